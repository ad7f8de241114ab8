"""Pictures and the comparison table, made from the JSON of evaluations alone: `python -m src.plots EVAL_FOLDER PICTURE.png`,
or the course of a training from its metrics.jsonl alone: `python -m src.plots RUN/metrics.jsonl PICTURE.png`."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from src.files import load_json, save_text

COLUMNS = ("L0", "NormMSE", "FVU", "KLDiv", "DeltaCE", "Recovered_mean", "Dead")
LABEL = {"step_tokens_per_s": "training step, tokens/s"}
SWEPT = re.compile(r"_(target_l0|l1_coeff)[\d.e+-]+(?=_|$)")


def load(folder: Path, only: str = "") -> list[dict[str, Any]]:
    """Results of one folder by NormMSE, best first. Raises ValueError where there are none."""
    found = [load_json(path) for path in sorted(folder.glob("*.json")) if only in path.stem]
    if not found:
        raise ValueError(f"no evaluation in {folder}; run evaluate.py first")
    return sorted(found, key=lambda result: result["NormMSE"])


def families(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results by title without the swept sparsity, each family by L0: one point of its frontier after another."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(SWEPT.sub("", result["title"]), []).append(result)
    return {name: sorted(family, key=lambda result: result["L0"]) for name, family in found.items()}


def between(family: list[dict[str, Any]], l0: float) -> dict[str, Any] | None:
    """The frontier of a family read off at an L0, linear in log L0; None where no two of its points lie around it."""
    for low, high in zip(family, family[1:], strict=False):
        if low["L0"] <= l0 <= high["L0"] and low["L0"] < high["L0"]:
            t = (math.log(l0) - math.log(low["L0"])) / (math.log(high["L0"]) - math.log(low["L0"]))
            numbers = {
                n: low[n] + t * (high[n] - low[n])
                for n in COLUMNS
                if low.get(n) is not None and high.get(n) is not None
            }
            return (
                low
                | numbers
                | {"title": f"{SWEPT.sub('', low['title'])}, read off its frontier", "L0": l0}
            )
    return None


def table(results: list[dict[str, Any]]) -> str:
    """A markdown table; a dash where nothing was measured. An L0 more than 10 % off the row's own k (else the one k of the table) is starred."""
    columns = COLUMNS + tuple(name for name in LABEL if any(result.get(name) for result in results))
    lines = [
        "| SAE | sites | " + " | ".join(LABEL.get(name, name) for name in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    targets = {result["k"] for result in results if result.get("k")}
    common = next(iter(targets)) if len(targets) == 1 else None
    if common:
        read = [between(family, common) for family in families(results).values() if len(family) > 1]
        results = sorted(
            [*results, *(row for row in read if row)], key=lambda result: result["NormMSE"]
        )
    for result in results:
        cells = [f"{result[name]:.4f}" if result.get(name) is not None else "-" for name in COLUMNS]
        cells += [
            f"{result[name]:,}" if result.get(name) else "-" for name in columns[len(COLUMNS) :]
        ]
        target = result.get("k") or common
        if target and abs(result["L0"] / target - 1) > 0.1:
            cells[0] += " *"
        sites = result["sites"]
        where = str(sites[0]) if len(sites) == 1 else f"{sites[0]} ... {sites[-1]}"
        lines.append(f"| {result['title']} | {where} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pyplot() -> Any:
    """matplotlib's, for files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """NormMSE and KL against L0, routing shares, firing rates."""
    plt = pyplot()
    figure, ((mse, kl), (share, density)) = plt.subplots(
        2, 2, figsize=(13, 9), constrained_layout=True
    )
    drawn = families(results)
    looks = {
        name: {"color": f"C{i % 10}", "marker": "osD^vP"[i // 10]} for i, name in enumerate(drawn)
    }
    for axis, name, label in ((mse, "NormMSE", "NormMSE"), (kl, "KLDiv", "KL, nats a token")):
        for title, family in drawn.items():
            points = [
                (result["L0"], result[name]) for result in family if result.get(name) is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), **looks[title], label=title)
        axis.set(xlabel="L0, active latents a token", ylabel=label, xscale="log", yscale="log")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_locator(
                plt.matplotlib.ticker.LogLocator(subs=(2, 3, 5))
            )  # all nine would run into each other
            side.set_minor_formatter("{x:.2g}")
        axis.grid(alpha=0.3, which="both")
    routed = [result for result in results if "Routing" in result]
    for i, result in enumerate(routed):
        sites = [site + 0.8 * (i / len(routed) - 0.5) for site in result["Routing"]["sites"]]
        share.bar(
            sites,
            result["Routing"]["share"],
            width=0.8 / len(routed),
            label=result["title"],
            align="edge",
        )
    share.set(xlabel="site", ylabel="share of tokens", title="Routing")
    if routed:
        share.set_xticks(routed[0]["Routing"]["sites"])
        share.legend(fontsize=8)
    for title, family in drawn.items():
        latents = family[len(family) // 2]["Density_histogram"]["latents"]
        density.plot(range(len(latents)), [n / sum(latents) for n in latents], **looks[title])
    density.set_xticks(range(7), ["never", "<1e-5", "<1e-4", "<1e-3", "<1e-2", "<0.1", "<1"])
    density.set(
        xlabel="share of tokens a latent is active on",
        ylabel="share of latents",
        title="Firing rates",
    )
    handles, labels = mse.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def course(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a metrics.jsonl by SAE, in the order written. A last line cut short by a kill is left out.

    Raises ValueError where there is no line.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # what was being written when the process was killed
            continue
        found.setdefault(line["sae"], []).append(line)
    if not found:
        raise ValueError(f"{path} has no line yet")
    return found


def run_picture(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A training's course over tokens: every term of the loss, L0, the dead share, and for routed models the share of each site."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    routed = [title for title, lines in runs.items() if any("share" in line for line in lines)]
    rows = 2 + math.ceil(len(routed) / 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(13, 4.2 * rows), constrained_layout=True, squeeze=False
    )
    panels = {
        "NormMSE": axes[0][0],
        "other terms of the loss": axes[0][1],
        "L0, active latents a token": axes[1][0],
        "dead latents": axes[1][1],
    }
    marks = ["-", "--", ":", "-."]
    for i, (title, lines) in enumerate(runs.items()):
        tokens, look = [line["tokens"] for line in lines], {"color": f"C{i % 10}", "label": title}
        for panel, name in (
            ("NormMSE", "NormMSE"),
            ("L0, active latents a token", "L0"),
            ("dead latents", "dead"),
        ):
            panels[panel].plot(tokens, [line.get(name, math.nan) for line in lines], **look)
        names = list(
            dict.fromkeys(
                name
                for line in lines
                for name in list(line)[list(line).index("loss") + 1 : list(line).index("L0")]
            )
        )
        for name, mark in zip(
            [name for name in names if name != "NormMSE"], itertools.cycle(marks), strict=False
        ):  # terms stand between the two
            label = f"{title}: {name}"
            panels["other terms of the loss"].plot(
                tokens,
                [line.get(name, math.nan) for line in lines],
                mark,
                color=look["color"],
                label=label,
            )
    for label, axis in panels.items():
        axis.set(xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    for label in ("NormMSE", "other terms of the loss", "L0, active latents a token"):
        panels[label].set_yscale("log")
    for axis in axes[2:].flat[len(routed) :]:
        axis.remove()
    for title, axis in zip(routed, axes[2:].flat, strict=False):
        lines = [line for line in runs[title] if "share" in line]
        shares = list(zip(*(line["share"] for line in lines), strict=True))
        colors = plt.get_cmap("viridis")([i / max(1, len(shares) - 1) for i in range(len(shares))])
        axis.stackplot(
            [line["tokens"] for line in lines],
            shares,
            labels=[f"site {site}" for site in lines[0]["sites"]],
            colors=colors,
        )
        axis.set(xlabel="tokens", ylabel="share of tokens", title=title, ylim=(0, 1))
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m src.plots", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="folder of evaluation results, or a run's metrics.jsonl"
    )
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--table", type=Path, help="markdown file to write as well")
    parser.add_argument("--only", default="", help="only results whose name holds this")
    args = parser.parse_args()
    if args.folder.suffix == ".jsonl":
        run_picture(
            {title: lines for title, lines in course(args.folder).items() if args.only in title},
            args.picture,
        )
        print(f"picture: {args.picture}")
        return
    results = load(args.folder, args.only)
    picture(results, args.picture)
    print(table(results))
    print(f"picture: {args.picture}")
    if args.table:
        head = results[0]
        about = f"{head['tokens']:,} tokens of split {head['split']} of {Path(head['data_path']).name}; commit {str(head['git_commit'])[:10]}; "
        about += (
            f"torch {head['versions']['torch']}; trained on {head['trained_tokens']:,} tokens each."
        )
        scale = "NormMSE: below 0.1 very good (look at L0), 0.1 to 0.3 good, 0.3 to 0.6 fair, above 0.8 failed. KLDiv: nats per real token."
        star = "\\* L0 is more than 10 % off the common k: not comparable at this row. A Crosscoder's code has read later sites too, "
        star += "so its KL is no causal comparison. KL follows the depth of the patched site: compare it only between rows patched at the same sites."
        save_text(
            f"# Evaluation results\n\n{about}\n\n{table(results)}\n\n{scale}\n\n{star}\n\n![comparison]({args.picture.name})\n",
            args.table,
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"plots: error: {error}", file=sys.stderr)
        sys.exit(2)
