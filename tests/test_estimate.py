"""What a run will need is printed before it starts, and compared with what it used at its end."""

import json
import platform
import re
import subprocess
import sys

import pytest
import torch

from src import device, estimate
from src.applier import Applier
from src.config import parse
from src.data import Batch
from src.evaluator import Evaluator
from src.files import DEMO_LM, ROOT
from src.lm import get_language_model
from src.model import build
from src.trainer import Trainer


def test_memory_and_time_stand_before_the_run_at_its_end_and_in_the_recipe(tmp_path, capsys):
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    sentence = "Return the {}th of {} values. "
    lines = [json.dumps({"text": sentence.format(i, i * 7) * 5}) for i in range(60)]
    text.write_text("\n".join(lines))
    argv = ["--model_path", str(DEMO_LM), "--data_path", str(text), "--output_dir", str(out)]
    argv += ["--latent_size", "64", "--k", "4", "--max_length", "32"]
    argv += ["--batch_size", "4", "--max_samples", "40"]
    Trainer(parse("train", argv)).run()
    output = capsys.readouterr().out
    assert re.search(r"together \d+\.\d\d GB\. Time: .* for 10 steps", output)
    before, after = "memory by estimate", "estimated and used: memory"
    assert output.index(before) < output.index(after) < output.index("saved ")
    recipe = json.loads((out / "SAE_models" / "TopK_text.json").read_text())
    figures = recipe["estimate"]
    assert set(figures) == {"memory_gb", "memory_gb_used", "seconds", "seconds_used"}
    assert all(value > 0 for value in figures.values())


class RandomRows:
    """Stands for data.Rows: 3 rows of 16 random tokens."""

    max_length = 16

    def __len__(self):
        return 3

    def batch(self, rows):
        ids = torch.randint(3, 4000, (len(rows), self.max_length))
        mask = torch.ones_like(ids, dtype=torch.bool)
        return Batch(ids, mask, torch.zeros_like(ids), torch.arange(len(rows)))


@pytest.fixture(scope="module")
def language_model():
    return get_language_model(str(DEMO_LM), "cpu", dtype="float32")[1]


def demo_sae(name, **options):
    return build(name, 128, 16, {"latent_size": 64, "k": 4, **options})


def test_timing_a_step_changes_no_weight_and_leaves_no_gradient(language_model):
    saes = [demo_sae(name) for name in ("TopK", "RouteSAE", "Crosscoder", "BatchTopK")]
    # The loss of this one keeps a running mean in a buffer.
    saes.append(demo_sae("RouteSAE", router_objective="advantage"))
    tensors = [t for sae in saes for t in (*sae.parameters(), *sae.buffers())]
    before = [t.clone() for t in tensors]
    sites = list(range(4, 13))
    seconds, size = estimate.step_cost(saes, language_model, RandomRows(), 8, sites, "cpu")
    assert seconds > 0 and size > 0
    _, size_of_one = estimate.step_cost(saes[:1], language_model, RandomRows(), 8, [12], "cpu")
    assert size_of_one < size
    for tensor, value in zip(tensors, before, strict=True):
        assert torch.allclose(tensor, value, rtol=0, atol=0, equal_nan=True)
    assert all(p.grad is None for sae in saes for p in sae.parameters())


def test_a_step_that_does_not_fit_is_timed_on_fewer_rows(language_model):
    sae = demo_sae("TopK")
    autoencode, tried = sae.autoencode, []

    def limited(x, *args, **kwargs):
        tried.append(len(x))
        if len(x) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return autoencode(x, *args, **kwargs)

    sae.autoencode = limited
    seconds, _ = estimate.step_cost([sae], language_model, RandomRows(), 8, [12], "cpu")
    assert seconds > 0
    # The first trial has fewer rows. All 3 do not fit; one does, and is timed after a first call.
    assert tried[:4] == [16, 48, 16, 16]


def test_the_memory_of_a_step_is_that_of_trials_with_fewer_rows_extended():
    row_bytes, fixed_bytes = 12_000_000, 40_000_000
    tried = []

    def time_step(n):
        tried.append(n)
        held = torch.ones(n * row_bytes + fixed_bytes, dtype=torch.uint8)
        return float(held[0])

    seconds, size = estimate._cost(time_step, 8, 32, "cpu")
    assert tried == [2, 8, 8]
    assert seconds == 4.0
    expected = estimate.REUSE_FACTOR * (32 * row_bytes + fixed_bytes)
    if sys.platform == "linux":  # elsewhere a peak cannot be counted anew
        assert size == pytest.approx(expected, rel=0.15)
    assert estimate.peak_resident() >= estimate.recent_peak()


def test_a_trial_that_takes_no_memory_is_no_negative_estimate(monkeypatch):
    """The system counts pages in parcels, so a peak may lie below what was there."""
    monkeypatch.setattr(estimate, "resident", lambda: 10**9)
    for peaks in ([10**9 - 4096, 10**9 - 8192], [10**9 + 4096, 10**9]):
        monkeypatch.setattr(estimate, "recent_peak", iter([*peaks, 0, 0]).__next__)
        monkeypatch.setattr(estimate, "count_peak_anew", lambda: None)
        _, size = estimate._cost(lambda n: 0.1, 8, 32, "cpu")
        assert 0 <= size < 10**5


def test_evaluate_and_apply_say_what_they_need_before_they_start(tmp_path, capfd):
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"Return the {i}th of {i * 7} values. " * 5}) for i in range(60)]
    text.write_text("\n".join(lines))
    common = ["--output_dir", str(tmp_path / "out"), "--max_samples", "12"]
    sizes = ["--latent_size", "64", "--k", "4", "--max_length", "32", "--batch_size", "4"]
    paths = ["--model_path", str(DEMO_LM), "--data_path", str(text), "--split", "all"]
    Trainer(parse("train", [*common, *sizes, *paths])).run()
    capfd.readouterr()
    for run, bar in (
        (lambda: Evaluator(parse("evaluate", [*common, "--metric", "all"])).run(), "evaluating"),
        (lambda: Applier(parse("apply", common)).run(), "applying"),
    ):
        run()
        written = capfd.readouterr()
        assert bar in written.err
        assert "estimated and used: memory" in written.out
        needs = re.search(r"memory by estimate: (.*); together .* GB\. Time: .* rows", written.out)
        assert "reading a batch" in needs[1]
        assert ("patched runs" in needs[1]) == (bar == "evaluating")


def test_durations_have_two_units_at_most():
    durations = {0.25: "0.25 s", 75: "1 min 15 s", 3600: "1 h", 90061: "1 d 1 h"}
    assert {seconds: estimate.duration(seconds) for seconds in durations} == durations


def test_the_steps_of_a_kl_finish_are_counted(language_model, tmp_path, monkeypatch, capsys):
    sae = demo_sae("TopK")
    cfg = parse("train", ["--kl_finish", "0.25"])
    cfg.batch_size, cfg.device, cfg.optimizer = 4, "cpu", "signum"
    costs = {False: (1.0, 10.0), True: (3.0, 20.0)}
    monkeypatch.setattr(estimate, "step_cost", lambda *_, with_kl=False: costs[with_kl])
    result = estimate.of_training(cfg, [sae], language_model, RandomRows(), 100, tmp_path)
    assert result.seconds == 75 * 1.0 + 25 * 3.0
    assert result.needs["one step"] == 20.0
    monkeypatch.undo()
    args = [sae], language_model, RandomRows(), 8, [12], "cpu"
    before = [p.clone() for p in sae.parameters()]
    assert all(cost > 0 for cost in estimate.step_cost(*args, with_kl=True))
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), before, strict=True))


# Prints how many bytes the C library holds free after a step has freed its tensors, and how many
# the process holds.
FREE_BYTES = """
import ctypes, sys, torch
from src.device import keep_freed_memory, limit_freed_memory, resident
if sys.argv[1] != "not kept":
    keep_freed_memory()
class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = MallInfo
tensors = [torch.ones(7 << 20) for _ in range(4)]
del tensors
if sys.argv[1] == "limited":
    limit_freed_memory()
print(mallinfo().fordblks, resident())
"""


def glibc_has_mallinfo2():
    library, version = platform.libc_ver()
    return library == "glibc" and tuple(map(int, version.split("."))) >= (2, 33)


@pytest.mark.skipif(not glibc_has_mallinfo2(), reason="a C library without mallinfo2")
def test_memory_that_a_step_frees_stays_for_the_next_one():
    def bytes_of(mode):
        command = [sys.executable, "-c", FREE_BYTES, mode]
        return map(int, subprocess.check_output(command, cwd=ROOT).split())

    # Four blocks of 28 MiB. The first blocks of a size go back to the system unless it is told
    # otherwise; of later ones, how many go back depends on their order, so one round is tried.
    free, held = bytes_of("kept")
    assert free > next(bytes_of("not kept")) + 3 * (28 << 20)
    *_, held_after_return = bytes_of("limited")
    assert held_after_return < held - 3 * (28 << 20)


def test_freed_memory_goes_back_once_the_process_grew_by_a_quarter(monkeypatch):
    monkeypatch.setitem(device._after_return, "bytes", 0)
    # Before and after the first call, before the second, before and after the third.
    monkeypatch.setattr(device, "resident", iter([100, 80, 99, 101, 90]).__next__)
    held = []
    for _ in range(3):
        device.limit_freed_memory()
        held.append(device._after_return["bytes"])
    assert held == [80, 80, 90]
