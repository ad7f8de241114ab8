"""Text around an active token: texts of single tokens, sentences, marks. Works without torch.

A piece is the text of one token as it stands inside a text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from typing import Any

OPEN, CLOSE = "<ACTIVATED>", "</ACTIVATED>"
SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f][\"'\u201d\u2019)\]]*(?=\s|$)|\n")
# What ends a sentence of a window: a mark before a space and no small letter, or an empty line.
# Ends of lines do not, because texts are wrapped and sentences run through verse.
WINDOW_END = re.compile(
    r"[.!?][\"'\u201d\u2019)\]]*(?=\s+[^\sa-z])"
    r"|[\u3002\uff01\uff1f][\u201d\u2019\u300d]*|\n[ \t]*\n"
)
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Sr|Jr|Gen|Col|Capt|Rev|Hon|No|vs|etc|cf|[A-Z])\.$")
ABBREVIATION_CHARS = 8  # before an end, in which an abbreviation is looked for
WINDOW_TOKENS = 32  # to which whole sentences are added to a short one
BROKEN = "\ufffd"  # decoders put it for bytes that are no whole character
MAX_CHARACTER_TOKENS = 8  # tokens over which one character may be spread


class _Decoded(dict):
    """The texts of tokens, made when they are first asked for."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode

    def __missing__(self, token: int) -> str:
        self[token] = self.decode([token])
        return self[token]


class TokenText:
    """The text of every token id inside a text, and its class.

    A class is the stripped, lower-cased text, so ' The' and 'the' are one. `group` holds the
    number of each token's class, `names` the classes.
    """

    def __init__(self, decode: Callable[[list[int]], str], vocabulary: int, anchor: int) -> None:
        """decode: ids -> text. anchor: an ordinary token, decoded before the others.

        Some tokenizers drop the first space of a text; after the anchor they keep it.
        """
        self.decode = decode
        self.anchor = anchor
        self.prefix = decode([anchor])
        self.text: Any = [self._inside_text([token]) for token in range(vocabulary)]
        numbers: dict[str, int] = {}
        self.group = [
            numbers.setdefault(self.name_of(token), len(numbers)) for token in range(vocabulary)
        ]
        self.names = list(numbers)

    @classmethod
    def of_few(cls, decode: Callable[[list[int]], str], anchor: int) -> TokenText:
        """Return one that decodes a token when it is first asked for, and has no classes."""
        result = cls(decode, 0, anchor)
        result.text = _Decoded(result._inside_text)
        return result

    def _inside_text(self, ids: list[int]) -> str:
        text = self.decode([self.anchor, *ids])
        return text[len(self.prefix) :] if text.startswith(self.prefix) else self.decode(ids)

    def name_of(self, token: int) -> str:
        text = self.text[token]
        if BROKEN in text:
            return f"<bytes {token}>"
        return text.strip().lower() or text or f"<{token}>"

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the texts of consecutive tokens.

        A character spread over several tokens stands whole at its first one; the others get ''.
        """
        pieces = [self.text[token] for token in ids]
        if BROKEN not in "".join(pieces):
            return pieces
        pieces = []
        while len(pieces) < len(ids):
            text, n_tokens = self._character(ids, len(pieces))
            pieces += [text] + [""] * (n_tokens - 1)
        return pieces

    def _character(self, ids: Sequence[int], start: int) -> tuple[str, int]:
        """Return the text of the fewest tokens from `start` that hold whole characters, and how
        many they are; that of one token if there are none, as at the end of a window."""
        most = min(MAX_CHARACTER_TOKENS, len(ids) - start)
        for n_tokens in range(1, most + 1):
            chunk = list(ids[start : start + n_tokens])
            text = self.text[chunk[0]] if n_tokens == 1 else self._inside_text(chunk)
            if BROKEN not in text:
                return text, n_tokens
        return self.text[ids[start]], 1


def text_decoder(tokenizer: Any) -> tuple[Callable[[list[int]], str], int]:
    """Return (ids -> text, an ordinary token) of a tokenizer, as TokenText takes them."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode, tokenizer.encode("a", add_special_tokens=False)[-1]


def sentence(pieces: Sequence[str], position: int) -> str:
    """Return the sentence around one token with that token marked.

    Its bounds are searched in the text, because a token may hold the end of a sentence.
    """
    while position and not pieces[position]:  # inside a character that began earlier
        position -= 1
    text = "".join(pieces)
    piece = pieces[position]
    start = len("".join(pieces[:position]))
    stop = start + len(piece)
    if piece.strip():
        start += len(piece) - len(piece.lstrip())
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    first = max((end for end in ends if end <= start), default=0)
    last = min((end for end in ends if end >= stop), default=len(text))
    before = neutral(text[first:start].lstrip())
    after = neutral(text[stop:last].rstrip())
    return f"{before}{_mark(text[start:stop])}{after}"


def sentence_bounds(pieces: Sequence[str], position: int) -> tuple[int, int]:
    """Return (first, end) of the tokens of the sentence around a token.

    Whole sentences before it, or else after it, are added while it has fewer than WINDOW_TOKENS.
    A sentence that the pieces hold in part is not added.
    """
    starts = _sentence_starts(pieces)
    inside = bisect_right(starts, position)
    first = starts[inside - 1] if inside else 0
    end = starts[inside] if inside < len(starts) else len(pieces)
    before, after = inside - 1, inside  # numbers of the bounds
    while end - first < WINDOW_TOKENS:
        if before > 0:
            before -= 1
            first = starts[before]
        elif after + 1 < len(starts):
            after += 1
            end = starts[after]
        else:
            break
    return first, end


def _sentence_starts(pieces: Sequence[str]) -> list[int]:
    """Return the tokens at which a sentence begins, of sentences whose beginning is there.

    A token of white space alone belongs to the sentence before it.
    """
    text = "".join(pieces)
    ends = [
        match.end()
        for match in WINDOW_END.finditer(text)
        if not ABBREVIATION.search(text[max(0, match.end() - ABBREVIATION_CHARS) : match.end()])
    ]
    starts = []
    next_end = 0
    length = 0
    for index, piece in enumerate(pieces):
        begin = length + len(piece) - len(piece.lstrip())
        length += len(piece)
        if piece.strip() and next_end < len(ends) and ends[next_end] <= begin:
            starts.append(index)
            while next_end < len(ends) and ends[next_end] <= begin:
                next_end += 1
    return starts


def whole_words(pieces: Sequence[str], position: int) -> tuple[int, int]:
    """Return (first, end) of the pieces without a cut word at either end of their window.

    A window that begins with a small letter is taken to begin inside a word, and one that ends
    with a letter or digit to end inside one. The piece at `position` always stays.
    """
    first, end = 0, len(pieces)
    if pieces[0][:1].islower():
        first = next((i for i in range(1, end) if not pieces[i][:1].isalnum()), position)
    if pieces[-1][-1:].isalnum():
        last = next((i for i in reversed(range(end)) if not pieces[i][:1].isalnum()), 0)
        end = last if last > position else end
    return min(first, position), end


def neutral(text: str) -> str:
    """Return the text with any marks in it broken up, so that only our own marks count."""
    return re.sub(r"<(/?)ACTIVATED>", r"<\1 ACTIVATED>", text)


def marked(pieces: Sequence[str], positions: Collection[int]) -> str:
    """Return the whole window with the given tokens marked."""
    return "".join(
        _mark(piece) if index in positions else neutral(piece) for index, piece in enumerate(pieces)
    )


def _mark(text: str) -> str:
    return f"{OPEN}{neutral(text)}{CLOSE}"
