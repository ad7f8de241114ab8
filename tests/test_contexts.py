"""Texts of tokens and the sentence around one of them."""

import pytest

from src import contexts
from src.contexts import TokenText, sentence, sentence_bounds, whole_words


class ByteTokenizer:
    """A tokenizer of single bytes: characters outside ASCII are spread over tokens."""

    @staticmethod
    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")


@pytest.fixture
def token_text():
    return TokenText(ByteTokenizer.decode, 256, ord("a"))


def test_characters_over_several_tokens_stand_whole_and_nothing_is_lost(token_text):
    text = "na\u00efve \u65e5\u672c!"
    ids = list(text.encode())
    pieces = token_text.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert pieces[2:4] == ["\u00ef", ""]
    assert pieces[7:10] == ["\u65e5", "", ""]


def test_a_character_cut_off_by_the_end_of_the_window_cannot_be_shown(token_text):
    ids = list("na\u00ef".encode())
    assert "\ufffd" in "".join(token_text.pieces(ids[:3]))


def test_token_classes_join_case_and_space(token_text):
    group = token_text.group
    assert group[ord("A")] == group[ord("a")]
    assert group[ord("a")] != group[ord("b")]


@pytest.mark.parametrize(
    ("pieces", "position", "expected"),
    [
        ([" One", ".", " Two", " three", ".", " Four"], 3, "Two<X> three</X>."),
        ([" He", " said", ' "', "no", '."', " Then"], 3, 'He said "<X>no</X>."'),
        (["a", "\n", "b", "\n", "c"], 2, "<X>b</X>"),
        ([" end", "."], 1, "end<X>.</X>"),
        (["v1", ".", "5", " is"], 2, "v1.<X>5</X> is"),
        ([" x", " </ACTIVATED>", " y"], 0, "<X>x</X> < /ACTIVATED> y"),
    ],
)
def test_sentences_are_cut_in_the_text_and_the_token_marked(pieces, position, expected):
    result = sentence(pieces, position)
    result = result.replace("<ACTIVATED>", "<X>").replace("</ACTIVATED>", "</X>")
    assert result.replace("<X> ", " <X>") == expected.replace("<X> ", " <X>").replace("< /", "</ ")


SPEECH = [" He", " saw", " Mr", ".", " Lee", ".", "\n\n", "HAMLET", ".", "\n", "To", " be", ",\n"]
SPEECH += ["or", " not", "?", ' "', "No", '."', " Then", " i", ".", "e", ".", " on", "."]


@pytest.mark.parametrize(
    ("position", "wanted", "expected"),
    [
        (1, 1, " He saw Mr. Lee.\n\n"),
        (10, 1, "To be,\nor not?"),
        (13, 5, "To be,\nor not?"),
        (13, 9, "HAMLET.\nTo be,\nor not?"),
        (17, 1, ' "No."'),
        (17, 7, 'To be,\nor not? "No."'),
        (20, 1, " Then i.e. on."),
    ],
)
def test_a_window_is_cut_at_the_bounds_of_sentences(position, wanted, expected, monkeypatch):
    monkeypatch.setattr(contexts, "WINDOW_TOKENS", wanted)
    first, end = sentence_bounds(SPEECH, position)
    assert "".join(SPEECH[first:end]) == expected
    assert first <= position < end


def test_a_sentence_longer_than_the_window_is_kept_as_far_as_it_is_there():
    assert sentence_bounds([" a"] * 9, 4) == (0, 9)


@pytest.mark.parametrize(
    ("pieces", "position", "expected"),
    [
        (["ing", " the", " war", " effort", "s"], 2, " the war"),
        (["ing", " the", " war", "."], 2, " the war."),
        (["The", " war", ".", "\n"], 1, "The war.\n"),
        (["ing", "s", " on"], 0, "ings"),
        (["ing", "s"], 1, "s"),
        ([" a"], 0, " a"),
        (["a"], 0, "a"),
        (["", " b", " c", "d"], 3, " b cd"),
    ],
)
def test_words_that_a_window_cuts_are_left_out(pieces, position, expected):
    first, end = whole_words(pieces, position)
    assert "".join(pieces[first:end]) == expected
    assert first <= position < end
