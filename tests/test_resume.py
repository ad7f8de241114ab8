"""A stopped, killed or damaged training continues bit for bit, or says in one line why not."""

import argparse
import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from src import checkpoint, distributed, files, lm
from src.config import interval, parse, run_stage
from src.files import DEMO_LM
from src.interrupt import HANDLED, Interrupted
from src.model import build
from src.sae_training import LocalBatch, SAETraining
from src.trainer import Trainer
from src.zoo import ZOO


class Killed(BaseException):
    """Stands for SIGKILL: nothing in src catches it (real kills: tests/campaign.py)."""


@pytest.fixture
def text(tmp_path):
    sentence = "Return the {}th of {} values, or raise ValueError. "
    lines = [json.dumps({"text": sentence.format(i, i * 7) * 5}) for i in range(60)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines))
    return path


def arguments(text, *more, out="out"):
    """Ten steps on the CPU, as a run with the tag t."""
    paths = ["--model_path", str(DEMO_LM), "--data_path", str(text)]
    paths += ["--output_dir", str(text.parent / out)]
    sizes = "--latent_size 64 --k 4 --max_length 32 --batch_size 4 --max_samples 40"
    return [*paths, *sizes.split(), "--dtype", "float32", "--tag", "t", *more]


def train(text, *more, out="out"):
    return Trainer(parse("train", arguments(text, *more, out=out))).run()


def home_of(text, out="out"):
    """The folder of the run."""
    return text.parent / out / "runs" / "t"


def interrupt(monkeypatch, step, action):
    """Call action() in the middle of a step: after the first SAE's update, before the others'."""
    original = SAETraining.step

    def hooked(self, batch, now, due):
        original(self, batch, now, due)
        if now == step:
            action()

    monkeypatch.setattr(SAETraining, "step", hooked)


def kill():
    raise Killed


def train_until_killed(text, monkeypatch, step, *more):
    with monkeypatch.context() as patch:
        interrupt(patch, step, kill)
        with pytest.raises(Killed):
            train(text, *more)


def results(text, out):
    """(weights by file, lines of the metrics without measured speeds)"""
    weights = {
        path.name: torch.load(path, weights_only=True)
        for path in sorted((text.parent / out / "SAE_models").glob("*.pt"))
    }
    lines = map(json.loads, (home_of(text, out) / "metrics.jsonl").open())
    timeless = [{k: v for k, v in line.items() if "tokens_per_s" not in k} for line in lines]
    return weights, timeless


def assert_same_results(text, out, other_out):
    weights, lines = results(text, out)
    other_weights, other_lines = results(text, other_out)
    assert list(weights) == list(other_weights) and lines == other_lines
    for name, parameters in weights.items():
        for key, value in parameters.items():
            assert torch.equal(value, other_weights[name][key]), (name, key)


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
    train_until_killed(text, monkeypatch, 8, *more, "--save_every", "3")
    np.random.rand(), torch.rand(1)  # another process has other random states
    train_until_killed(text, monkeypatch, 9, *more, "--save_every", "3")
    train(text, *more)
    assert "continuing at step 9" in capsys.readouterr().out
    assert_same_results(text, "straight", "out")
    names = sorted(path.name for path in home_of(text).iterdir())
    assert names == ["lock", "metrics.jsonl"]
    assert not (home_of(text) / "lock").read_text()


@pytest.mark.parametrize("number, code", [(n, 130 if n == signal.SIGINT else 143) for n in HANDLED])
def test_a_signal_lets_the_step_end_saves_and_says_so_in_the_exit_code(
    text, monkeypatch, capsys, number, code
):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt(patch, 4, lambda: os.kill(os.getpid(), number))
        assert run_stage("train", lambda cfg: Trainer(cfg).run(), arguments(text)) == code
    assert "step 5 of 10 is saved" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    train(text)
    train(text, out="straight")
    assert_same_results(text, "straight", "out")


def test_a_signal_while_the_processes_agree_is_kept_for_the_next_step(text, monkeypatch):
    agree, steps = distributed.all_max_ints, []

    def signalled_agree(*numbers):
        steps.append(numbers)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return agree(*numbers)

    monkeypatch.setattr(distributed, "all_max_ints", signalled_agree)
    with pytest.raises(Interrupted, match="step 6 of 10 is saved"):
        train(text)


def test_signals_of_terminals_and_batch_systems_are_handled():
    names = {number.name for number in HANDLED}
    assert names >= {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"}


SIGNALLED_TWICE = """
import os, signal, sys
from src import checkpoint
from src.config import run_stage
from src.sae_training import LocalBatch, SAETraining
from src.trainer import Trainer

step, save = SAETraining.step, checkpoint.torch.save

def signalled_step(self, batch, now, due):
    step(self, batch, now, due)
    if now == 4:
        os.kill(os.getpid(), signal.SIGTERM)

def signalled_save(*args):
    save(*args)
    os.kill(os.getpid(), signal.SIGTERM)

SAETraining.step, checkpoint.torch.save = signalled_step, signalled_save
run_stage("train", lambda cfg: Trainer(cfg).run(), sys.argv[1:])
"""


def test_a_second_signal_ends_the_process_at_once_and_leaves_no_half_state(text):
    command = [sys.executable, "-c", SIGNALLED_TWICE, *arguments(text)]
    process = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGTERM, process.stderr
    states = home_of(text) / "state"
    assert checkpoint.states(states) == [] and list(states.glob(".tmp-*"))  # ended inside the save
    assert json.loads((home_of(text) / "lock").read_text())["pid"]  # stale; taken over below
    train(text)
    assert not states.exists()


def test_a_changed_option_or_text_is_named_and_refused_and_a_safe_one_is_not(
    text, monkeypatch, capsys
):
    train_until_killed(text, monkeypatch, 5, "--save_every", "2")
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
    train_until_killed(text, monkeypatch, 5, "--save_every", "2")
    environment = checkpoint.environment() | {"threads": 77}
    monkeypatch.setattr(checkpoint, "environment", lambda: environment)
    train_until_killed(text, monkeypatch, 7, "--save_every", "2")
    assert "continued with 77" in capsys.readouterr().out
    train(text, "--resume", "never", "--overwrite")
    assert "continuing" not in capsys.readouterr().out


def other_language_model(folder, factor):
    """The demo's language model with its weights multiplied."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_LM)
    model = AutoModelForCausalLM.from_pretrained(DEMO_LM)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_run_is_not_continued_with_other_weights_or_another_format_of_the_language_model(
    text, monkeypatch, capsys
):
    folder = text.parent / "lm"
    path = ["--model_path", str(folder)]
    other_language_model(folder, 1.0)
    train(text, *path, out="straight")
    train_until_killed(text, monkeypatch, 5, "--save_every", "2", *path)
    other_language_model(folder, 1.5)
    with pytest.raises(ValueError, match="the language model is not the one .* other values"):
        train(text, *path)
    other_language_model(folder, 1.0)
    with pytest.raises(ValueError, match="were float32 then and are bfloat16 now; .*--dtype"):
        train(text, *path, "--dtype", "bfloat16")
    with monkeypatch.context() as patch:  # as where auto means another format
        patch.setattr(lm, "fast_bfloat16", lambda: True)
        with pytest.raises(ValueError, match="were float32 then and are bfloat16 now"):
            train(text, *path, "--dtype", "auto")
    monkeypatch.setattr(lm, "fast_bfloat16", lambda: False)
    train(text, *path, "--dtype", "auto")
    assert "continuing at step 4" in capsys.readouterr().out
    assert_same_results(text, "straight", "out")
    recipe = checkpoint.read_recipe(text.parent / "out" / "SAE_models" / "TopK_text_t.pt")
    assert recipe["language_model"]["dtype"] == "float32"


def test_a_finished_run_on_a_text_that_has_changed_since_is_not_already_trained(text, capsys):
    train(text)
    content = text.read_text()
    text.write_text(content)  # another modification time, the same text
    train(text)
    assert "already trained" in capsys.readouterr().out
    text.write_text(content.replace("Return", "Reduce"))
    with pytest.raises(ValueError, match="was trained on another text.*give --tag NAME or"):
        train(text)
    train(text, "--overwrite")
    train(text)


def test_a_finished_run_on_another_language_model_is_not_already_trained(text, capsys):
    folder = text.parent / "lm"
    other_language_model(folder, 1.0)
    train(text, "--model_path", str(folder))
    train(text, "--model_path", str(folder))
    assert "already trained" in capsys.readouterr().out
    other_language_model(folder, 1.5)
    with pytest.raises(ValueError, match="was trained on another language model.*has changed"):
        train(text, "--model_path", str(folder))
    train(text, "--model_path", str(folder), "--overwrite")
    train(text, "--model_path", str(folder))


@pytest.mark.parametrize("other", [["--seed", "7"], ["--model", "Gated"], []])
def test_states_of_another_unfinished_run_are_left_alone(text, monkeypatch, capsys, other):
    train(text)
    content = text.read_text()
    if not other:  # the same options, another text
        text.write_text(content.replace("Return", "Reduce"))
    train_until_killed(text, monkeypatch, 5, "--save_every", "2", "--overwrite", *other)
    saved = (home_of(text) / "state" / "step-00000004").stat().st_ino
    text.write_text(content)
    train(text)
    said = capsys.readouterr().out
    assert "already trained" in said and "another unfinished run, stopped at step 4" in said
    assert (home_of(text) / "state" / "step-00000004").stat().st_ino == saved
    if other:
        train(text, "--overwrite", *other)
        assert "continuing at step 4" in capsys.readouterr().out


def test_a_finished_run_removes_its_own_states_and_leaves_damaged_ones(text, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("src.trainer._warn_of_missed_l0", lambda *_: kill())
        with pytest.raises(Killed):
            train(text, "--save_every", "4")
    states = home_of(text) / "state"
    assert len(checkpoint.states(states)) == 2
    shutil.copytree(states, states.with_name("copy"))
    for path in checkpoint.states(states):
        (path / "meta.json").write_text("{}")
    train(text)
    assert states.exists() and "is left as it is" in capsys.readouterr().out
    shutil.rmtree(states)
    states.with_name("copy").rename(states)
    train(text)
    assert not states.exists()


def test_values_that_differ_late_and_long_names_keep_an_sae_each(text):
    values = ["--model", "Vanilla", "--l1_coeff", "0.01000001", "0.01000002", "0.5"]
    train(text, *values)
    names = {path.stem for path in (text.parent / "out" / "SAE_models").glob("*.pt")}
    numbers = {name.split("l1_coeff")[1] for name in names}
    assert numbers == {"0.01000001_t", "0.01000002_t", "0.5_t"}
    train(text, "--model", "MLSAE", "--sites", "7", "11", "15")
    assert (text.parent / "out" / "SAE_models" / "MLSAE_text_sites7-11-15_t.pt").exists()
    long = ["--tag", "x" * 119]
    train(text, *long)
    (path,) = (text.parent / "out" / "SAE_models").glob("TopK*.pt")
    written = path.stat().st_mtime_ns
    train(text, *long)
    assert path.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="trained with other options"):
        train(text, *long, "--seed", "7")


def test_odd_lines_of_a_report_end_no_training(text):
    train(text)
    log = home_of(text) / "metrics.jsonl"
    lines = [b'{"sae": ["a"]}', b'{"sae": {}}', b"[1]", b"\xff", b"", b"null", b"1" * 5000]
    log.write_bytes(b"\n".join([*lines, b'{"sae": "other"}']) + b"\nhalf a li")
    train(text, "--overwrite")
    kept = log.read_bytes().split(b"\n")
    assert kept[: len(lines) + 1] == [*lines, b'{"sae": "other"}']
    assert json.loads(kept[len(lines) + 1])["sae"] == "TopK_text_t"


def test_a_run_too_short_for_its_target_l0_is_warned_of_before_and_after(text, capsys):
    train(text, "--model", "Vanilla", "TopK", "--target_l0", "8")
    said = capsys.readouterr().out
    assert "--target_l0 takes about 120 steps, this run has 10" in said
    assert re.search(r"Vanilla_text_t ends at L0 \S+, its --target_l0 is 8", said)
    assert "TopK_text_t ends" not in said
    train(text, "--tag", "u")
    assert "target_l0" not in capsys.readouterr().out


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flip": flip_a_bit,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "append": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "delete": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", ["meta.json", "manifest.json", "a.pt", "random.pt"])
def test_a_damaged_state_is_never_loaded_the_one_before_is_with_a_warning(tmp_path, capsys, name):
    parts = {"a": {"t": torch.zeros(100)}, "random": {"r": 1}}
    for kind, damage in DAMAGES.items():
        folder = tmp_path / kind
        for step in (3, 12):
            checkpoint.save_state(folder, step, {"x": 1}, parts)
        damage(folder / "step-00000012" / name)
        path, meta = checkpoint.find_state(folder)
        assert path.name == "step-00000003" and meta["step"] == 3, kind
        assert "damaged" in capsys.readouterr().out, kind
        damage(path / name)
        with pytest.raises(ValueError, match="every saved state is damaged.*step-00000003"):
            checkpoint.find_state(folder)


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
    assert checkpoint.find_state(tmp_path)[1]["step"] == 11
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_full_disk_leaves_the_states_before_intact_and_no_stub(text, monkeypatch):
    original = files.HashingFile.__init__
    free = [180_000]  # bytes: the first state fits, the second does not

    class FullDisk:
        def __init__(self, file):
            self.file, self.flush = file, file.flush

        def write(self, data):
            free[0] -= len(data)
            if free[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    with monkeypatch.context() as patch:
        patch.setattr(
            files.HashingFile, "__init__", lambda self, file: original(self, FullDisk(file))
        )
        message = r"cannot save the state of step 4.*No space left.*step-00000002 is intact"
        with pytest.raises(OSError, match=message):
            train(text, "--save_every", "2")
    names = [path.name for path in (home_of(text) / "state").iterdir()]
    assert names == ["step-00000002"]
    train(text)
    train(text, out="straight")
    assert_same_results(text, "straight", "out")


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
    lock = tmp_path / "lock"
    with files.locked(tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), files.locked(tmp_path):
            pass
        assert json.loads(lock.read_text())["pid"] == os.getpid()  # unharmed
    dead = json.dumps({"host": files.socket.gethostname(), "pid": 2**22 + 1})
    for content in ('{"half', dead):
        lock.write_text(content)
        with files.locked(tmp_path):
            pass
    # A container that started anew on this machine has another name, and shares the kernel's locks.
    lock.write_text(json.dumps({"host": "elsewhere", "boot": files._boot_id(), "pid": 1}))
    monkeypatch.setattr(files, "_file_system", lambda path: ("lustre", "rw"))
    with files.locked(tmp_path):
        pass
    other = json.dumps({"host": "elsewhere", "pid": 1, "job": "7", "restart": None})
    for kind, options in (("ext4", "rw"), ("nfs4", "rw,vers=4.2,local_lock=none")):
        monkeypatch.setattr(files, "_file_system", lambda path, k=kind, o=options: (k, o))
        lock.write_text(other)
        with files.locked(tmp_path):
            pass
    monkeypatch.setattr(files, "_file_system", lambda path: ("lustre", "rw"))
    lock.write_text(other)
    with pytest.raises(ValueError, match="process 1 on elsewhere"), files.locked(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the same job, requeued on this machine
    with files.locked(tmp_path):
        pass


def test_a_loss_that_is_not_finite_keeps_the_weights_of_the_step_before_and_the_batch(
    text, monkeypatch
):
    original, parameters = SAETraining.step, {}

    def poison(self, batch, now, due):
        if now == 6:
            parameters["before"] = {name: p.clone() for name, p in self.sae.named_parameters()}
            hidden = {site: h * float("nan") for site, h in batch.hidden.items()}
            batch = batch._replace(hidden=hidden)
        original(self, batch, now, due)
        if now == 6:
            parameters["after"] = dict(self.sae.named_parameters())
        assert now < 7

    monkeypatch.setattr(SAETraining, "step", poison)
    with pytest.raises(ValueError, match="loss is not finite at step 6"):
        train(text)
    for name, value in parameters["before"].items():
        assert torch.equal(value, parameters["after"][name]), name
    dump = json.loads((home_of(text) / "nonfinite-TopK_text_t-step6.json").read_text())
    assert len(dump["input_ids"]) == 4 == len(dump["rows"]) and dump["step"] == 6


def training_of(text, name, n_tokens=48):
    """(an SAETraining, its batch)"""
    cfg = parse("train", arguments(text, "--model", name))
    cfg.optimizer, cfg.grad_clip, cfg.steps = "adam", 0.0, 1
    torch.manual_seed(0)
    training = SAETraining(build(name, 32, 8, {"latent_size": 64, "k": 4}), name, {}, cfg, 10)
    training.mode(True)
    hidden = {
        site: torch.randn(n_tokens, 32, generator=torch.Generator().manual_seed(site))
        for site in training.sae.sites()
    }
    return training, LocalBatch(hidden, torch.arange(n_tokens), n_tokens, 0)


@pytest.mark.parametrize("name", ["TopK", "Gated", "RouteSAE", "Crosscoder"])
def test_out_of_memory_halves_the_slices_and_keeps_the_gradient_of_the_whole_batch(
    text, monkeypatch, capsys, name
):
    whole, batch = training_of(text, name)
    whole.step(batch, 0, True)
    sliced, _ = training_of(text, name)
    original = sliced.sae.autoencode

    def limited(x, *args):
        if len(x) > 15:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(x, *args)

    def never(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sliced.sae, "autoencode", limited)
    sliced.step(batch, 0, True)
    assert sliced.parts == 4 and "in 4 parts" in capsys.readouterr().out
    others = dict(sliced.sae.named_parameters())
    for key, parameter in whole.sae.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, others[key].grad, rtol=1e-4, atol=1e-6), key
    assert torch.equal(whole.sae.tokens_since_fired, sliced.sae.tokens_since_fired)
    assert sliced.last[0].latents.shape == whole.last[0].latents.shape
    monkeypatch.setattr(sliced.sae, "autoencode", never)
    with pytest.raises(torch.OutOfMemoryError):
        sliced.step(batch, 1, True)


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
    assert interval("500") == (500, "steps")
    assert interval("90s") == (90, "s") == interval("1.5m")
    assert interval("2h") == (7200, "s")
    for bad in ("x", "-1", "1.5", "nanm", "m", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            interval(bad)
    names = {files.safe_name("+".join(["Ünicode"] * 30) + end) for end in "ab"}
    assert len(names) == 2 and max(len(name.encode()) for name in names) <= 120
