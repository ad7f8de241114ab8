"""A TopK step (code, loss, gradients) by sums of rows against the same by dense products: `python -m benchmarks.sparse_code`.

Ratios of minima within one run, one line a setting; the crossing sets SPARSE_FROM in src/model.py. On CUDA: --hidden_size 2048 --tokens 32768.
"""

import argparse
import time

import torch

from src import checkpoint, model
from src.model import TopK


def step(sae: TopK, x: torch.Tensor, dense: bool) -> float:
    """Seconds."""
    started = time.perf_counter()
    model.SPARSE_FROM[x.device.type] = torch.inf if dense else 0
    p = sae.autoencode(x)
    sae.zero_grad()
    sum(sae.loss(p).values()).backward()
    float(sae.pre_bias.grad[0])  # waits for a device that runs ahead
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4080)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    cfg = parser.parse_args()
    device = torch.device(checkpoint.pick_device(cfg.device))
    print(f"{device}, {torch.get_num_threads()} threads, hidden {cfg.hidden_size}, {cfg.tokens} tokens, torch {torch.__version__}")
    print(f"{'latents':>8} {'k':>4} {'dense ms':>9} {'sparse ms':>10} {'ratio':>6}")
    for latents, k in ((256, 32), (256, 16), (512, 32), (1024, 64), (2048, 64), (2048, 16), (8192, 64), (16384, 64), (16384, 32), (65536, 64)):
        sae, x = TopK(cfg.hidden_size, latents, k, auxk_coeff=0.0).to(device), torch.randn(cfg.tokens, cfg.hidden_size, device=device)
        times = [(step(sae, x, True), step(sae, x, False)) for _ in range(cfg.repeats)]
        dense, sparse = (min(column) * 1e3 for column in zip(*times, strict=True))
        print(f"{latents:>8} {k:>4} {dense:>9.1f} {sparse:>10.1f} {dense / sparse:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
