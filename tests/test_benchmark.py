"""The benchmark at tiny shapes: turns of contenders, their counts, quality, stages and table."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import record_function

from benchmarks import contenders, draw, report, stages, sweeps
from benchmarks.gate import Gate, score
from benchmarks.runner import ratios
from src import estimate
from src.applier import Applier
from src.data import Rows
from src.device import fast_bfloat16
from src.files import DEMO_LM, ROOT
from src.model import build


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    sentence = "Return the {}th value of the array, or raise ValueError if it is {}. "
    lines = [json.dumps({"text": sentence.format(i, i) * 4}) for i in range(60)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def put_back(monkeypatch):
    """Contenders replace functions of src in their own process; here they are put back."""
    monkeypatch.setattr(Rows, "batch", Rows.batch)
    monkeypatch.setattr(estimate, "step_cost", estimate.step_cost)
    monkeypatch.setattr(estimate, "of_reading", estimate.of_reading)
    monkeypatch.setattr(Applier, "_write", Applier._write)


def answers(contender, job, commands):
    """The messages of a contender that reads these commands."""
    out = io.StringIO()
    contender(job, Gate(out, io.StringIO("\n".join(commands) + "\n")))
    return [json.loads(line) for line in out.getvalue().splitlines()]


def flags(**options):
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def train_topk(text, tmp_path):
    """The answers of a contender that trains 600 tokens in two turns."""
    argv = flags(
        model_path=DEMO_LM,
        data_path=text,
        device="cpu",
        max_tokens=600,
        batch_size=4,
        max_length=32,
        latent_size=64,
        k=4,
        output_dir=tmp_path / "out",
    )
    torch.save({12: torch.randn(50, 128)}, tmp_path / "held_out.pt")
    measure = f"measure {tmp_path / 'held_out.pt'}"
    commands = ["go 1", measure, "go 400", "go 600", measure, "end"]
    return answers(contenders.ours, {"argv": argv, "kind": "ours"}, commands)


def test_contenders_take_turns_and_count_useful_tokens(text, tmp_path, put_back):
    ready, first, early, second, last, late = train_topk(text, tmp_path)
    assert ready["event"] == "ready"
    assert first["steps"] == 1 and 100 < first["tokens"] <= 124
    assert second["steps"] == 3 and second["done"] >= 400 and second["peak"] > 1e7
    assert last["final"]
    assert first["tokens"] + second["tokens"] + last["tokens"] == last["done"]
    assert late["NormMSE"] != early["NormMSE"] and late["L0"] == 4


def test_only_the_saes_of_a_training_are_measured_not_those_of_other_tests():
    options = {"latent_size": 32, "k": 4, "seed": 3}
    others = [build(name, 8, 8, options) for name in ("RouteSAE", "TopK")]  # one has an inner TopK
    before = contenders.living()
    trained = build("RouteSAE", 8, 8, options)
    saes, _ = contenders.training_objects(before)
    assert len(saes) == 1 and saes[0] is trained
    assert others[0].sae is not saes[0]


def test_apply_as_a_contender_counts_every_token_once(text, tmp_path, put_back, monkeypatch):
    with monkeypatch.context() as of_training:
        of_training.setattr(Rows, "batch", Rows.batch)
        train_topk(text, tmp_path)
    argv = flags(
        SAE_path=tmp_path / "out/SAE_models/TopK_text.pt",
        output_dir=tmp_path,
        act_threshold=0,
        lines=1,
        device="cpu",
    )
    *_, last = answers(contenders.apply, {"argv": argv}, ["go 1", "go 100000", "end"])
    contexts = json.loads((tmp_path / "contexts" / "TopK_text_contexts.json").read_text())
    assert last["done"] == contexts["tokens"] and contexts["latent_context_map"]


def test_the_published_loop_is_a_contender(text, tmp_path):
    torch.save({12: torch.randn(50, 128)}, tmp_path / "held_out.pt")
    job = {
        "model_path": str(DEMO_LM),
        "data_path": str(text),
        "device": "cpu",
        "batch": 4,
        "length": 32,
        "split": "train",
        "tokens": 300,
        "rows": 40,
        "model": "TopK",
        "argv": flags(model="TopK", recipe="published", latent_size=64, k=4),
    }
    commands = ["go 1", "go 300", f"measure {tmp_path / 'held_out.pt'}", "end"]
    *_, last, quality = answers(contenders.published, job, commands)
    assert last["done"] >= 300
    assert 0 < quality["NormMSE"] < 1.5 and quality["L0"] == 4


def test_quality_is_that_of_standardised_states():
    h = torch.randn(100, 8) * 5 + 3
    x = (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True)

    def halve(h):
        mean = h.mean(-1, keepdim=True)
        return mean + 0.5 * (h - mean), torch.tensor([0, 50, 100])

    quality = score(h, halve, chunk_tokens=100)
    errors = (x - 0.5 * x).square().sum(-1) / x.square().sum(-1)
    assert quality["NormMSE"] == pytest.approx(float(errors.mean()), rel=1e-5)
    assert quality["dead"] == pytest.approx(1 / 3) and quality["L0"] == pytest.approx(1.5)


def test_operations_are_sorted_into_stages():
    x, w = torch.randn(2000, 64), torch.randn(512, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with record_function("bench:LM"):
            x @ w.T
        with record_function("bench:code"):  # routing around a code
            x.softmax(-1)
            with record_function("bench:code"):
                values, index = torch.nn.functional.linear(x, w).topk(8)
                torch.nn.functional.embedding_bag(index, w, per_sample_weights=values, mode="sum")
    spent = stages.breakdown(profiler, 10.0, 2000)
    for stage in ("LM", "gather", "encode", "top-k", "decode"):
        assert spent[stage] > 0, stage
    assert spent["backward"] == spent["data"] == 0
    assert sum(spent.values()) == pytest.approx(10.0 / 2000)


def test_ratios_pair_the_turns_of_a_round():
    measured = ratios([4.0, 6.0, 9.0], [1.0, 2.0, 3.0, 5.0])
    assert measured == {"median": 3.0, "low": 3.0, "high": 4.0, "turns": 3}


@pytest.mark.parametrize("tokens, rounds", [(20_500, 3), (36_864, 3), (37_000, 4), (10**9, 2)])
def test_a_training_in_which_no_turn_would_count_is_refused_before_it_begins(tokens, rounds):
    from benchmarks.run import training

    cfg = SimpleNamespace(tokens=tokens, rounds=rounds)
    with pytest.raises(SystemExit, match="no turn of the training counts"):
        training(SimpleNamespace(cfg=cfg, batch=16, length=256))


def test_a_contender_without_a_turn_that_counts_is_said_to_have_none():
    from benchmarks.run import describe

    result = {"name": "x", "tokens_per_s": None, "spread": None, "NormMSE": 0.2, "dead": 0.0}
    assert describe(result) == "x: no turn counted  NormMSE 0.2000  dead 0.000"


@pytest.mark.parametrize(
    "median, must, goal, more_is_better, met",
    [
        (3.4, 3, 5, True, "must"),
        (5.0, 3, 5, True, "goal"),
        (1.0, 3, 5, True, "no"),
        (0.7, 1, 0.5, False, "must"),
    ],
)
def test_a_target_is_met_by_its_median(median, must, goal, more_is_better, met):
    from benchmarks.run import Bench

    bench = SimpleNamespace(results={"targets": []})
    measured = {"median": median, "low": 1.0, "high": 9.0, "turns": 2}
    Bench.target(bench, "x", must, goal, measured, more_is_better=more_is_better)
    assert [row["met"] for row in bench.results["targets"]] == [met]


def test_a_target_without_a_measurement_is_reported_as_not_measured():
    assert report.number(None, "x")[0] == "not measured"


def test_sweeps_are_drawn_with_gaps_where_a_contender_failed(tmp_path):
    result = {"tokens_per_s": 100.0, "spread": [90.0, 120.0]}
    of_k = {"ours": {16: result, 32: result}, "peer": {16: result}}
    of_saes = {"ours": {1: result, 4: result}}
    sweeps.picture({"k": of_k, "saes": of_saes}, tmp_path / "sweeps.png")
    assert (tmp_path / "sweeps.png").stat().st_size > 10_000


def miniature():
    """Results of benchmarks.run as they are kept, of two contenders."""
    contender = {
        "name": "ours TopK",
        "tokens_per_s": 30e3,
        "spread": [29e3, 31e3],
        "curve": [{"seconds": 2.0, "NormMSE": 0.3}, {"seconds": 9.0, "NormMSE": 0.15}],
    }
    curve = [{"seconds": 30.0, "NormMSE": 0.2}]
    peer = dict(contender, name="sparsify TopK", tokens_per_s=2e4, curve=curve)
    return {"groups": {"training": [contender, peer]}}


@pytest.mark.parametrize("kind", ["benchmark", "sweeps"])
def test_a_picture_keeps_the_results_that_it_is_drawn_from(tmp_path, kind):
    point = {"tokens_per_s": 100.0, "spread": [90.0, 120.0]}
    results = {"sweeps": {"k": {"ours": {"16": point, "32": point}}}}
    if kind == "benchmark":
        results = miniature()
    (tmp_path / "run.json").write_text(json.dumps(results))
    draw.main([str(tmp_path / "run.json"), str(tmp_path / "kept.png")])
    assert json.loads((tmp_path / "kept.json").read_text()) == results
    first = (tmp_path / "kept.png").read_bytes()
    assert len(first) > 10_000
    draw.main([str(tmp_path / "kept.json"), str(tmp_path / "kept.png")])  # drawn again
    assert (tmp_path / "kept.png").read_bytes() == first


@pytest.mark.slow
def test_the_whole_benchmark_runs_and_writes_its_table(text, tmp_path):
    options = flags(data_path=text, output_dir=tmp_path) + ["--only", "training", "apply"]
    command = [sys.executable, "-m", "benchmarks.run", "--quick", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(results["groups"]["training"]) == (7 if fast_bfloat16() else 5)
    assert results["left_out"]
    assert set(results["floors"]["TopK"]) >= {"LM", "encode", "total"}
    assert "| train RouteSAE" in (tmp_path / "benchmark.md").read_text()
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
