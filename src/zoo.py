"""The models by name: the options each uses, its recipes, one line of help.

`standard` is the right form of a model, `published` the documented one; both hold constructor
values. This file imports no torch, so that `--help` is quick.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from src.stage_help import did_you_mean

TUNED_WIDTH = 128  # hidden size of the demo model, on which the defaults were found
FEW_LATENTS, MANY_LATENTS = 1024, 4096  # between them the learning rate falls with the latents


class Entry(NamedTuple):
    """One model of the zoo."""

    help: str
    options: tuple[str, ...]  # command-line options that it uses
    fixed: tuple[str, ...]  # constructor values that only recipes and imports set
    standard: dict[str, Any] = {}
    published: dict[str, Any] = {}

    @property
    def constructor(self) -> frozenset[str]:
        """Return the constructor values that it takes besides the sizes of the language model."""
        return frozenset(("latent_size", "norm_eps", *self.fixed, *self.options))


_DICTIONARY = ("unit_encoder",)
_AUXK = ("auxk_coeff", "dead_tokens", "b_pre_init")
_SPARSE = ("l1_coeff", "target_l0", "sparsity_warmup", *_AUXK)
_ONE_SITE = ("layer", "input_norm", "freeze")
_RANGE = ("start_layer", "end_layer", "sites")
_ROUTER = (
    "aggre", "routing", "route_patch", "route_scale", "route_shares",
    "router_objective", "router_balance", "router_balance_coef",
)  # fmt: skip
_PUBLISHED = {"b_pre_init": "zero", "auxk_coeff": 0.0}
_PUBLISHED_DICTIONARY = _PUBLISHED | {"unit_encoder": False}
_L1 = ("start_l0", "l1_saturation", *_SPARSE)
_SATURATED = {"l1_saturation": 0.05}
_PUBLISHED_L1 = {
    "l1_coeff": 5e-4,
    "l1_mean": True,
    "l1_saturation": 0.0,
    "sparsity_warmup": 0.0,
    "start_l0": 0.0,
}
_PUBLISHED_JUMP = {
    "l1_coeff": 5e-4,
    "threshold": 1e-3,
    "bandwidth": 1e-3,
    "l0_post_jump": True,
    "sparsity_warmup": 0.0,
}
_SITE_BIAS = {"site_bias": True}
_PUBLISHED_ROUTER = {
    "route_patch": "unscaled",
    "router_objective": "published",
    "router_balance": "none",
}

ZOO: dict[str, Entry] = {
    "TopK": Entry(
        "k largest pre-activations of one site",
        ("k", "topk_relu", "hierarchical_k", *_ONE_SITE, *_AUXK),
        _DICTIONARY,
        published=_PUBLISHED_DICTIONARY,
    ),
    "Vanilla": Entry(
        "ReLU and an L1 penalty that levels off",
        (*_ONE_SITE, *_L1),
        (*_DICTIONARY, "l1_mean"),
        standard=_SATURATED,
        published=_PUBLISHED_DICTIONARY | _PUBLISHED_L1,
    ),
    "Gated": Entry(
        "a gate decides, a magnitude follows",
        (*_ONE_SITE, *_L1),
        (*_DICTIONARY, "l1_mean", "gated_aux"),
        published=_PUBLISHED_DICTIONARY | _PUBLISHED_L1 | {"gated_aux": False},
    ),
    "JumpReLU": Entry(
        "a learned threshold per latent",
        ("threshold", "bandwidth", *_ONE_SITE, *_SPARSE),
        (*_DICTIONARY, "l0_post_jump"),
        published=_PUBLISHED_DICTIONARY | _PUBLISHED_JUMP,
    ),
    "RouteSAE": Entry(
        "a router picks the site of each token",
        ("k", "topk_relu", "site_bias", "freeze", *_ROUTER, *_RANGE, *_AUXK),
        (*_DICTIONARY, "seed"),
        standard=_SITE_BIAS | {"router_objective": "expected", "router_balance": "switch"},
        published=_PUBLISHED_DICTIONARY | _PUBLISHED_ROUTER,
    ),
    "Crosscoder": Entry(
        "one code for all routed sites",
        (*_RANGE, *_L1),
        ("l1_mean", "decoder_bias", "free_norms"),
        standard=_SATURATED | {"decoder_bias": True, "free_norms": True},
        published=_PUBLISHED | _PUBLISHED_L1,
    ),
    "MLSAE": Entry(
        "one TopK for the states of all routed sites",
        ("k", "topk_relu", "input_norm", "site_bias", "freeze", *_RANGE, *_AUXK),
        _DICTIONARY,
        standard=_SITE_BIAS,
        published=_PUBLISHED_DICTIONARY,
    ),
    "RandomK": Entry(
        "k latents drawn at random: the control that must lose",
        ("k", "layer", "input_norm", "b_pre_init"),
        (*_DICTIONARY, "seed", "topk_relu"),
        published={"b_pre_init": "zero", "unit_encoder": False},
    ),
    "BatchTopK": Entry(
        "k active latents a token on average over a batch",
        ("k", *_ONE_SITE, *_AUXK),
        _DICTIONARY,
        published=_PUBLISHED_DICTIONARY,
    ),
    "Matryoshka": Entry(
        "BatchTopK whose first latents also reconstruct alone",
        ("k", "matryoshka_widths", *_ONE_SITE, *_AUXK),
        _DICTIONARY,
        published=_PUBLISHED_DICTIONARY,
    ),
}
ALIASES = {"Random": "RandomK", "MatryoshkaBatchTopK": "Matryoshka"}


def canonical(name: str) -> str:
    """Return the zoo's spelling of a model name. Raises ValueError that lists the zoo."""
    known = {key.lower(): key for key in ZOO}
    known |= {alias.lower(): key for alias, key in ALIASES.items()}
    if name.lower() not in known:
        near = did_you_mean(name, known.values())
        raise ValueError(f"unknown model {name!r} (the zoo has {', '.join(ZOO)}){near}")
    return known[name.lower()]
