"""The language model is read and resumed at numbered sites; tested on the built-in demo LM."""

import importlib.util
import json

import pytest
import torch

from src import trainer
from src.config import parse
from src.data import Batch
from src.files import DEMO_LM
from src.hooks import self_check
from src.lm import (
    block_at,
    blocks,
    check_family,
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
    expected = lm(ids, output_hidden_states=True).hidden_states
    states = read_sites(lm, ids, [1, 12, 16])
    assert torch.equal(states[1], expected[1])
    assert torch.equal(states[12], expected[12])
    assert not torch.allclose(states[16], expected[16])
    assert torch.allclose(lm.model.norm(states[16]), expected[16])


def test_no_block_after_the_last_site_runs(demo, ids):
    _, lm = demo
    calls = []
    handle = blocks(lm)[12].register_forward_hook(lambda *_: calls.append(1))
    read_sites(lm, ids, [4, 12])
    handle.remove()
    assert not calls


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
    text = "a <|end_of_text|> b"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_a_missing_model_is_one_clear_line():
    with pytest.raises(ValueError, match="cannot load language model"):
        get_language_model("/no/such/folder", "cpu")


MAMBA = {"mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
SCALED = {
    "Cohere": {},
    "Granite": {"logits_scaling": 8.0},
    "HyperCLOVAX": {"logits_scaling": 0.125},
    "FalconH1": MAMBA
    | {"lm_head_multiplier": 0.02, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "RecurrentGemma": {"logits_soft_cap": 2.0, "lru_width": 32, "attention_window_size": 16},
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "InklingText": {"head_dim": 8},
    "Llama4Text": {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
    "Bamba": MAMBA | {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "Rwkv": {"attention_hidden_size": 32},
    "xLSTM": {"num_heads": 4, "chunk_size": 16, "qk_dim_factor": 0.5, "num_blocks": 6},
    "ModernBertDecoder": {"cls_token_id": 1, "sep_token_id": 2, "layer_types": None},
    "Roberta": {"is_decoder": True},
    "Bert": {"is_decoder": True},
    "RemBert": {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 16},
    "Electra": {"is_decoder": True, "embedding_size": 16},
}
SIZES = {
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("family", SCALED)
def test_models_that_scale_their_logits_are_read_and_resumed_exactly(family, ids):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **SCALED[family])
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in lm.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.2)
    ids = ids % 93 + 3
    check_family(lm)
    with torch.no_grad():
        expected = lm(ids, use_cache=False)
    full = final_states(lm, ids)
    logits = logits_of(lm, full.flatten(0, 1))
    assert torch.allclose(logits, expected.logits.flatten(0, 1), atol=1e-5)
    states = read_sites(lm, ids, [2, 5])
    with resumed_at(lm, 5, states[5]):
        assert torch.equal(final_states(lm, ids), full)


# The last two blocks use the keys and values of earlier ones, which a resumed pass skips.
SHARED_KEYS = {"num_kv_shared_layers": 2, "head_dim": 8, "global_head_dim": 8}
SHARED_KEYS |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
SHARED_KEYS["layer_types"] = ["sliding_attention", "full_attention"] * 3
# These blocks are skipped without a picture.
CROSS_ATTENTION = {"text_config": SIZES | {"cross_attention_layers": [1, 4]}}


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("XLM", {}, "do not pass one residual stream on"),
        ("CpmAnt", {"dim_head": 8, "dim_ff": 64}, r"states of block 1 are \(1, 40, 32\)"),
        ("Mllama", CROSS_ATTENTION, "block 2 of 6 is not run on text alone"),
        ("Gemma4Text", SHARED_KEYS, "resumed after block 4 it gives"),
        ("Blenderbot", {}, "no list of 6 decoder blocks in Blenderbot"),
    ],
)
def test_families_that_cannot_be_read_are_refused_by_name(family, options, reason):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=reason) as refusal:
        check_family(model)
    name = family.removesuffix("Text")
    assert name in str(refusal.value) and "not supported" in str(refusal.value)


def test_logits_that_are_not_the_models_own_are_refused(monkeypatch, ids):
    _, model = get_language_model(str(DEMO_LM), "cpu", "float32")
    forward = model.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + 0.01 * output.logits.std()
        return output

    row = torch.zeros(1, dtype=torch.long)
    batch = Batch(ids[:1], torch.ones_like(ids[:1], dtype=torch.bool), ids[:1] * 0, row)
    assert self_check(model, batch, [3])
    monkeypatch.setattr(model, "forward", doubled)
    with pytest.raises(ValueError, match="logits made from the last states of Llama.* by 0.[0-9]%"):
        self_check(model, batch, [3])


def test_states_that_overflow_are_named_with_their_site(ids):
    _, model = get_language_model(str(DEMO_LM), "cpu", "float16")
    blocks(model)[8].mlp.down_proj.weight.data.fill_(torch.inf)
    row = torch.zeros(1, dtype=torch.long)
    batch = Batch(ids[:1], torch.ones_like(ids[:1], dtype=torch.bool), ids[:1] * 0, row)
    with pytest.raises(ValueError, match="site 9 are not finite: .*float16; try --dtype bfloat16"):
        self_check(model, batch, [3, 9, 12])
    with pytest.raises(ValueError, match="site 5 or after it are not finite"):
        self_check(model, batch, [3, 5])


def test_a_padding_token_beyond_the_embeddings_is_replaced(tmp_path):
    tokenizer, model = get_language_model(str(DEMO_LM), "cpu")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == model.get_input_embeddings().num_embeddings
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer, model = get_language_model(str(tmp_path), "cpu")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    beyond = torch.tensor([[5, model.get_input_embeddings().num_embeddings]])
    with pytest.raises(ValueError, match="the text has token 4096, .* embeddings for 4096 tokens"):
        read_sites(model, beyond, [1])


def test_spreading_a_model_without_accelerate_is_one_clear_line(monkeypatch):
    find = importlib.util.find_spec

    def without_accelerate(name, *args):
        return None if name == "accelerate" else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_accelerate)
    message = "--device_map needs the package accelerate, .* pip install accelerate"
    with pytest.raises(ValueError, match=message):
        get_language_model(str(DEMO_LM), "cpu", device_map="auto")


def test_device_map_is_a_word_or_json(capsys):
    assert parse("train", ["--device_map", "auto"]).device_map == "auto"
    placed = parse("evaluate", ["--device_map", '{"": 0, "lm_head": "cpu"}']).device_map
    assert placed == {"": 0, "lm_head": "cpu"}
    with pytest.raises(SystemExit):
        parse("train", ["--device_map", "{0}"])
    assert "is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_spread_model_gives_the_same_states(demo, ids, device_map):
    pytest.importorskip("accelerate")
    _, spread = get_language_model(str(DEMO_LM), "cpu", dtype="float32", device_map=device_map)
    assert torch.equal(final_states(spread, ids), final_states(demo[1], ids))
    assert torch.equal(read_sites(spread, ids, [5])[5], read_sites(demo[1], ids, [5])[5])


def test_a_quantised_model_is_not_moved(monkeypatch, demo):
    class Quantised(type(demo[1])):
        is_quantized = True

        def to(self, *_args, **_kwargs):
            raise ValueError("`.to` is not supported for 8-bit models")

    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained",
        lambda *args, **kwargs: Quantised(demo[1].config),
    )
    _, model = get_language_model(str(DEMO_LM), "cpu")
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("asked, compiled", [("auto", False), ("yes", True), ("no", False)])
def test_a_training_compiles_the_work_of_its_saes_with_the_blocks(
    asked, compiled, tmp_path, monkeypatch
):
    decisions = []
    monkeypatch.setattr("src.lm.compile_blocks", lambda *_: None)
    monkeypatch.setattr(trainer, "join_passes", decisions.append)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"Return value {i}. " * 9}) for i in range(20)))
    argv = ["--model", "Vanilla", "--latent_size", "48", "--device", "cpu", "--max_length", "32"]
    argv += ["--model_path", str(DEMO_LM), "--data_path", str(text), "--batch_size", "4"]
    argv += ["--output_dir", str(tmp_path / "out"), "--compile_lm", asked]
    trainer.Trainer(parse("train", argv)).run()
    assert decisions == [compiled]


def test_compiled_blocks_serve_one_shape_and_leave_others_and_hooks_alone(monkeypatch):
    _, model = get_language_model(str(DEMO_LM), "cpu", "float32")
    ids = torch.randint(0, 4096, (2, 8))
    before = read_sites(model, ids, [2, 5])
    before_of_one = read_sites(model, ids[:1], [5])[5]
    calls = []

    def compiled(function, **_):
        def counted(*args, **kwargs):
            calls.append(args[0].shape[:2])
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(torch, "compile", compiled)
    compile_blocks(model, 2, 8)
    after = read_sites(model, ids, [2, 5])
    assert len(calls) == 5  # the pass still ends after block 5
    assert all(torch.equal(before[site], after[site]) for site in (2, 5))
    assert torch.equal(read_sites(model, ids[:1], [5])[5], before_of_one)
    assert len(calls) == 5
    with resumed_at(model, 3, after[5]):
        assert torch.equal(read_sites(model, ids, [3])[3], after[5])
    assert len(calls) == 5
    read_sites(model, ids, [3])
    assert len(calls) == 8  # after resuming, the blocks are the compiled ones again
    compile_blocks(model, 2, 8)  # compiling again wraps nothing twice
    read_sites(model, ids, [3])
    assert len(calls) == 11
    compile_blocks(model, 1, 8)
    read_sites(model, ids, [3])
    assert len(calls) == 11
    assert torch.equal(read_sites(model, ids[:1], [5])[5], before_of_one)
    assert len(calls) == 16


def test_rows_longer_than_learned_positions_are_refused_and_others_warned_of(capsys):
    from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    learned = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=16, vocab_size=32))
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=16,
        vocab_size=32,
    )
    rotary = LlamaModel(config)
    for model in (learned, rotary):
        check_length(model, 16)
    assert not capsys.readouterr().out
    message = "a row has 17 tokens, and the language model has 16 positions"
    with pytest.raises(ValueError, match=message):
        check_length(learned, 17)
    check_length(rotary, 17)
    assert "was trained for 16" in capsys.readouterr().out
