"""Mistakes of the published code that give wrong numbers, each with a test that fails on it.

KNOWN names the tests of those that other files test.
"""

import importlib
import json
import subprocess

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from src import checkpoint, config, hooks, lm, metrics
from src.applier import Applier
from src.data import Batch, Rows
from src.evaluator import Evaluator
from src.files import DEMO_LM, ROOT
from src.model import build
from src.ops import unit_norm_decoder
from src.trainer import Trainer

KNOWN = {
    "D4": "test_data.test_mask_leaves_out_specials_first_position_and_padding",
    "D6": "test_data.test_no_text_is_lost",
    "D13": "test_data.test_splits_are_disjoint_and_complete",
    "D15": "test_data.test_download_writes_three_disjoint_splits_up_to_its_size",
    "L2": "test_lm.test_sites_equal_hidden_states_below_the_top_and_not_at_the_top",
    "E6": "test_lm.test_sites_outside_the_model_are_refused",
    "L5": "test_stages.test_blocks_that_return_tuples_are_patched_too",
    "L15": "test_model.test_routed_sites_are_the_middle_half_of_any_depth",
    "L7": "test_model.test_hard_routing_patches_each_token_at_its_own_site_as_it_was_trained",
    "N5": "test_model.test_l1_is_weighted_by_decoder_norms_so_that_rescaling_does_not_change_it",
    "N10": "test_stages.test_every_model_trains_and_is_evaluated_with_every_metric",
    "N11": "test_model.test_a_gate_learns_only_with_its_auxiliary_loss",
    "N12": "test_model.test_jumprelu_counts_pre_activations_and_keeps_thresholds_positive",
    "N18": "test_model.test_infer_k_and_theta_mean_the_same_in_every_model",
    "N25": "test_stages.test_the_schedule_warms_up_stays_and_falls_also_in_tiny_runs",
    "N31": "test_stages.test_evaluation_needs_no_flag_and_takes_everything_from_the_recipe",
    "R1": "test_routing."
    "test_the_published_objective_gives_no_gradient_at_initialisation_and_the_others_do",
    "R2": "test_routing.test_expected_error_follows_its_formula",
    "R4": "test_routing.test_a_patch_reproduces_what_was_coded",
    "R9": "test_model.test_a_routesae_takes_routed_sites_all_sites_or_all_with_the_embedding",
    "E2": "test_stages.test_kl_agrees_with_values_computed_by_hand",
    "E8": "test_model.test_random_draws_do_not_depend_on_batching",
    "E9": "test_stages.test_every_model_trains_and_is_evaluated_with_every_metric",
    "E7": "test_stages.test_every_model_trains_and_is_evaluated_with_every_metric",
    "P1": "test_reading.test_every_models_contexts_are_those_of_a_plain_loop",
    "P2": "test_faults.test_a_recipe_that_cannot_be_is_one_line",
    "P3": "test_reading.test_every_models_contexts_are_those_of_a_plain_loop",
    "P5": "test_contexts.test_sentences_are_cut_in_the_text_and_the_token_marked",
    "I2": "test_interpreter.test_every_feature_ends_in_one_record_whatever_the_server_does",
    "I4": "test_interpreter.test_the_azure_form_has_its_address_version_and_key",
    "C2": "test_model.test_a_routesae_takes_routed_sites_all_sites_or_all_with_the_embedding",
    "C3": "test_reading.test_under_the_cache_every_new_token_is_edited_as_in_a_full_pass",
}


def test_the_pitfalls_tested_elsewhere_have_their_test():
    for pitfall, test in KNOWN.items():
        module, name = test.split(".")
        assert callable(getattr(importlib.import_module(module), name, None)), pitfall


def tiny_lm(n_layers=6):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def saved_lm(n_layers, folder):
    tiny_lm(n_layers).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_LM).save_pretrained(folder)
    return folder


def batch_of(ids):
    """One document per row, every token counts."""
    position = torch.arange(ids.shape[1]).expand_as(ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, mask, torch.zeros_like(ids), position)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "t.jsonl"
    sentence = "Value {} of the array, or {} where that is larger. "
    lines = [json.dumps({"text": sentence.format(i, i * i) * 4}) for i in range(60)]
    path.write_text("\n".join(lines))
    return path


def run(text, model_path, *options, stage="train"):
    argv = ["--model_path", str(model_path), "--data_path", str(text), "--dtype", "float32"]
    argv += ["--output_dir", str(text.parent / "out")]
    argv += ["--max_length", "32", "--batch_size", "4", "--max_samples", "24"]
    if stage == "train":
        argv += ["--latent_size", "48", "--k", "4"]
    cfg = config.parse(stage, [*argv, *options])
    return {"train": Trainer, "evaluate": Evaluator}[stage](cfg).run()


def test_d1_d2_padding_changes_neither_what_is_coded_nor_a_metric():
    model, ids = tiny_lm(), torch.randint(3, 4000, (2, 12))
    unpadded = batch_of(ids)
    unpadded.mask[:, 0] = False
    padded = batch_of(F.pad(ids, (0, 5)))
    padded.mask[:] = F.pad(unpadded.mask, (0, 5))
    a, b = (hooks.read(model, batch, [4])[4] for batch in (padded, unpadded))
    assert a.shape == b.shape == (22, 32)
    assert torch.allclose(a, b, atol=1e-5)

    def kl_of_zero_ablation(batch):
        clean = lm.final_states(model, batch.input_ids)
        patched = hooks.patched_states(model, batch, {4: torch.zeros_like})
        logits = (lm.logits_of(model, states[batch.mask]) for states in (clean, patched))
        return float(metrics.KLDiv(*logits))

    kl = kl_of_zero_ablation(unpadded)
    assert kl > 0
    assert kl_of_zero_ablation(padded) == pytest.approx(kl, rel=1e-4)


def test_d3_padding_is_in_no_context(text):
    run(text, DEMO_LM, "--chunking", "words")
    argv = ["--output_dir", str(text.parent / "out"), "--chunking", "words", "--split", "train"]
    argv += ["--max_length", "24", "--max_samples", "12", "--act_threshold", "0", "--lines", "1"]
    total, path = Applier(config.parse("apply", argv)).run()
    assert total
    tokenizer = AutoTokenizer.from_pretrained(DEMO_LM)
    rows = Rows(text, tokenizer, 24, "train", chunking="words", max_samples=12)
    assert any((batch.document < 0).any() for batch in rows.batches(4))
    contexts = json.loads(path.read_text())
    shown = set()
    for entry in contexts["latent_context_map"].values():
        for tokens in entry["tokens"]:
            shown.update(tokens)
    assert not shown & set(tokenizer.all_special_tokens)
    assert contexts["tokens"] == sum(int(batch.mask.sum()) for batch in rows.batches(4))


def test_g3_sourcing_the_environment_overwrites_nothing_and_leaves_no_option_on(tmp_path):
    own = {
        "HF_TOKEN": "mine",
        "OPENAI_API_KEY": "mine",
        "OUTPUT_DIR": "mine",
        "CUDA_VISIBLE_DEVICES": "5",
        "HOME": str(tmp_path),
    }
    home_alone = {"HOME": str(tmp_path)}
    # The variables after sourcing, one per line, and then the shell options that are on.
    names = " ".join(own)
    script = f"source '{ROOT}/scripts/env_setup.sh'; false; "
    script += f"for name in {names}; do echo ${{!name}}; done; echo $-"
    for environment, expected in (
        (own, list(own.values())),
        (home_alone, ["", "", str(ROOT / "outputs"), "", str(tmp_path)]),
    ):
        done = subprocess.run(
            ["bash", "-c", script],
            env={"PATH": "/usr/bin:/bin"} | environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        *values, shell_options = done.stdout.splitlines()
        assert values == expected, done.stderr
        assert not set("eu") & set(shell_options)


def test_d8_a_text_without_spaces_is_kept_whole(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_LM)
    words = "模型的每一层都有稀疏特征" * 60
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": words}))
    rows = Rows(tmp_path / "t.jsonl", tokenizer, 16, "all")
    kept = [batch.input_ids[batch.mask | (batch.document >= 0)] for batch in rows.batches(8)]
    ids = torch.cat(kept).tolist()
    text = tokenizer.decode([token for token in ids if token not in tokenizer.all_special_ids])
    assert text.startswith(words[:700])


def test_d13_each_stage_reads_its_own_split():
    splits = []
    for stage in ("train", "evaluate", "apply"):
        cfg = config.parse(stage, ["--model_path", str(DEMO_LM), "--data_path", "x"])
        config.complete(cfg)
        splits.append(cfg.split)
    assert splits == ["train", "eval", "apply"]


def test_l6_a_tensor_and_a_tuple_are_both_read_and_rewritten():
    hidden, other = torch.randn(2, 3, 4), torch.randn(2, 3)
    for output in (hidden, (hidden, other)):
        assert torch.equal(lm.hidden_of(output), hidden)
        new = lm.with_hidden(output, hidden + 1)
        assert type(new) is type(output) and torch.equal(lm.hidden_of(new), hidden + 1)


def test_l14_sizes_that_contradict_the_language_model_are_refused(text):
    for flag, value in (("--n_layers", "12"), ("--hidden_size", "64")):
        with pytest.raises(ValueError, match=f"{flag} {value}, but the language model has"):
            run(text, DEMO_LM, flag, value)


@pytest.mark.parametrize("name", ["TopK", "MLSAE", "RouteSAE", "Crosscoder"])
def test_e4_l2_a_site_is_patched_where_it_was_read(name):
    """A patch receives at its sites the states that were read there."""
    model = tiny_lm()
    batch = batch_of(torch.randint(3, 4000, (2, 12)))
    sae = build(name, 32, 6, {"latent_size": 48, "k": 4})
    hidden = hooks.read(model, batch, sae.sites())
    for patches in sae.patches(hidden):
        received = {}

        def keep(site, received=received):
            # Returning the state unchanged: setdefault stores it and gives it back.
            return lambda h: received.setdefault(site, h)

        hooks.patched_states(model, batch, {site: keep(site) for site in patches})
        for site in patches:
            assert torch.equal(received[site], hidden[site])


def test_n7_a_crosscoders_norms_are_free_and_published_ones_are_not():
    sae = build("Crosscoder", 32, 6, {"latent_size": 48, "free_norms": True})
    with torch.no_grad():
        sae.decoder[0].weight.mul_(3)
    before = sae.decoder_norms().clone()
    unit_norm_decoder(sae)
    assert torch.equal(sae.decoder_norms(), before)
    bound = build("Crosscoder", 32, 6, {"latent_size": 48})
    with torch.no_grad():
        bound.decoder[0].weight.mul_(3)
    unit_norm_decoder(bound)
    assert torch.allclose(bound.decoder_norms(), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("width", [128, 2048])
def test_n13_jumprelus_defaults_scale_with_the_width(width):
    torch.manual_seed(0)
    sae = build("JumpReLU", width, 16, {"latent_size": 256})
    x = F.layer_norm(torch.randn(512, width), (width,))
    near = (sae.pre_acts(x) - sae.threshold).abs() < sae.bandwidth / 2
    assert near.float().mean() > 0.01  # published: 0.07 % of pre-activations can move a threshold
    assert sae.threshold[0] > sae.bandwidth / 2


def test_n23_a_decoder_column_of_zeros_stays_finite():
    sae = build("TopK", 32, 6, {"latent_size": 48, "k": 4})
    with torch.no_grad():
        sae.decoder.weight[:, 3] = 0
    unit_norm_decoder(sae)
    assert sae.decoder.weight.isfinite().all()


def test_n33_random_is_randomk_in_every_stage(text):
    run(text, DEMO_LM, "--model", "Random")
    assert run(text, DEMO_LM, "--metric", "NormMSE", stage="evaluate") > 0
    recipe = checkpoint.read_recipe(text.parent / "out" / "SAE_models" / "RandomK_t.pt")
    assert recipe["model"] == "RandomK"


def test_e1_kl_is_per_token_and_the_published_figure_its_sum_over_a_sequence():
    torch.manual_seed(0)
    a, b = torch.randn(2, 7, 50), torch.randn(2, 7, 50)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    published = float(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"))
    per_token = float(metrics.KLDiv(a.flatten(0, 1), b.flatten(0, 1)))
    assert per_token == pytest.approx(published / 7, rel=1e-5)


def test_e11_an_unknown_metric_ends_before_anything_is_loaded(capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse("evaluate", ["--metric", "Quality"])
    assert stop.value.code == 2 and "NormMSE" in capsys.readouterr().err


@pytest.mark.parametrize("n_layers", [4, 5, 7, 11])
def test_models_over_several_sites_work_at_any_depth(text, tmp_path, n_layers):
    folder = saved_lm(n_layers, tmp_path / "lm")
    names = ["RouteSAE", "MLSAE", "Crosscoder"]
    run(text, folder, "--model", *names, "--tag", "d")
    paths = [str(text.parent / "out" / "SAE_models" / f"{name}_t_d.pt") for name in names]
    options = ["--SAE_path", *paths, "--metric", "KLDiv", "Routing"]
    results = run(text, folder, *options, stage="evaluate")
    assert all(result["KLDiv"] > 0 for result in results.values())
    first, end = n_layers // 4, 3 * n_layers // 4 + 1
    assert len(results["RouteSAE_t_d"]["Routing"]["share"]) == end - first


def test_models_over_several_sites_refuse_a_shallow_language_model(text, tmp_path):
    folder = saved_lm(3, tmp_path / "lm")
    message = "3 blocks; a model over several sites needs a language model of at least 4"
    with pytest.raises(ValueError, match=message):
        run(text, folder, "--model", "RouteSAE")
    assert run(text, folder, "--model", "TopK") > 0
