"""The coefficient of a sparsity penalty: its warm-up and its control."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEMORY = 0.08  # share of the run over which log(L0 / target) is averaged
LOOK_AHEAD = 0.05  # share of the run that the controller predicts ahead
MAX_STEP_GAIN = 0.2  # of the lasting gain in one step, which bounds it in short runs
MEAN_LAG = 0.25  # the schedule-free mean (--average_power 3) follows a quarter of its age behind


def default_l1_coefficient(hidden_size: int) -> float:
    """Return the coefficient of L1 that suits this width (docs/LOG.md)."""
    return 0.1 / hidden_size**0.5


class SparsityController(nn.Module):
    """The coefficient of a sparsity penalty.

    It warms up from 0 over `warmup`, a share of the run. With target_l0 it is controlled: L0
    falls to its target over `approach_share` of the run and stays there. A shorter approach
    kills latents, a longer one leaves less time at the target. `i_rate` says how fast the lasting
    gain follows the error, per run; `p_gain` how strongly the other gain answers at once. Slower
    gains end a run of 123 steps 5 to 15 % below the target, faster ones swing (docs/LOG.md).
    With `looks_at_lag` the controller also predicts what the schedule-free mean has still to
    make up: weights that are slow to move need it.
    """

    def __init__(
        self,
        coefficient: float,
        *,
        target_l0: float | None = None,
        warmup: float = 0.05,
        approach_share: float = 0.3,
        i_rate: float = 24.0,
        p_gain: float = 1.0,
        looks_at_lag: bool = False,
    ) -> None:
        super().__init__()
        self.base = coefficient
        self.target_l0 = target_l0
        self.warmup = warmup
        self.approach_share = approach_share
        self.i_rate, self.p_strength = i_rate, p_gain
        self.looks_at_lag = looks_at_lag
        start = {
            "warm": 0.0 if warmup else 1.0,
            "i_gain": 1.0,
            "p_gain": 1.0,
            "progress": 0.0,
            "log_l0": float("nan"),
            "first_l0": float("nan"),
        }
        for name, value in start.items():
            self.register_buffer(name, torch.tensor(value), persistent=False)

    def coefficient(self) -> Tensor:
        """Return the coefficient of this step. []"""
        return self.base * self.warm * self.i_gain * self.p_gain

    @torch.no_grad()
    def update(self, mean_l0: Tensor, progress: float) -> None:
        """Take in the mean L0 of a step; progress is the share of the run that is done."""
        self.warm.fill_(min(1.0, progress / self.warmup) if self.warmup else 1.0)
        if self.target_l0:
            self._control((mean_l0 / self.target_l0).clamp_min(1e-3).log(), progress)

    def _control(self, log_l0: Tensor, progress: float) -> None:
        """Move both gains of a PI controller by the predicted log(L0 / target).

        Between the target and a bound that closes in on it, ever more slowly, nothing is done. All
        rates are per run, so that its length changes nothing, except where MAX_STEP_GAIN bounds a
        step.
        """
        step = progress - self.progress
        before = self.log_l0.clone()
        self.progress.fill_(progress)
        if before.isnan():
            self.log_l0.copy_(log_l0)
            self.first_l0.copy_(log_l0.clamp_min(0))
            return
        self.log_l0.lerp_(log_l0, (step / MEMORY).clamp_max(1))
        look_ahead = LOOK_AHEAD
        if self.looks_at_lag:
            look_ahead += progress * MEAN_LAG
        predicted = self.log_l0 + look_ahead * (self.log_l0 - before) / step
        bound = 0.0
        if self.approach_share:
            bound = self.first_l0 * max(0.0, 1 - progress / self.approach_share) ** 2
        too_sparse = predicted.clamp(max=0)
        too_dense = (predicted - bound).clamp(min=0)
        error = (too_sparse + too_dense).clamp(-1, 1)
        self.i_gain *= torch.exp(min(self.i_rate * step, MAX_STEP_GAIN) * error)
        self.p_gain.copy_((self.p_strength * error).exp())
