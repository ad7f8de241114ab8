"""Contexts and steering through their entry points, on the demo LM and a small text."""

import json

import pytest
import torch

from src import applier as applier_module
from src import checkpoint, demo, export_formats, hooks, lm, utils
from src.applier import Applier
from src.config import parse, run_stage
from src.data import open_rows
from src.events import ContextCollector, PoolWindow, Together
from src.files import DEMO_LM, load_json
from src.model import build
from src.reader import Reader
from src.sae import BatchInfo
from src.sparse import active
from src.steerer import Steerer, conversations
from src.trainer import Trainer
from src.zoo import ZOO


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with every model of the zoo, barely trained, and the text."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [
        {"text": f"The {i}th value: caf\u00e9. Returns {i % 7} if it is larger than its size! " * 3}
        for i in range(120)
    ]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(folder / "data"))
        argv = ["--model", *ZOO, "--model_path", str(DEMO_LM), "--output_dir", str(folder)]
        argv += ["--data_path", str(folder / "text.jsonl"), "--dtype", "float32"]
        sizes = "--latent_size 64 --k 4 --max_length 32 --batch_size 4 --max_samples 60".split()
        Trainer(parse("train", [*argv, *sizes])).run()
    return folder


def sae_argv(trained, tmp_path, name):
    path = trained / "SAE_models" / f"{name}_text.pt"
    return ["--SAE_path", str(path), "--output_dir", str(tmp_path), "--dtype", "float32"]


def applied(trained, tmp_path, name, *more):
    """(applier, number of latents with contexts, contexts file)"""
    argv = sae_argv(trained, tmp_path, name)
    argv += "--lines 1 --context_length 5 --split train".split()
    if "--quantile" not in more:
        argv += ["--act_threshold", "0.01"]
    applier = Applier(parse("apply", [*argv, *more]))
    total, path = applier.run()
    return applier, total, load_json(path)


@pytest.mark.parametrize("name", list(ZOO))
def test_every_models_contexts_are_those_of_a_plain_loop(trained, tmp_path, name):
    applier, total, found = applied(trained, tmp_path, name, "--max_samples", "30")
    assert total == found["total_latents"] == len(found["latent_context_map"])
    rows, sae = open_rows(applier.cfg, applier.tokenizer), applier.sae
    largest: dict[int, float] = {}
    for batch in rows.batches(7):
        hidden = hooks.read(applier.language_model, batch, sae.sites())
        p = sae.autoencode(sae.gather(hidden), BatchInfo(token_keys=batch.token_keys()))
        for _, latent, value in zip(
            *(column.tolist() for column in active(sae.strength(p))), strict=True
        ):
            largest[int(latent)] = max(largest.get(int(latent), 0.0), float(value))
    expected = {str(latent) for latent, value in largest.items() if value > 0.01}
    assert set(found["latent_context_map"]) == expected
    for latent, entry in found["latent_context_map"].items():
        assert entry["activations"] == sorted(entry["activations"], reverse=True)
        assert entry["activations"][0] == pytest.approx(largest[int(latent)], abs=2e-3)
        for tokens, at, value, kinds, near in zip(
            entry["tokens"],
            entry["position"],
            entry["activations"],
            entry["token_class"],
            entry["token_activations"],
            strict=True,
        ):
            assert tokens[at].strip().lower() in (kinds, "") or "<" in kinds
            assert dict(near)[at] == pytest.approx(value, rel=0.01, abs=2e-3)
            assert not any("<|" in t for t in tokens)
        # No text is shown twice with the same token marked.
        marked = set(zip(map(tuple, entry["tokens"]), entry["position"], strict=True))
        assert len(marked) == len(entry["tokens"])
        assert max(map(entry["token_class"].count, entry["token_class"])) <= 2
        if entry["layer"][0] is not None:
            assert set(entry["layer"]) <= set(sae.sites())
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("name", ["RouteSAE", "MLSAE", "Crosscoder"])
def test_what_is_counted_beside_the_contexts_is_that_of_a_plain_loop(trained, tmp_path, name):
    more = ["--max_samples", "30", "--max_length", "16"]
    applier, _, found = applied(trained, tmp_path, name, *more)
    sae, table = applier.sae, found["latent_context_map"]
    on_tokens = {latent: set() for latent in range(64)}
    sums = torch.zeros(64, len(sae.sites()))
    counts = torch.zeros_like(sums)
    first_token = {}
    n_tokens = 0
    for batch in open_rows(applier.cfg, applier.tokenizer).batches(7):
        hidden = hooks.read(applier.language_model, batch, sae.sites())
        out = sae.autoencode(sae.gather(hidden), BatchInfo(token_keys=batch.token_keys()))
        per_token = len(sae.code_sites(out)) // int(batch.mask.sum())
        sites = sae.code_sites(out).clamp_min(0)
        columns = [column.tolist() for column in active(sae.strength(out))]
        for code, latent, value in zip(*columns, strict=True):
            on_tokens[latent].add(n_tokens + code // per_token)
            sums[latent, sites[code]] += value
            counts[latent, sites[code]] += 1
            if n_tokens + code // per_token == 0:
                first_token[latent] = max(value, first_token.get(latent, value))
        n_tokens += int(batch.mask.sum())
    assert found["tokens_of_partners"] == n_tokens
    assert found["firings"] == counts.sum(1).int().tolist()
    named = 0
    for latent, entry in table.items():
        own = on_tokens[int(latent)]
        expected = sums[int(latent)] / counts[int(latent)].clamp_min(1)
        assert entry["site_strengths"] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)
        for other, share in entry["partners"]:
            assert str(other) in table and other != int(latent)
            assert share == pytest.approx(len(own & on_tokens[other]) / len(own), abs=1e-3)
            named += 1
    assert named
    best = sorted(first_token.items(), key=lambda pair: -pair[1])[:5]
    assert [latent for latent, _ in found["sample"]["strongest"][0]] == [pair[0] for pair in best]


def test_the_nearest_latents_are_those_of_the_largest_cosine_and_the_read_outs_differ(
    trained, tmp_path
):
    applier, _, found = applied(trained, tmp_path, "RouteSAE", "--max_samples", "30")
    table = found["latent_context_map"]
    directions = torch.nn.functional.normalize(applier.sae.sae.decoder.weight.detach().T, dim=1)
    latents = [int(latent) for latent in table]
    for latent, entry in table.items():
        cosines = directions[latents] @ directions[int(latent)]
        cosines[latents.index(int(latent))] = -2
        values, index = cosines.topk(8)
        assert [other for other, _ in entry["nearest"]] == [latents[i] for i in index.tolist()]
        assert [c for _, c in entry["nearest"]] == pytest.approx(values.tolist(), abs=1e-3)
        assert sum(entry["logit_histogram"]["counts"]) == len(applier.text.text)
        assert not any("\ufffd" in token for token, _ in entry["promoted"] + entry["suppressed"])
    # What all directions add is subtracted: no token is named for most of them.
    names = [token for entry in table.values() for token, _ in entry["promoted"]]
    assert max(map(names.count, names)) < len(table) / 2


def test_partners_are_counted_on_the_tokens_that_fit(monkeypatch):
    monkeypatch.setattr("src.events.PAIRS", 3 * 4)
    together = Together(5)
    token, latent = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([0, 1, 0, 1, 0, 1, 2, 3])
    together.update(token, latent, 4)
    together.update(token, latent, 4)  # there is no room for it
    assert together.n_tokens == 3
    assert together.partners([0, 1, 2]) == {0: [(1, 1.0)], 1: [(0, 1.0)], 2: []}
    other = Together(5)
    other.merge(together)
    other.merge(together)
    assert other.n_tokens == 6 and other.partners([1, 4]) == {1: [], 4: []}


def test_batching_changes_no_context(trained, tmp_path):
    def contexts(batch_size):
        more = ["--batch_size", batch_size, "--max_samples", "20"]
        _, _, result = applied(trained, tmp_path / batch_size, "RouteSAE", *more)
        return result["latent_context_map"]

    first, second = contexts("2"), contexts("9")
    for latent in first.keys() | second.keys():
        for entry, other in zip(first[latent]["sample"], second[latent]["sample"], strict=True):
            assert (entry["tokens"], entry["quarter"]) == (other["tokens"], other["quarter"])
        for key in ("position", "document", "density", "site_counts", "negatives"):
            assert first[latent][key] == second[latent][key]


def test_beside_the_strongest_contexts_each_quarter_of_the_activations_is_shown(trained, tmp_path):
    _, _, found = applied(trained, tmp_path, "TopK", "--max_samples", "60", "--top_n", "2")
    quarters = set()
    for entry in found["latent_context_map"].values():
        values = entry["sample_activations"]
        shown = set(zip(map(tuple, entry["tokens"]), entry["position"], strict=True))
        assert values == sorted(values, reverse=True) and len(values) <= 64
        for context in entry["sample"]:
            quarter = context["quarter"]
            part = [v for i, v in enumerate(values) if i * 4 // len(values) + 1 == quarter]
            assert min(part) - 1e-4 <= context["activation"] <= max(part) + 1e-4
            marked = (tuple(context["tokens"]), context["position"])
            assert marked not in shown
            shown.add(marked)
        of_entry = [context["quarter"] for context in entry["sample"]]
        assert max(of_entry.count(quarter) for quarter in (1, 2, 3, 4)) <= 3
        quarters |= set(of_entry)
    assert quarters == {1, 2, 3, 4}


def test_a_threshold_above_all_activations_is_reported_with_the_largest_one(
    trained, tmp_path, capsys
):
    _, total, result = applied(trained, tmp_path, "TopK", "--act_threshold", "1e6")
    assert total == 0
    assert result["latent_context_map"] == {}
    assert result["largest_activation"] > 0
    assert "--act_threshold" in capsys.readouterr().out


def test_a_context_is_held_once_and_large_files_are_compressed(
    trained, tmp_path, monkeypatch, capsys
):
    few = ["--max_samples", "20"]
    applier, _, plain = applied(trained, tmp_path, "TopK", *few)
    path = tmp_path / "contexts" / "TopK_text_contexts.json"
    assert path.exists()
    for entry in plain["latent_context_map"].values():
        assert "contexts" not in entry
        assert not any("context" in context for context in entry["sample"])
    monkeypatch.setattr(applier_module, "GZIP_BYTES", 1000)
    _, _, packed = applied(trained, tmp_path, "TopK", *few)
    # The earlier form is replaced, and none does not replace some.
    assert packed["latent_context_map"] == plain["latent_context_map"]
    assert [file.name for file in path.parent.iterdir()] == [f"{path.name}.gz"]
    argv = [*sae_argv(trained, tmp_path, "TopK"), "--act_threshold", "1e6", *few]
    assert Applier(parse("apply", argv)).run() == (0, path.with_name(f"{path.name}.gz"))
    assert "left unchanged" in capsys.readouterr().out
    _, _, unpacked = applied(trained, tmp_path, "TopK", *few, "--gzip", "no")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_contexts_of_less_or_of_another_text_do_not_replace_those_that_are_there(
    trained, tmp_path, capsys
):
    def apply(*more):
        argv = [*sae_argv(trained, tmp_path, "TopK"), "--lines", "1", *more]
        return Applier(parse("apply", argv)).run()[1]

    first = apply("--max_samples", "20")
    kept = first.read_bytes()
    second = apply("--max_samples", "4")
    assert second.name == "TopK_text_2_contexts.json" and str(second) in capsys.readouterr().out
    assert apply("--max_samples", "4") == second
    third = apply("--max_samples", "20", "--split", "train", "--gzip", "yes")
    assert third.name == "TopK_text_3_contexts.json.gz"
    assert apply("--max_samples", "30", "--split", "train") == third.with_suffix("")
    assert not third.exists() and first.read_bytes() == kept
    assert apply("--max_samples", "30") == first
    assert first.read_bytes() != kept
    assert apply("--max_samples", "4", "--act_threshold", "1e6") == first
    first.write_text("damaged")
    assert apply("--max_samples", "4") == first


def test_contexts_of_the_same_text_that_hold_less_do_not_replace_those_that_are_there(
    trained, tmp_path
):
    def apply(*more):
        argv = [*sae_argv(trained, tmp_path, "TopK"), "--lines", "1", "--max_samples", "10", *more]
        return Applier(parse("apply", argv)).run()[1]

    first = apply("--effect", "1", "--top_n", "3")
    content = first.read_bytes()
    for less in (
        ["--effect", "1", "--top_n", "3", "--act_threshold", "2"],
        ["--effect", "1", "--top_n", "2"],
        ["--effect", "1", "--top_n", "3", "--context_length", "8"],
        ["--effect", "1", "--top_n", "3", "--infer_k", "1"],
        ["--top_n", "3"],
    ):
        assert apply(*less) != first
    assert first.read_bytes() == content
    assert apply("--effect", "2", "--top_n", "4") == first


def test_by_default_every_latent_that_fires_often_enough_has_contexts(trained, tmp_path):
    argv = [*sae_argv(trained, tmp_path, "TopK"), "--max_samples", "30", "--split", "train"]
    for more, threshold in (([], 0), (["--threshold_rel", "0.25"], 0.25 * 128**0.5)):
        _, path = Applier(parse("apply", [*argv, *more])).run()
        result = load_json(path)
        assert result["threshold"] == pytest.approx(threshold)
        smallest = [min(e["activations"]) for e in result["latent_context_map"].values()]
        assert min(smallest) >= threshold


def test_effects_are_measured_and_negatives_are_windows_without_the_latent(trained, tmp_path):
    more = "--effect 3 --quantile 0.9 --gzip --max_samples 30".split()
    _, _, result = applied(trained, tmp_path, "TopK", *more)
    assert result["quantile"] == 0.9
    entries = result["latent_context_map"].values()
    effects = [entry["effect_KL"] for entry in entries if "effect_KL" in entry]
    assert len(effects) == 3 and any(effect > 0 for effect in effects)
    for entry in entries:
        assert len(entry["promoted"]) == 8
        silent = {tuple(result["negatives"][i]["tokens"]) for i in entry["negatives"]}
        assert not silent & {tuple(tokens) for tokens in entry["tokens"]}


def test_no_negative_shows_a_text_of_the_contexts():
    collector = object.__new__(ContextCollector)
    collector.seed = 0
    off, on = torch.tensor([False]), torch.tensor([True])
    windows = [([1], off), ([2], off), ([3], on), ([], off)]
    collector.pool = [PoolWindow(*window) for window in windows]
    assert collector.negatives(0, [("a",), ("b",), ("c",), ()], {("a",)}) == [1]


def steered(trained, tmp_path, name, *more):
    """(steerer, its results)"""
    argv = sae_argv(trained, tmp_path, name)
    argv += ["--prompt", "Returns the value", "--max_new_tokens", "6"]
    steerer = Steerer(parse("steer", [*argv, *more]))
    return steerer, steerer.run()


@pytest.mark.parametrize("name", list(ZOO))
def test_an_edit_without_effect_changes_no_bit_and_another_edit_changes_the_output(
    trained, tmp_path, name
):
    _, result = steered(trained, tmp_path, name, "--multiply", "3=1", "--add", "5=0")
    output = result["outputs"]["0"][0]
    assert output["KL"] == 0.0 and output["original_output"] == output["clamped_output"]
    _, result = steered(trained, tmp_path, name, "--set", "3=40")
    assert result["outputs"]["0"][0]["KL"] > 1e-3


@pytest.mark.parametrize("name", list(ZOO))
def test_under_the_cache_every_new_token_is_edited_as_in_a_full_pass(
    trained, tmp_path, name, monkeypatch
):
    steerer, _ = steered(trained, tmp_path, name, "--set", "3=9")
    next_logits = lm.next_logits
    cached = []

    def recorded_logits(*args):
        logits, cache = next_logits(*args)
        cached.append(logits[0])
        return logits, cache

    monkeypatch.setattr(lm, "next_logits", recorded_logits)
    alike = []
    for prompt in (
        "Returns the value",
        "Returns the first",
        "The 3th value: Returns 4",
        "if the size is larger",
    ):
        ids = steerer.ids({"prompt": prompt})
        site = steerer._site(ids)
        cached.clear()
        new = steerer._continue(ids, steerer.edit, site)
        full = steerer._logits_of_new(ids, new, steerer.edit, site)
        alike.append(torch.allclose(torch.stack(cached), full, atol=2e-3))
    # A router sees an edited past under the cache, and a clean one in a full pass. It may then
    # send a token to another site.
    assert all(alike) or (hasattr(steerer.sae, "router") and any(alike)), alike


def test_the_edited_site_is_where_counted_tokens_activate_the_latent_most(trained, tmp_path):
    steerer, _ = steered(trained, tmp_path, "MLSAE", "--set", "3=9")
    sae = steerer.sae
    ids = steerer.ids({"prompt": "Returns the value"})
    states = lm.read_sites(steerer.model, ids, sae.sites())
    x = sae.gather({site: hidden[0] for site, hidden in states.items()})
    latents = sae.autoencode(x).latents
    best_of_all = latents.sum(0).argmax(0)
    best_of_counted = latents[1:].sum(0).argmax(0)  # without the begin-of-text token
    differing = (best_of_all != best_of_counted).nonzero()[:, 0].tolist()
    assert differing
    for latent in differing:
        steerer.operations = [("set", latent, 9.0)]
        assert steerer._site(ids) == sae.sites()[best_of_counted[latent]]


@pytest.mark.parametrize("name", list(ZOO))
def test_a_prompt_without_a_counted_token_can_be_continued(trained, tmp_path, name):
    steerer, _ = steered(trained, tmp_path, name, "--set", "3=9")
    steerer.prompts = [{"prompt": ""}]
    (text,) = steerer.run()["outputs"]["0"]
    assert text["Human"] == "" and text["clamped_output"]


def test_raising_a_latent_raises_the_tokens_its_direction_promotes(trained, tmp_path):
    applier, _, found = applied(trained, tmp_path, "TopK")
    latent, entry = next(iter(found["latent_context_map"].items()))
    token = next(i for i, text in enumerate(applier.text.text) if text == entry["promoted"][0][0])
    up, _ = steered(trained, tmp_path, "TopK", "--set", f"{latent}=60")
    down, _ = steered(trained, tmp_path, "TopK", "--set", f"{latent}=-60")
    ids = up.ids({"prompt": "Returns the value"})
    chances = [
        steerer._logits(ids, steerer.edit, None)[0, -1].softmax(-1)[token] for steerer in (down, up)
    ]
    plain = up._logits(ids, None, None)[0, -1].softmax(-1)[token]
    assert chances[0] < plain < chances[1]


def test_switching_latents_off_lowers_the_tokens_their_directions_promote(trained, tmp_path):
    applier, _, found = applied(trained, tmp_path, "TopK")
    steerer, _ = steered(trained, tmp_path, "TopK", "--zero", "0")
    ids = steerer.ids(
        {"prompt": "The 3th value: Returns 4 if it is larger than its size! The 5th value"}
    )
    state = lm.read_sites(steerer.model, ids, steerer.sae.sites())
    latents = steerer.sae.autoencode(
        steerer.sae.gather({site: hidden[0].float() for site, hidden in state.items()})
    ).latents
    plain, changes = steerer._logits(ids, None, None)[0].log_softmax(-1), []
    for latent, entry in found["latent_context_map"].items():
        at = (latents[1:, int(latent)] > 0).nonzero()[:, 0] + 1
        if len(at):
            steerer.operations = [("set", int(latent), 0.0)]
            token = next(
                i for i, text in enumerate(applier.text.text) if text == entry["promoted"][0][0]
            )
            changes += (steerer._logits(ids, steerer.edit, None)[0].log_softmax(-1) - plain)[
                at, token
            ].tolist()
    assert len(changes) > 20 and sum(changes) / len(changes) < 0


def test_bad_steering_is_one_clear_line(trained, tmp_path, capsys):
    path = str(trained / "SAE_models" / "TopK_text.pt")
    for more, message in (
        (["--set", "99999=1", "--prompt", "x"], "has latents 0"),
        (["--set", "3", "--prompt", "x"], "LATENT=VALUE"),
        (["--set", "3=1"], "--prompt"),
        (["--prompts", str(tmp_path / "no.txt")], "check --prompts"),
    ):
        try:
            code = run_stage("steer", lambda cfg: Steerer(cfg).run(), ["--SAE_path", path, *more])
        except SystemExit as stop:
            code = stop.code
        assert code == 2 and message in capsys.readouterr().err


def test_prompts_of_all_documented_forms(tmp_path):
    hh = {
        "chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.",
        "rejected": "\n\nHuman: Hi?\n\nAssistant: No.",
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(hh) + "\n" + json.dumps({"prompt": "x"}))
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    without_question = {"chosen": "Yes.", "rejected": "No."}
    (tmp_path / "b.jsonl").write_text(json.dumps(without_question))
    with pytest.raises(ValueError, match="holds no prompt"):
        conversations(tmp_path / "b.jsonl")
    conversation, prompt = conversations(tmp_path / "a.jsonl")
    assert conversation["messages"] == [{"role": "user", "content": "Hi?"}]
    assert conversation["chosen"] == "Yes."
    assert conversation["rejected"] == "No."
    assert prompt["prompt"] == "x"
    assert [p["prompt"] for p in conversations(tmp_path / "a.txt")] == ["one", "two"]


TURNS = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yes."},
]
SHARED = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]
PARTS = [{"type": "text", "text": "Hi?"}, {"type": "image", "url": "x.png"}]
HH = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}


@pytest.mark.parametrize(
    "content",
    [
        {"messages": TURNS[:1]},
        {"messages": TURNS},
        {"conversations": SHARED},
        {"messages": [{"role": "user", "content": PARTS}]},
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]},
        {"chosen": TURNS, "rejected": TURNS},
        HH,
        TURNS,
        [{"conversations": SHARED}],
        {"first": {"messages": TURNS}},
    ],
)
def test_one_conversation_of_any_form_is_one_prompt(tmp_path, content, capsys):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(content))
    (prompt,) = conversations(path)
    assert prompt["messages"] == TURNS[:1]
    if "Yes." in str(content):
        assert prompt["chosen"] == "Yes."
    if "image" in str(content):
        assert "left out 1 parts of conversations" in capsys.readouterr().out


def test_a_preference_of_plain_texts_is_a_prompt_with_both_answers(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}))
    assert conversations(path) == [{"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}]


@pytest.mark.parametrize(
    "content",
    [
        [{"prompt": 5}, {"prompt": ["a"]}],
        {"question": "Hi?", "answer": "Yes."},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": "Hi?"} | {"messages": 5},
        {"conversations": [{"value": "Hi?"}]},
        {"chosen": TURNS[1:]},
        [None, 3, []],
        7,
    ],
)
def test_records_that_are_no_prompt_are_one_clear_line(tmp_path, content):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="odd.json holds no prompt; expected lines of text"):
        conversations(path)


def test_records_left_out_are_counted_and_the_first_is_named(tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": 5}\n{"text": "y"}\n')
    assert [prompt["prompt"] for prompt in conversations(path)] == ["x"]
    message = capsys.readouterr().out
    assert "left out 2" in message and "record 2" in message


def test_prompts_of_a_file_with_separators_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "u.jsonl"
    path.write_text('\ufeff{"prompt": "first\u2028second"}\n{"prompt": "third"}\n', "utf-8")
    assert [prompt["prompt"] for prompt in conversations(path)] == ["first\u2028second", "third"]


def test_a_second_steering_is_added_to_the_file_of_the_first(trained, tmp_path):
    _, first = steered(trained, tmp_path, "TopK", "--set", "3=40")
    _, second = steered(trained, tmp_path, "TopK", "--zero", "5")
    _, third = steered(trained, tmp_path, "TopK", "--set", "7=9")
    (path,) = (tmp_path / "clamp").glob("*.json")
    saved = json.loads(path.read_text())
    assert saved["outputs"] == third["outputs"] and saved["set_high"] == [["set", 7, 9.0]]
    assert [run["outputs"] for run in saved["earlier_runs"]] == [
        second["outputs"],
        first["outputs"],
    ]
    assert "earlier_runs" not in saved["earlier_runs"][0]
    for damaged in ("{", "5", '{"earlier_runs": 5}', '{"a": NaN}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="not readable JSON|is no file of steer.py"):
            steered(trained, tmp_path, "TopK", "--set", "3=40")
        assert path.read_text() == damaged


def test_logits_that_are_no_numbers_are_named(trained, tmp_path, monkeypatch):
    logits_of = lm.logits_of
    monkeypatch.setattr(
        lm, "logits_of", lambda *model_and_states: logits_of(*model_and_states) * torch.nan
    )
    with pytest.raises(ValueError, match="no number as a logit; check its weights"):
        applied(trained, tmp_path, "TopK")
    with pytest.raises(ValueError, match="no number as a logit; check its weights"):
        steered(trained, tmp_path, "TopK", "--zero", "3")


def test_prompts_with_half_a_character_are_continued(trained, tmp_path):
    _, result = steered(trained, tmp_path, "TopK", "--zero", "3", "--prompt", "a \ud800 b")
    assert len(result["outputs"]) == 1


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_an_edit_beyond_the_number_format_is_one_line(trained, tmp_path, temperature):
    with pytest.raises(ValueError, match="with this edit .* use smaller values"):
        steered(trained, tmp_path, "TopK", "--set", "3=3e38", "--temperature", temperature)
    assert not list((tmp_path / "clamp").glob("*.json"))


@pytest.mark.parametrize("listed", [True, False])
def test_every_end_token_of_the_generation_settings_ends_a_text(
    trained, tmp_path, monkeypatch, listed
):
    steerer, _ = steered(trained, tmp_path, "TopK", "--set", "3=0")
    ids = steerer.ids({"prompt": "Returns the value"})
    new = steerer._continue(ids, None, None)[0].tolist()
    assert len(new) == 6
    second = new.index(new[2])  # its first place in the text
    opened = steerer.tokenizer, steerer.model
    settings = [new[2], steerer.tokenizer.pad_token_id] if listed else new[2]
    monkeypatch.setattr(steerer.model.generation_config, "eos_token_id", settings)
    monkeypatch.setattr(hooks, "open_language_model", lambda *_: opened)  # not loaded anew
    steerer.run()
    assert steerer._continue(ids, None, None)[0].tolist() == new[: second + 1]


def test_the_reader_makes_no_text_and_names_a_text_beyond_learned_positions(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(demo, "build_corpus", lambda: pytest.fail("text made"))
    sae, recipe = checkpoint.load(trained / "SAE_models" / "TopK_text.pt")
    folder = export_formats.export(sae, recipe, tmp_path, "hf")
    reader = Reader(folder, device="cpu", dtype="float32")
    assert reader.read("Returns the value").tokens

    def refuse(_model, length):
        raise ValueError(f"a row has {length} tokens, and the language model has 4 positions")

    monkeypatch.setattr(lm, "check_length", refuse)
    with pytest.raises(ValueError, match="a row has .* tokens, and the language model has"):
        reader.read("Returns the value of the first item in the list")


def test_a_conversation_is_continued_after_the_chat_template(trained, tmp_path):
    hh = {
        "chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant: So.",
        "rejected": "\n\nHuman: Hi?\n\nAssistant: No.",
    }
    (tmp_path / "hh.jsonl").write_text(json.dumps(hh))
    argv = sae_argv(trained, tmp_path, "RouteSAE")
    argv += ["--prompts", str(tmp_path / "hh.jsonl"), "--max_new_tokens", "4", "--set", "3=20"]
    steerer = Steerer(parse("steer", argv))
    output = steerer.run()["outputs"]["0"][0]
    ids = steerer.ids(steerer.prompts[0])[0].tolist()
    assert ids.count(steerer.tokenizer.bos_token_id) == 1  # the template writes its own
    assert steerer.tokenizer.decode(ids[1:]) == "user: Hi?\nassistant: Yes.\nuser: Why?\nassistant:"
    assert (output["Human"], output["chosen"], output["rejected"]) == ("Why?", "So.", "No.")
    assert output["KL"] > 0
    steerer.tokenizer.chat_template = None  # a tokenizer without one gets the plain turns
    ids = steerer.ids(steerer.prompts[0])[0].tolist()
    assert steerer.tokenizer.decode(ids[1:]) == "Hi?\n\nYes.\n\nWhy?"


TRIPLES = [  # set_high, set_low, what latent 3 of value z becomes
    ([(3, 2.5, 0)], None, lambda z: z + 2.5),
    ([(3, 4.0, 1)], None, lambda z: 4 * z),
    (None, [(3, 2.5, 0)], lambda z: z - 2.5),
    (None, [(3, 4.0, 1)], lambda z: z / 4),
    ([(3, 4.0, 1)], [(3, 1.0, 0)], lambda z: 4 * z - 1),
]


@pytest.mark.parametrize(("high", "low", "becomes"), TRIPLES)
def test_hooks_apply_triples_to_the_module_they_hook(high, low, becomes):
    torch.manual_seed(0)
    sae = build("TopK", 16, 4, {"latent_size": 8, "k": 8, "layer": 1})
    module, h = torch.nn.Identity(), torch.randn(2, 5, 16)
    (handle,) = utils.hook_SAE(None, sae, module, high, low)
    x, _, std = sae.standardise(h)
    z = sae.encode(x)[..., 3:4]
    assert torch.allclose(
        module(h), h + (becomes(z) - z) * sae.decoder.weight[:, 3] * std, atol=1e-5
    )
    handle.remove()
    assert torch.equal(module(h), h)


def test_hooks_without_triples_put_the_reconstruction_or_zero():
    torch.manual_seed(0)
    sae = build("TopK", 16, 4, {"latent_size": 8, "k": 2, "layer": 1})
    module, h = torch.nn.Identity(), torch.randn(2, 5, 16)
    (handle,) = utils.hook_SAE(None, sae, module)
    x, mean, std = sae.standardise(h)
    assert torch.allclose(module(h), sae(x)[1] * std + mean, atol=1e-5)
    handle.remove()
    utils.hook_SAE(None, sae, module, is_zero=True)
    assert not module(h).any()


@pytest.mark.parametrize("scaled", [False, True])
def test_routed_hooks_rewrite_each_token_at_its_own_site_only(scaled):
    tokenizer, model = lm.get_language_model(str(DEMO_LM), "cpu", "float32")
    torch.manual_seed(0)
    sae = build("RouteSAE", 128, 16, {"latent_size": 64, "k": 64})
    ids = torch.tensor([tokenizer.encode("Returns the number of items in the list")])
    sites, clean = sae.sites(), lm.read_sites(model, ids, sae.sites())
    x = torch.stack([sae.standardise(clean[site])[0] for site in sites], -2)
    weights = torch.zeros(1, ids.shape[1], len(sites))  # the first token of no site stays as it is
    p, half = float(sae.get_router_weights(x).detach().max()) if scaled else 1.0, ids.shape[1] // 2
    weights[:, 1:half, 0], weights[:, half:, 3] = p, p
    first = slice(1, half)
    for high, low, becomes in TRIPLES:
        handles = utils.hook_RouteSAE(None, sae, model, weights, high, low)
        changed = lm.read_sites(model, ids, sites)
        scale = weights[:, first].max(-1, keepdim=True).values
        h = clean[sites[0]]
        state, _, std = sae.standardise(h[:, first])
        z = sae.sae.encode(scale * state)[..., 3:4]
        wanted = h[:, first] + (becomes(z) - z) / scale * sae.sae.decoder.weight[:, 3] * std
        assert torch.allclose(changed[sites[0]][:, first], wanted, atol=1e-4)
        rest = torch.ones(ids.shape[1], dtype=torch.bool)
        rest[first] = False
        assert torch.equal(changed[sites[0]][:, rest], h[:, rest])
        for handle in handles:
            handle.remove()
    for handle in utils.hook_RouteSAE(None, sae, model, weights, is_zero=True):
        handle.remove()
    assert torch.equal(lm.read_sites(model, ids, sites)[12], clean[12])
