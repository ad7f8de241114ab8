"""Floors: the least time that a token can take, counted from shapes.

A floor is FLOPs over the rate of matrix products, plus bytes over the memory bandwidth. It counts
what no implementation can leave out: the products of a model, elementwise work fused into one
pass, codes written and read once, the rows of the k active latents, and one pass of the optimiser
over the weights. An implementation pays for caches, kernel launches and imperfect products on top.

All counts are per token, if nothing else is stated.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from src.device import fast_bfloat16, matmul_precision
from src.zoo import ZOO


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
# The rate of fp32 without TF32 is assumed, not measured.
H200_REACHED = Machine("H200, highest rates measured on one", 790e12, 395e12, 52e12, 4.3e12)
LLAMA_1B = Shape(2048, 16, 32, 8, 64, 8192, 128256, 512, 64 * 512)
STAGES = ("data", "LM", "gather", "encode", "top-k", "decode", "backward", "optimiser")


def shape_of(config, length: int, step: int) -> Shape:
    """The Shape of a transformers configuration."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        hidden=config.hidden_size,
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head=head,
        ffn=config.intermediate_size,
        vocabulary=config.vocab_size,
        length=length,
        step=step,
    )


def blocks(shape: Shape, count: int, width: int = 2) -> Work:
    """`count` decoder blocks, their elementwise work fused. width: bytes of a number."""
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    weights = shape.hidden * (2 * queries + 2 * keys) + 3 * shape.hidden * shape.ffn
    # Two products; causal attention covers half the row on average.
    attention = 2 * shape.length * queries
    gate = 3 * shape.ffn  # gate and up are read, their product is written
    norms = 4 * shape.hidden  # two, each read and written
    residual = 6 * shape.hidden  # two sums
    rotation = 2 * (queries + keys)
    numbers = gate + norms + residual + rotation
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
    """{stage: work per token} of one training step over `step` tokens.

    sparse: decode and differentiate by the rows of the k active latents instead of dense products;
    ignored for models without a fixed k. width: bytes of a number. frozen_decoder: the auxiliary
    loss of Gated is trained too.

    The gradient of the input is never needed: that of pre_bias sums over tokens first, and that of
    a router takes O(k).
    """
    codes = sites if model == "MLSAE" else 1  # codes of one token
    dictionaries = sites if model == "Crosscoder" else 1  # dictionaries that share one code
    has_k = "k" in ZOO[model].options
    sites_read = sites if model in ("RouteSAE", "MLSAE", "Crosscoder") else 1
    sites_standardised = 1 if model == "RouteSAE" else sites_read
    product = Work(2 * hidden * latents)
    code = Work(0, width * latents)  # one dense code, read or written once
    if sparse and has_k:
        decode = Work(0, k * hidden * width)
        backward = decode * 3
    else:
        decode = product * dictionaries + code * 2
        backward = product * 3 * dictionaries + code * 4
    select = Work(0, 2 * width * latents + k * (width + 4)) if has_k else Work()
    stages = {
        "gather": Work(0, width * hidden * (sites_read + sites_standardised)),
        "encode": product * dictionaries * codes,
        "top-k": select * codes,
        "decode": decode * codes,
        "backward": backward * codes,
        "optimiser": optimiser_work(hidden * latents, dictionaries, step, adam),
    }
    if model == "Crosscoder":
        # every site's reconstruction is written, and read together with its target
        stages["decode"] += Work(0, 3 * width * hidden * sites)
    if frozen_decoder:
        stages["decode"] += product + code
        stages["backward"] += product + code * 2
    return stages


def optimiser_work(weights: int, dictionaries: int, step: int, adam: bool) -> Work:
    """Share of one token in an update of encoders and decoders, `weights` numbers each.

    Adam reads moments, weight and gradient; it writes moments, weight and a copy in half precision.
    Sign steps with an average keep two sets of weights.
    """
    bytes_per_weight = 30 if adam else 22
    update = Work(0, 2 * dictionaries * weights * bytes_per_weight / step)
    unit_norm = Work(0, 12 * weights / step)  # decoder columns kept at norm 1
    return update + unit_norm if dictionaries == 1 else update


def seconds(work: Work, machine: Machine, number: str) -> float:
    """Time of the work, with products in a number format (bf16, tf32, fp32)."""
    return work.flops / getattr(machine, number) + work.bytes / machine.bandwidth


def step_floor(
    saes: list[dict[str, Work]],
    language_model: Work,
    machine: Machine,
    lm_number: str = "bf16",
    sae_number: str = "bf16",
) -> dict[str, float]:
    """{stage or "total": seconds a token} of SAEs trained from one pass of the language model."""
    token_bytes = 12  # a token id is read as 4 bytes and written as 8
    floor = {
        "data": token_bytes / machine.bandwidth,
        "LM": seconds(language_model, machine, lm_number),
    }
    for stage in STAGES[2:]:
        floor[stage] = sum(seconds(work[stage], machine, sae_number) for work in saes)
    return floor | {"total": sum(floor.values())}


def measured(device: str = "cpu", repeats: int = 5, side: int | None = None) -> Machine:
    """The best rates of this machine over some repeats.

    Products are square, of a side of 2,048 (8,192 on CUDA). Copies have 16 times as many numbers.
    """
    cuda = device.startswith("cuda")
    side = side or (8192 if cuda else 2048)
    numbers = 16 * side**2

    def synchronise():
        if cuda:
            torch.cuda.synchronize()

    def best(work):
        times = []
        for _ in range(repeats + 1):
            synchronise()
            started = time.perf_counter()
            work()
            synchronise()
            times.append(time.perf_counter() - started)
        return min(times[1:])

    def rate(dtype, precision="highest"):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        with matmul_precision(precision):
            return 2 * side**3 / best(lambda: a @ b)

    source, target = torch.ones(numbers, device=device), torch.empty(numbers, device=device)
    bandwidth = 8 * numbers / best(lambda: target.copy_(source))
    fp32 = rate(torch.float32, "highest" if cuda else "medium")  # as in device.bf16_matmuls()
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    # Emulated bfloat16 products take minutes, and no benchmark uses them.
    bf16 = rate(torch.bfloat16) if cuda or fast_bfloat16() else fp32
    tf32 = rate(torch.float32, "high") if cuda else fp32
    return Machine(f"{name}, measured", bf16, tf32, fp32, bandwidth)
