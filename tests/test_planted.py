"""The planted benchmark: its worlds, its measures, and the complete command on a tiny world."""

import itertools

import numpy as np
import pytest
import torch

from experiments import planted
from src.model import build
from src.zoo import ZOO


@pytest.fixture
def world():
    return planted.World(n_sites=4, width=24, n_features=60, seed=0)


def test_a_child_fires_only_with_its_parent_and_never_beside_a_sibling(world):
    fires = world.sample(2000).fires
    children = (world.parent >= 0).nonzero()[:, 0]
    assert len(children) == 36
    for child in children.tolist():
        parent = fires[:, world.parent[child]]
        assert fires[:, child].any() and not (fires[:, child] & ~parent).any()
    siblings = fires[:, children].view(2000, -1, planted.BRANCHES)
    assert siblings.sum(-1).max() == 1
    rate = siblings.any(-1).sum() / fires[:, world.parent[children[:: planted.BRANCHES]]].sum()
    assert abs(float(rate) - planted.CHILD_RATE) < 0.05


def test_features_live_where_they_are_present_and_rotate_or_stay(world):
    assert world.present.any(0).all() and not world.present.all()
    children = (world.parent >= 0).nonzero()[:, 0]
    assert not (world.present[:, children] & ~world.present[:, world.parent[children]]).any()
    assert torch.allclose(world.directions.norm(dim=-1), torch.ones(4, 60))
    turned = (world.directions[0] * world.directions[3]).sum(-1)
    kept = turned > 0.999
    assert kept.any() and (~kept).any()
    assert torch.allclose(turned[~kept], torch.tensor(3 * planted.ROTATION).cos(), atol=1e-4)


def test_the_matching_is_the_best_of_all():
    generator = np.random.default_rng(0)
    for shape in ((5, 5), (4, 6), (6, 4)):
        similarity = generator.random(shape).round(1)  # with ties
        rows, columns = planted.match(similarity)
        assert len(set(rows)) == len(set(columns)) == min(shape)
        wide = similarity if shape[0] <= shape[1] else similarity.T
        best = max(
            sum(wide[i, j] for i, j in enumerate(chosen))
            for chosen in itertools.permutations(range(wide.shape[1]), wide.shape[0])
        )
        assert similarity[rows, columns].sum() == pytest.approx(best)


def planted_sae(world, site):
    """A TopK that has the planted features of a site as its dictionary."""
    sae = build("TopK", 24, 4, {"latent_size": 60, "k": 4, "layer": site, "topk_relu": True}).eval()
    directions = world.directions[site - 1]
    directions = directions - directions.mean(-1, keepdim=True)
    with torch.no_grad():
        sae.decoder.weight.copy_(directions.T)
        sae.encoder.weight.copy_(directions)
    return sae


def test_an_sae_of_the_planted_features_scores_1_and_shuffled_latents_score_less(world):
    world.present.fill_(True)
    sae = planted_sae(world, 2)
    perfect = planted.measure(sae, world)
    assert perfect["MCC"] == pytest.approx(1, abs=1e-3) and perfect["uniqueness"] == 1
    with torch.no_grad():
        sae.encoder.weight.copy_(sae.encoder.weight.roll(1, 0))
    shuffled = planted.measure(sae, world)
    assert shuffled["MCC"] == pytest.approx(1, abs=1e-3)
    assert shuffled["F1"] < perfect["F1"] / 2
    with torch.no_grad():
        sae.decoder.weight.normal_()
    assert planted.measure(sae, world)["MCC"] < 0.8


def test_sites_of_latents_are_compared_with_those_of_their_features():
    present = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    rates = torch.tensor([[0.4, 0.0], [0.3, 0.1], [0.0, 0.1]])
    assert planted._places(rates, present) == {"birth": 1.0, "span": 1.0}
    rates = torch.tensor([[0.4, 0.1], [0.1, 0.1], [0.0, 0.1]])
    assert planted._places(rates, present) == {
        "birth": 0.5,
        "span": pytest.approx((1 / 2 + 2 / 3) / 2),
    }


def test_the_command_measures_every_model_and_orders_its_table(tmp_path):
    argv = "--sites 3 --width 16 --latents 32 --k 3 --samples 3072 --level easy --out".split()
    results = planted.main([*argv, str(tmp_path / "planted")])
    several = {"RouteSAE", "RouteSAE, oracle sites", "MLSAE", "Crosscoder"}
    assert {result["model"] for result in results} == {*ZOO, *several}
    for result in results:
        assert 0 <= result["F1"] <= 1 and 0 < result["MCC"] <= 1
        assert ("span" in result) == (result["model"] in several)
    lines = (tmp_path / "planted.md").read_text().splitlines()
    scores = [float(line.split("|")[2]) for line in lines[2:]]
    assert len(scores) == len(results) and scores == sorted(scores, reverse=True)
