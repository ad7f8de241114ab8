"""Tables and pictures from the results of benchmarks.run."""

from pathlib import Path

from src import plot_style


def table(head, rows):
    """Lines of a Markdown table, after an empty line."""
    return [
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def number(measured, unit):
    """(value, spread) of {"median", "low", "high", "turns"} as cells of a table."""
    if measured is None:
        return "not measured", ""
    turns = f"{measured['turns']} turn{'s' * (measured['turns'] > 1)}"
    spread = f"{measured['low']:.2f} to {measured['high']:.2f}, {turns}"
    return f"{measured['median']:.2f} {unit}", spread


def floor_of(found, contender):
    """The floor of a contender that trains with all options at their defaults, else None."""
    by_name = {f"ours {models}": floor for models, floor in found["floors"].items()}
    return by_name.get(contender["name"])


CONTENDER_COLUMNS = [
    "useful tokens/s",
    "spread",
    "of the floor",
    "NormMSE",
    "dead",
    "peak memory",
    "to the first step",
]


def contender_row(found, contender):
    """A row of the table of contenders."""
    rate, (low, high) = contender["tokens_per_s"], contender["spread"]
    floor = floor_of(found, contender)
    share = f"{floor['total'] * rate:.0%}" if floor else ""
    qualities = [contender[key] for key in ("NormMSE", "dead")]
    return [
        contender["name"],
        f"{rate:,.0f}",
        f"{low:,.0f} to {high:,.0f}",
        share,
        *("" if quality is None else f"{quality:.4f}" for quality in qualities),
        f"{contender['peak_bytes'] / 1e9:.2f} GB",
        f"{contender['first_step_s']:.1f} s",
    ]


def header(found):
    """Two lines about the machine and the shapes."""
    bf16, fp32, bandwidth = (found["machine"][key] / 1e9 for key in ("bf16", "fp32", "bandwidth"))
    commit = (found["commit"]["git_commit"] or "?")[:9]
    return [
        f"{found['device']}: {bf16:,.0f} GFLOP/s in bfloat16, {fp32:,.0f} in float32, "
        f"{bandwidth:.1f} GB/s; load {found['load_before']} before and "
        f"{found['load_after']} after.",
        f"{found['shape']} shapes, {found['latents']:,} latents, k {found['k']}, "
        f"{found['rows_a_step']} x {found['tokens_a_row']} tokens a step, "
        f"{found['tokens']:,} training tokens; commit {commit}, {found['seconds']:.0f} s in all.",
    ]


def targets_table(targets):
    """The table of targets; the column `moonshot` only if a target has one."""
    limits = ["must", "goal"]
    if any(row["moonshot"] for row in targets):
        limits.append("moonshot")
    rows = []
    for row in targets:
        cells = [f"{row[key]:g} {row['unit']}" if row[key] else "" for key in limits]
        measured = number(row["measured"], row["unit"])
        rows.append([row["target"], *cells, *measured, row.get("met", "")])
    return table(["target", *limits, "measured", "spread", "met"], rows)


def stages_table(contender, floor):
    """Time of each stage beside its floor."""
    spent = {**contender["stages"], "all": sum(contender["stages"].values())}
    least = {**floor, "all": floor["total"]}
    measured = [f"{1e6 * seconds:.2f}" for seconds in spent.values()]
    counted = [f"{1e6 * least[stage]:.2f}" if stage in least else "" for stage in spent]
    head = [f"{contender['name']}, microseconds a token", *spent]
    return table(head, [["measured", *measured], ["floor", *counted]])


def markdown(found):
    """benchmark.md: targets, contenders, stages beside their floors, and what was left out."""
    lines = [*header(found), *targets_table(found["targets"])]
    for name, results in found["groups"].items():
        if isinstance(results, dict):  # of apply, which has no contenders
            continue
        rows = [contender_row(found, contender) for contender in results]
        lines += table([name, *CONTENDER_COLUMNS], rows)
        for contender in results:
            floor = floor_of(found, contender)
            if contender["stages"] and floor:
                lines += stages_table(contender, floor)
    lines += ["", *(f"left out: {line}" for line in found["left_out"])]
    return "\n".join(lines).rstrip() + "\n"


def picture(found, path):
    """Rates of the training contenders, and their NormMSE over seconds of training."""
    contenders = found["groups"].get("training")
    if not contenders:
        return
    size = (12, 1.2 + 0.32 * len(contenders))
    figure, (left, right) = plot_style.pyplot().subplots(1, 2, figsize=size)
    draw_rates(left, contenders)
    draw_curves(right, contenders, size[1] - 0.8)
    plot_style.save(figure, Path(path))


def colour_of(name):
    """The colour of our own models in all pictures; grey for a peer."""
    if not name.startswith("ours "):
        return plot_style.GREY
    return plot_style.colour(name.replace(",", " ").split()[1])


def draw_rates(axis, contenders):
    """A bar each, with its spread, the first contender above."""
    for row, contender in enumerate(contenders):
        rate = contender["tokens_per_s"] / 1e3
        spread = [[abs(rate - side / 1e3)] for side in contender["spread"]]
        axis.barh(row, rate, 0.7, xerr=spread, color=colour_of(contender["name"]), capsize=3)
    axis.set_yticks(range(len(contenders)), [contender["name"] for contender in contenders])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(title="Training rate", xlabel="useful tokens/s, thousands")


def draw_curves(axis, contenders, height):
    """A line each; a cross where quality was measured only once."""
    labels = []
    for contender in contenders:
        curve = contender["curve"]
        colour = colour_of(contender["name"])
        line = {"marker": "o"} if len(curve) > 1 else {"marker": "x", "linestyle": ""}
        seconds = [point["seconds"] for point in curve]
        errors = [point["NormMSE"] for point in curve]
        axis.plot(seconds, errors, color=colour, **line)
        if curve:
            labels.append(plot_style.Label(seconds[-1], errors[-1], contender["name"], colour))
    points = [point for contender in contenders for point in contender["curve"]]
    axis.set(xlabel="seconds of training", title="NormMSE on held-out text")
    plot_style.set_zero_axis(axis, "x", [point["seconds"] for point in points])
    plot_style.set_log_axis(axis, "y", [point["NormMSE"] for point in points])
    plot_style.label_lines(axis, labels, height)
