"""Several processes that work as one, started by torchrun or with the same environment by hand.

Each process learns its number here, sums tensors over all, agrees with the others, and knows
whether it is the one that writes. With one process every function is the identity, so callers need
no second path. The functions below `start` are collective: all processes have to call them alike.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from src.files import first_line

T = TypeVar("T")
# How long the others wait while one process tokenises or saves.
SETUP_TIMEOUT = timedelta(hours=3)
# How long a process may fall behind another within a step. A machine that is gone gives no sign.
STEP_TIMEOUT = timedelta(seconds=45)
# Tensors of fewer numbers are reduced together in flat buckets, larger ones in place.
BUCKET_NUMBERS = 2**22
# "store": of the rendezvous; "steps": process group with STEP_TIMEOUT; "alone": see alone().
_job: dict[str, Any] = {}


class ProcessLost(OSError):
    """Another process of the job is gone, or does not answer."""

    exit_code = 4


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes that work together."""
    return 1 if not dist.is_initialized() or "alone" in _job else dist.get_world_size()


def main() -> bool:
    """True in the one process that writes and logs."""
    return rank() == 0


def _take_gpu(device: str, local: int) -> str:
    """Make the GPU with the local number of this process its current device."""
    if device not in ("auto", "cuda"):
        raise ValueError(
            f"--device {device} with several processes: each takes the GPU of its number; "
            "leave it out, or give --device cpu"
        )
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU of its own: the machine has "
            f"{torch.cuda.device_count()}; lower --nproc_per_node"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def start(device: str) -> str:
    """Join the job that the environment describes; returns the device of this process.

    From here on, the standard output of all processes but the main one is closed.
    Raises ValueError where the processes of a machine outnumber its GPUs.
    """
    local = int(os.environ.get("LOCAL_RANK") or 0)
    backend, own_device = "gloo", "cpu"
    if torch.cuda.is_available() and device != "cpu":
        backend, own_device = "cpu:gloo,cuda:nccl", _take_gpu(device, local)
    with _reported():
        store, number, size = next(dist.rendezvous("env://", timeout=SETUP_TIMEOUT))
        dist.init_process_group(
            "gloo", store=store, rank=number, world_size=size, timeout=SETUP_TIMEOUT
        )
        _job["store"] = store
        _job["steps"] = dist.new_group(backend=backend, timeout=STEP_TIMEOUT)
    if not main():
        sys.stdout = open(os.devnull, "w")
    return own_device


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process computes as if it were the only one."""
    _job["alone"] = True
    try:
        yield
    finally:
        del _job["alone"]


def stop() -> None:
    """Leave the job in good order."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _job.clear()


def first_to_end() -> bool:
    """True in the process that ends first. Its error is the cause, those of the others follow."""
    if not _job:
        return True
    try:
        return _job["store"].add("ended", 1) == 1
    except RuntimeError:  # the launcher that holds the store is gone too
        return True


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turn an error of the backend into ProcessLost."""
    try:
        yield
    except RuntimeError as error:  # the backends raise it whatever has happened
        # Without the place in the source, and without advice that follows the first sentence.
        reason = re.sub(r"\[\S*/\S*\] *", "", first_line(error)).split(". ")[0]
        number, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        raise ProcessLost(
            f"process {number} of {size} lost another one ({reason}); run the same command again: "
            "a training continues at its last saved state"
        ) from error


# -------------------------------------------------------------------------------- within a step


def all_sum(x: Tensor) -> Tensor:
    """Sum over processes, with the same bits in each."""
    return x if world() == 1 else _reduce_(x.clone(), dist.ReduceOp.SUM)


def all_max(x: Tensor) -> Tensor:
    """Elementwise maximum over processes."""
    return x if world() == 1 else _reduce_(x.clone(), dist.ReduceOp.MAX)


def _reduce_(x: Tensor, op: Any) -> Tensor:
    with _reported():
        dist.all_reduce(x, op, _job["steps"])
    return x


def all_sum_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over processes, in place."""
    if world() == 1:
        return
    small: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() >= BUCKET_NUMBERS and tensor.is_contiguous():
            _reduce_(tensor, dist.ReduceOp.SUM)
            continue
        small.append(tensor)
        if sum(t.numel() for t in small) >= BUCKET_NUMBERS:
            _sum_bucket_(small)
            small = []
    _sum_bucket_(small)


def _sum_bucket_(tensors: list[Tensor]) -> None:
    if not tensors:
        return
    flat = _reduce_(torch.cat([t.flatten() for t in tensors]), dist.ReduceOp.SUM)
    parts = flat.split([t.numel() for t in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def concat(x: Tensor) -> Tensor:
    """Rows of all processes, in the order of their numbers. [n,...] -> [N,...]

    n may differ from process to process.
    """
    if world() == 1:
        return x
    own_size = torch.eye(world(), dtype=torch.long)[rank()] * len(x)
    sizes = all_sum(own_size).tolist()
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    with _reported():
        dist.all_gather(parts, padded, _job["steps"])
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


# ----------------------------------------------------------------------------- between the steps


def all_max_ints(*numbers: int) -> list[int]:
    """Maximum of each number over processes: how they agree to stop, or to take more slices."""
    if world() == 1:
        return list(numbers)
    return _reduce_(torch.tensor(numbers), dist.ReduceOp.MAX).tolist()


def share(n: int) -> slice:
    """The part of n items that belongs to this process."""
    return slice(rank() * n // world(), (rank() + 1) * n // world())


def from_main(function: Callable[[], T]) -> T:
    """Call the function in the main process; return its value in all of them.

    A ValueError or OSError of the function is raised in all processes.
    """
    if world() == 1:
        return function()
    answer: list[Any] = [None, None]
    if main():
        try:
            answer[0] = function()
        except (ValueError, OSError) as error:
            answer[1] = error
    with _reported():
        dist.broadcast_object_list(answer)
    value, error = answer
    if error is not None:
        raise error
    return value


def require_same(values: dict[str, Any]) -> None:
    """Raise ValueError in every process if one of them has other values than the main one.

    Processes that differ would train on without a word, towards the weights of neither.
    """
    if world() == 1:
        return
    gathered: list[Any] = [None] * world()
    with _reported():
        dist.all_gather_object(gathered, values)
    for number, other in enumerate(gathered):
        for name, value in gathered[0].items():
            if other.get(name) != value:
                raise ValueError(
                    f"process {number} of {world()} has {name} {other.get(name)}, the main one "
                    f"{value}; give all processes the same options, language model and text"
                )


def main_first(function: Callable[[], T]) -> T:
    """Call the function in every process, in the main one first: the others find what it cached."""
    values: list[T] = []
    from_main(lambda: values.append(function()))
    return values[0] if values else function()


def to_main(value: T, device: str) -> list[T]:
    """Gather the values of all processes in the main one; the others get only their own.

    Tensors arrive on this device, or on the CPU where they were on the CPU. The values are
    unpickled, so they must come from the processes of this job alone.
    """
    if world() == 1:
        return [value]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    gathered: list[Any] | None = [None] * world() if main() else None
    with _reported():
        dist.gather_object(buffer.getvalue(), gathered)
    if gathered is None:
        return [value]

    def place(storage: Any, location: str) -> Any:
        if location == "cpu":
            return storage
        return torch.serialization.default_restore_location(storage, device)

    return [
        torch.load(io.BytesIO(content), map_location=place, weights_only=False)
        for content in gathered
    ]


def copy_from_main_(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by that of the main process, in place."""
    if world() > 1:
        with _reported():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0, _job["steps"])
