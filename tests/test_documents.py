"""Every command of README and docs/ runs: on a small text and few tokens, in the order of its page. What needs the hub or minutes is named here."""

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
ELSEWHERE = {  # run as a whole by another test, by a script of its own or by hand before a release; or they need the hub
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
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def supply(path):
    """A checkpoint under the name that a page uses: a copy of one that is there. NAME of a run: one that is there."""
    if path.startswith("outputs/runs/NAME"):
        return [path.replace("NAME", next(Path("outputs/runs").iterdir()).name)]
    if path.startswith("outputs/SAE_models/") and not glob.glob(path):
        real = next(Path("outputs/SAE_models").glob("RouteSAE*.pt"))
        for suffix in (".pt", ".json"):
            shutil.copy(real.with_suffix(suffix), Path(path.replace("*", "x")).with_suffix(suffix))
    return sorted(glob.glob(path)) if "*" in path and path.startswith("outputs") else [path]


def run(monkeypatch, target, arguments):
    monkeypatch.setattr(sys, "argv", [target, *arguments])
    try:
        if target.endswith(".py"):
            runpy.run_path(str(ROOT / target), run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, (target, arguments, stop.code)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    found = list(commands(page))
    if not found:
        pytest.skip("no command on this page")
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "path" / "to" / "text" / "text.jsonl"
    text.parent.mkdir(parents=True)
    lines = [
        json.dumps(
            {
                "text": f"Return the {i}th value of the array, or raise ValueError if {i * 7} is larger. "
                * 4
            }
        )
        for i in range(250)
    ]
    text.write_text("\n".join(lines))
    (tmp_path / "path" / "to" / "model").symlink_to(DEMO_LM)
    monkeypatch.setenv("MODEL_PATH", str(DEMO_LM))
    monkeypatch.setenv("DATA_PATH", str(text.parent))
    run(
        monkeypatch,
        "train.py",
        ["--model", "RouteSAE", "TopK", "--topk_relu", "1", *SMALL["train"]],
    )  # what pages take for granted
    run(
        monkeypatch,
        "apply.py",
        ["--SAE_path", "outputs/SAE_models/RouteSAE_text.pt", *SMALL["apply"]],
    )
    for number, words in enumerate(found):
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words[0] == "bash":
            assert (ROOT / words[1]).exists(), words
            if words[1] in ELSEWHERE:
                continue
            line = (ROOT / words[1]).read_text().split("python ")[1].splitlines()[0]
            words = ["python", *shlex.split(line.replace('"$@"', "")), *words[2:]]
        if words[0] == "torchrun":
            at = next(i for i, word in enumerate(words) if word.endswith(".py"))
            config.parse(
                words[at][:-3], words[at + 1 :]
            )  # run with several processes by tests/test_distributed.py
            continue
        if words[0] != "python":
            assert words[0] in ("source", "git", "cd", "pip", "sbatch", "export", "hf"), words
            continue
        if any(word in ("MODEL", "NAME") or word.startswith("user/") for word in words):
            config.parse(
                words[1][:-3], words[2:]
            )  # a hub name or someone else's file: tests/test_formats.py and test_hub.py open such
            continue
        words = [one for word in words[1:] for one in supply(word.replace("/path/to/", "path/to/"))]
        if words[0] == "-m":
            if not words[1].startswith(MODULES_ELSEWHERE):
                contexts = [word for word in words[2:] if word.endswith("_contexts.json")]
                for path in contexts:
                    if not Path(path).exists():
                        shutil.copy("outputs/contexts/RouteSAE_text_contexts.json", path)
                run(monkeypatch, words[1], words[2:])
            continue
        stage = words[0][:-3]
        more = list(SMALL[stage])
        if stage == "train":
            more += ["--tag", f"c{number}"]
        if stage == "interpret" and "--api_base" in words:
            more += ["--dry_run", "1"]  # the prompts are written, nothing is sent
        run(monkeypatch, words[0], [*words[1:], *more])
