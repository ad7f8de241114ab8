"""What a text says of its tokens and of itself, by rules: the labels of sparse probing.

A rule that cannot tell says nothing, so that a label is rather missing than wrong. How often each
rule is right was counted where the answer is known (docs/LOG.md). Works without torch.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence

from src.rule_labels import Condition, conditions

WORD_CLASSES = (
    "articles",
    "prepositions",
    "conjunctions",
    "personal pronouns",
    "modal verbs",
    "forms of 'be'",
    "demonstratives",
)
# Terms of the presidents of the United States, by the year in which they begin.
PRESIDENTS = """
1789 Washington; 1797 J. Adams; 1801 Jefferson; 1809 Madison; 1817 Monroe; 1825 J. Q. Adams
1829 Jackson; 1837 Van Buren; 1841 Tyler; 1845 Polk; 1849 Taylor; 1850 Fillmore; 1853 Pierce
1857 Buchanan; 1861 Lincoln; 1865 A. Johnson; 1869 Grant; 1877 Hayes; 1881 Arthur; 1885 Cleveland
1889 B. Harrison; 1893 Cleveland; 1897 McKinley; 1901 T. Roosevelt; 1909 Taft; 1913 Wilson
1921 Harding; 1923 Coolidge; 1929 Hoover; 1933 F. D. Roosevelt; 1945 Truman; 1953 Eisenhower
1961 Kennedy; 1963 L. B. Johnson; 1969 Nixon; 1974 Ford; 1977 Carter; 1981 Reagan; 1989 Bush
1993 Clinton; 2001 G. W. Bush; 2009 Obama; 2017 Trump; 2021 Biden; 2025 Trump
"""
TERMS = [
    (int(term[:4]), term[5:]) for term in map(str.strip, re.split(r"[;\n]", PRESIDENTS.strip()))
]
LANGUAGES = {  # frequent words that hardly any of the others has
    "English": "the of and that with was which shall not his",
    "French": "les des est dans une pour vous que sur avec",
    "German": "der und das nicht ist ein ich den sich auf",
    "Spanish": "los las una por del con para como pero esta",
    "Italian": "che della gli per sono non del alla questo anche",
    "Latin": "et quae sed non cum nec ut quod atque tibi",
}
SCRIPTS = {
    "Chinese": "[\u4e00-\u9fff]",
    "Japanese": "[\u3040-\u30ff]",
    "Russian": "[\u0400-\u04ff]",
}
MIN_WORDS = 20  # of a document whose language is told
MIN_SHARE = 0.04  # of its words, or of its characters, that are of the language
VERSE_LINE = 60  # characters; half of the lines of verse and drama are at most so long
YEAR = re.compile(r"(?<![\d,.$])(1[789]\d\d|20[0-4]\d)(?![.,]?\d)")
CODE = re.compile(r"\w_\w|\w\(|>>>|``|::|</")
CODE_RATE = 3e-3  # signs of code a character from which a text is documentation
CIVIC = re.compile(r"\b(?:Congress|Government|citizens|[Nn]ation|Senate|President|Union)\b")
CIVIC_RATE = 3e-4  # such words a character from which prose is a political speech

NO_WORDS = ("punctuation", "line breaks", "white space")

Holds = Callable[[set[Condition]], bool]


def _has(kind: str, *values: str) -> Holds:
    return lambda holding: any((kind, value) in holding for value in values)


def _begins_sentence(holding: set[Condition]) -> bool:
    is_word = not any(("kind", kind) in holding for kind in NO_WORDS)
    return ("start", "sentence") in holding and is_word


def _is_name(holding: set[Condition]) -> bool:
    """A capitalised word inside a line and a sentence that is in no list of words."""
    begins = ("start", "sentence") in holding or ("start", "line") in holding
    is_listed = any(kind == "class" for kind, _ in holding)
    return ("kind", "capitalised words") in holding and not begins and not is_listed


TOKEN_RULES: dict[str, Holds] = {
    "number": _has("kind", "numbers"),
    "punctuation": _has("kind", "punctuation"),
    "name": _is_name,
    "first of a sentence": _begins_sentence,
    "inside a word": _has("part", "inner", "last"),
    **{name: _has("class", name) for name in WORD_CLASSES},
}


def token_labels(tokens: Sequence[str], before: str = "") -> list[dict[str, bool]]:
    """Return for each token of a text which labels it has: those of TOKEN_RULES and one more.

    before: the text in front of it, from which it is told whether a quotation is open.
    """
    result = []
    quoted = _quoted(tokens, before)
    for holding, is_quoted in zip(conditions(tokens), quoted, strict=True):
        labels = {name: holds(holding) for name, holds in TOKEN_RULES.items()}
        result.append(labels | {"inside a quotation": is_quoted})
    return result


def _quoted(tokens: Sequence[str], before: str) -> list[bool]:
    """Return whether each token begins inside a quotation; one ends with its paragraph at last."""
    paragraph = before.rpartition("\n\n")[2]
    result = []
    is_open = _open_after(paragraph, False)
    tail = paragraph[-1:]
    for token in tokens:
        result.append(is_open)
        if "\n\n" in tail + token:
            is_open = False
            token = token.rpartition("\n")[2]
        is_open = _open_after(token, is_open)
        tail = token[-1:] or tail
    return result


def _open_after(text: str, is_open: bool) -> bool:
    for mark in re.findall('["\u201c\u201d]', text):
        is_open = mark == "\u201c" if mark != '"' else not is_open
    return is_open


def document_labels(text: str, neighbours: Sequence[str] = ()) -> dict[str, str | None]:
    """Return what is told of a document: its source, language, century and president, or None.

    A speech has the century and the president of the latest year that it mentions, if a document
    beside it in the data agrees: archives keep the parts of a speech, and speeches of a time,
    together, and a single year may be that of a plan or of a memory.
    """
    source = _source(text)
    labels = {"source": source, "language": _language(text), "century": None, "president": None}
    year = _latest_year(text)
    if source == "speech" and year:
        others = [other for other in map(_latest_year, neighbours) if other]
        for kind, value_of in (("century", _century), ("president", _president)):
            if value_of(year) in map(value_of, others):
                labels[kind] = value_of(year)
    return labels


def _source(text: str) -> str | None:
    lines = sorted(len(line.strip()) for line in text.split("\n") if line.strip())
    if not lines:
        return None
    if len(CODE.findall(text)) > CODE_RATE * len(text):
        return "documentation"
    if lines[len(lines) // 2] <= VERSE_LINE:
        return "verse"
    return "speech" if len(CIVIC.findall(text)) > CIVIC_RATE * len(text) else None


def _latest_year(text: str) -> int | None:
    return max(map(int, YEAR.findall(text)), default=None)


def _century(year: int) -> str:
    return f"{year // 100 + 1}th" if year < 2000 else "21st"


def _president(year: int) -> str:
    index = bisect.bisect_right(TERMS, year, key=lambda term: term[0]) - 1
    return TERMS[max(0, index)][1]


def _language(text: str) -> str | None:
    for name, script in SCRIPTS.items():
        if len(re.findall(script, text)) > MIN_SHARE * len(text):
            return name
    words = re.findall(r"[^\W\d_]+", text.lower())
    if len(words) < MIN_WORDS:
        return None
    counts = {}
    for name, frequent in LANGUAGES.items():
        listed = set(frequent.split())
        counts[name] = sum(word in listed for word in words)
    name = max(counts, key=counts.get)
    second = sorted(counts.values())[-2]
    return name if counts[name] > max(MIN_SHARE * len(words), 2 * second) else None
