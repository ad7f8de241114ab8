"""The models by name: the options each uses, its recipes, one line of help. Without torch, so that `--help` is quick.

`standard` is the right form of a model, `published` the documented one; both are constructor values.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Entry(NamedTuple):
    help: str
    options: tuple[str, ...]
    standard: dict[str, Any] = {}
    published: dict[str, Any] = {}
    lr: float = 1.0  # of the standard recipe, in units of its default (docs/LOG.md has the sweep)


_AUXK = ("auxk_coeff", "dead_tokens", "b_pre_init")
_SPARSE = ("l1_coeff", "target_l0", "sparsity_warmup", "b_pre_init")
_OLD = {"b_pre_init": "zero", "unit_encoder": False}
_OLD_K = _OLD | {"auxk_coeff": 0.0}
_OLD_L1 = _OLD | {"l1_coeff": 5e-4, "l1_mean": True, "sparsity_warmup": 0.0}

ZOO: dict[str, Entry] = {
    "TopK": Entry(
        "k largest pre-activations of one site", ("k", "layer", "topk_relu", *_AUXK), {}, _OLD_K
    ),
    "Vanilla": Entry("ReLU and an L1 penalty", ("layer", *_SPARSE), {}, _OLD_L1),
    "Gated": Entry(
        "a gate decides, a magnitude follows",
        ("layer", *_SPARSE),
        {},
        _OLD_L1 | {"gated_aux": False},
    ),
    "JumpReLU": Entry(
        "a learned threshold per latent",
        ("layer", "threshold", "bandwidth", *_SPARSE),
        {},
        _OLD
        | {
            "l1_coeff": 5e-4,
            "threshold": 1e-3,
            "bandwidth": 1e-3,
            "l0_post_jump": True,
            "sparsity_warmup": 0.0,
        },
    ),
    "RouteSAE": Entry(
        "a router picks the site of each token",
        (
            "k",
            "aggre",
            "routing",
            "route_patch",
            "start_layer",
            "end_layer",
            "router_objective",
            "router_balance",
            "router_balance_coef",
            "route_scale",
            "route_shares",
            "topk_relu",
            *_AUXK,
        ),
        {"router_objective": "expected", "router_balance": "switch"},
        _OLD_K
        | {"route_patch": "unscaled", "router_objective": "published", "router_balance": "none"},
    ),
    "Crosscoder": Entry(
        "one code for all routed sites",
        ("start_layer", "end_layer", "l1_coeff", "target_l0", "sparsity_warmup"),
        {"decoder_bias": True, "free_norms": True},
        {"l1_coeff": 5e-4, "l1_mean": True, "sparsity_warmup": 0.0},
        lr=0.3,
    ),
    "MLSAE": Entry(
        "one TopK for the states of all routed sites",
        ("k", "start_layer", "end_layer", "topk_relu", *_AUXK),
        {},
        _OLD_K,
    ),
    "RandomK": Entry(
        "k latents drawn at random: the control that must lose",
        ("k", "layer", "b_pre_init"),
        {},
        _OLD,
    ),
    "BatchTopK": Entry(
        "k active latents a token on average over a batch", ("k", "layer", *_AUXK), {}, _OLD_K
    ),
}
ALIASES = {"Random": "RandomK"}


def canonical(name: str) -> str:
    """The zoo's spelling of a model name. Raises ValueError listing the zoo."""
    known = {key.lower(): key for key in ZOO} | {
        alias.lower(): key for alias, key in ALIASES.items()
    }
    if name.lower() not in known:
        raise ValueError(f"unknown model {name!r}; the zoo has {', '.join(ZOO)}")
    return known[name.lower()]
