"""Does a learned router beat a random assignment with the same shares, and on which metrics?

`python -m experiments.routing` trains the routers and their controls, measures them, and writes
tables and pictures. It uses the demo language model. Every option of train.py is passed on
(--model_path, --device, --latent_size, --k ...), so that the same command runs on another one.

After an interruption the same command continues: trainings from their last saved state,
measurements part by part.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from experiments import exit_code, routing_measure, routing_report, routing_runs
from src import config, demo, lm
from src.data import Rows
from src.device import pick_device
from src.sae import routed_sites


def rows_of(cfg: argparse.Namespace, tokenizer: object, split: str, max_tokens: int) -> Rows:
    return Rows(
        cfg.data_path,
        tokenizer,
        cfg.max_length,
        split,
        text_key=cfg.text_key,
        chunking=cfg.chunking,
        max_tokens=max_tokens,
        max_bad_frac=cfg.max_bad_frac,
    )


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(options of this command, options of train.py)"""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.routing",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    tokens_help = "training tokens of each SAE (default: 1M)"
    add("--tokens", type=int, default=1_000_000, help=tokens_help)
    add("--eval_tokens", type=int, default=200_000, help="tokens measured (default: 200k)")
    seeds_help = "one matrix of SAEs each (default: 42 43 44)"
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help=seeds_help)
    output_help = "folder of weights and measurements (default: outputs/routing)"
    add("--output_dir", default="outputs/routing", help=output_help)
    docs_help = "folder of the tables and pictures (default: the output folder)"
    add("--docs", type=Path, default=None, help=docs_help)
    smoke_help = "40k training tokens, 2k measured, two seeds, 256 latents: does everything run?"
    add("--smoke", action="store_true", help=smoke_help)
    options, train_options = parser.parse_known_args(argv)
    if options.smoke:
        options.tokens, options.eval_tokens = 40_000, 2_000
        options.seeds = options.seeds[:2]
        train_options = ["--latent_size", "256", "--k", "8", *train_options]
    return options, train_options


def run(options: argparse.Namespace, train_options: list[str]) -> None:
    """Train and measure the SAEs of every seed, then write the report."""
    argv = ["--max_tokens", str(options.tokens), "--output_dir", options.output_dir]
    argv += train_options
    paths = {}
    for seed in options.seeds:
        cfg = routing_runs.options_of(argv, seed, "first")
        demo.use_demo_defaults(cfg)
        config.complete(cfg)
        cfg.device = pick_device(cfg.device)
        tokenizer, language_model = lm.get_language_model(
            cfg.model_path, cfg.device, cfg.dtype, cfg.trust_remote_code
        )
        cfg.n_layers = len(lm.blocks(language_model))
        demo.make_text(cfg, whole=True)
        rows = rows_of(cfg, tokenizer, "train", options.tokens)
        routing_runs.train(argv, seed, language_model, rows, cfg.n_layers)
        # The measured rows are drawn from ten times as many, so that they are of many documents.
        rows = rows_of(cfg, tokenizer, "eval", 10 * options.eval_tokens)
        order = rows.order(0, 0)[: -(-options.eval_tokens // cfg.max_length)]
        folder = Path(options.output_dir) / "measured"
        sites = routed_sites(cfg.n_layers, cfg.start_layer, cfg.end_layer)
        make_arms = functools.partial(
            routing_measure.arms_of, cfg, seed, language_model, rows, order
        )
        paths[seed] = routing_measure.measure(
            cfg, seed, language_model, rows, order, folder, sites, make_arms
        )
    routing_report.write(cfg, paths, options.docs or Path(options.output_dir))


def main(argv: list[str] | None = None) -> int:
    options, train_options = parse_args(argv)
    return exit_code("routing", lambda: run(options, train_options))


if __name__ == "__main__":
    sys.exit(main())
