"""Every option once: its type, default and help; which stage shows it; the order of precedence; how a stage ends.

Precedence: typed > --config file > saved recipe of a checkpoint > recipe of the model > declared default. Torch-free, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src import config_file, zoo
from src.files import DEMO_LM, printable, redacted


def assignment(text: str) -> tuple[int, float]:
    """LATENT=VALUE."""
    latent, _, value = text.partition("=")
    try:
        return int(latent), float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not LATENT=VALUE, as in 12=5.0") from error


def boolean(text: str) -> bool:
    """0/1, true/false, yes/no."""
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or 1")
    return known[text.lower()]


def placement(text: str) -> Any:
    """auto, cpu, cuda:1 ... as it is; JSON as what it says: {"": 0}."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error


def interval(text: str) -> tuple[float, str]:
    """500 -> (500.0, "steps"); 90s, 10m, 2h -> (seconds, "s")."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "")
    try:
        value = float(number) if unit else int(number)
        if not 0 <= value < float("inf"):
            raise ValueError
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither steps (500) nor a time (90s, 10m, 2h)"
        ) from error
    return (value * {"s": 1, "m": 60, "h": 3600}[unit], "s") if unit else (value, "steps")


class Option(NamedTuple):
    """One row of the table. `low` is the smallest accepted value, `above` a value it must exceed; `many` takes several values."""

    group: str
    type: Callable[[str], Any]
    default: Any
    help: str
    choices: Sequence[str] | None = None
    low: float | None = None
    above: float | None = None
    many: bool = False
    count: int | None = None


METRICS = (
    "NormMSE",
    "KLDiv",
    "FVU",
    "L0",
    "Dead",
    "Density",
    "DeltaCE",
    "Recovered",
    "Shrinkage",
    "Routing",
    "all",
)
OPTIONS: dict[str, Option] = {
    # where things are, what they run on
    "model_path": Option(
        "lm",
        str,
        None,
        "language model: folder or hub name ($MODEL_PATH, else the built-in demo LM)",
    ),
    "data_path": Option(
        "text interpretation",
        str,
        None,
        "text: file, folder, glob, hub name ($DATA_PATH, else demo text); interpret.py: contexts",
    ),
    "output_dir": Option("common", str, "outputs", "folder all results go to ($OUTPUT_DIR)"),
    "device": Option("lm", str, "auto", "auto (CUDA where there is one), cpu, cuda:0 ..."),
    "device_map": Option(
        "lm",
        placement,
        None,
        'spread a large language model: auto, a device, or JSON {"module": device} (needs accelerate)',
    ),
    "dtype": Option(
        "lm",
        str,
        "auto",
        "number format of the language model; SAEs are float32",
        ("auto", "float32", "bfloat16", "float16"),
    ),
    "seed": Option("common", int, 42, "seed of initialisation, order and random draws", low=0),
    "trust_remote_code": Option(
        "lm", boolean, False, "run code that comes with the language model"
    ),
    "config": Option(
        "common",
        str,
        None,
        "file of options: YAML, JSON, or the .json recipe beside trained weights; what is typed wins",
    ),
    "debug": Option("common", boolean, False, "show the whole traceback of an error"),
    # text
    "batch_size": Option("text", int, None, "rows a step (default: 64; demo LM: 16)", low=1),
    "max_length": Option("text", int, None, "tokens a row (default: 512; demo LM: 256)", low=2),
    "max_samples": Option("text", int, None, "rows to use at most (default: all)", low=1),
    "max_tokens": Option("text", int, None, "tokens of text to use at most (default: all)", low=1),
    "split": Option(
        "text",
        str,
        None,
        "split to read (default: each stage its own)",
        ("train", "eval", "apply", "all"),
    ),
    "text_key": Option("text", str, "text", "key of the text in each record"),
    "chunking": Option(
        "text",
        str,
        "pack",
        "pack: rows are full; words: the documented pieces of max_length words",
        ("pack", "words"),
    ),
    "max_bad_frac": Option("text", float, 0.01, "share of damaged lines that is accepted", low=0),
    "include_special": Option(
        "text", boolean, False, "count special tokens and position 0 too (for comparison only)"
    ),
    # the SAE
    "hidden_size": Option(
        "sae", int, None, "check: width of the language model (default: read from it)", low=1
    ),
    "n_layers": Option(
        "sae export", int, None, "check: number of its blocks (default: read from it)", low=1
    ),
    "latent_size": Option("sae", int, None, "latents (default: 16384; demo LM: 2048)", low=1),
    "k": Option(
        "sae export",
        int,
        None,
        "active latents a token; several values train one SAE each (default: 64; demo LM: 16)",
        low=1,
        many=True,
    ),
    "layer": Option(
        "sae export",
        int,
        None,
        "site of single-layer models; several train one SAE each (default: 3/4 of the depth)",
        low=1,
        many=True,
    ),
    "start_layer": Option(
        "sae", int, None, "first routed site (default: a quarter of the depth)", low=1
    ),
    "end_layer": Option(
        "sae",
        int,
        None,
        "site after the last routed one (default: three quarters of the depth, plus 1)",
        low=2,
    ),
    "l1_coeff": Option(
        "sae",
        float,
        None,
        "L1 (JumpReLU: L0) coefficient; several values train one SAE each (default: auto)",
        low=0,
        many=True,
    ),
    "threshold": Option(
        "sae",
        float,
        None,
        "initial JumpReLU threshold (default: auto, scaled to the width)",
        above=0,
    ),
    "bandwidth": Option(
        "sae", float, None, "width of JumpReLU's gradient window (default: auto)", above=0
    ),
    "target_l0": Option(
        "sae",
        float,
        None,
        "steer sparsity to this many active latents; several: an SAE each (default: off)",
        above=0,
        many=True,
    ),
    "sparsity_warmup": Option(
        "sae", float, None, "share of the run over which the coefficient rises from 0", low=0
    ),
    "aggre": Option("sae", str, None, "how the router joins the sites' states", ("sum", "mean")),
    "routing": Option(
        "sae",
        str,
        None,
        "one site a token, a mixture, a random one, shuffled, or the best",
        ("hard", "soft", "random", "permuted", "oracle"),
    ),
    "route_shares": Option(
        "sae",
        float,
        None,
        "share of each routed site: random routing (default: uniform), frozen router",
        low=0,
        many=True,
    ),
    "router_objective": Option(
        "sae",
        str,
        None,
        "where the router's gradient comes from (docs/routing.md)",
        ("published", "expected", "advantage", "ste", "frozen"),
    ),
    "router_balance": Option(
        "sae", str, None, "what keeps the sites' load even", ("none", "switch", "bias")
    ),
    "router_balance_coef": Option(
        "sae", float, None, "its weight, or the bias's step (default: .02, .001)", low=0
    ),
    "route_scale": Option(
        "sae",
        str,
        None,
        "what multiplies the chosen state (default: p for published, else one)",
        ("p", "one", "ste"),
    ),
    "auxk_coeff": Option(
        "sae", float, None, "weight of the auxiliary loss that revives dead latents", low=0
    ),
    "dead_tokens": Option(
        "sae",
        int,
        None,
        "tokens without activation after which a latent is dead (default: auto)",
        low=1,
    ),
    "topk_relu": Option("sae", boolean, None, "clip negative values among the k"),
    "b_pre_init": Option("sae", str, None, "initial pre_bias", ("geom_median", "mean", "zero")),
    "norm_eps": Option(
        "sae export",
        float,
        1e-5,
        "added to the standard deviation when inputs are standardised",
        above=0,
    ),
    # training
    "model": Option(
        "training",
        str,
        "TopK",
        f"SAEs to train on the same batches: {', '.join(zoo.ZOO)}",
        many=True,
    ),
    "recipe": Option(
        "training",
        str,
        "standard",
        "the right form of each model, or the documented one",
        ("standard", "published"),
    ),
    "optimizer": Option(
        "training",
        str,
        None,
        "signum: schedule-free sign of gradient; adam (default: by recipe)",
        ("signum", "adam"),
    ),
    "lr": Option(
        "training",
        float,
        None,
        "learning rate (default: signum 5e-3/sqrt(latents/16384), for some models 0.3 of it; adam 5e-4)",
        above=0,
    ),
    "betas": Option("training", float, [0.9, 0.999], "betas of adam", low=0, count=2),
    "grad_clip": Option(
        "training", float, None, "largest gradient norm; 0: off (default: by recipe)", low=0
    ),
    "num_epochs": Option("training", int, 1, "passes over the text", low=1),
    "steps": Option(
        "training",
        int,
        None,
        "decoder columns go back to unit norm every so many steps (default: by recipe)",
        low=1,
    ),
    "tag": Option("training", str, None, "added to the names of the results"),
    "overwrite": Option("training export", boolean, False, "replace results of the same name"),
    "save_every": Option(
        "training",
        interval,
        (600.0, "s"),
        "save the unfinished run: steps (500) or time (90s, 10m); 0: on signals (default: 10m)",
    ),
    "resume": Option(
        "training",
        str,
        "auto",
        "auto: continue an unfinished run; never: start again (with --overwrite)",
        ("auto", "never"),
    ),
    "deterministic": Option(
        "training", boolean, False, "on CUDA: only algorithms that repeat bit for bit (slower)"
    ),
    "compile_lm": Option(
        "training evaluation application",
        str,
        "auto",
        "compile the language model's blocks: auto (CUDA, not short runs), yes, no",
        ("auto", "yes", "no"),
    ),
    "max_memory_hint": Option(
        "training",
        float,
        None,
        "GB a run may need by estimate, more is refused (default: warn above what is free)",
        above=0,
    ),
    "use_wandb": Option("training", boolean, False, "log to Weights & Biases too"),
    "wandb_project": Option("training", str, "RouteSAE-repro", "project name there"),
    # trained SAEs
    "SAE_path": Option(
        "inference export",
        str,
        None,
        "checkpoints, folders or hub names (default: the newest)",
        many=True,
    ),
    "format": Option(
        "export",
        str,
        "hf",
        "hf: a Hugging Face folder with its card; saelens: one SAELens folder per site",
        ("hf", "saelens"),
    ),
    "infer_k": Option(
        "inference", int, None, "keep this many latents a token instead of the trained rule", low=1
    ),
    "theta": Option("inference", float, None, "keep latents above this value instead"),
    "metric": Option(
        "evaluation", str, ["NormMSE"], f"what to measure: {', '.join(METRICS)}", METRICS, many=True
    ),
    "route_patch": Option(
        "evaluation",
        str,
        None,
        "scaled: as trained; unscaled: the published form",
        ("scaled", "unscaled"),
    ),
    "act_threshold": Option(
        "application",
        float,
        None,
        "strength a latent must exceed (default: 0.22 sqrt(hidden), 10 at 2048)",
        low=0,
    ),
    "threshold_rel": Option("application", float, None, "the same in units of sqrt(hidden)", low=0),
    "quantile": Option(
        "application",
        float,
        None,
        "instead: above this quantile of each latent's own activations, estimated from a sample",
        low=0,
    ),
    "context_length": Option(
        "application", int, 64, "tokens shown on each side of the active one", low=1
    ),
    "max_per_token": Option(
        "application",
        int,
        2,
        "contexts of one latent at most for one token class (stripped, lower-cased text)",
        low=1,
    ),
    "lines": Option("application", int, 4, "contexts a latent needs to be kept", low=1),
    "top_n": Option("application", int, 20, "strongest contexts kept of each latent", low=1),
    "effect": Option(
        "application",
        int,
        0,
        "measure for this many latents what removing them does to the next-token distribution",
        low=0,
    ),
    "sample_latents": Option(
        "interpretation", int, 100, "features to label, drawn at random; 0: all", low=0
    ),
    "engine": Option(
        "interpretation",
        str,
        "gpt-4o-mini",
        "model at the endpoint; `heuristic` labels by rule, without any endpoint",
    ),
    "api_base": Option(
        "interpretation", str, None, "address of an OpenAI-compatible endpoint (default: OpenAI's)"
    ),
    "api_type": Option(
        "interpretation", str, "auto", "form of the endpoint", ("auto", "openai", "azure")
    ),
    "api_version": Option("interpretation", str, None, "Azure's API version"),
    "api_key": Option(
        "interpretation",
        str,
        None,
        "key; visible to others on this machine (prefer $OPENAI_API_KEY)",
    ),
    "api_key_file": Option("interpretation", str, None, "file that holds the key"),
    "concurrency": Option("interpretation", int, 8, "requests at one time", low=1),
    "requests_per_minute": Option(
        "interpretation", float, None, "send no more than this (default: no limit)", above=0
    ),
    "timeout": Option("interpretation", float, 60.0, "seconds to wait for one answer", above=0),
    "budget_usd": Option("interpretation", float, None, "stop once this much is spent", above=0),
    "budget_tokens": Option(
        "interpretation", int, None, "stop once this many tokens are used", low=1
    ),
    "dry_run": Option(
        "interpretation", boolean, False, "write the prompts and their size, send nothing"
    ),
    "score": Option(
        "interpretation",
        str,
        None,
        "test each label on contexts it was not made from",
        ("detection", "fuzzing"),
        many=True,
    ),
    "set": Option(
        "steering", assignment, None, "latents held at a strength, LATENT=VALUE ...", many=True
    ),
    "add": Option("steering", assignment, None, "latents raised by a strength", many=True),
    "multiply": Option("steering", assignment, None, "latents multiplied", many=True),
    "zero": Option("steering", int, None, "latents switched off", low=0, many=True),
    "prompt": Option("steering", str, None, "texts to continue", many=True),
    "prompts": Option(
        "steering", str, None, "file of them: .txt (one a line) or conversations (.json, .jsonl)"
    ),
    "max_new_tokens": Option("steering", int, 40, "tokens to write", low=1),
    "temperature": Option(
        "steering",
        float,
        0.0,
        "0: the likeliest token; above: drawn, seeded alike with and without the edit",
        low=0,
    ),
    "mode": Option(
        "steering",
        str,
        "delta",
        "add the change alone, or replace the state by the edited code",
        ("delta", "replace"),
    ),
    "site": Option(
        "steering",
        int,
        None,
        "where an SAE of several sites is edited (default: where the latent is strongest)",
        low=1,
    ),
    "gzip": Option("application", boolean, False, "compress the contexts file"),
}
STAGES: dict[str, tuple[str, ...]] = {
    "train": ("training", "sae", "text", "lm", "common"),
    "evaluate": ("evaluation", "inference", "text", "sae", "lm", "common"),
    "apply": ("application", "inference", "text", "sae", "lm", "common"),
    "interpret": ("interpretation", "common"),
    "steer": ("steering", "inference", "lm", "common"),
    "export": ("export", "common"),
}
ABOUT = {
    "train": "Train sparse autoencoders on a language model's residual stream.",
    "evaluate": "Measure trained sparse autoencoders.",
    "apply": "Find the contexts in which each latent of a trained sparse autoencoder is active.",
    "interpret": "Label latents from their contexts, and test the labels.",
    "export": "Write trained sparse autoencoders in the formats of other libraries.",
    "steer": "Continue texts with latents set, added to, multiplied or switched off.",
}
SHARED_OUT = (
    "train",
    "evaluate",
    "apply",
)  # stages that several processes may share out (src/distributed.py)
ENVIRONMENT = {"model_path": "MODEL_PATH", "data_path": "DATA_PATH", "output_dir": "OUTPUT_DIR"}
SWEPT = ("k", "l1_coeff", "target_l0", "layer")
# What a recipe sets beside the constructor values in the zoo.
RECIPES: dict[str, dict[str, Any]] = {
    "standard": {"optimizer": "signum", "grad_clip": 1.0, "steps": 1},
    "published": {"optimizer": "adam", "grad_clip": 0.0, "steps": 100, "include_special": True},
}
# Options that change nothing about the weights.
NEUTRAL = frozenset(
    "output_dir config debug tag overwrite save_every resume max_memory_hint use_wandb wandb_project device device_map trust_remote_code "
    "typed from_file stage".split()
)
SECRET = frozenset({"api_key", "api_key_file"})


class _Parser(argparse.ArgumentParser):
    reading = ""  # the file whose options are being parsed

    def error(self, message: str) -> None:
        self.exit(
            2,
            f"{self.prog}: error: {self.reading}{message}; see --help\n"
            if os.environ.get("RANK", "0") == "0"
            else None,
        )


def parser(stage: str) -> _Parser:
    """The command line of one stage. Absent options stay absent, so that what was typed is known."""
    order = "What is typed wins over the --config file, that over the recipe of a checkpoint, that over the defaults here."
    usage = "%(prog)s [options]" + (" [contexts]" if stage == "interpret" else "")
    made = _Parser(
        f"{stage}.py",
        usage,
        ABOUT[stage],
        order,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for group in STAGES[stage]:
        section = made.add_argument_group(group)
        for name, row in OPTIONS.items():
            if group not in row.group.split():
                continue
            default = (
                " ".join(map(str, row.default)) if isinstance(row.default, list) else row.default
            )
            shown = (
                f" (default: {default})"
                if row.default is not None and "$" not in row.help and "default" not in row.help
                else ""
            )
            extra: dict[str, Any] = {
                "type": row.type,
                "help": (row.help + shown).replace("%", "%%"),
            }
            if row.type is boolean:
                extra |= {"nargs": "?", "const": True, "metavar": "0|1"}
            elif row.many or row.count:
                extra["nargs"] = row.count or "+"
            if row.choices:
                extra["choices"] = row.choices
            elif row.type is not boolean:
                extra["metavar"] = (
                    "LATENT=VALUE" if row.type is assignment else row.type.__name__.upper()
                )
            section.add_argument(f"--{name}", **extra)
    if stage == "interpret":
        made.add_argument(
            "contexts", nargs="?", default=None, help="contexts file (default: the newest)"
        )
    return made


def parse(stage: str, argv: Sequence[str] | None = None) -> Namespace:
    """Options of a stage, checked as far as that goes without a language model. `typed` names those the user gave.

    A bad value ends the program with one line and exit code 2, as argparse does.
    """
    made = parser(stage)
    given = vars(made.parse_args(argv))
    cfg = Namespace(
        **{
            name: row.default
            for name, row in OPTIONS.items()
            if set(row.group.split()) & set(STAGES[stage])
        }
    )
    for name, variable in ENVIRONMENT.items():
        if hasattr(cfg, name):
            setattr(cfg, name, os.environ.get(variable) or getattr(cfg, name))
    try:
        from_file = _from_file(given["config"], stage, made) if given.get("config") else {}
        vars(cfg).update(from_file | given)
        cfg.typed, cfg.from_file, cfg.stage = (
            set(given) | set(from_file),
            set(from_file) - set(given),
            stage,
        )
        check(cfg)
    except ValueError as error:
        made.error(str(error))
    return cfg


def _from_file(path: str, stage: str, made: _Parser) -> dict[str, Any]:
    """What a --config file says for this stage, parsed as if it were typed; options of other stages are passed over."""
    options, said = config_file.read(path, stage, OPTIONS)
    if said:
        print(said)
    mine = {
        name for name, row in OPTIONS.items() if set(row.group.split()) & set(STAGES[stage])
    } - {"config"}
    mine -= (
        {"data_path"} if stage == "interpret" else set()
    )  # there it means contexts, in a file for all stages text
    made.reading = f"--config {path}: "
    parsed = vars(
        made.parse_args(
            config_file.words({name: value for name, value in options.items() if name in mine})
        )
    )
    made.reading = ""
    return {name: value for name, value in parsed.items() if name in mine}


def parse_args() -> Namespace:
    """Options of the training stage from the command line: the documented name."""
    return parse("train")


def check(cfg: Namespace) -> None:
    """Raises ValueError for a value out of range, an unknown model or options that exclude each other; mends lists."""
    for name, row in OPTIONS.items():
        value = getattr(cfg, name, None)
        if row.many and value is not None and not isinstance(value, list | tuple):
            value = [value]
            setattr(cfg, name, value)
        if value is None or row.type not in (int, float):
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            if one != one or abs(one) == float("inf"):
                raise ValueError(f"--{name} {one}: not a finite number")
            if row.low is not None and one < row.low:
                raise ValueError(f"--{name} {one}: must be at least {row.low}")
            if row.above is not None and one <= row.above:
                raise ValueError(f"--{name} {one}: must be above {row.above}")
    if getattr(cfg, "betas", None) and max(cfg.betas) >= 1:
        raise ValueError(f"--betas {' '.join(map(str, cfg.betas))}: each must be below 1")
    if getattr(cfg, "model", None):
        cfg.model = list(dict.fromkeys(zoo.canonical(name) for name in cfg.model))
    if getattr(cfg, "infer_k", None) is not None and getattr(cfg, "theta", None) is not None:
        raise ValueError("--infer_k and --theta exclude each other; give one")
    thresholds = [
        name
        for name in ("act_threshold", "threshold_rel", "quantile")
        if getattr(cfg, name, None) is not None
    ]
    if len(thresholds) > 1:
        raise ValueError(f"--{' and --'.join(thresholds)} exclude each other; give one")
    objective, routing = getattr(cfg, "router_objective", None), getattr(cfg, "routing", None)
    if (
        cfg.stage == "train"
        and objective not in (None, "published")
        and routing not in (None, "hard", "permuted")
    ):
        raise ValueError(
            f"--router_objective {objective} chooses one site a token; it needs --routing hard, not {routing}"
        )
    if (getattr(cfg, "quantile", None) or 0) >= 1:
        raise ValueError(f"--quantile {cfg.quantile}: must be below 1")


def complete(cfg: Namespace) -> Namespace:
    """Fills what depends on the language model's size or the recipe and was not typed. Raises ValueError where k > latent_size."""
    demo = bool(cfg.model_path) and Path(cfg.model_path).resolve() == DEMO_LM
    sizes = {
        "batch_size": (64, 16),
        "max_length": (512, 256),
        "latent_size": (16384, 2048),
        "k": ([64], [16]),
    }
    for name, (real, small) in sizes.items():
        if getattr(cfg, name, 0) is None:
            setattr(cfg, name, small if demo else real)
    for name, value in RECIPES[getattr(cfg, "recipe", "standard")].items():
        if name not in cfg.typed and hasattr(cfg, name):
            setattr(cfg, name, value)
    if getattr(cfg, "split", 0) is None:
        cfg.split = {"train": "train", "evaluate": "eval", "apply": "apply"}[cfg.stage]
    if cfg.stage == "train":
        if max(cfg.k) > cfg.latent_size:
            raise ValueError(f"--k {max(cfg.k)} is more than --latent_size {cfg.latent_size}")
    return cfg


def model_options(cfg: Namespace, name: str) -> dict[str, Any]:
    """Constructor options of one model of the zoo: typed > recipe of the model > default. Swept options keep their lists."""
    entry = zoo.ZOO[name]
    recipe = dict(
        entry.published if getattr(cfg, "recipe", "standard") == "published" else entry.standard
    )
    common = ("latent_size", "norm_eps", "seed", "start_layer", "end_layer")
    shared = {key: getattr(cfg, key) for key in common if getattr(cfg, key, None) is not None}
    own = {key: getattr(cfg, key) for key in entry.options if getattr(cfg, key, None) is not None}
    return (
        shared
        | {k: v for k, v in own.items() if k not in cfg.typed}
        | recipe
        | {k: v for k, v in own.items() if k in cfg.typed}
    )


def learning_rate(cfg: Namespace, name: str) -> float:
    """The typed one, else the default of the optimiser: for signum one that falls with the dictionary's size, in the model's own units."""
    if cfg.lr is not None:
        return cfg.lr
    return (
        zoo.ZOO[name].lr * 5e-3 / (cfg.latent_size / 16384) ** 0.5
        if cfg.optimizer == "signum"
        else 5e-4
    )


def unused(cfg: Namespace) -> list[str]:
    """One line for each typed option that none of the chosen models uses. Files may hold options for all models."""
    lines = []
    for name in sorted(cfg.typed - cfg.from_file):
        owners = [model for model, entry in zoo.ZOO.items() if name in entry.options]
        if owners and len(owners) < len(zoo.ZOO) and not set(owners) & set(cfg.model):
            lines.append(
                f"--{name} does nothing for {', '.join(cfg.model)}; it belongs to {', '.join(owners)}"
            )
    return lines


def fill_from_recipe(cfg: Namespace, recipe: Mapping[str, Any]) -> Namespace:
    """Takes over what a checkpoint's recipe says about model, text and language model, for whatever was not typed.

    Neither the split nor sizes of the training run (rows, tokens, device) are taken over.
    """
    own = NEUTRAL | config_file.NOT_INHERITED
    saved = dict(recipe.get("options", {})) | {
        key: recipe[key] for key in ("model_path", "data_path") if recipe.get(key)
    }
    for name, value in saved.items():
        if (
            name in own
            or name in cfg.typed
            or name not in OPTIONS
            or value is None
            or not hasattr(cfg, name)
        ):
            continue
        if name in ENVIRONMENT and os.environ.get(ENVIRONMENT[name]):
            continue
        kind = {float: (int, float), boolean: (bool, int)}.get(
            OPTIONS[name].type, OPTIONS[name].type
        )
        many = OPTIONS[name].many or OPTIONS[name].count
        if isinstance(kind, type | tuple) and not all(
            isinstance(one, kind)
            for one in (value if many and isinstance(value, list) else [value])
        ):
            raise ValueError(f"the checkpoint's recipe says {name} {value!r}; give --{name}")
        setattr(cfg, name, [value] if OPTIONS[name].many and not isinstance(value, list) else value)
    check(cfg)
    return cfg


def run_stage(
    stage: str, function: Callable[[Namespace], Any], argv: Sequence[str] | None = None
) -> int:
    """Parses, calls function(cfg), and turns what went wrong into one line and an exit code.

    The line may quote files, servers and language models: secrets and what a terminal would obey are taken out.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal that lacks a letter ends no run
    cfg = parse(stage, argv)
    speaks, leave = (lambda: True), (lambda: None)
    try:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            if stage not in SHARED_OUT:
                raise ValueError(
                    f"one of {os.environ['WORLD_SIZE']} processes; this stage takes one, run it without torchrun"
                )
            if os.environ.get("RANK", "0") != "0":
                os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which torch does
            from src import distributed

            speaks, leave = distributed.first_to_end, distributed.stop
            cfg.device = distributed.start(cfg.device)
        function(cfg)
        leave()
        return 0
    except KeyboardInterrupt as stop:
        if speaks():
            print(f"{stage}.py: interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except (ValueError, OSError, RuntimeError) as error:
        if (
            type(error).__name__ == "OutOfMemoryError"
        ):  # PyTorch's, which is not imported for a word of help
            error = ValueError(f"{error}; lower --batch_size, or --max_length")
        elif isinstance(error, RuntimeError):
            raise
        if cfg.debug:
            print(
                printable(redacted(traceback.format_exc(), getattr(cfg, "api_key", None))),
                file=sys.stderr,
            )
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = redacted(" ".join(lines) or type(error).__name__, getattr(cfg, "api_key", None))
        if speaks():
            print(f"{stage}.py: error: {printable(said)}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 2)
