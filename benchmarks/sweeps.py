"""Training rates over latents, k, rows a step and SAEs a pass: `python -m benchmarks.sweeps`.

Contenders take turns at every point as in benchmarks.run, peers if --peers DIR is given. Results:
sweeps.json and sweeps.png in --output_dir. The widest dictionaries are for a GPU.
"""

from pathlib import Path

from benchmarks import report, run
from src import plot_style
from src.config import small_parser
from src.files import save_json

SWEEPS = {  # attribute of the benchmark: label
    "latents": "latents",
    "k": "active latents a token",
    "batch": "rows a step",
    "saes": "SAEs from one forward pass",
}
# Lines of one grey would not be told apart.
PEERS = {
    "published TopK": plot_style.COLOURS["MLSAE"],
    "sparsify": plot_style.COLOURS["Gated"],
    "sae-lens": plot_style.COLOURS["JumpReLU"],
}
CPU_VALUES = {
    "latents": (2048, 4096, 8192, 16384, 32768),
    "k": (16, 32, 64, 128, 256, 512),
    "batch": (2, 4, 8, 16, 32),
    "saes": (1, 2, 4, 8),
}
CUDA_VALUES = {
    "latents": (4096, 8192, 16384, 32768, 65536, 131072),
    "k": (16, 32, 64, 128, 256, 512),
    "batch": (4, 16, 64, 128),
    "saes": (1, 2, 4, 8, 16),
}


def contenders(bench, name, value):
    """{name: function that starts a contender} at one point of a sweep."""
    if name == "saes":
        ks = [bench.k + i for i in range(value)]
        return {"ours TopK": lambda: bench.ours("ours TopK", "TopK", k=ks)}
    return {
        "ours TopK": lambda: bench.ours("ours TopK", "TopK"),
        "ours RouteSAE": lambda: bench.ours("ours RouteSAE", "RouteSAE", **run.AS_PUBLISHED),
        "published TopK": lambda: bench.published("published TopK", "TopK"),
        "sparsify": lambda: bench.peer("sparsify", "sparsify"),
        "sae-lens": lambda: bench.peer("saelens", "sae-lens"),
    }


def sweep(bench, name, values, steps, rounds):
    """{contender: {value: result}}. A contender that fails (out of memory) has no result."""
    results, default = {}, getattr(bench, name, None)
    for value in values:
        if name != "saes":
            setattr(bench, name, value)
        point = f"{name} {value}"
        tokens = steps * rounds * bench.batch * bench.length
        for result in play_without_failures(
            bench, point, contenders(bench, name, value), tokens, rounds
        ):
            results.setdefault(result["name"], {})[value] = result
    if name != "saes":
        setattr(bench, name, default)
    return results


def play_without_failures(bench, point, starts, tokens, rounds):
    """Results of the contenders that do not fail; the reasons of the others are printed."""
    while starts:
        try:
            bench.group(point, starts.values(), tokens, rounds)
            return bench.results["groups"][point]
        except run.Failed as error:
            print(f"{point}: {error}\nagain without it ...", flush=True)
            del starts[error.contender]
    return []


HEIGHT = 3.8  # inches of a panel


def picture(results, path):
    """One panel a sweep: useful tokens a second, with their spread as bars."""
    figure, axes = plot_style.pyplot().subplots(
        1, len(results), figsize=(4.6 * len(results), HEIGHT), squeeze=False
    )
    for axis, (name, curves) in zip(axes[0], results.items(), strict=True):
        panel(axis, name, curves)
    plot_style.save(figure, Path(path))


def panel(axis, name, curves):
    """One sweep; where the number of SAEs varies, rates are multiplied by it."""
    labels, drawn = [], []
    for contender, points in curves.items():
        values, rates, below, above = [], [], [], []
        for value, result in points.items():
            scale = (float(value) if name == "saes" else 1) / 1e3
            low, high = result["spread"]
            values.append(float(value))  # keys of a JSON are text
            rates.append(result["tokens_per_s"] * scale)
            below.append(abs(result["tokens_per_s"] - low) * scale)
            above.append(abs(high - result["tokens_per_s"]) * scale)
        colour = report.colour_of(contender)
        if colour == plot_style.GREY:
            colour = PEERS.get(contender, colour)
        axis.errorbar(values, rates, yerr=[below, above], marker="o", capsize=3, color=colour)
        labels.append(plot_style.Label(values[-1], rates[-1], contender, colour))
        drawn += rates
    unit = "SAE tokens/s" if name == "saes" else "tokens/s"
    axis.set(xlabel=SWEEPS[name], title=f"thousand {unit}")
    axis.set_xscale("log", base=2)
    swept = sorted({float(value) for points in curves.values() for value in points})
    axis.set_xticks(swept, [f"{value:g}" for value in swept])
    axis.set_xticks([], minor=True)
    axis.set_xlim(swept[0] / 1.2, swept[-1] * 1.2)
    plot_style.set_log_axis(axis, "y", drawn)
    plot_style.label_lines(axis, labels, HEIGHT - 0.8)


def main(argv=None):
    parser = small_parser("benchmarks.sweeps", __doc__)
    run.add_common_options(parser, 4)
    parser.add_argument(
        "--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="which sweeps"
    )
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    cfg = parser.parse_args(argv)
    bench = run.Bench(cfg)
    values = CUDA_VALUES if cfg.device == "cuda" else CPU_VALUES
    results = {name: sweep(bench, name, values[name], cfg.steps, cfg.rounds) for name in cfg.sweep}
    keys = ("device", "shape", "commit", "load_before", "machine", "left_out")
    header = {key: bench.results[key] for key in keys}
    save_json(header | {"sweeps": results}, Path(cfg.output_dir) / "sweeps.json")
    picture(results, Path(cfg.output_dir) / "sweeps.png")


if __name__ == "__main__":
    main()
