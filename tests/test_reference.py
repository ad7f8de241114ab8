"""Every model of src/model.py against its formulas in src/reference.py, in float64.

The loss, its gradients and the losses of a training must be equal.
"""

import pytest
import torch
from torch import nn

from src import model
from src.ops import pre_process, project_decoder_grad, unit_norm_decoder
from src.reference import reference_of
from src.sae import BatchInfo
from src.zoo import ZOO

D, LATENTS, K, N = 16, 96, 4, 64
FACTORS = 40  # from which the states of all sites are mixed
DEAD_TOKENS = 100
STEPS, LEARNING_RATE = 25, 1e-3
VARIANTS = [(name, recipe, {}) for name in ZOO for recipe in ("standard", "published")]
VARIANTS += [("RouteSAE", "standard", {"routing": routing}) for routing in ("soft", "random")]
VARIANTS += [("TopK", "standard", {"hierarchical_k": [1, 2]})]
VARIANTS += [("Gated", "standard", {"l1_saturation": 0.05})]
VARIANTS += [("Vanilla", "standard", {"l1_saturation": 0.0})]
VARIANTS += [("TopK", "standard", {"latent_size": 24})]  # k / F too large for the sparse kernels


def build_pair(name, recipe, changes):
    """(SAE of src/model.py in float64, its reference with equal weights)"""
    torch.manual_seed(0)
    options = {
        "latent_size": LATENTS,
        "k": K,
        "l1_coeff": 0.01,
        "threshold": 0.3,
        "bandwidth": 0.2,
        "dead_tokens": DEAD_TOKENS,
        "matryoshka_widths": [12, 40],
    }
    options |= getattr(ZOO[name], recipe) | changes
    if name == "RouteSAE":
        # The other objectives have formulas of their own in tests/test_routing.py.
        options |= {"router_objective": "published", "router_balance": "none"}
    sae = model.build(name, D, 16, options).double()
    with torch.no_grad():
        for parameter in sae.parameters():  # else biases would be 0 and norms 1
            parameter.add_(0.02 * torch.randn_like(parameter))
    options["dead_tokens"] = DEAD_TOKENS
    if name == "JumpReLU":
        options["bandwidth"] = sae.bandwidth
    return sae, options


def make_batches(sae, count):
    """Batches of (x, token keys): standardised mixtures of sparse factors."""
    generator = torch.Generator().manual_seed(1)
    n_sites = len(sae.sites())
    mixing = torch.randn(n_sites, FACTORS, D, generator=generator, dtype=torch.float64)
    batches = []
    for i in range(count):
        values = torch.randn(N, FACTORS, generator=generator, dtype=torch.float64)
        factors = values * (torch.rand(N, FACTORS, generator=generator) < 0.15)
        states = torch.einsum("nc,lcd->nld", factors, mixing) + 0.1
        x = pre_process(states, 1e-5)[0].double()
        keys = torch.arange(N) + i * N
        batches.append((x if n_sites > 1 else x[:, 0], keys))
    return batches


def let_a_third_be_dead(sae, reference):
    dictionary = getattr(sae, "sae", sae)  # of a RouteSAE, its TopK
    for counted in (sae, dictionary):
        counted.tokens_since_fired[::3] = 2.0 * DEAD_TOKENS
    dictionary.auxk.dead_threshold.fill_(DEAD_TOKENS)
    reference.tokens_since_fired = dictionary.tokens_since_fired.clone()
    reference.dead_threshold = DEAD_TOKENS


def end_the_warmup(sae, reference):
    if hasattr(sae, "sparsity"):
        sae.sparsity.warm.fill_(1.0)
        reference.progress = 1.0


def gradient(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@pytest.mark.parametrize("name, recipe, changes", VARIANTS)
def test_loss_and_gradients_equal_those_of_the_formulas(name, recipe, changes):
    sae, options = build_pair(name, recipe, changes)
    reference = reference_of(sae, options)
    let_a_third_be_dead(sae, reference)
    end_the_warmup(sae, reference)
    ((x, keys),) = make_batches(sae, 1)
    terms = sae.loss(sae.autoencode(x, BatchInfo(token_keys=keys)))
    expected = reference.loss_terms(x, keys)
    assert terms.keys() == expected.keys()
    for term in terms:
        assert torch.allclose(terms[term], expected[term], rtol=1e-12, atol=1e-14), term
    sum(terms.values()).backward()
    sum(expected.values()).backward()
    for key, parameter in sae.named_parameters():
        wanted = gradient(reference.weights[key])
        difference = (gradient(parameter) - wanted).abs().max()
        assert difference < 1e-12 * max(1.0, float(wanted.abs().max())), key
    assert any(gradient(parameter).abs().max() > 0 for parameter in sae.parameters())


def train(sae, batches):
    """Losses of Adam steps with the functions that training uses."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    losses = []
    sae.train()
    for step, (x, keys) in enumerate(batches, 1):
        out = sae.autoencode(x, BatchInfo(token_keys=keys))
        loss = torch.stack(list(sae.loss(out).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        project_decoder_grad(sae)
        optimizer.step()
        unit_norm_decoder(sae)
        sae.after_step(out, step / len(batches))
        losses.append(loss.item())
    return losses


def train_reference(reference, batches, decoders):
    """The same, written out. Columns of these decoders keep norm 1."""
    optimizer = torch.optim.Adam(reference.weights.values(), lr=LEARNING_RATE)
    losses = []
    for step, (x, keys) in enumerate(batches, 1):
        loss = sum(reference.loss_terms(x, keys).values())
        optimizer.zero_grad()
        loss.backward()
        for weight in decoders:
            unit = nn.functional.normalize(weight.detach(), dim=0)
            weight.grad -= unit * (unit * weight.grad).sum(0)
        optimizer.step()
        with torch.no_grad():
            for weight in decoders:
                weight /= weight.norm(dim=0, keepdim=True)
        reference.after_step(step / len(batches))
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ZOO)
def test_the_losses_of_a_training_equal_those_of_the_formulas(name):
    sae, options = build_pair(name, "standard", {})
    unit_norm_decoder(sae)
    reference = reference_of(sae, options)
    unit_norm_weights = {id(decoder.weight) for decoder in sae.decoders()}
    names = [key for key, value in sae.named_parameters() if id(value) in unit_norm_weights]
    decoders = [reference.weights[key] for key in names]
    batches = make_batches(sae, STEPS)
    losses = train(sae, batches)
    assert losses[-1] != losses[0]
    assert losses == pytest.approx(train_reference(reference, batches, decoders), rel=1e-9)
