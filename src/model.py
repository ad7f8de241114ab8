"""The sparse autoencoders of the zoo. src/reference.py has the same models as their formulas read.

N tokens (any leading dimensions), L sites, D hidden, F latents. Sites are numbered from 1; a
site index counts the routed sites from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import router, sparse
from src.auxk import DEFAULT_COEFFICIENT as DEFAULT_AUXK_COEFFICIENT
from src.auxk import AuxK
from src.draws import random_subset
from src.ops import Jump_func as Jump_func  # a documented name of this module
from src.ops import Step_func as Step_func
from src.ops import (
    apply_inference_cut,
    count_above,
    flat_indices,
    gated_magnitudes,
    jump,
    kth_largest,
    linear,
    saturated_sum,
    shifted_relu,
    squared_errors,
    topk_flat_indices,
)
from src.router import Router
from src.sae import (
    SAE,
    WHOLE_BATCH,
    BatchInfo,
    Dictionary,
    SAEOutput,
    centre_,
    edited_code,
    routed_sites,
)
from src.sparse import DictionaryWeights, Selection
from src.sparsity import SparsityController, default_l1_coefficient
from src.zoo import FEW_LATENTS, TUNED_WIDTH, ZOO, canonical

CUT_RATE = 20  # BatchTopK's threshold remembers 1/20 of a run
MATRYOSHKA_PARTS = (1, 3, 7, 15)  # of 32: where the paper's prefixes end, before the whole
MIN_THRESHOLD = 1e-4
DEFAULT_L0_COEFFICIENT = 1e-3
DEFAULT_START_L0 = 4.0  # in units of target_l0
START_TOKENS = 2048  # on which the biases of the start are found


# -------------------------------------------------------------------------------- dead latents


class _RevivedSAE(SAE):
    """Base of the models whose dead latents are revived: AuxK lets them code the residual."""

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        *,
        auxk_coeff: float = DEFAULT_AUXK_COEFFICIENT,
        dead_tokens: int | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(hidden_size, latent_size, **rest)
        self.auxk = AuxK(hidden_size, auxk_coeff, dead_tokens)

    def dictionary_of(self, latents: Tensor) -> DictionaryWeights:
        """Return the dictionary of some latents, which says what would make them active."""
        raise NotImplementedError

    def revival(self, out: SAEOutput, batch: BatchInfo) -> dict[str, Tensor]:
        """Return the term of the loss that revives dead latents; {} where there are none."""
        latents = self.auxk.dead(self.tokens_since_fired)
        if not len(latents):
            return {}
        dead = self.dictionary_of(latents)
        # One row for each code: a code for all sites stands for the states of all sites.
        width = dead.encoder.shape[1]
        n_tokens, *rest = out.target.shape
        rows = (n_tokens, math.prod(rest) // width, width)
        if out.pre_bias is not None:
            dead = dead._replace(pre_bias=out.pre_bias.reshape(rows))
        x = out.target.reshape(rows)
        residual = x - out.x_hat.reshape(rows)
        loss = self.auxk.loss(x, residual, dead, batch.share_of_mean, batch.mean_over_processes)
        return {"AuxK": loss}

    @torch.no_grad()
    def after_step(self, out, progress, batch=WHOLE_BATCH):
        super().after_step(out, progress, batch)
        self.auxk.update(self.tokens_seen, progress)


class _RevivedDictionary(_RevivedSAE, Dictionary):
    """Base of those with one encoder whose latents no bias silences."""

    def _weights(self, bias: Tensor | None = None) -> DictionaryWeights:
        pre_bias = self.pre_bias if bias is None else bias
        return DictionaryWeights(
            pre_bias, self.encoder.weight, self.latent_bias, self.decoder.weight
        )

    def dictionary_of(self, latents):
        return self._weights().subset(latents)


# --------------------------------------------------------------------- k active latents a token


class TopK(_RevivedDictionary):
    """Exactly the k largest pre-activations (Gao et al. 2024).

    With hierarchical_k the loss also adds the errors of the code cut to its j largest values, for
    each j listed, so that one SAE serves several k (HierarchicalTopK, arXiv:2505.24473).
    """

    architecture = "topk"
    per_token = True  # a token's choice is independent of other tokens

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        k: int,
        *,
        topk_relu: bool = False,
        hierarchical_k: list[int] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(hidden_size, latent_size, **rest)
        if not 0 < k <= latent_size:
            raise ValueError(
                f"k {k} with {latent_size} latents; it must lie between 1 and the latent size"
            )
        if any(not 0 < smaller <= k for smaller in hierarchical_k or ()):
            listed = " ".join(map(str, hierarchical_k))
            raise ValueError(f"hierarchical_k {listed} with k {k}; each lies between 1 and k")
        self.k = k
        self.smaller_k = sorted(set(hierarchical_k or ()) - {k})
        self.topk_relu = topk_relu

    def choose(self, pre_acts: Tensor, token_keys: Tensor, batch: BatchInfo) -> Tensor:
        """Return which latents stay active, as flat indices in [N,F], token by token."""
        return topk_flat_indices(pre_acts, self.k)

    def activate(self, pre_acts, batch=WHOLE_BATCH):
        rows = pre_acts.flatten(0, -2)
        flat = pre_acts.flatten()
        index = self.choose(rows, batch.keys_of(rows), batch)
        kept = F.relu(flat[index]) if self.topk_relu else flat[index]
        return torch.zeros_like(flat).scatter(0, index, kept).view_as(pre_acts)

    def cut_latents(self, pre_acts, batch=WHOLE_BATCH):
        if not batch.has_cut:
            return self.activate(pre_acts, batch)
        return batch.cut(F.relu(pre_acts) if self.topk_relu else pre_acts)  # replaces k

    def autoencode(self, x, batch=WHOLE_BATCH, bias=None):
        if batch.has_cut:
            return super().autoencode(x, batch, bias)
        keys = batch.keys_of(x.flatten(0, -2))

        def choose(pre_acts, tokens):
            return self.choose(pre_acts, keys[tokens], batch)

        selection = Selection(choose, self.k, self.topk_relu, self.per_token)
        code, x_hat = sparse.sparse_autoencode(x, self._weights(bias), selection)
        return SAEOutput(x, code, x_hat, pre_bias=bias)

    def penalty(self, out, batch=WHOLE_BATCH):
        return self._nested(out, batch) | self.revival(out, batch)

    def _nested(self, out: SAEOutput, batch: BatchInfo) -> dict[str, Tensor]:
        """Return the errors of parts of the code that must reconstruct alone, added up."""
        if not self.smaller_k:
            return {}
        rank = sparse.ranks(out.code)
        errors = sum(self._part_errors(out, rank < k, self.latent_size) for k in self.smaller_k)
        return {"Nested": batch.share_of_mean(errors)}

    def _part_errors(self, out: SAEOutput, kept: Tensor, width: int) -> Tensor:
        """Return each token's error if only the kept entries of its code are active. [...]

        They must lie within the first `width` latents.
        """
        token, latent, values = sparse.active(out.code)
        known = values[kept].detach(), token[kept] * width + latent[kept]
        selection = Selection(None, self.k, self.topk_relu, per_token=False, known=known)
        part = self._weights(out.pre_bias).subset(slice(width))
        _, x_hat = sparse.sparse_autoencode(out.target, part, selection)
        return squared_errors(out.target, x_hat)


class BatchTopK(TopK):
    """The k N largest activations of a batch of N tokens (Bussmann et al. 2024).

    At inference a latent is active above a threshold: the mean of the batches' smallest values.
    Over several processes the batch is the whole one: two summed histograms find its k N-th
    largest value, a minimum the smallest.
    """

    architecture = "batchtopk"
    per_token = False

    def __init__(self, hidden_size: int, latent_size: int, k: int, **rest: Any) -> None:
        rest["topk_relu"] = True
        super().__init__(hidden_size, latent_size, k, **rest)
        # the threshold for inference; its name is that of the key in checkpoints
        self.register_buffer("cut", torch.full((), float("nan")))

    def choose(self, pre_acts, token_keys, batch):
        if not self.training and not self.cut.isnan():
            chosen = pre_acts > self.cut
        else:
            count = self.k * len(pre_acts)
            chosen = pre_acts.float() >= kth_largest(pre_acts, count, batch.all_sum)
        return chosen.flatten().nonzero()[:, 0]

    def to_standard_form(self):
        if self.cut.isnan():
            raise ValueError(
                "this BatchTopK has no threshold for inference; it gets one in training"
            )
        threshold = self.cut.clamp_min(0).expand(self.latent_size)  # negative values are clipped
        (form,) = super().to_standard_form().values()
        tensors = form.tensors | {"threshold": threshold}
        form = form._replace(architecture="jumprelu", tensors=tensors, k=None)
        return {self.layer: form}

    @torch.no_grad()
    def after_step(self, out, progress, batch=WHOLE_BATCH):
        super().after_step(out, progress, batch)
        _, _, values = sparse.active(out.code)
        smallest = values.min() if len(values) else self.cut.new_tensor(torch.inf)
        smallest = -batch.all_max(-smallest)
        smallest = torch.where(smallest.isinf(), self.cut, smallest)
        codes = batch.all_sum(self.tokens_seen.new_full((), out.n_codes))
        share_of_run = codes / self.tokens_seen * progress
        weight = (CUT_RATE * share_of_run).clamp(0.01, 1)
        if self.cut.isnan():
            self.cut.copy_(smallest)
        else:
            self.cut.lerp_(smallest, weight)


class Matryoshka(BatchTopK):
    """BatchTopK in which the first latents must also reconstruct alone (Bussmann et al. 2025).

    arXiv:2503.17547. The loss adds the errors of nested prefixes: what the first m latents of the
    code reconstruct, for each m of `matryoshka_widths` [numbers of latents]. General features then
    come first, and more latents do not split them. The default has the paper's groups, of 1/32,
    1/16, 1/8 and 1/4 of the latents, and the rest. Raises ValueError for a width that is no prefix.
    """

    architecture = "matryoshka"

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        k: int,
        *,
        matryoshka_widths: list[int] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(hidden_size, latent_size, k, **rest)
        if matryoshka_widths is None:
            matryoshka_widths = [latent_size * parts // 32 for parts in MATRYOSHKA_PARTS]
            matryoshka_widths = [width for width in matryoshka_widths if width]
        for width in matryoshka_widths:
            if not 0 < width <= latent_size:
                raise ValueError(
                    f"matryoshka_widths {width} with {latent_size} latents; "
                    "a prefix has at least 1 of them and at most all"
                )
        # NormMSE is the error of the whole code.
        self.shorter_widths = sorted(set(matryoshka_widths) - {latent_size})

    def _nested(self, out, batch):
        if not self.shorter_widths:
            return {}
        _, latent, _ = sparse.active(out.code)
        errors = sum(self._part_errors(out, latent < m, m) for m in self.shorter_widths)
        return {"Nested": batch.share_of_mean(errors)}


class RandomK(TopK):
    """k latents drawn uniformly per token, with their values: the control that must lose.

    The draw is a function of (seed, token key).
    """

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        k: int,
        *,
        seed: int = 42,
        **rest: Any,
    ) -> None:
        rest["auxk_coeff"] = 0.0
        super().__init__(hidden_size, latent_size, k, **rest)
        self.seed = seed

    def choose(self, pre_acts, token_keys, batch):
        drawn = random_subset(token_keys, self.seed, self.latent_size, self.k)
        return flat_indices(drawn, self.latent_size)

    cut_latents = Dictionary.cut_latents  # a cut at inference chooses among those drawn

    def to_standard_form(self):
        reason = "the latents of a RandomK are drawn, not computed from the state"
        raise ValueError(f"{reason}; no other library holds that")


class MLSAE(TopK):
    """One TopK for the states of all routed sites (Lawson et al. 2024).

    Every (token, site) is a sample of the same batch.
    """

    def __init__(
        self,
        hidden_size: int,
        n_layers: int,
        latent_size: int,
        k: int,
        *,
        start_layer: int | None = None,
        end_layer: int | None = None,
        sites: list[int] | None = None,
        site_bias: bool = False,
        **rest: Any,
    ) -> None:
        routed = routed_sites(n_layers, start_layer, end_layer, sites)
        n_biases = len(routed) if site_bias else None
        super().__init__(hidden_size, latent_size, k, n_biases=n_biases, **rest)
        self.routed = routed

    def sites(self):
        return self.routed

    gather = SAE.gather

    def autoencode(self, x, batch=WHOLE_BATCH, bias=None):
        """Code the states of all sites [...,L,D], or others [...,D] with the bias of theirs."""
        if bias is None and self.pre_bias.dim() > 1:
            bias = self.pre_bias.expand(x.shape)
        return super().autoencode(x, batch, bias)

    def autoencode_at(self, index, x, batch=WHOLE_BATCH):
        return self.autoencode(x, batch, self.bias_at(index).expand(x.shape))

    def edit_site(self, out, latents):
        strength = sparse.dense(self.strength(out))
        by_site = strength[..., latents].sum((0, 2))
        return self.routed[int(by_site.argmax())]


# ----------------------------------------------------------------- a penalty makes them sparse


class _PenaltySAE(_RevivedSAE):
    """Base of the models whose sparsity comes from a penalty with a controlled coefficient."""

    sparsity: SparsityController

    @torch.no_grad()
    def after_step(self, out, progress, batch=WHOLE_BATCH):
        super().after_step(out, progress, batch)
        mean_l0 = None
        if self.sparsity.target_l0:
            firings = out.fired.sum()[None]
            sums = batch.all_sum(torch.cat([firings, firings.new_full((1,), out.n_codes)]))
            mean_l0 = sums[0] / sums[1]
        self.sparsity.update(mean_l0, progress)


def _gradient_only(bias: Tensor) -> Tensor:
    """Return 0 with the gradient of a bias.

    A penalty kills a latent by a bias so low that ReLU is 0 for every token. AuxK would get no
    gradient through it.
    """
    return bias - bias.detach()


class _L1SAE(_PenaltySAE):
    """Base of the models with an L1 penalty on their latents.

    With target_l0, all latents begin equally active, so that start_l0 targets of them are active
    on a token. From a denser start L1 kills most latents on the way down (docs/LOG.md).
    """

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        *,
        l1_coeff: float | None = None,
        l1_mean: bool = False,
        l1_saturation: float = 0.0,
        target_l0: float | None = None,
        sparsity_warmup: float = 0.05,
        start_l0: float = DEFAULT_START_L0,
        **dictionary: Any,
    ) -> None:
        super().__init__(hidden_size, latent_size, **dictionary)
        if l1_coeff is None:
            l1_coeff = default_l1_coefficient(hidden_size)
        self.l1_mean = l1_mean
        self.l1_saturation = l1_saturation
        self.start_l0 = start_l0
        self.sparsity = SparsityController(l1_coeff, target_l0=target_l0, warmup=sparsity_warmup)

    @torch.no_grad()
    def warm_start(self, x):
        super().warm_start(x)
        if not self.start_l0 or not self.sparsity.target_l0:
            return
        pre_acts = self.pre_acts(x[:START_TOKENS])
        share = self.start_l0 * self.sparsity.target_l0 / self.latent_size  # of the tokens
        active = min(max(1, round(share * len(pre_acts))), len(pre_acts))
        lowest_active = pre_acts.topk(active, dim=0).values[-1]
        self.silencing_bias().sub_(lowest_active.clamp_min(0))

    def revival(self, out, batch):
        """Return AuxK, which here also lifts the bias of each dead latent until it is active.

        The lift is 0 in value; AuxK alone gives dead latents a direction, but leaves them below
        the bias that silences them (docs/LOG.md).
        """
        terms = super().revival(out, batch)
        if terms:
            dead = self.auxk.dead(self.tokens_since_fired)
            share = batch.share_of_mean(out.target.new_ones(len(out.target)))
            lift = _gradient_only(self.silencing_bias()[dead]).sum()
            terms["AuxK"] = terms["AuxK"] - self.auxk.coefficient * share * lift
        return terms

    def silencing_bias(self) -> Tensor:
        """Return the bias by which a latent can be silent for every token. [F]"""
        return self.latent_bias

    def _l1(self, latents: Tensor, norms: Tensor, batch: BatchInfo) -> Tensor:
        """Return the penalty: latents [N,F] weighted by decoder norms [F], or their mean.

        With l1_saturation a strength s counts a tanh(s / a), a being this share of the norm
        sqrt(D) of a token. It is L1 for small s; what is large is not shrunk (docs/LOG.md).
        """
        if self.l1_mean:
            per_token = latents.mean(-1)
        elif self.l1_saturation:
            highest = self.l1_saturation * self.hidden_size**0.5
            per_token = saturated_sum(latents, norms, highest)
        else:
            per_token = latents @ norms
        return self.sparsity.coefficient() * batch.share_of_mean(per_token)


class _L1Dictionary(_L1SAE, Dictionary):
    """Base of those with one site."""

    def dictionary_of(self, latents):
        encoder, decoder = self.encoder.weight[latents], self.decoder.weight[:, latents]
        bias = _gradient_only(self.silencing_bias()[latents])
        return DictionaryWeights(self.pre_bias, encoder, bias, decoder)


class Vanilla(_L1Dictionary):
    """ReLU, and L1 summed over latents, weighted by decoder norms (Conerly et al. 2024)."""

    architecture = "standard"

    def penalty(self, out, batch=WHOLE_BATCH):
        norms = self.decoder.weight.norm(dim=0)
        l1 = self._l1(out.latents, norms, batch)
        return {"L1": l1, **self.revival(out, batch)}


class Gated(_L1Dictionary):
    """A gate decides which latents are active, a magnitude how strongly.

    Rajamanoharan et al. 2024a. The gate is a step without gradient; it learns from L1 on
    ReLU(pi_gate) and from reconstructing through a frozen decoder.
    """

    architecture = "gated"

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        *,
        gated_aux: bool = True,
        **rest: Any,
    ) -> None:
        super().__init__(hidden_size, latent_size, **rest)
        self.gated_aux = gated_aux
        del self.latent_bias
        for name in ("gate_bias", "mag_bias", "r_mag"):
            setattr(self, name, nn.Parameter(torch.zeros(latent_size)))

    def pre_acts(self, x, bias=None):
        return linear(x, self.encoder.weight, shift=self.pre_bias if bias is None else bias)

    def silencing_bias(self):
        return self.gate_bias

    def activate(self, pre_acts, batch=WHOLE_BATCH):
        return gated_magnitudes(pre_acts, self.gate_bias, self.mag_bias, self.r_mag)

    def penalty(self, out, batch=WHOLE_BATCH):
        norms = self.decoder.weight.norm(dim=0)
        revival = self.revival(out, batch)
        if not self.gated_aux:
            return {"L1": self._l1(out.latents, norms, batch), **revival}
        gate = shifted_relu(out.pre_acts, self.gate_bias)
        x_hat = linear(gate, self.decoder.weight.detach(), self.pre_bias.detach())
        return {
            "L1": self._l1(gate, norms.detach(), batch),
            "GateAux": batch.share_of_mean(squared_errors(out.target, x_hat)),
            **revival,
        }


class JumpReLU(_PenaltySAE, _RevivedDictionary):
    """A learned threshold per latent; the penalty counts the pre-activations above it.

    Rajamanoharan et al. 2024b.
    """

    architecture = "jumprelu"

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        threshold: float | None = None,
        bandwidth: float | None = None,
        *,
        l1_coeff: float | None = DEFAULT_L0_COEFFICIENT,
        l0_post_jump: bool = False,
        target_l0: float | None = None,
        sparsity_warmup: float = 0.05,
        **dictionary: Any,
    ) -> None:
        super().__init__(hidden_size, latent_size, **dictionary)
        coefficient = DEFAULT_L0_COEFFICIENT if l1_coeff is None else l1_coeff
        # Thresholds move by one learning rate a step: they answer slowly, and come back slowly.
        self.sparsity = SparsityController(
            coefficient,
            target_l0=target_l0,
            warmup=sparsity_warmup,
            i_rate=16.0,
            p_gain=2.0,
            looks_at_lag=True,
        )
        self.auto_threshold = threshold is None
        if bandwidth is None:  # a share of the pre-activations, which are of size sqrt(D)
            bandwidth = 0.05 * (hidden_size / TUNED_WIDTH) ** 0.5
        if threshold is None:
            threshold = 0.5 * (coefficient * (hidden_size - 1)) ** 0.5
        start = float(max(threshold, MIN_THRESHOLD))
        self.bandwidth = bandwidth
        self.l0_post_jump = l0_post_jump
        self.threshold = nn.Parameter(torch.full((latent_size,), start))

    @torch.no_grad()
    def warm_start(self, x):
        super().warm_start(x)
        target = self.sparsity.target_l0
        if not target or not self.auto_threshold:
            return
        # a threshold moves by one learning rate a step, too slowly for a short run: start where
        # 20 times the target is active
        tokens = x.flatten(0, -2)[:1024]
        pre_acts = self.pre_acts(tokens).flatten()
        active = min(round(20 * target * len(tokens)), len(pre_acts) // 2)
        start = pre_acts.topk(max(1, active)).values[-1]
        self.threshold.fill_(float(start.clamp_min(MIN_THRESHOLD)))

    def lr_factors(self):
        """Return that of the threshold.

        A step is a share of a weight, which is about 1 / sqrt(D). A threshold is of the size of a
        pre-activation, sqrt(D). With the rate of weights L0 ended 16 % below its target on
        SmolLM2, with this one within 3 %. Of few latents many fire at first, and a threshold has
        further to go: with 256, L0 ended 20 % below its target without the second factor, within
        1 % with it (docs/LOG.md).
        """
        few = max(1.0, FEW_LATENTS / self.latent_size) ** 0.5
        return {self.threshold: self.hidden_size / TUNED_WIDTH * few}

    def activate(self, pre_acts, batch=WHOLE_BATCH):
        return jump(pre_acts, self.threshold, self.bandwidth)

    def penalty(self, out, batch=WHOLE_BATCH):
        counted = out.latents if self.l0_post_jump else out.pre_acts
        l0 = count_above(counted, self.threshold, self.bandwidth)
        penalty = self.sparsity.coefficient() * batch.share_of_mean(l0)
        return {"L0_penalty": penalty, **self.revival(out, batch)}

    @torch.no_grad()
    def after_step(self, out, progress, batch=WHOLE_BATCH):
        super().after_step(out, progress, batch)
        if not self.l0_post_jump:
            self.threshold.clamp_(min=MIN_THRESHOLD)


# --------------------------------------------------------------------------- over several sites


class Crosscoder(_L1SAE, SAE):
    """One code read from all routed sites and written back to each (Lindsey et al. 2024).

    Decoder norms say at which sites a latent lives.
    """

    def __init__(
        self,
        hidden_size: int,
        n_layers: int,
        latent_size: int,
        *,
        start_layer: int | None = None,
        end_layer: int | None = None,
        sites: list[int] | None = None,
        decoder_bias: bool = False,
        free_norms: bool = False,
        b_pre_init: str = "geom_median",
        **rest: Any,
    ) -> None:
        super().__init__(hidden_size, latent_size, **rest)
        # It answers late to its coefficient, so L0 falls to the target over the whole run. With the
        # approach of the others L0 fell below the target (11 for 16), and the error was 8 % higher.
        self.sparsity.approach_share = 1.0
        self.routed = routed_sites(n_layers, start_layer, end_layer, sites)
        self.b_pre_init = b_pre_init
        self.n_processed_layers = len(self.routed)
        self.free_norms = free_norms
        self.latent_bias = nn.Parameter(torch.zeros(latent_size))
        self.encoder = nn.ModuleList(
            nn.Linear(hidden_size, latent_size, bias=False) for _ in self.routed
        )
        self.decoder = nn.ModuleList(
            nn.Linear(latent_size, hidden_size, bias=False) for _ in self.routed
        )
        bias = torch.zeros(self.n_processed_layers, hidden_size)
        self.decoder_bias = nn.Parameter(bias) if decoder_bias else None
        # the same at every site, because neighbouring states are alike
        unit = F.normalize(torch.randn(latent_size, hidden_size), dim=1)
        # L1 falls hard on free columns that begin at norm 1
        norm = 0.1 if free_norms else 1.0
        with torch.no_grad():
            for encoder, decoder in zip(self.encoder, self.decoder, strict=True):
                encoder.weight.copy_(unit / self.n_processed_layers)
                decoder.weight.copy_(norm * unit.T)

    def lr_unit(self):
        """Return .3 for the nine sites of the demo model, and more for fewer sites.

        A latent's weights are a vector over all L sites, so each is as 1 / sqrt(L) (docs/LOG.md).
        """
        return 0.3 * (9 / len(self.routed)) ** 0.5

    def lr_factors(self):
        """Return that of the bias.

        It is of the size of a pre-activation, as JumpReLU's threshold is, and it must move fast
        enough for AuxK to lift dead latents. With the rate of weights .21 of them stayed dead on
        SmolLM2, with this one .08 (docs/LOG.md).
        """
        return {self.latent_bias: 10 * self.hidden_size / TUNED_WIDTH}

    def sites(self):
        return self.routed

    def pre_acts(self, x: Tensor) -> Tensor:
        """Return the sum of all encoders and the bias. [...,L,D] -> [...,F]"""
        # one product of concatenated weights: no [N,L,F] tensor
        weight = torch.cat([encoder.weight for encoder in self.encoder], 1)
        return linear(x.flatten(-2), weight, self.latent_bias)

    def encode(self, x: Tensor, infer_k: int | None = None, theta: float | None = None) -> Tensor:
        """Return the dense code. [...,L,D] -> [...,F]"""
        latents = F.relu(self.pre_acts(x))
        return apply_inference_cut(latents, infer_k, theta)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the reconstruction at every site. [...,F] -> [...,L,D]"""
        x_hat = self.contribution(latents)
        return x_hat if self.decoder_bias is None else x_hat + self.decoder_bias

    def contribution(self, latents):
        weight = torch.cat([decoder.weight for decoder in self.decoder])
        return linear(latents, weight).unflatten(-1, (self.n_processed_layers, -1))

    @torch.no_grad()
    def warm_start(self, x):
        """Centre the states of each site: without it most latents begin silent (docs/LOG.md)."""
        if self.decoder_bias is not None:
            sites = zip(self.decoder_bias, self.encoder, x.unbind(-2), strict=True)
            for bias, encoder, states in sites:
                centre_(bias, states, self.b_pre_init)
                self.latent_bias -= encoder.weight @ bias
        super().warm_start(x)

    def dictionary_of(self, latents):
        """Return one dictionary for the states of all sites side by side. [F,L D]"""
        encoder = torch.cat([encoder.weight[latents] for encoder in self.encoder], 1)
        decoder = torch.cat([decoder.weight[:, latents] for decoder in self.decoder])
        centre = encoder.new_zeros(encoder.shape[1])
        if self.decoder_bias is not None:
            centre = self.decoder_bias.detach().flatten()
        bias = _gradient_only(self.latent_bias[latents])
        return DictionaryWeights(centre, encoder, bias, decoder)

    forward = Dictionary.forward  # (latents, x_hat [N,L,D])

    def autoencode(self, x, batch=WHOLE_BATCH):
        pre_acts = self.pre_acts(x)
        latents = batch.cut(F.relu(pre_acts))
        return SAEOutput(x, latents, self.decode(latents), pre_acts)

    def decoder_norms(self) -> Tensor:
        """Return the norm of each latent's column at each site. [L,F]"""
        norms = [decoder.weight.norm(dim=0) for decoder in self.decoder]
        return torch.stack(norms)

    site_profile = decoder_norms

    def site_drive(self, index, x):
        return linear(x[..., index, :], self.encoder[index].weight)

    def edit_site(self, out, latents):
        norm_at_site = self.decoder_norms()[:, latents].sum(1)
        return self.routed[int(norm_at_site.argmax())]

    def penalty(self, out, batch=WHOLE_BATCH):
        norms = self.decoder_norms().mean(0)
        l1 = self._l1(out.latents, norms, batch)
        return {"L1": l1, **self.revival(out, batch)}

    def strength(self, out):
        return out.latents * self.decoder_norms().mean(0)

    def patches(self, hidden, batch=WHOLE_BATCH, *, edit=None, keep_error=True, clean=None):
        # the code has read later sites too, so a run at an early site is no causal comparison
        clean = clean or self.autoencode(self.gather(hidden), batch)
        new = clean.x_hat
        if edit is not None:
            norms = self.decoder_norms().mean(0).clamp_min(1e-12)
            strength = clean.latents * norms
            wanted = edited_code(clean.latents, strength, edit, lambda w: w / norms)
            new = self.decode(wanted)

        def patch_at(index):
            def patch(h):
                _, mean, std = self.standardise(h)
                if edit is not None and keep_error:
                    return h + (new - clean.x_hat)[..., index, :] * std
                return new[..., index, :] * std + mean

            return patch

        for index, site in enumerate(self.routed):
            yield {site: patch_at(index)}

    def decoders(self):
        return [] if self.free_norms else list(self.decoder)


class TokenRouted(SAE):
    """Base of the SAEs that give each token one of their sites and code its state there.

    routing says how the site is chosen (src/router.py). A patch at a site replaces the tokens that
    were given to it, and leaves all others.
    """

    evaluation_options = ("routing",)
    routed: list[int]
    router: Router
    routing: str
    seed: int
    route_scale = "one"  # what multiplies the chosen state: p, one, or ste

    def sites(self):
        return self.routed

    @property
    def encoders_per_token(self):
        return len(self.routed) if self.routing == "oracle" else 1

    def route_weights(self, x: Tensor, batch: BatchInfo) -> Tensor:
        """Return the weights of the sites: p, or p (for "random" 1) at the chosen site alone.

        [...,L,D] -> [...,L]
        """
        keys = batch.keys_of(x.flatten(0, -3))
        if self.routing == "random":
            site = self.router.sample(keys, self.seed)
            site = site.view(x.shape[:-2])
            return router.one_hot(site, x[..., 0])
        weights = self.router(x)
        if self.routing in ("hard", "soft"):
            return weights
        p, site = weights.flatten(0, -2).max(-1)
        if self.routing == "permuted":
            site = router.shuffled(site, keys, self.seed)
        else:
            scale = p if self.route_scale == "p" else None
            errors = self.site_errors(x.flatten(0, -3), scale, batch)
            site = errors.argmin(-1)
        p_at_site = p[:, None] * F.one_hot(site, len(self.routed))
        return p_at_site.view_as(weights)

    @torch.no_grad()
    def site_errors(
        self, x: Tensor, scale: Tensor | None = None, batch: BatchInfo = WHOLE_BATCH
    ) -> Tensor:
        """Return the NormMSE of a token at each site if it were sent there. [N,L,D] -> [N,L]

        The states are multiplied by scale [N].
        """
        if scale is not None:
            x = x * scale[:, None, None]
        errors = []
        for index, state in enumerate(x.unbind(1)):
            out = self.autoencode_at(index, state, batch)
            errors.append(squared_errors(out.target, out.x_hat))
        return torch.stack(errors, dim=1)

    def routing_errors(self, out, batch=WHOLE_BATCH):
        return self.site_errors(out.inputs, None, batch)

    def code_sites(self, out):
        return out.weights.argmax(-1)

    def patches(self, hidden, batch=WHOLE_BATCH, *, edit=None, keep_error=True, clean=None):
        clean = clean or self.autoencode(self.gather(hidden), batch)
        site_index = self.code_sites(clean)

        def patch_at(index):
            def patch(h):
                routed = site_index == index
                if not routed.any():
                    return h
                options = {"edit": edit, "keep_error": keep_error}
                new = self.replacement(h[routed], index, clean, routed, batch, **options)
                return h.index_put((routed,), new.to(h.dtype))

            return patch

        # the language model resumes at the first site in use
        used = site_index.unique().tolist() or [0]
        yield {self.routed[index]: patch_at(index) for index in used}

    def replacement(
        self,
        h: Tensor,
        index: int,
        clean: SAEOutput,
        routed: Tensor,
        batch: BatchInfo,
        **options: Any,
    ) -> Tensor:
        """Return what replaces the raw residual h [n,D] of the tokens `routed` [N] of a site."""
        scale = clean.scale[routed]
        return self.substitute(h, batch.part(routed), index=index, scale=scale, **options)

    def substitute(
        self,
        h: Tensor,
        batch: BatchInfo = WHOLE_BATCH,
        *,
        index: int,
        scale: Tensor,
        edit=None,
        keep_error: bool = True,
    ) -> Tensor:
        """Return what replaces the raw residual h [n,D] of tokens routed to the site of an index.

        scale [n] multiplies the standardised state before it is coded, and divides what is
        decoded.
        """
        x, mean, std = self.standardise(h)
        factor = scale[:, None]
        out = self.autoencode_at(index, factor * x, batch)
        if edit is None:
            return out.x_hat / factor * std + mean
        strength = out.latents / factor
        wanted = edited_code(out.latents, strength, edit, lambda w: w * factor)
        change = self.contribution(wanted) - self.contribution(out.latents)
        if keep_error:
            return h + change / factor * std
        return (out.x_hat + change) / factor * std + mean


class RouteSAE(TokenRouted):
    """A router gives each token one of the routed sites; a TopK codes its state there.

    arXiv:2503.08200, eqs 5-12; the paper multiplies the state by the router's p. routing: "hard"
    takes the argmax, "soft" the mixture. Three are controls. "random" draws a site for each token
    at scale 1, with route_shares or uniformly. "permuted" deals the hard sites to other tokens of
    the batch (of a process's part of it), so that the shares stay; "oracle" takes the site with
    the least error; both keep the token's p.

    router_objective, router_balance: see src/router.py. The errors of all sites are measured on
    one token in L. route_scale is what multiplies the state: "p", "one", or "ste" (1, with the
    gradient of p). Its default is p for the published objective, else one.
    """

    evaluation_options = ("routing", "route_patch")

    def __init__(
        self,
        hidden_size: int,
        n_layers: int,
        latent_size: int,
        k: int,
        *,
        aggre: str = "sum",
        routing: str = "hard",
        route_patch: str = "scaled",
        start_layer: int | None = None,
        end_layer: int | None = None,
        sites: list[int] | None = None,
        router_objective: str = "published",
        router_balance: str = "none",
        router_balance_coef: float | None = None,
        route_scale: str | None = None,
        route_shares: list[float] | None = None,
        site_bias: bool = False,
        seed: int = 42,
        norm_eps: float = 1e-5,
        **topk: Any,
    ) -> None:
        super().__init__(hidden_size, latent_size, norm_eps)
        router.check_choice("routing", routing, router.ROUTINGS)
        router.check_choice("route_scale", route_scale, (None, *router.SCALES))
        if routing not in router.LEARNING_ROUTINGS:
            router_objective, router_balance = "published", "none"
        _check_shares(route_shares, routing, router_objective)
        self.routed = routed_sites(n_layers, start_layer, end_layer, sites)
        self.n_layers = n_layers
        self.start_layer = self.routed[0]
        self.end_layer = self.routed[-1] + 1
        self.n_routed_layers = len(self.routed)
        self.routing = routing
        self.route_patch = route_patch
        self.seed = seed
        self.route_scale = route_scale or ("p" if router_objective == "published" else "one")
        self.fits_shares = bool(route_shares) and routing != "random"
        self.router = Router(
            hidden_size,
            self.n_routed_layers,
            objective=router_objective,
            balance=router_balance,
            balance_coefficient=router_balance_coef,
            aggre=aggre,
            shares=route_shares,
            keep_bias=router_balance == "bias" or self.fits_shares,
        )
        n_biases = self.n_routed_layers if site_bias else None
        self.sae = TopK(hidden_size, latent_size, k, n_biases=n_biases, **topk)
        self.k = k

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if f"{prefix}load_bias" in state_dict:  # where earlier versions kept it
            state_dict[f"{prefix}router.load_bias"] = state_dict.pop(f"{prefix}load_bias")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # -------------------------------------------------------- the documented form

    def get_router_weights(self, x: Tensor, aggre: str = "sum") -> Tensor:
        """Return the softmax over sites of the routed states' sum or mean. [...,L,D] -> [...,L]"""
        return self.router(x, aggre)

    def route(
        self, x: Tensor, router_weights: Tensor, routing: str = "hard"
    ) -> tuple[Tensor, Tensor]:
        """Return (layer_weights [...,L], routed_x [...,D]).

        Hard: layer_weights is 1 at the argmax and 0 elsewhere, routed_x is that site's state
        times p (times 1 if route_scale is not p). Soft: layer_weights is p, routed_x the mixture.
        """
        router.check_choice("routing", routing, router.ROUTINGS)
        if routing == "soft":
            return router_weights, (router_weights[..., None] * x).sum(-2)
        p, site = router_weights.max(-1, keepdim=True)
        # One site's state, not a sum over L products of which L-1 are 0. With cheaper statistics
        # this halved RouteSAE's step on a CPU, 184 to 96 ms (docs/LOG.md).
        state = x.take_along_dim(site[..., None], -2).squeeze(-2)
        layer_weights = torch.zeros_like(router_weights).scatter(-1, site, 1.0)
        if self.route_scale == "p":
            state = p * state
        return layer_weights, state

    def forward(
        self,
        x: Tensor,
        aggre: str = "sum",
        routing: str = "hard",
        infer_k: int | None = None,
        theta: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return (layer_weights, routed_x, latents, x_hat, router_weights), as the reference does.

        x holds the routed sites, all sites, or all sites and the embedding. [...,L,D]
        """
        x = self._routed_part(x)
        router_weights = self.get_router_weights(x, aggre)
        layer_weights, routed_x = self.route(x, router_weights, routing)
        cut = BatchInfo(infer_k=infer_k, theta=theta)
        out = self.sae.autoencode(routed_x, cut, self._bias(layer_weights))
        return layer_weights, routed_x, out.latents, out.x_hat, router_weights

    def _routed_part(self, x: Tensor) -> Tensor:
        layers = x.shape[-2]
        if layers == self.n_routed_layers:
            return x
        if layers in (self.n_layers, self.n_layers + 1):
            first = layers == self.n_layers  # the site that the first entry holds
            return x[..., [site - first for site in self.routed], :]
        expected = f"expected {self.n_routed_layers} routed ones, or all {self.n_layers}"
        raise ValueError(f"{layers} layers; {expected} (+1 with the embedding)")

    # ----------------------------------------------------------- routing and coding

    def _bias(self, layer_weights: Tensor) -> Tensor | None:
        """Return the bias of each token's site, or their mixture; None if sites share one."""
        if self.sae.pre_bias.dim() == 1:
            return None
        # A product, because the gradient of an index adds up token by token.
        return layer_weights @ self.sae.pre_bias

    def autoencode(self, x, batch=WHOLE_BATCH):
        weights = self.route_weights(x, batch)
        layer_weights, routed = self.route(x, weights, self.routing)
        scale = weights.max(-1).values
        through = self.router.objective == "ste"
        if self.routing != "soft" and (through or self.route_scale != "p"):
            if through:
                site_weights = router.straight_through(weights)
                routed = (site_weights[..., None] * x).sum(-2)
            if self.route_scale == "ste":
                routed = routed * (scale / scale.detach())[..., None]
            scale = torch.ones_like(scale)
        out = self.sae.autoencode(routed, batch.cut_only(), self._bias(layer_weights))
        return out.replace(weights=weights, scale=scale, inputs=x)

    def contribution(self, latents):
        return self.sae.contribution(latents)

    def strength(self, out):
        if self.routing == "soft":
            return out.code
        return sparse.divided(out.code, out.scale)

    def autoencode_at(self, index, x, batch=WHOLE_BATCH):
        bias = self.sae.bias_at(index).expand(x.shape)
        return self.sae.autoencode(x, batch.cut_only(), bias)

    # -------------------------------------------------------------------- training

    def _sampled_errors(self, out: SAEOutput, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        """Return (errors, weights), both [n,L], of every L-th token.

        Tokens are counted over the whole training, so that any split of a batch into processes
        and slices samples the same ones.
        """
        first = (int(self.tokens_seen) - batch.token_offset) % self.n_routed_layers
        sampled = slice(first, None, self.n_routed_layers)
        x = out.inputs.flatten(0, -3)[sampled]
        weights = out.weights.flatten(0, -2)[sampled]
        scale = out.scale.flatten()[sampled]
        return self.site_errors(x, scale.detach()), weights

    def penalty(self, out, batch=WHOLE_BATCH):
        terms = self.sae.penalty(out, batch)
        if self.router.needs_errors and out.weights.requires_grad:
            errors, weights = self._sampled_errors(out, batch)
            tokens = batch.batch_tokens
            if tokens is None:
                tokens = out.weights.shape[:-1].numel()
            first = int(self.tokens_seen) % self.n_routed_layers
            count = len(range(first, tokens, self.n_routed_layers))  # in the whole batch
            if count:
                average = batch.mean_over_processes
                terms["Router"] = self.router.error_loss(weights, errors, count, average)
        balance = self.router.balance_loss(
            out.weights, batch.share_of_mean, batch.mean_over_processes
        )
        if balance is not None:
            terms["Balance"] = balance
        return terms

    def adam_parameters(self):
        return [self.router.weight]  # sign steps of 1e-2 saturate p at 1 within ten steps

    @torch.no_grad()
    def warm_start(self, x):
        self.sae.warm_start(x)
        if self.fits_shares:
            self.router.fit_shares(x)

    @torch.no_grad()
    def after_step(self, out, progress, batch=WHOLE_BATCH):
        super().after_step(out, progress, batch)
        self.sae.after_step(out, progress, batch)
        self.router.update_bias(out.weights, batch.mean_over_processes)

    @torch.no_grad()
    def diagnostics(self, out, batch=WHOLE_BATCH):
        """Return router.summary (errors of one token in L) and the router's gradient norm."""
        weights = out.weights.flatten(0, -2)
        errors, sampled = self._sampled_errors(out, batch)
        result = router.summary(weights, errors, sampled, batch.mean_over_processes)
        grad = self.router.weight.grad
        if grad is not None:
            result["router_grad"] = grad.norm()
        return result

    def decoders(self):
        return self.sae.decoders()

    def held(self):
        return self.sae.held()

    # -------------------------------------------------------------------- patching

    def replacement(self, h, index, clean, routed, batch, **options):
        if self.routing == "soft":
            return self._substitute_mixture(h, clean, routed, **options)
        if self.route_patch == "unscaled":
            clean = clean.replace(scale=torch.ones_like(clean.scale))
        return super().replacement(h, index, clean, routed, batch, **options)

    def _substitute_mixture(
        self,
        h: Tensor,
        clean: SAEOutput,
        routed: Tensor,
        *,
        edit,
        keep_error: bool,
    ) -> Tensor:
        """Move the error of the mixture to each token's strongest site.

        If every state x_l gets the mixture's error e, then sum_l p_l (x_l + e) is its x_hat.
        """
        x, mean, std = self.standardise(h)
        latents = clean.latents[routed]
        x_hat = clean.x_hat[routed]
        if edit is not None:
            wanted = edited_code(latents, latents, edit, lambda w: w)
            change = self.contribution(wanted) - self.contribution(latents)
            if keep_error:
                return h + change * std
            x_hat = x_hat + change
        return (x + x_hat - clean.target[routed]) * std + mean

    def to_standard_form(self):
        if self.routing == "soft":
            reason = "soft routing codes a mixture of sites, which is the state of no site"
            raise ValueError(f"{reason}; an SAE of one site cannot hold it")
        caveat = (
            "The router is left out: this is the shared dictionary, here on every token of the "
            "site, routed there or not."
        )
        if self.route_scale == "p":
            caveat += (
                " It was trained on p x, p the router's weight; here it codes x, so values stand "
                "for z/p (alike where biases are small)."
            )
        forms = {}
        for index, site in enumerate(self.routed):
            forms[site] = self.sae.standard_form_at(index)._replace(caveat=caveat)
        return forms


def _check_shares(shares: list[float] | None, routing: str, objective: str) -> None:
    """Raise ValueError for shares that nothing uses, or that are no shares."""
    if not shares:
        return
    used = routing == "random" or objective == "frozen"
    if used and min(shares) >= 0 < sum(shares):
        return
    given = f"route_shares {', '.join(map(str, shares))} with routing {routing}"
    needs = "it needs routing random or a frozen router, and numbers of which none is negative"
    raise ValueError(f"{given}, router_objective {objective}; {needs} and one is not 0")


# ------------------------------------------------------------------------------------- building

CLASSES = {
    cls.__name__: cls
    for cls in (
        TopK, Vanilla, Gated, JumpReLU, RouteSAE, Crosscoder, MLSAE, RandomK, BatchTopK,
        Matryoshka,
    )
}  # fmt: skip


def build(
    name: str,
    hidden_size: int,
    n_layers: int | None,
    options: Mapping[str, Any],
) -> SAE:
    """Build a model of the zoo. Options it does not take are left out; None means its default.

    Raises ValueError for an unknown name, a missing or an impossible value.
    """
    name = canonical(name)
    entry = ZOO[name]
    config = {}
    for key, value in options.items():
        if key in entry.constructor and value is not None:
            config[key] = value
    config |= {"hidden_size": hidden_size, "n_layers": n_layers}
    if "layer" in entry.options and n_layers:
        config.setdefault("layer", max(1, 3 * n_layers // 4))
    sae = CLASSES[name](**config)
    sae.config = config
    return sae


def get_model(
    name: str,
    hidden_size: int,
    n_layers: int,
    latent_size: int,
    k: int = 64,
    **options: Any,
) -> SAE:
    """Build a model by its documented name."""
    sizes = {"latent_size": latent_size, "k": k}
    return build(name, hidden_size, n_layers, sizes | options)
