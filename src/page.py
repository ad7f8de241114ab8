"""One self-contained HTML page of features: `python -m src.page CONTEXTS.json REPORT.html`.

The page is made from the JSON files of the stages alone and loads nothing from outside. Texts
reach it as JSON data and are shown by textContent only, so that hostile text stays text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from string import Template
from typing import Any

from src.config import small_parser
from src.feature_files import (
    CONTEXT,
    ENTRY,
    HEADER,
    LABEL,
    NUMBER,
    check,
    check_length,
    read_features,
    require,
    strongest,
)
from src.files import (
    EVAL_DIR,
    ROOT,
    error_text,
    is_stale_result,
    load_json,
    printable,
    printable_output,
    save_text,
    say,
)
from src.metric_table import PAGE, columns

ASSETS = ROOT / "assets" / "page"  # page.html is the frame of page.css, page.js and the data
HISTOGRAM_BINS = 12
MAX_CLASSES = 8  # token classes of a feature that the search finds

# No text in a <script> element may end it; U+2028 and U+2029 are line ends to old browsers.
SCRIPT_ESCAPES = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})

ROUTING = {"share": [NUMBER], "sample": {"tokens": [str], "weights": [[NUMBER]]}}
METRICS = columns(PAGE)
MEASURED_ON = {"split": str | None, "tokens": int | None}
EVALUATION = {"title": str | None} | MEASURED_ON | dict.fromkeys(METRICS, NUMBER | None)


# ------------------------------------------------------------------------------- checks of the data


def _check_routing(routing: dict[str, Any], n_sites: int) -> None:
    check(routing, ROUTING, "the routing")
    check_length(routing["share"], n_sites, "the share of the sites")
    sample = routing["sample"]
    check_length(sample["weights"], len(sample["tokens"]), "the sample of router weights")
    for row in sample["weights"]:
        check_length(row, n_sites, "a row of router weights")


# --------------------------------------------------------------------------- what the script reads


class FeatureWriter:
    """Turns the entries of latents into what the page's script reads.

    Each distinct token text is stored once, in `words`; contexts hold its number.
    Raises ValueError if an entry has values of a wrong type or lists of a wrong length.
    """

    def __init__(self, sites: list[int], reach: int, shown: int) -> None:
        self.sites = sites
        self.reach = reach
        self.shown = shown
        self.words: dict[str, int] = {}

    def feature(self, latent: str, entry: dict[str, Any], label: dict[str, Any]) -> dict[str, Any]:
        """What the page shows of one latent, from its contexts and its label."""
        name = f"latent {latent}"
        check(entry, ENTRY, name)
        check(label, LABEL, f"the label of {name}")
        by_site = entry.get("site_counts") or entry.get("decoder_norms")
        if by_site:
            check(by_site, [NUMBER], f"{name} by site")
            check_length(by_site, len(self.sites), f"{name} by site")
        result = {
            "id": latent,
            "label": label.get("description"),
            "category": label.get("category"),
            "score": label.get("score"),
            "detection": label.get("detection"),
            "fuzzing": label.get("fuzzing"),
            "max": entry["max_activation"],
            "density": entry["density"],
            "classes": list(dict.fromkeys(entry["token_class"]))[:MAX_CLASSES],
            "sites": by_site if by_site and len(self.sites) > 1 else None,
            "norms": entry.get("site_counts") is None,
            "site": self.sites[by_site.index(max(by_site))] if by_site else None,
            "histogram": _histogram(entry["sample_activations"]),
            "effect_KL": entry.get("effect_KL"),
            "contexts": [self._context(c, name) for c in strongest(entry, name)[: self.shown]],
            "others": [self._context(context, name) for context in entry["sample"]],
        }
        for key in ("promoted", "suppressed", "effect_promoted", "effect_suppressed"):
            pairs = entry.get(key, [])
            check(pairs, [[str, NUMBER]], f"{key} of {name}")
            result[key] = [[token, float(f"{value:.3g}")] for token, value in pairs]
        return result

    def _context(self, context: dict[str, Any], name: str) -> list[Any]:
        """[words, index of the active one, strength, [[index, strength], ...], site, router weight,
        document, quarter of the sample or 0]"""
        name = f"a context of {name}"
        check(context, CONTEXT, name)
        tokens = context["tokens"]
        position = context["position"]
        require(0 <= position < len(tokens), f"position {position} of {name} is outside of it")
        first = max(0, position - self.reach)
        last = position + self.reach + 1
        strengths = [
            [index - first, float(f"{value:.3g}")]
            for index, value in context["token_activations"]
            if first <= index < last
        ]
        return [
            [self.words.setdefault(token, len(self.words)) for token in tokens[first:last]],
            position - first,
            float(f"{context['activation']:.4g}"),
            strengths,
            context["layer"],
            context["router_weight"],
            context["document"],
            context.get("quarter", 0),
        ]


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


def _headline(contexts: dict[str, Any], n_shown: int) -> str:
    sites = contexts["sites"]
    language_model = Path(contexts["source_model"]).name
    last_site = f" to {sites[-1]}" if len(sites) > 1 else ""
    return (
        f"{contexts['model']} on {language_model}, sites {sites[0]}{last_site}; "
        f"{n_shown} of {contexts['total_latents']} latents with contexts, "
        f"{contexts['latent_size']} in all; "
        f"{contexts['tokens']:,} tokens, strength above {contexts['threshold']:.3g}"
    )


def page(
    contexts: dict[str, Any],
    labels: dict[str, Any],
    evaluation: list[dict[str, Any]],
    picture: bytes = b"",
    *,
    limit: int = 1000,
    reach: int = 20,
    shown: int = 10,
) -> str:
    """Return the whole page.

    limit: features at most, the strongest first. reach: tokens on each side of the active one.
    shown: strongest contexts of each feature. Raises ValueError if the contexts are damaged.
    """
    check(contexts, HEADER, "the contexts file")
    sites = contexts["sites"]
    require(bool(sites), "there are no sites")
    if contexts.get("routing"):
        _check_routing(contexts["routing"], len(sites))
    for result in evaluation:
        check(result, EVALUATION, "an evaluation")
    check(labels, {}, "the labels file")
    table = contexts["latent_context_map"]
    for latent, entry in table.items():
        check(entry, {"max_activation": NUMBER}, f"latent {latent}")
    chosen = sorted(table, key=lambda latent: -table[latent]["max_activation"])[:limit]
    writer = FeatureWriter(sites, reach, shown)
    about = {
        "title": contexts["title"],
        "line": _headline(contexts, len(chosen)),
        "sites": sites,
    }
    encoded_picture = base64.b64encode(picture).decode()
    data = {
        "about": about,
        "features": [
            writer.feature(latent, table[latent], labels.get(latent, {})) for latent in chosen
        ],
        "routing": contexts.get("routing"),
        "evaluation": evaluation,
        "metrics": METRICS,
        "picture": f"data:image/png;base64,{encoded_picture}" if picture else None,
        "words": list(writer.words),
    }
    return _fill_in(data)


def _fill_in(data: dict[str, Any]) -> str:
    """The frame with style, script and data put in. Its policy allows this one script alone."""
    frame, style, script = (
        (ASSETS / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Template(frame).substitute(
        script_hash=f"sha256-{digest}",
        style=style,
        script=script,
        data=text.translate(SCRIPT_ESCAPES),
    )


# --------------------------------------------------------------------------------- the command line


def _arguments() -> Namespace:
    parser = small_parser("src.page", __doc__.splitlines()[0])
    add = parser.add_argument
    add("contexts", type=Path, help="contexts file of apply.py")
    add("report", type=Path, help="HTML file to write")
    add("--labels", type=Path, help="labels of interpret.py (default: those beside the contexts)")
    folder = "folder of evaluation results (default: the one beside the contexts)"
    add("--eval", type=Path, help=folder)
    add("--picture", type=Path, help="comparison picture to put in")
    add("--only", default="", help="only evaluations whose name holds this")
    add("--features", type=int, default=1000, help="features at most, strongest first")
    return parser.parse_args()


def _evaluation(folder: Path, only: str, contexts: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations in a folder, without one of the same SAE from before its last training."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        if only not in path.stem:
            continue
        result = load_json(path)
        check(result, EVALUATION, str(path))
        title = result.get("title")
        if title == contexts["title"] and is_stale_result(result, contexts):
            say(
                f"{title}: was evaluated before it was trained anew and is left out; "
                "run evaluate.py again"
            )
        else:
            rows.append({key: result.get(key) for key in EVALUATION})
    return rows


@printable_output()
def main() -> None:
    args = _arguments()
    contexts, labels = read_features(args.contexts, args.labels)
    root = args.contexts.resolve().parent.parent
    evaluation = _evaluation(args.eval or root / EVAL_DIR, args.only, contexts)
    html = page(
        contexts,
        labels,
        evaluation,
        args.picture.read_bytes() if args.picture else b"",
        limit=args.features,
    )
    save_text(html, args.report)
    say(f"page: {args.report.resolve()} ({args.report.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"page: error: {printable(error_text(error))}", file=sys.stderr)
        raise SystemExit(2) from None
