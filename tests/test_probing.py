"""Sparse probing: what the rules call a label, and what the probes find."""

import json

import numpy as np
import pytest
import torch

from src import config, data, lm, metric_table, probing, text_labels
from src.config import parse
from src.draws import random_integers
from src.evaluator import Evaluator
from src.files import DEMO_LM
from src.probing import KS, Probing, Sample, Units
from src.text_labels import document_labels, token_labels
from src.trainer import Trainer
from src.zoo import ZOO

LATENTS, WIDTH, DOCUMENTS, EACH = 40, 16, 24, 20
PLANTED = 7  # the latent that is active where the label is


def probe(has_label, planted, width=WIDTH):
    """The result for codes of noise in which one latent is active where `planted` is."""
    torch.manual_seed(0)
    n = len(has_label)
    codes = torch.relu(torch.randn(n, LATENTS) - 1)
    codes[:, PLANTED] = planted * torch.rand(n).add(0.5)
    states = torch.randn(n, width)
    states[:, 0] += 4 * planted
    labels = [{"planted": bool(value)} for value in has_label]
    documents = [i // EACH for i in range(n)]
    measure = Probing()
    for part in torch.arange(n).split(100):
        chosen = slice(int(part[0]), int(part[-1]) + 1)
        units = Units(torch.arange(len(part)), part.tolist(), documents[chosen], labels[chosen])
        measure.update(codes[chosen], states[chosen], {"tokens": units})
    return measure.compute()


def random_labels():
    keys = torch.arange(DOCUMENTS * EACH)
    return random_integers(keys, 3, 4) == 0


def test_a_planted_feature_is_found_by_one_latent_and_not_by_random_directions():
    has_label = random_labels()
    result = probe(has_label, has_label)
    assert all(result[f"Probing_k{k}"] == pytest.approx(1, abs=1e-3) for k in KS)
    assert result["Probing"]["labels"]["planted"]["latents"][0] == PLANTED
    assert result["Probing_state"] > 0.95
    assert result["Probing_random"] < 0.9


def test_shuffled_labels_are_at_chance():
    has_label = random_labels()
    shuffled = has_label[torch.from_numpy(np.random.default_rng(1).permutation(len(has_label)))]
    result = probe(shuffled, has_label)
    for key in ("k1", "k5", "state"):
        assert result[f"Probing_{key}"] == pytest.approx(0.5, abs=0.06)
    assert result["Probing_noise"] > 0
    halves = [probing._halves(np.arange(DOCUMENTS * EACH) // EACH, seed) for seed in range(2)]
    assert not np.array_equal(*halves)


def test_no_document_is_in_both_halves():
    documents = np.random.default_rng(0).integers(0, 31, 500)
    for seed in range(5):
        trains = probing._halves(documents, seed)
        assert not set(documents[trains]) & set(documents[~trains])
        assert 0 < trains.sum() < len(documents)


def test_the_order_of_the_parts_changes_nothing():
    def measured(parts):
        measures = []
        for part in parts:
            measure = Probing()
            of_part = slice(part * 120, part * 120 + 120)
            units = Units(
                torch.arange(120), keys[of_part].tolist(), documents[of_part], labels[of_part]
            )
            measure.update(codes[of_part], codes[of_part], {"passages": units})
            measures.append(measure)
        measures[0].merge(measures[1])
        measures[0].merge(measures[2])
        return measures[0].compute()

    generator = torch.Generator().manual_seed(2)
    codes = torch.relu(torch.randn(360, 12, generator=generator))
    keys = torch.arange(360)
    documents = [i // 10 for i in range(360)]
    labels = [{"kind": "abc"[i % 3]} for i in range(360)]
    result = measured([0, 1, 2])
    assert result == measured([2, 0, 1])
    assert list(result["Probing"]["labels"]) == ["kind: a", "kind: b", "kind: c"]


def test_the_code_of_a_passage_is_the_mean_over_its_tokens_and_sites():
    code = torch.tensor([[[2.0, 0], [4, 1]], [[0, 3], [0, 0]], [[9, 9], [9, 9]]])  # [3,2,F]
    states = code + 1
    measure = probing._Codes()
    measure.update(code, states, Units(torch.tensor([0, 0, -1]), [0], [0], [{}]))
    (codes,), (state,) = measure.codes, measure.states
    assert codes.toarray().tolist() == [[1.5, 1.0]] and state.tolist() == [[2.5, 2.0]]


SPEECH = (
    "Fellow citizens of the Senate: the Government of the Union reports to Congress, in the year "
    "{year}, that General Washington and his nation of farmers paid 300 dollars. They said "
    '"it is a just debt, and we must pay it" to Mr. Franklin.'
)
VERSE = "Upon the hill the {a} wind sings\nAnd all {b} birds have folded wings\nTo sleep."


def write_text(folder, n=40):
    """Write n speeches and n verses of about 60 tokens, and return the file."""
    path = folder / "t.jsonl"
    words = "old cold grey wild dark pale swift slow sad last".split()
    with open(path, "w") as file:
        for i in range(n):
            verse = VERSE.format(a=words[i % 10], b=words[i // 10])
            year = 1801 + 2 * i if i < n // 2 else 1905 + 2 * (i - n // 2)
            speech = SPEECH.format(year=year)
            for text in (speech, "\n".join([verse] * 3)):
                file.write(json.dumps({"text": text}) + "\n")
    return path


def test_a_documents_source_century_and_president_are_told_by_rule():
    speech = SPEECH.format(year=1863)
    beside = [SPEECH.format(year=1862), VERSE]
    assert document_labels(speech, beside) == {
        "source": "speech",
        "language": "English",
        "century": "19th",
        "president": "Lincoln",
    }
    assert document_labels(speech, [SPEECH.format(year=1871)])["president"] is None
    assert document_labels(speech)["century"] is None
    code = "def read(path):\n    >>> read('x')\n" * 4
    assert document_labels(code)["source"] == "documentation"
    assert document_labels(VERSE)["source"] == "verse"
    french = "Les enfants sont dans une maison avec des amis pour vous et que sur les toits " * 2
    assert document_labels(french)["language"] == "French"
    assert document_labels("\u6211\u4eec\u5728\u8fd9\u91cc")["language"] == "Chinese"


def test_tokens_have_the_classes_of_the_rules():
    text = 'In 1812 the General Jackson said , " We must go ." Then he went\n\nto sea'
    tokens = [" " + word if word[0] != "\n" else word for word in text.split(" ")]
    tokens[-2:] = [" went", "\n\n", "to", " sea"]
    labels = token_labels(tokens)

    def having(name):
        return [token.strip() for token, has in zip(tokens, labels, strict=True) if has[name]]

    assert having("number") == ["1812"] and having("articles") == ["the"]
    assert having("name") == ["Jackson"]  # a general is a rank
    assert having("modal verbs") == ["must"]
    assert having("inside a quotation") == ["We", "must", "go", '."']
    assert having("first of a sentence") == ["In", "Then", "to"]
    assert token_labels([" there", '"', " he"], before='He said "it is')[0]["inside a quotation"]
    assert not token_labels([" there"], before='"so"\n\nHe')[0]["inside a quotation"]


def test_every_probed_token_has_its_own_labels(tmp_path):
    tokenizer, _ = lm.get_language_model(str(DEMO_LM), "cpu", "float32")
    rows = data.Rows(write_text(tmp_path, 20), tokenizer, 32, "all")
    sample = Sample(rows, tokenizer)
    n_tokens = n_passages = 0
    for batch in rows.batches(4):
        ids = batch.input_ids[batch.mask]
        units = sample.of(batch)["tokens"]
        probed = ids[units.of_token >= 0]
        assert len(probed) == len(units.labels) == len(units.keys)
        for token, labels in zip(probed.tolist(), units.labels, strict=True):
            text = tokenizer.decode([token]).strip()
            assert labels["number"] == text.isdecimal(), text
            assert labels["articles"] <= (text.lower() in ("the", "a", "an")), text
        n_tokens += len(probed)
        passages = sample.of(batch)["passages"]
        for number, labels in zip(passages.documents, passages.labels, strict=True):
            assert labels["source"] == ("verse" if number % 2 else "speech")
            own = batch.document[batch.mask][passages.of_token == passages.documents.index(number)]
            assert set(own.tolist()) == {number}
        n_passages += len(passages.keys)
    assert n_tokens > 1000 and n_passages > 40


def arguments(tmp_path):
    text = ["--data_path", str(tmp_path / "t.jsonl"), "--output_dir", str(tmp_path / "out")]
    return [*text, "--model_path", str(DEMO_LM), "--split", "all", "--max_length", "64"]


@pytest.mark.slow
def test_every_model_is_probed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probing, "SEEDS", 2)
    monkeypatch.setattr(probing, "MIN_UNITS", 5)
    rules = {name: text_labels.TOKEN_RULES[name] for name in ("punctuation", "articles")}
    monkeypatch.setattr(text_labels, "TOKEN_RULES", rules)
    write_text(tmp_path, 20)
    sizes = ["--latent_size", "64", "--k", "4", "--batch_size", "16", "--max_tokens", "2000"]
    with_l0 = ["--target_l0", "4"]
    Trainer(parse("train", [*arguments(tmp_path), *sizes, *with_l0, "--model", *ZOO])).run()
    paths = sorted(map(str, (tmp_path / "out" / "SAE_models").glob("*.pt")))
    capsys.readouterr()
    argv = [*arguments(tmp_path), "--metric", "probing", "--SAE_path", *paths]
    results = Evaluator(parse("evaluate", argv)).run()
    assert {result["model"] for result in results.values()} == set(ZOO)
    for result in results.values():
        labels = result["Probing"]["labels"]
        assert {"articles", "punctuation"} <= labels.keys()
        (source,) = (name for name in labels if name.startswith("source: "))
        assert labels["articles"]["units"] == "tokens" and 0 < labels["articles"]["share"] < 0.3
        assert labels[source]["AUC"]["state"] == pytest.approx([1, 1], abs=0.01)
        assert 0.4 < result["Probing_k1"] <= 1 and result["units"]["Probing_k1"] == "AUC"
        assert result["Probing"]["left_out"]["language"] == "all passages are English"
    printed = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "left out: " in printed and "language (all passages are English)" in printed


def test_a_text_without_labels_says_so_and_loses_no_other_metric(tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text('{"text": "a b c d e f g h"}\n')
    sizes = ["--latent_size", "64", "--k", "4", "--batch_size", "16", "--model", "TopK"]
    Trainer(parse("train", [*arguments(tmp_path), *sizes])).run()
    argv = [*arguments(tmp_path), "--metric", "Probing", "NormMSE"]
    (result,) = Evaluator(parse("evaluate", argv)).run().values()
    assert result["NormMSE"] > 0 and "Probing_k1" not in result
    assert result["Probing"]["labels"] == {}
    printed = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "probes of 0 labels" in printed and "articles (" in printed


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(probing.importlib.util, "find_spec", lambda name: None)
    message = "--metric Probing needs scikit-learn; run: pip install scikit-learn"
    with pytest.raises(ValueError, match=message):
        Evaluator(parse("evaluate", ["--metric", "Probing"]))


def test_probing_is_asked_for_by_name_and_not_by_all(capsys):
    assert "Probing" in metric_table.NAMES and "Probing" not in metric_table.ALL
    assert set(metric_table.NAMES) - set(metric_table.ALL) == {"Probing"}
    assert parse("evaluate", ["--metric", "probing"]).metric == ["Probing"]
    assert metric_table.headline("Probing") == "Probing_k1"
    with pytest.raises(SystemExit):
        config.parse("evaluate", ["--help"])
    assert "Probing" in capsys.readouterr().out
