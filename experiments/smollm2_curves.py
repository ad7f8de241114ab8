"""Error and dead latents over the tokens of one training: RouteSAE beside TopK at some sites.

python -m experiments.smollm2_curves outputs/runs/sites/metrics.jsonl docs/smollm2_curves
"""

from __future__ import annotations

import argparse
from pathlib import Path

from src.files import save_text
from src.plots import Course, load_courses, pyplot

METRICS = {"NormMSE": "NormMSE on text not seen before", "dead": "share of dead latents"}
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#CC79A7")
TABLE_TOKENS = (100_000, 200_000, 500_000, 1_000_000)


def chosen(courses: dict[str, Course], sites: list[int]) -> dict[str, Course]:
    """Return the courses of the SAEs of several sites and of those at the given sites."""
    result = {}
    for title, course in courses.items():
        model, own = title.split("_")[0], course[0]["sites"]
        if len(own) > 1:
            result[f"{model}, sites {own[0]} ... {own[-1]}"] = course
        elif own[0] in sites:
            result[f"{model}, site {own[0]}"] = course
    return result


def table(courses: dict[str, Course]) -> str:
    """Return the Markdown table: both metrics at the report next to some numbers of tokens."""
    heads = [f"{name} at {n // 1000}k" for name in METRICS for n in TABLE_TOKENS]
    lines = ["| SAE | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, course in courses.items():
        near = [min(course, key=lambda line, n=n: abs(line["tokens"] - n)) for n in TABLE_TOKENS]
        numbers = [f"{line[key]:.4f}" for key in METRICS for line in near]
        lines.append("| " + " | ".join([name, *numbers]) + " |")
    return "\n".join(lines) + "\n"


def picture(courses: dict[str, Course], path: Path) -> None:
    """Draw both metrics over the tokens of training, one curve for each SAE."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(METRICS), figsize=(10, 3.6), layout="constrained")
    for axis, (key, label) in zip(axes, METRICS.items(), strict=True):
        for (name, course), colour in zip(courses.items(), COLOURS, strict=True):
            tokens = [line["tokens"] / 1000 for line in course]
            axis.plot(tokens, [line[key] for line in course], color=colour, label=name)
        axis.set_ylim(0, None)
        axis.set_xlabel("thousand training tokens")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("log", type=Path, help="metrics.jsonl of the training")
    parser.add_argument("out", type=Path, help="path of the picture and the table, without suffix")
    parser.add_argument("--sites", type=int, nargs=3, default=[7, 14, 22], help="of the TopKs")
    args = parser.parse_args()
    courses = chosen(load_courses(args.log), args.sites)
    save_text(table(courses), args.out.with_suffix(".md"))
    picture(courses, args.out)
    print(f"{args.out}.md and {args.out}.png")


if __name__ == "__main__":
    main()
