"""Language models of many families, made here with random weights: each is trained on, measured, read and steered from --model_path alone."""

import json
import math

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from src import checkpoint, hooks, lm, metrics
from src.applier import Applier
from src.config import parse
from src.data import Rows
from src.evaluator import Evaluator
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


def text_only(config, **more):
    return transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{config}Config")(**(SIZES | more))
    )


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
    parts = {
        "text_config": transformers.LlamaConfig(**SIZES).to_dict(),
        "vision_config": transformers.CLIPVisionConfig(**VISION).to_dict(),
    }
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(**parts, image_token_index=VOCABULARY - 1)
    )


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
    """Bytes, joined where the text joins them often; specials first, as many families have them."""
    special = ["<pad>", "<s>", "</s>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [" ".join(WORDS)],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet
        ),
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>"} | ({"bos_token": "<s>"} if bos else {})
    if bos:
        bpe.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, folder with model, tokenizer and text)"""
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    FAMILIES[request.param]().save_pretrained(folder / "model")
    tokenizer(bos=request.param not in ("GPT-2", "Pythia")).save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(0)
    lines = [
        {"text": " ".join(WORDS[int(i)] for i in torch.randint(90, (60,), generator=draw))}
        for _ in range(40)
    ]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return request.param, folder


@pytest.fixture(scope="module")
def opened(family):
    return lm.get_language_model(str(family[1] / "model"), "cpu", dtype="float32")


def some_rows(opened, folder):
    return Rows(folder / "text.jsonl", opened[0], 32, "all", max_samples=4).batch([0, 1, 2])


def test_every_stage_works_from_the_path_alone(family, opened, monkeypatch):
    _, folder = family
    monkeypatch.setattr(
        lm, "get_language_model", lambda *a, **k: opened
    )  # loaded once; opened from its folder as any other
    out = ["--output_dir", str(folder / "out"), "--dtype", "float32"]
    sizes = ["--max_length", "32", "--batch_size", "4"]
    Trainer(
        parse(
            "train",
            [
                *out,
                *sizes,
                "--model",
                *SAES,
                "--model_path",
                str(folder / "model"),
                "--data_path",
                str(folder / "text.jsonl"),
                "--latent_size",
                "48",
                "--k",
                "4",
                "--max_samples",
                "20",
            ],
        )
    ).run()
    paths = [str(folder / "out" / "SAE_models" / f"{sae}_text.pt") for sae in SAES]
    recipe = checkpoint.read_recipe(paths[0])
    assert (
        recipe["config"]["hidden_size"] == WIDTH
        and recipe["config"]["n_layers"] == DEPTH
        and recipe["sites"] == [1, 2, 3]
    )
    assert checkpoint.read_recipe(paths[1])["sites"] == [3]
    results = Evaluator(
        parse(
            "evaluate",
            [*out, "--SAE_path", *paths, "--metric", "NormMSE", "KLDiv", "--max_samples", "4"],
        )
    ).run()
    for result in results.values():
        assert math.isfinite(result["KLDiv"]) and result["KLDiv"] > 0 and 0 < result["NormMSE"] < 2
    for path in paths:
        cfg = parse(
            "apply",
            [
                *out,
                "--SAE_path",
                path,
                "--max_samples",
                "8",
                "--act_threshold",
                "0",
                "--lines",
                "1",
                "--context_length",
                "4",
            ],
        )
        total, contexts = Applier(cfg).run()
        found = json.loads(open(contexts).read())["latent_context_map"]
        assert total == len(found) > 0
        latent, entry = next(iter(found.items()))
        assert not {"<pad>", "<s>", "</s>"} & set(entry["tokens"][0])
        steered = Steerer(
            parse(
                "steer",
                [
                    *out,
                    "--SAE_path",
                    path,
                    "--set",
                    f"{latent}={10 * entry['max_activation']}",
                    "--prompt",
                    "w1 w2 w3",
                    "--max_new_tokens",
                    "3",
                ],
            )
        ).run()
        assert steered["outputs"]["0"][0]["KL"] > 0


def test_the_blocks_the_norm_and_the_head_are_the_models_own(family, opened):
    _, folder = family
    model, batch = opened[1], some_rows(opened, folder)
    assert len(lm.blocks(model)) == DEPTH and lm.text_config(model).hidden_size == WIDTH
    with torch.no_grad():
        whole = model(input_ids=batch.input_ids, output_hidden_states=True)
    logits = lm.logits_of(model, lm.final_states(model, batch.input_ids).flatten(0, 1))
    assert torch.allclose(
        logits, whole.logits.flatten(0, 1).float(), atol=1e-5
    )  # scaled embeddings, soft caps, projections
    read = lm.read_sites(model, batch.input_ids, list(range(1, DEPTH + 1)))
    for site in range(1, DEPTH):
        assert torch.equal(read[site], whole.hidden_states[site])
    assert not batch.mask[
        torch.isin(batch.input_ids, torch.tensor(opened[0].all_special_ids))
    ].any()
    assert not batch.mask[:, 0].any() and batch.mask.any()


def test_an_identity_graft_changes_no_bit_and_a_perfect_reconstruction_nothing_that_counts(
    family, opened
):
    _, folder = family
    model, batch = opened[1], some_rows(opened, folder)
    clean = lm.logits_of(model, lm.final_states(model, batch.input_ids)[batch.mask])
    full = lm.read_sites(model, batch.input_ids, list(range(1, DEPTH + 1)))

    def perfect(h):
        return (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True) * h.std(
            -1, keepdim=True
        ) + h.mean(-1, keepdim=True)

    for site in range(1, DEPTH + 1):
        for known in (None, full):
            same = hooks.patched_states(model, batch, {site: lambda h: h}, known)
            assert torch.equal(lm.logits_of(model, same[batch.mask]), clean)
        near = lm.logits_of(
            model, hooks.patched_states(model, batch, {site: perfect}, full)[batch.mask]
        )
        assert float(metrics.KLDiv(clean, near)) < 1e-6
        far = lm.logits_of(
            model, hooks.patched_states(model, batch, {site: lambda h: -h}, full)[batch.mask]
        )
        assert float(metrics.KLDiv(clean, far)) > 1e-6


def test_an_edit_shows_at_its_site_and_after_it_at_its_token_and_after_it(family, opened):
    _, folder = family
    model, batch = opened[1], some_rows(opened, folder)
    mask = batch.mask.clone()
    mask[:, :10] = False
    sites = list(range(1, DEPTH + 1))
    clean, states = (
        lm.read_sites(model, batch.input_ids, sites),
        lm.final_states(model, batch.input_ids),
    )
    with lm.hooked(model, hooks.patch_hooks({2: lambda h: h + 1}, mask)):
        changed = lm.read_sites(model, batch.input_ids, sites)
        after = lm.final_states(model, batch.input_ids)
    assert torch.equal(changed[1], clean[1])
    assert torch.allclose(changed[2][mask], clean[2][mask] + 1) and torch.equal(
        changed[2][~mask], clean[2][~mask]
    )
    first = int(mask.any(0).nonzero()[0])
    assert torch.allclose(
        after[:, :first], states[:, :first], atol=1e-5
    )  # experts take tokens together, which moves the last bits
    moved = (after != states).any(-1)
    assert moved[:, first:][mask[:, first:]].all()
