"""The measurements of the routing experiment.

They are sums over the tokens of each document, so that the report can redraw documents (bootstrap).
An arm is an SAE with a way to use it; a run is one patched pass of the language model.

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
from src.sparse import SparseCode, active

# Summed for each run and document. On some of the batches the KL (KL_here) is compared with that of
# two other replacements at the same tokens and sites: the site's mean, and an error of equal size
# in a random direction.
QUANTITIES = (
    "tokens",  # counted
    "NormMSE",
    "predictions",  # made at counted tokens
    "KL",
    "DeltaCE",
    "cost_predictions",  # of the batches on which costs are measured
    "KL_here",
    "KL_mean",
    "KL_noise",
)


class Pace(NamedTuple):
    """What is measured how often: a patched pass costs as much as the coding of many SAEs."""

    part_rows: int = 80  # rows of one file of measurements
    kl_every: int = 1  # batches, of which one measures KL
    cost_every: int = 5  # batches, of which one measures costs; a multiple of kl_every
    noise: bool = True  # whether costs include an error of equal size in a random direction


PACE = Pace()


class PatchedRun(NamedTuple):
    """One patched pass of one arm."""

    name: str
    patches: dict[int, Callable[[Tensor], Tensor]]
    site: Tensor  # index into the routed sites of each token's patch [N]
    errors: Tensor  # NormMSE [N]
    code: Tensor | SparseCode  # [N,F]
    routed: bool  # tokens are at several sites, by a router or at random
    costs: bool  # whether costs are measured


def arms_of(
    cfg: Namespace, seed: int, language_model: nn.Module, rows: Rows, order: np.ndarray
) -> dict[str, SAE]:
    """Every SAE of a seed, in each way it is used.

    Random assignments and shifted routers get the shares that their router has on these rows.
    """
    sites = routed_sites(cfg.n_layers, cfg.start_layer, cfg.end_layer)
    names = trained_names(sites)
    arms = {name: checkpoint.load(path_of(cfg, name, seed), cfg.device)[0] for name in names}
    routers = {name: sae for name, sae in arms.items() if has_own_router(name)}
    weights = router_weights(routers, language_model, rows, order, cfg.batch_size, cfg.device)
    for name in ROUTERS:
        arms[f"{name}_shares"].router.shares = router.load(weights[name])
    for name in LEARNED:
        arms[f"{name}_fixed"].router.load_bias += router.logit_shifts(
            weights[f"{name}_fixed"].clamp_min(1e-30).log(), router.load(weights[name])
        )
    for name in ROUTERS:
        arms[f"{name}_permuted"] = _with_routing(arms[name], "permuted")
    for name in ("random", *ROUTERS):
        arms[f"{name}_oracle"] = _with_routing(arms[name], "oracle")
    return arms


def trained_names(sites: list[int]) -> list[str]:
    """The members of all matrices."""
    names = [f"topk_{site}" for site in sites] + ["mlsae", "random", *ROUTERS]
    names += [f"{name}_shares" for name in ROUTERS]
    return names + [f"{name}_fixed" for name in LEARNED]


def has_own_router(name: str) -> bool:
    return name in ROUTERS or name.endswith("_fixed")


def _with_routing(sae: SAE, routing: str) -> SAE:
    """The same weights with another routing."""
    other = copy.copy(sae)
    if sae.routing == "random":
        # Its router was not used in training, so its weights must not scale the input here.
        other.route_scale = "one"
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
                costs = not name.endswith(("_permuted", "_oracle"))
                site_index = p.weights.argmax(-1)
                yield PatchedRun(name, patches, site_index, errors, p.code, True, costs)
                continue
            (site,) = patches
            site_index = torch.full_like(keys, routed.index(site))
            if errors.ndim == 1:
                yield PatchedRun(name, patches, site_index, errors, p.code, False, True)
                continue
            # Some have a code for every site, others one for all.
            code = p.latents[:, i] if len(p.code.shape) == 3 else p.code
            of_site = errors[:, i], code
            yield PatchedRun(f"{name}_{site}", patches, site_index, *of_site, False, True)


def with_noise(
    patch: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """A patch whose error is as large as that of `patch`, in a random direction."""

    def noisy(h: Tensor) -> Tensor:
        direction = torch.randn(h.shape, generator=generator).to(h)
        return h + F.normalize(direction, dim=-1) * (patch(h) - h).norm(dim=-1, keepdim=True)

    return noisy


def mean_put(site: Tensor, index: int, mean: Tensor) -> Callable[[Tensor], Tensor]:
    """A patch that puts the site's mean in place of the tokens that are patched there."""
    return lambda h: torch.where((site == index)[:, None], mean, h)


class Sums:
    """Running sums of one part."""

    def __init__(self, n_documents: int, n_sites: int) -> None:
        self.shape = (n_documents, len(QUANTITIES))
        self.documents: dict[str, np.ndarray] = {}  # {run: [O,Q]}
        self.runs: dict[str, dict[str, np.ndarray]] = {}  # {run: {kind: sum over documents}}
        self.n_sites = n_sites

    def per_document(self, name: str, quantity: str, document: Tensor, values: Tensor) -> None:
        table = self.documents.setdefault(name, np.zeros(self.shape))
        table[:, QUANTITIES.index(quantity)] += np.bincount(
            document.numpy(), values.double().cpu().numpy(), self.shape[0]
        )

    def per_run(self, name: str, **values: Tensor) -> None:
        sums = self.runs.setdefault(name, {})
        for kind, value in values.items():
            sums[kind] = sums.get(kind, 0) + value.cpu().numpy()

    def save(self, path: Path) -> None:
        arrays = {f"documents/{name}": table for name, table in self.documents.items()}
        for name, sums in self.runs.items():
            arrays |= {f"{kind}/{name}": value for kind, value in sums.items()}
        files.write_atomic(path, lambda file: np.savez_compressed(file, **arrays))


@torch.no_grad()
def site_means(
    language_model: nn.Module, rows: Rows, order: np.ndarray, sites: list[int], cfg: Namespace
) -> dict[int, Tensor]:
    """Mean raw residual of each site."""
    sums, count = dict.fromkeys(sites, 0), 0
    for start in range(0, len(order), cfg.batch_size):
        batch = rows.batch(order[start : start + cfg.batch_size]).to(cfg.device)
        hidden = hooks.read(language_model, batch, sites)
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
    sites: list[int],
    make_arms: Callable[[], dict[str, SAE]],
    pace: Pace = PACE,
) -> list[Path]:
    """Measure the arms of one seed, a file for every `part_rows` rows.

    Existing files are not made again; the arms are made if one is missing.
    """
    starts = range(0, len(order), pace.part_rows)
    parts = [order[start : start + pace.part_rows] for start in starts]
    paths = [
        folder / f"seed{seed}_rows{start}-{start + len(part)}.npz"
        for start, part in zip(starts, parts, strict=True)
    ]
    if all(path.exists() for path in paths):
        return paths
    arms = make_arms()
    means = site_means(language_model, rows, rows.order(1, 0)[:80], sites, cfg)
    hooks.self_check(language_model, rows.batch(order[:1]).to(cfg.device), sites)
    for part, path in zip(parts, paths, strict=True):
        if path.exists():
            continue
        sums = Sums(len(rows.documents), len(sites))
        starts = range(0, len(part), cfg.batch_size)
        progress = tqdm(starts, f"seed {seed}, {path.stem}", unit=" batches", mininterval=5)
        for number, start in enumerate(progress):
            batch = rows.batch(part[start : start + cfg.batch_size])
            _measure_batch(sums, arms, language_model, batch, sites, means, cfg, pace, number)
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
    pace: Pace,
    number: int,
) -> None:
    document = batch.document
    costs = number % pace.cost_every == 0
    batch = batch.to(cfg.device)
    full, final = lm.read_through(language_model, batch.input_ids, sites)
    hidden = {site: state[batch.mask].float() for site, state in full.items()}
    # Predictions are counted where the residual may be replaced and the next token counts.
    predicts = torch.zeros_like(batch.mask)
    predicts[:, :-1] = batch.mask[:, 1:]
    predicts &= batch.mask
    targets = batch.input_ids.roll(-1, 1)[predicts]
    states: dict[tuple[str, str], Tensor] = {}
    generator = torch.Generator().manual_seed(int(batch.row[0]))
    ablated: dict[str, Tensor] = {}  # runs with one site for all tokens share their states
    chosen = {}  # {run: site of each token}
    document_of_token = document[batch.mask.cpu()]
    ids = batch.input_ids[batch.mask]
    vocabulary = lm.text_config(language_model).vocab_size

    def patched(patches: dict[int, Callable[[Tensor], Tensor]]) -> Tensor:
        return hooks.patched_states(language_model, batch, patches, full)[predicts]

    for run in runs_of(arms, hidden, batch.token_keys(), sites):
        _count_run(sums, run, document_of_token, len(sites))
        if run.routed:
            cells = pair_counts(ids, run.site, vocabulary, len(sites))
            sums.per_run(run.name, site_of_token=cells)
            chosen[run.name] = run.site
        if number % pace.kl_every:
            continue
        states[run.name, "KL"] = patched(run.patches)
        if costs and run.costs and pace.noise:
            noisy = {site: with_noise(patch, generator) for site, patch in run.patches.items()}
            states[run.name, "KL_noise"] = patched(noisy)
        if costs and run.costs:
            key = run.name if run.routed else str(run.site[:1].tolist())
            if key not in ablated:
                put = {
                    site: mean_put(run.site, sites.index(site), means[site]) for site in run.patches
                }
                ablated[key] = patched(put)
            states[run.name, "KL_mean"] = ablated[key]
    for name, site in chosen.items():
        if f"{name}_oracle" in chosen:
            sums.per_run(name, agreed=(site == chosen[f"{name}_oracle"]).sum())
    _compare(sums, language_model, final[predicts], states, targets, document[predicts.cpu()])


def _count_run(sums: Sums, run: PatchedRun, document: Tensor, n_sites: int) -> None:
    """Tokens and errors by document and by site, and how often each latent fired at each site."""
    sums.per_document(run.name, "tokens", document, torch.ones(len(document)))
    sums.per_document(run.name, "NormMSE", document, run.errors)
    one_hot = F.one_hot(run.site, n_sites)
    site_errors = (one_hot * run.errors[:, None]).double().sum(0)
    sums.per_run(run.name, site_tokens=one_hot.sum(0), site_errors=site_errors)
    token, latent, _ = active(run.code)
    fired = pair_counts(run.site[token], latent, n_sites, run.code.shape[-1])
    sums.per_run(run.name, fired=fired)


def pair_counts(first: Tensor, second: Tensor, n_first: int, n_second: int) -> Tensor:
    """How often each pair of values occurs [n_first, n_second]."""
    cells = torch.bincount(first * n_second + second, minlength=n_first * n_second)
    return cells.view(-1, n_second).int()


def _compare(
    sums: Sums,
    language_model: nn.Module,
    clean: Tensor,
    states: dict[tuple[str, str], Tensor],
    targets: Tensor,
    document: Tensor,
) -> None:
    """KL and rise of cross-entropy of every patched run against the clean one, by chunks."""
    for start in range(0, len(clean), lm.HEAD_CHUNK):
        chunk = slice(start, start + lm.HEAD_CHUNK)
        logits = lm.logits_of(language_model, clean[chunk])
        prediction = metrics.Prediction(logits, targets[chunk])
        of_chunk = document[chunk]
        ones = torch.ones(len(of_chunk))
        for (name, quantity), patched in states.items():
            kl, ce = prediction.compare(lm.logits_of(language_model, patched[chunk]))
            sums.per_document(name, quantity, of_chunk, kl)
            if quantity == "KL":
                sums.per_document(name, "predictions", of_chunk, ones)
                sums.per_document(name, "DeltaCE", of_chunk, ce - prediction.ce)
            if quantity == "KL_mean":
                sums.per_document(name, "cost_predictions", of_chunk, ones)
            if quantity == "KL" and (name, "KL_mean") in states:
                sums.per_document(name, "KL_here", of_chunk, kl)


def load(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """{kind: {run: sum over parts}}.

    Kinds: documents [O,Q], site_tokens [L], site_errors [L], fired [L,F], site_of_token [V,L],
    agreed.
    """
    sums: dict[str, dict[str, Any]] = {}
    for path in paths:
        with np.load(path) as part:
            for key in part.files:
                kind, name = key.split("/")
                of_kind = sums.setdefault(kind, {})
                of_kind[name] = of_kind.get(name, 0) + part[key]
    return sums
