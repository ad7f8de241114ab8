"""The tables that evaluate.py prints: a row for each SAE, by site, no wider than a terminal.

One SAE alone gets a line for each metric instead.
"""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from src import metric_table, names

Result = dict[str, Any]  # the JSON of one evaluation

LINE = 100  # characters of a line where no terminal says how many it has
LEAST_LINE = 50
GAP = "  "  # between columns
LONGEST_SITES = 24  # characters; more sites are counted
NUMBERS = {
    "share_entropy": "entropy of shares",
    "p_entropy": "entropy of p",
    "agrees_with_best_site_unscaled": "agrees with best site",
}
HOW_TO_READ_ROUTING = (
    "Entropy 1: all sites alike. The best site of a token is the one where its error is least."
)


class Column(NamedTuple):
    """A column of a table. Its heading may have several lines."""

    heading: list[str]
    cells: list[str]
    is_text: bool = False  # texts begin at the left, numbers end at the right

    def width(self) -> int:
        return max(map(len, [*self.heading, *self.cells]))

    def padded(self, cell: str) -> str:
        width = self.width()
        return f"{cell:<{width}}" if self.is_text else f"{cell:>{width}}"


def line_width() -> int:
    """Characters of a line: as many as the terminal has, but at least LEAST_LINE."""
    return max(LEAST_LINE, shutil.get_terminal_size((LINE, 0)).columns)


def lines(results: Sequence[Result], names_asked: Collection[str], width: int) -> list[str]:
    """Return the tables of the metrics that were asked for, and how to read them.

    L0 is always shown, since errors compare at equal L0. width: characters of a line.
    """
    ordered = sorted(results, key=_order)
    keys = _keys(ordered, names_asked)
    if len(ordered) == 1:
        written = _one_result(ordered[0], keys)
    else:
        written = _several_results(ordered, keys, width)
    routed = [result for result in ordered if "Routing" in result]
    if metric_table.ROUTING in metric_table.needs(names_asked) and routed:
        written += ["", *_routing(routed, width)]
    return written


def _order(result: Result) -> tuple[Any, ...]:
    return len(result["sites"]), result["sites"], result["NormMSE"]


def _keys(results: Sequence[Result], names_asked: Collection[str]) -> list[str]:
    measured = {key for result in results for key in result}
    shown = measured.intersection(metric_table.keys_of({*names_asked, "L0"}))
    return [key for key in metric_table.shown_in(metric_table.CONSOLE) if key in shown]


def _one_result(result: Result, keys: Sequence[str]) -> list[str]:
    units = metric_table.units(keys)
    columns = [
        Column([], [f"  {key}" for key in keys], is_text=True),
        Column([], [_numbers([result.get(key)])[0] for key in keys]),
        Column([], [units.get(key, "") for key in keys], is_text=True),
    ]
    return [f"{result['title']}, {names.sites(result['sites'])}", *_table(columns)]


def _several_results(results: Sequence[Result], keys: Sequence[str], width: int) -> list[str]:
    columns = [
        Column(_heading(key), _numbers([result.get(key) for result in results])) for key in keys
    ]
    written = _tables(_firsts(results), columns, width)
    units = "; ".join(f"{key}: {unit}" for key, unit in metric_table.units(keys).items())
    for text in (units, metric_table.HOW_TO_COMPARE):
        written += textwrap.wrap(text, width, break_on_hyphens=False)
    return written


def _routing(routed: Sequence[Result], width: int) -> list[str]:
    """The share of tokens at each site, and what sums the routing up."""
    sites = sorted({site for result in routed for site in result["Routing"]["sites"]})
    shares = [
        dict(zip(result["Routing"]["sites"], result["Routing"]["share"], strict=True))
        for result in routed
    ]
    columns = [Column([str(site)], [_share(of.get(site)) for of in shares]) for site in sites]
    sums = [
        Column(_heading(text), [_share(result["Routing"][key]) for result in routed])
        for key, text in NUMBERS.items()
    ]
    name = _firsts(routed)[-1]
    return [
        "share of tokens at each site",
        *_tables([name], columns, width),
        "",
        *_tables([name], sums, width),
        *textwrap.wrap(HOW_TO_READ_ROUTING, width),
    ]


# ------------------------------------------------------------------------------------- layout


def _firsts(results: Sequence[Result]) -> list[Column]:
    """The columns that every table begins with: the sites, told once a group, and the names."""
    sites = [_sites(result["sites"]) for result in results]
    told = [text if i == 0 or text != sites[i - 1] else "" for i, text in enumerate(sites)]
    called = names.of_results(results)
    counts = Counter(called)
    rows = [
        str(result["title"])
        if counts[name] > 1
        else name.replace(f", {names.sites(result['sites'])}", "")
        for result, name in zip(results, called, strict=True)
    ]
    return [
        Column(["site"], told, is_text=True),
        Column(["SAE"], rows, is_text=True),
    ]


def _sites(numbers: Sequence[int]) -> str:
    text = names.site_numbers(numbers)
    if len(text) > LONGEST_SITES:
        return f"{len(numbers)} from {numbers[0]} to {numbers[-1]}"
    return text


def _heading(text: str) -> list[str]:
    return text.replace("_", " ").split()


def _numbers(values: Sequence[Any]) -> list[str]:
    """The cells of one metric, all with as many decimals; a dash where it was not measured."""
    numbers = [abs(value) for value in values if isinstance(value, float)]
    decimals = 2 if max(numbers, default=0) >= 10 else 4
    return [f"{value:.{decimals}f}" if isinstance(value, float) else "-" for value in values]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}".removeprefix("0")


def _tables(firsts: list[Column], columns: Sequence[Column], width: int) -> list[str]:
    """Set columns beside each other; those for which a line has no room follow below.

    Each table begins with `firsts`, and has one further column at least.
    """
    room = width - sum(column.width() + len(GAP) for column in firsts) + len(GAP)
    groups = _groups(columns, room)
    while room > 0 and len(narrower := _groups(columns, room - 1)) == len(groups):
        groups, room = narrower, room - 1  # so that the tables are about as wide as each other
    written: list[str] = []
    for group in groups:
        written += [*([""] if written else []), *_table([*firsts, *group])]
    return written


def _groups(columns: Sequence[Column], room: int) -> list[list[Column]]:
    groups: list[list[Column]] = []
    free = 0
    for column in columns:
        needed = column.width() + len(GAP)
        if not groups or needed > free:
            groups.append([])
            free = room
        groups[-1].append(column)
        free -= needed
    return groups


def _table(columns: Sequence[Column]) -> list[str]:
    height = max(len(column.heading) for column in columns)
    blocks = [[""] * (height - len(c.heading)) + c.heading + c.cells for c in columns]
    rows = zip(*blocks, strict=True)
    return [
        GAP.join(column.padded(cell) for column, cell in zip(columns, row, strict=True)).rstrip()
        for row in rows
    ]
