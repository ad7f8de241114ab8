"""The routing experiment on a real language model: the complete command on a tiny one."""

# ruff: noqa: F811  (the fixture `command` is imported)

import json

import pytest

from experiments import real_routing
from experiments.real_routing_report import seed_interval
from src.config import parse
from src.evaluator import Evaluator
from tests.test_routing_experiment import command  # noqa: F401

ASSIGNED = ("router", "best", "random")


def evaluate(out, *argv):
    common = ["--output_dir", str(out), "--dtype", "float32", "--metric", "NormMSE", "KLDiv"]
    return Evaluator(parse("evaluate", [*argv, *common])).run()


def test_the_experiment_compares_unions_and_controls_and_agrees_with_the_evaluator(
    command, tmp_path, capsys
):
    out = tmp_path / "out"
    argv = [*command, "--seeds", "1", "--choose_tokens", "2000", "--kl_every", "1"]
    assert real_routing.main(argv) == 0, capsys.readouterr().err
    result = json.loads((out / "real_routing.json").read_text())
    lines = {line["runs"][0]: line for line in result["lines"] if len(line["runs"]) == 1}
    expected = {f"{size}_by_{way}" for size in ("small", "full") for way in ASSIGNED}
    expected |= {"route", "random", "shares", "untrained", "route_permuted", "frozen_decoder"}
    assert expected <= lines.keys()
    value = {name: line["values"]["NormMSE"]["seeds"] for name, line in lines.items()}
    for size in ("small", "full"):
        assert all(map(float.__le__, value[f"{size}_by_best"], value[f"{size}_by_router"]))
    assert value["full_by_best"][0] < value["small_by_best"][0]
    assert [lines[name].get("latents") for name in ("small_by_best", "full_by_best")] == [30, 96]
    assert [lines[f"full_by_{way}"]["encoders"] for way in ASSIGNED] == [1, 3, 1]
    assert lines["route"]["below"]["KL"]["value"] == 0
    check_against_evaluator(value, lines, out)
    for name in ("real_routing_gains.png", "real_routing_sites.png"):
        assert (out / name).stat().st_size > 10_000
    assert "TopK, best single site" in (out / "real_routing.md").read_text()
    # Nothing is made twice, and parts can be asked for.
    written = {path: path.stat().st_mtime_ns for path in (out / "measured").iterdir()}
    assert real_routing.main([*argv, "--only", "small", "measure"]) == 0
    assert written == {path: path.stat().st_mtime_ns for path in (out / "measured").iterdir()}


def check_against_evaluator(value, lines, out):
    """A union and a RouteSAE are measured as evaluate.py measures them, which reads all rows."""
    folder = out / "SAE_models"
    topks = [str(folder / f"TopK_text_layer{site}_s1.pt") for site in (1, 2, 3)]
    routed = str(folder / "RouteSAE_text_sites1-2-3_s1.pt")
    results = evaluate(out, "--SAE_path", routed, "--union", *topks, "--assign", routed, "oracle")
    names = ("route", "full_by_router", "full_by_best")
    for name, measured in zip(names, results.values(), strict=True):
        assert value[name][0] == pytest.approx(measured["NormMSE"], rel=1e-3), name
        assert lines[name]["values"]["KL"]["seeds"][0] == pytest.approx(measured["KLDiv"], rel=1e-3)


def test_a_pace_that_the_batches_of_a_file_cannot_keep_is_refused(capsys):
    with pytest.raises(SystemExit):
        real_routing.parse_args(["--kl_every", "12"])
    assert "argument --kl_every: invalid choice: 12 (choose from" in capsys.readouterr().err


def test_an_interval_over_seeds_needs_more_than_one():
    assert seed_interval([0.2]) is None
    low, high = seed_interval([0.1, 0.2, 0.3])
    assert low == pytest.approx(0.2 - 4.303 * 0.1 / 3**0.5) and high == pytest.approx(0.4 - low)


def test_a_part_that_needs_another_says_so(command, capsys):
    assert real_routing.main([*command, "--only", "shares"]) == 2
    assert "the part routed comes first" in capsys.readouterr().err
