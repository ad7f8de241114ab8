"""The device a stage computes on: its choice and settings, fast kernels, precision of products.

N tokens, D hidden, F latents.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.files import first_line

# Parameters of glibc's mallopt(3) and the values set here.
M_TRIM_THRESHOLD, NEVER_TRIM = -1, 2**31 - 1
M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD = -3, 2**25  # bytes
# Growth of the process at which freed memory goes back. Each time takes a tenth of a second.
MAX_GROWTH = 1.25
_after_return = {"bytes": 0}  # held when freed memory last went back
# Set by bf16_matmuls(). A plain global: on CUDA, gradients are computed in threads of their own.
_bf16_allowed = False
_joins_passes = False  # set by join_passes()
_BIAS_COLUMNS = 3  # a float32 bias is three bfloat16 parts
_PADDED_COLUMNS = 16  # rows stay aligned


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
        reason = first_line(error)
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


def resident() -> int:
    """Return the memory that this process holds, in bytes; 0 where the system hides it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def limit_freed_memory() -> None:
    """Give what keep_freed_memory() keeps back to the system, once the process grew by a quarter.

    Kept blocks are cut for smaller tensors, and later tensors do not fit into the rests. With AuxK,
    whose tensors change in size from step to step, three SAEs grew by 20 MB a step (docs/LOG.md).
    """
    if resident() > MAX_GROWTH * _after_return["bytes"]:
        return_freed_memory()


def return_freed_memory() -> None:
    """Give all freed memory that the process holds back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    _after_return["bytes"] = resident()


def wait(device: str) -> None:
    """Wait until a CUDA device has done its work, so that its time can be measured."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize(device)


@functools.cache
def fast_bfloat16() -> bool:
    """Return whether this CPU multiplies matrices in bfloat16 faster than in float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def kernels(x: Tensor) -> Any:
    """Return src.kernels for a tensor on CUDA, None where plain PyTorch must do the work.

    That is on other devices, in float64, and where Triton cannot build the kernels.
    """
    return _working_kernels() if x.is_cuda and x.dtype is not torch.float64 else None


@functools.cache
def _working_kernels() -> Any:
    try:
        from src import kernels

        kernels.topk_indices(torch.zeros(1, 1, device="cuda"), 1)
    except Exception as error:  # no Triton, no C compiler, an unknown card: no common base class
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"Triton's kernels do not work here ({reason}); plain PyTorch takes their place",
            stacklevel=3,
        )
        return None
    return kernels


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)  # older cards emulate it


def join_passes(wanted: bool) -> None:
    """Let functions marked with `joined` be compiled on CUDA, or let them run as they are."""
    global _joins_passes
    _joins_passes = wanted


def joins_passes(x: Tensor) -> bool:
    """Return whether functions marked with `joined` run compiled on this tensor.

    On a CPU the compiled sums over tokens take up to five times as long (docs/LOG.md).
    """
    return _joins_passes and x.is_cuda


def joined(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function of element-wise work where joins_passes() says so.

    Each operation of PyTorch reads and writes all latents of all tokens. torch.compile joins the
    operations, and those of the gradient, into a few passes over memory.
    """

    @functools.cache
    def compiled() -> Callable[..., Tensor]:
        import torch._dynamo

        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        return torch.compile(function)

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any) -> Tensor:
        return (compiled() if joins_passes(first) else function)(first, *rest)

    return run


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Set PyTorch's precision of float32 products inside this block: highest, high or medium."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def bf16_matmuls() -> Iterator[None]:
    """Allow products in bfloat16 inside this block where they are faster. SAEs train in it.

    On a CPU, products of float32 factors then go to oneDNN. It rounds the factors where the CPU has
    AMX. With AVX512 alone it does not, and takes half the time of MKL on an AMD EPYC (docs/LOG.md).
    """
    global _bf16_allowed
    before = _bf16_allowed
    _bf16_allowed = True
    on_cuda = torch.cuda.is_available()
    try:
        with contextlib.nullcontext() if on_cuda else matmul_precision("medium"):
            yield
    finally:
        _bf16_allowed = before


def uses_bf16_matmul(x: Tensor) -> bool:
    """Return whether a factor on CUDA is rounded to bfloat16 before a product.

    It halves the time of TF32, and switching TF32 off switches it off too.
    """
    allowed = _bf16_allowed and torch.backends.cuda.matmul.allow_tf32
    return allowed and x.is_cuda and x.dtype is torch.float32 and _has_bfloat16(x.device)


def uses_bf16_on_cpu(x: Tensor) -> bool:
    """Return whether a forward product on this CPU takes bfloat16 factors (gradients do not)."""
    on_cpu = x.device.type == "cpu" and x.dtype is torch.float32
    return _bf16_allowed and on_cpu and fast_bfloat16()


def to_matmul_dtype(x: Tensor) -> Tensor:
    """Return a factor of a product, in bfloat16 where uses_bf16_matmul() says so."""
    return x.bfloat16() if uses_bf16_matmul(x) else x


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32, whether the factors are bfloat16 or not."""
    if a.is_cuda and a.dtype is torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def affine_factors(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return bfloat16 factors whose product is x weight^T + bias.

    Adding the bias inside the product saves one pass over the result. The bias is split into
    three bfloat16 columns, so that it is as exact as in float32.
    [N,D], [F,D], [F] -> [N,D+16], [F,D+16]
    """
    width = x.shape[1]
    columns = width + _PADDED_COLUMNS
    a = torch.zeros(len(x), columns, dtype=torch.bfloat16, device=x.device)
    b = torch.zeros(len(weight), columns, dtype=torch.bfloat16, device=weight.device)
    a[:, :width] = x
    b[:, :width] = weight
    a[:, width : width + _BIAS_COLUMNS] = 1
    for i in range(width, width + _BIAS_COLUMNS):
        b[:, i] = bias
        bias = bias - b[:, i]  # what the column could not hold
    return a, b
