"""What a training will need in memory, disk and time: said before it starts, and held against what happened at its end."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from src import distributed, hooks
from src.data import Rows
from src.device import bf16_matmuls
from src.sae import SAE, BatchInfo

GIGA = 1e9
TRIAL_TOKENS = (
    4096  # what the time of a step is measured on: enough for its rate, little beside a run
)


@contextmanager
def unchanged(saes: list[SAE]) -> Iterator[None]:
    """Puts buffers back as they were: some losses keep running means."""
    before = [(buffer, buffer.clone()) for sae in saes for buffer in sae.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def step_bytes(sae: SAE, device: str) -> float:
    """Bytes a token takes in one update on a CPU: what the backward pass needs (what 16 tokens keep beyond 8), and some tensors of the code's size.

    Of a dense code five, codes and their gradients alive at one time: measured growth was .56 to .88 of the sum. Of a code by its entries two:
    the gradient of dense products, or AuxK over half of the latents; without dead latents measured growth was .2 to .5 (docs/LOG.md).
    """
    more = 0.0
    weights = {
        tensor.untyped_storage().data_ptr() for tensor in (*sae.parameters(), *sae.buffers())
    }

    def kept(n: int) -> int:
        nonlocal more
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.arange(n * sae.hidden_size, dtype=torch.float32, device=device).view(n, -1).sin()
        info = BatchInfo(token_keys=torch.arange(n, device=device))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            p = sae.autoencode(sae.gather({site: x for site in sae.sites()}), info)
            _terms = sae.loss(p, info)
        more = 4 * p.code.shape.numel() / n * (5 if isinstance(p.code, Tensor) else 2)
        return sum(sizes.values())

    with unchanged([sae]):
        return max(0, kept(16) - kept(8)) / 8 + more


def step_cost(
    saes: list[SAE],
    language_model: nn.Module,
    rows: Rows,
    batch_size: int,
    sites: list[int],
    device: str,
) -> tuple[float, float]:
    """(seconds, bytes beyond weights) of one step in this process, without the update; changes no SAE.

    Measured: on CUDA on all rows of the step, and on half as many as often as memory is short (AuxK, which begins later, is not in it);
    elsewhere on a few of them, the bytes reckoned by step_bytes. Raises torch.OutOfMemoryError where not even one row fits.
    """
    on_cuda = str(device).startswith("cuda")

    def trial(n: int) -> float:
        batch = rows.batch(list(range(n)))
        info = BatchInfo(token_keys=batch.token_keys().to(device))
        if on_cuda:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        hidden = hooks.read(language_model, batch.to(device), sites)
        for sae in saes if batch.mask.any() else []:
            loss = sum(sae.loss(sae.autoencode(sae.gather(hidden), info), info).values())
            torch.autograd.grad(
                loss, [p for p in sae.parameters() if p.requires_grad], allow_unused=True
            )
        if on_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    mine = -(-min(batch_size, len(rows)) // distributed.world())  # rows of a step in this process
    n = mine if on_cuda else max(1, min(mine, TRIAL_TOKENS // rows.max_length))
    with distributed.alone(), unchanged(saes), bf16_matmuls():
        while True:
            try:
                if on_cuda:
                    torch.cuda.reset_peak_memory_stats(device)
                trial(n)  # the first call of anything is slower: compiling is in it
                seconds = trial(n) * mine / n
                break
            except torch.OutOfMemoryError:
                if n == 1:
                    raise
            n //= 2  # outside the handler, whose traceback holds the tensors
        if on_cuda:
            peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
            return seconds, peak * mine / n
        a_token = max(step_bytes(sae, device) for sae in saes) + 4 * saes[0].hidden_size * len(
            sites
        )
        return seconds, batch_size / distributed.world() * rows.max_length * a_token


def peak_resident() -> int:
    """Bytes of memory this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def resident() -> int:
    """Bytes of memory this process holds now; where the system does not tell, the most it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident()


def duration(seconds: float) -> str:
    """75 -> 1 min 15 s; two units at most."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left, parts = round(seconds), []
    for unit, size in units:
        if left >= size and len(parts) < 2:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts) or f"{seconds:.2g} s"


class Estimate:
    """The memory and time of a run. Making one prints both; `compare` prints them beside what was used.

    Raises ValueError where the memory is above --max_memory_hint, OSError where the disk at `folder` cannot take the run's states.
    """

    def __init__(
        self,
        cfg: Namespace,
        saes: list[SAE],
        language_model: nn.Module,
        rows: Rows,
        steps: int,
        folder: Path,
    ) -> None:
        self.device, on_cuda = cfg.device, str(cfg.device).startswith("cuda")
        sites = sorted({site for sae in saes for site in sae.sites()})
        weights = [sum(p.numel() for p in sae.parameters()) * 4 for sae in saes]
        states = [size * (3 if cfg.optimizer == "adam" else 2) for size in weights]
        seconds, step = step_cost(saes, language_model, rows, cfg.batch_size, sites, cfg.device)
        self.seconds = steps * seconds
        there = (
            sum(p.numel() * p.element_size() for p in language_model.parameters()) + sum(weights)
            if on_cuda
            else resident()
        )
        need = {
            "language model and weights" if on_cuda else "this process by now": there,
            "gradients and optimiser": sum(states),
            "one step": step,
        }
        self.memory = sum(need.values()) / GIGA
        if cfg.max_memory_hint is not None and self.memory > cfg.max_memory_hint:
            found = f"the run needs {self.memory:.2f} GB by estimate, above --max_memory_hint {cfg.max_memory_hint:g}"
            raise ValueError(f"{found}; lower --batch_size")
        disk, want = (
            shutil.disk_usage(folder).free,
            3 * sum(states),
        )  # two states are kept while a third is written
        if want > disk:
            room = f"{disk / 1e6:.0f} MB free; the states of this run need {want / 1e6:.0f} MB"
            raise OSError(f"{folder} has {room}: make room or change --output_dir")
        parts = ", ".join(f"{what} {size / GIGA:.2f} GB" for what, size in need.items())
        print(
            f"memory by estimate: {parts}; together {self.memory:.2f} GB. Time: {duration(self.seconds)} for {steps:,} steps"
        )
        free = (
            torch.cuda.mem_get_info(cfg.device)[0]
            if on_cuda
            else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        )
        if (self.memory * GIGA - there if on_cuda else self.memory * GIGA) > free:
            print(
                f"warning: that is above the {free / GIGA:.2f} GB here; lower --batch_size or train fewer SAEs at once"
            )

    def compare(self, seconds: float) -> dict[str, float]:
        """Estimated and used memory (GB) and time (s) for the recipe; `seconds` is the time all steps took."""
        used = (
            torch.cuda.max_memory_allocated(self.device)
            if str(self.device).startswith("cuda")
            else peak_resident()
        )
        memory, used = self.memory, used / GIGA
        print(
            f"estimated and used: memory {memory:.2f} GB and {used:.2f} GB, time {duration(self.seconds)} and {duration(seconds)}"
        )
        numbers = {
            "memory_gb": memory,
            "memory_gb_used": used,
            "seconds": self.seconds,
            "seconds_used": seconds,
        }
        return {name: round(value, 3) for name, value in numbers.items()}
