"""Sparse codes: how they are stored, decoded and differentiated without dense [N,F] products.

N tokens, D hidden, F latents, E entries (active latents of all tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from src import device

# Pre-activations computed at one time on each kind of device. On CUDA that is half a GB.
CHUNK_NUMBERS = {"cuda": 2**27}
CHUNK_NUMBERS_ELSEWHERE = 2**21
MIN_CHUNK_TOKENS = 256  # products of fewer tokens are slow
# Use row sums for everything if F / k is at least this. On a CPU they take 15 ms in place of 67 at
# 128 and 8.1 in place of 10.2 at 8 (benchmarks/sparse_code.py). On CUDA it is extrapolated.
SPARSE_FROM = {"cpu": 8, "cuda": 1200}
# Use the kernels for everything but the gradients of weights if F / k is at least this. At 256 they
# take 1.3 ms to decode in place of 2.8 on an H200 (docs/LOG.md).
ROWS_FROM = 128


class SparseCode(NamedTuple):
    """A code given by its entries, token by token; all other latents are 0."""

    values: Tensor  # [E]
    flat_index: Tensor  # where each value lies in the flat dense code, int64 [E]
    shape: torch.Size  # of the dense code, [...,F]

    def dense(self) -> Tensor:
        flat = self.values.new_zeros(self.shape.numel())
        return flat.index_put_((self.flat_index,), self.values).view(self.shape)

    @staticmethod
    def cat(codes: list[SparseCode]) -> SparseCode:
        """Return the codes of consecutive tokens as one."""
        index = []
        start = 0
        for code in codes:
            index.append(code.flat_index + start)
            start += code.shape.numel()
        values = torch.cat([code.values for code in codes])
        n_tokens = sum(code.shape[0] for code in codes)
        shape = torch.Size([n_tokens, *codes[0].shape[1:]])
        return SparseCode(values, torch.cat(index), shape)


def cat_tokens(parts: list[Tensor] | list[SparseCode]) -> Tensor | SparseCode:
    """Return the tensors, or sparse codes, of consecutive tokens as one."""
    if isinstance(parts[0], SparseCode):
        return SparseCode.cat(parts)
    return torch.cat(parts)


def dense(code: Tensor | SparseCode) -> Tensor:
    """Return the dense code."""
    return code.dense() if isinstance(code, SparseCode) else code


def divided(code: Tensor | SparseCode, by: Tensor) -> Tensor | SparseCode:
    """Divide each token's code by its number. [...,F], [...] -> [...,F]"""
    if isinstance(code, SparseCode):
        token = code.flat_index.div(code.shape[-1], rounding_mode="floor")
        return code._replace(values=code.values / by.flatten()[token])
    return code / by[..., None]


def active(code: Tensor | SparseCode) -> tuple[Tensor, Tensor, Tensor]:
    """Return (token, latent, value) of every latent that is not 0, by token. -> 3 x [E]"""
    if isinstance(code, SparseCode):
        index, values = code.flat_index, code.values
    else:
        flat = code.flatten()
        index = flat.nonzero()[:, 0]
        values = flat[index]
    size = code.shape[-1]
    return index.div(size, rounding_mode="floor"), index.remainder(size), values


def ranks(code: SparseCode) -> Tensor:
    """Return how many larger values the code of its token has, for each entry. int64 [E]"""
    token = code.flat_index.div(code.shape[-1], rounding_mode="floor")
    order = code.values.argsort(descending=True)
    order = order[token[order].argsort(stable=True)]  # by token, then by value
    place = torch.arange(len(order), device=order.device)
    first = torch.searchsorted(token[order], token[order])  # where the entries of a token begin
    return torch.empty_like(order).scatter_(0, order, place - first)


def firings(code: Tensor | SparseCode) -> Tensor:
    """Count in how many codes each latent is not 0. [...,F] -> int64 [F]"""
    if isinstance(code, SparseCode):
        size = code.shape[-1]
        latent = code.flat_index.remainder(size)
        counts = latent.new_zeros(size)
        # bincount would wait for the device.
        return counts.scatter_add_(0, latent, torch.ones_like(latent))
    is_active = (code != 0).flatten(0, -2)
    # int32 first, because a sum in int64 takes four times as long on a CPU.
    return is_active.sum(0, dtype=torch.int32).long()


def weighted_embedding_bag(
    values: Tensor,
    index: Tensor,
    bounds: Tensor,
    table: Tensor,
) -> Tensor:
    """Sum values[e] table[index[e]] over the entries e of each bag.

    Bag n holds the entries bounds[n] ... bounds[n+1]-1. [E], [E], [N+1], [F,D] -> [N,D]
    """
    if fast := device.kernels(table):
        return fast.weighted_embedding_bag(values, index, bounds, table)
    return nn.functional.embedding_bag(
        index,
        table.to(values.dtype),
        bounds,
        mode="sum",
        per_sample_weights=values,
        include_last_offset=True,
    )


def bag_dots(grad: Tensor, index: Tensor, bounds: Tensor, table: Tensor) -> Tensor:
    """Return <grad[n], table[index[e]]> of every entry e of bag n. -> [E]

    The shapes are those of weighted_embedding_bag; grad is [N,D].
    """
    if fast := device.kernels(table):
        return fast.bag_dots(grad, index, bounds, table)
    with torch.enable_grad():  # the library's gradient of bag weights: no [N,k,D] tensor
        weights = grad.new_zeros(len(index), requires_grad=True)
        sums = weighted_embedding_bag(weights, index, bounds, table)
        (dots,) = torch.autograd.grad(sums, weights, grad)
    return dots


class Selection(NamedTuple):
    """Which pre-activations of a token stay active."""

    # maps (pre-activations [n,F] of a slice of tokens, that slice) to flat indices in them
    choose: Callable[[Tensor, slice], Tensor] | None
    k: int  # how many stay per token, about
    clip: bool  # cut negative values
    per_token: bool  # whether a token's choice is independent of other tokens
    # (values [E], flat indices [E]) of those that stay, where they are known; nothing is chosen
    known: tuple[Tensor, Tensor] | None = None


class DictionaryWeights(NamedTuple):
    """The parameters of a dictionary at one site."""

    pre_bias: Tensor  # [D], or one for each state: the shape of the states
    encoder: Tensor  # [F,D]
    latent_bias: Tensor  # [F]
    decoder: Tensor  # [D,F]

    def subset(self, latents: Tensor | slice) -> DictionaryWeights:
        """Return the dictionary of these latents alone, given by their numbers or as a slice."""
        decoder = self.decoder[:, latents]
        return DictionaryWeights(
            self.pre_bias, self.encoder[latents], self.latent_bias[latents], decoder
        )


def sparse_autoencode(
    x: Tensor, weights: DictionaryWeights, selection: Selection
) -> tuple[SparseCode, Tensor]:
    """Code each token by few latents and decode them. [...,D] -> (code [...,F], x_hat [...,D])

    Gradients reach x and the weights through x_hat alone.
    """
    rows = x.flatten(0, -2)
    if weights.pre_bias.dim() > 1:
        weights = weights._replace(pre_bias=weights.pre_bias.reshape(rows.shape))
    x_hat, values, index = _SparseAutoencode.apply(rows, *weights, selection)
    shape = torch.Size([*x.shape[:-1], len(weights.encoder)])
    return SparseCode(values, index, shape), x_hat.view_as(x)


def decode_form(ratio: float, x: Tensor) -> str:
    """Return the fastest way to decode and differentiate a code with `ratio` latents per active.

    "sums": sums of the rows of active latents. "rows": the same except for the gradients of
    weights. "products": dense products.
    """
    if ratio >= SPARSE_FROM.get(x.device.type, torch.inf):
        return "sums"
    if ratio >= ROWS_FROM and device.kernels(x):
        return "rows"
    return "products"


def bag_bounds(index: Tensor, count: int, size: int = 1) -> Tensor:
    """Return where each of `count` runs of a sorted index begins, and where the last one ends.

    Run i holds the entries in [i size, (i+1) size). [E] -> [count+1]
    """
    starts = size * torch.arange(count + 1, device=index.device)
    return torch.searchsorted(index, starts)


class _SparseAutoencode(Function):
    """sparse_autoencode with a backward pass that skips what nobody asks for."""

    @staticmethod
    def forward(ctx, x, pre_bias, encoder, latent_bias, decoder, selection):
        size = len(encoder)
        values, index, factors = _select(x - pre_bias, encoder, latent_bias, selection)
        if selection.clip:
            positive = values > 0
            values, index = values[positive], index[positive]
        ctx.form = decode_form(size / max(1, selection.k), x)
        decoder = device.to_matmul_dtype(decoder)
        if ctx.form == "products":
            code = _dense_rows(values.to(decoder.dtype), index, len(x), size)
            x_hat = device.matmul(code, decoder.T).add_(pre_bias)
            ctx.save_for_backward(*factors, decoder, code, index)
        else:
            latent = index.remainder(size)
            columns = decoder.T.contiguous()
            bounds = bag_bounds(index, len(x), size)
            x_hat = weighted_embedding_bag(values, latent, bounds, columns) + pre_bias
            ctx.save_for_backward(*factors, columns, values, index, latent, bounds)
        ctx.shared_bias = pre_bias.dim() == 1
        ctx.mark_non_differentiable(values, index)
        ctx.set_materialize_grads(False)
        return x_hat, values, index

    @staticmethod
    def backward(ctx, grad, _values, _index):
        if grad is None:
            return (None,) * 6
        backward = _backward_products if ctx.form == "products" else _backward_rows
        input_too = ctx.needs_input_grad[0] or not ctx.shared_bias
        by_x, by_encoder, by_bias, by_decoder = backward(
            grad, *ctx.saved_tensors, input_too, ctx.form == "sums"
        )
        if ctx.shared_bias:
            # Tokens are summed first: a vector times the encoder instead of a product of matrices,
            # so that a step takes five products in place of six.
            encoder = ctx.saved_tensors[1].to(by_bias.dtype)
            by_pre_bias = grad.sum(0) - by_bias @ encoder
        else:
            by_pre_bias = grad - by_x
        return by_x, by_pre_bias, by_encoder, by_bias, by_decoder, None


def _dense_rows(values: Tensor, index: Tensor, n_tokens: int, size: int) -> Tensor:
    """Return the dense code [N,F] of these entries."""
    return SparseCode(values, index, torch.Size([n_tokens, size])).dense()


def _select(
    centred: Tensor,
    encoder: Tensor,
    latent_bias: Tensor,
    selection: Selection,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return (values [E], flat indices [E], the encoder product's factors for the gradients)."""
    size = len(encoder)
    left, right, bias = centred, encoder, latent_bias
    factors = centred, encoder
    if device.uses_bf16_matmul(centred):
        width = centred.shape[1]
        left, right = device.affine_factors(centred, encoder, latent_bias)
        bias = None
        factors = left[:, :width], right[:, :width]
    if selection.known is not None:
        return *selection.known, factors
    if selection.per_token and device.uses_bf16_on_cpu(centred):
        # Gradients keep the float32 factors. A TopK update: 35.1 ms in place of 41.4 (docs/LOG.md).
        left, right, bias = (factor.bfloat16() for factor in (centred, encoder, latent_bias))
    n_tokens = max(1, len(centred))
    chunk = _chunk_tokens(centred, size) if selection.per_token else n_tokens
    values = []
    index = []
    for start in range(0, n_tokens, chunk):
        tokens = slice(start, start + chunk)
        pre_acts = device.matmul(left[tokens], right.T)
        if bias is not None:
            pre_acts.add_(bias)
        chosen = selection.choose(pre_acts, tokens)
        kept = pre_acts.view(-1)[chosen]
        index.append(chosen + start * size)
        values.append(kept.to(latent_bias.dtype))
    return torch.cat(values), torch.cat(index), factors


def _chunk_tokens(x: Tensor, size: int) -> int:
    """Return how many tokens are encoded at one time."""
    numbers = CHUNK_NUMBERS.get(x.device.type, CHUNK_NUMBERS_ELSEWHERE)
    return max(MIN_CHUNK_TOKENS, numbers // size)


def _backward_products(grad, centred, encoder, decoder, code, index, input_too, _):
    """Gradients of (x, encoder, latent bias, decoder) by dense products."""
    grad = grad.to(code.dtype)
    by_latent = grad @ decoder
    by_value = by_latent.view(-1)[index]
    by_latent.zero_().view(-1)[index] = by_value
    by_x = device.matmul(by_latent, encoder) if input_too else None
    by_encoder, by_bias = _encoder_gradients(by_latent, centred)
    by_decoder = device.matmul(grad.T, code)
    return by_x, by_encoder, by_bias, by_decoder


def _encoder_gradients(by_latent, centred):
    """Return the gradients of the encoder and of its bias."""
    dtype = torch.promote_types(by_latent.dtype, torch.float32)
    by_encoder = device.matmul(by_latent.T, centred)
    by_bias = by_latent.sum(0, dtype=dtype)
    return by_encoder, by_bias


def _backward_rows(
    grad,
    centred,
    encoder,
    columns,
    values,
    index,
    latent,
    bounds,
    input_too,
    weights_too,
):
    """The same gradients by the rows of active latents; those of weights only if weights_too."""
    size = len(encoder)
    grad = grad.contiguous()
    by_value = bag_dots(grad, latent, bounds, columns)
    by_x = weighted_embedding_bag(by_value, latent, bounds, encoder) if input_too else None
    if not weights_too:
        factor = grad.to(centred.dtype)
        code = _dense_rows(values.to(factor.dtype), index, len(grad), size)
        by_decoder = device.matmul(factor.T, code)
        # The gradient of the code takes the code's memory: both are 0 at the same places.
        code.view(-1)[index] = by_value.to(code.dtype)
        by_encoder, by_bias = _encoder_gradients(code, centred)
        return by_x, by_encoder, by_bias, by_decoder
    latent_sorted, order = latent.sort(stable=True)
    token = index[order].div(size, rounding_mode="floor")
    ends = bag_bounds(latent_sorted, size)
    by_decoder = weighted_embedding_bag(values[order], token, ends, grad).T
    by_encoder = weighted_embedding_bag(by_value[order], token, ends, centred)
    by_bias = torch.zeros(size, dtype=by_value.dtype, device=grad.device)
    by_bias.index_add_(0, latent, by_value)
    return by_x, by_encoder, by_bias, by_decoder
