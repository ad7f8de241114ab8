"""Any number of SAEs trained from one pass of the language model: a list of runs, each with its own optimiser and schedule."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from src import checkpoint, config, demo, files, hooks, lm, model
from src.data import Rows, open_rows
from src.ops import project_decoder_grad, unit_norm_decoder


def set_seed(seed: int) -> None:
    """Seeds random, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class LinearWarmupLR(torch.optim.lr_scheduler.LambdaLR):
    """Linear warm-up, constant, linear decay to 0 over the last fifth. The first step is not idle."""

    def __init__(self, optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int, max_lr: float | None = None) -> None:
        self.warmup, self.total = num_warmup_steps, max(1, num_training_steps)
        if max_lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = max_lr
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        return max(0.0, min(rising, (self.total - step) / max(1, math.ceil(0.2 * self.total))))


class SignSGD(torch.optim.Optimizer):
    """Steps of size lr along the sign of the gradient; schedule-free averaging around it gives it its momentum."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


def make_optimizer(name: str, params: list[Tensor], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """adam, or signum: the sign of the gradient in a schedule-free wrapper (Defazio et al. 2024), momentum .95."""
    if name == "adam":
        return torch.optim.Adam(params, lr=lr, betas=tuple(betas))
    import schedulefree

    return schedulefree.ScheduleFreeWrapper(SignSGD(params, lr), momentum=0.95, weight_decay_at_y=0.0)


def wandb_init(project: str, config: dict[str, Any], name: str) -> Any:
    """A Weights & Biases run, or None with the reason printed: logging there never stops a training."""
    try:
        import wandb

        return wandb.init(project=project, config=config, name=name)
    except Exception as error:  # optional service: network, login and version errors of every kind end here, printed
        print(f"no wandb logging ({type(error).__name__}: {error}); metrics.jsonl has every line")
        return None


def log_layers(layer_weights: Tensor) -> dict[str, float]:
    """Share of tokens per site of [...,L] routing weights."""
    share = torch.bincount(layer_weights.argmax(-1).flatten(), minlength=layer_weights.shape[-1]).float()
    return {f"share_{i}": float(s) for i, s in enumerate(share / share.sum())}


class Run:
    """One SAE in training."""

    def __init__(self, sae: model.SAE, title: str, options: dict[str, Any], cfg: Namespace, total_steps: int) -> None:
        self.lr = config.learning_rate(cfg, sae.name)
        self.sae, self.title, self.options, self.total = sae, title, options, total_steps
        apart = sae.adam_parameters() if cfg.optimizer != "adam" else []
        others = [p for p in sae.parameters() if all(p is not a for a in apart)]
        self.optimizers = [make_optimizer(cfg.optimizer, others, self.lr, cfg.betas)]
        if apart:
            self.optimizers.append(make_optimizer("adam", apart, 5e-4, cfg.betas))
        adams = [o for o in self.optimizers if isinstance(o, torch.optim.Adam)]
        self.schedules = [LinearWarmupLR(adam, round(0.05 * total_steps), total_steps) for adam in adams]
        self.clip, self.normalise_every = cfg.grad_clip, cfg.steps
        self.failed, self.sums, self.count, self.seconds = "", {}, 0, 0.0

    def mode(self, training: bool) -> None:
        """Schedule-free optimisers hold two sets of weights: those that get gradients and the average that is kept."""
        self.sae.train(training)
        for optimizer in self.optimizers:
            switch = getattr(optimizer, "train" if training else "eval", None)
            if switch is not None:
                switch()

    def step(self, hidden: dict[int, Tensor], token: Tensor, step: int) -> None:
        """One update. A loss that is not finite ends this run before the weights are touched."""
        started = time.perf_counter()
        p = self.sae.autoencode(self.sae.gather(hidden), token=token)
        terms = self.sae.loss(p)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            self.failed = f"{self.title}: loss is not finite at step {step} ({', '.join(f'{k} {float(v):.4g}' for k, v in terms.items())})"
            return
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        normalise = step % self.normalise_every == 0
        if self.normalise_every == 1:
            project_decoder_grad(self.sae)
        if self.clip:
            nn.utils.clip_grad_norm_(self.sae.parameters(), self.clip)
        for changing in (*self.optimizers, *self.schedules):
            changing.step()
        if normalise:
            unit_norm_decoder(self.sae)
        self.sae.after_step(p, (step + 1) / self.total)
        with torch.no_grad():
            now = {"loss": loss.detach()} | {k: v.detach() for k, v in terms.items()} | {"L0": p.latents.count_nonzero() / p.latents[..., 0].numel()}
            self.sums = {k: self.sums.get(k, 0.0) + v for k, v in now.items()}
            self.count += 1
            self.last = p
        self.seconds += time.perf_counter() - started

    def report(self) -> dict[str, Any]:
        """Means since the last report, dead share, and what the model adds."""
        line = {k: float(v) / self.count for k, v in self.sums.items()} if self.count else {}
        self.sums, self.count = {}, 0
        extra = self.sae.diagnostics(self.last)
        return line | {"dead": self.sae.dead_fraction()} | {k: v.tolist() if isinstance(v, Tensor) else v for k, v in extra.items()}


class Trainer:
    """Trains every combination of the chosen models and swept values from the same batches; `run()` returns the first SAE's loss."""

    def __init__(self, cfg: Namespace) -> None:
        self.cfg = cfg
        for line in config.unused(cfg):
            print(f"warning: {line}")
        demo.stand_in(cfg)
        config.complete(cfg)
        cfg.device = checkpoint.pick_device(cfg.device)
        self.folder = Path(cfg.output_dir) / files.SAE_DIR
        self.combinations = list(self._combine())
        self.titles = [self._title(name, swept) for name, _, swept in self.combinations]

    def _combine(self) -> Any:
        """(model, options, swept values) of every SAE to train: a model crosses only the lists it uses."""
        for name in self.cfg.model:
            options = config.model_options(self.cfg, name)
            lists = {key: options[key] for key in config.SWEPT if isinstance(options.get(key), list)}
            for values in itertools.product(*lists.values()):
                chosen = dict(zip(lists, values, strict=True))
                yield name, options | chosen, {key: value for key, value in chosen.items() if len(lists[key]) > 1}

    def _title(self, name: str, swept: dict[str, Any]) -> str:
        parts = [name, files.data_name(self.cfg.data_path), *(f"{key}{value:g}" for key, value in swept.items())]
        return "_".join(parts + ([files.safe_name(self.cfg.tag)] if self.cfg.tag else []))

    def _settings(self) -> dict[str, Any]:
        neutral = config.NEUTRAL | {"model", *config.SWEPT}
        return {key: value for key, value in sorted(vars(self.cfg).items()) if key not in neutral and key not in config.SECRET}

    def _todo(self) -> list[int]:
        """Which SAEs are not there yet. Raises ValueError where another recipe's result has the name."""
        missing = []
        for i, (title, (_, options, _)) in enumerate(zip(self.titles, self.combinations, strict=True)):
            recipe = None if self.cfg.overwrite else checkpoint.read_recipe(self.folder / f"{title}.pt")
            if recipe is None or not (self.folder / f"{title}.pt").exists():
                missing.append(i)
                continue
            wanted = json.loads(json.dumps({**self._settings(), **options}))
            differ = [f"{k} {recipe['options'].get(k)} -> {v}" for k, v in wanted.items() if recipe["options"].get(k) != v]
            if differ:
                raise ValueError(f"{self.folder / title}.pt was trained otherwise ({'; '.join(differ[:4])}); give --tag NAME or --overwrite")
            print(f"{title}: already trained ({self.folder / title}.pt)")
        return missing

    def run(self) -> float:
        cfg = self.cfg
        todo = self._todo()
        if not todo:
            return float(checkpoint.read_recipe(self.folder / f"{self.titles[0]}.pt")["final"]["loss"])
        for i in todo:  # impossible sizes are found before the language model is loaded
            name, options, _ = self.combinations[i]
            with torch.device("meta"):
                model.build(name, cfg.hidden_size or 2**20, cfg.n_layers or 2**10, options)
        self.folder.mkdir(parents=True, exist_ok=True)
        tokenizer, language_model = lm.get_language_model(cfg.model_path, cfg.device, cfg.dtype, cfg.trust_remote_code)
        sizes = {"hidden_size": lm.text_config(language_model).hidden_size, "n_layers": len(lm.blocks(language_model))}
        for name, found in sizes.items():
            if getattr(cfg, name) not in (None, found):
                raise ValueError(f"--{name} {getattr(cfg, name)}, but the language model has {found}; leave the flag out")
        rows = open_rows(cfg, tokenizer)
        per_epoch = math.ceil(len(rows) / cfg.batch_size)
        total = per_epoch * cfg.num_epochs
        runs = []
        for i in todo:
            set_seed(cfg.seed)  # each SAE starts as it would alone
            name, options, _ = self.combinations[i]
            sae = model.build(name, sizes["hidden_size"], sizes["n_layers"], options).to(cfg.device)
            runs.append(Run(sae, self.titles[i], options, cfg, total))
        return self._loop(runs, rows, language_model, per_epoch, total)

    def _loop(self, runs: list[Run], rows: Rows, language_model: nn.Module, per_epoch: int, total: int) -> float:
        cfg = self.cfg
        sites = sorted({site for run in runs for site in run.sae.sites()})
        print(f"{len(rows)} rows of {cfg.max_length} tokens, {total} steps; sites {sites}; {', '.join(run.title for run in runs)}")
        log = Path(cfg.output_dir) / files.RUN_DIR / files.safe_name(cfg.tag or "+".join(run.title for run in runs)) / "metrics.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        wandb = wandb_init(cfg.wandb_project, self._settings(), log.parent.name) if cfg.use_wandb else None
        tokens, started, every = 0, time.time(), max(1, total // 50)
        finals: dict[str, dict[str, Any]] = {}
        with open(log, "w", encoding="utf-8") as lines, tqdm(total=total, desc="training", unit=" steps", mininterval=1) as bar:
            for step in range(total):
                epoch, at = divmod(step, per_epoch)
                order = rows.order(cfg.seed, epoch)[at * cfg.batch_size : (at + 1) * cfg.batch_size]
                batch = rows.batch(order).to(cfg.device)
                hidden = hooks.read(language_model, batch, sites)
                keys = batch.token_keys() + epoch * len(rows) * cfg.max_length
                if not len(keys):
                    continue
                for run in [r for r in runs if not r.failed]:
                    if step == 0:
                        run.sae.warm_start(run.sae.gather(hidden))
                        unit_norm_decoder(run.sae)
                        run.mode(True)
                    run.step(hidden, keys, step)
                    if run.failed:
                        bar.write(run.failed)
                tokens += len(keys)
                bar.update()
                if (step + 1) % every == 0 or step + 1 == total:
                    speed = tokens / (time.time() - started)
                    for run in [r for r in runs if not r.failed]:
                        line = {"sae": run.title, "step": step + 1, "tokens": tokens, "tokens_per_s": round(speed), "lr": run.lr} | run.report()
                        if cfg.device == "cpu":  # elsewhere a step returns before its work is done
                            line["step_tokens_per_s"] = round(tokens / run.seconds)
                        finals[run.title] = line
                        lines.write(json.dumps(line) + "\n")
                        if wandb is not None:
                            wandb.log({f"{run.title}/{k}": v for k, v in line.items() if isinstance(v, int | float)}, step=step + 1)
                    lines.flush()
                    if finals:
                        shown = finals[next(iter(finals))]
                        bar.set_postfix({k: f"{shown[k]:.3g}" for k in ("NormMSE", "L0", "dead") if k in shown}, tok_s=round(speed))
        for run in runs:
            if not run.failed:
                run.mode(False)
                unit_norm_decoder(run.sae)
                self._save(run, finals[run.title], rows, tokens, sites)
        if any(run.failed for run in runs):
            raise ValueError("; ".join(run.failed for run in runs if run.failed) + "; lower --lr (the other SAEs are saved)")
        return finals[runs[0].title]["loss"]

    def _save(self, run: Run, final: dict[str, Any], rows: Rows, tokens: int, sites: list[int]) -> None:
        cfg = self.cfg
        recipe = {
            "model": run.sae.name, "config": run.sae.config, "sites": run.sae.sites(), "options": self._settings() | run.options,
            "model_path": str(cfg.model_path), "data_path": str(cfg.data_path), "data_fingerprint": rows.fingerprint, "tokens": tokens,
            "seed": cfg.seed, "device": cfg.device, "final": final, **checkpoint.environment(),
        }
        path = checkpoint.save(run.sae, recipe, self.folder, run.title)
        shown = {k: v for k, v in final.items() if isinstance(v, float)}
        print(f"saved {path}  " + "  ".join(f"{k} {v:.4g}" for k, v in shown.items() if k != "lr"))
