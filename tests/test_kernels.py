"""Triton kernels against their twins in plain PyTorch (kernel_checks.py).

They run in Triton's interpreter on a CPU, where Triton is installed, and on CUDA with `-m gpu`.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from src import device, model, sparse
from src.files import ROOT

CHECKS = ("topk", "bags", "sign_step", "compare", "standardise", "joined")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(check, argument, **environment):
    command = [sys.executable, "-m", "tests.kernel_checks", check, argument]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_equal_their_twins_in_the_interpreter(check):
    run(check, "cpu", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("factors", ["float32", "bf16"])
def test_a_step_with_kernels_is_exact_up_to_the_rounding_of_factors(factors):
    run("steps", factors, TRITON_INTERPRET="1")


def test_without_working_kernels_plain_functions_take_their_place(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "src.kernels", raising=False)
    device._working_kernels.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch takes their place"):
        assert device._working_kernels() is None
    device._working_kernels.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_equal_their_twins_on_cuda(check):
    run(check, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["sums", "rows", "products"])
def test_bfloat16_factors_change_a_step_by_their_rounding(form, monkeypatch):
    monkeypatch.setattr(sparse, "decode_form", lambda ratio, x: form)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    options = {"latent_size": 1024, "k": 16, "layer": 4}
    sae = model.build("TopK", 256, 16, options).cuda()
    exact = model.build("TopK", 256, 16, options).cuda().double()
    exact.load_state_dict(sae.state_dict())
    x = torch.randn(512, 256, device="cuda")
    for one in (sae, exact):
        with device.bf16_matmuls():
            terms = one.loss(one.autoencode(x.to(one.pre_bias.dtype)))
            sum(terms.values()).backward()
    for p, q in zip(sae.parameters(), exact.parameters(), strict=True):
        # A few tokens choose another latent.
        assert (p.grad - q.grad).norm() < 0.15 * q.grad.norm()
