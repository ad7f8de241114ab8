"""Pictures and the comparison table, made from the JSON files of the stages alone.

`python -m src.plots EVAL_FOLDER PICTURE.png` compares evaluated SAEs;
`python -m src.plots RUN/metrics.jsonl PICTURE.png` shows the course of a training.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from src import names, plot_style
from src.config import small_parser
from src.files import (
    error_text,
    load_json,
    one_line,
    parse_json,
    printable,
    printable_output,
    save_text,
    say,
    text_records,
)
from src.metric_table import METRICS, SCALE, TABLE, columns
from src.plot_style import DARK, L0_LABEL, LABEL_SIZE, Label, label_lines, pyplot
from src.plot_style import save as _save

Result = dict[str, Any]  # the JSON of one evaluation
LONGEST_SHOWN = 4096  # characters of a path
LARGEST_SHOWN = 1e300  # of a number in a table or picture; NaN and infinity are not shown either

COLUMNS = columns(TABLE)
SPEED, SPEED_TITLE = "step_tokens_per_s", "training step, tokens/s"
SWEPT = re.compile(r"_(k|target_l0|l1_coeff)[\d.e+-]+(?=_|$)")
L0_TOLERANCE = 0.1  # an L0 farther than this share from the row's own k is starred
CURVE = 3  # sites of a model from which it is drawn as a curve over sites
ROW_HEIGHT, COURSE_HEIGHT = 4.0, 3.2  # inches of a panel
MAX_LABELS = 9  # of lines in a panel
MAX_ROUTED = 4  # SAEs whose shares stand beside each other, the best first
LONG_NAME = 26  # characters; longer ones stand below each other in a legend
# Lines of a training that end so near each other, if they are more than so many, have one label.
SAME_END, MOST_AT_ONE_END = 0.002, 3
QUANTITIES = {
    "NormMSE": "NormMSE, share of squared norm",
    "L0": L0_LABEL,
    "dead": "dead latents, share",
}
LOG_SPREAD = 10  # ratio of values above which a linear axis would press the smaller ones together
DENSITY_TICKS = ("never", "<1e-5", "<1e-4", "<1e-3", "<1e-2", "<0.1", "<1")
STAR = (
    "\\* L0 is more than 10 % off the common k: not comparable at this row. A Crosscoder's code "
    "has read later sites too, so its KL is no causal comparison. KL follows the depth of the "
    "patched site: compare it only between rows patched at the same sites. Only rows measured on "
    "the same tokens compare: those of another split or number of tokens stand below the others."
)


# ------------------------------------------------------------------------------- evaluation results


def load(folder: Path, only: str = "") -> list[Result]:
    """Return the results of one folder by NormMSE, best first. Raises ValueError if it has none."""
    paths = [path for path in sorted(folder.glob("*.json")) if only in path.stem]
    if not paths:
        raise ValueError(f"no evaluation in {folder}; run evaluate.py first")
    results = [_load_result(path) for path in paths]
    return [result for group in groups(results) for result in group]


def _load_result(path: Path) -> Result:
    """The evaluation in a file. Raises ValueError if it lacks what every evaluation has."""
    result = load_json(path)
    if not isinstance(result, dict) or not all(_is_valid(result, key) for key in VALUES):
        raise ValueError(f"{path} is no result of evaluate.py; remove it or use --only NAME")
    return result


def _is_valid(result: Result, key: str) -> bool:
    """Whether a result has a value that can be shown, or leaves out one that not every has."""
    value = result.get(key)
    return key not in REQUIRED if value is None else VALUES[key](value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST_SHOWN


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(_is_number, values))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_SHOWN


def _is_routing(value: Any) -> bool:
    parts = [value.get(key) for key in ("sites", "share")] if isinstance(value, dict) else []
    return bool(parts) and all(map(_are_numbers, parts)) and len(parts[0]) == len(parts[1])


def _is_histogram(value: Any) -> bool:
    return (
        isinstance(value, dict) and _are_numbers(value.get("latents")) and sum(value["latents"]) > 0
    )


# What the table and the pictures take from a result, and what must be there.
REQUIRED = ("title", "NormMSE", "L0", "sites")
VALUES: dict[str, Callable[[Any], bool]] = {
    **{metric.key: _is_number for metric in METRICS},
    **dict.fromkeys(("k", "tokens", "trained_tokens", SPEED), _is_number),
    **dict.fromkeys(("title", "split", "data_path", "git_commit"), _is_text),
    "sites": _are_numbers,
    "Routing": _is_routing,
    "Density_histogram": _is_histogram,
    "versions": lambda value: isinstance(value, dict),
}


def groups(results: list[Result]) -> list[list[Result]]:
    """Return the results that were measured on the same tokens, each group by NormMSE.

    Results of different groups do not compare. Those of held-out text come first, and of these the
    ones of most tokens.
    """

    def order(result: Result) -> tuple[Any, ...]:
        n_tokens = result.get("tokens")
        return (
            result.get("split") != "eval",
            str(result.get("split")),
            -n_tokens if isinstance(n_tokens, int) else 0,
            *(str(result.get(name)) for name in ("data_fingerprint", "max_length", "model_path")),
        )

    ordered = sorted(results, key=lambda result: (order(result), result["NormMSE"]))
    return [list(group) for _, group in itertools.groupby(ordered, key=order)]


def families(results: list[Result]) -> dict[str, list[Result]]:
    """Group results by their title without the swept sparsity, and by the tokens measured on.

    Each family is ordered by L0, so that it is a sparsity frontier.
    """
    result_families: dict[str, list[Result]] = {}
    for number, group in enumerate(groups(results)):
        for result in group:
            name = SWEPT.sub("", result["title"])
            if number:
                name = f"{name} ({result.get('split')}, {result.get('tokens')} tokens, {number})"
            result_families.setdefault(name, []).append(result)
    return {
        name: sorted(family, key=lambda result: result["L0"])
        for name, family in result_families.items()
    }


def interpolate(family: list[Result], l0: float) -> Result | None:
    """Read a family's frontier off at an L0, linearly in log L0.

    Returns None if no two neighbouring points of the family lie around this L0.
    """
    for low, high in itertools.pairwise(family):
        if not (0 < low["L0"] <= l0 <= high["L0"] and low["L0"] < high["L0"]):
            continue
        low_log = math.log(low["L0"])
        share = (math.log(l0) - low_log) / (math.log(high["L0"]) - low_log)
        result = dict(low)
        for name in COLUMNS:
            if low.get(name) is not None and high.get(name) is not None:
                result[name] = low[name] + share * (high[name] - low[name])
        title = f"{SWEPT.sub('', low['title'])}, read off its frontier"
        return result | {"title": title, "L0": l0}
    return None


def table(results: list[Result]) -> str:
    """Return a markdown table, with a dash where nothing was measured.

    Rows that were measured on the same tokens stand together; of these, rows of the same sites, by
    NormMSE. An L0 that is more than 10 % off the row's own k, or off the one k of the table, is
    starred.
    """
    with_speed = any(result.get(SPEED) for result in results)
    headings = ["SAE", "sites", "split", "tokens", *COLUMNS, *([SPEED_TITLE] if with_speed else [])]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    all_k = {result["k"] for result in results if result.get("k")}
    common_k = all_k.pop() if len(all_k) == 1 else None
    for group in groups(results):
        if common_k:
            group = groups(group + _frontiers_at(group, common_k))[0]
        for result in sorted(group, key=_by_sites):  # which leaves equal sites as they are
            cells = _cells(result, result.get("k") or common_k, with_speed)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_sites(result: Result) -> tuple[bool, list[int]]:
    """Order results of one site before those of several: only equal sites compare."""
    return len(result["sites"]) > 1, result["sites"]


def _site_text(sites: list[int]) -> str:
    """Return sites as '12', '4 ... 12' or '7 11 15'."""
    first, last = sites[0], sites[-1]
    is_range = len(sites) > 2 and sites == list(range(first, last + 1))
    return f"{first} ... {last}" if is_range else " ".join(map(str, sites))


def _frontiers_at(results: list[Result], l0: float) -> list[Result]:
    swept = [family for family in families(results).values() if len(family) > 1]
    return [result for family in swept if (result := interpolate(family, l0))]


def _cells(result: Result, target_l0: float | None, with_speed: bool) -> list[str]:
    numbers = [f"{result[name]:.4f}" if result.get(name) is not None else "-" for name in COLUMNS]
    if target_l0 and abs(result["L0"] / target_l0 - 1) > L0_TOLERANCE:
        numbers[COLUMNS.index("L0")] += " *"
    if with_speed:
        numbers.append(f"{result[SPEED]:,}" if result.get(SPEED) else "-")
    n_tokens = f"{result['tokens']:,}" if result.get("tokens") else "-"
    sites = _site_text(result["sites"])
    title = one_line(result["title"]).replace("|", "\\|")
    return [title, sites, result.get("split") or "-", n_tokens, *numbers]


def _about(result: Result) -> str:
    """What a group of results was measured on, from its first."""
    parts = [
        f"{_count(result, 'tokens')} tokens of split {result.get('split')} of "
        f"{Path(result.get('data_path') or 'unknown').name}",
        f"commit {str(result.get('git_commit'))[:10]}",
        f"torch {(result.get('versions') or {}).get('torch')}",
        f"trained on {_count(result, 'trained_tokens')} tokens each.",
    ]
    return "; ".join(parts)


def _count(result: Result, key: str) -> str:
    return f"{result[key]:,}" if result.get(key) else "an unknown number of"


def _document(results: list[Result], picture_name: str) -> str:
    """The markdown file of a comparison: what was measured, the table, how to read it."""
    about = "\n".join(f"- {_about(group[0])}" for group in groups(results))
    picture_link = f"![comparison]({picture_name})"
    parts = ("# Evaluation results", about, table(results), SCALE, STAR, picture_link)
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------- the pictures


def picture(results: list[Result], path: Path) -> None:
    """Draw the metrics that have a panel, then routing shares and firing rates where measured.

    Of a sweep, shares and rates are those of its middle.
    """
    drawn = [m for m in METRICS if m.panel and any(r.get(m.key) is not None for r in results)]
    middles = [family[len(family) // 2] for family in families(results).values()]
    panels = [
        (_draw_routing, [result for result in middles if result.get("Routing")][:MAX_ROUTED]),
        (_draw_densities, [result for result in middles if _histogram(result)]),
    ]
    panels = [(draw, of_it) for draw, of_it in panels if of_it]
    draw_metric, height = _form(results)
    heights = [height, ROW_HEIGHT] if panels else [height]
    figure = pyplot().figure(figsize=(13, sum(heights)))
    rows = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    above = rows[0].subgridspec(1, len(drawn))
    for number, metric in enumerate(drawn):
        measured = [result for result in results if result.get(metric.key) is not None]
        axis = figure.add_subplot(above[number])
        draw_metric(axis, measured, metric.key, metric.panel, height)
    below = rows[-1].subgridspec(1, max(1, len(panels)))
    for number, (draw, of_it) in enumerate(panels):
        draw(figure.add_subplot(below[number]), of_it)
    _save(figure, path)


def _form(results: list[Result]) -> tuple[Callable[..., None], float]:
    """(function that draws a metric, its height in inches).

    Results are drawn over the sites where one model was trained at several, as bars grouped by the
    patched site where all L0 are alike, and otherwise against L0.
    """
    l0 = [result["L0"] for result in results]
    if max(l0) > (1 + L0_TOLERANCE) * min(l0):
        return draw_frontiers, ROW_HEIGHT
    if any(len(set(map(_sites, curve))) >= CURVE for curve in curves(results).values()):
        return draw_sites, ROW_HEIGHT
    n_rows = len(results) + len(set(map(_sites, results)))  # with a heading for each site
    return draw_bars, 1.1 + 0.24 * n_rows


def _sites(result: Result) -> tuple[int, ...]:
    return tuple(result["sites"])


def _colour(result: Result) -> str:
    return plot_style.colour(names.model_of(result))


def curves(results: list[Result]) -> dict[str, list[Result]]:
    """Group the results of one-site models by their title without the site, ordered by site."""
    result_curves: dict[str, list[Result]] = {}
    for result in sorted(results, key=_sites):
        if len(result["sites"]) == 1:
            key = names.SWEPT.sub("", result["title"])
            result_curves.setdefault(key, []).append(result)
    return result_curves


def _named_curves(results: list[Result]) -> Iterator[tuple[str, list[Result]]]:
    """Yield each curve with its name: "TopK, one a site", or "TopK, site 8" of a single SAE."""
    # By the object, because results of one model at several sites may share a title.
    named = dict(zip(map(id, results), names.of_results(results), strict=True))
    for curve in curves(results).values():
        name = named[id(curve[0])]
        if len(curve) > 1:
            name = name.removesuffix(names.sites(curve[0]["sites"])) + "one a site"
        yield name, curve


def _several_sites(results: list[Result]) -> list[tuple[Result, str]]:
    """The results of models that read several sites, with their names, variants last."""
    named = zip(results, names.of_results(results), strict=True)
    several = [(result, name) for result, name in named if len(result["sites"]) > 1]
    return sorted(several, key=lambda pair: len(pair[1]))


def _line_styles(results: list[Result]) -> dict[int, str]:
    """{place in results: line style}: the variants of a model differ in their lines."""
    counts: dict[str, int] = {}
    styles = {}
    for place, result in enumerate(results):
        number = counts.setdefault(names.model_of(result), 0)
        styles[place] = ("-", "--", ":", "-.")[number % 4]
        counts[names.model_of(result)] += 1
    return styles


def draw_sites(axis: Any, results: list[Result], key: str, label: str, height: float) -> None:
    """Draw one metric over the sites: a curve for a model at several sites, a level line for a
    model that reads them all."""
    labels = []
    for name, curve in _named_curves(results):
        sites = [result["sites"][0] for result in curve]
        values = [result[key] for result in curve]
        colour = _colour(curve[0])
        axis.plot(sites, values, "o-", color=colour)
        labels.append(Label(sites[-1], values[-1], name, colour))
    several = _several_sites(results)
    styles = _line_styles([result for result, _ in several])
    for place, (result, name) in enumerate(several):
        first, last = result["sites"][0], result["sites"][-1]
        colour = _colour(result)
        axis.hlines(result[key], first, last, color=colour, linestyle=styles[place], lw=2)
        labels.append(Label(last, result[key], name, colour))
    axis.set(xlabel="site", title=label)
    axis.grid(axis="x", visible=False)
    axis.xaxis.get_major_locator().set_params(integer=True)
    values = [result[key] for result in results]
    positive = [value for value in values if value > 0]
    if positive and max(positive) > LOG_SPREAD * min(positive):
        plot_style.set_log_axis(axis, "y", values)
    else:
        plot_style.set_zero_axis(axis, "y", values)
    label_lines(axis, labels, height)


def draw_bars(axis: Any, results: list[Result], key: str, label: str, height: float) -> None:
    """Draw one metric as bars, grouped by the sites that are patched."""
    del height
    named = zip(results, names.of_results(results), strict=True)
    by_site = sorted(named, key=lambda pair: (len(pair[0]["sites"]), _sites(pair[0]), pair[0][key]))
    row = 0.0
    ticks, texts = [], []
    for sites, group in itertools.groupby(by_site, lambda pair: _sites(pair[0])):
        axis.text(0, row, f" {names.sites(sites)}", va="center", fontweight="bold", color=DARK)
        row += 1
        for result, name in group:
            axis.barh(row, result[key], 0.72, color=_colour(result))
            axis.text(result[key], row, f" {result[key]:.3g}", va="center", color=DARK)
            ticks.append(row)
            texts.append(name.removesuffix(f", {names.sites(sites)}"))
            row += 1
    axis.set_yticks(ticks, texts)
    axis.tick_params(axis="y", length=0)
    axis.set(title=label, ylim=(row - 0.4, -0.6))
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)
    plot_style.set_zero_axis(axis, "x", [result[key] for result in results], room=1.15)


def draw_frontiers(axis: Any, results: list[Result], key: str, label: str, height: float) -> None:
    """Draw one metric against L0, with one line for each family of swept sparsity."""
    labels = []
    lines = list(families(results).values())
    markers = plot_style.site_markers(result["sites"] for result in results)
    middles = [line[len(line) // 2] | {"title": SWEPT.sub("", line[0]["title"])} for line in lines]
    styles = _line_styles(middles)
    several = names.of_results(middles)
    for place, (line, name) in enumerate(zip(lines, several, strict=True)):
        colour = _colour(line[0])
        l0, values = [result["L0"] for result in line], [result[key] for result in line]
        look = {"color": colour, "marker": markers[_sites(line[0])], "linestyle": styles[place]}
        look["markerfacecolor"] = "white" if styles[place] != "-" else colour
        look["markersize"] = 5 if len(line[0]["sites"]) == 1 else 9  # of a star
        axis.plot(l0, values, **look)
        labels.append(Label(l0[-1], values[-1], name, colour))
    axis.set(xlabel=L0_LABEL, title=label)
    plot_style.set_log_axis(axis, "x", [result["L0"] for result in results])
    plot_style.set_log_axis(axis, "y", [result[key] for result in results])
    label_lines(axis, labels, height)


def _draw_routing(axis: Any, routed: list[Result]) -> None:
    axis.set(xlabel="site", title="Share of tokens at each site")
    width = 0.8 / len(routed)
    hatches = ("", "////", "....", "xxxx")
    for i, (result, name) in enumerate(zip(routed, names.of_results(routed), strict=True)):
        routing = result["Routing"]
        positions = [site + width * (i + 0.5) - 0.4 for site in routing["sites"]]
        look = {"facecolor": _colour(result) if not i else "white"}
        look |= {"edgecolor": _colour(result), "hatch": hatches[i % 4]}
        axis.bar(positions, routing["share"], width, label=name, linewidth=0.8, **look)
    sites = sorted({site for result in routed for site in result["Routing"]["sites"]})
    axis.set_xticks(sites)
    axis.axhline(1 / len(sites), color=DARK, lw=0.9, ls=":", label="equal shares")
    axis.grid(axis="x", visible=False)
    _, labels = axis.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > LONG_NAME else 3
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": columns}
    axis.legend(fontsize=LABEL_SIZE, **place)


def _histogram(result: Result) -> list[int]:
    histogram = result.get("Density_histogram")
    return histogram["latents"] if isinstance(histogram, dict) else []


def _draw_densities(axis: Any, results: list[Result]) -> None:
    """Draw the share of latents by firing rate, one line for each SAE, one label for each model."""
    labels = {}
    for result in results:
        latents = _histogram(result)
        shares = [n / max(1, sum(latents)) for n in latents]
        colour = _colour(result)
        axis.plot(range(len(latents)), shares, color=colour, lw=1, alpha=0.8)
        # Lines end together near zero, so that each is named at its peak, by the legend.
        labels[names.model_of(result)] = colour
    for model, colour in labels.items():
        axis.plot([], [], color=colour, label=model)
    axis.set_xticks(range(len(DENSITY_TICKS)), DENSITY_TICKS)
    axis.set(xlabel="share of tokens on which a latent is active", title="Share of latents")
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 5}
    axis.legend(fontsize=LABEL_SIZE, **place)


# ---------------------------------------------------------------------------- course of a training

Course = list[dict[str, Any]]  # the lines of one SAE in a metrics.jsonl


def load_courses(path: Path) -> dict[str, Course]:
    """Return the lines of a metrics.jsonl by SAE, in the order written.

    A last line cut short by a kill is left out. Raises ValueError if the file has no line.
    """
    courses: dict[str, Course] = {}
    for text in text_records(path.read_text(encoding="utf-8", errors="replace")):
        try:
            line = parse_json(text)
        except ValueError:  # it was being written when the process was killed
            continue
        earlier = courses.get(str(line["sae"]), []) if _is_line(line) else None
        if earlier is None or (earlier and line.get("sites") != earlier[0].get("sites")):
            raise ValueError(f"{path} is no metrics.jsonl of a training")
        courses.setdefault(str(line["sae"]), []).append(line)
    if not courses:
        raise ValueError(f"{path} has no line yet")
    return courses


def _is_line(line: Any) -> bool:
    """Whether it is a line of a training: numbers, and shares of as many sites as it names."""
    if not isinstance(line, dict) or not {"sae", "tokens", "loss", "L0"} <= line.keys():
        return False
    if "share" in line and not _is_routing(line):
        return False
    names = ("tokens", "loss", "L0", "NormMSE", "dead", *_loss_terms(line))
    return all(isinstance(line.get(name, 0), int | float) for name in names)


def _loss_terms(line: dict[str, Any]) -> list[str]:
    """The names of the loss's terms: the trainer writes them between `loss` and `L0`."""
    keys = list(line)
    return keys[keys.index("loss") + 1 : keys.index("L0")]


def run_picture(courses: dict[str, Course], path: Path) -> None:
    """Draw the course of a training over its tokens, with one panel for each quantity.

    These are every term of the loss, L0, the share of dead latents and, for routed models, the
    share of tokens at each site. A quantity that no SAE has, or that stays 0, has no panel.
    """
    lines = [line for course in courses.values() for line in course]
    terms = list(dict.fromkeys(name for line in lines for name in _loss_terms(line)))
    quantities = [name for name in (*terms, "L0", "dead") if any(line.get(name) for line in lines)]
    routed = [title for title, course in courses.items() if any("share" in line for line in course)]
    n_panels = len(quantities) + len(routed)
    n_columns = min(n_panels, 3)
    n_rows = math.ceil(n_panels / n_columns)
    size = (5.4 * n_columns, COURSE_HEIGHT * n_rows)
    figure, axes = pyplot().subplots(n_rows, n_columns, figsize=size, squeeze=False)
    panels = list(axes.flat)
    looks = _course_looks(courses)
    for name, axis in zip(quantities, panels, strict=False):
        _draw_quantity(axis, courses, name, looks)
    for title, axis in zip(routed, panels[len(quantities) :], strict=False):
        _draw_site_shares(
            axis, looks[title][0], [line for line in courses[title] if "share" in line]
        )
    for axis in panels[n_panels:]:
        axis.remove()
    _save(figure, path)


def _course_looks(courses: dict[str, Course]) -> dict[str, tuple[str, Any]]:
    """{title: (name, colour)}: one colour for each model, or for each site of a model at many."""
    models = {title: title.split("_")[0] for title in courses}
    named = [
        {"title": title, "model": models[title], "sites": course[0].get("sites") or [0]}
        for title, course in courses.items()
    ]
    texts = names.of_results(named)
    single = [of_one["model"] for of_one in named if len(of_one["sites"]) == 1]
    at_many = {model for model in single if single.count(model) >= CURVE}
    sites = sorted({of["sites"][0] for of in named if of["model"] in at_many})
    shades = dict(zip(sites, plot_style.site_colours(len(sites)), strict=True))
    return {
        of["title"]: (
            text,
            shades[of["sites"][0]]
            if of["model"] in at_many and len(of["sites"]) == 1
            else plot_style.colour(of["model"]),
        )
        for of, text in zip(named, texts, strict=True)
    }


def _draw_quantity(
    axis: Any, courses: dict[str, Course], name: str, looks: dict[str, tuple[str, Any]]
) -> None:
    labels, drawn = [], []
    for title, course in courses.items():
        if not any(line.get(name) for line in course):
            continue
        text, colour = looks[title]
        tokens = [line["tokens"] for line in course]
        values = [line.get(name, math.nan) for line in course]
        axis.plot(tokens, values, color=colour, lw=1.4)
        labels.append(Label(tokens[-1], values[-1], text, colour))
        drawn += values
    axis.set(xlabel="tokens", title=QUANTITIES.get(name, f"{name}, term of the loss"))
    axis.xaxis.set_major_formatter(_short_count)
    axis.xaxis.get_major_locator().set_params(nbins=5)
    if name == "dead":
        plot_style.set_zero_axis(axis, "y", drawn)
    else:
        plot_style.set_log_axis(axis, "y", drawn)
    label_lines(axis, _few(labels), COURSE_HEIGHT - 0.9)


def _few(labels: list[Label]) -> list[Label]:
    """One label for lines that end together, and of many others a choice by height."""
    groups: list[list[Label]] = []
    for label in sorted(labels, key=lambda label: label.y):
        if groups and label.y <= (1 + SAME_END) * groups[-1][0].y:
            groups[-1].append(label)
        else:
            groups.append([label])
    chosen = []
    for group in groups:
        is_many = len(group) > MOST_AT_ONE_END
        chosen += [group[0]._replace(text=f"{len(group)} SAEs", colour=DARK)] if is_many else group
    if len(chosen) <= MAX_LABELS:
        return chosen
    step = (len(chosen) - 1) / (MAX_LABELS - 1)
    return [chosen[round(step * number)] for number in range(MAX_LABELS)]


def _short_count(value: float, _place: Any = None) -> str:
    """1500000 -> 1.5M; 20000 -> 20k."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _draw_site_shares(axis: Any, name: str, course: Course) -> None:
    tokens = [line["tokens"] for line in course]
    shares = list(zip(*(line["share"] for line in course), strict=True))
    sites = course[0]["sites"]
    colours = plot_style.site_colours(len(shares))
    axis.stackplot(tokens, shares, colors=colours)
    axis.set(xlabel="tokens", title=f"{name}: share of tokens by site", ylim=(0, 1))
    axis.xaxis.set_major_formatter(_short_count)
    axis.xaxis.get_major_locator().set_params(nbins=5)
    axis.margins(x=0)
    axis.grid(visible=False)
    heights = [share[-1] for share in shares]
    middles = [sum(heights[:i]) + height / 2 for i, height in enumerate(heights)]
    labels = [
        Label(tokens[-1], middle, f"site {site}", colour)
        for site, middle, height, colour in zip(sites, middles, heights, colours, strict=True)
        if height > 0.02
    ]
    label_lines(axis, [label._replace(colour=DARK) for label in labels], COURSE_HEIGHT - 0.9)


# --------------------------------------------------------------------------------- the command line


@printable_output()
def main() -> None:
    parser = small_parser("src.plots", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="folder of evaluation results, or a run's metrics.jsonl")
    add("picture", type=Path, help="PNG to write")
    add("--table", type=Path, help="markdown file to write as well")
    add("--only", default="", help="only results whose name holds this")
    args = parser.parse_args()
    # Letters that the font lacks, and an L0 of 0 on a logarithmic scale, leave the rest drawn.
    warnings.simplefilter("ignore", UserWarning)
    if args.folder.suffix == ".jsonl":
        courses = load_courses(args.folder)
        chosen = {title: course for title, course in courses.items() if args.only in title}
        run_picture(chosen, args.picture)
    else:
        results = load(args.folder, args.only)
        picture(results, args.picture)
        say(table(results))
        if args.table:
            save_text(_document(results, args.picture.name), args.table)
    say(f"picture: {args.picture}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"plots: error: {printable(error_text(error))}", file=sys.stderr)
        sys.exit(2)
