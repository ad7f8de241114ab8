"""The paper's figures, drawn from their JSON alone: one `draw(data, caption, path)` for each.

`python -m experiments.figures docs/figures` draws those of a folder again.

A model has the colour of all pictures (src.plot_style), a site one marker; variants differ in the
line.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import claims
from src import plot_style
from src.config import small_parser
from src.files import load_json
from src.plot_style import DARK, GREY, L0_LABEL, pyplot

Data = dict[str, Any]  # the JSON of one figure
Styles = dict[str, dict[str, Any]]  # {label: options of a line}
Draw = Callable[[Data, str, Path], None]

LIGHT_GREY = "#BBBBBB"
LINES = ("-", "--", ":", "-.")
THRESHOLDS = {"default": 10, "paper": 15}
MIN_SCORED = 5  # labels that a mean score needs, to be drawn
SCORE_LABEL = f"mean score of the labels, 1 to 5 (of {MIN_SCORED} or more)"
# An SAE whose L0 is this many times below the smallest or above the largest L0 that was asked for
# missed its target and is left out of the line.
L0_MARGIN = 2.5


def line_styles(sites: dict[str, tuple[int, ...]]) -> Styles:
    """Return {label: style} from {label: sites of the SAE}, with a model's variants side by side.

    A label is the model's name, then perhaps its variant: "RouteSAE, random sites".
    """
    markers = plot_style.site_markers(sites.values())
    models = {label: label.replace(",", " ").split()[0] for label in sites}
    order = list(plot_style.COLOURS)
    rank = {m: order.index(m) if m in order else len(order) for m in models.values()}
    styles: Styles = {}
    for label in sorted(sites, key=lambda label: (rank[models[label]], models[label], label)):
        variant = sum(models[label] == models[other] for other in styles)
        colour = plot_style.colour(models[label])
        styles[label] = {
            "color": colour,
            "marker": markers[sites[label]] if sites[label] else "o",
            "linestyle": LINES[variant % len(LINES)],
            "markersize": 5 if len(sites[label]) < 2 else 9,
            "linewidth": 1.5,
            "markerfacecolor": "white" if variant else colour,
        }
    return styles


def _subplots(columns: int, width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    return pyplot().subplots(
        rows, columns, figsize=(width, height), constrained_layout=True, squeeze=False
    )


def _save(figure: Any, caption: str, path: Path) -> None:
    """Put the caption below the figure and write the PNG and the PDF."""
    line_length = int(figure.get_size_inches()[0] * 17)
    lines = [textwrap.fill(line, line_length) for line in caption.split("\n")]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color=DARK)
    plot_style.save(figure, path)


def _set_round_ticks(axis: Any, values: list[float]) -> None:
    """Give a log axis ticks at round numbers, written out."""
    low, high = min(values), max(values)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    numbers = [step * 10.0**power for power in range(-6, 8) for step in steps]
    ticks = [number for number in numbers if 0.8 * low <= number <= 1.25 * high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _plot_against_l0(
    axis: Any, points: list[Data], measure: str, styles: Styles, asked: list[float]
) -> list[float]:
    """Draw a line for each label through its points of the first seed; other seeds as crosses.

    asked: the L0 or k that was asked for. Points far from it are left out, and the legend says
    where they are. Returns the values drawn.
    """
    drawn = []
    seeds = list(dict.fromkeys(point["seed"] for point in points))
    for label, style in styles.items():
        inside, outside = _points_of(points, label, seeds[0], measure, asked)
        drawn += [value for _, value in inside]
        if inside or outside:
            away = ", ".join(f"{l0:.3g}" for l0, _ in outside)
            note = f" (outside: L0 {away})" if outside else ""
            axis.plot(*_columns(inside), **style, label=label + note)
        for seed in seeds[1:]:
            inside, _ = _points_of(points, label, seed, measure, asked)
            drawn += [value for _, value in inside]
            if inside:
                cross = {"marker": "x", "linestyle": "", "markersize": 6}
                axis.plot(*_columns(inside), color=style["color"], **cross)
    _set_l0_axis(axis, asked)
    return drawn


def _points_of(
    points: list[Data], label: str, seed: int, measure: str, asked: list[float]
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The (L0, value) near the L0 asked for, and those far from it, by L0."""
    pairs = sorted(
        (point["L0"], point[measure])
        for point in points
        if point["label"] == label and point["seed"] == seed and point.get(measure) is not None
    )
    low, high = asked[0] / L0_MARGIN, asked[-1] * L0_MARGIN
    inside = [pair for pair in pairs if low <= pair[0] <= high]
    return inside, [pair for pair in pairs if pair not in inside]


def _columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _set_l0_axis(axis: Any, asked: list[float]) -> None:
    axis.set(xscale="log", xlabel=L0_LABEL)
    axis.set_xlim(asked[0] / L0_MARGIN, asked[-1] * L0_MARGIN)
    ticks = [asked[0] / 2, *asked, 2 * asked[-1]]
    axis.xaxis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_ticks([], minor=True)
    axis.grid(alpha=0.3)


def _legend(figure: Any, axis: Any, n_seeds: int = 1) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if n_seeds > 1:
        handles.append(pyplot().Line2D([], [], color=DARK, marker="x", linestyle=""))
        labels.append("the same, another seed")
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def _styles_of(points: list[Data]) -> Styles:
    return line_styles({point["label"]: tuple(point.get("sites", ())) for point in points})


def _distinct(points: list[Data], key: str) -> list[Any]:
    return sorted({point[key] for point in points})


# ------------------------------------------------------------------------------------------ figures


def frontier(measure: str, label: str) -> Draw:
    """Return the function that draws one measure against L0, on log axes."""

    def draw(data: Data, caption: str, path: Path) -> None:
        points = data["points"]
        figure, ((axis,),) = _subplots(1, 9, 5.6)
        asked = _distinct(points, "asked")
        values = _plot_against_l0(axis, points, measure, _styles_of(points), asked)
        axis.set(yscale="log", ylabel=label, title=data["title"])
        _set_round_ticks(axis.yaxis, values)
        _legend(figure, axis, len(_distinct(points, "seed")))
        _save(figure, caption, path)

    return draw


def thresholds(data: Data, caption: str, path: Path) -> None:
    """Draw the features left above a threshold, and the mean score of their labels."""
    figure, ((count, score),) = _subplots(2, 11, 5)
    curves = data["curves"]
    for label, style in line_styles(dict.fromkeys(curves, ())).items():
        _draw_curve(count, score, data["thresholds"], curves[label], label, style)
    count.set(yscale="log", ylabel="latents with 4 or more contexts above it", title="Features")
    most = max((n for curve in curves.values() for n in curve["features"]), default=1)
    _set_round_ticks(count.yaxis, [1, max(most, 2)])
    first_curve = next(iter(curves.values()))
    score.set_xticks([float(threshold) for threshold in first_curve["scores"]])
    score.set(ylabel=SCORE_LABEL, title=f"Mean score, {data['scored_by']}")
    for axis in (count, score):
        axis.set(xlabel="activation threshold, in strength x sqrt(2048 / hidden size)")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        _mark_thresholds(axis)
    _legend(figure, count)
    _save(figure, caption, path)


def _draw_curve(
    count: Any, score: Any, grid: list[float], curve: Data, label: str, style: dict[str, Any]
) -> None:
    # A log axis shows no zero.
    counted = [(t, n) for t, n in zip(grid, curve["features"], strict=True) if n]
    count_style = style | {"marker": "", "label": f"{label} (L0 {curve['L0']:.3g})"}
    count.plot(*_columns(counted), **count_style)
    scored = [
        (float(threshold), mean["score"])
        for threshold, mean in curve["scores"].items()
        if mean["scored"] >= MIN_SCORED
    ]
    if scored:
        score.plot(*_columns(scored), **style)


def _mark_thresholds(axis: Any) -> None:
    for name, threshold in THRESHOLDS.items():
        axis.axvline(threshold, color=GREY, linewidth=0.8, zorder=0)
        axis.annotate(
            name,
            (threshold, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, -9),
            textcoords="offset points",
            fontsize=7,
            color="#555555",
        )


def features(data: Data, caption: str, path: Path) -> None:
    """Draw how many latents have enough contexts, and how many a label was found for."""
    points = data["points"]
    figure, ((counted, labelled),) = _subplots(2, 11, 5)
    styles = _styles_of(points)
    enough = f"latents with {data['lines']} or more contexts\n"
    enough += f"above {data['threshold']} sqrt(hidden / 2048)"
    of_them = f"of them scored 3 or more, {data['scored_by']}"
    panels = (
        (counted, "features", "Features", enough),
        (labelled, "labelled", "Features with a good label", of_them),
    )
    for axis, measure, title, label in panels:
        _plot_against_l0(axis, points, measure, styles, _distinct(points, "asked"))
        axis.set(ylabel=label, ylim=(0, None))
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_title(title, fontsize=10)
    _legend(figure, counted)
    _save(figure, caption, path)


def scores(data: Data, caption: str, path: Path) -> None:
    """Draw the mean score of the labels against L0."""
    points = [point for point in data["points"] if point["scored"] >= MIN_SCORED]
    figure, ((axis,),) = _subplots(1, 8.5, 5)
    asked = _distinct(data["points"], "asked")
    _plot_against_l0(axis, points, "score", _styles_of(points), asked)
    axis.set(ylabel=SCORE_LABEL)
    axis.set_title(f"{data['title']}, {data['scored_by']}", fontsize=10)
    _legend(figure, axis)
    _save(figure, caption, path)


def routing(data: Data, caption: str, path: Path) -> None:
    """Draw the shares of the sites, with one column for each seed.

    Above: in training. Below: on held-out text, beside the same router untrained.
    """
    sites = data["sites"]
    seeds = list(dict.fromkeys(run["seed"] for run in data["training"]))
    figure, axes = _subplots(len(seeds), max(8, 3.7 * len(seeds)), 7.2, rows=2)
    kinds = list(dict.fromkeys(run["label"] for run in data["inference"]))
    for seed, above, below in zip(seeds, *axes, strict=True):
        run = next(run for run in data["training"] if run["seed"] == seed)
        _draw_training_shares(above, run, sites)
        above.set_title(f"in training, seed {seed}")
        runs = [run for run in data["inference"] if run["seed"] == seed]
        _draw_held_out_shares(below, runs, kinds, sites)
        below.set_title(f"held-out text, seed {seed}")
    for row in axes:
        row[0].set_ylabel("share of tokens routed there")
    handles, labels = axes[0][0].get_legend_handles_labels()
    # In reverse, as the sites lie above each other in the stack.
    _legend_beside(axes[0][-1], handles[::-1], labels[::-1])
    _legend_beside(axes[1][-1], *axes[1][0].get_legend_handles_labels())
    _save(figure, caption, path)


def _draw_training_shares(axis: Any, run: Data, sites: list[int]) -> None:
    axis.stackplot(
        [tokens / 1000 for tokens in run["tokens"]],
        *zip(*run["share"], strict=True),
        colors=plot_style.site_colours(len(sites)),
        labels=[f"site {site}" for site in sites],
    )
    axis.set(xlabel="tokens, thousands", ylim=(0, 1))
    axis.margins(x=0)


def _draw_held_out_shares(axis: Any, runs: list[Data], kinds: list[str], sites: list[int]) -> None:
    """Bars for the shares of each kind of router, dots for its mean weight."""
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        run = next((run for run in runs if run["label"] == kind), None)
        if run is None:
            continue
        positions = [site + width * (i + 0.5) - 0.4 for site in sites]
        colour = (plot_style.colour("RouteSAE"), "white", LIGHT_GREY)[i % 3]
        style = {"color": colour, "edgecolor": DARK, "linewidth": 0.4}
        axis.bar(positions, run["share"], width, label=kind, **style)
        label = "" if i else "mean routing weight p"
        axis.plot(positions, run["mean_p"], "k.", markersize=4, label=label)
    axis.axhline(1 / len(sites), color=DARK, linewidth=0.8, linestyle=":", label="uniform")
    axis.set(xlabel="site", ylim=(0, 1))
    axis.set_xticks(sites)


def _legend_beside(axis: Any, handles: list[Any], labels: list[str]) -> None:
    position = {"loc": "upper left", "bbox_to_anchor": (1.02, 1)}
    axis.legend(handles, labels, fontsize=8, frameon=False, **position)


PAPER: dict[str, Draw] = {
    "fig4_kl": frontier("KLDiv", "KL(clean || patched), nats a token"),
    "fig5_thresholds": thresholds,
    "fig6_features": features,
    "fig8_scores": scores,
    "fig9_routing": routing,
    "fig12_normmse": frontier("NormMSE", "NormMSE, share of squared norm"),
}


def main() -> None:
    parser = small_parser("experiments.figures", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="with the JSON of the figures")
    for folder in parser.parse_args().folders:
        for name, draw in PAPER.items():
            data = load_json(folder / f"{name}.json")
            draw(data, claims.figure_caption(data, data["about"]), folder / f"{name}.png")


if __name__ == "__main__":
    main()
