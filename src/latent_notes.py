"""What earlier stages found out about the latents of an SAE: the largest activation, the label.

Reads the files of apply.py and interpret.py under an output folder. Works on JSON alone.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from src import files, names
from src.feature_files import NUMBER, check, contexts_of, read_features
from src.rule_labels import BY_RULE_MARK

SHOWN_CHARS = 80  # of a label in one line
BY_RULE = "heuristic"  # the engine of labels that no language model wrote


class Note(NamedTuple):
    """What is known of one latent."""

    maximum: float | None = None  # largest activation in the text of apply.py
    label: str = ""
    origin: str = ""  # who wrote the label, and how it did in its tests

    def __str__(self) -> str:
        short = textwrap.shorten(names.shortened(self.label), SHOWN_CHARS, placeholder=" ...")
        label = f" {short} ({self.origin})" if self.label else " no label"
        return f"{label}, maximum {self.maximum:.3g}" if self.maximum is not None else label


def of_sae(output_dir: str | Path, title: str, weights_sum: str | None) -> dict[int, Note]:
    """Return {latent: its note} of an SAE; empty before apply.py has run.

    Contexts of other weights with this title are passed over, and damaged files after a warning.
    """
    path = contexts_of(output_dir, title)
    if path is None:
        return {}
    try:
        contexts, labels = read_features(path)
        entries = contexts["latent_context_map"]
        check(entries, {}, "latent_context_map")
        for latent, entry in entries.items():
            check(entry, {"max_activation": NUMBER}, f"latent {latent}")
    except ValueError as error:
        print(f"warning: nothing is said of the latents: {error}")
        return {}
    if files.is_stale_result(contexts, {"weights_sum": weights_sum}):
        return {}
    return {
        int(latent): _note(entry, labels.get(latent, {}))
        for latent, entry in entries.items()
        if latent.isdecimal()
    }


def _note(entry: dict[str, Any], label: dict[str, Any]) -> Note:
    tests = [
        f"{kind} {test['balanced_accuracy']:.2f}"
        for kind in ("detection", "fuzzing")
        if (test := label.get(kind)) and test.get("balanced_accuracy") is not None
    ]
    engine = "by rule" if label.get("engine") == BY_RULE else f"by {label.get('engine')}"
    text = str(label.get("description") or "").removeprefix(BY_RULE_MARK).strip()
    return Note(entry.get("max_activation"), text, ", ".join([engine, *tests]))
