"""Read files of options (--config): YAML, JSON, or the recipe of a trained SAE.

Uses the standard library and PyYAML only.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from src.files import parse_json

# The published code (swei2001/RouteSAEs) names two options differently. Three of its keys are no
# options here; the pipe_ keys list one value for each of its three stages.
OFFICIAL_NAMES = {"lamda": "l1_coeff", "threshold": "act_threshold"}
OFFICIAL_ONLY = {"language_model", "pipe_data_path", "pipe_project"}
# Settings of one run or machine. No other stage takes them from the recipe of a training.
NOT_INHERITED = {"split", "max_samples", "max_tokens", "dtype", "seed", "compile_lm"}
MAX_FILE_SIZE = 2**20  # bytes; files of options have a few thousand
YES_OR_NO = {True: "yes", False: "no"}


class Content(NamedTuple):
    """What a file of options says."""

    options: dict[str, Any]
    note: str  # a line on how the file was understood, or ""
    is_recipe: bool


def read(
    path: str | Path, stage: str, known: Collection[str], from_recipe: Collection[str]
) -> Content:
    """Read a file of options.

    One file can serve all stages, so options of other stages are included. `from_recipe` names
    the options that a recipe may set. Raises ValueError for a file that cannot be read and for an
    unknown option, naming the nearest known one.
    """
    path = Path(path)
    content = _load(path)
    is_recipe = _is_recipe(content)
    if is_recipe:
        options = _options_for_stage(recipe_options(content, from_recipe), path, stage)
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
    options = {key: value for key, value in options.items() if value is not None}
    return Content(options, note, is_recipe)


def _load(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises ValueError in one line if it holds none."""
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    if path.stat().st_size > MAX_FILE_SIZE:
        raise ValueError(f"--config {path} is larger than {MAX_FILE_SIZE} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        content = parse_json(text) if path.suffix == ".json" else _parse_yaml(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config {path} is not readable ({error})") from error
    if not isinstance(content, dict):
        what = "nothing" if content is None else "no `option: value` lines"
        raise ValueError(f"--config {path} holds {what}")
    return {str(key): value for key, value in content.items()}


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            # Ten lines of aliases of aliases can stand for billions of values.
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"it has an alias in line {self.peek_event().start_mark.line + 1}")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _is_recipe(content: Mapping[str, Any]) -> bool:
    """Whether it is the recipe of a checkpoint: a file that may come from somebody else."""
    parts = (content.get("config"), content.get("options"))
    return "format_version" in content or any(isinstance(part, dict) for part in parts)


def recipe_options(recipe: Mapping[str, Any], from_recipe: Collection[str]) -> dict[str, Any]:
    """The options that a recipe decides: those of the training, as far as a recipe may set them.

    Raises ValueError if its options are no mapping.
    """
    options = recipe.get("options", {})
    if not isinstance(options, dict):
        raise ValueError("the recipe's options are no mapping")
    top_level = ("model", "model_path", "data_path")
    options = options | {key: recipe[key] for key in top_level if recipe.get(key)}
    return {
        key: value for key, value in options.items() if key in from_recipe and value is not None
    }


def _options_for_stage(options: dict[str, Any], path: Path, stage: str) -> dict[str, Any]:
    """A recipe's options for one stage. The weights beside the recipe become SAE_path."""
    if stage == "train":
        return options
    options = {key: value for key, value in options.items() if key not in NOT_INHERITED}
    weights = path.with_suffix(".pt")
    if weights.exists():
        options["SAE_path"] = str(weights)
    return options


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


def words(options: dict[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The same options as words of a command line.

    known: {option: its row in config.OPTIONS}. Raises ValueError for a list where one value is
    expected, and for a value that a command line would take for another option.
    """
    line: list[str] = []
    for name, value in options.items():
        is_list = isinstance(value, list | tuple)
        if is_list and not (known[name].many or known[name].count):
            raise ValueError(f"{name} takes one value, not a list")
        texts = [_word(item, known[name].choices) for item in (value if is_list else [value])]
        if len(texts) == 1:
            line.append(f"--{name}={texts[0]}")
        elif any(text.startswith("--") for text in texts):
            raise ValueError(f"{name} holds a value that begins with '--'")
        else:
            line += [f"--{name}", *texts]
    return line


def _word(value: Any, choices: str) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, bool):
        # YAML reads a bare yes as true.
        return YES_OR_NO[value] if "yes" in choices.split() else str(int(value))
    return str(value)
