"""Draw the results of a benchmark: `python -m benchmarks.draw RESULTS.json docs/benchmark_cpu.png`.

RESULTS is the benchmark.json of benchmarks.run or the sweeps.json of benchmarks.sweeps. It is kept
beside the picture under the picture's name, so that the picture can be drawn again.
"""

from pathlib import Path

from benchmarks import report, sweeps
from src.config import small_parser
from src.files import load_json, save_text


def main(argv=None):
    parser = small_parser("benchmarks.draw", __doc__)
    parser.add_argument("results", type=Path, help="benchmark.json or sweeps.json")
    parser.add_argument("picture", type=Path, help="PNG to write")
    cfg = parser.parse_args(argv)
    found = load_json(cfg.results)
    if "sweeps" in found:
        sweeps.picture(found["sweeps"], cfg.picture)
    else:
        report.picture(found, cfg.picture)
    kept = cfg.picture.with_suffix(".json")
    if kept.resolve() != cfg.results.resolve():
        save_text(cfg.results.read_text(encoding="utf-8"), kept)
    print(f"{cfg.picture}, from {kept}")


if __name__ == "__main__":
    main()
