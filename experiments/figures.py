"""The paper's figures, drawn from their JSON alone: one function a figure, each `draw(data, caption, path)`.

Colours are Okabe and Ito's, told apart by colour-blind readers too; a model has one colour and marker, its variants differ in the line.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.plots import pyplot
from src.zoo import ZOO

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#882255",
    "#8A8A8A",
)
MARKERS, LINES = "osD^vPX<>", ("-", "--", ":", "-.")
DEFAULT_THRESHOLD, PAPER_THRESHOLD = 10, 15
FEWEST = 5  # labels, for their mean score to be drawn
SCORE = f"mean score of the labels, 1 to 5 (of {FEWEST} or more)"
FAR = 2.5  # times the sparsest or densest L0 asked for: an SAE beyond missed its target


def looks(labels: list[str]) -> dict[str, dict[str, Any]]:
    """{label: how it is drawn}, a model's variants side by side. A label is the model's name, then perhaps its variant: "RouteSAE, random sites"."""
    model = {label: label.replace(",", " ").split()[0] for label in labels}
    found: dict[str, dict[str, Any]] = {}
    for label in sorted(model, key=lambda label: (list(ZOO).index(model[label]), label)):
        base, variant = (
            list(ZOO).index(model[label]),
            sum(model[label] == model[other] for other in found),
        )
        style = {
            "color": COLOURS[base % len(COLOURS)],
            "marker": MARKERS[base % len(MARKERS)],
            "linestyle": LINES[variant % len(LINES)],
        }
        found[label] = style | {
            "markersize": 5,
            "linewidth": 1.5,
            "markerfacecolor": "white" if variant else style["color"],
        }
    return found


def _sheet(columns: int, width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    return pyplot().subplots(
        rows, columns, figsize=(width, height), constrained_layout=True, squeeze=False
    )


def _finish(figure: Any, caption: str, path: Path) -> None:
    """Puts the caption below and writes the PNG."""
    wide = int(figure.get_size_inches()[0] * 19)
    figure.supxlabel(
        "\n".join(textwrap.fill(line, wide) for line in caption.split("\n")),
        x=0.01,
        ha="left",
        fontsize=7.5,
        color="#333333",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot().close(figure)


def _number_axis(axis: Any, values: list[float]) -> None:
    """A log axis with ticks at round numbers, written out."""
    low, high = min(values), max(values)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [
        step * 10.0**power
        for power in range(-6, 8)
        for step in steps
        if 0.8 * low <= step * 10.0**power <= 1.25 * high
    ]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _points(
    axis: Any,
    points: list[dict[str, Any]],
    name: str,
    styles: dict[str, dict[str, Any]],
    asked: list[float],
) -> list[float]:
    """One line a label through its points of the first seed; other seeds as crosses. Returns the values drawn.

    Points far from the L0 asked for are left out, and the legend says where they are.
    """
    drawn = []
    seeds = list(dict.fromkeys(point["seed"] for point in points))
    for label, style in styles.items():
        for seed in seeds:
            every = sorted(
                (p["L0"], p[name])
                for p in points
                if p["label"] == label and p["seed"] == seed and p.get(name) is not None
            )
            mine = [(l0, value) for l0, value in every if asked[0] / FAR <= l0 <= asked[-1] * FAR]
            away = [f"{l0:.3g}" for l0, value in every if (l0, value) not in mine]
            drawn += [value for _, value in mine]
            if seed == seeds[0] and every:
                note = f" (outside: L0 {', '.join(away)})" if away else ""
                axis.plot(
                    [l0 for l0, _ in mine],
                    [value for _, value in mine],
                    **style,
                    label=label + note,
                )
            elif mine:
                axis.plot(
                    *zip(*mine, strict=True),
                    color=style["color"],
                    marker="x",
                    linestyle="",
                    markersize=6,
                )
    axis.set(xscale="log", xlabel="L0, active latents a token")
    ticks = [asked[0] / 2, *asked, 2 * asked[-1]]
    axis.set_xlim(asked[0] / FAR, asked[-1] * FAR)
    axis.xaxis.set_ticks(ticks, [f"{k:g}" for k in ticks])
    axis.xaxis.set_ticks([], minor=True)
    axis.grid(alpha=0.3)
    return drawn


def _legend(figure: Any, axis: Any, seeds: list[int] | None = None) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if seeds and len(seeds) > 1:
        handles.append(pyplot().Line2D([], [], color="#333333", marker="x", linestyle=""))
        labels.append("the same, another seed")
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def frontier(name: str, what: str) -> Callable[[dict[str, Any], str, Path], None]:
    """Draws one measure against L0, on log axes."""

    def draw(data: dict[str, Any], caption: str, path: Path) -> None:
        points = data["points"]
        figure, ((axis,),) = _sheet(1, 9, 5.6)
        values = _points(
            axis,
            points,
            name,
            looks([point["label"] for point in points]),
            sorted({point["asked"] for point in points}),
        )
        axis.set(yscale="log", ylabel=what, title=data["title"])
        _number_axis(axis.yaxis, values)
        _legend(figure, axis, sorted({point["seed"] for point in points}))
        _finish(figure, caption, path)

    return draw


def thresholds(data: dict[str, Any], caption: str, path: Path) -> None:
    """Features left above a threshold, and the mean score of their labels."""
    figure, ((count, score),) = _sheet(2, 11, 5)
    for label, style in looks(list(data["curves"])).items():
        curve = data["curves"][label]
        label = f"{label} (L0 {curve['L0']:.3g})"
        shown = [(t, n) for t, n in zip(data["thresholds"], curve["features"], strict=True) if n]
        if shown:
            count.plot(*zip(*shown, strict=True), label=label, **(style | {"marker": ""}))
        else:
            count.plot([], [], label=label, **(style | {"marker": ""}))
        scored = [
            (float(t), s["score"]) for t, s in curve["scores"].items() if s["scored"] >= FEWEST
        ]
        if scored:
            score.plot(*zip(*scored, strict=True), **style)
    count.set(yscale="log", ylabel="latents with 4 or more contexts above it", title="Features")
    most = max((n for curve in data["curves"].values() for n in curve["features"]), default=1)
    _number_axis(count.yaxis, [1, max(most, 2)])
    score.set_xticks([float(t) for t in next(iter(data["curves"].values()))["scores"]])
    score.set(ylabel=SCORE, title=f"Mean score, {data['scored_by']}")
    for axis in (count, score):
        axis.set(xlabel="activation threshold, in strength x sqrt(2048 / hidden size)")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        for at, said in ((DEFAULT_THRESHOLD, "default"), (PAPER_THRESHOLD, "paper")):
            axis.axvline(at, color="#999999", linewidth=0.8, zorder=0)
            axis.annotate(
                said,
                (at, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, -9),
                textcoords="offset points",
                fontsize=7,
                color="#555555",
            )
    _legend(figure, count)
    _finish(figure, caption, path)


def features(data: dict[str, Any], caption: str, path: Path) -> None:
    """Latents with enough contexts against L0; how many of them a label was found for."""
    points = data["points"]
    figure, ((every, labelled),) = _sheet(2, 11, 5)
    styles, asked = (
        looks([point["label"] for point in points]),
        sorted({point["asked"] for point in points}),
    )
    counted = f"Latents with {data['lines']} or more contexts above {data['threshold']} sqrt(hidden / 2048)"
    titles = counted, f"of them scored 3 or more, {data['scored_by']}"
    for axis, name, title in zip((every, labelled), ("features", "labelled"), titles, strict=True):
        _points(axis, points, name, styles, asked)
        axis.set(ylabel="latents", ylim=(0, None))
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_title(title, fontsize=10)
    _legend(figure, every)
    _finish(figure, caption, path)


def scores(data: dict[str, Any], caption: str, path: Path) -> None:
    """Mean score of the labels against L0."""
    points = [point for point in data["points"] if point["scored"] >= FEWEST]
    figure, ((axis,),) = _sheet(1, 8.5, 5)
    _points(
        axis,
        points,
        "score",
        looks([point["label"] for point in points]),
        sorted({point["asked"] for point in data["points"]}),
    )
    axis.set(ylabel=SCORE)
    axis.set_title(f"{data['title']}, {data['scored_by']}", fontsize=10)
    _legend(figure, axis)
    _finish(figure, caption, path)


def routing(data: dict[str, Any], caption: str, path: Path) -> None:
    """Above: shares of the sites in training, a panel a seed. Below: on held-out text, beside the same router untrained."""
    sites, training, inference = data["sites"], data["training"], data["inference"]
    seeds = list(dict.fromkeys(run["seed"] for run in training))
    figure, axes = _sheet(len(seeds), max(8, 3.7 * len(seeds)), 7.2, rows=2)
    colours = pyplot().get_cmap("viridis")([i / max(1, len(sites) - 1) for i in range(len(sites))])
    kinds = list(dict.fromkeys(run["label"] for run in inference))
    for column, seed in enumerate(seeds):
        above, below = axes[0][column], axes[1][column]
        run = next(run for run in training if run["seed"] == seed)
        names = [f"site {site}" for site in sites]
        above.stackplot(
            [t / 1000 for t in run["tokens"]],
            *zip(*run["share"], strict=True),
            colors=colours,
            labels=names,
        )
        above.set(title=f"in training, seed {seed}", xlabel="tokens, thousands", ylim=(0, 1))
        above.margins(x=0)
        width = 0.8 / len(kinds)
        for i, kind in enumerate(kinds):
            mine = next(
                (run for run in inference if run["seed"] == seed and run["label"] == kind), None
            )
            if mine is not None:
                places = [site + width * (i + 0.5) - 0.4 for site in sites]
                style = {
                    "color": (COLOURS[1], "#BBBBBB", COLOURS[0])[i % 3],
                    "edgecolor": "#333333",
                    "linewidth": 0.4,
                }
                below.bar(places, mine["share"], width, label=kind, **style)
                below.plot(
                    places,
                    mine["mean_p"],
                    "k.",
                    markersize=4,
                    label="" if i else "mean routing weight p",
                )
        below.axhline(
            1 / len(sites), color="#333333", linewidth=0.8, linestyle=":", label="uniform"
        )
        below.set(title=f"held-out text, seed {seed}", xlabel="site", ylim=(0, 1))
        below.set_xticks(sites)
    axes[0][0].set_ylabel("share of tokens routed there")
    axes[1][0].set_ylabel("share of tokens routed there")
    for row, reverse in ((0, True), (1, False)):
        handles, labels = axes[row][0].get_legend_handles_labels()
        order = slice(None, None, -1) if reverse else slice(None)
        axes[row][-1].legend(
            handles[order],
            labels[order],
            loc="upper left",
            bbox_to_anchor=(1.02, 1),
            fontsize=8,
            frameon=False,
        )
    _finish(figure, caption, path)


PAPER: dict[str, Callable[[dict[str, Any], str, Path], None]] = {
    "fig4_kl": frontier("KLDiv", "KL(clean || patched), nats a token"),
    "fig5_thresholds": thresholds,
    "fig6_features": features,
    "fig8_scores": scores,
    "fig9_routing": routing,
    "fig12_normmse": frontier("NormMSE", "NormMSE, share of squared norm"),
}
