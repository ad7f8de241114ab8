"""Unions of trained SAEs of one site each: whose site a token gets, and what that measures."""

# ruff: noqa: F811  (the fixture `text` is imported)

import pytest
import torch

from src.files import load_json
from src.model import build
from src.ops import squared_errors
from src.sae import BatchInfo
from src.union import assemble
from tests.test_stages import evaluate, sae_path, text, train  # noqa: F401

N, D, BLOCKS, SITES = 50, 24, 20, list(range(3, 19))  # sixteen sites
SIZES = {"latent_size": 32, "k": 3}


def trained(name="TopK", **options):
    """(SAE, recipe) as checkpoint.load gives them, with biases that differ between sites."""
    sae = build(name, D, BLOCKS, SIZES | options).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    where = f"_layer{options['layer']}" if "layer" in options else ""
    return sae, {"title": f"{name}_text{where}_small"}


@pytest.fixture
def members():
    torch.manual_seed(0)
    return [trained(layer=site) for site in SITES]


@pytest.fixture
def hidden():
    torch.manual_seed(1)
    return {site: 3 * torch.randn(N, D) + site for site in SITES}


def test_the_union_of_one_sae_is_that_sae(members, hidden):
    sae, _ = members[4]
    union, recipe = assemble(members[4:5], "oracle")
    assert recipe["title"] == "Union_1x32_TopK_text_small_sites7-7_oracle"
    own, joined = (each.autoencode(each.gather(hidden)) for each in (sae, union))
    assert torch.equal(own.latents, joined.latents) and torch.equal(own.x_hat, joined.x_hat)
    (patches,), (expected,) = union.patches(hidden), sae.patches(hidden)
    assert torch.equal(patches[7](hidden[7]), expected[7](hidden[7]))


def test_a_router_gives_each_token_the_sae_of_its_site(members, hidden):
    by = trained("RouteSAE", sites=SITES)
    union, recipe = assemble(members[::-1], "some/path.pt", by)
    assert recipe["title"] == "Union_16x32_TopK_text_small_sites3-18_RouteSAE"
    x = union.gather(hidden)
    site = by[0].router(x).argmax(-1)
    out = union.autoencode(x)
    assert len(site.unique()) > 3 and torch.equal(union.code_sites(out), site)
    for token, index in enumerate(site.tolist()):
        expected = members[index][0].autoencode(x[token, index][None])
        assert torch.allclose(out.x_hat[token], expected.x_hat[0], atol=1e-6)
        own = slice(32 * index, 32 * index + 32)
        assert torch.allclose(out.latents[token, own], expected.latents[0], atol=1e-6)
        assert out.latents[token].count_nonzero() == 3
    assert torch.allclose(
        union.contribution(out.latents)[0] + members[site[0]][0].pre_bias, out.x_hat[0], atol=1e-5
    )


def test_the_oracle_gives_the_site_of_least_error_and_counts_its_encoders(members, hidden):
    union, _ = assemble(members, "oracle")
    x = union.gather(hidden)
    errors = torch.stack(
        [
            squared_errors(x[:, i], sae.autoencode(x[:, i]).x_hat)
            for i, (sae, _) in enumerate(members)
        ],
        1,
    )
    out = union.autoencode(x)
    assert torch.allclose(squared_errors(out.target, out.x_hat), errors.min(1).values)
    assert union.encoders_per_token == 16 and members[0][0].encoders_per_token == 1
    assert assemble(members, "random")[0].encoders_per_token == 1


def test_random_sites_are_those_of_a_randomly_routed_sae_and_repeat(members, hidden):
    keys = BatchInfo(token_keys=torch.arange(N) * 7)
    shares = [float(i % 3) for i in range(16)]
    for given in (None, shares):
        chosen = []
        for _ in range(2):
            union, recipe = assemble(members, "random", shares=given, seed=5)
            x = union.gather(hidden)
            chosen.append(union.code_sites(union.autoencode(x, keys)))
        routed, _ = trained("RouteSAE", sites=SITES, routing="random", route_shares=given, seed=5)
        assert torch.equal(*chosen)
        assert torch.equal(chosen[0], routed.code_sites(routed.autoencode(x, keys)))
    assert "random-shares" in recipe["title"] and recipe["union"]["shares"] == shares


def test_a_patch_replaces_the_tokens_of_its_site_alone_with_their_keys(hidden):
    torch.manual_seed(0)
    members = [trained("RandomK", layer=site, seed=3) for site in SITES]
    union, _ = assemble(members, "random")
    keys = BatchInfo(token_keys=torch.arange(N) * 7)
    out = union.autoencode(union.gather(hidden), keys)
    site = union.code_sites(out)
    (patches,) = union.patches(hidden, keys, clean=out)
    for index, at in enumerate(SITES):
        mean, std = hidden[at].mean(-1, keepdim=True), hidden[at].std(-1, keepdim=True)
        expected = torch.where(
            (site == index)[:, None], out.x_hat * (std + 1e-5) + mean, hidden[at]
        )
        patched = patches[at](hidden[at]) if at in patches else hidden[at]
        assert torch.allclose(patched, expected, atol=1e-4)


def test_what_cannot_be_joined_is_one_clear_line(members):
    by = trained("RouteSAE", sites=SITES[1:])
    cases = [
        ([trained("MLSAE", sites=SITES)], "oracle", None, "reads sites 3 to 18"),
        ([members[0], members[0]], "oracle", None, "both at site 3"),
        ([members[0], trained(layer=4, input_norm="none")], "oracle", None, "input_norm"),
        (members, "a.pt", by, "between sites 4 to 18"),
        (members, "a.pt", trained(layer=3), "no trained router"),
        (members, "a.pt", trained("RouteSAE", sites=SITES, routing="random"), "no trained router"),
    ]
    for saes, assign, router_of, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            assemble(saes, assign, router_of)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="3 numbers for 16"):
        assemble(members, "random", shares=[1, 2, 3])


def test_unions_are_measured_with_every_metric_beside_the_router_they_use(text, tmp_path):
    train(
        text,
        tmp_path,
        "--model",
        "TopK",
        "RouteSAE",
        "--layer",
        "5",
        "8",
        "11",
        "--sites",
        "5",
        "8",
        "11",
    )
    paths = [str(sae_path(tmp_path, f"TopK_text_layer{site}")) for site in (5, 8, 11)]
    routed = str(sae_path(tmp_path, "RouteSAE_text_sites5-8-11"))
    argv = ["--SAE_path", routed, "--union", *paths, "--assign", routed, "oracle", "random"]
    results = evaluate(tmp_path, *argv, "--metric", "all")
    prefix = "Union_3x64_TopK_text_sites5-11"
    by = {how: results[f"{prefix}_{how}"] for how in ("RouteSAE", "oracle", "random")}
    by_router, oracle, drawn = by.values()
    assert by_router["Routing"]["share"] == results["RouteSAE_text_sites5-8-11"]["Routing"]["share"]
    errors = oracle["Routing"]["NormMSE_unscaled_if_all_went_there"]
    assert oracle["NormMSE"] < min(errors) and oracle["Routing"]["regret_unscaled"] == 0
    # The errors of the sites alone are those of their own SAEs.
    alone = evaluate(tmp_path, "--SAE_path", *paths, "--metric", "NormMSE")
    assert errors == pytest.approx([alone[f"TopK_text_layer{n}"]["NormMSE"] for n in (5, 8, 11)])
    assert [result["encoders_per_token"] for result in by.values()] == [1, 3, 1]
    for result in by.values():
        assert {"KLDiv", "DeltaCE", "Recovered_mean", "L0", "Dead"} <= result.keys()
        assert result["model"] == "Union" and result["sites"] == [5, 8, 11]
        assert result["L0"] == 4
    again = evaluate(tmp_path, *argv, "--metric", "NormMSE")
    assert again[f"{prefix}_random"]["NormMSE"] == drawn["NormMSE"]
    # Other shares are another measurement, which replaces none.
    for shares in (["1", "1", "2"], ["1", "2", "1"]):
        evaluate(tmp_path, *argv[2:], "--route_shares", *shares, "--assign", "random")
    kept = [
        load_json(path)["union"]["shares"]
        for path in (tmp_path / "out" / "eval").glob("Union*random*.json")
    ]
    assert sorted(map(str, kept)) == ["None", "[1.0, 1.0, 2.0]", "[1.0, 2.0, 1.0]"]


def test_assign_needs_a_union(text, tmp_path):
    with pytest.raises(ValueError, match="name these too"):
        evaluate(tmp_path, "--assign", "oracle")
