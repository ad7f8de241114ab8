"""The table, the numbers and the pictures of the routing experiment on a real language model.

Intervals are 95 % intervals. Those of a value are over documents (bootstrap, the same redraws for
every run and seed). With several seeds a second one is over the seeds, by Student's t.

O documents, Q quantities, R redraws.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.routing_measure import QUANTITIES, load
from experiments.routing_report import bootstrap, interval, number, ratio, rows
from src import checkpoint, files, names, plot_style
from src.plots import draw_sites, pyplot

if TYPE_CHECKING:
    from experiments.real_routing import Experiment

SHOWN = ("NormMSE", "KL", "KL / mean ablation")
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 %, by number of seeds
FOLDERS = {"choose": "chosen", "measure": "measured"}  # of the measurements of a part
BEST = "TopK, best single site"
CONTROLS = {
    "route": "RouteSAE",
    "route_permuted": "RouteSAE, its sites dealt to other tokens",
    "route_oracle": "RouteSAE, best site of each token",
    "random": "random sites, evenly",
    "shares": "random sites, its shares",
    "untrained": "untrained router, its shares",
}
WAYS = {
    "router": "by its router",
    "best": "best site of each token",
    "random": "random, its shares",
}
FROZEN_RUNS = {
    "frozen_decoder": "frozen decoder",
    "frozen_soft_decoder": "soft-frozen decoder",
    "frozen_encoder": "frozen encoder",
}
LEVELS = {  # drawn as level lines across the sites
    "route": "RouteSAE",
    "shares": "random sites",
    "small_by_router": "TopKs, equal total",
    "full_by_router": "TopKs, full size",
}
HEIGHT = 4.2  # inches


class Row(NamedTuple):
    """One line of the table: the mean over some runs."""

    label: str
    runs: list[str]


class Measured:
    """The sums of every seed, on held-out text and on the text that chose the site."""

    def __init__(self, experiments: list[Experiment]) -> None:
        first = experiments[0]
        self.sites = first.sites
        self.seeds = [experiment.seed for experiment in experiments]
        self.sums = {e.seed: _documents(e, "measure") for e in experiments}
        self.chosen = {e.seed: _documents(e, "choose") for e in experiments}
        self.arms = {}
        for experiment in experiments:
            path = experiment.folder / f"arms_seed{experiment.seed}.json"
            self.arms |= files.load_json(path) if path.exists() else {}
        if not all(self.sums.values()):
            raise ValueError("not every seed was measured; the part measure comes first")
        tables = next(iter(self.sums.values()))
        self.used = np.flatnonzero(next(iter(tables.values()))[:, 0])
        self.draws = bootstrap(len(self.used))

    def has(self, run: str) -> bool:
        return all(run in tables for tables in self.sums.values())

    def values(self, row: Row, metric: str, seed: int) -> np.ndarray:
        """Return the metric in every draw of documents, the mean over the runs of a row. [R+1]"""
        runs = row.runs
        if row.label == BEST:
            runs = [f"topk_{self.best_site(metric, seed)}"]
        tables = [self.sums[seed][run][self.used] for run in runs]
        return np.mean([ratio(self.draws, table, metric) for table in tables], axis=0)

    def best_site(self, metric: str, seed: int) -> int:
        """Return the site at which TopK is best on the text that chooses it."""
        tables = self.chosen[seed]

        def value(site: int) -> float:
            table = tables[f"topk_{site}"]
            return float(ratio(np.ones((1, len(table))), table, metric)[0])

        return min(self.sites, key=value)


def _documents(experiment: Experiment, part: str) -> dict[str, np.ndarray]:
    """Return {run: sums by document [O,Q]} of what was measured of a seed."""
    folder = experiment.folder / FOLDERS[part]
    paths = sorted(folder.glob(f"seed{experiment.seed}_rows*.npz"))
    if not paths:
        return {}
    return load(paths)["documents"]


def table_rows(measured: Measured) -> list[Row]:
    """Return the lines of the table whose runs were measured."""
    sites = measured.sites
    topks = [f"topk_{site}" for site in sites]
    lines = [Row(label, [run]) for run, label in CONTROLS.items()]
    for name, run in (("small", "small_by_best"), ("full", "full_by_best")):
        latents = measured.arms.get(run, {}).get("latents")
        about = f"{len(sites)} TopKs, {latents:,} latents in all"
        lines += [Row(f"{about}, {how}", [f"{name}_by_{way}"]) for way, how in WAYS.items()]
    if all(topk in tables for tables in measured.chosen.values() for topk in topks):
        lines.append(Row(BEST, topks))
    lines.append(Row("TopK, mean of all sites", topks))
    fourth = sites[::4]
    for name in ("TopK", "MLSAE", "Crosscoder"):
        runs = [f"{name.lower()}_{site}" for site in fourth]
        lines.append(Row(f"{name}, mean of {names.sites(fourth)}", runs))
    lines += [Row(f"TopK, site {site}", [f"topk_{site}"]) for site in sites]
    middle = sites[(len(sites) - 1) // 2]
    lines += [Row(f"TopK, site {middle}, {how}", [run]) for run, how in FROZEN_RUNS.items()]
    return [line for line in lines if all(map(measured.has, line.runs))]


def seed_interval(values: list[float | None]) -> list[float] | None:
    """Return the interval of the mean over seeds by Student's t, None for one seed."""
    quantile = T_QUANTILE.get(len(values))
    if quantile is None or None in values:
        return None
    half = quantile * np.std(values, ddof=1) / len(values) ** 0.5
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def figure_of(each: list[np.ndarray]) -> dict[str, Any]:
    """Return a mean over seeds with its intervals over documents and seeds, and each seed."""
    seeds = [float(values[0]) if np.isfinite(values[0]) else None for values in each]
    return interval(np.mean(each, axis=0)) | {"seeds": seeds, "over_seeds": seed_interval(seeds)}


def collect(measured: Measured) -> list[dict[str, Any]]:
    """Return the lines with their figures, and by how much RouteSAE is below each."""
    lines = []
    route = Row("RouteSAE", ["route"])
    for row in table_rows(measured):
        line: dict[str, Any] = {"label": row.label, "runs": row.runs, "values": {}, "below": {}}
        line |= measured.arms.get(row.runs[0].rsplit("_", 1)[0], {})
        line |= measured.arms.get(row.runs[0], {})
        if row.label == BEST:
            pairs = itertools.product(SHOWN, measured.seeds)
            line["chosen"] = [[m, seed, measured.best_site(m, seed)] for m, seed in pairs]
        for metric in SHOWN:
            each = [measured.values(row, metric, seed) for seed in measured.seeds]
            line["values"][metric] = figure_of(each)
            own = [measured.values(route, metric, seed) for seed in measured.seeds]
            gains = [1 - a / b for a, b in zip(own, each, strict=True)]
            line["below"][metric] = figure_of(gains)
        lines.append(line)
    return lines


# ------------------------------------------------------------------------------ table, pictures


def below(figure: dict[str, Any]) -> str:
    """Return per cent with the interval over documents and, in braces, over seeds."""
    text = number(figure, percent=True)
    if figure["over_seeds"]:
        low, high = (100 * value for value in figure["over_seeds"])
        text += f" {{{low:.1f}, {high:.1f}}}"
    return text


def table(lines: list[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    body = []
    for line in lines:
        values = [number(line["values"][metric]) for metric in SHOWN]
        gains = [below(line["below"][metric]) for metric in SHOWN]
        cells = [f"{line['latents']:,}" if "latents" in line else "-", line.get("encoders", "-")]
        body.append([line["label"], *cells, *values, *gains])
    heads = [f"{metric}: RouteSAE below, %" for metric in SHOWN]
    return rows(["SAE", "latents", "encoders a token", *SHOWN, *heads], body)


def _is_one_topk(line: dict[str, Any]) -> bool:
    return len(line["runs"]) == 1 and line["runs"][0].startswith("topk_")


def draw_gains(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw by how much RouteSAE is below each line; small points are seeds.

    A single site is in the other picture.
    """
    lines = [line for line in lines if line["label"] != "RouteSAE" and not _is_one_topk(line)]
    height = 1.2 + 0.3 * len(lines)
    figure, axes = pyplot().subplots(1, len(SHOWN), figsize=(13, height), sharey=True)
    for axis, metric in zip(axes, SHOWN, strict=True):
        for place, line in enumerate(lines):
            gain = line["below"][metric]
            if gain["value"] is None:
                continue
            axis.plot([100 * gain["low"], 100 * gain["high"]], [place] * 2, color=plot_style.GREY)
            seeds = [100 * value for value in gain["seeds"] if value is not None]
            axis.plot(seeds, [place] * len(seeds), ".", color=plot_style.GREY)
            axis.plot(100 * gain["value"], place, "D", color=plot_style.colour("RouteSAE"))
        axis.axvline(0, color=plot_style.DARK, lw=0.8)
        axis.set(title=metric, xlabel="RouteSAE below, %", ylim=(len(lines) - 0.5, -0.5))
    axes[0].set_yticks(range(len(lines)), [line["label"] for line in lines])
    plot_style.save(figure, path)


def draw_by_site(measured: Measured, lines: list[dict[str, Any]], path: Path) -> None:
    """Draw TopK over the sites, and what uses all of them as level lines."""
    figure, axes = pyplot().subplots(1, 2, figsize=(12, HEIGHT))
    for axis, metric in zip(axes, ("NormMSE", "KL"), strict=True):
        results = []
        for site in measured.sites:
            row = Row("TopK", [f"topk_{site}"])
            if measured.has(row.runs[0]):
                each = [measured.values(row, metric, seed)[0] for seed in measured.seeds]
                value = float(np.mean(each))
                results.append({"title": "TopK", "model": "TopK", "sites": [site], metric: value})
        for line in lines:
            if line["runs"][0] in LEVELS:
                name = LEVELS[line["runs"][0]]
                value = line["values"][metric]["value"]
                routed = {"title": name, "model": name, "sites": measured.sites, metric: value}
                results.append(routed)
        results = [result for result in results if np.isfinite(result[metric] or np.nan)]
        if results:
            draw_sites(axis, results, metric, metric, HEIGHT)
    plot_style.save(figure, path)


def write(experiments: list[Experiment], folder: Path) -> None:
    """Write real_routing.json, real_routing.md and two pictures."""
    measured = Measured(experiments)
    if not measured.has("route"):
        raise ValueError("no RouteSAE was measured for every seed; the part routed comes first")
    lines = collect(measured)
    table_of_first = measured.sums[measured.seeds[0]]["route"]
    tokens, predictions = (
        int(table_of_first[:, QUANTITIES.index(name)].sum()) for name in ("tokens", "predictions")
    )
    options = experiments[0].options
    about = {
        "trained_tokens": options.tokens,
        "measured_tokens": tokens,
        "predictions": predictions,
        "documents": len(measured.used),
        "seeds": measured.seeds,
        "sites": measured.sites,
    }
    result = about | {"lines": lines} | checkpoint.environment()
    files.save_json(result, folder / "real_routing.json")
    text = (
        "# Routing on a real language model: the table\n\n"
        f"{options.tokens:,} training tokens, k {options.k}, {names.sites(measured.sites)}, "
        f"{'seed' if len(measured.seeds) == 1 else 'seeds'} "
        f"{', '.join(map(str, measured.seeds))}; {tokens:,} held-out tokens of "
        f"{len(measured.used)} documents, KL of {predictions:,} predictions, in nats. In brackets "
        "the 95 % interval over documents, in braces that over seeds. KL / mean ablation: relative "
        "to the KL when the same tokens have the mean state of the site. Latents: of each SAE, of "
        "a union in all. Written by `python -m experiments.real_routing`.\n\n"
        f"{table(lines)}\n"
    )
    files.save_text(text, folder / "real_routing.md")
    draw_gains(lines, folder / "real_routing_gains.png")
    draw_by_site(measured, lines, folder / "real_routing_sites.png")
    print(f"{folder}: real_routing.md, real_routing.json, real_routing_gains.png, _sites.png")
