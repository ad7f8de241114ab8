"""Where features live: each measure on dictionaries in which the answer is planted."""

import pytest
import torch
import torch.nn.functional as F

from experiments import features
from src.config import parse
from src.files import DEMO_LM, load_json
from src.model import build
from src.trainer import Trainer
from tests.test_probing import write_text

WIDTH, LATENTS, SITES = 64, 40, 4


def rows(seed, n=LATENTS):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, WIDTH, generator=generator), dim=1)


def test_planted_twins_at_another_site_are_counted_and_random_directions_are_none():
    first, second, third = rows(1), rows(2), rows(3)
    second[:10] = F.normalize(first[20:30] + 0.3 * rows(4)[:10], dim=1)
    result = features.twins({3: first, 5: second, 7: third})
    assert result["twins"] == pytest.approx(20 / (3 * LATENTS))
    assert result["twins_by_site"] == pytest.approx({3: 0.25, 5: 0.25, 7: 0})
    assert result["same_index"] == 0
    assert sum(result["histogram"]["latents"]) == 3 * LATENTS
    assert result["histogram"]["latents"][-2:] == [0, 20]


def test_latents_that_kept_a_common_start_are_told_from_other_twins():
    first, second = rows(1), rows(2)
    second[:10] = first[:10]
    second[10:20] = -first[10:20]  # the opposite direction is no twin
    result = features.twins({3: first, 5: second})
    assert (result["twins"], result["same_index"]) == (0.25, 1)


def test_a_permuted_dictionary_matches_whole_and_each_latent_has_one_partner():
    pytest.importorskip("scipy")
    first = rows(1)
    order = torch.randperm(LATENTS, generator=torch.Generator().manual_seed(0))
    assert features.matching(first, first[order]) == {
        "matched": 1,
        "mean_cosine": pytest.approx(1),
    }
    half = torch.cat([first[order][:20], rows(2)[:20]])
    assert features.matching(first, half)["matched"] == pytest.approx(0.5)
    one = first[:1].expand(LATENTS, -1)  # only one of them can have the partner
    assert features.matching(one, first)["matched"] == pytest.approx(1 / LATENTS)


def crosscoder():
    """A Crosscoder: latent 0 reads all sites, latent 1 one, latent 2 is never active."""
    torch.manual_seed(0)
    sae = build("Crosscoder", WIDTH, 8, {"latent_size": 4, "sites": [2, 3, 4, 5]})
    with torch.no_grad():
        for index in range(SITES):
            sae.encoder[index].weight.zero_()
            sae.encoder[index].weight[0] = F.one_hot(torch.tensor(0), WIDTH)
            sae.decoder[index].weight.copy_(torch.eye(WIDTH)[:, :4] * (index == 1))
        sae.decoder[3].weight[0, 0] = 1
        sae.encoder[1].weight[1] = F.one_hot(torch.tensor(1), WIDTH)
        sae.latent_bias.copy_(torch.tensor([-3.0, -1.0, -100.0, -100.0]))
    return sae


def test_a_latent_of_all_sites_has_them_all_and_a_local_one_has_one():
    sae = crosscoder()
    generator = torch.Generator().manual_seed(3)
    drive = features.Drive(sae)
    for _ in range(4):
        x = 0.05 * torch.randn(500, SITES, WIDTH, generator=generator)
        x[:, 2, 0] += 1  # a constant part of a state drives nothing
        fires = torch.rand(500, 2, generator=generator) < 0.1
        x[..., 0] += fires[:, :1]
        x[..., 1] += fires[:, 1:]  # at all sites too, but only one is read
        drive.update(x)
    sites = features.participation(drive.means())
    assert sites.tolist() == pytest.approx([SITES, 1], abs=0.05)
    assert features.participation(sae.site_profile())[:2].tolist() == pytest.approx([2, 1])


def test_participation_of_sites_follows_its_formula():
    weights = torch.tensor([[1.0, 1.0, 0.0, 2.0], [1.0, 0.0, 0.0, -1.0]])
    assert features.participation(weights).tolist() == pytest.approx([2, 1, 0, 9 / 5])


def test_two_seeds_are_a_pair_across_versions_that_differ_by_an_option_without_a_value():
    def opened(**options):
        seed = options["seed"]
        recipe = {"model": "TopK", "seed": seed, "options": options, "config": {"k": 4}}
        return features.Opened(str(seed), None, recipe)

    old, new = opened(seed=1, tag="old"), opened(seed=2, tag="new", option_of_today=None)
    assert features.seed_pairs([old, new]) == [(old, new)]
    assert features.seed_pairs([old, opened(seed=2, option_of_today=0.5)]) == []


def test_one_command_measures_all_checkpoints(tmp_path, monkeypatch, capsys):
    pytest.importorskip("scipy")
    text = ["--data_path", str(write_text(tmp_path)), "--output_dir", str(tmp_path / "out")]
    common = [*text, "--model_path", str(DEMO_LM), "--split", "all", "--max_length", "32"]
    argv = [*common, "--latent_size", "64", "--k", "4", "--batch_size", "8", "--max_tokens", "2000"]
    for layer, seed in ((2, 1), (3, 1), (3, 2)):
        single = ["--model", "TopK", "--layer", str(layer), "--seed", str(seed)]
        Trainer(parse("train", [*argv, *single, "--tag", f"{layer}_{seed}"])).run()
    Trainer(parse("train", [*argv, "--model", "Crosscoder"])).run()
    paths = sorted(map(str, (tmp_path / "out" / "SAE_models").glob("*.pt")))
    monkeypatch.setattr("sys.argv", ["features", *paths, *common])
    features.main()
    results = load_json(tmp_path / "out" / "features.json")
    twins = "TopK of 64 latents at 2 sites"
    assert set(results) == {twins, "TopK_t_3_1 and TopK_t_3_2", "Crosscoder_t"}
    assert results["Crosscoder_t"]["sites"] == 9
    assert "mean_cosine" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["features", paths[1], *common])
    with pytest.raises(ValueError, match="nothing to measure: name SAEs of one site"):
        features.main()


def test_the_value_of_an_option_is_no_checkpoint(monkeypatch):
    parsed = []
    monkeypatch.setattr(features, "measure", lambda cfg: parsed.append(cfg) or {})
    monkeypatch.setattr("sys.argv", ["features", "--max_tokens", "50k", "--seed", "3"])
    with pytest.raises(ValueError, match="nothing to measure"):
        features.main()
    assert parsed[0].max_tokens == 50_000 and not parsed[0].SAE_path
