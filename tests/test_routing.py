"""What the router learns from each objective: gradients by formula, recovery of planted sites."""

import math

import pytest
import torch
import torch.nn.functional as F

from src import router
from src.config import model_options, parse
from src.metrics import Routing
from src.model import build
from src.ops import project_decoder_grad, unit_norm_decoder
from src.sae import BatchInfo
from src.zoo import ZOO

N, D, BLOCKS = 45, 24, 8
SITES = 5  # sites 2 ... 6 of 8 blocks


def make(**options):
    """A RouteSAE without AuxK and with biases of 0."""
    torch.manual_seed(0)
    sizes = {"latent_size": 64, "k": 3, "auxk_coeff": 0.0, "b_pre_init": "zero"}
    return build("RouteSAE", D, BLOCKS, sizes | options).train()


def router_grad(sae, x, terms=None):
    """Gradient of the router's weight by these terms of the loss, by default all; or None."""
    losses = sae.loss(sae.autoencode(x))
    total = sum(value for name, value in losses.items() if terms is None or name in terms)
    (grad,) = torch.autograd.grad(total, sae.router.weight, allow_unused=True)
    return grad


def site_weights_of_one_site(n, site=0):
    return F.one_hot(torch.full((n,), site), SITES).float()


def softmax_grad(p, by_p):
    """Gradient of the logits of p, given that of p. [N,L] -> [N,L]"""
    return p * (by_p - (p * by_p).sum(-1, keepdim=True))


@pytest.fixture
def x():
    torch.manual_seed(1)
    return F.layer_norm(torch.randn(N, SITES, D), (D,))


# ------------------------------------------------------------------------------- objectives


def test_the_published_objective_gives_no_gradient_at_initialisation_and_the_others_do(x):
    assert router_grad(make(), x).abs().max() < 1e-7
    for objective in ("expected", "advantage", "ste"):
        assert router_grad(make(router_objective=objective), x).abs().max() > 1e-4


def test_the_published_objective_follows_its_formula_where_there_are_biases(x):
    """The symbols are those of src/router.py."""
    sae = make().double()
    with torch.no_grad():
        sae.sae.pre_bias.normal_(std=0.3)
        sae.sae.latent_bias.normal_(std=0.3)
    x = x.double()
    p = sae.get_router_weights(x)
    s, site = p.max(-1)
    u = x[torch.arange(N), site]
    routed = s[:, None] * u
    latents, x_hat = sae.sae(routed)
    active = (latents != 0).double()
    s_a_u = (routed @ sae.sae.encoder.weight.T * active) @ sae.sae.decoder.weight.T
    beta = x_hat - s_a_u
    r = routed - x_hat
    by_s = 2 * (r * beta).sum(-1) / (s**3 * u.square().sum(-1))
    by_logit = (by_s * s)[:, None] * (F.one_hot(site, SITES) - p)
    expected = by_logit.T @ x.sum(-2) / N
    assert torch.allclose(router_grad(sae, x), expected, atol=1e-10)


@pytest.mark.parametrize("objective", ["expected", "advantage"])
def test_expected_error_follows_its_formula(x, objective):
    sae = make(router_objective=objective).double()
    x = x.double()
    sampled = x[::SITES]
    errors = sae.site_errors(sampled)
    if objective == "advantage":
        sae.router.site_error.copy_(torch.rand(SITES) + 0.5)
        mean = 0.95 * sae.router.site_error + 0.05 * errors.mean(0)
        errors = (errors - mean) / mean
    by_logit = softmax_grad(sae.get_router_weights(sampled), errors)
    expected = by_logit.T @ sampled.sum(-2) / len(sampled)
    assert torch.allclose(router_grad(sae, x, ["Router"]), expected, atol=1e-10)
    # The scale is 1, so the error of the code does not depend on p.
    assert router_grad(sae, x, ["NormMSE"]) is None


def test_straight_through_follows_its_formula(x):
    logits = x.sum(-1).double().requires_grad_()
    by_weight = torch.randn_like(logits)
    p = logits.softmax(-1)
    loss = (router.straight_through(p) * by_weight).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(grad, softmax_grad(p, by_weight))


def test_the_switch_loss_follows_its_formula(x):
    logits = x.sum(-1).double().requires_grad_()
    p = logits.softmax(-1)
    load = router.load(p)
    (grad,) = torch.autograd.grad(router.switch_loss(p, load), logits)
    assert torch.allclose(grad, SITES * softmax_grad(p, load) / N)


def test_balance_is_least_where_the_load_is_even(x):
    sae = make(router_objective="expected", router_balance="switch", router_balance_coef=1.0)
    out = sae.autoencode(x)
    even = out.replace(weights=torch.eye(SITES).repeat(N // SITES, 1))
    uneven = out.replace(weights=site_weights_of_one_site(N))
    assert sae.penalty(even)["Balance"] == pytest.approx(1.0)
    assert sae.penalty(uneven)["Balance"] == pytest.approx(SITES)


def test_a_balance_bias_moves_against_the_load(x):
    sae = make(router_balance="bias", router_balance_coef=0.1)
    uneven = sae.autoencode(x).replace(weights=site_weights_of_one_site(N))
    sae.after_step(uneven, 0.1)
    assert sae.router.load_bias.tolist() == pytest.approx([-0.1, 0.1, 0.1, 0.1, 0.1])


def test_a_frozen_router_stays_as_it_was_drawn(x):
    sae = make(router_objective="frozen", router_balance="switch")
    sum(sae.loss(sae.autoencode(x)).values()).backward()
    assert sae.router.weight.grad is None
    assert torch.equal(sae.router.weight, make().router.weight)
    assert torch.all(sae.autoencode(x).scale == 1)


# ------------------------------------------------------------------------ coding and patching


@pytest.mark.parametrize("scale", ["p", "one", "ste"])
def test_a_patch_reproduces_what_was_coded(x, scale):
    sae = make(route_scale=scale).eval()
    hidden = {site: x[:, i] * 3 + 1 for i, site in enumerate(sae.sites())}
    out = sae.autoencode(sae.gather(hidden))
    assert torch.all(out.scale == 1) == (scale != "p")
    site_index = out.weights.argmax(-1)
    (patches,) = sae.patches(hidden)
    for index, site in enumerate(sae.sites()):
        patched = patches[site](hidden[site])
        routed = site_index == index
        assert torch.equal(patched[~routed], hidden[site][~routed])
        _, mean, std = sae.standardise(hidden[site])
        x_hat = out.x_hat / out.scale[:, None] * std + mean
        assert torch.allclose(patched[routed], x_hat[routed], atol=1e-4)


@pytest.mark.parametrize("scale", ["p", "one"])
def test_the_documented_form_gives_what_training_computes(x, scale):
    sae = make(router_objective="expected", route_scale=scale)
    layer_weights, routed, latents, x_hat, _ = sae(x)
    out = sae.autoencode(x)
    assert torch.equal(routed, out.target)
    assert torch.equal(latents, out.latents)
    assert torch.allclose(x_hat, out.x_hat, atol=1e-6)
    assert torch.equal(layer_weights, F.one_hot(out.weights.argmax(-1), SITES).float())


# -------------------------------------------------------------------------------- controls


SHARES = [0.5, 0.0, 0.3, 0.2, 0.0]


def test_random_routing_has_the_given_shares_and_depends_on_the_token_alone():
    sae = make(routing="random", route_shares=SHARES)
    keys = torch.arange(20_000)
    x = torch.randn(1, SITES, D).expand(len(keys), -1, -1)
    weights = sae.autoencode(x, BatchInfo(token_keys=keys)).weights
    share = weights.mean(0)
    assert torch.allclose(share, torch.tensor(SHARES), atol=0.02)
    assert share[[1, 4]].eq(0).all()
    later = sae.autoencode(x[:50], BatchInfo(token_keys=keys[100:150])).weights
    assert torch.equal(later, weights[100:150])


@pytest.mark.parametrize("shares, routing", [(SHARES, "hard"), ([0.0] * SITES, "random")])
def test_shares_that_nothing_uses_or_that_add_up_to_0_are_refused(shares, routing):
    with pytest.raises(ValueError, match="it needs routing random or a frozen router"):
        make(routing=routing, route_shares=shares)


def test_shares_of_another_number_of_sites_are_refused(x):
    sae = make(routing="random", route_shares=SHARES[:4])
    with pytest.raises(ValueError, match="4 numbers for 5 routed sites"):
        sae.autoencode(x[:2])


def test_a_frozen_router_can_be_given_shares():
    torch.manual_seed(2)
    first, later = torch.randn(6000, SITES, D).split(3000)
    shares = [0.5, 0.0, 0.3, 0.15, 0.05]
    sae = make(router_objective="frozen", route_shares=shares)
    site_before = sae.get_router_weights(later).argmax(-1)
    sae.warm_start(first)
    site = sae.autoencode(later).weights.argmax(-1)
    share = torch.bincount(site, minlength=SITES) / len(later)
    assert torch.allclose(share, torch.tensor(shares), atol=0.03)
    assert (site == site_before).float().mean() > 0.4  # it still reads the states
    assert torch.equal(sae.router.weight, make().router.weight)
    loaded = make(router_objective="frozen", route_shares=shares)
    loaded.load_state_dict(sae.state_dict())
    assert torch.equal(loaded.autoencode(later).weights.argmax(-1), site)


@pytest.mark.parametrize("scale", ["p", "one"])
def test_the_oracle_takes_the_best_site_at_the_scale_of_the_token(x, scale):
    sae = make(route_scale=scale).eval()
    sae.sae.pre_bias.data.normal_(std=0.3)
    hard = sae.autoencode(x)
    sae.routing = "oracle"
    out = sae.autoencode(x)
    p = hard.weights.max(-1).values
    best, best_site = sae.site_errors(x, p if scale == "p" else None).min(-1)
    assert torch.equal(out.weights.argmax(-1), best_site)
    assert not torch.equal(out.weights, hard.weights)
    errors = (out.target - out.x_hat).square().sum(-1) / out.target.square().sum(-1)
    assert torch.allclose(errors, best, atol=1e-5)
    assert torch.equal(out.scale, hard.scale)


# --------------------------------------------------------------------------------- measures


def test_site_information_is_full_if_the_token_decides_its_site_and_small_if_shuffled():
    routing = Routing()
    for ids in (torch.arange(4000) % 8).split(1000):
        weights = F.one_hot(ids % 4, SITES).float()
        routing.update(weights, torch.rand(len(ids), SITES), torch.rand(len(ids)), ids + 3)
    result = routing.compute()
    assert result["site_token_information"] == pytest.approx(math.log(4))
    assert result["site_token_information_shuffled"] < 0.02
    assert result["share"] == [0.25] * 4 + [0.0]
    assert result["p_entropy"] == 0


# ---------------------------------------------------------------------------------- options


def test_unknown_objectives_are_refused():
    with pytest.raises(ValueError, match="router_objective 'best'; known are published"):
        make(router_objective="best")


def test_soft_routing_with_an_objective_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("train", ["--router_objective", "expected", "--routing", "soft"])
    assert "needs --routing hard, not soft" in capsys.readouterr().err


def test_the_standard_recipe_trains_the_router(x):
    options = model_options(parse("train", []), "RouteSAE")
    assert options["router_objective"] == "expected"
    assert options["router_balance"] == "switch"
    sae = make(**ZOO["RouteSAE"].standard)
    assert sae.loss(sae.autoencode(x)).keys() == {"NormMSE", "Router", "Balance"}


@pytest.mark.parametrize("routing", ["soft", "random"])
def test_soft_and_random_routing_have_no_objective_for_the_router(routing, x):
    sae = make(**ZOO["RouteSAE"].standard, routing=routing)
    assert sae.loss(sae.autoencode(x)).keys() == {"NormMSE"}


def test_the_published_recipe_has_the_published_objective():
    options = model_options(parse("train", ["--recipe", "published"]), "RouteSAE")
    assert options["router_objective"] == "published"
    assert make().router.objective == "published"


# ----------------------------------------------------------------------------- planted sites


def planted_states(n, directions, generator):
    """(x [n,L,D], site index [n])

    The features of a token are at one site, which also decides which features they can be. Every
    other site holds weak noise.
    """
    site = torch.randint(SITES, (n,), generator=generator)
    per_site = len(directions) // SITES
    order = torch.rand(n, per_site, generator=generator).argsort(1)
    features = order[:, :3] + site[:, None] * per_site
    strength = 1 + torch.rand(n, 3, 1, generator=generator)
    signal = (directions[features] * strength).sum(1)
    x = 0.3 * torch.randn(n, SITES, D, generator=generator)
    x[torch.arange(n), site] = signal * (D**0.5 / signal.norm(dim=1, keepdim=True))
    return x - x.mean(-1, keepdim=True), site


def train_on_planted_states(objective, steps=400):
    """(share of tokens that go to their planted site, mean regret)"""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(40, D, generator=generator), dim=1)
    sae = make(router_objective=objective)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(steps):
        out = sae.autoencode(planted_states(512, directions, generator)[0])
        optimizer.zero_grad()
        sum(sae.loss(out).values()).backward()
        project_decoder_grad(sae)
        optimizer.step()
        unit_norm_decoder(sae)
        sae.after_step(out, (step + 1) / steps)
    x, planted_site = planted_states(2000, directions, generator)
    with torch.no_grad():
        site = sae.eval().autoencode(x).weights.argmax(-1)
        regret = router.regret(site, sae.site_errors(x))
    return float((site == planted_site).float().mean()), float(regret.mean())


@pytest.mark.parametrize("objective", ["expected", "advantage"])
def test_planted_sites_are_found_by_objectives_that_compare_sites(objective):
    agreement, regret = train_on_planted_states(objective)
    assert agreement > 0.9  # chance is 0.2
    assert regret < 0.03


def test_planted_sites_are_not_found_by_the_published_objective():
    agreement, regret = train_on_planted_states("published")
    assert agreement < 0.5
    assert regret > 0.08
