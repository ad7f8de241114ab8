"""Contexts and labels, read from the files of apply.py and interpret.py and checked.

Everything that shows or publishes features reads them here, so that a damaged or foreign file
ends in one line.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from src import files
from src.files import INTERPRET_DIR, contexts_name, digest, load_json, read_bytes, say

# What the data has to be, as types: {key: type} is an object, [type] a list of any length and
# [type, type] a pair.
NUMBER = int | float
CONTEXT = {
    "activation": NUMBER,
    "tokens": [str],
    "position": int,
    "token_activations": [[int, NUMBER]],
    "layer": int | None,
    "router_weight": NUMBER,
    "document": int,
    "row": int | None,
    "start": int | None,
}
ADDED = ("row", "start")  # columns that files of earlier versions do not have
HISTOGRAM = {"from": NUMBER, "to": NUMBER, "counts": [NUMBER]}
ENTRY = {
    "activations": [NUMBER],
    "token_class": [str],
    "max_activation": NUMBER,
    "density": NUMBER,
    "sample": list,
    "sample_activations": [NUMBER],
    "effect_KL": NUMBER | None,
}
# Parts that files of earlier versions, and files of other models, do not have.
ENTRY_PARTS = {
    "site_counts": [NUMBER],
    "site_strengths": [NUMBER],
    "decoder_norms": [NUMBER],
    "nearest": [[int, NUMBER]],
    "partners": [[int, NUMBER]],
    "logit_histogram": HISTOGRAM,
}
HEADER = {
    "title": str,
    "model": str,
    "source_model": str,
    "sites": [int],
    "latent_size": int,
    "total_latents": int,
    "tokens": int,
    "threshold": NUMBER,
    "latent_context_map": dict,
    "data_path": str | None,
    "split": str | None,
    "codes": int | None,
}
SAMPLE = {"tokens": [str], "strongest": [[[int, NUMBER]]]}
HEADER_PARTS = {"firings": [int], "sample": SAMPLE}
LABEL = {
    "description": str | None,
    "category": str | None,
    "engine": str | None,
    "score": NUMBER | None,
    "detection": dict | None,
    "fuzzing": dict | None,
}
TEST = {"balanced_accuracy": NUMBER | None, "n": int}


def require(condition: bool, problem: str) -> None:
    if not condition:
        again = "run the stage that wrote it again"
        raise ValueError(f"damaged contexts, labels or evaluation: {problem}; {again}")


def check(value: Any, expected: Any, name: str) -> None:
    """Raise ValueError if a value is not of the expected type. A missing key counts as None."""
    if isinstance(expected, dict):
        require(isinstance(value, dict), f"{name} is no JSON object")
        for key, part in expected.items():
            check(value.get(key), part, f"{key} of {name}")
    elif isinstance(expected, list):
        require(isinstance(value, list), f"{name} is no list")
        if len(expected) > 1:
            require(len(value) == len(expected), f"{name} has {len(value)} values")
        # One expected type is for every item.
        for item, part in zip(value, itertools.cycle(expected), strict=False):
            check(item, part, name)
    else:
        require(isinstance(value, expected), f"{name} is missing or of a wrong type")
        is_number = isinstance(value, int | float)
        is_usual = not is_number or abs(value) <= sys.maxsize  # NaN is not
        require(is_usual, f"{name} is no number that this program writes")


def check_parts(table: dict[str, Any], parts: dict[str, Any], name: str) -> None:
    """Check those parts that are there."""
    for key, expected in parts.items():
        if table.get(key) is not None:
            check(table[key], expected, f"{key} of {name}")


def check_length(values: Any, length: int, name: str) -> None:
    require(len(values) == length, f"{name} has {len(values)} values, not {length}")


def strongest(entry: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The strongest contexts of a checked entry, one by one; the file holds them by columns."""
    columns = {key: entry.get(key) for key in CONTEXT} | {"activation": entry["activations"]}
    for key in ADDED:
        columns[key] = columns[key] or [None] * len(entry["activations"])
    for key, column in columns.items():
        check(column, list, f"{key} of {name}")
        check_length(column, len(entry["activations"]), f"{key} of {name}")
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def contexts_of(output_dir: str | Path, title: str) -> Path | None:
    """Return the newest contexts file of the SAE with this title, or None."""
    folder = Path(output_dir) / files.CONTEXT_DIR
    return files.newest(folder, f"{files.safe_name(title)}_contexts.json*")


def read_features(
    path: Path, labels_path: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(contexts, the labels that belong to them) of a contexts file.

    labels_path: default, the file that interpret.py writes for these contexts. Raises ValueError
    for a file of another kind.
    """
    content = read_bytes(path)
    contexts = load_json(path, content)
    needed = {"title", "latent_context_map", "sites"}
    if not isinstance(contexts, dict) or not needed <= set(contexts):
        raise ValueError(f"{path} is no contexts file of apply.py")
    if labels_path and not labels_path.exists():
        raise ValueError(f"--labels {labels_path}: there is no such file")
    # The name of the file, not the title inside it, decides which other file is read.
    folder = path.resolve().parent.parent / INTERPRET_DIR
    beside = folder / f"interp_{contexts_name(path)}.json"
    return contexts, _labels(labels_path or beside, path, digest(content))


def _labels(path: Path, contexts_path: Path, contexts_sum: str) -> dict[str, Any]:
    """The labels in a file that belong to these contexts, as far as they name theirs."""
    if not path.exists():
        return {}
    labels = load_json(path)
    check(labels, {}, "the labels file")
    for latent, label in labels.items():
        check(label, LABEL, f"the label of latent {latent}")
    unnamed = [label for label in labels.values() if "contexts_sum" not in label]
    if unnamed and path.stat().st_mtime < contexts_path.stat().st_mtime:
        say(
            f"warning: {path} is older than the contexts; if the SAE was trained anew in "
            "between, these labels belong to its predecessor: run interpret.py again"
        )
    own = {
        latent: label
        for latent, label in labels.items()
        if label.get("contexts_sum", contexts_sum) == contexts_sum
    }
    if len(own) < len(labels):
        say(
            f"{len(labels) - len(own)} labels in {path} belong to other contexts and are left out; "
            "run interpret.py again"
        )
    return own
