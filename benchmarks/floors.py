"""Floors: the least time a token can take, counted from shapes: FLOPs over the rate of matrix products plus bytes over the memory bandwidth.

What is counted is what no implementation can leave out: the products a model is made of, elementwise work fused into one pass, codes written and
read once, the rows of k active latents, one pass of the optimiser over the weights. Caches, launches and imperfect products are what an
implementation pays above its floor. D hidden, F latents, L routed sites, k active latents; all counts are per token unless said otherwise.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from src.ops import fast_bfloat16


class Machine(NamedTuple):
    """FLOP/s of matrix products by number format, and bytes/s."""

    name: str
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float


class Shape(NamedTuple):
    """A Llama-like language model, and the tokens of one step."""

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    head: int
    ffn: int
    vocabulary: int
    length: int
    step: int


class Work(NamedTuple):
    """FLOPs of matrix products, and bytes moved beside them."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other):
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times):
        return Work(self.flops * times, self.bytes * times)


DATASHEET = {
    "H100": Machine("H100 SXM, datasheet", 989e12, 494e12, 67e12, 3.35e12),
    "H200": Machine("H200 SXM, datasheet", 989e12, 494e12, 67e12, 4.8e12),
}
H200_REACHED = Machine(
    "H200, highest rates measured on one", 790e12, 395e12, 52e12, 4.3e12
)  # fp32 without TF32 is assumed
LLAMA_1B = Shape(2048, 16, 32, 8, 64, 8192, 128256, 512, 64 * 512)
STAGES = ("data", "LM", "gather", "encode", "top-k", "decode", "backward", "optimiser")


def shape_of(config, length: int, step: int) -> Shape:
    """The Shape of a transformers configuration."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads, head
    return Shape(
        config.hidden_size,
        config.num_hidden_layers,
        *heads,
        config.intermediate_size,
        config.vocab_size,
        length,
        step,
    )


def blocks(shape: Shape, count: int, width: int = 2) -> Work:
    """`count` decoder blocks: their products, causal attention over half the row on average, elementwise work fused; width: bytes of a number."""
    s, queries, keys = shape, shape.heads * shape.head, shape.kv_heads * shape.head
    weights = s.hidden * (2 * queries + 2 * keys) + 3 * s.hidden * s.ffn
    attention = 2 * s.length * queries  # two products, half the positions
    # gate and up read, their product written; two norms read and written; two sums into the residual; q and k rotated
    numbers = 3 * s.ffn + 4 * s.hidden + 6 * s.hidden + 2 * (queries + keys)
    return Work(2 * weights + attention, width * numbers) * count


def head(shape: Shape, width: int = 2) -> Work:
    """The output layer, its logits written once."""
    return Work(2 * shape.hidden * shape.vocabulary, width * shape.vocabulary)


def sae(
    model: str,
    hidden: int,
    latents: int,
    k: int,
    sites: int = 1,
    step: int = 1,
    *,
    sparse: bool = False,
    width: int = 2,
    adam: bool = True,
    frozen_decoder: bool = False,
) -> dict[str, Work]:
    """{stage: work} of one training step over `step` tokens, per token.

    sparse: decode and differentiate by the k rows, else by dense products (models without a fixed k always). frozen_decoder: Gated's auxiliary
    loss. A step never needs the gradient of the input: that of pre_bias sums over tokens first, that of a router takes O(k).
    """
    product, row = Work(2 * hidden * latents), Work(0, width * latents)
    many, joint = (
        (sites, 1) if model == "MLSAE" else (1, sites) if model == "Crosscoder" else (1, 1)
    )  # codes a token; dictionaries a code
    k_sparse = model in ("TopK", "RandomK", "BatchTopK", "RouteSAE", "MLSAE")
    rows_of_k = Work(0, k * hidden * width)
    by_rows = sparse and k_sparse
    weights = 2 * hidden * latents * joint
    routed = model in ("RouteSAE", "MLSAE", "Crosscoder")
    standardised = sites if routed and model != "RouteSAE" else 1
    stages = {
        "gather": Work(0, width * hidden * ((sites if routed else 1) + standardised)),
        "encode": product * joint * many,
        "top-k": Work(0, 2 * width * latents + k * (width + 4)) * many if k_sparse else Work(),
        "decode": rows_of_k * many if by_rows else (product * joint + row * 2) * many,
        "backward": rows_of_k * 3 * many if by_rows else (product * 3 * joint + row * 4) * many,
        # moments, weight and gradient read, moments and weight written, a copy in half precision; sign steps with an average: two sets of weights
        "optimiser": Work(0, weights * (30 if adam else 22) / step)
        + (Work(0, 12 * hidden * latents / step) if joint == 1 else Work()),
    }
    if model == "Crosscoder":
        stages["decode"] += Work(
            0, 3 * width * hidden * sites
        )  # every site's reconstruction written, read with its target
    if frozen_decoder:
        stages["decode"] += product + row
        stages["backward"] += product + row * 2
    return stages


def seconds(work: Work, machine: Machine, number: str) -> float:
    """Time of some work with products in a number format (bf16, tf32, fp32)."""
    return work.flops / getattr(machine, number) + work.bytes / machine.bandwidth


def step_floor(
    saes: list[dict[str, Work]],
    language_model: Work,
    machine: Machine,
    lm_number: str = "bf16",
    sae_number: str = "bf16",
) -> dict[str, float]:
    """{stage: seconds a token} of SAEs trained from one pass of the language model, "total" among them."""
    found = {
        "data": 12 / machine.bandwidth,
        "LM": seconds(language_model, machine, lm_number),
    }  # a token id of 4 bytes, read and written as 8
    for stage in STAGES[2:]:
        found[stage] = sum(seconds(one[stage], machine, sae_number) for one in saes)
    return found | {"total": sum(found.values())}


def measured(device: str = "cpu", repeats: int = 5, side: int | None = None) -> Machine:
    """The rates of this machine: the best of some square products (2,048; 8,192 on CUDA) and of copies of 16 times their size."""
    cuda = device.startswith("cuda")
    side = side or (8192 if cuda else 2048)
    numbers = 16 * side**2

    def best(work):
        took = []
        for _ in range(repeats + 1):
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            took.append(time.perf_counter() - started)
        return min(took[1:])

    def rate(dtype, precision="highest"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        result = 2 * side**3 / best(lambda: a @ b)
        torch.set_float32_matmul_precision(before)
        return result

    source, target = torch.ones(numbers, device=device), torch.empty(numbers, device=device)
    bandwidth = 8 * numbers / best(lambda: target.copy_(source))
    fp32 = rate(torch.float32)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    bf16 = (
        rate(torch.bfloat16) if cuda or fast_bfloat16() else fp32
    )  # emulated ones take minutes, and nothing here uses them
    return Machine(
        f"{name}, measured", bf16, rate(torch.float32, "high") if cuda else fp32, fp32, bandwidth
    )
