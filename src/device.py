"""The device a stage computes on and the settings of PyTorch and the C library that go with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

import torch

# Parameters of glibc's mallopt(3) and the values set here.
M_TRIM_THRESHOLD, NEVER_TRIM = -1, 2**31 - 1
M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD = -3, 2**25  # bytes


def pick_device(device: str) -> str:
    """Resolve `auto` to CUDA if available, else the CPU, and prepare PyTorch for the device.

    Raises ValueError for an unusable device and for kinds other than cpu and cuda.
    """
    if device == "auto":
        # With several processes distributed.start has already chosen each one's own.
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    kind = str(device).split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}; known are auto, cpu, cuda and cuda:NUMBER")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {device} is not usable here ({reason}); try --device auto"
        ) from error
    if kind == "cpu":
        keep_freed_memory()
        return device
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # "cuda" without a number now means this one
    # TF32 computes float32 products in an eighth of the time, with factors rounded to 10 bits.
    # bfloat16 products in training follow this switch as well.
    torch.backends.cuda.matmul.allow_tf32 = os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
    return device


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MB in the process.

    Otherwise the temporary tensors of every step come anew from the system, page by page. That
    took a sixth of a training in float32 (docs/LOG.md).
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # a C library without mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)
