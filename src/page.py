"""One self-contained HTML page of features, made from the JSON artefacts alone: `python -m src.page CONTEXTS.json REPORT.html`.

No network, no outside file; texts reach the page as JSON data and are shown by textContent only, so that hostile text stays text.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from src.files import ROOT, is_stale_result, load_json, newest, save_text

ASSETS = ROOT / "assets" / "page"  # page.css and page.js, put into the page as they are


BINS = 12  # bars of an activation histogram


class _Words:
    """Texts of tokens, each stored once: the page holds their numbers."""

    def __init__(self) -> None:
        self.number: dict[str, int] = {}

    def __call__(self, words: list[str]) -> list[int]:
        return [self.number.setdefault(word, len(self.number)) for word in words]


def _context(activation: float, one: dict[str, Any], reach: int, words: _Words) -> list[Any]:
    """[words, place of the active one, strength, [[place, strength], ...], site, router weight, document, quarter]"""
    at = one["position"]
    first, last = max(0, at - reach), at + reach + 1
    near = [
        [j - first, float(f"{value:.3g}")]
        for j, value in one["token_activations"]
        if first <= j < last
    ]
    tokens = words(one["tokens"][first:last])
    return [
        tokens,
        at - first,
        float(f"{activation:.4g}"),
        near,
        one["layer"],
        one["router_weight"],
        one["document"],
        one.get("quarter", 0),
    ]


def _histogram(values: list[float]) -> dict[str, Any] | None:
    """{"from", "to", "counts", "n"} of a sample of activations; None for fewer than two."""
    if len(values) < 2:
        return None
    low, high, counts = min(values), max(values), [0] * BINS
    for value in values:
        counts[min(BINS - 1, int(BINS * (value - low) / (high - low or 1)))] += 1
    return {"from": low, "to": high, "counts": counts, "n": len(values)}


def feature(
    latent: str,
    entry: dict[str, Any],
    label: dict[str, Any],
    sites: list[int],
    reach: int,
    shown: int,
    words: _Words,
) -> dict[str, Any]:
    """What the page shows of one latent, from its entries in the contexts and the interpretation."""
    keys = ("tokens", "position", "token_activations", "layer", "router_weight", "document")
    top = [
        _context(a, {key: entry[key][i] for key in keys}, reach, words)
        for i, a in enumerate(entry["activations"][:shown])
    ]
    by_site = entry.get("site_counts") or entry.get("decoder_norms")
    found = {
        "id": latent,
        "label": label.get("description"),
        "category": label.get("category"),
        "score": label.get("score"),
        "detection": label.get("detection"),
        "fuzzing": label.get("fuzzing"),
        "max": entry["max_activation"],
        "density": entry["density"],
        "classes": list(dict.fromkeys(entry["token_class"]))[:8],
        "sites": by_site if by_site and len(sites) > 1 else None,
        "norms": entry.get("site_counts") is None,
        "site": sites[by_site.index(max(by_site))] if by_site else None,
        "histogram": _histogram(entry["sample_activations"]),
        "effect_KL": entry.get("effect_KL"),
        "contexts": top,
        "others": [_context(one["activation"], one, reach, words) for one in entry["sample"]],
    }
    for name in ("promoted", "suppressed", "effect_promoted", "effect_suppressed"):
        found[name] = [[word, float(f"{value:.3g}")] for word, value in entry.get(name, [])]
    return found


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
    """The whole page. limit: features, the most active first; reach: tokens on each side; shown: strongest contexts of each."""
    table = contexts["latent_context_map"]
    chosen = sorted(table, key=lambda latent: -table[latent]["max_activation"])[:limit]
    sites = contexts["sites"]
    line = f"{contexts['model']} on {Path(contexts['source_model']).name}, sites {sites[0]}" + (
        f" to {sites[-1]}" if len(sites) > 1 else ""
    )
    line += f"; {len(chosen)} of {contexts['total_latents']} latents with contexts, {contexts['latent_size']} in all; "
    line += f"{contexts['tokens']:,} tokens, strength above {contexts['threshold']:.3g}"
    words = _Words()
    data = {
        "about": {"title": contexts["title"], "line": line, "sites": sites},
        "features": [
            feature(latent, table[latent], labels.get(latent, {}), sites, reach, shown, words)
            for latent in chosen
        ],
        "routing": contexts.get("routing"),
        "evaluation": evaluation,
        "picture": "data:image/png;base64," + base64.b64encode(picture).decode()
        if picture
        else None,
    }
    data["words"] = list(words.number)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, escaped in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("&", "\\u0026"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(character, escaped)  # inside <script> no text may end it
    script, style = (
        (ASSETS / name).read_text(encoding="utf-8") for name in ("page.js", "page.css")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>Features</title>'
        f'<link rel="icon" href="data:,"><style>{style}</style></head><body><header><h1>Features of a sparse autoencoder</h1>'
        '<span><button id="home" type="button">overview</button> <button id="back" type="button" aria-label="previous feature">&larr;</button> '
        '<button id="next" type="button" aria-label="next feature">&rarr;</button></span></header><main><nav>'
        '<input id="query" type="search" placeholder="search labels, tokens, numbers" aria-label="search">'
        '<p><label>order <select id="order"><option value="max">strength</option><option value="density">density</option>'
        '<option value="score">score</option><option value="tested">tested score</option><option value="site">site</option>'
        '<option value="id">number</option></select></label> <label>site <select id="site"><option value="">all</option></select></label> '
        '<small id="count"></small></p><div id="list"></div></nav><section id="view"><noscript>This page needs its script.</noscript></section>'
        f'</main><script type="application/json" id="data">{text}</script><script>{script}</script></body></html>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contexts", type=Path, help="contexts file of apply.py")
    parser.add_argument("report", type=Path, help="HTML file to write")
    parser.add_argument(
        "--labels", type=Path, help="labels of interpret.py (default: those beside the contexts)"
    )
    parser.add_argument(
        "--eval",
        type=Path,
        help="folder of evaluation results (default: the one beside the contexts)",
    )
    parser.add_argument("--picture", type=Path, help="comparison picture to put in")
    parser.add_argument("--only", default="", help="only evaluations whose name holds this")
    parser.add_argument(
        "--features", type=int, default=1000, help="features at most, strongest first"
    )
    args = parser.parse_args()
    contexts, root = load_json(args.contexts), args.contexts.resolve().parent.parent
    if not isinstance(contexts, dict) or not {"title", "latent_context_map", "sites"} <= set(
        contexts
    ):
        raise ValueError(f"{args.contexts} is no contexts file of apply.py")
    labels = args.labels or newest(root / "interpret", f"interp_{contexts['title']}.json")
    found = sorted((args.eval or root / "eval").glob("*.json"))
    evaluation = [load_json(path) for path in found if args.only in path.stem]
    for result in [
        one
        for one in evaluation
        if one.get("title") == contexts["title"] and is_stale_result(one, contexts)
    ]:
        print(
            f"{result['title']}: was evaluated before it was trained anew; left out. Run evaluate.py again"
        )
        evaluation.remove(result)
    if labels and labels.stat().st_mtime < args.contexts.stat().st_mtime:
        print(
            f"warning: {labels} is older than the contexts; where the SAE was trained anew its labels are another's: run interpret.py again"
        )
    picture = args.picture.read_bytes() if args.picture else b""
    columns = ("title", "L0", "NormMSE", "FVU", "KLDiv", "Recovered_mean", "Dead")
    evaluation = [{key: result.get(key) for key in columns} for result in evaluation]
    save_text(
        page(
            contexts, load_json(labels) if labels else {}, evaluation, picture, limit=args.features
        ),
        args.report,
    )
    print(f"page: {args.report.resolve()} ({args.report.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"page: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
