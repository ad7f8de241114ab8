"""The coefficient of a sparsity penalty: its warm-up and its control."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEMORY = 0.1  # weight of the newest batch in the running mean of log(L0 / target)
LOOK_AHEAD = 0.05  # share of the run that the controller predicts ahead
I_RATE = 8.0  # how fast the lasting gain follows the error, per run


def default_l1_coefficient(hidden_size: int) -> float:
    """Return the coefficient of L1 that suits this width (docs/LOG.md)."""
    return 0.1 / hidden_size**0.5


class SparsityController(nn.Module):
    """The coefficient of a sparsity penalty.

    It warms up from 0 over `warmup`, a share of the run. With target_l0 it is controlled: L0
    falls to its target over `approach_share` of the run and stays there. A shorter approach
    kills latents, a longer one leaves less time at the target (docs/LOG.md).
    """

    def __init__(
        self,
        coefficient: float,
        *,
        target_l0: float | None = None,
        warmup: float = 0.05,
        approach_share: float = 0.25,
    ) -> None:
        super().__init__()
        self.base = coefficient
        self.target_l0 = target_l0
        self.warmup = warmup
        self.approach_share = approach_share
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

        Between the target and a bound that closes in on it, nothing is done. All rates are per
        run, so that the length of the run changes nothing.
        """
        step = progress - self.progress
        before = self.log_l0.clone()
        self.progress.fill_(progress)
        if before.isnan():
            self.log_l0.copy_(log_l0)
            self.first_l0.copy_(log_l0.clamp_min(0))
            return
        self.log_l0.lerp_(log_l0, MEMORY)
        bound = 0.0
        if self.approach_share:
            bound = self.first_l0 * max(0.0, 1 - progress / self.approach_share)
        too_sparse = self.log_l0.clamp(max=0)
        too_dense = (self.log_l0 - bound).clamp(min=0)
        trend = LOOK_AHEAD * (self.log_l0 - before) / step
        error = (too_sparse + too_dense + trend).clamp(-1, 1)
        self.i_gain *= torch.exp(I_RATE * step * error)
        self.p_gain.copy_(error.exp())
