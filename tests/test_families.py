"""Every stage works with language models of many families, from --model_path alone.

The models are small and have random weights.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from src import checkpoint, hooks, lm, metrics
from src.applier import Applier
from src.config import parse
from src.data import Rows
from src.evaluator import Evaluator
from src.model import build
from src.steerer import Steerer
from src.trainer import Trainer

WORDS = [f"w{i}" for i in range(90)]
DEPTH, WIDTH, VOCABULARY = 4, 32, 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def text_only(family, **options):
    config = getattr(transformers, f"{family}Config")(**(SIZES | options))
    return transformers.AutoModelForCausalLM.from_config(config)


def gemma3_with_pictures():
    text = transformers.Gemma3TextConfig(**(SIZES | {"sliding_window": 8}))
    config = transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES).to_dict(),
        vision_config=transformers.CLIPVisionConfig(**VISION).to_dict(),
        image_token_index=VOCABULARY - 1,
    )
    return transformers.LlavaForConditionalGeneration(config)


FAMILIES = {
    "Llama": lambda: text_only("Llama"),
    "Qwen2": lambda: text_only("Qwen2"),
    "Qwen3": lambda: text_only("Qwen3"),
    "Gemma2": lambda: text_only(
        "Gemma2", sliding_window=8, final_logit_softcapping=2.0, attn_logit_softcapping=2.0
    ),
    "Gemma3": lambda: text_only("Gemma3Text", sliding_window=8),
    "GPT-2": lambda: text_only("GPT2", n_embd=WIDTH, n_layer=DEPTH, n_head=4, n_positions=64),
    "Pythia": lambda: text_only("GPTNeoX"),
    "OPT": lambda: text_only("OPT", ffn_dim=48, word_embed_proj_dim=16),
    "OPT, norms last": lambda: text_only(
        "OPT", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "Phi-3": lambda: text_only("Phi3"),
    "Mistral": lambda: text_only("Mistral", sliding_window=8),
    "OLMo-2": lambda: text_only("Olmo2"),
    "Mixtral": lambda: text_only("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "Qwen-MoE": lambda: text_only(
        "Qwen2Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "Gemma3 with pictures": gemma3_with_pictures,
    "LLaVA": llava,
}
SAES = ["RouteSAE", "TopK", "Crosscoder"]


def tokenizer(bos):
    """A byte-level BPE of the words, with special tokens first, as in many families."""
    special = ["<pad>", "<s>", "</s>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([" ".join(WORDS)], trainer)
    names = {"pad_token": "<pad>", "eos_token": "</s>"}
    if bos:
        names["bos_token"] = "<s>"
        bpe.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A folder with a model of the family, its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    FAMILIES[request.param]().save_pretrained(folder / "model")
    tokenizer(bos=request.param not in ("GPT-2", "Pythia")).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(40):
        numbers = torch.randint(90, (60,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(WORDS[i] for i in numbers)}))
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def opened(folder):
    """(tokenizer, model)"""
    return lm.get_language_model(str(folder / "model"), "cpu", dtype="float32")


@pytest.fixture(scope="module")
def batch(folder, opened):
    return Rows(folder / "text.jsonl", opened[0], 32, "all", max_samples=4).batch([0, 1, 2])


def options(**values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def train(folder, output):
    argv = options(
        model_path=folder / "model",
        data_path=folder / "text.jsonl",
        latent_size=48,
        k=4,
        max_samples=20,
        max_length=32,
        batch_size=4,
    )
    Trainer(parse("train", [*output, "--model", *SAES, *argv])).run()
    return [str(folder / "out" / "SAE_models" / f"{sae}_text.pt") for sae in SAES]


def check_evaluation(paths, output):
    argv = ["--SAE_path", *paths, "--metric", "NormMSE", "KLDiv", "--max_samples", "4"]
    for result in Evaluator(parse("evaluate", [*output, *argv])).run().values():
        assert 0 < result["KLDiv"] < math.inf
        assert 0 < result["NormMSE"] < 2


def check_contexts_and_steering(path, output):
    argv = options(SAE_path=path, max_samples=8, act_threshold=0, lines=1, context_length=4)
    total, contexts = Applier(parse("apply", [*output, *argv])).run()
    latents = json.loads(Path(contexts).read_text())["latent_context_map"]
    assert total == len(latents) > 0
    latent, entry = next(iter(latents.items()))
    assert not {"<pad>", "<s>", "</s>"} & set(entry["tokens"][0])
    edit = f"{latent}={10 * entry['max_activation']}"
    argv = options(SAE_path=path, set=edit, prompt="w1 w2 w3", max_new_tokens=3)
    steered = Steerer(parse("steer", [*output, *argv])).run()
    assert steered["outputs"]["0"][0]["KL"] > 0


def test_every_stage_works_from_the_path_alone(folder, opened, monkeypatch):
    monkeypatch.setattr(lm, "get_language_model", lambda *args, **kwargs: opened)  # loaded once
    output = options(output_dir=folder / "out", dtype="float32")
    paths = train(folder, output)
    recipe = checkpoint.read_recipe(paths[0])
    assert recipe["config"]["hidden_size"] == WIDTH
    assert recipe["config"]["n_layers"] == DEPTH
    assert recipe["sites"] == [1, 2, 3]
    assert checkpoint.read_recipe(paths[1])["sites"] == [3]
    check_evaluation(paths, output)
    for path in paths:
        check_contexts_and_steering(path, output)


def test_the_blocks_the_norm_and_the_head_are_the_models_own(opened, batch):
    tokenizer, model = opened
    assert len(lm.blocks(model)) == DEPTH
    assert lm.text_config(model).hidden_size == WIDTH
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, output_hidden_states=True)
    # Families differ in scaled embeddings, soft caps and projections.
    logits = lm.logits_of(model, lm.final_states(model, batch.input_ids).flatten(0, 1))
    assert torch.allclose(logits, expected.logits.flatten(0, 1).float(), atol=1e-5)
    states = lm.read_sites(model, batch.input_ids, list(range(1, DEPTH + 1)))
    for site in range(1, DEPTH):
        assert torch.equal(states[site], expected.hidden_states[site])
    special = torch.isin(batch.input_ids, torch.tensor(tokenizer.all_special_ids))
    assert not batch.mask[special].any()
    assert not batch.mask[:, 0].any()
    assert batch.mask.any()


def rebuild(hidden):
    """Standardises the states and undoes it, as a perfect SAE would."""
    mean, std = hidden.mean(-1, keepdim=True), hidden.std(-1, keepdim=True)
    return (hidden - mean) / std * std + mean


def test_an_identity_patch_changes_no_bit_and_a_perfect_reconstruction_nothing_that_counts(
    opened, batch
):
    _, model = opened
    clean = lm.logits_of(model, lm.final_states(model, batch.input_ids)[batch.mask])
    states = lm.read_sites(model, batch.input_ids, list(range(1, DEPTH + 1)))

    def patched_logits(site, function, known):
        final = hooks.patched_states(model, batch, {site: function}, known)
        return lm.logits_of(model, final[batch.mask])

    for site in range(1, DEPTH + 1):
        for known in (None, states):
            assert torch.equal(patched_logits(site, lambda h: h, known), clean)
        near = patched_logits(site, rebuild, states)
        assert float(metrics.KLDiv(clean, near)) < 1e-6
        far = patched_logits(site, lambda h: -h, states)
        assert float(metrics.KLDiv(clean, far)) > 1e-6


def test_an_edit_shows_at_its_site_and_after_it_at_its_token_and_after_it(opened, batch):
    _, model = opened
    mask = batch.mask.clone()
    mask[:, :10] = False
    sites = list(range(1, DEPTH + 1))
    states = lm.read_sites(model, batch.input_ids, sites)
    final = lm.final_states(model, batch.input_ids)
    with lm.hooked(model, hooks.patch_hooks({2: lambda h: h + 1}, mask)):
        edited = lm.read_sites(model, batch.input_ids, sites)
        edited_final = lm.final_states(model, batch.input_ids)
    assert torch.equal(edited[1], states[1])
    assert torch.allclose(edited[2][mask], states[2][mask] + 1)
    assert torch.equal(edited[2][~mask], states[2][~mask])
    first = int(mask.any(0).nonzero()[0])
    # Not bit for bit: experts take tokens together, which moves the last bits.
    assert torch.allclose(edited_final[:, :first], final[:, :first], atol=1e-5)
    moved = (edited_final != final).any(-1)
    assert moved[:, first:][mask[:, first:]].all()


WITHOUT_CACHE = {
    "Mamba": lambda: text_only("Mamba", state_size=4, expand=2, conv_kernel=4),
    "RecurrentGemma": lambda: text_only(
        "RecurrentGemma", lru_width=WIDTH, attention_window_size=8, num_hidden_layers=DEPTH
    ),
    "RWKV": lambda: text_only("Rwkv", attention_hidden_size=WIDTH, context_length=64),
    "GPT": lambda: text_only("OpenAIGPT", n_embd=WIDTH, n_layer=DEPTH, n_head=4, n_positions=64),
}


@pytest.mark.parametrize("family", WITHOUT_CACHE)
def test_models_without_a_cache_of_keys_and_values_are_steered(family, tmp_path):
    torch.manual_seed(0)
    WITHOUT_CACHE[family]().save_pretrained(tmp_path / "model")
    tokenizer(bos=True).save_pretrained(tmp_path / "model")
    sae = build("TopK", WIDTH, DEPTH, {"latent_size": 48, "k": 4, "layer": 2})
    recipe = {
        "model": "TopK",
        "config": sae.config,
        "sites": sae.sites(),
        "options": {},
        "model_path": str(tmp_path / "model"),
    }
    path = checkpoint.save(sae, recipe, tmp_path / "SAE_models", "TopK_t")
    output = options(output_dir=tmp_path, dtype="float32", device="cpu", SAE_path=path)
    argv = [*output, *options(prompt="w1 w2 w3", max_new_tokens=5)]
    (unchanged,) = Steerer(parse("steer", [*argv, "--add", "3=0"])).run()["outputs"]["0"]
    assert unchanged["KL"] == 0 and unchanged["original_output"] == unchanged["clamped_output"]
    steerer = Steerer(parse("steer", [*argv, "--set", "3=50"]))
    (steered,) = steerer.run()["outputs"]["0"]
    assert steered["KL"] > 0
    text = ids = steerer.ids({"prompt": "w1 w2 w3"})
    for _ in range(5):  # every token is the one that a pass over the whole text gives
        logits = steerer._logits(text, steerer.edit, None)[:, -1]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        if int(text[0, -1]) in steerer.end_tokens:
            break
    written = steerer._continue(ids, steerer.edit, None)
    assert written[0].tolist() == text[0, ids.shape[1] :].tolist()
