"""RouteSAE beside a TopK at each of its sites: a table and a picture from evaluation results.

python -m experiments.smollm2_sites outputs/eval docs/smollm2_sites
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from src import plot_style
from src.files import load_json, save_text
from src.plots import draw_sites, pyplot

METRICS = {"NormMSE": "NormMSE", "KLDiv": "KL, nats a token"}
HEIGHT = 3.6  # inches


def load(folder: Path) -> tuple[dict[int, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return ({site: result of the TopK there}, {name: result of a RouteSAE})."""
    topk, routed = {}, {}
    for path in sorted(folder.glob("*.json")):
        result = load_json(path)
        if result["model"] == "TopK":
            topk[result["sites"][0]] = result
        elif result["model"] == "RouteSAE":
            random = "random" in result["title"]
            routed["RouteSAE, random sites" if random else "RouteSAE"] = result
    return dict(sorted(topk.items())), routed


def table(topk: dict[int, dict[str, Any]], routed: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table, one row a site and one for each RouteSAE."""
    lines = ["| SAE | site | NormMSE | FVU | KL, nats a token | dead | tokens routed here |"]
    lines.append("|---|---|---|---|---|---|---|")
    shares = {}
    if "Routing" in routed["RouteSAE"]:
        routing = routed["RouteSAE"]["Routing"]
        shares = dict(zip(routing["sites"], routing["share"], strict=True))

    def row(name: str, site: str, result: dict[str, Any], share: str) -> str:
        numbers = [f"{result[key]:.4f}" for key in ("NormMSE", "FVU", "KLDiv", "Dead")]
        return "| " + " | ".join([name, site, *numbers, share]) + " |"

    for site, result in topk.items():
        lines.append(row("TopK", str(site), result, f"{shares.get(site, 0):.3f}"))
    for name, result in routed.items():
        sites = f"{result['sites'][0]} ... {result['sites'][-1]}"
        lines.append(row(name, sites, result, ""))
    return "\n".join(lines) + "\n"


def picture(topk: dict[int, dict[str, Any]], routed: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw each metric over the sites: TopK as a curve, RouteSAE as a line across its sites."""
    figure, axes = pyplot().subplots(1, len(METRICS), figsize=(11, HEIGHT))
    results = [*topk.values(), *routed.values()]
    for axis, (key, label) in zip(axes, METRICS.items(), strict=True):
        draw_sites(axis, results, key, label, HEIGHT)
    plot_style.save(figure, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="folder of evaluation results")
    parser.add_argument("out", type=Path, help="path of the picture and the table, without suffix")
    args = parser.parse_args()
    topk, routed = load(args.results)
    save_text(table(topk, routed), args.out.with_suffix(".md"))
    picture(topk, routed, args.out)
    print(f"{args.out}.md and {args.out}.png")


if __name__ == "__main__":
    main()
