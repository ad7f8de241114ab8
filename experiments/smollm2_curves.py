"""Error and dead latents over the tokens of one training: RouteSAE beside TopK at some sites.

python -m experiments.smollm2_curves outputs/runs/sites/metrics.jsonl docs/smollm2_curves
"""

from __future__ import annotations

from pathlib import Path

from src import plot_style
from src.config import small_parser
from src.files import save_text
from src.plots import Course, load_courses, pyplot

METRICS = {"NormMSE": "NormMSE on text not seen before", "dead": "share of dead latents"}
HEIGHT = 3.6  # inches
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
    figure, axes = pyplot().subplots(1, len(METRICS), figsize=(11, HEIGHT))
    at_one_site = [name for name in courses if ", site " in name]
    shades = dict(zip(at_one_site, plot_style.site_colours(len(at_one_site)), strict=True))
    for axis, (key, title) in zip(axes, METRICS.items(), strict=True):
        labels = []
        for name, course in courses.items():
            colour = shades.get(name, plot_style.colour(name.split(",")[0]))
            tokens = [line["tokens"] / 1000 for line in course]
            values = [line[key] for line in course]
            axis.plot(tokens, values, color=colour)
            labels.append(plot_style.Label(tokens[-1], values[-1], name, colour))
        drawn = [line[key] for course in courses.values() for line in course]
        axis.set(xlabel="thousand training tokens", title=title)
        plot_style.set_zero_axis(axis, "y", drawn)
        plot_style.label_lines(axis, labels, HEIGHT - 0.8)
    plot_style.save(figure, path.with_suffix(".png"))


def main() -> None:
    parser = small_parser("experiments.smollm2_curves", __doc__)
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
