"""Rates over latent width, k, tokens a step and SAEs a forward pass, as curves: `python -m benchmarks.sweeps [--peers DIR]`.

Contenders take turns at every point as in benchmarks.run; sweeps.json and sweeps.png go to --output_dir. The widest dictionaries are for a GPU.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import run
from src.files import save_json

SWEEPS = {  # attribute of the benchmark: (label, values on a CPU, values on CUDA)
    "latents": (
        "latents",
        (2048, 4096, 8192, 16384, 32768),
        (4096, 8192, 16384, 32768, 65536, 131072),
    ),
    "k": ("active latents a token", (16, 32, 64, 128, 256, 512), (16, 32, 64, 128, 256, 512)),
    "batch": ("rows a step", (2, 4, 8, 16, 32), (4, 16, 64, 128)),
    "saes": ("SAEs from one forward pass", (1, 2, 4, 8), (1, 2, 4, 8, 16)),
}


def contenders(bench, name, value):
    """What is compared at one point of a sweep, by name."""
    if name == "saes":
        return {
            "ours TopK": lambda: bench.ours(
                "ours TopK", "TopK", k=[bench.k + i for i in range(value)]
            )
        }
    return {
        "ours TopK": lambda: bench.ours("ours TopK", "TopK"),
        "ours RouteSAE": lambda: bench.ours("ours RouteSAE", "RouteSAE", **run.AS_PUBLISHED),
        "published TopK": lambda: bench.published("published TopK", "TopK"),
        "sparsify": lambda: bench.peer("sparsify", "sparsify"),
        "sae-lens": lambda: bench.peer("saelens", "sae-lens"),
    }


def sweep(bench, name, values, steps, rounds):
    """{contender: {value: result}}; a contender that fails at a value (memory) lacks it, and the reason is printed."""
    found, before = {}, getattr(bench, name, None)
    for value in values:
        if name != "saes":
            setattr(bench, name, value)
        able = contenders(bench, name, value)
        while able:
            try:
                bench.group(
                    f"{name} {value}",
                    able.values(),
                    steps * rounds * bench.batch * bench.length,
                    rounds,
                )
            except run.Failed as error:
                print(f"{name} {value}: {error}\nagain without it ...", flush=True)
                del able[error.who]
                continue
            for one in bench.found["groups"][f"{name} {value}"]:
                found.setdefault(one["name"], {})[value] = one
            break
    if name != "saes":
        setattr(bench, name, before)
    return found


def picture(found, path):
    """One panel a sweep: useful tokens a second (times the SAEs, where their number varies), spread as bars."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(4.2 * len(found), 3.8), layout="constrained", squeeze=False
    )
    for axis, (name, curves) in zip(axes[0], found.items(), strict=True):
        for contender, points in curves.items():
            times = [value if name == "saes" else 1 for value in points]
            middle = [
                one["tokens_per_s"] * n / 1e3 for one, n in zip(points.values(), times, strict=True)
            ]
            ends = [
                [
                    one["spread"][side] * n / 1e3
                    for one, n in zip(points.values(), times, strict=True)
                ]
                for side in (0, 1)
            ]
            off = [
                [abs(end - rate) for end, rate in zip(side, middle, strict=True)] for side in ends
            ]
            axis.errorbar(list(points), middle, yerr=off, marker="o", capsize=3, label=contender)
        axis.set(
            xlabel=SWEEPS[name][0],
            ylabel=f"thousand {'SAE ' * (name == 'saes')}tokens/s",
            yscale="log",
        )
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({value for points in curves.values() for value in points}))
        axis.tick_params(labelsize=7)
        for formatter in (
            axis.xaxis.set_major_formatter,
            axis.yaxis.set_major_formatter,
            axis.yaxis.set_minor_formatter,
        ):
            formatter("{x:g}")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweeps", description=__doc__.splitlines()[0]
    )
    run.common(parser, 4)
    parser.add_argument(
        "--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="which sweeps"
    )
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    cfg = parser.parse_args(argv)
    bench = run.Bench(cfg)
    found = {
        name: sweep(bench, name, SWEEPS[name][1 + (cfg.device == "cuda")], cfg.steps, cfg.rounds)
        for name in cfg.sweep
    }
    header = {
        key: bench.found[key]
        for key in ("device", "shape", "commit", "load_before", "machine", "left_out")
    }
    save_json(header | {"sweeps": found}, Path(cfg.output_dir) / "sweeps.json")
    picture(found, Path(cfg.output_dir) / "sweeps.png")


if __name__ == "__main__":
    main()
