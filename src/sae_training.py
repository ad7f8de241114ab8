"""One SAE in training: its optimiser, its schedule, its step, and all of its state. The same in every process of a job."""

from __future__ import annotations

import math
import time
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

from src import config, distributed
from src.ops import bf16_matmuls, project_decoder_grad, sign_step_, unit_norm_decoder
from src.sae import SAE, WARM_START, SAEOutput


class LinearWarmupLR(torch.optim.lr_scheduler.LambdaLR):
    """Linear warm-up, constant, linear decay to 0 over the last fifth. The first step is not idle."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        num_warmup_steps: int,
        num_training_steps: int,
        max_lr: float | None = None,
    ) -> None:
        self.warmup, self.total = num_warmup_steps, max(1, num_training_steps)
        if max_lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = max_lr
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        return max(0.0, min(rising, (self.total - step) / max(1, math.ceil(0.2 * self.total))))


class Signum(torch.optim.Optimizer):
    """Steps of size lr along the sign of the gradient, schedule-free (Defazio et al. 2024): gradients are taken at y = (1-b) z + b x,
    z makes the steps, x is their mean and what is kept.

    In place of the authors' wrapper because `found_inf`, a 0-dim tensor as Adam's, turns a step into none without the host's knowing; moving
    y and z alone, it also takes half the time for large weights (docs/LOG.md).
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "k": 0})
        self.momentum, self.at_y, self.found_inf = momentum, False, torch.zeros(())

    @torch.no_grad()
    def _swing(self, at_y: bool, weight: float) -> None:
        if self.at_y != at_y:
            for p, state in self.state.items():
                p.lerp_(state["z"], weight)
        self.at_y = at_y

    def train(self) -> None:
        """From x to y."""
        self._swing(True, 1 - self.momentum)

    def eval(self) -> None:
        """From y to x."""
        self._swing(False, 1 - 1 / self.momentum)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """x becomes the mean of all z: y goes towards z by 1/k, then z along the sign, and y with it by its share."""
        for group in self.param_groups:
            group["k"] += 1
            share, lr = 1 / group["k"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "z" not in self.state[p]:
                    self.state[p]["z"] = p.clone(memory_format=torch.preserve_format)
                sign_step_(
                    p,
                    self.state[p]["z"],
                    p.grad,
                    share,
                    lr * (1 - self.momentum * (1 - share)),
                    lr,
                    self.found_inf,
                )


def make_optimizer(
    name: str, params: list[Tensor], lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """adam, or signum with momentum .95. Both leave weights and state alone where their `found_inf` is 1."""
    return (
        torch.optim.Adam(params, lr=lr, betas=tuple(betas), fused=True)
        if name == "adam"
        else Signum(params, lr)
    )


class SAETraining:
    """One SAE in training."""

    def __init__(
        self, sae: SAE, title: str, options: dict[str, Any], cfg: Namespace, total_steps: int
    ) -> None:
        self.lr = config.learning_rate(cfg, sae.name)
        self.sae, self.title, self.options, self.total = sae, title, options, total_steps
        apart = sae.adam_parameters() if cfg.optimizer != "adam" else []
        others = [p for p in sae.parameters() if all(p is not a for a in apart)]
        self.optimizers = [make_optimizer(cfg.optimizer, others, self.lr, cfg.betas)]
        if apart:
            self.optimizers.append(make_optimizer("adam", apart, 5e-4, cfg.betas))
        adams = [o for o in self.optimizers if isinstance(o, torch.optim.Adam)]
        self.schedules = [
            LinearWarmupLR(adam, round(0.05 * total_steps), total_steps) for adam in adams
        ]
        self.clip, self.normalise_every = cfg.grad_clip, cfg.steps
        self.failed, self.failed_at, self.sums, self.count, self.seconds, self.parts, self.last = (
            "",
            -1,
            {},
            0,
            0.0,
            1,
            None,
        )
        self.tried = distributed.world() == 1  # whether the first step's memory was looked at
        self.found_inf = torch.zeros(
            (), device=sae.tokens_since_fired.device
        )  # 1 from the first loss or gradient on that is not finite
        self.unread: list[
            tuple[int, list[str], Tensor]
        ] = []  # what steps gave; on the device, as the flag is, until check() reads that
        for optimizer in self.optimizers:
            optimizer.found_inf = self.found_inf

    def mode(self, training: bool) -> None:
        """Schedule-free optimisers hold two sets of weights: those that get gradients and the average that is kept."""
        self.sae.train(training)
        for optimizer in self.optimizers:
            switch = getattr(optimizer, "train" if training else "eval", None)
            if switch is not None:
                switch()

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and all buffers: counters and controllers are not in the state dict."""
        return dict(self.sae.named_parameters()) | dict(self.sae.named_buffers())

    def state(self) -> dict[str, Any]:
        """All that a step changes."""
        return {
            "sae": {name: tensor.detach() for name, tensor in self._tensors().items()},
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedules": [s.state_dict() for s in self.schedules],
            "plain": {
                name: getattr(self, name)
                for name in ("failed", "sums", "count", "seconds", "parts")
            },
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Puts back what state() gave. Raises ValueError where it belongs to another SAE."""
        self.mode(True)  # first: with optimiser states in place it would exchange weights
        tensors = self._tensors()
        mine, saved = (
            {(name, tensor.shape) for name, tensor in named.items()}
            for named in (tensors, state["sae"])
        )
        if mine != saved:
            odd = ", ".join(sorted({name for name, _ in mine ^ saved})[:4])
            raise ValueError(
                f"the saved state of {self.title} does not fit ({odd}); another version of this program wrote it"
            )
        for name, tensor in tensors.items():
            tensor.copy_(state["sae"][name])
        for mine, saved in zip(
            (*self.optimizers, *self.schedules),
            (*state["optimizers"], *state["schedules"]),
            strict=True,
        ):
            mine.load_state_dict(saved)
        vars(self).update(state["plain"])
        self.sums = {
            name: value.to(self.sae.tokens_since_fired.device) for name, value in self.sums.items()
        }

    def warm_start(self, hidden: dict[int, Tensor]) -> None:
        """Data-dependent initialisation from the first tokens of the whole batch; then the processes are made equal."""
        head = self.sae.gather(
            {site: h[: max(0, WARM_START - self.sae.first)] for site, h in hidden.items()}
        )
        self.sae.warm_start(distributed.concat(head))
        unit_norm_decoder(self.sae)
        distributed.copy_from_main_(list(self._tensors().values()))
        self.mode(True)

    @bf16_matmuls()
    def _gradients(
        self, hidden: dict[int, Tensor], token: Tensor, whole: int, first: int
    ) -> tuple[SAEOutput, dict[str, Tensor]]:
        """Forward and backward over `parts` slices of the tokens; (the pass, or the code of all slices; this process's shares of the loss terms).

        Terms that look at a batch as a whole (the variance in AuxK, a top-k over the batch) then look at each slice.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        passes, terms = [], {}
        parts = min(
            self.parts, -(-whole // distributed.world())
        )  # as many in every process; some may be empty, but not in all
        for at in torch.arange(len(token), device="cpu").tensor_split(parts):
            here = slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0)
            self.sae.part_of(whole, first + (here.start or 0))
            p = self.sae.autoencode(
                self.sae.gather({site: h[here] for site, h in hidden.items()}), token=token[here]
            )
            own = self.sae.loss(p)
            terms = {name: terms.get(name, 0.0) + term.detach() for name, term in own.items()}
            torch.stack(list(own.values())).sum().backward()
            passes.append(p if parts == 1 else p.detach_code())
        self.sae.part_of(whole, first)
        return p if parts == 1 else SAEOutput.cat(passes), terms

    def _within_memory(self, step: int, *batch: Any) -> tuple[SAEOutput, dict[str, Tensor]]:
        """_gradients, in twice as many slices where memory is short, as often as it takes. Raises torch.OutOfMemoryError where slices of one
        token do not help."""
        while True:
            try:
                return self._gradients(*batch)
            except torch.OutOfMemoryError:
                if self.parts >= len(batch[1]):
                    raise
            self.parts *= 2  # outside the handler, whose traceback holds the tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(
                f"{self.title}: out of memory at step {step}; the batch now goes through in {self.parts} parts, with one update as before"
            )

    def _agree_on_parts(self, step: int, *batch: Any) -> None:
        """Several processes take as many slices as the one that needs most. They find out without each other: one that runs out of memory
        within a step that all share would leave the others waiting."""
        before = {name: buffer.clone() for name, buffer in self.sae.named_buffers()}
        with distributed.alone():
            self._within_memory(step, *batch)
        with torch.no_grad():
            for name, buffer in self.sae.named_buffers():
                buffer.copy_(before[name])
        (self.parts,) = distributed.all_max_ints(self.parts)
        self.tried = True

    def step(self, hidden: dict[int, Tensor], token: Tensor, step: int, due: bool) -> None:
        """One update. The tokens are the whole batch, or what sae.part_of has said they are.

        A loss or gradient that is not finite changes nothing, here and in all later steps; check() says so. Raises torch.OutOfMemoryError.
        """
        started = time.perf_counter()
        self.last = None  # tensors that the next forward pass may need the room of
        first = self.sae.first
        batch = hidden, token, len(token) if self.sae.whole is None else self.sae.whole, first
        if not self.tried:
            self._agree_on_parts(step, *batch)
        p, terms = (
            self._within_memory(step, *batch)
            if distributed.world() == 1
            else self._gradients(*batch)
        )
        with torch.no_grad():
            found = torch.stack(
                [*terms.values(), p.fired.sum() / (batch[2] * p.code.shape[1:-1].numel())]
            )
            distributed.all_sum_(
                [found, *(q.grad for q in self.sae.parameters() if q.grad is not None)]
            )
            now = dict(zip([*terms, "L0"], found, strict=True))
            loss = found[:-1].sum()
            if self.normalise_every == 1:
                project_decoder_grad(self.sae)
            gradients = [q.grad for q in self.sae.parameters() if q.grad is not None]
            norm = (
                nn.utils.clip_grad_norm_(self.sae.parameters(), self.clip)
                if self.clip
                else nn.utils.get_total_norm(gradients)
            )
            good = torch.isfinite(loss) & torch.isfinite(
                norm
            )  # the same in every process, as all it is made of
            self.found_inf.masked_fill_(~good, 1)
            self.unread.append((step, list(terms), torch.cat([norm[None], found])))
            for changing in (*self.optimizers, *self.schedules):
                changing.step()
            if step % self.normalise_every == 0:
                unit_norm_decoder(self.sae, self.found_inf == 0)
            self.sae.after_step(p, (step + 1) / self.total)
            self.sums = {k: self.sums.get(k, 0.0) + v for k, v in ({"loss": loss} | now).items()}
            self.count += 1
            self.last = p if due else None
        self.sae.part_of(None, first)
        if due or loss.device.type == "cpu":  # elsewhere reading the flag waits for the device
            self.check()
        self.seconds += time.perf_counter() - started

    def check(self) -> None:
        """Sets `failed` (why) and `failed_at` (the step) where since the last call something was not finite."""
        if self.found_inf and not self.failed:
            self.failed_at, names, values = next(
                one for one in self.unread if not one[2].isfinite().all()
            )
            what = "gradient" if values[1 : len(names) + 1].sum().isfinite() else "loss"
            terms = ", ".join(
                f"{name} {value:.4g}"
                for name, value in zip(names, values[1:].tolist(), strict=False)
            )
            self.failed = f"{self.title}: {what} is not finite at step {self.failed_at} ({terms})"
        self.unread.clear()

    def report(self) -> dict[str, Any]:
        """Means since the last report, dead share, and what the model adds."""
        line = {k: float(v) / self.count for k, v in self.sums.items()} if self.count else {}
        self.sums, self.count = {}, 0
        extra = {} if self.last is None else self.sae.diagnostics(self.last)
        return (
            line
            | {"dead": self.sae.dead_fraction()}
            | {k: v.tolist() if isinstance(v, Tensor) else v for k, v in extra.items()}
        )
