"""The benchmark: `python -m benchmarks.run`.

Measures this project, the methods as published and other libraries: rates beside quality, floors
and targets. On a CPU the built-in language model is used; on CUDA a language model with the shapes
of Llama-3.2-1B and random weights. --shape overrides this; smollm2 is the model that
`scripts/download_model.sh smollm2` puts into $DATA_DIR/model.

Other libraries run from environments made by benchmarks/requirements-*.txt and found at --peers DIR
(DIR/saelens, DIR/sparsify); absent ones are left out. Results: benchmark.json, benchmark.md and
pictures in --output_dir.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import floors, report
from benchmarks.runner import Contender, Failed, play, ratios, spread_of
from src import checkpoint, demo, lm
from src.config import small_parser
from src.data import Rows
from src.files import DEMO_LM, save_json, save_text
from src.sae import routed_sites

LLAMA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 4096,
}


class Sizes(NamedTuple):
    """Sizes of one benchmark."""

    language_model: (
        dict[str, int] | Path
    )  # a configuration to fill with random weights, or a folder
    latents: int
    k: int
    batch: int  # rows a step
    length: int  # tokens a row


SHAPES = {
    "demo": Sizes(DEMO_LM, 2048, 16, 16, 256),
    "smollm2": Sizes(
        Path(os.environ.get("DATA_DIR", "data")).resolve() / "model", 4096, 32, 16, 256
    ),
    "llama": Sizes(LLAMA_1B, 16384, 64, 64, 512),
    "tiny": Sizes(TINY, 64, 4, 4, 32),
}
# The router as the published method trains it.
AS_PUBLISHED = {"router_objective": "published", "router_balance": "none"}
EIGHT = ("TopK", "RandomK", "Vanilla", "Gated", "JumpReLU", "RouteSAE", "Crosscoder", "MLSAE")
METRICS = ("NormMSE", "KLDiv", "DeltaCE")


class HeldSet(NamedTuple):
    """Models trained together, and the limits of their minutes for 100M tokens."""

    models: tuple[str, ...]
    must: float | None = None
    goal: float | None = None
    moonshot: float | None = None
    options: dict[str, str] = AS_PUBLISHED  # of train.py; models without a router ignore these


SETS = {
    "RouteSAE": HeldSet(("RouteSAE",), 8.3, 6.5, 5.0),
    "RouteSAE_standard": HeldSet(("RouteSAE",), options={}),
    "TopK": HeldSet(("TopK",)),
    "Crosscoder": HeldSet(("Crosscoder",), 21, 16, 13),
    "MLSAE": HeldSet(("MLSAE",), 18, 13.7, 11),
    "zoo": HeldSet(EIGHT, 45, 31, 25),
}


class Bench:
    """One benchmark: its shapes, text, held-out states and results."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.folder = Path(cfg.output_dir).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        source, self.latents, self.k, self.batch, self.length = SHAPES[cfg.shape]
        self.device = cfg.device
        # whether this project's contenders run the language model in bfloat16
        self.bf16 = self.device == "cuda" or lm.pick_dtype("auto", "cpu") == torch.bfloat16
        self.model_path = str(self._random_model(source) if isinstance(source, dict) else source)
        self.data_path = str(cfg.data_path or demo.build_corpus())
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        self.config = AutoConfig.from_pretrained(self.model_path)
        self.depth = self.config.num_hidden_layers
        self.site = 3 * self.depth // 4
        self.sites = routed_sites(self.depth)
        self.rows_file = self.folder / "rows.pt"
        self.held_out = self.folder / "held_out.pt"
        self._prepare_rows()
        self._prepare_held_out()
        self.results = {
            "shape": cfg.shape,
            "device": self._device_name(),
            "commit": checkpoint.environment(),
            "tokens": cfg.tokens,
            "started": time.ctime(),
            "latents": self.latents,
            "k": self.k,
            "rows_a_step": self.batch,
            "tokens_a_row": self.length,
            "load_before": system_load(),
            "groups": {},
            "targets": [],
            "left_out": [],
        }
        measured = floors.measured(self.device)
        self.machine = self._machine(measured)
        self.results["machine"] = self.machine._asdict()
        self.results["measured"] = measured._asdict()

    def _device_name(self):
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        name = "CPU"
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    name = line.split(":")[1].strip()
                    break
        return f"{torch.get_num_threads()} threads of {name}"

    def _machine(self, measured):
        """The rates that floors are counted with.

        Those of a known chip, because a floor must not depend on what PyTorch reaches on it.
        """
        chip = torch.cuda.get_device_name() if self.device == "cuda" else ""
        if "H200" in chip:
            return floors.H200_REACHED
        if "H100" in chip:
            return floors.DATASHEET["H100"]
        return measured

    def _random_model(self, config):
        """A Llama of random weights with the tokenizer of the built-in model, saved once."""
        path = self.folder / f"random_{self.cfg.shape}"
        if not (path / "config.json").exists():
            torch.manual_seed(0)
            llama = LlamaConfig(**config, max_position_embeddings=512, tie_word_embeddings=True)
            with torch.device(self.device):
                model = LlamaForCausalLM(llama).to(torch.bfloat16)
            AutoTokenizer.from_pretrained(DEMO_LM).save_pretrained(path)
            model.save_pretrained(path)
        return path

    def _rows(self, split, tokens):
        return Rows(self.data_path, self.tokenizer, self.length, split, max_tokens=tokens)

    def _prepare_rows(self):
        """Save training rows for other libraries, in the order in which train.py takes them."""
        rows = self._rows("train", self.cfg.tokens)
        wanted = math.ceil(self.cfg.tokens / self.length)
        epochs = range(max(1, math.ceil(wanted / len(rows))))  # a short text is read again
        order = torch.cat([torch.as_tensor(rows.order(42, epoch)) for epoch in epochs])
        torch.save(rows.batch(order[: max(wanted, len(rows))]).input_ids.int(), self.rows_file)

    @torch.no_grad()
    def _prepare_held_out(self):
        """Save raw states of held-out text, on which every contender's quality is measured."""
        if self.cfg.shape == "llama":  # quality on random weights means nothing
            self.held_out = None
            return
        _, model = lm.get_language_model(self.model_path, "cpu", "float32")
        chunks = {site: [] for site in self.sites}
        for batch in self._rows("eval", self.cfg.held_out).batches(self.batch):
            for site, state in lm.read_sites(model, batch.input_ids, self.sites).items():
                chunks[site].append(state[batch.mask].float())
        torch.save({site: torch.cat(states) for site, states in chunks.items()}, self.held_out)

    # ---------------------------------------------------------------------------------- contenders

    def argv(self, *models, k=None, layers=(), **options):
        """Options of train.py."""
        defaults = {
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
        }
        lists = {"model": models, "k": k or [self.k], "layer": layers}
        argv = [
            str(part) for name, items in lists.items() if items for part in (f"--{name}", *items)
        ]
        return argv + flags(defaults | options)

    def ours(self, name, *models, **options):
        """A contender that trains models with this project."""
        job = {"kind": "ours", "argv": self.argv(*models, **options), "stages": len(models) == 1}
        return Contender(name, job, self.folder)

    def published(self, name, model, **changes):
        """A contender that trains a model with the loop as published."""
        job = self.published_job() | {
            "kind": "published",
            "model": model,
            "argv": self.argv(model, recipe="published"),
            "split": "train",
            "tokens": self.cfg.tokens,
            "rows": math.ceil(2 * self.cfg.tokens / self.length) + 64,
        }
        return Contender(name, job | changes, self.folder)

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
        """A contender of another library, or None if its environment does not exist."""
        python = Path(self.cfg.peers or "/nonexistent") / folder / "bin" / "python"
        if not python.exists():
            why = "no --peers DIR given"
            if self.cfg.peers:
                why = f"no environment at {python.parent.parent}"
            self.results["left_out"].append(f"{name}: {why}")
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

    # ------------------------------------------------------------------------------------- results

    def target(self, name, must, goal, measured, unit="x", more_is_better=True, moonshot=None):
        """Add a row of the table of targets. measured: see runner.spread_of; None: not measured."""
        limits = {"must": must, "goal": goal, "moonshot": moonshot}
        row = {"target": name, **limits, "unit": unit, "measured": measured}
        if measured is not None and any(limits.values()):
            sign = 1 if more_is_better else -1
            row["met"] = "no"
            for word, limit in limits.items():  # the last one that is met counts
                if limit and sign * measured["median"] >= sign * limit:
                    row["met"] = word
        self.results["targets"].append(row)

    def save(self):
        """Save what has been measured so far, in case a later part fails."""
        save_json(self.results, self.folder / "benchmark.json")

    def group(self, name, starts, tokens, rounds, **options):
        """Start contenders, give them their turns, end them. Returns {name: contender}.

        starts: functions that return a contender or None. options: see runner.play.
        """
        print(f"{name} ...", flush=True)
        contenders = []
        try:
            for start in starts:
                contender = start()
                if contender is not None:
                    contenders.append(contender)
                    print(f"  {contender.name}: loaded in {contender.loading:.1f} s", flush=True)
            results = play(contenders, tokens, rounds, **options)
        finally:
            for contender in contenders:
                contender.end()
        self.results["groups"][name] = results
        self.save()  # what is made of the results may fail
        for result in results:
            print(f"  {describe(result)}", flush=True)
        return {contender.name: contender for contender in contenders}

    def floor(self, *models):
        """{stage: seconds a token} of one training step of these models together."""
        step = self.batch * self.length
        number, width = ("bf16", 2) if self.bf16 else ("fp32", 4)
        shape = floors.shape_of(self.config, self.length, step)
        blocks = floors.blocks(shape, self.site, width)

        def fastest(model):
            sites = len(self.sites) if model in ("RouteSAE", "MLSAE", "Crosscoder") else 1
            sizes = (self.config.hidden_size, self.latents, self.k, sites, step)
            ways = [floors.sae(model, *sizes, sparse=way, adam=False) for way in (True, False)]
            return min(ways, key=total_seconds)

        def total_seconds(stages):
            return sum(floors.seconds(work, self.machine, number) for work in stages.values())

        saes = [fastest(model) for model in models]
        return floors.step_floor(saes, blocks, self.machine, number, number)


def describe(result):
    """One line about a contender's result."""
    line = f"{result['name']}: no turn counted"
    if result["spread"]:
        low, high = result["spread"]
        line = f"{result['name']}: {result['tokens_per_s']:,.0f} tokens/s"
        line += f" ({low:,.0f} to {high:,.0f})"
    if result["NormMSE"] is not None:
        line += f"  NormMSE {result['NormMSE']:.4f}  dead {result['dead']:.3f}"
    return line


def flags(options):
    """Options as one would type them; None leaves one out."""
    given = {name: value for name, value in options.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def trained(bench, model="RouteSAE"):
    """The checkpoint of a model that an earlier part has trained. Raises Failed without one."""
    folder = bench.folder / model
    paths = list((folder / "SAE_models").glob(f"{model}_*.pt"))
    if not paths:
        raise Failed(f"no trained {model} in {folder}; let --only include training")
    return paths[0]


def system_load():
    with open("/proc/loadavg") as file:
        return file.read().split()[0]


# ---------------------------------------------------------------------------------------- on a CPU


def training(bench):
    """Training rates against the methods as published and other libraries; tokens to quality."""
    tokens, rounds = bench.cfg.tokens, bench.cfg.rounds
    step = bench.batch * bench.length
    profiled = 3 * step
    # Each turn ends with a whole step.
    uncounted = tokens / rounds + step + profiled + step
    if tokens * (rounds - 1) / rounds <= uncounted:
        raise SystemExit(
            f"benchmarks.run: --tokens {tokens} --rounds {rounds}: no turn of the training counts; "
            f"the first warms up, the last ends it, and {profiled} tokens are profiled; give more"
        )
    done = bench.group(
        "training",
        training_contenders(bench),
        tokens,
        rounds,
        held_out=bench.held_out,
        curves=("ours TopK", "sparsify"),
        profiled=profiled,
    )

    def against(slow, fast):
        if slow in done and fast in done:
            return ratios(done[slow].costs(), done[fast].costs())
        return None

    for model in ("RouteSAE", "TopK"):
        name = f"train {model}, useful tokens/s against the method as published"
        bench.target(name, 3, 5, against(f"published {model}", f"ours {model}"))
        fp32 = f"ours {model}, float32 LM" if bench.bf16 else f"ours {model}"
        name = f"the same with a float32 LM, {model}"
        bench.target(name, 2.2, 2.6, against(f"published {model}", fp32))
    for peer in ("sae-lens", "sparsify"):
        names = [name for name in done if name.startswith(peer)]
        rate_of = {name: done[name].result()["tokens_per_s"] for name in names}
        fastest = max(names, key=rate_of.get, default=peer)
        name = f"train TopK against {peer} ({fastest})"
        bench.target(name, 2, 3, against(fastest, "ours TopK"))
    name = "tokens to the NormMSE that sparsify's default ends with"
    bench.target(name, 1, 0.5, to_quality(done, "tokens"), "of its tokens", False)
    in_seconds = to_quality(done, "seconds")
    bench.target("seconds to the same", None, None, in_seconds, "of its seconds", False)


def training_contenders(bench):
    """Functions that start them."""
    in_folder = AS_PUBLISHED | {"output_dir": bench.folder / "RouteSAE"}
    in_float32 = AS_PUBLISHED | {"dtype": "float32"}
    starts = [
        lambda: bench.ours("ours TopK", "TopK", output_dir=bench.folder / "TopK"),
        lambda: bench.ours("ours RouteSAE", "RouteSAE", **in_folder),
        lambda: bench.ours("ours RouteSAE, standard router", "RouteSAE"),
        lambda: bench.published("published TopK", "TopK"),
        lambda: bench.published("published RouteSAE", "RouteSAE"),
        lambda: bench.peer("sparsify", "sparsify"),
        lambda: bench.peer("saelens", "sae-lens"),
    ]
    if bench.bf16:  # otherwise all of the above run in float32 already
        starts += [
            lambda: bench.ours("ours TopK, float32 LM", "TopK", dtype="float32"),
            lambda: bench.ours("ours RouteSAE, float32 LM", "RouteSAE", **in_float32),
            lambda: bench.peer("sparsify", "sparsify, float32 LM", dtype="float32"),
            lambda: bench.peer("saelens", "sae-lens, autocast", autocast=True),
        ]
    return starts


def to_quality(done, unit):
    """Share of sparsify's tokens (or seconds) after which ours reaches sparsify's NormMSE.

    Interpolated between rounds; one value for every round of sparsify after the first, of which the
    last is reported as the median.
    """
    if not {"ours TopK", "sparsify"} <= set(done) or not done["sparsify"].qualities:
        return None
    curve = done["ours TopK"].qualities
    shares = []
    for point in done["sparsify"].qualities[1:]:
        reached = amount_to_reach(curve, point["NormMSE"], unit)
        if reached is not None:
            shares.append(reached / point[unit])
    if not shares:
        return None
    return spread_of(shares) | {"median": shares[-1]}


def amount_to_reach(curve, error, unit):
    """Tokens (or seconds) at which a curve reaches an error; None if it does not."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after["NormMSE"] <= error:
            part = (before["NormMSE"] - error) / (before["NormMSE"] - after["NormMSE"])
            part = min(1.0, max(0.0, part))
            return before[unit] + part * (after[unit] - before[unit])
    return None


def six(bench):
    """Six SAEs from one forward pass against six runs."""
    models, ks = ("TopK", "RouteSAE"), [bench.k // 2, bench.k, 2 * bench.k]
    name = "six from one forward"
    starts = [lambda: bench.ours(name, *models, k=sorted(set(ks)), **AS_PUBLISHED)]
    for model in models:
        for k in ks:
            starts.append(
                lambda model=model, k=k: bench.ours(f"{model} k {k}", model, k=[k], **AS_PUBLISHED)
            )
    rounds = min(bench.cfg.rounds, 6)
    done = bench.group("six SAEs", starts, bench.batch * bench.length * 4 * rounds, rounds)
    together = done.pop(name).costs()
    target = "six SAEs (2 models x 3 k) from one forward against six runs"
    bench.target(target, 2.5, 3.3, ratios(summed_costs(done), together))


def summed_costs(contenders):
    """Seconds a token of all contenders one after the other, turn by turn."""
    costs = [contender.costs() for contender in contenders.values()]
    return [sum(of_turn) for of_turn in zip(*costs, strict=False)]


def eight(bench):
    """Eight TopKs at eight sites from one forward pass, by this project and by other libraries."""
    spacing = max(1, len(bench.sites) // 8)
    sites = bench.sites[::-spacing][:8]
    starts = [
        lambda: bench.ours("ours, eight TopK", "TopK", layers=sites),
        lambda: bench.peer("sparsify", "sparsify, eight", site=sites[0], sites=sites),
        lambda: bench.peer("saelens", "sae-lens, eight", site=sites[0], sites=sites),
    ]
    rounds = min(bench.cfg.rounds, 6)
    tokens = bench.batch * bench.length * 4 * rounds
    done = bench.group("eight SAEs", starts, tokens, rounds, held_out=bench.held_out)
    for name in list(done)[1:]:
        measured = ratios(done[name].costs(), done["ours, eight TopK"].costs())
        bench.target(f"eight TopKs from one forward against {name}", None, None, measured)


def evaluating(bench):
    """All metrics of the trained RouteSAE from one process, against one process per metric."""
    tokens = bench.cfg.evaluate
    rows = math.ceil(tokens / (bench.length - 1))
    path = trained(bench)
    options = {
        "SAE_path": path,
        "max_samples": rows,
        "batch_size": bench.batch,
        "output_dir": bench.folder / "RouteSAE",
        "model_path": bench.model_path,
        "device": bench.device,
    }
    job = {"kind": "evaluate", "argv": [*flags(options), "--metric", *METRICS]}
    starts = [lambda: Contender("ours, all metrics", job, bench.folder)]
    for metric in METRICS:
        published = bench.published_job() | {
            "kind": "evaluate_published",
            "metric": metric,
            "SAE_path": str(path),
            "split": "eval",
            "tokens": tokens,
            "rows": 2 * rows,
        }
        starts.append(
            lambda job=published: Contender(f"published, {job['metric']}", job, bench.folder)
        )
    done = bench.group("evaluation", starts, tokens, bench.cfg.rounds)
    ours = done.pop("ours, all metrics").costs()
    target = "evaluate NormMSE + KL + CE of RouteSAE against one process per metric"
    bench.target(target, 3.5, 6, ratios(summed_costs(done), ours))


def applying(bench):
    """Extraction of contexts against a loop over activations (benchmarks/apply_extraction.py)."""
    from benchmarks import apply_extraction

    print("apply ...", flush=True)
    options = {
        "SAE_path": trained(bench, "TopK"),
        "max_tokens": bench.cfg.apply,
        "output_dir": bench.folder / "TopK",
        "device": bench.device,
    }
    seconds, times = apply_extraction.compare(flags(options))
    bench.results["groups"]["apply"] = {"seconds": seconds, "times": times}
    target = "apply: extraction after encoding against a per-activation loop"
    bench.target(target, 30, 100, spread_of([times["published loop"]]))


# ---------------------------------------------------------------------------------------- on a GPU


def held(bench, start, warm=8):
    """Let a contender hold its rate for cfg.held seconds in ten turns, alone on the device.

    warm: steps before that, which are not counted. Returns the contender.
    """
    contender = start()
    try:
        contender.go(1, counted=False)
        step = contender.turns[-1]["tokens"]
        turn = contender.go((warm + 1) * step, counted=False)
        tokens_per_s = turn["tokens"] / turn["seconds"]
        share = max(step, bench.cfg.held / 10 * tokens_per_s)
        for _ in range(10):
            turn = contender.go(turn["done"] + share)
        if contender.job.get("stages"):
            contender.profile(turn["done"] + 3 * step)
    finally:
        contender.end()
    result = contender.result()
    bench.results["groups"].setdefault("held", []).append(result)
    bench.save()
    print(f"  {describe(result)}", flush=True)
    return contender


def minutes(costs, tokens):
    """Minutes for a number of tokens, extrapolated from seconds a token."""
    return spread_of([cost * tokens / 60 for cost in costs])


def rates(bench):
    """Rates held for a minute, and the minutes that 100M tokens would take at these rates."""
    print("held rates ...", flush=True)
    for name in bench.cfg.rate_of:
        models, must, goal, moonshot, changes = SETS[name]
        options = {
            "max_tokens": None,
            "num_epochs": 100_000,  # more than the time allows
            "output_dir": bench.folder / f"held_{name}",
        }
        if "RouteSAE" in models:
            options |= changes

        def start(name=name, models=models, options=options):
            return bench.ours(f"ours {name}", *models, **options)

        done = held(bench, start)
        measured = minutes(done.costs(), 1e8)
        target = f"{name}, 100M tokens at the rate held"
        bench.target(target, must, goal, measured, "min", False, moonshot)
        if name == "RouteSAE":
            peak = spread_of([done.result()["peak_bytes"] / 1e9])
            bench.target("peak memory, RouteSAE", 40, 20, peak, "GB", False, 16)


def reading(bench):
    """Minutes to evaluate and to apply 10M tokens with a RouteSAE that was trained for 20 steps."""
    print("reading ...", flush=True)
    output_dir = bench.folder / "RouteSAE"
    steps = {"output_dir": output_dir, "max_tokens": 20 * bench.batch * bench.length}
    short = bench.ours("RouteSAE to read", "RouteSAE", **AS_PUBLISHED, **steps)
    short.go(math.inf)
    short.end()
    options = {
        "SAE_path": trained(bench),
        "output_dir": output_dir,
        "model_path": bench.model_path,
        "device": bench.device,
        "batch_size": bench.batch,
        "split": "all",
        "compile_lm": "yes",  # the default for 10M tokens
    }
    metrics = ["--metric", "NormMSE", "KLDiv"]
    evaluation = {"kind": "evaluate", "argv": flags(options) + metrics}
    contexts = {"kind": "apply", "argv": flags(options)}
    evaluator = Contender("evaluate", evaluation, bench.folder)
    applier = Contender("apply", contexts, bench.folder)
    read_all(bench, evaluator, "evaluate 10M tokens, RouteSAE KL", 3, 1.75, 1.33)
    read_all(bench, applier, "apply 10M tokens", 5, 1.67, 1)


def read_all(bench, contender, name, must, goal, moonshot):
    """Let a contender read for cfg.read seconds; a target of its minutes for 10M tokens."""
    try:
        turn = contender.go(1, counted=False)
        for seconds in (bench.cfg.read / 10, bench.cfg.read):  # the first gives the rate
            if turn.get("final"):
                break
            turn = contender.go(turn["done"] + seconds * turn["tokens"] / turn["seconds"])
    finally:
        contender.end()
    tokens, seconds = turn["tokens"], turn["seconds"]
    target = f"{name} (from {tokens:,})"
    bench.target(target, must, goal, minutes([seconds / tokens], 1e7), "min", False, moonshot)
    bench.save()
    print(f"  {name}: {tokens:,} in {seconds:.1f} s", flush=True)


def against_published(bench):
    """The held rate of RouteSAE against that of the method as published."""

    def start():
        return bench.published("published RouteSAE", "RouteSAE", tokens=10**12)

    published = held(bench, start, warm=2)
    measured = None
    for result in bench.results["groups"]["held"]:
        if result["name"] == "ours RouteSAE":
            measured = ratios(published.costs(), [1 / rate for rate in result["rates"]])
            break
    target = "train RouteSAE, useful tokens/s against the method as published"
    bench.target(target, 10, 19, measured)


# ------------------------------------------------------------------------------------ command line

PEERS = {  # name: (environment, options of its job)
    "sparsify": ("sparsify", {}),
    "sparsify, bfloat16": ("sparsify", {"dtype": "bfloat16"}),
    "sae-lens": ("saelens", {}),
    "sae-lens, bfloat16 and autocast": ("saelens", {"dtype": "bfloat16", "autocast": True}),
}


def other_libraries(bench):
    """Held rates of other libraries, at their defaults and with the options made for speed."""
    print("other libraries ...", flush=True)
    for name, (environment, options) in PEERS.items():
        contender = bench.peer(environment, name, **options)
        if contender is None:
            continue
        try:
            held(bench, lambda contender=contender: contender, warm=2)
        except Failed as error:  # the others are still worth measuring
            bench.results["left_out"].append(f"{name}: {error}")
            bench.save()


PARTS = {
    "training": training,
    "six": six,
    "eight": eight,
    "evaluate": evaluating,
    "apply": applying,
    "rates": rates,
    "peers": other_libraries,
    "reading": reading,
    "published": against_published,
}
DEFAULT_PARTS = {
    "cuda": ("rates", "reading", "published"),
    "cpu": ("training", "six", "evaluate", "apply"),
}
QUICK = {
    "shape": "tiny",
    "tokens": 3000,
    "rounds": 3,
    "held_out": 500,
    "evaluate": 1000,
    "apply": 500,
}


def add_common_options(parser, rounds):
    """Options of this benchmark and of benchmarks.sweeps."""
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    shape = "llama" if cuda else "demo"
    add("--shape", choices=SHAPES, default=shape, help="which language model and SAE sizes")
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--peers", help="folder of the peers' environments")
    add("--tokens", type=int, default=300_000, help="training tokens of each contender")
    rounds_help = "turns of each contender, the first not counted"
    add("--rounds", type=int, default=rounds, help=rounds_help)
    add("--held_out", type=int, default=16_000, help="tokens quality is measured on")
    add("--data_path", help="text (default: the demo's)")
    add("--output_dir", default="outputs/benchmark")


def parse_args(argv=None):
    parser = small_parser("benchmarks.run", __doc__)
    add_common_options(parser, 8)
    add = parser.add_argument
    add("--quick", action="store_true", help="a smoke test: tiny shapes, few tokens")
    add("--evaluate", type=int, default=30_000, help="tokens of the evaluation contenders")
    add("--apply", type=int, default=60_000, help="tokens contexts are extracted from")
    add("--held", type=float, default=65, help="seconds for which a rate is held")
    read_help = "seconds for which evaluation and apply read (default: the whole text)"
    add("--read", type=float, default=math.inf, help=read_help)
    on_cuda, on_cpu = (" ".join(DEFAULT_PARTS[device]) for device in ("cuda", "cpu"))
    parts_help = f"parts (default on CUDA: {on_cuda}; else {on_cpu})"
    add("--only", nargs="+", choices=PARTS, help=parts_help)
    add("--rate_of", nargs="+", choices=SETS, default=list(SETS), help="whose rates are held")
    cfg = parser.parse_args(argv)
    if cfg.quick:
        vars(cfg).update(QUICK)
    return cfg


def main(argv=None):
    cfg = parse_args(argv)
    started = time.perf_counter()
    bench = Bench(cfg)
    for name in cfg.only or DEFAULT_PARTS[cfg.device]:
        PARTS[name](bench)
    bench.results["seconds"] = time.perf_counter() - started
    bench.results["load_after"] = system_load()
    bench.results["floors"] = {model: bench.floor(model) for model in EIGHT}
    bench.results["floors"]["zoo"] = bench.floor(*EIGHT)
    bench.save()
    text = report.markdown(bench.results)
    save_text(text, bench.folder / "benchmark.md")
    print(text)
    report.picture(json.loads(json.dumps(bench.results)), bench.folder / "benchmark.png")
    return bench.results


if __name__ == "__main__":
    main()
