"""Any number of SAEs trained from one pass of the language model: a list of runs, each with its own optimiser and schedule."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from src import checkpoint, config, demo, distributed, files, hooks, lm, model
from src.data import Rows, open_rows
from src.device import pick_device
from src.estimate import Estimate
from src.ops import unit_norm_decoder
from src.sae_training import LocalBatch, SAETraining
from src.tracking import wandb_init

REPORTS, APART = (
    50,
    10,
)  # reports of a run; of a short one fewer, down to 10, to be so many steps apart: one costs as much as a forward pass


def set_seed(seed: int) -> None:
    """Seeds random, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Interrupted(KeyboardInterrupt):
    """Ended by a signal: exit code 130 for SIGINT, 143 for the others."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = 130 if number == signal.SIGINT else 143


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 while it is entered. A first one raises Interrupted, or once `in_loop` is set only says so in `asked`;
    a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked, self.in_loop, self.before = 0, False, {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other thread may set them
            self.before = {
                number: signal.signal(number, self._heard)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
            }
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _frame: Any) -> None:
        for every in self.before:
            signal.signal(every, signal.SIG_DFL)
        self.asked = number
        if not self.in_loop:
            raise Interrupted(number, "nothing was trained yet")


def random_state() -> dict[str, Any]:
    """The states of all global generators, in types that load safely."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what random_state() gave."""
    torch.set_rng_state(state["torch"])
    if (
        len(state["cuda"]) == torch.cuda.device_count()
    ):  # else the run has moved to another machine, which was warned of
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(
        (state["numpy"][0], np.asarray(state["numpy"][1], dtype=np.uint32), *state["numpy"][2:])
    )


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(option, saved value, wanted value) where the two differ; an option that is younger than what was saved had its default then."""
    before = {
        key: saved.get(key, config.OPTIONS[key].default if key in config.OPTIONS else None)
        for key in wanted
    }
    return [(key, before[key], value) for key, value in wanted.items() if before[key] != value]


def _sae_of(line: bytes) -> Any:
    """Whose line of metrics.jsonl it is."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return files.parse_json(line.decode("utf-8")).get("sae")
    return None


def said(value: Any) -> str:
    """An option's value as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class Trainer:
    """Trains every combination of the chosen models and swept values from the same batches; `run()` returns the first SAE's loss."""

    def __init__(self, cfg: Namespace) -> None:
        self.cfg = cfg
        for line in config.unused(cfg):
            print(f"warning: {line}")
        demo.use_demo_defaults(cfg)
        config.complete(cfg)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        cfg.device = pick_device(cfg.device)
        self.folder = Path(cfg.output_dir) / files.SAE_DIR
        self.combinations = list(self._combine())
        self.titles = [self._title(name, swept) for name, _, swept in self.combinations]
        self.home = (
            Path(cfg.output_dir) / files.RUN_DIR / files.safe_name(cfg.tag or "+".join(self.titles))
        )
        self.states, self.log = self.home / "state", self.home / "metrics.jsonl"

    def _combine(self) -> Any:
        """(model, options, swept values) of every SAE to train: a model crosses only the lists it uses."""
        for name in self.cfg.model:
            options = config.model_options(self.cfg, name)
            lists = {
                key: options[key] for key in config.SWEPT if isinstance(options.get(key), list)
            }
            for values in itertools.product(*lists.values()):
                chosen = dict(zip(lists, values, strict=True))
                yield (
                    name,
                    options | chosen,
                    {key: value for key, value in chosen.items() if len(lists[key]) > 1},
                )

    def _title(self, name: str, swept: dict[str, Any]) -> str:
        parts = [
            name,
            files.data_name(self.cfg.data_path),
            *(f"{key}{value:g}" for key, value in swept.items()),
        ]
        return "_".join(parts + ([files.safe_name(self.cfg.tag)] if self.cfg.tag else []))

    def _settings(self) -> dict[str, Any]:
        neutral = config.NEUTRAL | {"model", *config.SWEPT}
        return {
            key: value
            for key, value in sorted(vars(self.cfg).items())
            if key not in neutral and key not in config.SECRET
        }

    def _todo(self) -> list[int]:
        """Which SAEs are not there yet. Raises ValueError where another recipe's result has the name."""
        missing = []
        for i, (title, (_, options, _)) in enumerate(
            zip(self.titles, self.combinations, strict=True)
        ):
            recipe = (
                None if self.cfg.overwrite else checkpoint.read_recipe(self.folder / f"{title}.pt")
            )
            if recipe is None or not (self.folder / f"{title}.pt").exists():
                missing.append(i)
                continue
            wanted = json.loads(json.dumps({**self._settings(), **options}))
            differ = [
                f"{key} {old} -> {new}" for key, old, new in differences(recipe["options"], wanted)
            ]
            if differ:
                raise ValueError(
                    f"{self.folder / title}.pt was trained otherwise ({'; '.join(differ[:4])}); give --tag NAME or --overwrite"
                )
            print(f"{title}: already trained ({self.folder / title}.pt)")
        return missing

    def _wanted(self) -> dict[str, Any]:
        """Every option that decides what this run trains, as JSON gives it back."""
        lists = {key: getattr(self.cfg, key) for key in ("model", *config.SWEPT)}
        runs = {
            title: options
            for title, (_, options, _) in zip(self.titles, self.combinations, strict=True)
        }
        return json.loads(json.dumps({"options": self._settings() | lists, "runs": runs}))

    def _unfinished(self) -> tuple[Path, dict[str, Any]] | None:
        """The state to continue from. Raises ValueError where one is there that must not be continued or cannot be."""
        if self.cfg.resume == "never" and checkpoint.states(self.states):
            if not self.cfg.overwrite:
                raise ValueError(
                    f"{self.home} holds an unfinished run; leave out --resume never to continue it, or add --overwrite to start again"
                )
            shutil.rmtree(self.states)
        found = checkpoint.find_state(self.states)
        if found is None:
            if self.log.exists() and self.log.stat().st_size:
                print(f"{self.home}: no saved state; beginning at step 0")
            return None
        path, meta = found
        wanted = self._wanted()
        differ = [
            f"--{key} {said(old)} -> {said(new)}"
            for key, old, new in differences(meta["options"], wanted["options"])
        ]
        for title, options in wanted["runs"].items():
            differ += [
                f"{title}: {key} {old} -> {new}"
                for key, old, new in differences(meta["runs"].get(title, options), options)
            ]
        if differ:
            again = "give the same options, --tag NAME for another run, or --resume never --overwrite to start again"
            unfinished = f"{self.home} holds an unfinished run, stopped at step {meta['step']}, with other options"
            raise ValueError(f"{unfinished} ({'; '.join(differ[:4])}); {again}")
        here = {"device": self.cfg.device, **checkpoint.environment()}
        for what in ("device", "threads", "versions"):
            if meta[what] != here[what]:
                print(
                    f"warning: saved with {what} {said(meta[what])}, continued with {said(here[what])}; the last bits may differ"
                )
        return path, meta

    def run(self) -> float:
        cfg = self.cfg
        todo = distributed.from_main(self._todo)
        if not todo:
            if distributed.main() and self.states.exists():
                with files.locked(self.home):
                    shutil.rmtree(self.states)
            return float(
                checkpoint.read_recipe(self.folder / f"{self.titles[0]}.pt")["final"]["loss"]
            )
        self._try_to_build(
            todo, cfg.hidden_size or 2**20, cfg.n_layers or 2**10
        )  # before the language model is loaded
        shared = (
            [] if cfg.tag else [self.home.parent / files.safe_name(title) for title in self.titles]
        )  # with an SAE that trains alone elsewhere
        runs_of = list(dict.fromkeys([self.home, *shared]))
        for folder in (self.folder, *runs_of):
            distributed.from_main(lambda folder=folder: files.probe(folder))
        with contextlib.ExitStack() as stack, Signals() as self.signals:
            for folder in runs_of:
                distributed.from_main(
                    lambda folder=folder: stack.enter_context(files.locked(folder))
                )
            saved = distributed.from_main(self._unfinished)
            if saved is not None:
                todo = [
                    i
                    for i, title in enumerate(self.titles)
                    if title in saved[1]["training"] or i in todo
                ]
                new = [self.titles[i] for i in todo if self.titles[i] not in saved[1]["training"]]
                if new:
                    raise ValueError(
                        f"the unfinished run in {self.home} does not train {', '.join(new)}; give --tag NAME"
                    )
            tokenizer, language_model = lm.get_language_model(
                cfg.model_path, cfg.device, cfg.dtype, cfg.trust_remote_code, cfg.device_map
            )
            sizes = {
                "hidden_size": lm.text_config(language_model).hidden_size,
                "n_layers": len(lm.blocks(language_model)),
            }
            for name, found in sizes.items():
                if getattr(cfg, name) not in (None, found):
                    raise ValueError(
                        f"--{name} {getattr(cfg, name)}, but the language model has {found}; leave the flag out"
                    )
            self._try_to_build(todo, **sizes)  # before a long text is tokenised
            lm.check_length(language_model, cfg.max_length)
            rows = distributed.main_first(lambda: open_rows(cfg, tokenizer))
            total = math.ceil(len(rows) / cfg.batch_size) * cfg.num_epochs
            runs = []
            for i in todo:
                set_seed(cfg.seed)  # each SAE starts as it would alone
                name, options, _ = self.combinations[i]
                sae = model.build(name, sizes["hidden_size"], sizes["n_layers"], options).to(
                    cfg.device
                )
                runs.append(SAETraining(sae, self.titles[i], options, cfg, total))
            mine = distributed.share(min(cfg.batch_size, len(rows)))
            lm.compile_if_it_pays(cfg, language_model, mine.stop - mine.start, total)
            self.estimate = Estimate(
                cfg, [run.sae for run in runs], language_model, rows, total, self.home
            )
            return self._loop(runs, rows, language_model, total, saved)

    def _try_to_build(self, todo: list[int], hidden_size: int, n_layers: int) -> None:
        """Raises ValueError for values that cannot be."""
        for i in todo:
            name, options, _ = self.combinations[i]
            with torch.device("meta"):
                model.build(name, hidden_size, n_layers, options)

    def _loop(
        self,
        runs: list[SAETraining],
        rows: Rows,
        language_model: nn.Module,
        total: int,
        saved: tuple[Path, dict[str, Any]] | None,
    ) -> float:
        cfg, signals, per_epoch = self.cfg, self.signals, math.ceil(len(rows) / self.cfg.batch_size)
        sites = sorted({site for run in runs for site in run.sae.sites()})
        print(
            f"{len(rows)} rows of {cfg.max_length} tokens, {total} steps; sites {sites}; {', '.join(run.title for run in runs)}"
        )
        self.text_sum = hashlib.sha256(np.ascontiguousarray(rows.tokens)).hexdigest()
        if distributed.from_main(lambda: self.text_sum) != self.text_sum:
            raise ValueError(
                f"the text is not the main process's ({cfg.data_path} differs between the machines); copy it anew"
            )
        at = Namespace(step=0, tokens=0, seconds=0.0, log_bytes=0, finals={})
        if saved is not None:
            path, meta = saved
            if (meta["text_sum"], meta["rows"]) != (self.text_sum, len(rows)):
                raise ValueError(
                    f"the text is not the one the run in {self.home} was stopped on ({meta['rows']} rows then, {len(rows)} now)"
                )
            vars(at).update(meta["at"])
            for run in runs:
                run.restore(checkpoint.load_part(path, run.title))
            set_random_state(checkpoint.load_part(path, "random"))
            print(f"continuing at step {at.step} of {total} ({path})")
        wandb = (
            wandb_init(cfg.wandb_project, self._settings(), self.home.name, self.home)
            if cfg.use_wandb and distributed.main()
            else None
        )
        started, every, saved_at = (
            time.time() - at.seconds,
            max(1, min(APART, total // 10), total // REPORTS),
            (at.step, time.monotonic()),
        )
        distributed.from_main(
            lambda: None
        )  # a step waits 45 s for the others, who may still be reading
        signals.in_loop = True
        log = self._log_from(at.log_bytes, {run.title for run in runs})
        with (
            log as lines,
            tqdm(
                total=total, initial=at.step, desc="training", unit=" steps", mininterval=1
            ) as bar,
        ):
            for step in range(at.step, total):
                alive = [run for run in runs if not run.failed]
                if not alive:
                    break
                order = self._rows_of(rows, step)
                batch, mine = rows.batch(order), distributed.share(len(order))
                whole, first = int(batch.mask.sum()), int(batch.mask[: mine.start].sum())
                due = (step + 1) % every == 0 or step + 1 == total
                if whole:
                    part = batch.part(mine)
                    keys = (part.token_keys() + step // per_epoch * len(rows) * cfg.max_length).to(
                        cfg.device
                    )
                    hidden = hooks.read(language_model, part.to(cfg.device), sites)
                    local = LocalBatch(hidden, keys, whole, first)
                    for run in alive:
                        if not at.tokens:
                            run.warm_start(local)
                        self._step(run, local, step, due)
                    at.tokens += whole
                bar.update()
                at.step, at.seconds = step + 1, time.time() - started
                amount, unit = cfg.save_every
                passed = (
                    at.step - saved_at[0] if unit == "steps" else time.monotonic() - saved_at[1]
                )
                signals.asked, saves = distributed.all_max_ints(
                    signals.asked, bool(amount) and passed >= amount
                )
                saves = at.step < total and (signals.asked or saves)
                if due or saves or cfg.device == "cpu":
                    self._find_failed(alive, rows, language_model, sites, bar)
                if due:
                    self._report(runs, at, lines, bar, wandb)
                if saves:
                    path = distributed.from_main(
                        lambda: self._save_state(runs, at, lines, len(rows))
                    )
                    saved_at = at.step, time.monotonic()
                    if signals.asked:
                        again = " without --resume never" * (cfg.resume == "never")
                        raise Interrupted(
                            signals.asked,
                            f"step {at.step} of {total} is saved in {path}; the same command{again} continues",
                        )
        if wandb is not None:
            wandb.finish()
        return self._finish(runs, rows, at)

    def _step(self, run: SAETraining, batch: LocalBatch, step: int, due: bool) -> None:
        try:
            run.step(batch, step, due)
        except torch.OutOfMemoryError as error:
            slices = "with one token at a time; train fewer SAEs at once, or a smaller one"
            if distributed.world() > 1:
                slices = f"in {run.parts} parts; run the same command again (it tries more of them), or train fewer SAEs at once"
            raise ValueError(f"{run.title}: out of memory at step {step} {slices}") from error

    def _find_failed(
        self,
        alive: list[SAETraining],
        rows: Rows,
        language_model: nn.Module,
        sites: list[int],
        bar: tqdm,
    ) -> None:
        """Marks the runs with a loss or gradient that was not finite and keeps each one's batch for whoever wants to know why."""
        for run in alive:
            run.check()
            if not run.failed:
                continue
            dump = self.home / f"nonfinite-{run.title}-step{run.failed_at}.json"
            batch = rows.batch(self._rows_of(rows, run.failed_at))
            hidden = hooks.read(
                language_model,
                batch.part(distributed.share(len(batch.row))).to(self.cfg.device),
                sites,
            )
            finite = distributed.all_max_ints(
                *(not torch.isfinite(h).all() for h in hidden.values())
            )
            bad = [site for site, odd in zip(hidden, finite, strict=True) if odd]
            where = {
                "rows": batch.row.tolist(),
                "input_ids": batch.input_ids.tolist(),
                "mask": batch.mask.tolist(),
            }
            said = {
                "sae": run.title,
                "step": run.failed_at,
                "said": run.failed,
                "sites_not_finite": bad,
                **where,
            }
            distributed.from_main(
                lambda said=said, dump=dump: files.save_json(said, dump, indent=None)
            )
            run.failed += f", its batch is in {dump}"
            bar.write(run.failed)

    def _rows_of(self, rows: Rows, step: int) -> np.ndarray:
        """Numbers of the rows of a step's batch, whatever the number of processes."""
        epoch, index = divmod(step, math.ceil(len(rows) / self.cfg.batch_size))
        return rows.order(self.cfg.seed, epoch)[
            index * self.cfg.batch_size : (index + 1) * self.cfg.batch_size
        ]

    def _log_from(self, size: int, titles: set[str]) -> BinaryIO:
        """metrics.jsonl, cut to what it held when the state was saved: no line twice. At a run's beginning: to the lines of other SAEs."""
        if not distributed.main():
            return open(os.devnull, "ab", buffering=0)
        lines = files.open_to_append(self.log, "ab", buffering=0)
        if not size:
            there = self.log.read_bytes()
            others = b"".join(
                line
                for line in io.BytesIO(there)
                if line.endswith(b"\n") and _sae_of(line) not in titles
            )
            if others != there:
                lines.close()
                files.write_atomic(self.log, lambda file: file.write(others))
                lines = files.open_to_append(self.log, "ab", buffering=0)
            size = len(others)
        if lines.tell() < size:
            print(
                f"warning: {self.log} is shorter than when the state was saved; lines are missing there"
            )
        lines.truncate(min(size, lines.tell()))
        return lines

    def _report(
        self, runs: list[SAETraining], at: Namespace, lines: BinaryIO, bar: tqdm, wandb: Any
    ) -> None:
        """One line of metrics.jsonl for each run that goes on."""
        speed = at.tokens / max(at.seconds, 1e-9)
        for run in [r for r in runs if not r.failed]:
            line = {
                "sae": run.title,
                "sites": run.sae.sites(),
                "step": at.step,
                "tokens": at.tokens,
                "tokens_per_s": round(speed),
                "lr": run.lr,
            }
            line |= run.report()
            if self.cfg.device == "cpu":  # elsewhere a step returns before its work is done
                line["step_tokens_per_s"] = round(at.tokens / max(run.seconds, 1e-9))
            at.finals[run.title] = line
            files.append(lines, json.dumps(line).encode() + b"\n")
            if wandb is not None:
                wandb.log(
                    {f"{run.title}/{k}": v for k, v in line.items() if isinstance(v, int | float)},
                    step=at.step,
                )
        if at.finals:
            shown = at.finals[next(iter(at.finals))]
            bar.set_postfix(
                {k: f"{shown[k]:.3g}" for k in ("NormMSE", "L0", "dead") if k in shown},
                tok_s=round(speed),
            )

    def _save_state(
        self, runs: list[SAETraining], at: Namespace, lines: BinaryIO, n_rows: int
    ) -> Path:
        """All that the rest of the run depends on. Raises OSError where it cannot be written; the states before stay as they are."""
        os.fsync(lines.fileno())
        at.log_bytes = lines.tell()
        meta = self._wanted() | {
            "training": [run.title for run in runs],
            "at": vars(at),
            "text_sum": self.text_sum,
            "rows": n_rows,
            "device": self.cfg.device,
            **checkpoint.environment(),
        }
        parts = {run.title: run.state() for run in runs} | {"random": random_state()}
        try:
            return checkpoint.save_state(self.states, at.step, meta, parts)
        except OSError as error:
            there = [path.name for path in checkpoint.states(self.states)]
            kept = f"{there[0]} is intact" if there else "none was saved before"
            free = shutil.disk_usage(self.home).free / 1e6
            raise OSError(
                f"cannot save the state of step {at.step} in {self.states} ({error.strerror or error}; {free:.0f} MB free); {kept}: mend that and "
                "run the same command again"
            ) from error

    def _finish(self, runs: list[SAETraining], rows: Rows, at: Namespace) -> float:
        """Final weights and recipes; then the state to continue from is not needed any more. Raises ValueError where no token counted."""
        if not at.tokens:
            raise ValueError("no counted token in the rows; use more text or longer rows")
        used = self.estimate.compare(at.seconds)
        for run in runs:
            if not run.failed:
                run.mode(False)
                unit_norm_decoder(run.sae)
                distributed.from_main(
                    lambda run=run: self._save(run, at.finals[run.title], rows, at.tokens, used)
                )
        if distributed.main():
            shutil.rmtree(self.states, ignore_errors=True)
        if any(run.failed for run in runs):
            raise ValueError(
                "; ".join(run.failed for run in runs if run.failed)
                + "; lower --lr (the other SAEs are saved)"
            )
        return at.finals[runs[0].title]["loss"]

    def _save(
        self,
        run: SAETraining,
        final: dict[str, Any],
        rows: Rows,
        tokens: int,
        used: dict[str, float],
    ) -> None:
        cfg = self.cfg
        recipe = {
            "model": run.sae.name,
            "config": run.sae.config,
            "sites": run.sae.sites(),
            "options": self._settings() | run.options,
            "model_path": str(cfg.model_path),
            "data_path": str(cfg.data_path),
            "data_fingerprint": rows.fingerprint,
            "tokens": tokens,
            "seed": cfg.seed,
            "device": cfg.device,
            "final": final,
            "estimate": used,
            **checkpoint.environment(),
        }
        path = checkpoint.save(run.sae, recipe, self.folder, run.title)
        shown = {k: v for k, v in final.items() if isinstance(v, float)}
        print(f"saved {path}  " + "  ".join(f"{k} {v:.4g}" for k, v in shown.items() if k != "lr"))
