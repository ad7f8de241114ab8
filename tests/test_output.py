"""Output is no way to die, and a full disk leaves what was there: every stage.

All six stages run, one after the other, in a process whose terminal, pipe or log file fails.
"""

import errno
import json
import os
import pty
import resource
import signal
import subprocess
import sys

import pytest

from src import checkpoint, files
from src.config import RESULT_DIRS, run_stage
from src.files import DEMO_LM
from src.trainer import Trainer

SIX_STAGES = """
import importlib, json, sys
from src.config import run_stage

codes = {}
for stage, argv in json.loads(sys.argv[1]).items():
    codes[stage] = run_stage(stage, getattr(importlib.import_module(stage), stage), argv)
with open(sys.argv[2], "w") as file:
    json.dump(codes, file)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text whose tokens are cached."""
    folder = tmp_path_factory.mktemp("home")
    sentence = "Return the {}th of {} values, or raise ValueError. "
    lines = [json.dumps({"text": sentence.format(i, i * 7) * 5}) for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def arguments(home, out):
    """{stage: its command line}"""
    place = ["--output_dir", str(out)]
    language_model = ["--model_path", str(DEMO_LM), "--dtype", "float32", "--device", "cpu"]
    text = ["--data_path", str(home / "text.jsonl"), "--max_length", "32", "--batch_size", "4"]
    inference = [*place, *language_model, *text, "--split", "all", "--max_samples", "8"]
    training = "--latent_size 64 --k 4 --max_samples 40 --save_every 3".split()
    return {
        "train": [*place, *language_model, *text, *training],
        "evaluate": inference,
        "apply": [*inference, "--act_threshold", "0", "--lines", "1"],
        "interpret": [*place, "--engine", "heuristic"],
        "steer": [*place, *language_model, "--zero", "1", "--prompt", "a", "--max_new_tokens", "2"],
        "export": place,
    }


def start(home, out, stdout, stderr=None):
    command = [sys.executable, "-c", SIX_STAGES, json.dumps(arguments(home, out))]
    return subprocess.Popen(
        [*command, str(home / f"{out.name}.json")],
        cwd=files.ROOT,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr or stdout,
        start_new_session=True,
    )


def full_file(home, out):
    with open("/dev/full", "w") as file:
        return start(home, out, file)


def pipe_without_reader(home, out):
    reader, writer = os.pipe()
    process = start(home, out, writer)
    os.close(writer)
    os.read(reader, 1)  # the program has begun to print
    os.close(reader)
    return process


def terminal_that_goes(home, out):
    terminal, program_side = pty.openpty()
    process = start(home, out, program_side)
    os.close(program_side)
    os.read(terminal, 1)
    os.close(terminal)
    return process


def closed_streams(home, out):
    command = [sys.executable, "-c", SIX_STAGES, json.dumps(arguments(home, out))]
    command = ["sh", "-c", '"$@" >&- 2>&-', "sh", *command, str(home / f"{out.name}.json")]
    return subprocess.Popen(command, cwd=files.ROOT, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "begin", [full_file, pipe_without_reader, terminal_that_goes, closed_streams]
)
def test_every_stage_keeps_its_results_when_its_output_fails(home, tmp_path, begin):
    out = tmp_path / begin.__name__
    process = begin(home, out)
    try:
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    codes = json.loads((home / f"{out.name}.json").read_text())
    assert codes == dict.fromkeys(RESULT_DIRS, 0)
    for stage, folder in RESULT_DIRS.items():
        assert any(path.is_file() for path in (out / folder).rglob("*")), stage


# ---------------------------------------------------------------------------------- a full disk


def run(stage, argv, function):
    try:
        return run_stage(stage, function, argv)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("stage", RESULT_DIRS)  # explore.py writes no result
def test_every_stage_finds_out_first_that_it_cannot_write(home, tmp_path, capsys, stage):
    (tmp_path / RESULT_DIRS[stage]).write_text("a file")
    argv = arguments(home, tmp_path)[stage]
    code = run(stage, argv, lambda cfg: pytest.fail("began"))
    assert code == 2
    assert f"cannot write to {tmp_path / RESULT_DIRS[stage]}" in capsys.readouterr().err


def test_leftovers_of_killed_writers_are_removed_at_the_start(home, tmp_path):
    for folder in RESULT_DIRS.values():
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ".x.json.abc.tmp").write_text("half")
        (tmp_path / folder / ".notes.tmp").write_text("of the user")
    for stage, argv in arguments(home, tmp_path).items():
        assert run(stage, argv, lambda cfg: None) == 0, stage
    assert {path.name for path in tmp_path.rglob("*.tmp")} == {".notes.tmp"}


def test_weights_that_do_not_fit_on_the_disk_leave_the_earlier_pair_and_one_line(
    home, tmp_path, capsys
):
    argv = [*arguments(home, tmp_path)["train"], "--save_every", "0"]
    weights = tmp_path / "SAE_models" / "TopK_text.pt"
    train_one = lambda cfg: Trainer(cfg).run()  # noqa: E731

    def train_on_small_disk(*more):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))  # weights take 16 kB
        try:
            return run("train", [*argv, *more], train_one)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # so that a write fails instead
    run("train", [*argv, "--tag", "cache"], train_one)  # tokens are cached without the limit
    capsys.readouterr()
    assert train_on_small_disk() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"cannot use {weights} ({os.strerror(errno.EFBIG)}); earlier results are" in error
    assert not weights.exists() and not weights.with_suffix(".json").exists()
    assert run("train", argv, train_one) == 0
    before = weights.read_bytes(), checkpoint.load(weights)[1]
    assert train_on_small_disk("--seed", "7", "--overwrite") == 2
    assert (weights.read_bytes(), checkpoint.load(weights)[1]) == before
    names = {path.name for path in weights.parent.iterdir() if "cache" not in path.name}
    assert names == {"TopK_text.pt", "TopK_text.json"}


def test_answers_that_do_not_fit_on_the_disk_are_one_line_with_the_file(tmp_path):
    contexts = [
        {"activation": 9.0 - i, "context": f"a <ACTIVATED>fox</ACTIVATED> {i}"} for i in range(4)
    ]
    table = {str(latent): {"contexts": {"fox": contexts}} for latent in range(3)}
    path = tmp_path / "S_contexts.json"
    path.write_text(json.dumps({"latent_context_map": table}))
    script = (
        "import resource, signal, sys; from src import interpreter;"
        "from src.config import run_stage;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "ask = interpreter.Interpreter._ask_all\n"
        "def limited(*args):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); return ask(*args)\n"
        "interpreter.Interpreter._ask_all = limited\n"
        "run = lambda cfg: interpreter.Interpreter(cfg).run()\n"
        "sys.exit(run_stage('interpret', run, sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", script, str(path), "--engine", "heuristic"]
    process = subprocess.run(
        [*argv, "--output_dir", str(tmp_path)],
        cwd=files.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    last = process.stderr.replace("\r", "\n").strip().split("\n")[-1]
    assert process.returncode == 2 and "cannot write" in last and "interp_S.jsonl (" in last
    kept = (tmp_path / "interpret" / "interp_S.jsonl").read_text()
    assert not kept or kept.endswith("\n")  # whole lines
