"""The language model read and resumed at numbered sites, on the built-in demo LM."""

import importlib.util

import pytest
import torch

from src.config import parse
from src.files import DEMO_LM
from src.lm import (
    block_at,
    blocks,
    check_length,
    compile_blocks,
    final_states,
    get_language_model,
    hooked,
    logits_of,
    read_sites,
    resumed_at,
)


@pytest.fixture(scope="module")
def demo():
    return get_language_model(str(DEMO_LM), "cpu", dtype="float32")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(4096, (2, 12), generator=torch.Generator().manual_seed(0))


def test_sites_equal_hidden_states_below_the_top_and_not_at_the_top(demo, ids):
    _, lm = demo
    states = lm(ids, output_hidden_states=True).hidden_states
    read = read_sites(lm, ids, [1, 12, 16])
    assert torch.equal(read[1], states[1]) and torch.equal(read[12], states[12])
    assert not torch.allclose(read[16], states[16])
    assert torch.allclose(lm.model.norm(read[16]), states[16])


def test_no_block_after_the_last_site_runs(demo, ids):
    _, lm = demo
    ran = []
    handle = blocks(lm)[12].register_forward_hook(lambda *_: ran.append(1))
    read_sites(lm, ids, [4, 12])
    handle.remove()
    assert not ran


def test_a_resumed_run_equals_the_full_one(demo, ids):
    _, lm = demo
    hidden = read_sites(lm, ids, [7])[7]
    full = final_states(lm, ids)
    with resumed_at(lm, 7, hidden):
        assert torch.equal(final_states(lm, ids), full)
    assert torch.equal(final_states(lm, ids), full)


def test_hooks_are_gone_after_an_exception(demo, ids):
    _, lm = demo
    before = final_states(lm, ids)

    def broken(_):
        raise RuntimeError("from the hook")

    hooks = len(block_at(lm, 3)._forward_hooks)
    with pytest.raises(RuntimeError, match="from the hook"), hooked(lm, {3: broken}):
        final_states(lm, ids)
    assert len(block_at(lm, 3)._forward_hooks) == hooks
    assert torch.equal(final_states(lm, ids), before)


def test_sites_outside_the_model_are_refused(demo):
    with pytest.raises(ValueError, match="layer 17 of a 16-block model; sites run from 1 to 16"):
        block_at(demo[1], 17)


def test_the_tokenizer_takes_special_tokens_in_text_for_text(demo):
    tokenizer, _ = demo
    ids = tokenizer("a <|end_of_text|> b", add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a <|end_of_text|> b"


def test_a_missing_model_is_one_clear_line():
    with pytest.raises(ValueError, match="cannot load language model"):
        get_language_model("/no/such/folder", "cpu")


SCALED = {"Cohere": {}, "Granite": {"logits_scaling": 8.0}}


@pytest.mark.parametrize("family", SCALED)
def test_models_that_scale_their_logits_are_read_resumed_and_given_their_own(family, ids):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**small, **sizes, **SCALED[family])
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = ids % 96
    with torch.no_grad():
        whole = lm(ids, output_hidden_states=True)
    assert torch.allclose(
        logits_of(lm, final_states(lm, ids).flatten(0, 1)), whole.logits.flatten(0, 1), atol=1e-5
    )
    read = read_sites(lm, ids, [2, 5])
    assert torch.equal(read[5], whole.hidden_states[5])
    full = final_states(lm, ids)
    with resumed_at(lm, 5, read[5]):
        assert torch.equal(final_states(lm, ids), full)


def test_spreading_a_model_without_accelerate_is_one_clear_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "accelerate" else find(name, *a),
    )
    with pytest.raises(
        ValueError,
        match="--device_map needs the package accelerate, which is not installed; pip install accelerate",
    ):
        get_language_model(str(DEMO_LM), "cpu", device_map="auto")


def test_placement_is_a_word_or_json(capsys):
    assert parse("train", ["--device_map", "auto"]).device_map == "auto"
    assert parse("evaluate", ["--device_map", '{"": 0, "lm_head": "cpu"}']).device_map == {
        "": 0,
        "lm_head": "cpu",
    }
    with pytest.raises(SystemExit):
        parse("train", ["--device_map", "{0}"])
    assert "is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("placed", ["auto", {"": "cpu"}])
def test_a_spread_model_gives_the_same_states(demo, ids, placed):
    pytest.importorskip("accelerate")
    spread = get_language_model(str(DEMO_LM), "cpu", dtype="float32", device_map=placed)[1]
    assert torch.equal(final_states(spread, ids), final_states(demo[1], ids))
    assert torch.equal(read_sites(spread, ids, [5])[5], read_sites(demo[1], ids, [5])[5])


def test_a_quantised_model_is_not_moved(monkeypatch, demo):
    class Quantised(type(demo[1])):
        is_quantized = True

        def to(self, *_args, **_named):
            raise ValueError("`.to` is not supported for 8-bit models")

    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained",
        lambda *a, **k: Quantised(demo[1].config),
    )
    assert not any(p.requires_grad for p in get_language_model(str(DEMO_LM), "cpu")[1].parameters())


def test_compiled_blocks_serve_one_shape_and_leave_others_and_hooks_alone(monkeypatch):
    _, model = get_language_model(str(DEMO_LM), "cpu", "float32")
    ids = torch.randint(0, 4096, (2, 8))
    before, other = read_sites(model, ids, [2, 5]), read_sites(model, ids[:1], [5])
    calls = []

    def compiled(function, **_):
        return lambda *args, **kwargs: (calls.append(args[0].shape[:2]), function(*args, **kwargs))[
            1
        ]

    monkeypatch.setattr(torch, "compile", compiled)
    compile_blocks(model, 2, 8)
    after = read_sites(model, ids, [2, 5])
    assert len(calls) == 5 and all(
        torch.equal(before[site], after[site]) for site in (2, 5)
    )  # early exit as before
    assert torch.equal(read_sites(model, ids[:1], [5])[5], other[5]) and len(calls) == 5
    with resumed_at(model, 3, after[5]):
        assert torch.equal(read_sites(model, ids, [3])[3], after[5]) and len(calls) == 5
    read_sites(model, ids, [3])
    assert len(calls) == 8  # resuming has put the compiled ones back
    compile_blocks(model, 2, 8)  # again: nothing is wrapped twice
    read_sites(model, ids, [3])
    assert len(calls) == 11
    compile_blocks(model, 1, 8)
    read_sites(model, ids, [3])
    assert (
        len(calls) == 11
        and torch.equal(read_sites(model, ids[:1], [5])[5], other[5])
        and len(calls) == 16
    )


def test_rows_longer_than_learned_positions_are_refused_and_others_warned_of(capsys):
    from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    learned = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=16, vocab_size=32))
    rotary = LlamaModel(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=16,
            vocab_size=32,
        )
    )
    for model in (learned, rotary):
        check_length(model, 16)
    assert not capsys.readouterr().out
    with pytest.raises(
        ValueError, match="17 tokens in a row, and the language model has 16 positions"
    ):
        check_length(learned, 17)
    check_length(rotary, 17)
    assert "was made for 16" in capsys.readouterr().out
