"""What PyTorch moves between processes where the latents of a TopK are shared among them.

    python -m benchmarks.sharding --processes 2 3

The weights of one TopK are DTensors, cut along their latents; each process has all tokens. Every
operation of a step runs on them as it is, over gloo. Printed are where its result lies, the bytes
that a process receives, and for the whole step the difference to one process. docs/scale.md shows
the table.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import init_device_mesh as device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from src.config import small_parser

WIDTH, LATENTS, TOKENS, K = 256, 6144, 1536, 32  # cut evenly by 2 and by 3 processes

# How often the result of a collective crosses to a process, but for its own share.
COLLECTIVES = {"all_gather_into_tensor": 1, "all_to_all_single": 1, "all_reduce": 2}


class Received(TorchDispatchMode):
    """Adds up the bytes of all collectives that this process receives from the others."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.share_of_others = (processes - 1) / processes
        self.bytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if DTensor in types:  # it comes again, as what each process does
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        passes = COLLECTIVES.get(str(function).split(".")[-2], 0)
        if passes:
            self.bytes += passes * result.nbytes * self.share_of_others
        return result


def step(states: Tensor, encoder: Tensor, decoder: Tensor) -> Tensor:
    """Return the loss of a TopK in plain operations, after its backward pass."""
    values, latents = torch.topk(states @ encoder.T, K, dim=1)
    code = torch.zeros_like(states @ encoder.T).scatter(1, latents, values)
    loss = (code @ decoder - states).square().mean()
    loss.backward()
    return loss


def measure(processes: int) -> dict[str, Any]:
    """Return what each operation moves, in the process that calls it."""
    mesh = device_mesh("cpu", (processes,))
    torch.manual_seed(0)
    states = torch.randn(TOKENS, WIDTH)
    plain = [(torch.randn(LATENTS, WIDTH) / math.sqrt(WIDTH)).requires_grad_() for _ in range(2)]
    encoder, decoder = (
        distribute_tensor(weight.detach().clone(), mesh, [Shard(0)]).requires_grad_()
        for weight in plain
    )
    everywhere = distribute_tensor(states, mesh, [Replicate()])
    rows: dict[str, Any] = {}

    def run(name: str, operation: Callable[[], Any]) -> Any:
        with Received(processes) as received:
            result = operation()
        first = result[0] if isinstance(result, tuple) else result
        rows[name] = {"placement": str(first.placements[0]), "received": received.bytes}
        return result

    with torch.no_grad():
        latents = run("encoder's product", lambda: everywhere @ encoder.T)
        values, chosen = run("top-k of the latents", lambda: torch.topk(latents, K, dim=1))
        code = run("code", lambda: torch.zeros_like(latents).scatter(1, chosen, values))
        run("decoder's product", lambda: code @ decoder)
        run("decoder's rows of a sparse code", lambda: decoder[chosen])
    loss = run("whole step", lambda: step(everywhere, encoder, decoder))
    expected = step(states, *plain)
    rows["difference of the loss"] = abs(loss.detach().full_tensor().item() - expected.item())
    rows["difference of the gradients"] = max(
        float((cut.grad.full_tensor() - whole.grad).abs().max())
        for cut, whole in zip((encoder, decoder), plain, strict=True)
        if isinstance(cut.grad, DTensor)
    )
    return rows


def _process(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{processes}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    rows = measure(processes)
    if rank == 0:
        Path(folder, f"{processes}.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def table(processes: int, rows: dict[str, Any]) -> str:
    """Return the Markdown table, beside the bytes of the least that would do."""
    others = (processes - 1) / processes
    candidates = TOKENS * K * processes * 8 * others  # a value and a number for each
    sums = 2 * TOKENS * WIDTH * 4 * others  # reconstructions, summed and sent back
    least = {"top-k of the latents": candidates, "decoder's product": sums}
    least["whole step"] = candidates + 2 * sums  # reconstructions, and gradients of the states
    lines = [f"| {processes} processes | result | received, MB | least, MB |", "|---" * 4 + "|"]
    for name, row in rows.items():
        if isinstance(row, dict):
            need = f"{least[name] / 1e6:.1f}" if name in least else "0"
            lines.append(f"| {name} | {row['placement']} | {row['received'] / 1e6:.1f} | {need} |")
        else:
            lines.append(f"| {name} | {row:.1e} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = small_parser("benchmarks.sharding", __doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3])
    with tempfile.TemporaryDirectory() as folder:
        for processes in parser.parse_args().processes:
            mp.spawn(_process, (processes, folder), nprocs=processes)
            content = Path(folder, f"{processes}.json").read_text(encoding="utf-8")
            print(table(processes, json.loads(content)), flush=True)


if __name__ == "__main__":
    main()
