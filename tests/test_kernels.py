"""Triton kernels against their plain twins: in Triton's interpreter on a CPU, where the package is installed, and on CUDA (`-m gpu`)."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from src import model, ops
from src.files import ROOT

INTERPRETED = """
import torch
from src import kernels, ops
torch.manual_seed(0)
for n, f, k in ((5, 1030, 16), (3, 1024, 64), (5, 4100, 100), (9, 2048, 64), (2, 2048, 1), (5, 700, 512), (4, 64, 64), (1, 1, 1), (0, 1024, 2)):
    values = torch.randn(n, f, device=DEVICE)
    values[: n // 2] = values[: n // 2].round() + 0.0  # ties; +0, as the kernel puts -0 below it
    values[1:2] = -values[1:2].abs()
    values[2:3, : f // 2] = -torch.inf
    values[3:4, : f - k // 2] = 0.5  # more equal values than there is room for
    values[4:5] *= torch.logspace(-30, 30, f, device=DEVICE)
    values[4:5, 7:8], values[4:5, 8:9] = torch.inf, -torch.inf
    found = kernels.topk_indices(values, k)
    assert found.shape == (n, k)
    assert torch.equal(kernels.topk_indices(values.T.contiguous().T, k), found)
    broken = values[:2].clone()  # numbers that are none have a sign: below all others with a minus, above them without
    broken[:, 5:] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    broken[1:] = -broken[1:]
    for i, row in enumerate(kernels.topk_indices(broken, k).tolist()):
        assert len(set(row)) == k and set(row) <= set(range(f)) and (i == 1 or k < 5 or set(range(5)) <= set(row))
    assert torch.equal(found.sort(1).values, values.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values), (n, f, k)
for n, e, f, d, dtype in ((6, 40, 30, 100, torch.bfloat16), (3, 7, 5, 64, torch.float32), (4, 0, 5, 64, torch.float32), (0, 0, 5, 64, torch.float32)):
    table, values = torch.randn(f, d + 8, device=DEVICE).to(dtype)[:, :d], torch.randn(e, device=DEVICE)
    latent, grad = torch.randint(f, (e,), device=DEVICE), torch.randn(n, d, device=DEVICE)
    bag = torch.randint(n, (e,), device=DEVICE).sort().values if e else latent  # some are empty
    bounds = ops.SparseCode.bounds(bag, n)
    sums = torch.zeros(n, d, device=DEVICE).index_add_(0, bag, values[:, None] * table[latent].float())
    assert torch.allclose(kernels.weighted_embedding_bag(values, latent, bounds, table), sums, atol=1e-5)
    assert torch.allclose(kernels.bag_dots(grad, latent, bounds, table), (grad[bag] * table[latent].float()).sum(1), atol=1e-4)
    same = torch.ones(1, 1, device=DEVICE).expand(f, d)
    assert torch.allclose(kernels.weighted_embedding_bag(values, latent, bounds, same), kernels.weighted_embedding_bag(values, latent, bounds, same.contiguous()))
    assert torch.allclose(kernels.bag_dots(grad, latent, bounds, same), grad.sum(1)[bag], atol=1e-4)
for stop in (0.0, 1.0):
    y, z, grad, stop = (*(torch.randn(3, 1700, device=DEVICE) for _ in range(3)), torch.tensor(stop, device=DEVICE))
    grad[0] = 0
    mine = y.clone(), z.clone()
    kernels.sign_step(*mine, grad, 0.25, 0.3, 0.7, stop)
    ops.sign_step_(y_twin := y.cpu().clone(), z_twin := z.cpu().clone(), grad.cpu(), 0.25, 0.3, 0.7, stop.cpu())
    assert torch.allclose(mine[0].cpu(), y_twin, atol=1e-6) and torch.allclose(mine[1].cpu(), z_twin, atol=1e-6)
    assert torch.equal(mine[0], y) == bool(stop)
for n, v in ((5, 9000), (3, 4096), (0, 10)):
    logits = torch.randn(n, v, device=DEVICE) * 5
    others, targets = logits + torch.randn_like(logits) * 0.1, torch.randint(v, (n,), device=DEVICE)
    kl, ce = kernels.compare(logits, others, targets)
    log_p, log_q = (x.double().log_softmax(-1) for x in (logits, others))
    assert torch.allclose(kl, (log_p.exp() * (log_p - log_q)).sum(-1).float(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(ce, -log_q.gather(1, targets[:, None])[:, 0].float(), atol=1e-5)
    assert not kernels.compare(logits, logits, targets)[0].any()
for dtype in (torch.bfloat16, torch.float32):
    h, out = (torch.randn(7, 200, device=DEVICE) * 9 + 3).to(dtype), torch.zeros(7, 3, 100, device=DEVICE)
    kernels.standardise(h[:, :100], 1e-5, out[:, 1])
    assert torch.allclose(out[:, 1], ops.pre_process(h[:, :100], 1e-5)[0], atol=1e-5) and not out[:, ::2].any()
"""

# What CUDA does in training, on a CPU: kernels, bfloat16 factors, every form of a code; against float64 without them
STEPS = """
import torch
from src import kernels, ops
from src.model import build
from src.ops import SparseCode
product = ops.product
ops.kernels = lambda x: None if x.dtype is torch.float64 else kernels
ops.uses_bf16_matmul = lambda x: NARROW and ops._bf16_allowed and x.dtype is torch.float32
ops.fast_bfloat16 = lambda: False
ops.product = lambda a, b: a.float() @ b.float() if a.dtype is torch.bfloat16 else product(a, b)
torch.manual_seed(0)
hidden = {site: torch.randn(12, 32) + site * torch.randn(32) / 8 for site in range(1, 17)}
several = {"start_layer": 4, "end_layer": 6}
for name, forms, more in (
    ("TopK", ("rows", "sums", "products"), {"layer": 4}), ("BatchTopK", ("rows",), {"layer": 4}), ("RandomK", ("rows",), {"layer": 4}),
    ("MLSAE", ("rows",), several), ("RouteSAE", ("rows", "sums"), several),
    ("RouteSAE", ("rows",), several | {"router_objective": "advantage", "router_balance": "switch"}),
    ("Vanilla", ("",), {"layer": 4}), ("Gated", ("",), {"layer": 4}), ("JumpReLU", ("",), {"layer": 4}), ("Crosscoder", ("",), several),
):
    for form in forms:
        SparseCode.form = lambda ratio, x: form
        sae, exact = (build(name, 32, 16, {"latent_size": 1030, "k": 32, **more}) for _ in range(2))
        with torch.no_grad():  # without biases a code is as large as its input, and the error knows nothing of the router's p
            for label, p in sae.named_parameters():
                if "bias" in label:
                    p.normal_(0, 0.5)
        exact.load_state_dict(sae.state_dict())
        exact.double()
        for one, where in ((sae, hidden), (exact, {site: h.double() for site, h in hidden.items()})):
            if hasattr(one, "tokens_since_fired") and name in ("TopK", "MLSAE"):
                one.tokens_since_fired[:40], one.dead_threshold = 1e6, torch.tensor(1e5)  # AuxK codes the first forty
            with ops.bf16_matmuls():
                terms = one.loss(one.autoencode(one.gather(where).to(next(one.parameters()).dtype)))
                sum(terms.values()).backward()
        assert ("AuxK" in terms) == (name in ("TopK", "MLSAE"))
        for (label, a), b in zip(sae.named_parameters(), exact.parameters(), strict=True):
            off = float((a.grad - b.grad).norm() / b.grad.norm().clamp_min(1e-12)) if b.grad is not None else 0.0
            bound = (0.5 if label == "threshold" else 0.2) if NARROW else 1e-5  # the few values near a threshold enter and leave its window
            assert (a.grad is None) == (b.grad is None) and off < bound, (name, form, label, off)
sae, x = build("TopK", 32, 16, {"latent_size": 64, "k": 4, "layer": 4}).double(), torch.randn(5, 32)
SparseCode.form = lambda ratio, x: "products"
with ops.bf16_matmuls():  # a float32 state of a float64 SAE
    assert torch.allclose(sae.autoencode(x).x_hat, sae.autoencode(x.double()).x_hat, rtol=1e-12)
"""


def run(device, code=INTERPRETED, **environment):
    code = code.replace("DEVICE", repr(device))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_equal_their_twins_in_the_interpreter():
    run("cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16 factors"])
def test_a_step_with_kernels_is_the_exact_one_but_for_the_rounding_of_factors(narrow):
    run("cpu", STEPS.replace("NARROW", str(narrow)), TRITON_INTERPRET="1")


def test_without_working_kernels_plain_functions_take_their_place(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "src.kernels", raising=False)
    ops._working_kernels.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch takes their place"):
        assert ops._working_kernels() is None
    ops._working_kernels.cache_clear()


@pytest.mark.gpu
def test_kernels_equal_their_twins_on_cuda():
    run("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["sums", "rows", "products"])
def test_narrow_factors_change_a_step_by_their_rounding(form, monkeypatch):
    monkeypatch.setattr(ops.SparseCode, "form", lambda ratio, x: form)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    options = {"latent_size": 1024, "k": 16, "layer": 4}
    sae, exact = (
        model.build("TopK", 256, 16, options).cuda().to(dtype)
        for dtype in (torch.float, torch.double)
    )
    exact.load_state_dict(sae.state_dict())
    x = torch.randn(512, 256, device="cuda")
    for one in (sae, exact):
        with ops.bf16_matmuls():
            sum(one.loss(one.autoencode(x.to(one.pre_bias.dtype))).values()).backward()
    for a, b in zip(sae.parameters(), exact.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 0.15 * b.grad.norm()  # a few tokens choose another latent
