"""The routing experiment: its intervals, and the whole command on a tiny language model."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from experiments import routing
from experiments.routing_measure import QUANTITIES
from experiments.routing_report import bootstrap, ratio, said
from src.config import parse
from src.evaluator import Evaluator
from src.files import DEMO_LM


def table(errors, tokens):
    made = np.zeros((len(errors), len(QUANTITIES)))
    made[:, QUANTITIES.index("NormMSE")], made[:, QUANTITIES.index("tokens")] = errors, tokens
    return made


def test_intervals_come_from_documents_and_pairs_share_their_draws():
    tokens = np.array([10.0, 30.0, 20.0, 40.0] * 25)
    easy = np.random.default_rng(1).uniform(0.5, 1.5, 100)
    draws = bootstrap(100, 500)
    one, other = (
        ratio(draws, table(tokens * easy, tokens), "NormMSE"),
        ratio(draws, table(tokens * easy * 0.9, tokens), "NormMSE"),
    )
    found, gain = said(one), said(1 - other / one)
    assert found["value"] == pytest.approx((tokens * easy).sum() / tokens.sum())
    assert (
        0.02 < found["high"] - found["low"] < 0.2
    )  # 1.96 x .29 / 10 on each side, more for unequal lengths
    assert (
        gain["value"] == pytest.approx(0.1) and gain["high"] - gain["low"] < 1e-9
    )  # the same in every document: no doubt left
    assert said(ratio(draws, table(easy, tokens), "KL")) == {
        "value": None,
        "low": None,
        "high": None,
    }


def test_the_whole_experiment_runs_agrees_with_the_evaluator_and_is_not_done_twice(
    tmp_path, capsys
):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=4096, initializer_range=0.2, **sizes)
    ).save_pretrained(tmp_path / "lm")
    AutoTokenizer.from_pretrained(DEMO_LM).save_pretrained(tmp_path / "lm")
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_text(
        "\n".join(
            json.dumps({"text": f"Value {i} of the array, or {i * i} where that is larger. " * 4})
            for i in range(150)
        )
    )
    command = [
        "--seeds",
        "1",
        "2",
        "--tokens",
        "3000",
        "--eval_tokens",
        "5000",
        "--output_dir",
        str(out),
        "--model_path",
        str(tmp_path / "lm"),
    ]
    command += [
        "--data_path",
        str(text),
        "--latent_size",
        "32",
        "--k",
        "2",
        "--max_length",
        "64",
        "--batch_size",
        "8",
        "--dtype",
        "float32",
    ]
    assert routing.main(command) == 0, capsys.readouterr().err
    result = json.loads((out / "routing_results.json").read_text())
    measured = {path.name: path.stat().st_mtime_ns for path in (out / "measured").iterdir()}
    assert result["sites"] == [1, 2, 3] and all(
        (out / f"routing_{name}.png").stat().st_size > 10_000
        for name in ("gains", "sites", "costs")
    )
    for name in ("topk_2", "expected", "random"):
        path = f"{out}/SAE_models/{name}_seed1.pt"
        own = parse(
            "evaluate",
            [
                "--SAE_path",
                path,
                "--output_dir",
                str(out),
                "--dtype",
                "float32",
                "--metric",
                "NormMSE",
                "KLDiv",
            ],
        )
        wanted = Evaluator(own).run()[f"{name}_seed1"]
        for metric, other in (("NormMSE", "NormMSE"), ("KL", "KLDiv")):
            assert result["runs"][name][metric]["seeds"][0] == pytest.approx(
                wanted[other], rel=1e-3
            ), (name, metric)
    for name in ("published", "expected", "advantage", "ste", "untrained"):
        assert (
            result["runs"][f"{name}_oracle"]["NormMSE"]["value"]
            <= result["runs"][name]["NormMSE"]["value"]
        )
        mine, dealt = (
            np.array(result["per_site"][run]["shares"]) for run in (name, f"{name}_shares")
        )
        assert np.abs(mine - dealt).max() < 0.06  # equal but for the draw of some thousand tokens
        seeds = [
            1 - a / b
            for a, b in zip(
                *(result["runs"][run]["KL"]["seeds"] for run in (name, f"{name}_shares")),
                strict=True,
            )
        ]
        assert [seed["value"] for seed in result["gains"][name]["KL"]["seeds"]] == pytest.approx(
            seeds
        )
        if name != "untrained":
            shifted = np.array(result["per_site"][f"{name}_fixed"]["shares"])
            assert np.abs(mine - shifted).max() < 0.03
    assert 0 < result["runs"]["topk_2"]["KL / mean ablation"]["value"] < 1
    assert routing.main(command) == 0
    assert measured == {path.name: path.stat().st_mtime_ns for path in (out / "measured").iterdir()}
