"""Does routing help on a real language model, against the baselines that could refute it?

`python -m experiments.real_routing --model_path data/model --data_path data` trains what is
missing, measures it on held-out text, and writes a table, its numbers and two pictures. Further
options go to train.py. Every part continues where it was stopped; --only runs some of them.

The parts of a seed:
  routed     RouteSAE over all sites, and TopK at each of them
  small      TopK at each site with an equal part of the latents
  random     RouteSAE with random sites
  shares     the same, at the shares of the router of `routed`
  untrained  RouteSAE with a router that does not learn, at these shares
  several    MLSAE and Crosscoder over every fourth site
  frozen     TopK at the middle site: frozen decoder, soft-frozen decoder, frozen encoder
  choose     errors and KL of the TopKs on other text, which choose the best site
  measure    all of these, and unions of the TopKs, on held-out text
and for all seeds together:
  report     table, numbers, pictures
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from experiments import exit_code
from experiments import real_routing_report as report
from experiments.routing import rows_of
from experiments.routing_measure import Pace, measure
from experiments.routing_runs import router_weights, trained_shares
from src import checkpoint, config, demo, files, lm, router, union
from src.data import Rows
from src.device import pick_device
from src.sae import FROZEN, SAE, routed_sites
from src.trainer import Trainer

TRAININGS = ("routed", "small", "random", "shares", "untrained", "several", "frozen")
PARTS = (*TRAININGS, "choose", "measure", "report")
UNIONS = {"small": "small", "full": "topk"}  # {name: the SAEs that it joins}
BATCHES_OF_A_PART = 8  # a file of measurements; about a quarter of an hour on a CPU


class Experiment(NamedTuple):
    """The options of one seed."""

    options: Namespace
    train_options: list[str]
    sites: list[int]
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir)

    @property
    def shares_path(self) -> Path:
        return self.folder / f"shares_seed{self.seed}.json"

    def shares(self) -> list[float]:
        """Return the shares of the trained router."""
        if not self.shares_path.exists():
            raise ValueError(f"{self.shares_path} is missing: the part routed comes first")
        return files.load_json(self.shares_path)["route"]

    def train_options_of(self, part: str) -> list[str]:
        """Return what train.py is told for a part."""
        sites = [str(site) for site in self.sites]
        routed = ["--model", "RouteSAE", "--sites", *sites]
        every_fourth = ["--model", "MLSAE", "Crosscoder", "--sites", *sites[::4]]
        if part == "routed":
            wanted = ["--model", "RouteSAE", "TopK", "--sites", *sites, "--layer", *sites]
        elif part == "small":
            latents = str(self.options.latent_size // len(sites))
            wanted = ["--model", "TopK", "--layer", *sites, "--latent_size", latents]
        elif part == "several":
            wanted = [*every_fourth, "--target_l0", str(self.options.k)]
        elif part == "frozen":
            middle = ["--model", "TopK", "--layer", sites[(len(sites) - 1) // 2]]
            wanted = [*middle, "--freeze", *FROZEN]
        elif part == "random":
            wanted = [*routed, "--routing", "random"]
        else:
            shares = ["--route_shares", *map(str, self.shares())]
            how = ["--routing", "random"]
            if part == "untrained":
                how = ["--router_objective", "frozen", "--router_balance", "none"]
            wanted = [*routed, *how, *shares]
        options = self.options
        latents = str(options.latent_size)
        sizes = ["--latent_size", latents, "--k", str(options.k), "--seed", str(self.seed)]
        own = {"routed": "", "small": f"w{options.latent_size // len(self.sites)}"}
        tag = f"s{self.seed}{own.get(part, part)}"
        paths = ["--output_dir", str(self.folder), "--max_tokens", str(options.tokens)]
        return [*sizes, *paths, *self.train_options, *wanted, "--tag", tag]

    def train_cfg(self) -> Namespace:
        """Return the options of the language model and the text."""
        cfg = config.parse("train", self.train_options_of("routed"))
        demo.use_demo_defaults(cfg)
        config.complete(cfg)
        cfg.device = pick_device(cfg.device)
        return cfg

    def paths(self) -> dict[str, Path]:
        """Return {name: weights} of what is trained."""
        found = {}
        for part in TRAININGS:
            if part in ("shares", "untrained") and not self.shares_path.exists():
                continue
            trainer = Trainer(config.parse("train", self.train_options_of(part)))
            for (model, values, _), title in zip(trainer.combinations, trainer.titles, strict=True):
                path = trainer.folder / f"{title}.pt"
                if path.exists():
                    found[_name(part, model, values)] = path
        return found


def _name(part: str, model: str, values: dict[str, Any]) -> str:
    """The name of an SAE in the measurements."""
    if part == "frozen":
        return f"frozen_{values['freeze']}"
    if model == "TopK":
        return f"{'topk' if part == 'routed' else part}_{values['layer']}"
    if part == "several":
        return model.lower()
    return "route" if part == "routed" else part


# ------------------------------------------------------------------------------------ measuring


def make_arms(
    experiment: Experiment,
    language_model: nn.Module,
    rows: Rows,
    order: np.ndarray,
    cfg: Namespace,
) -> dict[str, SAE]:
    """Return every SAE of a seed, in each way it is used.

    Random and shifted sites get the shares that the router has on these rows.
    """
    opened = {name: checkpoint.load(path, cfg.device) for name, path in experiment.paths().items()}
    arms = {name: sae for name, (sae, _) in opened.items() if not name.startswith("small_")}
    routed = {name: arms[name] for name in ("route", "untrained") if name in arms}
    if "route" in arms:
        weights = router_weights(routed, language_model, rows, order, cfg.batch_size, cfg.device)
        shares = router.load(weights["route"])
        if "shares" in arms:
            arms["shares"].router.shares = shares
        if "untrained" in arms:
            logits = weights["untrained"].clamp_min(1e-30).log()
            arms["untrained"].router.load_bias += router.logit_shifts(logits, shares)
        for routing in ("permuted", "oracle"):
            arms[f"route_{routing}"] = copy.copy(arms["route"])
            arms[f"route_{routing}"].routing = routing
        arms |= _unions(experiment, opened, shares.tolist())
    about = {
        name: {
            "latents": sae.latent_size,
            "encoders": sae.encoders_per_token,
            "sites": sae.sites(),
        }
        for name, sae in arms.items()
    }
    files.save_json(about, experiment.folder / f"arms_seed{experiment.seed}.json")
    return arms


def _unions(
    experiment: Experiment, opened: dict[str, union.Opened], shares: list[float]
) -> dict[str, SAE]:
    """Return the unions of the TopKs, where one is trained at every site."""
    arms = {}
    for name, family in UNIONS.items():
        members = [opened.get(f"{family}_{site}") for site in experiment.sites]
        if None in members:
            print(f"real_routing: no union of {family}, which is not trained at every site")
            continue
        ways = {
            "router": ("router", opened["route"], None),
            "best": ("oracle", None, None),
            "random": ("random", None, shares),
        }
        for way, (assign, by, given) in ways.items():
            arms[f"{name}_by_{way}"], _ = union.assemble(
                members, assign, by, shares=given, seed=experiment.seed
            )
    return arms


def _topks(experiment: Experiment, device: str) -> dict[str, SAE]:
    """Return the TopKs among which the best site is chosen."""
    paths = experiment.paths()
    names = [f"topk_{site}" for site in experiment.sites if f"topk_{site}" in paths]
    return {name: checkpoint.load(paths[name], device)[0] for name in names}


def measure_part(experiment: Experiment, part: str) -> list[Path]:
    """Measure one seed: on the text that chooses the site, or on the held-out text."""
    options, cfg = experiment.options, experiment.train_cfg()
    tokenizer, language_model = lm.get_language_model(
        cfg.model_path, cfg.device, cfg.dtype, cfg.trust_remote_code
    )
    split, tokens = ("apply", options.choose_tokens)
    rows_of_a_part = BATCHES_OF_A_PART * cfg.batch_size
    pace = Pace(rows_of_a_part, 1, 1, noise=False)
    if part == "measure":
        split, tokens = "eval", options.eval_tokens
        pace = Pace(rows_of_a_part, options.kl_every, 2 * options.kl_every, noise=False)
    # The measured rows are drawn from ten times as many, so that they are of many documents.
    rows = rows_of(cfg, tokenizer, split, 10 * tokens)
    order = rows.order(0, 0)[: -(-tokens // cfg.max_length)]
    arms = functools.partial(_topks, experiment, cfg.device)
    if part == "measure":
        arms = functools.partial(make_arms, experiment, language_model, rows, order, cfg)
    folder = experiment.folder / report.FOLDERS[part]
    return measure(
        cfg, experiment.seed, language_model, rows, order, folder, experiment.sites, arms, pace
    )


def train_part(experiment: Experiment, part: str) -> None:
    """Train one part. What is trained already is not trained again."""
    Trainer(config.parse("train", experiment.train_options_of(part))).run()


def save_shares(experiment: Experiment) -> None:
    """Write the shares of the trained router on 50k training tokens, unless they are there."""
    paths = experiment.paths()
    if experiment.shares_path.exists() or "route" not in paths:
        return
    cfg = experiment.train_cfg()
    tokenizer, language_model = lm.get_language_model(
        cfg.model_path, cfg.device, cfg.dtype, cfg.trust_remote_code
    )
    rows = rows_of(cfg, tokenizer, "train", experiment.options.tokens)
    saes = {"route": checkpoint.load(paths["route"], cfg.device)[0]}
    shares = trained_shares(saes, language_model, rows, experiment.seed, cfg)
    files.save_json(shares, experiment.shares_path)


# --------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> tuple[Namespace, list[str]]:
    """Return (options of this command, options of train.py)."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.real_routing",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=config.whole_number, default=1_000_000, help="of each training")
    add("--eval_tokens", type=config.whole_number, default=100_000, help="held-out, measured")
    add("--choose_tokens", type=config.whole_number, default=8192, help="that choose the site")
    # Each file of measurements begins with a batch that measures KL.
    paces = [n for n in range(1, BATCHES_OF_A_PART + 1) if BATCHES_OF_A_PART % n == 0]
    add("--kl_every", type=int, default=4, choices=paces, help="batches, of which one measures KL")
    add("--seeds", type=int, nargs="+", default=[42, 43, 44])
    add("--sites", type=int, nargs="+", help="default: those of a RouteSAE")
    add("--latent_size", type=int, default=4096, help="of a RouteSAE and of a TopK")
    add("--k", type=int, default=32)
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="default: all")
    add("--output_dir", default="outputs/real_routing", help="of weights and measurements")
    add("--docs", type=Path, help="of table and pictures; default: the output folder")
    return parser.parse_known_args(argv)


def run(options: Namespace, train_options: list[str]) -> None:
    """Run the chosen parts of every seed, then the report."""
    sites = options.sites or default_sites(train_options)
    experiments = [Experiment(options, train_options, sites, seed) for seed in options.seeds]
    for experiment in experiments:
        for part in PARTS:
            if part not in options.only or part == "report":
                continue
            print(f"seed {experiment.seed}, {part}", flush=True)
            if part not in TRAININGS:
                measure_part(experiment, part)
                continue
            train_part(experiment, part)
            if part == "routed":
                save_shares(experiment)
    if "report" in options.only:
        report.write(experiments, options.docs or Path(options.output_dir))


def default_sites(train_options: list[str]) -> list[int]:
    """Return the sites of a RouteSAE that is told no others."""
    cfg = config.parse("train", train_options)
    demo.use_demo_defaults(cfg)
    sizes = lm.sizes_by_config(cfg.model_path, cfg.trust_remote_code)
    if not sizes:
        raise ValueError(f"the depth of {cfg.model_path} is not known; give --sites")
    return routed_sites(sizes[1])


def main(argv: list[str] | None = None) -> int:
    options, train_options = parse_args(argv)
    return exit_code("real_routing", lambda: run(options, train_options))


if __name__ == "__main__":
    sys.exit(main())
