"""Names for people: the short form of a label by rule."""

import pytest

from src import names
from src.rule_labels import Rule, _explanation

RULE = (
    "demonstratives; or forms of 'law', \"'em\", 'form, or', 'date'; or the tokens 'ol', 'it\\'s', "
    "'nature'; or forms of 'to', if it is what follows 'led', such as 'this', 'laws' "
    "(93% of the active tokens)"
)


@pytest.mark.parametrize(
    ("label", "short"),
    [
        (RULE, "demonstratives; or forms of 'law'; or the token 'ol'; and 6 more"),
        ("the tokens 'a', 'b', 'c', 'd', 'e'", "the tokens 'a', 'b', 'c'; and 2 more"),
        (
            "the token 'a'; or the token 'b' (91% of the active tokens)",
            "the token 'a'; or the token 'b'",
        ),
        ("words of war, such as battles", "words of war, such as battles"),
        ("no rule found; tokens such as 'a', 'b'", "no rule found; tokens such as 'a', 'b'"),
        ("", ""),
    ],
)
def test_a_label_by_rule_is_shown_by_its_first_conditions(label, short):
    assert names.shortened(label) == short


def test_the_short_form_counts_all_conditions_of_a_rule_as_it_is_made():
    conditions = [("forms", "war"), ("class", "months"), ("token", "of"), ("forms", "law")]
    parts = [frozenset([one]) for one in [*conditions, ("token", "it's"), ("before", "to")]]
    rule = Rule(parts, parts, 0.9, ["war", "laws", "of", "it's"])
    text, n_more = names.short_label(_explanation(rule))
    assert (text, n_more) == ("forms of 'war'; or months; or the token 'of'", 3)


def test_a_name_does_not_list_many_sites():
    titles = [f"Union_4x8_by-{who}_sites7-22" for who in ("oracle", "RouteSAE-sites7-8-9-10-11-12")]
    results = [{"title": title, "model": "Union", "sites": list(range(7, 13))} for title in titles]
    assert names.of_results(results) == ["Union, by-oracle", "Union, by-RouteSAE-sites7...12"]


def test_a_language_model_is_called_by_its_card(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert names.language_model(str(folder)) == names.language_model("org/model") == "model"
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Other\n")
    assert names.language_model(str(folder)) == "model"
    (folder / "README.md").write_text("# SmolLM2-135M-Instruct with four-bit weights\n\n- Source\n")
    assert names.language_model(str(folder)) == "SmolLM2-135M-Instruct with four-bit weights"
    (folder / "README.md").write_bytes(b"# " + b"\xff" * 1000)
    assert len(names.language_model(str(folder))) == names.HEADING_CHARS
