"""What can be checked without the text and the weights of the language model is checked first."""

import pytest
from test_security import run
from test_trust import save_sae

from src import demo, lm
from src.model import build
from src.reader import Reader

WRONG_TRAININGS = [
    ["--layer", "99"],
    ["--layer", "2", "99"],
    ["--k", "5000"],
    ["--device", "cuda:99"],
    ["--device", "tpu"],
    ["--model", "RouteSAE", "--start_layer", "5", "--end_layer", "3"],
    ["--model", "MLSAE", "--end_layer", "99"],
    ["--hidden_size", "7"],
    ["--n_layers", "3"],
    ["--route_shares", "-1"],
]


@pytest.fixture
def nothing_is_made(monkeypatch):
    """Neither the demo's text nor the weights of the language model."""

    def fail(*_, **__):
        pytest.fail("text or language model made before a check")

    monkeypatch.setattr(demo, "build_corpus", fail)
    monkeypatch.setattr(demo, "open_rows", fail)
    monkeypatch.setattr(lm, "get_language_model", fail)


@pytest.mark.parametrize("more", WRONG_TRAININGS)
def test_a_training_that_cannot_be_is_refused_first(nothing_is_made, tmp_path, capsys, more):
    code, printed = run("train", capsys, "--output_dir", tmp_path, *more)
    assert code == 2 and printed.count("error:") == 1, printed


@pytest.mark.parametrize("stage", ["evaluate", "apply", "steer"])
@pytest.mark.parametrize("wrong", ["width", "site", "device", "latent"])
def test_an_sae_that_does_not_fit_is_refused_first(
    nothing_is_made, tmp_path, capsys, monkeypatch, stage, wrong
):
    sizes = {"width": (64, 2), "site": (128, 90)}.get(wrong, (128, 2))
    monkeypatch.setattr(
        "test_trust.build",
        lambda *_: build("TopK", sizes[0], None, {"latent_size": 16, "k": 2, "layer": sizes[1]}),
    )
    path = save_sae(tmp_path)
    argv = ["--SAE_path", path, "--output_dir", tmp_path / "out"]
    if stage == "steer":
        argv += ["--prompt", "x", "--zero", "99" if wrong == "latent" else "1"]
    elif wrong == "latent":
        return
    if wrong == "device":
        argv += ["--device", "cuda:99"]
    code, printed = run(stage, capsys, *argv)
    assert code == 2 and printed.count("error:") == 1, printed
    assert {"device": "--device", "latent": "latent 99"}.get(wrong, "does not fit") in printed
    assert not (tmp_path / "out").exists()


def test_a_reader_makes_no_text(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "build_corpus", lambda: pytest.fail("text made"))
    reading = Reader(save_sae(tmp_path), output_dir=str(tmp_path)).read("Return the value.")
    assert len(reading.tokens) == len(reading.latents)
