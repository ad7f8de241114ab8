"""What decides a result besides the options: the language model's weights, and the text.

Paths do not tell: a folder may get other weights, and a file other text. Digests of the content
are kept in saved states and recipes, and compared between processes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from src.sources import find_files, is_local, split_files

SAMPLED_VALUES = 256  # of each parameter; all values of a large model would take seconds to read
READ_BYTES = 2**28  # of a text; a larger one is sampled, which takes a second at most
BLOCK_BYTES = 2**16


def of_language_model(model: nn.Module) -> dict[str, str]:
    """Return {"weights": a hash of names, shapes and sampled values, "dtype": their format}."""
    digest = hashlib.blake2b(digest_size=8)
    dtypes = set()
    for name, parameter in sorted(model.named_parameters()):
        dtypes.add(str(parameter.dtype).removeprefix("torch."))
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if parameter.device.type == "meta":  # its values are on disk, in the care of accelerate
            continue
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // SAMPLED_VALUES)]
        digest.update(values.float().cpu().contiguous().view(torch.uint8).numpy())
    return {"weights": digest.hexdigest(), "dtype": " ".join(sorted(dtypes))}


def of_tokens(tokens: np.ndarray) -> str:
    """Return a hash of all tokens of a text."""
    return hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()


def of_text(source: str | os.PathLike, split: str) -> str | None:
    """Return a hash of the files of a split, None for text on the hub or without files."""
    if not is_local(source):
        return None
    try:
        paths, _ = split_files(find_files(source), split)
        sizes = [path.stat().st_size for path in paths]
    except (OSError, ValueError):
        return None
    digest = hashlib.blake2b(digest_size=8)
    # One block in so many is read.
    every = max(1, -(-sum(sizes) // READ_BYTES))
    for path, size in zip(paths, sizes, strict=True):
        digest.update(f"{size}\n".encode())
        for block in _blocks(path, size, every):
            digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path, size: int, every: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for start in range(0, size, every * BLOCK_BYTES):
            file.seek(start)
            yield file.read(BLOCK_BYTES)


def language_model_difference(
    saved: Mapping[str, str] | None, current: Mapping[str, str]
) -> str | None:
    """Return in words how two language models differ, None if they do not.

    What earlier versions saved names no language model.
    """
    if not saved or saved == current:
        return None
    if saved["dtype"] != current["dtype"]:
        return f"its weights were {saved['dtype']} then and are {current['dtype']} now"
    return "its weights have other values"
