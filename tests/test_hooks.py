"""The self-check of an evaluation: every kind of broken patch is found, and it costs little."""

import contextlib

import pytest
import torch

from src import hooks, lm
from src.data import Batch
from src.files import DEMO_LM

DEPTH = 16
SITES = list(range(1, DEPTH + 1))


@pytest.fixture
def model():
    return lm.get_language_model(str(DEMO_LM), "cpu", "float32")[1]


@pytest.fixture
def batch():
    ids = torch.randint(3, 4000, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    return Batch(ids, mask, torch.zeros_like(ids), torch.arange(2))


def test_the_self_check_takes_less_than_a_tenth_of_what_each_site_alone_would(model, batch):
    lm.check_family(model)
    calls = []
    block_class = type(lm.blocks(model)[0])
    forward = block_class.forward

    def counted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_class, "forward", counted)
        assert hooks.self_check(model, batch, SITES)
    # Two passes, two for the logits, and for each site one whole and two resumed passes.
    at_each_site = 4 * DEPTH + sum(DEPTH + 2 * (DEPTH - site) for site in SITES)
    assert at_each_site == 560
    assert len(calls) == 47


def test_logits_that_are_not_the_models_own_are_found(model, batch):
    lm.check_family(model)
    model.lm_head.register_forward_hook(lambda _module, _args, logits: 1.5 * logits)
    model._head_rule = True
    assert hooks.self_check(model, batch, SITES)  # a head that we use too
    own_forward = model.forward

    def scaled(*args, **kwargs):
        output = own_forward(*args, **kwargs)
        output.logits = 0.5 * output.logits
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="differ from its own by 100.0% of the largest"):
        hooks.self_check(model, batch, SITES)


def test_a_model_that_calls_its_decoder_in_another_way_is_checked_without_it(model, batch):
    """As where the whole model makes another attention mask, which moves the last bits."""
    lm.check_family(model)
    decoder = model.get_decoder()
    forward = decoder.forward

    def moved(*args, **kwargs):
        output = forward(*args, **kwargs)
        if "attention_mask" in kwargs:  # given by the whole model alone
            output.last_hidden_state = output.last_hidden_state * (1 + 1e-6)
        return output

    decoder.forward = moved
    assert not torch.equal(
        lm.own_pass(model, batch.input_ids)[0], lm.final_states(model, batch.input_ids)
    )
    assert hooks.self_check(model, batch, SITES)


def broken_at(site, change):
    """patch_hooks whose hook of one site gives change(old output, new output)."""
    patch_hooks = hooks.patch_hooks

    def broken(patches, mask):
        functions = patch_hooks(patches, mask)
        if site in functions:
            whole = functions[site]
            functions[site] = lambda output: change(output, whole(output))
        return functions

    return broken


@pytest.mark.parametrize("site", [1, 9, 16])
def test_a_hook_of_one_site_that_does_nothing_is_found(model, batch, monkeypatch, site):
    monkeypatch.setattr(hooks, "patch_hooks", broken_at(site, lambda old, new: old))
    with pytest.raises(ValueError, match=f"rewriting site {site} does not reach"):
        hooks.self_check(model, batch, SITES)


@pytest.mark.parametrize("site", [1, 9, 16])
def test_a_hook_of_one_site_that_changes_what_it_should_keep_is_found(
    model, batch, monkeypatch, site
):
    monkeypatch.setattr(hooks, "patch_hooks", broken_at(site, lambda old, new: new + 1e-3))
    with pytest.raises(ValueError, match=f"writing site {site} back unchanged changes"):
        hooks.self_check(model, batch, SITES)


def test_a_resumed_pass_that_ignores_its_state_is_found(model, batch, monkeypatch):
    monkeypatch.setattr(lm, "resumed_at", lambda *_: contextlib.nullcontext())
    with pytest.raises(ValueError, match="does not reach"):
        hooks.self_check(model, batch, SITES)


@pytest.mark.parametrize(("giver", "taker"), [(2, 7), (1, 2), (15, 16), (3, 16)])
def test_a_block_that_needs_more_of_an_earlier_one_than_its_state_is_found(
    model, batch, giver, taker
):
    """As where later blocks use the keys of an earlier one, which a resumed pass skips."""
    given = []
    first, second = lm.block_at(model, giver), lm.block_at(model, taker)
    first_forward, second_forward = first.forward, second.forward

    def giving(*args, **kwargs):
        given.append(1)
        return first_forward(*args, **kwargs)

    def taking(*args, **kwargs):
        output = second_forward(*args, **kwargs)
        return lm.with_hidden(output, lm.hidden_of(output) + (given.pop() if given else 0))

    lm.check_family(model)
    model.get_decoder().register_forward_pre_hook(lambda *_: given.clear())
    first.forward, second.forward = giving, taking
    with pytest.raises(ValueError, match="resuming from site"):
        hooks.self_check(model, batch, SITES)


def test_blocks_that_do_not_lead_to_the_output_are_found(model, batch, monkeypatch):
    lm.check_family(model)
    final_states = lm.final_states
    monkeypatch.setattr(lm, "final_states", lambda *args: torch.zeros_like(final_states(*args)))
    with pytest.raises(ValueError, match="rewriting site 16 does not reach"):
        hooks.self_check(model, batch, SITES)
