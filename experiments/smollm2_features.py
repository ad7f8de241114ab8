"""What a planted world copies from a language model: rates, norms and lives of its latents.

    python -m experiments.smollm2_features outputs/SAE_models --model_path data/model \
      --data_path data/eval.jsonl --tokens 8192

It reads a RouteSAE and the TopKs at its sites from one folder. The figures are constants of
experiments/planted_world.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src import checkpoint, lm
from src.config import small_parser
from src.files import load_json
from src.sae import SAE

ROW = 256  # tokens read at once
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
PROFILE = 0.5  # a latent lives where its rate is at least this share of its largest
WITHIN = 0.9  # share of the child's tokens at which a parent fires too
STEPS = (1, 3)  # sites between the states that are compared
MIN_FIRED = 20  # tokens; rarer latents have no parent that could be told from chance


def read(path: Path, model_path: str, n_tokens: int, sites: list[int]) -> dict[int, Tensor]:
    """Return the states of the first tokens of a text. {site: [N,D]}"""
    tokenizer, model = lm.get_language_model(model_path, "cpu")
    ids: list[int] = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            ids += tokenizer(json.loads(line)["text"])["input_ids"]
            if len(ids) >= n_tokens:
                break
    rows = torch.tensor(ids[: len(ids) // ROW * ROW]).view(-1, ROW)[: n_tokens // ROW]
    parts = [lm.read_sites(model, row[None], sites) for row in rows]
    # The first token of a row has a norm of its own.
    return {site: torch.cat([part[site][0, 1:].float() for part in parts]) for site in sites}


def of_rates(fired: Tensor) -> dict[str, Any]:
    """Return the quantiles of the latents' rates and the exponent of their fall by rank. [N,F]"""
    rates = fired.float().mean(0).sort(descending=True).values
    ranks = torch.arange(1, len(rates) + 1)
    head = slice(3, len(rates) // 4)  # three latents that fire nearly always are no feature
    x, y = ranks[head].log(), rates[head].clamp_min(1e-9).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    quantiles = torch.quantile(rates, torch.tensor(QUANTILES)).tolist()
    return {"rates": dict(zip(QUANTILES, quantiles, strict=True)), "exponent": -float(slope)}


def of_parents(fired: Tensor) -> float:
    """Return the share of latents that fire within a latent at least twice as frequent."""
    count = fired.float().sum(0)
    both = fired.float().T @ fired.float()
    more = count[None] >= 2 * count[:, None]
    # One that fires at half of all tokens is a parent of too many.
    candidates = more & (count[None] < len(fired) / 2)
    is_child = ((both >= WITHIN * count[:, None]) & candidates).any(1)
    return float(is_child[count >= MIN_FIRED].float().mean())


def of_lives(sae: SAE, hidden: dict[int, Tensor]) -> dict[str, Any]:
    """Return where the latents of one dictionary live, if every state is coded at every site."""
    x = sae.gather(hidden)  # [N,L,D]
    sae.routing = "random"
    rates = []
    for index in range(x.shape[1]):
        sae.router.sample = lambda keys, _seed, index=index: torch.full_like(keys, index)
        rates.append(sae.autoencode(x).fired / len(x))
    rates = torch.stack(rates)  # [L,F]
    rates = rates[:, rates.amax(0) * len(x) >= MIN_FIRED]
    alive = rates >= PROFILE * rates.amax(0)
    first = alive.int().argmax(0)
    last = len(alive) - 1 - alive.flip(0).int().argmax(0)
    ends = F.one_hot(last, len(alive)).sum(0)[:-1]
    sites = torch.arange(len(alive))[:, None]
    spans = ((first <= sites) & (sites <= last)).sum(1)[:-1]
    return {
        "latents": rates.shape[1],
        "born_first": float((first == 0).float().mean()),
        "born": F.one_hot(first, len(alive)).float().mean(0).tolist(),
        "dropped": float(ends.sum() / spans.sum()),  # a site
        "span": float((last - first + 1).float().mean()),
    }


def of_site(site: int, sae: SAE, hidden: dict[int, Tensor]) -> dict[str, Any]:
    """Return what the TopK of one site and its states say."""
    states = hidden[site]
    x = sae.gather(hidden)
    fired = sae.autoencode(x).latents != 0
    decoder = F.normalize(sae.contribution(torch.eye(sae.latent_size)), dim=1)
    nearest = (decoder @ decoder.T).fill_diagonal_(0).abs().amax(1)
    result = {
        "site": site,
        "norm": float(states.norm(dim=1).median()),
        "offset": float(x.mean(0).norm() / x.norm(dim=1).mean()),
        "superposition": float(nearest.mean()),
        "children": of_parents(fired),
    }
    for step in STEPS:
        if site + step in hidden:
            after = sae.standardise(hidden[site + step])[0]
            pair = F.cosine_similarity(x - x.mean(0), after - after.mean(0))
            result[f"cosine_{step}"] = float(pair.median())  # of centred states
    return result | of_rates(fired)


@torch.no_grad()
def main() -> None:
    parser = small_parser("experiments.smollm2_features", __doc__)
    parser.add_argument("saes", type=Path, help="folder of TopK SAEs, one a site")
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--data_path", type=Path, required=True, help="a JSONL file of texts")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    recipes = [load_json(path) for path in args.saes.glob("*.json")]
    saes = [checkpoint.load(args.saes / f"{recipe['title']}.pt")[0] for recipe in recipes]
    routed = next(sae for sae in saes if sae.name == "RouteSAE" and sae.routing == "hard")
    alone = {sae.sites()[0]: sae for sae in saes if sae.name == "TopK"}
    hidden = read(args.data_path, args.model_path, args.tokens, routed.sites())
    print(json.dumps(of_lives(routed, hidden)), flush=True)
    for site in sorted(alone):
        print(json.dumps(of_site(site, alone[site], hidden)), flush=True)


if __name__ == "__main__":
    main()
