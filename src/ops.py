"""Tensor functions without state: normalisation, losses, top-k, JumpReLU, decoder norms.

N tokens (any leading dimensions), D hidden, F latents, k active latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from src import device

# Values per group of the two-stage top-k on a CPU. For 4,080 x 2,048 values two stages take 11.2 ms
# in place of 12.6 at k 16, and 22.2 in place of 36.1 at k 64 (docs/LOG.md).
GROUP_SIZE = 8
COSINE_MARGIN = 1e-6  # above the least cosine, so that rounding leaves it there
MIN_NORM = 1e-12  # a decoder column that is 0 is divided by it and stays 0


# ------------------------------------------------------------------------------- normalisation


def pre_process(
    hidden_states: Tensor,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standardise each token: x = (h - mean) / (std + eps), in float32.

    Returns (x, mean, std); std is the unbiased estimate. [...,D] -> [...,D], [...,1], [...,1]
    x is written to `out` if it is given.
    """
    # Statistics of a bfloat16 vector would lose about three digits.
    h = hidden_states.float()
    mean = h.mean(-1, keepdim=True)
    centred = h - mean
    # h.std() takes 15 times as long on a CPU: 3.7 ms for 4,080 x 128 where this takes .25.
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    std = norm / (h.shape[-1] - 1) ** 0.5
    return torch.div(centred, std + eps, out=out), mean, std


def stack_standardised(states: list[Tensor], eps: float) -> Tensor:
    """Standardise the states of several sites side by side: L times [...,D] -> float32 [...,L,D]"""
    *tokens, width = states[0].shape
    x = torch.empty(*tokens, len(states), width, device=states[0].device)
    rows = x.flatten(0, -3)
    for i, h in enumerate(states):
        fast = device.kernels(h)
        if fast:
            # One pass over memory instead of five: .95 ms for 9 sites x 32,704 states of 2,048
            # numbers on an H200 (docs/LOG.md).
            fast.standardise(h.flatten(0, -2), eps, rows[:, i])
        else:
            pre_process(h, eps, x[..., i, :])
    return x


@torch.no_grad()
def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Return the point of least mean distance to the rows of x (Weiszfeld). [N,D] -> [D]"""
    guess = x.mean(0)
    for _ in range(iterations):
        distance = (x - guess).norm(dim=1)
        weight = 1 / distance.clamp_min(1e-8)
        new = (x * weight[:, None]).sum(0) / weight.sum()
        if (new - guess).norm() <= tolerance * guess.norm():
            return new
        guess = new
    return guess


# -------------------------------------------------------------------------------------- losses


class SquaredErrors(Function):
    """squared_errors with half the memory passes that autograd takes for its formula."""

    @staticmethod
    def forward(ctx, x, x_hat):
        residual = x - x_hat
        smallest = torch.finfo(x.dtype).tiny
        norm = torch.linalg.vector_norm(x, dim=-1).square().clamp_min(smallest)
        errors = torch.linalg.vector_norm(residual, dim=-1).square() / norm
        x_for_gradient = x if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x_for_gradient, residual, norm, errors)
        return errors

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, residual, norm, errors = ctx.saved_tensors
        factor = (2 * grad / norm)[..., None]
        by_residual = residual * factor
        by_x_hat = -by_residual if ctx.needs_input_grad[1] else None
        if x is None:
            return None, by_x_hat
        by_x = by_residual - x * (factor * errors[..., None])
        return by_x, by_x_hat


def squared_errors(x: Tensor, x_hat: Tensor) -> Tensor:
    """Return ||x - x_hat||^2 / ||x||^2 of each token. [...,D] -> [...]

    A zero norm counts as the smallest positive number.
    """
    return SquaredErrors.apply(x, x_hat)


# --------------------------------------------------------------------------------------- top-k


def topk_sparsify(pre_acts: Tensor, k: int) -> Tensor:
    """Keep the k largest entries of the last dimension with their signs; set the rest to 0."""
    indices = topk_indices(pre_acts.flatten(0, -2), k)
    indices = indices.view(*pre_acts.shape[:-1], k)
    kept = pre_acts.gather(-1, indices)
    return torch.zeros_like(pre_acts).scatter(-1, indices, kept)


def apply_inference_cut(
    latents: Tensor,
    infer_k: int | None = None,
    theta: float | None = None,
) -> Tensor:
    """Cut latents at inference: keep the infer_k largest, or those above max(theta, 0).

    Raises ValueError if both are given or infer_k is not positive. An infer_k above F is clamped
    with a warning.
    """
    if infer_k is not None and theta is not None:
        raise ValueError("infer_k and theta exclude each other; give one")
    if infer_k is not None:
        size = latents.shape[-1]
        if infer_k <= 0:
            raise ValueError(f"infer_k {infer_k}; it must be positive")
        if infer_k > size:
            message = f"infer_k {infer_k} is more than the {size} latents; all are kept"
            warnings.warn(message, stacklevel=2)
        return topk_sparsify(latents, min(infer_k, size))
    if theta is not None:
        return latents * (latents > max(theta, 0.0))
    return latents


def topk_indices(values: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest entries of each row, unordered. [N,F] -> int64 [N,k]"""
    size = values.shape[1]
    if k == size:
        return torch.arange(k, device=values.device).expand(len(values), k)
    fast = device.kernels(values) if values.dtype is torch.float32 else None
    if fast:
        return fast.topk_indices(values, k)
    groups = size // GROUP_SIZE
    if values.is_cuda or size % GROUP_SIZE or groups < 2 * k:
        return _topk_one_stage(values, k)
    # the k largest values lie in the k groups that have the largest maxima
    group_maxima = values.view(len(values), GROUP_SIZE, groups).amax(1)
    best_groups = _topk_one_stage(group_maxima, k)
    starts = groups * torch.arange(GROUP_SIZE)
    members = best_groups[:, None] + starts[:, None]
    candidates = members.flatten(1)
    best = _topk_one_stage(values.gather(1, candidates), k)
    return candidates.gather(1, best)


def _topk_one_stage(values: Tensor, k: int) -> Tensor:
    """topk_indices in one stage. On a CPU numpy's partition beats torch.topk (docs/LOG.md)."""
    n, width = values.shape
    if not values.is_cuda and 0 < k < width <= 2**16:
        values = values.detach()
        if values.dtype is torch.bfloat16:
            return _topk_bfloat16(values, k)
        array = values.numpy()
        kth = np.partition(array, width - k, axis=1)[:, width - k, None]
        flat = np.flatnonzero(array >= kth)
        if len(flat) == n * k:  # no ties at the k-th place and no NaN
            return torch.from_numpy(flat.reshape(n, k) % width)
    return values.topk(k, dim=-1, sorted=False).indices


def _topk_bfloat16(values: Tensor, k: int) -> Tensor:
    """topk_indices on a CPU. A bfloat16 leaves the low 16 bits of a float32 free for the index."""
    width = values.shape[1]
    bits = values.float().view(torch.int32)
    bits |= torch.arange(width, dtype=torch.int32)
    keys = bits.view(torch.float32).numpy()
    top = np.partition(keys, width - k, axis=1)[:, width - k :]
    top_bits = torch.from_numpy(np.ascontiguousarray(top)).view(torch.int32)
    return (top_bits & 0xFFFF).long()


def topk_flat_indices(values: Tensor, k: int) -> Tensor:
    """Return where the k largest of each row lie in the flat tensor, row by row. -> int64 [N k]"""
    return flat_indices(topk_indices(values, k), values.shape[1])


def flat_indices(indices: Tensor, width: int) -> Tensor:
    """Return where indices [N,k] into rows of that width lie in the flat tensor. -> int64 [N k]"""
    rows = torch.arange(len(indices), device=indices.device)
    return (indices + rows[:, None] * width).flatten()


def kth_largest(
    values: Tensor,
    k: int,
    all_sum: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Return the k-th largest of the positive values, 0 if there are fewer. [...] -> []

    `all_sum` adds over processes that each hold a share of the values and of k. Positive floats
    are ordered as their bits are, so two histograms find the value: one of the upper 16 bits,
    then one of the lower 16 bits of the values in the bin that holds it.
    """
    values = values.detach().flatten().float()
    bits = torch.where(values > 0, values, 0).view(torch.int32)
    rank = all_sum(torch.full((), k, device=values.device))
    upper_bits = bits >> 16
    high, rank = _bin_of_rank(upper_bits, rank, all_sum)
    lower_bits = bits[upper_bits == high] & 0xFFFF
    low, _ = _bin_of_rank(lower_bits, rank, all_sum)
    result = high << 16 | low
    return result.to(torch.int32).view(torch.float32)


def _bin_of_rank(
    bins: Tensor,
    rank: Tensor,
    all_sum: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return (the bin of the entry of that rank from the highest bin down, its rank in the bin)."""
    counts = all_sum(torch.bincount(bins, minlength=65536))
    from_above = counts.flip(0).cumsum(0)
    index = torch.searchsorted(from_above, rank).clamp_max(65535)
    above = torch.where(index > 0, from_above[index - 1], 0)
    return 65535 - index, rank - above


# ------------------------------------------------------------------------------------ JumpReLU


def _sum_near_threshold(
    x: Tensor,
    threshold: Tensor,
    bandwidth: float,
    grad: Tensor,
) -> Tensor:
    """Sum the gradient over tokens where x lies in the rectangle around its threshold. -> [F]"""
    near = (x - threshold).abs_() < bandwidth / 2
    return torch.where(near, grad, 0).sum_to_size(threshold.shape)


class Jump_func(Function):
    """x 1[x > threshold], with a rectangle-kernel gradient for the threshold.

    Rajamanoharan et al. 2024b, eq. 11. apply(x [...,F], threshold [F], bandwidth) -> [...,F]
    """

    @staticmethod
    def forward(ctx, x, threshold, bandwidth):
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        # On CUDA a product of two types takes twice as long.
        return torch.where(x > threshold, x, 0)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        near = _sum_near_threshold(x, threshold, ctx.bandwidth, grad)
        by_x = torch.where(x > threshold, grad, 0)
        by_threshold = -threshold / ctx.bandwidth * near
        return by_x, by_threshold, None


class Step_func(Function):
    """1[x > threshold], with a gradient for the threshold only (same paper, eq. 12)."""

    @staticmethod
    def forward(ctx, x, threshold, bandwidth):
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        near = _sum_near_threshold(x, threshold, ctx.bandwidth, grad)
        return None, -1 / ctx.bandwidth * near, None


@device.joined
def jump(x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return x 1[x > threshold], as Jump_func does. [...,F] -> [...,F]"""
    return Jump_func.apply(x, threshold, bandwidth)


@device.joined
def count_above(x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return how many values are above their thresholds, as Step_func does. [...,F] -> [...]"""
    return Step_func.apply(x, threshold, bandwidth).sum(-1)


# -------------------------------------------------------------------------- gates and penalties


@device.joined
def gated_magnitudes(
    pre_acts: Tensor, gate_bias: Tensor, mag_bias: Tensor, r_mag: Tensor
) -> Tensor:
    """Return 1[pi + b_gate > 0] ReLU(exp(r_mag) pi + b_mag). [...,F] -> [...,F]

    Rajamanoharan et al. 2024a. The gate gets no gradient.
    """
    # One pass over the code for the product and the sum.
    scaled = torch.addcmul(mag_bias, r_mag.exp(), pre_acts)
    return torch.where(pre_acts > -gate_bias, nn.functional.relu(scaled), 0)


@device.joined
def shifted_relu(pre_acts: Tensor, bias: Tensor) -> Tensor:
    """Return ReLU(pre_acts + bias). [...,F] -> [...,F]"""
    return nn.functional.relu(pre_acts + bias)


@device.joined
def saturated_sum(latents: Tensor, norms: Tensor, highest: float) -> Tensor:
    """Return the sum of a tanh(s / a) over strengths s = latents x norms, a = highest.

    [...,F], [F] -> [...]
    """
    return highest * torch.tanh(latents * (norms / highest)).sum(-1)


# ------------------------------------------------------------------------ products and weights


class Linear(Function):
    """apply(x [N,D], shift [D] or None, weight [F,D], bias [F] or None) -> [N,F].

    Computes (x - shift) weight^T + bias. The gradient of shift is summed over tokens before it
    passes the weight, which saves one of autograd's products.
    """

    @staticmethod
    def forward(ctx, x, shift, weight, bias):
        x = x if shift is None else x - shift
        bias_in_product = bias is not None and device.uses_bf16_matmul(x)
        if bias_in_product:
            a, b = device.affine_factors(x, weight, bias)
        else:
            a, b = device.to_matmul_dtype(x), device.to_matmul_dtype(weight)
        width = x.shape[1]
        ctx.save_for_backward(a[:, :width], b[:, :width])
        y = device.matmul(a, b.T)
        return y if bias is None or bias_in_product else y.add_(bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x, for_shift, for_weight, for_bias = ctx.needs_input_grad
        factor = device.to_matmul_dtype(grad)
        by_bias = grad.sum(0) if for_shift or for_bias else None
        by_shift = -(by_bias @ weight.to(by_bias.dtype)) if for_shift else None
        by_x = device.matmul(factor, weight) if for_x else None
        by_weight = device.matmul(factor.T, x) if for_weight else None
        return by_x, by_shift, by_weight, by_bias if for_bias else None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Return (x - shift) weight^T + bias. [...,D] -> [...,F]"""
    if not torch.is_grad_enabled():
        centred = x if shift is None else x - shift
        return nn.functional.linear(centred, weight, bias)
    *tokens, width = x.shape
    y = Linear.apply(x.reshape(-1, width), shift, weight, bias)
    return y.view(*tokens, len(weight))


def _decoders(model: nn.Module) -> list[nn.Linear]:
    model = getattr(model, "module", model)  # a data-parallel wrapper
    if not hasattr(model, "decoders"):
        name = type(model).__name__
        raise TypeError(f"{name} does not say which decoders are kept at unit norm")
    return model.decoders()


def _norms(columns: Tensor) -> Tensor:
    return columns.norm(dim=0, keepdim=True).clamp_min(MIN_NORM)


@torch.no_grad()
def hold_cosine_(weight: Tensor, start: Tensor, least: float) -> None:
    """Turn columns back, in place, to a cosine of `least` with those of start. [D,F], [D,F]

    Columns of a larger cosine stay bit for bit; the norms of all stay.
    """
    direction = start / _norms(start)
    along = (weight * direction).sum(0, keepdim=True)
    norm = _norms(weight)
    outside = along < least * norm
    across = weight - along * direction
    cosine = least + COSINE_MARGIN
    turned = cosine * direction + (1 - cosine**2) ** 0.5 * across / _norms(across)
    weight.copy_(torch.where(outside, norm * turned, weight))


@torch.no_grad()
def unit_norm_decoder(model: nn.Module, only_if: Tensor | None = None) -> None:
    """Scale every decoder column to norm 1, in place; a zero column stays zero.

    A decoder that does not train stays bit for bit.

    Where only_if, a 0-dim bool, is False, nothing changes. Raises TypeError for a module without
    decoders().
    """
    for decoder in _decoders(model):
        if not decoder.weight.requires_grad:
            continue
        norm = _norms(decoder.weight)
        if only_if is not None:
            norm = torch.where(only_if, norm, 1)
        decoder.weight.div_(norm)


@torch.no_grad()
def project_decoder_grad(model: nn.Module) -> None:
    """Remove the part of each decoder gradient that would only change its column's norm."""
    for decoder in _decoders(model):
        grad = decoder.weight.grad
        if grad is not None:
            unit = decoder.weight / _norms(decoder.weight)
            grad -= unit * (unit * grad).sum(0, keepdim=True)


@torch.no_grad()
def sign_step_(
    y: Tensor,
    z: Tensor,
    grad: Tensor,
    share: float,
    y_step: float,
    z_step: float,
    stop: Tensor,
) -> None:
    """Move y towards z by share, then y and z by their step against the gradient's sign.

    In place; where the 0-dim `stop` is not 0, nothing changes.
    """
    contiguous = y.is_contiguous() and z.is_contiguous()
    fast = device.kernels(y) if y.dtype is torch.float32 and contiguous else None
    if fast:
        return fast.sign_step(y, z, grad.contiguous(), share, y_step, z_step, stop)
    sign = grad.sign().masked_fill_(stop > 0, 0)
    y.lerp_(z, share * (1 - stop))
    y.add_(sign, alpha=-y_step)
    z.add_(sign, alpha=-z_step)
