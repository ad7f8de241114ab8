"""The benchmark at tiny shapes: contenders in turns, their counts, quality, stages, the table."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import record_function

from benchmarks import contenders, report, stages, sweeps
from benchmarks.gate import Gate, score
from benchmarks.runner import ratios
from src import estimate
from src.applier import Applier
from src.data import Rows
from src.files import DEMO_LM, ROOT
from src.ops import fast_bfloat16


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [
        {"text": f"Return the {i}th value of the array, or raise ValueError if it is {i}. " * 4}
        for i in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def played(kind, job, commands):
    """Messages of a contender that is told `commands`."""
    out = io.StringIO()
    kind(job, Gate(out, io.StringIO("\n".join(commands) + "\n")))
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_contenders_take_turns_and_count_useful_tokens(text, tmp_path, monkeypatch):
    options = {
        "model_path": DEMO_LM,
        "data_path": text,
        "device": "cpu",
        "max_tokens": 600,
        "batch_size": 4,
        "max_length": 32,
        "latent_size": 64,
        "k": 4,
        "output_dir": tmp_path / "out",
    }
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    torch.save({12: torch.randn(50, 128)}, tmp_path / "held_out.pt")
    commands = [
        "go 1",
        f"measure {tmp_path / 'held_out.pt'}",
        "go 400",
        "go 600",
        f"measure {tmp_path / 'held_out.pt'}",
        "end",
    ]
    with monkeypatch.context() as put_back:
        put_back.setattr(Rows, "batch", Rows.batch)
        put_back.setattr(estimate, "step_cost", estimate.step_cost)
        ready, first, early, second, last, late = played(
            contenders.ours, {"argv": argv, "kind": "ours"}, commands
        )
    assert ready["event"] == "ready" and first["steps"] == 1 and 100 < first["tokens"] <= 124
    assert (
        second["steps"] == 3
        and second["done"] >= 400
        and last["final"]
        and sum(m["tokens"] for m in (first, second, last)) == last["done"]
    )
    assert late["NormMSE"] != early["NormMSE"] and late["L0"] == 4 and second["peak"] > 1e7

    read = {
        "SAE_path": tmp_path / "out/SAE_models/TopK_text.pt",
        "output_dir": tmp_path,
        "act_threshold": 0,
        "lines": 1,
        "device": "cpu",
    }
    argv = [part for name, value in read.items() for part in (f"--{name}", str(value))]
    with monkeypatch.context() as put_back:
        put_back.setattr(Rows, "batch", Rows.batch)
        put_back.setattr(Applier, "_write", Applier._write)
        *_, last = played(contenders.apply, {"argv": argv}, ["go 1", "go 100000", "end"])
    contexts = json.loads((tmp_path / "contexts" / "TopK_text_contexts.json").read_text())
    assert last["done"] == contexts["tokens"] and contexts["latent_context_map"]

    job = {
        "model_path": str(DEMO_LM),
        "data_path": str(text),
        "device": "cpu",
        "batch": 4,
        "length": 32,
        "split": "train",
        "tokens": 300,
        "rows": 40,
    }
    recipe = ["--model", "TopK", "--recipe", "published", "--latent_size", "64", "--k", "4"]
    *_, last, found = played(
        contenders.published,
        {**job, "argv": recipe, "model": "TopK"},
        ["go 1", "go 300", commands[1], "end"],
    )
    assert last["done"] >= 300 and 0 < found["NormMSE"] < 1.5 and found["L0"] == 4


def test_quality_is_of_the_standardised_state():
    h = torch.randn(100, 8) * 5 + 3
    x = (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True)
    found = score(
        h,
        lambda h: (
            h.mean(-1, keepdim=True) + 0.5 * (h - h.mean(-1, keepdim=True)),
            torch.tensor([0, 50, 100]),
        ),
        piece=100,
    )
    assert found["NormMSE"] == pytest.approx(
        float(((x - 0.5 * x).square().sum(-1) / x.square().sum(-1)).mean()), rel=1e-5
    )
    assert found["dead"] == pytest.approx(1 / 3) and found["L0"] == pytest.approx(1.5)


def test_operations_are_sorted_into_stages():
    x, w = torch.randn(2000, 64), torch.randn(512, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with record_function("bench:LM"):
            x @ w.T
        with record_function("bench:code"):  # routing around a code
            x.softmax(-1)
            with record_function("bench:code"):
                values, at = torch.nn.functional.linear(x, w).topk(8)
                torch.nn.functional.embedding_bag(at, w, per_sample_weights=values, mode="sum")
    found = stages.breakdown(profiler, 10.0, 2000)
    assert (
        all(found[stage] > 0 for stage in ("LM", "gather", "encode", "top-k", "decode"))
        and found["backward"] == found["data"] == 0
    )
    assert sum(found.values()) == pytest.approx(10.0 / 2000)


def test_ratios_pair_the_turns_of_a_round_and_targets_are_judged():
    assert ratios([4.0, 6.0, 9.0], [1.0, 2.0, 3.0, 5.0]) == {
        "median": 3.0,
        "low": 3.0,
        "high": 4.0,
        "turns": 3,
    }
    from benchmarks.run import Bench

    bench = SimpleNamespace(found={"targets": []})
    for median, more in ((3.4, True), (5.0, True), (1.0, True), (0.7, False)):
        Bench.target(
            bench,
            "x",
            *((3, 5) if more else (1, 0.5)),
            {"median": median, "low": 1.0, "high": 9.0, "turns": 2},
            more_is_better=more,
        )
    assert [row["met"] for row in bench.found["targets"]] == ["must", "goal", "no", "must"]
    assert report.number(None, "x")[0] == "not measured"


def test_sweeps_are_drawn_with_gaps_where_a_contender_failed(tmp_path):
    one = {"tokens_per_s": 100.0, "spread": [90.0, 120.0]}
    sweeps.picture(
        {"k": {"ours": {16: one, 32: one}, "peer": {16: one}}, "saes": {"ours": {1: one, 4: one}}},
        tmp_path / "sweeps.png",
    )
    assert (tmp_path / "sweeps.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_whole_benchmark_runs_and_writes_its_table(text, tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "--quick",
        "--data_path",
        str(text),
        "--output_dir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, "--only", "training", "apply"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(found["groups"]["training"]) == (7 if fast_bfloat16() else 5)
    assert found["left_out"] and "| train RouteSAE" in (tmp_path / "benchmark.md").read_text()
    assert (
        set(found["floors"]["TopK"]) >= {"LM", "encode", "total"}
        and (tmp_path / "benchmark.png").stat().st_size > 10_000
    )
