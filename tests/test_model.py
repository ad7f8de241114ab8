"""What all models of the zoo have in common, then what is particular to each."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from src import device, model, ops, sparse
from src.draws import random_integers, random_subset
from src.formats import site_saes
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

N, D, LATENTS, BLOCKS = 50, 32, 64, 16
TOKEN_KEYS = torch.arange(N)
INFO = BatchInfo(token_keys=TOKEN_KEYS)
DECODE_FORMS = ("sums", "rows", "products")


@pytest.fixture
def hidden():
    """{site: states [N,D]}, not standardised."""
    generator = torch.Generator().manual_seed(1)
    return {site: torch.randn(N, D, generator=generator) * 2 + 1 for site in range(1, BLOCKS + 1)}


def make(name, recipe="standard", **options):
    """A model of the zoo with biases that are not 0."""
    torch.manual_seed(0)
    sizes = {"latent_size": LATENTS, "k": 4, "seed": 3}
    sae = build(name, D, BLOCKS, sizes | getattr(ZOO[name], recipe) | options)
    with torch.no_grad():
        for key, value in sae.named_parameters():
            if "bias" in key:
                value.add_(0.05 * torch.randn_like(value))
    return sae


def mean_l0(out):
    return float((out.latents != 0).float().sum(-1).mean())


def check_equal_gradients(outputs, expected_outputs, parameters):
    """Gradients of the sums of squares must be equal."""
    gradients = torch.autograd.grad(outputs.square().sum(), parameters)
    expected = torch.autograd.grad(expected_outputs.square().sum(), parameters)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------- all models


@pytest.mark.parametrize("name", ZOO)
def test_every_model_keeps_the_contract(name, hidden):
    sae = make(name)
    x = sae.gather(hidden)
    sae.warm_start(x)
    out = sae.autoencode(x, INFO)
    assert out.x_hat.shape == out.target.shape
    assert out.latents.shape[-1] == LATENTS
    assert sae.strength(out).shape == out.latents.shape
    sae.after_step(out, 0.5)
    sum(sae.loss(sae.autoencode(x, INFO)).values()).backward()
    for key, value in sae.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), key
        assert value.grad.abs().max() > 0, key
    unit_norm_decoder(sae)
    project_decoder_grad(sae)
    for decoder in sae.decoders():
        assert torch.allclose(decoder.weight.norm(dim=0), torch.ones(LATENTS))
        assert (decoder.weight.grad * decoder.weight).sum(0).abs().max() < 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_config_and_state_rebuild_every_model(name, hidden):
    sae = make(name)
    x = sae.gather(hidden)
    rebuilt = build(name, D, BLOCKS, sae.config)
    rebuilt.load_state_dict(sae.state_dict())
    assert torch.equal(rebuilt.autoencode(x, INFO).x_hat, sae.autoencode(x, INFO).x_hat)


@pytest.mark.parametrize("name", ZOO)
def test_infer_k_and_theta_mean_the_same_in_every_model(name, hidden):
    sae = make(name)
    x = sae.gather(hidden)

    def latents(**cut):
        return sae.autoencode(x, BatchInfo(token_keys=TOKEN_KEYS, **cut)).latents

    assert (latents(infer_k=2) != 0).sum(-1).max() <= 2
    kept = latents(theta=0.3)
    assert kept[kept != 0].min() > 0.3
    assert latents(theta=-1.0).min() >= 0
    with pytest.raises(ValueError, match="exclude each other"):
        latents(infer_k=2, theta=0.1)


# A Crosscoder's patches come from its decoders, not from autoencode().
@pytest.mark.parametrize("name", [name for name in ZOO if name != "Crosscoder"])
def test_a_perfect_reconstruction_leaves_the_residual_as_it_is(name, hidden, monkeypatch):
    sae = make(name)
    dictionary = getattr(sae, "sae", sae)

    def perfect(self, x, *_, **__):
        return SAEOutput(x, x.new_zeros(*x.shape[:-1], LATENTS), x)

    monkeypatch.setattr(type(dictionary), "autoencode", perfect)
    for patches in sae.patches(hidden, INFO):
        for site, patch in patches.items():
            assert torch.allclose(patch(hidden[site]), hidden[site], atol=1e-5)


def test_documented_tuples_and_errors():
    sae = TopK(8, 16, 2)
    latents, x_hat = sae(torch.randn(3, 5, 8))
    assert latents.shape == (3, 5, 16)
    assert x_hat.shape == (3, 5, 8)
    assert len(RouteSAE(8, 16, 16, 2)(torch.randn(3, 5, 9, 8))) == 5
    for too_large_or_unknown in (
        lambda: TopK(8, 16, 17),
        lambda: TopK(8, 16, 0),
        lambda: TopK(0, 16, 1),
        lambda: RouteSAE(8, 3, 16, 2),
        lambda: canonical("TopKK"),
    ):
        with pytest.raises(ValueError):
            too_large_or_unknown()
    assert canonical("Random") == "RandomK"


@pytest.mark.parametrize("n_blocks", [7, 11, 15, 16, 6])
def test_routed_sites_are_the_middle_half_of_any_depth(n_blocks):
    sites = model.routed_sites(n_blocks)
    assert sites == list(range(n_blocks // 4, 3 * n_blocks // 4 + 1))
    assert RouteSAE(8, n_blocks, 16, 2).n_routed_layers == len(sites)


def test_shallow_language_models_and_impossible_ranges_of_sites():
    sizes = {"latent_size": 16, "k": 2}
    assert build("TopK", 8, 1, sizes).sites() == [1]
    all_three = sizes | {"start_layer": 1, "end_layer": 4}
    assert build("MLSAE", 8, 3, all_three).sites() == [1, 2, 3]
    with pytest.raises(ValueError, match="at least 4"):
        build("MLSAE", 8, 3, sizes)
    with pytest.raises(ValueError, match="--start_layer 10 --end_layer 5;"):
        build("RouteSAE", 8, 2**10, sizes | {"start_layer": 10, "end_layer": 5})


# ----------------------------------------------------------------- centres and dead latents


def product_without_biases(dictionary, x):
    """W_enc x, summed over sites where there is an encoder for each."""
    if isinstance(dictionary.encoder, torch.nn.Linear):
        return dictionary.encoder(x)
    return sum(
        encoder(states) for encoder, states in zip(dictionary.encoder, x.unbind(1), strict=True)
    )


@pytest.mark.parametrize("b_pre_init", ["mean", "geom_median"])
@pytest.mark.parametrize("name", [name for name in ZOO if "b_pre_init" in ZOO[name].options])
def test_at_the_start_pre_activations_are_those_of_centred_states(name, b_pre_init, hidden):
    torch.manual_seed(0)
    sizes = {"latent_size": LATENTS, "k": 4, "b_pre_init": b_pre_init}
    sae = build(name, D, BLOCKS, sizes | ZOO[name].standard)
    offset = torch.linspace(0, 2, D)
    x = sae.gather({site: h + site * offset for site, h in hidden.items()})
    sae.warm_start(x)
    centre = x.mean(0)
    if b_pre_init == "geom_median":
        sites = x.view(N, -1, D).unbind(1)
        centre = torch.stack([ops.geometric_median(states) for states in sites]).view_as(centre)
    assert centre.abs().max() > 0.3
    dictionary = getattr(sae, "sae", sae)  # of a RouteSAE, its TopK
    expected = product_without_biases(dictionary, x - centre)
    assert (dictionary.pre_acts(x) - expected).abs().max() < 1e-6
    # A code of zeros is decoded to the centre.
    no_latents = torch.zeros(*x.shape[:-1], LATENTS)
    if name == "Crosscoder":
        no_latents = no_latents[:, 0]
    assert torch.equal(dictionary.decode(no_latents), centre.expand(x.shape))


REVIVED = [name for name in ZOO if "auxk_coeff" in ZOO[name].options]


@pytest.mark.parametrize("name", REVIVED)
def test_auxk_is_absent_without_dead_latents_and_trains_only_dead_ones(name, hidden):
    sae = make(name)
    x = sae.gather(hidden)
    dictionary = getattr(sae, "sae", sae)
    dictionary.auxk.dead_threshold.fill_(10)
    assert "AuxK" not in sae.penalty(sae.autoencode(x))
    dead = torch.arange(LATENTS) % 3 == 0
    dictionary.tokens_since_fired[dead] = 11
    sae.penalty(sae.autoencode(x))["AuxK"].backward()
    trained = 0
    for key, parameter in sae.named_parameters():
        if parameter.grad is not None and LATENTS in parameter.shape:
            by_latent = parameter.grad.movedim(parameter.shape.index(LATENTS), 0)
            assert not by_latent[~dead].any(), key
            trained += bool(by_latent[dead].any())
    assert trained >= 3  # encoder, decoder and a bias


def test_dead_latents_that_code_the_residual_leave_nothing_to_auxk(hidden):
    sae = make("Crosscoder")
    x = sae.gather(hidden)
    sae.auxk.dead_threshold.fill_(10)
    sae.tokens_since_fired[:] = 11
    out = sae.autoencode(x)
    # D / 2 of them code at one time; here they may add the residual of exactly these latents.
    weights = sae.dictionary_of(torch.arange(LATENTS))
    pre_acts = F.linear(x.flatten(1) - weights.pre_bias, weights.encoder)
    norms = weights.decoder.norm(dim=0)
    chosen = (pre_acts * norms).topk(D // 2).indices
    code = torch.zeros_like(pre_acts).scatter(1, chosen, pre_acts.relu().gather(1, chosen))
    by_dead = F.linear(code, weights.decoder).view_as(x)
    perfect = sae.penalty(out.replace(x_hat=x - by_dead))["AuxK"]
    assert perfect < 1e-8 < 1e-3 < sae.penalty(out)["AuxK"]


@pytest.mark.parametrize("name", ["Vanilla", "Gated", "Crosscoder"])
def test_a_bias_that_silences_a_latent_does_not_keep_auxk_from_it(name, hidden):
    sae = make(name)
    bias = sae.gate_bias if name == "Gated" else sae.latent_bias
    with torch.no_grad():
        bias.fill_(-100)
    sae.auxk.dead_threshold.fill_(10)
    sae.tokens_since_fired[:] = 11
    out = sae.autoencode(sae.gather(hidden))
    assert not out.fired.any()
    sae.penalty(out)["AuxK"].backward()
    assert (bias.grad != 0).float().mean() > 0.5


# ------------------------------------------------------------------------- k active latents


def test_topk_keeps_exactly_k_and_negative_values_only_without_relu(hidden):
    sae = make("TopK", k=40)
    x = sae.gather(hidden)
    latents = sae.autoencode(x).latents
    assert ((latents != 0).sum(-1) == 40).all()
    assert latents.min() < 0
    assert make("TopK", k=40, topk_relu=True).autoencode(x).latents.min() >= 0


def test_batchtopk_has_a_threshold_at_inference(hidden):
    sae = make("BatchTopK", k=4)
    x = sae.gather(hidden)
    out = sae.autoencode(x)
    l0 = (out.latents != 0).sum(-1)
    assert int(l0.sum()) == 4 * len(x)
    assert len(set(l0.tolist())) > 1
    sae.after_step(out, 0.5)
    sae.eval()
    latents = sae.autoencode(x).latents
    # With the threshold no token depends on the others.
    assert torch.allclose(sae.autoencode(x[:3]).latents, latents[:3], atol=1e-5)
    loaded = make("BatchTopK", k=4).eval()
    loaded.load_state_dict(sae.state_dict())
    assert torch.equal(loaded.autoencode(x).latents, latents)


def test_a_matryoshka_of_one_prefix_is_a_batchtopk_bit_for_bit(hidden):
    batchtopk = make("BatchTopK")
    x = batchtopk.gather(hidden)
    for widths, is_one in (([LATENTS], True), ([8, 24], False)):
        matryoshka = make("Matryoshka", matryoshka_widths=widths)
        results = []
        for sae in (batchtopk, matryoshka):
            sae.zero_grad()
            terms = sae.loss(sae.autoencode(x, INFO))
            sum(terms.values()).backward()
            results.append((terms, [p.grad.clone() for p in sae.parameters()]))
        (terms, gradients), (nested_terms, nested_gradients) = results
        assert torch.equal(terms["NormMSE"], nested_terms["NormMSE"])
        assert (terms.keys() == nested_terms.keys()) == is_one
        assert all(map(torch.equal, gradients, nested_gradients)) == is_one


def test_the_first_latents_of_a_matryoshka_learn_to_reconstruct_alone(hidden):
    sae = make("Matryoshka", matryoshka_widths=[8])
    x = sae.gather(hidden)
    out = sae.autoencode(x, INFO)
    first = out.latents.clone()
    first[:, 8:] = 0
    by_hand = ops.squared_errors(x, sae.decode(first)).mean()
    nested = sae.penalty(out)["Nested"]
    assert torch.isclose(nested, by_hand, rtol=1e-5)
    nested.backward()
    used = (sae.encoder.weight.grad != 0).any(1)
    assert used[:8].any() and not used[8:].any()
    assert make("Matryoshka").shorter_widths == [2, 6, 14, 30]
    with pytest.raises(ValueError, match="matryoshka_widths 65 with 64 latents"):
        make("Matryoshka", matryoshka_widths=[65])


@pytest.mark.parametrize(
    ("name", "options"),
    [("Matryoshka", {"matryoshka_widths": [8, 16]}), ("TopK", {"hierarchical_k": [3, 1]})],
)
def test_the_parts_of_a_nested_code_are_not_encoded_again(name, options, hidden, monkeypatch):
    sae = make(name, **options)
    out = sae.autoencode(sae.gather(hidden))

    def decoding_only(a, b):
        assert len(b) != sae.hidden_size, "encoded again"
        return torch.mm(a, b)

    monkeypatch.setattr(sparse.device, "matmul", decoding_only)
    assert sae.penalty(out)["Nested"] > 0


def test_a_hierarchical_topk_adds_the_errors_of_its_code_cut_to_fewer_latents(hidden):
    sae = make("TopK", hierarchical_k=[3, 1], topk_relu=True)
    x = sae.gather(hidden)
    out = sae.autoencode(x, INFO)
    cut = [sae.autoencode(x, BatchInfo(token_keys=TOKEN_KEYS, infer_k=k)).x_hat for k in (1, 3)]
    by_hand = sum(ops.squared_errors(x, x_hat).mean() for x_hat in cut)
    assert torch.isclose(sae.penalty(out)["Nested"], by_hand, rtol=1e-5)
    assert "Nested" not in make("TopK").penalty(out)
    with pytest.raises(ValueError, match="hierarchical_k 5 with k 4"):
        make("TopK", hierarchical_k=[5])


@pytest.mark.parametrize("name, options", [("RandomK", {}), ("RouteSAE", {"routing": "random"})])
def test_random_draws_do_not_depend_on_batching(name, options, hidden):
    sae = make(name, **options)
    x = sae.gather(hidden)
    all_tokens = sae.autoencode(x, INFO)
    later_tokens = sae.autoencode(x[20:], BatchInfo(token_keys=TOKEN_KEYS[20:]))
    assert torch.equal(all_tokens.latents[20:] != 0, later_tokens.latents != 0)


def test_random_subsets_are_distinct_and_uniform():
    subset = random_subset(torch.arange(4000), 7, 10, 3)
    assert all(len(set(row)) == 3 for row in subset.tolist())
    share = torch.bincount(subset.flatten(), minlength=10) / 4000
    assert (share - 0.3).abs().max() < 0.03


@pytest.mark.parametrize(("n", "k"), [(2048, 16), (100, 50), (64, 64), (64, 63), (3, 2), (1, 1)])
def test_a_random_subset_is_that_of_floyds_algorithm(n, k):
    keys = torch.arange(300)
    subsets = [[] for _ in keys]
    for i, top in enumerate(range(n - k, n)):
        drawn = random_integers(keys, 7, top + 1, i).tolist()
        for subset, number in zip(subsets, drawn, strict=True):
            subset.append(top if number in subset else number)
    assert random_subset(keys, 7, n, k).tolist() == subsets


@pytest.mark.parametrize("form", DECODE_FORMS)
@pytest.mark.parametrize(
    "name, options",
    [("TopK", {}), ("TopK", {"topk_relu": True}), ("BatchTopK", {}), ("RandomK", {})],
)
def test_sparse_codes_have_the_values_and_gradients_of_dense_ones(name, options, form, monkeypatch):
    monkeypatch.setattr(sparse, "decode_form", lambda ratio, x: form)
    torch.manual_seed(0)
    sae = build(name, 12, 16, {"latent_size": 64, "k": 3, "layer": 4} | options).double()
    with torch.no_grad():
        sae.pre_bias.normal_()
        sae.latent_bias.normal_()
    x = torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True)
    weight = torch.randn(2, 5, 12, dtype=torch.double)
    latents = sae.activate(F.linear(x - sae.pre_bias, sae.encoder.weight, sae.latent_bias))
    dense = SAEOutput(x, latents, F.linear(latents, sae.decoder.weight, sae.pre_bias))
    out = sae.autoencode(x)
    assert torch.allclose(out.latents, dense.latents, rtol=1e-12)
    assert torch.allclose(out.x_hat, dense.x_hat, rtol=1e-12)
    active_index = dense.latents.flatten().nonzero()[:, 0]
    assert torch.equal(out.code.flat_index.sort().values, active_index)
    assert torch.equal(sparse.firings(out.code), sparse.firings(dense.code))
    inputs = (x, *sae.parameters())
    gradients = torch.autograd.grad((out.x_hat * weight).sum(), inputs)
    expected = torch.autograd.grad((dense.x_hat * weight).sum(), inputs)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", DECODE_FORMS)
def test_a_code_without_active_latents_is_decoded(form, monkeypatch):
    monkeypatch.setattr(sparse, "decode_form", lambda ratio, x: form)
    sae = build("BatchTopK", 12, 16, {"latent_size": 64, "k": 3, "layer": 4}).eval()
    sae.cut.fill_(1e9)
    out = sae.autoencode(torch.randn(5, 12))
    assert torch.equal(out.x_hat, sae.pre_bias.expand(5, 12))
    assert not out.latents.any()
    assert not len(out.code.flat_index)
    out.x_hat.sum().backward()
    assert not sae.encoder.weight.grad.any()
    assert torch.equal(sae.pre_bias.grad, torch.full((12,), 5.0))


# -------------------------------------------------------------------------------- penalties


@pytest.mark.parametrize("gated_aux", [True, False])
def test_a_gate_learns_only_with_its_auxiliary_loss(gated_aux, hidden):
    sae = make("Gated", gated_aux=gated_aux, sparsity_warmup=0.0)
    sum(sae.loss(sae.autoencode(sae.gather(hidden))).values()).backward()
    gradient = sae.gate_bias.grad
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) == gated_aux


def test_the_auxiliary_loss_of_a_gate_leaves_the_decoder_alone(hidden):
    sae = make("Gated")
    sae.penalty(sae.autoencode(sae.gather(hidden)))["GateAux"].backward()
    assert sae.decoder.weight.grad is None or sae.decoder.weight.grad.abs().sum() == 0


def test_jumprelu_counts_pre_activations_and_keeps_thresholds_positive(hidden):
    sae = make("JumpReLU", sparsity_warmup=0.0)
    out = sae.autoencode(sae.gather(hidden))
    l0 = (out.pre_acts > sae.threshold).float().sum(-1).mean()
    assert torch.isclose(sae.penalty(out)["L0_penalty"], 1e-3 * l0)
    with torch.no_grad():
        sae.threshold.fill_(-1)
    sae.after_step(out, 1.0)
    assert sae.threshold.min() > 0


def test_threshold_gradients_equal_finite_differences_of_the_expected_loss():
    generator = torch.Generator().manual_seed(0)
    z = 0.3 + torch.randn(2_000_000, generator=generator, dtype=torch.float64)
    theta = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    Step_func.apply(z, theta, 0.1).mean().backward()
    density = torch.exp(torch.tensor(-0.5 * 0.7**2)) / (2 * torch.pi) ** 0.5  # of z at theta
    assert abs(theta.grad.item() + density.item()) < 0.01
    theta.grad = None
    ((z - Jump_func.apply(z, theta, 0.1)) ** 2).mean().backward()
    below, above = (((z - z * (z > threshold)) ** 2).mean() for threshold in (0.95, 1.05))
    assert abs(theta.grad.item() - (above - below).item() / 0.1) < 0.02


@pytest.mark.parametrize("saturation", [0.0, 0.05])
def test_l1_is_weighted_by_decoder_norms_so_that_rescaling_does_not_change_it(hidden, saturation):
    sae = make("Vanilla", sparsity_warmup=0.0, l1_saturation=saturation)
    x = sae.gather(hidden)
    before = sae.penalty(sae.autoencode(x))["L1"]
    with torch.no_grad():
        sae.decoder.weight *= 3
        sae.encoder.weight /= 3
        sae.latent_bias /= 3
    out = sae.autoencode(x)
    assert torch.isclose(sae.penalty(out)["L1"], before)
    strengths = out.latents * 3
    if saturation:
        highest = saturation * D**0.5
        strengths = highest * torch.tanh(strengths / highest)
    by_hand = 0.1 / D**0.5 * strengths.sum(-1).mean()
    assert torch.isclose(before, by_hand, rtol=1e-4)


def test_a_saturating_l1_is_l1_for_weak_latents_and_bounded_for_strong_ones():
    sae = make("Vanilla", sparsity_warmup=0.0, l1_saturation=0.05)
    latent_size = sae.latent_size
    weak, strong = (torch.full((1, latent_size), strength) for strength in (1e-4, 100.0))
    out = sae.autoencode(torch.randn(1, D))
    penalties = [sae.penalty(dataclasses.replace(out, code=z))["L1"].item() for z in (weak, strong)]
    coefficient, highest = 0.1 / D**0.5, 0.05 * D**0.5
    assert penalties[0] == pytest.approx(coefficient * latent_size * 1e-4, rel=1e-3)
    assert penalties[1] == pytest.approx(coefficient * latent_size * highest, rel=1e-5)


# direction 1: the code is too dense and the coefficient must rise; -1: it is too sparse.
@pytest.mark.parametrize("target_ratio, direction", [(0.1, 1), (10, -1)])
def test_target_l0_moves_the_coefficient_towards_its_target(hidden, target_ratio, direction):
    sae = make("Vanilla", sparsity_warmup=0.0)
    out = sae.autoencode(sae.gather(hidden))
    sae.sparsity.target_l0 = target_ratio * mean_l0(out)
    for step in range(1, 21):
        sae.after_step(out, 0.05 * step)
    lasting = direction * sae.sparsity.i_gain.log().item()
    total = direction * (sae.sparsity.coefficient() / sae.sparsity.base).log().item()
    assert 1 < lasting < total


@pytest.mark.parametrize("name, speed, drift", [("Vanilla", 40, 1), ("JumpReLU", 5, 0)])
def test_a_short_run_ends_at_its_target_l0_although_the_mean_weights_lag(name, speed, drift):
    control = make(name, target_l0=16.0, sparsity_warmup=0.0).sparsity
    control.base = 1.0
    steps = 123
    newest = mean = math.log(4)  # log(L0 / target) of the newest weights and of their mean
    for step in range(1, steps + 1):
        share = step / steps
        too_dear = math.log(float(control.coefficient())) + newest + drift * share
        newest -= speed / steps * math.tanh(too_dear)
        mean += 4 / (step + 3) * (newest - mean)
        control.update(torch.tensor(16 * math.exp(mean)), share)
    assert abs(math.exp(mean) - 1) < 0.05


def test_the_l0_of_a_crosscoder_that_answers_late_does_not_swing_in_a_short_run():
    control = make("Crosscoder", target_l0=16.0, sparsity_warmup=0.0).sparsity
    control.base = 1.0
    steps, delay = 74, 5
    log_l0, asked, seen = math.log(4), [0.0] * delay, []  # log_l0: of L0 / target
    for step in range(1, steps + 1):
        asked.append(math.log(float(control.coefficient())))
        log_l0 -= 0.4 * math.tanh(2 * asked[-1 - delay] + log_l0)
        control.update(torch.tensor(16 * math.exp(log_l0)), step / steps)
        seen.append(abs(log_l0))
    assert max(seen[steps // 2 :]) < 0.3  # with the approach of the other models .62


@pytest.mark.parametrize("name", ["Vanilla", "Gated", "Crosscoder"])
def test_with_a_target_all_latents_begin_equally_active(name, hidden):
    torch.manual_seed(0)
    options = {"latent_size": LATENTS, "target_l0": 2.0, "sparsity_warmup": 0.0}
    sae = build(name, D, BLOCKS, options | ZOO[name].standard)
    sae.warm_start(sae.gather(hidden))
    out = sae.autoencode(sae.gather(hidden))
    active = round(4 * 2.0 / LATENTS * N)  # tokens of each latent
    assert ((out.fired - active).abs() <= 1).all()
    dense = build(name, D, BLOCKS, options | ZOO[name].standard | {"start_l0": 0.0})
    dense.warm_start(dense.gather(hidden))
    assert mean_l0(dense.autoencode(dense.gather(hidden))) > 3 * mean_l0(out)


# ---------------------------------------------------------------------------- several sites


def test_the_published_objective_does_not_train_an_initial_router(hidden):
    torch.manual_seed(0)
    sae = build("RouteSAE", D, BLOCKS, {"latent_size": LATENTS, "k": 4}).double()
    sae.loss(sae.autoencode(sae.gather(hidden).double()))["NormMSE"].backward()
    assert sae.router.weight.grad.abs().max() < 1e-12
    assert sae.sae.encoder.weight.grad.abs().max() > 1e-12


def test_hard_routing_patches_each_token_at_its_own_site_as_it_was_trained(hidden):
    sae = make("RouteSAE", route_scale="p")
    out = sae.autoencode(sae.gather(hidden))
    site_index = out.weights.argmax(-1)
    (patches,) = sae.patches(hidden)
    for index, site in enumerate(sae.sites()):
        patched = patches[site](hidden[site])
        routed = site_index == index
        assert torch.equal(patched[~routed], hidden[site][~routed])
        expected = out.x_hat[routed] / out.scale[routed, None]
        _, mean, std = sae.standardise(hidden[site][routed])
        assert torch.allclose((patched[routed] - mean) / std, expected, atol=1e-4)
    (unscaled,) = make("RouteSAE", route_scale="p", route_patch="unscaled").patches(hidden)
    site = sae.sites()[int(site_index[0])]
    first_states = [run[site](hidden[site])[0] for run in (unscaled, patches)]
    assert not torch.allclose(*first_states, atol=1e-4)


def test_errors_of_soft_routing_add_up_to_that_of_the_mixture(hidden):
    sae = make("RouteSAE", routing="soft")
    x = sae.gather(hidden)
    out = sae.autoencode(x)
    error = out.x_hat - out.target
    mixture = (out.weights[..., None] * (x + error[:, None])).sum(1)
    assert torch.allclose(mixture, out.x_hat, atol=1e-5)


def test_a_routesae_takes_routed_sites_all_sites_or_all_with_the_embedding(hidden):
    sae = make("RouteSAE")
    states = [pre_process(hidden[site])[0] for site in range(1, BLOCKS + 1)]
    with_embedding = torch.stack([torch.zeros(N, D), *states], 1)
    routed = sae(with_embedding[:, 4:13])[3]
    assert torch.equal(sae(with_embedding)[3], routed)
    assert torch.equal(sae(with_embedding[:, 1:])[3], routed)
    with pytest.raises(ValueError, match="expected 9"):
        sae(with_embedding[:, :5])


def test_a_crosscoder_has_the_published_keys():
    sae = build("Crosscoder", D, 4, {"latent_size": 8})
    assert sorted(sae.state_dict())[-1] == "latent_bias"


def test_a_crosscoder_of_one_site_is_a_vanilla_sae(hidden):
    vanilla = make("Vanilla", layer=4)
    options = {"start_layer": 4, "end_layer": 5, "decoder_bias": True}
    crosscoder = build("Crosscoder", D, BLOCKS, {"latent_size": LATENTS} | options)
    with torch.no_grad():
        crosscoder.encoder[0].weight.copy_(vanilla.encoder.weight)
        crosscoder.decoder[0].weight.copy_(vanilla.decoder.weight)
        shift = vanilla.encoder.weight @ vanilla.pre_bias
        crosscoder.latent_bias.copy_(vanilla.latent_bias - shift)
        crosscoder.decoder_bias[0].copy_(vanilla.pre_bias)
    out = crosscoder.autoencode(crosscoder.gather(hidden))
    expected = vanilla.autoencode(vanilla.gather(hidden))
    assert torch.allclose(out.x_hat[:, 0], expected.x_hat, atol=1e-5)


def test_a_crosscoder_sums_over_its_encoders_and_decodes_to_each_site():
    torch.manual_seed(0)
    sae = build("Crosscoder", 12, 16, {"latent_size": 24, "decoder_bias": True}).double()
    x = torch.randn(2, 5, 9, 12, dtype=torch.double)
    by_site = [x[..., i, :] @ encoder.weight.T for i, encoder in enumerate(sae.encoder)]
    pre_acts = sum(by_site) + sae.latent_bias
    decoded = [F.relu(pre_acts) @ decoder.weight.T for decoder in sae.decoder]
    x_hat = torch.stack(decoded, -2) + sae.decoder_bias
    out = sae.autoencode(x)
    assert torch.allclose(out.pre_acts, pre_acts, rtol=1e-12)
    assert torch.allclose(out.x_hat, x_hat, rtol=1e-12)
    check_equal_gradients(out.x_hat, x_hat, list(sae.parameters()))


def test_an_mlsae_of_one_site_is_a_topk(hidden):
    topk = make("TopK", layer=4)
    mlsae = make("MLSAE", start_layer=4, end_layer=5)
    mlsae.load_state_dict(topk.state_dict() | {"pre_bias": topk.pre_bias[None]})
    out = mlsae.autoencode(mlsae.gather(hidden))
    expected = topk.autoencode(topk.gather(hidden))
    assert torch.allclose(out.x_hat[:, 0], expected.x_hat, atol=1e-6)


def test_a_patch_of_one_site_codes_its_states_with_the_bias_of_that_site(hidden):
    sae = make("MLSAE")
    with torch.no_grad():
        sae.pre_bias.normal_()
    clean = sae.autoencode(sae.gather(hidden))
    for known, coded in zip(sae.patches(hidden, clean=clean), sae.patches(hidden), strict=True):
        ((site, patch),) = coded.items()
        assert torch.allclose(patch(hidden[site]), known[site](hidden[site]), atol=1e-5)


@pytest.mark.parametrize("name", ["MLSAE", "RouteSAE"])
def test_the_standard_form_of_a_site_has_its_bias_and_gives_the_same_code(name, hidden):
    sae = make(name, topk_relu=True)
    dictionary = getattr(sae, "sae", sae)
    with torch.no_grad():
        dictionary.pre_bias.normal_()
    for index, (site, site_sae) in enumerate(site_saes(sae).items()):  # it compares the codes too
        assert torch.equal(site_sae.b_dec, dictionary.pre_bias[index])
        x = sae.standardise(hidden[site])[0]
        own = dictionary.encode(x, bias=dictionary.pre_bias[index])
        assert torch.allclose(site_sae.encode(hidden[site]), own, atol=1e-5)


# --------------------------------------------------------------------------------- functions


@pytest.mark.parametrize(
    "n, f, k", [(50, 256, 16), (50, 256, 17), (9, 250, 4), (0, 64, 2), (3, 8, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_indices_are_right_in_one_stage_and_in_two(n, f, k, dtype):
    torch.manual_seed(0)
    values = torch.randn(n, f).to(dtype)
    with_ties = torch.cat([values[: n // 2].round(), values[n // 2 :]])
    for rows in (values, with_ties):
        indices = ops.topk_indices(rows, k)
        assert indices.shape == (n, k)
        assert all(len(set(row)) == k for row in indices.tolist())
        largest = rows.topk(k).values.sort(1).values
        assert torch.equal(rows.gather(1, indices).sort(1).values, largest)


@pytest.mark.skipif(not device.fast_bfloat16(), reason="this CPU has no fast bfloat16")
def test_training_rounds_pre_activations_to_bfloat16_and_gradients_are_those_of_the_rounded_code():
    torch.manual_seed(0)
    sae = build("TopK", 64, 16, {"latent_size": 512, "k": 8, "layer": 4})
    x = torch.randn(100, 64)
    with device.bf16_matmuls():
        out = sae.autoencode(x)
    exact = sae.autoencode(x)
    difference = (out.x_hat - exact.x_hat).norm() / exact.x_hat.norm()
    assert 0 < difference < 0.1
    assert not torch.equal(out.latents, exact.latents)  # some tokens choose another latent
    x_hat = F.linear(out.latents, sae.decoder.weight, sae.pre_bias)
    assert torch.allclose(out.x_hat, x_hat, atol=1e-5)
    weight = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((out.x_hat * weight).sum(), sae.encoder.weight)
    by_pre_acts = (weight @ sae.decoder.weight) * (out.latents != 0)
    assert torch.allclose(gradient, by_pre_acts.T @ (x - sae.pre_bias), atol=1e-4)


def test_the_precision_of_products_is_put_back_after_a_step_also_after_one_that_fails():
    before = torch.get_float32_matmul_precision()
    within = before if torch.cuda.is_available() else "medium"
    with pytest.raises(KeyError), device.bf16_matmuls():
        with device.bf16_matmuls():
            assert torch.get_float32_matmul_precision() == within
        assert torch.get_float32_matmul_precision() == within
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_a_bias_in_bfloat16_factors_is_as_exact_as_float32():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 16), torch.randn(7, 16), torch.randn(7)
    a, b = device.affine_factors(x, weight, bias)
    assert a.dtype == b.dtype == torch.bfloat16
    a, b = a.float(), b.float()
    assert torch.allclose(a @ b.T, a[:, :16] @ b[:, :16].T + bias, atol=1e-6)
    assert torch.allclose(a[:, :16], x, rtol=2**-8)
    assert not torch.equal(a[:, :16], x)


@pytest.mark.parametrize("missing", ["", "shift", "bias"])
def test_linear_has_the_values_and_gradients_of_autograd(missing):
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.double, requires_grad=True)

    x, weight = random(2, 5, 12), random(7, 12)
    shift = None if missing == "shift" else random(12)
    bias = None if missing == "bias" else random(7)
    y = ops.linear(x, weight, bias, shift)
    expected = F.linear(x if shift is None else x - shift, weight, bias)
    assert torch.allclose(y, expected, rtol=1e-12)
    inputs = [tensor for tensor in (x, weight, shift, bias) if tensor is not None]
    check_equal_gradients(y, expected, inputs)


def test_functions_on_small_numbers():
    x = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    assert topk_sparsify(x, 2).tolist() == [[3.0, 0.0, 2.0, 0.0]]
    rows, latents, values = active(topk_sparsify(x, 2))
    assert rows.tolist() == [0, 0]
    assert latents.tolist() == [0, 2]
    assert values.tolist() == [3.0, 2.0]
    with pytest.warns(UserWarning, match="all are kept"):
        assert apply_inference_cut(x, infer_k=9).tolist() == x.tolist()


def test_states_in_bfloat16_are_standardised_in_float32():
    states, _, _ = pre_process(torch.randn(5, 16).bfloat16() * 100 + 7)
    assert states.dtype == torch.float32
    assert torch.allclose(states.square().sum(-1), torch.tensor(15.0), atol=1e-3)


def test_a_decoder_column_of_zeros_stays_finite():
    sae = TopK(4, 8, 1)
    with torch.no_grad():
        sae.decoder.weight[:, 0] = 0
    unit_norm_decoder(sae)
    assert sae.decoder.weight.isfinite().all()


# ---------------------------------------------------------------------- planted dictionaries


def separated_directions(n, width):
    """Unit vectors [n,width] that lie far from each other, so that recovery is well defined."""
    directions = torch.nn.Parameter(F.normalize(torch.randn(n, width), dim=1))
    optimizer = torch.optim.Adam([directions], 0.01)
    for _ in range(500):
        unit = F.normalize(directions, dim=1)
        optimizer.zero_grad()
        (unit @ unit.T).fill_diagonal_(0).pow(8).sum().backward()
        optimizer.step()
    return F.normalize(directions.detach(), dim=1)


def train_on_planted(sae, sample, loss_of, after, steps=1500):
    """Adam with a decay over the last fifth. Returns the last (input, output)."""
    optimizer = torch.optim.Adam(sae.parameters(), 3e-3)
    for step in range(steps):
        x = sample()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (1 - step / steps) / 0.2)
        out = sae.autoencode(x)
        optimizer.zero_grad()
        loss_of(out).backward()
        optimizer.step()
        sae.after_step(out, (step + 1) / steps)
        after()
    return x, out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,options",
    [
        ("TopK", {"k": 3}),
        ("BatchTopK", {"k": 3}),
        ("Matryoshka", {"k": 3}),
        ("Vanilla", {"l1_coeff": 0.05}),
        ("Gated", {"l1_coeff": 0.1}),
        ("JumpReLU", {"l1_coeff": 0.025, "threshold": 0.1, "bandwidth": 0.1}),
    ],
)
def test_a_known_dictionary_is_recovered(name, options):
    torch.manual_seed(0)
    directions = separated_directions(48, 24)
    sae = build(name, 24, 16, {"latent_size": 64, "sparsity_warmup": 0.0} | options)

    def sample():
        chosen = torch.rand(1024, 48).topk(3, dim=1).indices
        code = torch.zeros(1024, 48).scatter(1, chosen, 1 + torch.rand(1024, 3))
        x = code @ directions
        return x * (24 / x.square().sum(1).mean()) ** 0.5

    x, out = train_on_planted(
        sae, sample, lambda out: sum(sae.loss(out).values()), lambda: unit_norm_decoder(sae)
    )
    cosine = F.normalize(sae.decoder.weight, dim=0).T @ directions.T
    assert cosine.abs().max(0).values.mean() > 0.95
    assert mean_l0(out) < 8
    if "k" in options:  # at inference BatchTopK has a threshold in place of k
        assert abs(mean_l0(sae.eval().autoencode(x)) - options["k"]) < 0.2


@pytest.mark.slow
def test_a_crosscoder_finds_shared_and_local_features_and_their_sites():
    torch.manual_seed(0)
    n_sites, width, n_shared, n_local = 3, 16, 32, 8
    n_features = n_shared + n_local
    directions = F.normalize(torch.randn(n_features, n_sites, width), dim=-1)
    site_of_local = torch.arange(n_local) % n_sites
    directions[n_shared:] *= F.one_hot(site_of_local, n_sites)[..., None]
    options = {
        "latent_size": 64,
        "l1_coeff": 0.02,
        "decoder_bias": True,
        "free_norms": True,
        "sparsity_warmup": 0.0,
    }
    sae = build("Crosscoder", width, 4, options)

    def sample():
        is_active = torch.rand(512, n_features) < 0.08
        code = is_active * (1 + torch.rand(512, n_features))
        return torch.einsum("nf,fld->nld", code, directions)

    def loss_of(out):
        return (out.target - out.x_hat).square().mean() + sae.penalty(out)["L1"]

    train_on_planted(sae, sample, loss_of, lambda: None)
    learned = torch.stack([decoder.weight.T for decoder in sae.decoder], dim=1)  # [F,L,D]
    cosine = F.normalize(directions.flatten(1), dim=1) @ F.normalize(learned.flatten(1), dim=1).T
    assert cosine.max(1).values.mean() > 0.95
    latent_of_local = cosine[n_shared:].argmax(1)
    norms = sae.decoder_norms()[:, latent_of_local]
    share_at_site = norms[site_of_local, torch.arange(n_local)] / norms.sum(0)
    assert share_at_site.mean() > 0.95


@pytest.mark.parametrize("name", ["RouteSAE", "MLSAE", "Crosscoder"])
def test_a_list_of_sites_takes_the_place_of_a_range(name):
    sae = build(name, D, 30, {"latent_size": 64, "k": 4, "sites": [23, 7, 11, 7]})
    assert sae.sites() == [7, 11, 23] and sae.config["sites"] == [23, 7, 11, 7]
    states = {site: torch.randn(6, D) for site in sae.sites()}
    patched = {site for run in sae.patches(states) for site in run}
    assert patched <= {7, 11, 23} and patched
    with pytest.raises(ValueError, match="--sites 31; sites of this model run from 1 to 30"):
        build(name, D, 30, {"latent_size": 64, "k": 4, "sites": [31]})
    with pytest.raises(ValueError, match="exclude each other"):
        build(name, D, 30, {"latent_size": 64, "k": 4, "sites": [7], "start_layer": 4})


def test_the_documented_form_takes_its_listed_sites_out_of_all_states():
    torch.manual_seed(0)
    sae = build("RouteSAE", D, 12, {"latent_size": 64, "k": 4, "sites": [3, 5, 9]})
    states = torch.randn(2, 6, 13, D)  # the embedding and all twelve sites
    for part in (states, states[..., 1:, :]):
        assert torch.equal(sae(part)[1], sae(states[..., [3, 5, 9], :])[1])
