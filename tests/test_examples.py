"""The examples run one after the other on a small text, and print what their comments announce."""

import ast
import html
import json
import re
import runpy
import sys

import pytest

from src import files, names
from src.files import DEMO_LM
from src.reader import Reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text called demo, as the built-in text is."""
    folder = tmp_path_factory.mktemp("examples")
    sentence = "Return the {}th value of the array, or raise ValueError if {} is larger. "
    lines = [json.dumps({"text": sentence.format(i, i * 7) * 4}) for i in range(200)]
    (folder / "demo.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def user_folder(folder, monkeypatch):
    """The folder, with the environment variables that a user may set."""
    monkeypatch.setenv("DATA_PATH", str(folder / "demo.jsonl"))
    monkeypatch.setenv("MODEL_PATH", str(DEMO_LM))
    monkeypatch.setenv("OUTPUT_DIR", str(folder / "out"))
    return folder


SMALL = ["--max_length", "32", "--batch_size", "8"]
FLAGS = {  # by example, in the order in which they need each other's results
    "train": [*SMALL, "--max_tokens", "4000", "--latent_size", "64", "--k", "4"],
    "evaluate": [*SMALL, "--max_tokens", "600"],
    "apply": [*SMALL, "--max_tokens", "3000", "--act_threshold", "0.1"],
    "interpret": [],
    "read": [],
    "steer": ["--max_new_tokens", "2"],
}
OUTPUT = {
    "train": "NormMSE of the last step",
    "evaluate": "share of tokens by site",
    "apply": "latents with contexts",
    "interpret": "mean score",
    "read": "strongest latents",
    "steer": "\n  steered ",
}


def test_every_stage_has_an_example_that_runs(user_folder, capsys, monkeypatch):
    for name, flags in FLAGS.items():
        monkeypatch.setattr(sys, "argv", [name, *flags])
        runpy.run_module(f"examples.{name}", run_name="__main__")
        assert OUTPUT[name] in capsys.readouterr().out, name


def test_a_reader_gives_codes_sites_and_contexts_of_a_text(user_folder):
    weights = user_folder / "out" / "SAE_models"
    reader = Reader(weights / "RouteSAE_demo_example.pt")
    reading = reader.read("Return the value of the array.")
    n_tokens = len(reading.tokens)
    assert "".join(reading.tokens) == "Return the value of the array."
    assert "Return" in str(reading)
    assert reading.latents.shape == (n_tokens, 64)
    assert (reading.latents != 0).sum(1).eq(4).all()
    assert reading.weights.shape == (n_tokens, 9)
    assert set(reading.sites) <= set(range(4, 13))
    latent, strength = reading.strongest(1)[0][0]
    assert reading.latents[0, latent] == strength == reading.latents[0].max()
    latent_with_contexts = next(latent for latent in range(64) if reader.contexts(latent))
    strengths = [strength for strength, _ in reader.contexts(latent_with_contexts)]
    assert strengths == sorted(strengths, reverse=True) and strengths[0] > 0.1


def test_a_reading_names_its_strongest_features_and_is_a_strip_in_a_notebook(user_folder):
    reader = Reader(user_folder / "out" / "SAE_models" / "RouteSAE_demo_example.pt")
    text = "Return <b onclick=alert(1)>the</b>\nvalue of na\u00efve \u65e5\u672c \U0001f680"
    reading = reader.read(text)
    assert "".join(reading.tokens) == text
    features = reading.features(64)
    strengths = [feature.strength for feature in features]
    assert strengths == sorted(strengths, reverse=True) and min(strengths) > 0
    for feature in features:
        column = reading.latents[:, feature.latent]
        assert column.max() == column[feature.token] == feature.strength
        assert feature.label == reader.labels.get(feature.latent)
    labelled = [feature for feature in features if feature.label]
    assert labelled and not any("[by rule]" in feature.label for feature in labelled)
    strip = reading._repr_html_()
    assert "<b " not in strip and "&lt;" in strip and "\u23ce" in strip
    assert strip.count("<span style=") == len(reading.tokens) + len(set(reading.sites))
    named = {pair[0] for pairs in reading.strongest(3) for pair in pairs} & reader.labels.keys()
    assert named
    for latent in named:
        assert html.escape(f"{latent}: ") in strip
        assert html.escape(names.shortened(reader.labels[latent])[:80]) in strip


NOTEBOOK = files.ROOT / "examples" / "reading.ipynb"


def test_the_notebook_runs_and_its_stored_results_are_of_a_run_without_errors(
    user_folder, monkeypatch
):
    path = user_folder / "out" / "SAE_models" / "RouteSAE_demo_example.pt"
    monkeypatch.setenv("SAE_PATH", str(path))
    names = {}
    shown = []
    for cell in files.load_json(NOTEBOOK)["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["execution_count"] and cell["outputs"], cell["source"]
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        assert not re.search(r"/(home|tmp|root|work)/", json.dumps(cell["outputs"]))
        # As a notebook does: the value of the last line is shown, if it is an expression.
        *lines, last = ast.parse("".join(cell["source"])).body
        if not isinstance(last, ast.Expr):
            lines, last = [*lines, last], None
        exec(compile(ast.Module(lines, []), "cell", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    assert any(hasattr(value, "_repr_html_") for value in shown)


def test_a_reading_without_a_router_has_no_sites_and_wrong_requests_are_refused(user_folder):
    path = user_folder / "out" / "SAE_models" / "TopK_demo_example.pt"
    reader = Reader(str(path))
    reading = reader.read("Return the value")
    assert reading.sites is None and reading.weights is None
    with pytest.raises(ValueError, match="no option colour"):
        Reader(path, colour="red")
    with pytest.raises(ValueError, match="no token that counts"):
        reader.read("")
