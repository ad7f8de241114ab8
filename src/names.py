"""Names for people: of sites, language models, and SAEs beside each other in a table or a picture.

Works on titles, the JSON of results, and the card of a language model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Parts of a title that tell swept values; "layer" is told by the site of the result.
SWEPT = re.compile(r"_(k|layer|l1_coeff|target_l0|sites)([\d.e+-]+)(?=_|$)")
SHOWN_CONDITIONS = 3  # of a label by rule; their number is 10 in the median
EXAMPLES = re.compile(r", such as ['\"]| \(\d+% of the active tokens\)$")  # what follows the rule
QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
LISTED = re.compile(rf"(forms of|the tokens) ((?:{QUOTED})(?:, (?:{QUOTED}))+)")
MANY_SITES = re.compile(r"(\d+)(?:-\d+){2,}-(\d+)")  # listed inside a word of a title
HEADING_CHARS = 80  # of the card of a language model
UNITS = {"k": "k {}", "l1_coeff": "coefficient {}", "target_l0": "L0 {} asked for"}


def sites(numbers: Sequence[int]) -> str:
    """Return "site 12", "sites 7 to 22" where none is left out, else "sites 7, 10, 13"."""
    return ("site " if len(numbers) == 1 else "sites ") + site_numbers(numbers)


def site_numbers(numbers: Sequence[int]) -> str:
    """Return "12", "7 to 22" or "7, 10, 13"."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def language_model(place: str) -> str:
    """Return the heading of the card in a language model's folder, else the last part of its path.

    The folder that scripts/download_model.sh fills is called "model".
    """
    try:
        with open(Path(place) / "README.md", encoding="utf-8", errors="replace") as card:
            heading = card.readline(2 * HEADING_CHARS)
    except OSError:
        heading = ""
    if heading.startswith("# "):
        return heading[2:].strip()[:HEADING_CHARS]
    return Path(place).name


def model_of(result: Mapping[str, Any]) -> str:
    """The model of a result: what it says, or else the first word of its title."""
    return str(result.get("model") or str(result["title"]).split("_")[0])


def of_results(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each result, such as "TopK, site 12" or "RouteSAE, random".

    results: dicts with "title", "model" and "sites". What all titles share, such as the name of the
    text, is left out; the sites of models of several sites are told only where they differ; swept
    values are told where names would be the same without them.
    """
    own_words = _own_words([str(result["title"]) for result in results])
    several = {tuple(result["sites"]) for result in results if len(result["sites"]) > 1}
    names = []
    for result, words in zip(results, own_words, strict=True):
        parts = [model_of(result)]
        parts += [" ".join(words)] if words else []
        if len(result["sites"]) == 1 or len(several) > 1:
            parts.append(sites(result["sites"]))
        names.append(", ".join(parts))
    counts = Counter(names)
    return [
        name if counts[name] == 1 else ", ".join([name, *_swept(str(result["title"]))])
        for name, result in zip(names, results, strict=True)
    ]


def _own_words(titles: list[str]) -> list[list[str]]:
    """The words of each title, without the model's name, swept values and what all share."""
    shorter = [MANY_SITES.sub(r"\1...\2", SWEPT.sub("", title)) for title in titles]
    words = [title.split("_")[1:] for title in shorter]
    shared = set.intersection(*map(set, words)) if words else set()
    return [[word for word in of_one if word not in shared] for of_one in words]


def _swept(title: str) -> list[str]:
    found = SWEPT.findall(title)
    return [UNITS[key].format(value) for key, value in found if key in UNITS]


def short_label(label: str) -> tuple[str, int]:
    """Return (the first conditions of a label by rule, how many more it has).

    The conditions of a rule stand by what they add to it, with all words and all forms of words
    in one list each; the first of every list is shown before a second one. The examples and the
    share behind the rule are left out. A label with "; or " nowhere is no such list and stays.
    """
    phrases = EXAMPLES.split(label)[0].split("; or ")
    lists = [_conditions(phrase) for phrase in phrases]
    total = sum(len(values) for _, values in lists)
    if total <= SHOWN_CONDITIONS + 1:
        return "; or ".join(phrases), 0
    counts = [0] * len(lists)
    for _ in range(SHOWN_CONDITIONS):
        has_more = [i for i, (_, values) in enumerate(lists) if counts[i] < len(values)]
        counts[min(has_more, key=lambda i: (counts[i], i))] += 1
    shown = [
        _written(head, values[:count])
        for (head, values), count in zip(lists, counts, strict=True)
        if count
    ]
    return "; or ".join(shown), total - SHOWN_CONDITIONS


def shortened(label: str) -> str:
    """Return a label with three conditions at most, and the number of the others."""
    text, n_more = short_label(label)
    return f"{text}; and {n_more} more" if n_more else text


def _conditions(phrase: str) -> tuple[str, list[str]]:
    """("the tokens", ["'a'", "'b'"]) of a list; ("", [phrase]) of what is none."""
    match = LISTED.fullmatch(phrase)
    return (match[1], re.findall(QUOTED, match[2])) if match else ("", [phrase])


def _written(head: str, values: Sequence[str]) -> str:
    if head == "the tokens" and len(values) == 1:
        head = "the token"
    return f"{head} {', '.join(values)}".strip()
