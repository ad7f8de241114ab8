"""SAEs on states whose features are known: which model finds them, and finds where they live?

    python -m experiments.planted --level synth --seeds 1 2 3
    python -m experiments.planted --level medium --seeds 1 2 3

All models of a seed are trained on the same samples. What is done is kept in OUT.json, and the
same command continues. A language model with these states, for train.py, and the score of what
train.py saved:

    python -m experiments.planted --level medium --write outputs/planted/world
    python train.py --model TopK RouteSAE --model_path outputs/planted/world \
      --data_path outputs/planted/world/text.jsonl --trust_remote_code 1
    python -m experiments.planted --level medium --score outputs/SAE_models/TopK_text.pt

| measure | meaning |
|---|---|
| F1, precision, recall | of each latent as a detector of the feature nearest to its decoder, mean |
| MCC | mean cosine of latents and features under the best one-to-one matching |
| uniqueness | different nearest features over the number of latents |
| roots, children, free | share of these features that a latent finds (cosine from 0.7) |
| birth | share of found features whose first site is the first site of their latent |
| span | overlap of the sites of a found feature and its latent: intersection over union |
| reach | share of a token's active features that live at the site where it was read |

F1, MCC and uniqueness are those of SynthSAEBench (arXiv:2602.14687). A feature counts as active
where it fires and lives at the site that was read.

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

from experiments import exit_code
from experiments.planted_world import LEVELS, Samples, World
from src import checkpoint, config, model
from src.config import small_parser
from src.files import load_json, save_json, save_text
from src.ops import squared_errors
from src.sae import SAE, BatchInfo
from src.sae_training import LocalBatch, SAETraining
from src.sparse import active
from src.zoo import ZOO

FOUND = 0.7  # cosine from which a feature counts as found
PROFILE = 0.5  # a latent lives where its rate is at least this share of its largest
MIN_CODES = 100  # read at a site; from fewer, no rate of a latent is known there
BATCH = 1024
TEST_SAMPLES = 16_384
TEST_SEED = 10_000  # held-out samples are drawn with this seed plus the world's

_ALONE = {"routing": "random", "router_objective": "published", "router_balance": "none"}
# Every model by its standard recipe, controls of the routing, and penalties that do not saturate.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ZOO} | {
    "RouteSAE, random": ("RouteSAE", _ALONE),
    "RouteSAE, truth": ("RouteSAE", _ALONE),
    "Vanilla, plain L1": ("Vanilla", {"l1_saturation": 0.0}),
    "Crosscoder, plain L1": ("Crosscoder", {"l1_saturation": 0.0}),
}


# ------------------------------------------------------------------------------------- training


def route_by_truth(sae: SAE, world: World, samples: Samples) -> None:
    """Send each of these samples to the site where most of its active features live."""
    site = world.alive(samples.values).argmax(1)
    sae.router.sample = lambda keys, _seed: site[keys % len(site)]


def prepare(name: str, world: World, steps: int, seed: int, **changes: Any) -> SAETraining:
    """Return the training of an arm by its standard recipe, as train.py would make it."""
    model_name, options = ARMS[name]
    level = world.level
    sizes = ["--latent_size", str(level.latents), "--k", str(level.k), "--seed", str(seed)]
    cfg = config.complete(config.parse("train", ["--model", model_name, *sizes]))
    for key in ("optimizer", "lr"):
        setattr(cfg, key, changes.get(key, getattr(cfg, key)))
    options = config.model_options(cfg, model_name) | {"k": level.k} | options | changes
    if "target_l0" in ZOO[model_name].options:
        options.setdefault("target_l0", level.k)
    if "sites" in ZOO[model_name].options:
        options["sites"] = list(world.sites())
    torch.manual_seed(seed)
    sae = model.build(model_name, level.width, world.n_sites, options)
    return SAETraining(sae, name, options, cfg, steps)


def train(trainings: list[SAETraining], world: World, steps: int) -> None:
    """Train SAEs side by side on the same samples. Raises ValueError if a loss is not finite."""
    for step in range(steps):
        samples = world.sample(BATCH)
        keys = torch.arange(BATCH) + step * BATCH
        batch = LocalBatch(samples.hidden, keys, BATCH, token_offset=0)
        for training in trainings:
            if training.title == "RouteSAE, truth":
                route_by_truth(training.sae, world, samples)
            if not step:
                training.warm_start(batch)
            training.step(batch, step, report_due=False)
            training.check()
            if training.failed:
                raise ValueError(training.failed)
    for training in trainings:
        training.finish()


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
    """Return the size of the cosine of each latent's decoder and each feature. [F,G]

    An SAE with one decoder is compared at each site, and the largest cosine counts. One with a
    decoder for each site is compared over all sites together.
    """
    with torch.no_grad():
        decoder = sae.contribution(torch.eye(sae.latent_size))  # [F,D] or [F,L,D]
    planted = world.directions
    if sae.input_norm != "none":  # else the mean of a state is subtracted before it is coded
        planted = planted - planted.mean(-1, keepdim=True)
    planted = planted * world.present[..., None]
    if decoder.dim() == 3:
        features = F.normalize(planted.transpose(0, 1).flatten(1), dim=1)
        return (F.normalize(decoder.flatten(1), dim=1) @ features.T).abs()
    sites = torch.tensor(sae.sites()) - 1
    by_site = F.normalize(decoder, dim=1) @ F.normalize(planted[sites], dim=-1).mT
    return by_site.abs().amax(0)


def detection(fired: Tensor, truth: Tensor) -> dict[str, float]:
    """Return the means over latents as detectors, 0 for one without a hit. bool [N,F] twice"""
    hits = (fired & truth).sum(0)
    precision = hits / fired.sum(0).clamp_min(1)
    recall = hits / truth.sum(0).clamp_min(1)
    f1 = 2 * hits / (fired.sum(0) + truth.sum(0)).clamp_min(1)
    return {
        "F1": float(f1.mean()),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
    }


class Codes(NamedTuple):
    """How an SAE read held-out samples; C codes, of which a sample may have several."""

    fired: Tensor  # bool [C,F]
    sample: Tensor  # that a code belongs to [C]
    there: Tensor  # whether each feature lives at a site that the code was read from. bool [C,G]
    rates: Tensor  # how often each latent fired, by site [L,F]
    l0: float
    error: float


@torch.no_grad()
def read(sae: SAE, world: World, samples: Samples) -> Codes:
    """Code samples."""
    n = len(samples.values)
    out = sae.autoencode(sae.gather(samples.hidden), BatchInfo(token_keys=torch.arange(n)))
    fired = out.latents.flatten(0, -2) != 0
    site_index = sae.code_sites(out).flatten()
    own_sites = torch.tensor(sae.sites()) - 1
    there = world.present[own_sites][site_index]
    there[site_index < 0] = world.present[own_sites].any(0)
    rates = torch.zeros(world.n_sites, sae.latent_size)
    for index, site in enumerate(own_sites.tolist()):
        if (site_index == index).sum() >= MIN_CODES:
            rates[site] = fired[site_index == index].float().mean(0)
    profile = sae.site_profile()
    if profile is not None:
        rates[own_sites] = profile / profile.sum(0) * fired.float().mean(0)
    sample = torch.arange(n).repeat_interleave(len(fired) // n)
    error = float(squared_errors(out.target, out.x_hat).mean())
    _, latent, _ = active(out.code)
    return Codes(fired, sample, there, rates, len(latent) / len(fired), error)


def measure(sae: SAE, world: World, samples: Samples) -> dict[str, float]:
    """Return every measure of an SAE."""
    cosine = similarities(sae, world)
    nearest = cosine.argmax(1)
    codes = read(sae, world, samples)
    truth = samples.fires[codes.sample] & codes.there
    latents, features = match(cosine.numpy())
    matched = cosine.numpy()[latents, features]
    result = detection(codes.fired, truth[:, nearest]) | {
        "MCC": float(matched.mean()),
        "uniqueness": len(nearest.unique()) / sae.latent_size,
        "L0": codes.l0,
        "NormMSE": codes.error,
        "dead": float((~codes.fired.any(0)).float().mean()),
    }
    if world.n_sites == 1:
        return result | _found_by_kind(cosine, world)
    found = matched >= FOUND
    fires = samples.fires.sum(1).clamp_min(1)[codes.sample]
    if found.any():
        result |= places(codes.rates[:, latents[found]], world.present[:, features[found]])
    return result | {
        "found": float(found.mean()),
        "reach": float((truth.sum(1) / fires)[samples.fires.any(1)[codes.sample]].mean()),
    }


def _found_by_kind(cosine: Tensor, world: World) -> dict[str, float]:
    """Return the share of the roots of trees, of their children, and of other features found."""
    found = (cosine.amax(0) >= FOUND).float()
    is_child = world.parent >= 0
    is_root = torch.zeros_like(is_child)
    is_root[world.parent[is_child]] = True
    kinds = {"roots": is_root & ~is_child, "children": is_child, "free": ~is_root & ~is_child}
    return {kind: float(found[chosen].mean()) for kind, chosen in kinds.items() if chosen.any()}


def places(rates: Tensor, present: Tensor) -> dict[str, float]:
    """Return how well sites of latents [L,M] agree with those of their features [L,M]."""
    lives = (rates >= PROFILE * rates.amax(0)) & (rates > 0)
    first = (lives.int().argmax(0) == present.int().argmax(0)) & lives.any(0)
    overlap = (lives & present).sum(0) / (lives | present).sum(0)
    return {"birth": float(first.float().mean()), "span": float(overlap.mean())}


def measured_as(title: str, sae: SAE) -> Iterator[str]:
    """Yield the titles under which an SAE is measured; routed ones have controls."""
    yield title
    if title == "RouteSAE" and len(sae.sites()) > 1:
        for routing in ("permuted", "oracle"):
            sae.routing = routing
            yield {"permuted": "RouteSAE, permuted", "oracle": "RouteSAE, least error"}[routing]


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
    parser = small_parser("experiments.planted", __doc__)
    add = parser.add_argument
    add("--level", choices=LEVELS, default="synth", help="the world")
    add("--models", nargs="+", choices=ARMS, help="default: all that the world has sites for")
    add("--samples", type=int, default=400_000, help="of each training")
    add("--seeds", type=int, nargs="+", default=[1], help="of worlds and trainings")
    add("--write", type=Path, metavar="FOLDER", help="only write the world as a language model")
    add("--score", nargs="+", metavar="SAE", help="only measure these SAEs, in the first seed")
    add("--out", type=Path, help="path without suffix; default: outputs/planted/LEVEL")
    return parser.parse_args(argv)


def _earlier(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of the same command that were stopped or had other models and seeds."""
    if not path.exists():
        return []
    earlier = load_json(path)
    if earlier["about"] != about:
        raise ValueError(
            f"{path} holds results of {earlier['about']}, not of {about}; give another --out"
        )
    return earlier["results"]


def run_seed(names: list[str], args: argparse.Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """Train these arms in one world, and yield what was measured."""
    world = World(LEVELS[args.level], seed)
    steps = args.samples // BATCH
    trainings = [prepare(name, world, steps, seed) for name in names]
    train(trainings, world, steps)
    samples = held_out(world, seed)
    for training in trainings:
        if training.title == "RouteSAE, truth":
            route_by_truth(training.sae, world, samples)
        for title in measured_as(training.title, training.sae):
            yield {"model": title, "seed": seed} | measure(training.sae, world, samples)


def held_out(world: World, seed: int) -> Samples:
    """Return the samples on which SAEs are measured."""
    return world.sample(TEST_SAMPLES, torch.Generator().manual_seed(TEST_SEED + seed))


def score(paths: list[str], level: str, seed: int) -> list[dict[str, Any]]:
    """Return the measures of SAEs that were trained elsewhere on the states of a world."""
    world = World(LEVELS[level], seed)
    samples = held_out(world, seed)
    results = []
    for path in paths:
        sae, recipe = checkpoint.load(path)
        sae.check_language_model(world.level.width, world.n_sites)
        results.append({"model": recipe["title"], "seed": seed} | measure(sae, world, samples))
    return results


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    if args.write:
        from experiments import planted_model  # it imports transformers, which takes seconds

        planted_model.write(args.write, LEVELS[args.level], args.seeds[0], args.samples)
        print(f"{args.write}: the language model, and text.jsonl")
        return []
    if args.score:
        results = score(args.score, args.level, args.seeds[0])
        print(table(results))
        return results
    several = LEVELS[args.level].n_sites > 1
    names = args.models or [
        name for name in ARMS if several or "sites" not in ZOO[ARMS[name][0]].options
    ]
    out = args.out or Path("outputs/planted") / args.level
    about = {"level": args.level, "samples": args.samples, **LEVELS[args.level]._asdict()}
    results = _earlier(out.with_suffix(".json"), about)
    done = {(result["model"], result["seed"]) for result in results}
    for seed in args.seeds:
        missing = [name for name in names if (name, seed) not in done]
        if missing:
            for result in run_seed(missing, args, seed):
                print(result, flush=True)
                results.append(result)
            save_json({"about": about, "results": results}, out.with_suffix(".json"))
    save_text(table(results), out.with_suffix(".md"))
    print(table(results))
    return results


if __name__ == "__main__":
    raise SystemExit(exit_code("planted", main))
