"""The course of a training is drawn from its metrics.jsonl alone."""

import json
import sys

import pytest

from src import plots


def lines(n):
    for step in range(1, n + 1):
        common = {
            "step": step,
            "tokens": 100 * step,
            "tokens_per_s": 5,
            "lr": 0.1,
            "loss": 1 / step,
        }
        yield {
            "sae": "RouteSAE_t",
            "sites": [4, 5, 6],
            **common,
            "NormMSE": 0.9 / step,
            "AuxK": 0.1 / step,
            "L0": 16.0,
            "dead": 0.1,
        } | {"share": [0.5, 0.3, 0.2]}
        yield {
            "sae": "Gated_t",
            "sites": [5],
            **common,
            "NormMSE": 0.5 / step,
            "L1": 0.5,
            "GateAux": 0.2,
            "L0": 900 / step,
            "dead": 0.0,
        }


def test_every_term_l0_dead_share_and_the_sites_are_drawn(tmp_path, monkeypatch, capsys):
    import matplotlib.pyplot as plt

    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "\n".join(json.dumps(line) for line in lines(5)) + '\n{"sae": "Gat'
    )  # killed while writing
    drawn = {}
    monkeypatch.setattr(plt, "close", lambda figure: drawn.update(figure=figure))
    monkeypatch.setattr(sys, "argv", ["plots", str(path), str(tmp_path / "course.png")])
    plots.main()
    mse, terms, l0, dead, shares = drawn["figure"].axes
    assert [line.get_label() for line in terms.lines] == [
        "RouteSAE_t: AuxK",
        "Gated_t: L1",
        "Gated_t: GateAux",
    ]
    assert list(mse.lines[1].get_ydata()) == [0.5 / step for step in range(1, 6)] and list(
        mse.lines[1].get_xdata()
    ) == [100, 200, 300, 400, 500]
    assert (
        list(l0.lines[0].get_ydata()) == [16.0] * 5 and list(dead.lines[0].get_ydata()) == [0.1] * 5
    )
    assert [text.get_text() for text in shares.get_legend().get_texts()] == [
        "site 4",
        "site 5",
        "site 6",
    ]
    assert (tmp_path / "course.png").read_bytes().startswith(
        b"\x89PNG"
    ) and "course.png" in capsys.readouterr().out


def test_a_run_without_lines_is_one_clear_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl has no line yet"):
        plots.course(tmp_path / "metrics.jsonl")
