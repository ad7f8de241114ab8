"""What the routing experiment measures: sums over the tokens of each document, so that documents can be drawn again.

An arm is an SAE and a way to use it; a run is one patched pass of the language model.
N tokens, L routed sites, F latents, O documents, V vocabulary.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from experiments.routing_runs import LEARNED, ROUTERS, path_of, router_weights
from src import checkpoint, files, hooks, lm, metrics, router
from src.data import Batch, Rows
from src.ops import squared_errors
from src.sae import SAE, BatchInfo, routed_sites
from src.sparse import active

# of each run and document: counted tokens and their summed NormMSE; predictions made at them with summed KL and rise of cross-entropy; and on a part
# of the rows the same KL beside that of putting each site's mean, and an error of equal size and random direction, at the same tokens and sites
QUANTITIES = (
    "tokens",
    "NormMSE",
    "predictions",
    "KL",
    "DeltaCE",
    "cost_predictions",
    "KL_here",
    "KL_mean",
    "KL_noise",
)
PART_ROWS, COST_EVERY = 80, 5  # rows a part, of which every fifth batch measures costs


class PatchedRun(NamedTuple):
    """One patched pass of one arm."""

    name: str
    patches: dict[int, Callable[[Tensor], Tensor]]
    site: Tensor  # index into the routed sites of each token's patch [N]
    errors: Tensor  # NormMSE [N]
    latents: Tensor  # [N,F]
    routed: bool  # by a router or at random: tokens at several sites
    costs: bool  # whether costs are measured too


def arms_of(
    cfg: Namespace, seed: int, language_model: nn.Module, rows: Rows, order: np.ndarray
) -> dict[str, SAE]:
    """Every SAE of a seed in each way it is used. Random assignments and shifted routers get the shares of their router on these very rows."""
    sites = routed_sites(cfg.n_layers, cfg.start_layer, cfg.end_layer)
    names = [
        *(f"topk_{site}" for site in sites),
        "mlsae",
        "random",
        *ROUTERS,
        *(f"{name}_shares" for name in ROUTERS),
    ]
    names += [f"{name}_fixed" for name in LEARNED]
    arms = {name: checkpoint.load(path_of(cfg, name, seed), cfg.device)[0] for name in names}
    asked = {name: sae for name, sae in arms.items() if name in ROUTERS or name.endswith("_fixed")}
    weights = router_weights(asked, language_model, rows, order, cfg.batch_size, cfg.device)
    for name in ROUTERS:
        arms[f"{name}_shares"].router.shares = router.load(weights[name])
    for name in LEARNED:
        arms[f"{name}_fixed"].router.load_bias += router.logit_shifts(
            weights[f"{name}_fixed"].clamp_min(1e-30).log(), router.load(weights[name])
        )
    for name in ROUTERS:
        arms[f"{name}_permuted"] = _used(arms[name], "permuted")
    for name in ("random", *ROUTERS):
        arms[f"{name}_oracle"] = _used(arms[name], "oracle")
    return arms


def _used(sae: SAE, routing: str) -> SAE:
    """The same weights with another routing."""
    other = copy.copy(sae)
    if sae.routing == "random":
        other.route_scale = (
            "one"  # its router, never asked in training, has no say in the scale either
        )
    other.routing = routing
    return other


def runs_of(
    arms: dict[str, SAE], hidden: dict[int, Tensor], keys: Tensor, routed: list[int]
) -> Iterator[PatchedRun]:
    for name, sae in arms.items():
        p = sae.autoencode(sae.gather(hidden), BatchInfo(token_keys=keys))
        errors = squared_errors(p.target, p.x_hat)
        for i, patches in enumerate(sae.patches(hidden, BatchInfo(token_keys=keys), clean=p)):
            if p.weights is not None:
                yield PatchedRun(
                    name,
                    patches,
                    p.weights.argmax(-1),
                    errors,
                    p.latents,
                    True,
                    not name.endswith(("_permuted", "_oracle")),
                )
                continue
            (site,) = patches
            here = torch.full_like(keys, routed.index(site))
            several = errors.ndim > 1
            run = f"{name}_{site}" if several else name
            yield PatchedRun(
                run,
                patches,
                here,
                errors[:, i] if several else errors,
                p.latents[:, i] if several else p.latents,
                False,
                True,
            )


def with_noise(
    patch: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """h plus an error as long as the patch's, in a random direction."""

    def noisy(h: Tensor) -> Tensor:
        direction = torch.randn(h.shape, generator=generator).to(h)
        return h + F.normalize(direction, dim=-1) * (patch(h) - h).norm(dim=-1, keepdim=True)

    return noisy


def mean_put(site: Tensor, index: int, mean: Tensor) -> Callable[[Tensor], Tensor]:
    """The site's mean in place of the tokens that are patched there."""
    return lambda h: torch.where((site == index)[:, None], mean, h)


class Sums:
    """Running sums of one part."""

    def __init__(self, n_documents: int, n_sites: int) -> None:
        self.shape, self.documents, self.runs = (n_documents, len(QUANTITIES)), {}, {}
        self.n_sites = n_sites

    def per_document(self, name: str, quantity: str, document: Tensor, values: Tensor) -> None:
        table = self.documents.setdefault(name, np.zeros(self.shape))
        table[:, QUANTITIES.index(quantity)] += np.bincount(
            document.numpy(), values.double().cpu().numpy(), self.shape[0]
        )

    def per_run(self, name: str, **values: Tensor) -> None:
        mine = self.runs.setdefault(name, {})
        for key, value in values.items():
            mine[key] = mine.get(key, 0) + value.cpu().numpy()

    def save(self, path: Path) -> None:
        arrays = {f"documents/{name}": table for name, table in self.documents.items()}
        arrays |= {
            f"{key}/{name}": value
            for name, mine in self.runs.items()
            for key, value in mine.items()
        }
        files.write_atomic(path, lambda file: np.savez(file, **arrays))


@torch.no_grad()
def site_means(
    language_model: nn.Module, rows: Rows, order: np.ndarray, sites: list[int], cfg: Namespace
) -> dict[int, Tensor]:
    """Mean raw residual of each site."""
    sums, count = dict.fromkeys(sites, 0), 0
    for at in range(0, len(order), cfg.batch_size):
        hidden = hooks.read(
            language_model, rows.batch(order[at : at + cfg.batch_size]).to(cfg.device), sites
        )
        sums = {site: sums[site] + hidden[site].double().sum(0) for site in sites}
        count += len(hidden[sites[0]])
    return {site: (total / count).float() for site, total in sums.items()}


@torch.no_grad()
def measure(
    cfg: Namespace,
    seed: int,
    language_model: nn.Module,
    rows: Rows,
    order: np.ndarray,
    folder: Path,
) -> list[Path]:
    """Parts of one seed's measurements, each written once; what is there already is not measured again."""
    starts = range(0, len(order), PART_ROWS)
    parts = [order[at : at + PART_ROWS] for at in starts]
    paths = [
        folder / f"seed{seed}_rows{at}-{at + len(part)}.npz"
        for at, part in zip(starts, parts, strict=True)
    ]
    if all(path.exists() for path in paths):
        return paths
    sites = routed_sites(cfg.n_layers, cfg.start_layer, cfg.end_layer)
    arms = arms_of(cfg, seed, language_model, rows, order)
    means = site_means(language_model, rows, rows.order(1, 0)[:80], sites, cfg)
    hooks.self_check(language_model, rows.batch(order[:1]).to(cfg.device), sites)
    for part, path in zip(parts, paths, strict=True):
        if path.exists():
            continue
        sums = Sums(len(rows.documents), len(sites))
        starts = range(0, len(part), cfg.batch_size)
        for number, at in enumerate(
            tqdm(starts, f"seed {seed}, {path.stem}", unit=" batches", mininterval=5)
        ):
            batch = rows.batch(part[at : at + cfg.batch_size])
            _measure_batch(
                sums, arms, language_model, batch, sites, means, cfg, number % COST_EVERY == 0
            )
        sums.save(path)
    return paths


def _measure_batch(
    sums: Sums,
    arms: dict[str, SAE],
    language_model: nn.Module,
    batch: Batch,
    sites: list[int],
    means: dict[int, Tensor],
    cfg: Namespace,
    costs: bool,
) -> None:
    document = batch.document
    batch = batch.to(cfg.device)
    full, final = lm.read_through(language_model, batch.input_ids, sites)
    hidden = {site: state[batch.mask].float() for site, state in full.items()}
    at = torch.zeros_like(batch.mask)
    at[:, :-1] = batch.mask[:, 1:]
    at &= batch.mask  # predictions made where the residual may be replaced
    targets, of_tokens, of_predictions = (
        batch.input_ids.roll(-1, 1)[at],
        document[batch.mask.cpu()],
        document[at.cpu()],
    )
    states: dict[tuple[str, str], Tensor] = {}
    generator = torch.Generator().manual_seed(int(batch.row[0]))
    ablated: dict[str, Tensor] = {}  # one site for all tokens: the same whatever the SAE
    ids, chosen = batch.input_ids[batch.mask], {}
    for run in runs_of(arms, hidden, batch.token_keys(), sites):
        sums.per_document(run.name, "tokens", of_tokens, torch.ones(len(of_tokens)))
        sums.per_document(run.name, "NormMSE", of_tokens, run.errors)
        one_hot = F.one_hot(run.site, len(sites))
        sums.per_run(
            run.name,
            site_tokens=one_hot.sum(0),
            site_errors=(one_hot * run.errors[:, None]).double().sum(0),
        )
        token, latent, _ = active(run.latents)
        cells = torch.bincount(
            run.site[token] * run.latents.shape[1] + latent,
            minlength=len(sites) * run.latents.shape[1],
        )
        sums.per_run(run.name, fired=cells.view(len(sites), -1).int())
        if run.routed:
            cells = torch.bincount(
                ids * len(sites) + run.site,
                minlength=lm.text_config(language_model).vocab_size * len(sites),
            )
            sums.per_run(run.name, site_of_token=cells.view(-1, len(sites)).int())
            chosen[run.name] = run.site
        states[run.name, "KL"] = hooks.patched_states(language_model, batch, run.patches, full)[at]
        if costs and run.costs:
            noisy = {site: with_noise(patch, generator) for site, patch in run.patches.items()}
            states[run.name, "KL_noise"] = hooks.patched_states(language_model, batch, noisy, full)[
                at
            ]
            key = run.name if run.routed else str(run.site[:1].tolist())
            if key not in ablated:
                put = {
                    site: mean_put(run.site, sites.index(site), means[site]) for site in run.patches
                }
                ablated[key] = hooks.patched_states(language_model, batch, put, full)[at]
            states[run.name, "KL_mean"] = ablated[key]
    for name in ROUTERS:
        sums.per_run(name, agreed=(chosen[name] == chosen[f"{name}_oracle"]).sum())
    _compare(sums, language_model, final[at], states, targets, of_predictions)


def _compare(
    sums: Sums,
    language_model: nn.Module,
    clean: Tensor,
    states: dict[tuple[str, str], Tensor],
    targets: Tensor,
    document: Tensor,
) -> None:
    """KL and rise of cross-entropy of every patched run against the clean one, a chunk of predictions at a time."""
    for start in range(0, len(clean), lm.HEAD_CHUNK):
        here = slice(start, start + lm.HEAD_CHUNK)
        prediction, where = (
            metrics.Prediction(lm.logits_of(language_model, clean[here]), targets[here]),
            document[here],
        )
        ones = torch.ones(len(where))
        for (name, quantity), patched in states.items():
            kl, ce = prediction.compare(lm.logits_of(language_model, patched[here]))
            sums.per_document(name, quantity, where, kl)
            if quantity == "KL":
                sums.per_document(name, "predictions", where, ones)
                sums.per_document(name, "DeltaCE", where, ce - prediction.ce)
            if quantity == "KL_noise":
                sums.per_document(name, "cost_predictions", where, ones)
            if quantity == "KL" and (name, "KL_noise") in states:
                sums.per_document(name, "KL_here", where, kl)


def load(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """{kind: {run: sum over parts}} with kinds documents [O,Q], site_tokens [L], site_errors [L], fired [L,F], site_of_token [V,L], agreed."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        with np.load(path) as part:
            for key in part.files:
                kind, name = key.split("/")
                mine = found.setdefault(kind, {})
                mine[name] = mine.get(name, 0) + part[key]
    return found
