"""Our models against those of other libraries: on the same states and tokens, at equal L0.

    python -m benchmarks.quality --peers DIR --tokens 500000

States of one site are read once and standardised token by token, so that all SAEs have the same
input and target. Every SAE is trained at its defaults and with other learning rates. A library
runs in its own environment, DIR/saelens, DIR/dictionary_learning or DIR/sparsify; one that is
absent is left out. The table has, for each SAE, its defaults and the best of the small sweep.

What is done is kept in OUTPUT_DIR/results.json; the same command continues.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src import config, demo, hooks, lm, model
from src.config import small_parser
from src.data import Batch
from src.files import ROOT, load_json, save_json, save_text
from src.metrics import token_kl
from src.ops import pre_process, squared_errors
from src.sae import BatchInfo
from src.sae_training import LocalBatch, SAETraining
from src.zoo import ZOO

OURS = "ours"
FACTORS = {"default": None, "x0.5": 0.5, "x2": 2.0}  # of our learning rate
PEER_FACTORS = {"default": None, "x0.3": 0.3, "x1": 1.0, "x3": 3.0, "x10": 10.0, "x30": 30.0}
# The architectures in the order of the table: (our model, {library: its model}).
ARCHITECTURES = {
    "TopK": {"SAELens": "TopK", "dictionary_learning": "TopK", "sparsify": "TopK"},
    "BatchTopK": {"SAELens": "BatchTopK", "dictionary_learning": "BatchTopK"},
    "Matryoshka": {"SAELens": "Matryoshka"},
    "JumpReLU": {"SAELens": "JumpReLU", "dictionary_learning": "JumpReLU"},
    "Gated": {"SAELens": "Gated", "dictionary_learning": "Gated"},
    "Vanilla": {"SAELens": "Standard", "dictionary_learning": "p-anneal"},
}
Result = dict[str, Any]


class States:
    """States of one site of the language model, for training and held out."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.site, self.path = args.site, folder / "states.pt"
        if self.path.exists():
            self.train = torch.load(self.path)["train"]
        else:
            self.train = self._read(args, "train", args.tokens)
        self.test = self._read(args, "eval", args.held_out)  # last: it keeps the batches
        sizes = lm.text_config(self.language_model)
        self.width, self.depth = sizes.hidden_size, len(lm.blocks(self.language_model))
        torch.save({"train": self.train, "test": self.test}, self.path)

    def _read(self, args: argparse.Namespace, split: str, tokens: int) -> Tensor:
        """Standardised states [N,D] of a split; those held out keep what their patches need."""
        argv = ["--split", split, "--max_tokens", str(tokens), "--seed", str(args.seed)]
        cfg = config.parse("train", [*argv, "--dtype", "float32", "--device", "cpu"])
        demo.use_demo_defaults(cfg)
        config.complete(cfg)
        tokenizer, self.language_model = hooks.open_language_model(cfg, [])
        rows = demo.open_rows(cfg, tokenizer)
        order = rows.order(cfg.seed, 0) if split == "train" else None
        self.batches: list[tuple[Batch, Tensor, Tensor]] = []
        parts = []
        for batch in rows.batches(cfg.batch_size, order):
            x, mean, std = pre_process(
                hooks.read(self.language_model, batch, [self.site])[self.site], cfg.norm_eps
            )
            self.batches.append((batch, mean, std + cfg.norm_eps))
            parts.append(x)
        return torch.cat(parts)

    @torch.no_grad()
    def measure(self, x_hat: Tensor) -> dict[str, float]:
        """NormMSE, FVU and the KL divergence in nats a token of reconstructions [N,D]."""
        errors = (self.test - x_hat).square().sum(-1)
        variance = (self.test - self.test.mean(0)).square().sum(-1).mean()
        start, kls = 0, []
        for batch, mean, std in self.batches:
            count = int(batch.mask.sum())
            states = x_hat[start : start + count] * std + mean
            start += count
            kls.append(_kl(self.language_model, batch, self.site, states))
        return {
            "NormMSE": float(squared_errors(self.test, x_hat).mean()),
            "FVU": float(errors.mean() / variance),
            "KL": float(torch.cat(kls).mean()),
        }


def _kl(language_model: nn.Module, batch: Batch, site: int, states: Tensor) -> Tensor:
    """KL at each prediction if these states [N,D] replace those of the counted tokens. [M]"""
    clean, final = lm.read_through(language_model, batch.input_ids, [site])
    patched = hooks.patched_states(language_model, batch, {site: lambda _h: states}, clean)
    predicts = hooks.predictions(batch.mask)
    pairs = zip(final[predicts].split(1024), patched[predicts].split(1024), strict=True)
    return torch.cat(
        [
            token_kl(lm.logits_of(language_model, a), lm.logits_of(language_model, b))
            for a, b in pairs
        ]
    )


def train_ours(name: str, factor: float | None, states: States, args: argparse.Namespace) -> Result:
    """Train one of our models by its standard recipe; return its reconstructions and its L0."""
    started = time.perf_counter()
    argv = ["--model", name, "--latent_size", str(args.latents), "--k", str(args.k)]
    cfg = config.complete(config.parse("train", [*argv, "--seed", str(args.seed)]))
    if factor is not None:
        cfg.lr = factor * config.learning_rate(cfg, states.width)
    options = config.model_options(cfg, name) | {"k": args.k, "layer": states.site}
    if "target_l0" in ZOO[name].options:
        options["target_l0"] = args.k
    torch.manual_seed(args.seed)
    # The states are standardised already.
    sae = model.build(name, states.width, states.depth, options | {"input_norm": "none"})
    steps = len(states.train) // args.batch
    batches = (
        LocalBatch({states.site: states.train[tokens]}, tokens, args.batch, token_offset=0)
        for tokens in torch.arange(steps * args.batch).split(args.batch)
    )
    SAETraining(sae, name, options, cfg, steps).run(batches)
    parts, fired, codes = [], 0, 0
    with torch.no_grad():
        for x in states.test.split(4096):
            out = sae.autoencode(x, BatchInfo(token_keys=torch.arange(len(x))))
            parts.append(out.x_hat)
            fired, codes = fired + out.fired, codes + len(x)
    return {
        "L0": float(fired.sum() / codes),
        "dead": float((fired == 0).float().mean()),
        "seconds": time.perf_counter() - started,
        "x_hat": torch.cat(parts),
    }


# ------------------------------------------------------------------------------------ all of them


class Bench:
    """Trains what has no result yet, and keeps each result at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.output_dir
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "results.json"
        names = ("tokens", "held_out", "latents", "k", "site", "batch", "seed")
        self.about = {name: getattr(args, name) for name in names}
        saved = load_json(self.path) if self.path.exists() else {"about": self.about, "results": []}
        if saved["about"] != self.about:
            raise SystemExit(f"{self.path} is of another run; give another --output_dir")
        self.results: list[Result] = saved["results"]
        self.states = States(args, self.folder)

    def missing(self, library: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings that were asked for and have no result yet."""
        settings = {s: factor for s, factor in settings.items() if s in self.args.settings}
        done = {(r["library"], r["model"], r["setting"]) for r in self.results}
        return {s: factor for s, factor in settings.items() if (library, name, s) not in done}

    def add(self, library: str, name: str, setting: str, result: Result) -> None:
        x_hat = result.pop("x_hat")
        line = {"library": library, "model": name, "setting": setting}
        self.results.append(line | result | self.states.measure(x_hat))
        save_json({"about": self.about, "results": self.results}, self.path)
        print(self.results[-1], flush=True)

    def ours(self, name: str) -> None:
        for setting, factor in self.missing(OURS, name, FACTORS).items():
            self.add(OURS, name, setting, train_ours(name, factor, self.states, self.args))

    def peer(self, library: str, name: str) -> None:
        python = self.args.peers / library.lower() / "bin" / "python"
        settings = self.missing(library, name, PEER_FACTORS)
        if not python.exists() or not settings:
            return
        folder = self.folder / f"{library}_{name}"
        folder.mkdir(exist_ok=True)
        job = {"library": library, "model": name, "settings": settings, "folder": str(folder)}
        job |= {"states": str(self.states.path), "latents": self.args.latents, "k": self.args.k}
        job |= {"batch": self.args.batch, "seed": self.args.seed}
        job_path = save_json(job, folder / "job.json")
        command = [str(python), "-m", "benchmarks.quality_peers", str(job_path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        with (
            open(folder / "log", "a") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=environment
            ) as process,
        ):
            for line in process.stdout:
                if line.startswith("ANSWER "):
                    answer = json.loads(line.removeprefix("ANSWER "))
                    answer["x_hat"] = torch.load(answer["x_hat"])
                    self.add(library, name, answer.pop("setting"), answer)
        if process.returncode:
            print(f"{library} {name} failed with code {process.returncode}; see {log.name}")


def table(results: list[Result], k: int) -> str:
    """Markdown: for each SAE its defaults and the best of its sweep near the target L0."""
    lines = ["| model | library | setting | L0 | NormMSE | FVU | KL, nats a token | dead |"]
    lines.append("|---" * 8 + "|")
    for ours, peers in ARCHITECTURES.items():
        for library, name in {OURS: ours, **peers}.items():
            rows = [r for r in results if (r["library"], r["model"]) == (library, name)]
            defaults = [row for row in rows if row["setting"] == "default"]
            near = [row for row in rows if abs(row["L0"] / k - 1) <= 0.1]
            best = min(near, key=lambda row: row["NormMSE"], default=None)
            shown = defaults + [best] * (best is not None and best not in defaults)
            for row in shown:
                setting = "defaults" if row["setting"] == "default" else f"best, {row['setting']}"
                numbers = [f"{row['L0']:.1f}"]
                numbers += [f"{row[key]:.4f}" for key in ("NormMSE", "FVU", "KL", "dead")]
                title = ours if name == ours else f"{ours} ({name})"
                lines.append(f"| {title} | {library} | {setting} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = small_parser("benchmarks.quality", __doc__)
    add = parser.add_argument
    add("--peers", type=Path, default=Path("peers"), help="folder of the libraries' environments")
    add("--models", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    add("--libraries", nargs="+", default=[OURS, "SAELens", "dictionary_learning", "sparsify"])
    settings = list(FACTORS | PEER_FACTORS)
    add("--settings", nargs="+", default=settings, help="default, or factors of the learning rate")
    add("--tokens", type=int, default=500_000, help="of each training")
    add("--held_out", type=int, default=20_000, help="tokens on which all are measured")
    add("--latents", type=int, default=2048)
    add("--k", type=int, default=16, help="active latents, or the target of a penalty")
    add("--site", type=int, default=12)
    add("--batch", type=int, default=4096, help="tokens of a step")
    add("--seed", type=int, default=42)
    add("--output_dir", type=Path, default=Path("outputs/quality"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Result]:
    args = parse(argv)
    bench = Bench(args)
    for ours in args.models:
        if OURS in args.libraries:
            bench.ours(ours)
        for library, name in ARCHITECTURES[ours].items():
            if library in args.libraries:
                bench.peer(library, name)
    text = table(bench.results, args.k)
    save_text(text, args.output_dir / "quality.md")
    print(text)
    return bench.results


if __name__ == "__main__":
    sys.exit(bool(not main()))
