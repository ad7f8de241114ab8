"""Times a TopK step (code, loss, gradients) in each form of SparseCode.

`python -m benchmarks.sparse_code` prints one line a setting, with the minimum over repeats. The
ratios at which one form becomes faster than another set SPARSE_FROM and ROWS_FROM in src/ops.py.
On CUDA use --hidden_size 2048 --tokens 32768.
"""

import time

import torch

from src import device as device_module
from src import sparse
from src.config import small_parser
from src.device import pick_device
from src.model import TopK

FORMS = "products", "rows", "sums"
SETTINGS = (
    (256, 32),
    (256, 16),
    (512, 32),
    (1024, 64),
    (2048, 64),
    (2048, 16),
    (8192, 64),
    (16384, 256),
    (16384, 64),
    (16384, 32),
    (32768, 32),
    (65536, 64),
)


def step(sae: TopK, x: torch.Tensor, form: str) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    sparse.decode_form = lambda ratio, x: form
    with device_module.bf16_matmuls():
        p = sae.autoencode(x)
        sae.zero_grad()
        sum(sae.loss(p).values()).backward()
    float(sae.pre_bias.grad[0])  # waits for a device that runs ahead
    return time.perf_counter() - started


def main() -> None:
    parser = small_parser("benchmarks.sparse_code", __doc__)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4080)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    cfg = parser.parse_args()
    device = torch.device(pick_device(cfg.device))
    print(
        f"{device}, {torch.get_num_threads()} threads, hidden {cfg.hidden_size}, "
        f"{cfg.tokens} tokens, torch {torch.__version__}; milliseconds"
    )
    print(f"{'latents':>8} {'k':>4} {'ratio':>6} " + " ".join(f"{form:>9}" for form in FORMS))
    for latents, k in SETTINGS:
        sae = TopK(cfg.hidden_size, latents, k, auxk_coeff=0.0).to(device)
        x = torch.randn(cfg.tokens, cfg.hidden_size, device=device)
        repeats = [[step(sae, x, form) for form in FORMS] for _ in range(cfg.repeats)]
        best = [min(seconds) for seconds in zip(*repeats, strict=True)]
        columns = " ".join(f"{seconds * 1e3:>9.1f}" for seconds in best)
        print(f"{latents:>8} {k:>4} {latents // k:>6} {columns}", flush=True)


if __name__ == "__main__":
    main()
