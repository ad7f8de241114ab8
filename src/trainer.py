"""Any number of SAEs trained from one pass of the language model.

Each SAE has its own optimiser and schedule, and ends with the weights of a training alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import random
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from src import (
    checkpoint,
    config,
    demo,
    distributed,
    files,
    hooks,
    identity,
    lm,
    model,
    names,
    zoo,
)
from src.data import Batch, Rows
from src.device import join_passes, limit_freed_memory, pick_device
from src.estimate import Estimate, of_training
from src.interrupt import Interrupted, Signals
from src.sae import SAE, Patch
from src.sae_training import SOURCE_SUM, LocalBatch, SAETraining
from src.tracking import wandb_init

# About 50 reports, at least 10 steps apart; each costs a forward pass. Runs of fewer than 100
# steps report about ten times.
MAX_REPORTS = 50
MIN_SPACING = 10
LOG_NAME = "metrics.jsonl"
STATES_NAME = "state"
EQUAL_STATES = 1e-6  # the largest difference of equal states, a share of their largest value
MAX_DIFFERENCES = 4  # in a message
# What the bar and the final table show of a report, with the unit in the table.
SHOWN = {"NormMSE": "share of norm", "L0": "latents/token", "dead": "of latents"}
TABLE_COLUMN = 15  # characters
# Steps after which L0 is near --target_l0: 123 end within 7 % of it (docs/LOG.md). And how far L0
# may end without a warning.
CONTROL_STEPS = 120
L0_TOLERANCE = 0.1
MAX_NORM_ERROR = 0.01  # of the decoder columns of another SAE, which training keeps at 1


def set_seed(seed: int) -> None:
    """Seed random, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _use_deterministic_algorithms() -> None:
    # CUDA reads the variable when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _probe(folders: list[Path]) -> None:
    for folder in folders:
        files.probe(folder)


def _lock(folders: list[Path], stack: contextlib.ExitStack) -> None:
    for folder in folders:
        stack.enter_context(files.locked(folder))


def _as_json(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value))


def as_typed(value: Any) -> str:
    """Return the value of an option as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Return 'option saved -> wanted' for each option with another value."""
    result = []
    for key, value in ({SOURCE_SUM: None} | wanted).items():
        # An option that is younger than what was saved had its default value then.
        default = config.OPTIONS[key].default if key in config.OPTIONS else None
        old = saved.get(key, default)
        if old != value:
            result.append(f"{prefix}{key} {as_typed(old)} -> {as_typed(value)}")
    return result


# -------------------------------------------------------------------------------- metrics.jsonl


def _title_in(line: bytes) -> str | None:
    """Return the title of the SAE that a line is about, None for a damaged line."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return str(files.parse_json(line.decode("utf-8")).get("sae"))
    return None


def open_log(path: Path, size: int, titles: set[str]) -> BinaryIO:
    """Open metrics.jsonl to append, cut to the size it had in the saved state.

    A step that is repeated then leaves no second line. At the beginning of a run the size is 0:
    complete lines of other SAEs stay. Processes other than the main one write nothing.
    """
    if not distributed.main():
        return open(os.devnull, "ab", buffering=0)
    file = files.open_to_append(path, "ab", buffering=0)
    if not size:
        content = path.read_bytes()
        # Like the readers of the file, BytesIO splits it at line feeds alone.
        complete = [line for line in io.BytesIO(content) if line.endswith(b"\n")]
        kept = b"".join(line for line in complete if _title_in(line) not in titles)
        if kept != content:
            file.close()
            files.write_atomic(path, lambda new: new.write(kept))
            file = files.open_to_append(path, "ab", buffering=0)
        size = len(kept)
    if file.tell() < size:
        print(f"warning: {path} is shorter than when the state was saved; it lacks lines")
    file.truncate(min(size, file.tell()))
    return file


# --------------------------------------------------------------------------------------- the steps


@dataclasses.dataclass
class Progress:
    """How far a run has come. Saved states keep it."""

    step: int = 0  # number of steps made
    tokens: int = 0  # counted tokens of these steps
    seconds: float = 0.0  # also those before an interruption
    log_bytes: int = 0  # size of metrics.jsonl when the state was saved
    finals: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # last reports


class TrainingLoop:
    """The steps of a run, its reports and its saved states.

    requested: the options that every saved state records, so that no other run continues it.
    """

    log_file: BinaryIO  # open while run() runs, like `bar`
    bar: tqdm

    def __init__(
        self,
        cfg: Namespace,
        trainings: list[SAETraining],
        rows: Rows,
        language_model: nn.Module,
        run_folder: Path,
        requested: dict[str, Any],
    ) -> None:
        self.cfg = cfg
        self.trainings = trainings
        self.titles = [training.title for training in trainings]
        self.rows = rows
        self.language_model = language_model
        self.run_folder = run_folder
        self.states = run_folder / STATES_NAME
        self.requested = requested
        self.wandb: Any = None
        self.progress = Progress()
        self.steps_per_epoch = math.ceil(len(rows) / cfg.batch_size)
        self.total = trainings[0].total  # it is the same for all
        self.finish_step = self.total - round(cfg.kl_finish * self.total)
        spacing = min(MIN_SPACING, self.total // 10)
        self.report_every = max(1, spacing, self.total // MAX_REPORTS)
        self.sites = sorted({site for training in trainings for site in training.sae.sites()})
        self._announce()
        self.text_sum = identity.of_tokens(rows.tokens)

    def _announce(self) -> None:
        """Print what is trained on what."""
        cfg = self.cfg
        parameter = next(self.language_model.parameters())
        dtype = str(parameter.dtype).removeprefix("torch.")
        print(f"device {cfg.device}; language model {cfg.model_path} in {dtype}, SAEs in float32")
        width = max(map(len, self.titles))
        for training in self.trainings:
            sae = training.sae
            size = f"{sae.latent_size:,} latents" + (f", k {sae.k}" if sae.k else "")
            print(f"  {training.title:<{width}}  {names.sites(sae.sites())}, {size}")
        print(f"{len(self.rows):,} rows of {cfg.max_length} tokens, {self.total:,} steps")

    def restore(self, path: Path, meta: dict[str, Any]) -> None:
        """Continue from a saved state. Raises ValueError for another language model or text."""
        difference = identity.language_model_difference(
            meta.get("language_model"), self.requested["language_model"]
        )
        if difference:
            raise ValueError(
                f"the language model is not the one with which the run in {self.run_folder} was "
                f"stopped: {difference}; give the same one (--model_path, --dtype), or --tag NAME "
                "for another run"
            )
        if (meta["text_sum"], meta["rows"]) != (self.text_sum, len(self.rows)):
            raise ValueError(
                f"the text is not the one on which the run in {self.run_folder} was stopped "
                f"({meta['rows']} rows then, {len(self.rows)} now); give the same text, or "
                "--tag NAME for another run"
            )
        self.progress = Progress(**meta["at"])
        for training in self.trainings:
            training.restore(checkpoint.load_part(path, training.title))
        checkpoint.set_random_state(checkpoint.load_part(path, "random"))
        print(f"continuing at step {self.progress.step} of {self.total} ({path})")

    def run(self, signals: Signals) -> None:
        """Make the steps that are left. Raises Interrupted after a signal, with the state saved."""
        progress = self.progress
        start_time = time.monotonic() - progress.seconds
        self._mark_saved()
        # Within a step a process waits 45 s for the others, which may still be reading states.
        distributed.from_main(lambda: None)
        signals.is_deferred = True
        self.log_file = open_log(self.run_folder / LOG_NAME, progress.log_bytes, set(self.titles))
        self.bar = tqdm(
            total=self.total, initial=progress.step, desc="training", unit=" steps", mininterval=1
        )
        with self.log_file, self.bar:
            for step in range(progress.step, self.total):
                active = [training for training in self.trainings if not training.failed]
                if not active:
                    break
                report_due = (step + 1) % self.report_every == 0 or step + 1 == self.total
                self._step(step, active, report_due)
                self.bar.update()
                progress.step = step + 1
                progress.seconds = time.monotonic() - start_time
                self._after_step(active, report_due, signals)
                limit_freed_memory()
        if self.wandb is not None:
            self.wandb.finish()

    def _row_numbers(self, step: int) -> np.ndarray:
        """Return the rows of a step, whatever the number of processes."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.cfg.batch_size
        return self.rows.order(self.cfg.seed, epoch)[start : start + self.cfg.batch_size]

    def _step(self, step: int, active: list[SAETraining], report_due: bool) -> None:
        batch = self.rows.batch(self._row_numbers(step))
        batch_tokens = int(batch.mask.sum())
        if not batch_tokens:
            return
        local_rows = distributed.share(len(batch.row))
        token_offset = int(batch.mask[: local_rows.start].sum())
        local = batch.part(local_rows)
        # Other keys in each epoch, so that what is drawn for a token differs between epochs.
        epoch_offset = step // self.steps_per_epoch * len(self.rows) * self.cfg.max_length
        keys = (local.token_keys() + epoch_offset).to(self.cfg.device)
        read = self._read_for_kl if step >= self.finish_step else self._read
        local_batch = read(local.to(self.cfg.device), batch, keys, token_offset)
        if not self.progress.tokens:
            _warn_of_equal_states(local_batch.hidden)
        for training in active:
            if not self.progress.tokens:
                training.warm_start(local_batch)
            if step == self.finish_step:
                training.begin_kl_finish()
            _update(training, local_batch, step, report_due)
        self.progress.tokens += batch_tokens

    def _read(self, local: Batch, batch: Batch, keys: Tensor, token_offset: int) -> LocalBatch:
        """Return this process's tokens of a batch."""
        hidden = hooks.read(self.language_model, local, self.sites)
        return LocalBatch(hidden, keys, int(batch.mask.sum()), token_offset)

    def _read_for_kl(
        self, local: Batch, batch: Batch, keys: Tensor, token_offset: int
    ) -> LocalBatch:
        """Return the same with the KL of patched passes, a share of the whole batch's mean."""
        clean = hooks.CleanPass(self.language_model, local, self.sites)
        n_predictions = max(1, int(hooks.predictions(batch.mask).sum()))

        def patched_kl(tokens: slice, patches: Mapping[int, Patch]) -> Tensor:
            return clean.total_kl(tokens, patches) / n_predictions

        return LocalBatch(
            clean.hidden(), keys, int(batch.mask.sum()), token_offset, clean.row_ends, patched_kl
        )

    def _after_step(self, active: list[SAETraining], report_due: bool, signals: Signals) -> None:
        # `received` stays as it is: a signal may come while the processes agree.
        number, save_due = distributed.all_max_ints(signals.received, self._is_save_due())
        save = self.progress.step < self.total and (number or save_due)
        # On CUDA, reading what failed would wait for the step to end.
        if report_due or save or self.cfg.device == "cpu":
            self._check(active)
        if report_due:
            self._report()
        if not save:
            return
        path = distributed.from_main(self._save_state)
        self._mark_saved()
        if number:
            command = "the same command"
            if self.cfg.resume == "never":  # which would refuse the state
                command += " without --resume never"
            done = f"step {self.progress.step} of {self.total} is saved in {path}"
            raise Interrupted(number, f"{done}; {command} continues")

    # ------------------------------------------------------------------------------ saved states

    def _mark_saved(self) -> None:
        self.saved_step = self.progress.step
        self.saved_time = time.monotonic()

    def _is_save_due(self) -> bool:
        interval, unit = self.cfg.save_every
        passed = time.monotonic() - self.saved_time
        if unit == "steps":
            passed = self.progress.step - self.saved_step
        return bool(interval) and passed >= interval

    def _save_state(self) -> Path:
        """Save all that the rest of the run depends on; return the folder.

        Raises OSError if it cannot be written; the earlier states stay as they are.
        """
        os.fsync(self.log_file.fileno())
        self.progress.log_bytes = self.log_file.tell()
        meta = self.requested | {
            "training": self.titles,
            "at": vars(self.progress),
            "text_sum": self.text_sum,
            "rows": len(self.rows),
            "device": self.cfg.device,
            **checkpoint.environment(),
        }
        parts = {training.title: training.state() for training in self.trainings}
        parts["random"] = checkpoint.random_state()
        try:
            return checkpoint.save_state(self.states, self.progress.step, meta, parts)
        except OSError as error:
            earlier = checkpoint.states(self.states)
            kept = f"{earlier[0].name} is intact" if earlier else "none was saved before"
            free = shutil.disk_usage(self.run_folder).free / 1e6
            raise OSError(
                f"cannot save the state of step {self.progress.step} in {self.states} "
                f"({error.strerror or error}; {free:.0f} MB free); {kept}: remove the cause and "
                "run the same command again"
            ) from error

    # ----------------------------------------------------------------------- reports and failures

    def _report(self) -> None:
        """Write one line of metrics.jsonl for each SAE that has not failed."""
        progress = self.progress
        speed = round(progress.tokens / max(progress.seconds, 1e-9))
        for training in self.trainings:
            if training.failed or not training.count:  # no token counted since the last report
                continue
            line = {
                "sae": training.title,
                "sites": training.sae.sites(),
                "step": progress.step,
                "tokens": progress.tokens,
                "tokens_per_s": speed,
                "lr": training.lr,
            }
            line |= training.report()
            # On CUDA a step returns before its work is done.
            if self.cfg.device == "cpu":
                line["step_tokens_per_s"] = round(progress.tokens / max(training.seconds, 1e-9))
            progress.finals[training.title] = line
            files.append(self.log_file, json.dumps(line).encode() + b"\n")
            if self.wandb is not None:
                numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
                sent = {f"{training.title}/{name}": value for name, value in numbers.items()}
                self.wandb.log(sent, step=progress.step)
        if progress.finals:
            first = next(iter(progress.finals.values()))
            shown = [f"{name} {first[name]:.3g}" for name in SHOWN if name in first]
            self.bar.set_postfix_str(f"{first['sae']}: {', '.join(shown)}; {speed:,} tokens/s")

    def _check(self, active: list[SAETraining]) -> None:
        """Find SAEs with a loss or gradient that was not finite, and save the batch of each."""
        for training in active:
            training.check()
            if training.failed:
                path, overflown = self._save_batch(training)
                training.failed += f", its batch is in {path}; "
                if overflown:
                    training.failed += hooks.overflow(overflown[0], self.language_model)
                else:
                    training.failed += "lower --lr"
                self.bar.write(training.failed)

    def _save_batch(self, training: SAETraining) -> tuple[Path, list[int]]:
        """Save the batch at which an SAE failed; return the file and the sites that overflow."""
        step = training.failed_step
        batch = self.rows.batch(self._row_numbers(step))
        local = batch.part(distributed.share(len(batch.row))).to(self.cfg.device)
        hidden = hooks.read(self.language_model, local, self.sites)
        not_finite = [not torch.isfinite(h).all() for h in hidden.values()]
        not_finite = distributed.all_max_ints(*not_finite)
        sites = list(itertools.compress(hidden, not_finite))
        content = {
            "sae": training.title,
            "step": step,
            "said": training.failed,
            "sites_not_finite": sites,
            "rows": batch.row.tolist(),
            "input_ids": batch.input_ids.tolist(),
            "mask": batch.mask.tolist(),
        }
        path = self.run_folder / f"nonfinite-{training.title}-step{step}.json"
        return distributed.from_main(lambda: files.save_json(content, path, indent=None)), sites


def _update(training: SAETraining, batch: LocalBatch, step: int, report_due: bool) -> None:
    try:
        training.step(batch, step, report_due)
    except torch.OutOfMemoryError as error:
        advice = "with one token at a time; train fewer SAEs at once, or a smaller one"
        if distributed.world() > 1:
            advice = (
                f"in {training.parts} parts; run the same command again (it tries more of them), "
                "or train fewer SAEs at once"
            )
        raise ValueError(f"{training.title}: out of memory at step {step} {advice}") from error


def _print_results(trainings: list[SAETraining], progress: Progress) -> None:
    """Print one row for each SAE, with units: its figures on the batch of the last report."""
    width = max(len(training.title) for training in trainings) + 2
    columns = {"site": "", **SHOWN}
    print(" " * width + "".join(f"{name:>{TABLE_COLUMN}}" for name in columns))
    print(" " * width + "".join(f"{unit:>{TABLE_COLUMN}}" for unit in columns.values()))
    for training in trainings:
        final = progress.finals[training.title]
        site = names.site_numbers(training.sae.sites())
        cells = [site, *(f"{final[name]:.4g}" if name in final else "-" for name in SHOWN)]
        cells = [f"{cell:>{TABLE_COLUMN}}" for cell in cells]
        print(f"{training.title:<{width}}" + "".join(cells))


def _warn_of_equal_states(hidden: dict[int, torch.Tensor]) -> None:
    """hidden: {site: [N,D]}. A constant reconstructs equal states, which says nothing of an SAE."""
    for site, states in hidden.items():
        spread = (states - states[:1]).abs().max() if len(states) > 1 else states.new_tensor(1.0)
        if spread <= EQUAL_STATES * states.abs().max():
            print(
                f"warning: all {len(states)} states at site {site} are equal in the first batch; "
                "check the text and the weights of the language model"
            )


def _warn_of_missed_l0(training: SAETraining, l0: float) -> None:
    target = training.options.get("target_l0")
    if target and abs(l0 / target - 1) > L0_TOLERANCE:
        print(
            f"warning: {training.title} ends at L0 {l0:.4g}, its --target_l0 is {target:g}; "
            "train for more steps"
        )


# ----------------------------------------------------------------------------------------- the run


class Trainer:
    """Trains every combination of the chosen models and swept values from the same batches."""

    def __init__(self, cfg: Namespace) -> None:
        self.cfg = cfg
        for line in config.unused(cfg):
            print(f"warning: {line}")
        demo.use_demo_defaults(cfg)
        self.source: SAE | None = None
        self.inherited: dict[str, Any] = {}
        if cfg.init_from:
            self._open_source()
        config.complete(cfg)
        if cfg.deterministic:
            _use_deterministic_algorithms()
        cfg.device = pick_device(cfg.device)
        self.folder = Path(cfg.output_dir) / files.SAE_DIR
        self.combinations = list(self._combine())
        self.titles = distributed.from_main(self._make_titles)
        self.run_folder = self._run_folder(cfg.tag or "+".join(self.titles))
        self.states = self.run_folder / STATES_NAME
        self.log = self.run_folder / LOG_NAME

    def _open_source(self) -> None:
        """Load the SAE of --init_from, and take from it the options that were not typed.

        Raises ValueError for an SAE that no training can begin with.
        """
        hints = {"model": self.cfg.model[0]} if "model" in self.cfg.typed else {}
        self.source, recipe = checkpoint.load(self.cfg.init_from, hints=hints)
        norms = [decoder.weight.norm(dim=0) for decoder in self.source.decoders()]
        if norms and (torch.cat(norms) - 1).abs().max() > MAX_NORM_ERROR:
            smallest, largest = torch.cat(norms).aminmax()
            raise ValueError(
                f"--init_from {self.cfg.init_from}: its decoder columns have norms from "
                f"{smallest:.3g} to {largest:.3g}, which training would set to 1; fold them into "
                "the encoder first (fold_W_dec_norm of SAELens)"
            )
        self.inherited = config.inherit(self.cfg, self.source.name, self.source.config)
        self.inherited[SOURCE_SUM] = recipe["weights_sum"]

    def _check_source(self, sae: SAE) -> None:
        """Raise ValueError if the weights of --init_from do not fit an SAE of this run."""
        of_source, of_run = (checkpoint.shapes(one.state_dict()) for one in (self.source, sae))
        sizes = {
            "hidden size": (self.source.hidden_size, sae.hidden_size),
            "latent size": (self.source.latent_size, sae.latent_size),
        }
        names = of_source.keys() | of_run.keys()
        sizes |= {name: (of_source.get(name), of_run.get(name)) for name in sorted(names)}
        for name, (there, here) in sizes.items():
            if there != here:
                raise ValueError(
                    f"--init_from {self.cfg.init_from} has {name} {there}, but this run needs "
                    f"{here}; an SAE can only begin with weights of its own shape"
                )

    def _combine(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Yield (model, options, swept values) of each SAE; a model crosses the lists it uses."""
        for name in self.cfg.model:
            options = config.model_options(self.cfg, name) | self.inherited
            swept_keys = [key for key in config.SWEPT if isinstance(options.get(key), list)]
            for values in itertools.product(*(options[key] for key in swept_keys)):
                chosen = dict(zip(swept_keys, values, strict=True))
                swept = {key: value for key, value in chosen.items() if len(options[key]) > 1}
                yield name, options | chosen, swept

    def _make_titles(self) -> list[str]:
        """Return the title of each SAE.

        The language model's name joins them if an SAE of another one has such a title.
        """
        cfg = self.cfg
        titles = [self._title(*combination) for combination in self.combinations]
        own_name = files.data_name(Path(cfg.model_path).resolve())
        for title in titles:
            other = checkpoint.language_model_name(self.folder / f"{title}.pt")
            if other not in (None, own_name):
                print(f"{title} is an SAE of {other}; these get {own_name} in their names")
                return [files.safe_name(f"{title}_{own_name}") for title in titles]
        return titles

    def _title(self, name: str, options: dict[str, Any], swept: dict[str, Any]) -> str:
        numbers = {key: value for key, value in swept.items() if key != "freeze"}
        values = [f"{key}{config.short_number(value)}" for key, value in numbers.items()]
        if self.cfg.sites and "sites" in zoo.ZOO[name].options:
            values.append(f"sites{'-'.join(map(str, self.cfg.sites))}")
        if options.get("freeze"):
            values.append(f"frozen-{options['freeze'].replace('_', '-')}")
        parts = [name, files.data_name(self.cfg.data_path), *values]
        if self.cfg.tag:
            parts.append(files.safe_name(self.cfg.tag))
        return files.safe_name("_".join(parts))

    def _run_folder(self, name: str) -> Path:
        return Path(self.cfg.output_dir) / files.RUN_DIR / files.safe_name(name)

    @functools.cached_property
    def text_digest(self) -> str | None:
        """Hash of the text's files; it takes up to a second."""
        return identity.of_text(self.cfg.data_path, self.cfg.split)

    @functools.cached_property
    def model_digest(self) -> str | None:
        """Hash of the language model's weight files; it takes up to a second."""
        return identity.of_weight_files(self.cfg.model_path)

    def _settings(self) -> dict[str, Any]:
        """Return the options that are the same for all SAEs of the run."""
        left_out = config.NEUTRAL | config.SECRET | {"model", *config.SWEPT}
        return {key: value for key, value in sorted(vars(self.cfg).items()) if key not in left_out}

    def _requested(self) -> dict[str, Any]:
        """Return every option that decides what this run trains, as JSON gives it back."""
        lists = {key: getattr(self.cfg, key) for key in ("model", *config.SWEPT)}
        options = [options for _, options, _ in self.combinations]
        runs = dict(zip(self.titles, options, strict=True))
        return _as_json({"options": self._settings() | lists, "runs": runs})

    def run(self) -> float:
        """Train what has no result yet; return the final loss of the first SAE.

        Raises ValueError for options, texts or saved states that cannot be used, OSError for
        folders that cannot be written, and Interrupted after a signal.
        """
        todo = distributed.from_main(self._untrained)
        if not todo:
            return self._earlier_loss()
        self._check_before_loading(todo)
        run_folders = self._run_folders()
        distributed.from_main(lambda: _probe([self.folder, *run_folders]))
        with contextlib.ExitStack() as stack, Signals() as signals:
            distributed.from_main(lambda: _lock(run_folders, stack))
            saved = distributed.from_main(self._find_unfinished)
            if saved is not None:
                todo = self._todo_of(saved[1], todo)
            return self._train(todo, saved, signals)

    # ----------------------------------------------------------------------- earlier results

    def _untrained(self) -> list[int]:
        """Return the index of each SAE that has no result yet.

        Raises ValueError if a result of the same name was trained with other options.
        """
        untrained = []
        for i, title in enumerate(self.titles):
            path = self.folder / f"{title}.pt"
            if path.is_dir():
                raise ValueError(f"{path} is a folder; move it, or give --tag NAME")
            recipe = None if self.cfg.overwrite else checkpoint.trained_recipe(path)
            if recipe is None:
                untrained.append(i)
                continue
            _, options, _ = self.combinations[i]
            different = differences(recipe.get("options", {}), _as_json(self._settings() | options))
            if different:
                raise ValueError(
                    f"{path} was trained with other options "
                    f"({'; '.join(different[:MAX_DIFFERENCES])}); give --tag NAME or --overwrite"
                )
            self._check_unchanged(path, recipe)
            print(f"{title}: already trained ({path})")
        return untrained

    def _check_unchanged(self, path: Path, recipe: dict[str, Any]) -> None:
        """Raise ValueError if text or language model are not those of a result, as far as known."""
        for key, what, place in (
            ("text_digest", "another text", self.cfg.data_path),
            ("model_digest", "another language model", self.cfg.model_path),
        ):
            recorded = recipe.get(key)
            if recorded and getattr(self, key) not in (None, recorded):
                raise ValueError(
                    f"{path} was trained on {what}: {place} has changed since; "
                    "give --tag NAME or --overwrite"
                )

    def _earlier_loss(self) -> float:
        """Return the loss in the first SAE's recipe; remove states that nobody needs now."""
        if distributed.main() and self.states.exists():
            self._remove_own_states()
        recipe = checkpoint.read_recipe(self.folder / f"{self.titles[0]}.pt")
        return float(recipe.get("final", {}).get("loss", math.nan))

    def _remove_own_states(self) -> None:
        """Remove the states of this run, which has its results; those of another one stay."""
        with files.locked(self.run_folder):
            try:
                saved = checkpoint.find_state(self.states)
            except ValueError as error:  # nobody knows whose they are
                print(f"warning: {self.states} is left as it is: {error}")
                return
            if saved is None or self._is_finished(saved[1]):
                shutil.rmtree(self.states)
                return
        print(
            f"warning: {self.run_folder} holds another unfinished run, stopped at step "
            f"{saved[1]['step']}; it is left as it is (the command that began it continues it)"
        )

    def _is_finished(self, meta: dict[str, Any]) -> bool:
        """Return whether the earlier results are what the run of a saved state would give."""
        requested = self._requested()
        if any(meta[key] != requested[key] for key in ("options", "runs")):
            return False
        recipes = [checkpoint.read_recipe(self.folder / f"{title}.pt") for title in self.titles]
        keys = ("language_model", "text_digest")
        # Earlier versions recorded neither.
        return all(meta.get(key) in (None, r.get(key)) for key in keys for r in recipes)

    def _check_before_loading(self, todo: list[int]) -> None:
        """Raise ValueError if a model cannot be built for what the language model's config says."""
        cfg = self.cfg
        sizes = lm.sizes_by_config(cfg.model_path, cfg.trust_remote_code)
        if sizes is None:
            # A size that is not known yet is taken as that of --init_from, or as large.
            known = self.source.config if self.source is not None else {}
            width = cfg.hidden_size or known.get("hidden_size") or 2**20
            self._check_options(todo, width, cfg.n_layers or known.get("n_layers") or 2**10)
            return
        self._check_sizes(*sizes)
        self._check_options(todo, *sizes)

    def _check_options(self, todo: list[int], hidden_size: int, n_layers: int) -> None:
        """Raise ValueError if a model cannot be built."""
        for i in todo:
            name, options, _ = self.combinations[i]
            with torch.device("meta"):
                sae = model.build(name, hidden_size, n_layers, options)
            if self.source is not None:
                self._check_source(sae)

    def _run_folders(self) -> list[Path]:
        """Return the folders to lock: without a tag, another run may train one of these SAEs."""
        others = [] if self.cfg.tag else [self._run_folder(title) for title in self.titles]
        return list(dict.fromkeys([self.run_folder, *others]))

    # ----------------------------------------------------------------------------- unfinished runs

    def _find_unfinished(self) -> tuple[Path, dict[str, Any]] | None:
        """Return (folder, meta) of the state from which to continue, if there is one.

        Raises ValueError if there is one from which this run must not continue, or cannot.
        """
        if self.cfg.resume == "never" and checkpoint.states(self.states):
            if not self.cfg.overwrite:
                raise ValueError(
                    f"{self.run_folder} holds an unfinished run; leave out --resume never to "
                    "continue it, or add --overwrite to start again"
                )
            shutil.rmtree(self.states)
        saved = checkpoint.find_state(self.states)
        if saved is not None:
            self._compare_options(saved[1])
            self._compare_machine(saved[1])
        elif self.log.exists() and self.log.stat().st_size:
            print(f"{self.run_folder}: no saved state; beginning at step 0")
        return saved

    def _compare_options(self, meta: dict[str, Any]) -> None:
        requested = self._requested()
        wanted = requested["options"]
        if "language_model" in meta:  # what --dtype auto meant is compared with it
            wanted = {key: value for key, value in wanted.items() if key != "dtype"}
        different = differences(meta["options"], wanted, "--")
        for title, options in requested["runs"].items():
            different += differences(meta["runs"].get(title, options), options, f"{title}: ")
        if different:
            raise ValueError(
                f"{self.run_folder} holds an unfinished run, stopped at step {meta['step']}, with "
                f"other options ({'; '.join(different[:MAX_DIFFERENCES])}); give the same options, "
                "--tag NAME for another run, or --resume never --overwrite to start again"
            )

    def _compare_machine(self, meta: dict[str, Any]) -> None:
        current = {"device": self.cfg.device, **checkpoint.environment()}
        for key in ("device", "threads", "versions"):
            if meta[key] != current[key]:
                print(
                    f"warning: saved with {key} {meta[key]}, continued with {current[key]}; "
                    "the last bits may differ"
                )

    def _todo_of(self, meta: dict[str, Any], todo: list[int]) -> list[int]:
        """Return the indices of the SAEs that an unfinished run trains.

        Raises ValueError if it does not train all of those that are still to do.
        """
        titles = meta["training"]
        new = [self.titles[i] for i in todo if self.titles[i] not in titles]
        if new:
            raise ValueError(
                f"the unfinished run in {self.run_folder} does not train {', '.join(new)}; "
                "give --tag NAME"
            )
        return [i for i, title in enumerate(self.titles) if title in titles]

    # ------------------------------------------------------------------------------- the training

    def _train(
        self, todo: list[int], saved: tuple[Path, dict[str, Any]] | None, signals: Signals
    ) -> float:
        cfg = self.cfg
        tokenizer, language_model = hooks.open_language_model(cfg)
        sizes = self._sizes(language_model)
        self._check_options(todo, **sizes)  # before a long text is tokenised
        lm.check_length(language_model, cfg.max_length)
        rows = demo.open_rows(cfg, tokenizer)
        self.identities = {
            "language_model": identity.of_language_model(language_model),
            "text_digest": distributed.from_main(lambda: self.text_digest),
            "model_digest": distributed.from_main(lambda: self.model_digest),
        }
        requested = self._requested() | self.identities
        total = math.ceil(len(rows) / cfg.batch_size) * cfg.num_epochs
        trainings = [self._build(i, sizes, total) for i in todo]
        if total < CONTROL_STEPS and any(t.options.get("target_l0") for t in trainings):
            print(
                f"warning: --target_l0 takes about {CONTROL_STEPS} steps, this run has {total}; "
                "L0 may end far from it. Use more text, a smaller --batch_size or more --num_epochs"
            )
        local_rows = distributed.share(min(cfg.batch_size, len(rows)))
        n_rows = local_rows.stop - local_rows.start
        join_passes(lm.compile_if_it_pays(cfg, language_model, n_rows, total))
        saes = [training.sae for training in trainings]
        estimate = of_training(cfg, saes, language_model, rows, total, self.run_folder)
        loop = TrainingLoop(cfg, trainings, rows, language_model, self.run_folder, requested)
        if saved is not None:
            loop.restore(*saved)
        if cfg.use_wandb and distributed.main():
            name = self.run_folder.name
            loop.wandb = wandb_init(cfg.wandb_project, self._settings(), name, self.run_folder)
        loop.run(signals)
        return self._finish(trainings, rows, loop.progress, estimate)

    def _sizes(self, language_model: nn.Module) -> dict[str, int]:
        """Return the language model's sizes. Raises ValueError if a flag gives another one."""
        sizes = {
            "hidden_size": lm.text_config(language_model).hidden_size,
            "n_layers": len(lm.blocks(language_model)),
        }
        self._check_sizes(**sizes)
        return sizes

    def _check_sizes(self, hidden_size: int, n_layers: int) -> None:
        """Raise ValueError if a flag gives another size than the language model has."""
        for name, size in (("hidden_size", hidden_size), ("n_layers", n_layers)):
            flag = getattr(self.cfg, name)
            if flag not in (None, size):
                raise ValueError(
                    f"--{name} {flag}, but the language model has {size}; leave the flag out"
                )

    def _build(self, index: int, sizes: dict[str, int], total: int) -> SAETraining:
        set_seed(self.cfg.seed)  # each SAE begins as it would alone
        name, options, _ = self.combinations[index]
        sae = model.build(name, sizes["hidden_size"], sizes["n_layers"], options)
        if self.source is not None:
            sae.load_state_dict(self.source.state_dict())
        return SAETraining(sae.to(self.cfg.device), self.titles[index], options, self.cfg, total)

    def _finish(
        self, trainings: list[SAETraining], rows: Rows, progress: Progress, estimate: Estimate
    ) -> float:
        """Save weights and recipes, remove the saved states, return the first SAE's loss.

        Raises ValueError if no token counted or only one, or if an SAE has failed.
        """
        if not progress.tokens:
            raise ValueError("no counted token in the rows; use more text or longer rows")
        if progress.tokens <= self.cfg.num_epochs:
            raise ValueError(
                "only one token counts in the rows, and an SAE of one state learns that state "
                "alone; use more text"
            )
        used = estimate.compare(progress.seconds)
        trained = [training for training in trainings if not training.failed]
        for training in trained:
            training.finish()
            distributed.from_main(partial(self._save, training, rows, progress, used))
            _warn_of_missed_l0(training, progress.finals[training.title]["L0"])
        if trained:
            _print_results(trained, progress)
            paths = [str(self.folder / f"{training.title}.pt") for training in trained]
            evaluate = config.command("evaluate")
            print(f"next: {evaluate} --metric NormMSE KLDiv --SAE_path {' '.join(paths)}")
        if distributed.main():
            shutil.rmtree(self.states, ignore_errors=True)
        failures = [training.failed for training in trainings if training.failed]
        if failures:
            raise ValueError(f"{'; '.join(failures)} (the other SAEs are saved)")
        return progress.finals[trainings[0].title]["loss"]

    def _save(
        self, training: SAETraining, rows: Rows, progress: Progress, used: dict[str, float]
    ) -> None:
        cfg, sae = self.cfg, training.sae
        final = progress.finals[training.title]
        recipe = {
            "model": sae.name,
            "config": sae.config,
            "sites": sae.sites(),
            "options": self._settings() | training.options,
            "model_path": str(cfg.model_path),
            "data_path": str(cfg.data_path),
            "data_fingerprint": rows.fingerprint,
            **self.identities,
            "tokens": progress.tokens,
            "seed": cfg.seed,
            "device": cfg.device,
            "final": final,
            "estimate": used,
            **checkpoint.environment(),
        }
        path = checkpoint.save(sae, recipe, self.folder, training.title)
        print(f"saved {path}")
