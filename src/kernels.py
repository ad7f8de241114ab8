"""Triton kernels for CUDA, each with a plain twin in ops.py or metrics.py that says what it computes. ops.kernels imports them.

N rows, D hidden, F latents, E entries of a code. TRITON_INTERPRET=1 runs them on a CPU, which is how the tests compare them with their twins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

RANKED = 128  # largest of a row at most, for whose sake candidates are compared each with each


def _beside(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launches on the device of its first tensor; Triton takes the thread's current one."""

    @functools.wraps(launch)
    def run(first: Tensor, *more: Any) -> Any:
        with torch.cuda.device_of(first):
            return launch(first, *more)

    return run


def _rows(x: Tensor) -> Tensor:
    """With neighbours in a row next to each other in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _keys(values, at, width):
    """Integers in the order of the floats there, the least one outside."""
    bits = tl.load(values + at, mask=at < width, other=0.0).to(tl.int32, bitcast=True)
    return tl.where(at < width, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -2147483648)


@triton.jit
def _places(mask):
    """Place of every True of a [R,C] among them, in the order of memory."""
    ones = mask.to(tl.int32)
    of_row = tl.sum(ones, 1)
    return (tl.cumsum(of_row, 0) - of_row)[:, None] + tl.cumsum(ones, 1) - 1


@triton.jit
def _largest(
    values,
    out,
    waiting,
    taken,
    width,
    stride,
    k: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    ROOM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values += row * stride
    out += row * k
    tile = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    few = False
    if ROOM:
        best = tl.full((LANES,), -2147483648, tl.int32)
        for start in range(0, width, ROWS * LANES):
            best = tl.maximum(best, tl.max(_keys(values, start + tile, width), 0))
        # at least k values reach the k-th largest of the lanes' maxima, and seldom many more. Histograms of the maxima find it, each of what
        # lies in one bin of the one before, until few more than k are above
        low, high, reached = tl.min(best, 0), tl.max(best, 0), LANES
        while (reached > k + k // 4) & (low < high):
            scale = 255 / (high.to(tl.int64) - low.to(tl.int64)).to(tl.float32)
            place = (tl.minimum(tl.maximum(best, low), high).to(tl.int64) - low.to(tl.int64)).to(
                tl.float32
            )
            bin = (place * scale).to(tl.int32)
            from_above = tl.cumsum(tl.histogram(bin, 256), 0, reverse=True)
            lowest = tl.sum((from_above >= k).to(tl.int32)) - 1
            high = tl.max(tl.where((bin <= lowest) & (best <= high), best, -2147483648), 0)
            low = tl.min(tl.where((bin >= lowest) & (best >= low), best, 2147483647), 0)
            reached = tl.sum((best >= low).to(tl.int32))
        waiting += row * ROOM
        counts = tl.zeros((LANES,), tl.int32)
        for start in range(0, width, ROWS * LANES):
            at = start + tile
            candidate = (_keys(values, at, width) >= low) & (at < width)
            slot = tl.atomic_add(
                taken + row + tl.zeros_like(at), 1, mask=candidate, sem="relaxed", scope="cta"
            )
            tl.store(waiting + slot, at, mask=candidate & (slot < ROOM))
            counts += tl.sum(candidate.to(tl.int32), 0)
        count = tl.sum(counts)
        tl.debug_barrier()
        few = count <= ROOM
        if few:  # they came in any order; their places follow from comparing each with each
            slot, some = tl.arange(0, ROOM), tl.arange(0, 32)
            index = tl.load(waiting + slot, mask=slot < count, other=2147483647)
            key, place = (
                _keys(values, index, width),
                tl.zeros((ROOM,), tl.int32),
            )  # no such index: below all
            for start in range(0, count, 32):
                other = tl.load(waiting + start + some, mask=start + some < count, other=2147483647)
                other_key = _keys(values, other, width)
                before = (other_key[None, :] > key[:, None]) | (
                    (other_key[None, :] == key[:, None]) & (other[None, :] < index[:, None])
                )
                place += tl.sum(before.to(tl.int32), 1)
            tl.store(out + place, index.to(tl.int64), mask=(slot < count) & (place < k))
    if not few:
        # the largest threshold that at least k keys reach, bit by bit from the sign down, until exactly k do; of those equal to it the first ones
        threshold, reached, bit = -2147483648, width, 31
        while (bit >= 0) & (reached != k):
            higher = tl.where(bit == 31, 0, threshold + (1 << bit))
            counts = tl.zeros((LANES,), tl.int32)
            for start in range(0, width, ROWS * LANES):
                counts += tl.sum(
                    ((_keys(values, start + tile, width) >= higher) & (start + tile < width)).to(
                        tl.int32
                    ),
                    0,
                )
            count = tl.sum(counts)
            threshold = tl.where(count >= k, higher, threshold)
            reached = tl.where(count >= k, count, reached)
            bit -= 1
        counts = tl.zeros((LANES,), tl.int32)
        for start in range(0, width, ROWS * LANES):
            counts += tl.sum((_keys(values, start + tile, width) > threshold).to(tl.int32), 0)
        above, written, equals = tl.sum(counts), 0, 0
        for start in range(0, width, ROWS * LANES):
            at = start + tile
            key = _keys(values, at, width)
            equal = (key == threshold) & (at < width)
            kept = (key > threshold) | (equal & (equals + _places(equal) < k - above))
            tl.store(out + written + _places(kept), at.to(tl.int64), mask=kept)
            written += tl.sum(kept.to(tl.int32))
            equals += tl.sum(equal.to(tl.int32))


@_beside
def topk_indices(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, in no order; of equal values (-0 is below 0) the first. float32 [N,F] -> int64 [N,k]"""
    values, (n, width) = _rows(values), values.shape
    lanes = max(512, triton.next_power_of_2(8 * k))
    room = max(64, triton.next_power_of_2(2 * k)) if k <= RANKED and 2 * lanes <= width else 0
    lanes = lanes if room else 512
    out = torch.empty(n, k, dtype=torch.long, device=values.device)
    waiting = torch.empty(n, room, dtype=torch.int32, device=values.device)
    taken = torch.zeros(n, dtype=torch.int32, device=values.device)
    if n:
        _largest[(n,)](
            values,
            out,
            waiting,
            taken,
            width,
            values.stride(0),
            k,
            1024 // lanes,
            lanes,
            room,
            num_warps=4,
        )
    return out


@triton.jit
def _standardise(states, out, width, stride, out_stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    h = tl.load(states + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
    centred = tl.where(at < width, h - tl.sum(h) / width, 0.0)
    std = tl.sqrt(tl.sum(centred * centred) / (width - 1))
    tl.store(out + row * out_stride + at, centred / (std + eps), mask=at < width)


@_beside
def standardise(states: Tensor, eps: float, out: Tensor) -> None:
    """out [N,D] = (h - mean) / (std + eps) of every row of states [N,D], of any float type; rows of both may lie apart."""
    if len(states):
        block = triton.next_power_of_2(states.shape[1])
        warps = min(16, max(1, block // 256))
        _standardise[(len(states),)](
            states,
            out,
            states.shape[1],
            states.stride(0),
            out.stride(0),
            eps,
            block,
            num_warps=warps,
        )


@triton.jit
def _row_sums(
    values, latent, bounds, table, out, width, stride, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    bag = tl.program_id(0).to(tl.int64)
    first, end = tl.load(bounds + bag), tl.load(bounds + bag + 1)
    at, some = tl.arange(0, BLOCK), tl.arange(0, AT_ONCE)
    total = tl.zeros((BLOCK,), tl.float32)
    for entry in range(first, end, AT_ONCE):
        there = entry + some < end
        value = tl.load(values + entry + some, mask=there, other=0.0)
        row = tl.load(latent + entry + some, mask=there, other=0)
        part = tl.load(
            table + row[:, None] * stride + at[None, :],
            mask=there[:, None] & (at < width)[None, :],
            other=0.0,
        )
        total += tl.sum(value[:, None] * part.to(tl.float32), 0)
    tl.store(out + bag * width + at, total, mask=at < width)


@_beside
def weighted_embedding_bag(values: Tensor, latent: Tensor, bounds: Tensor, table: Tensor) -> Tensor:
    """values[e] table[latent[e]] summed over the entries e of each bag, bounds[n] ... bounds[n+1]-1. [E], [E], [N+1], [F,D] -> float32 [N,D]"""
    out, table = torch.empty(len(bounds) - 1, table.shape[1], device=table.device), _rows(table)
    if len(out):
        block = triton.next_power_of_2(table.shape[1])
        warps = min(8, max(1, block // 512))
        _row_sums[(len(bounds) - 1,)](
            values,
            latent,
            bounds,
            table,
            out,
            table.shape[1],
            table.stride(0),
            4,
            block,
            num_warps=warps,
        )
    return out


@triton.jit
def _row_dots(
    grad, latent, bounds, table, out, width, stride, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    bag = tl.program_id(0).to(tl.int64)
    first, end = tl.load(bounds + bag), tl.load(bounds + bag + 1)
    at, some = tl.arange(0, BLOCK), tl.arange(0, AT_ONCE)
    mine = tl.load(grad + bag * width + at, mask=at < width, other=0.0).to(tl.float32)
    for entry in range(first, end, AT_ONCE):
        there = entry + some < end
        row = tl.load(latent + entry + some, mask=there, other=0)
        part = tl.load(
            table + row[:, None] * stride + at[None, :],
            mask=there[:, None] & (at < width)[None, :],
            other=0.0,
        )
        tl.store(out + entry + some, tl.sum(mine[None, :] * part.to(tl.float32), 1), mask=there)


@_beside
def bag_dots(grad: Tensor, latent: Tensor, bounds: Tensor, table: Tensor) -> Tensor:
    """<grad[n], table[latent[e]]> of every entry e of bag n. [N,D], [E], [N+1], [F,D] -> float32 [E]"""
    out, table = torch.empty(len(latent), device=table.device), _rows(table)
    if len(latent):
        block = triton.next_power_of_2(table.shape[1])
        warps = min(8, max(1, block // 512))
        _row_dots[(len(bounds) - 1,)](
            grad.contiguous(),
            latent,
            bounds,
            table,
            out,
            table.shape[1],
            table.stride(0),
            4,
            block,
            num_warps=warps,
        )
    return out


@triton.jit
def _sign_step(y, z, grad, stop, share, by, lr, count, BLOCK: tl.constexpr):
    if tl.load(stop) == 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = at < count
        g, before, ahead = (
            tl.load(grad + at, mask=there),
            tl.load(y + at, mask=there),
            tl.load(z + at, mask=there),
        )
        sign = (g > 0).to(tl.float32) - (g < 0).to(tl.float32)
        tl.store(y + at, before + share * (ahead - before) - by * sign, mask=there)
        tl.store(z + at, ahead - lr * sign, mask=there)


@_beside
def sign_step(
    y: Tensor, z: Tensor, grad: Tensor, share: float, by: float, lr: float, stop: Tensor
) -> None:
    """ops.sign_step_ of float32 tensors that lie in one piece, in one pass over memory."""
    _sign_step[(triton.cdiv(y.numel(), 2048),)](
        y, z, grad, stop, share, by, lr, y.numel(), 2048, num_warps=8
    )


@triton.jit
def _compare(logits, others, targets, divergence, loss, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    most, other_most = -float("inf"), -float("inf")
    total, other_total, apart = (
        0.0,
        0.0,
        0.0,
    )  # sums of exponentials below the largest so far; apart: those of logits times the difference
    for start in range(0, width, BLOCK):
        there = start + at < width
        a = tl.load(logits + row * width + start + at, mask=there, other=-float("inf")).to(
            tl.float32
        )
        b = tl.load(others + row * width + start + at, mask=there, other=-float("inf")).to(
            tl.float32
        )
        new, other_new = tl.maximum(most, tl.max(a)), tl.maximum(other_most, tl.max(b))
        shrink, weight = tl.exp(most - new), tl.exp(a - new)
        total = total * shrink + tl.sum(weight)
        apart = apart * shrink + tl.sum(tl.where(there, weight * (a - b), 0.0))
        other_total = other_total * tl.exp(other_most - other_new) + tl.sum(tl.exp(b - other_new))
        most, other_most = new, other_new
    tl.store(
        divergence + row,
        apart / total - (most - other_most) - tl.log(tl.div_rn(total, other_total)),
    )
    tl.store(
        loss + row,
        other_most
        + tl.log(other_total)
        - tl.load(others + row * width + tl.load(targets + row)).to(tl.float32),
    )


@_beside
def compare(logits: Tensor, others: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(softmax of logits || softmax of others), cross-entropy of the others) of each row, in nats. [N,V], [N,V], int64 [N] -> float32 [N], [N]"""
    divergence, loss = (torch.empty(len(logits), device=logits.device) for _ in range(2))
    if len(logits):
        _compare[(len(logits),)](
            logits.contiguous(),
            others.contiguous(),
            targets,
            divergence,
            loss,
            logits.shape[1],
            4096,
            num_warps=8,
        )
    return divergence, loss
