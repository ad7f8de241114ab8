"""The plain path: every model as its formulas read, dense and differentiated by autograd alone, and the training loop as published.

What the fast paths in src are held against (tests/test_plain.py), and what they are timed against (benchmarks). Nothing here is fast, and nothing
of src computes here but the hash that RandomK and random routing draw by. N tokens, L sites, D hidden, F latents; w: parameters by name.
"""

import torch
import torch.nn.functional as F
from torch import nn

from src.draws import random_integers, random_subset


def standardise(h, eps=1e-5):
    """(h - mean) / (std + eps) of each token."""
    return (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + eps)


def error(x, x_hat):
    """||x - x_hat||^2 / ||x||^2 of each token."""
    return ((x - x_hat) ** 2).sum(-1) / (x**2).sum(-1)


def encode(w, x):
    return (x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]


def decode(w, z):
    return z @ w["decoder.weight"].T + w["pre_bias"]


def largest(pre_acts, k):
    """All but the k largest of each token set to 0."""
    values, indices = pre_acts.topk(k, dim=-1)
    return torch.zeros_like(pre_acts).scatter(-1, indices, values)


def above(x, threshold, bandwidth):
    """1 where x exceeds the threshold; a rectangle as wide as the bandwidth stands for the derivative in the threshold."""
    window = ((x - threshold).abs() < bandwidth / 2).to(x.dtype).detach()
    return (x > threshold).to(x.dtype).detach() - window / bandwidth * (
        threshold - threshold.detach()
    )


class Plain:
    """One model in training: w are its parameters (leaves), o the constructor values. `terms` gives the loss, `after` counts what is silent."""

    def __init__(self, w, o):
        self.w, self.o = w, o
        self.tokens_since_fired, self.dead_threshold, self.progress = 0.0, float("inf"), 0.0

    def code(self, x, token):
        """(latents, x_hat, more terms of the loss)"""
        raise NotImplementedError

    def terms(self, x, token=None):
        self.latents, x_hat, more = self.code(x, token)
        return {
            "NormMSE": error(x if self.o.get("target") is None else self.o["target"], x_hat).mean(),
            **more,
        }

    def coefficient(self):
        """Of L1 or L0: it rises from 0 over the warm-up."""
        warm = self.o.get("sparsity_warmup", 0.05)
        return self.o["l1_coeff"] * (min(1.0, self.progress / warm) if warm else 1.0)

    def l1(self, latents, norms):
        return (
            self.coefficient()
            * (latents.mean(-1) if self.o.get("l1_mean") else (latents * norms).sum(-1)).mean()
        )

    @torch.no_grad()
    def after(self, progress):
        fired = self.latents.flatten(0, -2) != 0
        self.tokens_since_fired = (self.tokens_since_fired + len(fired)) * (~fired.any(0))
        self.progress, self.dead_threshold = progress, self.o.get("dead_tokens", float("inf"))


class TopK(Plain):
    def choose(self, pre_acts, token):
        return largest(pre_acts, self.o["k"])

    def code(self, x, token):
        z = self.choose(encode(self.w, x), token)
        x_hat = decode(self.w, z)
        return z, x_hat, self.auxk(x, x_hat)

    def auxk(self, x, x_hat):
        """Dead latents code what the living miss (Gao et al. 2024, A.2)."""
        dead = torch.as_tensor(self.tokens_since_fired > self.dead_threshold)
        if not self.o.get("auxk_coeff", 1 / 32) or not dead.any():
            return {}
        x, missed = x.flatten(0, -2), (x - x_hat).detach().flatten(0, -2)
        pre_acts = encode(self.w, x).masked_fill(~dead, -torch.inf)
        z = F.relu(largest(pre_acts, min(int(dead.sum()), x.shape[-1] // 2, 512)))
        rest = ((missed - z @ self.w["decoder.weight"].T) ** 2).sum()
        return {
            "AuxK": self.o.get("auxk_coeff", 1 / 32) * rest / ((missed - missed.mean(0)) ** 2).sum()
        }


class BatchTopK(TopK):
    def choose(self, pre_acts, token):
        return F.relu(largest(pre_acts.flatten(), self.o["k"] * len(pre_acts)).view_as(pre_acts))


class RandomK(TopK):
    def auxk(self, x, x_hat):
        return {}

    def choose(self, pre_acts, token):
        chosen = random_subset(token, self.o.get("seed", 42), pre_acts.shape[-1], self.o["k"])
        return pre_acts * torch.zeros_like(pre_acts).scatter(-1, chosen, 1.0)


class MLSAE(TopK):
    """Every (token, site) a sample: TopK takes any leading dimensions."""


class RouteSAE(TopK):
    def code(self, x, token):
        kind = self.o.get("routing", "hard")
        p = (x.sum(-2) @ self.w["router.weight"].T).softmax(-1)  # [N,L]
        if kind == "hard":
            p = p * F.one_hot(p.argmax(-1), p.shape[-1])
        if kind == "random":
            p = F.one_hot(
                random_integers(token, self.o.get("seed", 42), p.shape[-1]), p.shape[-1]
            ).to(x.dtype)
        self.o["target"] = routed = (p[..., None] * x).sum(-2)
        inner = TopK({name.removeprefix("sae."): value for name, value in self.w.items()}, self.o)
        inner.tokens_since_fired, inner.dead_threshold = (
            self.tokens_since_fired,
            self.dead_threshold,
        )
        return inner.code(routed, token)


class Vanilla(Plain):
    def code(self, x, token):
        z = F.relu(encode(self.w, x))
        return z, decode(self.w, z), {"L1": self.l1(z, self.w["decoder.weight"].norm(dim=0))}


class Gated(Plain):
    def code(self, x, token):
        w = self.w
        pi = (x - w["pre_bias"]) @ w["encoder.weight"].T
        z = (pi + w["gate_bias"] > 0) * F.relu(w["r_mag"].exp() * pi + w["mag_bias"])
        norms = w["decoder.weight"].norm(dim=0)
        if not self.o.get("gated_aux", True):
            return z, decode(w, z), {"L1": self.l1(z, norms)}
        gate, still = (
            F.relu(pi + w["gate_bias"]),
            {name: value.detach() for name, value in w.items()},
        )
        return (
            z,
            decode(w, z),
            {"L1": self.l1(gate, norms.detach()), "GateAux": error(x, decode(still, gate)).mean()},
        )


class JumpReLU(Plain):
    def code(self, x, token):
        threshold, bandwidth = self.w["threshold"], self.o["bandwidth"]
        pre_acts = encode(self.w, x)
        window = ((pre_acts - threshold).abs() < bandwidth / 2).to(x.dtype)
        z = pre_acts * (pre_acts > threshold) - (threshold * window / bandwidth).detach() * (
            threshold - threshold.detach()
        )
        counted = z if self.o.get("l0_post_jump") else pre_acts
        return (
            z,
            decode(self.w, z),
            {
                "L0_penalty": self.coefficient()
                * above(counted, threshold, bandwidth).sum(-1).mean()
            },
        )

    def after(self, progress):
        super().after(progress)
        if not self.o.get("l0_post_jump"):
            self.w["threshold"].data.clamp_(min=1e-4)


class Crosscoder(Plain):
    def code(self, x, token):
        sites = range(x.shape[-2])
        z = F.relu(
            sum(x[:, i] @ self.w[f"encoder.{i}.weight"].T for i in sites) + self.w["latent_bias"]
        )
        x_hat = torch.stack(
            [z @ self.w[f"decoder.{i}.weight"].T for i in sites], dim=-2
        ) + self.w.get("decoder_bias", 0.0)
        norms = torch.stack([self.w[f"decoder.{i}.weight"].norm(dim=0) for i in sites]).mean(0)
        return z, x_hat, {"L1": self.l1(z, norms)}


MODELS = {
    cls.__name__: cls
    for cls in (TopK, Vanilla, Gated, JumpReLU, RouteSAE, Crosscoder, MLSAE, RandomK, BatchTopK)
}


def of(sae, options):
    """The plain twin of an SAE of src: its own copy of the weights, the same constructor values."""
    w = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
    return MODELS[type(sae).__name__](w, dict(options))


@torch.no_grad()
def unit_columns(w, names):
    for name in names:
        w[name] /= w[name].norm(dim=0, keepdim=True)


def published(language_model, rows, sae, sites, options, total, lr=5e-4, every=100):
    """The loop as published, one step a `next`: all blocks, the head, every hidden state, padding in the loss, float32, Adam with a linear warm-up
    over a twentieth and a decay over the last fifth; yields (plain model, loss). rows: batches of (input_ids, attention_mask); sae: where it starts.
    """
    model = of(sae, options)
    decoder = [name for name in model.w if name.endswith("decoder.weight")]
    optimizer = torch.optim.Adam(model.w.values(), lr=lr)
    warm, falling = round(0.05 * total), -(-total // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: max(0.0, min(1.0, (step + 1) / max(1, warm), (total - step) / falling)),
    )
    for step, (input_ids, attention_mask) in enumerate(rows):
        with torch.no_grad():
            states = language_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        hidden = (
            torch.stack([states[site] for site in sites], dim=2)
            if len(sites) > 1
            else states[sites[0]]
        )
        x = standardise(hidden.float()).flatten(0, 1)
        terms = model.terms(x, torch.arange(len(x)))
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0:
            unit_columns(model.w, decoder)
        model.after((step + 1) / total)
        yield model, loss.item()


def train(model, batches, lr=1e-3, decoders=()):
    """Losses of Adam steps over batches of (x, token); decoder columns stay at norm 1, their gradients across it."""
    optimizer, losses = torch.optim.Adam(model.w.values(), lr=lr), []
    for step, (x, token) in enumerate(batches):
        loss = sum(model.terms(x, token).values())
        optimizer.zero_grad()
        loss.backward()
        for name in decoders:
            w = nn.functional.normalize(model.w[name].detach(), dim=0)
            model.w[name].grad -= w * (w * model.w[name].grad).sum(0)
        optimizer.step()
        unit_columns(model.w, decoders)
        model.after((step + 1) / len(batches))
        losses.append(loss.item())
    return losses
