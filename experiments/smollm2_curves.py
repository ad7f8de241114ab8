"""Error, KL and dead latents of SAEs by the number of tokens on which each was trained.

    python -m experiments.smollm2_curves outputs/smollm2_curves/eval docs/smollm2_curves

reads the results of evaluate.py in the folder. Results of the same model and sites are one curve;
each point is a finished training. `bash scripts/smollm2_curves.sh` makes everything.
"""

from __future__ import annotations

from pathlib import Path

from experiments import exit_code
from src import plot_style
from src.config import small_parser
from src.files import save_text
from src.plots import Result, load, pyplot

METRICS = {
    "NormMSE": "NormMSE, held-out text",
    "KLDiv": "KL, nats a token, held-out text",
    "Dead": "share of dead latents",
}
HEIGHT = 3.6  # inches


def curves(results: list[Result]) -> dict[str, list[Result]]:
    """Return {name: results by trained tokens}. Raises ValueError if a result lacks a number."""
    named: dict[str, list[Result]] = {}
    for result in results:
        lacking = [key for key in (*METRICS, "trained_tokens") if result.get(key) is None]
        if lacking:
            raise ValueError(
                f"the evaluation of {result['title']} has no {', '.join(lacking)}; "
                f"measure it with evaluate.py --metric {' '.join(METRICS)}"
            )
        sites = result["sites"]
        where = f"site {sites[0]}" if len(sites) == 1 else f"sites {sites[0]} ... {sites[-1]}"
        named.setdefault(f"{result['title'].split('_')[0]}, {where}", []).append(result)
    by_sites = sorted(
        named.items(), key=lambda item: (-len(item[1][0]["sites"]), item[1][0]["sites"])
    )
    return {name: sorted(rows, key=lambda row: row["trained_tokens"]) for name, rows in by_sites}


def table(named: dict[str, list[Result]]) -> str:
    """Return the Markdown table: one row for each SAE, with its metrics side by side."""
    heads = ["SAE", "training tokens", *METRICS]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, rows in named.items():
        for row in rows:
            numbers = [f"{row[key]:.4f}" for key in METRICS]
            lines.append("| " + " | ".join([name, f"{row['trained_tokens']:,}", *numbers]) + " |")
    return "\n".join(lines) + "\n"


def picture(named: dict[str, list[Result]], path: Path) -> None:
    """Draw each metric over the training tokens, one line for each model and its sites."""
    figure, axes = pyplot().subplots(1, len(METRICS), figsize=(15, HEIGHT))
    at_one_site = [name for name in named if ", site " in name]
    shades = dict(zip(at_one_site, plot_style.site_colours(len(at_one_site)), strict=True))
    for axis, (key, title) in zip(axes, METRICS.items(), strict=True):
        labels, drawn = [], []
        for name, rows in named.items():
            colour = shades.get(name, plot_style.colour(name.split(",")[0]))
            tokens = [row["trained_tokens"] / 1000 for row in rows]
            values = [row[key] for row in rows]
            axis.plot(tokens, values, color=colour, marker="o", markersize=4)
            labels.append(plot_style.Label(tokens[-1], values[-1], name, colour))
            drawn += values
        axis.set_xscale("log")
        axis.set(xlabel="thousand training tokens", title=title)
        ticks = sorted({round(row["trained_tokens"] / 1000, -1) for row in sum(named.values(), [])})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        plot_style.set_zero_axis(axis, "y", drawn)
        plot_style.label_lines(axis, labels, HEIGHT - 0.8)
    plot_style.save(figure, path.with_suffix(".png"))


def main() -> None:
    parser = small_parser("experiments.smollm2_curves", __doc__)
    parser.add_argument("folder", type=Path, help="results of evaluate.py")
    parser.add_argument("out", type=Path, help="path of the picture and the table, without suffix")
    args = parser.parse_args()
    named = curves(load(args.folder))
    save_text(table(named), args.out.with_suffix(".md"))
    picture(named, args.out)
    print(f"{args.out}.md and {args.out}.png")


if __name__ == "__main__":
    raise SystemExit(exit_code("smollm2_curves", main))
