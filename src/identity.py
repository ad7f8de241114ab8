"""What decides a result besides the options: the language model's weights, and the text.

Paths do not tell: a folder may get other weights, and a file other text. Digests of the content
are kept in saved states and recipes, and compared between processes. Here is also the one rule by
which a result takes the place of an earlier one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from src import files, hub
from src.sources import find_files, is_local, split_files

SAMPLED_VALUES = 256  # of each parameter; all values of a large model would take seconds to read
READ_BYTES = 2**28  # of a text or model; a larger one is sampled, which takes a second at most
BLOCK_BYTES = 2**16
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


def of_language_model(model: nn.Module) -> dict[str, str]:
    """Return {"weights": a hash of names, shapes and sampled values, "dtype": their format,
    "rounded": the same hash of the values rounded to bfloat16}.

    float32 and bfloat16 weights of one model have the same "rounded". It is left out where a part
    of the values is on disk, in the care of accelerate.
    """
    exact, rounded = (hashlib.blake2b(digest_size=8) for _ in range(2))
    dtypes = set()
    is_whole = True
    for name, parameter in sorted(model.named_parameters()):
        dtypes.add(str(parameter.dtype).removeprefix("torch."))
        for digest in (exact, rounded):
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if parameter.device.type == "meta":
            is_whole = False
            continue
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // SAMPLED_VALUES)].float().cpu()
        exact.update(_bytes(values))
        rounded.update(_bytes(values.bfloat16()))
    identity = {"weights": exact.hexdigest(), "dtype": " ".join(sorted(dtypes))}
    return identity | ({"rounded": rounded.hexdigest()} if is_whole else {})


def _bytes(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().view(torch.uint8).numpy()


def of_tokens(tokens: np.ndarray) -> str:
    """Return a hash of all tokens of a text."""
    return hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()


def of_text(source: str | os.PathLike, split: str) -> str | None:
    """Return a hash of the files of a split, None for text on the hub or without files."""
    if not is_local(source):
        return None
    try:
        paths, _ = split_files(find_files(source), split)
    except (OSError, ValueError):
        return None
    return _of_files(paths)


def of_weight_files(model_path: str | os.PathLike) -> str | None:
    """Return a hash of the weight files of a language model, which is not loaded for it.

    None without such files, as for a model on the hub that is not in the cache.
    """
    path = Path(model_path)
    if not path.exists():
        path = hub.cached_folder(str(model_path)) or path
    found = [path] if path.is_file() else path.glob("*")
    return _of_files(sorted(file for file in found if file.suffix in WEIGHT_SUFFIXES))


def _of_files(paths: Sequence[Path]) -> str | None:
    """Return a hash of the content of files, None if there are none or they cannot be read."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        sizes = [path.stat().st_size for path in paths]
        # One block in so many is read.
        every = max(1, -(-sum(sizes) // READ_BYTES))
        for path, size in zip(paths, sizes, strict=True):
            digest.update(f"{size}\n".encode())
            for block in _blocks(path, size, every):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest() if paths else None


def _blocks(path: Path, size: int, every: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for start in range(0, size, every * BLOCK_BYTES):
            file.seek(start)
            yield file.read(BLOCK_BYTES)


def language_model_difference(
    saved: Mapping[str, str] | None, current: Mapping[str, str]
) -> str | None:
    """Return in words how the language model of a run differs from an earlier one of that run,
    None if it does not.

    What earlier versions saved names no language model, or says less of it.
    """
    if not saved or all(current.get(key) == value for key, value in saved.items()):
        return None
    if saved["dtype"] != current["dtype"]:
        return f"its weights were {saved['dtype']} then and are {current['dtype']} now"
    return "its weights have other values"


def is_another_model(recorded: Any, current: Mapping[str, str]) -> bool:
    """Return whether a recipe or result was made with other weights, as far as it tells.

    The number format is left out: it belongs to each run.
    """
    if not isinstance(recorded, Mapping):
        return False
    if "rounded" in recorded and "rounded" in current:
        return recorded["rounded"] != current["rounded"]
    same_format = recorded.get("dtype") == current["dtype"]
    return same_format and recorded.get("weights") != current["weights"]


def agrees(result: Mapping[str, Any], earlier: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Return whether two results are of the same weights and agree in these fields.

    What an earlier version did not record counts as the same.
    """
    if not earlier or files.is_stale_result(earlier, result):
        return False
    if is_another_model(earlier.get("language_model"), result.get("language_model", {})):
        return False
    return all(earlier.get(key, result[key]) == result[key] for key in keys)


def may_replace(
    result: Mapping[str, Any],
    earlier: Mapping[str, Any],
    same: Sequence[str],
    no_less: Sequence[str],
    no_more: Sequence[str] = (),
) -> bool:
    """Return whether nothing that was measured is lost if a result takes the place of another.

    same: fields that say what was measured. no_less: numbers, or tables, of which a larger one
    holds all that a smaller one does; no_more: numbers that limit what is held from below.
    """
    if not earlier or files.is_stale_result(earlier, result):
        return True
    return (
        agrees(result, earlier, same)
        and all(_holds(result[key], earlier.get(key)) for key in no_less)
        and all(_holds(earlier.get(key, result[key]), result[key]) for key in no_more)
    )


def _holds(larger: Any, smaller: Any) -> bool:
    """Return whether one number or table holds another. What cannot be compared is held."""
    if isinstance(larger, Mapping):
        larger, smaller = set(larger), set(smaller or ())
    try:
        return smaller is None or smaller <= larger
    except TypeError:
        return True
