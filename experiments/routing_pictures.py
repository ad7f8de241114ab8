"""Pictures of the routing experiment, from its results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "untrained": "untrained",
    "published": "published",
    "expected": "expected + switch",
    "advantage": "advantage + switch",
    "ste": "ste + switch",
}


def _axes(rows: int, columns: int, size: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
                face = f"C{row}" if marker == "D" else "white"
                axis.plot(
                    [100 * found[key]["low"], 100 * found[key]["high"]],
                    [row + offset] * 2,
                    color=f"C{row}",
                    lw=2,
                )
                axis.plot(
                    100 * found[key]["value"], row + offset, marker, color=f"C{row}", mfc=face, ms=8
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
    axes[0][0].legend(fontsize=8)
    _save(figure, path)


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
                color=f"C{column}",
                alpha=0.45 + 0.25 * (i % 3),
            )
        share.set(title=NAMES[name], ylim=(0, 1))
        share.set_xticks(numbers)
        for label, runs, look in (
            ("router", mine, f"C{column}"),
            ("random, same shares", random, "0.5"),
        ):
            errors = np.array(runs["NormMSE"], dtype=float)
            errors[np.array(runs["shares"]) < 0.005] = np.nan  # too few tokens to say
            for i, seed in enumerate(errors):
                error.plot(
                    numbers, seed, "o", color=look, ms=4, alpha=0.8, label=label if not i else None
                )
        error.plot(numbers, topk, "k-", lw=1, label="TopK trained there")
        error.set(xlabel="site", ylim=(0, 1.35 * max(topk)))
        error.set_xticks(numbers)
        error.legend(fontsize=7)
    axes[0][0].set_ylabel("share of tokens")
    axes[1][0].set_ylabel("NormMSE of the tokens there")
    _save(figure, path)


def costs(result: dict[str, Any], path: Path) -> None:
    """KL of patching by depth: single-site SAEs as lines, each routed SAE at its mean site."""
    figure, axes = _axes(1, 3, (15, 4.4))
    numbers = result["sites"]
    for axis, metric in zip(axes[0][:2], ("KL", "KL / mean ablation"), strict=True):
        for family, look in (("topk", "k-o"), ("mlsae", "C7-s")):
            values = [result["runs"][f"{family}_{site}"][metric] for site in numbers]
            axis.plot(
                numbers,
                [v["value"] for v in values],
                look,
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
        for column, name in enumerate(result["gains"]):
            for run, marker in ((name, "D"), (f"{name}_shares", "x")):
                for seed, shares in enumerate(result["per_site"][run]["shares"]):
                    depth = float(np.dot(shares, numbers))
                    value = result["runs"][run][metric]["seeds"][seed]
                    axis.plot(
                        depth,
                        value,
                        marker,
                        color=f"C{column}",
                        ms=6,
                        label=NAMES[name] if marker == "D" and not seed else None,
                    )
        axis.set(xlabel="site, or mean site of the tokens (x: random at its shares)", ylabel=metric)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    noise = axes[0][2]
    for family, look in (("topk", "k-o"), ("mlsae", "C7-s")):
        noise.plot(
            numbers,
            [result["runs"][f"{family}_{site}"]["KL / equal noise"]["value"] for site in numbers],
            look,
            ms=4,
            label=family,
        )
    for column, name in enumerate(result["gains"]):
        for seed, shares in enumerate(result["per_site"][name]["shares"]):
            value = result["runs"][name]["KL / equal noise"]["seeds"][seed]
            noise.plot(float(np.dot(shares, numbers)), value, "D", color=f"C{column}", ms=6)
    noise.axhline(1, color="k", lw=0.8)
    noise.set(
        xlabel="site, or mean site of the tokens",
        ylabel="KL of the SAE's error / of random error of its size",
        ylim=(0, None),
    )
    noise.grid(alpha=0.3)
    _save(figure, path)


def draw(result: dict[str, Any], folder: Path) -> None:
    gains(result, folder / "routing_gains.png")
    sites(result, folder / "routing_sites.png")
    costs(result, folder / "routing_costs.png")
