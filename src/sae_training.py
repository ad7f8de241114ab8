"""One SAE in training: its optimisers, its schedules, its step and all of its state.

It is the same in every process of a job. N tokens, F latents, D hidden.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src import config, distributed
from src.device import bf16_matmuls
from src.ops import project_decoder_grad, sign_step_, unit_norm_decoder
from src.sae import SAE, WARM_START_TOKENS, BatchInfo, Hold, Patch, SAEOutput

SIGNUM_MOMENTUM = 0.95
ADAM_LR = 5e-4  # of parameters that keep Adam beside another optimiser
# The option of an SAE that began with another's weights (--init_from): the sum of these weights.
SOURCE_SUM = "init_weights_sum"
WARMUP_SHARE, DECAY_SHARE = 0.05, 0.2  # of a run
KL_LR = 0.1  # learning rate of the KL finish, in units of that before; best of .03 to 1


class LinearWarmupLR(torch.optim.lr_scheduler.LambdaLR):
    """Linear warm-up, constant, linear decay to 0 over the last fifth. The first step moves."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        num_warmup_steps: int,
        num_training_steps: int,
        max_lr: float | None = None,
    ) -> None:
        self.warmup = num_warmup_steps
        self.total = max(1, num_training_steps)
        if max_lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = max_lr
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Return the learning rate of a step in units of its maximum."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        falling = (self.total - step) / max(1, math.ceil(DECAY_SHARE * self.total))
        return max(0.0, min(rising, falling))


class Signum(torch.optim.Optimizer):
    """Steps of size lr along the sign of the gradient, schedule-free (Defazio et al. 2024).

    Gradients are taken at y = (1-b) z + b x; z makes the steps, x is their mean and what is kept.
    In the mean step k has the weight k^average_power: late steps count more, because early ones
    are far from the end in a short run, and denser than the target of L0.
    It replaces the authors' wrapper for two reasons. `found_inf`, a 0-dim tensor as in Adam,
    turns a step into none without the host's knowledge. And moving y and z alone takes half the
    time for large weights (docs/LOG.md).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = SIGNUM_MOMENTUM,
        average_power: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "k": 0})
        self.momentum = momentum
        self.average_power = average_power
        self.at_y = False
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def _move_weights(self, to_y: bool, weight: float) -> None:
        if self.at_y != to_y:
            for p, state in self.state.items():
                p.lerp_(state["z"], weight)
        self.at_y = to_y

    def train(self) -> None:
        """Move the weights from x to y, where gradients are taken."""
        self._move_weights(True, 1 - self.momentum)

    def eval(self) -> None:
        """Move the weights from y to x, the mean that is kept."""
        self._move_weights(False, 1 - 1 / self.momentum)

    @torch.no_grad()
    def restart(self, lr_factor: float) -> None:
        """Begin a new mean at x, with another learning rate."""
        self.eval()
        for p, state in self.state.items():
            state["z"].copy_(p)
        for group in self.param_groups:
            group["k"] = 0
            group["lr"] *= lr_factor
        self.train()

    @torch.no_grad()
    def hold(self, weight: Tensor, hold: Hold) -> None:
        """Bring z back to a bound after a step, and y with it: x, the mean of z, is then within."""
        if self.at_y and weight in self.state:
            z = self.state[weight]["z"]
            before = z.clone()
            hold(z)
            weight.add_(z - before, alpha=self._share_of_z(self.param_groups[0]["k"]))

    def _share(self, step: int) -> float:
        """Return the share of this step's z in the mean x; steps count from 1."""
        return (self.average_power + 1) / (self.average_power + step)

    def _share_of_z(self, step: int) -> float:
        """Return the share of this step's z in y."""
        return 1 - self.momentum * (1 - self._share(step))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Make x the mean of all z: y moves towards z by a share, then z along the sign, y too."""
        for group in self.param_groups:
            group["k"] += 1
            share = self._share(group["k"])
            lr = group["lr"]
            y_step = lr * self._share_of_z(group["k"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "z" not in state:
                    state["z"] = p.clone(memory_format=torch.preserve_format)
                sign_step_(p, state["z"], p.grad, share, y_step, lr, self.found_inf)


def make_optimizer(
    name: str,
    params: list[Tensor] | list[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    average_power: float = 0.0,
) -> torch.optim.Optimizer:
    """Return Adam or Signum. Both leave weights and state alone where their `found_inf` is 1."""
    if name == "adam":
        return torch.optim.Adam(params, lr=lr, betas=tuple(betas), fused=True)
    return Signum(params, lr, average_power=average_power)


class LocalBatch(NamedTuple):
    """This process's tokens of a training batch."""

    hidden: dict[int, Tensor]  # {site: [N,D]}
    token_keys: Tensor  # int64 [N]
    batch_tokens: int  # of all processes
    token_offset: int  # index in the whole batch of the first token here
    # Of the KL finish: where rows end, and the mean KL of patches for the tokens of whole rows.
    row_ends: list[int] | None = None
    patched_kl: Callable[[slice, Mapping[int, Patch]], Tensor] | None = None

    def info(self, tokens: slice = slice(None)) -> BatchInfo:
        """Return what an SAE is told about some of these tokens."""
        return BatchInfo(
            token_keys=self.token_keys[tokens],
            batch_tokens=self.batch_tokens,
            token_offset=self.token_offset + (tokens.start or 0),
            all_sum=distributed.all_sum,
            all_max=distributed.all_max,
        )

    def states(self, tokens: slice) -> dict[int, Tensor]:
        """Return the states of some of these tokens."""
        return {site: h[tokens] for site, h in self.hidden.items()}

    def slices(self, count: int) -> Iterator[slice]:
        """Divide the tokens into consecutive slices, in the KL finish of whole rows.

        Some may be empty.
        """
        starts = range(len(self.token_keys) + 1)
        if self.row_ends is not None:
            starts = [0, *self.row_ends]
        for part in torch.arange(len(starts) - 1, device="cpu").tensor_split(count):
            yield slice(starts[part[0]], starts[part[-1] + 1]) if len(part) else slice(0)


class SAETraining:
    """One SAE in training."""

    # what a saved state keeps of this object itself
    SAVED = ("failed", "sums", "count", "seconds", "parts", "kl_weight")

    def __init__(
        self, sae: SAE, title: str, options: dict[str, Any], cfg: Namespace, total_steps: int
    ) -> None:
        self.sae = sae
        self.title = title
        self.options = options
        self.total = total_steps
        self.lr = config.learning_rate(cfg, sae.hidden_size, sae.lr_unit())
        self.clip = cfg.grad_clip
        self.normalise_every = cfg.steps
        self._make_optimizers(cfg)
        self.failed = ""
        self.failed_step = -1
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.seconds = 0.0
        self.parts = 1  # slices of a batch, more where memory is short
        self.last: tuple[SAEOutput, BatchInfo] | None = None
        self.memory_tried = distributed.world() == 1
        self.kl_weight: float | None = None  # known from the first step of the KL finish on
        # 1 from the first loss or gradient that is not finite. It stays on the device, as do the
        # numbers of the steps, until check() reads it.
        self.found_inf = torch.zeros((), device=sae.tokens_since_fired.device)
        # (step, names of the loss terms, [gradient norm, terms, L0])
        self.unread: list[tuple[int, list[str], Tensor]] = []
        for optimizer in self.optimizers:
            optimizer.found_inf = self.found_inf

    def _make_optimizers(self, cfg: Namespace) -> None:
        adam_params = self.sae.adam_parameters() if cfg.optimizer != "adam" else []
        others = [p for p in self.sae.parameters() if all(p is not a for a in adam_params)]
        if cfg.optimizer == "signum":
            others = self._groups(others)
        power = cfg.average_power
        self.optimizers = [make_optimizer(cfg.optimizer, others, self.lr, cfg.betas, power)]
        if adam_params:
            self.optimizers.append(make_optimizer("adam", adam_params, ADAM_LR, cfg.betas))
        warmup = round(WARMUP_SHARE * self.total)
        self.schedules = [
            LinearWarmupLR(optimizer, warmup, self.total)
            for optimizer in self.optimizers
            if isinstance(optimizer, torch.optim.Adam)
        ]

    def _groups(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Return these parameters grouped by their learning rates."""
        factors = self.sae.lr_factors()
        groups: dict[float, list[Tensor]] = {}
        for p in params:
            groups.setdefault(factors.get(p, 1.0), []).append(p)
        return [{"params": group, "lr": factor * self.lr} for factor, group in groups.items()]

    def mode(self, training: bool) -> None:
        """Switch to the weights that get gradients, or to the average that is kept."""
        self.sae.train(training)
        for optimizer in self.optimizers:
            switch = getattr(optimizer, "train" if training else "eval", None)
            if switch is not None:
                switch()

    # ---------------------------------------------------------------------- saved state

    def _tensors(self) -> dict[str, Tensor]:
        """Return parameters and all buffers: counters are not in the state dict."""
        return dict(self.sae.named_parameters()) | dict(self.sae.named_buffers())

    def state(self) -> dict[str, Any]:
        """Return everything that a step changes."""
        return {
            "sae": {name: tensor.detach() for name, tensor in self._tensors().items()},
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedules": [s.state_dict() for s in self.schedules],
            "plain": {name: getattr(self, name) for name in self.SAVED},
        }

    def _differences(self, state: dict[str, Any]) -> list[str]:
        """Return what of a saved state does not fit this SAE."""
        expected = {(name, tensor.shape) for name, tensor in self._tensors().items()}
        saved = {(name, tensor.shape) for name, tensor in state["sae"].items()}
        names = sorted({name for name, _ in expected ^ saved})
        own_groups = [len(optimizer.param_groups) for optimizer in self.optimizers]
        if own_groups != [len(optimizer["param_groups"]) for optimizer in state["optimizers"]]:
            names.append("learning rates")
        return names

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Put back what state() returned. Raises ValueError if it belongs to another SAE."""
        self.mode(True)  # first: with optimiser states in place it would exchange weights
        differences = self._differences(state)
        if differences:
            raise ValueError(
                f"the saved state of {self.title} does not fit ({', '.join(differences[:4])}); "
                "another version of this program wrote it"
            )
        for name, tensor in self._tensors().items():
            tensor.copy_(state["sae"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        vars(self).update(state["plain"])
        device = self.sae.tokens_since_fired.device
        self.sums = {name: value.to(device) for name, value in self.sums.items()}

    # ------------------------------------------------------------------------- one step

    def warm_start(self, batch: LocalBatch) -> None:
        """Initialise from the first tokens of the whole batch; then make the processes equal.

        Weights of another SAE stay as they are.
        """
        if SOURCE_SUM not in self.options:
            first = slice(max(0, WARM_START_TOKENS - batch.token_offset))
            inputs = self.sae.gather(batch.states(first))
            self.sae.warm_start(distributed.concat(inputs))
            unit_norm_decoder(self.sae)
        distributed.copy_from_main_(list(self._tensors().values()))
        self.mode(True)

    def begin_kl_finish(self) -> None:
        """Restart the schedule-free average: its mean over all steps would hide the last ones."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Signum):
                optimizer.restart(KL_LR)

    def _kl_term(
        self, batch: LocalBatch, step: int, tokens: slice, out: SAEOutput, info: BatchInfo
    ) -> Tensor:
        """Return the KL of one patched run, weighted to equal the error when the finish begins. []

        The runs of a model take turns.
        """
        runs = list(self.sae.patches(batch.states(tokens), info, clean=out))
        kl = batch.patched_kl(tokens, runs[step % len(runs)])
        if self.kl_weight is None:
            error = self.sae.loss(out, info)["NormMSE"]
            sums = distributed.all_sum(torch.stack([error, kl]).detach())
            self.kl_weight = float(sums[0] / sums[1].clamp_min(1e-12))
        return self.kl_weight * kl

    @bf16_matmuls()
    def _gradients(self, batch: LocalBatch, step: int) -> tuple[SAEOutput, dict[str, Tensor]]:
        """Run forward and backward passes over `parts` slices of the tokens.

        Returns the output (of several slices: their codes) and this process's shares of the loss
        terms. Batch-level terms (the variance in AuxK, a top-k over the batch) are then computed
        per slice.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        # as many slices in every process; some may be empty, but not in all
        parts = min(self.parts, -(-batch.batch_tokens // distributed.world()))
        outputs = []
        terms: dict[str, Any] = {}
        for tokens in batch.slices(parts):
            info = batch.info(tokens)
            out = self.sae.autoencode(self.sae.gather(batch.states(tokens)), info)
            part_terms = self.sae.loss(out, info)
            if batch.patched_kl is not None:
                part_terms["KL"] = self._kl_term(batch, step, tokens, out, info)
            for name, term in part_terms.items():
                terms[name] = terms.get(name, 0.0) + term.detach()
            torch.stack(list(part_terms.values())).sum().backward()
            outputs.append(out if parts == 1 else out.detach_code())
        return outputs[0] if parts == 1 else SAEOutput.cat(outputs), terms

    def _within_memory(self, step: int, batch: LocalBatch) -> tuple[SAEOutput, dict[str, Tensor]]:
        """Call _gradients with twice as many slices each time memory is short.

        Raises torch.OutOfMemoryError if slices of one token do not help.
        """
        while True:
            try:
                return self._gradients(batch, step)
            except torch.OutOfMemoryError:
                if self.parts >= len(batch.token_keys):
                    raise
            self.parts *= 2  # outside the handler, whose traceback holds the tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(
                f"{self.title}: out of memory at step {step}; the batch now goes through in "
                f"{self.parts} parts, with one update as before"
            )

    def _agree_on_parts(self, step: int, batch: LocalBatch) -> None:
        """Find the number of slices that every process can hold, and use it in all.

        Each process tries a step alone: one that ran out of memory within a shared step would
        leave the others waiting.
        """
        before = {name: buffer.clone() for name, buffer in self.sae.named_buffers()}
        kl_weight = self.kl_weight
        with distributed.alone():
            self._within_memory(step, batch)
        self.kl_weight = kl_weight
        with torch.no_grad():
            for name, buffer in self.sae.named_buffers():
                buffer.copy_(before[name])
        (self.parts,) = distributed.all_max_ints(self.parts)
        self.memory_tried = True

    def step(self, batch: LocalBatch, step: int, report_due: bool) -> None:
        """Make one update; `report_due` means that a report follows.

        A loss or gradient that is not finite changes nothing, here and in all later steps;
        check() reports it. Raises torch.OutOfMemoryError.
        """
        started = time.perf_counter()
        self.last = None  # the next forward pass may need the room of its tensors
        if not self.memory_tried:
            self._agree_on_parts(step, batch)
        if distributed.world() == 1:
            out, terms = self._within_memory(step, batch)
        else:
            out, terms = self._gradients(batch, step)
        self._update(batch, step, out, terms, report_due)
        if report_due or self.found_inf.device.type == "cpu":  # elsewhere reading it waits
            self.check()
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def _update(
        self,
        batch: LocalBatch,
        step: int,
        out: SAEOutput,
        terms: dict[str, Tensor],
        report_due: bool,
    ) -> None:
        """Sum over processes, clip, step the optimisers, and count."""
        codes_per_token = out.code.shape[1:-1].numel()
        l0 = out.fired.sum() / (batch.batch_tokens * codes_per_token)
        values = torch.stack([*terms.values(), l0])
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        distributed.all_sum_([values, *gradients])
        loss = values[:-1].sum()
        norm = self._clip(gradients)
        finite = torch.isfinite(loss) & torch.isfinite(norm)  # the same in every process
        self.found_inf.masked_fill_(~finite, 1)
        self.unread.append((step, list(terms), torch.cat([norm[None], values])))
        for stepper in (*self.optimizers, *self.schedules):
            stepper.step()
        if step % self.normalise_every == 0:
            unit_norm_decoder(self.sae, self.found_inf == 0)
        self._hold()
        info = batch.info()
        self.sae.after_step(out, (step + 1) / self.total, info)
        reported = {"loss": loss} | dict(zip([*terms, "L0"], values, strict=True))
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in reported.items()}
        self.count += 1
        self.last = (out, info) if report_due else None

    def _clip(self, gradients: list[Tensor]) -> Tensor:
        """Project and clip the gradients; return their norm before clipping. []"""
        if self.normalise_every == 1:
            project_decoder_grad(self.sae)
        if self.clip:
            return nn.utils.clip_grad_norm_(self.sae.parameters(), self.clip)
        return nn.utils.get_total_norm(gradients)

    def check(self) -> None:
        """Set `failed` (why) and `failed_step` (the step) if something was not finite."""
        if self.found_inf and not self.failed:
            first_bad = next(row for row in self.unread if not row[2].isfinite().all())
            self.failed_step, names, values = first_bad
            loss_terms = values[1 : len(names) + 1]
            what = "gradient" if loss_terms.sum().isfinite() else "loss"
            pairs = zip(names, loss_terms.tolist(), strict=True)
            listed = ", ".join(f"{name} {value:.4g}" for name, value in pairs)
            self.failed = (
                f"{self.title}: {what} is not finite at step {self.failed_step} ({listed})"
            )
        self.unread.clear()

    def _hold(self) -> None:
        for weight, hold in self.sae.held().items():
            for optimizer in self.optimizers:
                if isinstance(optimizer, Signum):
                    optimizer.hold(weight, hold)
            hold(weight)

    def finish(self) -> None:
        """Take the weights that are kept: the average, with decoder columns of norm 1."""
        self.mode(False)
        unit_norm_decoder(self.sae)
        self._hold()

    def run(self, batches: Iterable[LocalBatch]) -> SAE:
        """Train on states that are there already, one step a batch; return the SAE.

        Raises ValueError if a loss or a gradient is not finite.
        """
        for step, batch in enumerate(batches):
            if not step:
                self.warm_start(batch)
            self.step(batch, step, report_due=False)
            self.check()
            if self.failed:
                raise ValueError(self.failed)
        self.finish()
        return self.sae

    def report(self) -> dict[str, Any]:
        """Return means since the last report, the dead share, and what the model adds."""
        line = {name: float(value) / self.count for name, value in self.sums.items()}
        self.sums = {}
        self.count = 0
        line["dead"] = self.sae.dead_fraction()
        if self.last is not None:
            for name, value in self.sae.diagnostics(*self.last).items():
                line[name] = value.tolist() if isinstance(value, Tensor) else value
        self.last = None  # of five SAEs it held 0.3 GB until the next step
        return line
