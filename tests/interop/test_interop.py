"""Comparisons with other libraries, run by tests/interop/run.sh.

SAELens loads exported SAEs, its folders load in this program, and SAEBench measures the SAEs of
this program. The largest differences are printed. The language model is the built-in one and the
text is that of this repository, so that no network is needed.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sae_lens = pytest.importorskip("sae_lens", reason="bash tests/interop/run.sh makes the environment")
core = pytest.importorskip(
    "sae_bench.evals.core.main", reason="bash tests/interop/run.sh makes the environment"
)

from sae_lens.load_model import HookedProxyLM  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402

from src import checkpoint, export_formats, formats, lm, probing  # noqa: E402
from src.config import parse  # noqa: E402
from src.data import Rows  # noqa: E402
from src.evaluator import Evaluator  # noqa: E402
from src.files import DEMO_LM, ROOT  # noqa: E402
from src.trainer import Trainer  # noqa: E402

pytestmark = pytest.mark.interop
SINGLE = ("TopK", "Vanilla", "Gated", "JumpReLU", "BatchTopK", "Matryoshka")
NAMES = (*SINGLE, "MLSAE", "RouteSAE")
LENGTH, EVAL_ROWS = 128, 32
# Share of tokens on which rounding may decide between two latents, at k or at a threshold.
TIES = 1e-3


def flags(**options):
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text, and SAEs of eight models trained on it for a minute."""
    folder = tmp_path_factory.mktemp("interop")
    sources = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("src/*.py"), ROOT / "README.md"])
    with open(folder / "text.jsonl", "w") as file:
        for source in sources:
            for paragraph in source.read_text().split("\n\n"):
                file.write(json.dumps({"text": paragraph}) + "\n")
    argv = flags(
        data_path=folder / "text.jsonl",
        output_dir=folder / "out",
        max_length=LENGTH,
        dtype="float32",
        latent_size=512,
        k=16,
        max_tokens=60000,
    )
    Trainer(parse("train", [*argv, "--model", *NAMES])).run()
    return folder


@pytest.fixture(scope="module")
def saes(folder):
    return {
        name: checkpoint.load(folder / "out" / "SAE_models" / f"{name}_text.pt") for name in NAMES
    }


@pytest.fixture(scope="module")
def language_model():
    tokenizer, model = lm.get_language_model(str(DEMO_LM), "cpu", "float32")
    return tokenizer, model


@pytest.fixture(scope="module")
def rows(folder, language_model):
    tokenizer, _ = language_model
    rows = Rows(folder / "text.jsonl", tokenizer, LENGTH, "eval", max_samples=EVAL_ROWS)
    return list(rows.batches(16))


@pytest.fixture(scope="module")
def hidden(saes, language_model, rows):
    """{site: raw states [N,D]} of every counted token of the evaluation rows."""
    _, model = language_model
    sites = sorted({site for sae, _ in saes.values() for site in sae.sites()})
    chunks = {site: [] for site in sites}
    for batch in rows:
        for site, states in lm.read_sites(model, batch.input_ids, sites).items():
            chunks[site].append(states[batch.mask])
    return {site: torch.cat(states) for site, states in chunks.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_saelens_loads_the_export_and_finds_the_same_latents(name, saes, hidden, folder):
    sae, recipe = saes[name]
    exported = export_formats.export(sae, recipe, folder / "out", "saelens")
    dictionary = getattr(sae, "sae", sae)  # of a RouteSAE the SAE inside
    latent_errors, state_errors, n_others, n_tokens = [], [], 0, 0
    for site, form in sae.to_standard_form().items():
        lens = sae_lens.SAE.load_from_disk(exported / formats.hook_of(site))
        h = hidden[site]
        x, mean, std = sae.standardise(h)
        latents, lens_latents = form.code(x), lens.encode(h)
        same = ((latents != 0) == (lens_latents != 0)).all(-1)
        latent_errors.append(float((latents - lens_latents)[same].abs().max()))
        n_tokens += len(h)
        n_others += int((~same).sum())
        # The biases of a model over several sites are those of the site.
        x_hat = latents @ form.tensors["W_dec"] + form.tensors["b_dec"]
        h_hat = x_hat * std + mean
        state_errors.append(float((h_hat - lens.decode(lens_latents))[same].abs().max()))
        lens.fold_W_dec_norm()  # what SAEDashboard does
        folded = lens.encode(h) / dictionary.decoder.weight.norm(dim=0)
        assert ((folded - latents).abs().amax(-1) > 1e-3).sum() <= TIES * len(h)
    print_differences(f"export {name:<10}", latent_errors, state_errors, n_others, n_tokens)
    assert max(latent_errors) < 1e-4
    assert n_others <= TIES * n_tokens
    assert max(state_errors) < 1e-3


def print_differences(title, latent_errors, state_errors, n_others, n_tokens):
    print(
        f"\n{title} latents {max(latent_errors):.1e}  reconstruction {max(state_errors):.1e}  "
        f"other active sets {n_others} of {n_tokens} tokens"
    )


KINDS = {"topk": {"k": 9}, "standard": {}, "jumprelu": {}, "gated": {}}


@torch.no_grad()
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("at_input", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_saelens_loads_with_the_same_latents_and_reconstruction(
    kind, at_input, norm, tmp_path
):
    torch.manual_seed(0)
    hook = "blocks.5.hook_resid_post"
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=hook, model_name="org/lm")
    lens_class, lens_config = sae_lens.registry.get_sae_class(kind)
    config = lens_config(
        d_in=64,
        d_sae=256,
        apply_b_dec_to_input=at_input,
        normalize_activations=norm,
        metadata=metadata,
        **KINDS[kind],
    )
    lens = lens_class(config)
    for parameter in lens.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    lens.save_model(tmp_path / "sae")
    sae, _ = checkpoint.load(tmp_path / "sae")
    h = torch.randn(5000, 64)
    out, expected = sae.autoencode(sae.gather({6: h})), lens.encode(h)
    same = ((out.latents != 0) == (expected != 0)).all(-1)
    n_others = int((~same).sum())
    latent_error = float((out.latents - expected)[same].abs().max())
    _, mean, std = sae.standardise(h)
    state_error = float((out.x_hat * std + mean - lens.decode(expected))[same].abs().max())
    form = f"{kind} {norm}{'' if at_input else ', b_dec folded'}"
    print_differences(f"import {form:<36}", [latent_error], [state_error], n_others, len(h))
    assert latent_error < 2e-4 and state_error < 1e-3 and n_others <= 2


class Tokens:
    """The part of SAELens' ActivationsStore that SAEBench uses, over the evaluation rows."""

    def __init__(self, rows):
        self.rows = rows
        self.context_size = LENGTH
        self.store_batch_size_prompts = rows[0].input_ids.shape[0]
        self.reset_input_dataset()

    def reset_input_dataset(self):
        self.next = iter(self.rows)

    def get_batch_tokens(self, _size=None):
        return next(self.next).input_ids


@pytest.fixture(scope="module")
def evaluated(folder):
    """Results of evaluate.py by title."""
    paths = [str(folder / "out" / "SAE_models" / f"{name}_text.pt") for name in SINGLE]
    argv = flags(
        data_path=folder / "text.jsonl",
        dtype="float32",
        output_dir=folder / "ev",
        max_length=LENGTH,
        max_samples=EVAL_ROWS,
    )
    argv += ["--SAE_path", *paths, "--metric", "NormMSE", "KLDiv", "Recovered"]
    return Evaluator(parse("evaluate", argv)).run()


def special(tokenizer):
    return {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}


def saebench_metrics(site_sae, proxy, rows, tokenizer):
    """SAEBench's core metrics by name."""
    config = core.CoreEvalConfig(
        model_name=str(DEMO_LM),
        batch_size_prompts=16,
        n_eval_reconstruction_batches=len(rows),
        n_eval_sparsity_variance_batches=len(rows),
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        context_size=LENGTH,
        exclude_special_tokens_from_reconstruction=True,
    )
    ignored = special(tokenizer)
    groups, _ = core.run_evals(site_sae, Tokens(rows), proxy, config, ignore_tokens=ignored)
    return {key: value for group in groups.values() for key, value in group.items()}


def saebench_losses_of_counted(site_sae, proxy, rows, tokenizer):
    """(KL, CE added) of SAEBench's tokens, averaged over those that evaluate.py counts.

    evaluate.py counts predictions of a counted token from a counted token.
    """
    kl, added = [], []
    for batch in rows:
        counted = batch.mask[:, :-1] & batch.mask[:, 1:]
        losses = core.get_recons_loss(
            site_sae,
            proxy,
            batch.input_ids,
            None,
            compute_kl=True,
            compute_ce_loss=True,
            ignore_tokens=special(tokenizer),
            exclude_special_tokens_from_reconstruction=True,
        )
        kl.append(losses["kl_div_with_sae"][:, :-1][counted])
        added.append((losses["ce_loss_with_sae"] - losses["ce_loss_without_sae"])[counted])
    return float(torch.cat(kl).mean()), float(torch.cat(added).mean())


@torch.no_grad()
@pytest.mark.parametrize("name", SINGLE)
def test_saebench_and_evaluate_agree_on_metrics_with_the_same_meaning(
    name, saes, rows, language_model, evaluated, hidden
):
    tokenizer, model = language_model
    sae, _ = saes[name]
    (site_sae,) = formats.site_saes(sae, str(DEMO_LM), {12: "model.layers.11"}).values()
    proxy = HookedProxyLM(model, tokenizer, hook_names=["model.layers.11"])
    bench = saebench_metrics(site_sae, proxy, rows, tokenizer)
    kl, ce_added = saebench_losses_of_counted(site_sae, proxy, rows, tokenizer)
    ours = evaluated[f"{name}_text"]
    h = hidden[12]
    h_hat = next(sae.patches({12: h}))[12](h)
    error = float((h - h_hat).square().sum(-1).mean())
    cosine = float(torch.cosine_similarity(h, h_hat, dim=-1).mean())
    # SAEBench divides squared errors by the tokens of a batch, then takes the mean over tokens.
    bench_error = bench["mse"] * len(h) / len(rows)
    bench_added = bench["ce_loss_with_sae"] - bench["ce_loss_without_sae"]
    explained = 1 - ours["FVU"]
    table = {  # SAEBench; SAEBench on the positions that evaluate.py counts; evaluate.py
        "KL": (bench["kl_div_with_sae"], kl, ours["KLDiv"]),
        "CE added": (bench_added, ce_added, ours["DeltaCE"]),
        "CE recovered (zero ablation)": (bench["ce_loss_score"], None, ours["Recovered_zero"]),
        "L0": (bench["l0"], bench["l0"], ours["L0"]),
        "cosine of raw states": (bench["cossim"], bench["cossim"], cosine),
        "squared error of raw states": (bench_error, bench_error, error),
        "explained variance": (bench["explained_variance"], None, explained),
        "explained variance, legacy": (bench["explained_variance_legacy"], None, explained),
    }
    print(f"\nSAEBench {name}")
    for metric, values in table.items():
        cells = [f"{'-':>16}" if value is None else f"{value:>16.5f}" for value in values]
        print(f"    {metric:<30}" + "".join(cells))
    assert kl == pytest.approx(ours["KLDiv"], rel=1e-4)
    assert ce_added == pytest.approx(ours["DeltaCE"], rel=1e-3, abs=1e-5)
    assert bench["l0"] == pytest.approx(ours["L0"], rel=1e-6)
    assert bench["cossim"] == pytest.approx(cosine, rel=1e-5)
    assert bench_error == pytest.approx(error, rel=0.02)  # batches differ in tokens
    assert abs(bench["kl_div_with_sae"] - kl) < 0.1 * kl


@torch.no_grad()
def test_transformerlens_calls_a_site_by_the_name_that_is_exported(language_model, rows):
    bridge = TransformerBridge.boot_transformers(str(DEMO_LM), device="cpu", dtype=torch.float32)
    _, cache = bridge.run_with_cache(
        rows[0].input_ids, names_filter=lambda name: name.endswith("hook_resid_post")
    )
    for site, state in lm.read_sites(language_model[1], rows[0].input_ids, [1, 12, 16]).items():
        assert (cache[formats.hook_of(site)] - state).abs().max() < 1e-5 * state.abs().max()


def test_saebenchs_own_runner_takes_our_objects_from_start_to_result_file(
    saes, folder, monkeypatch
):
    text = folder / "dataset"
    text.mkdir(exist_ok=True)
    (text / "train.jsonl").write_bytes((folder / "text.jsonl").read_bytes())

    class LocalModel:
        """Opens a folder; the runner's HookedTransformer knows models by name only."""

        @staticmethod
        def from_pretrained_no_processing(name, device, dtype):
            return TransformerBridge.boot_transformers(name, device=device, dtype=dtype)

    monkeypatch.setattr(core, "HookedTransformer", LocalModel)
    for name in ("TopK", "RouteSAE"):
        sae, _ = saes[name]
        site_saes = list(formats.site_saes(sae, str(DEMO_LM)).items())
        chosen = [(f"{name}_{site}", site_sae) for site, site_sae in site_saes[:2]]
        results = core.multiple_evals(
            chosen,
            2,
            2,
            eval_batch_size_prompts=8,
            exclude_special_tokens_from_reconstruction=True,
            dataset=str(text),
            context_size=LENGTH,
            output_folder=str(folder / "bench"),
            device="cpu",
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
        )
        assert len(results) == len(chosen)
        for title, _ in chosen:
            path = Path(folder / "bench" / f"{title}_custom_sae_eval_results.json")
            metrics = json.loads(path.read_text())["eval_result_metrics"]
            score = metrics["model_behavior_preservation"]["kl_div_score"]
            l0 = metrics["sparsity"]["l0"]
            print(f"\nSAEBench's runner {title:<12} KL score {score:.4f}  L0 {l0:.3f}")
            assert 0 < score <= 1 and l0 == pytest.approx(16, abs=0.01)


@torch.no_grad()
def test_sae_probes_finds_the_same_latents_and_aucs(saes, language_model, folder, monkeypatch):
    """Its own choice of latents and fit, on the code that SAELens gives of an exported SAE."""
    run_sae_evals = pytest.importorskip(
        "sae_probes.run_sae_evals", reason="bash tests/interop/run.sh makes the environment"
    )
    tokenizer, model = language_model
    sae, recipe = saes["TopK"]
    (site,) = sae.sites()
    exported = export_formats.export(sae, recipe, folder / "out", "saelens")
    lens = sae_lens.SAE.load_from_disk(exported / formats.hook_of(site))
    rows = Rows(folder / "text.jsonl", tokenizer, LENGTH, "eval", max_samples=4 * EVAL_ROWS)
    sample, measure, hidden = probing.Sample(rows, tokenizer), probing.Probing(), []
    for batch in rows.batches(16):
        states = lm.read_sites(model, batch.input_ids, [site])
        h = states[site][batch.mask].float()
        units = sample.of(batch)
        out = sae.autoencode(sae.gather({site: h}))
        measure.update(sae.strength(out), out.target, units)
        hidden.append(h[units["tokens"].of_token >= 0])
    data, labels = measure.tokens.in_order()  # the rows were read in order
    codes = lens.encode(torch.cat(hidden))
    trains = torch.from_numpy(probing._halves(data.documents, 0))
    worst = 0.0
    for label in ("punctuation", "prepositions", "articles", "inside a word"):
        y = np.array([unit[label] for unit in labels])
        own = probing._fit(probing.Task(label, "tokens", y.astype(np.int8)), data, 0)
        given = SimpleNamespace(
            X_train=codes[trains], X_test=codes[~trains], y_train=y[trains], y_test=y[~trains]
        )
        monkeypatch.setattr(
            run_sae_evals, "generate_sae_activations", lambda given=given, **_: given
        )
        options = {
            "sae": lens,
            "dataset": label,
            "hook_name": "x",
            "model_name": "x",
            "ks": [1, 2, 5],
        }
        options |= {"reg_type": "l2", "setting": "normal", "model_cache_path": folder}
        run_sae_evals.run_sae_eval(**options, results_path=folder / "probes")
        (path,) = (folder / "probes").rglob(f"*{label}*.json")
        for result in json.loads(path.read_text()):
            assert set(result["indices"]) == set(own["latents"][: result["k"]]), label
            worst = max(worst, abs(result["test_auc"] - own[f"k{result['k']}"]))
    print(f"sae-probes: largest difference of an AUC {worst:.4f}")
    assert worst < 0.01
