"""Against the libraries themselves: SAELens loads what is exported, its folders load here, SAEBench measures our SAEs. Run by tests/interop/run.sh.

It prints the largest differences. The language model is the built-in one, the text this repository's own; no network.
"""

import json
from pathlib import Path

import pytest
import torch

sae_lens = pytest.importorskip("sae_lens", reason="bash tests/interop/run.sh makes the environment")
core = pytest.importorskip(
    "sae_bench.evals.core.main", reason="bash tests/interop/run.sh makes the environment"
)

from sae_lens.load_model import HookedProxyLM  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402

from src import checkpoint, formats, lm  # noqa: E402
from src.config import parse  # noqa: E402
from src.data import Rows  # noqa: E402
from src.evaluator import Evaluator  # noqa: E402
from src.files import DEMO_LM, ROOT  # noqa: E402
from src.trainer import Trainer  # noqa: E402

pytestmark = pytest.mark.interop
SINGLE = ("TopK", "Vanilla", "Gated", "JumpReLU", "BatchTopK")
NAMES = (*SINGLE, "MLSAE", "RouteSAE")
LENGTH, EVAL_ROWS = 128, 32
TIES = (
    1e-3  # share of tokens on which rounding may decide between two latents, at k or at a threshold
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The text, and SAEs of seven models trained on it for a minute."""
    folder = tmp_path_factory.mktemp("interop")
    sources = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("src/*.py"), ROOT / "README.md"])
    with open(folder / "text.jsonl", "w") as file:
        for part in (part for source in sources for part in source.read_text().split("\n\n")):
            file.write(json.dumps({"text": part}) + "\n")
    common = [
        "--data_path",
        str(folder / "text.jsonl"),
        "--output_dir",
        str(folder / "out"),
        "--max_length",
        str(LENGTH),
        "--dtype",
        "float32",
    ]
    Trainer(
        parse(
            "train",
            [
                *common,
                "--model",
                *NAMES,
                "--latent_size",
                "512",
                "--k",
                "16",
                "--max_tokens",
                "60000",
            ],
        )
    ).run()
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
    return list(
        Rows(
            folder / "text.jsonl", language_model[0], LENGTH, "eval", max_samples=EVAL_ROWS
        ).batches(16)
    )


@pytest.fixture(scope="module")
def hidden(saes, language_model, rows):
    """{site: raw states [N,D]} of every counted token of the evaluation rows."""
    sites = sorted({site for sae, _ in saes.values() for site in sae.sites()})
    parts = [
        (lm.read_sites(language_model[1], batch.input_ids, sites), batch.mask) for batch in rows
    ]
    return {site: torch.cat([states[site][mask] for states, mask in parts]) for site in sites}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_saelens_loads_the_export_and_finds_the_same_latents(name, saes, hidden, folder):
    sae, recipe = saes[name]
    exported = formats.export(sae, recipe, folder / "out", "saelens")
    worst, other, x_hat_worst, tokens = 0.0, 0, 0.0, 0
    for site, form in sae.to_standard_form().items():
        theirs = sae_lens.SAE.load_from_disk(exported / formats.hook_of(site))
        h = hidden[site]
        x, mean, std = sae.standardise(h)
        ours, found = form.code(x), theirs.encode(h)
        same = ((ours != 0) == (found != 0)).all(-1)
        worst, tokens = max(worst, float((ours - found)[same].abs().max())), tokens + len(h)
        other += int((~same).sum())
        mine = getattr(sae, "sae", sae).decode(ours) * std + mean
        x_hat_worst = max(x_hat_worst, float((mine - theirs.decode(found))[same].abs().max()))
        theirs.fold_W_dec_norm()  # what SAEDashboard does
        folded = theirs.encode(h) / getattr(sae, "sae", sae).decoder.weight.norm(dim=0)
        assert ((folded - ours).abs().amax(-1) > 1e-3).sum() <= TIES * len(h)
    print(
        f"\nexport {name:<10} latents {worst:.1e}  reconstruction {x_hat_worst:.1e}  other active sets {other} of {tokens} tokens"
    )
    assert worst < 1e-4 and other <= TIES * tokens and x_hat_worst < 1e-3


KINDS = {"topk": {"k": 9}, "standard": {}, "jumprelu": {}, "gated": {}}


@torch.no_grad()
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("at_input", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_folders_saelens_writes_load_here_with_the_same_latents_and_reconstruction(
    kind, at_input, norm, tmp_path
):
    torch.manual_seed(0)
    metadata = sae_lens.saes.sae.SAEMetadata(
        hook_name="blocks.5.hook_resid_post", model_name="org/lm"
    )
    _, config = sae_lens.registry.get_sae_class(kind)
    theirs = sae_lens.registry.get_sae_class(kind)[0](
        config(
            d_in=64,
            d_sae=256,
            apply_b_dec_to_input=at_input,
            normalize_activations=norm,
            metadata=metadata,
            **KINDS[kind],
        )
    )
    for parameter in theirs.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_model(tmp_path / "sae")
    sae, _ = checkpoint.load(tmp_path / "sae")
    h = torch.randn(5000, 64)
    found, expected = sae.autoencode(sae.gather({6: h})), theirs.encode(h)
    other = int(((found.latents != 0) != (expected != 0)).any(-1).sum())
    same = ((found.latents != 0) == (expected != 0)).all(-1)
    worst = float((found.latents - expected)[same].abs().max())
    x_hat, mean, std = found.x_hat, *sae.standardise(h)[1:]
    x_hat_worst = float((x_hat * std + mean - theirs.decode(theirs.encode(h)))[same].abs().max())
    form = f"{kind} {norm}{'' if at_input else ', b_dec folded'}"
    print(
        f"\nimport {form:<36} latents {worst:.1e}  reconstruction {x_hat_worst:.1e}  other active sets {other} of 5000"
    )
    assert worst < 2e-4 and x_hat_worst < 1e-3 and other <= 2


class Tokens:
    """The part of SAELens' ActivationsStore that SAEBench asks for, over our own rows."""

    def __init__(self, rows):
        self.rows, self.context_size, self.store_batch_size_prompts = (
            rows,
            LENGTH,
            rows[0].input_ids.shape[0],
        )
        self.reset_input_dataset()

    def reset_input_dataset(self):
        self.next = iter(self.rows)

    def get_batch_tokens(self, _size=None):
        return next(self.next).input_ids


@pytest.fixture(scope="module")
def evaluated(folder):
    """evaluate.py's results by title."""
    paths = [str(folder / "out" / "SAE_models" / f"{name}_text.pt") for name in SINGLE]
    arguments = [
        "--SAE_path",
        *paths,
        "--data_path",
        str(folder / "text.jsonl"),
        "--dtype",
        "float32",
        "--output_dir",
        str(folder / "ev"),
    ]
    arguments += [
        "--max_length",
        str(LENGTH),
        "--max_samples",
        str(EVAL_ROWS),
        "--metric",
        "NormMSE",
        "KLDiv",
        "Recovered",
    ]
    return Evaluator(parse("evaluate", arguments)).run()


def special(tokenizer):
    return {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}


@torch.no_grad()
@pytest.mark.parametrize("name", SINGLE)
def test_saebench_measures_what_evaluate_measures_where_both_mean_the_same(
    name, saes, rows, language_model, evaluated, hidden
):
    tokenizer, model = language_model
    sae, _ = saes[name]
    (one,) = formats.site_saes(sae, str(DEMO_LM), {12: "model.layers.11"}).values()
    proxy = HookedProxyLM(model, tokenizer, hook_names=["model.layers.11"])
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
    measured, _ = core.run_evals(one, Tokens(rows), proxy, config, ignore_tokens=special(tokenizer))
    theirs = {key: value for group in measured.values() for key, value in group.items()}
    ours = evaluated[f"{name}_text"]
    kl, ce_sae, ce_clean = (
        [],
        [],
        [],
    )  # of SAEBench's tokens, those that evaluate counts: a prediction of a counted token from a counted one
    for batch in rows:
        at = batch.mask[:, :-1] & batch.mask[:, 1:]
        per_token = core.get_recons_loss(
            one,
            proxy,
            batch.input_ids,
            None,
            compute_kl=True,
            compute_ce_loss=True,
            ignore_tokens=special(tokenizer),
            exclude_special_tokens_from_reconstruction=True,
        )
        kl.append(per_token["kl_div_with_sae"][:, :-1][at])
        ce_sae.append(per_token["ce_loss_with_sae"][at])
        ce_clean.append(per_token["ce_loss_without_sae"][at])
    kl, ce_sae, ce_clean = (float(torch.cat(part).mean()) for part in (kl, ce_sae, ce_clean))
    h = hidden[12]
    x_hat = next(sae.patches({12: h}))[12](h)
    error, cosine = (h - x_hat).square().sum(-1), torch.cosine_similarity(h, x_hat, dim=-1)
    size = len(h) / len(
        rows
    )  # SAEBench divides squared errors by the tokens of a batch, then takes the mean over tokens
    table = {  # SAEBench's, on the positions that evaluate counts, evaluate's
        "KL": (theirs["kl_div_with_sae"], kl, ours["KLDiv"]),
        "CE added": (
            theirs["ce_loss_with_sae"] - theirs["ce_loss_without_sae"],
            ce_sae - ce_clean,
            ours["DeltaCE"],
        ),
        "CE recovered (zero ablation)": (theirs["ce_loss_score"], None, ours["Recovered_zero"]),
        "L0": (theirs["l0"], theirs["l0"], ours["L0"]),
        "cosine of raw states": (theirs["cossim"], theirs["cossim"], float(cosine.mean())),
        "squared error of raw states": (
            theirs["mse"] * size,
            theirs["mse"] * size,
            float(error.mean()),
        ),
        "explained variance": (theirs["explained_variance"], None, 1 - ours["FVU"]),
        "explained variance, legacy": (theirs["explained_variance_legacy"], None, 1 - ours["FVU"]),
    }
    print(f"\nSAEBench {name}")
    for metric, values in table.items():
        print(
            f"    {metric:<30}"
            + "".join(f"{value:>16.5f}" if value is not None else f"{'-':>16}" for value in values)
        )
    assert kl == pytest.approx(ours["KLDiv"], rel=1e-4) and ce_sae - ce_clean == pytest.approx(
        ours["DeltaCE"], rel=1e-3, abs=1e-5
    )
    assert theirs["l0"] == pytest.approx(ours["L0"], rel=1e-6) and theirs[
        "cossim"
    ] == pytest.approx(float(cosine.mean()), rel=1e-5)
    assert theirs["mse"] * size == pytest.approx(
        float(error.mean()), rel=0.02
    )  # batches differ in tokens
    assert abs(theirs["kl_div_with_sae"] - kl) < 0.1 * kl


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

    class Local:  # the runner's HookedTransformer knows models by name alone; TransformerLens' bridge opens a folder
        @staticmethod
        def from_pretrained_no_processing(name, device, dtype):
            return TransformerBridge.boot_transformers(name, device=device, dtype=dtype)

    monkeypatch.setattr(core, "HookedTransformer", Local)
    for name in ("TopK", "RouteSAE"):
        sae, _ = saes[name]
        chosen = [
            (f"{name}_{site}", one) for site, one in formats.site_saes(sae, str(DEMO_LM)).items()
        ][:2]
        options = {
            "dataset": str(text),
            "context_size": LENGTH,
            "output_folder": str(folder / "bench"),
            "device": "cpu",
        }
        options |= {
            "compute_featurewise_density_statistics": True,
            "compute_featurewise_weight_based_metrics": True,
        }
        results = core.multiple_evals(
            chosen,
            2,
            2,
            eval_batch_size_prompts=8,
            exclude_special_tokens_from_reconstruction=True,
            **options,
        )
        assert len(results) == len(chosen)
        for title, _ in chosen:
            written = json.loads(
                Path(folder / "bench" / f"{title}_custom_sae_eval_results.json").read_text()
            )["eval_result_metrics"]
            score, l0 = (
                written["model_behavior_preservation"]["kl_div_score"],
                written["sparsity"]["l0"],
            )
            print(f"\nSAEBench's runner {title:<12} KL score {score:.4f}  L0 {l0:.3f}")
            assert 0 < score <= 1 and l0 == pytest.approx(16, abs=0.01)
