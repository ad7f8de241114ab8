"""What an evaluation measures: objects that take in batches, merge, and compute numbers.

They keep sums over counted tokens, which are divided once. metric_table.py lists the metrics.

N tokens, D hidden, F latents, L sites, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from src import device, router
from src.ops import squared_errors
from src.sae import SAEOutput

# Of the mean square of the states. The variance of equal states is not 0 but rounding.
NO_VARIANCE = 1e-9
CHUNK_TOKENS = 4096  # tokens in float64 at one time


def token_kl(logits_original: Tensor, logits_reconstruct: Tensor) -> Tensor:
    """Return KL(original || reconstruct) of each token, in nats. [...,V] -> [...]"""
    log_p = logits_original.float().log_softmax(-1)
    log_q = logits_reconstruct.float().log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    return terms.sum(-1)


def KLDiv(logits_original: Tensor, logits_reconstruct: Tensor) -> Tensor:
    """Return the mean over tokens of KL(original || reconstruct), in nats."""
    return token_kl(logits_original, logits_reconstruct).mean()


class Prediction:
    """What the language model predicts at some positions, to compare other predictions with.

    Logits [N,V], targets int64 [N].
    """

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self.logits = logits.float()
        self.targets = targets
        self.kernels = device.kernels(logits)
        if self.kernels:
            # Nothing but the logits is kept: comparing .33 ms in place of 2.16 (docs/LOG.md).
            _, self.ce = self.compare(self.logits)
        else:
            self.log_p = self.logits.log_softmax(-1)
            self.p = self.log_p.exp()
            self.ce = self._ce(self.log_p)

    def _ce(self, log_q: Tensor) -> Tensor:
        log_q_of_targets = log_q.gather(-1, self.targets[:, None])
        return -log_q_of_targets[:, 0]

    def compare(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (KL(this || other), cross-entropy of the other) of each token, in nats. [N]"""
        if self.kernels:
            return self.kernels.compare(self.logits, logits.float(), self.targets)
        log_q = logits.float().log_softmax(-1)
        kl = (self.p * (self.log_p - log_q)).sum(-1)
        return kl, self._ce(log_q)


class Sum:
    """A sum of float64 tensors that keeps the error of each addition (Knuth's two-sum).

    Its value depends neither on the order of the additions nor on which process makes them.
    """

    def __init__(self) -> None:
        self.high: Tensor | float = 0.0
        self.low: Tensor | float = 0.0

    def add(self, x: Tensor | float) -> None:
        high = self.high + x
        added = high - self.high
        lost_of_sum = self.high - (high - added)
        lost_of_x = x - added
        self.low = self.low + (lost_of_sum + lost_of_x)
        self.high = high

    def merge(self, other: Sum) -> None:
        self.add(other.high)
        self.low = self.low + other.low

    def value(self) -> Any:
        return self.high + self.low


class Measure:
    """Counts and sums over a part of the data. They can be merged with those of another part."""

    def merge(self, other: Measure) -> None:
        for name, local in vars(self).items():
            added = getattr(other, name)
            if isinstance(local, Sum | Measure):
                local.merge(added)
            else:
                setattr(self, name, local + added)


class Mean(Measure):
    """Sum over tokens / number of tokens; a vector where each token has one."""

    def __init__(self) -> None:
        self.total = Sum()
        self.count = 0

    def update(self, values: Tensor) -> None:
        """Take in the values of N tokens. [N] or [N,L]"""
        self.total.add(values.double().sum(0))
        self.count += len(values)

    def compute(self) -> Any:
        """Return a number or a list; None without tokens."""
        if not self.count:
            return None
        mean = torch.as_tensor(self.total.value()) / self.count
        return mean.tolist()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _total(values: Tensor) -> Tensor:
    """Sum over tokens and hidden units. [N,D] -> [], [N,L,D] -> [L]"""
    return values.sum((0, -1))


def _share(mask: Tensor) -> float:
    """Return the share of True."""
    return float(mask.double().mean())


# ------------------------------------------------------------------------------------- of the code


class Reconstruction(Measure):
    """NormMSE, FVU and Shrinkage of a reconstruction, per site where there are several."""

    def __init__(self) -> None:
        self.norm_mse = Mean()
        self.count = 0
        self.error = Sum()
        self.target = Sum()
        self.target_square = Sum()
        self.product = Sum()
        self.x_hat_square = Sum()

    def update(self, out: SAEOutput) -> None:
        self.norm_mse.update(squared_errors(out.target, out.x_hat))
        self.count += len(out.target)
        targets = out.target.split(CHUNK_TOKENS)
        x_hats = out.x_hat.split(CHUNK_TOKENS)
        for x, x_hat in zip(targets, x_hats, strict=True):
            x = x.double()
            x_hat = x_hat.double()
            self.target.add(x.sum(0))
            self.error.add(_total((x - x_hat).square()))
            self.target_square.add(_total(x.square()))
            self.product.add(_total(x * x_hat))
            self.x_hat_square.add(_total(x_hat.square()))

    def compute(self) -> dict[str, Any]:
        """Return the means over the sites, and the values per site if there are several.

        FVU is the error over the variance around the data mean. Shrinkage is
        E|x_hat|^2 / E<x_hat, x>; it is below 1 where norms are too small, and negative
        where reconstructions point away from the states. Raises ValueError if
        all states of a site are equal: a constant then reconstructs them without error.
        """
        square_of_sum = self.target.value().square().sum(-1)
        mean_square = self.target_square.value()
        variance = mean_square - square_of_sum / self.count
        if bool((variance <= NO_VARIANCE * mean_square).any()):
            raise ValueError(
                f"all {self.count} counted tokens have the same state, so that no reconstruction "
                "can be measured; check the text and the weights of the language model"
            )
        product = self.product.value()
        shrinkage = self.x_hat_square.value() / product
        # An SAE that gives only zeros has shrinkage 0, not 0 / 0.
        shrinkage = torch.where(product == 0, 0, shrinkage)
        values = {
            "NormMSE": self.norm_mse.compute(),
            "FVU": (self.error.value() / variance).tolist(),
            "Shrinkage": shrinkage.tolist(),
        }
        result: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, list):
                result[name] = _mean(value)
                result[f"{name}_per_site"] = value
            else:
                result[name] = value
        return result


class Activity(Measure):
    """L0, the share of latents that never fire, and the histogram of firing rates."""

    EDGES = [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]

    def __init__(self) -> None:
        self.fired: Tensor | int = 0
        self.n_codes = 0

    def update(self, out: SAEOutput) -> None:
        """Every code is a sample; some models have one for every (token, site)."""
        self.fired = self.fired + out.fired
        self.n_codes += out.n_codes

    def compute(self) -> dict[str, Any]:
        density = self.fired.double() / self.n_codes
        dead = density == 0
        counts = [int(dead.sum())]
        for low, high in itertools.pairwise(self.EDGES):
            inside = (density > low) & (density <= high)
            counts.append(int(inside.sum()))
        return {
            "L0": float(density.sum()),
            "Dead": _share(dead),
            "Density": float(density.median()),
            "Density_histogram": {"edges": self.EDGES, "latents": counts},
            "Density_over_1_percent": _share(density > 0.01),
            "Density_over_10_percent": _share(density > 0.1),
        }


CODE_MEASURES = (Reconstruction, Activity)  # what every evaluation updates with every SAEOutput


# ----------------------------------------------------------------------------------- of the router


class Routing(Measure):
    """What the router does: shares, entropies, errors, regret, information of tokens on sites."""

    def __init__(self) -> None:
        self.chosen = Mean()
        self.p = Mean()
        self.p_max = Mean()
        self.p_entropy = Mean()
        self.errors = Mean()
        self.regret = Mean()
        self.is_best = Mean()
        self.error_at_site = Sum()
        # Tokens in each cell (token id, site), flat; they grow with the largest id.
        self.counts = torch.zeros(0, dtype=torch.long)
        self.shuffled_counts = torch.zeros(0, dtype=torch.long)

    def update(
        self,
        weights: Tensor,
        errors: Tensor,
        routed: Tensor,
        token_ids: Tensor,
    ) -> None:
        """Take in a batch.

        weights [N,L] of the router; errors [N,L], NormMSE of each site's state at scale 1;
        routed [N], NormMSE of what was coded, scale included; token_ids int64 [N].
        """
        site = weights.argmax(-1)
        n_sites = weights.shape[-1]
        one_hot = F.one_hot(site, n_sites).double()
        self.chosen.update(one_hot)
        self.p.update(weights)
        self.p_max.update(weights.max(-1).values)
        self.p_entropy.update(router.entropy(weights))
        self.errors.update(errors)
        self.regret.update(router.regret(site, errors))
        is_best = site == errors.argmin(-1)
        self.is_best.update(is_best.double())
        routed_at_site = one_hot * routed[:, None]
        self.error_at_site.add(routed_at_site.sum(0))
        # The seed depends on the batch alone, so that any number of processes agrees.
        keys = torch.arange(len(site), device=site.device)
        shuffled_site = router.shuffled(site, keys, int(token_ids.sum()))
        first_cell = token_ids * n_sites
        self.counts = _count_cells(self.counts, first_cell + site)
        self.shuffled_counts = _count_cells(self.shuffled_counts, first_cell + shuffled_site)

    def merge(self, other: Measure) -> None:
        for name in ("counts", "shuffled_counts"):
            local = getattr(self, name)
            added = getattr(other, name).to(local.device)
            missing = len(added) - len(local)
            local = F.pad(local, (0, max(0, missing)))
            added = F.pad(added, (0, max(0, -missing)))
            setattr(self, name, local)
            setattr(other, name, added)
        super().merge(other)

    def compute(self) -> dict[str, Any]:
        share = torch.tensor(self.chosen.compute(), dtype=torch.float64)
        n_sites = len(share)
        tokens_at_site = share * self.chosen.count
        error_at_site = [
            float(error / tokens) if tokens > 0 else None
            for error, tokens in zip(self.error_at_site.value(), tokens_at_site, strict=True)
        ]
        return {
            "share": share.tolist(),
            "mean_p": self.p.compute(),
            "p_max": self.p_max.compute(),
            "p_entropy": self.p_entropy.compute(),
            "share_entropy": float(router.entropy(share)),
            "NormMSE_of_routed": error_at_site,
            # In nats. The estimate is biased upwards by about its value for shuffled sites.
            "site_token_information": _information(self.counts, n_sites),
            "site_token_information_shuffled": _information(self.shuffled_counts, n_sites),
            # At scale 1, where sites compare with each other. NormMSE is that of the scaled state.
            "NormMSE_unscaled_if_all_went_there": self.errors.compute(),
            "regret_unscaled": self.regret.compute(),
            "agrees_with_best_site_unscaled": self.is_best.compute(),
        }


def _count_cells(counts: Tensor, cells: Tensor) -> Tensor:
    """Return the counts [C] with a batch of cells [N] added; longer if a cell is new."""
    total = torch.bincount(cells, minlength=len(counts)).cpu()
    total[: len(counts)] += counts
    return total


def _information(counts: Tensor, n_sites: int) -> float:
    """Return the mutual information of token and site, from the flat counts."""
    padded = F.pad(counts, (0, -len(counts) % n_sites))
    return router.information(padded.view(-1, n_sites))


# -------------------------------------------------------------------- of the patched language model


class Run(NamedTuple):
    """A run of the language model that measures an SAE."""

    index: int  # of the patches among those that SAE.patches yields
    ablation: str = ""  # what replaces the states; "": the reconstruction


class RunMeasure(Measure):
    """KL, cross-entropy and the clean model's cross-entropy of one run, in nats."""

    def __init__(self) -> None:
        self.kl = Mean()
        self.ce = Mean()
        self.clean_ce = Mean()

    def ce_increase(self) -> float:
        return self.ce.compute() - self.clean_ce.compute()


class PatchedRuns(Measure):
    """The runs of the language model that measure one SAE.

    Sites that the SAE patches one by one have a run each; the metrics are means over these runs.
    """

    def __init__(self) -> None:
        self.runs: dict[Run, RunMeasure] = {}

    def update(self, run: Run, kl: Tensor, ce: Tensor, clean_ce: Tensor) -> None:
        """Take in the values of the predictions of one run, in nats. [N]"""
        measure = self.runs.setdefault(run, RunMeasure())
        measure.kl.update(kl)
        measure.ce.update(ce)
        measure.clean_ce.update(clean_ce)

    def merge(self, other: Measure) -> None:
        for run, measure in other.runs.items():
            self.runs.setdefault(run, RunMeasure()).merge(measure)

    def has_predictions(self) -> bool:
        return bool(self.runs)

    def compute(self, n_rows: int) -> dict[str, Any]:
        """Return the metrics in nats; KLDiv_seq is per row.

        Recovered is the share of the increase of cross-entropy under ablation that the SAE avoids.
        """
        by_ablation: dict[str, list[RunMeasure]] = {}
        # Sums over the sites take them in their order, whatever else was evaluated.
        for run in sorted(self.runs, key=lambda run: run.index):
            by_ablation.setdefault(run.ablation, []).append(self.runs[run])
        patched = by_ablation.pop("")
        kl = [run.kl.compute() for run in patched]
        delta = [run.ce_increase() for run in patched]
        result: dict[str, Any] = {
            "KLDiv": _mean(kl),
            "KLDiv_seq": _mean(kl) * patched[0].kl.count / n_rows,
            "DeltaCE": _mean(delta),
            "CE_clean": patched[0].clean_ce.compute(),
        }
        if len(patched) > 1:
            result |= {"KLDiv_per_site": kl, "DeltaCE_per_site": delta}
        for kind, ablated in by_ablation.items():
            increase = sum(run.ce_increase() for run in ablated)
            ablated_kl = [run.kl.compute() for run in ablated]
            # An ablation that changes no prediction leaves nothing to recover.
            result[f"Recovered_{kind}"] = 1 - sum(delta) / increase if increase else None
            result[f"KLDiv_{kind}_ablation"] = _mean(ablated_kl)
        return result
