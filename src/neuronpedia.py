"""Features in the layout that Neuronpedia takes: bodies of its POST /api/feature/upload-batch.

They come from contexts and labels alone. A source there is one layer of a language model, so that
an SAE of several sites fills one source for each of them. Works without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from src.feature_files import CONTEXT, ENTRY, HEADER, NUMBER, check, strongest

# What its schema allows.
MAX_FEATURES = 128  # in one body
MAX_TOKENS = 1024  # of one activation
MAX_LOGITS = 20
MAX_TEXT = 512  # characters of an explanation
MAX_SET_NAME = 32  # what it asks for


def model_id(source_model: str) -> str:
    """A language model's name as Neuronpedia may have it: small letters, digits, dots, dashes."""
    return _slug(Path(source_model).name)


def set_name(title: str) -> str:
    """The name of a source set; a source's is the number of the block, a dash and this."""
    return _slug(title)[:MAX_SET_NAME].strip("-")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "unnamed"


def bodies(
    contexts: dict[str, Any], labels: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (source, body) for at most MAX_FEATURES features each, the features in their order.

    Raises ValueError for damaged contexts, and for codes that belong to no one site.
    """
    check(contexts, HEADER, "the contexts file")
    sites = contexts["sites"]
    by_site: dict[int, list[dict[str, Any]]] = {site: [] for site in sites}
    table = contexts["latent_context_map"]
    for latent in sorted(table, key=int):
        for site, feature in _features(latent, table[latent], labels.get(latent, {}), sites):
            by_site[site].append(feature)
    about = {"modelId": model_id(contexts["source_model"])}
    for site, features in by_site.items():
        source = f"{site - 1}-{set_name(contexts['title'])}"
        for start in range(0, len(features), MAX_FEATURES):
            part = features[start : start + MAX_FEATURES]
            yield source, about | {"source": source, "features": part}


def _features(
    latent: str, entry: dict[str, Any], label: Mapping[str, Any], sites: list[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (site, feature) for each site at which a latent has contexts."""
    name = f"latent {latent}"
    check(entry, ENTRY, name)
    contexts = [*strongest(entry, name), *entry["sample"]]
    for context in contexts:
        check(context, CONTEXT, f"a context of {name}")
        if context["layer"] not in sites:
            raise ValueError(
                f"its codes are read from sites {', '.join(map(str, sites))} together, and a "
                "source of Neuronpedia belongs to one layer"
            )
    text = label.get("description")
    common = {
        "index": int(latent),
        "topLogits": _logits(entry, "promoted", 1, name),
        "bottomLogits": _logits(entry, "suppressed", -1, name),
        "explanations": [],
    }
    if text:
        explanation = {"text": text[:MAX_TEXT], "methodName": None, "modelName": None}
        common["explanations"] = [explanation]
    for site in sites:
        here = [context for context in contexts if context["layer"] == site]
        if here:
            density = entry["density"] * _share(entry, sites.index(site))
            activations = [_activation(context) for context in here]
            yield site, common | {"density": min(1.0, density), "activations": activations}


def _share(entry: dict[str, Any], index: int) -> float:
    """The share of a latent's firings at one site; 1 where all its codes are of one site."""
    counts = entry.get("site_counts") or []
    return counts[index] / max(1, sum(counts)) if len(counts) > 1 else 1.0


def _logits(entry: dict[str, Any], key: str, sign: int, name: str) -> list[dict[str, Any]] | None:
    pairs = entry.get(key)
    if not pairs:
        return None
    check(pairs, [[str, NUMBER]], f"{key} of {name}")
    shown = [(token, value) for token, value in pairs if token][:MAX_LOGITS]
    return [{"token": token, "value": sign * abs(value)} for token, value in shown]


def _activation(context: dict[str, Any]) -> dict[str, Any]:
    """The tokens of a context and their strengths. Its schema takes no empty token.

    A character over several tokens stands whole at the first; the others are joined to it.
    """
    strengths = dict.fromkeys(range(len(context["tokens"])), 0.0)
    strengths |= {index: float(value) for index, value in context["token_activations"]}
    strengths[context["position"]] = float(context["activation"])
    tokens: list[str] = []
    values: list[float] = []
    for index, token in enumerate(context["tokens"]):
        if token or not tokens:
            tokens.append(token or " ")
            values.append(strengths[index])
        else:
            values[-1] = max(values[-1], strengths[index], key=abs)
    first = max(0, min(context["position"] - MAX_TOKENS // 2, len(tokens) - MAX_TOKENS))
    window = slice(first, first + MAX_TOKENS)
    quantiles = dict.fromkeys(("quantileMax", "quantileMin", "quantileFraction"))
    return {"tokens": tokens[window], "values": values[window]} | quantiles
