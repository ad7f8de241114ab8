"""A lower bound on the time and memory of an experiment, printed before it starts.

Operations are counted from shapes and divided by the rate of a matrix product measured on this
device. On a GPU tokenising, memory traffic, top-k, decoding of contexts and requests come on top.
On a CPU k-sparse codes need fewer operations than the dense ones that are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from src import config, lm, model
from src.sae import BatchInfo
from src.trainer import Trainer


class Cost(NamedTuple):
    """Operations of one token and bytes of one SAE."""

    train: float
    code: float  # forward only
    patched: float  # language model, all patched runs
    depth: float  # share of the language model's blocks that lie below the SAE's last site
    weights: float  # bytes with gradient, average and optimiser
    step: float  # bytes a token


def rate(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second of a square matrix product, best of five."""
    size = size or (8192 if device.startswith("cuda") else 1024)
    a, best = torch.ones(size, size, device=device, dtype=dtype), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def cost(name: str, options: dict[str, Any], shape: dict[str, int]) -> Cost:
    """Cost of one SAE on a language model of that shape; the SAE is not allocated."""
    hidden_size, n_layers = shape["hidden_size"], shape["n_layers"]
    with torch.device("meta"):
        sae = model.build(name, hidden_size, n_layers, options)
    sites = sae.sites()
    # A small SAE tells how many codes a token has, and whether it routes.
    small = model.build(name, hidden_size, n_layers, options | {"latent_size": 16, "k": 2})
    hidden = {site: torch.randn(2, hidden_size) for site in sites}
    out = small.autoencode(small.gather(hidden), BatchInfo(token_keys=torch.arange(2)))
    codes = out.latents.numel() / (2 * small.latent_size)
    numbers = sum(weight.numel() for weight in sae.parameters())
    code = 2 * numbers * codes
    # The one patched run of a router starts at its first site.
    runs = [sites[0]] if out.weights is not None or len(sites) == 1 else sites
    blocks, head = 2 * shape["blocks"], 2 * shape["head"]
    patched = sum(blocks * (1 - site / n_layers) + 2 * head for site in runs)
    step = 5 * 4 * codes * sae.latent_size  # five float32 buffers of a dense code
    return Cost(3 * code, code, patched, sites[-1] / n_layers, 16 * numbers, step)


def shape_of(language_model: nn.Module) -> dict[str, int]:
    """Sizes, and the number of weights of blocks and head, of a language model."""
    text = lm.text_config(language_model)
    blocks = lm.blocks(language_model)
    return {
        "hidden_size": text.hidden_size,
        "n_layers": len(blocks),
        "head": text.hidden_size * text.vocab_size,
        "blocks": sum(p.numel() for p in blocks.parameters()),
    }


def floors(
    groups: Sequence[Any], scale: Any, options: list[str], reads: Callable[[str, int], bool]
) -> dict[str, Any]:
    """The least seconds of "train", "evaluate" and "apply", and the least bytes of "memory".

    "memory" is that of the largest training. "rate" and "lm_rate" are the measured rates in float32
    and in the language model's format. reads(model, seed): whether contexts of that SAE are made.
    """
    trainers = [
        Trainer(config.parse("train", [*group.argv, "--seed", str(group.seed), *options]))
        for group in groups
    ]
    cfg = trainers[0].cfg
    _, language_model = lm.get_language_model(
        cfg.model_path, cfg.device, cfg.dtype, cfg.trust_remote_code
    )
    shape = shape_of(language_model)
    loaded = sum(p.numel() * p.element_size() for p in language_model.parameters())
    lm_rate = rate(cfg.device, next(language_model.parameters()).dtype)
    sae_rate = rate(cfg.device, torch.float32)
    below, logits = 2 * shape["blocks"], 2 * shape["head"]
    train = evaluate = apply = memory = 0.0
    for trainer in trainers:
        saes = [cost(name, chosen, shape) for name, chosen, _ in trainer.combinations]
        depth = max(sae.depth for sae in saes)
        trained = sum(sae.train for sae in saes)
        coded = sum(sae.code for sae in saes)
        patched = sum(sae.patched for sae in saes)
        train += scale.train * (below * depth / lm_rate + trained / sae_rate)
        evaluate += scale.evaluate * ((below + logits + patched) / lm_rate + coded / sae_rate)
        for sae, (name, _, _) in zip(saes, trainer.combinations, strict=True):
            if reads(name, trainer.cfg.seed):
                apply += scale.apply * (below * sae.depth / lm_rate + sae.code / sae_rate)
        tokens = trainer.cfg.batch_size * trainer.cfg.max_length
        step = tokens * max(sae.step for sae in saes)
        memory = max(memory, loaded + sum(sae.weights for sae in saes) + step)
    return {
        "train": train,
        "evaluate": evaluate,
        "apply": apply,
        "memory": memory,
        "rate": sae_rate,
        "lm_rate": lm_rate,
        "device": cfg.device,
    }


def summary(least: dict[str, Any], scale: Any) -> str:
    """One paragraph for the terminal, from what `floors` returns."""
    hours = {stage: least[stage] / 3600 for stage in ("train", "evaluate", "apply")}
    parts = ", ".join(f"{stage} {value:.2g} h" for stage, value in hours.items())
    return (
        f"{scale.train:,} training, {scale.evaluate:,} evaluation, {scale.apply:,} applied "
        f"tokens a SAE; at least {sum(hours.values()):.2g} h ({parts}) and "
        f"{least['memory'] / 1e9:.1f} GB: operations counted from shapes, over the rate of matrix "
        f"products measured on this device ({least['rate'] / 1e12:.2g} Tflop/s in float32, "
        f"{least['lm_rate'] / 1e12:.2g} in the language model's format). The real run takes longer."
    )
