"""The documented surface: every name with its positional form, every flag, file and script."""

import importlib
import inspect
import operator
from pathlib import Path

import pytest
import torch

from src import config, model
from src.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
SIGNATURES = {
    "src.model": {
        "TopK": "hidden_size latent_size k",
        "RouteSAE": "hidden_size n_layers latent_size k",
        "Vanilla": "hidden_size latent_size",
        "Gated": "hidden_size latent_size",
        "JumpReLU": "hidden_size latent_size threshold bandwidth",
        "Crosscoder": "hidden_size n_layers latent_size",
        "TopK.encode": "self x infer_k theta",
        "TopK.forward": "self x infer_k theta",
        "TopK.pre_acts": "self x",
        "TopK.decode": "self latents",
        "TopK.get_latents": "self pre_acts infer_k theta",
        "RouteSAE.get_router_weights": "self x aggre",
        "RouteSAE.route": "self x router_weights routing",
        "RouteSAE.forward": "self x aggre routing infer_k theta",
        "Vanilla.forward": "self x infer_k theta",
        "Crosscoder.pre_acts": "self x",
        "Crosscoder.forward": "self x infer_k theta",
        "get_model": "",
    },
    "src.data": {
        "OpenWebTextDataset": "folder_path tokenizer max_length max_samples keyword",
        "create_dataloader": "folder_path tokenizer batch_size max_length max_samples keyword",
    },
    "src.utils": {
        "set_seed": "seed",
        "parse_args": "",
        "get_language_model": "model_path device",
        "get_outputs": "cfg batch language_model device",
        "pre_process": "hidden_states eps",
        "Normalized_MSE_loss": "x x_hat",
        "L1_loss": "latents",
        "unit_norm_decoder": "model",
        "wandb_init": "project config name",
        "log_layers": "layer_weights",
        "save_json": "data path",
        "hook_SAE": "cfg model hooked_module set_high set_low is_zero",
        "RouteHook": "",
        "hook_RouteSAE": "cfg model language_model batch_layer_weights set_high set_low is_zero",
        "LinearWarmupLR": "optimizer num_warmup_steps num_training_steps max_lr",
    },
    "src.trainer": {"Trainer": "cfg", "Trainer.run": "self"},
    "src.evaluator": {
        "Evaluator": "cfg",
        "Evaluator.run": "self",
        "Evaluator.KLDiv": "logits_original logits_reconstruct",
    },
    "src.applier": {
        "Applier": "cfg",
        "Applier.get_context": "self threshold max_length max_per_token lines output_path",
    },
    "src.interpreter": {
        "Interpreter": "cfg",
        "Interpreter.construct_prompt": "self tokens_info",
        "Interpreter.chat_completion": "self client prompt max_retry",
        "Interpreter.run": "self data_path sample_latents output_path",
        "Interpreter.calculate_cost": "self",
    },
}
# Documented names whose arguments are not checked.
NAMES = {
    "src.model": "MLSAE RandomK Jump_func Step_func",
    "src.steerer": "Steerer",
    "src.metrics": "KLDiv",
}
FLAGS = """
model model_path hidden_size latent_size k layer n_layers l1_coeff threshold bandwidth aggre
routing data_path batch_size max_length lr betas num_epochs steps max_samples use_wandb
wandb_project SAE_path metric infer_k theta api_base api_version api_key engine output_dir
device seed recipe max_tokens chunking text_key max_bad_frac split dtype norm_eps auxk_coeff
dead_tokens target_l0 sparsity_warmup topk_relu b_pre_init grad_clip optimizer include_special
start_layer end_layer router_objective router_balance router_balance_coef route_scale save_every
resume deterministic tag overwrite trust_remote_code max_memory_hint route_patch site
act_threshold threshold_rel quantile context_length max_per_token lines top_n effect gzip
sample_latents api_type api_key_file concurrency requests_per_minute budget_usd budget_tokens
dry_run score set add multiply zero prompt prompts max_new_tokens mode format debug compile_lm
""".split()
FILES = """
src/__init__.py src/model.py src/data.py src/utils.py src/applier.py src/trainer.py
src/evaluator.py src/interpreter.py scripts/env_setup.sh scripts/download_data.sh
scripts/download_model.sh scripts/evaluate_compare.sh scripts/apply.sh scripts/interpret.sh
scripts/steer.sh scripts/quickstart.sh scripts/test.sh scripts/common.sh train.py evaluate.py
apply.py interpret.py steer.py export.py requirements.txt constraints.txt
docs/evaluation_results.md docs/LOG.md LICENSE CONTRIBUTING.md README.md
""".split()


@pytest.mark.parametrize(
    "module, name", [(module, name) for module, names in SIGNATURES.items() for name in names]
)
def test_documented_names_take_the_documented_arguments_in_their_order(module, name):
    function = operator.attrgetter(name)(importlib.import_module(module))
    expected = SIGNATURES[module][name].split()
    assert list(inspect.signature(function).parameters)[: len(expected)] == expected


@pytest.mark.parametrize("module", NAMES)
def test_other_documented_names_exist(module):
    for name in NAMES[module].split():
        assert callable(getattr(importlib.import_module(module), name)), name


def test_every_documented_flag_is_accepted_by_a_stage():
    known = set()
    for stage in config.STAGES:
        for action in config.parser(stage)._actions:
            known.update(action.option_strings)
    assert {f"--{flag}" for flag in FLAGS} <= known


def test_every_documented_file_exists():
    assert not [name for name in FILES if not (ROOT / name).exists()]


def test_scripts_pass_their_arguments_on():
    names = [f"train_{name.lower()}" for name in ZOO]
    names += ["evaluate_compare", "apply", "interpret", "steer", "download_data"]
    for name in names:
        assert '"$@"' in (ROOT / "scripts" / f"{name}.sh").read_text(), name


BIASES = {"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"}
GATED = {"latent_bias", "pre_bias", "gate_bias", "mag_bias", "r_mag"}
GATED |= {"encoder.weight", "decoder.weight"}
CROSSCODER = {"latent_bias"}
CROSSCODER |= {f"{part}.{i}.weight" for part in ("encoder", "decoder") for i in range(9)}
ROUTED = {"router.weight", *(f"sae.{key}" for key in BIASES)}


@pytest.mark.parametrize(
    "sae, documented",
    [
        (model.TopK(8, 32, 4), BIASES),
        (model.Vanilla(8, 32), BIASES),
        (model.Gated(8, 32), GATED),
        (model.JumpReLU(8, 32), BIASES | {"threshold"}),
        (model.Crosscoder(8, 16, 32), CROSSCODER),
        (model.RouteSAE(8, 16, 32, 4), ROUTED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_parameters_have_the_documented_names(sae, documented):
    names = set(sae.state_dict())
    # A model may lack the latent bias; it may have nothing beyond the documented parameters.
    assert documented - {"latent_bias"} <= names <= documented


@pytest.mark.parametrize(
    "sae", [model.TopK(8, 32, 4), model.Vanilla(8, 32), model.Gated(8, 32), model.JumpReLU(8, 32)]
)
def test_models_of_one_site_return_latents_and_reconstruction(sae):
    x = torch.randn(2, 3, 8)
    latents, x_hat = sae(x)
    assert latents.shape == (2, 3, 32)
    assert x_hat.shape == x.shape


def test_models_of_several_sites_return_the_documented_tuples():
    x = torch.randn(2, 3, 9, 8)
    route = model.RouteSAE(8, 16, 32, 4)
    assert (route.start_layer, route.end_layer, route.n_routed_layers) == (4, 13, 9)
    layer_weights, routed_x, latents, x_hat, router_weights = route(x)
    assert layer_weights.shape == router_weights.shape == (2, 3, 9)
    assert routed_x.shape == x_hat.shape == (2, 3, 8)
    assert latents.shape == (2, 3, 32)
    latents, x_hat = model.Crosscoder(8, 16, 32)(x)
    assert latents.shape == (2, 3, 32)
    assert x_hat.shape == x.shape


@pytest.mark.parametrize(
    "call",
    [
        lambda: model.TopK(0, 32, 4),
        lambda: model.TopK(8, 0, 4),
        lambda: model.TopK(8, 32, 0),
        lambda: model.TopK(8, 32, 33),
        lambda: model.Vanilla(8, -1),
        lambda: model.Gated(0, 32),
        lambda: model.JumpReLU(8, 0),
        lambda: model.Crosscoder(8, 3, 32),
        lambda: model.RouteSAE(8, 3, 32, 4),
        lambda: model.TopK(8, 32, 4)(torch.randn(2, 8), infer_k=2, theta=0.1),
        lambda: model.RouteSAE(8, 16, 32, 4)(torch.randn(2, 9, 8), aggre="max"),
        lambda: model.RouteSAE(8, 16, 32, 4)(torch.randn(2, 9, 8), routing="no"),
    ],
)
def test_documented_value_errors(call):
    with pytest.raises(ValueError):
        call()
