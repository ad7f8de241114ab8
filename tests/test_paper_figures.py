"""The paper's figures: verdicts from values, steps made once, thresholds cut as apply cuts them."""

import itertools
import json
import math

import pytest
import torch

from experiments import claims, cost
from experiments.figures import PAPER
from experiments.paper_figures import RECORDED, SCALES, Figures, above, count, main, parse
from src import plot_style
from src.config import parse as parse_stage
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
KL = {
    "TopK": 0.3,
    "RouteSAE": 0.2,
    claims.RANDOM: 0.4,
    "Vanilla": 0.6,
    "Gated": 0.62,
    "Crosscoder": 0.9,
    "TopK at site 4": 0.1,
}
U_SHAPE = [0.4, 0.1, 0.1, 0.1, 0.3]
LOWEST_KL = "RouteSAE has a lower KL than TopK (Fig. 4)"
SITE_CONTROL = "control: RouteSAE has a lower KL than TopK at the first routed site"
MORE_FEATURES = "RouteSAE gives more features than TopK, +22.5 % (Fig. 6)"
U_CLAIM = "the router's shares form a U over the sites (Fig. 9)"


def point(label, seed, kl, l0=16.0, asked=16):
    return {
        "title": label,
        "label": label,
        "seed": seed,
        "asked": asked,
        "L0": l0,
        "KLDiv": kl,
        "NormMSE": kl / 2,
    }


def figures(**changed):
    """The figures of two seeds at L0 16. changed: {label: KL of each seed}."""
    points = [
        point(label, seed, changed.get(label, [kl, kl])[i])
        for label, kl in KL.items()
        for i, seed in enumerate(ABOUT["seeds"])
    ]
    counted = [
        {"label": label, "asked": 16, "L0": 16.0, "features": n, "score": 3.0}
        for label, n in (("TopK", 100), ("RouteSAE", 120))
    ]
    inference = [
        {"label": label, "seed": seed, "share": share}
        for label, share in (("RouteSAE", U_SHAPE), (claims.UNTRAINED, [0.2] * 5))
        for seed in ABOUT["seeds"]
    ]
    return {
        "fig4_kl": {"points": points},
        "fig6_features": {"points": counted, "lines": 4},
        "fig8_scores": {"points": counted},
        "fig9_routing": {"inference": inference},
    }


def verdicts(data, about=ABOUT):
    return {record["claim"]: record["verdict"] for record in claims.judge(data, about)}


def fails(verdict):
    return verdict.startswith("does not hold")


def test_verdicts_follow_from_the_values_of_every_seed():
    assert verdicts(figures())[LOWEST_KL] == "holds (2 of 2 seeds)"
    assert fails(verdicts(figures())[SITE_CONTROL])
    some = verdicts(figures(RouteSAE=[0.2, 0.5]))
    assert some[LOWEST_KL] == "depends on the seed (1 of 2 seeds)"
    none = verdicts(figures(RouteSAE=[0.35, 0.5]))
    assert none[LOWEST_KL] == "does not hold (0 of 2 seeds)"
    assert verdicts(figures())[MORE_FEATURES] == "holds (1 seed)"


def with_shares(shares, n_runs):
    """Figures in which the first runs, those of RouteSAE, have other shares."""
    data = figures()
    for run in data["fig9_routing"]["inference"][:n_runs]:
        run["share"] = shares
    return data


def test_shares_form_a_u_only_by_training_and_with_two_high_ends():
    assert verdicts(figures())[U_CLAIM] == "holds (2 of 2 seeds)"
    # The untrained router has the same shape, so training made no U.
    assert fails(verdicts(with_shares(U_SHAPE, 4))[U_CLAIM])
    slope = [0.8, 0.05, 0.05, 0.05, 0.05]
    assert fails(verdicts(with_shares(slope, 2))[U_CLAIM])
    # The small end is above the middle, but below an equal share.
    small_end = [0.01, 0.0, 0.0, 0.0, 0.99]
    assert fails(verdicts(with_shares(small_end, 2))[U_CLAIM])


def test_what_this_run_cannot_show_is_not_judged():
    score = "RouteSAE's features score higher than TopK's, +22.3 % (Fig. 8)"
    absolute = "KL of TopK and RouteSAE is below 150 a sequence, .29 a token (Fig. 4)"
    by_rule = verdicts(figures())
    assert by_rule[score] == by_rule[absolute] == claims.NOT_HERE
    by_model = verdicts(figures(), ABOUT | {"engine": "a model", "hidden_size": 2048})
    assert fails(by_model[score])
    assert fails(by_model[absolute])


def test_values_far_from_the_common_l0_are_not_judged():
    data = figures()
    for result in data["fig4_kl"]["points"]:
        result["L0"] = 40.0  # no frontier passes L0 16
    for result in data["fig6_features"]["points"]:
        result["L0"] = 0.1  # collapsed: the few features that are left say nothing
    judged = verdicts(data)
    assert judged[MORE_FEATURES] == claims.NOT_HERE
    assert judged["random routing has a higher KL than TopK (Fig. 4)"] == claims.NOT_HERE


def test_values_are_read_off_a_frontier_at_the_common_l0():
    data = figures()
    data["fig4_kl"]["points"] = [
        point("Vanilla", 1, kl, l0=l0, asked=l0) for l0, kl in ((8, 0.8), (32, 0.4))
    ]
    # L0 16 is half way in log L0.
    assert claims.Measured(data, ABOUT).value("Vanilla", "KLDiv") == pytest.approx(0.6)


def test_a_sequence_of_512_is_divided_into_tokens_and_captions_say_how_it_was_made():
    assert claims.per_token("400 to 350") == ".78 to .68"
    assert claims.per_token("< 150, the lowest") == "< .29, the lowest"
    text = claims.table(figures(), claims.judge(figures(), ABOUT), ABOUT)
    row = "| TopK | .15 | 0.1937 | 0.1500 | < 150 | < .29 | 0.725 | 0.300 | 154 | > 3000 | 100 |"
    assert row in text
    for caption in (claims.caption(ABOUT, "Fig. 0"), text):
        assert ABOUT["command"] in caption
        for part in ("1,000 training tokens", "200 held-out", "seeds 1 2", "abc"):
            assert part in caption


def test_a_step_is_repeated_only_with_other_settings(tmp_path):
    made = []

    def step(settings):
        steps = Figures(*parse(["--output_dir", str(tmp_path)]))
        return steps.step("a step", settings, lambda: made.append(settings) or {"n": len(made)})

    assert step({"tokens": 1}) == step({"tokens": 1}) == {"n": 1}
    assert step({"tokens": 2}) == {"n": 2}
    assert len(made) == 2


def test_labels_come_from_an_endpoint_where_one_is_configured_else_from_rules(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert parse([])[0].engine == "heuristic"
    assert parse(["--api_base", "http://localhost:1/v1"])[0].engine == "gpt-4o-mini"
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    args, extra = parse(["--engine", "m", "--latent_size", "64"])
    assert (args.engine, args.sample_latents, extra) == ("m", 100, ["--latent_size", "64"])


@pytest.mark.parametrize("name", [name for name in PAPER if "fig9" not in name])
def test_a_figure_with_little_in_it_is_drawn(tmp_path, name):
    """A point far from the L0 asked for, one seed, too few labels for a mean score."""
    counts = {"features": 0, "labelled": 0.0, "scored": 1, "score": 3.0}
    scores = {"15": {"score": 3.0, "scored": 1}}
    data = {
        "title": "A figure",
        "scored_by": "by rule",
        "lines": 4,
        "threshold": 15,
        "points": [point("TopK", 1, 0.3) | counts, point("TopK", 1, 0.2, l0=900.0) | counts],
        "thresholds": [5, 6],
        "curves": {"TopK": {"L0": 16.0, "features": [0, 0], "scores": scores}},
    }
    PAPER[name](data, "A caption", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PAPER)
def test_no_text_beside_the_axes_of_a_recorded_figure_covers_another(tmp_path, monkeypatch, name):
    drawn = []
    monkeypatch.setattr(plot_style, "save", lambda figure, path: drawn.append(figure))
    PAPER[name](load_json(RECORDED / f"{name}.json"), "A caption", tmp_path / "figure.png")
    figure = drawn[0]
    figure.canvas.draw()
    texts = [*figure.texts]
    for axis in figure.axes:
        texts += [text for text in axis.get_children() if hasattr(text, "get_text")]
        texts += [axis.xaxis.label, axis.yaxis.label]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    plot_style.pyplot().close(figure)
    assert len(boxes) >= 4
    for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (text, other)


def test_operations_are_counted_once_a_site():
    shape = {"hidden_size": 32, "n_layers": 8, "blocks": 1000, "head": 100}
    single, multi = (
        cost.cost(name, {"latent_size": 64, "k": 4}, shape) for name in ("TopK", "MLSAE")
    )
    assert multi.code == 5 * single.code
    assert single.patched == 2 * 1000 * (1 - 6 / 8) + 4 * 100
    assert multi.patched > 5 * single.patched


def test_the_papers_scale_is_refused_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "rate", lambda device, dtype, size=None: 1e12)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Returns the array."}\n')
    out = tmp_path / "out"
    argv = ["--scale", "paper", "--device", "cpu"]
    assert main([*argv, "--data_path", str(text), "--output_dir", str(out)]) == 2
    output = capsys.readouterr()
    assert all(part in output.out for part in ("100,000,000 training", "at least", "GB"))
    assert "--force" in output.err
    assert not out.exists()


# -------------------------------------------------------------------------- all stages, one command


@pytest.fixture
def language_model(tmp_path):
    """A random Llama of eight blocks with the demo's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path / "lm"
    tokenizer = AutoTokenizer.from_pretrained(DEMO_LM)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    sentence = "Return the {}th value of the array, or raise ValueError if {} is larger than its "
    sentences = [sentence.format(i, 7 * i) + "size. " for i in range(200)]
    path.write_text("\n".join(json.dumps({"text": 3 * sentence}) for sentence in sentences))
    return path


def check_figures(folder, command_end):
    for name in (*PAPER, "fig10_steering"):
        about = load_json(folder / f"{name}.json")["about"]
        assert about["command"].endswith(command_end)
        assert about["seeds"] == [42, 43]
        assert about["trained_tokens"] and about["evaluated_tokens"]
    for name in PAPER:
        assert (folder / f"{name}.png").stat().st_size > 10_000
    points = load_json(folder / "fig4_kl.json")["points"]
    labels = {point["label"] for point in points}
    models = set(ZOO) - {"Matryoshka"}  # younger than the paper
    assert labels >= {*models, "TopK at site 2", claims.RANDOM, claims.UNTRAINED}
    asked = {point["asked"] for point in points if point["label"] == "MLSAE"}
    assert asked == set(SCALES["smoke"].sweep)
    routing = load_json(folder / "fig9_routing.json")
    assert [run["seed"] for run in routing["training"]] == [42, 43]
    assert len(routing["inference"]) == 4
    assert all(math.isclose(sum(run["share"]), 1, rel_tol=1e-6) for run in routing["inference"])
    assert load_json(folder / "table.json")["claims"]
    assert "| steered |" in (folder / "fig10_steering.md").read_text()


@pytest.mark.slow
def test_one_command_makes_every_figure_and_a_second_one_repeats_nothing(
    tmp_path, language_model, text, capsys
):
    out = tmp_path / "out"
    argv = ["--scale", "smoke", "--model_path", str(language_model), "--data_path", str(text)]
    argv += ["--output_dir", str(out), "--device", "cpu", "--latent_size", "64"]
    assert main(argv) == 0
    first_output = capsys.readouterr().out
    check_figures(out / "figures", "--latent_size 64")
    assert main(argv) == 0
    assert "0 of" in capsys.readouterr().out.splitlines()[-1]
    assert "already there" not in first_output
    check_threshold_cut(out, text, tmp_path / "again")


def check_threshold_cut(out, text, again):
    """Contexts cut at a threshold are those that apply makes at that threshold."""
    from src.applier import Applier

    name = "TopK_text_k8_fig-zoo-s42"
    contexts = load_json(out / "contexts" / f"{name}_contexts.json")
    threshold = contexts["largest_activation"] / 2
    argv = ["--SAE_path", str(out / "SAE_models" / f"{name}.pt"), "--data_path", str(text)]
    argv += ["--max_tokens", str(SCALES["smoke"].apply), "--context_length", "8"]
    argv += ["--output_dir", str(again), "--device", "cpu", "--act_threshold", str(threshold)]
    kept, path = Applier(parse_stage("apply", argv)).run()
    direct = strengths(load_json(path))
    assert direct == strengths(above(contexts, threshold))
    assert count(contexts, threshold) == kept == len(direct) > 0


def strengths(contexts):
    """{latent: activations}. Of equally strong contexts, common here, either may be kept."""
    return {
        latent: sorted(entry["activations"])
        for latent, entry in contexts["latent_context_map"].items()
    }
