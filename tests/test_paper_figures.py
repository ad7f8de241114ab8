"""The paper's figures: verdicts follow from values, steps are not repeated, thresholds are cut as apply cuts them, all files are made."""

import json

import pytest
import torch

from experiments import claims, cost
from experiments.figures import PAPER
from experiments.paper_figures import SCALES, Figures, above, count, main, parse
from src.config import parse as stage
from src.files import DEMO_LM, load_json
from src.zoo import ZOO

ABOUT = {
    "command": "bash scripts/paper_figures.sh --scale demo",
    "language_model": "lm",
    "data": "text",
    "hidden_size": 128,
    "n_layers": 16,
    "middle": 16,
    "sweep": [16],
    "seeds": [1, 2],
    "engine": "heuristic",
    "trained_tokens": [1000],
    "evaluated_tokens": [200],
    "applied_tokens": [300],
    "device": "cpu",
    "threads": 1,
    "git_commit": ["abc"],
}


def figures(**changed):
    """Two seeds of the compared models at L0 16; a changed value is {label: KL of every seed}."""
    kl = {
        "TopK": 0.3,
        "RouteSAE": 0.2,
        claims.RANDOM: 0.4,
        "Vanilla": 0.6,
        "Gated": 0.62,
        "Crosscoder": 0.9,
        "TopK at site 4": 0.1,
    }
    kl = {label: changed.get(label, [value, value]) for label, value in kl.items()}
    points = [
        {
            "title": label,
            "label": label,
            "seed": seed,
            "asked": 16,
            "L0": 16.0,
            "KLDiv": kl[label][i],
            "NormMSE": kl[label][i] / 2,
        }
        for label in kl
        for i, seed in enumerate(ABOUT["seeds"])
    ]
    counted = [
        {"label": label, "asked": 16, "L0": 16.0, "features": n, "score": 3.0}
        for label, n in (("TopK", 100), ("RouteSAE", 120))
    ]
    shares = {"RouteSAE": [0.4, 0.1, 0.1, 0.1, 0.3], claims.UNTRAINED: [0.2] * 5}
    inference = [
        {"label": label, "seed": seed, "share": share}
        for label, share in shares.items()
        for seed in ABOUT["seeds"]
    ]
    return {
        "fig4_kl": {"points": points},
        "fig6_features": {"points": counted, "lines": 4},
        "fig8_scores": {"points": counted},
        "fig9_routing": {"inference": inference},
    }


def judged(found, about=ABOUT):
    return {record["claim"]: record["verdict"] for record in claims.judge(found, about)}


def test_verdicts_follow_from_the_values_of_every_seed():
    lowest, control = (
        "RouteSAE has a lower KL than TopK (Fig. 4)",
        "control: RouteSAE has a lower KL than TopK at the first routed site",
    )
    assert judged(figures())[lowest] == "holds (2 of 2 seeds)" and judged(figures())[
        control
    ].startswith("does not hold")
    assert judged(figures(RouteSAE=[0.2, 0.5]))[lowest] == "depends on the seed (1 of 2 seeds)"
    assert judged(figures(RouteSAE=[0.35, 0.5]))[lowest] == "does not hold (0 of 2 seeds)"
    assert (
        judged(figures())["RouteSAE gives more features than TopK, +22.5 % (Fig. 6)"]
        == "holds (1 seed)"
    )
    u = "the router's shares form a U over the sites (Fig. 9)"
    assert judged(figures())[u] == "holds (2 of 2 seeds)"
    flat = figures()
    for run in flat["fig9_routing"]["inference"]:
        run["share"] = [
            0.4,
            0.1,
            0.1,
            0.1,
            0.3,
        ]  # an untrained router of the same shape: training made no U
    assert judged(flat)[u].startswith("does not hold")
    slope = figures()
    for run in slope["fig9_routing"]["inference"][:2]:
        run["share"] = [0.8, 0.05, 0.05, 0.05, 0.05]
    assert judged(slope)[u].startswith("does not hold")
    for run in slope["fig9_routing"]["inference"][:2]:
        run["share"] = [
            0.01,
            0.0,
            0.0,
            0.0,
            0.99,
        ]  # its small end is above the middle, but below an equal share
    assert judged(slope)[u].startswith("does not hold")


def test_what_this_run_cannot_show_is_not_judged():
    score = "RouteSAE's features score higher than TopK's, +22.3 % (Fig. 8)"
    absolute = "KL of TopK and RouteSAE is below 150 a sequence, .29 a token (Fig. 4)"
    assert judged(figures())[score] == judged(figures())[absolute] == claims.NOT_HERE
    asked = judged(figures(), ABOUT | {"engine": "a model", "hidden_size": 2048})
    assert asked[score].startswith("does not hold") and asked[absolute].startswith("does not hold")
    far = figures()
    for point in far["fig4_kl"]["points"]:
        point["L0"] = 40.0  # no frontier passes L0 16
    for point in far["fig6_features"]["points"]:
        point["L0"] = 0.1  # collapsed: the few features it has say nothing
    assert (
        judged(far)["RouteSAE gives more features than TopK, +22.5 % (Fig. 6)"] == claims.NOT_HERE
    )
    assert judged(far)["random routing has a higher KL than TopK (Fig. 4)"] == claims.NOT_HERE


def test_values_are_read_off_a_frontier_at_the_common_l0():
    found = figures()
    found["fig4_kl"]["points"] = [
        {
            "title": "Vanilla",
            "label": "Vanilla",
            "seed": 1,
            "asked": l0,
            "L0": l0,
            "KLDiv": kl,
            "NormMSE": kl,
        }
        for l0, kl in ((8, 0.8), (32, 0.4))
    ]
    assert claims.Found(found, ABOUT).at("Vanilla", "KLDiv") == pytest.approx(
        0.6
    )  # half way in log L0


def test_a_sequence_of_512_is_divided_into_tokens_and_captions_say_how_it_was_made():
    assert (
        claims.per_token("400 to 350") == ".78 to .68"
        and claims.per_token("< 150, the lowest") == "< .29, the lowest"
    )
    text = claims.table(figures(), claims.judge(figures(), ABOUT), ABOUT)
    assert (
        "| TopK | .15 | 0.1937 | 0.1500 | < 150 | < .29 | 0.725 | 0.300 | 154 | > 3000 | 100 |"
        in text
    )
    for said in (claims.caption(ABOUT, "Fig. 0"), text):
        assert all(
            part in said
            for part in (
                ABOUT["command"],
                "1,000 training tokens",
                "200 held-out",
                "seeds 1 2",
                "abc",
            )
        )


def test_a_step_is_repeated_only_with_other_settings(tmp_path):
    made = []

    def step(settings):
        figures = Figures(*parse(["--output_dir", str(tmp_path)]))
        return figures.step("a step", settings, lambda: made.append(settings) or {"n": len(made)})

    assert step({"tokens": 1}) == step({"tokens": 1}) == {"n": 1}
    assert step({"tokens": 2}) == {"n": 2} and len(made) == 2


def test_labels_come_from_an_endpoint_where_one_is_configured_else_from_rules(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert (
        parse([])[0].engine == "heuristic"
        and parse(["--api_base", "http://localhost:1/v1"])[0].engine == "gpt-4o-mini"
    )
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    args, extra = parse(["--engine", "m", "--latent_size", "64"])
    assert (args.engine, args.sample_latents, extra) == ("m", 100, ["--latent_size", "64"])


def test_operations_are_counted_once_a_site_and_the_papers_scale_is_refused_on_a_cpu(
    tmp_path, capsys, monkeypatch
):
    shape = {"hidden_size": 32, "n_layers": 8, "blocks": 1000, "head": 100}
    one, many = (cost.cost(name, {"latent_size": 64, "k": 4}, shape) for name in ("TopK", "MLSAE"))
    assert (
        many.code == 5 * one.code
        and one.patched == 2 * 1000 * (1 - 6 / 8) + 4 * 100
        and many.patched > 5 * one.patched
    )
    monkeypatch.setattr(cost, "rate", lambda device, dtype, size=None: 1e12)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Returns the array."}\n')
    given = [
        "--scale",
        "paper",
        "--device",
        "cpu",
        "--data_path",
        str(text),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(given) == 2
    said = capsys.readouterr()
    assert (
        "100,000,000 training" in said.out
        and "at least" in said.out
        and "GB" in said.out
        and "--force" in said.err
    )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def language_model(tmp_path):
    """A random Llama of eight blocks with the demo's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    tokenizer = AutoTokenizer.from_pretrained(DEMO_LM)
    tokenizer.save_pretrained(tmp_path / "lm")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    ).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.mark.slow
def test_one_command_makes_every_figure_and_a_second_one_repeats_nothing(
    tmp_path, language_model, capsys
):
    from src.applier import Applier

    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    lines = [
        {
            "text": f"Return the {i}th value of the array, or raise ValueError if {i * 7} is larger than its size. "
            * 3
        }
        for i in range(200)
    ]
    text.write_text("\n".join(map(json.dumps, lines)))
    given = [
        "--scale",
        "smoke",
        "--model_path",
        str(language_model),
        "--data_path",
        str(text),
        "--output_dir",
        str(out),
        "--device",
        "cpu",
    ]
    given += ["--latent_size", "64"]
    assert main(given) == 0
    first = capsys.readouterr().out
    folder = out / "figures"
    for name in (*PAPER, "fig10_steering"):
        data = load_json(folder / f"{name}.json")
        about = data["about"]
        assert about["command"].endswith(" ".join(given[-2:])) and about["seeds"] == [42, 43]
        assert about["trained_tokens"] and about["evaluated_tokens"]
        assert name == "fig10_steering" or (folder / f"{name}.png").stat().st_size > 10_000
    points = load_json(folder / "fig4_kl.json")["points"]
    assert {p["label"] for p in points} >= {*ZOO, "TopK at site 2", claims.RANDOM, claims.UNTRAINED}
    assert {p["asked"] for p in points if p["label"] == "MLSAE"} == set(SCALES["smoke"].sweep)
    routing = load_json(folder / "fig9_routing.json")
    assert [run["seed"] for run in routing["training"]] == [42, 43] and len(
        routing["inference"]
    ) == 4
    assert all(sum(run["share"]) == pytest.approx(1) for run in routing["inference"])
    assert (
        load_json(folder / "table.json")["claims"]
        and "| steered |" in (folder / "fig10_steering.md").read_text()
    )
    assert main(given) == 0
    assert "0 of" in capsys.readouterr().out.splitlines()[-1] and "already there" not in first

    low = load_json(
        out / "contexts" / "TopK_text_k8_fig-zoo-s42_contexts.json"
    )  # made at the lowest threshold
    cut = low["largest_activation"] / 2
    options = [
        "--SAE_path",
        str(out / "SAE_models" / "TopK_text_k8_fig-zoo-s42.pt"),
        "--max_tokens",
        str(SCALES["smoke"].apply),
    ]
    options += [
        "--context_length",
        "8",
        "--data_path",
        str(text),
        "--output_dir",
        str(tmp_path / "again"),
        "--device",
        "cpu",
    ]
    kept, path = Applier(stage("apply", [*options, "--act_threshold", str(cut)])).run()
    (
        direct,
        after,
    ) = (  # strengths, not texts: of equally strong contexts, common in this text, either may be the one kept
        {
            latent: sorted(
                one["activation"] for group in entry["contexts"].values() for one in group
            )
            for latent, entry in contexts.items()
        }
        for contexts in (
            load_json(path)["latent_context_map"],
            above(low, cut)["latent_context_map"],
        )
    )
    assert direct == after and count(low, cut) == kept == len(direct) > 0
