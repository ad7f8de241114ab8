"""The net under a refactor: results of every model on the demo LM, written as files to compare.

    python -m benchmarks.same_bytes /tmp/before                         # at the old commit
    python -m benchmarks.same_bytes /tmp/after --against /tmp/before    # at the new one

Both recipes of every model, and the routing controls, train for 20 steps on one thread of a CPU,
then they are evaluated, applied and steered. A second run of the same code gives the same bytes.
What names a time, a commit or a package version is left out.
"""

import filecmp
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from src.config import small_parser

ROOT = Path(__file__).resolve().parent.parent
VOLATILE = {
    "git_commit", "versions", "threads", "tokens_per_s", "step_tokens_per_s", "estimate",
    "output_dir", "data_path",
    "SAE_path", "sae_path", "data_fingerprint", "created", "date", "seconds",
}  # fmt: skip
WORDS = (
    "the value of a list returns an error when its index is larger than any array in memory and "
    "each file must be closed before another process may read or write data from this function"
).split()
ROUTE_VARIANTS = {
    "soft": ["--routing", "soft"],
    "random": ["--routing", "random", "--route_shares", *"987654321"],
    "permuted": ["--routing", "permuted", "--route_scale", "p"],
    "oracle": ["--routing", "oracle"],
    "advantage": ["--router_objective", "advantage", "--router_balance", "bias"],
    "ste": ["--router_objective", "ste", "--route_scale", "ste"],
    "frozen": ["--router_objective", "frozen", "--route_shares", *"111222111"],
}


def write_text(path: Path) -> None:
    """120 documents of words drawn with a fixed seed."""
    draw = random.Random(7)
    lines = [" ".join(draw.choice(WORDS) for _ in range(60)) for _ in range(120)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines) + "\n")


def without_volatile(value):
    if isinstance(value, dict):
        return {k: without_volatile(v) for k, v in value.items() if k not in VOLATILE}
    return [without_volatile(v) for v in value] if isinstance(value, list) else value


def run(program: str, *arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in environment.items() if k not in ("MODEL_PATH", "DATA_PATH")}
    subprocess.run([sys.executable, program, *arguments], cwd=ROOT, check=True, env=environment)


def write_results(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        write_text(text)
        shared = ["--output_dir", f"{folder}/out", "--device", "cpu"]
        lm = ["--model_path", "assets/demo_lm", "--data_path", str(text), "--dtype", "float32"]
        train = [
            *shared,
            *lm,
            "--latent_size",
            "256",
            "--k",
            "8",
            "--max_length",
            "32",
            "--batch_size",
            "8",
        ]
        train += ["--max_samples", "160", "--split", "all"]
        models = "TopK Vanilla Gated JumpReLU RouteSAE Crosscoder MLSAE RandomK BatchTopK".split()
        for recipe in ("standard", "published"):
            run("train.py", "--model", *models, "--recipe", recipe, "--tag", recipe, *train)
        for name, options in ROUTE_VARIANTS.items():
            run("train.py", "--model", "RouteSAE", "--tag", name, *train, *options)
        run(
            "train.py",
            "--model",
            "JumpReLU",
            "Crosscoder",
            "--target_l0",
            "12",
            "--tag",
            "target",
            *train,
        )
        paths = sorted(map(str, Path(folder, "out", "SAE_models").glob("*.pt")))
        rows = ["--max_samples", "16", "--split", "all"]
        run("evaluate.py", *shared, "--SAE_path", *paths, "--metric", "all", *rows)
        for cut in (["--infer_k", "3"], ["--theta", "0.5"]):
            run(
                "evaluate.py",
                *shared,
                "--SAE_path",
                *paths,
                "--metric",
                "NormMSE",
                "KLDiv",
                *cut,
                *rows,
            )
        for path in paths:
            few = [
                "--context_length",
                "8",
                "--threshold_rel",
                "0.01",
                "--lines",
                "2",
                "--effect",
                "2",
            ]
            run(
                "apply.py",
                *shared,
                "--SAE_path",
                path,
                *few,
                "--max_samples",
                "40",
                "--split",
                "all",
            )
            hold = [
                "--prompt",
                "Returns the number of",
                "--set",
                "3=4",
                "--add",
                "5=1.5",
                "--zero",
                "7",
            ]
            run("steer.py", *shared, "--SAE_path", path, *hold, "--max_new_tokens", "12")
        collect(Path(folder, "out"), out)


def collect(results: Path, out: Path) -> None:
    """Weights as sums, JSON without what changes from run to run."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(results.rglob("*")):
        name = "__".join(path.relative_to(results).parts)
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            sums = {
                key: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
                for key, value in sorted(state.items())
            }
            (out / f"{name}.txt").write_text(json.dumps(sums, indent=1))
        elif path.suffix in (".json", ".jsonl") and path.is_file():
            records = (
                [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
                if (path.suffix == ".jsonl")
                else [json.loads(path.read_text())]
            )
            lines = [
                json.dumps(without_volatile(record), indent=1, sort_keys=True) for record in records
            ]
            (out / f"{name}.txt").write_text("\n".join(lines))


def main() -> None:
    parser = small_parser("benchmarks.same_bytes", __doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="what an earlier call has written")
    given = parser.parse_args()
    write_results(given.out)
    if given.against:
        ours, theirs = (
            {path.name for path in folder.iterdir()} for folder in (given.out, given.against)
        )
        _, different, _ = filecmp.cmpfiles(
            given.out, given.against, sorted(ours & theirs), shallow=False
        )
        equal = len(ours & theirs) - len(different)
        missing = sorted(ours ^ theirs)
        print(f"{equal} files equal; different: {different}; missing: {missing}")
        sys.exit(bool(different or ours ^ theirs))


if __name__ == "__main__":
    main()
