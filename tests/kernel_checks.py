"""Checks of the Triton kernels, run by test_kernels.py in processes of their own.

Usage: python -m tests.kernel_checks CHECK DEVICE. TRITON_INTERPRET has to be set, or not, before
Triton is imported; so these checks cannot run inside the process of the tests.
"""

import sys

import torch

from src import device, kernels, ops, sparse
from src.model import build

INF = float("inf")
# All bits set: a NaN with a minus sign.
NEGATIVE_NAN = torch.tensor(-1, dtype=torch.int32).view(torch.float32)


def rows_with_hard_cases(n, f, k, device):
    """Random rows; the first five, where there are so many, hold ties, infinities and extremes."""
    values = torch.randn(n, f, device=device)
    # Ties. The + 0.0 turns -0 into 0, because the kernel puts -0 below 0.
    values[: n // 2] = values[: n // 2].round() + 0.0
    values[1:2] = -values[1:2].abs()
    values[2:3, : f // 2] = -INF
    # More equal values than the list of candidates has room for.
    values[3:4, : f - k // 2] = 0.5
    values[4:5] *= torch.logspace(-30, 30, f, device=device)
    values[4:5, 7:8] = INF
    values[4:5, 8:9] = -INF
    return values


def check_nan_rows(values, k):
    """A NaN is ordered by its sign: below all numbers with a minus, above them without."""
    f = values.shape[1]
    rows = values[:2].clone()
    rows[:, 5:] = NEGATIVE_NAN
    rows[1:] = -rows[1:]
    chosen = [set(row) for row in kernels.topk_indices(rows, k).tolist()]
    for row in chosen:
        assert len(row) == k and row <= set(range(f))
    if chosen and k >= 5:
        assert set(range(5)) <= chosen[0]


def topk(device):
    shapes = (
        (5, 1030, 16),
        (3, 1024, 64),
        (5, 4100, 100),
        (9, 2048, 64),
        (2, 2048, 1),
        (5, 700, 512),
        (4, 64, 64),
        (1, 1, 1),
        (0, 1024, 2),
    )
    for n, f, k in shapes:
        values = rows_with_hard_cases(n, f, k, device)
        indices = kernels.topk_indices(values, k)
        assert indices.shape == (n, k)
        transposed = values.T.contiguous().T
        assert torch.equal(kernels.topk_indices(transposed, k), indices)
        exact = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(indices.sort(1).values, exact.sort(1).values), (n, f, k)
        check_nan_rows(values, k)


def bags(device):
    cases = (
        (6, 40, 30, 100, torch.bfloat16),
        (3, 7, 5, 64, torch.float32),
        (4, 0, 5, 64, torch.float32),
        (0, 0, 5, 64, torch.float32),
    )
    for n, e, f, d, dtype in cases:
        # The table is a part of a wider one: its rows are not contiguous.
        table = torch.randn(f, d + 8, device=device).to(dtype)[:, :d]
        values = torch.randn(e, device=device)
        latent = torch.randint(f, (e,), device=device)
        grad = torch.randn(n, d, device=device)
        # Some bags are empty.
        bag = torch.randint(n, (e,), device=device).sort().values if e else latent
        bounds = sparse.bag_bounds(bag, n)
        rows = table[latent].float()
        sums = torch.zeros(n, d, device=device).index_add_(0, bag, values[:, None] * rows)
        result = kernels.weighted_embedding_bag(values, latent, bounds, table)
        assert torch.allclose(result, sums, atol=1e-5)
        dots = (grad[bag] * rows).sum(1)
        assert torch.allclose(kernels.bag_dots(grad, latent, bounds, table), dots, atol=1e-4)
        ones = torch.ones(1, 1, device=device).expand(f, d)
        check_expanded_table(values, latent, bounds, grad, bag, ones)


def check_expanded_table(values, latent, bounds, grad, bag, ones):
    """A table that repeats one number: its strides are 0."""
    expanded = kernels.weighted_embedding_bag(values, latent, bounds, ones)
    contiguous = kernels.weighted_embedding_bag(values, latent, bounds, ones.contiguous())
    assert torch.allclose(expanded, contiguous)
    dots = kernels.bag_dots(grad, latent, bounds, ones)
    assert torch.allclose(dots, grad.sum(1)[bag], atol=1e-4)


def sign_step(device):
    for stop in (torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)):
        y, z, grad = (torch.randn(3, 1700, device=device) for _ in range(3))
        grad[0] = 0
        new_y, new_z = y.clone(), z.clone()
        kernels.sign_step(new_y, new_z, grad, 0.25, 0.3, 0.7, stop)
        y_twin, z_twin = y.cpu().clone(), z.cpu().clone()
        ops.sign_step_(y_twin, z_twin, grad.cpu(), 0.25, 0.3, 0.7, stop.cpu())
        assert torch.allclose(new_y.cpu(), y_twin, atol=1e-6)
        assert torch.allclose(new_z.cpu(), z_twin, atol=1e-6)
        assert torch.equal(new_y, y) == bool(stop)


def compare(device):
    for n, v in ((5, 9000), (3, 4096), (0, 10)):
        logits = torch.randn(n, v, device=device) * 5
        others = logits + torch.randn_like(logits) * 0.1
        targets = torch.randint(v, (n,), device=device)
        kl, loss = kernels.compare(logits, others, targets)
        log_p, log_q = (x.double().log_softmax(-1) for x in (logits, others))
        exact = (log_p.exp() * (log_p - log_q)).sum(-1).float()
        assert torch.allclose(kl, exact, rtol=1e-5, atol=1e-6)
        exact = -log_q.gather(1, targets[:, None])[:, 0].float()
        assert torch.allclose(loss, exact, atol=1e-5)
        # No rounding error may be left where both are the same.
        assert not kernels.compare(logits, logits, targets)[0].any()


def standardise(device):
    for dtype in (torch.bfloat16, torch.float32):
        h = (torch.randn(7, 200, device=device) * 9 + 3).to(dtype)
        out = torch.zeros(7, 3, 100, device=device)
        kernels.standardise(h[:, :100], 1e-5, out[:, 1])
        assert torch.allclose(out[:, 1], ops.pre_process(h[:, :100], 1e-5)[0], atol=1e-5)
        assert not out[:, ::2].any()


SEVERAL_SITES = {"start_layer": 4, "end_layer": 6}
ONE_SITE = {"layer": 4}
SATURATED = {"l1_saturation": 0.05}
ADVANTAGE = {"router_objective": "advantage", "router_balance": "switch"}
# (model, forms of its code, constructor options)
STEPS = (
    ("TopK", ("rows", "sums", "products"), ONE_SITE),
    ("BatchTopK", ("rows",), ONE_SITE),
    ("Matryoshka", ("rows",), ONE_SITE),
    ("RandomK", ("rows",), ONE_SITE),
    ("MLSAE", ("rows",), SEVERAL_SITES),
    ("MLSAE", ("rows", "products"), SEVERAL_SITES | {"site_bias": True}),
    ("RouteSAE", ("rows", "sums"), SEVERAL_SITES),
    ("RouteSAE", ("rows",), SEVERAL_SITES | ADVANTAGE),
    ("Vanilla", ("",), ONE_SITE | SATURATED),
    ("Gated", ("",), ONE_SITE | SATURATED),
    ("JumpReLU", ("",), ONE_SITE),
    ("Crosscoder", ("",), SEVERAL_SITES | SATURATED),
)


def compile_or_fail(**options):
    """Let torch.compile raise where it cannot compile a whole function."""
    original = torch.compile

    def strict(function):
        fast = original(function, fullgraph=True, **options)

        def run(*arguments):
            torch._dynamo.config.suppress_errors = False
            return fast(*arguments)

        return run

    torch.compile = strict


def joined(on):
    """Each function that is compiled on CUDA gives the values and gradients of its plain form."""
    calls = []
    # On a CPU the traced operations run one by one: no C++ compiler is asked for.
    compile_or_fail(backend="aot_eager" if on == "cpu" else "inductor")
    device.joins_passes = lambda x: calls.append(x) is None and x.dtype is torch.float32
    x, threshold = torch.randn(70, 130, device=on), torch.rand(130, device=on)
    cases = (
        (ops.jump, (x, threshold, 0.3)),
        (ops.count_above, (x, threshold, 0.3)),
        (ops.gated_magnitudes, (x, -threshold, threshold - 0.5, threshold)),
        (ops.shifted_relu, (x, -threshold)),
        (ops.saturated_sum, (x.relu(), 1 + threshold, 0.6)),
    )
    for function, arguments in cases:
        results = []
        for dtype in (torch.float32, torch.float64):  # compiled, and as it is written
            inputs = [a.to(dtype) if torch.is_tensor(a) else a for a in arguments]
            leaves = [a.requires_grad_() for a in inputs if torch.is_tensor(a)]
            y = function(*inputs)
            weights = torch.linspace(-1, 2, y.numel(), device=on, dtype=dtype).view(y.shape)
            grads = torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)
            results.append([y, *grads])
        for got, exact in zip(*results, strict=True):
            assert (got is None) == (exact is None)
            if exact is not None:
                assert got.dtype is torch.float32
                assert relative_error(got, exact) < 1e-5, function.__name__
    assert len(calls) == 2 * len(cases)


def use_cuda_paths(bf16):
    """Let float32 SAEs on a CPU take the paths of CUDA: kernels and, if asked, bfloat16 factors."""
    compile_or_fail(backend="aot_eager")
    device.joins_passes = lambda x: x.dtype is torch.float32
    product = device.matmul

    def product_with_bf16(a, b):
        return a.float() @ b.float() if a.dtype is torch.bfloat16 else product(a, b)

    device.kernels = lambda x: None if x.dtype is torch.float64 else kernels
    device.uses_bf16_matmul = lambda x: bf16 and device._bf16_allowed and x.dtype is torch.float32
    device.fast_bfloat16 = lambda: False
    device.matmul = product_with_bf16


def twins(name, options):
    """(a float32 SAE, the same in float64)"""
    sae, exact = (build(name, 32, 16, {"latent_size": 1030, "k": 32, **options}) for _ in range(2))
    # Without biases a code scales with its input, and the error does not depend on the router's p.
    with torch.no_grad():
        for label, p in sae.named_parameters():
            if "bias" in label:
                p.normal_(0, 0.5)
    exact.load_state_dict(sae.state_dict())
    return sae, exact.double()


def backward(sae, hidden, with_auxk):
    """Names of the loss terms; the gradients are left in the SAE."""
    if with_auxk:
        # The first 40 latents are dead.
        sae.tokens_since_fired[:40] = 1e6
        sae.auxk.dead_threshold.fill_(1e5)
    dtype = next(sae.parameters()).dtype
    hidden = {site: h.to(dtype) for site, h in hidden.items()}
    with device.bf16_matmuls():
        terms = sae.loss(sae.autoencode(sae.gather(hidden).to(dtype)))
        sum(terms.values()).backward()
    return set(terms)


def relative_error(grad, exact):
    return float((grad - exact).detach().norm() / exact.detach().norm().clamp_min(1e-12))


def steps(bf16):
    use_cuda_paths(bf16)
    hidden = {site: torch.randn(12, 32) + site * torch.randn(32) / 8 for site in range(1, 17)}
    for name, forms, options in STEPS:
        for form in forms:
            sparse.decode_form = lambda ratio, x, form=form: form
            sae, exact = twins(name, options)
            with_auxk = name in ("TopK", "MLSAE")
            for one in (sae, exact):
                assert ("AuxK" in backward(one, hidden, with_auxk)) == with_auxk
            for (label, p), q in zip(sae.named_parameters(), exact.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                bound = 0.2 if bf16 else 1e-5
                if bf16 and label == "threshold":
                    # The few values near a threshold enter and leave its window.
                    bound = 0.5
                if q.grad is not None:
                    error = relative_error(p.grad, q.grad)
                    assert error < bound, (name, form, label, error)
    check_float64_sae()


def check_float64_sae():
    """A float64 SAE takes float32 states without losing precision."""
    sae = build("TopK", 32, 16, {"latent_size": 64, "k": 4, "layer": 4}).double()
    x = torch.randn(5, 32)
    sparse.decode_form = lambda ratio, x: "products"
    with device.bf16_matmuls():
        out, exact = sae.autoencode(x), sae.autoencode(x.double())
    assert torch.allclose(out.x_hat, exact.x_hat, rtol=1e-12)


if __name__ == "__main__":
    torch.manual_seed(0)
    check, argument = sys.argv[1:]
    if check == "steps":
        steps(bf16=argument == "bf16")
    else:
        {
            "topk": topk,
            "bags": bags,
            "sign_step": sign_step,
            "compare": compare,
            "standardise": standardise,
            "joined": joined,
        }[check](argument)
