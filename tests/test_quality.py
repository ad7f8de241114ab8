"""The benchmark of quality: its search for an L0, its settings and its table."""

import json

import pytest
import torch

from benchmarks import quality, quality_peers


@pytest.mark.parametrize("steepness, start", [(0.5, 1.0), (1.5, 0.4), (2.0, 30.0)])
def test_the_search_finds_the_coefficient_of_an_l0(steepness, start):
    tried = []

    def train(coefficient):
        l0 = min(500.0, 100 * coefficient**-steepness)
        tried.append(l0)
        return lambda x: (x, torch.arange(512).expand(len(x), -1) < round(min(l0, 512)))

    (x_hat, l0, dead), coefficient, trainings = quality_peers.at_target(
        train, torch.zeros(4, 3), 16, start
    )
    assert trainings == len(tried) <= quality_peers.MAX_TRAININGS
    assert l0 == pytest.approx(16, rel=0.2)
    assert dead == pytest.approx(1 - l0 / 512)
    assert x_hat.shape == (4, 3)


def test_a_model_with_k_is_trained_once():
    calls = []

    def train(coefficient):
        calls.append(coefficient)
        return lambda x: (x, torch.ones(len(x), 8, dtype=torch.bool))

    quality_peers.at_target(train, torch.zeros(4, 3), 2, None)
    assert calls == [None]


def row(library, model, setting, l0, error):
    line = {"library": library, "model": model, "setting": setting, "L0": l0, "NormMSE": error}
    return line | {"FVU": 0.2, "KL": 0.3, "dead": 0.0}


def test_the_table_has_defaults_and_the_best_near_the_target():
    results = [
        row("ours", "Vanilla", "default", 16.1, 0.2),
        row("SAELens", "Standard", "default", 15.0, 0.5),
        row("SAELens", "Standard", "x3", 16.0, 0.4),
        row("SAELens", "Standard", "x10", 40.0, 0.1),  # too dense to count
    ]
    lines = quality.table(results, k=16).splitlines()[2:]
    assert [line.split(" | ")[1:5] for line in lines] == [
        ["ours", "defaults", "16.1", "0.2000"],
        ["SAELens", "defaults", "15.0", "0.5000"],
        ["SAELens", "best, x3", "16.0", "0.4000"],
    ]


def test_our_models_are_measured_and_the_same_command_continues(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "FACTORS", {"default": None, "x2": 2.0})
    sizes = "--tokens 1500 --held_out 300 --latents 64 --k 4 --batch 512 --models Vanilla"
    argv = [*sizes.split(), "--libraries", "ours", "--output_dir", str(tmp_path)]
    results = quality.main(argv)
    assert [(r["model"], r["setting"]) for r in results] == [
        ("Vanilla", "default"),
        ("Vanilla", "x2"),
    ]
    for result in results:
        assert 0 < result["NormMSE"] < 2 and result["KL"] > 0
    saved = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(saved | {"results": saved["results"][:-1]}))
    capsys.readouterr()
    again = quality.main(argv)
    assert capsys.readouterr().out.count("'setting': ") == 1  # one was trained
    assert again[-1]["NormMSE"] == pytest.approx(results[-1]["NormMSE"], rel=1e-4)
