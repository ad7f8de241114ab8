"""What the command line says: help, examples, near misses, and the forms in which values come."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from src import config, stage_help

ROOT = Path(__file__).resolve().parent.parent

TRAINING = (
    "lr betas optimizer auxk_coeff b_pre_init router_objective latent_size dead_tokens".split()
)


def printed_help(stage, capsys, *more):
    with pytest.raises(SystemExit) as stop:
        config.parse(stage, ["--help", *more])
    assert stop.value.code == 0
    return capsys.readouterr().out


def shown(text):
    return set(re.findall(r"^  (?:-h \[all\], )?--(\w+)", text, re.M))


@pytest.mark.parametrize("stage", config.STAGES)
def test_help_shows_at_most_fifteen_options_and_help_all_every_one(stage, capsys):
    brief = shown(printed_help(stage, capsys)) - {"help"}
    every = shown(printed_help(stage, capsys, "all")) - {"help"}
    assert brief == set(stage_help.MAIN[stage].split()) <= every and len(brief) <= 15
    for name, option in config.OPTIONS.items():
        groups = set(option.group.split()) & set(config.STAGES[stage])
        if groups - {"sae"}:
            assert name in every, name


@pytest.mark.parametrize("stage", ["evaluate", "apply", "interpret", "steer", "export"])
def test_a_stage_that_does_not_train_lists_no_training_option(stage, capsys):
    assert not shown(printed_help(stage, capsys, "all")) & set(TRAINING)
    if stage in ("evaluate", "apply"):  # which take them all the same, as earlier versions did
        assert config.parse(stage, ["--latent_size", "64"]).latent_size == 64


@pytest.mark.parametrize("stage", config.STAGES)
def test_the_examples_of_the_help_are_command_lines(stage, capsys):
    text = printed_help(stage, capsys)
    for example in stage_help.EXAMPLES[stage]:
        assert f"  python {stage}.py {example}\n" in text
        config.parse(stage, shlex.split(example))


@pytest.mark.parametrize(
    "stage, argv, expected",
    [
        ("train", ["--mdel", "TopK"], "there is no option --mdel; did you mean --model?"),
        ("train", ["--max-tokens", "5"], "did you mean --max_tokens?"),
        ("train", ["-k", "5"], "did you mean --k?"),
        ("train", ["--prompt", "x"], "--prompt is no option of train.py; it belongs to steer.py"),
        ("train", ["--model", "RoutSAE"], "did you mean RouteSAE?"),
        ("evaluate", ["--metric", "KlDv"], "did you mean KLDiv?"),
        ("evaluate", ["stray"], "unrecognized arguments: stray"),
        ("train", ["--max_tokens", "1.5"], "such as 250, 100k or 1M"),
        ("train", ["--max_tokens", "infk"], "such as 250, 100k or 1M"),
        ("train", ["--max_tokens", "0.0001k"], "such as 250, 100k or 1M"),
    ],
)
def test_a_near_miss_is_suggested(stage, argv, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(stage, argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.count("\n") == 1


def test_counts_may_be_short_and_names_in_any_case(tmp_path):
    argv = "--max_tokens 1.1M --latent_size 4k --dead_tokens 100K --model topk --recipe Published"
    cfg = config.parse("train", argv.split())
    assert (cfg.max_tokens, cfg.latent_size, cfg.dead_tokens) == (1_100_000, 4000, 100_000)
    assert (cfg.model, cfg.recipe) == (["TopK"], "published")
    assert config.parse("evaluate", ["--metric", "normmse", "kldiv"]).metric == ["NormMSE", "KLDiv"]
    options = tmp_path / "options.yaml"
    options.write_text("max_tokens: 100k\nmodel: [TOPK]\n")
    assert config.parse("train", ["--config", str(options)]).max_tokens == 100_000


PROGRAMS = [
    f"{path.parent.name}.{path.stem}"
    for path in sorted(ROOT.glob("benchmarks/*.py")) + sorted(ROOT.glob("experiments/*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]
# Another program starts these, with a job as JSON, some in an environment of another library.
CHILDREN = {f"benchmarks.{name}" for name in "contenders peer_saelens peer_sparsify".split()}
CHILDREN.add("benchmarks.quality_peers")
SCRIPTS = {"benchmarks.gpu": "gpu.sh", "experiments.paper_figures": "paper_figures.sh"}


def test_the_programs_of_other_programs_exist():
    assert CHILDREN | set(SCRIPTS) <= set(PROGRAMS)


@pytest.mark.parametrize("module", sorted(set(PROGRAMS) - CHILDREN))
def test_each_program_beside_the_stages_has_a_help_of_its_own(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    shown_help = capsys.readouterr().out
    assert stop.value.code == 0
    assert SCRIPTS.get(module, f"python -m {module}") in shown_help.splitlines()[0]
    assert len(shown_help.splitlines()) > 3
