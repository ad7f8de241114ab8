"""Tables and pictures from what benchmarks.run found."""

from pathlib import Path


def table(head, rows):
    """A markdown table, an empty line before it."""
    return [
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def number(found, unit):
    """(value, spread) as shown."""
    if found is None:
        return "not measured", ""
    turns = f"{found['turns']} turn{'s' * (found['turns'] > 1)}"
    return f"{found['median']:.2f} {unit}", f"{found['low']:.2f} to {found['high']:.2f}, {turns}"


def floor_of(found, one):
    """The floor of the contender that trains one model with everything at its default, else None."""
    return next(
        (floor for model, floor in found["floors"].items() if one["name"] == f"ours {model}"), None
    )


def contender(found, one):
    floor = floor_of(found, one)
    share = f"{floor['total'] * one['tokens_per_s']:.0%}" if floor else ""
    quality = [f"{one[key]:.4f}" if one[key] is not None else "" for key in ("NormMSE", "dead")]
    return [
        one["name"],
        f"{one['tokens_per_s']:,.0f}",
        f"{one['spread'][0]:,.0f} to {one['spread'][1]:,.0f}",
        share,
        *quality,
        f"{one['peak_bytes'] / 1e9:.2f} GB",
        f"{one['first_step_s']:.1f} s",
    ]


def markdown(found):
    """The table of targets, then contenders, stages beside their floors, and what was left out."""
    machine, scale = found["machine"], 1e9
    lines = [
        f"{found['device']}: {machine['bf16'] / scale:,.0f} GFLOP/s in bfloat16, {machine['fp32'] / scale:,.0f} in float32, "
        f"{machine['bandwidth'] / scale:.1f} GB/s; load {found['load_before']} before and {found['load_after']} after.",
        f"{found['shape']} shapes, {found['latents']:,} latents, k {found['k']}, {found['rows_a_step']} x {found['tokens_a_row']} tokens a step, "
        f"{found['tokens']:,} training tokens; commit {(found['commit']['git_commit'] or '?')[:9]}, {found['seconds']:.0f} s in all.",
    ]
    targets, beyond = [], any(row["moonshot"] for row in found["targets"])
    for row in found["targets"]:
        limits = [
            f"{row[key]:g} {row['unit']}" if row[key] else ""
            for key in ("must", "goal", "moonshot")[: 2 + beyond]
        ]
        targets.append(
            [row["target"], *limits, *number(row["measured"], row["unit"]), row.get("met", "")]
        )
    lines += table(
        ["target", "must", "goal", *["moonshot"] * beyond, "measured", "spread", "met"], targets
    )
    for name, results in found["groups"].items():
        if isinstance(results, dict):
            continue
        head = [
            name,
            "useful tokens/s",
            "spread",
            "of the floor",
            "NormMSE",
            "dead",
            "peak memory",
            "to the first step",
        ]
        lines += table(head, [contender(found, one) for one in results])
        for one in results:
            floor = floor_of(found, one)
            if one["stages"] and floor:
                spent = {**one["stages"], "all": sum(one["stages"].values())}
                least = {**floor, "all": floor["total"]}
                measured = ["measured", *(f"{1e6 * took:.2f}" for took in spent.values())]
                counted = [
                    "floor",
                    *(f"{1e6 * least[stage]:.2f}" if stage in least else "" for stage in spent),
                ]
                lines += table(
                    [f"{one['name']}, microseconds a token", *spent], [measured, counted]
                )
    lines += ["", *(f"left out: {line}" for line in found["left_out"])]
    return "\n".join(lines).rstrip() + "\n"


def pictures(found, folder):
    """Rates of all training contenders with their spread, and NormMSE over seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = found["groups"].get("training")
    if not results:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    shown = results[::-1]
    off = [
        [abs(one["tokens_per_s"] - one["spread"][side]) / 1e3 for one in shown] for side in (0, 1)
    ]
    colours = ["tab:blue" if one["name"].startswith("ours") else "tab:gray" for one in shown]
    left.barh(
        [one["name"] for one in shown],
        [one["tokens_per_s"] / 1e3 for one in shown],
        xerr=off,
        color=colours,
        capsize=3,
    )
    left.set_xlabel("useful tokens/s, thousands")
    for one in results:
        line = {"marker": "o"} if len(one["curve"]) > 1 else {"marker": "x", "linestyle": ""}
        right.plot(
            [point["seconds"] for point in one["curve"]],
            [point["NormMSE"] for point in one["curve"]],
            label=one["name"],
            **line,
        )
    right.set(xlabel="seconds of training", ylabel="NormMSE, held out", yscale="log")
    right.legend(fontsize=7)
    figure.savefig(Path(folder) / "benchmark.png", dpi=110)
    plt.close(figure)
