"""Everything that is measured on a GPU, as one prepared script: `bash benchmarks/gpu.sh`.

The parts run in the order of their value. Each is a process of its own with its own limit, and
gpu.json is written after each, so that a run that is cut short loses its last part only. A part
takes at most three minutes, all of them at most 21. `--dry` runs the same parts at about a
thousandth of the size on a CPU.

Nothing is installed here. `bash benchmarks/gpu_kit.sh` collects the wheels, the peers and the
language model beforehand, on a machine with a network.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.run import flags
from src import checkpoint
from src.files import DEMO_LM, ROOT, first_line, save_json
from src.trainer import STATES_NAME

PYTHON = sys.executable
FAILED_IN_TIME = 124  # the exit status of timeout(1)


class Scale(NamedTuple):
    """Sizes of one run of all parts."""

    device: str
    shape: str  # of benchmarks.run: its language model and its SAE sizes
    held: float  # seconds for which a rate is held
    peer_tokens: int  # tokens of the rows that are prepared for other libraries
    repeat_tokens: int  # tokens of the trainings that must repeat bit for bit
    repeat_sizes: dict[str, int]  # options of these trainings
    epochs: int  # passes over the text in the part on SmolLM2
    site_sizes: dict[str, int]  # options of its trainings
    held_out: int  # tokens on which it is evaluated
    layers: tuple[int, ...]  # sites of its TopKs


CARD = Scale(
    device="cuda",
    shape="llama",
    held=30,
    peer_tokens=12_000_000,
    repeat_tokens=400_000,
    repeat_sizes={"latent_size": 4096, "k": 32, "batch_size": 32, "max_length": 256},
    epochs=7,  # of about 3M tokens that scripts/download_data.sh finds in the package index
    site_sizes={"latent_size": 16384, "k": 32, "batch_size": 64, "max_length": 512},
    held_out=200_000,
    layers=(9, 10, 11, 14, 18),
)
DRY = Scale(
    device="cpu",
    shape="tiny",
    held=0.5,
    peer_tokens=6_000,
    repeat_tokens=12_000,
    repeat_sizes={"latent_size": 64, "k": 4, "batch_size": 4, "max_length": 32},
    epochs=1,
    site_sizes={"latent_size": 64, "k": 4, "batch_size": 4, "max_length": 32},
    held_out=500,
    layers=(4, 8),
)


class Setting(NamedTuple):
    """What the parts of a run share."""

    scale: Scale
    folder: Path  # of all results
    model_path: str  # a real language model, for quality
    data_path: str | None  # its text; None: the demo's
    peers: str | None  # folder of the peers' environments

    def stage(self, name: str, **options) -> list[str]:
        """Return the command of a stage, with the device of this run."""
        common = {"model_path": self.model_path, "data_path": self.data_path}
        options = common | {"device": self.scale.device} | options
        return [PYTHON, f"{name}.py", *flags(options)]

    def rates(self, part: str, *only: str, **options) -> list[str]:
        """Return the command of benchmarks.run that writes into the folder of a part."""
        options = {
            "shape": self.scale.shape,
            "device": self.scale.device,
            "held": self.scale.held,
            "peers": self.peers,
            "data_path": self.data_path,
            "output_dir": self.folder / part,
        } | options
        return [PYTHON, "-m", "benchmarks.run", *flags(options), "--only", *only]


Commands = Iterator[list[str]]


def correctness(setting: Setting) -> Commands:
    """Every kernel against its plain twin on the card."""
    marks = ["-m", "gpu"] if setting.scale.device == "cuda" else ["-k", "bags and interpreter"]
    yield [PYTHON, "-m", "pytest", "-q", *marks, "tests/test_kernels.py"]


def same_bits(setting: Setting) -> Commands:
    """Two deterministic trainings and one that is stopped and continued: the same weights."""
    folder = setting.folder / "same_bits"

    def training(tag):
        return [
            *setting.stage(
                "train",
                **setting.scale.repeat_sizes,
                max_tokens=setting.scale.repeat_tokens,
                deterministic="yes",
                tag=tag,
                overwrite="yes",
                output_dir=folder,
            ),
            *("--model", "RouteSAE", "TopK"),
        ]

    yield training("once")
    yield training("twice")
    yield [PYTHON, "-m", "benchmarks.gpu", "--stop", json.dumps(training("stopped"))]
    yield [PYTHON, "-m", "benchmarks.gpu", "--compare", str(folder)]


def one_model(setting: Setting) -> Commands:
    """Held rates of RouteSAE with both routers and of TopK."""
    names = ("RouteSAE", "RouteSAE_standard", "TopK")
    yield [*setting.rates("one_model", "rates"), "--rate_of", *names]


def many_sites(setting: Setting) -> Commands:
    """Held rates of MLSAE, of the Crosscoder and of eight models from one pass."""
    yield [*setting.rates("many_sites", "rates"), "--rate_of", "MLSAE", "Crosscoder", "zoo"]


def reading(setting: Setting) -> Commands:
    """Evaluation and apply at the progress of a minute, extrapolated."""
    yield setting.rates("reading", "reading", read=2 * setting.scale.held)


def sites(setting: Setting) -> Commands:
    """RouteSAE, TopKs at five sites and random routing at the router's own shares."""
    scale = setting.scale
    folder = setting.folder / "sites"
    common = {**scale.site_sizes, "num_epochs": scale.epochs}
    common |= {"output_dir": folder, "overwrite": "yes"}
    train = setting.stage("train", **common, tag="gpu")
    layers = map(str, scale.layers)
    yield [*train, "--model", "RouteSAE", "TopK", "--layer", *layers]
    metrics = ("NormMSE", "KLDiv", "DeltaCE", "FVU", "L0", "Dead", "Routing")
    measure = setting.stage("evaluate", max_tokens=scale.held_out, output_dir=folder)
    measure += ["--metric", *metrics, "--SAE_path"]
    yield [*measure, *saes(folder, "gpu")]
    (result,) = (folder / "eval").glob("RouteSAE_*_gpu.json")
    shares = json.loads(result.read_text())["Routing"]["share"]
    random = setting.stage("train", **common, tag="random", routing="random")
    yield [*random, "--model", "RouteSAE", "--route_shares", *map(str, shares)]
    yield [*measure, *saes(folder, "random")]


def saes(folder: Path, tag: str) -> list[str]:
    """Return the trained SAEs of a tag."""
    return sorted(map(str, (folder / "SAE_models").glob(f"*_{tag}.pt")))


def peers(setting: Setting) -> Commands:
    """Other libraries at the same shapes, at their defaults and at their best flags."""
    yield setting.rates("peers", "peers", tokens=setting.scale.peer_tokens)


def quality(setting: Setting) -> Commands:
    """One SAE and eight from one pass on the real model, with NormMSE beside each rate."""
    on_card = setting.scale.device == "cuda"
    shape = "smollm2" if on_card else setting.scale.shape
    parts = ("training", "eight") if on_card else ("eight",)
    options = {"shape": shape, "tokens": setting.scale.peer_tokens // 4, "rounds": 4}
    yield setting.rates("quality", *parts, **options)


class Part(NamedTuple):
    """One part, the seconds it may take on a card and the file with its figures."""

    commands: object
    limit: float
    figures: str | None = None  # below the folder of the run


PARTS = {
    "correctness": Part(correctness, 90),
    "same_bits": Part(same_bits, 120, "same_bits/same_bits.json"),
    "one_model": Part(one_model, 170, "one_model/benchmark.json"),
    "many_sites": Part(many_sites, 180, "many_sites/benchmark.json"),
    "reading": Part(reading, 180, "reading/benchmark.json"),
    "sites": Part(sites, 180),
    "peers": Part(peers, 180, "peers/benchmark.json"),
    "quality": Part(quality, 180, "quality/benchmark.json"),
}


def play(name: str, setting: Setting) -> dict:
    """Run one part until it ends, fails or reaches its limit, and return its record."""
    part = PARTS[name]
    # A dry run may stand beside other work on a small machine.
    limit = part.limit if setting.scale.device == "cuda" else 10 * part.limit
    started = time.perf_counter()
    record = {"part": name, "commands": [], "status": 0}
    log = setting.folder / f"{name}.log"
    with open(log, "w") as output:
        for command in part.commands(setting):
            left = limit - (time.perf_counter() - started)
            status = run(command, left, output)
            shown = ["python", *command[1:]]
            record["commands"].append({"command": " ".join(shown), "status": status})
            if status:
                record["status"] = status
                break
    record["seconds"] = time.perf_counter() - started
    figures = setting.folder / part.figures if part.figures else None
    if figures and figures.exists():
        record["figures"] = json.loads(figures.read_text())
    if name == "sites":
        paths = sorted((setting.folder / "sites" / "eval").glob("*.json"))
        record["figures"] = {path.stem: json.loads(path.read_text()) for path in paths}
    return record


def run(command: list[str], limit: float, output) -> int:
    """Run a command in the repository for at most `limit` seconds, and return its status."""
    if limit <= 0:
        return FAILED_IN_TIME
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        # The whole group: a benchmark has its contenders as children.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return FAILED_IN_TIME


def stop_and_continue(command: list[str]) -> None:
    """Train, send SIGTERM once the first steps are saved, and train on to the end."""
    folder = Path(command[command.index("--output_dir") + 1])
    tag = command[command.index("--tag") + 1]
    process = subprocess.Popen([*command, "--save_every", "2"], cwd=ROOT)
    while process.poll() is None and not checkpoint.states(folder / "runs" / tag / STATES_NAME):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stopped = process.wait()
    if stopped != 143:
        raise SystemExit(f"the training ended with status {stopped} before it was stopped")
    continued = [*command]
    where = continued.index("--overwrite")
    del continued[where : where + 2]  # it would start at step 0
    subprocess.run(continued, cwd=ROOT, check=True)


def compare(folder: Path) -> dict[str, bool]:
    """Return and save, for each SAE, whether all three trainings ended with the same weights."""
    same = {}
    for path in map(Path, saes(folder, "once")):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        for tag in ("twice", "stopped"):
            other = path.with_name(path.name.replace("_once.pt", f"_{tag}.pt"))
            others = torch.load(other, map_location="cpu", weights_only=True)
            equal = all(torch.equal(weights[name], others[name]) for name in weights)
            same[f"{path.stem} and {tag}"] = equal
    save_json(same, folder / "same_bits.json")
    return same


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", description=first_line(__doc__))
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"which parts (default: all): {' '.join(PARTS)}")
    add("--dry", action="store_true", help="tiny sizes on the CPU, to see that each part works")
    add("--model_path", help="a real language model (default: data/model, the demo's with --dry)")
    add("--data_path", help="text (default: data; the demo's with --dry)")
    add("--peers", help="folder of the peers' environments")
    add("--output_dir", default="outputs/gpu")
    add("--stop", metavar="COMMAND", help=argparse.SUPPRESS)
    add("--compare", metavar="DIR", help=argparse.SUPPRESS)
    cfg = parser.parse_args(argv)
    for part in cfg.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part}; known are {' '.join(PARTS)}")
    return cfg


def main(argv=None) -> int:
    cfg = parse_args(argv)
    if cfg.stop:
        stop_and_continue(json.loads(cfg.stop))
        return 0
    if cfg.compare:
        return int(not all(compare(Path(cfg.compare)).values()))
    folder = Path(cfg.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model_path = cfg.model_path or (str(DEMO_LM) if cfg.dry else "data/model")
    data_path = cfg.data_path or (None if cfg.dry else "data")
    setting = Setting(DRY if cfg.dry else CARD, folder, model_path, data_path, cfg.peers)
    results = {
        "dry": cfg.dry,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "commit": checkpoint.environment(),
        "started": time.ctime(),
        "parts": [],
    }
    for name in cfg.parts or PARTS:
        print(f"{name} ...", flush=True)
        record = play(name, setting)
        results["parts"].append(record)
        save_json(results, folder / "gpu.json")
        outcome = "done" if record["status"] == 0 else f"status {record['status']}"
        print(f"  {outcome} in {record['seconds']:.0f} s; log {folder / name}.log", flush=True)
    print(f"all figures: {folder / 'gpu.json'}")
    return int(any(record["status"] for record in results["parts"]))


if __name__ == "__main__":
    sys.exit(main())
