"""Every command of README and docs/ runs, on a small text and few tokens, in the order of its page.

Commands that need the hub or many minutes are named here; other tests or people run them.
"""

import glob
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from src import config
from src.files import DEMO_LM

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    page
    for page in [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]
    if page.name != "LOG.md"
]
# Run as a whole by another test or by hand before a release, or in need of the hub.
SCRIPTS_ELSEWHERE = {
    "scripts/quickstart.sh",
    "scripts/test.sh",
    "scripts/download_model.sh",
    "scripts/download_data.sh",
    "scripts/evaluate_compare.sh",
    "scripts/paper_figures.sh",
    "scripts/slurm_train.sh",
    "tests/interop/run.sh",
}
MODULES_ELSEWHERE = ("examples.", "benchmarks.", "experiments.", "tests.")
ROWS = ["--max_length", "32", "--batch_size", "8"]
SMALL = {
    "train": [*ROWS, "--max_tokens", "2000", "--latent_size", "64"],
    "evaluate": [*ROWS, "--max_tokens", "300"],
    "apply": [*ROWS, "--max_tokens", "1500", "--act_threshold", "0.1"],
    "interpret": ["--sample_latents", "3"],
    "steer": ["--max_new_tokens", "2"],
    "export": [],
}


def commands(page):
    """The commands of the bash blocks of a page, each as a list of words."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def existing_paths(word):
    """The paths that stand for a word of a page: its example names get files of this test."""
    word = word.replace("/path/to/", "path/to/")
    if word.startswith("outputs/runs/NAME"):
        return [word.replace("NAME", next(Path("outputs/runs").iterdir()).name)]
    if word.startswith("outputs/SAE_models/") and not glob.glob(word):
        trained = next(Path("outputs/SAE_models").glob("RouteSAE*.pt"))
        for suffix in (".pt", ".json"):
            named = Path(word.replace("*", "x")).with_suffix(suffix)
            shutil.copy(trained.with_suffix(suffix), named)
    if word.startswith("outputs") and "*" in word:
        return sorted(glob.glob(word))
    return [word]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs an entry or a module, beside a text, a model and two trained SAEs."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "path" / "to"
    (folder / "text").mkdir(parents=True)
    (folder / "model").symlink_to(DEMO_LM)
    sentence = "Return the {}th value of the array, or raise ValueError if {} is larger. "
    lines = [json.dumps({"text": sentence.format(i, i * 7) * 4}) for i in range(250)]
    (folder / "text" / "text.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("MODEL_PATH", str(DEMO_LM))
    monkeypatch.setenv("DATA_PATH", str(folder / "text"))

    def run(target, *arguments):
        monkeypatch.setattr(sys, "argv", [target, *arguments])
        try:
            if target.endswith(".py"):
                runpy.run_path(str(ROOT / target), run_name="__main__")
            else:
                runpy.run_module(target, run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, (target, arguments, stop.code)

    # What the pages take for granted.
    run("train.py", "--model", "RouteSAE", "TopK", "--topk_relu", "1", *SMALL["train"])
    run("apply.py", "--SAE_path", "outputs/SAE_models/RouteSAE_text.pt", *SMALL["apply"])
    return run


def command_of_script(words):
    """The python command in a script, with the arguments of the page."""
    script = (ROOT / words[1]).read_text()
    line = script.split("python ")[1].splitlines()[0]
    return ["python", *shlex.split(line.replace('"$@"', "")), *words[2:]]


def parse_only(words):
    """Check the options of a command that cannot run here."""
    index = next(index for index, word in enumerate(words) if word.endswith(".py"))
    config.parse(words[index].removesuffix(".py"), words[index + 1 :])


def run_module(run, module, arguments):
    if module.startswith(MODULES_ELSEWHERE):
        return
    for path in arguments:
        if path.endswith("_contexts.json") and not Path(path).exists():
            shutil.copy("outputs/contexts/RouteSAE_text_contexts.json", path)
    run(module, *arguments)


def run_entry(run, entry, arguments, number):
    stage = entry.removesuffix(".py")
    options = list(SMALL[stage])
    if stage == "train":
        options += ["--tag", f"c{number}"]
    if stage == "interpret" and "--api_base" in arguments:
        # The prompts are written, nothing is sent.
        options += ["--dry_run", "1"]
    run(entry, *arguments, *options)


def run_command(run, words, number):
    program = words[0]
    if program == "bash":
        assert (ROOT / words[1]).exists(), words
        if words[1] in SCRIPTS_ELSEWHERE:
            return
        words = command_of_script(words)
    elif program == "torchrun":
        # tests/test_distributed.py runs several processes.
        return parse_only(words)
    elif "explore.py" in words:
        # It serves until it is stopped; tests/test_explore.py runs its server.
        return parse_only(words)
    elif program != "python":
        assert program in ("source", "git", "cd", "pip", "sbatch", "export", "hf"), words
        return
    if any(word in ("MODEL", "NAME") or word.startswith("user/") for word in words):
        # A hub name or a file of someone else: tests/test_formats.py and test_hub.py open such.
        return parse_only(words)
    arguments = [path for word in words[1:] for path in existing_paths(word)]
    if arguments[0] == "-m":
        run_module(run, arguments[1], arguments[2:])
    else:
        run_entry(run, arguments[0], arguments[1:], number)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, request):
    page_commands = list(commands(page))
    if not page_commands:
        pytest.skip("no command on this page")
    run = request.getfixturevalue("run")
    for number, words in enumerate(page_commands):
        run_command(run, words, number)
