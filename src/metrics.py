"""What is measured, as objects with update, merge and compute: sums over counted tokens, divided once.

N tokens, D hidden, F latents, L sites, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src import device, router
from src.ops import squared_errors
from src.sparse import SparseCode, firings

CHUNK_TOKENS = 4096  # tokens in float64 at one time
UNITS = {
    "NormMSE": "share of squared norm",
    "FVU": "share of variance",
    "L0": "latents a token",
    "Dead": "share of latents",
    "Density": "share of tokens",
    "KLDiv": "nats a token",
    "KLDiv_seq": "nats a sequence",
    "DeltaCE": "nats a token",
    "Recovered_zero": "share",
    "Recovered_mean": "share",
    "Shrinkage": "1 = none",
}


def token_kl(logits_original: Tensor, logits_reconstruct: Tensor) -> Tensor:
    """KL(original || reconstruct) of each token, in nats. [...,V] -> [...]"""
    p, q = logits_original.float().log_softmax(-1), logits_reconstruct.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def KLDiv(logits_original: Tensor, logits_reconstruct: Tensor) -> Tensor:
    """Mean over tokens of KL(original || reconstruct), in nats."""
    return token_kl(logits_original, logits_reconstruct).mean()


class Prediction:
    """What the language model predicts at some positions, for others to be compared with. Logits [N,V], targets int64 [N]."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self.logits, self.targets, self.fast = logits.float(), targets, device.kernels(logits)
        if self.fast:  # keeps nothing but the logits
            _, self.ce = self.fast.compare(self.logits, self.logits, targets)
        else:
            self.log_p = self.logits.log_softmax(-1)
            self.p, self.ce = self.log_p.exp(), self._ce(self.log_p)

    def _ce(self, log_q: Tensor) -> Tensor:
        return -log_q.gather(-1, self.targets[:, None])[:, 0]

    def compare(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(KL(this || other), cross-entropy of the other) of each token, in nats [N]."""
        if self.fast:
            return self.fast.compare(self.logits, logits.float(), self.targets)
        log_q = logits.float().log_softmax(-1)
        return (self.p * (self.log_p - log_q)).sum(-1), self._ce(log_q)


class Sum:
    """A sum of float64 tensors that keeps the error of each addition (Knuth's two-sum): neither their order nor who adds changes its value."""

    def __init__(self) -> None:
        self.high: Tensor | float = 0.0
        self.low: Tensor | float = 0.0

    def add(self, x: Tensor | float) -> None:
        high = self.high + x
        added = high - self.high
        self.low = self.low + ((self.high - (high - added)) + (x - added))
        self.high = high

    def merge(self, other: Sum) -> None:
        self.add(other.high)
        self.low = self.low + other.low

    def value(self) -> Any:
        return self.high + self.low


class Measure:
    """Counts and sums that can be added to those of another part of the same data."""

    def merge(self, other: Measure) -> None:
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if isinstance(mine, Sum | Measure):
                mine.merge(theirs)
            else:
                setattr(self, name, mine + theirs)


class Mean(Measure):
    """Sum over tokens / number of tokens; a vector where each token has one."""

    def __init__(self) -> None:
        self.total, self.count = Sum(), 0

    def update(self, values: Tensor) -> None:
        """values [N] or [N,L]"""
        self.total.add(values.double().sum(0))
        self.count += len(values)

    def compute(self) -> Any:
        if not self.count:
            return None
        result = torch.as_tensor(self.total.value()) / self.count
        return result.tolist()


class Reconstruction(Measure):
    """NormMSE, FVU and Shrinkage of (target, x_hat), per site where there are several."""

    def __init__(self) -> None:
        self.norm_mse, self.n = Mean(), 0
        self.error, self.first, self.second, self.cross, self.hat = (Sum() for _ in range(5))

    def update(self, target: Tensor, x_hat: Tensor) -> None:
        """[N,D] or [N,L,D]"""
        self.norm_mse.update(squared_errors(target, x_hat))
        self.n += len(target)
        for x, y in zip(target.split(CHUNK_TOKENS), x_hat.split(CHUNK_TOKENS), strict=True):
            x, y = x.double(), y.double()
            self.error.add((x - y).square().sum((0, -1)))
            self.first.add(x.sum(0))
            self.second.add(x.square().sum((0, -1)))
            self.cross.add((x * y).sum((0, -1)))
            self.hat.add(y.square().sum((0, -1)))

    def compute(self) -> dict[str, Any]:
        """FVU: error over variance around the data mean. Shrinkage: E|x_hat|^2 / E<x_hat, x>, below 1 where norms are too small."""
        variance = self.second.value() - self.first.value().square().sum(-1) / self.n
        shrinkage = (
            self.hat.value() / self.cross.value().clamp_min(1e-300)
        ).tolist()  # an SAE that gives only zeros has 0, not 0/0
        found = {
            "NormMSE": self.norm_mse.compute(),
            "FVU": (self.error.value() / variance).tolist(),
            "Shrinkage": shrinkage,
        }
        result: dict[str, Any] = {}
        for name, value in found.items():
            result[name] = sum(value) / len(value) if isinstance(value, list) else value
            if isinstance(value, list):
                result[f"{name}_per_site"] = value
        return result


class Activity(Measure):
    """L0, share of latents that never fire, and the histogram of firing rates."""

    EDGES = [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]

    def __init__(self) -> None:
        self.fired, self.n = 0, 0

    def update(self, code: Tensor | SparseCode) -> None:
        """[N,F] or [N,L,F]; every (token, site) is a sample."""
        self.fired = self.fired + firings(code)
        self.n += code.shape[:-1].numel()

    def compute(self) -> dict[str, Any]:
        density = self.fired.double() / self.n
        counts = [
            int(((density > low) & (density <= high)).sum())
            for low, high in zip(self.EDGES, self.EDGES[1:], strict=False)
        ]
        return {
            "L0": float(density.sum()),
            "Dead": float((density == 0).double().mean()),
            "Density": float(density.median()),
            "Density_histogram": {
                "edges": self.EDGES,
                "latents": [int((density == 0).sum()), *counts],
            },
            "Density_over_1_percent": float((density > 0.01).double().mean()),
            "Density_over_10_percent": float((density > 0.1).double().mean()),
        }


class Routing(Measure):
    """What the router does: share and mean p per site, entropies, error per site, regret against the best site, what a token says about its site."""

    def __init__(self) -> None:
        self.chosen, self.p, self.p_max, self.p_entropy, self.error, self.regret, self.best = (
            Mean() for _ in range(7)
        )
        self.at_site = Sum()
        self.counts, self.shuffled = (torch.zeros(0, dtype=torch.long) for _ in range(2))

    def update(self, weights: Tensor, errors: Tensor, routed: Tensor, token_ids: Tensor) -> None:
        """weights [N,L] of the router; errors [N,L] NormMSE of each site's state as it is; routed [N] of what was coded (p x); token_ids [N]"""
        site, n_sites = weights.argmax(-1), weights.shape[-1]
        one_hot = F.one_hot(site, n_sites).double()
        self.p.update(weights)
        self.p_max.update(weights.max(-1).values)
        self.p_entropy.update(router.entropy(weights))
        self.error.update(errors)
        self.regret.update(router.regret(site, errors))
        self.best.update((site == errors.argmin(-1)).double())
        self.at_site.add((one_hot * routed[:, None]).sum(0))
        others = router.shuffled(
            site, torch.arange(len(site), device=site.device), int(token_ids.sum())
        )  # seeded by the batch alone
        self.chosen.update(one_hot)
        self.counts = self._counted(self.counts, token_ids * n_sites + site)
        self.shuffled = self._counted(self.shuffled, token_ids * n_sites + others)

    def merge(self, other: Measure) -> None:
        for name in ("counts", "shuffled"):
            mine, theirs = getattr(self, name), getattr(other, name).to(getattr(self, name).device)
            size = max(len(mine), len(theirs))
            setattr(self, name, F.pad(mine, (0, size - len(mine))))
            setattr(other, name, F.pad(theirs, (0, size - len(theirs))))
        super().merge(other)

    @staticmethod
    def _counted(counts: Tensor, cells: Tensor) -> Tensor:
        added = torch.bincount(cells, minlength=len(counts)).cpu()
        added[: len(counts)] += counts
        return added

    def _information(self, counts: Tensor, n_sites: int) -> float:
        return router.information(F.pad(counts, (0, -len(counts) % n_sites)).view(-1, n_sites))

    def compute(self) -> dict[str, Any]:
        share = torch.tensor(self.chosen.compute(), dtype=torch.float64)
        per_site = [
            float(e / n) if n > 0 else None
            for e, n in zip(self.at_site.value(), share * self.chosen.count, strict=True)
        ]
        return {
            "share": share.tolist(),
            "mean_p": self.p.compute(),
            "p_max": self.p_max.compute(),
            "p_entropy": self.p_entropy.compute(),
            "share_entropy": float(router.entropy(share)),
            "NormMSE_of_routed": per_site,
            # nats; the estimate is too high by what it finds where the sites are shuffled over the tokens
            "site_token_information": self._information(self.counts, len(share)),
            "site_token_information_shuffled": self._information(self.shuffled, len(share)),
            # from here on at scale 1, where sites compare with each other; not the error of p x that the headline reports
            "NormMSE_unscaled_if_all_went_there": self.error.compute(),
            "regret_unscaled": self.regret.compute(),
            "agrees_with_best_site_unscaled": self.best.compute(),
        }
