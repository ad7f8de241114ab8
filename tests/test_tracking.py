"""--use_wandb: a second place for the lines of metrics.jsonl, whose failures stop nothing. A stand-in for the package, no network."""

import json
import sys
from types import SimpleNamespace

import pytest

from src.config import parse
from src.files import DEMO_LM
from src.trainer import Trainer


class Fake:
    """Stands for the module and the run; `broken` names the call that fails."""

    def __init__(self, broken=""):
        self.broken, self.lines, self.given, self.finished = broken, [], {}, False

    def _maybe(self, call):
        if call == self.broken:
            raise RuntimeError(f"{call}: the network is down")

    def init(self, **given):
        self._maybe("init")
        self.given = given
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values, step):
        if len(self.lines) == 2:
            self._maybe("log")
        self.lines.append((step, values))

    def finish(self):
        self._maybe("finish")
        self.finished = True


@pytest.fixture
def train(tmp_path, monkeypatch):
    text = tmp_path / "t.jsonl"
    text.write_text(
        "\n".join(
            json.dumps({"text": f"Value {i} of the array, or {i * i} where that is larger. " * 4})
            for i in range(60)
        )
    )

    def run(module, *more):
        monkeypatch.setitem(sys.modules, "wandb", module)
        where = [
            "--model_path",
            str(DEMO_LM),
            "--data_path",
            str(text),
            "--output_dir",
            str(tmp_path / "out"),
            "--dtype",
            "float32",
        ]
        sizes = [
            "--latent_size",
            "64",
            "--k",
            "4",
            "--max_length",
            "32",
            "--batch_size",
            "4",
            "--max_samples",
            "20",
        ]
        Trainer(
            parse("train", [*where, *sizes, "--use_wandb", "--tag", "t", "--overwrite", *more])
        ).run()
        return [
            json.loads(line) for line in (tmp_path / "out" / "runs" / "t" / "metrics.jsonl").open()
        ]

    return run


def test_wandb_gets_the_lines_of_the_file_and_every_option(train):
    fake = Fake()
    lines = train(fake, "--wandb_project", "mine", "--model", "TopK", "Vanilla")
    assert (
        fake.finished
        and fake.given["project"] == "mine"
        and fake.given["config"]["max_length"] == 32
    )
    assert len(fake.lines) == len(lines) == 10
    for (step, sent), line in zip(fake.lines, lines, strict=True):
        assert step == line["step"] and sent[f"{line['sae']}/NormMSE"] == line["NormMSE"]


@pytest.mark.parametrize(
    "broken,said",
    [
        ("import", "no wandb logging (ModuleNotFoundError"),
        ("init", "no wandb logging (RuntimeError: init: the network is down)"),
        ("log", "wandb stopped (RuntimeError: log: the network is down)"),
        ("finish", "wandb stopped (RuntimeError: finish"),
    ],
)
def test_its_failures_are_one_warning_and_the_training_goes_on(train, capsys, broken, said):
    fake = None if broken == "import" else Fake(broken)
    lines = train(fake)
    told = capsys.readouterr().out
    assert told.count("warning") == 1 and said in told and "saved " in told
    assert len(lines) == 5 and all(line["NormMSE"] > 0 for line in lines)
    assert broken != "log" or len(fake.lines) == 2
