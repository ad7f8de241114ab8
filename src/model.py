"""The sparse autoencoders of the zoo, each a class that answers the contract's questions (src/sae.py).

N tokens (any leading dimensions), L sites, D hidden, F latents. Sites are 1-based, indices into routed sites 0-based.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import distributed, ops, router
from src.ops import (
    Jump_func,
    Sparse,
    SparseCode,
    Step_func,
    apply_inference_cut,
    kth_largest,
    linear,
    random_subset,
    squared_errors,
    topk_flat_indices,
)
from src.sae import SAE, Dictionary, SAEOutput, routed_sites
from src.zoo import canonical


class TopK(Dictionary):
    """Exactly the k largest pre-activations (Gao et al. 2024), dead latents revived by AuxK (same paper, appendix A.2).

    Over several processes AuxK's variance and the tokens since a latent fired are those of the whole batch.
    """

    architecture = "topk"
    apart = True  # what stays of a token's code does not depend on other tokens

    def __init__(
        self,
        hidden_size,
        latent_size,
        k,
        *,
        auxk_coeff=1 / 32,
        dead_tokens=None,
        topk_relu=False,
        **rest,
    ):
        super().__init__(hidden_size, latent_size, **rest)
        if not 0 < k <= latent_size:
            raise ValueError(
                f"k {k} with {latent_size} latents; it must lie between 1 and the latent size"
            )
        self.k, self.auxk_coeff, self.dead_tokens, self.topk_relu = (
            k,
            auxk_coeff,
            dead_tokens,
            topk_relu,
        )
        self.register_buffer("dead_threshold", torch.tensor(float("inf")), persistent=False)

    def choose(self, pre_acts: Tensor, token: Tensor | None = None) -> Tensor:
        """Which latents stay, token by token: positions in the flat [N,F]."""
        return topk_flat_indices(pre_acts, self.k)

    def activate(self, pre_acts, token=None):
        flat = pre_acts.flatten()
        at = self.choose(pre_acts.flatten(0, -2), token)
        kept = F.relu(flat[at]) if self.topk_relu else flat[at]
        return torch.zeros_like(flat).scatter(0, at, kept).view_as(pre_acts)

    def get_latents(self, pre_acts, infer_k=None, theta=None, token=None):
        if infer_k is None and theta is None:
            return self.activate(pre_acts, token)
        return apply_inference_cut(
            F.relu(pre_acts) if self.topk_relu else pre_acts, infer_k, theta
        )  # both take the place of k

    def autoencode(self, x, infer_k=None, theta=None, token=None):
        if infer_k is not None or theta is not None:
            return super().autoencode(x, infer_k, theta, token)
        flat = x.flatten(0, -2)
        token = torch.arange(len(flat), device=x.device) if token is None else token.flatten()
        how = (
            (lambda acts, here: self.choose(acts, token[here])),
            self.k,
            self.topk_relu,
            self.apart,
        )
        x_hat, values, at = SparseCode.apply(
            flat, self.pre_bias, self.encoder.weight, self.latent_bias, self.decoder.weight, *how
        )
        return SAEOutput(
            x, Sparse(values, at, torch.Size([*x.shape[:-1], self.latent_size])), x_hat.view_as(x)
        )

    def penalty(self, p):
        dead = (
            (self.tokens_since_fired > self.dead_threshold).nonzero()[:, 0]
            if self.auxk_coeff
            else self.tokens_since_fired[:0]
        )
        if not len(dead):
            return {}
        x, error = p.target.flatten(0, -2), (p.target - p.x_hat).detach().flatten(0, -2)
        k = min(len(dead), self.hidden_size // 2, 512)
        weights = self.encoder.weight[dead], self.latent_bias[dead], self.decoder.weight[:, dead]
        x_hat, _, _ = SparseCode.apply(
            x, self.pre_bias, *weights, lambda acts, _: topk_flat_indices(acts, k), k, True, True
        )
        missed = (error - (x_hat - self.pre_bias)).square().sum(-1).view(p.target.shape[:-1])
        variance = self.average((error - self.average(error)).square().sum(-1)).clamp_min(1e-12)
        return {"AuxK": self.auxk_coeff * self.mean(missed) / variance}

    @torch.no_grad()
    def after_step(self, p, progress):
        super().after_step(p, progress)
        # a run of 1.5M tokens did best with dead latents called dead after 3 % of it; long runs use the papers' 10M tokens
        auto = (0.03 * self.tokens_seen.double() / max(progress, 1e-9)).clamp_max(1e7)
        self.dead_threshold.copy_(
            auto if self.dead_tokens is None else torch.full_like(auto, self.dead_tokens)
        )


class BatchTopK(TopK):
    """The k N largest activations of a batch of N tokens; at inference those above the mean of the batches' smallest (Bussmann et al. 2024).

    Over several processes the batch is the whole one: its k N-th largest value is found by two summed histograms, the smallest by a minimum.
    """

    apart = False

    def __init__(self, hidden_size, latent_size, k, **rest):
        super().__init__(hidden_size, latent_size, k, **(rest | {"topk_relu": True}))
        self.register_buffer("cut", torch.full((), float("nan")))

    def choose(self, pre_acts, token=None):
        if not self.training and not self.cut.isnan():
            return (pre_acts > self.cut).flatten().nonzero()[:, 0]
        return (
            (pre_acts.float() >= kth_largest(pre_acts, self.k * len(pre_acts), self.total))
            .flatten()
            .nonzero()[:, 0]
        )

    def to_standard_form(self):
        if self.cut.isnan():
            raise ValueError(
                "this BatchTopK has no threshold for inference; it gets one in training"
            )
        threshold = {
            "threshold": self.cut.clamp_min(0).expand(self.latent_size)
        }  # negative values are clipped either way
        return {
            site: form._replace(architecture="jumprelu", tensors=form.tensors | threshold, k=None)
            for site, form in super().to_standard_form().items()
        }

    @torch.no_grad()
    def after_step(self, p, progress):
        super().after_step(p, progress)
        _, _, values = ops.active(p.code)
        smallest = -distributed.all_max(
            -values.min() if len(values) else self.cut.new_tensor(-torch.inf)
        )
        smallest = torch.where(smallest.isinf(), self.cut, smallest)
        share = (
            self.total(self.tokens_seen.new_full((), p.code.shape[:-1].numel()))
            / self.tokens_seen
            * progress
        )  # of the run in this step
        self.cut.copy_(
            smallest if self.cut.isnan() else self.cut.lerp(smallest, (20 * share).clamp(0.01, 1))
        )  # memory: 5 % of a short run


class RandomK(TopK):
    """k latents drawn uniformly per token, values as they come: the control that must lose. A function of (seed, token key)."""

    def __init__(self, hidden_size, latent_size, k, *, seed=42, **rest):
        super().__init__(hidden_size, latent_size, k, **(rest | {"auxk_coeff": 0.0}))
        self.seed = seed

    def choose(self, pre_acts, token=None):
        rows = torch.arange(len(pre_acts), device=pre_acts.device)
        chosen = random_subset(
            rows if token is None else token.flatten(), self.seed, self.latent_size, self.k
        )
        return (chosen + rows[:, None] * self.latent_size).flatten()

    get_latents = Dictionary.get_latents  # infer_k and theta cut among those drawn

    def to_standard_form(self):
        raise ValueError(
            "the latents of a RandomK are drawn, not computed from the state; no other library holds that"
        )


class MLSAE(TopK):
    """One TopK for the states of all routed sites, each a sample of one batch (Lawson et al. 2024)."""

    def __init__(
        self, hidden_size, n_layers, latent_size, k, *, start_layer=None, end_layer=None, **rest
    ):
        super().__init__(hidden_size, latent_size, k, **rest)
        self.routed = routed_sites(n_layers, start_layer, end_layer)

    def sites(self):
        return self.routed

    gather = SAE.gather


class _Sparsified:
    """A sparsity coefficient that warms up from 0 and, with target_l0, steers itself: L0 falls to its target over the first quarter of the run."""

    approach_share = 0.25  # share of the run; faster kills latents, slower leaves less time at the target (docs/LOG.md)

    def _sparsity(self, l1_coeff, l1_mean, target_l0, sparsity_warmup):
        self.l1_coeff, self.l1_mean, self.target_l0, self.sparsity_warmup = (
            l1_coeff,
            l1_mean,
            target_l0,
            sparsity_warmup,
        )
        self.register_buffer(
            "warm", torch.tensor(0.0 if sparsity_warmup else 1.0), persistent=False
        )
        for name, start in (
            ("i_gain", 1.0),
            ("p_gain", 1.0),
            ("progress", 0.0),
            ("log_l0", float("nan")),
            ("first_l0", float("nan")),
        ):
            self.register_buffer(name, torch.tensor(start), persistent=False)

    def _coefficient(self) -> Tensor:
        return self.l1_coeff * self.warm * self.i_gain * self.p_gain

    def _l1(self, latents: Tensor, norms: Tensor) -> dict[str, Tensor]:
        per_token = latents.mean(-1) if self.l1_mean else latents @ norms
        return {"L1": self._coefficient() * self.mean(per_token)}

    @torch.no_grad()
    def after_step(self, p, progress):
        super().after_step(p, progress)
        self.warm.fill_(min(1.0, progress / self.sparsity_warmup) if self.sparsity_warmup else 1.0)
        if self.target_l0:
            self._steer(
                (self.average((p.latents != 0).sum(-1)) / self.target_l0).clamp_min(1e-3).log(),
                progress,
            )

    def _steer(self, log_l0: Tensor, progress: float) -> None:
        """Moves the coefficient by where log(L0 / target) will be a twentieth of the run ahead: at once (p_gain) and for good (i_gain).

        Between the target and a bound that closes in on it nothing is done. All rates are per run, so that its length changes nothing.
        """
        share, before = progress - self.progress, self.log_l0.clone()
        self.progress.fill_(progress)
        if before.isnan():
            self.log_l0.copy_(log_l0)
            self.first_l0.copy_(log_l0.clamp_min(0))
            return
        self.log_l0.lerp_(log_l0, 0.1)
        bound = (
            self.first_l0 * max(0.0, 1 - progress / self.approach_share)
            if self.approach_share
            else 0.0
        )
        off = (
            self.log_l0.clamp(max=0)
            + (self.log_l0 - bound).clamp(min=0)
            + 0.05 * (self.log_l0 - before) / share
        )
        self.i_gain *= torch.exp(8 * share * off.clamp(-1, 1))
        self.p_gain.copy_(off.clamp(-1, 1).exp())


class Vanilla(_Sparsified, Dictionary):
    """ReLU, and L1 summed over latents, weighted by decoder norms (Conerly et al. 2024)."""

    architecture = "standard"

    def __init__(
        self,
        hidden_size,
        latent_size,
        *,
        l1_coeff=None,
        l1_mean=False,
        target_l0=None,
        sparsity_warmup=0.05,
        **rest,
    ):
        super().__init__(hidden_size, latent_size, **rest)
        self._sparsity(
            0.1 / hidden_size**0.5 if l1_coeff is None else l1_coeff,
            l1_mean,
            target_l0,
            sparsity_warmup,
        )

    def penalty(self, p):
        return self._l1(p.latents, self.decoder.weight.norm(dim=0))


class Gated(_Sparsified, Dictionary):
    """Which latents are active is decided apart from how strongly (Rajamanoharan et al. 2024a).

    The gate is a step without gradient; it learns from L1 on ReLU(pi_gate) and from reconstructing through a frozen decoder.
    """

    architecture = "gated"

    def __init__(
        self,
        hidden_size,
        latent_size,
        *,
        l1_coeff=None,
        l1_mean=False,
        gated_aux=True,
        target_l0=None,
        sparsity_warmup=0.05,
        **rest,
    ):
        super().__init__(hidden_size, latent_size, **rest)
        self._sparsity(
            0.1 / hidden_size**0.5 if l1_coeff is None else l1_coeff,
            l1_mean,
            target_l0,
            sparsity_warmup,
        )
        self.gated_aux = gated_aux
        del self.latent_bias
        for name in ("gate_bias", "mag_bias", "r_mag"):
            setattr(self, name, nn.Parameter(torch.zeros(latent_size)))

    def pre_acts(self, x):
        return linear(x, self.encoder.weight, shift=self.pre_bias)

    def activate(self, pre_acts, token=None):
        return torch.where(
            pre_acts > -self.gate_bias,
            F.relu(torch.addcmul(self.mag_bias, self.r_mag.exp(), pre_acts)),
            0,
        )

    def penalty(self, p):
        if not self.gated_aux:
            return self._l1(p.latents, self.decoder.weight.norm(dim=0))
        gate = F.relu(p.pre_acts + self.gate_bias)
        frozen = linear(gate, self.decoder.weight.detach(), self.pre_bias.detach())
        return self._l1(gate, self.decoder.weight.norm(dim=0).detach()) | {
            "GateAux": self.mean(squared_errors(p.target, frozen))
        }


class JumpReLU(_Sparsified, Dictionary):
    """A learned threshold per latent; the penalty counts pre-activations above it (Rajamanoharan et al. 2024b)."""

    architecture = "jumprelu"
    approach_share = (
        0.0  # its L0 begins near the target (warm_start), and thresholds are slow to come back
    )

    def __init__(
        self,
        hidden_size,
        latent_size,
        threshold=None,
        bandwidth=None,
        *,
        l1_coeff=1e-3,
        l0_post_jump=False,
        target_l0=None,
        sparsity_warmup=0.05,
        **rest,
    ):
        super().__init__(hidden_size, latent_size, **rest)
        l1_coeff = 1e-3 if l1_coeff is None else l1_coeff
        self._sparsity(l1_coeff, False, target_l0, sparsity_warmup)
        self.bandwidth = max(0.05, 1e-3 * hidden_size**0.5) if bandwidth is None else bandwidth
        self.auto_threshold = threshold is None
        start = 0.5 * (l1_coeff * (hidden_size - 1)) ** 0.5 if self.auto_threshold else threshold
        self.threshold = nn.Parameter(torch.full((latent_size,), float(max(start, 1e-4))))
        self.l0_post_jump = l0_post_jump

    @torch.no_grad()
    def warm_start(self, x):
        super().warm_start(x)
        if (
            self.target_l0 and self.auto_threshold
        ):  # thresholds move by one learning rate a step: in a short run never far enough
            pre_acts = self.pre_acts(x.flatten(0, -2)[:1024])
            count = min(round(20 * self.target_l0 * len(pre_acts)), pre_acts.numel() // 2)
            self.threshold.fill_(
                float(pre_acts.flatten().topk(max(1, count)).values[-1].clamp_min(1e-4))
            )

    def activate(self, pre_acts, token=None):
        return Jump_func.apply(pre_acts, self.threshold, self.bandwidth)

    def penalty(self, p):
        counted = p.latents if self.l0_post_jump else p.pre_acts
        return {
            "L0_penalty": self._coefficient()
            * self.mean(Step_func.apply(counted, self.threshold, self.bandwidth).sum(-1))
        }

    @torch.no_grad()
    def after_step(self, p, progress):
        super().after_step(p, progress)
        if not self.l0_post_jump:
            self.threshold.clamp_(min=1e-4)


class Crosscoder(_Sparsified, SAE):
    """One code read from all routed sites and written back to each (Lindsey et al. 2024). Decoder norms say where a latent lives."""

    def __init__(
        self,
        hidden_size,
        n_layers,
        latent_size,
        *,
        start_layer=None,
        end_layer=None,
        l1_coeff=None,
        l1_mean=False,
        target_l0=None,
        sparsity_warmup=0.05,
        decoder_bias=False,
        free_norms=False,
        norm_eps=1e-5,
    ):
        super().__init__(hidden_size, latent_size, norm_eps)
        self.routed = routed_sites(n_layers, start_layer, end_layer)
        self.n_processed_layers, self.free_norms = len(self.routed), free_norms
        self._sparsity(
            0.1 / hidden_size**0.5 if l1_coeff is None else l1_coeff,
            l1_mean,
            target_l0,
            sparsity_warmup,
        )
        self.latent_bias = nn.Parameter(torch.zeros(latent_size))
        self.encoder = nn.ModuleList(
            nn.Linear(hidden_size, latent_size, bias=False) for _ in self.routed
        )
        self.decoder = nn.ModuleList(
            nn.Linear(latent_size, hidden_size, bias=False) for _ in self.routed
        )
        self.decoder_bias = (
            nn.Parameter(torch.zeros(self.n_processed_layers, hidden_size))
            if decoder_bias
            else None
        )
        unit = F.normalize(
            torch.randn(latent_size, hidden_size), dim=1
        )  # the same at every site: states of neighbours are alike
        with torch.no_grad():
            for encoder, decoder in zip(self.encoder, self.decoder, strict=True):
                encoder.weight.copy_(unit / self.n_processed_layers)
                decoder.weight.copy_(
                    (0.1 if free_norms else 1.0) * unit.T
                )  # free norms: L1 falls hard on columns that begin at 1

    def sites(self):
        return self.routed

    def pre_acts(self, x: Tensor) -> Tensor:
        return linear(
            x.flatten(-2),
            torch.cat([encoder.weight for encoder in self.encoder], 1),
            self.latent_bias,
        )  # one product: no [N,L,F]

    def encode(self, x: Tensor, infer_k: int | None = None, theta: float | None = None) -> Tensor:
        return apply_inference_cut(F.relu(self.pre_acts(x)), infer_k, theta)

    def decode(self, latents: Tensor) -> Tensor:
        x_hat = linear(latents, torch.cat([decoder.weight for decoder in self.decoder])).unflatten(
            -1, (self.n_processed_layers, -1)
        )
        return x_hat if self.decoder_bias is None else x_hat + self.decoder_bias

    def forward(
        self, x: Tensor, infer_k: int | None = None, theta: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """(latents, x_hat [N,L,D]): the documented form."""
        p = self.autoencode(x, infer_k, theta)
        return p.latents, p.x_hat

    def autoencode(self, x, infer_k=None, theta=None, token=None):
        pre_acts = self.pre_acts(x)
        latents = apply_inference_cut(F.relu(pre_acts), infer_k, theta)
        return SAEOutput(x, latents, self.decode(latents), pre_acts)

    def decoder_norms(self) -> Tensor:
        """[L,F]: the profile over sites of each latent."""
        return torch.stack([decoder.weight.norm(dim=0) for decoder in self.decoder])

    def penalty(self, p):
        return self._l1(p.latents, self.decoder_norms().mean(0))

    def strength(self, p):
        return p.latents * self.decoder_norms().mean(0)

    def patches(
        self,
        hidden,
        *,
        infer_k=None,
        theta=None,
        edit=None,
        token=None,
        keep_error=True,
        clean=None,
    ):
        clean = clean or self.autoencode(
            self.gather(hidden), infer_k, theta
        )  # its code has read later sites too: no causal comparison
        norms = self.decoder_norms().mean(0).clamp_min(1e-12)
        new = clean.x_hat
        if edit is not None:
            wanted = edit(clean.latents * norms)
            new = self.decode(
                torch.where(wanted == clean.latents * norms, clean.latents, wanted / norms)
            )

        def at(index):
            def patch(h):
                _, mean, std = self.standardise(h)
                if edit is not None and keep_error:
                    return h + (new - clean.x_hat)[..., index, :] * std
                return new[..., index, :] * std + mean

            return patch

        for index, site in enumerate(self.routed):
            yield {site: at(index)}

    def decoders(self):
        return [] if self.free_norms else list(self.decoder)


class RouteSAE(SAE):
    """A router gives each token one of the routed sites; a TopK codes p times the state there (arXiv:2503.08200, eqs 5-12).

    routing: "hard" (argmax); "soft" (the mixture); and controls. At scale 1, "random": a site drawn for each token, with route_shares where given,
    else uniformly. At the token's own p, "permuted": hard sites shuffled over the tokens of a batch (of a process's part of it), so that the shares
    stay; "oracle": the site with the least error.
    router_objective: where the router's gradient comes from (src/router.py) under hard routing; errors of all sites are measured on one token in L.
    A "frozen" router may be given route_shares too: its logits are shifted once so that its choices have them.
    router_balance: "switch" adds coef times router.switch; "bias" moves a bias of each logit by coef against its load, without gradient
    (Wang et al. 2024; here p feels it too).
    route_scale: what multiplies the state, "p", "one", or "ste" (1, with the gradient of p); default p for published, else one.
    """

    def __init__(
        self,
        hidden_size,
        n_layers,
        latent_size,
        k,
        *,
        aggre="sum",
        routing="hard",
        route_patch="scaled",
        start_layer=None,
        end_layer=None,
        router_objective="published",
        router_balance="none",
        router_balance_coef=None,
        route_scale=None,
        route_shares=None,
        seed=42,
        norm_eps=1e-5,
        **rest,
    ):
        super().__init__(hidden_size, latent_size, norm_eps)
        for what, value, known in (
            ("aggre", aggre, ("sum", "mean")),
            ("routing", routing, router.ROUTINGS),
            ("router_objective", router_objective, router.OBJECTIVES),
            ("router_balance", router_balance, router.BALANCES),
            ("route_scale", route_scale, (None, *router.SCALES)),
        ):
            if value not in known:
                raise ValueError(f"{what} {value!r}; known are {', '.join(map(str, known))}")
        if routing not in ("hard", "permuted"):  # no choice of one site that could be learned
            router_objective, router_balance = "published", "none"
        self.routed = routed_sites(n_layers, start_layer, end_layer)
        self.n_layers, self.start_layer, self.end_layer, self.n_routed_layers = (
            n_layers,
            self.routed[0],
            self.routed[-1] + 1,
            len(self.routed),
        )
        self.aggre, self.routing, self.route_patch, self.seed = aggre, routing, route_patch, seed
        self.objective, self.balance = router_objective, router_balance
        self.balance_coef = (
            {"none": 0.0, "switch": 0.02, "bias": 1e-3}[router_balance]
            if router_balance_coef is None
            else router_balance_coef
        )
        self.route_scale = route_scale or ("p" if router_objective == "published" else "one")
        taken = routing == "random" or router_objective == "frozen"
        if route_shares and (not taken or not min(route_shares) >= 0 < sum(route_shares)):
            what = f"route_shares {', '.join(map(str, route_shares))} with routing {routing}, router_objective {router_objective}"
            raise ValueError(
                f"{what}; it needs routing random or a frozen router, and numbers of which none is negative and one is not 0"
            )
        self.shares = torch.tensor(route_shares) if route_shares else None
        self.router = nn.Linear(hidden_size, self.n_routed_layers, bias=False).requires_grad_(
            router_objective != "frozen"
        )
        shifted = router_balance == "bias" or (self.shares is not None and routing != "random")
        self.register_buffer("load_bias", torch.zeros(self.n_routed_layers), persistent=shifted)
        self.register_buffer(
            "site_error", torch.full((self.n_routed_layers,), float("nan")), persistent=False
        )
        self.sae = TopK(hidden_size, latent_size, k, **rest)
        self.k = k

    def sites(self):
        return self.routed

    def get_router_weights(self, x: Tensor, aggre: str = "sum") -> Tensor:
        """Softmax over sites of the routed states' sum or mean. [...,L,D] -> [...,L]"""
        if aggre not in ("sum", "mean"):
            raise ValueError(f"aggre {aggre!r}; known are sum, mean")
        pooled = x.sum(-2) if aggre == "sum" else x.mean(-2)
        return (self.router(pooled) + self.load_bias).softmax(-1)

    def route(
        self, x: Tensor, router_weights: Tensor, routing: str = "hard"
    ) -> tuple[Tensor, Tensor]:
        """(layer_weights [...,L], routed_x [...,D]): p (1 where route_scale is not p) at the argmax and 0 elsewhere for hard, p itself for soft."""
        if routing not in router.ROUTINGS:
            raise ValueError(f"routing {routing!r}; known are {', '.join(router.ROUTINGS)}")
        if routing == "soft":
            return router_weights, (router_weights[..., None] * x).sum(-2)
        p, site = router_weights.max(-1, keepdim=True)
        p = p if self.route_scale == "p" else torch.ones_like(p)
        there = x.take_along_dim(site[..., None], -2).squeeze(
            -2
        )  # one site's state, not a sum over L products of which L-1 are 0
        return torch.zeros_like(router_weights).scatter(-1, site, p), p * there

    def _weights(
        self, x: Tensor, token: Tensor | None, infer_k: int | None, theta: float | None
    ) -> Tensor:
        keys = (
            torch.arange(x.shape[:-2].numel(), device=x.device)
            if token is None
            else token.flatten()
        )
        if self.routing == "random":
            site = router.sample_sites(
                keys,
                self.seed,
                self.n_routed_layers,
                None if self.shares is None else self.shares.to(x.device),
            )
            return router.one_hot(site.view(x.shape[:-2]), x[..., 0])
        weights = self.get_router_weights(x, self.aggre)
        if self.routing in ("hard", "soft"):
            return weights
        p, site = weights.flatten(0, -2).max(-1)
        if self.routing == "permuted":
            site = router.shuffled(site, keys, self.seed)
        else:
            site = self.site_errors(
                x.flatten(0, -3), p if self.route_scale == "p" else None, infer_k, theta
            ).argmin(-1)
        return (p[:, None] * F.one_hot(site, self.n_routed_layers)).view_as(weights)

    def _slice(self, x: Tensor) -> Tensor:
        """The routed sites of an input that holds them, all sites, or all sites and the embedding."""
        there = x.shape[-2]
        if there == self.n_routed_layers:
            return x
        if there in (self.n_layers, self.n_layers + 1):
            first = self.start_layer - (there == self.n_layers)
            return x[..., first : first + self.n_routed_layers, :]
        raise ValueError(
            f"{there} layers; expected {self.n_routed_layers} routed ones, or all {self.n_layers} (+1 with the embedding)"
        )

    def forward(
        self,
        x: Tensor,
        aggre: str = "sum",
        routing: str = "hard",
        infer_k: int | None = None,
        theta: float | None = None,
    ):
        """(layer_weights, routed_x, latents, x_hat, router_weights): the documented form."""
        x = self._slice(x)
        router_weights = self.get_router_weights(x, aggre)
        layer_weights, routed_x = self.route(x, router_weights, routing)
        latents, x_hat = self.sae(routed_x, infer_k, theta)
        return layer_weights, routed_x, latents, x_hat, router_weights

    def autoencode(self, x, infer_k=None, theta=None, token=None):
        weights = self._weights(x, token, infer_k, theta)
        _, routed = self.route(x, weights, self.routing)
        scale = weights.max(-1).values
        if self.routing != "soft" and (self.objective == "ste" or self.route_scale != "p"):
            if self.objective == "ste":
                routed = (router.straight_through(weights)[..., None] * x).sum(-2)
            if self.route_scale == "ste":
                routed = routed * (scale / scale.detach())[..., None]
            scale = torch.ones_like(scale)
        inner = self.sae.autoencode(routed, infer_k, theta)
        return inner.replace(weights=weights, scale=scale, inputs=x)

    @torch.no_grad()
    def site_errors(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        infer_k: int | None = None,
        theta: float | None = None,
    ) -> Tensor:
        """NormMSE of every site's state, times scale [N], had the token gone there. [N,L,D] -> [N,L]"""
        x = x if scale is None else x * scale[:, None, None]
        found = [self.sae.autoencode(x[:, i], infer_k, theta) for i in range(x.shape[1])]
        return torch.stack([squared_errors(p.target, p.x_hat) for p in found], dim=1)

    def _sample(self, p: SAEOutput) -> tuple[Tensor, Tensor]:
        """(errors, weights), both [n,L], of one token in L."""
        every = slice(
            (int(self.tokens_seen) - self.first) % self.n_routed_layers, None, self.n_routed_layers
        )
        x, weights, scale = (
            p.inputs.flatten(0, -3)[every],
            p.weights.flatten(0, -2)[every],
            p.scale.flatten()[every],
        )
        return self.site_errors(x, scale.detach()), weights

    def penalty(self, p):
        terms = self.sae.penalty(p)
        if self.objective in ("expected", "advantage") and p.weights.requires_grad:
            errors, weights = self._sample(p)
            whole = p.weights.shape[:-1].numel() if self.whole is None else self.whole
            if count := len(
                range(int(self.tokens_seen) % self.n_routed_layers, whole, self.n_routed_layers)
            ):  # in the sample of the whole batch
                mean = self.average(errors)
                new = torch.where(
                    self.site_error.isnan(), mean, 0.95 * self.site_error + 0.05 * mean
                )
                self.site_error.copy_(
                    torch.where(mean.isnan(), self.site_error, new)
                )  # a slice may have none of the sample
                objective = (
                    functools.partial(router.advantage_loss, mean_site_error=self.site_error)
                    if self.objective == "advantage"
                    else router.expected_error_loss
                )
                terms["Router"] = objective(weights, errors, mean=lambda each: each.sum() / count)
        if self.balance == "switch" and self.balance_coef:
            terms["Balance"] = self.balance_coef * router.switch_loss(
                p.weights, router.load(p.weights, self.average), mean=self.mean
            )
        return terms

    def strength(self, p):
        return p.code if self.routing == "soft" else ops.divided(p.code, p.scale)

    def patches(
        self,
        hidden,
        *,
        infer_k=None,
        theta=None,
        edit=None,
        token=None,
        keep_error=True,
        clean=None,
    ):
        clean = clean or self.autoencode(self.gather(hidden), infer_k, theta, token)
        site_of = clean.weights.argmax(-1)
        scale = torch.ones_like(clean.scale) if self.route_patch == "unscaled" else clean.scale

        def at(index):
            def patch(h):
                here = site_of == index
                if not here.any():
                    return h
                x, mean, std = self.standardise(h[here])
                soft = self.routing == "soft"
                factor = torch.ones_like(scale[here, None]) if soft else scale[here, None]
                inner = None if soft else self.sae.autoencode(factor * x, infer_k, theta)
                z, x_hat = (
                    (clean.latents[here], clean.x_hat[here])
                    if soft
                    else (inner.latents, inner.x_hat)
                )
                if edit is not None:
                    wanted = edit(z / factor)
                    wanted = torch.where(wanted == z / factor, z, wanted * factor)
                    change = self.sae.decode(wanted) - self.sae.decode(z)
                if edit is not None and keep_error:
                    new = h[here] + change / factor * std
                else:  # soft: the mixture's error moved to the strongest site; sum_l p_l (x_l + e) is the mixture's x_hat
                    x_hat = x_hat if edit is None else x_hat + change
                    new = (x + x_hat - clean.target[here] if soft else x_hat / factor) * std + mean
                return h.index_put((here,), new.to(h.dtype))

            return patch

        used = site_of.unique().tolist() or [
            0
        ]  # the first in use is where the language model resumes
        yield {self.routed[index]: at(index) for index in used}

    def decode(self, latents):
        return self.sae.decode(latents)

    def to_standard_form(self):
        if self.routing == "soft":
            raise ValueError(
                "soft routing codes a mixture of sites, which is the state of no site; an SAE of one site cannot hold it"
            )
        (form,) = self.sae.to_standard_form().values()
        caveat = "The router is left out: this is the shared dictionary, here on every token of the site, routed there or not."
        if self.route_scale == "p":
            caveat += " It was trained on p x, p the router's weight; here it codes x, so values stand for z/p (alike where biases are small)."
        return {site: form._replace(caveat=caveat) for site in self.routed}

    def decoders(self):
        return self.sae.decoders()

    def adam_parameters(self):
        return [self.router.weight]  # sign steps of 1e-2 saturate p at 1 within ten steps

    @torch.no_grad()
    def warm_start(self, x):
        self.sae.warm_start(x)
        if self.shares is not None and self.routing != "random":
            self.load_bias.copy_(
                router.logit_shifts(
                    self.get_router_weights(x, self.aggre).clamp_min(1e-30).log(),
                    self.shares.to(x.device),
                )
            )

    @torch.no_grad()
    def after_step(self, p, progress):
        super().after_step(p, progress)
        self.sae.after_step(p, progress)
        if self.balance == "bias":
            self.load_bias += (
                self.balance_coef
                * (1 / self.n_routed_layers - router.load(p.weights, self.average)).sign()
            )

    @torch.no_grad()
    def diagnostics(self, p):
        """router.summary, the errors those of one token in L, and the gradient norm of the router."""
        found, grad = (
            router.summary(p.weights.flatten(0, -2), *self._sample(p), self.average),
            self.router.weight.grad,
        )
        return found if grad is None else found | {"router_grad": grad.norm()}


CLASSES = {
    cls.__name__: cls
    for cls in (TopK, Vanilla, Gated, JumpReLU, RouteSAE, Crosscoder, MLSAE, RandomK, BatchTopK)
}


def build(name: str, hidden_size: int, n_layers: int | None, options: Mapping[str, Any]) -> SAE:
    """A model of the zoo. Options its constructors do not take are left out; None means its default.

    Raises ValueError for an unknown name, a missing or an impossible value.
    """
    cls = CLASSES[canonical(name)]
    known: set[str] = set()
    for parent in (*cls.__mro__, *((TopK, Dictionary) if cls is RouteSAE else ())):
        if issubclass(parent, SAE):
            known |= set(inspect.signature(parent.__init__).parameters)
    config = {key: value for key, value in options.items() if key in known and value is not None}
    config |= {"hidden_size": hidden_size, "n_layers": n_layers}
    if cls is not RouteSAE and "layer" in known and n_layers and "routed" not in config:
        config.setdefault("layer", max(1, 3 * n_layers // 4))
    if "n_layers" not in known:
        del config["n_layers"]
    sae = cls(**config)
    sae.config = config | {"n_layers": n_layers}
    return sae


def get_model(
    name: str, hidden_size: int, n_layers: int, latent_size: int, k: int = 64, **options: Any
) -> SAE:
    """A model by its documented name."""
    return build(name, hidden_size, n_layers, {"latent_size": latent_size, "k": k, **options})
