"""Pictures of the routing experiment, from its results alone.

python -m experiments.routing_pictures docs/routing_results.json docs
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from src import plot_style
from src.config import small_parser
from src.files import load_json

NAMES = {
    "untrained": "untrained",
    "published": "published",
    "expected": "expected + switch",
    "advantage": "advantage + switch",
    "ste": "ste + switch",
}


# Colour-blind safe; "published" and "untrained" are controls.
COLOURS = {
    "untrained": plot_style.GREY,
    "published": plot_style.COLOURS["Vanilla"],
    "expected": plot_style.COLOURS["RouteSAE"],
    "advantage": plot_style.COLOURS["JumpReLU"],
    "ste": plot_style.COLOURS["Gated"],
}


LOOKS = {"topk": plot_style.COLOURS["TopK"], "mlsae": plot_style.COLOURS["MLSAE"]}


def _axes(rows: int, columns: int, size: tuple[float, float]) -> Any:
    return plot_style.pyplot().subplots(rows, columns, figsize=size, squeeze=False)


def gains(result: dict[str, Any], path: Path) -> None:
    """How far each router is below two controls at its own shares; small points are seeds."""
    metrics = ("NormMSE", "KL", "KL / mean ablation")
    controls = (
        ("mean", "seeds", "D", -0.14, "random assignment"),
        ("against_fixed", "against_fixed_seeds", "s", 0.14, "untrained router, shifted"),
    )
    figure, axes = _axes(1, len(metrics), (14, 4))
    for axis, metric in zip(axes[0], metrics, strict=True):
        for row, name in enumerate(result["gains"]):
            for key, seeds, marker, offset, _ in controls:
                found = result["gains"][name][metric]
                if key not in found:
                    continue
                face = COLOURS[name] if marker == "D" else "white"
                axis.plot(
                    [100 * found[key]["low"], 100 * found[key]["high"]],
                    [row + offset] * 2,
                    color=COLOURS[name],
                    lw=2,
                )
                axis.plot(
                    100 * found[key]["value"],
                    row + offset,
                    marker,
                    color=COLOURS[name],
                    mfc=face,
                    ms=8,
                )
                axis.plot(
                    [100 * seed["value"] for seed in found[seeds]],
                    [row + offset + 0.12] * len(found[seeds]),
                    ".",
                    color="0.5",
                    ms=5,
                )
        axis.axvline(0, color="k", lw=0.8)
        axis.set(
            title=metric,
            xlabel="% below the control at equal shares",
            ylim=(len(result["gains"]) - 0.4, -0.6),
        )
        axis.set_yticks(
            range(len(result["gains"])),
            [NAMES[name] for name in result["gains"]] if axis is axes[0][0] else [],
        )
        axis.grid(axis="x", alpha=0.3)
    for _, _, marker, _, label in controls:
        axes[0][0].plot(
            [], [], marker, color="k", mfc="k" if marker == "D" else "white", ms=7, label=label
        )
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    plot_style.save(figure, path)


def sites(result: dict[str, Any], path: Path) -> None:
    """Share of tokens that each router sends to each site, a bar a seed, and their error."""
    figure, axes = _axes(2, len(result["gains"]), (16, 6))
    numbers = result["sites"]
    topk = [result["runs"][f"topk_{site}"]["NormMSE"]["value"] for site in numbers]
    for column, name in enumerate(result["gains"]):
        mine, random = result["per_site"][name], result["per_site"][f"{name}_shares"]
        share, error = axes[0][column], axes[1][column]
        for i, shares in enumerate(mine["shares"]):
            share.bar(
                np.array(numbers) + 0.27 * (i - 1),
                shares,
                0.25,
                color=COLOURS[name],
                alpha=0.45 + 0.25 * (i % 3),
            )
        share.set(title=NAMES[name], ylim=(0, 1))
        share.set_xticks(numbers)
        for label, runs, look, marker in (
            ("random, same shares", random, "0.5", "x"),
            ("router", mine, COLOURS[name], "o"),
        ):
            errors = np.array(runs["NormMSE"], dtype=float)
            errors[np.array(runs["shares"]) < 0.005] = np.nan  # too few tokens to say
            for i, seed in enumerate(errors):
                error.plot(
                    numbers,
                    seed,
                    marker,
                    color=look,
                    ms=4,
                    alpha=0.8,
                    label=label if not i else None,
                )
        error.plot(numbers, topk, "k-", lw=1, label="TopK trained there")
        error.set(xlabel="site", ylim=(0, 1.35 * max(topk)))
        error.set_xticks(numbers)
        error.legend(fontsize=7)
    axes[0][0].set_ylabel("share of tokens")
    axes[1][0].set_ylabel("NormMSE of the tokens there")
    plot_style.save(figure, path)


def costs(result: dict[str, Any], path: Path) -> None:
    """KL of patching by depth: single-site SAEs as lines, each routed SAE at its mean site."""
    figure, axes = _axes(1, 3, (15, 4.4))
    numbers = result["sites"]
    for axis, metric in zip(axes[0][:2], ("KL", "KL / mean ablation"), strict=True):
        for family, look in LOOKS.items():
            values = [result["runs"][f"{family}_{site}"][metric] for site in numbers]
            axis.plot(
                numbers,
                [v["value"] for v in values],
                "-o",
                color=look,
                ms=4,
                label={"topk": "TopK of the site", "mlsae": "MLSAE"}[family],
            )
            axis.fill_between(
                numbers,
                [v["low"] for v in values],
                [v["high"] for v in values],
                alpha=0.2,
                color="0.5",
            )
        for name in result["gains"]:
            for run, marker in ((name, "D"), (f"{name}_shares", "x")):
                for seed, shares in enumerate(result["per_site"][run]["shares"]):
                    depth = float(np.dot(shares, numbers))
                    value = result["runs"][run][metric]["seeds"][seed]
                    axis.plot(
                        depth,
                        value,
                        marker,
                        color=COLOURS[name],
                        ms=6,
                        label=NAMES[name] if marker == "D" and not seed else None,
                    )
        axis.set(xlabel="site, or mean site of the tokens (x: random at its shares)", ylabel=metric)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    noise = axes[0][2]
    for family, look in LOOKS.items():
        noise.plot(
            numbers,
            [result["runs"][f"{family}_{site}"]["KL / equal noise"]["value"] for site in numbers],
            "-o",
            color=look,
            ms=4,
            label=family,
        )
    for name in result["gains"]:
        for seed, shares in enumerate(result["per_site"][name]["shares"]):
            value = result["runs"][name]["KL / equal noise"]["seeds"][seed]
            noise.plot(float(np.dot(shares, numbers)), value, "D", color=COLOURS[name], ms=6)
    noise.axhline(1, color="k", lw=0.8)
    noise.set(
        xlabel="site, or mean site of the tokens",
        ylabel="KL of the SAE's error / of random error of its size",
        ylim=(0, None),
    )
    noise.grid(alpha=0.3)
    plot_style.save(figure, path)


def draw(result: dict[str, Any], folder: Path) -> None:
    gains(result, folder / "routing_gains.png")
    sites(result, folder / "routing_sites.png")
    costs(result, folder / "routing_costs.png")


def main() -> None:
    parser = small_parser("experiments.routing_pictures", __doc__)
    parser.add_argument("results", type=Path, help="routing_results.json")
    parser.add_argument("folder", type=Path, help="of the pictures")
    args = parser.parse_args()
    draw(load_json(args.results), args.folder)


if __name__ == "__main__":
    main()
