"""The results of the routing experiment as JSON and tables; its pictures are in routing_pictures.

Intervals are 95 % bootstrap intervals over documents, with the same redraws for every run and seed.
Seeds are too few to be redrawn, so their values are listed beside each other.

O documents, L sites, F latents, R redraws.
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
from experiments.routing_measure import QUANTITIES, load, trained_names
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
REDRAWS = 2000  # of documents
ENOUGH = 10  # activations at a site that make a latent a feature of this site


def bootstrap(n_documents: int, redraws: int = REDRAWS) -> np.ndarray:
    """How often each document is drawn [R+1,O]. The first row, once each, is the measurement."""
    drawn = np.random.default_rng(0).multinomial(
        n_documents, np.full(n_documents, 1 / n_documents), redraws
    )
    return np.concatenate([np.ones((1, n_documents)), drawn]).astype(np.float64)


def ratio(draws: np.ndarray, table: np.ndarray, metric: str) -> np.ndarray:
    """A metric of one run in every draw [R+1], nan if it was not measured. table: [O,Q]"""
    top, bottom = (draws @ table[:, QUANTITIES.index(name)] for name in METRICS[metric])
    return np.divide(top, bottom, out=np.full(len(draws), np.nan), where=bottom > 0)


def interval(values: np.ndarray) -> dict[str, float | None]:
    """The measurement and its interval; all None if nothing was measured."""
    if not np.isfinite(values[0]):
        return {"value": None, "low": None, "high": None}
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


class Measurements:
    """The sums of every seed, and the metrics that follow from them."""

    def __init__(self, cfg: Namespace, paths: dict[int, list[Path]]) -> None:
        self.cfg, self.seeds = cfg, list(paths)
        self.sites = routed_sites(cfg.n_layers, cfg.start_layer, cfg.end_layer, cfg.sites)
        self.sums = {seed: load(parts) for seed, parts in paths.items()}
        tables = next(iter(self.sums.values()))["documents"]
        used = np.flatnonzero(next(iter(tables.values()))[:, 0])
        self.draws, self.used, self.runs = bootstrap(len(used)), used, list(tables)

    def metric(
        self, run: str, metric: str, seed: int, draws: np.ndarray | None = None
    ) -> np.ndarray:
        """The metric of a run in every draw [R+1]."""
        table = self.sums[seed]["documents"][run][self.used]
        return ratio(self.draws if draws is None else draws, table, metric)

    def mean(self, run: str, metric: str) -> dict[str, Any]:
        """Mean over seeds with its interval, and each seed's value."""
        each = [self.metric(run, metric, seed) for seed in self.seeds]
        seeds = [interval(values)["value"] for values in each]
        return interval(np.mean(each, axis=0)) | {"seeds": seeds}

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
        """The mean metric of the single-site TopKs, weighted with the shares of a run.

        It is what a dictionary for each site and random assignment reach.
        """
        shares = self.shares(name, seed)
        return sum(
            share * self.metric(f"topk_{site}", metric, seed)
            for site, share in zip(self.sites, shares, strict=True)
        )

    def best_site(self, family: str, metric: str, seed: int) -> tuple[int, float]:
        """(site, value): chosen on every other document, measured on the others."""
        chosen_on = (np.arange(len(self.used)) % 2 == 0).astype(np.float64)[None]

        def value(site: int, draws: np.ndarray) -> float:
            return float(self.metric(f"{family}_{site}", metric, seed, draws)[0])

        site = min(self.sites, key=lambda site: value(site, chosen_on))
        return site, value(site, 1 - chosen_on)

    def features(self, run: str, seed: int) -> dict[str, Any]:
        """Features of each site, and on how many sites the activations of a latent lie.

        That number is the exponential of their entropy over sites, averaged over latents.
        """
        fired = self.sums[seed]["fired"][run].astype(np.float64)
        alive = fired.sum(0) >= ENOUGH
        shares = torch.from_numpy(fired[:, alive] / fired[:, alive].sum(0))
        spread = np.exp(torch.special.entr(shares).sum(0).numpy())
        return {
            "per_site": (fired >= ENOUGH).sum(1).tolist(),
            "alive": int(alive.sum()),
            "sites_of_a_latent": float(spread.mean()),
        }

    def information(self, run: str, seed: int) -> dict[str, float]:
        """Nats that a token's id gives about its site.

        by_chance: the same for sites that are drawn at random with the same shares.
        """
        counts = self.sums[seed]["site_of_token"][run].astype(np.int64)
        drawn = np.random.default_rng(0).multinomial(counts.sum(1), counts.sum(0) / counts.sum())
        return {
            "nats": router.information(torch.from_numpy(counts)),
            "by_chance": router.information(torch.from_numpy(drawn)),
        }

    def stability(self, name: str) -> list[float]:
        """How similar the decoders of each pair of seeds are.

        The largest cosine of a decoder column with any of the other seed, averaged over latents and
        over both directions.
        """
        units = []
        for seed in self.seeds:
            (decoder,) = checkpoint.load(path_of(self.cfg, name, seed))[0].decoders()
            units.append(F.normalize(decoder.weight.detach(), dim=0))
        pairs = [a.T @ b for a, b in itertools.combinations(units, 2)]
        both_ways = [(pair.max(0).values.mean(), pair.max(1).values.mean()) for pair in pairs]
        return [float((first + second) / 2) for first, second in both_ways]


def collect(measured: Measurements) -> dict[str, Any]:
    """The content of routing_results.json."""
    of_first_seed = measured.sums[measured.seeds[0]]
    routed = [run for run in measured.runs if run in of_first_seed["site_of_token"]]
    runs = {
        run: {metric: measured.mean(run, metric) for metric in METRICS} for run in measured.runs
    }
    best: dict[str, dict[str, Any]] = {"topk": {}, "mlsae": {}}
    for family, metric in itertools.product(best, METRICS):
        sites = [measured.best_site(family, metric, seed) for seed in measured.seeds]
        best[family][metric] = sites
    topk_features = {}
    for name in (f"topk_{site}" for site in measured.sites):
        of_seeds = [measured.features(name, seed) for seed in measured.seeds]
        topk_features[name] = [features["alive"] for features in of_seeds]
    members = trained_names(measured.sites)
    return {
        "sites": measured.sites,
        "seeds": measured.seeds,
        "documents": len(measured.used),
        "redraws": REDRAWS,
        "runs": runs,
        "gains": {name: gains_of(measured, name) for name in ROUTERS},
        "routers": {name: router_facts(measured, name) for name in ROUTERS},
        "per_site": {run: per_site(measured, run) for run in routed},
        "best_single_site": best,
        "stability": {name: measured.stability(name) for name in members},
        "topk_features": topk_features,
    }


def gains_of(measured: Measurements, name: str) -> dict[str, Any]:
    """By metric: how far a router is below its controls, as shares of the control's value."""
    gains: dict[str, Any] = {}
    for metric in METRICS:
        random = measured.gain(name, f"{name}_shares", metric)
        permuted = [-values for values in measured.gain(f"{name}_permuted", name, metric)]
        own_topk = [
            1 - measured.metric(name, metric, seed) / measured.own_topk(name, metric, seed)
            for seed in measured.seeds
        ]
        gains[metric] = {
            "mean": interval(np.mean(random, axis=0)),
            "seeds": [interval(values) for values in random],
            "permuting_costs": interval(np.mean(permuted, axis=0)),
            "against_each_sites_own_topk": interval(np.mean(own_topk, axis=0)),
        }
        if name in LEARNED:
            fixed = measured.gain(name, f"{name}_fixed", metric)
            gains[metric]["against_fixed"] = interval(np.mean(fixed, axis=0))
            gains[metric]["against_fixed_seeds"] = [interval(values) for values in fixed]
    return gains


def router_facts(measured: Measurements, name: str) -> dict[str, Any]:
    """Regret and agreement beside the oracle, information and entropy; one value a seed."""
    regret, agreement, information, entropy = [], [], [], []
    for seed in measured.seeds:
        sums = measured.sums[seed]
        oracle = measured.metric(f"{name}_oracle", "NormMSE", seed)[0]
        regret.append(float(measured.metric(name, "NormMSE", seed)[0] - oracle))
        agreement.append(float(sums["agreed"][name] / sums["site_tokens"][name].sum()))
        information.append(measured.information(name, seed))
        shares = torch.from_numpy(measured.shares(name, seed))
        entropy.append(float(router.entropy(shares)))
    return {
        "regret": regret,
        "agreement": agreement,
        "information": information,
        "entropy": entropy,
    }


def per_site(measured: Measurements, run: str) -> dict[str, Any]:
    """Shares, NormMSE (None where no token is) and features of each site; one list a seed."""
    errors = []
    for seed in measured.seeds:
        sums = measured.sums[seed]
        pairs = zip(sums["site_errors"][run], sums["site_tokens"][run], strict=True)
        errors.append([float(error / tokens) if tokens else None for error, tokens in pairs])
    return {
        "shares": [measured.shares(run, seed).tolist() for seed in measured.seeds],
        "NormMSE": errors,
        "features": [measured.features(run, seed) for seed in measured.seeds],
    }


# ----------------------------------------------------------------------------------------- as text


def number(figure: dict[str, Any], percent: bool = False) -> str:
    """A value with its interval, as a table has it."""
    if figure["value"] is None:
        return "-"
    value, low, high = (figure[key] * (100 if percent else 1) for key in ("value", "low", "high"))
    digits = 1 if percent else 3
    if not percent and abs(value) < 0.1:
        digits = 4
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def without_intervals(figures: list[dict[str, Any]]) -> str:
    """Per cent of each seed."""
    return ", ".join(number(figure, True).split()[0] for figure in figures)


def listed(values: list[float]) -> str:
    """One value a seed."""
    return ", ".join(f"{value:.3f}" for value in values)


def rows(head: list[Any], body: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def runs_table(result: dict[str, Any]) -> str:
    runs = result["runs"]
    order = sorted(runs, key=lambda run: runs[run]["NormMSE"]["value"])
    body = [
        [run.replace("_", " "), *(number(runs[run][metric]) for metric in METRICS)] for run in order
    ]
    return rows(["run", *METRICS], body)


def gains_table(result: dict[str, Any]) -> str:
    body = []
    for name, metric in itertools.product(ROUTERS, METRICS):
        gain = result["gains"][name][metric]
        fixed = ["-", "-"]
        if name in LEARNED:
            seeds = without_intervals(gain["against_fixed_seeds"])
            fixed = [number(gain["against_fixed"], True), seeds]
        random = [number(gain["mean"], True), without_intervals(gain["seeds"])]
        permuting = number(gain["permuting_costs"], True)
        own_topk = number(gain["against_each_sites_own_topk"], True)
        body.append([name, metric, *random, *fixed, permuting, own_topk])
    head = ["router", "metric", "below random", "seeds", "below a fixed router", "seeds"]
    return rows([*head, "shuffling costs", "below own TopKs"], body)


def sites_table(result: dict[str, Any]) -> str:
    body = []
    for name, run in result["per_site"].items():
        if name.endswith(("_permuted", "_oracle")):
            continue
        of_seeds = zip(result["seeds"], run["shares"], run["NormMSE"], run["features"], strict=True)
        for seed, shares, errors, features in of_seeds:
            cells = [
                f"{share:.2f} / {error:.3f} / {n_features}" if share > 0 else "0"
                for share, error, n_features in zip(
                    shares, errors, features["per_site"], strict=True
                )
            ]
            spread = f"{features['sites_of_a_latent']:.2f}"
            body.append([name.replace("_", " "), seed, *cells, features["alive"], spread])
    return rows(["run", "seed", *result["sites"], "latents", "sites of one"], body)


def routers_table(result: dict[str, Any]) -> str:
    body = []
    for name, facts in result["routers"].items():
        information = ", ".join(
            f"{seed['nats']:.2f} ({seed['by_chance']:.2f})" for seed in facts["information"]
        )
        cells = [listed(facts[key]) for key in ("regret", "agreement", "entropy")]
        body.append([name, *cells, information])
    return rows(["router", "regret", "agreement", "entropy", "information"], body)


def best_table(result: dict[str, Any]) -> str:
    body = []
    for family, metrics in result["best_single_site"].items():
        for metric, seeds in metrics.items():
            cells = ", ".join(f"{value:.4f} (site {site})" for site, value in seeds)
            body.append([family, metric, cells])
    return rows(["family", "metric", "value"], body)


def stability_table(result: dict[str, Any]) -> str:
    """Empty with one seed only."""
    if len(result["seeds"]) == 1:
        return rows(["SAE", "pairs"], [])
    body = [[name.replace("_", " "), listed(pairs)] for name, pairs in result["stability"].items()]
    return rows(["SAE", "pairs"], body)


def tables(result: dict[str, Any]) -> str:
    """All tables in Markdown, each with a title and an explanation."""
    parts = [
        (
            "Every run",
            "Mean over seeds, 95 % interval over documents. KL and DeltaCE in nats a token.",
            runs_table(result),
        ),
        (
            "Gains at equal shares",
            "Per cent by which a router is below random assignment trained from scratch at its "
            "own shares, and below an untrained router whose logits were shifted to these shares: "
            "mean over seeds, then each seed. By how much shuffling its sites raises the metric. "
            "Per cent below the TopKs of the single sites (a dictionary each), weighted with its "
            "shares.",
            gains_table(result),
        ),
        (
            "By site",
            "Share of tokens / NormMSE of those tokens / latents active at least "
            f"{ENOUGH} times at the site. Last: such latents over all sites, and on how many "
            "sites the activations of one lie (exponential of their entropy).",
            sites_table(result),
        ),
        (
            "The routers",
            "By seed. Regret: NormMSE less that of the oracle on the same SAE. Agreement: share "
            "of tokens at the oracle's site. Entropy of the shares: 1 is uniform. Information of "
            "the token on its site in nats (in brackets: by chance).",
            routers_table(result),
        ),
        (
            "Best single site",
            "Chosen on every other document, measured on the rest; by seed.",
            best_table(result),
        ),
        (
            "Stability",
            "Largest cosine of each decoder column with another seed's, mean; by pair of seeds.",
            stability_table(result),
        ),
    ]
    return "\n\n".join(f"## {title}\n\n{about}\n\n{table}" for title, about, table in parts)


def write(cfg: Namespace, paths: dict[int, list[Path]], folder: Path) -> None:
    """Write routing_results.json, routing_tables.md and the pictures."""
    measured = Measurements(cfg, paths)
    result = collect(measured)
    first = measured.seeds[0]
    recipe = checkpoint.read_recipe(path_of(cfg, "random", first))
    tokens = int(sum(measured.sums[first]["site_tokens"]["random"]))
    about = {key: recipe.get(key) for key in ("tokens", "git_commit", "versions", "threads")}
    about |= {"eval_tokens": tokens, "seeds": measured.seeds}
    about["written_at"] = checkpoint.environment()["git_commit"]
    files.save_json(about | result, folder / "routing_results.json")
    seeds = ", ".join(map(str, measured.seeds))
    text = (
        "# Routing: the tables\n\n"
        f"{recipe['tokens']:,} training tokens, {tokens:,} measured of {len(measured.used)} "
        f"documents, seeds {seeds}. Written by `python -m experiments.routing`.\n\n"
        f"{tables(result)}\n"
    )
    files.save_text(text, folder / "routing_tables.md")
    routing_pictures.draw(result, folder)
    print(f"{folder}: routing_results.json, routing_tables.md, pictures")
