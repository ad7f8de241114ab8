"""What the routing experiment found: figures with bootstrap intervals over documents, as JSON and tables. Pictures are in routing_pictures.

O documents, L sites, F latents, R redraws. Intervals: 95 %, documents drawn again with replacement, the same draw for every run and seed;
seeds are few and are not drawn: their figures stand beside each other.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from experiments import routing_pictures
from experiments.routing_measure import QUANTITIES, load
from experiments.routing_runs import LEARNED, ROUTERS, path_of
from src import checkpoint, files, router
from src.sae import routed_sites

METRICS = {  # numerator, denominator
    "NormMSE": ("NormMSE", "tokens"),
    "KL": ("KL", "predictions"),
    "DeltaCE": ("DeltaCE", "predictions"),
    "KL / mean ablation": ("KL_here", "KL_mean"),
    "KL / equal noise": ("KL_here", "KL_noise"),
}
REDRAWS, ENOUGH = 2000, 10  # redraws; activations at a site that make a latent a feature there


def bootstrap(n_documents: int, redraws: int = REDRAWS) -> np.ndarray:
    """How often each document is drawn: first once each, the measurement itself, then R redraws. [R+1,O]"""
    drawn = np.random.default_rng(0).multinomial(
        n_documents, np.full(n_documents, 1 / n_documents), redraws
    )
    return np.concatenate([np.ones((1, n_documents)), drawn]).astype(np.float64)


def ratio(draws: np.ndarray, table: np.ndarray, metric: str) -> np.ndarray:
    """A metric of one run in every draw. [R+1,O], [O,Q] -> [R+1]; nan where it was not measured"""
    top, bottom = (draws @ table[:, QUANTITIES.index(name)] for name in METRICS[metric])
    return np.divide(top, bottom, out=np.full(len(draws), np.nan), where=bottom > 0)


def said(values: np.ndarray) -> dict[str, float | None]:
    """The measurement and its interval; None where nothing was measured."""
    if not np.isfinite(values[0]):
        return {"value": None, "low": None, "high": None}
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


class Found:
    """The sums of every seed, and what follows from them."""

    def __init__(self, cfg: Namespace, paths: dict[int, list[Path]]) -> None:
        self.cfg, self.seeds = cfg, list(paths)
        self.sites = routed_sites(cfg.n_layers, cfg.start_layer, cfg.end_layer)
        self.sums = {seed: load(parts) for seed, parts in paths.items()}
        tables = next(iter(self.sums.values()))["documents"]
        used = np.flatnonzero(next(iter(tables.values()))[:, 0])
        self.draws, self.used, self.runs = bootstrap(len(used)), used, list(tables)

    def metric(
        self, run: str, metric: str, seed: int, draws: np.ndarray | None = None
    ) -> np.ndarray:
        return ratio(
            self.draws if draws is None else draws,
            self.sums[seed]["documents"][run][self.used],
            metric,
        )

    def mean(self, run: str, metric: str) -> dict[str, Any]:
        """Mean over seeds with its interval, and each seed's value."""
        each = [self.metric(run, metric, seed) for seed in self.seeds]
        return said(np.mean(each, axis=0)) | {"seeds": [said(values)["value"] for values in each]}

    def gain(self, run: str, against: str, metric: str) -> list[np.ndarray]:
        """1 - run / against of each seed, both from the same draws of documents."""
        return [
            1 - self.metric(run, metric, seed) / self.metric(against, metric, seed)
            for seed in self.seeds
        ]

    def shares(self, run: str, seed: int) -> np.ndarray:
        tokens = self.sums[seed]["site_tokens"][run]
        return tokens / tokens.sum()

    def own_topk(self, name: str, metric: str, seed: int) -> np.ndarray:
        """TopKs of the single sites, each weighted with the share of its site in a run: a dictionary for each site and random assignment."""
        shares = self.shares(name, seed)
        return sum(
            share * self.metric(f"topk_{site}", metric, seed)
            for site, share in zip(self.sites, shares, strict=True)
        )

    def best_site(self, family: str, metric: str, seed: int) -> tuple[int, float]:
        """(site, value): chosen on every other document, measured on the others."""
        chooses = (np.arange(len(self.used)) % 2 == 0).astype(np.float64)[None]
        site = min(
            self.sites, key=lambda site: self.metric(f"{family}_{site}", metric, seed, chooses)[0]
        )
        return site, float(self.metric(f"{family}_{site}", metric, seed, 1 - chooses)[0])

    def features(self, run: str, seed: int) -> dict[str, Any]:
        """Features of each site; on how many sites a latent's activations lie (exponential of their entropy, mean over latents)."""
        fired = self.sums[seed]["fired"][run].astype(np.float64)
        alive = fired.sum(0) >= ENOUGH
        spread = np.exp(
            torch.special.entr(torch.from_numpy(fired[:, alive] / fired[:, alive].sum(0)))
            .sum(0)
            .numpy()
        )
        return {
            "per_site": (fired >= ENOUGH).sum(1).tolist(),
            "alive": int(alive.sum()),
            "sites_of_a_latent": float(spread.mean()),
        }

    def information(self, run: str, seed: int) -> dict[str, float]:
        """Nats a token gives on its site, and what the same counts give where sites are dealt at random with the same shares."""
        counts = self.sums[seed]["site_of_token"][run].astype(np.int64)
        dealt = np.random.default_rng(0).multinomial(counts.sum(1), counts.sum(0) / counts.sum())
        return {
            "nats": router.information(torch.from_numpy(counts)),
            "by_chance": router.information(torch.from_numpy(dealt)),
        }

    def stability(self, name: str) -> list[float]:
        """For each pair of seeds: the largest cosine of a latent's decoder column with one of the other seed's, mean over latents, both ways."""
        units = []
        for seed in self.seeds:
            (decoder,) = checkpoint.load(path_of(self.cfg, name, seed))[0].decoders()
            units.append(F.normalize(decoder.weight.detach(), dim=0))
        pairs = [a.T @ b for a, b in itertools.combinations(units, 2)]
        return [
            float((cosines.max(0).values.mean() + cosines.max(1).values.mean()) / 2)
            for cosines in pairs
        ]


def collect(found: Found) -> dict[str, Any]:
    """Every figure, by what it answers."""
    routed = [run for run in found.runs if run in found.sums[found.seeds[0]]["site_of_token"]]
    every = {run: {metric: found.mean(run, metric) for metric in METRICS} for run in found.runs}
    gains: dict[str, Any] = {}
    for name in ROUTERS:
        gains[name] = {}
        for metric in METRICS:
            each = found.gain(name, f"{name}_shares", metric)
            permuted = [-values for values in found.gain(f"{name}_permuted", name, metric)]
            own = [
                1 - found.metric(name, metric, seed) / found.own_topk(name, metric, seed)
                for seed in found.seeds
            ]
            gains[name][metric] = {
                "mean": said(np.mean(each, axis=0)),
                "seeds": [said(values) for values in each],
                "permuting_costs": said(np.mean(permuted, axis=0)),
                "against_each_sites_own_topk": said(np.mean(own, axis=0)),
            }
            if name in LEARNED:
                fixed = found.gain(name, f"{name}_fixed", metric)
                gains[name][metric] |= {
                    "against_fixed": said(np.mean(fixed, axis=0)),
                    "against_fixed_seeds": [said(values) for values in fixed],
                }
    routers = {}
    for name in ROUTERS:
        oracle = [found.metric(f"{name}_oracle", "NormMSE", seed)[0] for seed in found.seeds]
        hard = [found.metric(name, "NormMSE", seed)[0] for seed in found.seeds]
        routers[name] = {
            "regret": (np.array(hard) - np.array(oracle)).tolist(),
            "agreement": [
                float(
                    found.sums[seed]["agreed"][name] / found.sums[seed]["site_tokens"][name].sum()
                )
                for seed in found.seeds
            ],
            "information": [found.information(name, seed) for seed in found.seeds],
            "entropy": [
                float(router.entropy(torch.from_numpy(found.shares(name, seed))))
                for seed in found.seeds
            ],
        }
    per_site = {}
    for run in routed:
        errors = [found.sums[seed]["site_errors"][run] for seed in found.seeds]
        tokens = [found.sums[seed]["site_tokens"][run] for seed in found.seeds]
        per_site[run] = {
            "shares": [found.shares(run, seed).tolist() for seed in found.seeds],
            "NormMSE": [
                [float(e / n) if n else None for e, n in zip(*pair, strict=True)]
                for pair in zip(errors, tokens, strict=True)
            ],
            "features": [found.features(run, seed) for seed in found.seeds],
        }
    members = [
        *(f"topk_{site}" for site in found.sites),
        "mlsae",
        "random",
        *ROUTERS,
        *(f"{name}_shares" for name in ROUTERS),
    ]
    members += [f"{name}_fixed" for name in LEARNED]
    best = {}
    for family, metric in itertools.product(("topk", "mlsae"), METRICS):
        best.setdefault(family, {})[metric] = [
            found.best_site(family, metric, seed) for seed in found.seeds
        ]
    return {
        "sites": found.sites,
        "seeds": found.seeds,
        "documents": len(found.used),
        "redraws": REDRAWS,
        "runs": every,
        "gains": gains,
        "routers": routers,
        "per_site": per_site,
        "best_single_site": best,
        "stability": {name: found.stability(name) for name in members},
        "topk_features": {
            f"topk_{site}": [found.features(f"topk_{site}", seed)["alive"] for seed in found.seeds]
            for site in found.sites
        },
    }


def number(figure: dict[str, Any], percent: bool = False) -> str:
    """A figure with its interval, as a table has it."""
    if figure["value"] is None:
        return "-"
    value, low, high = (figure[key] * (100 if percent else 1) for key in ("value", "low", "high"))
    form = "{:.1f}" if percent else ("{:.4f}" if abs(value) < 0.1 else "{:.3f}")
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"


def listed(figures: list[dict[str, Any]]) -> str:
    """Per cent of each seed, without intervals."""
    return ", ".join(number(figure, True).split()[0] for figure in figures)


def rows(head: list[str], body: list[list[Any]]) -> str:
    return "\n".join(
        ["| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *body]]
    )


def tables(result: dict[str, Any]) -> str:
    """Markdown."""
    sites, several = result["sites"], len(result["seeds"]) > 1
    order = sorted(result["runs"], key=lambda run: result["runs"][run]["NormMSE"]["value"])
    every = [
        [run.replace("_", " "), *(number(result["runs"][run][metric]) for metric in METRICS)]
        for run in order
    ]
    gain = []
    for name, metric in itertools.product(ROUTERS, METRICS):
        g = result["gains"][name][metric]
        fixed = (
            [number(g["against_fixed"], True), listed(g["against_fixed_seeds"])]
            if name in LEARNED
            else ["-", "-"]
        )
        others = [
            number(g[key], True) for key in ("permuting_costs", "against_each_sites_own_topk")
        ]
        gain.append([name, metric, number(g["mean"], True), listed(g["seeds"]), *fixed, *others])
    site_rows = []
    for name in result["per_site"]:
        if name.endswith(("_permuted", "_oracle")):
            continue
        mine = result["per_site"][name]
        for seed, shares, errors, features in zip(
            result["seeds"], mine["shares"], mine["NormMSE"], mine["features"], strict=True
        ):
            cells = [
                f"{s:.2f} / {e:.3f} / {f}" if s > 0 else "0"
                for s, e, f in zip(shares, errors, features["per_site"], strict=True)
            ]
            site_rows.append(
                [
                    name.replace("_", " "),
                    seed,
                    *cells,
                    features["alive"],
                    f"{features['sites_of_a_latent']:.2f}",
                ]
            )
    learned = []
    for name, r in result["routers"].items():
        info = ", ".join(f"{i['nats']:.2f} ({i['by_chance']:.2f})" for i in r["information"])
        learned.append(
            [
                name,
                *(
                    ", ".join(f"{value:.3f}" for value in r[key])
                    for key in ("regret", "agreement", "entropy")
                ),
                info,
            ]
        )
    stable = (
        [
            [name.replace("_", " "), ", ".join(f"{value:.3f}" for value in pair)]
            for name, pair in result["stability"].items()
        ]
        if several
        else []
    )
    best = []
    for family, metrics in result["best_single_site"].items():
        best += [
            [family, metric, ", ".join(f"{value:.4f} (site {site})" for site, value in seeds)]
            for metric, seeds in metrics.items()
        ]
    parts = [
        (
            "Every run",
            "Mean over seeds, 95 % interval over documents. KL and DeltaCE in nats a token.",
            rows(["run", *METRICS], every),
        ),
        (
            "Gains at equal shares",
            "Per cent by which a router is below random assignment trained from scratch at its own shares, and below an "
            "untrained router whose logits were shifted to these shares: mean over seeds, each seed. By how much shuffling its sites raises it; and "
            "per cent below the single sites' own TopKs (a dictionary each), weighted with its shares.",
            rows(
                [
                    "router",
                    "metric",
                    "below random",
                    "seeds",
                    "below a fixed router",
                    "seeds",
                    "shuffling costs",
                    "below own TopKs",
                ],
                gain,
            ),
        ),
        (
            "By site",
            f"Share of tokens / NormMSE of those tokens / latents active at least {ENOUGH} times there. Last: such latents "
            "over all sites, and on how many sites the activations of one lie (exponential of their entropy).",
            rows(["run", "seed", *sites, "latents", "sites of one"], site_rows),
        ),
        (
            "The routers",
            "By seed. Regret: NormMSE less that of the oracle on the same SAE. Agreement: share of tokens at the oracle's site. "
            "Entropy of the shares: 1 is uniform. Information of the token on its site in nats (in brackets: by chance).",
            rows(["router", "regret", "agreement", "entropy", "information"], learned),
        ),
        (
            "Best single site",
            "Chosen on every other document, measured on the rest; by seed.",
            rows(["family", "metric", "value"], best),
        ),
        (
            "Stability",
            "Largest cosine of each decoder column with another seed's, mean; by pair of seeds.",
            rows(["SAE", "pairs"], stable),
        ),
    ]
    return "\n\n".join(
        f"## {title}\n\n{about}\n\n{table}" for title, about, table in parts if table
    )


def write(cfg: Namespace, paths: dict[int, list[Path]], folder: Path) -> None:
    """routing_results.json, routing_tables.md and the pictures."""
    found = Found(cfg, paths)
    result = collect(found)
    trained = checkpoint.read_recipe(path_of(cfg, "random", found.seeds[0]))
    tokens = int(sum(found.sums[found.seeds[0]]["site_tokens"]["random"]))
    about = {key: trained.get(key) for key in ("tokens", "git_commit", "versions", "threads")} | {
        "eval_tokens": tokens,
        "seeds": found.seeds,
    }
    files.save_json(
        about | {"written_at": checkpoint.environment()["git_commit"]} | result,
        folder / "routing_results.json",
    )
    line = f"{trained['tokens']:,} training tokens, {tokens:,} measured of {len(found.used)} documents, seeds {', '.join(map(str, found.seeds))}."
    text = f"# Routing: the tables\n\n{line} Written by `python -m experiments.routing`.\n\n{tables(result)}\n"
    files.save_text(text, folder / "routing_tables.md")
    routing_pictures.draw(result, folder)
    print(f"{folder}: routing_results.json, routing_tables.md, pictures")
