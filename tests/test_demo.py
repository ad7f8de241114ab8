"""The demo text is made from documentation, and make.py trains a language model on it."""

import importlib.util
import json
import multiprocessing
import os
import signal
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from src import demo
from src.files import DEMO_LM
from src.sources import find_files, split_files


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """The folder of a demo text made from 60 small files, of which half repeat the others."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    files = []
    for i in range(60):
        path = tmp_path / f"module_{i}.py"
        text = " ".join(f"Returns value {i % 30} of array {n}." for n in range(60))
        path.write_text(f'"""{text}"""\n')
        files.append(("package", path))
    (tmp_path / "broken.py").write_text("def (")
    files.append(("package", tmp_path / "broken.py"))
    monkeypatch.setattr(demo, "source_files", lambda: files)
    return demo.build_corpus()


@pytest.mark.parametrize("name", ["model_path", "data_path"])
def test_an_empty_option_is_not_taken_for_one_left_out(name):
    cfg = Namespace(model_path="", data_path="", typed={name})
    with pytest.raises(ValueError, match=f'--{name} ""; it is empty'):
        demo.use_demo_defaults(cfg)


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make", DEMO_LM / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_repeated_paragraphs_are_dropped_and_each_document_is_in_one_split(corpus):
    about = json.loads((corpus / "about.json").read_text())
    assert sum(about["documents"].values()) == 30
    texts = set()
    for name, count in about["documents"].items():
        lines = (corpus / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == count > 0
        texts |= {json.loads(line)["text"] for line in lines}
    assert len(texts) == 30


def test_a_text_made_in_part_is_the_beginning_of_the_whole(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "again"))
    monkeypatch.setattr(demo, "BLOCK_FILES", 4)
    whole = (corpus / "train.jsonl").read_bytes()
    parts = []
    for n_bytes in (3000, 2000, 9000):
        folder = demo.build_corpus("train", n_bytes)
        parts.append((folder / "train.jsonl").read_bytes())
        assert n_bytes <= len(parts[-1]) < len(whole) and whole.startswith(parts[-1])
    assert parts[0] == parts[1] != parts[2]
    # Another split is read from its own file, which is not made yet.
    assert (folder / "eval.jsonl").read_bytes() == b""
    assert split_files(find_files(folder), "eval") == ([folder / "eval.jsonl"], "all")
    # What was read is not read again.
    read = []
    monkeypatch.setattr(demo, "_block_path", recorded(read, demo._block_path))
    n_blocks = len(list((folder / "made").iterdir()))
    demo.build_corpus()
    assert sum(existed for existed in read) == n_blocks
    for name in ("train.jsonl", "eval.jsonl", "apply.jsonl", "about.json"):
        assert (folder / name).read_bytes() == (corpus / name).read_bytes()
    assert not (folder / "made").exists()


def recorded(read, block_path):
    def path_of(files, folder):
        path = block_path(files, folder)
        read.append(path.exists())
        return path

    return path_of


def test_the_demo_text_is_made_as_far_as_a_stage_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    asked = []
    monkeypatch.setattr(demo, "build_corpus", lambda *request: asked.append(request))
    cfg = Namespace(data_path=demo.text_folder(), split="apply", max_length=100)
    for max_tokens, max_samples in ((1000, None), (None, 5), (1000, 5), (None, None)):
        cfg.max_tokens, cfg.max_samples = max_tokens, max_samples
        demo.make_text(cfg)
    demo.make_text(cfg, whole=True)
    cfg.data_path = tmp_path / "other"
    demo.make_text(cfg)
    n_bytes = [8000, 4000, 4000, float("inf"), float("inf")]
    assert asked == [("apply", n) for n in n_bytes]


def test_demo_defaults_fill_only_what_is_missing(corpus, capsys):
    cfg = Namespace(model_path="", data_path=None)
    demo.use_demo_defaults(cfg)
    assert (cfg.model_path, cfg.data_path) == (str(DEMO_LM), str(corpus))
    assert "built-in demo LM" in capsys.readouterr().out
    cfg = Namespace(model_path="model", data_path="text")
    demo.use_demo_defaults(cfg)
    assert (cfg.model_path, cfg.data_path) == ("model", "text")
    assert not capsys.readouterr().out


def test_the_demo_lm_is_the_model_that_its_program_makes(make):
    from transformers import AutoConfig, AutoTokenizer

    model = make.new_model(AutoTokenizer.from_pretrained(DEMO_LM))
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_674_240
    committed = AutoConfig.from_pretrained(DEMO_LM)
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
        assert getattr(model.config, name) == getattr(committed, name)


def test_a_finished_training_of_the_demo_lm_is_not_repeated(make, corpus, tmp_path, capsys):
    for out in ("first", "second"):
        make.train_lm(1, tmp_path / out)
    assert "continuing at step 1 of 1" in capsys.readouterr().out
    first, second = (tmp_path / out / "model.safetensors" for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    score = json.loads((tmp_path / "second" / "score.json").read_text())
    assert score["trained_tokens"] == 16 * 256
    assert score["perplexity"] > 1
    assert torch.load(tmp_path / "data" / "demo_lm" / "training.pt")["step"] == 1


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def announce_and_sleep(writer):
    os.write(writer, f"{os.getpid()} ".encode())
    time.sleep(60)


def test_the_workers_of_a_killed_preparation_end_with_it():
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        fork = multiprocessing.get_context("fork")  # the workers have the pipe
        with ProcessPoolExecutor(2, fork, demo._begin_worker) as pool:
            for _ in range(2):
                pool.submit(announce_and_sleep, writer)
            time.sleep(60)
        os._exit(0)
    workers = []
    while len(workers) < 2:
        workers += os.read(reader, 1000).decode().split()
    assert all(map(is_running, workers))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, workers))
