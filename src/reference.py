"""The ten models as their formulas read: dense, and differentiated by autograd alone.

src/model.py computes the same models fast. tests/test_reference.py checks in float64 that both
have equal losses, gradients and trainings.

N tokens, L sites, D hidden, F latents. x: standardised states, [N,D] of one site or [N,L,D].
z [N,F]: the code, with one value per latent. x_hat: the reconstruction of x. Weights are called as
in a checkpoint: encoder.weight [F,D] is W_enc, decoder.weight [D,F] is W_dec.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.draws import random_integers, random_subset

DEFAULTS = {  # of the options that a model may leave out
    "auxk_coeff": 1 / 32,
    "dead_tokens": float("inf"),  # a latent is dead once it was silent for this many tokens
    "gated_aux": True,
    "hierarchical_k": (),  # all below k
    "l0_post_jump": False,
    "l1_mean": False,
    "l1_saturation": 0.0,  # share of a token's norm sqrt(D)
    "matryoshka_widths": (),  # all below the number of latents
    "routing": "hard",
    "seed": 42,
    "site_bias": False,
    "sparsity_warmup": 0.05,  # share of the training
}
MAX_AUXK = 512

# ------------------------------------------------------------------------------------ functions


def standardise(h: Tensor, eps: float = 1e-5) -> Tensor:
    """x = (h - mean(h)) / (std(h) + eps), for each token. [...,D] -> [...,D]"""
    mean = h.mean(-1, keepdim=True)
    std = h.std(-1, keepdim=True)
    return (h - mean) / (std + eps)


def normalised_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """||x - x_hat||^2 / ||x||^2, for each token. [...,D] -> [...]"""
    error = ((x - x_hat) ** 2).sum(-1)
    return error / (x**2).sum(-1)


def keep_topk(pre_acts: Tensor, k: int) -> Tensor:
    """TopK: keep the k largest values of each row and set the others to 0. [...,F] -> [...,F]"""
    values, indices = pre_acts.topk(k, dim=-1)
    return torch.zeros_like(pre_acts).scatter(-1, indices, values)


def rectangle(x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """K((x - threshold) / bandwidth): 1 within half a bandwidth of the threshold, else 0."""
    inside = (x - threshold).abs() < bandwidth / 2
    return inside.to(x.dtype)


def zero_with_slope(threshold: Tensor, slope: Tensor) -> Tensor:
    """Return 0, whose derivative with respect to the threshold is `slope`."""
    return slope.detach() * (threshold - threshold.detach())


def gradient_only(x: Tensor) -> Tensor:
    """Return 0, whose derivative with respect to x is 1."""
    return x - x.detach()


def jump_relu(x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """x 1[x > threshold] (Rajamanoharan et al. 2024b).

    Eq. 11 replaces its derivative with respect to the threshold by
    -(threshold / bandwidth) rectangle.
    """
    slope = threshold * rectangle(x, threshold, bandwidth) / bandwidth
    return x * (x > threshold) - zero_with_slope(threshold, slope)


def step(x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1[x > threshold], constant in x (same paper).

    Eq. 12 replaces its derivative with respect to the threshold by -1 / bandwidth K.
    """
    slope = rectangle(x, threshold, bandwidth) / bandwidth
    return (x > threshold).to(x.dtype) - zero_with_slope(threshold, slope)


# --------------------------------------------------------------------------------------- models


class ReferenceSAE:
    """A model in training: weights by name, and the options of its constructor in src/model.py."""

    def __init__(self, weights: dict[str, Tensor], options: dict[str, Any]) -> None:
        self.weights = weights
        # RouteSAE keeps the weights of its dictionary under "sae."
        self.w = {}
        for name, weight in weights.items():
            self.w[name.removeprefix("sae.")] = weight
        self.options = DEFAULTS | options
        self.progress = 0.0  # share of the training that is done
        self.tokens_since_fired = torch.zeros(())  # [F] after the first step
        self.dead_threshold = float("inf")

    @property
    def W_enc(self) -> Tensor:
        return self.w["encoder.weight"]

    @property
    def W_dec(self) -> Tensor:
        return self.w["decoder.weight"]

    @property
    def b_pre(self) -> Tensor:
        return self.w["pre_bias"]

    def pre_acts(self, x: Tensor) -> Tensor:
        """W_enc (x - b_pre) + b_latent. [...,D] -> [...,F]"""
        return (x - self.b_pre) @ self.W_enc.T + self.w["latent_bias"]

    def decode(self, z: Tensor) -> Tensor:
        """x_hat = W_dec z + b_pre. [...,F] -> [...,D]"""
        return z @ self.W_dec.T + self.b_pre

    def decoder_norms(self) -> Tensor:
        """The norm of each latent's decoder column. [F]"""
        return self.W_dec.norm(dim=0)

    def autoencode(self, x: Tensor, token_keys: Tensor) -> tuple[Tensor, Tensor, dict]:
        """Return (z, x_hat, the terms that training adds to the error, by name)."""
        raise NotImplementedError

    def loss_terms(self, x: Tensor, token_keys: Tensor) -> dict[str, Tensor]:
        """The terms that add up to the training loss.

        token_keys: int64 [N], a number for each token, on which random draws depend.
        """
        self.z, x_hat, penalties = self.autoencode(x, token_keys)
        return {"NormMSE": normalised_error(x, x_hat).mean()} | penalties

    def coefficient(self) -> float:
        """The weight of an L1 or L0 penalty, which rises from 0 during the warm-up."""
        warmup = self.options["sparsity_warmup"]
        share = min(1.0, self.progress / warmup) if warmup else 1.0
        return self.options["l1_coeff"] * share

    def l1(self, z: Tensor, norms: Tensor) -> Tensor:
        """coefficient sum_f z_f ||W_dec,f||, averaged over tokens (Conerly et al. 2024).

        With l1_mean: the mean over latents, without norms. With l1_saturation each term s is
        a tanh(s / a), a = l1_saturation sqrt(D) (Anthropic, January 2025 update).
        """
        if self.options["l1_mean"]:
            per_token = z.mean(-1)
        elif self.options["l1_saturation"]:
            a = self.options["l1_saturation"] * self.options["hidden_size"] ** 0.5
            per_token = (a * torch.tanh(z * norms / a)).sum(-1)
        else:
            per_token = (z * norms).sum(-1)
        return self.coefficient() * per_token.mean()

    def auxk(self, pre_acts: Tensor, residual: Tensor, W_dec: Tensor) -> dict[str, Tensor]:
        """Dead latents reconstruct the residual e (Gao et al. 2024, appendix A.2).

        auxk_coeff ||e - W_dec z_dead||^2 / ||e - mean(e)||^2, both summed over codes. z_dead keeps
        the dead latents that would contribute most. [codes,F], [codes,W], [W,F]; W is the width of
        what one code stands for, D or L D.
        """
        dead = self.tokens_since_fired > self.dead_threshold
        if not self.options["auxk_coeff"] or not dead.any():
            return {}
        residual = residual.detach()
        k = min(int(dead.sum()), self.options["hidden_size"] // 2, MAX_AUXK)
        contribution = pre_acts * W_dec.norm(dim=0)
        chosen = contribution.masked_fill(~dead, -torch.inf).topk(k, dim=-1).indices
        z_dead = torch.zeros_like(pre_acts).scatter(-1, chosen, pre_acts.relu().gather(-1, chosen))
        error = ((residual - z_dead @ W_dec.T) ** 2).sum()
        variance = ((residual - residual.mean(0)) ** 2).sum()
        auxk = self.options["auxk_coeff"] * error / variance
        return {"AuxK": auxk}

    def auxk_of_l1(
        self, pre_acts: Tensor, bias: Tensor, residual: Tensor, W_dec: Tensor
    ) -> dict[str, Tensor]:
        """AuxK of latents that L1 silences by their bias: it is left out, and lifted where dead."""
        terms = self.auxk(pre_acts + gradient_only(bias), residual, W_dec)
        dead = self.tokens_since_fired > self.dead_threshold
        lift = (gradient_only(bias) * dead).sum()
        return {name: term - self.options["auxk_coeff"] * lift for name, term in terms.items()}

    def revival(self, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
        """AuxK of a dictionary, in which each state has a code of its own."""
        pre_acts = self.pre_acts(x).flatten(0, -2)
        residual = (x - x_hat).flatten(0, -2)
        return self.auxk(pre_acts, residual, self.W_dec)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Count for how many tokens each latent was silent."""
        fired = self.z.flatten(0, -2) != 0
        tokens = self.tokens_since_fired + len(fired)
        self.tokens_since_fired = tokens * ~fired.any(0)
        self.dead_threshold = self.options["dead_tokens"]
        self.progress = progress


class TopK(ReferenceSAE):
    """z = TopK(W_enc (x - b_pre) + b_latent) (Gao et al. 2024, section 2.3)."""

    def activate(self, pre_acts: Tensor, token_keys: Tensor) -> Tensor:
        return keep_topk(pre_acts, self.options["k"])

    def autoencode(self, x, token_keys):
        z = self.activate(self.pre_acts(x), token_keys)
        x_hat = self.decode(z)
        return z, x_hat, self.nested(x, z) | self.revival(x, x_hat)

    def nested(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """sum_j ||x - W_dec TopK_j(z) - b_pre||^2 / ||x||^2 for the j of hierarchical_k.

        HierarchicalTopK (arXiv:2505.24473): the j largest values of the code reconstruct alone.
        """
        parts = [keep_topk(z, j) for j in self.options["hierarchical_k"]]
        return self.errors_of(x, parts)

    def errors_of(self, x: Tensor, parts: list[Tensor]) -> dict[str, Tensor]:
        """The errors of parts of the code [N,F], averaged over tokens and added up."""
        if not parts:
            return {}
        errors = [normalised_error(x, self.decode(part)).mean() for part in parts]
        return {"Nested": sum(errors)}


class BatchTopK(TopK):
    """The k N largest pre-activations of a whole batch (Bussmann et al. 2024), then ReLU."""

    def activate(self, pre_acts, token_keys):
        count = self.options["k"] * len(pre_acts)
        kept = keep_topk(pre_acts.flatten(), count)
        return F.relu(kept.view_as(pre_acts))


class Matryoshka(BatchTopK):
    """BatchTopK that adds the error of what each prefix z[:m] reconstructs (Bussmann et al. 2025).

    The widths m are all but the whole dictionary, whose error is NormMSE.
    """

    def nested(self, x, z):
        latent = torch.arange(z.shape[-1])
        parts = [z * (latent < width) for width in self.options["matryoshka_widths"]]
        return self.errors_of(x, parts)


class RandomK(TopK):
    """k latents drawn at random for each token: a control."""

    def activate(self, pre_acts, token_keys):
        latent_size = pre_acts.shape[-1]
        chosen = random_subset(token_keys, self.options["seed"], latent_size, self.options["k"])
        mask = torch.zeros_like(pre_acts).scatter(-1, chosen, 1.0)
        return pre_acts * mask

    def revival(self, x, x_hat):
        return {}


class MLSAE(TopK):
    """One TopK for the states of all sites (Lawson et al. 2024): each (token, site) is a sample.

    With site_bias, b_pre [L,D] has a row for each site.
    """


class RouteSAE(TopK):
    """A router picks the site of each token; one TopK codes its state (arXiv:2503.08200, eqs 5-12).

    This is the published objective; src/router.py has the others, with their derivatives. With
    site_bias, b_pre is that of the token's site.
    """

    @property
    def b_pre(self):
        bias = self.w["pre_bias"]
        return self.layer_weight @ bias if self.options["site_bias"] else bias

    def site_probabilities(self, x: Tensor) -> Tensor:
        """p = softmax(W_router sum_l x_l). [...,L,D] -> [...,L]"""
        logits = x.sum(-2) @ self.w["router.weight"].T
        return logits.softmax(-1)

    def route(self, x: Tensor, token_keys: Tensor) -> Tensor:
        """Return sum_l weight_l x_l. [N,L,D] -> [N,D]

        weight is p at its largest entry and 0 elsewhere. Soft routing takes all of p, random
        routing a site at random with weight 1.
        """
        weight = self.site_probabilities(x)
        n_sites = weight.shape[-1]
        self.layer_weight = weight  # to which sites the token belongs; below to one
        if self.options["routing"] == "hard":
            self.layer_weight = F.one_hot(weight.argmax(-1), n_sites).to(x.dtype)
            weight = weight * self.layer_weight
        elif self.options["routing"] == "random":
            site = random_integers(token_keys, self.options["seed"], n_sites)
            weight = self.layer_weight = F.one_hot(site, n_sites).to(x.dtype)
        return (weight[..., None] * x).sum(-2)

    def loss_terms(self, x, token_keys):
        return super().loss_terms(self.route(x, token_keys), token_keys)


class Vanilla(ReferenceSAE):
    """z = ReLU(W_enc (x - b_pre) + b_latent), with an L1 penalty (Conerly et al. 2024)."""

    def autoencode(self, x, token_keys):
        z = F.relu(self.pre_acts(x))
        x_hat = self.decode(z)
        l1 = self.l1(z, self.decoder_norms())
        return z, x_hat, {"L1": l1} | self.revival(x, x_hat)

    def revival(self, x, x_hat):
        pre_acts = (x - self.b_pre) @ self.W_enc.T
        return self.auxk_of_l1(pre_acts, self.w["latent_bias"], x - x_hat, self.W_dec)


class Gated(ReferenceSAE):
    """z = 1[pi + b_gate > 0] ReLU(exp(r_mag) pi + b_mag) with pi = W_enc (x - b_pre).

    Rajamanoharan et al. 2024a. The step has no gradient. The gate learns from L1 on
    ReLU(pi + b_gate), and from how well that value reconstructs x through a constant decoder.
    """

    def autoencode(self, x, token_keys):
        w = self.w
        pi = (x - self.b_pre) @ self.W_enc.T
        pi_gate = pi + w["gate_bias"]
        magnitude = F.relu(w["r_mag"].exp() * pi + w["mag_bias"])
        z = (pi_gate > 0) * magnitude
        x_hat = self.decode(z)
        norms = self.decoder_norms()
        revival = self.auxk_of_l1(pi, w["gate_bias"], x - x_hat, self.W_dec)
        if not self.options["gated_aux"]:
            return z, x_hat, {"L1": self.l1(z, norms)} | revival
        gate = F.relu(pi_gate)
        by_gate = gate @ self.W_dec.detach().T + self.b_pre.detach()
        penalties = {
            "L1": self.l1(gate, norms.detach()),
            "GateAux": normalised_error(x, by_gate).mean(),
        }
        return z, x_hat, penalties | revival


class JumpReLU(ReferenceSAE):
    """z = JumpReLU(pre_acts), with a penalty on the number of pre_acts above the threshold.

    Rajamanoharan et al. 2024b. With l0_post_jump the entries of z are counted.
    """

    def autoencode(self, x, token_keys):
        threshold = self.w["threshold"]
        bandwidth = self.options["bandwidth"]
        pre_acts = self.pre_acts(x)
        z = jump_relu(pre_acts, threshold, bandwidth)
        counted = z if self.options["l0_post_jump"] else pre_acts
        l0 = step(counted, threshold, bandwidth).sum(-1).mean()
        penalties = {"L0_penalty": self.coefficient() * l0}
        x_hat = self.decode(z)
        return z, x_hat, penalties | self.revival(x, x_hat)

    def after_step(self, progress):
        super().after_step(progress)
        if not self.options["l0_post_jump"]:
            self.w["threshold"].data.clamp_(min=1e-4)


class Crosscoder(ReferenceSAE):
    """z = ReLU(sum_l W_enc,l x_l + b_latent); x_hat_l = W_dec,l z + b_dec,l (Lindsey et al. 2024).

    L1 weights each latent by the mean over sites of its decoder norms.
    """

    def autoencode(self, x, token_keys):
        sites = range(x.shape[-2])
        encoders = [self.w[f"encoder.{i}.weight"] for i in sites]
        decoders = [self.w[f"decoder.{i}.weight"] for i in sites]
        pre_acts = sum(x[:, i] @ encoders[i].T for i in sites) + self.w["latent_bias"]
        z = F.relu(pre_acts)
        by_site = [z @ decoder.T for decoder in decoders]
        x_hat = torch.stack(by_site, dim=-2)
        x_hat = x_hat + self.w.get("decoder_bias", 0.0)
        norms = torch.stack([decoder.norm(dim=0) for decoder in decoders])
        centred = x - self.w.get("decoder_bias", torch.zeros(())).detach()
        by_dead = sum(centred[:, i] @ encoders[i].T for i in sites)
        residual = (x - x_hat).flatten(1)
        bias = self.w["latent_bias"]
        revival = self.auxk_of_l1(by_dead, bias, residual, torch.cat(decoders))
        return z, x_hat, {"L1": self.l1(z, norms.mean(0))} | revival


MODELS = {
    cls.__name__: cls
    for cls in (
        TopK, BatchTopK, Matryoshka, RandomK, MLSAE, RouteSAE, Vanilla, Gated, JumpReLU,
        Crosscoder,
    )
}  # fmt: skip


def reference_of(sae: nn.Module, options: dict[str, Any]) -> ReferenceSAE:
    """Return the reference model of an SAE of src/model.py, with a copy of its weights."""
    weights = {}
    for name, parameter in sae.named_parameters():
        weights[name] = parameter.detach().clone().requires_grad_()
    model = MODELS[type(sae).__name__]
    return model(weights, options | {"hidden_size": sae.hidden_size})
