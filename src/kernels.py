"""Triton kernels for CUDA, each with a plain twin in ops.py that says what it computes. Imported where a tensor is on CUDA, by ops.py alone.

N rows, D hidden, F latents. TRITON_INTERPRET=1 runs them on a CPU, which is how the tests compare them with their twins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 32768  # latents of a row that one program holds in registers


@triton.jit
def _largest(values, out, width, stride, k: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(values + row * stride + at, mask=at < width, other=-float("inf"))
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
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
    surplus = reached - k  # as many of the equal smallest are left out, the last ones
    equal = (key == threshold) & (at < width)
    kept = (key >= threshold) & (at < width)
    if surplus > 0:
        equals = tl.cumsum(equal.to(tl.int32), 0)
        kept = kept & ((key > threshold) | (equals <= tl.sum(equal.to(tl.int32)) - surplus))
    slot = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(out + row * k + slot, at.to(tl.int64), mask=kept)


def largest(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, in rising order; of equal values the first. float32 [N,F] -> int64 [N,k]"""
    out = torch.empty(len(values), k, dtype=torch.long, device=values.device)
    block = triton.next_power_of_2(values.shape[1])
    if len(values):
        _largest[(len(values),)](values, out, values.shape[1], values.stride(0), k, block, num_warps=min(16, max(1, block // 512)))
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
