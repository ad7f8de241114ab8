"""One look for every picture: colours of models, markers of sites, direct labels, axes that hold.

Readers of all kinds of colour vision can tell the colours of the models apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src.files import write_atomic
from src.zoo import ZOO

# Chosen so that the two closest models are 11 apart (CIEDE2000) for all kinds of colour vision
# (tests/test_colours.py).
COLOURS = {
    "TopK": "#0072B2",
    "RouteSAE": "#D55E00",
    "MLSAE": "#222222",
    "Crosscoder": "#2C8BFA",
    "BatchTopK": "#5C1261",
    "Vanilla": "#F28D00",
    "Gated": "#1BB47C",
    "JumpReLU": "#AB557C",
    "RandomK": "#94A3AC",
}
MORE_COLOURS = ("#544700", "#583B9D", "#804E37")  # of further models, in the order of the zoo
INK = 0.75  # of a colour's brightness, for its text
SITE_MARKERS = "osD^vP<>Xph"
SEVERAL_SITES = "*"  # marker of a model that reads several sites
DARK, GREY, LIGHT = "#333333", "#767676", "#DDDDDD"
L0_LABEL = "L0, active latents a token"
LABEL_SIZE = 8.5  # points
LINE_HEIGHT = 1.3  # of a label, in units of its size
LEAST_RATIO = 1.25  # of the ends of a log axis
DPI = 150


def pyplot() -> Any:
    """Return matplotlib's pyplot, set to draw to files alone, with the style of all pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "text.parse_math": False,  # titles of others may hold $
            "font.size": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": LIGHT,
            "grid.linewidth": 0.7,
            "lines.linewidth": 1.6,
            "lines.markersize": 5,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "pdf.fonttype": 42,  # text stays text
        }
    )
    return plt


def save(figure: Any, path: Path) -> None:
    """Write a picture to its path, and as a PDF beside it; each file is whole or absent."""
    kinds = [path.suffix.removeprefix(".") or "png"]
    kinds += ["pdf"] if kinds[0] == "png" else []
    for kind in kinds:
        # Without a date the same results give the same bytes.
        metadata = {"CreationDate": None} if kind == "pdf" else None
        target = path if kind == kinds[0] else path.with_suffix(f".{kind}")
        write_atomic(
            target,
            lambda file, kind=kind, metadata=metadata: figure.savefig(
                file, dpi=DPI, format=kind, metadata=metadata
            ),
        )
    pyplot().close(figure)


def colour(model: str) -> str:
    """The colour of a model in every picture; grey for a name that is no model."""
    if model in COLOURS:
        return COLOURS[model]
    others = [name for name in ZOO if name not in COLOURS]
    return MORE_COLOURS[others.index(model) % len(MORE_COLOURS)] if model in others else GREY


def ink(colour: Any) -> tuple[float, ...]:
    """A darker form of a colour, in which small text is easy to read."""
    return tuple(INK * share for share in pyplot().matplotlib.colors.to_rgb(colour))


def site_colours(count: int) -> Any:
    """Colours of sites from the lowest to the highest, in a sequential map without its palest."""
    places = [0.9 * i / max(1, count - 1) for i in range(count)]
    return pyplot().get_cmap("viridis")(places)


def site_markers(all_sites: Iterable[Sequence[int]]) -> dict[tuple[int, ...], str]:
    """{sites of an SAE: its marker}, the same in every panel of a figure."""
    distinct = sorted({tuple(sites) for sites in all_sites})
    single = [sites for sites in distinct if len(sites) == 1]
    markers = {sites: SITE_MARKERS[i % len(SITE_MARKERS)] for i, sites in enumerate(single)}
    return {sites: markers.get(sites, SEVERAL_SITES) for sites in distinct}


# ------------------------------------------------------------------------------------------ axes


def round_ticks(low: float, high: float) -> list[float]:
    """Ticks of a log axis from low to high at round numbers: at least two, at most about eight."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        numbers = [step * 10.0**power for power in powers for step in steps]
        ticks = [number for number in numbers if low <= number <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / 8)]
    # So short an axis is nearly linear.
    numbers = pyplot().matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(number) for number in numbers if low <= number <= high]


def set_log_axis(axis: Any, side: str, values: Iterable[float]) -> None:
    """Make an axis logarithmic, around its positive values, with round ticks written out.

    Values that are equal, or nearly so, still get an axis of some length. side: "x" or "y".
    """
    positive = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
    low, high = min(positive), max(positive)
    if high / low < LEAST_RATIO:
        middle = math.sqrt(low * high)
        low, high = middle / LEAST_RATIO, middle * LEAST_RATIO
    margin = (high / low) ** 0.06
    low, high = low / margin, high * margin
    ticks = round_ticks(low, high)
    getattr(axis, f"set_{side}scale")("log")
    getattr(axis, f"set_{side}lim")(low, high)
    line = getattr(axis, f"{side}axis")
    line.set_ticks(ticks, [f"{tick:.3g}" for tick in ticks])
    line.set_ticks([], minor=True)


def set_zero_axis(axis: Any, side: str, values: Iterable[float], room: float = 1.08) -> None:
    """Let an axis begin at zero and end above its values."""
    finite = [value for value in values if math.isfinite(value)]
    top = max([value for value in finite if value > 0], default=1.0)
    getattr(axis, f"set_{side}lim")(min([0.0, *finite]), room * top)


# ------------------------------------------------------------------------------------ direct labels


class Label(NamedTuple):
    """A text beside the right end of a line."""

    x: float  # where the line ends
    y: float
    text: str
    colour: Any


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move places (0 to 1) apart until each is at least `gap` from the next; the order stays.

    They stay between 0 and 1 where there is room for all.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = [places[index] for index in order]
    for _ in range(200):
        is_close = False
        for i in range(len(moved) - 1):
            lack = gap - (moved[i + 1] - moved[i])
            if lack > 1e-9:
                moved[i] -= lack / 2
                moved[i + 1] += lack / 2
                is_close = True
        if gap * (len(moved) - 1) < 1 and (moved[0] < 0 or moved[-1] > 1):
            moved[0], moved[-1] = max(moved[0], 0.0), min(moved[-1], 1.0)
            is_close = True
        if not is_close:
            break
    result = [0.0] * len(places)
    for index, place in zip(order, moved, strict=True):
        result[index] = place
    return result


def label_lines(axis: Any, labels: Sequence[Label], height: float) -> None:
    """Name lines at their right ends. Call it when the limits of the axis are set.

    height: of the axis in inches, about; labels of neighbouring lines are moved apart by it.
    """
    if not labels:
        return
    to_axis = axis.transAxes.inverted()
    ends = [to_axis.transform(axis.transData.transform((label.x, label.y))) for label in labels]
    gap = LABEL_SIZE * LINE_HEIGHT / 72 / height
    places = spread([float(y) for _, y in ends], gap)
    for label, (x, y), place in zip(labels, ends, places, strict=True):
        axis.annotate(
            label.text,
            (x, y),
            (1.04, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=ink(label.colour),
            fontsize=LABEL_SIZE,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": label.colour, "lw": 0.6, "alpha": 0.5},
        )
