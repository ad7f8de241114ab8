"""Tensor functions without state. N tokens (any leading dimensions), D hidden, F latents, k active latents."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.autograd import Function


def pre_process(hidden_states: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """(x, mean, std) with x = (h - mean) / (std + eps) per token, in float32; std is the unbiased estimate. [...,D] -> [...,D], [...,1], [...,1]"""
    h = hidden_states.float()  # first: statistics of a bfloat16 vector lose about three digits
    mean, std = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
    return (h - mean) / (std + eps), mean, std


def squared_errors(x: Tensor, x_hat: Tensor) -> Tensor:
    """||x - x_hat||^2 / ||x||^2 of each token; 0 stands below as the smallest positive number. [...,D] -> [...]"""
    return (x - x_hat).square().sum(-1) / x.square().sum(-1).clamp_min(torch.finfo(x.dtype).tiny)


def Normalized_MSE_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean over tokens of ||x - x_hat||^2 / ||x||^2 (Gao et al. 2024)."""
    return squared_errors(x, x_hat).mean()


def L1_loss(latents: Tensor) -> Tensor:
    """Mean of |latents| over tokens and latents: the documented function. Training uses the sum over latents."""
    return latents.abs().mean()


def topk_sparsify(pre_acts: Tensor, k: int) -> Tensor:
    """The k largest entries of the last dimension kept, signs included; the rest 0."""
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_acts).scatter(-1, indices, values)


def restrict(latents: Tensor, infer_k: int | None = None, theta: float | None = None) -> Tensor:
    """Latents after their activation, cut at inference: the infer_k largest, or those above max(theta, 0).

    Raises ValueError where both are given or infer_k is not positive; infer_k above F is clamped with a warning.
    """
    if infer_k is not None and theta is not None:
        raise ValueError("infer_k and theta exclude each other; give one")
    if infer_k is not None:
        if infer_k <= 0:
            raise ValueError(f"infer_k {infer_k}; it must be positive")
        if infer_k > latents.shape[-1]:
            warnings.warn(f"infer_k {infer_k} is more than the {latents.shape[-1]} latents; all are kept", stacklevel=2)
        return topk_sparsify(latents, min(infer_k, latents.shape[-1]))
    if theta is not None:
        return latents * (latents > max(theta, 0.0))
    return latents


def active(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token, latent, value) of every latent that is not 0. [N,F] -> three tensors of one length, by token."""
    token, latent = latents.nonzero(as_tuple=True)
    return token, latent, latents[token, latent]


class Jump_func(Function):
    """x * 1[x > threshold] with a rectangle-kernel gradient for the threshold (Rajamanoharan et al. 2024b, eq. 11)."""

    @staticmethod
    def forward(ctx, x, threshold, bandwidth):
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return x * (x > threshold)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        window = ((x - threshold).abs() < ctx.bandwidth / 2).to(grad.dtype)
        to_threshold = -(threshold / ctx.bandwidth) * window * grad
        return (x > threshold) * grad, to_threshold.sum_to_size(threshold.shape), None


class Step_func(Function):
    """1[x > threshold]; gradient to the threshold only (same paper, eq. 12)."""

    @staticmethod
    def forward(ctx, x, threshold, bandwidth):
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        window = ((x - threshold).abs() < ctx.bandwidth / 2).to(grad.dtype)
        return torch.zeros_like(x), (-(1 / ctx.bandwidth) * window * grad).sum_to_size(threshold.shape), None


def _decoders(model: nn.Module) -> list[nn.Linear]:
    model = getattr(model, "module", model)  # a data-parallel wrapper
    if not hasattr(model, "decoders"):
        raise TypeError(f"{type(model).__name__} does not say which decoders are kept at unit norm")
    return model.decoders()


@torch.no_grad()
def unit_norm_decoder(model: nn.Module) -> None:
    """Scales every decoder column to norm 1, in place; a zero column stays zero. Raises TypeError for a module without decoders()."""
    for decoder in _decoders(model):
        decoder.weight.div_(decoder.weight.norm(dim=0, keepdim=True).clamp_min(1e-12))


@torch.no_grad()
def project_decoder_grad(model: nn.Module) -> None:
    """Removes the part of each decoder gradient that would only change its column's norm."""
    for decoder in _decoders(model):
        if decoder.weight.grad is not None:
            unit = decoder.weight / decoder.weight.norm(dim=0, keepdim=True).clamp_min(1e-12)
            decoder.weight.grad -= unit * (unit * decoder.weight.grad).sum(0, keepdim=True)


@torch.no_grad()
def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Point with the smallest mean distance to the rows of x (Weiszfeld). [N,D] -> [D]"""
    guess = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - guess).norm(dim=1).clamp_min(1e-8)
        new = (x * weight[:, None]).sum(0) / weight.sum()
        if (new - guess).norm() <= tolerance * guess.norm():
            return new
        guess = new
    return guess


def _mix(x: Tensor) -> Tensor:
    """A 63-bit integer hash (splitmix64's shape, kept positive): equal inputs, equal outputs, whatever the device."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) & 0x7FFFFFFFFFFFFFFF


def random_integers(keys: Tensor, seed: int, high: int, draw: int = 0) -> Tensor:
    """One integer in [0, high) per key: a function of (key, seed, draw) alone, so batching changes nothing. int64 [N] -> [N]"""
    half = 1 << 62  # Python's integers do not wrap around, int64's do
    return _mix(_mix(_mix(keys + 1) + seed * 0x9E3779B97F4A7C1 % half) + draw * 0x2545F4914F6CDD1D % half) % high


def random_subset(keys: Tensor, seed: int, n: int, k: int) -> Tensor:
    """k distinct integers of [0, n) per key, uniform (Floyd's sampling). int64 [N] -> [N,k]"""
    chosen = torch.empty(len(keys), k, dtype=torch.long, device=keys.device)
    for i, top in enumerate(range(n - k, n)):
        drawn = random_integers(keys, seed, top + 1, i)
        taken = (chosen[:, :i] == drawn[:, None]).any(1)
        chosen[:, i] = torch.where(taken, torch.full_like(drawn, top), drawn)
    return chosen
