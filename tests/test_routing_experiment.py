"""The routing experiment: its intervals, and the complete command on a tiny language model."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from experiments import routing
from experiments.routing_measure import QUANTITIES
from experiments.routing_report import bootstrap, interval, ratio
from src.config import parse
from src.evaluator import Evaluator
from src.files import DEMO_LM


def table(errors, tokens):
    """The sums of one run by document."""
    sums = np.zeros((len(errors), len(QUANTITIES)))
    sums[:, QUANTITIES.index("NormMSE")] = errors
    sums[:, QUANTITIES.index("tokens")] = tokens
    return sums


def test_intervals_come_from_documents_and_compared_runs_share_their_redraws():
    tokens = np.array([10.0, 30.0, 20.0, 40.0] * 25)
    errors = tokens * np.random.default_rng(1).uniform(0.5, 1.5, 100)
    draws = bootstrap(100, 500)
    run = ratio(draws, table(errors, tokens), "NormMSE")
    control = ratio(draws, table(errors * 0.9, tokens), "NormMSE")
    figure, gain = interval(run), interval(1 - control / run)
    assert figure["value"] == pytest.approx(errors.sum() / tokens.sum())
    # 1.96 x .29 / 10 on each side, more for documents of unequal length
    assert 0.02 < figure["high"] - figure["low"] < 0.2
    # the gain is the same in every document, so that its interval has no width
    assert gain["value"] == pytest.approx(0.1) and gain["high"] - gain["low"] < 1e-9
    unmeasured = interval(ratio(draws, table(errors, tokens), "KL"))
    assert unmeasured == {"value": None, "low": None, "high": None}


@pytest.fixture
def command(tmp_path):
    """Options of the experiment on a tiny language model and a small text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        initializer_range=0.2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    AutoTokenizer.from_pretrained(DEMO_LM).save_pretrained(tmp_path / "lm")
    sentence = "Value {} of the array, or {} where that is larger. "
    lines = [json.dumps({"text": sentence.format(i, i * i) * 4}) for i in range(150)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    paths = ["--output_dir", str(tmp_path / "out"), "--model_path", str(tmp_path / "lm")]
    paths += ["--data_path", str(tmp_path / "text.jsonl")]
    sizes = "--seeds 1 2 --tokens 3000 --eval_tokens 5000 --latent_size 32 --k 2 --max_length 64"
    return [*paths, *sizes.split(), "--batch_size", "8", "--dtype", "float32"]


def test_the_experiment_agrees_with_the_evaluator_and_is_not_repeated(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert routing.main(command) == 0, capsys.readouterr().err
    result = json.loads((out / "routing_results.json").read_text())
    written_at = {path.name: path.stat().st_mtime_ns for path in (out / "measured").iterdir()}
    assert result["sites"] == [1, 2, 3]
    for name in ("gains", "sites", "costs"):
        assert (out / f"routing_{name}.png").stat().st_size > 10_000
    for name in ("topk_2", "expected", "random"):
        check_against_evaluator(result, name, out)
    for name in ("published", "expected", "advantage", "ste", "untrained"):
        check_controls(result, name)
    assert 0 < result["runs"]["topk_2"]["KL / mean ablation"]["value"] < 1
    assert routing.main(command) == 0
    for path in (out / "measured").iterdir():
        assert path.stat().st_mtime_ns == written_at[path.name]


def check_against_evaluator(result, name, out):
    """NormMSE and KL of a run are those of evaluate.py."""
    path = f"{out}/SAE_models/{name}_seed1.pt"
    argv = ["--SAE_path", path, "--output_dir", str(out), "--dtype", "float32"]
    cfg = parse("evaluate", [*argv, "--metric", "NormMSE", "KLDiv"])
    evaluated = Evaluator(cfg).run()[f"{name}_seed1"]
    for metric, evaluator_name in (("NormMSE", "NormMSE"), ("KL", "KLDiv")):
        value = result["runs"][name][metric]["seeds"][0]
        assert value == pytest.approx(evaluated[evaluator_name], rel=1e-3), (name, metric)


def check_controls(result, name):
    """Controls have the shares of their router, and gains are relative to random assignment."""
    runs, random = result["runs"], f"{name}_shares"
    oracle_error = runs[f"{name}_oracle"]["NormMSE"]["value"]
    assert oracle_error <= runs[name]["NormMSE"]["value"]
    shares = np.array(result["per_site"][name]["shares"])
    random_shares = np.array(result["per_site"][random]["shares"])
    # they differ by the draws of some thousand tokens
    assert np.abs(shares - random_shares).max() < 0.06
    pairs = zip(runs[name]["KL"]["seeds"], runs[random]["KL"]["seeds"], strict=True)
    expected = [1 - router / control for router, control in pairs]
    gains = [seed["value"] for seed in result["gains"][name]["KL"]["seeds"]]
    assert gains == pytest.approx(expected)
    if name != "untrained":
        fixed_shares = np.array(result["per_site"][f"{name}_fixed"]["shares"])
        assert np.abs(shares - fixed_shares).max() < 0.03
