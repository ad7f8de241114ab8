"""The metrics of an evaluation, one row each: how a metric is asked for, and where it is shown.

The objects that measure them are in metrics.py. Nothing here needs torch, so that --help is quick.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

# What a metric needs.
CODE = "code"  # only the SAE's code and reconstruction; measured in every evaluation
ROUTING = "routing"  # codes of the states of all sites
PATCHED = "patched"  # runs of the language model with reconstructions in place
ABLATED = "ablated"  # these, and runs with the states of a site ablated
PROBED = "probed"  # probes on codes and states that are kept, with scikit-learn

# Where it is shown.
CONSOLE = "console"  # the table that evaluate.py prints
CARD = "card"  # the model card of an exported SAE
TABLE = "table"  # the table in which src.plots compares SAEs
PAGE = "page"  # the evaluation on the HTML page
EVERYWHERE = (CONSOLE, CARD, TABLE, PAGE)


class Metric(NamedTuple):
    """One number of an evaluation.

    Numbers that share a name are asked for together. The table and the page have their columns
    in the order of `column`; the console, the card and the result files have that of the rows.
    """

    name: str  # typed after --metric
    key: str  # in the result files, and the heading of its column
    needs: str
    unit: str  # "" for what is no single number
    shown: tuple[str, ...] = ()
    column: int = 0
    panel: str = ""  # label of its axis in the comparison picture; "" for no panel


METRICS = (
    Metric("NormMSE", "NormMSE", CODE, "share of squared norm", EVERYWHERE, 2, panel="NormMSE"),
    Metric("FVU", "FVU", CODE, "share of variance", EVERYWHERE, 3),
    Metric("L0", "L0", CODE, "latents a token", EVERYWHERE, 1),
    Metric("Dead", "Dead", CODE, "share of latents", EVERYWHERE, 7),
    Metric("Density", "Density", CODE, "share of tokens", (CONSOLE,)),
    Metric("KLDiv", "KLDiv", PATCHED, "nats a token", EVERYWHERE, 4, panel="KL, nats a token"),
    Metric("KLDiv", "KLDiv_seq", PATCHED, "nats a sequence", (CONSOLE,)),
    Metric("DeltaCE", "DeltaCE", PATCHED, "nats a token", (CONSOLE, CARD, TABLE), 5),
    Metric("Recovered", "Recovered_zero", ABLATED, "share", (CONSOLE, CARD)),
    Metric("Recovered", "Recovered_mean", ABLATED, "share", EVERYWHERE, 6),
    Metric("Shrinkage", "Shrinkage", CODE, "1 = none", (CONSOLE,)),
    Metric("Routing", "Routing", ROUTING, ""),
    Metric("Probing", "Probing_k1", PROBED, "AUC", (CONSOLE, CARD)),
    Metric("Probing", "Probing_k2", PROBED, "AUC", (CONSOLE,)),
    Metric("Probing", "Probing_k5", PROBED, "AUC", (CONSOLE, CARD)),
    Metric("Probing", "Probing_state", PROBED, "AUC", (CONSOLE,)),
    Metric("Probing", "Probing_random", PROBED, "AUC", (CONSOLE,)),
    Metric("Probing", "Probing_noise", PROBED, "AUC", (CONSOLE,)),
)
NAMES = tuple(dict.fromkeys(metric.name for metric in METRICS))
# What "all" stands for: not what needs an optional package.
ALL = tuple(dict.fromkeys(metric.name for metric in METRICS if metric.needs != PROBED))
SCALE = (
    "NormMSE: below 0.1 very good (look at L0), 0.1 to 0.3 good, 0.3 to 0.6 fair, "
    "above 0.8 failed. KLDiv: nats per real token."
)
HOW_TO_COMPARE = (
    "Compare rows of the same site and of about the same L0: NormMSE falls with L0, and KL follows "
    "the depth of the site."
)


def keys_of(names: Container[str]) -> list[str]:
    """Return the keys of the metrics of these names."""
    return [metric.key for metric in METRICS if metric.name in names]


def needs(names: Container[str]) -> set[str]:
    """Return what the metrics of these names need."""
    return {metric.needs for metric in METRICS if metric.name in names}


def shown_in(place: str) -> list[str]:
    """Return the keys shown in a place, in the order of the rows."""
    return [metric.key for metric in METRICS if place in metric.shown]


def columns(place: str) -> list[str]:
    """Return the keys shown in a place that compares SAEs, in the order of its columns."""
    rows = [metric for metric in METRICS if place in metric.shown]
    rows.sort(key=lambda metric: metric.column)
    return [metric.key for metric in rows]


def units(keys: Container[str]) -> dict[str, str]:
    """Return the units of those keys that have one, in the order of the rows."""
    return {metric.key: metric.unit for metric in METRICS if metric.unit and metric.key in keys}


def headline(name: str) -> str:
    """Return the key of the number that stands for a name: the one that is compared, if any."""
    rows = [metric for metric in METRICS if metric.name == name]
    return max(rows, key=lambda metric: metric.column > 0).key
