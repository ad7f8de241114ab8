"""The language model read and resumed at numbered sites, on the built-in demo LM."""

import pytest
import torch

from src.files import DEMO_LM
from src.lm import block_at, blocks, final_states, get_language_model, hooked, logits_of, read_sites, resumed_at


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
    ids = tokenizer("a <|end_of_text|> b", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a <|end_of_text|> b"


def test_a_missing_model_is_one_clear_line():
    with pytest.raises(ValueError, match="cannot load language model"):
        get_language_model("/no/such/folder", "cpu")


FAMILIES = {
    "Llama": {}, "GPT2": {"n_head": 4}, "GPTNeoX": {}, "Qwen2": {"num_key_value_heads": 2}, "Gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "Cohere": {"num_key_value_heads": 2}, "Granite": {"logits_scaling": 8.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_read_resumed_and_given_their_own_logits(family, ids):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64}
    if family == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 6}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**small, **sizes, **FAMILIES[family])
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = ids % 96
    with torch.no_grad():
        whole = lm(ids, output_hidden_states=True)
    assert torch.allclose(logits_of(lm, final_states(lm, ids).flatten(0, 1)), whole.logits.flatten(0, 1), atol=1e-5)
    read = read_sites(lm, ids, [2, 5])
    assert torch.equal(read[5], whole.hidden_states[5])
    full = final_states(lm, ids)
    with resumed_at(lm, 5, read[5]):
        assert torch.equal(final_states(lm, ids), full)
