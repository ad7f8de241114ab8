"""The floors of the benchmark agree with counts made by hand."""

import pytest

from benchmarks.floors import (
    H200_REACHED,
    LLAMA_1B,
    Shape,
    Work,
    blocks,
    head,
    measured,
    sae,
    seconds,
    step_floor,
)


def total(saes, **numbers):
    """Microseconds a token of SAEs trained on 12 blocks of Llama-3.2-1B."""
    return step_floor(saes, blocks(LLAMA_1B, 12), H200_REACHED, **numbers)["total"] * 1e6


def sae_work(model, sites=1, k=64, latents=16384, **options):
    return sae(model, 2048, latents, k, sites, 32768, **options)


def test_a_block_and_the_head_of_llama_1b():
    assert blocks(LLAMA_1B, 1).flops == pytest.approx(2 * 60.8e6 + 2.1e6, rel=1e-3)
    below = blocks(LLAMA_1B, 12)
    products = seconds(Work(below.flops), H200_REACHED, "bf16") * 1e6
    assert products == pytest.approx(1.880, rel=1e-3)
    assert seconds(below, H200_REACHED, "bf16") * 1e6 == pytest.approx(2.16, rel=5e-3)
    assert head(LLAMA_1B).flops == pytest.approx(0.525e9, rel=1e-3)
    whole = blocks(LLAMA_1B, 16).flops + head(LLAMA_1B).flops
    assert whole / H200_REACHED.bf16 * 1e6 == pytest.approx(3.171, rel=1e-3)


def test_floors_of_the_models_agree_with_the_counted_table():
    for microseconds, floor in (
        (2.53, total([sae_work("TopK", sparse=True)])),
        (2.65, total([sae_work("TopK", sparse=False)])),
        (2.54, total([sae_work("RouteSAE", 9, sparse=True)])),
        (3.13, total([sae_work("TopK", sparse=False, width=4)], sae_number="tf32")),
        (2.65, total([sae_work("Vanilla")])),
        (2.84, total([sae_work("Gated", frozen_decoder=True)])),
        (5.36, total([sae_work("MLSAE", 9, sparse=True)])),
        (6.24, total([sae_work("Crosscoder", 9)])),
    ):
        assert floor == pytest.approx(microseconds, rel=0.015)
    one_site = ("TopK", "RandomK", "Vanilla", "JumpReLU", "Gated")
    every = [sae_work(name, sparse=True) for name in one_site]
    every += [sae_work(name, 9, sparse=True) for name in ("RouteSAE", "MLSAE", "Crosscoder")]
    assert total(every) == pytest.approx(12.0, rel=0.02)


def test_dense_and_sparse_cross_where_the_hand_count_says():
    for latents, *microseconds in ((4096, 2.44, 2.29), (131072, 3.33, 6.05)):
        for sparse, expected in zip((True, False), microseconds, strict=True):
            work = sae_work("TopK", latents=latents, sparse=sparse)
            assert total([work]) == pytest.approx(expected, rel=0.03)


def test_a_small_step_counted_by_hand():
    tiny = Shape(
        hidden=4, blocks=2, heads=2, kv_heads=1, head=2, ffn=8, vocabulary=10, length=6, step=12
    )
    # weights: q 16 + k 8 + v 8 + o 16 + mlp 96 = 144; attention: 2 x 6 x 4
    # numbers read and written: 24 + 40 + 2 x 6
    assert blocks(tiny, 2, width=2) == Work(2 * (288 + 48), 2 * 2 * 76)
    counted = sae("TopK", 4, 10, 3, step=12, sparse=True, width=4)
    assert counted["encode"] == Work(80, 0)
    assert counted["top-k"] == Work(0, 104)
    assert counted["decode"] == Work(0, 48)
    assert counted["backward"] == Work(0, 144)
    assert counted["optimiser"].bytes == pytest.approx((80 * 30 + 12 * 40) / 12)


def test_the_rates_of_this_machine_are_measured():
    machine = measured("cpu", repeats=1, side=256)
    assert machine.fp32 > 1e9 and machine.bf16 > 1e8 and machine.bandwidth > 1e8
