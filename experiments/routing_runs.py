"""What the routing experiment trains: the matrix of SAEs of one seed, all from one pass of the language model.

The controls at a router's own shares come second, since those shares are only known then.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from src import checkpoint, config, files, hooks, router
from src.data import Rows
from src.device import pick_device
from src.sae import SAE, routed_sites
from src.trainer import Trainer

# The routers compared. An untrained one is a control that has to answer the same questions: it too sends equal tokens to equal sites.
ALONE = {"router_objective": "published", "router_balance": "none"}  # the loss and nothing else
ROUTERS = {
    "untrained": {"router_objective": "frozen", "router_balance": "none"},
    "published": ALONE,
    "expected": {"router_objective": "expected", "router_balance": "switch"},
    "advantage": {"router_objective": "advantage", "router_balance": "switch"},
    "ste": {"router_objective": "ste", "router_balance": "switch"},
}
LEARNED = [name for name in ROUTERS if name != "untrained"]


class Member(NamedTuple):
    """One SAE of the matrix."""

    name: str
    model: str
    options: dict[str, Any]


def first_matrix(n_layers: int, cfg: Namespace) -> list[Member]:
    """TopK at each routed site, MLSAE, random routing, and each router."""
    members = [
        Member(f"topk_{site}", "TopK", {"layer": site})
        for site in routed_sites(n_layers, cfg.start_layer, cfg.end_layer)
    ]
    members += [
        Member("mlsae", "MLSAE", {}),
        Member("random", "RouteSAE", ALONE | {"routing": "random"}),
    ]
    return members + [Member(name, "RouteSAE", options) for name, options in ROUTERS.items()]


def second_matrix(shares: dict[str, list[float]]) -> list[Member]:
    """A RouteSAE with random assignment at each router's shares."""
    return [
        Member(f"{name}_shares", "RouteSAE", ALONE | {"routing": "random", "route_shares": value})
        for name, value in shares.items()
    ]


def third_matrix(shares: dict[str, list[float]]) -> list[Member]:
    """An untrained router, its logits shifted to each learned router's shares: what a function of the token gives without being learned."""
    fixed = {name: ROUTERS["untrained"] | {"route_shares": shares[name]} for name in LEARNED}
    return [Member(f"{name}_fixed", "RouteSAE", options) for name, options in fixed.items()]


class Matrix(Trainer):
    """A trainer whose combinations are the members given."""

    def __init__(self, cfg: Namespace, members: list[Member]) -> None:
        self.members = members
        super().__init__(cfg)

    def _combine(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        (k,) = self.cfg.k
        for member in self.members:
            yield (
                member.model,
                config.model_options(self.cfg, member.model) | {"k": k} | member.options,
                {"member": member.name},
            )

    def _title(self, name: str, swept: dict[str, Any]) -> str:
        return f"{swept['member']}_seed{self.cfg.seed}"


def path_of(cfg: Namespace, name: str, seed: int) -> Path:
    """Where the weights of a member are."""
    return Path(cfg.output_dir) / files.SAE_DIR / f"{name}_seed{seed}.pt"


def options_of(argv: list[str], seed: int, phase: str) -> Namespace:
    """The options of one training, by the training stage's own rules."""
    return config.parse(
        "train",
        [*argv, "--model", "RouteSAE", "--seed", str(seed), "--tag", f"routing_seed{seed}_{phase}"],
    )


@torch.no_grad()
def router_weights(
    saes: dict[str, SAE],
    language_model: nn.Module,
    rows: Rows,
    order: np.ndarray,
    batch_size: int,
    device: str,
) -> dict[str, Tensor]:
    """Each router's p at every counted token [N,L]."""
    sites = sorted({site for sae in saes.values() for site in sae.sites()})
    found: dict[str, list[Tensor]] = {name: [] for name in saes}
    for at in range(0, len(order), batch_size):
        hidden = hooks.read(
            language_model, rows.batch(order[at : at + batch_size]).to(device), sites
        )
        for name, sae in saes.items():
            found[name].append(sae.get_router_weights(sae.gather(hidden), sae.router.aggre))
    return {name: torch.cat(parts) for name, parts in found.items()}


def train(argv: list[str], seed: int, language_model: nn.Module, rows: Rows, n_layers: int) -> None:
    """Both matrices of one seed; what is there already is not trained again."""
    cfg = options_of(argv, seed, "first")
    Matrix(cfg, first_matrix(n_layers, cfg)).run()
    noted = Path(cfg.output_dir) / f"shares_seed{seed}.json"
    if not noted.exists():
        device = pick_device(cfg.device)
        saes = {name: checkpoint.load(path_of(cfg, name, seed), device)[0] for name in ROUTERS}
        order = rows.order(seed, 0)[: -(-50_000 // rows.max_length)]
        weights = router_weights(saes, language_model, rows, order, cfg.batch_size or 16, device)
        files.save_json(
            {
                name: [round(float(share), 6) for share in router.load(p)]
                for name, p in weights.items()
            },
            noted,
        )
    for phase, members in (("second", second_matrix), ("third", third_matrix)):
        Matrix(options_of(argv, seed, phase), members(files.load_json(noted))).run()
