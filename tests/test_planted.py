"""The planted benchmark: its worlds, its measures, its door to train.py, the complete command."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import dynamic_module_utils

from experiments import planted, planted_model, planted_world
from experiments.planted_world import Level, World
from src import checkpoint, config
from src.model import build
from src.trainer import Trainer
from src.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
SMALL = Level(width=24, n_features=128, latents=32, k=3, n_sites=4)


@pytest.fixture(scope="module")
def world():
    return World(SMALL, seed=0)


def draw(world, n):
    return world.sample(n, torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------- worlds


def test_a_child_fires_only_with_its_parent_in_proportion_and_never_beside_a_sibling(world):
    values = draw(world, 20_000).values
    children = (world.parent >= 0).nonzero()[:, 0]
    assert len(children) == 4 + 16 + 64
    fires = values > 0
    assert not (fires[:, children] & ~fires[:, world.parent[children]]).any()
    siblings = fires[:, children].view(len(fires), -1, planted_world.BRANCHES)
    assert siblings.sum(-1).max() == 1
    both = fires[:, 1]
    pair = torch.stack([values[both, 0], values[both, 1]])
    assert torch.corrcoef(pair)[0, 1] > 0.2


def test_features_fire_as_often_as_planned_down_to_children_of_rare_parents(world):
    rates = draw(world, 20_000).fires.float().mean(0)
    planned = planted_world.planned_rates(SMALL.n_features)
    assert planned[0] == pytest.approx(0.4) and planned[-1] == pytest.approx(5e-4)
    free = slice(1 + 4 + 16 + 64, None)
    assert torch.allclose(rates[free].mean(), planned[free].mean(), rtol=0.2)
    assert rates[0] == pytest.approx(0.4, abs=0.02)


def test_features_live_where_they_are_present_and_rotate_or_stay(world):
    assert world.present.any(0).all() and not world.present.all()
    children = (world.parent >= 0).nonzero()[:, 0]
    assert not (world.present[:, children] & ~world.present[:, world.parent[children]]).any()
    assert torch.allclose(world.directions.norm(dim=-1), torch.ones(4, SMALL.n_features))
    turned = (world.directions[0] * world.directions[1]).sum(-1)
    kept = turned > 0.9999
    assert kept.any() and (~kept).any()
    angle = torch.tensor(planted_world.SEVERAL_SITES.angle)
    assert torch.allclose(turned[~kept], angle.cos(), atol=1e-4)


def test_a_state_is_the_sum_of_the_features_that_live_at_its_site(world):
    samples = draw(world, 50)
    for site, states in samples.hidden.items():
        alive = samples.values * world.present[site - 1]
        expected = alive @ world.directions[site - 1] + world.offset[site - 1]
        assert torch.allclose(states, expected * world.norms[site - 1], atol=1e-3)
    share = world.alive(samples.values)
    sample = int(samples.fires.sum(1).argmax())
    active = samples.fires[sample]
    assert torch.allclose(share[sample], world.present[:, active].float().mean(1))


def test_one_site_has_all_features():
    world = World(SMALL._replace(n_sites=1), seed=0)
    assert world.present.all()
    assert draw(world, 100).hidden[1].std(0).min() > 0.1


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    first, again, other = (World(SMALL, seed) for seed in (5, 5, 6))
    assert torch.equal(first.directions, again.directions)
    assert torch.equal(first.sample(20).values, again.sample(20).values)
    assert not torch.equal(first.present, other.present)


# ------------------------------------------------------------------------------------- measures


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


def planted_sae(world, site, first=0):
    """A TopK whose dictionary are planted features as they are at a site; one that reads none."""
    size = world.level.latents
    sae = build("TopK", world.level.width, world.n_sites, {"latent_size": size, "k": 3,
                "layer": site, "topk_relu": True}).eval()  # fmt: skip
    directions = world.directions[site - 1, first : first + size]
    directions = directions - directions.mean(-1, keepdim=True)
    with torch.no_grad():
        sae.decoder.weight.copy_(directions.T)
        sae.encoder.weight.copy_(directions)
    return sae


def test_one_site_scores_as_the_published_definitions_say_on_an_example_by_hand():
    """Three features, two latents: both are nearest to feature 0, and one never fires."""
    world = World(Level(width=3, n_features=3, latents=2, k=1), seed=0)
    world.directions = torch.eye(3)[None]
    world.present = torch.ones(1, 3, dtype=torch.bool)
    world.parent = torch.tensor([-1, -1, -1])
    sae = build("Vanilla", 3, 1, {"latent_size": 2, "input_norm": "none"}).eval()
    with torch.no_grad():
        sae.decoder.weight.copy_(torch.tensor([[1.0, 0.8], [0.0, 0.6], [0.0, 0.0]]))
        sae.encoder.weight.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
        for bias in (sae.pre_bias, sae.latent_bias):
            bias.zero_()
    values = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 1.0], [0, 0, 1.0]])
    samples = planted_world.Samples(values, {1: values})
    result = planted.measure(sae, world, samples)
    # Latent 0 fires on samples 0, 1, 2; feature 0 on 0 and 2: precision 2/3, recall 1, F1 0.8.
    assert result["precision"] == pytest.approx(1 / 3)
    assert result["recall"] == pytest.approx(1 / 2)
    assert result["F1"] == pytest.approx(0.4)
    assert result["uniqueness"] == 0.5 and result["dead"] == 0.5 and result["L0"] == 0.75
    # The best pairs are latent 0 with feature 0, and latent 1 with feature 1.
    assert result["MCC"] == pytest.approx((1 + 0.6) / 2)
    assert result["free"] == pytest.approx(1 / 3)  # only feature 0 has a cosine from 0.7


def test_each_measure_falls_when_what_it_measures_is_broken():
    world = World(SMALL, seed=0)
    world.present.fill_(True)
    samples = draw(world, 4000)
    sae = planted_sae(world, 2)
    good = planted.measure(sae, world, samples)
    shuffled = samples._replace(values=samples.values[torch.randperm(len(samples.values))])
    chance = planted.measure(sae, world, shuffled)
    assert chance["F1"] < good["F1"] / 2 and chance["precision"] < good["precision"] / 2
    assert chance["MCC"] == good["MCC"]
    with torch.no_grad():
        sae.decoder.weight.copy_(sae.decoder.weight[:, :1].expand(-1, 32))
    one_feature = planted.measure(sae, world, samples)
    assert one_feature["uniqueness"] == 1 / 32 and good["uniqueness"] > 0.7
    with torch.no_grad():
        sae.decoder.weight.normal_()
    random = planted.measure(sae, world, samples)
    assert random["MCC"] < good["MCC"] - 0.2 and random["found"] < good["found"] / 2


def test_sites_of_latents_are_compared_with_those_of_their_features():
    present = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    rates = torch.tensor([[0.4, 0.0], [0.3, 0.1], [0.0, 0.1]])
    assert planted.places(rates, present) == {"birth": 1.0, "span": 1.0}
    rates = torch.tensor([[0.4, 0.1], [0.1, 0.1], [0.0, 0.1]])
    assert planted.places(rates, present) == {
        "birth": 0.5,
        "span": pytest.approx((1 / 2 + 2 / 3) / 2),
    }
    silent = torch.zeros(3, 2)
    assert planted.places(silent, present) == {"birth": 0.0, "span": 0.0}


def test_shuffled_lives_lower_birth_and_span_to_chance(world):
    rates = world.present.float()
    assert planted.places(rates, world.present) == {"birth": 1.0, "span": 1.0}
    order = torch.randperm(rates.shape[1], generator=torch.Generator().manual_seed(0))
    chance = planted.places(rates[:, order], world.present)
    first = world.present.int().argmax(0)
    by_chance = float((torch.bincount(first) / len(first)).square().sum())
    assert chance["birth"] == pytest.approx(by_chance, abs=0.15)
    assert chance["span"] < 0.7


def routed_sae(world):
    options = {"latent_size": 32, "k": 3, "sites": list(world.sites()), "routing": "random"}
    return build("RouteSAE", world.level.width, world.n_sites, options).eval()


def test_the_router_that_is_told_the_truth_reaches_most_and_random_sites_the_mean(world):
    samples = draw(world, 4000)
    sae = routed_sae(world)
    alive = world.alive(samples.values)[samples.fires.any(1)]
    random = planted.measure(sae, world, samples)["reach"]
    assert random == pytest.approx(float(alive.mean()), abs=0.02)
    planted.route_by_truth(sae, world, samples)
    truth = planted.measure(sae, world, samples)["reach"]
    assert truth == pytest.approx(float(alive.amax(1).mean()))
    assert truth > random + 0.1


def test_a_feature_counts_only_where_it_lives(world):
    """A latent that fires at every site for a feature of one site is precise at that site alone."""
    samples = draw(world, 4000)
    site_of = {}
    for site in world.sites():
        sae = planted_sae(world, site)
        site_of[site] = planted.read(sae, world, samples).there
        assert torch.equal(site_of[site][0], world.present[site - 1])
    sae = routed_sae(world)
    codes = planted.read(sae, world, samples)
    own = sae.router.sample(torch.arange(4000), sae.seed)
    assert torch.equal(codes.there, world.present[own])


# ------------------------------------------------------------------------------------- commands


@pytest.fixture
def tiny(monkeypatch):
    levels = {"one": Level(16, 64, 16, 3), "several": Level(16, 64, 16, 3, 4)}
    monkeypatch.setattr(planted, "LEVELS", levels)
    monkeypatch.setattr(planted, "TEST_SAMPLES", 2048)


def run(tmp_path, *more):
    return planted.main([*more, "--samples", "2048", "--out", str(tmp_path / "planted")])


def test_the_command_measures_every_model_and_control_and_orders_its_table(tiny, tmp_path):
    results = run(tmp_path, "--level", "several")
    controls = {"RouteSAE, permuted", "RouteSAE, least error"}
    assert {result["model"] for result in results} == {*planted.ARMS, *controls}
    assert set(ZOO) < set(planted.ARMS)
    for result in results:
        assert all(0 <= result.get(key, 0) <= 1 for key in ("F1", "MCC", "birth", "span"))
    reach = {result["model"]: result["reach"] for result in results}
    assert reach["RouteSAE, truth"] >= max(reach[name] for name in reach if "RouteSAE" in name)
    lines = (tmp_path / "planted.md").read_text().splitlines()
    scores = [float(line.split("|")[2]) for line in lines[2:]]
    assert len(scores) == len(results) and scores == sorted(scores, reverse=True)


def test_the_command_goes_on_where_it_stopped_and_refuses_another_world(tiny, tmp_path):
    first = run(tmp_path, "--level", "one", "--models", "TopK")
    both = run(tmp_path, "--level", "one", "--models", "TopK", "BatchTopK")
    assert both[0] == first[0] and [r["model"] for r in both] == ["TopK", "BatchTopK"]
    with pytest.raises(ValueError, match="give another --out"):
        run(tmp_path, "--level", "several", "--models", "TopK")


def test_train_py_reads_a_planted_world_as_a_language_model(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "out"))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    level = planted.LEVELS["several"]
    folder = tmp_path / "world"
    planted_model.write(folder, level, seed=1, n_tokens=6000)
    argv = ["--model", "TopK", "RouteSAE", "--layer", "2", "--sites", "1", "2", "3", "4"]
    sizes = ["--latent_size", "16", "--k", "3", "--max_length", "64", "--max_tokens", "4000"]
    where = ["--model_path", str(folder), "--data_path", str(folder / "text.jsonl")]
    flags = [*argv, *sizes, *where, "--trust_remote_code", "1"]
    Trainer(config.complete(config.parse("train", flags))).run()
    paths = sorted(str(path) for path in (tmp_path / "out").rglob("*.pt"))
    assert len(paths) == 2
    results = planted.score(paths, "several", seed=1)
    assert [result["model"] for result in results] == [Path(path).stem for path in paths]
    # It learned this world and no other.
    sae, _ = checkpoint.load(paths[1])
    world, other = World(level, 1), World(level, 2)
    own = planted.measure(sae, world, draw(world, 4000))
    foreign = planted.measure(sae, other, draw(other, 4000))
    assert own["NormMSE"] < foreign["NormMSE"]
