"""Controls whose decoder or encoder does not train, or only within a cosine of its start."""

# ruff: noqa: F811  (the fixture `text` is imported)

import functools

import pytest
import torch
import torch.nn.functional as F

from src import checkpoint
from src.model import build
from src.ops import hold_cosine_
from src.sae_training import SAETraining, Signum
from src.zoo import ZOO
from tests.test_resume import Killed, interrupt, kill
from tests.test_stages import sae_path, text, train  # noqa: F401

FREEZABLE = [name for name, entry in ZOO.items() if "freeze" in entry.options]
FREEZABLE_ARGV = ["--model", *FREEZABLE, *"--dead_tokens 40 --lr 0.02 --max_samples 48".split()]


def dictionary(sae):
    return getattr(sae, "sae", sae)


def least_cosine(sae, start):
    weight = dictionary(sae).decoder.weight
    return F.cosine_similarity(weight, start, dim=0).min().item()


@pytest.fixture
def starts(monkeypatch):
    """{title: (encoder, decoder) before the first step}"""
    seen = {}
    warm_start = SAETraining.warm_start

    def record(self, batch):
        warm_start(self, batch)
        own = dictionary(self.sae)
        seen[self.title] = own.encoder.weight.clone(), own.decoder.weight.clone()

    monkeypatch.setattr(SAETraining, "warm_start", record)
    return seen


def test_every_model_with_one_dictionary_can_be_frozen():
    assert set(FREEZABLE) == set(ZOO) - {"Crosscoder", "RandomK"}


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_frozen_weights_are_bit_for_bit_those_of_the_start(text, tmp_path, starts, optimizer):
    train(
        text, tmp_path, *FREEZABLE_ARGV, "--freeze", "decoder", "encoder", "--optimizer", optimizer
    )
    assert len(starts) == 2 * len(FREEZABLE)
    for title, (encoder, decoder) in starts.items():
        kind = title.rsplit("_text_frozen-")[1]
        sae, recipe = checkpoint.load(sae_path(tmp_path, title))
        own = dictionary(sae)
        assert torch.equal(own.encoder.weight, encoder) == (kind == "encoder")
        assert torch.equal(own.decoder.weight, decoder) == (kind == "decoder")
        assert own.pre_bias.abs().max() > 0 and recipe["config"]["freeze"] == kind


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_a_soft_frozen_decoder_stays_within_its_cosine_at_every_step(
    text, tmp_path, starts, monkeypatch, optimizer
):
    least, step = {}, SAETraining.step

    def checked(self, *args):
        step(self, *args)
        for at_mean in (True, False):  # of signum: the weights that are kept, and those of the step
            self.mode(not at_mean)
            least.setdefault(self.title, []).append(least_cosine(self.sae, starts[self.title][1]))

    monkeypatch.setattr(SAETraining, "step", checked)
    argv = [*FREEZABLE_ARGV, "--freeze", "soft_decoder", "--optimizer", optimizer]
    train(text, tmp_path, *argv)
    for title, values in least.items():
        assert (
            len(values) == 24 and min(values) > 0.8 - 2e-3
        )  # the unit norm moves the mean a little
        sae, _ = checkpoint.load(sae_path(tmp_path, title))
        at_end = least_cosine(sae, starts[title][1])
        assert 0.8 - 1e-6 < at_end < 0.9  # the bound was reached
        norms = dictionary(sae).decoder.weight.norm(dim=0)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


@pytest.mark.parametrize("is_held", [True, False])
def test_the_mean_that_signum_keeps_stays_within_the_bound_if_its_steps_are_held(is_held):
    start = F.normalize(torch.randn(16, 5, generator=torch.Generator().manual_seed(1)), dim=0)
    weight = torch.nn.Parameter(start.clone())
    optimizer = Signum([weight], lr=0.05, average_power=3.0)
    optimizer.train()
    for _ in range(60):
        weight.grad = start.roll(1, 0)  # always the same direction
        optimizer.step()
        if is_held:
            optimizer.hold(weight, functools.partial(hold_cosine_, start=start, least=0.8))
            assert F.cosine_similarity(weight, start, dim=0).min() > 0.8 - 1e-6
    optimizer.eval()
    assert (F.cosine_similarity(weight, start, dim=0).min() > 0.8 - 1e-6) == is_held


def test_columns_turn_back_to_the_bound_with_their_norm_and_others_stay_bit_for_bit():
    torch.manual_seed(0)
    start = torch.randn(12, 40)
    near, far = start + 0.1 * torch.randn_like(start), torch.randn_like(start)
    weight = torch.cat([near, far], 1)
    norms = weight.norm(dim=0)
    hold_cosine_(weight, torch.cat([start, start], 1), 0.8)
    assert torch.equal(weight[:, :40], near)
    cosine = F.cosine_similarity(weight[:, 40:], start, dim=0)
    assert torch.allclose(cosine, torch.full_like(cosine, 0.8), atol=1e-4) and cosine.min() >= 0.8
    assert torch.allclose(weight.norm(dim=0), norms, rtol=1e-5)
    again = weight.clone()
    hold_cosine_(again, torch.cat([start, start], 1), 0.8)
    assert torch.equal(again, weight)


def test_a_killed_run_keeps_the_start_of_a_soft_frozen_decoder(text, tmp_path, monkeypatch):
    argv = ["--freeze", "soft_decoder", "--lr", "0.02", "--save_every", "3"]
    train(text, tmp_path / "straight", *argv)
    with monkeypatch.context() as patch:
        interrupt(patch, 8, kill)
        with pytest.raises(Killed):
            train(text, tmp_path, *argv)
    train(text, tmp_path, *argv)
    title = "TopK_text_frozen-soft-decoder"
    sae, straight = (
        checkpoint.load(sae_path(folder, title))[0] for folder in (tmp_path, tmp_path / "straight")
    )
    assert torch.equal(sae.decoder.weight, straight.decoder.weight)


def test_weights_of_another_sae_are_the_start_that_is_kept(text, tmp_path):
    train(text, tmp_path)
    source = sae_path(tmp_path, "TopK_text")
    begun = checkpoint.load(source)[0].decoder.weight
    for kind in ("decoder", "soft_decoder"):
        train(text, tmp_path, "--init_from", str(source), "--freeze", kind, "--lr", "0.02")
        title = f"TopK_text_frozen-{kind.replace('_', '-')}"
        sae, _ = checkpoint.load(sae_path(tmp_path, title))
        assert torch.equal(sae.decoder.weight, begun) == (kind == "decoder")
        assert least_cosine(sae, begun) > 0.8 - 1e-6


def test_a_training_that_begins_with_a_frozen_sae_trains_all_of_it(text, tmp_path):
    train(text, tmp_path, "--freeze", "decoder")
    source = sae_path(tmp_path, "TopK_text_frozen-decoder")
    begun = checkpoint.load(source)[0].decoder.weight
    train(text, tmp_path, "--init_from", str(source), "--tag", "more")
    sae, recipe = checkpoint.load(sae_path(tmp_path, "TopK_text_more"))
    assert recipe["config"].get("freeze") is None
    assert not torch.equal(sae.decoder.weight, begun)


def test_a_kind_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="known are decoder, soft_decoder, encoder"):
        build("TopK", 8, 4, {"latent_size": 16, "k": 2, "freeze": "both"})
