"""Documents, splits, tokens and rows, on small files made here and the demo tokenizer."""

import copy
import gzip
import json
import time
from threading import Thread

import datasets
import numpy as np
import pytest
import zstandard
from transformers import AutoTokenizer

from src import data, sources
from src.data import OpenWebTextDataset, Rows, create_dataloader
from src.files import DEMO_LM, ROOT, data_name
from src.sources import DataError, Documents, Report, find_files, write_splits


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_LM)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "cache_root"))


TEXTS = [
    f"Document {i}:\n    returns the   {'very ' * (i % 7)}value {i * i}.\t你好 <|end_of_text|>"
    for i in range(200)
]


def write(path, texts=TEXTS):
    path.write_bytes(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts))
    return path


def stream_text(rows, tokenizer):
    ids = np.concatenate([b.input_ids[b.document >= 0].numpy() for b in rows.batches(7)])
    return tokenizer.decode(ids[ids != tokenizer.eos_token_id].tolist())


@pytest.mark.parametrize("chunking", ["pack", "words"])
def test_no_text_is_lost(tmp_path, tokenizer, chunking):
    rows = Rows(write(tmp_path / "a.jsonl"), tokenizer, 16, "all", chunking=chunking)
    assert stream_text(rows, tokenizer) == "".join(TEXTS)


def test_splits_are_disjoint_and_complete(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl")
    parts = [
        stream_text(Rows(path, tokenizer, 32, split), tokenizer)
        for split in ("train", "eval", "apply")
    ]
    assert sum(map(len, parts)) == len("".join(TEXTS))
    for text in TEXTS:
        assert sum(text in part for part in parts) == 1


def test_named_files_are_the_splits(tmp_path, tokenizer):
    for name in ("train", "eval", "apply"):
        write(tmp_path / f"{name}.jsonl", [f"this is {name}"])
    assert stream_text(Rows(tmp_path, tokenizer, 32, "eval"), tokenizer) == "this is eval"


def test_compressed_files_read_like_plain_ones(tmp_path, tokenizer):
    plain = write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    half = plain.read_bytes().index(b"\n", 3000) + 1
    frames = [
        zstandard.compress(plain.read_bytes()[:half]),
        zstandard.compress(plain.read_bytes()[half:]),
    ]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    texts = [
        stream_text(Rows(tmp_path / n, tokenizer, 32, "all"), tokenizer)
        for n in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")
    ]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_truncated_archive_is_not_taken_for_a_finished_one(tmp_path, tokenizer, compress):
    data = compress(write(tmp_path / "plain.jsonl").read_bytes())
    path = tmp_path / ("cut.jsonl.gz" if compress is gzip.compress else "cut.jsonl.zst")
    path.write_bytes(data[: len(data) - 40])
    with pytest.raises(DataError, match="1 of 1 files cannot be read to their end, first .*cut"):
        Rows(path, tokenizer, 32, "all")


def test_damaged_lines_are_skipped_counted_and_then_refused(tmp_path, tokenizer, capsys):
    path = write(tmp_path / "a.jsonl")
    path.write_bytes(path.read_bytes() + b'{"text": \n[1]\n{"text": 3}\n\xff\xfe\n{"text": " "}\n')
    assert stream_text(Rows(path, tokenizer, 32, "all", max_bad_frac=0.1), tokenizer) == "".join(
        TEXTS
    )
    said = capsys.readouterr().out
    for reason in ("not JSON", "not an object", "text is not a string", "not UTF-8", "empty"):
        assert f"1 {reason}" in said
    with pytest.raises(DataError, match=r"first at .*a\.jsonl:201 \(not JSON\)"):
        Rows(path, tokenizer, 16, "all", max_bad_frac=0.001, text_key="text", max_tokens=10**6)


def test_a_wrong_key_lists_the_keys_there_are(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no line has the text key 'content'; the first has text"):
        Rows(write(tmp_path / "a.jsonl"), tokenizer, 32, text_key="content")


def test_missing_and_empty_sources_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError):
        find_files(tmp_path / "nothing")
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(DataError, match=r"found 1 \.csv"):
        find_files(tmp_path)


def test_mask_leaves_out_specials_first_position_and_padding(tmp_path, tokenizer):
    batch = next(
        Rows(write(tmp_path / "a.jsonl", ["a b c", "d e"]), tokenizer, 32, "all").batches(1)
    )
    ids, mask = batch.input_ids[0], batch.mask[0]
    assert ids[0] == tokenizer.bos_token_id and not mask[0]
    assert (
        not mask[ids == tokenizer.eos_token_id].any()
        and not mask[ids == tokenizer.pad_token_id].any()
    )
    assert tokenizer.decode(ids[mask].tolist()) == "a b cd e"
    assert batch.document[0][mask].tolist() == [0, 0, 0, 1, 1]


def test_order_is_a_function_of_seed_and_epoch(tmp_path, tokenizer):
    rows = Rows(write(tmp_path / "a.jsonl"), tokenizer, 16, "all")
    assert np.array_equal(rows.order(1, 2), rows.order(1, 2)) and not np.array_equal(
        rows.order(1, 2), rows.order(1, 3)
    )
    assert sorted(rows.order(1, 2)) == list(range(len(rows)))


def test_limits_count_rows_and_tokens(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl")
    assert len(Rows(path, tokenizer, 16, "all", max_samples=5)) == 5
    assert len(Rows(path, tokenizer, 16, "all", max_tokens=31)) == 3
    with pytest.raises(ValueError, match="max_samples 0"):
        Rows(path, tokenizer, 16, max_samples=0)


def test_the_documented_data_set_gives_ids_and_attention_mask(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl")
    ids, attention = OpenWebTextDataset(str(tmp_path), tokenizer, 16)[-1]
    assert ids.shape == attention.shape == (16,)
    assert torch_equal(attention, ids != tokenizer.pad_token_id)
    batch_ids, _ = next(iter(create_dataloader(str(tmp_path), tokenizer, 4, 16)))
    assert batch_ids.shape == (4, 16)


def torch_equal(a, b):
    return a.bool().tolist() == b.bool().tolist()


def test_download_writes_three_disjoint_splits_up_to_its_size(tmp_path):
    texts = [f"text number {i} " + "x" * 120 for i in range(200)] + ["short"]
    source = tmp_path / "source.jsonl"
    source.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    counts = write_splits(str(source), tmp_path / "out", 10**9)
    found = {
        name: [json.loads(line)["text"] for line in (tmp_path / "out" / f"{name}.jsonl").open()]
        for name in ("train", "eval", "apply")
    }
    assert {name: len(t) for name, t in found.items()} == counts and sorted(
        sum(found.values(), [])
    ) == sorted(texts[:-1])
    assert sum(write_splits(str(source), tmp_path / "small", 5000).values()) < 60
    source.write_text(json.dumps({"text": "y" * 200}))
    with pytest.raises(DataError, match="too few"):
        write_splits(str(source), tmp_path / "none", 1000)
    assert not list((tmp_path / "none").iterdir())


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/openwebtext2/", "openwebtext2"),
        ("x/train.jsonl.gz", "train"),
        ("x/*.jsonl", "x"),
        ("*.jsonl", "data"),
        ("owner/name:part", "name_part"),
        ("..", "data"),
    ],
)
def test_a_source_has_a_name_for_titles(source, name):
    assert data_name(source) == name


class Killed(BaseException):
    """Stands for SIGKILL: nothing in src catches it."""


def killed_after(monkeypatch, texts):
    """The process ends when so many texts were read; progress is saved after each batch."""
    original, seen = sources.in_split, []

    def counted(*args):
        seen.append(1)
        if len(seen) > texts:
            raise Killed
        return original(*args)

    monkeypatch.setattr(sources, "in_split", counted)
    monkeypatch.setattr(data, "SAVE_SECONDS", 0)
    monkeypatch.setattr(sources, "SAVE_SECONDS", 0)
    return seen


def same_rows(one, two):
    return (
        np.array_equal(one.tokens, two.tokens)
        and np.array_equal(one.documents, two.documents)
        and np.array_equal(one.cuts, two.cuts)
    )


def parquet(folder, texts, key="text", files=3):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        datasets.Dataset.from_list([{key: text} for text in texts[i::files]]).to_parquet(
            folder / f"part-{i}.parquet"
        )
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """owner/name on a stand-in for the hub: a folder of parquet, streamed as any other data set. Returns its folder and what was read."""
    real, state = (
        datasets.load_dataset,
        {"folder": parquet(tmp_path / "there", TEXTS * 5), "read": 0, "breaks": None},
    )

    def stand_in(name, config=None, **how):
        if name == "parquet":
            return real(name, **how)
        assert (name, config) == ("owner/name", None)
        rows = real(str(state["folder"]), **how)

        def watched(record):
            state["read"] += 1
            if state["breaks"] is not None and state["read"] > state["breaks"]:
                raise ConnectionError("the line is cut")
            return record

        return rows.map(watched)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return state


@pytest.mark.parametrize("chunking", ["pack", "words"])
@pytest.mark.parametrize("kind", ["a.jsonl", "folder of parquet", "hub"])
def test_a_killed_preparation_goes_on_where_it_was_and_ends_with_the_same_rows(
    tmp_path, tokenizer, monkeypatch, capsys, hub, kind, chunking
):
    source = {
        "a.jsonl": tmp_path / "a.jsonl",
        "folder of parquet": hub["folder"],
        "hub": "owner/name",
    }[kind]
    if kind == "a.jsonl":
        write(source, TEXTS * 5)
        source.write_bytes(source.read_bytes().replace(b"\n", b"\nnot JSON\n", 4))
    with monkeypatch.context() as patch:
        seen = killed_after(patch, 700)
        with pytest.raises(Killed):
            Rows(source, tokenizer, 16, chunking=chunking, max_tokens=10**6)
    capsys.readouterr()
    hub["read"] = 0
    with monkeypatch.context() as patch:
        seen = killed_after(patch, 10**9)
        rows = Rows(source, tokenizer, 16, chunking=chunking, max_tokens=10**6)
    assert "continuing after" in capsys.readouterr().out
    assert len(seen) < 700  # of 1,000 texts
    if kind == "hub":
        assert hub["read"] < 700
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "other"))
    assert same_rows(rows, Rows(source, tokenizer, 16, chunking=chunking, max_tokens=10**6))
    assert [path.name for path in (tmp_path / "cache_root" / "cache").iterdir()] == [
        rows.fingerprint
    ]


@pytest.mark.parametrize("chunking", ["pack", "words"])
def test_more_of_a_text_goes_on_from_what_is_there(
    tmp_path, tokenizer, monkeypatch, capsys, hub, chunking
):
    short = Rows("owner/name", tokenizer, 16, chunking=chunking, max_tokens=2000)
    before, hub["read"] = hub["read"], 0
    longer = Rows("owner/name", tokenizer, 16, chunking=chunking, max_tokens=10**5)
    assert "continuing after" in capsys.readouterr().out and 0 < hub["read"] <= 1000 - before
    assert np.array_equal(longer.tokens[: len(short.tokens)], short.tokens)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "other"))
    assert same_rows(longer, Rows("owner/name", tokenizer, 16, chunking=chunking, max_tokens=10**5))


def test_a_stream_that_breaks_off_keeps_what_was_read(tokenizer, monkeypatch, capsys, hub):
    monkeypatch.setattr(data, "SAVE_SECONDS", 0)
    hub["breaks"] = 800
    with pytest.raises(
        sources.StreamError, match="the hub stopped .*the same command continues from there"
    ) as told:
        Rows("owner/name", tokenizer, 16, "all", max_tokens=10**6)
    assert told.value.exit_code == 3
    hub |= {"breaks": None, "read": 0}
    rows = Rows("owner/name", tokenizer, 16, "all", max_tokens=10**6)
    assert "continuing after" in capsys.readouterr().out and hub["read"] < 800
    assert len(rows.documents) == 1000


def test_two_processes_that_need_the_same_text_prepare_it_once(tmp_path, tokenizer, capsys):
    path = write(tmp_path / "a.jsonl")
    before = Rows(path, tokenizer, 16)
    folder = tmp_path / "cache_root" / "cache" / before.fingerprint
    kept = folder.rename(tmp_path / "kept")
    work = folder.with_name(f".building-{folder.name}")
    work.mkdir()
    with sources.locked(work):  # as another process holds it
        Thread(
            target=lambda: (time.sleep(0.5), kept.rename(folder))
        ).start()  # which is done a moment later
        assert same_rows(Rows(path, tokenizer, 16), before)
    assert "waiting: " in capsys.readouterr().out


CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": f"A number, {i}."},
        ]
    }
    for i in range(30)
]


def test_conversations_go_through_the_models_template_and_its_special_tokens_do_not_count(
    tmp_path, tokenizer
):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, CHAT)))
    shared = [
        {
            "conversations": [
                {"from": "human", "value": c["messages"][0]["content"]},
                {"from": "gpt", "value": c["messages"][1]["content"]},
            ]
        }
        for c in CHAT
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, shared)))
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    a, b = (Rows(tmp_path / name, marked, 64, "all") for name in ("a.jsonl", "b.jsonl"))
    assert np.array_equal(a.tokens, b.tokens) and len(a.documents) == 30
    batch = next(a.batches(1))
    shown = marked.decode(batch.input_ids[0].tolist())
    assert shown.startswith(
        "<|begin_of_text|>user: What is 0?<|end_of_text|>assistant: A number, 0.<|end_of_text|>"
    )
    assert (
        not batch.mask[0][batch.input_ids[0] == marked.eos_token_id].any()
        and (batch.input_ids[0] == marked.bos_token_id).sum() == 1
    )
    assert (
        len(
            Rows(
                parquet(tmp_path / "p", [c["messages"] for c in CHAT], "messages"),
                marked,
                64,
                "all",
            ).documents
        )
        == 30
    )
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Rows(tmp_path / "a.jsonl", plain, 64, "all")


def test_what_is_no_conversation_is_skipped_and_counted(tmp_path, tokenizer, capsys):
    bad = [
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [3]},
        {"messages": "text"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, CHAT + bad)))
    assert len(Rows(tmp_path / "a.jsonl", tokenizer, 64, "all", max_bad_frac=0.5).documents) == 30
    assert "3 not a conversation, 1 no key 'text'" in capsys.readouterr().out


def test_a_killed_download_goes_on_and_ends_with_the_same_files(tmp_path, monkeypatch, hub):
    hub["folder"] = parquet(
        tmp_path / "long", [f"text number {i} " + "x" * 120 for i in range(300)]
    )
    with monkeypatch.context() as patch:
        killed_after(patch, 500)  # each text is asked for its split twice
        with pytest.raises(Killed):
            write_splits("owner/name", tmp_path / "out", 10**9)
    assert not (tmp_path / "out" / "train.jsonl").exists()
    hub["read"] = 0
    counts = write_splits("owner/name", tmp_path / "out", 10**9)
    assert sum(counts.values()) == 300 and hub["read"] < 250
    write_splits("owner/name", tmp_path / "straight", 10**9)
    for name in ("train", "eval", "apply"):
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == (
            tmp_path / "straight" / f"{name}.jsonl"
        ).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "apply.jsonl",
        "eval.jsonl",
        "train.jsonl",
    ]


def test_the_download_script_names_a_set_without_code_and_passes_its_arguments():
    script = (ROOT / "scripts" / "download_data.sh").read_text()
    assert "python -m src.sources" in script and "openwebtext" not in script.lower().replace(
        "openwebtext-like", ""
    )


def test_files_named_as_splits_that_are_none_and_splits_that_are_elsewhere_are_said(
    tmp_path, capsys
):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} {i} " * 9}) + "\n" for i in range(40))
        )
    list(Documents(str(tmp_path), "train", Report("text", 0.5)))
    assert "validation.jsonl is not used as a split" in capsys.readouterr().out
    list(Documents(str(tmp_path / "train.jsonl"), "train", Report("text", 0.5)))
    assert not capsys.readouterr().out
