"""A training that was stopped, killed or damaged: it continues bit for bit, or says in one line why not."""

import argparse
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from src import checkpoint, files, lm
from src.config import interval, parse, run_stage
from src.files import DEMO_LM
from src.model import build
from src.sae_training import SAETraining
from src.trainer import Trainer
from src.zoo import ZOO


class Killed(BaseException):
    """Stands for SIGKILL: nothing in src catches it (real kills: tests/campaign.py)."""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"text": f"Return the {i}th of {i * 7} values, or raise ValueError. " * 5})
            for i in range(60)
        )
    )
    return path


def arguments(text, *more, out="out"):
    base = [
        "--model_path",
        str(DEMO_LM),
        "--data_path",
        str(text),
        "--output_dir",
        str(text.parent / out),
        "--dtype",
        "float32",
    ]
    return [
        *base,
        "--latent_size",
        "64",
        "--k",
        "4",
        "--max_length",
        "32",
        "--batch_size",
        "4",
        "--max_samples",
        "40",
        "--tag",
        "t",
        *more,
    ]


def train(text, *more, out="out"):
    return Trainer(parse("train", arguments(text, *more, out=out))).run()


def stopped_at(monkeypatch, step, do):
    """Calls do() in the middle of a step: after the first SAE's update, before the others'."""
    original = SAETraining.step

    def hooked(self, hidden, token, now, due):
        original(self, hidden, token, now, due)
        if now == step:
            do()

    monkeypatch.setattr(SAETraining, "step", hooked)


def kill():
    raise Killed


def killed(text, monkeypatch, step, *more, out="out"):
    with monkeypatch.context() as patch:
        stopped_at(patch, step, kill)
        with pytest.raises(Killed):
            train(text, *more, out=out)


def results(text, out):
    """(weights by file, metrics without what a clock says)"""
    folder = text.parent / out
    weights = {
        path.name: torch.load(path, weights_only=True)
        for path in sorted((folder / "SAE_models").glob("*.pt"))
    }
    lines = [json.loads(line) for line in (folder / "runs" / "t" / "metrics.jsonl").open()]
    return weights, [{k: v for k, v in line.items() if "tokens_per_s" not in k} for line in lines]


def assert_same(text, one, two):
    (weights, lines), (others, other_lines) = results(text, one), results(text, two)
    assert list(weights) == list(others) and lines == other_lines
    for name in weights:
        assert all(torch.equal(weights[name][key], others[name][key]) for key in weights[name]), (
            name
        )


@pytest.mark.parametrize(
    "more",
    [
        ["--target_l0", "8"],
        ["--recipe", "published", "--num_epochs", "2"],
        ["--optimizer", "adam", "--dead_tokens", "40"],
    ],
)
def test_every_model_killed_at_a_step_ends_with_the_weights_and_lines_of_an_uninterrupted_run(
    text, monkeypatch, capsys, more
):
    more = ["--model", *ZOO, *more]
    train(text, *more, out="straight")
    killed(text, monkeypatch, 8, *more, "--save_every", "3")
    np.random.rand(), torch.rand(1)  # another process has other random states
    killed(text, monkeypatch, 9, *more, "--save_every", "3")
    train(text, *more)
    assert "continuing at step 9" in capsys.readouterr().out
    assert_same(text, "straight", "out")
    home = text.parent / "out" / "runs" / "t"
    assert (
        sorted(path.name for path in home.iterdir()) == ["lock", "metrics.jsonl"]
        and not (home / "lock").read_text()
    )


@pytest.mark.parametrize(
    "number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)]
)
def test_a_signal_lets_the_step_end_saves_and_says_so_in_the_exit_code(
    text, monkeypatch, capsys, number, code
):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stopped_at(patch, 4, lambda: os.kill(os.getpid(), number))
        assert run_stage("train", lambda cfg: Trainer(cfg).run(), arguments(text)) == code
    assert "step 5 of 10 is saved" in capsys.readouterr().err and signal.getsignal(number) is before
    train(text)
    train(text, out="straight")
    assert_same(text, "straight", "out")


def test_a_second_signal_ends_the_process_at_once_and_leaves_no_half_state(text):
    code = (
        "import os, signal, sys\nfrom src import checkpoint\nfrom src.config import run_stage\nfrom src.sae_training import SAETraining\n"
        "from src.trainer import Trainer\n"
        "step = SAETraining.step\ndef once(self, h, t, now, due):\n    step(self, h, t, now, due)\n    if now == 4: os.kill(os.getpid(), signal.SIGTERM)\n"
        "SAETraining.step = once\nsave = checkpoint.torch.save\n"
        "def slow(*a):\n    save(*a)\n    os.kill(os.getpid(), signal.SIGTERM)\ncheckpoint.torch.save = slow\n"
        "run_stage('train', lambda cfg: Trainer(cfg).run(), sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(text)],
        cwd=files.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    states = text.parent / "out" / "runs" / "t" / "state"
    assert checkpoint.states(states) == [] and list(states.glob(".tmp-*"))  # killed inside the save
    assert json.loads((states.parent / "lock").read_text())["pid"]  # a stale lock, taken over now
    train(text)
    assert not states.exists()


def test_a_changed_option_or_text_is_named_and_refused_and_a_safe_one_is_not(
    text, monkeypatch, capsys
):
    killed(text, monkeypatch, 5, "--save_every", "2")
    with pytest.raises(ValueError, match=r"stopped at step 4.*--lr None -> 0.5"):
        train(text, "--lr", "0.5")
    with pytest.raises(ValueError, match=r"--k 4 -> 8"):
        train(text, "--k", "8")
    with pytest.raises(ValueError, match="holds an unfinished run"):
        train(text, "--resume", "never")
    content = text.read_text()
    text.write_text(content.replace("Return", "Reduce"))
    with pytest.raises(ValueError, match="the text is not the one"):
        train(text)
    text.write_text(content)  # another modification time, the same text
    train(text, "--save_every", "1h", "--wandb_project", "other")
    assert "continuing at step 4" in capsys.readouterr().out


def test_resume_never_with_overwrite_starts_again_and_threads_are_warned_of(
    text, monkeypatch, capsys
):
    killed(text, monkeypatch, 5, "--save_every", "2")
    monkeypatch.setattr(
        checkpoint, "environment", lambda real=checkpoint.environment: real() | {"threads": 77}
    )
    killed(text, monkeypatch, 7, "--save_every", "2")
    assert "continued with 77" in capsys.readouterr().out
    train(text, "--resume", "never", "--overwrite")
    assert "continuing" not in capsys.readouterr().out


def damages():
    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    yield "flip", flip
    yield "cut", lambda path: path.write_bytes(path.read_bytes()[:-1])
    yield "junk", lambda path: path.write_bytes(path.read_bytes() + b"x")
    yield "gone", lambda path: path.unlink()
    yield "empty", lambda path: path.write_bytes(b"")


@pytest.mark.parametrize("name", ["meta.json", "manifest.json", "a.pt", "random.pt"])
def test_a_damaged_state_is_never_loaded_the_one_before_is_with_a_warning(tmp_path, capsys, name):
    for what, damage in damages():
        for step in (3, 12):
            checkpoint.save_state(
                tmp_path / what, step, {"x": 1}, {"a": {"t": torch.zeros(100)}, "random": {"r": 1}}
            )
        damage(tmp_path / what / "step-00000012" / name)
        path, meta = checkpoint.find_state(tmp_path / what)
        assert (path.name, meta["step"]) == (
            "step-00000003",
            3,
        ) and "damaged" in capsys.readouterr().out, what
        damage(path / name)
        with pytest.raises(ValueError, match="every saved state is damaged.*step-00000003"):
            checkpoint.find_state(tmp_path / what)


def test_a_manifest_of_another_step_is_noticed_and_states_are_ordered_by_step_not_by_clock(
    tmp_path,
):
    for step in (9, 10, 11):
        checkpoint.save_state(tmp_path, step, {}, {"a": {}})
    assert [path.name for path in checkpoint.states(tmp_path)] == ["step-00000011", "step-00000010"]
    os.utime(tmp_path / "step-00000010", (2e9, 2e9))
    assert checkpoint.find_state(tmp_path)[1]["step"] == 11
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000012")
    assert checkpoint.find_state(tmp_path)[1]["step"] == 11
    (tmp_path / ".tmp-step-00000013-1").mkdir()
    assert checkpoint.find_state(tmp_path)[1]["step"] == 11 and not list(tmp_path.glob(".tmp-*"))


def test_a_full_disk_leaves_the_states_before_intact_and_no_stub(text, monkeypatch):
    real, left = (
        files.HashingFile.__init__,
        [180_000],
    )  # bytes: the first state fits, the second does not

    class Full:
        def __init__(self, file):
            self.file, self.flush = file, file.flush

        def write(self, data):
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    monkeypatch.setattr(files.HashingFile, "__init__", lambda self, file: real(self, Full(file)))
    with pytest.raises(
        OSError, match=r"cannot save the state of step 4.*No space left.*step-00000002 is intact"
    ):
        train(text, "--save_every", "2")
    states = text.parent / "out" / "runs" / "t" / "state"
    assert [path.name for path in states.iterdir()] == ["step-00000002"]
    monkeypatch.setattr(files.HashingFile, "__init__", real)
    train(text)
    train(text, out="straight")
    assert_same(text, "straight", "out")


def test_a_place_that_cannot_be_written_is_found_before_the_language_model_is_loaded(
    text, monkeypatch
):
    monkeypatch.setattr(lm, "get_language_model", lambda *_: pytest.fail("loaded"))
    (text.parent / "file").write_text("")
    (text.parent / "dangling").symlink_to(text.parent / "nowhere")
    for out in ("file", "dangling"):
        with pytest.raises(OSError, match="cannot write to .*check --output_dir"):
            train(text, out=out)


def test_two_writers_of_one_folder_are_refused_and_locks_of_the_dead_are_taken_over(
    tmp_path, monkeypatch
):
    with files.locked(tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), files.locked(tmp_path):
            pass
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()  # unharmed
    for left in ('{"half', json.dumps({"host": files.socket.gethostname(), "pid": 2**22 + 1})):
        (tmp_path / "lock").write_text(left)
        with files.locked(tmp_path):
            pass
    elsewhere = {"host": "elsewhere", "pid": 1, "job": "7", "restart": None}
    (tmp_path / "lock").write_text(json.dumps(elsewhere))
    with pytest.raises(ValueError, match="process 1 on elsewhere"), files.locked(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the same job, requeued on this machine
    with files.locked(tmp_path):
        pass


def test_a_loss_that_is_not_finite_keeps_the_weights_of_the_step_before_and_the_batch(
    text, monkeypatch
):
    original, seen = SAETraining.step, {}

    def poison(self, hidden, token, now, due):
        if now == 6:
            seen["before"] = {name: p.clone() for name, p in self.sae.named_parameters()}
            hidden = {site: h * float("nan") for site, h in hidden.items()}
        original(self, hidden, token, now, due)
        if now == 6:
            seen["after"] = dict(self.sae.named_parameters())
        assert now < 7

    monkeypatch.setattr(SAETraining, "step", poison)
    with pytest.raises(ValueError, match="loss is not finite at step 6"):
        train(text)
    assert all(torch.equal(value, seen["after"][name]) for name, value in seen["before"].items())
    dump = json.loads(
        (text.parent / "out" / "runs" / "t" / "nonfinite-TopK_text_t-step6.json").read_text()
    )
    assert len(dump["input_ids"]) == 4 == len(dump["rows"]) and dump["step"] == 6


def run_of(text, name, n=48):
    cfg = parse("train", arguments(text, "--model", name))
    cfg.optimizer, cfg.grad_clip, cfg.steps = "adam", 0.0, 1
    torch.manual_seed(0)
    run = SAETraining(build(name, 32, 8, {"latent_size": 64, "k": 4}), name, {}, cfg, 10)
    run.mode(True)
    return (
        run,
        {
            site: torch.randn(n, 32, generator=torch.Generator().manual_seed(site))
            for site in run.sae.sites()
        },
        torch.arange(n),
    )


@pytest.mark.parametrize("name", ["TopK", "Gated", "RouteSAE", "Crosscoder"])
def test_out_of_memory_halves_the_slices_and_keeps_the_gradient_of_the_whole_batch(
    text, monkeypatch, capsys, name
):
    run, hidden, token = run_of(text, name)
    run.step(hidden, token, 0, True)
    small, _, _ = run_of(text, name)
    original = small.sae.autoencode

    def limited(x, *rest, token=None):
        if len(x) > 15:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(x, *rest, token=token)

    monkeypatch.setattr(small.sae, "autoencode", limited)
    small.step(hidden, token, 0, True)
    assert small.parts == 4 and "in 4 parts" in capsys.readouterr().out
    for (key, one), (_, two) in zip(
        run.sae.named_parameters(), small.sae.named_parameters(), strict=True
    ):
        if one.grad is not None:
            assert torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-6), key
    assert (
        torch.equal(run.sae.tokens_since_fired, small.sae.tokens_since_fired)
        and small.last.latents.shape == run.last.latents.shape
    )
    monkeypatch.setattr(
        small.sae,
        "autoencode",
        lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    )
    with pytest.raises(torch.OutOfMemoryError):
        small.step(hidden, token, 1, True)


def test_a_state_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    path = checkpoint.save_state(tmp_path / "s", 1, {}, {"a": {}})
    (path / "a.pt").write_bytes(pickle.dumps(Trap(), 2))
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load_part(path, "a")
    assert not (tmp_path / "run").exists()


def test_memory_above_the_hint_is_refused_with_the_estimate(text):
    with pytest.raises(ValueError, match="needs .* GB by estimate, above --max_memory_hint 0.001"):
        train(text, "--max_memory_hint", "0.001")


def test_intervals_and_long_names():
    assert (
        interval("500") == (500, "steps")
        and interval("90s") == (90, "s") == interval("1.5m")
        and interval("2h") == (7200, "s")
    )
    for bad in ("x", "-1", "1.5", "nanm", "m", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            interval(bad)
    one, two = (files.safe_name("+".join(["Ünicode"] * 30) + end) for end in "ab")
    assert one != two and max(len(name.encode()) for name in (one, two)) <= 120
