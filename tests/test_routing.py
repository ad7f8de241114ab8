"""What the router learns from each objective: gradients by formula, and a planted structure that a sound one finds."""

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

D, SITES = 24, 5  # sites 2 ... 6 of 8 blocks


def make(**options):
    torch.manual_seed(0)
    return build(
        "RouteSAE",
        D,
        8,
        {"latent_size": 64, "k": 3, "auxk_coeff": 0.0, "b_pre_init": "zero", **options},
    ).train()


def router_grad(sae, x, terms=None):
    loss = sae.loss(sae.autoencode(x))
    total = sum(value for name, value in loss.items() if terms is None or name in terms)
    (grad,) = torch.autograd.grad(total, sae.router.weight, allow_unused=True)
    return grad


@pytest.fixture()
def x():
    torch.manual_seed(1)
    return F.layer_norm(torch.randn(45, SITES, D), (D,))


def test_the_published_objective_gives_no_gradient_at_initialisation_and_the_others_do(x):
    assert router_grad(make(), x).abs().max() < 1e-7  # PITFALLS R1
    for objective in ("expected", "advantage", "ste"):
        assert router_grad(make(router_objective=objective), x).abs().max() > 1e-4


def test_the_published_objective_follows_its_formula_where_there_are_biases(x):
    sae = make().double()
    with torch.no_grad():
        sae.sae.pre_bias.normal_(std=0.3), sae.sae.latent_bias.normal_(std=0.3)
    x = x.double()
    pooled, p = x.sum(-2), sae.get_router_weights(x)
    s, site = p.max(-1)
    u = x[torch.arange(len(x)), site]
    latents, x_hat = sae.sae(s[:, None] * u)
    active = (latents != 0).double()
    encoder, decoder = sae.sae.encoder.weight, sae.sae.decoder.weight
    linear = ((s[:, None] * u) @ encoder.T * active) @ decoder.T  # s A u
    beta, residual = x_hat - linear, s[:, None] * u - x_hat
    by_s = 2 * (residual * beta).sum(-1) / (s**3 * u.square().sum(-1))
    by_logit = (by_s * s)[:, None] * (F.one_hot(site, SITES) - p)
    assert torch.allclose(router_grad(sae, x), by_logit.T @ pooled / len(x), atol=1e-10)


@pytest.mark.parametrize("objective", ["expected", "advantage"])
def test_expected_error_follows_its_formula(x, objective):
    sae, x = make(router_objective=objective).double(), x.double()
    seen = x[::SITES]
    errors = sae.site_errors(seen)
    if objective == "advantage":
        sae.router.site_error.copy_(torch.rand(SITES) + 0.5)
        mean = 0.95 * sae.router.site_error + 0.05 * errors.mean(0)
        errors = (errors - mean) / mean
    p = sae.get_router_weights(seen)
    by_logit = p * (errors - (p * errors).sum(-1, keepdim=True))
    assert torch.allclose(
        router_grad(sae, x, ["Router"]), by_logit.T @ seen.sum(-2) / len(seen), atol=1e-10
    )
    assert (
        router_grad(sae, x, ["NormMSE"]) is None
    )  # scale one: the code's error says nothing about the choice


def test_balance_is_least_where_the_load_is_even(x):
    sae = make(router_objective="expected", router_balance="switch", router_balance_coef=1.0)
    even = sae.autoencode(x).replace(weights=torch.eye(SITES).repeat(9, 1))
    uneven = even.replace(weights=F.one_hot(torch.zeros(45, dtype=torch.long), SITES).float())
    assert sae.penalty(even)["Balance"] == pytest.approx(1.0)
    assert sae.penalty(uneven)["Balance"] == pytest.approx(SITES)
    sae = make(router_balance="bias", router_balance_coef=0.1)
    sae.after_step(sae.autoencode(x).replace(weights=uneven.weights), 0.1)
    assert sae.router.load_bias.tolist() == pytest.approx([-0.1, 0.1, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("scale", ["p", "one", "ste"])
def test_a_patch_reproduces_what_was_coded(x, scale):
    sae = make(route_scale=scale).eval()
    hidden = {site: x[:, i] * 3 + 1 for i, site in enumerate(sae.sites())}
    p = sae.autoencode(sae.gather(hidden))
    (patches,) = sae.patches(hidden)
    site = p.weights.argmax(-1)
    for i, number in enumerate(sae.sites()):
        new, (_, mean, std) = patches[number](hidden[number]), sae.standardise(hidden[number])
        assert torch.equal(new[site != i], hidden[number][site != i])
        wanted = (p.x_hat / p.scale[:, None] * std + mean)[site == i]
        assert torch.allclose(new[site == i], wanted, atol=1e-4)
    assert torch.all(p.scale == 1) == (scale != "p")


def test_an_untrained_router_stays_as_it_was_drawn(x):
    sae = make(router_objective="frozen", router_balance="switch")
    sum(sae.loss(sae.autoencode(x)).values()).backward()
    assert sae.router.weight.grad is None and torch.equal(sae.router.weight, make().router.weight)
    assert torch.all(sae.autoencode(x).scale == 1)


def test_random_routing_keeps_the_shares_asked_for_and_draws_by_token_alone():
    wanted = [0.5, 0.0, 0.3, 0.2, 0.0]
    sae, keys = make(routing="random", route_shares=wanted), torch.arange(20_000)
    x = torch.randn(1, SITES, D).expand(20_000, -1, -1)
    weights = sae.autoencode(x, BatchInfo(token_keys=keys)).weights
    assert (
        torch.allclose(weights.mean(0), torch.tensor(wanted), atol=0.02)
        and weights.mean(0)[[1, 4]].eq(0).all()
    )
    assert torch.equal(
        sae.autoencode(x[:50], BatchInfo(token_keys=keys[100:150])).weights, weights[100:150]
    )
    for shares, routing in ((wanted, "hard"), ([0.0] * 5, "random")):
        with pytest.raises(ValueError, match="it needs routing random or a frozen router"):
            make(routing=routing, route_shares=shares)
    with pytest.raises(ValueError, match="4 numbers for 5 routed sites"):
        make(routing="random", route_shares=wanted[:4]).autoencode(x[:2])


def test_an_untrained_router_can_be_given_the_shares_of_another(x):
    torch.manual_seed(2)
    many, wanted = torch.randn(6000, SITES, D), torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    sae = make(router_objective="frozen", route_shares=wanted.tolist())
    before = sae.get_router_weights(many).argmax(-1)
    sae.warm_start(many[:3000])
    site = sae.autoencode(many[3000:]).weights.argmax(-1)
    assert torch.allclose(torch.bincount(site, minlength=SITES) / 3000, wanted, atol=0.03)
    assert (site == before[3000:]).float().mean() > 0.4 and torch.equal(
        sae.router.weight, make().router.weight
    )
    again = make(router_objective="frozen", route_shares=wanted.tolist())
    again.load_state_dict(sae.state_dict())
    assert torch.equal(again.autoencode(many[3000:]).weights.argmax(-1), site)


@pytest.mark.parametrize("scale", ["p", "one"])
def test_the_oracle_takes_the_best_site_at_the_tokens_own_scale(x, scale):
    sae = make(route_scale=scale).eval()
    sae.sae.pre_bias.data.normal_(std=0.3)
    before = sae.autoencode(x)
    sae.routing = "oracle"
    p = sae.autoencode(x)
    errors = sae.site_errors(x, before.weights.max(-1).values if scale == "p" else None)
    assert torch.equal(p.weights.argmax(-1), errors.argmin(-1)) and not torch.equal(
        p.weights, before.weights
    )
    assert torch.allclose(
        (p.target - p.x_hat).square().sum(-1) / p.target.square().sum(-1),
        errors.min(-1).values,
        atol=1e-5,
    )
    assert torch.equal(p.scale, before.scale)


def test_straight_through_and_advantage_follow_their_formulas(x):
    logits = x.sum(-1).double().requires_grad_()
    pull, p = torch.randn_like(logits), logits.softmax(-1)
    by_logit = p * (pull - (p * pull).sum(-1, keepdim=True))
    assert torch.allclose(
        torch.autograd.grad((router.straight_through(p) * pull).sum(), logits)[0], by_logit
    )
    load, p = router.load(logits.softmax(-1)), logits.softmax(-1)
    by_logit = SITES * p * (load - (p * load).sum(-1, keepdim=True)) / len(x)
    assert torch.allclose(torch.autograd.grad(router.switch_loss(p, load), logits)[0], by_logit)


def test_a_token_that_decides_its_site_gives_all_the_information_and_a_shuffled_one_little():
    ids = torch.arange(4000) % 8
    routing = Routing()
    for part in ids.split(1000):
        routing.update(
            F.one_hot(part % 4, SITES).float(),
            torch.rand(len(part), SITES),
            torch.rand(len(part)),
            part + 3,
        )
    found = routing.compute()
    assert found["site_token_information"] == pytest.approx(torch.tensor(4.0).log().item())
    assert found["site_token_information_shuffled"] < 0.02
    assert found["share"] == [0.25] * 4 + [0.0] and found["p_entropy"] == 0


@pytest.mark.parametrize("scale", ["p", "one"])
def test_the_documented_form_codes_what_training_coded(x, scale):
    sae = make(router_objective="expected", route_scale=scale)
    weights, routed, latents, x_hat, _ = sae(x)
    p = sae.autoencode(x)
    assert (
        torch.equal(routed, p.target)
        and torch.equal(latents, p.latents)
        and torch.allclose(x_hat, p.x_hat, atol=1e-6)
    )
    assert torch.equal(weights, torch.nn.functional.one_hot(p.weights.argmax(-1), SITES).float())


def test_unknown_objectives_and_soft_routing_with_one_are_refused(capsys):
    with pytest.raises(ValueError, match="router_objective 'best'; known are published"):
        make(router_objective="best")
    with pytest.raises(SystemExit):
        parse("train", ["--router_objective", "expected", "--routing", "soft"])
    assert "needs --routing hard, not soft" in capsys.readouterr().err


def test_the_standard_recipe_teaches_the_router_and_soft_or_random_routing_leaves_it_to_the_loss(x):
    cfg = parse("train", [])
    options = model_options(cfg, "RouteSAE")
    assert (options["router_objective"], options["router_balance"]) == ("expected", "switch")
    assert make(**ZOO["RouteSAE"].standard).loss(
        make(**ZOO["RouteSAE"].standard).autoencode(x)
    ).keys() == {"NormMSE", "Router", "Balance"}
    for routing in ("soft", "random"):
        assert make(**ZOO["RouteSAE"].standard, routing=routing).loss(
            make(routing=routing).autoencode(x)
        ).keys() == {"NormMSE"}
    cfg = parse("train", ["--recipe", "published"])
    assert (
        model_options(cfg, "RouteSAE")["router_objective"] == "published"
        and make().router.objective == "published"
    )


def planted(n, atoms, generator):
    """Each token's features live at one site, which also decides their atoms; every other site holds faint noise. -> x [n,L,D], site [n]"""
    site = torch.randint(SITES, (n,), generator=generator)
    per_site = len(atoms) // SITES
    picks = (
        torch.rand(n, per_site, generator=generator).argsort(1)[:, :3] + site[:, None] * per_site
    )
    signal = (atoms[picks] * (1 + torch.rand(n, 3, 1, generator=generator))).sum(1)
    x = 0.3 * torch.randn(n, SITES, D, generator=generator)
    x[torch.arange(n), site] = signal * (D**0.5 / signal.norm(dim=1, keepdim=True))
    return x - x.mean(-1, keepdim=True), site


def agreement(objective, steps=400):
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(40, D, generator=generator), dim=1)
    sae = make(router_objective=objective)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(steps):
        p = sae.autoencode(planted(512, atoms, generator)[0])
        optimizer.zero_grad()
        sum(sae.loss(p).values()).backward()
        project_decoder_grad(sae)
        optimizer.step()
        unit_norm_decoder(sae)
        sae.after_step(p, (step + 1) / steps)
    x, site = planted(2000, atoms, generator)
    with torch.no_grad():
        chosen, errors = sae.eval().autoencode(x).weights.argmax(-1), sae.site_errors(x)
    regret = errors.gather(1, chosen[:, None])[:, 0] - errors.min(-1).values
    return float((chosen == site).float().mean()), float(regret.mean())


def test_planted_sites_are_found_by_a_sound_router_and_not_by_the_published_one():
    for objective in ("expected", "advantage"):
        found, regret = agreement(objective)
        assert found > 0.9 and regret < 0.03  # chance is .2
    found, regret = agreement("published")
    assert found < 0.5 and regret > 0.08  # several times as much
