"""What a scale will take at least, before it starts: operations counted from shapes, over the rate of a matrix product measured here.

A floor on a GPU: tokenising, memory traffic, selection of the active latents, decoding of contexts and requests come on top. On a CPU k-sparse
codes need fewer operations than the dense ones counted here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from src import config, lm, model
from src.sae import BatchInfo
from src.trainer import Trainer


class Cost(NamedTuple):
    """Operations of one token and bytes of one SAE."""

    train: float
    code: float  # forward only
    patched: float  # language model, all patched runs
    depth: float  # share of the blocks below its last site
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
    """Of one SAE of the zoo on a language model of that shape. It is not allocated; a small one says how many codes a token has."""
    with torch.device("meta"):
        sae = model.build(name, shape["hidden_size"], shape["n_layers"], options)
    small = model.build(
        name, shape["hidden_size"], shape["n_layers"], options | {"latent_size": 16, "k": 2}
    )
    p = small.autoencode(
        small.gather({site: torch.randn(2, shape["hidden_size"]) for site in sae.sites()}),
        BatchInfo(token_keys=torch.arange(2)),
    )
    numbers, codes = (
        sum(weight.numel() for weight in sae.parameters()),
        p.latents.numel() / (2 * small.latent_size),
    )
    code = 2 * numbers * codes
    sites, blocks, head = sae.sites(), 2 * shape["blocks"], 2 * shape["head"]
    runs = [sites[0]] if p.weights is not None or len(sites) == 1 else sites
    patched = sum(blocks * (1 - site / shape["n_layers"]) + 2 * head for site in runs)
    return Cost(
        3 * code,
        code,
        patched,
        sites[-1] / shape["n_layers"],
        16 * numbers,
        5 * 4 * codes * sae.latent_size,
    )


def floors(
    groups: Sequence[Any], scale: Any, options: list[str], reads: Callable[[str, int], bool]
) -> dict[str, Any]:
    """{"train", "evaluate", "apply": seconds at least; "memory": bytes at least of the largest training; two rates; the device}

    reads(model, seed): whether contexts of that SAE are made.
    """
    trainers = [
        Trainer(config.parse("train", [*group.argv, "--seed", str(group.seed), *options]))
        for group in groups
    ]
    cfg = trainers[0].cfg
    _, language_model = lm.get_language_model(
        cfg.model_path, cfg.device, cfg.dtype, cfg.trust_remote_code
    )
    text = lm.text_config(language_model)
    shape = {
        "hidden_size": text.hidden_size,
        "n_layers": len(lm.blocks(language_model)),
        "head": text.hidden_size * text.vocab_size,
        "blocks": sum(p.numel() for p in lm.blocks(language_model).parameters()),
    }
    loaded = sum(p.numel() * p.element_size() for p in language_model.parameters())
    fast, exact = (
        rate(cfg.device, next(language_model.parameters()).dtype),
        rate(cfg.device, torch.float32),
    )
    found = {
        "train": 0.0,
        "evaluate": 0.0,
        "apply": 0.0,
        "memory": 0.0,
        "rate": exact,
        "lm_rate": fast,
        "device": cfg.device,
    }
    below, logits = 2 * shape["blocks"], 2 * shape["head"]
    for trainer in trainers:
        saes = [cost(name, chosen, shape) for name, chosen, _ in trainer.combinations]
        code = sum(sae.code for sae in saes)
        found["train"] += scale.train * (
            below * max(sae.depth for sae in saes) / fast + sum(sae.train for sae in saes) / exact
        )
        found["evaluate"] += scale.evaluate * (
            (below + logits + sum(sae.patched for sae in saes)) / fast + code / exact
        )
        read = [
            sae
            for sae, (name, _, _) in zip(saes, trainer.combinations, strict=True)
            if reads(name, trainer.cfg.seed)
        ]
        found["apply"] += scale.apply * sum(
            below * sae.depth / fast + sae.code / exact for sae in read
        )
        step = trainer.cfg.batch_size * trainer.cfg.max_length * max(sae.step for sae in saes)
        found["memory"] = max(found["memory"], loaded + sum(sae.weights for sae in saes) + step)
    return found


def said(found: dict[str, Any], scale: Any) -> str:
    """One paragraph for the terminal."""
    parts = ", ".join(
        f"{stage} {found[stage] / 3600:.2g} h" for stage in ("train", "evaluate", "apply")
    )
    total = sum(found[stage] for stage in ("train", "evaluate", "apply")) / 3600
    return (
        f"{scale.train:,} training, {scale.evaluate:,} evaluation, {scale.apply:,} applied tokens a SAE; at least {total:.2g} h ({parts}) and "
        f"{found['memory'] / 1e9:.1f} GB: operations counted from shapes over matrix products measured here "
        f"({found['rate'] / 1e12:.2g} Tflop/s float32, {found['lm_rate'] / 1e12:.2g} in the language model's format); the real run takes longer"
    )
