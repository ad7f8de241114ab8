"""SAEs on states whose features are known: which model finds them, and finds where they live?

    python -m experiments.planted --samples 1000000 --seeds 1 2 3
    python -m experiments.planted --sites 6 --models MLSAE RouteSAE Crosscoder

What is done is kept in OUT.json, and the same command continues.

The toy follows SynthSAEBench (arXiv:2602.14687): more features than dimensions, with Zipfian
firing rates, a hierarchy (a child fires only with its parent, and siblings exclude each other)
and correlations. Over several sites features are born, kept, rotated and dropped.

| measure | meaning |
|---|---|
| F1 | each latent as a detector of the feature whose direction its decoder is nearest to, mean |
| MCC | mean cosine of latents and features under the best one-to-one matching |
| uniqueness | different nearest features over the number of latents |
| birth | share of matched features whose first site is the first site of their latent |
| span | overlap of the sites of a matched feature and its latent: intersection over union |

N samples, L sites, D width, G features, F latents.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src import config, model
from src.files import load_json, save_json, save_text
from src.ops import squared_errors
from src.sae import SAE, BatchInfo
from src.sae_training import LocalBatch, SAETraining
from src.sparse import active
from src.zoo import ZOO

LEVELS = {"easy": 2, "medium": 4, "hard": 8}  # features for each dimension
TREE_SHARE = 0.6  # of the features belong to trees
BRANCHES, DEPTH = 3, 2  # a tree has 1 + 3 + 9 features
ZIPF = 0.5  # exponent of the rates by rank
CHILD_RATE = 0.8  # how often one of the children of an active feature is active
MAX_RATE, MIN_RATE = 0.25, 0.01  # of features without a parent
FACTORS, CORRELATED = 8, 0.25  # hidden causes of firing, and the share of variance they explain
NOISE = 0.05  # of a state, in units of a feature's magnitude
EARLY_SHARE = 0.5  # of the trees and free features are born at the first site
FATES = {"kept": 0.4, "rotated": 0.3, "dropped": 0.3}
ROTATION = 0.5  # radians from one site to the next
MATCHED = 0.7  # cosine from which a feature counts as found
PROFILE = 0.5  # a latent lives where its rate is at least this share of its largest
BATCH = 1024
TEST_SAMPLES = 20_000


class Samples(NamedTuple):
    """States, and the features that made them."""

    fires: Tensor  # bool [N,G]
    hidden: dict[int, Tensor]  # {site: [N,D]}


class World:
    """Planted features. `directions` [L,G,D] have norm 1; `present` [L,G]: where they live."""

    def __init__(self, n_sites: int, width: int, n_features: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.n_sites = n_sites
        self.parent = _forest(n_features)
        self.roots = (self.parent < 0).nonzero()[:, 0]
        ranks = torch.arange(1, len(self.roots) + 1).float()
        rate = MIN_RATE + (MAX_RATE - MIN_RATE) / ranks**ZIPF
        order = torch.randperm(len(self.roots), generator=self.generator)
        self.threshold = torch.special.ndtri(1 - rate[order])
        loadings = self._normal(len(self.roots), FACTORS)
        self.loadings = CORRELATED**0.5 * F.normalize(loadings, dim=1)
        self.magnitude = 0.7 + 0.8 * torch.rand(n_features, generator=self.generator)
        self.present, rotates = self._lives()
        self.directions = self._directions(n_features, width, rotates)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _lives(self) -> tuple[Tensor, Tensor]:
        """Return (present [L,G], which features rotate [G]). A child lives within its parent."""
        n_features, sites = len(self.parent), torch.arange(self.n_sites)
        present = torch.ones(self.n_sites, n_features, dtype=torch.bool)
        shares = torch.tensor(list(FATES.values()))
        fate = torch.multinomial(
            shares.expand(n_features, -1), 1, generator=self.generator
        ).squeeze(1)
        for feature, parent in enumerate(self.parent.tolist()):
            early = torch.rand((), generator=self.generator) < EARLY_SHARE
            birth = 0 if early else self._integer(self.n_sites)
            end = self.n_sites
            if fate[feature] == list(FATES).index("dropped"):
                end = birth + 1 + self._integer(self.n_sites - birth)
            present[:, feature] = (birth <= sites) & (sites < end)
            if parent >= 0:
                inside = present[:, feature] & present[:, parent]
                present[:, feature] = inside if inside.any() else present[:, parent]
        return present, fate == list(FATES).index("rotated")

    def _integer(self, below: int) -> int:
        return int(torch.randint(max(1, below), (), generator=self.generator))

    def _directions(self, n_features: int, width: int, rotates: Tensor) -> Tensor:
        first, other = (_spread(self._normal(n_features, width)) for _ in range(2))
        other = F.normalize(other - (other * first).sum(1, keepdim=True) * first, dim=1)
        angle = ROTATION * torch.arange(self.n_sites)[:, None, None] * rotates[:, None]
        return angle.cos() * first + angle.sin() * other

    def sample(self, n: int) -> Samples:
        """Return n samples."""
        hidden_causes = self._normal(n, FACTORS) @ self.loadings.T
        score = hidden_causes + (1 - CORRELATED) ** 0.5 * self._normal(n, len(self.roots))
        fires = torch.zeros(n, len(self.parent), dtype=torch.bool)
        fires[:, self.roots] = score > self.threshold
        children = (self.parent >= 0).nonzero()[:, 0].view(-1, BRANCHES)  # by parent, in order
        for siblings in children:
            chosen = torch.randint(BRANCHES, (n, 1), generator=self.generator)
            one_of_them = F.one_hot(chosen[:, 0], BRANCHES).bool()
            has_child = torch.rand(n, 1, generator=self.generator) < CHILD_RATE
            has_parent = fires[:, self.parent[siblings[0]], None]
            fires[:, siblings] = one_of_them & has_child & has_parent
        values = (self.magnitude * (1 + 0.3 * self._normal(n, len(self.parent)))).abs() * fires
        hidden = {}
        for index in range(self.n_sites):
            states = (values * self.present[index]) @ self.directions[index]
            hidden[index + 1] = states + NOISE * self._normal(*states.shape)
        return Samples(fires, hidden)


def _forest(n_features: int) -> Tensor:
    """Return the parent of each feature, -1 for none. Siblings follow each other. int64 [G]"""
    tree_size = sum(BRANCHES**level for level in range(DEPTH + 1))
    inner = sum(BRANCHES**level for level in range(DEPTH))
    parents = []
    for _ in range(round(TREE_SHARE * n_features / tree_size)):
        root = len(parents)
        parents += [-1, *(root + node for node in range(inner) for _ in range(BRANCHES))]
    return torch.tensor(parents + [-1] * (n_features - len(parents)))


def _spread(directions: Tensor, steps: int = 200) -> Tensor:
    """Return unit vectors [G,D] near these that lie farther from each other."""
    directions = torch.nn.Parameter(F.normalize(directions, dim=1))
    optimizer = torch.optim.Adam([directions], 0.01)
    for _ in range(steps):
        unit = F.normalize(directions, dim=1)
        optimizer.zero_grad()
        (unit @ unit.T).fill_diagonal_(0).pow(4).sum().backward()
        optimizer.step()
    return F.normalize(directions.detach(), dim=1)


# ------------------------------------------------------------------------------------- training


def train(name: str, world: World, args: argparse.Namespace, seed: int, **changes: Any) -> SAE:
    """Train a model of the zoo by its standard recipe, with SAETraining, as train.py does."""
    sizes = ["--latent_size", str(args.latents), "--k", str(args.k), "--seed", str(seed)]
    cfg = config.complete(config.parse("train", ["--model", name, *sizes]))
    options = config.model_options(cfg, name) | {"k": args.k} | changes
    if "target_l0" in ZOO[name].options:
        options["target_l0"] = args.k
    if "sites" in ZOO[name].options:
        options["sites"] = list(world_sites(world))
    torch.manual_seed(seed)
    sae = model.build(name, args.width, world.n_sites, options)
    steps = args.samples // BATCH
    first_keys = range(0, steps * BATCH, BATCH)
    batches = (
        LocalBatch(world.sample(BATCH).hidden, torch.arange(BATCH) + key, BATCH, token_offset=0)
        for key in first_keys
    )
    return SAETraining(sae, name, options, cfg, steps).run(batches)


def world_sites(world: World) -> range:
    return range(1, world.n_sites + 1)


# ------------------------------------------------------------------------------------- measures


def match(similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, columns) of the one-to-one matching with the largest sum of similarities.

    The Hungarian method by shortest augmenting paths (Jonker and Volgenant 1987); every row or
    every column is matched, whichever are fewer.
    """
    if similarity.shape[0] > similarity.shape[1]:
        columns, rows = match(similarity.T)
        return rows, columns
    cost = -np.asarray(similarity, dtype=np.float64)
    n_rows, n_columns = cost.shape
    row_price, column_price = np.zeros(n_rows), np.zeros(n_columns)
    row_of = np.full(n_columns, -1)
    for new_row in range(n_rows):
        distance = np.full(n_columns, np.inf)
        previous = np.full(n_columns, -1)  # the column before, on the shortest path
        is_open = np.ones(n_columns, dtype=bool)
        row, column, length = new_row, -1, 0.0
        while row >= 0:
            path = length + cost[row] - row_price[row] - column_price
            shorter = is_open & (path < distance)
            distance[shorter], previous[shorter] = path[shorter], column
            column = int(np.where(is_open, distance, np.inf).argmin())
            length = distance[column]
            is_open[column] = False
            row = row_of[column]
        closed = ~is_open
        matched = closed & (row_of >= 0)
        row_price[row_of[matched]] += length - distance[matched]
        row_price[new_row] += length
        column_price[closed] -= length - distance[closed]
        while previous[column] >= 0:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
        row_of[column] = new_row
    columns = (row_of >= 0).nonzero()[0]
    return row_of[columns], columns


def similarities(sae: SAE, world: World) -> Tensor:
    """Return the cosine of each latent's decoder and each feature's direction. [F,G]

    An SAE with one decoder is compared at each site, and the largest cosine counts. One with a
    decoder for each site is compared over all sites together.
    """
    with torch.no_grad():
        decoder = sae.contribution(torch.eye(sae.latent_size))  # [F,D] or [F,L,D]
    # A standardised state has no mean.
    planted = world.directions - world.directions.mean(-1, keepdim=True)
    planted = planted * world.present[..., None]
    if decoder.dim() == 3:
        features = F.normalize(planted.transpose(0, 1).flatten(1), dim=1)
        return F.normalize(decoder.flatten(1), dim=1) @ features.T
    sites = torch.tensor(sae.sites()) - 1
    by_site = F.normalize(decoder, dim=1) @ F.normalize(planted[sites], dim=-1).mT
    return by_site.amax(0)


class Counts(NamedTuple):
    """How latents fired on held-out samples."""

    f1: Tensor  # of each latent as a detector of its nearest feature [F]
    rates: Tensor  # how often each latent fired, by site [L,F]
    l0: float
    error: float


@torch.no_grad()
def count(sae: SAE, world: World, nearest: Tensor) -> Counts:
    """Count on held-out samples. nearest: the feature that each latent should detect, int64 [F]"""
    samples = world.sample(TEST_SAMPLES)
    out = sae.autoencode(
        sae.gather(samples.hidden), BatchInfo(token_keys=torch.arange(len(samples.fires)))
    )
    code = out.latents.flatten(0, -2)
    site_index = sae.code_sites(out).flatten()
    own_sites = torch.tensor(sae.sites()) - 1
    here = world.present[own_sites][site_index]  # [codes,G]
    here[site_index < 0] = world.present[own_sites].any(0)
    codes_per_sample = len(code) // len(samples.fires)
    truth = (samples.fires.repeat_interleave(codes_per_sample, 0) & here)[:, nearest]
    fired = code != 0
    hits = (fired & truth).sum(0)
    f1 = 2 * hits / (fired.sum(0) + truth.sum(0)).clamp_min(1)
    rates = torch.zeros(world.n_sites, sae.latent_size)
    for index, site in enumerate(own_sites.tolist()):
        if (site_index == index).any():
            rates[site] = fired[site_index == index].float().mean(0)
    profile = sae.site_profile()
    if profile is not None:
        rates[own_sites] = profile / profile.sum(0) * fired.float().mean(0)
    error = float(squared_errors(out.target, out.x_hat).mean())
    _, latent, _ = active(out.code)
    return Counts(f1, rates, len(latent) / len(code), error)


def measure(sae: SAE, world: World) -> dict[str, float]:
    """Return every measure of an SAE."""
    cosine = similarities(sae, world)
    nearest = cosine.abs().argmax(1)
    counts = count(sae, world, nearest)
    latents, features = match(cosine.abs().numpy())
    matched = cosine.abs().numpy()[latents, features]
    result = {
        "F1": float(counts.f1.mean()),
        "MCC": float(matched.mean()),
        "uniqueness": len(nearest.unique()) / sae.latent_size,
        "L0": counts.l0,
        "NormMSE": counts.error,
        "dead": float((counts.rates.sum(0) == 0).float().mean()),
    }
    if len(sae.sites()) > 1:
        found = matched >= MATCHED
        result |= _places(counts.rates[:, latents[found]], world.present[:, features[found]])
        result["found"] = float(found.mean())
    return result


def _places(rates: Tensor, present: Tensor) -> dict[str, float]:
    """Return how well sites of latents [L,M] agree with those of their features [L,M]."""
    lives = rates >= PROFILE * rates.amax(0).clamp_min(1e-12)
    first = lives.int().argmax(0) == present.int().argmax(0)
    overlap = (lives & present).sum(0) / (lives | present).sum(0)
    return {"birth": float(first.float().mean()), "span": float(overlap.mean())}


def _measured_as(name: str, sae: SAE) -> Iterator[str]:
    """Yield the titles under which an SAE is measured; one that routes gets the best sites too."""
    yield name
    if "routing" in sae.evaluation_options and len(sae.sites()) > 1:
        sae.routing = "oracle"
        yield f"{name}, oracle sites"


# ---------------------------------------------------------------------------------------- report


def table(results: list[dict[str, Any]]) -> str:
    """Return the Markdown table: means over seeds, with half of the range, one row a model."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_model.setdefault(result["model"], []).append(result)
    measures = list(dict.fromkeys(key for result in results for key in result))[2:]
    lines = [f"| model | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]

    def f1(name: str) -> float:
        return statistics.mean(result["F1"] for result in by_model[name])

    for name in sorted(by_model, key=f1, reverse=True):
        cells = [_cell([r[key] for r in by_model[name] if key in r]) for key in measures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    half_range = (max(values) - min(values)) / 2
    text = f"{statistics.mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ± {half_range:.3f}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.planted", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=ZOO, default=list(ZOO))
    add("--sites", type=int, default=1, help="sites of the planted residual stream")
    add("--level", choices=LEVELS, default="medium", help="how many features a dimension has")
    add("--width", type=int, default=64)
    add("--latents", type=int, default=256)
    add("--k", type=int, default=8, help="active latents, or the target of a penalty")
    add("--samples", type=int, default=1_000_000, help="of each training")
    add("--seeds", type=int, nargs="+", default=[1])
    add("--out", type=Path, default=Path("outputs/planted"), help="path without suffix")
    return parser.parse_args(argv)


def _earlier(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of the same command that were stopped or had other models and seeds."""
    if not path.exists():
        return []
    earlier = load_json(path)
    if earlier["about"] != about:
        raise SystemExit(f"{path} is of another world; give another --out")
    return earlier["results"]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    about = {name: getattr(args, name) for name in ("sites", "level", "width", "latents", "k")}
    about["samples"] = args.samples
    results = _earlier(args.out.with_suffix(".json"), about)
    done = {(result["model"], result["seed"]) for result in results}
    for seed in args.seeds:
        for name in args.models:
            if (name, seed) in done:
                continue
            # A world draws its samples in order, so each model gets the same ones.
            world = World(args.sites, args.width, LEVELS[args.level] * args.width, seed)
            sae = train(name, world, args, seed)
            for title in _measured_as(name, sae):
                results.append({"model": title, "seed": seed} | measure(sae, world))
                print(results[-1], flush=True)
            save_json({"about": about, "results": results}, args.out.with_suffix(".json"))
    save_text(table(results), args.out.with_suffix(".md"))
    print(table(results))
    return results


if __name__ == "__main__":
    main()
