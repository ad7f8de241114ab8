"""Texts of tokens and the sentence around one of them."""

import pytest

from src.contexts import TokenText, sentence


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
