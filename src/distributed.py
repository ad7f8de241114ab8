"""Several processes that work as one (torchrun, or the same environment set by hand): who this is, sums over all, agreement, who writes.

With one process every function is the identity, so that no caller has a second path. Collective: every process has to make the same calls.
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

T = TypeVar("T")
PREPARING = timedelta(hours=3)  # what the others wait while one process tokenises or saves
STEPPING = timedelta(
    seconds=45
)  # what one process may be behind another within a step: a machine that is gone says nothing
BUCKET = 2**22  # numbers; smaller tensors travel together, larger ones alone and where they are
_job: dict[str, Any] = {}  # store, steps (a process group)


class Lost(OSError):
    """Another process of the job is gone, or hangs."""

    exit_code = 4


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return 1 if not dist.is_initialized() or "alone" in _job else dist.get_world_size()


def main() -> bool:
    """True in the one process that writes and logs."""
    return rank() == 0


def start(device: str) -> str:
    """Joins the job the environment describes; the device of this process. The others' standard output is closed from here on.

    Raises ValueError where the processes of a machine outnumber its GPUs.
    """
    local = int(os.environ.get("LOCAL_RANK") or 0)
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        if device not in ("auto", "cuda"):
            raise ValueError(
                f"--device {device} with several processes: each takes the GPU of its number; leave it out, or give --device cpu"
            )
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} here); lower --nproc_per_node"
            )
        torch.cuda.set_device(local)
    with _reported():
        store, number, size = next(dist.rendezvous("env://", timeout=PREPARING))
        dist.init_process_group(
            "gloo", store=store, rank=number, world_size=size, timeout=PREPARING
        )
        _job["store"] = store
        _job["steps"] = dist.new_group(
            backend="cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=STEPPING
        )
    if not main():
        sys.stdout = open(os.devnull, "w")
    return f"cuda:{local}" if cuda else "cpu"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one."""
    _job["alone"] = True
    try:
        yield
    finally:
        del _job["alone"]


def stop() -> None:
    """Leaves the job in good order."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _job.clear()


def first_to_end() -> bool:
    """True in the process that ends before the others do: its reason is the reason, theirs are consequences."""
    if not _job:
        return True
    try:
        return _job["store"].add("ended", 1) == 1
    except RuntimeError:  # the launcher is gone too
        return True


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what the backends raise, whatever has happened
        reason = re.sub(
            r"\[\S*/\S*\] *", "", (str(error).splitlines() or [type(error).__name__])[0]
        )
        reason = reason.split(". ")[0]  # without source file, advice and joke
        here = f"process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"
        raise Lost(
            f"{here} lost another one ({reason}); run the same command again: a training continues at its last saved state"
        ) from error


# ------------------------------------------------------------------------------------------------ within a step


def all_sum(x: Tensor) -> Tensor:
    """Sum over processes, the same bits in each."""
    return x if world() == 1 else _reduced(x.clone(), dist.ReduceOp.SUM)


def all_max(x: Tensor) -> Tensor:
    """Largest over processes, entry by entry."""
    return x if world() == 1 else _reduced(x.clone(), dist.ReduceOp.MAX)


def _reduced(x: Tensor, how: Any) -> Tensor:
    with _reported():
        dist.all_reduce(x, how, _job["steps"])
    return x


def all_sum_(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its sum over processes, in place: large ones as they are, small ones in flat buckets."""
    if world() == 1:
        return
    small: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() >= BUCKET and tensor.is_contiguous():
            _reduced(tensor, dist.ReduceOp.SUM)
            continue
        small.append(tensor)
        if sum(t.numel() for t in small) >= BUCKET:
            _bucket_(small)
            small = []
    _bucket_(small)


def _bucket_(tensors: list[Tensor]) -> None:
    if tensors:
        flat = _reduced(torch.cat([t.flatten() for t in tensors]), dist.ReduceOp.SUM)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def concat(x: Tensor) -> Tensor:
    """The rows of all processes in their order; there may be another number of them in each. [n,...] -> [N,...]"""
    if world() == 1:
        return x
    sizes = [int(n) for n in all_sum(torch.eye(world(), dtype=torch.long)[rank()] * len(x))]
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    found = [torch.empty_like(padded) for _ in sizes]
    with _reported():
        dist.all_gather(found, padded, _job["steps"])
    return torch.cat([part[:n] for part, n in zip(found, sizes, strict=True)])


# ------------------------------------------------------------------------------------------- between the steps


def all_max_ints(*numbers: int) -> list[int]:
    """The highest over processes of each number: how they agree to stop, or to take more slices."""
    return (
        list(numbers)
        if world() == 1
        else _reduced(torch.tensor(numbers), dist.ReduceOp.MAX).tolist()
    )


def share(n: int) -> slice:
    """Which of n things are this process's."""
    return slice(rank() * n // world(), (rank() + 1) * n // world())


def from_main(function: Callable[[], T]) -> T:
    """What the function gives in the main process, the others wait for it. Its ValueError or OSError is raised in all of them."""
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
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def main_first(function: Callable[[], T]) -> T:
    """The function's value in every process; the main one has done it before the others begin: what it wrote to a cache is there."""
    mine: list[T] = []
    from_main(lambda: mine.append(function()))
    return mine[0] if mine else function()


def to_main(thing: T, device: str) -> list[T]:
    """That of every process, in the main one, its tensors on this device or, where they were there, on the CPU; of this one elsewhere.

    Not for what others may have sent: unpickled.
    """
    if world() == 1:
        return [thing]
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    found: list[Any] | None = [None] * world() if main() else None
    with _reported():
        dist.gather_object(buffer.getvalue(), found)
    if found is None:
        return [thing]

    def place(storage: Any, there: str) -> Any:
        return (
            storage
            if there == "cpu"
            else torch.serialization.default_restore_location(storage, device)
        )

    return [torch.load(io.BytesIO(one), map_location=place, weights_only=False) for one in found]


def copy_from_main_(tensors: Sequence[Tensor]) -> None:
    """Every tensor becomes what it is in the main process."""
    if world() > 1:
        with _reported():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0, _job["steps"])
