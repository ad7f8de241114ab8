"""SAEs of other programs: small files in each documented layout, with the forward written out.

No other library is needed. tests/interop compares with the libraries themselves.
"""

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_formats import random_sae, recipe_of

from src import checkpoint, export_formats, files, import_formats, lm, tensor_files
from src.config import model_options, parse
from src.evaluator import Evaluator

D, F, K, BLOCK = 24, 80, 7, 5
SITE = BLOCK + 1


class Case(NamedTuple):
    """An SAE as another program wrote it, and what its documentation says that it computes."""

    path: Path
    model: str  # the model here that holds it
    code: Callable[[torch.Tensor], torch.Tensor]  # raw states [N,D] -> [N,F]
    decode: Callable[[torch.Tensor], torch.Tensor]  # [N,F] -> reconstruction of raw states
    language_model: str | None


def tensors():
    """Random weights of every kind, in which each matters. Decoder rows have norms around 1.5."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    return {
        "W_enc": draw(D, F, scale=0.3),
        "W_dec": draw(F, D, scale=0.3),
        "b_enc": draw(F, scale=0.2),
        "b_dec": draw(D, scale=0.5),
        "threshold": draw(F).abs(),
        "b_gate": draw(F, scale=0.2),
        "b_mag": draw(F, scale=0.2),
        "r_mag": draw(F, scale=0.2),
    }


def topk(pre_acts, k=K):
    values, indices = pre_acts.relu().topk(k, dim=-1)
    return torch.zeros_like(pre_acts).scatter(-1, indices, values)


def above(pre_acts, threshold):
    return pre_acts.relu() * (pre_acts > threshold)


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def save(path, weights):
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous().clone() for name, value in weights.items()}
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)


# ------------------------------------------------------------------------ one writer a format


def sparsify(root, **changes):
    w, folder = tensors(), root / "run" / f"layers.{BLOCK}"
    weights = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    save(folder / "sae.safetensors", weights | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]})
    config = {"activation": "topk", "expansion_factor": 32, "num_latents": F, "k": K, "d_in": D}
    config |= {"normalize_decoder": True, "skip_connection": False, "transcode": False}
    write_json(folder / "cfg.json", config | changes)
    write_json(folder.parent / "config.json", {"model": "org/lm", "ctx_len": 2048})

    def code(h):
        return topk((h - w["b_dec"]) @ w["W_enc"] + w["b_enc"])

    return Case(folder, "TopK", code, lambda f: f @ w["W_dec"] + w["b_dec"], "org/lm")


LEARNED_MODELS = {
    "AutoEncoder": "Vanilla",
    "AutoEncoderNew": "Vanilla",
    "GatedAutoEncoder": "Gated",
    "JumpReluAutoEncoder": "JumpReLU",
    "AutoEncoderTopK": "TopK",
    "BatchTopKSAE": "BatchTopK",
    "MatryoshkaBatchTopKSAE": "Matryoshka",
}


def learned(root, dict_class="AutoEncoder", trainer=(), buffer=(), extra=()):
    """A folder of dictionary_learning, with the class's own names and orientation."""
    w, folder = tensors(), root / "trainer_0"
    linear = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    plain = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    k, cut = torch.tensor(K, dtype=torch.int), torch.tensor(0.8)
    biased = linear | {"encoder.bias": w["b_enc"]}
    weights = {
        "AutoEncoder": biased | {"bias": w["b_dec"]},
        "AutoEncoderNew": biased | {"decoder.bias": w["b_dec"]},
        "GatedAutoEncoder": linear
        | {"decoder_bias": w["b_dec"], "gate_bias": w["b_gate"]}
        | {"mag_bias": w["b_mag"], "r_mag": w["r_mag"]},
        "JumpReluAutoEncoder": plain | {"threshold": w["threshold"]},
        "AutoEncoderTopK": biased | {"b_dec": w["b_dec"], "k": k, "threshold": torch.tensor(-1.0)},
        "BatchTopKSAE": biased | {"b_dec": w["b_dec"], "k": k, "threshold": cut},
        "MatryoshkaBatchTopKSAE": plain
        | {"k": k, "threshold": cut, "group_sizes": torch.tensor([30, 50])},
    }[dict_class]
    save(folder / "ae.pt", weights | dict(extra))
    options = {"dict_class": dict_class, "layer": BLOCK, "lm_name": "org/lm", "k": K}
    options |= {"submodule_name": f"resid_post_layer_{BLOCK}", "activation_dim": D, "dict_size": F}
    write_json(
        folder / "config.json",
        {
            "trainer": options | dict(trainer),
            "buffer": {"io": "out", "ctx_len": 128} | dict(buffer),
        },
    )
    is_centred = dict_class not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    # Loading an AutoEncoder there gives its decoder columns of norm 1.
    norms = w["W_dec"].norm(dim=-1) if dict_class == "AutoEncoder" else torch.ones(F)

    def code(h):
        product = (h - w["b_dec"] * is_centred) @ w["W_enc"]
        pre_acts = product + w["b_enc"]
        if dict_class == "GatedAutoEncoder":
            magnitude = (product * w["r_mag"].exp() + w["b_mag"]).relu()
            return (product + w["b_gate"] > 0) * magnitude
        if dict_class == "AutoEncoderTopK":
            return topk(pre_acts)
        if dict_class == "JumpReluAutoEncoder":
            return (pre_acts * (pre_acts > w["threshold"])).relu()
        if "BatchTopK" in dict_class:
            return above(pre_acts, cut)
        return pre_acts.relu() * norms

    def decode(f):
        return (f / norms) @ w["W_dec"] + w["b_dec"]

    return Case(folder, LEARNED_MODELS[dict_class], code, decode, "org/lm")


def gemma_scope(root, folder=f"gemma-scope-2b-pt-res/layer_{BLOCK}/width_16k/average_l0_71"):
    w, folder = tensors(), root / folder
    folder.mkdir(parents=True)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    np.savez(folder / "params.npz", **{name: w[name].numpy() for name in names})

    def code(h):
        return above(h @ w["W_enc"] + w["b_enc"], w["threshold"])

    language_model = "google/gemma-2-2b"
    return Case(folder, "JumpReLU", code, lambda f: f @ w["W_dec"] + w["b_dec"], language_model)


def gemma_scope_2(root, folder=f"resid_post/layer_{BLOCK}_width_16k_l0_medium", **changes):
    w, folder = tensors(), root / folder
    weights = {"w_enc": w["W_enc"], "w_dec": w["W_dec"]}
    weights |= {name: w[name] for name in ("b_enc", "b_dec", "threshold")}
    save(folder / "params.safetensors", weights)
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"}
    config["hf_hook_point_in"] = f"model.layers.{BLOCK}.output"
    write_json(folder / "config.json", config | changes)

    def code(h):
        return above(h @ w["W_enc"] + w["b_enc"], w["threshold"])

    language_model = "google/gemma-3-1b-pt"
    return Case(folder, "JumpReLU", code, lambda f: f @ w["W_dec"] + w["b_dec"], language_model)


NORM = 8.0  # mean norm of the states that an SAE of OpenMOSS was trained on
SCALE = math.sqrt(D) / NORM


def llama_scope(root, activation="jumprelu", **changes):
    w, folder = tensors(), root / f"Llama3_1-8B-Base-L{BLOCK}R-8x"
    weights = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    weights |= {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    save(folder / "checkpoints" / "final.safetensors", weights)
    hook, threshold = f"blocks.{BLOCK}.hook_resid_post", 0.9
    config = {
        "hook_point_in": hook,
        "hook_point_out": hook,
        "d_model": D,
        "d_sae": F,
        "act_fn": activation,
        "jump_relu_threshold": threshold,
        "top_k": K,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": NORM, "out": NORM},
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
    }
    write_json(folder / "hyperparams.json", config | changes)
    norms = w["W_dec"].norm(dim=-1)

    def code(h):
        pre_acts = (SCALE * h @ w["W_enc"] + w["b_enc"]) * norms
        return topk(pre_acts) if activation == "topk" else above(pre_acts, threshold * SCALE)

    model = {"topk": "TopK", "jumprelu": "JumpReLU"}[activation]
    decode = lambda f: ((f / norms) @ w["W_dec"] + w["b_dec"]) / SCALE  # noqa: E731
    return Case(folder, model, code, decode, "meta-llama/Llama-3.1-8B")


def llamascopium(root, activation="jumprelu", has_norms=True, **changes):
    w, folder = tensors(), root / "sae"
    hook = f"blocks.{BLOCK}.hook_resid_post"
    weights = {"W_E": w["W_enc"], "W_D": w["W_dec"], "b_E": w["b_enc"], "b_D": w["b_dec"]}
    weights[f"dataset_average_activation_norm.{hook}"] = torch.tensor(NORM)
    if activation == "jumprelu":
        weights["activation_function.log_jumprelu_threshold"] = w["threshold"].log()
    save(folder / "sae_weights.safetensors", weights)
    config = {
        "sae_type": "sae",
        "hook_point_in": hook,
        "hook_point_out": hook,
        "d_model": D,
        "expansion_factor": F / D,
        "act_fn": activation,
        "top_k": K,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": has_norms,
    }
    write_json(folder / "config.json", config | changes)
    write_json(folder / "lm_config.json", {"model_name": "org/lm"})
    norms = w["W_dec"].norm(dim=-1) if has_norms else torch.ones(F)
    # A TopK ranks by pre-activation times norm; here its codes keep that factor.
    kept = norms if activation == "topk" else torch.ones(F)

    def code(h):
        pre_acts = (SCALE * h @ w["W_enc"] + w["b_enc"]) * norms
        if activation == "topk":
            return topk(pre_acts)
        threshold = w["threshold"] if activation == "jumprelu" else 0.0
        return above(pre_acts, threshold) / norms

    model = {"topk": "TopK", "jumprelu": "JumpReLU", "relu": "Vanilla"}[activation]
    decode = lambda f: ((f / kept) @ w["W_dec"] + w["b_dec"]) / SCALE  # noqa: E731
    return Case(folder, model, code, decode, "org/lm")


def openai(root, activation="TopK", place="resid_post_mlp_v5_32k", postact="ReLU", **changes):
    w, path = tensors(), root / place / "autoencoders" / f"{BLOCK}.pt"
    path.parent.mkdir(parents=True)
    state = {
        "pre_bias": w["b_dec"],
        "encoder.weight": w["W_enc"].T.contiguous(),
        "latent_bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
        "latents_activation_frequency": torch.ones(F),
        "latents_mean_square": torch.zeros(F),
        "activation": activation,
        "activation_state_dict": {"k": K, "postact_fn": postact} if activation == "TopK" else {},
    }
    torch.save(state | changes, path)
    is_topk = activation == "TopK"

    def moments(h):
        centred = h - h.mean(-1, keepdim=True)
        return centred.std(-1, keepdim=True), h.mean(-1, keepdim=True)

    def code(h):
        std, mean = moments(h)
        x = (h - mean) / (std + 1e-5) if is_topk else h
        pre_acts = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        return topk(pre_acts) if is_topk else pre_acts.relu()

    model = "TopK" if is_topk else "Vanilla"
    decode = lambda f: f @ w["W_dec"] + w["b_dec"]  # noqa: E731
    return Case(path, model, code, decode, "openai-community/gpt2")


CASES = {
    "sparsify": sparsify,
    **{name: lambda root, name=name: learned(root, name) for name in LEARNED_MODELS},
    "Gemma Scope": gemma_scope,
    "Gemma Scope 2": gemma_scope_2,
    "Llama Scope": llama_scope,
    "Llama Scope topk": lambda root: llama_scope(root, "topk"),
    "Llamascopium": llamascopium,
    "Llamascopium without norms": lambda root: llamascopium(root, has_norms=False),
    "Llamascopium relu": lambda root: llamascopium(root, "relu"),
    "Llamascopium topk": lambda root: llamascopium(root, "topk"),
    "OpenAI TopK": openai,
    "OpenAI ReLU": lambda root: openai(root, "ReLU", "resid_post_mlp"),
}


def fvu(h, h_hat):
    """Fraction of variance unexplained, as sparsify computes it."""
    return float((h - h_hat).square().sum() / (h - h.mean(0)).square().sum())


def states(n_tokens=500):
    return 3 * torch.randn(n_tokens, D, generator=torch.Generator().manual_seed(1)) + 1


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_each_format_gives_the_codes_and_reconstructions_of_its_documentation(name, tmp_path):
    case, h = CASES[name](tmp_path), states()
    sae, recipe = checkpoint.load(case.path)
    assert recipe["model"] == case.model and sae.sites() == [SITE]
    assert recipe.get("model_path") == case.language_model
    out = sae.autoencode(sae.gather({SITE: h}))
    expected = case.code(h)
    assert 0 < (expected != 0).float().mean() < 1
    assert torch.equal(out.latents != 0, expected != 0)
    assert (out.latents - expected).abs().max() <= 1e-5 * expected.max()
    (patch,) = sae.patches({SITE: h})
    h_hat = case.decode(expected)
    if sae.input_norm == "token":
        _, mean, std = sae.standardise(h)
        h_hat = h_hat * std + mean
    assert torch.allclose(patch[SITE](h), h_hat, atol=1e-4)
    assert fvu(h, patch[SITE](h)) == pytest.approx(fvu(h, h_hat), rel=1e-5)


@torch.no_grad()
def test_weights_in_bfloat16_become_float32_of_the_same_values(tmp_path, monkeypatch):
    rounded = {name: value.bfloat16().float() for name, value in tensors().items()}
    monkeypatch.setitem(globals(), "tensors", lambda: rounded)
    for case in (sparsify(tmp_path), gemma_scope_2(tmp_path)):
        (path,) = case.path.glob("*.safetensors")
        save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
        sae, _ = checkpoint.load(case.path)
        assert {value.dtype for value in sae.state_dict().values()} == {torch.float32}
        latents = sae.encode(sae.gather({SITE: states()}))
        assert torch.allclose(latents, case.code(states()), atol=1e-5)


def test_without_a_configuration_the_folder_of_gemma_scope_2_says_the_site(tmp_path):
    case = gemma_scope_2(tmp_path)
    (case.path / "config.json").unlink()
    assert checkpoint.load(case.path)[0].sites() == [SITE]
    attention = gemma_scope_2(tmp_path, "attn_out/layer_5_width_16k_l0_medium")
    (attention.path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"attn_out/layer_5.*\(attention\)"):
        checkpoint.load(attention.path)


def test_a_nested_dictionary_keeps_its_groups_and_a_threshold_below_0_lets_all_positive_pass(
    tmp_path,
):
    case = learned(tmp_path, "MatryoshkaBatchTopKSAE", extra={"threshold": torch.tensor(-1.0)})
    sae, recipe = checkpoint.load(case.path)
    assert recipe["config"]["matryoshka_widths"] == [30] and sae.k == K and sae.cut == 0
    latents = sae.autoencode(sae.gather({SITE: states()})).latents
    assert (latents >= 0).all() and (latents > 0).float().mean() > 0.3


def test_a_topk_of_openai_may_keep_negative_values(tmp_path):
    case = openai(tmp_path, postact="Identity")
    sae, _ = checkpoint.load(case.path)
    assert not sae.topk_relu


def test_a_file_of_weights_stands_for_its_folder_and_one_site_in_a_folder_for_the_folder(tmp_path):
    for number, name in enumerate(("sparsify", "Llama Scope", "Gemma Scope")):
        case = CASES[name](tmp_path / str(number))
        known = import_formats._format_of(case.path)
        by_file, _ = checkpoint.load(case.path / known.weights)
        above_it, _ = checkpoint.load(case.path.parent)
        assert by_file.sites() == above_it.sites() == [SITE]
    second = tmp_path / "0" / "run" / "layers.2"
    second.mkdir()
    for file in ("cfg.json", "sae.safetensors"):
        (second / file).write_bytes((second.parent / f"layers.{BLOCK}" / file).read_bytes())
    with pytest.raises(ValueError, match=r"it has SAEs in layers\.2, layers\.5: name one"):
        checkpoint.load(second.parent)


def test_seeds_of_sparsify_and_modules_of_gpt2_are_sites(tmp_path):
    case = sparsify(tmp_path)
    for name in ("layers.3/seed1", "h.3", "transformer.h.3"):
        folder = tmp_path / "other" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        case.path.rename(folder)
        case = case._replace(path=folder)
        assert checkpoint.load(folder)[0].sites() == [4]


def test_layer_says_the_site_where_no_name_does(tmp_path, capsys):
    hints = {"layer": 9}
    bare = gemma_scope(tmp_path, "downloaded")
    with pytest.raises(ValueError, match="no folder is named layer_N; say the site with --layer"):
        checkpoint.load(bare.path)
    assert checkpoint.load(bare.path, hints=hints)[0].sites() == [9]
    assert "taken for an SAE of blocks.8.hook_resid_post" in capsys.readouterr().out
    path = openai(tmp_path).path
    named = path.rename(tmp_path / "autoencoder.pt")
    with pytest.raises(ValueError, match="autoencoder.pt is no number of a block"):
        checkpoint.load(named)
    assert checkpoint.load(named, hints=hints)[0].sites() == [9]
    # Typed, it corrects what names say.
    for case in (gemma_scope(tmp_path), sparsify(tmp_path), learned(tmp_path)):
        assert checkpoint.load(case.path, hints=hints)[0].sites() == [9]


REFUSED = {
    "transcoder of sparsify": (lambda r: sparsify(r, transcode=True), "what a module gives"),
    "skip connection": (lambda r: sparsify(r, skip_connection=True), "linear map of its input"),
    "signed": (lambda r: sparsify(r, signed=True), "with their sign"),
    "groupmax": (lambda r: sparsify(r, activation="groupmax"), "'groupmax'"),
    "no k": (lambda r: sparsify(r, k=None), "does not say k"),
    "k of true": (lambda r: sparsify(r, k=True), "its k is True"),
    "k above the latents": (lambda r: sparsify(r, k=F + 1), "its k is 81, of 80 latents"),
    "unknown class": (lambda r: learned(r, trainer={"dict_class": "X"}), "its class is 'X'"),
    "class of a list": (lambda r: learned(r, trainer={"dict_class": []}), "its class is"),
    "no trainer": (lambda r: rewritten(learned(r), {"trainer": 3}), "has no trainer"),
    "input of a module": (lambda r: learned(r, buffer={"io": "in"}), "goes into"),
    "mlp": (
        lambda r: learned(r, trainer={"submodule_name": "mlp_layer_5"}),
        r"'mlp_layer_5' \(an MLP\)",
    ),
    "attention": (
        lambda r: learned(r, trainer={"submodule_name": "attention_out_layer_5"}),
        r"\(attention\)",
    ),
    "layer of text": (lambda r: learned(r, trainer={"layer": "5"}), "its layer is '5'"),
    "more tensors": (lambda r: learned(r, extra={"ghost": torch.ones(3)}), "its tensors are"),
    "integers": (
        lambda r: learned(r, extra={"bias": torch.ones(D, dtype=torch.long)}),
        "bias holds torch.int64",
    ),
    "no finite values": (
        lambda r: learned(r, extra={"bias": torch.full((D,), torch.nan)}),
        "not finite",
    ),
    "other shapes": (
        lambda r: learned(r, extra={"bias": torch.ones(D + 1)}),
        "b_dec has the shape",
    ),
    "attention of Gemma": (
        lambda r: gemma_scope(r, "gemma-scope-9b-pt-att/layer_5/x"),
        r"'gemma-scope-9b-pt-att' \(attention\)",
    ),
    "MLP of Gemma": (
        lambda r: gemma_scope(r, "gemma-scope-9b-it-mlp/layer_5/x"),
        r"'gemma-scope-9b-it-mlp' \(an MLP\)",
    ),
    "transcoder of Gemma": (
        lambda r: gemma_scope(r, "gemma-scope-2b-pt-transcoders/layer_5/x"),
        "'gemma-scope-2b-pt-transcoders'",
    ),
    "embeddings of Gemma": (
        lambda r: gemma_scope(r, "gemma-scope-2b-pt-res/embedding/x"),
        "the embeddings",
    ),
    "attention of Gemma 3": (
        lambda r: gemma_scope_2(r, hf_hook_point_in="model.layers.5.self_attn.o_proj.input"),
        r"o_proj\.input' \(attention\)",
    ),
    "transcoder of Gemma 3": (
        lambda r: gemma_scope_2(r, hf_hook_point_out="model.layers.5.x"),
        "and predicts 'model.layers.5.x'",
    ),
    "architecture of Gemma 3": (lambda r: gemma_scope_2(r, architecture="topk"), "'topk'"),
    "transcoder of Llama Scope": (
        lambda r: llama_scope(r, hook_point_out="blocks.5.hook_mlp_out"),
        "and predicts",
    ),
    "MLP of Llama Scope": (
        lambda r: llama_scope(r, hook_point_in="x.hook_mlp_out", hook_point_out="x.hook_mlp_out"),
        r"\(an MLP\)",
    ),
    "GLU": (lambda r: llama_scope(r, use_glu_encoder=True), "gating layer"),
    "token-wise": (lambda r: llama_scope(r, norm_activation="token-wise"), "scaled token-wise"),
    "no norm": (lambda r: llama_scope(r, dataset_average_activation_norm=None), "norm is None"),
    "norm of text": (
        lambda r: llama_scope(r, dataset_average_activation_norm={"in": "8"}),
        "norm is '8'",
    ),
    "two norms": (
        lambda r: llama_scope(r, dataset_average_activation_norm={"in": 8.0, "out": 2.0}),
        "outputs by 2.0",
    ),
    "threshold of a list": (lambda r: llama_scope(r, jump_relu_threshold=[1]), "threshold is"),
    "crosscoder": (lambda r: llamascopium(r, sae_type="crosscoder"), "'crosscoder'"),
    "batchtopk": (lambda r: llamascopium(r, "relu", act_fn="batchtopk"), "'batchtopk'"),
    "MLP of OpenAI": (lambda r: openai(r, place="mlp_post_act"), r"\(an MLP\)"),
    "resid_mid of OpenAI": (lambda r: openai(r, place="resid_post_attn_v5_32k"), "inside a block"),
    "unknown activation": (lambda r: openai(r, "Identity"), "'Identity'"),
    "tied decoder": (
        lambda r: openai(r, **{"decoder.linear.weight": torch.ones(F, D)}),
        "its tensors are",
    ),
}


def rewritten(case, config):
    write_json(case.path / "config.json", config)
    return case


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_model_here_holds_is_refused_by_name_in_one_line(name, tmp_path):
    make, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"cannot be held exactly here: .*{reason}") as caught:
        checkpoint.load(make(tmp_path).path)
    assert "\n" not in str(caught.value)


def test_a_hub_name_asks_for_the_files_of_every_format_in_its_folder(tmp_path, monkeypatch):
    asked = {}

    def download(repo, revision=None, allow_patterns=None):
        asked[repo] = allow_patterns
        return str(tmp_path / repo.partition("/")[2])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    case = gemma_scope(tmp_path)
    name = "/".join(case.path.parts[-4:])
    sae, recipe = checkpoint.load(f"google/{name}")
    assert sae.sites() == [SITE] and recipe["model_path"] == case.language_model
    assert recipe["title"] == f"layer_{BLOCK}_width_16k_average_l0_71"
    inside = name.partition("/")[2]
    assert f"{inside}/params.npz" in asked["google/gemma-scope-2b-pt-res"]
    sparsify(tmp_path)
    _, recipe = checkpoint.load(f"org/run/layers.{BLOCK}")
    assert recipe["title"] == f"run_layers.{BLOCK}" and recipe["model_path"] == "org/lm"
    wanted = {f"layers.{BLOCK}/cfg.json", f"layers.{BLOCK}/sae.safetensors", "config.json"}
    assert wanted <= set(asked["org/run"])
    # Without a folder only configurations are fetched, which is enough to say what there is.
    (tmp_path / "run" / f"layers.{BLOCK}" / "sae.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"it has SAEs in layers\.{BLOCK}: name one"):
        checkpoint.load("org/run")


def test_one_evaluation_measures_saes_of_several_formats(tmp_path, monkeypatch):
    """Their hidden size is that of the built-in language model."""
    monkeypatch.setitem(globals(), "D", lm.sizes_by_config(str(files.DEMO_LM), False)[0])
    text = [
        json.dumps({"text": f"Return the value {n} of the array, or None. " * 9}) for n in range(99)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(text))
    names = ("sparsify", "AutoEncoderTopK", "Gemma Scope", "Llamascopium", "OpenAI TopK")
    cases = [CASES[name](tmp_path / str(number)) for number, name in enumerate(names)]
    argv = ["--SAE_path", *(str(case.path) for case in cases), "--metric", "NormMSE", "FVU", "L0"]
    argv += ["--model_path", str(files.DEMO_LM), "--data_path", str(tmp_path / "text.jsonl")]
    argv += ["--max_length", "32", "--max_samples", "16", "--dtype", "float32"]
    results = Evaluator(parse("evaluate", [*argv, "--output_dir", str(tmp_path / "out")])).run()
    assert len(results) == len(cases)
    for result, name in zip(results.values(), names, strict=True):
        assert math.isfinite(result["NormMSE"]) and result["FVU"] > 0
        assert result["L0"] == K or "Gemma" in name or "Llama" in name


# ------------------------------------------------------------------------------- hostile files


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_no_pickle_in_a_file_of_any_format_is_run(tmp_path):
    ran = tmp_path / "ran"
    case = learned(tmp_path)
    torch.save({"encoder.weight": Payload(ran)}, case.path / "ae.pt")
    with pytest.raises(ValueError, match="nothing in it was run"):
        checkpoint.load(case.path)
    gemma = gemma_scope(tmp_path).path
    objects = np.array([Payload(ran)], dtype=object)
    np.savez(gemma / "params.npz", W_enc=objects)
    with pytest.raises(ValueError, match="W_enc.npy holds objects; nothing in it was run"):
        checkpoint.load(gemma)
    path = openai(tmp_path).path
    torch.save({"stats_last_nonzero": Payload(ran)}, path)
    with pytest.raises(ValueError, match="nothing in it was run"):
        checkpoint.load(path)
    assert not ran.exists()


def test_an_npz_is_measured_before_it_takes_memory(tmp_path):
    gemma = gemma_scope(tmp_path).path / "params.npz"
    np.savez_compressed(gemma, W_enc=np.zeros((2000, 2000), np.float32))
    with pytest.raises(ValueError, match="unpacks to 16,000,000 bytes"):
        tensor_files.read_npz(gemma)
    # A header that states a terabyte in a small file.
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**18)}
    with zipfile.ZipFile(gemma, "w") as archive, archive.open("W_enc.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(64))
    with pytest.raises(ValueError, match=r"states the shape \(1048576, 262144\) and holds less"):
        tensor_files.read_npz(gemma)
    # Weights that were packed by numpy are none of that.
    w = {name: value.numpy() for name, value in tensors().items() if name[0] != "r"}
    np.savez_compressed(gemma, **w)
    assert tensor_files.read_npz(gemma).keys() == w.keys()


FILES_OF = {
    "sparsify": ("sae.safetensors", "cfg.json"),
    "AutoEncoderTopK": ("ae.pt", "config.json"),
    "Gemma Scope": ("params.npz",),
    "Gemma Scope 2": ("params.safetensors", "config.json"),
    "Llama Scope": ("checkpoints/final.safetensors", "hyperparams.json"),
    "Llamascopium": ("sae_weights.safetensors", "config.json"),
    "OpenAI TopK": ("",),
}


@pytest.mark.parametrize("name", FILES_OF)
def test_damaged_files_end_in_one_line(name, tmp_path):
    case, generator = CASES[name](tmp_path), np.random.default_rng(0)
    for file in FILES_OF[name]:
        path = case.path / file if file else case.path
        content = path.read_bytes()
        damaged = [b"", content[: len(content) // 2], content[:-1], bytes(100), b"{" * 5000]
        for _ in range(12):
            changed = bytearray(content)
            changed[int(generator.integers(min(len(content), 400)))] ^= 1 << generator.integers(8)
            damaged.append(bytes(changed))
        for bad in damaged:
            path.write_bytes(bad)
            try:
                checkpoint.load(case.path)
            except ValueError as error:
                assert "\n" not in str(error)
        path.write_bytes(content)
    checkpoint.load(case.path)


@pytest.mark.parametrize("name", [name for name in FILES_OF if len(FILES_OF[name]) > 1])
def test_options_of_any_type_end_in_one_line(name, tmp_path):
    case = CASES[name](tmp_path)
    path = case.path / FILES_OF[name][1]
    config = json.loads(path.read_text())
    levels = [config, config["trainer"]] if "trainer" in config else [config]
    for level in levels:
        for key, value in list(level.items()):
            for other in (None, True, -1, 1e300, "x", [], [1], {}, {"x": [None]}):
                level[key] = other
                path.write_text(json.dumps(config))
                try:
                    checkpoint.load(case.path)
                except ValueError as error:
                    assert "\n" not in str(error)
            level[key] = value


# ------------------------------------------------------------------------------- take home


def raw_sae(name, **options):
    """An SAE of raw states, which every library can hold; decoder columns have norm 1."""
    sae = random_sae(name, input_norm="none", **options)
    for decoder in sae.decoders():
        with torch.no_grad():
            decoder.weight.div_(decoder.weight.norm(dim=0))
    return sae


EXPORTED = {
    "sparsify": {"TopK": "TopK", "MLSAE": "TopK"},
    "dictionary_learning": {
        "TopK": "TopK",
        "Vanilla": "Vanilla",
        "Gated": "Gated",
        "JumpReLU": "JumpReLU",
        "BatchTopK": "JumpReLU",
        "MLSAE": "TopK",
    },
}


@pytest.mark.parametrize(
    "kind, name, model", [(k, n, m) for k, names in EXPORTED.items() for n, m in names.items()]
)
def test_an_export_reads_back_with_the_same_codes(kind, name, model, tmp_path):
    sae, h = raw_sae(name), states()
    recipe = recipe_of(sae, model_path="org/lm", data_path="org/text")
    folder = export_formats.export(sae, recipe, tmp_path, kind)
    sites = sorted(path for path in folder.iterdir() if path.is_dir())
    assert len(sites) == len(sae.sites())
    for site_folder in sites:
        again, recipe = checkpoint.load(site_folder)
        (site,) = again.sites()
        assert recipe["model"] == model and recipe["model_path"] == "org/lm"
        assert site in sae.sites()
        expected = sae.encode(sae.standardise(h)[0])
        latents = again.encode(again.gather({site: h}))
        assert torch.equal(latents != 0, expected != 0)
        assert (latents - expected).abs().max() <= 1e-5 * expected.max()
    text = (folder / "README.md").read_text()
    assert f"library_name: {kind}" in text and f'"{sites[0].name}"' in text


@torch.no_grad()
@pytest.mark.parametrize("name", ["sparsify", "AutoEncoderNew", "Gemma Scope", "OpenAI TopK"])
def test_a_published_sae_is_converted_by_exporting_it(name, tmp_path):
    case, h = CASES[name](tmp_path / "from"), states()
    sae, recipe = checkpoint.load(case.path)
    folder = export_formats.export(sae, recipe, tmp_path, "saelens")
    again, recipe = checkpoint.load(folder / f"blocks.{BLOCK}.hook_resid_post")
    assert recipe["model_path"] == case.language_model
    assert (again.encode(again.gather({SITE: h})) - case.code(h)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "kind, make, reason",
    [
        ("sparsify", lambda: random_sae("TopK"), "it standardises the state of each token"),
        ("sparsify", lambda: random_sae("TopK", input_norm="mean"), "subtracts its mean"),
        ("sparsify", lambda: raw_sae("JumpReLU"), "a jumprelu SAE, and sparsify knows topk"),
        ("sparsify", lambda: raw_sae("TopK", k=60), "negative values"),
        ("dictionary_learning", lambda: random_sae("TopK"), "it standardises"),
        ("dictionary_learning", lambda: random_sae("Vanilla", input_norm="none"), "other norms"),
    ],
)
def test_what_a_library_cannot_express_is_refused_with_the_reason(kind, make, reason, tmp_path):
    sae = make()
    with pytest.raises(ValueError, match=reason):
        export_formats.export(sae, recipe_of(sae), tmp_path, kind)
    assert not list(tmp_path.rglob("*.json"))


def test_input_norm_trains_an_sae_of_raw_states():
    cfg = parse("train", ["--input_norm", "none", "--model", "TopK", "RouteSAE"])
    assert model_options(cfg, "TopK")["input_norm"] == "none"
    # A router compares the sites, for which it needs standardised states.
    assert "input_norm" not in model_options(cfg, "RouteSAE")


def test_sparsify_files_hold_what_its_loader_wants(tmp_path):
    sae, h = raw_sae("TopK"), states()
    folder = export_formats.export(sae, recipe_of(sae), tmp_path, "sparsify") / "layers.5"
    w, config = load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())
    assert w.keys() == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    pre_acts = torch.nn.functional.linear(h - w["b_dec"], w["encoder.weight"], w["encoder.bias"])
    assert config["num_latents"] == len(w["W_dec"]) and config["d_in"] == h.shape[1]
    assert torch.allclose(topk(pre_acts, config["k"]), sae.encode(h), atol=1e-5)


def test_the_card_names_the_licence_that_was_chosen(tmp_path):
    sae = random_sae("TopK")
    folder = export_formats.export(sae, recipe_of(sae), tmp_path, "hf", licence="mit")
    head = (folder / "README.md").read_text().split("---")[1]
    assert "\nlicense: mit\n" in head and "library_name: routesae-repro" in head
    with pytest.raises(ValueError, match="write it as the hub does"):
        export_formats.export(sae, recipe_of(sae), tmp_path, "saelens", licence="mit\n---")
