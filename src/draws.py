"""Random draws that depend on a key and a seed alone, so that batching changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

_NON_NEGATIVE = 0x7FFFFFFFFFFFFFFF


def _hash63(x: Tensor) -> Tensor:
    """Hash integers to 63 bits (the shape of splitmix64): the same value on every device."""
    x = _xor_shifted(x, 30) * -4658895280553007687
    x = _xor_shifted(x, 27) * -7723592293110705685
    return _xor_shifted(x, 31) & _NON_NEGATIVE


def _xor_shifted(x: Tensor, bits: int) -> Tensor:
    """Return x ^ (x >> bits) of unsigned integers; int64 would shift in copies of the sign."""
    unsigned = (1 << (64 - bits)) - 1
    return x ^ ((x >> bits) & unsigned)


def random_integers(
    keys: Tensor,
    seed: int,
    high: int | Tensor,
    draw: int | Tensor = 0,
) -> Tensor:
    """Draw one integer in [0, high) for each key: a function of (key, seed, draw) alone.

    keys int64 [...]; `high` and `draw` broadcast against it. Returns int64 [...].
    """
    half = 1 << 62  # Python's integers do not wrap around, those of int64 do
    seed_offset = seed * 0x9E3779B97F4A7C1 % half
    draw_offset = draw * 0x2545F4914F6CDD1D & half - 1
    x = _hash63(keys + 1)
    x = _hash63(x + seed_offset)
    return _hash63(x + draw_offset) % high


def random_subset(keys: Tensor, seed: int, n: int, k: int) -> Tensor:
    """Draw k distinct integers of [0, n) for each key, uniformly. int64 [N] -> [N,k]

    Floyd's sampling: draw i comes from [0, n - k + i], and n - k + i replaces it where an earlier
    draw has already taken that number. An earlier draw j has taken it if it drew the same number,
    or if it was itself replaced and its replacement n - k + j is this number. The second case is
    a chain of pointers to earlier draws; doubling the pointers resolves all chains at once.
    """
    index = torch.arange(k, device=keys.device)
    replacement = index + (n - k)
    drawn = random_integers(keys[:, None], seed, replacement + 1, index)
    ordered, order = drawn.sort(dim=1, stable=True)
    repeats = ordered[:, 1:] == ordered[:, :-1]
    taken = torch.zeros_like(drawn, dtype=torch.bool)
    taken.scatter_(1, order[:, 1:], repeats)
    pointer = drawn - (n - k)
    is_earlier_draw = (pointer >= 0) & (pointer < index)
    pointer = torch.where(is_earlier_draw, pointer, index)
    for _ in range((k - 1).bit_length()):
        taken = taken | taken.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    return torch.where(taken, replacement, drawn)
