"""Documents, splits, tokens and rows, on small files made here and the demo tokenizer."""

import gzip
import json

import numpy as np
import pytest
import zstandard
from transformers import AutoTokenizer

from src.data import DataError, OpenWebTextDataset, Rows, create_dataloader, find_files, write_splits
from src.files import DEMO_LM, data_name


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_LM)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "cache_root"))


TEXTS = [f"Document {i}:\n    returns the   {'very ' * (i % 7)}value {i * i}.\t你好 <|end_of_text|>" for i in range(200)]


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
    parts = [stream_text(Rows(path, tokenizer, 32, split), tokenizer) for split in ("train", "eval", "apply")]
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
    frames = [zstandard.compress(plain.read_bytes()[:half]), zstandard.compress(plain.read_bytes()[half:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    texts = [stream_text(Rows(tmp_path / n, tokenizer, 32, "all"), tokenizer) for n in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")]
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
    assert stream_text(Rows(path, tokenizer, 32, "all", max_bad_frac=0.1), tokenizer) == "".join(TEXTS)
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
    batch = next(Rows(write(tmp_path / "a.jsonl", ["a b c", "d e"]), tokenizer, 32, "all").batches(1))
    ids, mask = batch.input_ids[0], batch.mask[0]
    assert ids[0] == tokenizer.bos_token_id and not mask[0]
    assert not mask[ids == tokenizer.eos_token_id].any() and not mask[ids == tokenizer.pad_token_id].any()
    assert tokenizer.decode(ids[mask].tolist()) == "a b cd e"
    assert batch.document[0][mask].tolist() == [0, 0, 0, 1, 1]


def test_order_is_a_function_of_seed_and_epoch(tmp_path, tokenizer):
    rows = Rows(write(tmp_path / "a.jsonl"), tokenizer, 16, "all")
    assert np.array_equal(rows.order(1, 2), rows.order(1, 2)) and not np.array_equal(rows.order(1, 2), rows.order(1, 3))
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
    found = {name: [json.loads(line)["text"] for line in (tmp_path / "out" / f"{name}.jsonl").open()] for name in ("train", "eval", "apply")}
    assert {name: len(t) for name, t in found.items()} == counts and sorted(sum(found.values(), [])) == sorted(texts[:-1])
    assert sum(write_splits(str(source), tmp_path / "small", 5000).values()) < 60
    source.write_text(json.dumps({"text": "y" * 200}))
    with pytest.raises(DataError, match="too few"):
        write_splits(str(source), tmp_path / "none", 1000)
    assert not list((tmp_path / "none").iterdir())


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/openwebtext2/", "openwebtext2"), ("x/train.jsonl.gz", "train"), ("x/*.jsonl", "x"), ("*.jsonl", "data"),
        ("owner/name:part", "name_part"), ("..", "data"),
    ],
)
def test_a_source_has_a_name_for_titles(source, name):
    assert data_name(source) == name
