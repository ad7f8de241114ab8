"""Tensors read from files of others. Nothing in a file is run; sizes are checked before memory.

A file can end in an error of one line only: ValueError, which says what was found.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src import files
from src.stage_help import did_you_mean

WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Times that zip may make an .npz smaller. Random weights in float32 pack to 0.93 of their size,
# bfloat16 values stored as float32 to 0.47 (docs/LOG.md).
MAX_NPZ_PACKING = 8
UNREADABLE = (NotImplementedError, RuntimeError, TypeError)  # a zip of another kind; void values


def check_tensors(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ValueError, naming the tensor, if a state dict cannot be the weights of an SAE."""
    for name, value in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"{source} is not a state dict: it has the key {name!r}")
        if problem := _problem_of(value):
            raise ValueError(f"{source}: {name} {problem}")


def _problem_of(value: Tensor) -> str | None:
    """Why a tensor cannot hold weights, or None."""
    if value.layout is not torch.strided or value.is_meta or value.is_nested:
        return "is no dense tensor"
    if value.dtype not in WEIGHT_TYPES:
        return f"holds {value.dtype} values; weights are floating-point numbers"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return f"has the shape {tuple(value.shape)} and fewer values than that"
    # A scalar may be unset, which is NaN.
    n_bad = int((~value.float().isfinite()).sum()) if value.dim() else 0
    if n_bad:
        return f"has {n_bad} values that are not finite: its training failed, or it is damaged"
    return None


def read(path: Path) -> Any:
    """What a file of tensors holds, by its suffix: .safetensors, .npz, or one of torch.save.

    The first two hold {name: tensor}. torch.save holds tensors and plain values in any order.
    """
    readers = {".safetensors": read_safetensors, ".npz": read_npz}
    return readers.get(path.suffix, read_torch)(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, checked. Its header cannot state more than it holds."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files.check_regular(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    check_tensors(tensors, path)
    return tensors


def read_torch(path: Path, device: str = "cpu") -> Any:
    """What torch.save wrote: tensors and plain values. Raises ValueError for anything else."""
    if not path.is_file():
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*.pt")])
        raise ValueError(f"no checkpoint at {path}{near or '; check --SAE_path'}")
    try:
        problem = _problem_of_zip(path)
        value = None if problem else torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds other things than tensors, or is damaged; nothing in it was run"
        ) from error
    except Exception as error:  # a damaged file can end in any: IndexError, KeyError, MemoryError
        reason = files.first_line(error)[:120] if str(error) else "damaged"
        raise ValueError(f"{path} is not a readable checkpoint ({reason})") from error
    if problem:
        raise ValueError(f"{path} {problem}")
    return value


def _problem_of_zip(path: Path) -> str | None:
    """Why a small file could fill the memory, or None."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "is compressed; torch.save stores weights as they are"
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        return "has entries that overlap, which torch.save does not write"
    return None


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a .npz file as tensors, checked.

    Objects in it would be pickles, so it is refused with them. Arrays that claim more than
    MAX_NPZ_PACKING times the file are refused before they are unpacked.
    """
    files.check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(_npy_bytes(archive, entry, path) for entry in archive.infolist())
        if size > MAX_NPZ_PACKING * path.stat().st_size:
            raise ValueError(f"{path} unpacks to {size:,} bytes, which no weights do; not opened")
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, *UNREADABLE) as error:
        reason = files.first_line(error)[:120] if str(error) else "damaged"
        raise ValueError(f"{path} is not a readable .npz file ({reason})") from error
    check_tensors(tensors, path)
    return tensors


def _npy_bytes(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> int:
    """The size that the header of one array states. Raises ValueError for an array of objects."""
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{path}: {entry.filename} has the unknown version {version}")
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(f"{path}: {entry.filename} holds objects; nothing in it was run")
    size = dtype.itemsize
    for length in shape:
        size *= length
    if size > entry.file_size:
        raise ValueError(f"{path}: {entry.filename} states the shape {shape} and holds less")
    return size
