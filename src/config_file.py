"""A file of options: YAML, JSON, or the recipe of a trained SAE. What it says, as words of a command line. Standard library and PyYAML."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

OFFICIAL = {"lamda": "l1_coeff", "threshold": "act_threshold"}  # what the published code calls them
# Never taken from a training's recipe by another stage: sizes of that run, its part of the text, what its machine was made to do.
OF_ITS_RUN = {"split", "max_samples", "max_tokens", "dtype", "seed", "compile_lm"}


def _load(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises ValueError in one line where there is none."""
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            found = json.loads(text)
        else:
            import yaml

            try:
                found = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(" ".join(str(error).split())) from error
    except ValueError as error:
        raise ValueError(f"--config {path} is not readable ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"--config {path} holds {'nothing' if found is None else 'no `option: value` lines'}"
        )
    return {str(key): value for key, value in found.items()}


def _of_the_recipe(
    recipe: dict[str, Any], path: Path, stage: str, known: Collection[str]
) -> dict[str, Any]:
    """The options in a trained SAE's recipe; the weights beside it are the SAE of every stage but training."""
    options = dict(recipe.get("options", {})) | {
        key: recipe[key] for key in ("model", "model_path", "data_path") if recipe.get(key)
    }
    if stage != "train":
        options = {
            key: value
            for key, value in options.items()
            if key not in OF_ITS_RUN and key != "device"
        }
        if path.with_suffix(".pt").exists():
            options["SAE_path"] = str(path.with_suffix(".pt"))
    return {
        key: value for key, value in options.items() if key in known
    }  # the rest are constructor values that --recipe sets


def _of_the_official_code(found: dict[str, Any], stage: str) -> dict[str, Any]:
    """Options under the names and in the meaning of the published code: its learning rate and betas are Adam's, of --recipe published."""
    mine = {
        OFFICIAL.get(key, key): value
        for key, value in found.items()
        if key not in ("language_model", "pipe_data_path", "pipe_project")
    }
    for one, several in (("data_path", "pipe_data_path"), ("wandb_project", "pipe_project")):
        if found.get(several):  # one for each of the three stages
            mine[one] = found[several][{"train": 0, "evaluate": 1}.get(stage, 2)]
    return {"recipe": "published"} | mine


def read(path: str | Path, stage: str, known: Collection[str]) -> tuple[dict[str, Any], str]:
    """({option: value}, a line on how the file was understood, or "").

    Options of other stages are in it too: one file serves all. Raises ValueError for a file that cannot be read and for a key that is no
    option, naming the nearest that is.
    """
    path, said = Path(path), ""
    found = _load(path)
    if "format_version" in found:
        found, said = (
            _of_the_recipe(found, path, stage, known),
            f"{path}: the recipe of {found.get('title', path.stem)}",
        )
    elif {"lamda", "language_model", "pipe_data_path", "pipe_project"} & set(found):
        found = _of_the_official_code(found, stage)
        said = (
            f"{path}: read as the published code's: lamda is --l1_coeff, threshold --act_threshold"
        )
        said += ", with --recipe published" if found["recipe"] == "published" else ""
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            raise ValueError(
                f"--config {path}: there is no option {key!r}{f'; did you mean {near[0]!r}?' if near else ''}"
            )
    return {key: value for key, value in found.items() if value is not None}, said


def words(options: dict[str, Any]) -> list[str]:
    """A command line that says the same."""
    line: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        said = [
            json.dumps(v) if isinstance(v, dict) else str(int(v)) if isinstance(v, bool) else str(v)
            for v in values
        ]
        line += [f"--{name}={said[0]}"] if len(said) == 1 else [f"--{name}", *said]
    return line
