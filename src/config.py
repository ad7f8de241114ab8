"""Every option of the stages, stated once; their command lines; how a stage ends.

Precedence of values: typed > --config file > recipe saved with a checkpoint > recipe of the model
> default in the table. This module does not import torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from src import config_file, metric_table, stage_help, zoo
from src.files import (
    CLAMP_DIR,
    CONTEXT_DIR,
    DEMO_LM,
    DISK_ERRORS,
    EVAL_DIR,
    EXPORT_DIR,
    INTERPRET_DIR,
    SAE_DIR,
    error_text,
    first_line,
    one_line,
    parse_json,
    printable,
    printable_output,
    probe,
    redacted,
)

LARGEST_INTEGER = 2**63 - 1
LONGEST_METAVAR = 50  # characters; more choices are listed in the help text alone
LARGEST_FLOAT = 3.4e38  # of float32
MOST_KEPT = 1_000_000  # contexts of a latent, or tokens of a context
LOWEST_TEMPERATURE = 1e-4  # a smaller one takes logits beyond float32

# ------------------------------------------------------------------------------ types of options


SCALES = {"k": 10**3, "m": 10**6, "b": 10**9}


def whole_number(text: str) -> int:
    """A whole number; 100k, 1M and 1.5B are understood."""
    scale = SCALES.get(text[-1:].lower())
    try:
        if scale is None:
            return int(text)
        # 1.1 million is 1100000.0000000002 before it is rounded.
        value = round(float(text[:-1]) * scale, 3)
        if not value.is_integer():
            raise ValueError
        return int(value)
    except ValueError as error:
        message = f"invalid int value: {text!r}; write a whole number, such as 250, 100k or 1M"
        raise argparse.ArgumentTypeError(message) from error


class TimesMaximum(float):
    """A strength in units of the largest one that a latent had in the text of apply.py."""


def assignment(text: str) -> tuple[int, float]:
    """LATENT=VALUE, as in 12=5.0; 12=1.5x is one and a half times the latent's maximum."""
    latent, _, value = text.partition("=")
    kind = TimesMaximum if value[-1:] == "x" else float
    try:
        number = kind(value.removesuffix("x"))
        if abs(number) > LARGEST_FLOAT:
            raise ValueError("not a float32")
        return int(latent), number
    except ValueError as error:
        message = f"{text!r} is not LATENT=VALUE, as in 12=5.0 or 12=1.5x"
        raise argparse.ArgumentTypeError(message) from error


def one_of(choices: str) -> Callable[[str], str]:
    """The type of an option with choices, which may be typed in upper or lower case."""
    known = {name.lower(): name for name in choices.split()}

    def choice(text: str) -> str:
        if text.lower() in known:
            return known[text.lower()]
        near = stage_help.did_you_mean(text, known.values())
        listed = ", ".join(known.values())
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (known: {listed}){near}")

    return choice


def boolean(text: str) -> bool:
    """0/1, true/false, yes/no."""
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or 1")
    return values[text.lower()]


def placement(text: str) -> Any:
    """A mapping for JSON such as {"": 0}; other text, such as auto or cuda:1, stays as it is."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        places = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not all(isinstance(device, str | int) for device in places.values()):
        raise argparse.ArgumentTypeError(f'{text!r} is not {{"module": device}}')
    return places


def interval(text: str) -> tuple[float, str]:
    """500 -> (500, "steps"); 90s, 10m, 2h -> (seconds, "s")."""
    seconds = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        value = float(text[:-1]) * seconds if seconds else int(text)
        if not 0 <= value < float("inf"):
            raise ValueError
    except ValueError as error:
        message = f"{text!r} is neither steps (500) nor a time (90s, 10m, 2h)"
        raise argparse.ArgumentTypeError(message) from error
    return value, "s" if seconds else "steps"


class Option(NamedTuple):
    """One row of the table.

    group: sections of the command line, see STAGES. low: smallest value. above: a value that it
    must exceed. high: largest value. many: takes one value or more, kept as a list.
    count: takes exactly so many.
    choices: accepted values, separated by spaces.
    """

    group: str
    type: Callable[[str], Any]
    default: Any
    help: str
    choices: str = ""
    low: float | None = None
    above: float | None = None
    many: bool = False
    count: int | None = None
    high: float | None = None


# ------------------------------------------------------------------------------------- the table
OPTIONS: dict[str, Option] = {
    # language model, text and results
    "model_path": Option(
        "lm",
        str,
        None,
        "Language model: a folder or a hub name. Default: $MODEL_PATH, else the built-in demo LM.",
    ),
    "data_path": Option(
        "text interpretation",
        str,
        None,
        "Text: a file, folder, glob or hub name. Default: $DATA_PATH, else the demo's text. "
        "For interpret.py: the contexts file.",
    ),
    "output_dir": Option(
        "common", str, "outputs", "Folder for all results. Default: $OUTPUT_DIR, else outputs."
    ),
    "device": Option(
        "lm", str, "auto", "Device: cpu, cuda:0 and so on; auto takes CUDA where it is available."
    ),
    "device_map": Option(
        "lm",
        placement,
        None,
        'Spread a large language model over devices: auto, a device, or JSON {"module": '
        "device}. Needs the package accelerate. Default: one device.",
    ),
    "dtype": Option(
        "lm",
        str,
        "auto",
        "Number format of the language model. SAEs are always float32.",
        choices="auto float32 bfloat16 float16",
    ),
    "seed": Option(
        "common",
        int,
        42,
        "Seed of the initialisation, of the order of the text and of random draws.",
        low=0,
    ),
    "trust_remote_code": Option(
        "lm", boolean, False, "Run code that comes with the language model."
    ),
    "config": Option(
        "common",
        str,
        None,
        "File with options: YAML, JSON, or the .json recipe beside trained weights. Typed "
        "options win over it.",
    ),
    "debug": Option("common", boolean, False, "Show the whole traceback of an error."),
    # text
    "batch_size": Option(
        "text", int, None, "Rows per step. Default: 64; with the demo LM 16.", low=1
    ),
    "max_length": Option(
        "text", int, None, "Tokens per row. Default: 512; with the demo LM 256.", low=2
    ),
    "max_samples": Option("text", int, None, "Use at most this many rows. Default: all.", low=1),
    "max_tokens": Option(
        "text", int, None, "Use at most this many tokens of the text. Default: all.", low=1
    ),
    "split": Option(
        "text",
        str,
        None,
        "Split of the text to read. An evaluation of another one than eval has it in its name. "
        "Default: train for train.py, eval for evaluate.py, apply for apply.py.",
        choices="train eval apply all",
    ),
    "text_key": Option("text", str, "text", "Key of the text in each record."),
    "chunking": Option(
        "text",
        str,
        "pack",
        "How documents become rows. 'pack' fills every row; 'words' makes pieces of max_length "
        "words, as the published code does.",
        choices="pack words",
    ),
    "max_bad_frac": Option(
        "text", float, 0.01, "Accept at most this share of damaged lines.", low=0
    ),
    "include_special": Option(
        "text",
        boolean,
        False,
        "Also count special tokens and position 0. Meant for comparison with published figures.",
    ),
    # the SAE
    "hidden_size": Option(
        "sae",
        int,
        None,
        "Width that the language model is expected to have; another one is an error. "
        "Default: not checked.",
        low=1,
    ),
    "n_layers": Option(
        "sae export unlabelled",
        int,
        None,
        "Number of blocks that the language model is expected to have; another one is an "
        "error. Default: not checked.",
        low=1,
    ),
    "latent_size": Option(
        "sae", int, None, "Number of latents. Default: 16384; with the demo LM 2048.", low=1
    ),
    "k": Option(
        "sae export unlabelled",
        int,
        None,
        "Active latents per token. Several values train one SAE each. Default: 64; with the "
        "demo LM 16.",
        low=1,
        many=True,
    ),
    "layer": Option(
        "sae export unlabelled",
        int,
        None,
        "Site of models that read one site; site n is the output of block n, counted from 1. "
        "Several values train one SAE each. Default: three quarters of the depth.",
        low=1,
        many=True,
    ),
    "start_layer": Option(
        "sae unlabelled",
        int,
        None,
        "First of the sites that a routed model reads. Default: a quarter of the depth.",
        low=1,
    ),
    "end_layer": Option(
        "sae unlabelled",
        int,
        None,
        "Site after the last one that a routed model reads. Default: three quarters of the "
        "depth, plus 1.",
        low=2,
    ),
    "sites": Option(
        "sae",
        int,
        None,
        "Sites that a routed model, an MLSAE or a Crosscoder reads, such as 7 11 15 19 23, in "
        "place of a range.",
        low=1,
        many=True,
    ),
    "l1_coeff": Option(
        "sae",
        float,
        None,
        "Coefficient of the L1 penalty, for JumpReLU of the L0 penalty. Several values "
        "train one SAE each. Default: 0.1/sqrt(hidden size); JumpReLU 0.001.",
        low=0,
        many=True,
    ),
    "l1_saturation": Option(
        "sae",
        float,
        None,
        "A strength counts in L1 at most this share of a token's norm, by tanh; 0: plain L1. "
        "Default: 0.05 for Vanilla and Crosscoder, 0 for Gated and with --recipe published.",
        low=0,
    ),
    "threshold": Option(
        "sae",
        float,
        None,
        "Initial threshold of JumpReLU. Default: 0.5 sqrt(l1_coeff hidden_size).",
        above=0,
    ),
    "bandwidth": Option(
        "sae",
        float,
        None,
        "Width of the window in which JumpReLU's threshold gets a gradient. Default: "
        "0.05 sqrt(hidden size / 128).",
        above=0,
    ),
    "target_l0": Option(
        "sae",
        float,
        None,
        "Adjust the sparsity coefficient until this many latents are active per token. "
        "Several values train one SAE each. Default: off.",
        above=0,
        many=True,
    ),
    "start_l0": Option(
        "sae",
        float,
        None,
        "With --target_l0: latents that are active at the start, in units of that target; 0: no "
        "bias at the start. Default: 4; 0 with --recipe published.",
        low=0,
    ),
    "sparsity_warmup": Option(
        "sae",
        float,
        None,
        "Share of the run over which the sparsity coefficient rises from 0. Default: 0.05; "
        "0 with --recipe published.",
        low=0,
    ),
    "aggre": Option(
        "sae unlabelled",
        str,
        None,
        "How the router combines the states of the sites. Default: sum.",
        choices="sum mean",
    ),
    "routing": Option(
        "sae evaluation unlabelled",
        str,
        None,
        "Site of a token: the router's choice (hard), a mixture of all (soft), a random "
        "one, the choice of another token (permuted), or the best one (oracle). Default: "
        "hard.",
        choices="hard soft random permuted oracle",
    ),
    "route_shares": Option(
        "sae evaluation",
        float,
        None,
        "Share of tokens per routed site, for --routing random, --assign random and a frozen "
        "router. "
        "Default: uniform.",
        low=0,
        many=True,
    ),
    "router_objective": Option(
        "sae",
        str,
        None,
        "What gives the router its gradient (docs/routing.md): 'published' the reconstruction, "
        "'expected' the error of every site, 'advantage' that error relative to the site's mean, "
        "'ste' a straight-through choice, 'frozen' nothing. Default: expected; published with "
        "--recipe published.",
        choices="published expected advantage ste frozen",
    ),
    "router_balance": Option(
        "sae",
        str,
        None,
        "What keeps the sites' shares of tokens even: 'switch' a loss, 'bias' a bias of each "
        "site's logit. Default: switch; none with --recipe published.",
        choices="none switch bias",
    ),
    "router_balance_coef": Option(
        "sae",
        float,
        None,
        "Weight of the switch loss, or step of the bias. Default: 0.02 for switch, 0.001 for bias.",
        low=0,
    ),
    "route_scale": Option(
        "sae",
        str,
        None,
        "Factor of the chosen state: the router's probability (p), one, or a "
        "straight-through one (ste). Default: p for the published objective, else one.",
        choices="p one ste",
    ),
    "auxk_coeff": Option(
        "sae",
        float,
        None,
        "Weight of the auxiliary loss that revives dead latents. Default: 1/32; 0 with "
        "--recipe published.",
        low=0,
    ),
    "dead_tokens": Option(
        "sae",
        int,
        None,
        "A latent that has not fired for this many tokens is dead. "
        "Default: 3 % of the tokens of the run, at most 10 million.",
        low=1,
    ),
    "hierarchical_k": Option(
        "sae",
        int,
        None,
        "Numbers of latents below k to which the code of a TopK is also cut in training, such as "
        "2 4 8, so that one SAE serves every --infer_k up to k. Default: none.",
        low=1,
        many=True,
    ),
    "matryoshka_widths": Option(
        "sae",
        int,
        None,
        "Numbers of latents whose prefixes of the code Matryoshka trains to reconstruct alone, "
        "such as 64 192 448; the whole dictionary is always added. Default: 1, 3, 7 and 15 of "
        "32 parts of it.",
        low=1,
        many=True,
    ),
    "topk_relu": Option(
        "sae",
        boolean,
        None,
        "Set negative values among the k largest to 0. Default: 0; 1 for BatchTopK and Matryoshka.",
    ),
    "site_bias": Option(
        "sae",
        boolean,
        None,
        "One pre_bias for each site, of models that read states of several sites. Default: 1; "
        "0 with --recipe published.",
    ),
    "freeze": Option(
        "sae",
        str,
        None,
        "Controls that train less (arXiv:2602.14111): keep the weights of the decoder or of the "
        "encoder as they begin, or hold each decoder column within a cosine of 0.8 of its start "
        "(soft_decoder). Several values train one SAE each. Default: nothing.",
        many=True,
        choices="decoder soft_decoder encoder",
    ),
    "b_pre_init": Option(
        "sae",
        str,
        None,
        "Initial value of pre_bias, of a Crosscoder that of its decoder_bias, computed from the "
        "first batch. Default: geom_median; "
        "zero with --recipe published.",
        choices="geom_median mean zero",
    ),
    "norm_eps": Option(
        "sae export unlabelled",
        float,
        1e-5,
        "Added to the standard deviation when inputs are standardised.",
        above=0,
        high=1,
    ),
    "input_norm": Option(
        "sae unlabelled",
        str,
        None,
        "What is done to the state of each token: standardised (token), freed of its mean (mean), "
        "or nothing (none), as sparsify and dictionary_learning need it. Default: token.",
        choices="token mean none",
    ),
    # training
    "model": Option(
        "training",
        str,
        "TopK",
        f"SAEs to train on the same batches: {', '.join(zoo.ZOO)}.",
        many=True,
    ),
    "recipe": Option(
        "training",
        str,
        "standard",
        "standard trains the recommended form of each model, published the form that the "
        "paper documents.",
        choices="standard published",
    ),
    "optimizer": Option(
        "training",
        str,
        None,
        "'signum' makes steps of equal size along the sign of the gradient, without a decay. "
        "Default: signum; adam with --recipe published.",
        choices="signum adam",
    ),
    "average_power": Option(
        "training",
        float,
        3.0,
        "The weights that signum keeps are a mean over the steps, in which step n has the weight "
        "n^average_power; 0: all steps count alike.",
        low=0,
    ),
    "lr": Option(
        "training",
        float,
        None,
        "Learning rate. Default: for signum 1e-2 / sqrt(F * hidden_size / 128), where F is "
        "latent_size / 4096, at least 1/4 and at most 1, for a Crosscoder of n sites 0.9 / sqrt(n) "
        "of it; for adam 5e-4.",
        above=0,
    ),
    "betas": Option("training", float, [0.9, 0.999], "Betas of adam.", low=0, count=2),
    "grad_clip": Option(
        "training",
        float,
        None,
        "Largest norm of the gradient; 0 turns clipping off. Default: 1; 0 with --recipe "
        "published.",
        low=0,
    ),
    "init_from": Option(
        "training",
        str,
        None,
        "Begin with the weights of this trained SAE (checkpoint, folder or hub name) and, where "
        "nothing else is typed, with its model options. Default: begin anew.",
    ),
    "kl_finish": Option(
        "training",
        float,
        0.0,
        "Share of the steps, at the end, that also lower the KL divergence of the patched language "
        "model (docs/choosing_k.md). These steps cost several times as much. Default: 0.",
        low=0,
        high=1,
    ),
    "num_epochs": Option("training", int, 1, "Passes over the text.", low=1),
    "steps": Option(
        "training",
        int,
        None,
        "Set decoder columns to unit norm every so many steps (this is not the length of the "
        "run). Default: 1; 100 with --recipe published.",
        low=1,
    ),
    "tag": Option("training", str, None, "Text added to the names of the results. Default: none."),
    "overwrite": Option("training export", boolean, False, "Replace results of the same name."),
    "save_every": Option(
        "training",
        interval,
        (600.0, "s"),
        "Save the unfinished run every so many steps (500) or so much time (90s, 10m, 2h); "
        "0 saves on signals only. Default: 10m.",
    ),
    "resume": Option(
        "training",
        str,
        "auto",
        "'auto' continues an unfinished run. 'never' with --overwrite starts at step 0.",
        choices="auto never",
    ),
    "deterministic": Option(
        "training",
        boolean,
        False,
        "On CUDA, use only algorithms that repeat bit for bit. They are slower.",
    ),
    "compile_lm": Option(
        "training evaluation application",
        str,
        "auto",
        "Compile the blocks of the language model, and on CUDA the element-wise work of SAEs in "
        "training. auto does so on CUDA, except in short runs.",
        choices="auto yes no",
    ),
    "max_memory_hint": Option(
        "training",
        float,
        None,
        "Refuse a run whose estimated memory is above this many GB. Default: warn above the "
        "free memory.",
        above=0,
    ),
    "use_wandb": Option("training", boolean, False, "Log to Weights & Biases too."),
    "wandb_project": Option("training", str, "RouteSAE-repro", "Project at Weights & Biases."),
    # trained SAEs
    "SAE_path": Option(
        "inference export",
        str,
        None,
        "Trained SAEs: checkpoints, folders or hub names. Default: the newest in the output "
        "folder.",
        many=True,
    ),
    "format": Option(
        "export",
        str,
        "hf",
        "hf writes a Hugging Face folder with a model card. saelens, sparsify and "
        "dictionary_learning write one folder per site for these libraries. neuronpedia writes "
        "what it takes as upload, from the contexts and labels of the output folder.",
        choices="hf saelens sparsify dictionary_learning neuronpedia",
    ),
    "license": Option(
        "export",
        str,
        None,
        "Licence in the model card, as the hub spells it (mit, apache-2.0). Default: a line to "
        "fill in.",
    ),
    "infer_k": Option(
        "inference",
        int,
        None,
        "Keep this many latents per token, instead of the trained rule. Default: the trained rule.",
        low=1,
    ),
    "theta": Option(
        "inference",
        float,
        None,
        "Keep latents above this value, instead of the trained rule. Default: the trained rule.",
    ),
    "metric": Option(
        "evaluation",
        str,
        ["NormMSE"],
        f"What to measure: {', '.join(metric_table.NAMES)}, or all of them but Probing, which "
        "needs scikit-learn.",
        choices=" ".join([*metric_table.NAMES, "all"]),
        many=True,
    ),
    "union": Option(
        "evaluation",
        str,
        None,
        "Trained SAEs of one site each, at different sites, measured as one of which each token "
        "uses the SAE of one site. Default: none.",
        many=True,
    ),
    "assign": Option(
        "evaluation",
        str,
        None,
        "Site of a token of --union: the one with the least error (oracle), a random one, or "
        "that which the router of a trained SAE chooses; name its checkpoint. Several values "
        "measure one union each. Default: oracle random.",
        many=True,
    ),
    "route_patch": Option(
        "evaluation",
        str,
        None,
        "How a routed reconstruction is put back: scaled as in training, or unscaled as in "
        "the published code. Default: as the SAE was trained.",
        choices="scaled unscaled",
    ),
    "act_threshold": Option(
        "application",
        float,
        None,
        "Activation that a latent must exceed. Default: 0, because the strongest are kept anyway; "
        "the published code has 10 at a hidden size of 2048.",
        low=0,
    ),
    "threshold_rel": Option(
        "application",
        float,
        None,
        "Like --act_threshold, in units of sqrt(hidden_size): 0.22 is 10 at 2048. Default: off.",
        low=0,
    ),
    "quantile": Option(
        "application",
        float,
        None,
        "Instead of a threshold: exceed this quantile of the latent's own activations, "
        "estimated from a sample. Default: off.",
        low=0,
    ),
    "context_length": Option(
        "application",
        int,
        64,
        "Tokens kept on each side of the active token.",
        low=1,
        high=MOST_KEPT,
    ),
    "max_per_token": Option(
        "application",
        int,
        2,
        "Keep at most this many contexts per latent and token class. A class is the text of "
        "the token, stripped and in lower case.",
        low=1,
    ),
    "lines": Option("application", int, 4, "Drop latents with fewer contexts than this.", low=1),
    "top_n": Option(
        "application",
        int,
        20,
        "Keep this many of the strongest contexts per latent.",
        low=1,
        high=MOST_KEPT,
    ),
    "effect": Option(
        "application",
        int,
        0,
        "For this many latents, measure how removing them changes the next-token distribution.",
        low=0,
    ),
    "gzip": Option(
        "application",
        boolean,
        None,
        "Compress the contexts file. Default: if it has more than 20 million characters.",
    ),
    "sample_latents": Option(
        "interpretation", int, 100, "Label this many latents, drawn at random; 0 labels all.", low=0
    ),
    "engine": Option(
        "interpretation",
        str,
        "gpt-4o-mini",
        "Model at the endpoint. `heuristic` labels by rules, without an endpoint.",
    ),
    "api_base": Option(
        "interpretation", str, None, "Address of an OpenAI-compatible endpoint. Default: OpenAI."
    ),
    "api_type": Option(
        "interpretation",
        str,
        "auto",
        "Protocol of the endpoint. auto decides by its address.",
        choices="auto openai azure",
    ),
    "api_version": Option(
        "interpretation", str, None, "API version of Azure. Default: 2024-02-15-preview."
    ),
    "api_key": Option(
        "interpretation",
        str,
        None,
        "Key of the endpoint. Other users of this machine can see it: prefer the "
        "environment. Default: $OPENAI_API_KEY.",
    ),
    "api_key_file": Option("interpretation", str, None, "File with the key. Default: none."),
    "concurrency": Option("interpretation", int, 8, "Requests sent at one time.", low=1, high=1000),
    "requests_per_minute": Option(
        "interpretation",
        float,
        None,
        "Send at most this many requests per minute. Default: no limit.",
        low=0.001,
    ),
    "timeout": Option(
        "interpretation", float, 60.0, "Seconds to wait for an answer.", above=0, high=86_400
    ),
    "budget_usd": Option(
        "interpretation",
        float,
        None,
        "Stop once this many US dollars are spent. Default: no limit.",
        above=0,
    ),
    "budget_tokens": Option(
        "interpretation",
        int,
        None,
        "Stop once this many tokens are used. Default: no limit.",
        low=1,
    ),
    "dry_run": Option(
        "interpretation", boolean, False, "Write the prompts and their size, but send nothing."
    ),
    "score": Option(
        "interpretation",
        str,
        None,
        "Test each label on contexts that it was not made from. Default: no test.",
        choices="detection fuzzing",
        many=True,
    ),
    # steering
    "set": Option(
        "steering",
        assignment,
        None,
        "Hold latents at these values; 46=1.5x is one and a half times the maximum of latent 46. "
        "Default: none.",
        many=True,
    ),
    "add": Option("steering", assignment, None, "Add these values to latents.", many=True),
    "multiply": Option(
        "steering", assignment, None, "Multiply latents by these values.", many=True
    ),
    "zero": Option("steering", int, None, "Switch these latents off.", low=0, many=True),
    "prompt": Option("steering", str, None, "Texts to continue.", many=True),
    "prompts": Option(
        "steering",
        str,
        None,
        "File of texts to continue: .txt with one per line, or .json and .jsonl with texts, "
        '{"prompt"}, {"messages"}, {"conversations"} or {"chosen", "rejected"}.',
    ),
    "max_new_tokens": Option("steering exploring", int, 40, "Tokens to write.", low=1),
    "temperature": Option(
        "steering",
        float,
        0.0,
        "0 takes the most likely token. Above 0 tokens are drawn, with the same seed with "
        "and without the edit.",
        low=0,
    ),
    "mode": Option(
        "steering exploring",
        str,
        "delta",
        "delta adds the change of the code alone; replace puts the decoded code in place of "
        "the state.",
        choices="delta replace",
    ),
    "site": Option(
        "steering exploring",
        int,
        None,
        "Site at which an SAE of several sites is edited. Default: where the latent is strongest.",
        low=1,
    ),
    # exploring
    "port": Option(
        "exploring",
        int,
        0,
        "Port of 127.0.0.1 at which the page is served. Default: one that is free.",
        low=0,
        high=65535,
    ),
}
# Sections of each stage's command line, in the order of its --help.
STAGES: dict[str, tuple[str, ...]] = {
    "train": ("training", "sae", "text", "lm", "common"),
    "evaluate": ("evaluation", "inference", "text", "unlabelled", "lm", "common", "sae"),
    "apply": ("application", "inference", "text", "unlabelled", "lm", "common", "sae"),
    "interpret": ("interpretation", "common"),
    "steer": ("steering", "inference", "lm", "common"),
    "export": ("export", "common"),
    "explore": ("exploring", "inference", "lm", "common"),
}
NOT_SHOWN = "options of the training"  # accepted by stages that do not use them
ABOUT = {
    "train": "Train sparse autoencoders on a language model's residual stream.",
    "evaluate": "Measure trained sparse autoencoders. No result replaces one of more tokens, or of "
    "another text or language model: it gets a number in its name.",
    "apply": "Find the contexts in which each latent of a trained sparse autoencoder is active.",
    "interpret": "Label latents from their contexts, and test the labels.",
    "export": "Write trained sparse autoencoders in the formats of other libraries.",
    "steer": "Continue texts with latents set, added to, multiplied or switched off. The "
    "results of earlier runs stay in the file.",
    "explore": "Show on a page of this machine what trained SAEs read in a text that you type, and "
    "how the text goes on while a latent is held, added to or switched off.",
}
PRECEDENCE = (
    "Typed options win over the --config file, the file over the recipe of a checkpoint, "
    "and the recipe over the defaults."
)
# Stages that several processes may share (src/distributed.py).
SHARED_STAGES = ("train", "evaluate", "apply")
ENVIRONMENT = {"model_path": "MODEL_PATH", "data_path": "DATA_PATH", "output_dir": "OUTPUT_DIR"}
SWEPT = ("k", "l1_coeff", "target_l0", "layer", "freeze")
OF_THE_LM = {"hidden_size", "n_layers"}  # constructor values that the language model decides
OF_ONE_TRAINING = {"freeze"}  # those that --init_from does not take from its source
NOT_EMPTY = (
    "model_path", "data_path", "output_dir", "SAE_path", "init_from", "config", "prompts", "device",
    "union", "assign",
)  # fmt: skip
# What a recipe sets beside the constructor values in the zoo.
RECIPES: dict[str, dict[str, Any]] = {
    "standard": {"optimizer": "signum", "grad_clip": 1.0, "steps": 1},
    "published": {"optimizer": "adam", "grad_clip": 0.0, "steps": 100, "include_special": True},
}
# Defaults that depend on the language model: (with any other, with the demo LM).
SIZES: dict[str, tuple[Any, Any]] = {
    "batch_size": (64, 16),
    "max_length": (512, 256),
    "latent_size": (16384, 2048),
    "k": ([64], [16]),
}
RESULT_DIRS = {
    "train": SAE_DIR,
    "evaluate": EVAL_DIR,
    "apply": CONTEXT_DIR,
    "interpret": INTERPRET_DIR,
    "steer": CLAMP_DIR,
    "export": EXPORT_DIR,
}
STAGE_SPLIT = {"train": "train", "evaluate": "eval", "apply": "apply"}
# Options that do not change the trained weights.
NEUTRAL = frozenset(
    "output_dir config debug tag overwrite save_every resume max_memory_hint use_wandb "
    "wandb_project device device_map trust_remote_code init_from typed from_file stage".split()
)  # init_from: recipes record the sum of its weights instead of its place
SECRET = frozenset({"api_key", "api_key_file"})
# Options that a recipe may set, from a checkpoint, an export or the hub: those of the model and
# its training. Only a person decides what code runs, what is sent to whom, and what is written.
FROM_RECIPE = (
    frozenset(
        name
        for name, option in OPTIONS.items()
        if set(option.group.split()) & {"sae", "text", "training", "lm"}
    )
    | {"seed", "route_patch"}
) - NEUTRAL
PERSON_ONLY = frozenset(OPTIONS) - FROM_RECIPE
# Options in which the processes of a job may differ: places on their machines, and devices. The
# language models and texts are compared by content, once they are loaded.
OF_EACH_PROCESS = frozenset(
    "output_dir model_path data_path SAE_path union assign init_from config debug device "
    "device_map".split()
)


# --------------------------------------------------------------------------------- command lines


class _Formatter(argparse.HelpFormatter):
    """Keeps the lines of the examples, which begin with spaces."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        lines = text.split("\n")
        return "\n".join(line if line[:1] == " " else fill(line, width, indent) for line in lines)


class _Help(argparse.Action):
    """`--help` shows the options that matter, `--help all` every one."""

    def __call__(self, command_line: Any, _cfg: Any, value: Any, _word: str | None = None) -> None:
        shown = command_line if value == "all" else parser(command_line.stage, brief=True)
        shown.print_help()
        command_line.exit()


class _Parser(argparse.ArgumentParser):
    stage = ""
    source = ""  # prefix of error messages: the file whose options are being parsed

    def error(self, message: str) -> None:
        is_main = os.environ.get("RANK", "0") == "0"
        text = " ".join(f"{self.source}{message}".split())
        line = f"{self.prog}: error: {printable(text)}; see --help\n"
        self.exit(2, line if is_main else None)

    def parse_args(self, *args: Any) -> Namespace:  # type: ignore[override]
        cfg, unknown = self.parse_known_args(*args)
        if unknown:
            self.error(_advice(self.stage, unknown))
        return cfg


def _advice(stage: str, unknown: list[str]) -> str:
    """What to do about words of a command line that are no options."""
    word = next((word for word in unknown if word.startswith("-")), unknown[0])
    name = word.partition("=")[0]
    bare = name.lstrip("-")
    others = [other for other in STAGES if bare in dict(_options_of(other))]
    if name.startswith("--") and others:
        owners = ", ".join(map(program, others))
        return f"{name} is no option of {program(stage)}; it belongs to {owners}"
    near = stage_help.did_you_mean(bare, dict(_options_of(stage)), "--")
    what = "there is no option" if name.startswith("-") else "unrecognized arguments:"
    return f"{what} {name if near else ' '.join(unknown)}{near}"


def program(stage: str) -> str:
    """How this process calls a stage: train.py, or routesae train where that is installed."""
    return f"routesae {stage}" if _is_installed_command() else f"{stage}.py"


def _is_installed_command() -> bool:
    return Path(sys.argv[0]).stem == "routesae"


def command(stage: str) -> str:
    """What a person types to run a stage."""
    return program(stage) if _is_installed_command() else f"python {program(stage)}"


def module_command(module: str) -> str:
    """What a person types to run a small program beside the stages, such as src.page."""
    if _is_installed_command():
        return f"routesae {module.removeprefix('src.')}"
    return f"python -m {module}"


def small_parser(module: str, about: str) -> argparse.ArgumentParser:
    """Command line of a small program beside the stages. The first line of `about` is shown."""
    return argparse.ArgumentParser(prog=module_command(module), description=first_line(about))


def _options_of(stage: str) -> Iterator[tuple[str, Option]]:
    for name, option in OPTIONS.items():
        if set(option.group.split()) & set(STAGES[stage]):
            yield name, option


def _help_of(option: Option) -> str:
    """The help text; a plain default is added to it."""
    default = option.default
    if default is None or "Default:" in option.help:
        return option.help
    if option.type is boolean:
        default = int(default)
    values = default if isinstance(default, list) else [default]
    return f"{option.help} Default: {' '.join(map(str, values))}."


def _argument(option: Option) -> dict[str, Any]:
    """Arguments of argparse.add_argument for an option."""
    argument: dict[str, Any] = {"type": option.type, "help": _help_of(option).replace("%", "%%")}
    if option.type is int:
        argument["type"] = whole_number
    if option.type is boolean:
        return argument | {"nargs": "?", "const": True, "metavar": "0|1"}
    if option.many or option.count:
        argument["nargs"] = option.count or "+"
    if option.choices:
        argument["type"] = one_of(option.choices)
        listed = "{" + ",".join(option.choices.split()) + "}"
        argument["metavar"] = listed if len(listed) < LONGEST_METAVAR else "NAME"
    elif option.type is assignment:
        argument["metavar"] = "LATENT=VALUE"
    else:
        argument["metavar"] = option.type.__name__.upper()
    return argument


def parser(stage: str, brief: bool = False) -> _Parser:
    """The command line of one stage. Options that are not typed stay absent from its result.

    brief: with the options that matter alone, for the short help.
    """
    usage = "%(prog)s [options]"
    if stage == "interpret":
        usage += " [contexts]"
    command_line = _Parser(
        program(stage),
        usage,
        ABOUT[stage],
        _epilog(stage),
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    command_line.stage = stage
    added: set[str] = set()
    for title, names in _sections(stage, brief).items():
        section = command_line.add_argument_group(title)
        for name in [name for name in names if name not in added]:
            added.add(name)
            argument = _argument(OPTIONS[name])
            if title == NOT_SHOWN:
                argument["help"] = argparse.SUPPRESS
            if title == stage_help.SECTIONS["unlabelled"]:  # what follows is about training
                argument["help"] = OPTIONS[name].help.split(". ")[0].rstrip(".") + "."
            section.add_argument(f"--{name}", **argument)
    text = "Show the options that matter, or with `all` every one."
    about_help = {"nargs": "?", "choices": ["all"], "metavar": "all", "help": text}
    section.add_argument("-h", "--help", action=_Help, **about_help)
    if stage == "interpret":
        text = "Contexts file. Default: the newest."
        command_line.add_argument("contexts", nargs="?", default=None, help=text)
    return command_line


def _sections(stage: str, brief: bool) -> dict[str, list[str]]:
    """Options by section of the help; an option of two sections is shown in the first."""
    if brief:
        return {"options that matter": stage_help.MAIN[stage].split()}
    sections = {}
    for group in STAGES[stage]:
        title = stage_help.SECTIONS.get(group, group)
        if group == "sae" and stage != "train":
            title = NOT_SHOWN
        names = [name for name, option in OPTIONS.items() if group in option.group.split()]
        sections[title] = names
    return sections


def _epilog(stage: str) -> str:
    examples = [f"  {command(stage)} {example}" for example in stage_help.EXAMPLES[stage]]
    lines = ["Examples:", *examples]
    return "\n".join([*lines, "", PRECEDENCE])


def parse(stage: str, argv: Sequence[str] | None = None) -> Namespace:
    """Options of a stage, checked as far as that is possible without a language model.

    cfg.typed names the options that the user gave, cfg.from_file those that the --config file
    gave. A bad value ends the program with one line and exit code 2, as argparse does.
    """
    command_line = parser(stage)
    typed = vars(command_line.parse_args(argv))
    cfg = Namespace(**_defaults(stage))
    try:
        from_file = _from_file(typed, stage, command_line)
        vars(cfg).update(from_file | typed)
        cfg.typed = set(typed) | set(from_file)
        cfg.from_file = set(from_file) - set(typed)
        cfg.stage = stage
        check(cfg)
    except ValueError as error:
        command_line.error(str(error))
    return cfg


def parse_args() -> Namespace:
    """Options of the training stage from the command line: the documented name."""
    return parse("train")


def _defaults(stage: str) -> dict[str, Any]:
    values = {name: option.default for name, option in _options_of(stage)}
    for name, variable in ENVIRONMENT.items():
        if name in values:
            values[name] = os.environ.get(variable) or values[name]
    return values


def _from_file(typed: Mapping[str, Any], stage: str, command_line: _Parser) -> dict[str, Any]:
    """Options of a --config file, parsed as if they were typed; those of other stages are left."""
    path = typed.get("config")
    if not path:
        return {}
    options, note, is_recipe = config_file.read(path, stage, OPTIONS, FROM_RECIPE)
    if note:
        print(printable(note))
    if is_recipe and "model_path" in options.keys() - typed.keys():
        _check_code(typed.get("trust_remote_code"), options["model_path"])
    names = {name for name, _ in _options_of(stage)} - {"config"}
    if stage == "interpret":
        # A file for all stages means the text by data_path; here it would mean contexts.
        names -= {"data_path"}
    options = {name: value for name, value in options.items() if name in names}
    command_line.source = f"--config {path}: "
    try:
        words = config_file.words(options, OPTIONS)
    except ValueError as error:
        command_line.error(str(error))
    parsed = vars(command_line.parse_args(words))
    command_line.source = ""
    return {name: value for name, value in parsed.items() if name in options}


# ------------------------------------------------------------------------------------ the checks


def check(cfg: Namespace) -> None:
    """Check values and combinations; turn single values of options that take several into lists.

    Raises ValueError for a value out of range, an unknown model, or options that exclude each
    other.
    """
    for name, option in OPTIONS.items():
        value = getattr(cfg, name, None)
        if value is None:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if name in NOT_EMPTY and "" in values:
            raise ValueError(f'--{name} "": the value is empty; leave the option out, or name one')
        if any(isinstance(item, str) and "\0" in item for item in values):
            raise ValueError(f"--{name} holds a NUL character, which no name can have")
        if name in SWEPT:
            values = list(dict.fromkeys(values))
        if option.many:
            setattr(cfg, name, values)
        if option.type in (int, float):
            for number in values:
                _check_range(name, option, number)
    if getattr(cfg, "betas", None) and max(cfg.betas) >= 1:
        raise ValueError(f"--betas {' '.join(map(str, cfg.betas))}: each must be below 1")
    for latent, value in getattr(cfg, "multiply", None) or []:
        if isinstance(value, TimesMaximum):
            raise ValueError(f"--multiply {latent}={value:g}x: it takes a factor; leave out the x")
    temperature = getattr(cfg, "temperature", 0)
    if 0 < temperature < LOWEST_TEMPERATURE:
        advice = f"must be 0, or at least {LOWEST_TEMPERATURE:g}"
        raise ValueError(f"--temperature {temperature}: {advice}; 0 takes the most likely token")
    if (getattr(cfg, "quantile", None) or 0) >= 1:
        raise ValueError(f"--quantile {cfg.quantile}: must be below 1")
    if getattr(cfg, "model", None):
        cfg.model = list(dict.fromkeys(zoo.canonical(name) for name in cfg.model))
    _check_exclusive(cfg, "infer_k", "theta")
    _check_exclusive(cfg, "act_threshold", "threshold_rel", "quantile")
    if cfg.stage == "train":
        _check_routing(cfg)


def check_value(name: str, value: Any) -> None:
    """Raise ValueError for a value of an option, read from JSON, that no stage would accept.

    None, and names that are no options, pass.
    """
    option = OPTIONS.get(name)
    if option is None or value is None:
        return
    if not _has_type(option, value):
        raise ValueError(f"{name} {value!r} is no valid value")
    if option.type in (int, float):
        for number in value if isinstance(value, list) else [value]:
            _check_range(name, option, number)


def _check_range(name: str, option: Option, number: float) -> None:
    if number != number or abs(number) == float("inf"):
        raise ValueError(f"--{name} {number}: not a finite number")
    largest = LARGEST_INTEGER if option.type is int else LARGEST_FLOAT
    if abs(number) > largest:
        raise ValueError(f"--{name}: a number of this size cannot be used; at most {largest:.3g}")
    if option.low is not None and number < option.low:
        raise ValueError(f"--{name} {number}: must be at least {option.low}")
    if option.above is not None and number <= option.above:
        raise ValueError(f"--{name} {number}: must be above {option.above}")
    if option.high is not None and number > option.high:
        raise ValueError(f"--{name} {number}: must be at most {option.high}")


def _check_exclusive(cfg: Namespace, *names: str) -> None:
    present = [name for name in names if getattr(cfg, name, None) is not None]
    if len(present) > 1:
        raise ValueError(f"--{' and --'.join(present)} exclude each other; give one")


def _check_routing(cfg: Namespace) -> None:
    objective, routing = cfg.router_objective, cfg.routing
    if objective in (None, "published") or routing in (None, "hard", "permuted"):
        return
    raise ValueError(
        f"--router_objective {objective} chooses one site per token; "
        f"it needs --routing hard, not {routing}"
    )


# ------------------------------------------------------------------------- values that depend


def complete(cfg: Namespace) -> Namespace:
    """Set what was not typed and depends on the language model, the recipe or the stage.

    Raises ValueError where k is larger than latent_size.
    """
    is_demo = bool(cfg.model_path) and Path(cfg.model_path).resolve() == DEMO_LM
    for name, (size, demo_size) in SIZES.items():
        if getattr(cfg, name, 0) is None:
            setattr(cfg, name, demo_size if is_demo else size)
    for name, value in RECIPES[getattr(cfg, "recipe", "standard")].items():
        if name not in cfg.typed and hasattr(cfg, name):
            setattr(cfg, name, value)
    if getattr(cfg, "split", 0) is None:
        cfg.split = STAGE_SPLIT[cfg.stage]
    if cfg.stage == "train" and max(cfg.k) > cfg.latent_size:
        raise ValueError(
            f"--k {max(cfg.k)} is more than --latent_size {cfg.latent_size}; lower --k"
        )
    return cfg


def model_options(cfg: Namespace, name: str) -> dict[str, Any]:
    """Constructor options of one model: typed > recipe of the model > default.

    Swept options keep their lists.
    """
    entry = zoo.ZOO[name]
    is_published = getattr(cfg, "recipe", "standard") == "published"
    recipe = entry.published if is_published else entry.standard

    def present(names: Sequence[str]) -> dict[str, Any]:
        return {key: getattr(cfg, key) for key in names if getattr(cfg, key, None) is not None}

    shared = present(("latent_size", "norm_eps", "seed", "start_layer", "end_layer"))
    own = present(entry.options)
    typed = {key: value for key, value in own.items() if key in cfg.typed}
    untyped = {key: value for key, value in own.items() if key not in cfg.typed}
    return shared | untyped | recipe | typed


def inherit(cfg: Namespace, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Take from a source of weights (--init_from) its model's name and options, where not typed.

    values: the source's constructor values. Returns those that were taken; swept ones are lists.
    Raises ValueError for another model, and for values that no stage would accept.
    """
    if "model" in cfg.typed and cfg.model != [name]:
        raise ValueError(
            f"--init_from {cfg.init_from} holds a {name}; it cannot begin "
            f"--model {' '.join(cfg.model)}: give --model {name}"
        )
    cfg.model = [name]
    not_taken = cfg.typed | OF_THE_LM | OF_ONE_TRAINING
    taken = {key: value for key, value in values.items() if key not in not_taken}
    for key in taken.keys() & OPTIONS.keys() & vars(cfg).keys():
        setattr(cfg, key, taken[key])
    check(cfg)
    return taken | {key: getattr(cfg, key) for key in taken.keys() & set(SWEPT)}


def short_number(value: float) -> str:
    """A number for a title: as short as it can be without standing for another number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def learning_rate(cfg: Namespace, width: int, unit: float = 1.0) -> float:
    """Return the typed learning rate, else the default of the optimiser.

    A step of signum changes each weight by the learning rate, and the weights of a unit vector of
    this width (D) are about 1 / sqrt(D). So the rate falls with the width. It also falls with the
    number of latents between 1,024 and 4,096 of them (docs/LOG.md): if it rose further for fewer
    latents, a step would come near the size of the weights. `unit` is that of the model.
    """
    if cfg.lr is not None:
        return cfg.lr
    if cfg.optimizer == "signum":
        latents = min(max(cfg.latent_size, zoo.FEW_LATENTS), zoo.MANY_LATENTS)
        shape = latents / zoo.MANY_LATENTS * width / zoo.TUNED_WIDTH
        return unit * 1e-2 / shape**0.5
    return 5e-4


def unused(cfg: Namespace) -> list[str]:
    """One line for each typed option that none of the chosen models uses.

    Options from a file are passed over: it may hold options for all models.
    """
    lines = []
    models = ", ".join(cfg.model)
    for name in sorted(cfg.typed - cfg.from_file):
        owners = [model for model, entry in zoo.ZOO.items() if name in entry.options]
        is_common = len(owners) in (0, len(zoo.ZOO))
        if not is_common and not set(owners) & set(cfg.model):
            lines.append(f"--{name} does nothing for {models}; it belongs to {', '.join(owners)}")
    return lines


def _check_code(trust_remote_code: bool | None, model_path: Any) -> None:
    """Raise ValueError if code of a language model would run that a recipe chose, no person."""
    if trust_remote_code:
        raise ValueError(
            f"--trust_remote_code would run the code of {model_path}, which the recipe names; "
            "name the language model yourself with --model_path"
        )


def fill_from_recipe(cfg: Namespace, recipe: Mapping[str, Any]) -> Namespace:
    """Take options that were not typed from a checkpoint's recipe: of model, text and LM.

    Its split, its sizes (rows, tokens) and its device stay with the training run.
    """
    saved = config_file.recipe_options(recipe, FROM_RECIPE)
    for name, value in saved.items():
        if _takes_from_recipe(cfg, name):
            if not _has_type(OPTIONS[name], value):
                message = f"the checkpoint's recipe says {name} {value!r}, which is no valid value"
                raise ValueError(f"{message}; give --{name}")
            if name == "model_path":
                _check_code(getattr(cfg, "trust_remote_code", False), value)
            as_list = OPTIONS[name].many and not isinstance(value, list)
            setattr(cfg, name, [value] if as_list else value)
    check(cfg)
    return cfg


def _takes_from_recipe(cfg: Namespace, name: str) -> bool:
    in_environment = os.environ.get(ENVIRONMENT.get(name, ""))
    is_open = hasattr(cfg, name) and name not in cfg.typed
    return is_open and name not in config_file.NOT_INHERITED and not in_environment


def _has_type(option: Option, value: Any) -> bool:
    """True where a value read from JSON has the type of the option and is one of its choices."""
    accepted = {int: int, str: str, float: (int, float), boolean: (bool, int)}.get(option.type)
    is_list = isinstance(value, list) and (option.many or option.count)
    values = value if is_list else [value]
    if accepted is None:
        return True
    if option.type is not boolean and any(isinstance(item, bool) for item in values):
        return False
    is_accepted = all(isinstance(item, accepted) for item in values)
    return is_accepted and (not option.choices or set(values) <= set(option.choices.split()))


# ------------------------------------------------------------------------------------- the stages


def run_stage(
    stage: str, function: Callable[[Namespace], Any], argv: Sequence[str] | None = None
) -> int:
    """Parse the options, call function(cfg), and return the exit code.

    An error becomes one line. It may quote files, servers and language models; secrets and
    control characters are removed from it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal without some letter must not end a run.
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _print_traceback
    with printable_output():
        return _run(stage, function, argv)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print the traceback of an error of the program itself, without secrets or escapes."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(printable(redacted(text)), file=sys.stderr)


def _run(stage: str, function: Callable[[Namespace], Any], argv: Sequence[str] | None) -> int:
    cfg = parse(stage, argv)
    try:
        job = _join_job(cfg)
        # Stages that write have their folder; of several processes, one writes.
        if stage in RESULT_DIRS and os.environ.get("RANK", "0") == "0":
            probe(Path(cfg.output_dir) / RESULT_DIRS[stage], keep=False)
        function(cfg)
        if job is not None:
            job.stop()
        return 0
    except KeyboardInterrupt as stop:
        why = f"; {stop}" if str(stop) else ""
        if _ended_first():
            print(f"{program(stage)}: interrupted{one_line(redacted(why))}", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        out_of_memory = _is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not out_of_memory:
            raise
        _report(cfg, error, "; lower --batch_size, or --max_length" if out_of_memory else "")
        return 2 if out_of_memory else getattr(error, "exit_code", 2)


def _is_out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError, without an import of torch; its CPU allocator raises RuntimeError.
    message = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in message
        or "can't start new thread" in message
        or "not enough memory" in message
    )


def _number_of_job(name: str, default: int) -> int:
    """A number that torchrun puts into the environment. Raises ValueError if it is none."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(
            f"the environment variable {name} is {text!r}, but torchrun would set a whole number; "
            "unset it, or start several processes with torchrun"
        )
    return int(text)


def _join_job(cfg: Namespace) -> ModuleType | None:
    """Join the other processes, if there are several; returns src.distributed in that case."""
    world = _number_of_job("WORLD_SIZE", 1)
    if world <= 1:
        return None
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        _number_of_job(name, 0)
    if cfg.stage not in SHARED_STAGES:
        raise ValueError(
            f"{cfg.stage}.py runs in one process, but WORLD_SIZE is {world}; "
            "start it without torchrun"
        )
    if os.environ.get("RANK", "0") != "0":
        # tqdm reads it when it is imported, which torch does.
        os.environ["TQDM_DISABLE"] = "1"
    from src import distributed

    cfg.device = distributed.start(cfg.device)
    shared = OPTIONS.keys() & vars(cfg).keys() - OF_EACH_PROCESS
    distributed.require_same({f"--{name}": getattr(cfg, name) for name in sorted(shared)})
    return distributed


def _ended_first() -> bool:
    """distributed.first_to_end(), without an import of torch."""
    distributed = sys.modules.get("src.distributed")
    return distributed is None or distributed.first_to_end()


def _report(cfg: Namespace, error: Exception, advice: str) -> None:
    """Print an error as one line, with --debug after its traceback."""
    key = getattr(cfg, "api_key", None)
    if cfg.debug:
        print(printable(redacted(traceback.format_exc(), key)), file=sys.stderr)
    text = f"{error_text(error)}{advice}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS and error.filename:
        text += "; earlier results are intact: free some space and run the same command again"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    message = redacted(" ".join(lines) or type(error).__name__, key)
    if _ended_first():
        print(f"{program(cfg.stage)}: error: {printable(message)}", file=sys.stderr, flush=True)
