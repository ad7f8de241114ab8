"""What earlier stages found out about the latents of an SAE: the largest activation, the label.

Reads the files of apply.py and interpret.py under an output folder. Works on JSON alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from src import files

BY_RULE = "heuristic"  # the engine of labels that no language model wrote


class Note(NamedTuple):
    """What is known of one latent."""

    maximum: float | None = None  # largest activation in the text of apply.py
    label: str = ""
    origin: str = ""  # who wrote the label, and how it did in its tests

    def __str__(self) -> str:
        label = f" {self.label} ({self.origin})" if self.label else " no label"
        return f"{label}, maximum {self.maximum:.3g}" if self.maximum is not None else label


def of_sae(output_dir: str | Path, title: str, weights_sum: str | None) -> dict[int, Note]:
    """Return {latent: its note} of an SAE; empty before apply.py has run.

    Contexts of other weights with this title are passed over.
    """
    folder = Path(output_dir) / files.CONTEXT_DIR
    path = files.newest(folder, f"{files.safe_name(title)}_contexts.json*")
    if path is None:
        return {}
    contexts = files.load_json(path)
    if not isinstance(contexts, dict) or not isinstance(contexts.get("latent_context_map"), dict):
        return {}
    if files.is_stale_result(contexts, {"weights_sum": weights_sum}):
        return {}
    labels_path = Path(output_dir) / files.INTERPRET_DIR / f"interp_{files.safe_name(title)}.json"
    labels = files.load_json(labels_path) if labels_path.exists() else {}
    entries = contexts["latent_context_map"]
    return {int(latent): _note(entries[latent], labels.get(latent, {})) for latent in entries}


def _note(entry: dict[str, Any], label: dict[str, Any]) -> Note:
    tests = [
        f"{kind} {test['balanced_accuracy']:.2f}"
        for kind in ("detection", "fuzzing")
        if (test := label.get(kind)) and test.get("balanced_accuracy") is not None
    ]
    engine = "by rule" if label.get("engine") == BY_RULE else f"by {label.get('engine')}"
    text = str(label.get("description") or "").removeprefix("[by rule] ")
    return Note(entry.get("max_activation"), text, ", ".join([engine, *tests]))
