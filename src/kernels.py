"""Triton kernels for CUDA, each with a plain twin in ops.py that says what it computes. Imported where a tensor is on CUDA, by ops.kernels.

N rows, D hidden, F latents, E entries of a code. TRITON_INTERPRET=1 runs them on a CPU, which is how the tests compare them with their twins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 32768  # latents of a row that one program holds in registers
RANKED = 256  # candidates that are compared each with each


@triton.jit
def _places(mask):
    """Place of every True of a [R,C] among them, in the order of memory."""
    ones = mask.to(tl.int32)
    of_row = tl.sum(ones, 1)
    return (tl.cumsum(of_row, 0) - of_row)[:, None] + tl.cumsum(ones, 1) - 1


@triton.jit
def _keys(value):
    """Integers in the order of the floats."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _largest(values, out, waiting, width, stride, k: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, ROOM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values += row * stride
    at = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    there = at < width
    key = _keys(tl.load(values + at, mask=there, other=-float("inf")))
    few = False
    if ROOM:  # at least k values reach the k-th largest of the lanes' maxima, and seldom many more: a bound by a histogram of the maxima
        best = tl.max(key, 0)
        low = tl.min(best, 0).to(tl.int64)
        span = tl.maximum(tl.max(best, 0).to(tl.int64) - low, 1)
        bin = ((best.to(tl.int64) - low).to(tl.float32) * (255 / span.to(tl.float32))).to(tl.int32)
        from_above = tl.cumsum(tl.histogram(bin, 256), 0, reverse=True)
        lowest = tl.sum((from_above >= k).to(tl.int32)) - 1
        bound = tl.min(tl.where(bin >= lowest, best, 2147483647))
        candidate = (key >= bound) & there
        count = tl.sum(candidate.to(tl.int32))
        few = count <= ROOM
        if few:
            waiting += row * ROOM
            tl.store(waiting + _places(candidate), at, mask=candidate)
            tl.debug_barrier()
            slot = tl.arange(0, ROOM)
            index = tl.load(waiting + slot, mask=slot < count, other=2147483647)
            one = _keys(tl.load(values + index, mask=slot < count, other=-float("inf")))
            before = (one[None, :] > one[:, None]) | ((one[None, :] == one[:, None]) & (index[None, :] < index[:, None]))
            place = tl.sum(before.to(tl.int32), 1)
            tl.store(out + row * k + place, index.to(tl.int64), mask=(slot < count) & (place < k))
    if not few:
        # the largest threshold that at least k keys reach, bit by bit from the sign down, ended early where exactly k reach it
        reached = tl.sum((key >= 0).to(tl.int32))
        threshold = tl.where(reached >= k, 0, -2147483648)
        reached = tl.where(reached >= k, reached, width)
        bit = 30
        while (bit >= 0) & (reached != k):
            higher = threshold + (1 << bit)
            count = tl.sum((key >= higher).to(tl.int32))
            threshold = tl.where(count >= k, higher, threshold)
            reached = tl.where(count >= k, count, reached)
            bit -= 1
        equal = (key == threshold) & there
        wanted = tl.sum(equal.to(tl.int32)) - (reached - k)  # of the equal smallest the first ones
        kept = ((key > threshold) & there) | (equal & (_places(equal) < wanted))
        tl.store(out + row * k + _places(kept), at.to(tl.int64), mask=kept)


def largest(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, in no order; of equal values the first. float32 [N,F] -> int64 [N,k]"""
    width = values.shape[1]
    out = torch.empty(len(values), k, dtype=torch.long, device=values.device)
    block, lanes, room = triton.next_power_of_2(width), max(512, triton.next_power_of_2(8 * k)), max(64, triton.next_power_of_2(2 * k))
    if room > RANKED or 2 * lanes > width:
        room = 0
    lanes = min(lanes, block)
    waiting = torch.empty(len(values), room, dtype=torch.int32, device=values.device)
    if len(values):
        warps = min(16, max(1, block // 512))
        _largest[(len(values),)](values, out, waiting, width, values.stride(0), k, block // lanes, lanes, room, num_warps=warps)
    return out


@triton.jit
def _standardise(states, out, width, stride, out_stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    h = tl.load(states + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
    centred = tl.where(at < width, h - tl.sum(h) / width, 0.0)
    std = tl.sqrt(tl.sum(centred * centred) / (width - 1))
    tl.store(out + row * out_stride + at, centred / (std + eps), mask=at < width)


def standardise(states: Tensor, eps: float, out: Tensor) -> None:
    """out [N,D] = (h - mean) / (std + eps) of every row of states [N,D], of any float type; rows of both may lie apart."""
    if len(states):
        block = triton.next_power_of_2(states.shape[1])
        warps = min(16, max(1, block // 256))
        _standardise[(len(states),)](states, out, states.shape[1], states.stride(0), out.stride(0), eps, block, num_warps=warps)


@triton.jit
def _row_sums(values, latent, bounds, table, out, width, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    first, end = tl.load(bounds + bag), tl.load(bounds + bag + 1)
    at, some = tl.arange(0, BLOCK), tl.arange(0, AT_ONCE)
    total = tl.zeros((BLOCK,), tl.float32)
    for entry in range(first, end, AT_ONCE):
        there = entry + some < end
        value = tl.load(values + entry + some, mask=there, other=0.0)
        row = tl.load(latent + entry + some, mask=there, other=0)
        part = tl.load(table + row[:, None] * width + at[None, :], mask=there[:, None] & (at < width)[None, :], other=0.0)
        total += tl.sum(value[:, None] * part.to(tl.float32), 0)
    tl.store(out + bag * width + at, total, mask=at < width)


def row_sums(values: Tensor, latent: Tensor, bounds: Tensor, table: Tensor) -> Tensor:
    """values[e] table[latent[e]] summed over the entries e of each bag, bounds[n] ... bounds[n+1]-1. [E], [E], [N+1], [F,D] -> float32 [N,D]"""
    out = torch.empty(len(bounds) - 1, table.shape[1], device=table.device)
    if len(out):
        block = triton.next_power_of_2(table.shape[1])
        warps = min(8, max(1, block // 512))
        _row_sums[(len(bounds) - 1,)](values, latent, bounds, table, out, table.shape[1], 4, block, num_warps=warps)
    return out


@triton.jit
def _row_dots(grad, latent, bounds, table, out, width, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    first, end = tl.load(bounds + bag), tl.load(bounds + bag + 1)
    at, some = tl.arange(0, BLOCK), tl.arange(0, AT_ONCE)
    mine = tl.load(grad + bag * width + at, mask=at < width, other=0.0).to(tl.float32)
    for entry in range(first, end, AT_ONCE):
        there = entry + some < end
        row = tl.load(latent + entry + some, mask=there, other=0)
        part = tl.load(table + row[:, None] * width + at[None, :], mask=there[:, None] & (at < width)[None, :], other=0.0)
        tl.store(out + entry + some, tl.sum(mine[None, :] * part.to(tl.float32), 1), mask=there)


def row_dots(grad: Tensor, latent: Tensor, bounds: Tensor, table: Tensor) -> Tensor:
    """<grad[n], table[latent[e]]> of every entry e of bag n. [N,D], [E], [N+1], [F,D] -> float32 [E]"""
    out = torch.empty(len(latent), device=table.device)
    if len(latent):
        block = triton.next_power_of_2(table.shape[1])
        warps = min(8, max(1, block // 512))
        _row_dots[(len(bounds) - 1,)](grad.contiguous(), latent, bounds, table, out, table.shape[1], 4, block, num_warps=warps)
    return out


@triton.jit
def _compare(logits, others, targets, divergence, loss, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    most, other_most = -float("inf"), -float("inf")
    total, other_total, apart = 0.0, 0.0, 0.0  # sums of exponentials below the largest so far; apart: those of logits times the difference
    for start in range(0, width, BLOCK):
        there = start + at < width
        a = tl.load(logits + row * width + start + at, mask=there, other=-float("inf")).to(tl.float32)
        b = tl.load(others + row * width + start + at, mask=there, other=-float("inf")).to(tl.float32)
        new, other_new = tl.maximum(most, tl.max(a)), tl.maximum(other_most, tl.max(b))
        shrink, weight = tl.exp(most - new), tl.exp(a - new)
        total = total * shrink + tl.sum(weight)
        apart = apart * shrink + tl.sum(tl.where(there, weight * (a - b), 0.0))
        other_total = other_total * tl.exp(other_most - other_new) + tl.sum(tl.exp(b - other_new))
        most, other_most = new, other_new
    normaliser, other_normaliser = most + tl.log(total), other_most + tl.log(other_total)
    tl.store(divergence + row, apart / total - normaliser + other_normaliser)
    tl.store(loss + row, other_normaliser - tl.load(others + row * width + tl.load(targets + row)).to(tl.float32))


def compare(logits: Tensor, others: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(softmax of logits || softmax of others), cross-entropy of the others) of each row, in nats. [N,V], [N,V], int64 [N] -> float32 [N], [N]"""
    divergence, loss = (torch.empty(len(logits), device=logits.device) for _ in range(2))
    if len(logits):
        _compare[(len(logits),)](logits.contiguous(), others.contiguous(), targets, divergence, loss, logits.shape[1], 4096, num_warps=8)
    return divergence, loss
