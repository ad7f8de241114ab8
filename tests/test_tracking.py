"""--use_wandb: a second place for the lines of metrics.jsonl, whose failures stop nothing.

A fake takes the place of the package; no network is used.
"""

import json
import sys
from types import SimpleNamespace

import pytest

from src.config import parse
from src.files import DEMO_LM
from src.trainer import Trainer


class FakeWandb:
    """The module and its run in one; `broken` names the call that fails."""

    def __init__(self, broken=""):
        self.broken = broken
        self.lines = []
        self.init_arguments = {}
        self.finished = False

    def _fail_if_broken(self, call):
        if call == self.broken:
            raise RuntimeError(f"{call}: the network is down")

    def init(self, **arguments):
        self._fail_if_broken("init")
        self.init_arguments = arguments
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values, step):
        if len(self.lines) == 2:
            self._fail_if_broken("log")
        self.lines.append((step, values))

    def finish(self):
        self._fail_if_broken("finish")
        self.finished = True


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function that trains with a module in the place of wandb, and returns metrics.jsonl."""
    text, out = tmp_path / "t.jsonl", tmp_path / "out"
    sentence = "Value {} of the array, or {} where that is larger. "
    lines = [json.dumps({"text": sentence.format(i, i * i) * 4}) for i in range(60)]
    text.write_text("\n".join(lines))
    argv = ["--model_path", str(DEMO_LM), "--data_path", str(text), "--output_dir", str(out)]
    argv += ["--dtype", "float32", "--latent_size", "64", "--k", "4", "--max_length", "32"]
    argv += ["--batch_size", "4", "--max_samples", "20", "--use_wandb", "--tag", "t", "--overwrite"]

    def run(module, *options):
        monkeypatch.setitem(sys.modules, "wandb", module)
        Trainer(parse("train", [*argv, *options])).run()
        return [json.loads(line) for line in (out / "runs" / "t" / "metrics.jsonl").open()]

    return run


def test_wandb_gets_the_lines_of_the_file_and_every_option(train):
    fake = FakeWandb()
    lines = train(fake, "--wandb_project", "mine", "--model", "TopK", "Vanilla")
    assert fake.finished
    assert fake.init_arguments["project"] == "mine"
    assert fake.init_arguments["config"]["max_length"] == 32
    assert len(fake.lines) == len(lines) == 10
    for (step, sent), line in zip(fake.lines, lines, strict=True):
        assert step == line["step"]
        assert sent[f"{line['sae']}/NormMSE"] == line["NormMSE"]


@pytest.mark.parametrize(
    "broken, message",
    [
        ("import", "no wandb logging (ModuleNotFoundError"),
        ("init", "no wandb logging (RuntimeError: init: the network is down)"),
        ("log", "wandb stopped (RuntimeError: log: the network is down)"),
        ("finish", "wandb stopped (RuntimeError: finish"),
    ],
)
def test_its_failures_are_one_warning_and_the_training_goes_on(train, capsys, broken, message):
    # None in sys.modules makes the import fail.
    fake = None if broken == "import" else FakeWandb(broken)
    lines = train(fake)
    output = capsys.readouterr().out
    assert output.count("warning") == 1 and message in output
    assert "saved " in output
    assert len(lines) == 5 and all(line["NormMSE"] > 0 for line in lines)
    if broken == "log":
        assert len(fake.lines) == 2
