"""Labels by rule: what they see in a few contexts, whether they can be tested, what they cost."""

import os
import subprocess
import sys
import time

import pytest

from src import rule_labels
from src.files import ROOT
from src.rule_labels import answers, choose_rule, stem


def entry(*texts, activation=5.0):
    """An entry whose contexts are texts of tokens divided by '|'; that after '>' is active."""
    windows = []
    for text in texts:
        before, _, after = text.partition(">")
        tokens = [*before.split("|")[:-1], *after.split("|")] if before else after.split("|")
        windows.append((tokens, before.count("|")))
    return {
        "activations": [activation] * len(texts),
        "tokens": [tokens for tokens, _ in windows],
        "position": [position for _, position in windows],
        "token_activations": [[[position, activation]] for _, position in windows],
        "contexts": [],
    }


def label_of(entry):
    return rule_labels.label(choose_rule(entry))


SEEN = {
    "inflections": (
        "forms of 'know'",
        ["I| do| not|> know| him|.", "They|> knew| it|.", "She|> knows| us|.", "It| is|> known|."],
    ),
    "closed class": (
        "modal verbs",
        ["We|> must| go|.", "You|> might| see|.", "I|> may| be| late|.", "He|> shall| rest|."],
    ),
    "months": (
        "months",
        ["In|> March| we| left|.", "By|> June| all| came|.", "On|> May| 5|.", "Late| in|> July|."],
    ),
    "numbers": ("numbers", ["about|> 12| men|.", "of|> 7| days|.", "and|> 1863| was|."]),
    "beginning of a word": (
        "tokens that begin with 'un'",
        ["It| was|> unfair| to| us|.", "an|> unseen| hand|.", "so|> unkind| a| man|."],
    ),
    "end of a word": (
        "tokens that end in 'ness'",
        ["the|> darkness| of| it|.", "in|> kindness| he| came|.", "her|> sadness| was|."],
    ),
    "piece of a word": (
        "the first piece of a word",
        ["a|> kn|ack| for| it|.", "of|> gl|ee| and| joy|.", "one|> squ|id| swam|."],
    ),
    "place in the sentence": (
        "the first token of a sentence",
        ["No|.|> He| ran|.", "Yes|!|> Dogs| bark|.", "End|.|> Come| in|.", "Oh|.|> Rain| fell|."],
    ),
    "the word before": (
        "what follows 'united'",
        ["the| united|> states| of", "our| united|> forces| won", "a| united|> people| are"],
    ),
    "the word after": (
        "what comes before 'of'",
        ["a|> lot| of| it|.", "the|> sort| of| man|.", "one|> king| of| men|.", "a|> cup| of| tea"],
    ),
}


@pytest.mark.parametrize("kind", SEEN)
def test_a_rule_sees_what_the_eye_sees(kind):
    expected, texts = SEEN[kind]
    label = label_of(entry(*texts))
    assert label["explanation"].startswith(f"[by rule] {expected}")
    assert label["score"] == 5 and not label["polysemantic"]


def test_contexts_without_a_pattern_are_undiscernible():
    words = ["sky", "hen", "map", "oil", "urn", "pit", "toe", "web", "jar", "ink", "fig", "yak"]
    # The words occur where the latent is silent, too.
    texts = []
    for number, word in enumerate(words):
        rest = [f" {words[(number * step + 5) % 12]}" for step in (1, 5, 7, 11, 2, 3, 4, 6, 8, 9)]
        texts.append("|".join([*rest[:5], f"> {word}", *rest[5:]]))
    label = label_of(entry(*texts))
    assert label["category"] == "undiscernible" and label["score"] == 1


def test_meaning_is_a_higher_level_than_grammar():
    assert label_of(entry(*SEEN["months"][1]))["category"] == "high-level"
    assert label_of(entry(*SEEN["closed class"][1]))["category"] == "low-level"


def test_a_rule_answers_for_words_that_it_was_not_made_from():
    texts = [([" he", " could", " go"], [0, 1, 2]), ([" he", " went", " home"], [0, 1, 2])]
    texts += [([" he", " could", " go"], [1]), ([" he", " could", " go"], [2])]
    assert answers(choose_rule(entry(*SEEN["closed class"][1])), texts) == [
        True,
        False,
        True,
        False,
    ]


def test_contexts_of_other_programs_are_marked_texts():
    texts = ["we <ACTIVATED>walked</ACTIVATED> home", "he <ACTIVATED>walks</ACTIVATED> on"]
    contexts = [{"activation": 2.0, "token_class": "x", "context": text} for text in texts]
    assert "forms of 'walks'" in label_of({"contexts": contexts})["explanation"]
    unmarked = [{"activation": 1.0, "token_class": "", "context": "no mark"}]
    assert label_of({"contexts": unmarked})["explanation"].startswith("[by rule]")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("walk walks walked walking", "walk"),
        ("carry carries carried carrying", "carry"),
        ("stop stops stopped stopping", "stop"),
        ("hope hopes hoped hoping", "hop"),
        ("know knew known knows knowing", "know"),
        ("kiss kisses", "kiss"),
        ("thing", "thing"),
        ("bring brought bringing", "bring"),
    ],
)
def test_inflections_have_one_stem(words, expected):
    stems = {stem(word) for word in words.split()}
    assert stems == {expected} or stems == {expected, f"{expected}e"}


def test_the_cost_of_a_label_is_bounded():
    long = entry(*["a" * 40_000 + "|>" + "b" * 40_000 + "|" + "c" * 40_000] * 100)
    many = entry(*["|".join(" word" for _ in range(20_000)) + "|> last"] * 10)
    marked = "x " * 10**6 + "<ACTIVATED>" + "y" * 10**6 + "</ACTIVATED>" + "_" * 10**6
    text = {"contexts": [{"activation": 1.0, "token_class": "y", "context": marked}] * 1000}
    for hostile in (long, many, text):
        started = time.process_time()
        assert choose_rule(hostile).parts
        assert time.process_time() - started < 1


def test_words_and_forms_of_a_label_are_listed_once_each():
    texts = ["I|> knew| it|.", "she|> knows| us|.", "to|> know| him|.", "he|> laughs| at| it|."]
    texts += ["they|> laughed|.", "a|> tree| fell|.", "one|> moon| rose|.", "they|> laugh|."]
    explanation = label_of(entry(*texts))["explanation"]
    assert explanation.count("forms of") == 1 and explanation.count("token") <= 2
    assert all(repr(word) in explanation for word in ("know", "laugh", "tree", "moon"))


PAIR = """
from src.rule_labels import Rule, label
pair = frozenset([("kind", "commas"), ("kind", "brackets")])
print(label(Rule([pair], [pair], 1.0, ["),"]))["explanation"])
"""


def test_a_label_is_the_same_in_every_process():
    def explanation(seed):
        env = os.environ | {"PYTHONHASHSEED": str(seed)}
        return subprocess.check_output([sys.executable, "-c", PAIR], cwd=ROOT, env=env, text=True)

    # The order of a set depends on the seed: two conditions of one kind stood in either order.
    labels = {explanation(seed) for seed in range(4)}
    assert len(labels) == 1
    assert "brackets, if it is commas" in labels.pop()
