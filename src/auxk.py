"""AuxK: dead latents are revived, because they code what the living ones miss.

Gao et al. 2024, appendix A.2. Every model whose latents can die has one. F latents; W is the width
of what one code stands for: D, or L D for a model with one code for L sites.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from src import sparse
from src.ops import topk_flat_indices
from src.sparse import DictionaryWeights, Selection

MAX_AUXK = 512  # dead latents that are revived at one time
# A run of 1.5M tokens did best with latents called dead after 3 % of it; long runs use the
# papers' 10M tokens (docs/LOG.md).
DEAD_SHARE_OF_RUN, MAX_DEAD_TOKENS = 0.03, 1e7
DEFAULT_COEFFICIENT = 1 / 32

Mean = Callable[[Tensor], Tensor]  # BatchInfo.share_of_mean
Average = Callable[[Tensor], Tensor]  # BatchInfo.mean_over_processes


class AuxK(nn.Module):
    """The auxiliary loss of dead latents, and which latents are dead.

    A latent is dead once it was silent for dead_tokens tokens; None: for 3 % of the run, at most
    10 million. At most hidden_size / 2 dead latents code a token at one time.
    """

    def __init__(
        self, hidden_size: int, coefficient: float, dead_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.max_active = min(hidden_size // 2, MAX_AUXK)
        self.coefficient = coefficient
        self.dead_tokens = dead_tokens
        self.register_buffer("dead_threshold", torch.tensor(float("inf")), persistent=False)

    def dead(self, tokens_since_fired: Tensor) -> Tensor:
        """Return the numbers of the dead latents; none if the coefficient is 0. [F] -> int64"""
        if not self.coefficient:
            return tokens_since_fired[:0].long()
        return (tokens_since_fired > self.dead_threshold).nonzero()[:, 0]

    def loss(
        self,
        x: Tensor,
        residual: Tensor,
        dead: DictionaryWeights,
        share_of_mean: Mean,
        average: Average,
    ) -> Tensor:
        """Return coefficient ||e - sum_f z_f W_dec,f||^2 / ||e - mean(e)||^2. []

        x [N,...,W] is coded by the dead latents that would contribute most; e is the residual
        [N,...,W], a constant. Living latents are in no term and get no gradient.
        """
        k = min(len(dead.encoder), self.max_active)
        norms = dead.decoder.detach().norm(dim=0)

        def choose(pre_acts, _tokens):
            return topk_flat_indices(pre_acts * norms.to(pre_acts.dtype), k)

        selection = Selection(choose, k, clip=True, per_token=True)
        # Dead latents are coded by their entries too: with 300 of them a step takes 35.9 ms on a
        # CPU in place of 47.6 (docs/LOG.md).
        _, x_hat = sparse.sparse_autoencode(x, dead, selection)
        residual = residual.detach()
        error = (residual - (x_hat - dead.pre_bias)).square().sum(-1)
        residual = residual.flatten(0, -2)
        centred = residual - average(residual)
        variance = average(centred.square().sum(-1)).clamp_min(1e-12)
        return self.coefficient * share_of_mean(error) / variance

    @torch.no_grad()
    def update(self, tokens_seen: Tensor, progress: float) -> None:
        """Set the threshold; progress is the share of the run that is done."""
        run_tokens = tokens_seen.double() / max(progress, 1e-9)
        threshold = (DEAD_SHARE_OF_RUN * run_tokens).clamp_max(MAX_DEAD_TOKENS)
        if self.dead_tokens is not None:
            threshold = torch.full_like(threshold, self.dead_tokens)
        self.dead_threshold.copy_(threshold)
