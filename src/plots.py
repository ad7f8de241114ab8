"""Pictures and the comparison table, made from the JSON files of the stages alone.

`python -m src.plots EVAL_FOLDER PICTURE.png` compares evaluated SAEs;
`python -m src.plots RUN/metrics.jsonl PICTURE.png` shows the course of a training.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.config import small_parser
from src.files import (
    load_json,
    parse_json,
    printable,
    printable_output,
    save_text,
    say,
    text_records,
    write_atomic,
)
from src.metric_table import METRICS, SCALE, TABLE, columns

Result = dict[str, Any]  # the JSON of one evaluation
LONGEST_SHOWN = 4096  # characters of a path
LARGEST_SHOWN = 1e300  # of a number in a table or picture; NaN and infinity are not shown either

COLUMNS = columns(TABLE)
SPEED, SPEED_TITLE = "step_tokens_per_s", "training step, tokens/s"
SWEPT = re.compile(r"_(target_l0|l1_coeff)[\d.e+-]+(?=_|$)")
L0_TOLERANCE = 0.1  # an L0 farther than this share from the row's own k is starred
L0_LABEL = "L0, active latents a token"
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
    return [result["title"], sites, result.get("split") or "-", n_tokens, *numbers]


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


def pyplot() -> Any:
    """Return matplotlib's pyplot, set to draw to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # titles of others may hold $
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure: Any, path: Path) -> None:
    kind = path.suffix.removeprefix(".") or "png"
    write_atomic(path, lambda file: figure.savefig(file, dpi=110, format=kind))
    pyplot().close(figure)


def _site_colours(count: int) -> Any:
    return pyplot().get_cmap("viridis")([i / max(1, count - 1) for i in range(count)])


def picture(results: list[Result], path: Path) -> None:
    """Draw the metrics that have a panel against L0, then routing shares and firing rates."""
    drawn = [metric for metric in METRICS if metric.panel]
    rows = math.ceil(len(drawn) / 2) + 1
    figure, axes = pyplot().subplots(rows, 2, figsize=(13, 4.5 * rows), constrained_layout=True)
    metric_axes = list(axes[:-1].flat)
    share, density = axes[-1]
    result_families = families(results)
    styles = {
        name: {"color": f"C{i % 10}", "marker": "osD^vP"[i // 10]}
        for i, name in enumerate(result_families)
    }
    for metric, axis in zip(drawn, metric_axes, strict=False):
        _draw_frontiers(axis, result_families, styles, metric.key, metric.panel)
    for axis in metric_axes[len(drawn) :]:
        axis.remove()
    _draw_routing(share, [result for result in results if result.get("Routing")])
    _draw_densities(density, result_families, styles)
    handles, labels = metric_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    _save(figure, path)


def _draw_frontiers(
    axis: Any, result_families: dict[str, list[Result]], styles: dict, name: str, label: str
) -> None:
    for title, family in result_families.items():
        measured = [result for result in family if result.get(name) is not None]
        if measured:
            l0 = [result["L0"] for result in measured]
            values = [result[name] for result in measured]
            axis.plot(l0, values, **styles[title], label=title)
    axis.set(xlabel=L0_LABEL, ylabel=label, xscale="log", yscale="log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
        # The labels of all nine minor ticks would overlap.
        side.set_minor_locator(pyplot().matplotlib.ticker.LogLocator(subs=(2, 3, 5)))
        side.set_minor_formatter("{x:.2g}")
    axis.grid(alpha=0.3, which="both")


def _draw_routing(axis: Any, routed: list[Result]) -> None:
    axis.set(xlabel="site", ylabel="share of tokens", title="Routing")
    for i, result in enumerate(routed):
        routing = result["Routing"]
        width = 0.8 / len(routed)
        positions = [site + 0.8 * (i / len(routed) - 0.5) for site in routing["sites"]]
        axis.bar(positions, routing["share"], width=width, label=result["title"], align="edge")
    if routed:
        axis.set_xticks(routed[0]["Routing"]["sites"])
        axis.legend(fontsize=8)


def _draw_densities(axis: Any, result_families: dict[str, list[Result]], styles: dict) -> None:
    for title, family in result_families.items():
        middle = family[len(family) // 2]
        if not middle.get("Density_histogram"):
            continue
        latents = middle["Density_histogram"]["latents"]
        shares = [n / sum(latents) for n in latents]
        axis.plot(range(len(latents)), shares, **styles[title])
    axis.set_xticks(range(len(DENSITY_TICKS)), DENSITY_TICKS)
    axis.set(
        xlabel="share of tokens a latent is active on",
        ylabel="share of latents",
        title="Firing rates",
    )


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


def run_picture(courses: dict[str, Course], path: Path) -> None:
    """Draw the course of a training over its tokens.

    It shows every term of the loss, L0, the share of dead latents and, for routed models, the
    share of tokens at each site.
    """
    routed = [title for title, course in courses.items() if any("share" in line for line in course)]
    rows = 2 + math.ceil(len(routed) / 2)
    figure, axes = pyplot().subplots(
        rows, 2, figsize=(13, 4.2 * rows), constrained_layout=True, squeeze=False
    )
    (mse, terms), (l0, dead) = axes[:2]
    for i, (title, course) in enumerate(courses.items()):
        colour = f"C{i % 10}"
        for axis, name in ((mse, "NormMSE"), (l0, "L0"), (dead, "dead")):
            _draw_measure(axis, course, name, color=colour, label=title)
        _draw_other_terms(terms, course, title, colour)
    _label_panel(mse, "NormMSE", log=True)
    _label_panel(terms, "other terms of the loss", log=True)
    _label_panel(l0, L0_LABEL, log=True)
    _label_panel(dead, "dead latents", log=False)
    site_axes = list(axes[2:].flat)
    for title, axis in zip(routed, site_axes, strict=False):
        _draw_site_shares(axis, title, [line for line in courses[title] if "share" in line])
    for axis in site_axes[len(routed) :]:
        axis.remove()
    _save(figure, path)


def _draw_measure(axis: Any, course: Course, name: str, *line_style: str, **style: str) -> None:
    tokens = [line["tokens"] for line in course]
    values = [line.get(name, math.nan) for line in course]
    axis.plot(tokens, values, *line_style, **style)


def _draw_other_terms(axis: Any, course: Course, title: str, colour: str) -> None:
    names = [name for line in course for name in _loss_terms(line) if name != "NormMSE"]
    line_styles = itertools.cycle(("-", "--", ":", "-."))
    for name in dict.fromkeys(names):
        _draw_measure(axis, course, name, next(line_styles), color=colour, label=f"{title}: {name}")


def _loss_terms(line: dict[str, Any]) -> list[str]:
    """The names of the loss's terms: the trainer writes them between `loss` and `L0`."""
    keys = list(line)
    return keys[keys.index("loss") + 1 : keys.index("L0")]


def _label_panel(axis: Any, label: str, log: bool) -> None:
    axis.set(xlabel="tokens", ylabel=label)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)
    if log:
        axis.set_yscale("log")


def _draw_site_shares(axis: Any, title: str, course: Course) -> None:
    tokens = [line["tokens"] for line in course]
    shares = list(zip(*(line["share"] for line in course), strict=True))
    labels = [f"site {site}" for site in course[0]["sites"]]
    axis.stackplot(tokens, shares, labels=labels, colors=_site_colours(len(shares)))
    axis.set(xlabel="tokens", ylabel="share of tokens", title=title, ylim=(0, 1))
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


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
        print(f"plots: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
