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
for n, f, k in ((5, 300, 16), (3, 1024, 64), (4, 64, 64), (2, 2048, 1), (1, 1, 1), (0, 64, 2)):
    values = torch.randn(n, f, device=DEVICE)
    values[: n // 2] = values[: n // 2].round()  # ties
    values[1:2] = -values[1:2].abs()
    found = kernels.largest(values, k)
    assert found.shape == (n, k) and (found.diff(dim=1) > 0).all()
    assert torch.equal(values.gather(1, found).sort(1).values, values.topk(k).values.sort(1).values), (n, f, k)
for dtype in (torch.bfloat16, torch.float32):
    h, out = (torch.randn(7, 200, device=DEVICE) * 9 + 3).to(dtype), torch.zeros(7, 3, 100, device=DEVICE)
    kernels.standardise(h[:, :100], 1e-5, out[:, 1])
    assert torch.allclose(out[:, 1], ops.pre_process(h[:, :100], 1e-5)[0], atol=1e-5) and not out[:, ::2].any()
"""


def run(device, **environment):
    code = INTERPRETED.replace("DEVICE", repr(device))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_equal_their_twins_in_the_interpreter():
    run("cpu", TRITON_INTERPRET="1")


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
@pytest.mark.parametrize("least", [0, torch.inf], ids=["sums of rows", "dense products"])
def test_narrow_factors_change_a_step_by_their_rounding(least, monkeypatch):
    monkeypatch.setitem(model.SPARSE_FROM, "cuda", least)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    options = {"latent_size": 1024, "k": 16, "layer": 4}
    sae, exact = (model.build("TopK", 256, 16, options).cuda().to(dtype) for dtype in (torch.float, torch.double))
    exact.load_state_dict(sae.state_dict())
    x = torch.randn(512, 256, device="cuda")
    for one in (sae, exact):
        with ops.narrow_factors():
            sum(one.loss(one.autoencode(x.to(one.pre_bias.dtype))).values()).backward()
    for a, b in zip(sae.parameters(), exact.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 0.15 * b.grad.norm()  # a few tokens choose another latent
