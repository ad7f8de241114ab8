"""The contract over the whole zoo, then what is particular to each model."""

import pytest
import torch
import torch.nn.functional as F

from src import device, model, ops, sparse
from src.draws import random_integers, random_subset
from src.model import RouteSAE, TopK, build
from src.ops import (
    Jump_func,
    Step_func,
    apply_inference_cut,
    pre_process,
    project_decoder_grad,
    topk_sparsify,
    unit_norm_decoder,
)
from src.sae import BatchInfo, SAEOutput
from src.sparse import active
from src.zoo import ZOO, canonical

N, D, FEATURES, LAYERS = 50, 32, 64, 16
TOKENS = torch.arange(N)


@pytest.fixture
def hidden():
    generator = torch.Generator().manual_seed(1)
    return {site: torch.randn(N, D, generator=generator) * 2 + 1 for site in range(1, LAYERS + 1)}


def make(name, recipe="standard", **options):
    torch.manual_seed(0)
    sae = build(
        name,
        D,
        LAYERS,
        {"latent_size": FEATURES, "k": 4, "seed": 3, **getattr(ZOO[name], recipe), **options},
    )
    with torch.no_grad():
        for key, value in sae.named_parameters():
            if "bias" in key:
                value.add_(0.05 * torch.randn_like(value))
    return sae


@pytest.mark.parametrize("name", ZOO)
def test_every_model_keeps_the_contract(name, hidden):
    sae = make(name)
    x = sae.gather(hidden)
    sae.warm_start(x)
    p = sae.autoencode(x, BatchInfo(token_keys=TOKENS))
    assert p.x_hat.shape == p.target.shape and p.latents.shape[-1] == FEATURES
    sae.after_step(p, 0.5)
    loss = sum(sae.loss(sae.autoencode(x, BatchInfo(token_keys=TOKENS))).values())
    loss.backward()
    for key, value in sae.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), key
        assert value.grad.abs().max() > 0, key
    unit_norm_decoder(sae)
    project_decoder_grad(sae)
    for decoder in sae.decoders():
        assert torch.allclose(decoder.weight.norm(dim=0), torch.ones(FEATURES))
        assert (decoder.weight.grad * decoder.weight).sum(0).abs().max() < 1e-5
    assert sae.strength(p).shape == p.latents.shape
    other = build(name, D, LAYERS, sae.config)
    other.load_state_dict(sae.state_dict())
    assert torch.equal(
        other.autoencode(x, BatchInfo(token_keys=TOKENS)).x_hat,
        sae.autoencode(x, BatchInfo(token_keys=TOKENS)).x_hat,
    )


@pytest.mark.parametrize("name", ZOO)
def test_infer_k_and_theta_mean_the_same_everywhere(name, hidden):
    sae = make(name)
    x = sae.gather(hidden)
    assert (sae.autoencode(x, BatchInfo(infer_k=2, token_keys=TOKENS)).latents != 0).sum(
        -1
    ).max() <= 2
    kept = sae.autoencode(x, BatchInfo(theta=0.3, token_keys=TOKENS)).latents
    assert kept[kept != 0].min() > 0.3
    negative = sae.autoencode(x, BatchInfo(theta=-1.0, token_keys=TOKENS)).latents
    assert negative.min() >= 0
    with pytest.raises(ValueError, match="exclude each other"):
        sae.autoencode(x, BatchInfo(infer_k=2, theta=0.1, token_keys=TOKENS))


@pytest.mark.parametrize("name", [n for n in ZOO if n != "Crosscoder"])
def test_a_perfect_reconstruction_leaves_the_residual_as_it_is(name, hidden, monkeypatch):
    sae = make(name)
    inner = getattr(sae, "sae", sae)
    monkeypatch.setattr(
        type(inner),
        "autoencode",
        lambda self, x, *_, **__: model.SAEOutput(x, x.new_zeros(*x.shape[:-1], FEATURES), x),
    )
    for patches in sae.patches(hidden, BatchInfo(token_keys=TOKENS)):
        for site, patch in patches.items():
            assert torch.allclose(patch(hidden[site]), hidden[site], atol=1e-5)


def test_topk_keeps_exactly_k_and_negatives_only_without_relu(hidden):
    sae = make("TopK", k=40)
    x = sae.gather(hidden)
    latents = sae.autoencode(x).latents
    assert ((latents != 0).sum(-1) == 40).all() and latents.min() < 0
    assert make("TopK", k=40, topk_relu=True).autoencode(x).latents.min() >= 0


def test_auxk_is_zero_without_dead_latents_and_trains_the_dead(hidden):
    sae = make("TopK", dead_tokens=10)
    x = sae.gather(hidden)
    p = sae.autoencode(x)
    assert sae.penalty(p) == {}
    sae.after_step(p, 0.1)
    dead = sae.tokens_since_fired > 10
    assert dead.any()
    sae.penalty(sae.autoencode(x))["AuxK"].backward()
    assert (
        sae.encoder.weight.grad[dead].abs().sum() > 0
        and sae.encoder.weight.grad[~dead].abs().sum() == 0
    )


def test_a_batchs_k_becomes_a_threshold_at_inference(hidden):
    sae = make("BatchTopK", k=4)
    x = sae.gather(hidden)
    p = sae.autoencode(x)
    assert (
        int((p.latents != 0).sum()) == 4 * len(x)
        and len(set((p.latents != 0).sum(-1).tolist())) > 1
    )
    sae.after_step(p, 0.5)
    sae.eval()
    assert torch.allclose(
        sae.autoencode(x[:3]).latents, sae.autoencode(x).latents[:3], atol=1e-5
    )  # no token depends on the others any more
    again = make("BatchTopK", k=4)
    again.load_state_dict(sae.state_dict())
    assert torch.equal(again.eval().autoencode(x).latents, sae.autoencode(x).latents)


def test_random_routing_and_randomk_do_not_depend_on_batching(hidden):
    for sae in (make("RandomK"), make("RouteSAE", routing="random")):
        x = sae.gather(hidden)
        whole = sae.autoencode(x, BatchInfo(token_keys=TOKENS))
        half = sae.autoencode(x[20:], BatchInfo(token_keys=TOKENS[20:]))
        assert torch.equal(whole.latents[20:] != 0, half.latents != 0)
    subset = random_subset(torch.arange(4000), 7, 10, 3)
    assert all(len(set(row)) == 3 for row in subset.tolist())
    share = torch.bincount(subset.flatten(), minlength=10) / 4000
    assert (share - 0.3).abs().max() < 0.03


@pytest.mark.parametrize(("n", "k"), [(2048, 16), (100, 50), (64, 64), (64, 63), (3, 2), (1, 1)])
def test_a_subset_is_floyds_one_integer_after_the_other(n, k):
    keys = torch.arange(300)
    one_by_one: list[list[int]] = [[] for _ in keys]
    for i, top in enumerate(range(n - k, n)):
        for chosen, drawn in zip(
            one_by_one, random_integers(keys, 7, top + 1, i).tolist(), strict=True
        ):
            chosen.append(top if drawn in chosen else drawn)
    assert random_subset(keys, 7, n, k).tolist() == one_by_one


def test_router_is_untrained_at_the_start_of_the_published_objective(hidden):
    torch.manual_seed(0)
    sae = build("RouteSAE", D, LAYERS, {"latent_size": FEATURES, "k": 4}).double()
    sae.loss(sae.autoencode(sae.gather(hidden).double()))["NormMSE"].backward()
    assert sae.router.weight.grad.abs().max() < 1e-12 < sae.sae.encoder.weight.grad.abs().max()


def test_hard_route_substitutes_each_token_at_its_own_site_consistently_with_training(hidden):
    sae = make("RouteSAE", route_scale="p")
    x = sae.gather(hidden)
    p = sae.autoencode(x)
    site = p.weights.argmax(-1)
    (patches,) = sae.patches(hidden)
    for index, s in enumerate(sae.sites()):
        after, here = patches[s](hidden[s]), site == index
        assert torch.equal(after[~here], hidden[s][~here])
        expected = p.x_hat[here] / p.scale[here, None]
        states, mean, std = sae.standardise(hidden[s][here])
        assert torch.allclose((after[here] - mean) / std, expected, atol=1e-4)
    unscaled = next(make("RouteSAE", route_scale="p", route_patch="unscaled").patches(hidden))
    s = sae.sites()[int(site[0])]
    assert not torch.allclose(unscaled[s](hidden[s])[0], patches[s](hidden[s])[0], atol=1e-4)


def test_soft_error_transfer_sums_to_the_mixture(hidden):
    sae = make("RouteSAE", routing="soft")
    x = sae.gather(hidden)
    p = sae.autoencode(x)
    error = p.x_hat - p.target
    assert torch.allclose((p.weights[..., None] * (x + error[:, None])).sum(1), p.x_hat, atol=1e-5)


def test_route_accepts_all_layers_and_slices_the_routed_ones(hidden):
    sae = make("RouteSAE")
    every = torch.stack(
        [torch.zeros(N, D), *(pre_process(hidden[s])[0] for s in range(1, LAYERS + 1))], 1
    )
    a, b, c = sae(every)[3], sae(every[:, 1:])[3], sae(every[:, 4:13])[3]
    assert torch.equal(a, c) and torch.equal(b, c)
    with pytest.raises(ValueError, match="expected 9"):
        sae(every[:, :5])


def test_documented_tuples_and_errors():
    sae = TopK(8, 16, 2)
    latents, x_hat = sae(torch.randn(3, 5, 8))
    assert latents.shape == (3, 5, 16) and x_hat.shape == (3, 5, 8)
    assert len(RouteSAE(8, 16, 16, 2)(torch.randn(3, 5, 9, 8))) == 5
    for bad in (
        lambda: TopK(8, 16, 17),
        lambda: TopK(8, 16, 0),
        lambda: TopK(0, 16, 1),
        lambda: RouteSAE(8, 3, 16, 2),
        lambda: canonical("TopKK"),
    ):
        with pytest.raises(ValueError):
            bad()
    assert canonical("Random") == "RandomK"


@pytest.mark.parametrize("n", [7, 11, 15, 16, 6])
def test_routed_range_is_one_helper_for_any_depth(n):
    sites = model.routed_sites(n)
    assert sites == list(range(n // 4, 3 * n // 4 + 1)) and RouteSAE(
        8, n, 16, 2
    ).n_routed_layers == len(sites)


def test_gate_learns_only_with_its_auxiliary_loss(hidden):
    for aux, learns in ((True, True), (False, False)):
        sae = make("Gated", gated_aux=aux, sparsity_warmup=0.0)
        sum(sae.loss(sae.autoencode(sae.gather(hidden))).values()).backward()
        assert (
            sae.gate_bias.grad is not None and bool(sae.gate_bias.grad.abs().sum() > 0)
        ) == learns
    sae = make("Gated")
    sae.penalty(sae.autoencode(sae.gather(hidden)))["GateAux"].backward()
    assert sae.decoder.weight.grad is None or sae.decoder.weight.grad.abs().sum() == 0


def test_jumprelu_counts_pre_activations_and_keeps_thresholds_positive(hidden):
    sae = make("JumpReLU", sparsity_warmup=0.0)
    p = sae.autoencode(sae.gather(hidden))
    assert torch.isclose(
        sae.penalty(p)["L0_penalty"], 1e-3 * (p.pre_acts > sae.threshold).float().sum(-1).mean()
    )
    with torch.no_grad():
        sae.threshold.fill_(-1)
    sae.after_step(p, 1.0)
    assert sae.threshold.min() > 0


def test_threshold_gradients_equal_finite_differences_of_the_expected_loss():
    generator = torch.Generator().manual_seed(0)
    z = 0.3 + torch.randn(2_000_000, generator=generator, dtype=torch.float64)
    theta = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    Step_func.apply(z, theta, 0.1).mean().backward()
    density = torch.exp(torch.tensor(-0.5 * 0.7**2)) / (2 * torch.pi) ** 0.5
    assert abs(theta.grad.item() + density.item()) < 0.01
    theta.grad = None
    ((z - Jump_func.apply(z, theta, 0.1)) ** 2).mean().backward()
    loss = [((z - z * (z > t)) ** 2).mean() for t in (0.95, 1.05)]
    assert abs(theta.grad.item() - (loss[1] - loss[0]).item() / 0.1) < 0.02


def test_l1_is_a_norm_weighted_sum_that_rescaling_cannot_escape(hidden):
    sae = make("Vanilla", sparsity_warmup=0.0)
    x = sae.gather(hidden)
    before = sae.penalty(sae.autoencode(x))["L1"]
    with torch.no_grad():
        sae.decoder.weight *= 3
        sae.encoder.weight /= 3
        sae.latent_bias /= 3
    assert torch.isclose(sae.penalty(sae.autoencode(x))["L1"], before)
    by_hand = 0.1 / D**0.5 * (sae.autoencode(x).latents * 3).sum(-1).mean()
    assert torch.isclose(before, by_hand, rtol=1e-4)


def test_published_crosscoder_keys_and_a_one_site_crosscoder_is_vanilla(hidden):
    assert sorted(build("Crosscoder", D, 4, {"latent_size": 8}).state_dict())[-1] == "latent_bias"
    vanilla = make("Vanilla", layer=4)
    cross = build(
        "Crosscoder",
        D,
        LAYERS,
        {"latent_size": FEATURES, "start_layer": 4, "end_layer": 5, "decoder_bias": True},
    )
    with torch.no_grad():
        cross.encoder[0].weight.copy_(vanilla.encoder.weight)
        cross.decoder[0].weight.copy_(vanilla.decoder.weight)
        cross.latent_bias.copy_(vanilla.latent_bias - vanilla.encoder.weight @ vanilla.pre_bias)
        cross.decoder_bias[0].copy_(vanilla.pre_bias)
    a, b = (
        cross.autoencode(cross.gather(hidden)).x_hat[:, 0],
        vanilla.autoencode(vanilla.gather(hidden)).x_hat,
    )
    assert torch.allclose(a, b, atol=1e-5)


def test_mlsae_at_one_site_is_topk(hidden):
    topk, mlsae = make("TopK", layer=4), make("MLSAE", start_layer=4, end_layer=5)
    mlsae.load_state_dict(topk.state_dict())
    assert torch.allclose(
        mlsae.autoencode(mlsae.gather(hidden)).x_hat[:, 0],
        topk.autoencode(topk.gather(hidden)).x_hat,
        atol=1e-6,
    )


@pytest.mark.parametrize("factor, direction", [(0.1, 1), (10, -1)])
def test_target_l0_raises_the_coefficient_of_a_dense_code_and_lowers_that_of_a_sparse_one(
    hidden, factor, direction
):
    sae = make("Vanilla", sparsity_warmup=0.0)
    p = sae.autoencode(sae.gather(hidden))
    sae.sparsity.target_l0 = factor * float((p.latents != 0).float().sum(-1).mean())
    for step in range(1, 21):
        sae.after_step(p, 0.05 * step)
    assert direction * sae.sparsity.i_gain.log().item() > 1
    assert (
        direction * (sae.sparsity.coefficient() / sae.sparsity.base).log().item()
        > direction * sae.sparsity.i_gain.log().item()
    )


@pytest.mark.parametrize("form", ["sums", "rows", "products"])
@pytest.mark.parametrize(
    "name, more", [("TopK", {}), ("TopK", {"topk_relu": True}), ("BatchTopK", {}), ("RandomK", {})]
)
def test_values_and_gradients_of_the_fast_path_are_those_of_autograd(name, more, form, monkeypatch):
    monkeypatch.setattr(sparse, "decode_form", lambda ratio, x: form)
    torch.manual_seed(0)
    sae = build(name, 12, 16, {"latent_size": 64, "k": 3, "layer": 4, **more}).double()
    with torch.no_grad():
        for p in (sae.pre_bias, sae.latent_bias):
            p.normal_()
    x, weight = (
        torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True),
        torch.randn(2, 5, 12, dtype=torch.double),
    )
    wanted = (x, *sae.parameters())
    latents = sae.activate(F.linear(x - sae.pre_bias, sae.encoder.weight, sae.latent_bias))
    fast = sae.autoencode(x)
    dense = SAEOutput(x, latents, F.linear(latents, sae.decoder.weight, sae.pre_bias))
    assert torch.allclose(fast.latents, dense.latents, rtol=1e-12)
    assert torch.allclose(fast.x_hat, dense.x_hat, rtol=1e-12)
    active_index = dense.latents.flatten().nonzero()[:, 0]
    assert torch.equal(fast.code.flat_index.sort().values, active_index)
    assert torch.equal(sparse.firings(fast.code), sparse.firings(dense.code))
    gradients = (torch.autograd.grad((out.x_hat * weight).sum(), wanted) for out in (fast, dense))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "n, f, k", [(50, 256, 16), (50, 256, 17), (9, 250, 4), (0, 64, 2), (3, 8, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_of_each_row_are_found_in_one_stage_or_two(n, f, k, dtype):
    torch.manual_seed(0)
    values = torch.randn(n, f).to(dtype)
    tied = torch.cat([values[: n // 2].round(), values[n // 2 :]])
    for some in (values, tied):
        found = ops.topk_indices(some, k)
        assert found.shape == (n, k) and all(len(set(row)) == k for row in found.tolist())
        assert torch.equal(some.gather(1, found).sort(1).values, some.topk(k).values.sort(1).values)


@pytest.mark.skipif(not device.fast_bfloat16(), reason="this CPU has no fast bfloat16")
def test_in_training_a_code_is_that_of_bfloat16_factors_and_its_gradients_are_exact_for_it():
    torch.manual_seed(0)
    sae, x = build("TopK", 64, 16, {"latent_size": 512, "k": 8, "layer": 4}), torch.randn(100, 64)
    with device.bf16_matmuls():
        p = sae.autoencode(x)
    exact = sae.autoencode(x)
    off = (p.x_hat - exact.x_hat).norm() / exact.x_hat.norm()
    assert 0 < off < 0.1 and not torch.equal(
        p.latents, exact.latents
    )  # some tokens choose another latent
    assert torch.allclose(p.x_hat, F.linear(p.latents, sae.decoder.weight, sae.pre_bias), atol=1e-5)
    weight = torch.randn_like(x)
    (by_encoder,) = torch.autograd.grad((p.x_hat * weight).sum(), sae.encoder.weight)
    wanted = ((weight @ sae.decoder.weight) * (p.latents != 0)).T @ (x - sae.pre_bias)
    assert torch.allclose(by_encoder, wanted, atol=1e-4)


def test_a_bias_in_the_factors_of_a_product_is_as_exact_as_float32():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 16), torch.randn(7, 16), torch.randn(7)
    a, b = device.affine_factors(x, weight, bias)
    assert a.dtype == b.dtype == torch.bfloat16
    assert torch.allclose(
        a.float() @ b.float().T, a[:, :16].float() @ b[:, :16].float().T + bias, atol=1e-6
    )
    assert torch.allclose(a[:, :16].float(), x, rtol=2**-8) and not torch.equal(
        a[:, :16].float(), x
    )


@pytest.mark.parametrize("without", ["", "shift", "bias"])
def test_a_linear_map_of_shifted_states_has_the_values_and_gradients_of_autograd(without):
    torch.manual_seed(0)
    x, weight = (
        torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True),
        torch.randn(7, 12, dtype=torch.double, requires_grad=True),
    )
    shift = None if without == "shift" else torch.randn(12, dtype=torch.double, requires_grad=True)
    bias = None if without == "bias" else torch.randn(7, dtype=torch.double, requires_grad=True)
    mine, plain = (
        ops.linear(x, weight, bias, shift),
        F.linear(x if shift is None else x - shift, weight, bias),
    )
    assert torch.allclose(mine, plain, rtol=1e-12)
    wanted = [one for one in (x, weight, shift, bias) if one is not None]
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), wanted) for y in (mine, plain)), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["sums", "rows", "products"])
def test_a_code_of_which_nothing_is_active_is_decoded(form, monkeypatch):
    monkeypatch.setattr(sparse, "decode_form", lambda ratio, x: form)
    sae = build("BatchTopK", 12, 16, {"latent_size": 64, "k": 3, "layer": 4}).eval()
    sae.cut.fill_(1e9)
    p = sae.autoencode(torch.randn(5, 12))
    assert (
        torch.equal(p.x_hat, sae.pre_bias.expand(5, 12))
        and not p.latents.any()
        and not len(p.code.flat_index)
    )
    p.x_hat.sum().backward()
    assert not sae.encoder.weight.grad.any() and torch.equal(
        sae.pre_bias.grad, torch.full((12,), 5.0)
    )


def test_one_product_a_direction_of_a_crosscoder_sums_over_its_sites():
    torch.manual_seed(0)
    sae = build("Crosscoder", 12, 16, {"latent_size": 24, "decoder_bias": True}).double()
    x = torch.randn(2, 5, 9, 12, dtype=torch.double)
    pre_acts = sae.latent_bias + sum(
        x[..., i, :] @ encoder.weight.T for i, encoder in enumerate(sae.encoder)
    )
    x_hat = (
        torch.stack([F.relu(pre_acts) @ decoder.weight.T for decoder in sae.decoder], -2)
        + sae.decoder_bias
    )
    p = sae.autoencode(x)
    assert torch.allclose(p.pre_acts, pre_acts, rtol=1e-12) and torch.allclose(
        p.x_hat, x_hat, rtol=1e-12
    )
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), list(sae.parameters())) for y in (p.x_hat, x_hat)),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_ops_by_hand():
    x = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    assert topk_sparsify(x, 2).tolist() == [[3.0, 0.0, 2.0, 0.0]]
    assert [t.tolist() for t in active(topk_sparsify(x, 2))] == [[0, 0], [0, 2], [3.0, 2.0]]
    with pytest.warns(UserWarning, match="all are kept"):
        assert apply_inference_cut(x, infer_k=9).tolist() == x.tolist()
    states, mean, std = pre_process(torch.randn(5, 16).bfloat16() * 100 + 7)
    assert states.dtype == torch.float32 and torch.allclose(
        states.square().sum(-1), torch.tensor(15.0), atol=1e-3
    )
    sae = TopK(4, 8, 1)
    with torch.no_grad():
        sae.decoder.weight[:, 0] = 0
    unit_norm_decoder(sae)
    assert sae.decoder.weight.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,options",
    [
        ("TopK", {"k": 3}),
        ("BatchTopK", {"k": 3}),
        ("Vanilla", {"l1_coeff": 0.05}),
        ("Gated", {"l1_coeff": 0.1}),
        ("JumpReLU", {"l1_coeff": 0.025, "threshold": 0.1, "bandwidth": 0.1}),
    ],
)
def test_a_known_dictionary_is_recovered(name, options):
    torch.manual_seed(0)
    atoms = torch.nn.Parameter(F.normalize(torch.randn(48, 24), dim=1))
    spread = torch.optim.Adam([atoms], 0.01)
    for _ in range(500):  # atoms far apart, so that recovery is well defined
        unit = F.normalize(atoms, dim=1)
        spread.zero_grad()
        (unit @ unit.T).fill_diagonal_(0).pow(8).sum().backward()
        spread.step()
    atoms = F.normalize(atoms.detach(), dim=1)
    sae = build(name, 24, 16, {"latent_size": 64, "sparsity_warmup": 0.0, **options})
    adam = torch.optim.Adam(sae.parameters(), 3e-3)
    steps = 1500
    for step in range(steps):
        pick = torch.rand(1024, 48).topk(3, dim=1).indices
        code = torch.zeros(1024, 48).scatter(1, pick, 1 + torch.rand(1024, 3))
        x = code @ atoms
        x = x * (24 / x.square().sum(1).mean()) ** 0.5
        for group in adam.param_groups:
            group["lr"] = 3e-3 * min(1, (1 - step / steps) / 0.2)
        p = sae.autoencode(x)
        adam.zero_grad()
        sum(sae.loss(p).values()).backward()
        adam.step()
        sae.after_step(p, (step + 1) / steps)
        unit_norm_decoder(sae)
    cosine = (F.normalize(sae.decoder.weight, dim=0).T @ atoms.T).abs().max(0).values
    used = (sae.eval().autoencode(x).latents != 0).float().sum(-1).mean()
    assert (
        abs(used - options.get("k", used)) < 0.2
    )  # also by the threshold that a batch's k becomes at inference
    assert cosine.mean() > 0.95 and (p.latents != 0).float().sum(-1).mean() < 8


@pytest.mark.slow
def test_a_crosscoder_finds_shared_and_local_features_and_their_sites():
    torch.manual_seed(0)
    sites, width, shared, local = 3, 16, 32, 8
    directions = F.normalize(torch.randn(shared + local, sites, width), dim=-1)
    home = torch.arange(local) % sites
    directions[shared:] *= F.one_hot(home, sites)[..., None]  # the last ones live at one site
    sae = build(
        "Crosscoder",
        width,
        4,
        {
            "latent_size": 64,
            "l1_coeff": 0.02,
            "decoder_bias": True,
            "free_norms": True,
            "sparsity_warmup": 0.0,
        },
    )
    adam = torch.optim.Adam(sae.parameters(), 3e-3)
    steps = 1500
    for step in range(steps):
        code = (torch.rand(512, shared + local) < 0.08) * (1 + torch.rand(512, shared + local))
        x = torch.einsum("nf,fld->nld", code, directions)
        for group in adam.param_groups:
            group["lr"] = 3e-3 * min(1, (1 - step / steps) / 0.2)
        p = sae.autoencode(x)
        adam.zero_grad()
        ((p.target - p.x_hat).square().mean() + sae.penalty(p)["L1"]).backward()
        adam.step()
        sae.after_step(p, (step + 1) / steps)
    found = torch.stack([decoder.weight.T for decoder in sae.decoder], dim=1)  # [F,L,D]
    cosine = F.normalize(directions.flatten(1), dim=1) @ F.normalize(found.flatten(1), dim=1).T
    assert cosine.max(1).values.mean() > 0.95
    best = cosine[shared:].argmax(1)
    norms = sae.decoder_norms()[:, best]
    assert (norms[home, torch.arange(local)] / norms.sum(0)).mean() > 0.95


def test_shallow_language_models_and_ranges_that_cannot_be():
    assert build("TopK", 8, 1, {"latent_size": 16, "k": 2}).sites() == [1]
    assert build(
        "MLSAE", 8, 3, {"latent_size": 16, "k": 2, "start_layer": 1, "end_layer": 4}
    ).sites() == [1, 2, 3]
    with pytest.raises(ValueError, match="at least 4"):
        build("MLSAE", 8, 3, {"latent_size": 16, "k": 2})
    with pytest.raises(ValueError, match="--start_layer 10 --end_layer 5;"):
        build("RouteSAE", 8, 2**10, {"latent_size": 16, "k": 2, "start_layer": 10, "end_layer": 5})
