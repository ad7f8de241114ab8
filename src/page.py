"""One self-contained HTML page of features: `python -m src.page CONTEXTS.json REPORT.html`.

The page is made from the JSON files of the stages alone and loads nothing from outside. Texts
reach it as JSON data and are shown by textContent only, so that hostile text stays text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from src import names
from src.config import small_parser
from src.contexts import whole_words
from src.feature_files import (
    CONTEXT,
    ENTRY,
    ENTRY_PARTS,
    HEADER,
    HEADER_PARTS,
    LABEL,
    NUMBER,
    TEST,
    check,
    check_length,
    check_parts,
    read_features,
    require,
    strongest,
)
from src.files import (
    EVAL_DIR,
    ROOT,
    data_name,
    error_text,
    is_stale_result,
    load_json,
    printable,
    printable_output,
    save_text,
    say,
)
from src.metric_table import PAGE, columns
from src.rule_labels import BY_RULE_MARK, NO_RULE

ASSETS = ROOT / "assets" / "page"  # page.html is the frame of the style, the scripts and the data
SCRIPTS = ("elements.js", "list.js", "feature.js", "overview.js", "page.js")  # one after the other
# Red, green, blue: viridis without its darkest and its lightest end.
SITE_COLOURS = (
    (84, 56, 150),
    (49, 104, 142),
    (33, 145, 140),
    (80, 190, 100),
    (190, 205, 40),
)
HISTOGRAM_BINS = 12
DENSITY_BINS = 4  # of the histogram of densities, for each power of ten
MAX_CLASSES = 8  # token classes of a feature that the search finds
MAX_FEATURES = 5000  # on a page: 10 MB, with ten contexts and a sample of twelve each

# No text in a <script> element may end it; U+2028 and U+2029 are line ends to old browsers.
SCRIPT_ESCAPES = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})

TOKEN_LISTS = ("promoted", "suppressed", "effect_promoted", "effect_suppressed")
ROUTING = {"share": [NUMBER], "sample": {"tokens": [str], "weights": [[NUMBER]]}}
METRICS = columns(PAGE)
MEASURED_ON = {"split": str | None, "tokens": int | None}
EVALUATION = {"title": str | None} | MEASURED_ON | dict.fromkeys(METRICS, NUMBER | None)


# ------------------------------------------------------------------------------- checks of the data


def _check_header(contexts: dict[str, Any]) -> None:
    check(contexts, HEADER, "the contexts file")
    check_parts(contexts, HEADER_PARTS, "the contexts file")
    n_sites = len(contexts["sites"])
    require(n_sites > 0, "there are no sites")
    n_tokens = None
    if contexts.get("sample"):
        sample = contexts["sample"]
        n_tokens = len(sample["tokens"])
        check_length(sample["strongest"], n_tokens, "the sample of strongest latents")
    if contexts.get("routing"):
        _check_routing(contexts["routing"], n_sites, n_tokens)


def _check_routing(routing: dict[str, Any], n_sites: int, n_tokens: int | None) -> None:
    check(routing, ROUTING, "the routing")
    check_length(routing["share"], n_sites, "the share of the sites")
    sample = routing["sample"]
    if n_tokens is None:
        n_tokens = len(sample["tokens"])
    check_length(sample["weights"], n_tokens, "the sample of router weights")
    for row in sample["weights"]:
        check_length(row, n_sites, "a row of router weights")


# --------------------------------------------------------------------------- what the script reads


def _short(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")


def site_colour(site: int, first: int, last: int) -> list[int]:
    """Return red, green and blue of a site among those from first to last.

    The map grows evenly in lightness, for readers of all kinds of colour vision.
    """
    place = (len(SITE_COLOURS) - 1) * (site - first) / max(1, last - first)
    index = min(len(SITE_COLOURS) - 2, int(place))
    pairs = zip(SITE_COLOURS[index], SITE_COLOURS[index + 1], strict=True)
    return [round(low + (place - index) * (high - low)) for low, high in pairs]


def site_colours(sites: Sequence[int]) -> dict[str, list[int]]:
    """Return {site: its colour} on one scale."""
    return {str(site): site_colour(site, min(sites), max(sites)) for site in sites}


class Passages:
    """The tokens of all contexts, each place of the text once.

    `words` numbers the distinct token texts; `numbers` is the text of all passages, one after the
    other. A context is then an index into it and a length.
    """

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.numbers: list[int] = []
        self._index: dict[tuple[int, int], int] = {}  # of the token at (row, position)

    def word(self, text: str) -> int:
        return self.words.setdefault(text, len(self.words))

    def join(self, windows: list[tuple[int, int, list[str]]]) -> None:
        """Take in windows (row, position of the first token, tokens) that may overlap."""
        windows.sort(key=lambda window: window[:2])
        row, end = -1, 0
        for window_row, start, tokens in windows:
            overlap = end - start if window_row == row and start <= end else 0
            for offset in range(max(0, overlap), len(tokens)):
                self._index[window_row, start + offset] = len(self.numbers)
                self.numbers.append(self.word(tokens[offset]))
            if window_row != row or start + len(tokens) > end:
                row, end = window_row, start + len(tokens)

    def find(self, row: int | None, start: int | None, tokens: list[str]) -> int:
        """Return the index of a window. One that no passage holds becomes a passage."""
        numbers = [self.word(token) for token in tokens]
        index = self._index.get((row, start), len(self.numbers))
        if self.numbers[index : index + len(numbers)] != numbers:
            index = len(self.numbers)
            self.numbers += numbers
        return index


class FeatureWriter:
    """Turns the entries of latents into what the page's script reads.

    Raises ValueError if an entry has values of a wrong type or lists of a wrong length.
    """

    def __init__(self, sites: list[int], shown: int) -> None:
        self.sites = sites
        self.shown = shown
        self.passages = Passages()

    def features(
        self, table: dict[str, Any], labels: dict[str, Any], chosen: list[str]
    ) -> list[dict[str, Any]]:
        """What the page shows of the chosen latents, from their contexts and their labels."""
        contexts = {latent: self._contexts(table[latent], f"latent {latent}") for latent in chosen}
        self.passages.join(
            [
                (context["row"], context["start"], context["tokens"])
                for columns in contexts.values()
                for context in itertools.chain(*columns)
                if context.get("row") is not None and context.get("start") is not None
            ]
        )
        return [
            self._feature(latent, table[latent], labels.get(latent, {}), contexts[latent])
            for latent in chosen
        ]

    def _contexts(
        self, entry: dict[str, Any], name: str
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(the strongest contexts, the sample) of an entry; each without cut words."""
        check(entry, ENTRY, name)
        best = strongest(entry, name)[: self.shown]
        name = f"a context of {name}"
        return (
            [_without_cut_words(context, name) for context in best],
            [_without_cut_words(context, name) for context in entry["sample"]],
        )

    def _feature(
        self,
        latent: str,
        entry: dict[str, Any],
        label: dict[str, Any],
        contexts: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    ) -> dict[str, Any]:
        name = f"latent {latent}"
        check_parts(entry, ENTRY_PARTS, name)
        best, sample = contexts
        return (
            _label(label, f"the label of {name}")
            | self._by_site(entry, name)
            | self._token_lists(entry, name)
            | {
                "id": latent,
                "max": entry["max_activation"],
                "density": _short(entry["density"]),
                "classes": list(dict.fromkeys(entry["token_class"]))[:MAX_CLASSES],
                "histogram": _histogram(entry["sample_activations"]),
                "logits": entry.get("logit_histogram"),
                "nearest": entry.get("nearest") or [],
                "partners": entry.get("partners") or [],
                "effect_KL": entry.get("effect_KL"),
                "contexts": [self._written(context) for context in best],
                "others": [self._written(context) for context in sample],
            }
        )

    def _by_site(self, entry: dict[str, Any], name: str) -> dict[str, Any]:
        """Activations, mean strengths and decoder norms by site, and the site of most."""
        for key in ("site_counts", "site_strengths", "decoder_norms"):
            if entry.get(key) is not None:
                check_length(entry[key], len(self.sites), f"{name} by site")
        counts, norms = entry.get("site_counts"), entry.get("decoder_norms")
        by_site = counts or norms
        result = {"site": self.sites[by_site.index(max(by_site))] if by_site else None}
        if len(self.sites) > 1:
            # Strengths of a code that belongs to all sites have none of their own.
            strengths = (entry.get("site_strengths") if counts else None) or []
            result |= {"counts": counts, "norms": norms}
            result["strengths"] = [_short(value) for value in strengths] or None
        return result

    def _token_lists(self, entry: dict[str, Any], name: str) -> dict[str, Any]:
        """The tokens that a latent promotes and suppresses, as [number of the word, value]."""
        result = {}
        for key in TOKEN_LISTS:
            pairs = entry.get(key, [])
            check(pairs, [[str, NUMBER]], f"{key} of {name}")
            result[key] = [[self.passages.word(token), _short(value)] for token, value in pairs]
        return result

    def _written(self, context: dict[str, Any]) -> list[Any]:
        """[index of its first token in the passages, tokens, index of the active one,
        [index, strength, index, strength, ...], site, router weight, quarter or 0]

        The active token comes first among the strengths; the others have two digits.
        """
        tokens, position = context["tokens"], context["position"]
        strengths = [position, _short(context["activation"], 4)]
        for index, value in context["token_activations"]:
            if 0 <= index < len(tokens) and index != position:
                strengths += [index, _short(value, 2)]
        return [
            self.passages.find(context.get("row"), context.get("start"), tokens),
            len(tokens),
            position,
            strengths,
            context["layer"],
            _short(context["router_weight"]),
            context.get("quarter", 0),
        ]


def _without_cut_words(context: dict[str, Any], name: str) -> dict[str, Any]:
    """The context without a word that its window cuts at either end."""
    check(context, CONTEXT, name)
    tokens, position = context["tokens"], context["position"]
    require(0 <= position < len(tokens), f"position {position} of {name} is outside of it")
    first, end = whole_words(tokens, position)
    start = context.get("start")
    return context | {
        "tokens": tokens[first:end],
        "position": position - first,
        "token_activations": [
            [index - first, value] for index, value in context["token_activations"]
        ],
        "start": None if start is None else start + first,
    }


def _label(label: dict[str, Any], name: str) -> dict[str, Any]:
    """What the page shows of a label. A score that no rule stands behind is left out."""
    check(label, LABEL, name)
    check_parts(label, {"detection": TEST, "fuzzing": TEST}, name)
    text = label.get("description")
    by_rule = bool(text) and text.startswith(BY_RULE_MARK)
    if by_rule:
        text = text.removeprefix(BY_RULE_MARK).strip()
    without_rule = by_rule and text.startswith(NO_RULE)
    short, n_more = names.short_label(text or "")
    return {
        "label": text,
        "short": None if short == (text or "") else short,
        "more": n_more,
        "engine": "by rule" if by_rule else label.get("engine"),
        "category": None if without_rule else label.get("category"),
        "score": None if without_rule else label.get("score"),
        "ruled": not without_rule,
        "detection": _tested(label.get("detection")),
        "fuzzing": _tested(label.get("fuzzing")),
    }


def _tested(test: dict[str, Any] | None) -> list[float] | None:
    """[balanced accuracy, number of texts] of a test that could be made."""
    if test is None or test.get("balanced_accuracy") is None:
        return None
    return [_short(test["balanced_accuracy"]), test["n"]]


def _histogram(values: list[float]) -> dict[str, Any] | None:
    """{"from", "to", "counts", "n"} of a sample of activations; None for fewer than two."""
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    counts = [0] * HISTOGRAM_BINS
    for value in values:
        index = int(HISTOGRAM_BINS * (value - low) / (high - low or 1))
        counts[min(HISTOGRAM_BINS - 1, index)] += 1
    return {"from": low, "to": high, "counts": counts, "n": len(values)}


def _density_histogram(contexts: dict[str, Any]) -> dict[str, Any] | None:
    """{"from", "counts", "silent"} of the densities of all latents, in quarters of a power of ten.

    "from" is the number of the first bin: bin i begins at 10^(i/4).
    """
    firings, codes = contexts.get("firings"), contexts.get("codes")
    if not firings or not codes:
        return None
    bins = Counter(
        math.floor(DENSITY_BINS * math.log10(count / codes)) for count in firings if count > 0
    )
    first = min(bins, default=0)
    return {
        "from": first,
        "counts": [bins[index] for index in range(first, max(bins, default=0) + 1)],
        "silent": sum(count <= 0 for count in firings),
    }


def _about(contexts: dict[str, Any], n_shown: int) -> dict[str, Any]:
    """The heading and the first line of the page."""
    sites = contexts["sites"]
    where = f"site {sites[0]}" if len(sites) == 1 else f"sites {sites[0]} to {sites[-1]}"
    text = data_name(contexts["data_path"]) if contexts.get("data_path") else "text"
    split = f", split {contexts['split']}" if contexts.get("split") else ""
    facts = (
        f"{contexts['model']}, {where}",
        f"{n_shown:,} of {contexts['total_latents']:,} features with contexts, "
        f"{contexts['latent_size']:,} latents in all",
        f"{contexts['tokens']:,} tokens of {text}{split}",
    )
    if contexts["threshold"]:
        facts += (f"strength above {contexts['threshold']:.3g}",)
    return {
        "title": contexts["title"],
        "language_model": names.language_model(contexts["source_model"]),
        "text": text,
        "line": "; ".join(facts),
        "sites": sites,
        "colours": site_colours(sites),
    }


def page_data(
    contexts: dict[str, Any],
    labels: dict[str, Any],
    evaluation: list[dict[str, Any]],
    picture: bytes = b"",
    *,
    limit: int = MAX_FEATURES,
    shown: int = 10,
) -> dict[str, Any]:
    """Return what the page's script reads. The arguments are those of page()."""
    _check_header(contexts)
    for result in evaluation:
        check(result, EVALUATION, "an evaluation")
    check(labels, {}, "the labels file")
    table = contexts["latent_context_map"]
    for latent, entry in table.items():
        check(entry, {"max_activation": NUMBER}, f"latent {latent}")
    chosen = sorted(table, key=lambda latent: -table[latent]["max_activation"])[:limit]
    writer = FeatureWriter(contexts["sites"], shown)
    encoded_picture = base64.b64encode(picture).decode()
    return {
        "about": _about(contexts, len(chosen)),
        "features": writer.features(table, labels, chosen),
        "densities": _density_histogram(contexts),
        "sample": contexts.get("sample"),
        "routing": contexts.get("routing"),
        "evaluation": evaluation,
        "metrics": METRICS,
        "picture": f"data:image/png;base64,{encoded_picture}" if picture else None,
        "words": list(writer.passages.words),
        "passages": writer.passages.numbers,
    }


def page(
    contexts: dict[str, Any],
    labels: dict[str, Any],
    evaluation: list[dict[str, Any]],
    picture: bytes = b"",
    *,
    limit: int = MAX_FEATURES,
    shown: int = 10,
) -> str:
    """Return the whole page.

    limit: features at most, the strongest first. shown: strongest contexts of each feature.
    Raises ValueError if the contexts are damaged.
    """
    data = page_data(contexts, labels, evaluation, picture, limit=limit, shown=shown)
    return fill_in(data)


def fill_in(data: dict[str, Any], scripts: Sequence[str] = SCRIPTS, connect: str = "'none'") -> str:
    """Return the frame with style, scripts and data put in.

    Its policy allows these scripts alone, and requests to `connect` alone.
    """
    frame, style, *parts = (
        (ASSETS / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *scripts)
    )
    script = "".join(parts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The names of the fields stand once, which saves a tenth of a large page.
    keys = list(data["features"][0]) if data["features"] else []
    rows = [[feature[key] for key in keys] for feature in data["features"]]
    written = data | {"features": {"keys": keys, "rows": rows}}
    text = json.dumps(written, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    about = data["about"]
    title = f"{about['title']} on {about['language_model']}, {about['text']}"
    return Template(frame).substitute(
        script_hash=f"sha256-{digest}",
        connect=connect,
        title=html.escape(printable(title)),
        style=style,
        script=script,
        data=text.translate(SCRIPT_ESCAPES),
    )


# --------------------------------------------------------------------------------- the command line


def _arguments() -> Namespace:
    parser = small_parser("src.page", __doc__)
    add = parser.add_argument
    add("contexts", type=Path, help="contexts file of apply.py")
    add("report", type=Path, help="HTML file to write")
    add("--labels", type=Path, help="labels of interpret.py (default: those beside the contexts)")
    folder = "folder of evaluation results (default: the one beside the contexts)"
    add("--eval", type=Path, help=folder)
    add("--picture", type=Path, help="comparison picture to put in")
    add("--only", default="", help="only evaluations whose name holds this")
    limit = f"features at most, strongest first (default: {MAX_FEATURES:,})"
    add("--features", type=int, default=MAX_FEATURES, help=limit)
    return parser.parse_args()


def _evaluation(folder: Path, only: str, contexts: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations in a folder, by site, without one of the same SAE from before its last
    training."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        if only not in path.stem:
            continue
        result = load_json(path)
        check(result, EVALUATION, str(path))
        check_parts(result, {"sites": [int]}, str(path))
        title = result.get("title")
        if title == contexts["title"] and is_stale_result(result, contexts):
            say(
                f"{title}: was evaluated before it was trained anew and is left out; "
                "run evaluate.py again"
            )
        else:
            rows.append(result)
    rows.sort(key=lambda result: (len(result.get("sites") or ()), result.get("sites") or ()))
    return [{key: result.get(key) for key in EVALUATION} for result in rows]


@printable_output()
def main() -> None:
    args = _arguments()
    contexts, labels = read_features(args.contexts, args.labels)
    root = args.contexts.resolve().parent.parent
    evaluation = _evaluation(args.eval or root / EVAL_DIR, args.only, contexts)
    text = page(
        contexts,
        labels,
        evaluation,
        args.picture.read_bytes() if args.picture else b"",
        limit=args.features,
    )
    save_text(text, args.report)
    say(f"page: {args.report.resolve()} ({args.report.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"page: error: {printable(error_text(error))}", file=sys.stderr)
        raise SystemExit(2) from None
