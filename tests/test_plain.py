"""Every model of src against its plain twin: the same loss, the same gradients, the same losses over a training, in float64."""

import pytest
import torch

from src import model
from src.ops import pre_process, project_decoder_grad, unit_norm_decoder
from src.sae import BatchInfo
from src.zoo import ZOO
from tests import plain

D, LATENTS, K, N, SITES = 16, 96, 4, 64, 9
VARIANTS = [(name, recipe, {}) for name in ZOO for recipe in ("standard", "published")]
VARIANTS += [("RouteSAE", "standard", {"routing": routing}) for routing in ("soft", "random")]
VARIANTS += [("TopK", "standard", {"latent_size": 24})]  # too few latents for sums of rows


def built(name, recipe, more, seed=0):
    """(SAE of src in float64, constructor values its twin reads)"""
    torch.manual_seed(seed)
    options = {
        "latent_size": LATENTS,
        "k": K,
        "l1_coeff": 0.01,
        "threshold": 0.3,
        "bandwidth": 0.2,
        "dead_tokens": 100,
    }
    options |= getattr(ZOO[name], recipe) | more
    if name == "RouteSAE":  # its other objectives have formulas of their own in test_routing
        options |= {"router_objective": "published", "router_balance": "none"}
    sae = model.build(name, D, 16, options).double()
    with torch.no_grad():
        for parameter in sae.parameters():  # biases and norms that are not at their initial values
            parameter.add_(0.02 * torch.randn_like(parameter))
    return sae, {
        key: value for key, value in options.items() if key not in ("bandwidth", "dead_tokens")
    } | {"bandwidth": getattr(sae, "bandwidth", None), "dead_tokens": 100}


def batches(sae, count):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(len(sae.sites()), 40, D, generator=generator, dtype=torch.float64)
    for i in range(count):
        code = torch.randn(N, 40, generator=generator, dtype=torch.float64) * (
            torch.rand(N, 40, generator=generator) < 0.15
        )
        x = pre_process(torch.einsum("nc,lcd->nld", code, mix) + 0.1, 1e-5)[0].double()
        yield x if len(sae.sites()) > 1 else x[:, 0], torch.arange(N) + i * N


@pytest.mark.parametrize("name, recipe, more", VARIANTS)
def test_loss_and_gradients_equal_the_plain_path(name, recipe, more):
    sae, options = built(name, recipe, more)
    twin = plain.of(sae, options)
    ((x, token),) = batches(sae, 1)
    for counted in (sae, getattr(sae, "sae", sae)):
        counted.tokens_since_fired[::3] = 200.0  # a third of the latents is dead
        if hasattr(counted, "dead_threshold"):
            counted.dead_threshold.fill_(100.0)
    twin.tokens_since_fired, twin.dead_threshold = (
        getattr(sae, "sae", sae).tokens_since_fired.clone(),
        100.0,
    )
    if hasattr(sae, "sparsity"):
        sae.sparsity.warm.fill_(1.0)
        twin.progress = 1.0
    mine, theirs = sae.loss(sae.autoencode(x, BatchInfo(token_keys=token))), twin.terms(x, token)
    assert mine.keys() == theirs.keys()
    for term in mine:
        assert torch.allclose(mine[term], theirs[term], rtol=1e-12, atol=1e-14), term
    sum(mine.values()).backward()
    sum(theirs.values()).backward()
    for key, parameter in sae.named_parameters():
        wanted = twin.w[key].grad if twin.w[key].grad is not None else torch.zeros_like(parameter)
        found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        assert (found - wanted).abs().max() < 1e-12 * max(1.0, float(wanted.abs().max())), key
    assert any(
        float(parameter.grad.abs().max()) > 0
        for parameter in sae.parameters()
        if parameter.grad is not None
    )


@pytest.mark.parametrize("name", ZOO)
def test_the_losses_of_a_training_equal_the_plain_loop(name):
    sae, options = built(name, "standard", {})
    unit_norm_decoder(sae)
    twin, steps, losses = plain.of(sae, options), 25, []
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    sae.train()
    for step, (x, token) in enumerate(batches(sae, steps)):
        p = sae.autoencode(x, BatchInfo(token_keys=token))
        loss = torch.stack(list(sae.loss(p).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        project_decoder_grad(sae)
        optimizer.step()
        unit_norm_decoder(sae)
        sae.after_step(p, (step + 1) / steps)
        losses.append(loss.item())
    decoders = [
        name
        for name, parameter in sae.named_parameters()
        if any(parameter is decoder.weight for decoder in sae.decoders())
    ]
    wanted = plain.train(twin, list(batches(sae, steps)), decoders=decoders)
    assert losses[-1] != losses[0]
    assert losses == pytest.approx(wanted, rel=1e-9)
