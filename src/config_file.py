"""Read files of options (--config): YAML, JSON, or the recipe of a trained SAE.

Uses the standard library and PyYAML only.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from src.files import parse_json

# The published code (swei2001/RouteSAEs) names two options differently. Three of its keys are no
# options here; the pipe_ keys list one value for each of its three stages.
OFFICIAL_NAMES = {"lamda": "l1_coeff", "threshold": "act_threshold"}
OFFICIAL_ONLY = {"language_model", "pipe_data_path", "pipe_project"}
# Settings of one run or machine. No other stage takes them from the recipe of a training.
NOT_INHERITED = {"split", "max_samples", "max_tokens", "dtype", "seed", "compile_lm"}


def read(path: str | Path, stage: str, known: Collection[str]) -> tuple[dict[str, Any], str]:
    """({option: value}, a line on how the file was understood, or "").

    One file can serve all stages, so options of other stages are included. Raises ValueError for
    a file that cannot be read and for an unknown option, naming the nearest known one.
    """
    path = Path(path)
    content = _load(path)
    if "format_version" in content:
        options = _recipe_options(content, path, stage, known)
        note = f"{path}: the recipe of {content.get('title', path.stem)}"
    elif content.keys() & {"lamda", *OFFICIAL_ONLY}:
        options = _official_options(content, stage)
        note = f"{path}: read as the published code's: "
        note += "lamda is --l1_coeff, threshold --act_threshold"
        if options["recipe"] == "published":
            note += ", with --recipe published"
    else:
        options, note = content, ""
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--config {path}: there is no option {key!r}{hint}")
    return {key: value for key, value in options.items() if value is not None}, note


def _load(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises ValueError in one line if it holds none."""
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    text = path.read_text(encoding="utf-8")
    try:
        content = parse_json(text) if path.suffix == ".json" else _parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--config {path} is not readable ({error})") from error
    if not isinstance(content, dict):
        what = "nothing" if content is None else "no `option: value` lines"
        raise ValueError(f"--config {path} holds {what}")
    return {str(key): value for key, value in content.items()}


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _recipe_options(
    recipe: dict[str, Any], path: Path, stage: str, known: Collection[str]
) -> dict[str, Any]:
    """The options of a training. For other stages the weights beside the recipe become SAE_path.

    Entries that are no options are left out: constructor values, which --recipe sets.
    """
    options = dict(recipe.get("options", {}))
    options |= {key: recipe[key] for key in ("model", "model_path", "data_path") if recipe.get(key)}
    if stage != "train":
        for key in (*NOT_INHERITED, "device"):
            options.pop(key, None)
        weights = path.with_suffix(".pt")
        if weights.exists():
            options["SAE_path"] = str(weights)
    return {key: value for key, value in options.items() if key in known}


def _official_options(content: dict[str, Any], stage: str) -> dict[str, Any]:
    """Options of a file for the published code, under the names and with the meaning used here.

    Its learning rate and betas are those of Adam, so the recipe is `published` unless it is set.
    """
    options = {"recipe": "published"}
    for key, value in content.items():
        if key not in OFFICIAL_ONLY:
            options[OFFICIAL_NAMES.get(key, key)] = value
    position = {"train": 0, "evaluate": 1}.get(stage, 2)
    for key, list_key in (("data_path", "pipe_data_path"), ("wandb_project", "pipe_project")):
        if content.get(list_key):
            options[key] = content[list_key][position]
    return options


def words(options: dict[str, Any]) -> list[str]:
    """The same options as words of a command line."""
    line: list[str] = []
    for name, value in options.items():
        texts = [_word(v) for v in (value if isinstance(value, list | tuple) else [value])]
        line += [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
    return line


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, bool):
        return str(int(value))
    return str(value)
