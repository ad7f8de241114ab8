"""Faults and bad inputs: nothing is lost, and one line says so, with the right exit code.

Related: kills and damaged states of a training in test_resume.py, bad text in test_data.py,
endpoints in test_interpreter.py, hostile input in test_security.py. docs/faults.md lists the faults
with their tests.
"""

import ast
import errno
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from src import checkpoint, data, files, lm, sources
from src.applier import Applier
from src.config import run_stage
from src.data import Rows
from src.device import pick_device
from src.evaluator import Evaluator
from src.model import build
from src.sae import BatchInfo
from src.sae_training import SAETraining
from src.sources import DataError, Documents, Report
from src.trainer import Trainer
from src.zoo import ZOO

SHAPE = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
STAGES = {
    "train": lambda cfg: Trainer(cfg).run(),
    "evaluate": lambda cfg: Evaluator(cfg).run(),
    "apply": lambda cfg: Applier(cfg).run(),
}


def save_lm(folder, hidden=32, layers=4):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(files.DEMO_LM)
    sizes = SHAPE | {"hidden_size": hidden, "num_hidden_layers": layers}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a language model, a text and a trained TopK."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(folder / "data"))
        save_lm(folder / "lm")
        sentence = "Return the {}th of {} values, or raise ValueError. "
        lines = [json.dumps({"text": sentence.format(i, i * 7) * 5}) for i in range(80)]
        (folder / "text.jsonl").write_text("\n".join(lines))
        assert run(folder, "train") == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(files.DEMO_LM)


def run(home, stage, *more, out=None):
    """Exit code of a stage on the fixture's files; options in `more` win."""
    argv = ["--model_path", str(home / "lm"), "--data_path", str(home / "text.jsonl")]
    argv += ["--output_dir", str(out or home / "out")]
    argv += "--dtype float32 --max_length 32 --batch_size 4 --max_samples 24".split()
    if stage == "train":
        argv += ["--latent_size", "64", "--k", "4"]
    try:
        return run_stage(stage, STAGES[stage], [*argv, *map(str, more)])
    except SystemExit as stop:
        return stop.code


def the_error(capsys):
    """The one line a stage ended with."""
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(lines) == 1
    return lines[0].split(": error: ", 1)[1]


def sae(home):
    return home / "out" / "SAE_models" / "TopK_text.pt"


# ------------------------------------------------------------------------ what a training writes


TABLES = [
    {"a": {"b": {"c": [1, 2.5, None]}, "d": "\u2028 \U0001f600"}, "e": {}, "f": []},
    {"a": {1: "a key that is no text"}, "b": {"c": True}},
    {},
    ["a", {"b": 1}],
    "text",
]


@pytest.mark.parametrize("table", TABLES)
def test_json_in_pieces_is_the_json_of_the_whole(table, tmp_path):
    pieces = list(files.json_pieces(table))
    whole = json.dumps(table, ensure_ascii=False)
    assert b"".join(pieces) == whole.encode()
    for name in ("a.json", "a.json.gz"):
        path = files.save_json(table, tmp_path / name, indent=None)
        assert files.load_json(path) == json.loads(whole)
    files.save_json({"a": {"b": "\ud800"}}, tmp_path / "a.json", indent=None)
    assert files.load_json(tmp_path / "a.json") == {"a": {"b": "\ud800"}}
    with pytest.raises(ValueError, match="a b is no finite number"):
        files.save_json({"a": {"b": math.inf}}, tmp_path / "b.json", indent=None)
    assert not (tmp_path / "b.json").exists()


class Killed(BaseException):
    """Stands for SIGKILL."""


def kill(*_, **__):
    raise Killed


def lines_of(out):
    return [
        {k: v for k, v in json.loads(line).items() if "tokens_per_s" not in k}
        for line in (out / "runs" / "t" / "metrics.jsonl").open()
    ]


def test_a_full_disk_under_the_metrics_is_named_keeps_whole_lines_and_the_run_continues(
    home, tmp_path, monkeypatch, capsys
):
    class Full(io.FileIO):
        def write(self, piece):
            if self.tell() > 500:
                super().write(piece[:7])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(piece)

    def open_full(path, *_, **__):
        return open(path, "a+") if Path(path).name == "lock" else Full(path, "a")

    with monkeypatch.context() as patch:
        patch.setattr(files, "open_to_append", open_full)
        assert run(home, "train", "--tag", "t", "--save_every", "1", out=tmp_path) == 2
    assert "metrics.jsonl (No space left on device)" in the_error(capsys)
    assert lines_of(tmp_path)
    undisturbed = tmp_path / "straight"
    assert run(home, "train", "--tag", "t", out=tmp_path) == 0
    assert run(home, "train", "--tag", "t", out=undisturbed) == 0
    assert lines_of(tmp_path) == lines_of(undisturbed)
    weights, expected = (
        torch.load(out / "SAE_models" / "TopK_text_t.pt") for out in (tmp_path, undisturbed)
    )
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


def test_a_run_killed_after_its_last_step_takes_no_further_one_and_a_finished_run_none(
    home, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", kill)
        with pytest.raises(Killed):
            run(home, "train", "--tag", "t", "--save_every", "1", out=tmp_path)
    undisturbed = tmp_path / "straight"
    assert run(home, "train", "--tag", "t", out=tmp_path) == 0
    assert run(home, "train", "--tag", "t", out=undisturbed) == 0
    assert lines_of(tmp_path) == lines_of(undisturbed)
    assert lines_of(tmp_path)[-1]["step"] == 6
    monkeypatch.setattr(SAETraining, "step", kill)
    assert run(home, "train", "--tag", "t", out=tmp_path) == 0
    assert "already trained" in capsys.readouterr().out


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_all_that_is_written_has_the_permissions_the_umask_leaves(
    home, tmp_path, monkeypatch, mask
):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    finish = Trainer._finish

    def copy_states_and_finish(trainer, *args):
        shutil.copytree(trainer.states, tmp_path / "states")
        return finish(trainer, *args)

    monkeypatch.setattr(Trainer, "_finish", copy_states_and_finish)
    out = tmp_path / "out"
    trained = out / "SAE_models" / "TopK_text_t.pt"
    before = os.umask(mask)
    try:
        assert run(home, "train", "--tag", "t", "--save_every", "1", out=out) == 0
        assert run(home, "apply", "--SAE_path", trained, "--act_threshold", "0", out=out) == 0
    finally:
        os.umask(before)
    paths = [path for path in tmp_path.rglob("*") if path != tmp_path / "states"]
    suffixes = (".pt", ".json", ".jsonl", ".npy", ".bin")
    assert sum(path.suffix in suffixes for path in paths) > 10
    for path in paths:
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == expected, path


def test_a_run_folder_behind_a_link_is_followed(home, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "t").symlink_to(tmp_path / "disk")
    assert run(home, "train", "--tag", "t", out=tmp_path / "out") == 0
    assert (tmp_path / "disk" / "metrics.jsonl").stat().st_size


@pytest.mark.parametrize(
    "more",
    [
        ["--k", "65"],
        ["--k", "0"],
        ["--lr", "0"],
        ["--lr", "nan"],
        ["--lr", "inf"],
        ["--latent_size", "0"],
        ["--batch_size", "0"],
        ["--max_length", "1"],
        ["--layer", "0"],
        ["--num_epochs", "0"],
        ["--max_samples", "0"],
        ["--seed", "-1"],
        ["--nonsense", "1"],
        ["--k", "many"],
        ["--device", "tpu"],
    ],
)
def test_invalid_values_fail_before_loading_the_lm(home, monkeypatch, capsys, more):
    monkeypatch.setattr(lm, "get_language_model", lambda *_: pytest.fail("loaded"))
    assert run(home, "train", "--tag", "bad", *more) == 2 and more[0] in the_error(capsys)


def test_fewer_rows_than_a_batch_are_trained_on_and_no_countable_token_is_an_error(
    home, tmp_path, capsys
):
    assert run(home, "train", "--batch_size", "64", "--max_samples", "3", out=tmp_path) == 0
    recipe = checkpoint.read_recipe(tmp_path / "SAE_models" / "TopK_text.pt")
    assert recipe["tokens"] > 60 and recipe["final"]["step"] == 1
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "a"}))
    bare = AutoTokenizer.from_pretrained(
        files.DEMO_LM, bos_token=None, eos_token=None, pad_token=None
    )
    shutil.copytree(home / "lm", tmp_path / "lm")
    # Without a BOS token the only token of the text is the attention sink, which does not count.
    bare.save_pretrained(tmp_path / "lm")
    paths = ["--data_path", tmp_path / "one.jsonl", "--model_path", tmp_path / "lm"]
    assert run(home, "train", *paths, "--split", "all", "--tag", "one", out=tmp_path) == 2
    assert "no counted token" in the_error(capsys)
    assert not list((tmp_path / "SAE_models").glob("*one*"))


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_a_last_step_without_counted_tokens_ends_no_run(home, tmp_path, seed):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' * 100)
    sizes = ["--max_length", "2", "--batch_size", "1", "--max_samples", "20", "--seed", seed]
    path = ["--data_path", tmp_path / "t.jsonl", "--split", "all", "--tag", "t"]
    assert run(home, "train", *path, *sizes, out=tmp_path) == 0
    lines = (tmp_path / "runs" / "t" / "metrics.jsonl").read_text().splitlines()
    assert lines and all("loss" in json.loads(line) for line in lines)
    (path,) = (tmp_path / "SAE_models").glob("*.json")
    assert math.isfinite(json.loads(path.read_text())["final"]["loss"])


@pytest.mark.parametrize("name", ZOO)
def test_states_without_variance_give_finite_losses_and_gradients(name):
    torch.manual_seed(0)
    model = build(name, 32, 8, {"latent_size": 64, "k": 4})
    hidden = {
        site: torch.ones(16, 32) if site % 2 else torch.zeros(16, 32) for site in model.sites()
    }
    model.warm_start(model.gather(hidden))
    p = model.autoencode(model.gather(hidden), BatchInfo(token_keys=torch.arange(16)))
    loss = sum(model.loss(p).values())
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("where", ["init", "log", "import"])
def test_an_optional_service_that_fails_stops_no_training(
    home, tmp_path, monkeypatch, capsys, where
):
    def fails(*_, **__):
        raise ConnectionError(f"the network is down for {os.environ['WANDB_API_KEY']}")

    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    wandb_run = types.SimpleNamespace(log=fails)
    fake = types.SimpleNamespace(init=fails if where == "init" else lambda **_: wandb_run)
    monkeypatch.setitem(sys.modules, "wandb", None if where == "import" else fake)
    assert run(home, "train", "--use_wandb", "1", out=tmp_path) == 0
    assert (tmp_path / "SAE_models" / "TopK_text.pt").exists()
    printed = capsys.readouterr()
    assert "metrics.jsonl has" in printed.out
    assert "canary" not in printed.out + printed.err


def test_a_file_killed_while_it_is_written_keeps_its_old_content(tmp_path):
    path = files.save_json({"a": 1}, tmp_path / "x.json")
    with pytest.raises(Killed):
        files.write_atomic(path, lambda file: (file.write(b"half"), kill()))
    with pytest.raises(ValueError):
        files.save_json({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_results_go_to_bare_odd_and_existing_names_and_impossible_ones_are_errors(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("x.json", "a b/\u00fc \u6a21.json", "x.json"):
        assert json.loads(Path(files.save_json([name], name)).read_text()) == [name]
    for name in ("y" * 300 + ".json", "x.json/y.json"):
        with pytest.raises(OSError):
            files.save_json([1], name)


# ----------------------------------------------------------------------------------------- text


def count(path, tokenizer, **options):
    """(number of documents, tokens of the whole stream)"""
    rows = Rows(path, tokenizer, 32, "all", **options)
    return len(rows.documents), rows.tokens.tolist()


def numbered_texts(n):
    return [f"Document {i}: the value of {i * i} is \u6a21 \U0001f98a." for i in range(n)]


def write(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def broken_line(line, draw):
    cut = draw.randrange(1, len(line) - 1)
    return draw.choice(
        [
            line[:cut],
            line[:cut] + b"\xff" + line[cut:],
            b"[" + line + b"]",
            b"17",
            b'{"text": 5}',
            b'{"title": "x"}',
            b"junk",
        ]
    )


def test_one_line_in_a_hundred_damaged_loses_exactly_those_lines(tmp_path, tokenizer):
    draw = random.Random(0)
    texts = numbered_texts(5000)
    bad = set(draw.sample(range(5000), 50))
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for i, text in enumerate(texts):
            line = json.dumps({"text": text}).encode()
            file.write((broken_line(line, draw) if i in bad else line) + b"\n")
    with pytest.raises(DataError, match=r"50 of 5000 lines are damaged .*first at .*a\.jsonl:\d+"):
        Rows(path, tokenizer, 32, "all", max_bad_frac=0.009)
    documents = list(Documents(str(path), "all", Report("text", 0.01)))
    assert documents == [text for i, text in enumerate(texts) if i not in bad]
    assert count(path, tokenizer)[0] == 4950


def test_byte_order_marks_line_ends_nul_and_separators_inside_a_text_are_read(tmp_path, tokenizer):
    plain = numbered_texts(3)
    special = ["nul \0 inside", "line\u2028separator \u0085 next", "  spaces  ", "half \ud800"]
    lines = [json.dumps({"text": text}).encode() for text in [*plain, *special]]
    lines.append('{"text": "raw\u2028separator"}'.encode())
    content = b"\r\n".join([lines[0], b"", b"   ", *lines[1:]])  # and no line end at the end
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + content)
    documents = list(Documents(str(path), "all", Report("text", 0.0)))
    assert documents == [*plain, *special[:3], "half ?", "raw\u2028separator"]
    assert count(path, tokenizer)[0] == 8


@pytest.mark.parametrize("chunking", ["pack", "words"])
def test_one_endless_line_is_tokenised_in_pieces_without_loss(
    tmp_path, tokenizer, monkeypatch, chunking
):
    text = " ".join(numbered_texts(60))
    path = write(tmp_path / "a.jsonl", ["first", text, "last"])
    monkeypatch.setattr(data, "PIECE_CHARS", 100)
    encode = type(tokenizer).__call__
    sizes = []

    def counted(self, pieces, **options):
        sizes.append(sum(map(len, pieces)))
        return encode(self, pieces, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    n, tokens = count(path, tokenizer, chunking=chunking)
    assert n == 3
    assert len(sizes) > 3
    assert max(sizes) < 2000 < len(text)
    ids = [token for token in tokens if token != tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == "first" + text + "last"


def make_unusable(kind, folder):
    folder.mkdir()
    if kind == "empty file":
        (folder / "a.jsonl").write_text("")
    elif kind == "hidden only":
        write(folder / ".a.jsonl", ["x"])
    elif kind == "no text":
        (folder / "a.csv").write_text("x")
    elif kind == "blank":
        write(folder / "a.jsonl", ["  \n"])
    elif kind == "nulls":
        write(folder / "a.jsonl", [None, 3, {"x": "y"}, ["z"]])
    elif kind == "dangling":
        (folder / "a.jsonl").symlink_to(folder / "nowhere")
    elif kind.startswith("parquet"):
        (folder / "a.parquet").write_bytes(b"PAR1 cut" if kind == "parquet" else b"")


@pytest.mark.parametrize(
    "kind",
    [
        "nothing",
        "empty file",
        "hidden only",
        "no text",
        "blank",
        "nulls",
        "dangling",
        "parquet",
        "parquet, empty",
    ],
)
def test_a_source_without_usable_text_is_exit_3_and_named(home, tmp_path, capsys, kind):
    make_unusable(kind, tmp_path / "src")
    assert run(home, "train", "--data_path", tmp_path / "src", out=tmp_path / "out") == 3
    assert str(tmp_path / "src") in the_error(capsys)
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_a_damaged_file_among_others_is_refused_unless_it_is_accepted(tmp_path, tokenizer):
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", numbered_texts(200))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 cut")
    message = r"1 of 4 files cannot be read to their end, first .*bad\.parquet"
    with pytest.raises(DataError, match=message):
        Rows(tmp_path, tokenizer, 32, "all")
    assert count(tmp_path, tokenizer, max_bad_frac=0.25)[0] == 600
    # The tokens are cached now, but they were made when the damage was accepted.
    with pytest.raises(DataError, match=r"1 of 4 files"):
        Rows(tmp_path, tokenizer, 32, "all")


def test_links_in_a_circle_and_files_that_vanish_are_named(home, tmp_path, capsys):
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    assert run(home, "train", "--data_path", loop, "--tag", "x") == 2
    assert "loop.jsonl" in the_error(capsys)
    loop.unlink()
    (tmp_path / "again").symlink_to(tmp_path)  # a folder in a circle is read once
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", numbered_texts(2))
    documents = iter(Documents(str(tmp_path), "all", Report("text", 0.0)))
    assert [next(documents) for _ in range(2)] == numbered_texts(2)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jsonl"):
        list(documents)


def test_a_file_that_may_not_be_read_is_named(home, tmp_path, monkeypatch, capsys):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(sources, "_lines", refused)  # root may read everything
    assert run(home, "train", "--tag", "x") == 2
    message = the_error(capsys)
    assert "Permission denied" in message
    assert "text.jsonl" in message


def test_the_order_files_were_made_in_changes_nothing(tmp_path, tokenizer):
    for folder, names in (("one", "abc"), ("two", "cba")):
        (tmp_path / folder).mkdir()
        for name in names:
            write(tmp_path / folder / f"{name}.jsonl", [f"text {name} of them"])
    assert count(tmp_path / "one", tokenizer) == count(tmp_path / "two", tokenizer)


def test_a_number_of_thousands_of_digits_is_one_line_wherever_it_stands(home, tmp_path, capsys):
    number = "9" * 6000
    options = tmp_path / "options.json"
    options.write_text(f'{{"k": {number}}}')
    assert run(home, "train", "--config", options, "--tag", "x", out=tmp_path) == 2
    assert str(options) in the_error(capsys)
    copy = shutil.copytree(home / "out" / "SAE_models", tmp_path / "SAE_models") / sae(home).name
    recipe = copy.with_suffix(".json")
    recipe.write_text(recipe.read_text().replace("{", f'{{"x": {number},', 1))
    assert run(home, "evaluate", "--SAE_path", copy, "--metric", "NormMSE", out=tmp_path) == 3
    assert str(recipe) in the_error(capsys)


@pytest.mark.parametrize("text", ["", "x"])
def test_a_text_of_no_or_one_counted_token_is_one_clear_line(home, tmp_path, capsys, text):
    """One token after BOS has nothing to be compared with."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": text}))
    read_all = ["--data_path", path, "--split", "all"]
    of_home = [*read_all, "--SAE_path", sae(home)]
    what = "only one token counts" if text else "no usable text|empty"
    for epochs in (1, 3):
        training = [*read_all, "--num_epochs", epochs, "--tag", f"one{epochs}"]
        assert run(home, "train", *training, out=tmp_path) in (2, 3)
        assert re.search(what, the_error(capsys))
    assert not list((tmp_path / "SAE_models").glob("*.pt"))
    assert run(home, "evaluate", *of_home, "--metric", "NormMSE", "KLDiv", out=tmp_path) in (2, 3)
    assert re.search(what, the_error(capsys))
    code = run(home, "apply", *of_home, out=tmp_path)
    if text:  # its contexts are fewer than a latent needs
        assert code == 0 and "nothing kept" in capsys.readouterr().out
    else:
        assert code == 3 and re.search(what, the_error(capsys))


def test_a_training_whose_states_overflow_names_the_site(home, tmp_path, capsys):
    tokenizer, model = lm.get_language_model(str(home / "lm"), "cpu", "float32")
    lm.blocks(model)[1].mlp.down_proj.weight.data.mul_(1e38)
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    overflowing = ["--model_path", tmp_path / "lm", "--layer", 3, "--dtype", "float16"]
    assert run(home, "train", *overflowing, out=tmp_path / "out") == 2
    message = the_error(capsys)
    assert "the states at site 3 are not finite" in message and "--dtype bfloat16" in message
    assert "--lr" not in message


UNREACHABLE = ConnectionError("Couldn't reach 'owner/name' on the Hub")
SCRIPT = RuntimeError("Dataset scripts are no longer supported, but found name.py")


@pytest.mark.parametrize(
    "error, reason",
    [
        (UNREACHABLE, "the hub cannot be reached"),
        (SCRIPT, "scripts are no longer supported, but found name.py"),
    ],
)
def test_a_data_set_the_hub_does_not_give_is_one_line(home, monkeypatch, capsys, error, reason):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("src.hub.reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", fails)
    assert run(home, "train", "--data_path", "owner/name", "--tag", "x") == 3
    message = the_error(capsys)
    assert reason in message
    assert ("JSONL" in message) == (error is SCRIPT)


def test_a_tokenizer_without_special_tokens_works(tmp_path):
    bare = AutoTokenizer.from_pretrained(
        files.DEMO_LM, bos_token=None, eos_token=None, pad_token=None
    )
    rows = Rows(write(tmp_path / "a.jsonl", numbered_texts(9)), bare, 16, "all")
    assert bare.decode(rows.tokens.tolist()) == "".join(numbered_texts(9))
    mask = next(rows.batches(4)).mask
    assert mask[:, 1:].all()
    assert not mask[:, 0].any()


def test_cached_tokens_of_other_text_tokenizers_or_lengths_are_not_taken(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", numbered_texts(9))
    text = "".join(numbered_texts(9))

    def decoded(tokenizer, length):
        rows = Rows(path, tokenizer, length, "all", chunking="words")
        assert np.diff(rows.cuts).max() < length
        return rows.fingerprint, tokenizer.decode(rows.tokens.tolist())

    other = AutoTokenizer.from_pretrained(files.DEMO_LM)
    other.add_tokens(["value"])
    results = [decoded(tokenizer, 16), decoded(other, 16), decoded(tokenizer, 8)]
    assert [result for _, result in results] == [text] * 3
    # The same number of bytes, so that only the time of the change differs.
    write(path, [text.replace("value", "words") for text in numbered_texts(9)])
    results.append(decoded(tokenizer, 16))
    assert results[3][1] == text.replace("value", "words")
    assert len({fingerprint for fingerprint, _ in results}) == 4
    assert decoded(tokenizer, 16) == results[3]


def test_a_damaged_token_cache_is_noticed_and_made_again_and_a_killed_one_is_not_there(
    tmp_path, tokenizer, monkeypatch, capsys
):
    cache = data.data_dir() / "cache"
    path = write(tmp_path / "a.jsonl", numbered_texts(99))
    with monkeypatch.context() as patch:
        patch.setattr(data, "save_json", kill)
        with pytest.raises(Killed):
            count(path, tokenizer)
    assert all(path.name.startswith(".") for path in cache.iterdir())
    abandoned = cache / ".building-old"
    abandoned.mkdir()
    os.utime(abandoned, (1e9, 1e9))  # left by a process that was killed long ago
    expected = count(path, tokenizer)
    (folder,) = cache.iterdir()
    for name in ("tokens.bin", "documents.npy", "chunks.npy", "report.json", "manifest.json"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        assert count(path, tokenizer) == expected, name
        assert "the token cache is damaged" in capsys.readouterr().out, name


def test_a_cache_that_does_not_fit_or_cannot_be_written_says_what_to_set(home, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(data.np, "save", full)
        assert run(home, "train", "--tag", "x") == 2
    assert "make room or set DATA_DIR" in the_error(capsys)
    with monkeypatch.context() as patch:
        grown = OSError(errno.EFBIG, "File too large")
        patch.setattr(data.StreamBuilder, "_append", lambda *_: (_ for _ in ()).throw(grown))
        assert run(home, "train", "--tag", "x") == 2
    assert "make room or set DATA_DIR" in the_error(capsys)
    assert all(path.name.startswith(".") for path in (data.data_dir() / "cache").iterdir())
    (home / "file").write_text("")
    monkeypatch.setenv("DATA_DIR", str(home / "file"))
    assert run(home, "train", "--tag", "x") == 2
    assert "set DATA_DIR" in the_error(capsys)


# ----------------------------------------------------------------------- language models, SAEs


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    "name, damage, reason",
    [
        ("model.safetensors", Path.unlink, "no file named model.safetensors"),
        ("model.safetensors", lambda p: cut(p, 0), "header"),
        ("model.safetensors", lambda p: cut(p, -100), "not fully covered"),
        ("model.safetensors", lambda p: p.write_bytes(b"\xff" * 900), "header"),
        ("config.json", lambda p: cut(p, 20), "not a valid JSON"),
        ("tokenizer.json", lambda p: cut(p, 1), "not a complete model"),
    ],
)
def test_a_damaged_language_model_is_one_line(home, tmp_path, capsys, name, damage, reason):
    shutil.copytree(home / "lm", tmp_path / "lm")
    damage(tmp_path / "lm" / name)
    assert run(home, "train", "--model_path", tmp_path / "lm", "--tag", "x") == 2
    message = the_error(capsys)
    assert "cannot load language model" in message
    assert reason in message


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers every request with `answer`: (status, headers, text).

    `received` lists the authorisation that each request sent.
    """
    import huggingface_hub.constants as constants

    state = types.SimpleNamespace(answer=(404, {}, ""), received=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, text = state.answer
            sent = str(self.headers.get("Authorization"))
            state.received.append(sent)
            body = text.replace("ECHO", sent).encode()
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value.replace("ECHO", sent))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield state
    server.shutdown()


@pytest.mark.parametrize(
    "status, code, reason",
    [
        (401, "GatedRepo", "gated"),
        (403, "GatedRepo", "gated"),
        (404, "RepoNotFound", "there is no owner/name on the hub"),
    ],
)
def test_gated_private_and_mistyped_models_are_told_apart_and_no_token_is_shown(
    home, hub, monkeypatch, capsys, status, code, reason
):
    token = "hf_canary0123456789"
    monkeypatch.setenv("HF_TOKEN", token)
    headers = {"X-Error-Code": code, "X-Error-Message": "you sent ECHO"}
    hub.answer = (status, headers, "you sent ECHO")
    assert run(home, "train", "--model_path", "owner/name", "--tag", "x", "--debug") == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("train.py: error: ")]
    assert reason in line
    assert "hf_canary" not in printed.out + printed.err
    assert any(token in sent for sent in hub.received)  # else there was nothing to hide


def test_a_language_model_whose_states_overflow_is_noticed_before_a_weight_changes(
    home, tmp_path, capsys
):
    model = LlamaForCausalLM.from_pretrained(home / "lm")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    shutil.copytree(home / "lm", tmp_path / "lm")
    model.save_pretrained(tmp_path / "lm")
    assert run(home, "train", "--model_path", tmp_path / "lm", "--tag", "x", out=tmp_path) == 2
    assert "not finite at step 0" in the_error(capsys)
    assert not list((tmp_path / "SAE_models").glob("*.pt"))


def test_an_sae_of_another_language_model_is_refused(home, tmp_path, capsys):
    for name, sizes in (("narrow", {"hidden": 16}), ("shallow", {"layers": 2})):
        save_lm(tmp_path / name, **sizes)
        assert run(home, "evaluate", "--SAE_path", sae(home), "--model_path", tmp_path / name) == 2
        assert "language model" in the_error(capsys)


def with_recipe(home, folder, change):
    recipe = json.loads(sae(home).with_suffix(".json").read_text())
    change(recipe)
    shutil.copy(sae(home), folder / "x.pt")
    (folder / "x.json").write_text(json.dumps(recipe))
    return folder / "x.pt"


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("config"),
        lambda r: r["config"].pop("hidden_size"),
        lambda r: r.update(config=[1]),
        lambda r: r.update(options=[1]),
        lambda r: r.update(model="Foo"),
        lambda r: r.update(model=3),
        lambda r: r.update(format_version=99),
        lambda r: r.update(format_version="x"),
        lambda r: r.update(title=None),
        lambda r: r["options"].update(max_length="x"),
        lambda r: r["options"].update(batch_size=[1]),
        lambda r: r["config"].update(hidden_size=64),
        lambda r: r["config"].update(k=10**9),
        lambda r: r["config"].update(latent_size="many"),
        lambda r: r.update(model_path=5),
        lambda r: r["options"].update(max_length=-1),
        lambda r: r.update(title="../../x"),
        lambda r: r.update(final=3),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(home, tmp_path, capsys, change):
    path, out = with_recipe(home, tmp_path, change), tmp_path / "out"
    argv = ["--SAE_path", str(path), "--output_dir", str(out)]
    assert run_stage("evaluate", STAGES["evaluate"], argv) == 2
    assert the_error(capsys)
    assert not out.exists()


def test_a_recipe_of_a_later_program_with_more_in_it_is_read(home, tmp_path):
    def change(recipe):
        recipe["future"] = 1
        recipe["options"]["later"] = 2
        recipe["config"].pop("n_layers", None)

    path = with_recipe(home, tmp_path, change)
    assert run(home, "evaluate", "--SAE_path", path, out=tmp_path / "out") == 0


def test_weights_of_other_shapes_are_named_with_both(home, tmp_path, capsys):
    weights = torch.load(sae(home), weights_only=True)
    weights["encoder.weight"] = weights["encoder.weight"][:32]
    path = with_recipe(home, tmp_path, lambda r: None)
    torch.save(weights, path)
    assert run(home, "evaluate", "--SAE_path", path) == 2
    message = the_error(capsys)
    assert "(32, 32)" in message and "(64, 32)" in message


# --------------------------------------------------------------------- terminals, names, scripts


def test_a_terminal_that_lacks_letters_ends_no_run(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert run_stage("train", lambda cfg: print("\u6a21\u578b \U0001f98a caf\u00e9"), []) == 0
    narrow.flush()
    printed = narrow.buffer.getvalue().decode("cp1252").strip()
    assert printed == r"\u6a21\u578b \U0001f98a caf" + "\u00e9"


def test_memory_that_ends_and_devices_nothing_was_written_for_are_one_line(capsys):
    def short(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    assert run_stage("evaluate", short, []) == 2
    assert "20.00 GiB.; lower --batch_size" in the_error(capsys)
    assert run_stage("evaluate", lambda cfg: pick_device("mps"), []) == 2
    assert "--device mps; known are auto, cpu, cuda" in the_error(capsys)
    with pytest.raises(RuntimeError):  # an error of the program itself keeps its traceback
        run_stage("evaluate", lambda cfg: torch.zeros(2) @ torch.zeros(3), [])


def test_data_sources_give_usable_names():
    for source, name in (
        ("data/openweb/", "openweb"),
        ("x/train.jsonl.gz", "train"),
        ("my data/*.jsonl", "my_data"),
        ("x/part-*.jsonl", "part-"),
        ("/", "data"),
        ("a b/c d.jsonl", "c_d"),
        ("*", "data"),
        ("owner/name:config", "name_config"),
        ("x/odd\nname\0.jsonl", "odd_name"),
    ):
        assert files.data_name(source) == name


def scripts_with(python, root):
    """A copy of the scripts whose environment has this shell script in place of Python."""
    shutil.copytree(files.ROOT / "scripts", root / "scripts")
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "installed").write_text("")
    (root / ".venv" / "bin" / "python").write_text(f"#!/bin/sh\nprintf '%s|' \"$@\"\n{python}\n")
    (root / ".venv" / "bin" / "python").chmod(0o755)
    (root / "constraints.txt").write_text("")
    os.utime(root / "constraints.txt", (1, 1))

    def run_script(name, *options, **environment):
        command = ["bash", f"scripts/{name}.sh", *options]
        known = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        return subprocess.run(
            command, cwd=root, capture_output=True, text=True, env=known | environment
        )

    return run_script


def test_wrappers_pass_paths_with_spaces_on_and_the_exit_code_back(tmp_path):
    run_script = scripts_with("exit 7", tmp_path / "a clone")
    for script in ("train_topk", "apply", "interpret", "steer"):
        done = run_script(script, "--data_path", "x y/z")
        assert done.returncode == 7 and "|--data_path|x y/z|" in done.stdout, (script, done.stderr)


def test_the_download_of_text_falls_back_and_says_what_is_there(tmp_path):
    python = 'case "$*" in *src.sources*) exit "$ENDS_WITH";; esac'
    run_script = scripts_with(python, tmp_path / "a clone")
    folder = tmp_path / "some data"
    text = {"DATA_DIR": str(folder), "ENDS_WITH": "3"}
    done = run_script("download_data", **text)
    assert (done.returncode, "make.py|text|" in done.stdout) == (0, True)
    # A named data set is not replaced by another, nor is one whose download can be continued.
    for environment, code in (({"DATASET": "a/b"}, 3), ({"ENDS_WITH": "4"}, 4)):
        done = run_script("download_data", **text | environment)
        assert (done.returncode, "make.py" in done.stdout) == (code, False)
    folder.mkdir()
    for name in ("train", "eval", "apply"):
        (folder / f"{name}.jsonl").write_text("mine")
    done = run_script("download_data", **text)
    assert (done.returncode, "src.sources" in done.stdout) == (0, False)
    assert f"the text is there: {folder / 'train.jsonl'}" in done.stdout
    done = run_script("download_data", **text | {"DATASET": "a/b", "ENDS_WITH": "0"})
    assert (done.returncode, "src.sources|a/b|" in done.stdout) == (0, True)


def names_of_tests(module):
    tree = ast.parse((files.ROOT / "tests" / f"{module}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def rows_of_faults(head):
    """The rows of the tables of the page that begin so, each as its cells."""
    page = (files.ROOT / "docs" / "faults.md").read_text()
    tables = re.findall(rf"^{re.escape(head)}.*\n\|---.*\n((?:\|.*\n?)+)", page, re.M)
    rows = [row.split("|")[1:-1] for table in tables for row in table.splitlines()]
    return [[cell.strip() for cell in row] for row in rows]


def test_every_row_of_the_page_of_faults_is_shown_by_tests_that_exist():
    rows = [(row[-1], row) for row in rows_of_faults("| fault |")]
    assert len(rows) > 70
    numbered = rows_of_faults("| number | fault |")
    assert [*dict.fromkeys(int(row[0]) for row in numbered)] == list(range(1, 30))
    rows += [(row[4], row) for row in numbered]
    for shown_by, row in rows:
        assert all(row), row
        tests = re.findall(r"(test_\w+)\.(test_\w+)", shown_by)
        assert tests or "campaign" in shown_by or row[-1] == "open", row
        for module, name in tests:
            assert name in names_of_tests(module), f"{module}.{name}"


STREAMS_THAT_FAIL = [">&-", "2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&- 2>&-"]


@pytest.mark.parametrize("streams", STREAMS_THAT_FAIL)
def test_streams_that_are_closed_or_full_end_no_stage(streams):
    stage = (
        "import sys\nfrom src.config import run_stage\n"
        "def stage(cfg):\n"
        "    print('x' * 99999, flush=True)\n    print('x')\n"
        "    print('x', file=sys.stderr, flush=True)\n"
        "raise SystemExit(run_stage('evaluate', stage, ['--SAE_path', 'x.pt']))"
    )
    command = f'"$0" -c "$1" {streams}'
    process = subprocess.run(["bash", "-c", command, sys.executable, stage], cwd=files.ROOT)
    assert process.returncode == 0


def test_every_numbered_row_of_the_page_names_tests_or_is_open():
    page = (files.ROOT / "docs" / "faults.md").read_text()
    (table,) = re.findall(r"^\| number \|.*\n\|---.*\n((?:\|.*\n?)+)", page, re.M)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    assert {int(row[0]) for row in rows} == set(range(1, 30))
    for *_, shown_by, state in rows:
        tests = re.findall(r"(test_\w+)\.(test_\w+)", shown_by)
        assert state == ("mended" if tests else "open"), shown_by
        for module, name in tests:
            assert name in names_of_tests(module), f"{module}.{name}"
