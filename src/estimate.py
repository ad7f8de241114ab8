"""What a stage will need in memory, disk and time.

It is printed before the stage starts, and compared at its end with what was used.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from src import distributed, hooks
from src.data import Rows
from src.device import MAX_GROWTH, bf16_matmuls, return_freed_memory
from src.device import resident as held_now
from src.sae import SAE, BatchInfo

GIGA = 1e9
# A step is timed on so many tokens: enough for its rate, and short beside a run.
TRIAL_TOKENS = 4096
READING_TRIAL_TOKENS = 1024  # the same where text is only read
# Buffers of the code's size that are alive at the peak of a step. Dense: codes and their gradients;
# measured growth was 0.56 to 0.88 of the estimate. Sparse: the gradient of dense products, or AuxK
# over half of the latents; without dead latents it was 0.2 to 0.5 (docs/LOG.md).
DENSE_CODE_BUFFERS, SPARSE_CODE_BUFFERS = 5, 2
# What a later step needs for one byte of the first ones on a CPU: AuxK has tensors of its own, and
# not all fit into blocks that are free (docs/LOG.md).
REUSE_FACTOR = 1.45
# Copies of the parameters: the gradients and the states of the optimiser.
STATE_COPIES = {"adam": 3, "signum": 2}


def _on_cuda(device: str) -> bool:
    return str(device).startswith("cuda")


# --------------------------------------------------------------------------------- cost of a step


@contextlib.contextmanager
def unchanged(saes: list[SAE]) -> Iterator[None]:
    """Restore all buffers at the end: some losses keep running means."""
    before = [(buffer, buffer.clone()) for sae in saes for buffer in sae.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _saved_and_code_bytes(sae: SAE, n: int, device: str) -> tuple[int, float]:
    """Bytes that n tokens keep for the backward pass, and bytes of the code buffers of a token."""
    tensors = (*sae.parameters(), *sae.buffers())
    weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    sizes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.arange(n * sae.hidden_size, dtype=torch.float32, device=device).view(n, -1).sin()
    info = BatchInfo(token_keys=torch.arange(n, device=device))
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        out = sae.autoencode(sae.gather({site: x for site in sae.sites()}), info)
        # The terms hold the graph, so no storage is freed and its address used again.
        _terms = sae.loss(out, info)
    buffers = DENSE_CODE_BUFFERS if isinstance(out.code, Tensor) else SPARSE_CODE_BUFFERS
    return sum(sizes.values()), 4 * out.code.shape.numel() / n * buffers


def step_bytes(sae: SAE, device: str) -> float:
    """Bytes per token of one update on a CPU: what the backward pass keeps, and code buffers.

    The difference between 16 and 8 tokens leaves out what does not depend on their number.
    """
    with unchanged([sae]):
        more, code_bytes = _saved_and_code_bytes(sae, 16, device)
        fewer, code_bytes = _saved_and_code_bytes(sae, 8, device)
    return max(0, more - fewer) / 8 + code_bytes


def _time_step(
    saes: list[SAE],
    language_model: nn.Module,
    rows: Rows,
    sites: list[int],
    device: str,
    with_kl: bool,
    n: int,
) -> float:
    """Seconds of one step on the first n rows, without the update. with_kl: of the KL finish."""
    batch = rows.batch(list(range(n)))
    info = BatchInfo(token_keys=batch.token_keys().to(device))
    if _on_cuda(device):
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    batch = batch.to(device)
    clean = hooks.CleanPass(language_model, batch, sites) if with_kl else None
    hidden = clean.hidden() if clean else hooks.read(language_model, batch, sites)
    for sae in saes if batch.mask.any() else []:
        out = sae.autoencode(sae.gather(hidden), info)
        loss = sum(sae.loss(out, info).values())
        if clean:
            runs = list(sae.patches(hidden, info, clean=out))
            # The runs take turns; those of the middle stand for all.
            loss = loss + clean.total_kl(slice(0, clean.row_ends[-1]), runs[len(runs) // 2])
        trained = [p for p in sae.parameters() if p.requires_grad]
        torch.autograd.grad(loss, trained, allow_unused=True)
    if _on_cuda(device):
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _time_what_fits(time_step: Callable[[int], float], n: int, device: str) -> tuple[int, float]:
    """(rows, seconds) of a step on n rows, or on half as many while memory is short."""
    while True:
        try:
            if _on_cuda(device):
                torch.cuda.reset_peak_memory_stats(device)
            # The first call is slower: it compiles.
            time_step(n)
            return n, time_step(n)
        except torch.OutOfMemoryError:
            if n == 1:
                raise
        # Not in the handler, whose traceback would hold the tensors of the failed trial.
        n //= 2


def step_cost(
    saes: list[SAE],
    language_model: nn.Module,
    rows: Rows,
    batch_size: int,
    sites: list[int],
    device: str,
    with_kl: bool = False,
) -> tuple[float, float]:
    """(seconds, bytes beyond the weights) of one step in this process, without the update.

    Both are measured: on CUDA on all rows of the step or, while memory is short, on half as many;
    on a CPU on a few rows. AuxK, which begins later, is not included. No SAE is changed. Raises
    torch.OutOfMemoryError where one row does not fit.
    """
    on_cuda = _on_cuda(device)
    step_rows = -(-min(batch_size, len(rows)) // distributed.world())
    n = step_rows if on_cuda else max(1, min(step_rows, TRIAL_TOKENS // rows.max_length))
    time_step = functools.partial(_time_step, saes, language_model, rows, sites, device, with_kl)
    with distributed.alone(), unchanged(saes), bf16_matmuls():
        seconds, growth = _cost(time_step, n, step_rows, device)
        if on_cuda:
            return seconds, growth
        state_bytes = 4 * saes[0].hidden_size * len(sites)
        token_bytes = max(step_bytes(sae, device) for sae in saes) + state_bytes
        return seconds, max(growth, step_rows * rows.max_length * token_bytes)


def _cost(
    time_step: Callable[[int], float], n: int, step_rows: int, device: str
) -> tuple[float, float]:
    """(seconds, bytes) of a step of so many rows, from a trial with n rows.

    On a CPU there is another trial with fewer rows. The difference leaves out what does not depend
    on their number.
    """
    if _on_cuda(device):
        n, seconds = _time_what_fits(time_step, n, device)
        peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        return seconds * step_rows / n, peak * step_rows / n
    few = max(1, n // 4)
    return_freed_memory()  # in which a trial would not show
    present = resident()
    count_peak_anew()
    time_step(few)
    # A peak may be a little below what was there: the system counts pages in parcels.
    smaller = max(0, recent_peak() - present)
    n, seconds = _time_what_fits(time_step, n, "cpu")
    growth = max(smaller, recent_peak() - present)
    row_bytes = (growth - smaller) / (n - few) if n > few else growth / n
    growth += row_bytes * (step_rows - n)
    return seconds * step_rows / n, REUSE_FACTOR * growth


# -------------------------------------------------------------------------------- memory and time


_before = {"peak": 0}  # what was the largest when the count began anew


def recent_peak() -> int:
    """Largest memory that this process has held since count_peak_anew, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_resident() -> int:
    """Largest memory that this process has held, in bytes."""
    return max(_before["peak"], recent_peak())


def count_peak_anew() -> None:
    """Let recent_peak() begin with what is held now. Only Linux can; elsewhere nothing changes."""
    _before["peak"] = peak_resident()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident() -> int:
    """Memory that this process holds, in bytes; the largest so far where the system hides it."""
    return held_now() or peak_resident()


def _free_memory(device: str) -> int:
    """Free memory of the GPU, or all memory of the machine, in bytes."""
    if _on_cuda(device):
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def duration(seconds: float) -> str:
    """75 -> 1 min 15 s; two units at most."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    rest, parts = round(seconds), []
    for unit, size in units:
        if rest >= size and len(parts) < 2:
            parts.append(f"{rest // size} {unit}")
            rest %= size
    return " ".join(parts) or f"{seconds:.2g} s"


class Estimate:
    """Memory and time of a stage: printed when it is made, compared with what was used at the end.

    needs: bytes by what they are for. On CUDA what `present` names has left the free memory.
    """

    def __init__(
        self, device: str, present: dict[str, float], needs: dict[str, float], seconds: float
    ) -> None:
        self.device = device
        self.present = present
        self.needs = needs
        self.seconds = seconds
        # A process may have held more before, while the language model was loaded.
        before = 0 if _on_cuda(device) else peak_resident()
        self.memory = max(before, sum(present.values()) + sum(needs.values())) / GIGA

    def announce(self, work: str, advice: str) -> None:
        """Print the estimate, and what to do if it is above the memory of this machine."""
        parts = self.present | self.needs
        listed = ", ".join(f"{name} {size / GIGA:.2f} GB" for name, size in parts.items())
        print(
            f"memory by estimate: {listed}; together {self.memory:.2f} GB. "
            f"Time: {duration(self.seconds)} for {work}"
        )
        free = _free_memory(self.device) / GIGA
        needed = sum(self.needs.values()) / GIGA if _on_cuda(self.device) else self.memory
        if needed > free:
            print(f"warning: the estimate is above the {free:.2f} GB of this machine; {advice}")

    def compare(self, seconds: float) -> dict[str, float]:
        """Print and return estimated and used memory (GB) and time (s).

        `seconds` is the time that the announced work took.
        """
        if _on_cuda(self.device):
            used = torch.cuda.max_memory_allocated(self.device) / GIGA
        else:
            used = peak_resident() / GIGA
        print(
            f"estimated and used: memory {self.memory:.2f} GB and {used:.2f} GB, "
            f"time {duration(self.seconds)} and {duration(seconds)}"
        )
        numbers = {
            "memory_gb": self.memory,
            "memory_gb_used": used,
            "seconds": self.seconds,
            "seconds_used": seconds,
        }
        return {name: round(value, 3) for name, value in numbers.items()}


def of_training(
    cfg: Namespace,
    saes: list[SAE],
    language_model: nn.Module,
    rows: Rows,
    steps: int,
    folder: Path,
) -> Estimate:
    """Print and return the estimate of a training, from trials with a few of its rows.

    Raises ValueError where the memory is above --max_memory_hint, and OSError where the disk has no
    room for the run's states.
    """
    sites = sorted({site for sae in saes for site in sae.sites()})
    sae_bytes = 4 * sum(p.numel() for sae in saes for p in sae.parameters())
    state_bytes = sae_bytes * STATE_COPIES[cfg.optimizer]
    return_freed_memory()
    present = {"this process by now": resident()}
    cost = functools.partial(
        step_cost, saes, language_model, rows, cfg.batch_size, sites, cfg.device
    )
    seconds, step = cost()
    total = steps * seconds
    finish_steps = round(cfg.kl_finish * steps)
    if finish_steps:
        finish_seconds, finish_step = cost(with_kl=True)
        total += finish_steps * (finish_seconds - seconds)
        step = max(step, finish_step)
    if _on_cuda(cfg.device):
        lm_bytes = sum(p.numel() * p.element_size() for p in language_model.parameters())
        present = {"language model and weights": lm_bytes + sae_bytes}
    needs = {"gradients and optimiser": state_bytes, "one step": step}
    if not _on_cuda(cfg.device):
        held = sum(present.values()) + state_bytes
        needs["freed memory that is kept"] = (MAX_GROWTH - 1) * held
    estimate = Estimate(cfg.device, present, needs, total)
    limit = cfg.max_memory_hint
    if limit is not None and estimate.memory > limit:
        raise ValueError(
            f"the run needs {estimate.memory:.2f} GB by estimate, above --max_memory_hint "
            f"{limit:g}; lower --batch_size"
        )
    _check_disk(folder, state_bytes)
    estimate.announce(f"{steps:,} steps", "lower --batch_size or train fewer SAEs at once")
    return estimate


def of_reading(
    cfg: Namespace,
    rows: Rows,
    time_rows: Callable[[int], float],
    other_needs: dict[str, float],
    other_seconds: Callable[[float], float] = lambda _seconds: 0.0,
    held_share: float = 1.0,
) -> Estimate:
    """Print and return the estimate of a stage that reads text in batches.

    time_rows(n): reads n rows as the stage does, and returns the seconds. other_needs: bytes of
    what follows. other_seconds: time of what follows in a batch, from that of reading it.
    held_share: how much of what reading takes is still held when the rest needs its memory.
    """
    batch_rows = min(cfg.batch_size, len(rows))
    n = max(1, min(batch_rows, READING_TRIAL_TOKENS // rows.max_length))
    on_cuda = _on_cuda(cfg.device)
    present = torch.cuda.memory_allocated(cfg.device) if on_cuda else resident()
    with distributed.alone():
        seconds, size = _cost(time_rows, n, batch_rows, cfg.device)
    n_batches = len(rows) / cfg.batch_size / distributed.world()
    estimate = Estimate(
        cfg.device,
        {"this process by now": present},
        {"reading a batch": max(held_share * size, size - sum(other_needs.values()))} | other_needs,
        n_batches * (seconds + other_seconds(seconds)),
    )
    estimate.announce(f"{len(rows):,} rows", "lower --batch_size")
    return estimate


def _check_disk(folder: Path, state_bytes: int) -> None:
    # Two states are kept while a third is written.
    needed, free = 3 * state_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} has {free / 1e6:.0f} MB free; the states of this run need "
            f"{needed / 1e6:.0f} MB: make room or change --output_dir"
        )
