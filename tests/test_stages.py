"""Training and evaluation through their entry points, on the demo LM and a small text."""

import json
import math
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from src import (
    checkpoint,
    evaluator,
    export_formats,
    files,
    hooks,
    lm,
    metric_table,
    page,
    plots,
    utils,
)
from src.applier import Applier
from src.config import OPTIONS, parse, run_stage
from src.data import Rows
from src.evaluator import Evaluator
from src.files import DEMO_LM
from src.metrics import KLDiv, Mean, PatchedRuns, Reconstruction, Run
from src.model import build
from src.sae import SAEOutput
from src.sae_training import LinearWarmupLR
from src.trainer import Trainer
from src.zoo import ZOO


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    sentence = "Return the {}th value of the array, or raise ValueError if {} exceeds its size. "
    lines = [json.dumps({"text": sentence.format(i, i * 7) * 3}) for i in range(120)]
    path.write_text("\n".join(lines))
    return path


def train_argv(text, tmp_path, *more):
    paths = ["--model_path", str(DEMO_LM), "--data_path", str(text)]
    paths += ["--output_dir", str(tmp_path / "out")]
    sizes = "--latent_size 64 --k 4 --max_length 32 --batch_size 4 --max_samples 80".split()
    return [*paths, *sizes, "--dtype", "float32", *more]


def train(text, tmp_path, *more):
    return Trainer(parse("train", train_argv(text, tmp_path, *more))).run()


def evaluate(tmp_path, *more):
    argv = ["--output_dir", str(tmp_path / "out"), "--max_samples", "8", *more]
    return Evaluator(parse("evaluate", argv)).run()


def sae_path(tmp_path, title):
    return tmp_path / "out" / "SAE_models" / f"{title}.pt"


def metric_lines(tmp_path, run_name):
    path = tmp_path / "out" / "runs" / run_name / "metrics.jsonl"
    return [json.loads(line) for line in path.open()]


def test_every_model_trains_and_is_evaluated_with_every_metric(text, tmp_path, capsys):
    train(text, tmp_path, "--model", *ZOO)
    paths = [str(sae_path(tmp_path, f"{name}_text")) for name in ZOO]
    results = evaluate(tmp_path, "--SAE_path", *paths, "--metric", "all")
    eval_folder = tmp_path / "out" / "eval"
    for name in ZOO:
        result = results[f"{name}_text"]
        for metric in metric_table.METRICS:
            if metric.unit and metric.name != "Probing":  # this text is too short for it
                assert math.isfinite(result[metric.key]), (name, metric.key)
                assert result["units"][metric.key] == metric.unit
        assert result["KLDiv"] > 0
        assert (eval_folder / f"{name}_text.json").exists()
    top_k, crosscoder = results["TopK_text"], results["Crosscoder_text"]
    assert top_k["L0"] == 4
    assert results["RandomK_text"]["NormMSE"] > 1.3 * top_k["NormMSE"]
    assert len(crosscoder["KLDiv_per_site"]) == 9
    assert len(results["RouteSAE_text"]["Routing"]["share"]) == 9
    assert torch.tensor(crosscoder["decoder_norms_per_latent"]).shape == (64, 9)
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    assert "share of tokens at each site" in printed.out
    (log,) = (tmp_path / "out" / "runs").rglob("metrics.jsonl")
    lines = [json.loads(line) for line in log.open()]
    errors = [line["NormMSE"] for line in lines if line["sae"] == "TopK_text"]
    assert errors[-1] < errors[0]
    check_comparison(eval_folder, tmp_path)


def check_comparison(eval_folder, tmp_path):
    """The picture and the table of all results."""
    loaded = plots.load(eval_folder)
    plots.picture(loaded, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert plots.table(loaded).count("\n") == len(ZOO) + 1
    assert [result["model"] for result in plots.load(eval_folder, "Gated")] == ["Gated"]


def test_a_model_trained_alone_or_beside_others_is_bit_identical(text, tmp_path):
    train(text, tmp_path, "--model", "TopK", "--tag", "alone")
    train(text, tmp_path, "--model", "Vanilla", "RandomK", "TopK", "--tag", "beside")
    alone, beside = (
        torch.load(sae_path(tmp_path, f"TopK_text_{tag}")) for tag in ("alone", "beside")
    )
    assert all(torch.equal(alone[key], beside[key]) for key in alone)


def test_a_sweep_names_its_values_and_skips_models_without_the_option(text, tmp_path):
    train(text, tmp_path, "--model", "TopK", "Vanilla", "--k", "2", "4")
    names = sorted(path.stem for path in (tmp_path / "out" / "SAE_models").glob("*.pt"))
    assert names == ["TopK_text_k2", "TopK_text_k4", "Vanilla_text"]


def test_a_finished_run_says_so_and_another_recipe_is_refused(text, tmp_path, capsys):
    loss = train(text, tmp_path)
    path = sae_path(tmp_path, "TopK_text")
    before = path.stat().st_mtime_ns
    assert train(text, tmp_path) == loss
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"trained with other options \(.*lr"):
        train(text, tmp_path, "--lr", "0.5")
    assert path.stat().st_mtime_ns == before


def test_evaluation_needs_no_flag_and_takes_everything_from_the_recipe(text, tmp_path, capsys):
    train(text, tmp_path, "--layer", "5")
    value = evaluate(tmp_path, "--metric", "KLDiv")
    assert isinstance(value, float) and value > 0
    assert "newest checkpoint" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "eval" / "TopK_text.json").read_text())["sites"] == [5]


def test_one_metric_of_one_checkpoint_is_a_number(text, tmp_path):
    train(text, tmp_path)
    for metric in ("NormMSE", "Recovered", "Dead"):
        assert isinstance(evaluate(tmp_path, "--metric", metric), float)


def test_a_metric_of_the_code_is_shown_and_does_not_patch_the_language_model(
    text, tmp_path, monkeypatch, capsys
):
    train(text, tmp_path)
    monkeypatch.setattr(hooks, "patched_states", None)
    assert evaluate(tmp_path, "--metric", "L0") == 4
    *_, name, row, _saved = capsys.readouterr().out.splitlines()
    assert name == "TopK_text, site 12"
    assert row.split() == ["L0", "4.0000", "latents", "a", "token"]


ADD_A_METRIC = """
from src import metric_table as table
new = table.Metric("New", "New_mean", table.CODE, "share", table.EVERYWHERE, 9, panel="new")
table.METRICS += (new,)
table.NAMES += ("New",)
from src import config, page, plots
assert config.parse("evaluate", ["--metric", "New"]).metric == ["New"]
assert table.headline("New") == "New_mean"
assert table.shown_in(table.CONSOLE)[-1] == table.shown_in(table.CARD)[-1] == "New_mean"
assert page.METRICS[-1] == "New_mean"
result = {"title": "a", "sites": [3], "NormMSE": 0.5, "L0": 4.0, "New_mean": 0.25}
assert plots.table([result]).endswith("| 0.2500 |")
histogram = {"Density_histogram": {"latents": [1] * 7}}
plots.picture([result | histogram], pathlib.Path(sys.argv[1]))
"""


def test_a_row_of_the_metric_table_is_enough_to_ask_for_a_metric_and_to_show_it(tmp_path):
    code = "import pathlib, sys" + ADD_A_METRIC
    picture = tmp_path / "picture.png"
    subprocess.run([sys.executable, "-c", code, str(picture)], cwd=files.ROOT, check=True)
    assert picture.exists()


def test_results_of_a_previously_trained_sae_are_not_shown_for_the_new_one(
    text, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    contexts = out / "contexts" / "TopK_text_contexts.json"
    apply_argv = ["--output_dir", str(out), *"--act_threshold 0 --lines 1 --max_samples 8".split()]
    train(text, tmp_path)
    evaluate(tmp_path)
    train(text, tmp_path, "--layer", "4", "--overwrite", "1")
    Applier(parse("apply", apply_argv)).run()
    sae, recipe = checkpoint.load(sae_path(tmp_path, "TopK_text"))
    card = (export_formats.export(sae, recipe, out, "hf") / "README.md").read_text()
    assert "Not measured" in card
    assert "of another SAE that had this name" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["page", str(contexts), str(tmp_path / "page.html")])
    page.main()
    assert "was evaluated before it was trained anew" in capsys.readouterr().out
    evaluate(tmp_path)
    card = (export_formats.export(sae, recipe, out, "hf", overwrite=True) / "README.md").read_text()
    assert "held-out tokens (`eval` split)" in card and "NormMSE" in card
    page.main()
    assert "left out" not in capsys.readouterr().out
    before = contexts.read_bytes()
    Applier(parse("apply", [*apply_argv, "--act_threshold", "1e9"])).run()
    assert "nothing kept" in capsys.readouterr().out
    assert contexts.read_bytes() == before


def test_runs_that_share_an_sae_or_a_tag_do_not_destroy_each_other(text, tmp_path):
    other = tmp_path / "out" / "runs" / "TopK_text"
    files.probe(other)
    with files.locked(other), pytest.raises(ValueError, match="is being written by process"):
        train(text, tmp_path, "--model", "TopK", "Vanilla")
    for name in ("TopK", "Vanilla", "TopK"):
        train(text, tmp_path, "--model", name, "--tag", "t", "--overwrite", "1")
    lines = metric_lines(tmp_path, "t")
    steps = [line["step"] for line in lines if line["sae"] == "TopK_text_t"]
    assert steps == sorted(set(steps))
    assert {line["sae"] for line in lines} == {"TopK_text_t", "Vanilla_text_t"}


def test_options_that_do_not_fit_a_checkpoint_are_reported(text, tmp_path, capsys):
    train(text, tmp_path)
    path = tmp_path / "out" / "SAE_models" / "TopK_text.json"
    other = shutil.copytree(DEMO_LM, tmp_path / "other")
    evaluate(tmp_path, "--metric", "NormMSE", "--k", "2", "--model_path", str(other))
    message = capsys.readouterr().out
    assert "--k does nothing for a trained SAE" in message
    assert "was trained on" not in message  # it is the same language model
    recipe = json.loads(path.read_text())
    del recipe["language_model"]  # as in recipes of earlier versions
    path.write_text(json.dumps(recipe))
    evaluate(tmp_path, "--metric", "NormMSE", "--model_path", str(other))
    assert f"was trained on {DEMO_LM}, not on {other}" in capsys.readouterr().out
    del recipe["model_path"]
    path.write_text(json.dumps(recipe | {"model_name": "mine"}))
    with pytest.raises(ValueError, match="was trained on mine, .* name it with --model_path"):
        evaluate(tmp_path)


def test_ablations_of_a_site_are_run_once_for_all_its_saes(text, tmp_path, monkeypatch):
    names = ("TopK", "Vanilla", "RouteSAE")
    train(text, tmp_path, "--model", *names, "--layer", "6")
    patched_states, runs = hooks.patched_states, []

    def count_run(*args):
        runs.append(args)
        return patched_states(*args)

    monkeypatch.setattr(hooks, "patched_states", count_run)
    monkeypatch.setattr(hooks, "self_check", lambda *_: True)
    paths = [str(sae_path(tmp_path, f"{name}_text")) for name in names]
    together = evaluate(tmp_path, "--SAE_path", *paths, "--metric", "all")
    # two batches: three reconstructions, two ablations of the site, two of the routed tokens
    assert len(runs) == 2 * (3 + 2 + 2)
    for path in paths:
        (alone,) = evaluate(tmp_path, "--SAE_path", path, "--metric", "all").values()
        assert alone == together[alone["title"]]
    assert len(runs) == 2 * (7 + 9)


def test_batch_size_changes_no_metric(text, tmp_path):
    train(text, tmp_path, "--model", "RandomK")
    one, three = (
        evaluate(tmp_path, "--metric", "NormMSE", "KLDiv", "--batch_size", size)["RandomK_text"]
        for size in ("1", "3")
    )
    assert one["NormMSE"] == pytest.approx(three["NormMSE"], rel=1e-5)
    assert one["KLDiv"] == pytest.approx(three["KLDiv"], rel=1e-4)


def test_published_recipe_trains_and_documented_bare_files_load(text, tmp_path):
    train(text, tmp_path, "--model", *ZOO, "--recipe", "published")
    for name in ("RouteSAE", "Vanilla", "Gated", "JumpReLU", "Crosscoder"):
        bare = tmp_path / f"{name}_openwebtext2.pt"
        shutil.copy(sae_path(tmp_path, f"{name}_text"), bare)
        sae, recipe = checkpoint.load(bare, hints={"n_layers": 16})
        assert recipe["model"] == name and sae.sites()


def test_the_self_check_passes_here_and_sees_a_hook_that_does_nothing(text, tmp_path, monkeypatch):
    tokenizer, model = lm.get_language_model(str(DEMO_LM), "cpu", "float32")
    batch = next(Rows(text, tokenizer, 32, "all").batches(2))
    hooks.self_check(model, batch, [1, 8, 16])
    monkeypatch.setattr(lm, "with_hidden", lambda output, hidden: output)
    with pytest.raises(ValueError, match="does not reach"):
        hooks.self_check(model, batch, [8])


def test_blocks_that_return_tuples_are_patched_too(text):
    tokenizer, model = lm.get_language_model(str(DEMO_LM), "cpu", "float32")
    batch = next(Rows(text, tokenizer, 32, "all").batches(2))
    full = lm.read_sites(model, batch.input_ids, [16])
    plain = hooks.patched_states(model, batch, {16: lambda h: h + 1}, full)
    output = (full[16], "cache")
    hidden, rest = hooks.patch_hooks({16: lambda h: h + 1}, batch.mask)[16](output)
    assert rest == "cache"
    assert torch.equal(hidden[batch.mask], full[16][batch.mask] + 1)
    assert torch.equal(hidden[~batch.mask], full[16][~batch.mask])
    assert not torch.equal(plain, lm.final_states(model, batch.input_ids))


def test_overwriting_several_sites_is_overwriting_the_last(text):
    tokenizer, model = lm.get_language_model(str(DEMO_LM), "cpu", "float32")
    batch = next(Rows(text, tokenizer, 32, "all").batches(1))
    fixed = torch.randn(int(batch.mask.sum()), 128, generator=torch.Generator().manual_seed(0))
    every = hooks.patched_states(model, batch, {site: (lambda h: fixed) for site in (4, 8, 12)})
    assert torch.equal(every, hooks.patched_states(model, batch, {12: lambda h: fixed}))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--k", "65"], "more than --latent_size 64"),
        (["--k", "0"], "--k 0: must be at least 1"),
        (["--layer", "17"], "sites run from 1 to 16"),
        (["--hidden_size", "64"], "the language model has 128"),
        (["--model", "TopKK"], "the zoo has TopK"),
        (["--text_key", "body"], "the first has text"),
        (["--model_path", "/nowhere/at/all"], "cannot load language model"),
        (["--data_path", "/nowhere/at/all"], "no file, folder or glob"),
    ],
)
def test_bad_options_end_with_one_clear_line(text, tmp_path, capsys, more, message):
    argv = train_argv(text, tmp_path, *more)
    try:
        code = run_stage("train", lambda cfg: Trainer(cfg).run(), argv)
    except SystemExit as stop:
        code = stop.code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == (3 if "--text_key" in more else 2)
    assert message in line


def test_a_site_that_does_not_exist_is_refused_before_the_text_is_read(text, tmp_path, monkeypatch):
    monkeypatch.setattr("src.demo.open_rows", lambda *_: pytest.fail("text read"))
    with pytest.raises(ValueError, match="layer 17 of a 16-block model"):
        train(text, tmp_path, "--layer", "17")


def test_missing_and_foreign_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        evaluate(tmp_path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no encoder"):
        evaluate(tmp_path, "--SAE_path", str(tmp_path / "x.pt"))


def test_the_schedule_warms_up_stays_and_falls_also_in_tiny_runs():
    for total in (1, 3, 4, 100):
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = LinearWarmupLR(optimizer, round(0.05 * total), total)
        rates = []
        for _ in range(total):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[0] > 0 and optimizer.param_groups[0]["lr"] == 0
    assert rates[0] == pytest.approx(0.2) and rates[50] == 1 and rates[90] == pytest.approx(0.5)


def test_kl_agrees_with_values_computed_by_hand():
    logits = torch.randn(5, 9)
    assert KLDiv(logits, logits).abs() < 1e-6
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert KLDiv(p.log(), q.log()).item() == pytest.approx(0.5 * math.log(4 / 3))


def reconstruction_metrics(*pairs):
    """The metrics of (target, x_hat), taken in one pair at a time."""
    measure = Reconstruction()
    for target, x_hat in pairs:
        measure.update(SAEOutput(target, None, x_hat))
    return measure.compute()


def test_reconstruction_metrics_agree_with_values_computed_by_hand():
    x = torch.randn(100, 6) + 3
    for factor, mse in ((0.0, 1.0), (0.5, 0.25), (1.0, 0.0)):
        result = reconstruction_metrics((x[:30], factor * x[:30]), (x[30:], factor * x[30:]))
        assert result["NormMSE"] == pytest.approx(mse)
    mean = x.mean(0).expand_as(x)
    assert reconstruction_metrics((x, mean))["FVU"] == pytest.approx(1.0, abs=1e-5)
    assert reconstruction_metrics((x, 0.8 * x))["Shrinkage"] == pytest.approx(0.8, abs=1e-5)
    # Of an SAE for another place: an infinite value would lose the whole result.
    assert reconstruction_metrics((x, -0.5 * x))["Shrinkage"] == pytest.approx(-0.5, abs=1e-5)
    assert reconstruction_metrics((x, 0 * x))["Shrinkage"] == 0
    assert Mean().compute() is None


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-3])
def test_equal_states_are_no_reconstruction_that_can_be_measured(scale):
    state = torch.randn(6)
    equal = scale * state.expand(100, 6)
    with pytest.raises(ValueError, match="all 100 counted tokens have the same state"):
        reconstruction_metrics((equal, equal))
    # also where one of several sites is constant, and where rounding makes states differ
    noisy = equal + 1e-7 * scale * torch.randn(100, 6)
    with pytest.raises(ValueError, match="same state"):
        reconstruction_metrics(
            (torch.stack([torch.randn(100, 6), noisy], 1), torch.zeros(100, 2, 6))
        )


def test_equal_states_are_no_very_good_reconstruction(text, tmp_path, capsys):
    scaled_language_model(tmp_path / "lm", 0.0)
    train(text, tmp_path, "--model_path", str(tmp_path / "lm"))
    assert "states at site 12 are equal in the first batch" in capsys.readouterr().out
    with pytest.raises(ValueError, match="same state"):
        evaluate(tmp_path)
    assert not (tmp_path / "out" / "eval").exists()
    assert "very good" not in capsys.readouterr().out


def test_documented_training_and_evaluation_flags_exist():
    documented = """
        model model_path hidden_size latent_size k layer n_layers l1_coeff threshold bandwidth aggre
        routing data_path batch_size max_length lr betas num_epochs steps max_samples use_wandb
        wandb_project SAE_path metric infer_k theta output_dir device seed recipe max_tokens
        chunking text_key max_bad_frac split dtype norm_eps auxk_coeff dead_tokens target_l0
        sparsity_warmup topk_relu b_pre_init grad_clip optimizer include_special start_layer
        end_layer tag overwrite trust_remote_code route_patch debug
    """.split()
    assert set(documented) <= set(OPTIONS)


def test_checkpoints_of_one_name_are_not_measured_into_one_file(text, tmp_path):
    train(text, tmp_path)
    path = sae_path(tmp_path, "TopK_text")
    other = shutil.copytree(path.parent, tmp_path / "other") / path.name
    with pytest.raises(ValueError, match="several checkpoints are called TopK_text"):
        evaluate(tmp_path, "--SAE_path", str(path), str(other))


def evaluations(tmp_path):
    """{title in the file: the result}"""
    results = [json.loads(path.read_text()) for path in (tmp_path / "out" / "eval").glob("*.json")]
    return {result["title"]: result for result in results}


def test_an_evaluation_of_other_tokens_or_fewer_metrics_never_replaces_a_held_out_one(
    text, tmp_path, capsys
):
    train(text, tmp_path)
    evaluate(tmp_path, "--metric", "all")
    path = tmp_path / "out" / "eval" / "TopK_text.json"
    before = path.read_bytes()
    evaluate(tmp_path, "--split", "train", "--max_samples", "3")
    evaluate(tmp_path, "--max_samples", "2", "--metric", "all")
    assert "TopK_text.json holds another measurement" in capsys.readouterr().out
    other_text = shutil.copy(text, tmp_path / "other.jsonl")
    evaluate(tmp_path, "--data_path", str(other_text), "--metric", "all")
    other_model = shutil.copytree(DEMO_LM, tmp_path / "other")
    evaluate(tmp_path, "--model_path", str(other_model), "--metric", "all")
    assert path.read_bytes() == before
    saved = evaluations(tmp_path)
    # That of another language model has the model's name in its own.
    names = ["TopK_text", *(f"TopK_text_{end}" for end in ("2", "3", "other", "train"))]
    assert sorted(saved) == names
    assert saved["TopK_text_train"]["split"] == "train"
    assert saved["TopK_text_2"]["tokens"] < saved["TopK_text"]["tokens"]
    evaluate(tmp_path, "--max_samples", "2", "--metric", "all")  # the same again
    assert sorted(evaluations(tmp_path)) == names


@pytest.mark.parametrize("content", ["torn {", "[1]", '{"title": "x"}'])
def test_an_evaluation_replaces_what_is_no_result(text, tmp_path, content):
    train(text, tmp_path)
    path = tmp_path / "out" / "eval" / "TopK_text.json"
    path.parent.mkdir()
    path.write_text(content)
    evaluate(tmp_path)
    assert json.loads(path.read_text())["title"] == "TopK_text"


def test_metrics_of_the_same_rows_join_those_measured_before_and_more_rows_replace(text, tmp_path):
    train(text, tmp_path)
    kl = evaluate(tmp_path, "--metric", "KLDiv")
    evaluate(tmp_path, "--metric", "NormMSE")
    (saved,) = evaluations(tmp_path).values()
    assert saved["KLDiv"] == kl and saved["units"]["KLDiv"] == "nats a token"
    evaluate(tmp_path, "--metric", "KLDiv", "--max_samples", "9")
    (longer,) = evaluations(tmp_path).values()
    assert longer["tokens"] > saved["tokens"] and longer["KLDiv"] != kl
    evaluate(tmp_path, "--metric", "NormMSE", "--max_samples", "10")  # would take the KL away
    assert sorted(evaluations(tmp_path)) == ["TopK_text", "TopK_text_2"]
    train(text, tmp_path, "--overwrite", "1", "--seed", "7")
    evaluate(tmp_path, "--metric", "NormMSE")  # of new weights: nothing of the old ones stays
    assert "KLDiv" not in evaluations(tmp_path)["TopK_text"]


def scaled_language_model(folder, factor):
    """Write the demo language model with all weights multiplied by a factor."""
    tokenizer, model = lm.get_language_model(str(DEMO_LM), "cpu", "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_an_sae_that_reads_another_language_model_is_named_and_measured_apart(
    text, tmp_path, capsys
):
    folder = tmp_path / "lm"
    scaled_language_model(folder, 1.0)
    train(text, tmp_path, "--model_path", str(folder))
    evaluate(tmp_path, "--metric", "KLDiv")
    with_kl = (tmp_path / "out" / "eval" / "TopK_text.json").read_bytes()
    evaluate(tmp_path, "--dtype", "bfloat16")  # another format of the same weights
    argv = ["--output_dir", str(tmp_path / "out"), "--max_samples", "4", "--lines", "1"]
    apply = parse("apply", [*argv, "--act_threshold", "0"])
    Applier(apply).run()
    warning = "TopK_text was trained on a language model with other weights than"
    assert warning not in capsys.readouterr().out
    scaled_language_model(folder, 1.5)  # at the same place
    Applier(apply).run()
    assert warning in capsys.readouterr().out
    evaluate(tmp_path, "--metric", "DeltaCE")
    assert warning in capsys.readouterr().out
    # Its metrics do not join those of the other language model.
    assert (tmp_path / "out" / "eval" / "TopK_text.json").read_bytes() == with_kl


@pytest.mark.parametrize(
    "content", ["[1]", '{"tokens": "many", "units": [1]}', '{"tokens": 5, "units": {}, "sae": [1]}']
)
def test_what_lies_in_the_place_of_a_result_ends_no_evaluation(text, tmp_path, content):
    train(text, tmp_path)
    (tmp_path / "out" / "eval").mkdir()
    (tmp_path / "out" / "eval" / "TopK_text.json").write_text(content)
    evaluate(tmp_path)
    assert any("NormMSE" in path.read_text() for path in (tmp_path / "out" / "eval").glob("*.json"))


def test_results_of_evaluations_at_the_same_time_are_all_kept(text, tmp_path, monkeypatch):
    train(text, tmp_path)
    evaluate(tmp_path)
    (path,) = (tmp_path / "out" / "eval").glob("*.json")
    result = json.loads(path.read_text())
    path.unlink()
    earlier_result = evaluator._earlier_result

    def read_and_pause(path):
        earlier = earlier_result(path)
        time.sleep(0.03)  # in which another process could read the same
        return earlier

    monkeypatch.setattr(evaluator, "_earlier_result", read_and_pause)
    out = str(tmp_path / "out")
    four = [result | {"tokens": result["tokens"] - number} for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: evaluator._save(one, out), four))
    kept = {saved["tokens"] for saved in evaluations(tmp_path).values()}
    assert max(kept) == result["tokens"]
    joined = [result | {name: 1.0, "units": {name: "share"}} for name in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: evaluator._save(one, out), joined))
    assert set("abcd") <= json.loads(path.read_text())["units"].keys()


def test_metrics_that_overflow_are_named(text, tmp_path):
    train(text, tmp_path)
    path = sae_path(tmp_path, "TopK_text")
    sae, recipe = checkpoint.load(path)
    with torch.no_grad():
        sae.decoder.weight.mul_(1e30)
        sae.encoder.weight.mul_(1e30)
    recipe.pop("weights_sum")
    checkpoint.save(sae, recipe, path.parent, "TopK_text")
    with pytest.raises(ValueError, match="TopK_text: .*NormMSE.* cannot be computed in float32"):
        evaluate(tmp_path)


def test_an_ablation_that_changes_nothing_has_nothing_to_recover():
    runs, nats = PatchedRuns(), torch.ones(4)
    for ablation in ("", "mean"):
        runs.update(Run(0, ablation), 0 * nats, nats, nats)
    result = runs.compute(n_rows=1)
    assert result["Recovered_mean"] is None and result["KLDiv"] == 0


def test_a_numbered_result_does_not_replace_that_of_an_sae_of_this_name(text, tmp_path):
    train(text, tmp_path)
    train(text, tmp_path, "--tag", "2")
    paths = [str(sae_path(tmp_path, title)) for title in ("TopK_text", "TopK_text_2")]
    evaluate(tmp_path, "--SAE_path", *paths)
    evaluate(tmp_path, "--SAE_path", paths[0], "--max_samples", "2")
    saved = evaluations(tmp_path)
    assert sorted(saved) == ["TopK_text", "TopK_text_2", "TopK_text_3"]
    assert saved["TopK_text_2"]["sae"] == "TopK_text_2"
    assert saved["TopK_text_3"]["sae"] == "TopK_text"


def test_the_console_says_which_tokens_were_measured_and_l0_stands_beside_the_scale(
    text, tmp_path, capsys
):
    train(text, tmp_path)
    evaluate(tmp_path, "--metric", "NormMSE")
    lines = capsys.readouterr().out.splitlines()
    name = lines.index("TopK_text, site 12")
    assert lines[name - 1].endswith(f"tokens of split eval of {text}")
    assert [line.split()[0] for line in lines[name + 1 : name + 3]] == ["NormMSE", "L0"]


def test_rows_without_a_countable_prediction_are_one_clear_line(text, tmp_path):
    train(text, tmp_path)
    with pytest.raises(ValueError, match="no prediction between counted tokens"):
        evaluate(tmp_path, "--metric", "KLDiv", "--max_length", "2")


def test_routed_errors_per_site_add_up_to_the_headline(text, tmp_path):
    train(text, tmp_path, "--model", "RouteSAE")
    result = evaluate(tmp_path, "--metric", "NormMSE", "Routing")["RouteSAE_text"]
    routing = result["Routing"]
    pairs = zip(routing["share"], routing["NormMSE_of_routed"], strict=True)
    total = sum(share * (error or 0) for share, error in pairs)  # None where no token is routed
    assert total == pytest.approx(result["NormMSE"], rel=1e-5)


def test_the_self_check_says_when_it_could_check_nothing(text):
    tokenizer, model = lm.get_language_model(str(DEMO_LM), "cpu", "float32")
    batch = next(Rows(text, tokenizer, 32, "all").batches(2))
    assert hooks.self_check(model, batch, [8]) is True
    assert hooks.self_check(model, batch._replace(mask=torch.zeros_like(batch.mask)), [8]) is False
    late = batch.mask.clone()
    late[0] = False  # no token of the first row counts, so the check takes the next row
    assert hooks.self_check(model, batch._replace(mask=late), [8]) is True


def test_hook_sae_refuses_a_model_over_several_sites():
    sae = build("Crosscoder", 128, 16, {"latent_size": 8})
    with pytest.raises(ValueError, match="one site"):
        utils.hook_SAE(None, sae, torch.nn.Identity())
