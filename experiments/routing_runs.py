"""The SAEs that the routing experiment trains: one matrix a seed.

All SAEs of a matrix share each forward pass of the language model. Controls with the shares of a
router come in later matrices, because these shares are known only then.
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

ALONE = {"router_objective": "published", "router_balance": "none"}  # the loss and nothing else
# The routers compared. The untrained one is a control: it too sends equal tokens to equal sites.
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
    sites = routed_sites(n_layers, cfg.start_layer, cfg.end_layer)
    members = [Member(f"topk_{site}", "TopK", {"layer": site}) for site in sites]
    members.append(Member("mlsae", "MLSAE", {}))
    members.append(Member("random", "RouteSAE", ALONE | {"routing": "random"}))
    return members + [Member(name, "RouteSAE", options) for name, options in ROUTERS.items()]


def second_matrix(shares: dict[str, list[float]]) -> list[Member]:
    """A RouteSAE with random assignment at each router's shares."""
    random = ALONE | {"routing": "random"}
    return [
        Member(f"{name}_shares", "RouteSAE", random | {"route_shares": value})
        for name, value in shares.items()
    ]


def third_matrix(shares: dict[str, list[float]]) -> list[Member]:
    """An untrained router whose logits are shifted to each learned router's shares.

    It shows what a function of the token reaches without being learned.
    """
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
            options = config.model_options(self.cfg, member.model) | {"k": k} | member.options
            yield member.model, options, {"member": member.name}

    def _title(self, name: str, options: dict[str, Any], swept: dict[str, Any]) -> str:
        return f"{swept['member']}_seed{self.cfg.seed}"


def path_of(cfg: Namespace, name: str, seed: int) -> Path:
    """The weights of a member."""
    return Path(cfg.output_dir) / files.SAE_DIR / f"{name}_seed{seed}.pt"


def options_of(argv: list[str], seed: int, phase: str) -> Namespace:
    """The options of one training, as train.py parses them."""
    tag = f"routing_seed{seed}_{phase}"
    return config.parse("train", [*argv, "--model", "RouteSAE", "--seed", str(seed), "--tag", tag])


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
    weights: dict[str, list[Tensor]] = {name: [] for name in saes}
    for start in range(0, len(order), batch_size):
        batch = rows.batch(order[start : start + batch_size]).to(device)
        hidden = hooks.read(language_model, batch, sites)
        for name, sae in saes.items():
            weights[name].append(sae.get_router_weights(sae.gather(hidden), sae.router.aggre))
    return {name: torch.cat(parts) for name, parts in weights.items()}


def trained_shares(
    saes: dict[str, SAE], language_model: nn.Module, rows: Rows, seed: int, cfg: Namespace
) -> dict[str, list[float]]:
    """Each router's shares of the sites, on 50k of the tokens it was trained on."""
    order = rows.order(seed, 0)[: -(-50_000 // rows.max_length)]
    size = cfg.batch_size or 16
    weights = router_weights(saes, language_model, rows, order, size, cfg.device)
    return {
        name: [round(float(share), 6) for share in router.load(p)] for name, p in weights.items()
    }


def train(argv: list[str], seed: int, language_model: nn.Module, rows: Rows, n_layers: int) -> None:
    """Train the matrices of one seed. What an earlier call has trained is not trained again."""
    cfg = options_of(argv, seed, "first")
    Matrix(cfg, first_matrix(n_layers, cfg)).run()
    shares_path = Path(cfg.output_dir) / f"shares_seed{seed}.json"
    if not shares_path.exists():
        cfg.device = pick_device(cfg.device)
        saes = {name: checkpoint.load(path_of(cfg, name, seed), cfg.device)[0] for name in ROUTERS}
        files.save_json(trained_shares(saes, language_model, rows, seed, cfg), shares_path)
    shares = files.load_json(shares_path)
    Matrix(options_of(argv, seed, "second"), second_matrix(shares)).run()
    Matrix(options_of(argv, seed, "third"), third_matrix(shares)).run()
