"""The examples run in their order on a small text, and say what they are there to say."""

import json
import runpy
import sys

import pytest

from src.files import DEMO_LM
from src.reader import Reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data is called demo, as the built-in text is."""
    folder = tmp_path_factory.mktemp("examples")
    lines = [
        json.dumps(
            {
                "text": f"Return the {i}th value of the array, or raise ValueError if {i * 7} is larger. "
                * 4
            }
        )
        for i in range(200)
    ]
    (folder / "demo.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def place(folder, monkeypatch):
    """Environment of a user."""
    monkeypatch.setenv("DATA_PATH", str(folder / "demo.jsonl"))
    monkeypatch.setenv("MODEL_PATH", str(DEMO_LM))
    monkeypatch.setenv("OUTPUT_DIR", str(folder / "out"))
    return folder


SMALL = ["--max_length", "32", "--batch_size", "8"]
ORDER = {
    "train": [*SMALL, "--max_tokens", "4000", "--latent_size", "64", "--k", "4"],
    "evaluate": [*SMALL, "--max_tokens", "600"],
    "apply": [*SMALL, "--max_tokens", "3000", "--act_threshold", "0.1"],
    "interpret": [],
    "read": [],
    "steer": ["--max_new_tokens", "2"],
}
SAYS = {
    "train": "tokens; NormMSE of the last step",
    "evaluate": "share of tokens by site",
    "apply": "latents with contexts",
    "interpret": "mean score",
    "read": "strongest latents",
    "steer": "steered:",
}


def test_every_stage_has_an_example_that_runs(place, capsys, monkeypatch):
    for name, flags in ORDER.items():
        monkeypatch.setattr(sys, "argv", [name, *flags])
        runpy.run_module(f"examples.{name}", run_name="__main__")
        assert SAYS[name] in capsys.readouterr().out, name


def test_a_reader_gives_codes_sites_and_contexts_of_a_text(place):
    paths = {
        name: place / "out" / "SAE_models" / f"{name}_demo_example.pt"
        for name in ("RouteSAE", "TopK")
    }
    reader = Reader(paths["RouteSAE"])
    reading = reader.read("Return the value of the array.")
    assert "".join(reading.tokens) == "Return the value of the array." and "Return" in str(reading)
    assert (
        reading.latents.shape == (len(reading.tokens), 64)
        and (reading.latents != 0).sum(1).eq(4).all()
    )
    assert reading.weights.shape == (len(reading.tokens), 9) and set(reading.sites) <= set(
        range(4, 13)
    )
    strongest = reading.strongest(1)[0][0]
    assert reading.latents[0, strongest[0]] == strongest[1] == reading.latents[0].max()
    some = next(latent for latent in range(64) if reader.contexts(latent))
    values = [value for value, _ in reader.contexts(some)]
    assert values == sorted(values, reverse=True) and values[0] > 0.1
    plain = Reader(str(paths["TopK"])).read("Return the value")
    assert plain.sites is None and plain.weights is None
    with pytest.raises(ValueError, match="no option colour"):
        Reader(paths["TopK"], colour="red")
    with pytest.raises(ValueError, match="no token that counts"):
        reader.read("")
