"""Tensor functions without state. N tokens (any leading dimensions), D hidden, F latents, k active latents."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_bf16_allowed = False  # within bf16_matmuls(); a plain global, since gradients on CUDA are computed in threads of their own
CHUNK_NUMBERS = {
    "cuda": 2**27
}  # pre-activations at one time, half a GB; but at least 256 tokens, as products of fewer are slow
GROUP = 8  # values a group in a two-stage top-k on a CPU (docs/LOG.md)
# Latents per active one from which a code is decoded and differentiated by the rows of its active latents in place of dense products: all of it,
# measured on a CPU (benchmarks/sparse_code.py), on CUDA extrapolated; and, where there are kernels, all but the gradients of weights.
SPARSE_FROM = {"cpu": 8, "cuda": 1200}
ROWS_FROM = 128


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 faster than in float32."""
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def kernels(x: Tensor) -> Any:
    """src.kernels for a tensor on CUDA; None elsewhere, in float64, and where Triton cannot build them."""
    return _working_kernels() if x.is_cuda and x.dtype is not torch.float64 else None


@functools.cache
def _working_kernels() -> Any:
    try:
        from src import kernels

        kernels.topk_indices(torch.zeros(1, 1, device="cuda"), 1)
    except Exception as error:  # no Triton, no C compiler for it, a card that it does not know: each library has its own kinds of error
        warnings.warn(
            f"Triton's kernels do not work here ({type(error).__name__}: {error}); plain PyTorch takes their place",
            stacklevel=3,
        )
        return None
    return kernels


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)  # before Ampere it is emulated


def pre_process(
    hidden_states: Tensor, eps: float = 1e-6, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, mean, std) with x = (h - mean) / (std + eps) per token, in float32; std is the unbiased estimate. [...,D] -> [...,D], [...,1], [...,1]

    x is written to `out` where it is given.
    """
    h = hidden_states.float()  # first: statistics of a bfloat16 vector lose about three digits
    mean = h.mean(-1, keepdim=True)
    centred = h - mean
    std = (
        torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (h.shape[-1] - 1) ** 0.5
    )  # on a CPU h.std() takes 15 times as long
    return torch.div(centred, std + eps, out=out), mean, std


def standardised(states: list[Tensor], eps: float) -> Tensor:
    """pre_process's x of the states of several sites, side by side: L times [...,D] -> float32 [...,L,D]"""
    first = states[0]
    x = torch.empty(*first.shape[:-1], len(states), first.shape[-1], device=first.device)
    for i, h in enumerate(states):
        if fast := kernels(h):
            fast.standardise(
                h.flatten(0, -2), eps, x.flatten(0, -3)[:, i]
            )  # one pass over memory in place of five
        else:
            pre_process(h, eps, x[..., i, :])
    return x


class SquaredErrors(Function):
    """squared_errors with half the passes over memory that automatic differentiation of its formula takes."""

    @staticmethod
    def forward(ctx, x, x_hat):
        off, norm = (
            x - x_hat,
            torch.linalg.vector_norm(x, dim=-1).square().clamp_min(torch.finfo(x.dtype).tiny),
        )
        errors = torch.linalg.vector_norm(off, dim=-1).square() / norm
        ctx.save_for_backward(x if ctx.needs_input_grad[0] else None, off, norm, errors)
        return errors

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, off, norm, errors = ctx.saved_tensors
        share = (2 * grad / norm)[..., None]
        by_off = off * share
        return None if x is None else by_off - x * (
            share * errors[..., None]
        ), -by_off if ctx.needs_input_grad[1] else None


def squared_errors(x: Tensor, x_hat: Tensor) -> Tensor:
    """||x - x_hat||^2 / ||x||^2 of each token; 0 stands below as the smallest positive number. [...,D] -> [...]"""
    return SquaredErrors.apply(x, x_hat)


def Normalized_MSE_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean over tokens of ||x - x_hat||^2 / ||x||^2 (Gao et al. 2024)."""
    return squared_errors(x, x_hat).mean()


def L1_loss(latents: Tensor) -> Tensor:
    """Mean of |latents| over tokens and latents: the documented function. Training uses the sum over latents."""
    return latents.abs().mean()


def topk_sparsify(pre_acts: Tensor, k: int) -> Tensor:
    """The k largest entries of the last dimension kept, signs included; the rest 0."""
    indices = topk_indices(pre_acts.flatten(0, -2), k).view(*pre_acts.shape[:-1], k)
    return torch.zeros_like(pre_acts).scatter(-1, indices, pre_acts.gather(-1, indices))


def apply_inference_cut(
    latents: Tensor, infer_k: int | None = None, theta: float | None = None
) -> Tensor:
    """Latents after their activation, cut at inference: the infer_k largest, or those above max(theta, 0).

    Raises ValueError where both are given or infer_k is not positive; infer_k above F is clamped with a warning.
    """
    if infer_k is not None and theta is not None:
        raise ValueError("infer_k and theta exclude each other; give one")
    if infer_k is not None:
        if infer_k <= 0:
            raise ValueError(f"infer_k {infer_k}; it must be positive")
        if infer_k > latents.shape[-1]:
            warnings.warn(
                f"infer_k {infer_k} is more than the {latents.shape[-1]} latents; all are kept",
                stacklevel=2,
            )
        return topk_sparsify(latents, min(infer_k, latents.shape[-1]))
    if theta is not None:
        return latents * (latents > max(theta, 0.0))
    return latents


def topk_indices(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, in no order. [N,F] -> int64 [N,k]"""
    if k == values.shape[1]:
        return torch.arange(k, device=values.device).expand(len(values), k)
    fast = kernels(values) if values.dtype is torch.float32 else None
    if fast:
        return fast.topk_indices(values, k)
    groups = values.shape[1] // GROUP
    if (
        not values.is_cuda and values.shape[1] % GROUP == 0 and groups >= 2 * k
    ):  # the k largest lie in the k groups with the largest maxima
        best = _best(values.view(len(values), GROUP, groups).amax(1), k)
        candidates = (best[:, None] + groups * torch.arange(GROUP)[:, None]).flatten(1)
        return candidates.gather(1, _best(values.gather(1, candidates), k))
    return _best(values, k)


def _best(values: Tensor, k: int) -> Tensor:
    """topk_indices() in one stage; on a CPU by numpy's partition, which is quicker than PyTorch's top-k (docs/LOG.md)."""
    width, numbers = values.shape[1], values.detach()
    if not values.is_cuda and 0 < k < width <= 2**16:
        if (
            values.dtype is torch.bfloat16
        ):  # as float32 it leaves 16 bits for its place, so that the places come along
            keys = (
                numbers.float()
                .view(torch.int32)
                .bitwise_or_(torch.arange(width, dtype=torch.int32))
                .view(torch.float32)
            )
            top = np.ascontiguousarray(
                np.partition(keys.numpy(), width - k, axis=1)[:, width - k :]
            )
            return torch.from_numpy(top).view(torch.int32).bitwise_and_(0xFFFF).long()
        smallest = np.partition(numbers.numpy(), width - k, axis=1)[:, width - k, None]
        at = np.flatnonzero(numbers.numpy() >= smallest)
        if len(at) == len(values) * k:  # no ties at the k-th place, nothing that is no number
            return torch.from_numpy(at.reshape(-1, k) % width)
    return values.topk(k, dim=-1, sorted=False).indices


def topk_flat_indices(values: Tensor, k: int) -> Tensor:
    """Of the k largest of each row, in the flat tensor, row by row. [N,F] -> int64 [N k]"""
    indices = topk_indices(values, k)
    return (
        indices + torch.arange(len(values), device=indices.device)[:, None] * values.shape[1]
    ).flatten()


def kth_largest(values: Tensor, k: int, total: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """The k-th largest of the positive values; 0 where there are fewer. [...] -> []

    `total` adds up over processes that each hold a share of the values and of k. Two histograms find it: of the upper 16 bits of the
    floats, then of the lower 16 bits of those in the bin that holds it.
    """
    values = values.detach().flatten().float()
    bits = torch.where(values > 0, values, 0).view(
        torch.int32
    )  # positive floats are ordered as their bits are
    high, place = _bin_from_above(bits >> 16, total(torch.full((), k, device=values.device)), total)
    low, _ = _bin_from_above(bits[bits >> 16 == high] & 0xFFFF, place, total)
    return (high << 16 | low).to(torch.int32).view(torch.float32)


def _bin_from_above(
    bins: Tensor, place: Tensor, total: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(the bin of the entry at that place counted from the highest bin down, its place within the bin)."""
    counts = total(torch.bincount(bins, minlength=65536)).flip(0).cumsum(0)
    at = torch.searchsorted(counts, place).clamp_max(65535)
    return 65535 - at, place - torch.where(at > 0, counts[at - 1], 0)


class Sparse(NamedTuple):
    """A code by its entries, token by token; all others are 0."""

    values: Tensor  # [E]
    at: Tensor  # positions in the flat dense code, int64 [E]
    shape: torch.Size  # of the dense code, [...,F]

    def dense(self) -> Tensor:
        return (
            self.values.new_zeros(self.shape.numel())
            .index_put_((self.at,), self.values)
            .view(self.shape)
        )

    @staticmethod
    def cat(codes: list[Sparse]) -> Sparse:
        """The codes of consecutive tokens as one."""
        before = [0, *itertools.accumulate(code.shape.numel() for code in codes)]
        at = torch.cat([code.at + start for code, start in zip(codes, before, strict=False)])
        return Sparse(
            torch.cat([code.values for code in codes]),
            at,
            torch.Size([sum(code.shape[0] for code in codes), *codes[0].shape[1:]]),
        )


def dense(code: Tensor | Sparse) -> Tensor:
    return code.dense() if isinstance(code, Sparse) else code


def divided(code: Tensor | Sparse, by: Tensor) -> Tensor | Sparse:
    """Each token's code divided by its number. [...,F], [...] -> [...,F]"""
    if isinstance(code, Sparse):
        return code._replace(
            values=code.values / by.flatten()[code.at.div(code.shape[-1], rounding_mode="floor")]
        )
    return code / by[..., None]


def active(code: Tensor | Sparse) -> tuple[Tensor, Tensor, Tensor]:
    """(token, latent, value) of every latent that is not 0. [N,F] -> three tensors of one length, by token."""
    at = code.at if isinstance(code, Sparse) else code.flatten().nonzero()[:, 0]
    values = code.values if isinstance(code, Sparse) else code.flatten()[at]
    return at.div(code.shape[-1], rounding_mode="floor"), at.remainder(code.shape[-1]), values


def firings(code: Tensor | Sparse) -> Tensor:
    """In how many codes each latent is not 0. [...,F] -> int64 [F]"""
    if isinstance(code, Sparse):
        counts = torch.zeros(code.shape[-1], dtype=torch.long, device=code.at.device)
        return counts.scatter_add_(
            0, code.at.remainder(len(counts)), torch.ones_like(code.at)
        )  # bincount would wait for the device
    return (
        (code != 0).flatten(0, -2).sum(0, dtype=torch.int32).long()
    )  # on a CPU a quarter of the time of a sum in int64


def _near(x: Tensor, threshold: Tensor, bandwidth: float, grad: Tensor) -> Tensor:
    """The gradient summed over tokens where x lies within the rectangle around its threshold. [...,F], [F], [...,F] -> [F]"""
    return torch.where((x - threshold).abs_() < bandwidth / 2, grad, 0).sum_to_size(threshold.shape)


class Jump_func(Function):
    """x * 1[x > threshold] with a rectangle-kernel gradient for the threshold (Rajamanoharan et al. 2024b, eq. 11)."""

    @staticmethod
    def forward(ctx, x, threshold, bandwidth):
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(x > threshold, x, 0)  # twice as fast on CUDA as a product of two types

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        return (
            torch.where(x > threshold, grad, 0),
            -threshold / ctx.bandwidth * _near(x, threshold, ctx.bandwidth, grad),
            None,
        )


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
        return None, -1 / ctx.bandwidth * _near(x, threshold, ctx.bandwidth, grad), None


def _decoders(model: nn.Module) -> list[nn.Linear]:
    model = getattr(model, "module", model)  # a data-parallel wrapper
    if not hasattr(model, "decoders"):
        raise TypeError(f"{type(model).__name__} does not say which decoders are kept at unit norm")
    return model.decoders()


@torch.no_grad()
def unit_norm_decoder(model: nn.Module, only_if: Tensor | None = None) -> None:
    """Scales every decoder column to norm 1, in place; a zero column stays zero. Raises TypeError for a module without decoders().

    Where only_if, a 0-dim bool, is False, nothing changes.
    """
    for decoder in _decoders(model):
        norm = decoder.weight.norm(dim=0, keepdim=True).clamp_min(1e-12)
        decoder.weight.div_(norm if only_if is None else torch.where(only_if, norm, 1))


@torch.no_grad()
def project_decoder_grad(model: nn.Module) -> None:
    """Removes the part of each decoder gradient that would only change its column's norm."""
    for decoder in _decoders(model):
        if decoder.weight.grad is not None:
            unit = decoder.weight / decoder.weight.norm(dim=0, keepdim=True).clamp_min(1e-12)
            decoder.weight.grad -= unit * (unit * decoder.weight.grad).sum(0, keepdim=True)


@torch.no_grad()
def sign_step_(
    y: Tensor, z: Tensor, grad: Tensor, share: float, by: float, lr: float, stop: Tensor
) -> None:
    """y goes towards z by share, then by `by` against the gradient's sign, z by lr; in place, and not where the 0-dim `stop` is not 0."""
    fast = (
        kernels(y) if y.dtype is torch.float32 and y.is_contiguous() and z.is_contiguous() else None
    )
    if fast:
        return fast.sign_step(y, z, grad.contiguous(), share, by, lr, stop)
    sign = grad.sign().masked_fill_(stop > 0, 0)
    y.lerp_(z, share * (1 - stop))
    y.add_(sign, alpha=-by)
    z.add_(sign, alpha=-lr)


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


@contextlib.contextmanager
def bf16_matmuls() -> Iterator[None]:
    """Inside, which is where SAEs are trained, products take their factors in bfloat16 where that is faster."""
    global _bf16_allowed
    before, _bf16_allowed = _bf16_allowed, True
    try:
        yield
    finally:
        _bf16_allowed = before


def uses_bf16_matmul(x: Tensor) -> bool:
    """Whether x is a factor that goes in bfloat16: on CUDA in training, as that takes half the time of TF32 and is switched off together with it."""
    return (
        _bf16_allowed
        and x.is_cuda
        and x.dtype is torch.float32
        and torch.backends.cuda.matmul.allow_tf32
        and _has_bfloat16(x.device)
    )


def to_matmul_dtype(x: Tensor) -> Tensor:
    """A factor of a product, in bfloat16 where uses_bf16_matmul() says so."""
    return x.bfloat16() if uses_bf16_matmul(x) else x


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of narrow factors too in float32."""
    return (
        torch.mm(a, b, out_dtype=torch.float32)
        if a.is_cuda and a.dtype is torch.bfloat16
        else torch.mm(a, b)
    )


def affine_factors(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in bfloat16 whose product is x weight^T + bias: a pass over the result less. [N,D], [F,D], [F] -> [N,D+16], [F,D+16]

    Three columns of the sixteen, which keep rows aligned, hold the bias in parts, so that it is as exact as in float32.
    """
    width = x.shape[1]
    a, b = (
        torch.zeros(len(t), width + 16, dtype=torch.bfloat16, device=t.device) for t in (x, weight)
    )
    a[:, :width], b[:, :width], a[:, width : width + 3] = x, weight, 1
    for i in range(width, width + 3):
        b[:, i] = bias
        bias = bias - b[:, i]
    return a, b


class Linear(Function):
    """apply(x [N,D], shift [D] or None, weight [F,D], bias [F] or None) -> (x - shift) weight^T + bias [N,F].

    The gradient of shift sums over tokens before it goes through the weight: one product less than automatic differentiation makes.
    """

    @staticmethod
    def forward(ctx, x, shift, weight, bias):
        x = x if shift is None else x - shift
        joined = bias is not None and uses_bf16_matmul(x)
        a, b = (
            affine_factors(x, weight, bias)
            if joined
            else (to_matmul_dtype(x), to_matmul_dtype(weight))
        )
        ctx.save_for_backward(a[:, : x.shape[1]], b[:, : x.shape[1]])
        y = product(a, b.T)
        return y if bias is None or joined else y.add_(bias)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        by_bias, narrowed = grad.sum(0) if wanted[1] or wanted[3] else None, to_matmul_dtype(grad)
        return (
            product(narrowed, weight) if wanted[0] else None,
            -(by_bias @ weight.to(by_bias.dtype)) if wanted[1] else None,
            product(narrowed.T, x) if wanted[2] else None,
            by_bias if wanted[3] else None,
        )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """(x - shift) weight^T + bias. [...,D] -> [...,F]"""
    if not torch.is_grad_enabled():
        return nn.functional.linear(x if shift is None else x - shift, weight, bias)
    return Linear.apply(x.reshape(-1, x.shape[-1]), shift, weight, bias).view(
        *x.shape[:-1], len(weight)
    )


def weighted_embedding_bag(values: Tensor, latent: Tensor, bounds: Tensor, table: Tensor) -> Tensor:
    """values[e] table[latent[e]] summed over the entries e of each bag: bounds[n] ... bounds[n+1]-1. [E], [E], [N+1], [F,D] -> [N,D]"""
    if fast := kernels(table):
        return fast.weighted_embedding_bag(values, latent, bounds, table)
    return nn.functional.embedding_bag(
        latent,
        table.to(values.dtype),
        bounds,
        mode="sum",
        per_sample_weights=values,
        include_last_offset=True,
    )


def bag_dots(grad: Tensor, latent: Tensor, bounds: Tensor, table: Tensor) -> Tensor:
    """<grad[n], table[latent[e]]> of every entry e of bag n. [N,D], [E], [N+1], [F,D] -> [E]"""
    if fast := kernels(table):
        return fast.bag_dots(grad, latent, bounds, table)
    with torch.enable_grad():  # the library's gradient for weights of a bag: no [N,k,D] tensor
        weights = grad.new_zeros(len(latent), requires_grad=True)
        (dots,) = torch.autograd.grad(
            weighted_embedding_bag(weights, latent, bounds, table), weights, grad
        )
    return dots


class SparseCode(Function):
    """A code that keeps few pre-activations, decoded and differentiated without a product for the input's gradient that nobody asks for.

    apply(x [N,D], pre_bias [D], encoder [F,D], latent_bias [F], decoder [D,F], choose, k, clip, apart) -> (x_hat [N,D], values [E], their
    positions in the flat code [E], token by token). choose maps the pre-activations of a slice of tokens, and that slice, to the positions in
    them that stay, about k a token; clip cuts negative values. apart: whether tokens can be sliced. Gradients flow through x_hat.
    """

    @staticmethod
    def forward(ctx, x, pre_bias, encoder, latent_bias, decoder, choose, k, clip, apart):
        rows = (
            max(256, CHUNK_NUMBERS.get(x.device.type, 2**21) // len(encoder))
            if apart
            else max(1, len(x))
        )
        given, weight, bias = x - pre_bias, encoder, latent_bias
        factors = given, encoder
        if uses_bf16_matmul(given):
            given, weight = affine_factors(given, encoder, bias)
            factors, bias = (given[:, : x.shape[1]], weight[:, : x.shape[1]]), None
        elif (
            apart
            and _bf16_allowed
            and x.device.type == "cpu"
            and given.dtype is torch.float32
            and fast_bfloat16()
        ):
            given, weight, bias = (
                t.bfloat16() for t in (given, encoder, bias)
            )  # gradients stay exact
        found = []
        for start in range(0, max(1, len(x)), rows):
            here = slice(start, start + rows)
            pre_acts = product(given[here], weight.T)
            pre_acts = pre_acts if bias is None else pre_acts.add_(bias)
            chosen = choose(pre_acts, here)
            found.append(
                (chosen + start * len(encoder), pre_acts.view(-1)[chosen].to(latent_bias.dtype))
            )
        at, values = (torch.cat(column) for column in zip(*found, strict=True))
        if clip:
            at, values = at[values > 0], values[values > 0]
        ctx.form = SparseCode.form(len(encoder) / max(1, k), x)
        if ctx.form == "products":
            decoder = to_matmul_dtype(decoder)
            code = Sparse(values.to(decoder.dtype), at, torch.Size([len(x), len(encoder)])).dense()
            x_hat = product(code, decoder.T).add_(pre_bias)
            ctx.save_for_backward(*factors, decoder, code, at)
        else:
            latent, columns = at.remainder(len(encoder)), to_matmul_dtype(decoder).T.contiguous()
            bounds = SparseCode.bounds(at, len(x), len(encoder))
            x_hat = weighted_embedding_bag(values, latent, bounds, columns) + pre_bias
            ctx.save_for_backward(*factors, columns, values, at, latent, bounds)
        ctx.mark_non_differentiable(values, at)
        ctx.set_materialize_grads(False)
        return x_hat, values, at

    @staticmethod
    def form(ratio: float, x: Tensor) -> str:
        """What is quickest for so many latents per active one: "sums" of rows, "rows" but for the weights' gradients, or dense "products"."""
        if ratio >= SPARSE_FROM.get(x.device.type, torch.inf):
            return "sums"
        return "rows" if ratio >= ROWS_FROM and kernels(x) else "products"

    @staticmethod
    def bounds(index: Tensor, count: int, size: int = 1) -> Tensor:
        """Where the run of each of 0 ... count-1 begins in a sorted index of things of that size, and where the last one ends."""
        return torch.searchsorted(
            index, torch.arange(0, (count + 1) * size, size, device=index.device)
        )

    @staticmethod
    def backward(ctx, grad, _values, _at):
        if grad is None:
            return (None,) * 9
        through = SparseCode.by_products if ctx.form == "products" else SparseCode.by_rows
        by_x, by_encoder, by_bias, by_decoder = through(
            grad, *ctx.saved_tensors, ctx.needs_input_grad[0], ctx.form == "sums"
        )
        # tokens summed first: a vector times the encoder, no product
        by_pre_bias = grad.sum(0) - by_bias @ ctx.saved_tensors[1].to(by_bias.dtype)
        return by_x, by_pre_bias, by_encoder, by_bias, by_decoder, None, None, None, None

    @staticmethod
    def by_products(grad, centred, encoder, decoder, code, at, input_too, _):
        grad = grad.to(code.dtype)
        by_latent = grad @ decoder
        by_value = by_latent.view(-1)[at]
        by_latent.zero_().view(-1)[at] = by_value
        by_x = product(by_latent, encoder) if input_too else None
        return by_x, *SparseCode.of_weights(by_latent, centred), product(grad.T, code)

    @staticmethod
    def of_weights(by_latent, centred):
        """(gradient of the encoder, of its bias)"""
        return product(by_latent.T, centred), by_latent.sum(
            0, dtype=torch.promote_types(by_latent.dtype, torch.float32)
        )

    @staticmethod
    def by_rows(grad, centred, encoder, columns, values, at, latent, bounds, input_too, all_of_it):
        grad = grad.contiguous()
        by_value = bag_dots(grad, latent, bounds, columns)
        by_x = weighted_embedding_bag(by_value, latent, bounds, encoder) if input_too else None
        if not all_of_it:  # one dense code after the other in the same place
            narrowed = grad.to(centred.dtype)
            code = Sparse(
                values.to(narrowed.dtype), at, torch.Size([len(grad), len(encoder)])
            ).dense()
            by_decoder = product(narrowed.T, code)
            code.view(-1)[at] = by_value.to(code.dtype)
            return by_x, *SparseCode.of_weights(code, centred), by_decoder
        latent_sorted, order = latent.sort(stable=True)
        source, ends = (
            at.div(len(encoder), rounding_mode="floor")[order],
            SparseCode.bounds(latent_sorted, len(encoder)),
        )
        by_decoder = weighted_embedding_bag(values[order], source, ends, grad).T
        by_encoder = weighted_embedding_bag(by_value[order], source, ends, centred)
        by_bias = torch.zeros(len(encoder), dtype=by_value.dtype, device=grad.device).index_add_(
            0, latent, by_value
        )
        return by_x, by_encoder, by_bias, by_decoder


def random_integers(keys: Tensor, seed: int, high: int | Tensor, draw: int | Tensor = 0) -> Tensor:
    """One integer in [0, high) per key: a function of (key, seed, draw) alone, so batching changes nothing. int64 [...] -> [...], broadcast"""
    half = 1 << 62  # Python's integers do not wrap around, int64's do
    return (
        _mix(
            _mix(_mix(keys + 1) + seed * 0x9E3779B97F4A7C1 % half)
            + (draw * 0x2545F4914F6CDD1D & half - 1)
        )
        % high
    )


def random_subset(keys: Tensor, seed: int, n: int, k: int) -> Tensor:
    """k distinct integers of [0, n) per key, uniform. int64 [N] -> [N,k]

    Floyd's sampling: draw i comes from [0, n - k + i], and n - k + i takes its place where an earlier one has taken what it drew, that is
    where an earlier one drew the same, or drew what was taken and so got n - k + j, equal to this draw. All at once, by doubled pointers.
    """
    place = torch.arange(k, device=keys.device)
    drawn = random_integers(keys[:, None], seed, place + (n - k + 1), place)
    ordered, order = drawn.sort(dim=1, stable=True)
    taken = torch.zeros_like(drawn, dtype=torch.bool).scatter_(
        1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1]
    )
    earlier = drawn - (n - k)
    earlier = torch.where((earlier >= 0) & (earlier < place), earlier, place)
    for _ in range((k - 1).bit_length()):
        taken = taken | taken.gather(1, earlier)
        earlier = earlier.gather(1, earlier)
    return torch.where(taken, place + (n - k), drawn)
