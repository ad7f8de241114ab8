"""Does a learned router beat a random assignment at its own shares, and on what? Trains the controls, measures, writes tables and pictures.

`python -m experiments.routing` takes the demo language model; every option of train.py is passed on (--model_path, --device, --latent_size,
--k ...), so the same command runs on another language model. Interrupted, it goes on where it was: trainings from their last saved state,
measurements part by part.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments import routing_measure, routing_report, routing_runs
from src import config, demo, lm
from src.data import Rows
from src.device import pick_device


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.routing",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, help="training tokens of each SAE (default: 1M)"
    )
    parser.add_argument(
        "--eval_tokens", type=int, default=200_000, help="tokens measured (default: 200k)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[42, 43, 44],
        help="one matrix of SAEs each (default: 42 43 44)",
    )
    parser.add_argument(
        "--output_dir",
        default="outputs/routing",
        help="folder of weights and measurements (default: outputs/routing)",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        default=None,
        help="folder of the tables and pictures (default: the output folder)",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="40k training tokens, 2k measured, two seeds, 256 latents: does everything run?",
    )
    own, rest = parser.parse_known_args(argv)
    if own.smoke:
        own.tokens, own.eval_tokens, own.seeds, rest = (
            40_000,
            2_000,
            own.seeds[:2],
            ["--latent_size", "256", "--k", "8", *rest],
        )
    argv = ["--max_tokens", str(own.tokens), "--output_dir", own.output_dir, *rest]
    try:
        paths = {}
        for seed in own.seeds:
            cfg = routing_runs.options_of(argv, seed, "first")
            demo.use_demo_defaults(cfg)
            config.complete(cfg)
            cfg.device = pick_device(cfg.device)
            tokenizer, language_model = lm.get_language_model(
                cfg.model_path, cfg.device, cfg.dtype, cfg.trust_remote_code
            )
            cfg.n_layers = len(lm.blocks(language_model))
            routing_runs.train(
                argv,
                seed,
                language_model,
                rows_of(cfg, tokenizer, "train", own.tokens),
                cfg.n_layers,
            )
            rows = rows_of(
                cfg, tokenizer, "eval", 10 * own.eval_tokens
            )  # rows drawn from many documents
            order = rows.order(0, 0)[: -(-own.eval_tokens // cfg.max_length)]
            folder = Path(own.output_dir) / "measured"
            paths[seed] = routing_measure.measure(cfg, seed, language_model, rows, order, folder)
        routing_report.write(cfg, paths, own.docs or Path(own.output_dir))
    except KeyboardInterrupt as stop:
        print(
            f"routing: interrupted{f'; {stop}' if str(stop) else ''}; the same command goes on from here",
            file=sys.stderr,
        )
        return getattr(stop, "exit_code", 130)
    except (ValueError, OSError) as error:
        print(f"routing: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
