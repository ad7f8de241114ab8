"""SAEs that other libraries wrote, read here; SAEs of this program, read there.

Each library writes a small SAE with random weights, and its own forward is compared with that of
the model here that holds it. The largest differences are printed. A library that is not installed
is skipped. tests/interop/run.sh makes the environment.
"""

import http.server
import json
import math
import re
import runpy
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parent.parent))

from test_formats import recipe_of  # noqa: E402
from test_import_formats import raw_sae  # noqa: E402

from experiments import planted, planted_world  # noqa: E402
from src import checkpoint, export_formats  # noqa: E402

pytestmark = pytest.mark.interop
D, F, K, BLOCK = 64, 256, 9, 5
SITE = BLOCK + 1


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # the libraries draw their first weights


def states(n_tokens=4000, width=D):
    return 3 * torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(1)) + 1


def shaken(module):
    """The module with weights in which each tensor matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def fvu(h, h_hat):
    return float((h - h_hat).square().sum() / (h - h.mean(0)).square().sum())


@torch.no_grad()
def compare(title, path, code, reconstruct, h=None, hints=None):
    """Print and bound the differences between another forward and that of the SAE at path.

    code: raw states -> latents there. reconstruct: the same latents -> raw states there.
    """
    h = states() if h is None else h
    sae, _ = checkpoint.load(path, hints=hints)
    assert sae.sites() == [SITE]
    latents = sae.autoencode(sae.gather({SITE: h})).latents
    (patch,) = sae.patches({SITE: h})
    h_hat = patch[SITE](h)
    expected = code(h)
    expected_hat = reconstruct(expected)
    assert 0 < (expected != 0).float().mean() < 1
    same = ((latents != 0) == (expected != 0)).all(-1)
    n_others = int((~same).sum())
    error = float((latents - expected)[same].abs().max() / expected.max())
    state_error = float((h_hat - expected_hat)[same].abs().max())
    fvus = fvu(h, h_hat), fvu(h, expected_hat)
    print(
        f"\n{title:<42} latents {error:.1e} of the largest  states {state_error:.1e}  "
        f"FVU {fvus[0]:.6f} {fvus[1]:.6f}  other active sets {n_others} of {len(h)}"
    )
    assert error < 1e-5 and n_others <= len(h) * 1e-3
    assert fvus[0] == pytest.approx(fvus[1], rel=1e-4)


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


# ------------------------------------------------------------------------------- sparsify


@pytest.fixture
def sparsify(monkeypatch):
    """The library, with its plain decoder; the one in Triton needs a GPU."""
    library = pytest.importorskip("sparsify")
    from sparsify import sparse_coder, utils

    monkeypatch.setattr(sparse_coder, "decoder_impl", utils.eager_decode)
    return library


def dense(top_acts, top_indices, n_latents):
    return torch.zeros(len(top_acts), n_latents).scatter(-1, top_indices, top_acts)


@torch.no_grad()
@pytest.mark.parametrize("has_unit_rows", [True, False])
def test_sparsify_and_its_fvu(has_unit_rows, sparsify, tmp_path):
    config = sparsify.SparseCoderConfig(num_latents=F, k=K, normalize_decoder=has_unit_rows)
    coder = shaken(sparsify.SparseCoder(D, config))
    if has_unit_rows:
        coder.set_decoder_norm_to_unit_norm()
    folder = tmp_path / f"layers.{BLOCK}"
    coder.save_to_disk(folder)
    h, again = states(), sparsify.SparseCoder.load_from_disk(folder)

    def code(h):
        acts, indices, _ = again.encode(h)
        return dense(acts, indices, F)

    compare("sparsify", folder, code, lambda _: again(h).sae_out, h)
    sae, _ = checkpoint.load(folder)
    (patch,) = sae.patches({SITE: h})
    print(f"FVU of sparsify itself {float(again(h).fvu):.6f}, here {fvu(h, patch[SITE](h)):.6f}")
    assert float(again(h).fvu) == pytest.approx(fvu(h, patch[SITE](h)), rel=1e-5)


@torch.no_grad()
def test_sparsify_loads_our_export(sparsify, tmp_path):
    sae = raw_sae("TopK")
    folder = export_formats.export(sae, recipe_of(sae), tmp_path, "sparsify")
    coder = sparsify.Sae.load_from_disk(folder / f"layers.{sae.layer - 1}")
    h = states(width=sae.hidden_size)
    acts, indices, _ = coder.encode(h)
    report_export("sparsify TopK", sae, h, dense(acts, indices, sae.latent_size), coder(h).sae_out)


def report_export(title, sae, h, latents, h_hat):
    expected = sae.encode(sae.standardise(h)[0])
    (patch,) = sae.patches({sae.layer: h})
    error = float((latents - expected).abs().max() / expected.max())
    state_error = float((h_hat - patch[sae.layer](h)).abs().max())
    print(f"\nexport {title:<35} latents {error:.1e} of the largest  states {state_error:.1e}")
    assert error < 1e-5 and state_error < 1e-4


# ---------------------------------------------------------------------- dictionary_learning


@pytest.fixture(scope="module")
def dictionary_learning():
    """The library. It imports nnsight, which nothing that is called here needs."""
    if "nnsight" not in sys.modules:
        stand_in = types.ModuleType("nnsight")
        stand_in.LanguageModel = type("LanguageModel", (), {})
        stand_in.Envoy = type("Envoy", (), {})
        stand_in.CONFIG = types.SimpleNamespace()
        sys.modules["nnsight"] = stand_in
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary, utils
    from dictionary_learning.trainers import (
        batch_top_k,
        matryoshka_batch_top_k,
        top_k,
    )

    return types.SimpleNamespace(
        load=utils.load_dictionary,
        classes={
            "AutoEncoder": lambda: dictionary.AutoEncoder(D, F),
            "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D, F),
            "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D, F),
            "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D, F),
            "AutoEncoderTopK": lambda: top_k.AutoEncoderTopK(D, F, K),
            "BatchTopKSAE": lambda: batch_top_k.BatchTopKSAE(D, F, K),
            "MatryoshkaBatchTopKSAE": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(
                D, F, K, [100, 156]
            ),
        },
    )


LEARNED = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


@torch.no_grad()
@pytest.mark.parametrize("dict_class", LEARNED)
def test_dictionary_learning(dict_class, dictionary_learning, tmp_path):
    made = shaken(dictionary_learning.classes[dict_class]())
    if "BatchTopK" in dict_class:
        made.threshold.fill_(2.0)
    if dict_class == "JumpReluAutoEncoder":
        made.threshold.abs_().add_(1)
    trainer = {"dict_class": dict_class, "layer": BLOCK, "lm_name": "org/lm", "k": K}
    trainer |= {"submodule_name": f"resid_post_layer_{BLOCK}"}
    write_json(tmp_path / "config.json", {"trainer": trainer, "buffer": {"io": "out"}})
    torch.save(made.state_dict(), tmp_path / "ae.pt")
    opened, _ = dictionary_learning.load(str(tmp_path), device="cpu")
    compare(f"dictionary_learning {dict_class}", tmp_path, opened.encode, opened.decode)


@torch.no_grad()
@pytest.mark.parametrize("name", ["TopK", "Vanilla", "Gated", "JumpReLU", "BatchTopK"])
def test_dictionary_learning_loads_our_export(name, dictionary_learning, tmp_path):
    sae = raw_sae(name)
    folder = export_formats.export(sae, recipe_of(sae), tmp_path, "dictionary_learning")
    path = folder / f"resid_post_layer_{sae.layer - 1}"
    opened, _ = dictionary_learning.load(str(path), device="cpu")
    h = states(width=sae.hidden_size)
    latents = opened.encode(h)
    report_export(f"dictionary_learning {name}", sae, h, latents, opened.decode(latents))


# ------------------------------------------------------------------- what SAELens reads of others


@pytest.fixture
def lens(monkeypatch):
    """SAELens, whose downloads are files of a folder here."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def opened(loader, root, repo, folder):
        def fetch(repo_id, filename, subfolder=None, **_):
            return str(root / (subfolder or "") / filename)

        monkeypatch.setattr(loaders, "hf_hub_download", fetch)
        monkeypatch.setattr(
            loaders,
            "get_safetensors_tensor_shapes",
            lambda _, name: {
                key: list(value.shape)
                for key, value in loaders.load_safetensors_weights(root / name).items()
            },
        )
        wanted = {"d_in": D, "d_sae": F, "dtype": "float32"}
        config, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](
            repo, folder, "cpu", False, wanted
        )
        config = loaders.handle_config_defaulting(config)
        lens_class, lens_config = sae_lens.registry.get_sae_class(config["architecture"])
        sae = lens_class(lens_config.from_dict(config))
        sae.load_state_dict(state)
        return sae

    return opened


def weights():
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    return {
        "W_enc": draw(D, F),
        "W_dec": draw(F, D),
        "b_enc": draw(F),
        "b_dec": draw(D),
        "threshold": 4 * draw(F).abs(),
    }


@torch.no_grad()
def test_planted_worlds_and_their_scores_are_those_of_saelens():
    """SynthSAEBench is part of SAELens."""
    evals = pytest.importorskip("sae_lens.synthetic.evals")
    synthetic = pytest.importorskip("sae_lens.synthetic")
    rates = planted_world.planned_rates(256)
    theirs = synthetic.ZipfianFiringProbabilityConfig(max_prob=0.4, min_prob=5e-4, exponent=0.5)
    assert torch.allclose(rates, theirs.generate(256))
    trees = synthetic.HierarchyConfig(
        total_root_nodes=2, branching_factor=4, max_depth=3, mutually_exclusive_portion=1.0
    )
    factors = synthetic.generate_hierarchy(256, trees).compute_probability_correction_factors(rates)
    ours = planted_world.compensated(rates, planted_world.forest(256))
    assert torch.allclose(ours, (rates * factors).clamp_max(1), atol=1e-5)

    decoder, features = torch.randn(20, 16), torch.randn(50, 16)
    cosine = (
        torch.nn.functional.normalize(decoder) @ torch.nn.functional.normalize(features).T
    ).abs()
    latents, matched = planted.match(cosine.numpy())
    assert float(cosine[latents, matched].mean()) == pytest.approx(
        evals.mean_correlation_coefficient(decoder, features), abs=1e-5
    )
    nearest = cosine.argmax(1)
    assert len(nearest.unique()) / 20 == evals.feature_uniqueness(decoder, features)
    fired, fires = torch.rand(300, 20) < 0.2, torch.rand(300, 50) < 0.2
    fired[:, 0] = False  # a dead latent
    scores = evals.compute_classification_metrics(fired.float(), fires.float(), decoder, features)
    own = planted.detection(fired, fires[:, nearest])
    for name, value in {"F1": scores.f1_score, "precision": scores.precision}.items():
        assert own[name] == pytest.approx(value, abs=1e-6)
    assert own["recall"] == pytest.approx(scores.recall, abs=1e-6)


def test_gemma_scope_as_saelens_reads_it(lens, tmp_path):
    name = f"layer_{BLOCK}/width_16k/average_l0_71"
    root = tmp_path / "gemma-scope-2b-pt-res"
    (root / name).mkdir(parents=True)
    arrays = {key: value.numpy() for key, value in weights().items()}
    np.savez(root / name / "params.npz", **arrays)
    sae = lens("gemma_2", root, "google/gemma-scope-2b-pt-res", name)
    assert sae.cfg.metadata.hook_name == f"blocks.{BLOCK}.hook_resid_post"
    compare("Gemma Scope", root / name, sae.encode, sae.decode)


@torch.no_grad()
def test_gemma_scope_2_as_saelens_reads_it(lens, tmp_path):
    name = f"resid_post/layer_{BLOCK}_width_16k_l0_medium"
    renamed = {"W_enc": "w_enc", "W_dec": "w_dec"}
    (tmp_path / name).mkdir(parents=True)
    tensors = {renamed.get(key, key): value for key, value in weights().items()}
    save_file(tensors, tmp_path / name / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"}
    config["hf_hook_point_in"] = f"model.layers.{BLOCK}.output"
    write_json(tmp_path / name / "config.json", config)
    sae = lens("gemma_3", tmp_path, "google/gemma-scope-2-1b-pt", name)
    compare("Gemma Scope 2", tmp_path / name, sae.encode, sae.decode)


@torch.no_grad()
def test_llama_scope_as_saelens_reads_it(lens, tmp_path):
    name, hook = f"Llama3_1-8B-Base-L{BLOCK}R-8x", f"blocks.{BLOCK}.hook_resid_post"
    w, norm = weights(), 21.5
    unit = w["W_dec"] / w["W_dec"].norm(dim=-1, keepdim=True)  # as they are published
    (tmp_path / name / "checkpoints").mkdir(parents=True)
    tensors = {"encoder.weight": w["W_enc"].T, "decoder.weight": unit.T}
    tensors |= {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, tmp_path / name / "checkpoints" / "final.safetensors")
    config = {
        "hook_point_in": hook,
        "hook_point_out": hook,
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 1.5,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
    }
    write_json(tmp_path / name / "hyperparams.json", config)
    sae = lens("llama_scope", tmp_path, "fnlp/Llama3_1-8B-Base-LXR-8x", name)
    sae.fold_activation_norm_scaling_factor(math.sqrt(D) / norm)  # what from_pretrained does
    compare("Llama Scope", tmp_path / name, sae.encode, sae.decode)


# ------------------------------------------------------------------------------- Llamascopium


@torch.no_grad()
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("act_fn", ["jumprelu", "relu", "topk"])
def test_llamascopium(act_fn, has_norms, tmp_path):
    module = pytest.importorskip("llamascopium.models.sae")
    hook = f"blocks.{BLOCK}.hook_resid_post"
    config = module.SAEConfig(
        hook_point_in=hook,
        hook_point_out=hook,
        d_model=D,
        expansion_factor=F // D,
        act_fn=act_fn,
        top_k=K,
        norm_activation="dataset-wise",
        sparsity_include_decoder_norm=has_norms,
        dtype=torch.float32,
        device="cpu",
    )
    sae, w = module.SparseAutoEncoder(config), weights()
    for parameter, name in ((sae.W_E, "W_enc"), (sae.W_D, "W_dec")):
        parameter.copy_(w[name])
    sae.b_E.copy_(w["b_enc"])
    sae.b_D.copy_(w["b_dec"])
    if act_fn == "jumprelu":
        sae.activation_function.log_jumprelu_threshold.copy_((w["threshold"] / 2).log())
    sae.set_dataset_average_activation_norm({hook: 21.5})
    sae.save_pretrained(tmp_path / "sae")
    config.save_hyperparameters(tmp_path / "sae")
    again = module.SparseAutoEncoder.from_local(str(tmp_path / "sae"), dtype=torch.float32)
    # A TopK ranks by pre-activation times norm of the decoder row; here its codes keep the norm.
    kept = again.decoder_norm() if act_fn == "topk" and has_norms else torch.ones(F)

    def code(h):
        return again.encode(again.normalize_activations({hook: h})[hook]) * kept

    def reconstruct(latents):
        scale = again.compute_norm_factor(states(1), hook)
        return again.denormalize_activations({hook: again.decode(latents / kept)}, {hook: scale})[
            hook
        ]

    title = f"Llamascopium {act_fn}{'' if has_norms else ', without norms'}"
    compare(title, tmp_path / "sae", code, reconstruct)


# ------------------------------------------------------------------------------- OpenAI


@torch.no_grad()
@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_openai(activation, tmp_path):
    module = pytest.importorskip("sparse_autoencoder.model")
    is_topk = activation == "TopK"
    made = module.Autoencoder(
        F, D, activation=module.TopK(K) if is_topk else torch.nn.ReLU(), normalize=is_topk
    )
    path = tmp_path / "resid_post_mlp_v5_32k" / "autoencoders" / f"{BLOCK}.pt"
    path.parent.mkdir(parents=True)
    torch.save(shaken(made).state_dict(), path)
    # Its writer adds keys that its reader refuses: activation.k and activation.postact_fn.
    state = torch.load(path, weights_only=True)
    opened = module.Autoencoder.from_state_dict(state, strict=False)
    h = states()
    info = opened.encode(h)[1]
    compare(
        f"OpenAI {activation}",
        path,
        lambda h: opened.encode(h)[0],
        lambda f: opened.decode(f, info),
    )


# ------------------------------------------------------------------------------- Neuronpedia


def test_neuronpedias_client_makes_the_same_body_of_the_same_features(monkeypatch):
    client = pytest.importorskip("neuronpedia.requests.feature_request")
    from neuronpedia.np_activation import Activation
    from neuronpedia.np_explanation import Explanation
    from neuronpedia.np_feature import Feature, Logit
    from test_neuronpedia import contexts_of, labels_of

    from src import neuronpedia

    ((source, body),) = neuronpedia.bodies(contexts_of("TopK"), labels_of())
    sent = {}
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "none")
    monkeypatch.setattr(
        client.FeatureRequest, "send_request", lambda _, **options: sent.update(options)
    )
    about = {"modelId": body["modelId"], "source": source}

    def logits(pairs):
        return pairs and [Logit(pair["token"], pair["value"]) for pair in pairs]

    features = []
    for feature in body["features"]:
        named = about | {"index": feature["index"]}
        features.append(
            Feature(
                **named,
                density=feature["density"],
                top_logits=logits(feature["topLogits"]),
                bottom_logits=logits(feature["bottomLogits"]),
                explanations=[
                    Explanation(**named, text=e["text"]) for e in feature["explanations"]
                ],
                activations=[Activation(**named, **a) for a in feature["activations"]],
            )
        )
    client.FeatureRequest().upload_batch(body["modelId"], source, features)
    assert sent["uri"] == "upload-batch" and sent["json"] == body


# ------------------------------------------------------------------------------- the examples


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory):
    """A folder with a text, a TopK trained on it for seconds, its contexts and its labels."""
    from src.applier import Applier
    from src.config import parse
    from src.files import DEMO_LM
    from src.interpreter import Interpreter
    from src.trainer import Trainer

    folder = tmp_path_factory.mktemp("examples")
    sentence = "Return the {}th value of the array, or raise ValueError if {} is larger. "
    lines = [json.dumps({"text": sentence.format(i, i * 7) * 4}) for i in range(400)]
    (folder / "demo.jsonl").write_text("\n".join(lines))
    common = ["--output_dir", str(folder / "out")]
    read = [*common, "--data_path", str(folder / "demo.jsonl"), "--model_path", str(DEMO_LM)]
    read += ["--max_length", "64", "--batch_size", "8", "--dtype", "float32"]
    sizes = ["--latent_size", "256", "--k", "8", "--max_tokens", "20000", "--topk_relu", "1"]
    Trainer(parse("train", [*read, *sizes, "--model", "TopK", "--tag", "example"])).run()
    path = ["--SAE_path", str(folder / "out" / "SAE_models" / "TopK_demo_example.pt")]
    Applier(parse("apply", [*read, *path, "--act_threshold", "0.5"])).run()
    Interpreter(parse("interpret", [*common, "--engine", "heuristic"])).run()
    return folder


@pytest.fixture
def run_example(user_folder, monkeypatch, capsys):
    def run(name):
        from src.files import DEMO_LM

        monkeypatch.setenv("DATA_PATH", str(user_folder / "demo.jsonl"))
        monkeypatch.setenv("MODEL_PATH", str(DEMO_LM))
        monkeypatch.setenv("OUTPUT_DIR", str(user_folder / "out"))
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_module(f"examples.{name}", run_name="__main__")
        out = capsys.readouterr().out
        with capsys.disabled():
            print(f"\n{name}: {out.strip().splitlines()[-1]}")
        return out

    return run


def test_the_example_in_saelens(run_example):
    pytest.importorskip("sae_lens")
    out = run_example("in_saelens")
    difference = float(out.rsplit(":", 1)[1])
    assert "8 active latents a token, 256 in all" in out and difference < 1e-4


def test_the_example_in_saebench(run_example):
    pytest.importorskip("sae_bench")
    assert "KL score" in run_example("in_saebench")


def test_the_example_in_sae_probes(run_example):
    pytest.importorskip("sae_probes")
    assert "k 16, test AUC" in run_example("in_sae_probes")


@pytest.fixture
def delphi(monkeypatch):
    """The library. It imports vllm, which needs a GPU, and which nothing that is run here uses."""
    needed = (
        "LLM SamplingParams TokensPrompt destroy_distributed_environment destroy_model_parallel"
    )
    for name in ("vllm", "vllm.distributed", "vllm.distributed.parallel_state", "vllm.inputs"):
        stand_in = types.ModuleType(name)
        vars(stand_in).update(dict.fromkeys(needed.split(), object))
        monkeypatch.setitem(sys.modules, name, stand_in)
    return pytest.importorskip("delphi.latents")


class AlwaysFits(http.server.BaseHTTPRequestHandler):
    """An endpoint that finds every label right for every context."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = {"choices": [{"message": {"content": "[1, 1, 1, 1]"}}]}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_the_example_in_delphi(run_example, delphi, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), AlwaysFits)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("API_BASE", f"http://127.0.0.1:{server.server_port}/v1")
    out = run_example("in_delphi")
    server.shutdown()
    # The endpoint always says yes, so the share is that of contexts that are of the latent: a half
    # where delphi finds enough others.
    shares = [float(share) for share in re.findall(r"latent \d+: ([\d.]+) of [1-9]", out)]
    assert shares and all(0 < share <= 1 for share in shares)
