"""The benchmark: `python -m benchmarks.run`. Rates beside quality, floors and targets, of this project, its plain path and its peers.

On a CPU the built-in language model; where there is a CUDA device Llama-3.2-1B's shapes with random weights (--shape says otherwise). Peers run from
environments made by benchmarks/requirements-*.txt and found at --peers DIR (DIR/saelens, DIR/sparsify); absent ones are left out.
Results: benchmark.json, benchmark.md and pictures in --output_dir.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import floors, report
from benchmarks.runner import Contender, Failed, play, ratios
from src import checkpoint, demo, lm
from src.data import Rows
from src.files import DEMO_LM, save_json, save_text
from src.sae import routed_sites

SHAPES = {  # language model (None: the demo's), latents, k, rows a step, tokens a row
    "demo": (None, 2048, 16, 16, 256),
    "llama": (
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "vocab_size": 128256,
        },
        16384,
        64,
        64,
        512,
    ),
    "tiny": (
        {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 64,
            "vocab_size": 4096,
        },
        64,
        4,
        4,
        32,
    ),
}
AS_PUBLISHED = {
    "router_objective": "published",
    "router_balance": "none",
}  # the router that the method as published trains
EIGHT = ("TopK", "RandomK", "Vanilla", "Gated", "JumpReLU", "RouteSAE", "Crosscoder", "MLSAE")

SETS = {  # models whose rate is held together: minutes for 100M tokens that are must, goal, moonshot
    "RouteSAE": (["RouteSAE"], 8.3, 6.5, 5.0),
    "Crosscoder": (["Crosscoder"], 21, 16, 13),
    "MLSAE": (["MLSAE"], 18, 13.7, 11),
    "zoo": (list(EIGHT), 45, 31, 25),
}


class Bench:
    """One benchmark: its shapes, text, held-out states, and what was found."""

    def __init__(self, cfg):
        self.cfg, self.folder = cfg, Path(cfg.output_dir).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        config, self.latents, self.k, self.batch, self.length = SHAPES[cfg.shape]
        self.device = cfg.device
        self.bf16 = (
            self.device == "cuda" or lm.pick_dtype("auto", "cpu") == torch.bfloat16
        )  # what our language model runs in
        self.model_path = str(DEMO_LM if config is None else self._random_model(config))
        self.data_path = str(cfg.data_path or demo.build_corpus())
        self.tokenizer, self.config = (
            AutoTokenizer.from_pretrained(self.model_path),
            AutoConfig.from_pretrained(self.model_path),
        )
        self.depth = self.config.num_hidden_layers
        self.site, self.sites = 3 * self.depth // 4, routed_sites(self.depth)
        self.rows_file, self.held_out = self.folder / "rows.pt", self.folder / "held_out.pt"
        self._prepare()
        self.found = {
            "shape": cfg.shape,
            "device": self._device_name(),
            "commit": checkpoint.environment(),
            "tokens": cfg.tokens,
            "started": time.ctime(),
            "latents": self.latents,
            "k": self.k,
            "rows_a_step": self.batch,
            "tokens_a_row": self.length,
            "load_before": _load(),
            "groups": {},
            "targets": [],
            "left_out": [],
        }
        self.machine = measured = floors.measured(self.device)
        if (
            self.device == "cuda"
        ):  # counted floors are of the chip, not of what this program reaches on it
            chip = torch.cuda.get_device_name()
            self.machine = (
                floors.H200_REACHED
                if "H200" in chip
                else floors.DATASHEET["H100"]
                if "H100" in chip
                else measured
            )
        self.found |= {"machine": self.machine._asdict(), "measured": measured._asdict()}

    def _device_name(self):
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        with open("/proc/cpuinfo") as file:
            name = next(
                (line.split(":")[1].strip() for line in file if line.startswith("model name")),
                "CPU",
            )
        return f"{torch.get_num_threads()} threads of {name}"

    def _random_model(self, config):
        """A Llama of random weights with the demo's tokenizer, saved once."""
        path = self.folder / f"random_{self.cfg.shape}"
        if not (path / "config.json").exists():
            torch.manual_seed(0)
            with torch.device(self.device):
                model = LlamaForCausalLM(
                    LlamaConfig(**config, max_position_embeddings=512, tie_word_embeddings=True)
                ).to(torch.bfloat16)
            AutoTokenizer.from_pretrained(DEMO_LM).save_pretrained(path)
            model.save_pretrained(path)
        return path

    @torch.no_grad()
    def _prepare(self):
        """Training rows in the order that train.py takes them, and held-out raw states, for contenders that are not ours."""
        rows = Rows(
            self.data_path, self.tokenizer, self.length, "train", max_tokens=self.cfg.tokens
        )
        torch.save(rows.batch(rows.order(42, 0)).input_ids.int(), self.rows_file)
        if self.cfg.shape == "llama":  # random weights: quality says nothing
            self.held_out = None
            return
        _, model = lm.get_language_model(self.model_path, "cpu", "float32")
        found = {site: [] for site in self.sites}
        for batch in Rows(
            self.data_path, self.tokenizer, self.length, "eval", max_tokens=self.cfg.held_out
        ).batches(self.batch):
            for site, state in lm.read_sites(model, batch.input_ids, self.sites).items():
                found[site].append(state[batch.mask].float())
        torch.save({site: torch.cat(states) for site, states in found.items()}, self.held_out)

    def argv(self, *models, k=None, **more):
        """Options of train.py."""
        chosen = {
            "model_path": self.model_path,
            "data_path": self.data_path,
            "latent_size": self.latents,
            "batch_size": self.batch,
            "max_length": self.length,
            "max_tokens": self.cfg.tokens,
            "device": self.device,
            "save_every": 0,
            "overwrite": 1,
            "resume": "never",
            **more,
        }
        return ["--model", *models, "--k", *map(str, k or [self.k]), *flags(chosen)]

    def ours(self, name, *models, **more):
        argv = self.argv(*models, **more)
        return Contender(
            name, {"kind": "ours", "argv": argv, "stages": len(models) == 1}, self.folder
        )

    def published(self, name, model, **more):
        job = self.published_job() | {
            "kind": "published",
            "model": model,
            "argv": self.argv(model, recipe="published"),
            "split": "train",
            "tokens": self.cfg.tokens,
            "rows": math.ceil(2 * self.cfg.tokens / self.length) + 64,
            **more,
        }
        return Contender(name, job, self.folder)

    def published_job(self):
        return {
            "model_path": self.model_path,
            "data_path": self.data_path,
            "batch": self.batch,
            "length": self.length,
            "device": self.device,
            "packed": False,
        }

    def peer(self, folder, name, **options):
        """A contender from a peer's environment, or None where that is not there."""
        python = Path(self.cfg.peers or "/nonexistent") / folder / "bin" / "python"
        if not python.exists():
            self.found["left_out"].append(
                f"{name}: no environment at {python.parent.parent}"
                if self.cfg.peers
                else f"{name}: no --peers DIR given"
            )
            return None
        job = {
            "model_path": self.model_path,
            "rows": str(self.rows_file),
            "site": self.site,
            "hidden": self.config.hidden_size,
            "latents": self.latents,
            "k": self.k,
            "batch": self.batch,
            "length": self.length,
            "tokens": self.cfg.tokens,
            "device": self.device,
            "special": self.tokenizer.all_special_ids,
            "folder": str(self.folder / folder),
            **options,
        }
        if not self.bf16:  # the checkpoint's bfloat16 would be emulated, at a tenth of the rate
            job["dtype"] = "float32"
        return Contender(name, job, self.folder, str(python), f"peer_{folder}")

    def target(self, what, must, goal, found, unit="x", more_is_better=True, moonshot=None):
        """A row of the table; found: {"median", "low", "high"} or None where nothing was measured."""
        limits = {"must": must, "goal": goal, "moonshot": moonshot}
        row = {"target": what, **limits, "unit": unit, "measured": found}
        if found is not None and any(limits.values()):
            sign = 1 if more_is_better else -1
            row["met"] = next(
                (
                    word
                    for word in list(limits)[::-1]
                    if limits[word] and sign * found["median"] >= sign * limits[word]
                ),
                "no",
            )
        self.found["targets"].append(row)

    def save(self):
        """What is measured stays, should a later part fail."""
        save_json(self.found, self.folder / "benchmark.json")

    def group(self, name, start, tokens, rounds, **more):
        """Starts the contenders that `start` lists, gives them their turns, ends them. Returns {name: result}."""
        print(f"{name} ...", flush=True)
        contenders = []
        try:
            for make in start:
                contender = make()
                if contender is not None:
                    contenders.append(contender)
                    print(f"  {contender.name}: loaded in {contender.loading:.1f} s", flush=True)
            results = play(contenders, tokens, rounds, **more)
        finally:
            for contender in contenders:
                contender.end()
        self.found["groups"][name] = results
        for one in results:
            quality = (
                f"  NormMSE {one['NormMSE']:.4f}  dead {one['dead']:.3f}"
                if one["NormMSE"] is not None
                else ""
            )
            print(
                f"  {one['name']}: {one['tokens_per_s']:,.0f} tokens/s ({one['spread'][0]:,.0f} to {one['spread'][1]:,.0f}){quality}",
                flush=True,
            )
        return {contender.name: contender for contender in contenders}

    def floor(self, *models):
        """{stage: seconds a token} of one training step of these models together."""
        bf16, step = self.bf16, self.batch * self.length
        number = "bf16" if bf16 else "fp32"
        shape, several = (
            floors.shape_of(self.config, self.length, step),
            ("RouteSAE", "MLSAE", "Crosscoder"),
        )
        blocks, saes = floors.blocks(shape, self.site, 2 if bf16 else 4), []
        for name in models:
            sizes = (
                self.config.hidden_size,
                self.latents,
                self.k,
                len(self.sites) if name in several else 1,
                step,
            )
            ways = [floors.sae(name, *sizes, sparse=sparse, adam=False) for sparse in (True, False)]
            saes.append(
                min(
                    ways,
                    key=lambda way: sum(
                        floors.seconds(work, self.machine, number) for work in way.values()
                    ),
                )
            )
        return floors.step_floor(saes, blocks, self.machine, number, number)


def flags(options):
    """Options as one would type them; None leaves one out."""
    return [
        part
        for name, value in options.items()
        if value is not None
        for part in (f"--{name}", str(value))
    ]


def trained(bench, model="RouteSAE"):
    """The checkpoint that the training left."""
    found = list((bench.folder / model / "SAE_models").glob(f"{model}_*.pt"))
    if not found:
        raise Failed(f"no trained {model} in {bench.folder / model}; let --only include training")
    return found[0]


def _load():
    with open("/proc/loadavg") as file:
        return file.read().split()[0]


def training(bench):
    """Train against the method as published and against the peers; time to quality."""
    tokens, rounds = bench.cfg.tokens, bench.cfg.rounds
    start = [
        lambda: bench.ours("ours TopK", "TopK", output_dir=bench.folder / "TopK"),
        lambda: bench.ours(
            "ours RouteSAE", "RouteSAE", **AS_PUBLISHED, output_dir=bench.folder / "RouteSAE"
        ),
        lambda: bench.ours("ours RouteSAE, standard router", "RouteSAE"),
        lambda: bench.published("published TopK", "TopK"),
        lambda: bench.published("published RouteSAE", "RouteSAE"),
        lambda: bench.peer("sparsify", "sparsify"),
        lambda: bench.peer("saelens", "sae-lens"),
    ]
    if bench.bf16:  # elsewhere float32 is what all of them run in
        start += [
            lambda: bench.ours("ours TopK, float32 LM", "TopK", dtype="float32"),
            lambda: bench.ours(
                "ours RouteSAE, float32 LM", "RouteSAE", **AS_PUBLISHED, dtype="float32"
            ),
            lambda: bench.peer("sparsify", "sparsify, float32 LM", dtype="float32"),
            lambda: bench.peer("saelens", "sae-lens, autocast", autocast=True),
        ]
    curves = ("ours TopK", "sparsify")
    done = bench.group(
        "training",
        start,
        tokens,
        rounds,
        held_out=bench.held_out,
        curves=curves,
        profiled=3 * bench.batch * bench.length,
    )

    def against(slow, fast):
        return (
            ratios(done[slow].costs(), done[fast].costs())
            if slow in done and fast in done
            else None
        )

    for model in ("RouteSAE", "TopK"):
        bench.target(
            f"train {model}, useful tokens/s against the method as published",
            3,
            5,
            against(f"published {model}", f"ours {model}"),
        )
        fp32 = against(
            f"published {model}", f"ours {model}, float32 LM" if bench.bf16 else f"ours {model}"
        )
        bench.target(f"the same with a float32 LM, {model}", 2.2, 2.6, fp32)
    for peer in ("sae-lens", "sparsify"):
        names = [name for name in done if name.startswith(peer)]
        quickest = (
            max(names, key=lambda name: done[name].result()["tokens_per_s"]) if names else peer
        )
        bench.target(
            f"train TopK against {peer} ({quickest})", 2, 3, against(quickest, "ours TopK")
        )
    bench.target(
        "tokens to the NormMSE that sparsify's default ends with",
        1,
        0.5,
        to_quality(done, "tokens"),
        "of its tokens",
        False,
    )
    bench.target(
        "seconds to the same", None, None, to_quality(done, "seconds"), "of its seconds", False
    )


def to_quality(done, unit):
    """Share of sparsify's tokens (or seconds) after which ours reaches the NormMSE that sparsify reached; at each of the later rounds."""
    if not {"ours TopK", "sparsify"} <= set(done) or not done["sparsify"].qualities:
        return None
    mine, found = done["ours TopK"].qualities, []
    for point in done["sparsify"].qualities[1:]:
        for before, after in zip(mine, mine[1:], strict=False):
            if after["NormMSE"] <= point["NormMSE"]:
                part = min(
                    1.0,
                    max(
                        0.0,
                        (before["NormMSE"] - point["NormMSE"])
                        / (before["NormMSE"] - after["NormMSE"]),
                    ),
                )
                found.append((before[unit] + part * (after[unit] - before[unit])) / point[unit])
                break
    return (
        {"median": found[-1], "low": min(found), "high": max(found), "turns": len(found)}
        if found
        else None
    )


def six(bench):
    """Six SAEs from one forward pass against six runs."""
    combinations = [
        (model, k) for model in ("TopK", "RouteSAE") for k in (bench.k // 2, bench.k, 2 * bench.k)
    ]
    start = [
        lambda: bench.ours(
            "six from one forward",
            "TopK",
            "RouteSAE",
            k=sorted({k for _, k in combinations}),
            **AS_PUBLISHED,
        )
    ]
    start += [
        lambda model=model, k=k: bench.ours(f"{model} k {k}", model, k=[k], **AS_PUBLISHED)
        for model, k in combinations
    ]
    rounds = min(bench.cfg.rounds, 6)
    done = bench.group("six SAEs", start, bench.batch * bench.length * 4 * rounds, rounds)
    together = done.pop("six from one forward").costs()
    apart = [sum(costs) for costs in zip(*(one.costs() for one in done.values()), strict=False)]
    bench.target(
        "six SAEs (2 models x 3 k) from one forward against six runs",
        2.5,
        3.3,
        ratios(apart, together),
    )


def evaluating(bench):
    """NormMSE, KL and CE of the trained RouteSAE from one process against one process per metric with complete runs."""
    tokens = bench.cfg.evaluate
    rows = math.ceil(tokens / (bench.length - 1))
    options = {
        "SAE_path": trained(bench),
        "max_samples": rows,
        "batch_size": bench.batch,
        "output_dir": bench.folder / "RouteSAE",
        "model_path": bench.model_path,
        "device": bench.device,
    }
    argv = [*flags(options), "--metric", "NormMSE", "KLDiv", "DeltaCE"]
    start = [
        lambda: Contender("ours, all metrics", {"kind": "evaluate", "argv": argv}, bench.folder)
    ]
    for metric in ("NormMSE", "KLDiv", "DeltaCE"):
        job = bench.published_job() | {
            "kind": "evaluate_published",
            "metric": metric,
            "SAE_path": str(trained(bench)),
            "split": "eval",
        }
        job |= {"tokens": tokens, "rows": 2 * rows}
        start.append(
            lambda job=job, metric=metric: Contender(f"published, {metric}", job, bench.folder)
        )
    done = bench.group("evaluation", start, tokens, bench.cfg.rounds)
    mine = done.pop("ours, all metrics").costs()
    apart = [sum(costs) for costs in zip(*(one.costs() for one in done.values()), strict=False)]
    bench.target(
        "evaluate NormMSE + KL + CE of RouteSAE against one process per metric",
        3.5,
        6,
        ratios(apart, mine),
    )


def applying(bench):
    """Extraction of contexts after encoding against a per-activation loop (benchmarks/apply_extraction.py)."""
    from benchmarks import apply_extraction

    print("apply ...", flush=True)
    options = {
        "SAE_path": trained(bench, "TopK"),
        "max_tokens": bench.cfg.apply,
        "output_dir": bench.folder / "TopK",
        "device": bench.device,
    }
    spent, times = apply_extraction.compare(flags(options))
    bench.found["groups"]["apply"] = {"seconds": spent, "times": times}
    once = {
        "median": times["published loop"],
        "low": times["published loop"],
        "high": times["published loop"],
        "turns": 1,
    }
    bench.target("apply: extraction after encoding against a per-activation loop", 30, 100, once)


def held(bench, name, make, warm=8):
    """A contender's rate held for cfg.held seconds in ten turns, alone on the device."""
    contender = make()
    try:
        contender.go(1, counted=False)
        step = contender.turns[-1]["tokens"]
        turn = contender.go((warm + 1) * step, counted=False)
        share = max(step, bench.cfg.held / 10 * turn["tokens"] / turn["seconds"])
        for _ in range(10):
            turn = contender.go(turn["done"] + share)
        if contender.job.get("stages"):
            contender.profile(turn["done"] + 3 * step)
    finally:
        contender.end()
    result = contender.result()
    bench.found["groups"].setdefault("held", []).append(result)
    bench.save()
    print(
        f"  {name}: {result['tokens_per_s']:,.0f} tokens/s ({result['spread'][0]:,.0f} to {result['spread'][1]:,.0f})",
        flush=True,
    )
    return contender


def minutes(costs, tokens):
    """Minutes that a number of tokens takes at these seconds a token: extrapolated."""
    found = sorted(cost * tokens / 60 for cost in costs)
    return {
        "median": statistics.median(found),
        "low": found[0],
        "high": found[-1],
        "turns": len(found),
    }


def rates(bench):
    """Rates held for a minute, and what they come to for the tokens of a real run: the table of one large GPU."""
    endless = {"max_tokens": None, "num_epochs": 100_000}
    print("held rates ...", flush=True)
    for name in bench.cfg.rate_of:
        models, must, goal, moonshot = SETS[name]
        options = {
            **endless,
            **(AS_PUBLISHED if "RouteSAE" in models else {}),
            "output_dir": bench.folder / f"held_{name}",
        }
        done = held(
            bench,
            f"ours {name}",
            lambda name=name, models=models, options=options: bench.ours(
                f"ours {name}", *models, **options
            ),
        )
        bench.target(
            f"{name}, 100M tokens at the rate held",
            must,
            goal,
            minutes(done.costs(), 1e8),
            "min",
            False,
            moonshot,
        )
        if name == "RouteSAE":
            peak = done.result()["peak_bytes"] / 1e9
            bench.target(
                "peak memory, RouteSAE",
                40,
                20,
                {"median": peak, "low": peak, "high": peak, "turns": 1},
                "GB",
                False,
                16,
            )


def reading(bench):
    """How long evaluation and contexts take for the tokens of a real run, of a RouteSAE that has had twenty steps."""
    print("reading ...", flush=True)
    options = {
        **AS_PUBLISHED,
        "output_dir": bench.folder / "RouteSAE",
        "max_tokens": 20 * bench.batch * bench.length,
    }
    short = bench.ours("RouteSAE to read", "RouteSAE", **options)
    short.go(math.inf)
    short.end()
    common = {
        "SAE_path": trained(bench),
        "output_dir": bench.folder / "RouteSAE",
        "model_path": bench.model_path,
        "device": bench.device,
    }
    options = {
        **common,
        "batch_size": bench.batch,
        "max_tokens": None,
        "split": "all",
        "compile_lm": "yes",
    }  # as 10M tokens have it by default
    metrics = ["--metric", "NormMSE", "KLDiv"]
    evaluation = Contender(
        "evaluate", {"kind": "evaluate", "argv": flags(options) + metrics}, bench.folder
    )
    contexts = Contender("apply", {"kind": "apply", "argv": flags(options)}, bench.folder)
    for name, contender, limits in (
        ("evaluate 10M tokens, RouteSAE KL", evaluation, (3, 1.75, 1.33)),
        ("apply 10M tokens", contexts, (5, 1.67, 1)),
    ):
        try:
            contender.go(1, counted=False)
            contender.go(math.inf)  # all there is, to its end
        finally:
            contender.end()
        last = contender.turns[-1]
        must, goal, moonshot = limits
        bench.target(
            f"{name} (from {last['tokens']:,})",
            must,
            goal,
            minutes([last["seconds"] / last["tokens"]], 1e7),
            "min",
            False,
            moonshot,
        )
        bench.save()
        print(f"  {name}: {last['tokens']:,} in {last['seconds']:.1f} s", flush=True)


def against_published(bench):
    """The held rate of RouteSAE against that of the method as published."""
    published = held(
        bench,
        "published RouteSAE",
        lambda: bench.published("published RouteSAE", "RouteSAE", tokens=10**12),
        warm=2,
    )
    ours = next(
        (one for one in bench.found["groups"]["held"] if one["name"] == "ours RouteSAE"), None
    )
    found = ours and ratios(published.costs(), [1 / rate for rate in ours["rates"]])
    bench.target("train RouteSAE, useful tokens/s against the method as published", 10, 19, found)


PARTS = {
    "training": training,
    "six": six,
    "evaluate": evaluating,
    "apply": applying,
    "rates": rates,
    "reading": reading,
    "published": against_published,
}
ON = {"cuda": ("rates", "reading", "published"), "cpu": ("training", "six", "evaluate", "apply")}


def common(parser, rounds):
    """Options of every benchmark here."""
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="llama" if cuda else "demo",
        help="which language model and SAE sizes",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--peers", help="folder of the peers' environments")
    parser.add_argument(
        "--tokens", type=int, default=300_000, help="training tokens of each contender"
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="turns of each contender, the first not counted"
    )
    parser.add_argument(
        "--held_out", type=int, default=16_000, help="tokens quality is measured on"
    )
    parser.add_argument("--data_path", help="text (default: the demo's)")
    parser.add_argument("--output_dir", default="outputs/benchmark")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__.splitlines()[0]
    )
    common(parser, 8)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: tiny shapes, few tokens"
    )
    parser.add_argument(
        "--evaluate", type=int, default=30_000, help="tokens of the evaluation contenders"
    )
    parser.add_argument(
        "--apply", type=int, default=60_000, help="tokens contexts are extracted from"
    )
    parser.add_argument(
        "--held", type=float, default=65, help="seconds a rate is held where rates are measured"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        help=f"parts (default on CUDA: {' '.join(ON['cuda'])}; else {' '.join(ON['cpu'])})",
    )
    parser.add_argument(
        "--rate_of", nargs="+", choices=SETS, default=list(SETS), help="whose rates are held"
    )
    cfg = parser.parse_args(argv)
    if cfg.quick:
        cfg.shape, cfg.tokens, cfg.rounds, cfg.held_out, cfg.evaluate, cfg.apply = (
            "tiny",
            3000,
            3,
            500,
            1000,
            500,
        )
    started = time.perf_counter()
    bench = Bench(cfg)
    for name in cfg.only or ON["cuda" if "cuda" in cfg.device else "cpu"]:
        PARTS[name](bench)
    bench.found["seconds"], bench.found["load_after"] = time.perf_counter() - started, _load()
    bench.found["floors"] = {model: bench.floor(model) for model in EIGHT} | {
        "zoo": bench.floor(*EIGHT)
    }
    bench.save()
    text = report.markdown(bench.found)
    save_text(text, bench.folder / "benchmark.md")
    print(text)
    report.pictures(json.loads(json.dumps(bench.found)), bench.folder)
    return bench.found


if __name__ == "__main__":
    main()
