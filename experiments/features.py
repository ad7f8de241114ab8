"""Where features live: twins at other sites, partners in other seeds, the sites that drive them.

    python -m experiments.features outputs/SAE_models/*.pt
    python -m experiments.features outputs/SAE_models/Crosscoder_*.pt --max_tokens 50k

All options of `python evaluate.py` that concern the language model and the text hold here too. The
results are in OUTPUT_DIR/features.json.

| measure | of | meaning |
|---|---|---|
| twins | SAEs of one site each | share of the latents with a twin at another site: cosine > 0.9 |
| same index | the same | share of these twins that have the number of their latent |
| matched | two seeds of one SAE | share of the latents whose partner has a cosine > 0.7 |
| driving sites | a code over sites | sites whose states drive a latent, 1 to L |
| written sites | the same | sites at which its decoder writes, 1 to L |

SAEs that began with the same seed have the same first decoder, so that latents that hardly learned
are twins at once. They show in `same index`; another seed for each site avoids them.

N tokens, L sites, D hidden, F latents.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from experiments import exit_code
from src import checkpoint, config, demo, hooks
from src.files import save_json
from src.probing import require_sklearn
from src.sae import SAE
from src.sparse import dense

TWIN = 0.9  # cosine from which latents of two sites are twins
MATCHED = 0.7  # cosine from which partners of two seeds are the same feature (arXiv:2501.16615)
CHUNK = 2048  # latents compared with all others at one time
BINS = 20  # of the histogram of cosines, from 0 to 1
MIN_ACTIVE = 20  # tokens on which a latent must be active to be said to be driven
NOT_THE_SAME = ("seed", "tag", "output_dir", "device")  # options in which two seeds may differ


# ----------------------------------------------------------------------------------- directions


@torch.no_grad()
def directions(sae: SAE) -> Tensor:
    """Return what each latent adds, at all sites of one decoder side by side, at norm 1. [F,..]"""
    added = []
    for start in range(0, sae.latent_size, CHUNK):
        one_hot = torch.eye(sae.latent_size)[start : start + CHUNK]
        added.append(sae.contribution(one_hot).flatten(1))
    return F.normalize(torch.cat(added), dim=1)


def nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest cosine of each row of a with a row of b, and which it is. [F] and [F]"""
    best = [(chunk @ b.T).max(1) for chunk in a.split(CHUNK)]
    return torch.cat([each.values for each in best]), torch.cat([each.indices for each in best])


def twins(by_site: dict[int, Tensor]) -> dict[str, Any]:
    """Return the redundancy of dictionaries of single sites. {site: directions [F,D]}

    The histogram and mean_cosine are of each latent's largest cosine with one of another site.
    """
    cosine = {site: torch.full((len(rows),), -1.0) for site, rows in by_site.items()}
    index = {site: torch.full((len(rows),), -1) for site, rows in by_site.items()}
    pairs = list(itertools.permutations(by_site, 2))
    for site, other in tqdm(pairs, "twins", unit=" pairs of sites", mininterval=1):
        value, which = nearest(by_site[site], by_site[other])
        closer = value > cosine[site]
        cosine[site] = torch.where(closer, value, cosine[site])
        index[site] = torch.where(closer, which, index[site])
    every = torch.cat(list(cosine.values()))
    is_twin = every > TWIN
    own = torch.cat([torch.arange(len(rows)) for rows in by_site.values()])
    same = torch.cat(list(index.values())) == own
    counts = torch.histc(every.clamp(0, 1), BINS, 0, 1).int().tolist()
    return {
        "twins": float(is_twin.float().mean()),
        "same_index": float(same[is_twin].float().mean()) if is_twin.any() else 0.0,
        "mean_cosine": float(every.mean()),
        "twins_by_site": {site: float((of > TWIN).float().mean()) for site, of in cosine.items()},
        "histogram": {"edges": [i / BINS for i in range(BINS + 1)], "latents": counts},
    }


def matching(a: Tensor, b: Tensor) -> dict[str, float]:
    """Return how well two dictionaries match one to one. [F,..] and [F,..]

    The partners are those of the largest sum of cosines (the Hungarian method).
    """
    from scipy.optimize import linear_sum_assignment

    cosines = a @ b.T
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    partner = cosines[torch.from_numpy(rows), torch.from_numpy(columns)]
    return {
        "matched": float((partner > MATCHED).float().mean()),
        "mean_cosine": float(partner.mean()),
    }


# ------------------------------------------------------------------------------- sites of a latent


def participation(weights: Tensor) -> Tensor:
    """Return over how many sites each latent is spread: 1 for one site, L for all. [L,F] -> [F]

    It is (sum |w|)^2 / sum w^2; 0 where all weights are 0.
    """
    total = weights.abs().sum(0).square()
    return total / weights.square().sum(0).clamp_min(1e-30)


class Drive:
    """What the states of each site add to the activations of the latents of a shared code.

    For each latent and site it is the mean over the tokens on which the latent is active, less the
    mean over all tokens: a constant part belongs to the bias and drives nothing.
    """

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.n_tokens = 0
        shape = (len(sae.sites()), sae.latent_size)
        self.total = torch.zeros(shape, dtype=torch.double)
        self.total_active = torch.zeros(shape, dtype=torch.double)
        self.n_active = torch.zeros(sae.latent_size, dtype=torch.double)

    def update(self, x: Tensor) -> None:
        """Take in standardised states [N,L,D]."""
        is_active = dense(self.sae.autoencode(x).code) != 0
        self.n_tokens += len(x)
        self.n_active += is_active.sum(0).cpu()
        for index in range(len(self.sae.sites())):
            added = self.sae.site_drive(index, x)
            self.total[index] += added.sum(0).cpu()
            self.total_active[index] += (added * is_active).sum(0).cpu()

    def means(self) -> Tensor:
        """Return what each site adds to each latent that was active often enough. [L,n]"""
        often = self.n_active >= MIN_ACTIVE
        active = self.total_active[:, often] / self.n_active[often]
        return active - self.total[:, often] / self.n_tokens


def spread(sites: Tensor) -> dict[str, float]:
    """Return the mean and the quartiles of a number of sites. [n]"""
    low, middle, high = torch.quantile(sites.float(), torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {"mean": float(sites.mean()), "quartiles": [low, middle, high]}


@torch.no_grad()
def driving_sites(sae: SAE, inputs: Iterator[Tensor]) -> dict[str, Any]:
    """Return over how many sites the latents of a shared code are spread, read and written."""
    drive = Drive(sae)
    for x in inputs:
        drive.update(x)
    means = drive.means()
    if not means.shape[1]:
        return {"sites": len(sae.sites()), "latents": 0, "tokens": drive.n_tokens}
    often = (drive.n_active >= MIN_ACTIVE).to(sae.site_profile().device)
    return {
        "sites": len(sae.sites()),
        "latents": means.shape[1],
        "tokens": drive.n_tokens,
        "driving sites": spread(participation(means)),
        "written sites": spread(participation(sae.site_profile()[:, often])),
    }


# -------------------------------------------------------------------------------- the experiment


class Opened(NamedTuple):
    """A checkpoint."""

    title: str
    sae: SAE
    recipe: dict[str, Any]

    def key(self) -> str:
        """Return what two seeds of one SAE have in common.

        An option without a value is left out: an older checkpoint may not know it.
        """
        values = self.recipe.get("options", {}) | self.recipe["config"]
        kept = {
            key: value
            for key, value in values.items()
            if key not in NOT_THE_SAME and value is not None
        }
        return repr((self.recipe["model"], sorted(kept.items())))


def seed_pairs(opened: Sequence[Opened]) -> list[tuple[Opened, Opened]]:
    """Return the pairs that differ in their seed alone."""
    pairs = []
    for one, other in itertools.combinations(opened, 2):
        if one.key() == other.key() and one.recipe.get("seed") != other.recipe.get("seed"):
            pairs.append((one, other))
    return pairs


def single_sites(opened: Sequence[Opened]) -> dict[str, dict[int, SAE]]:
    """Return {model and size: {site: SAE}} of the SAEs of one site; at each site the first."""
    groups: dict[str, dict[int, SAE]] = {}
    for each in opened:
        name = f"{each.recipe['model']} of {each.sae.latent_size:,} latents"
        if len(each.sae.sites()) == 1:
            groups.setdefault(name, {}).setdefault(each.sae.sites()[0], each.sae)
    return {name: group for name, group in groups.items() if len(group) > 1}


def inputs_of(cfg: Any, opened: Sequence[Opened], sae: SAE) -> Iterator[Tensor]:
    """Yield the standardised states [N,L,D] of the text that is asked for, batch by batch."""
    pairs = [(each.sae, each.recipe) for each in opened]
    tokenizer, model = hooks.open_language_model(cfg, pairs)
    rows = demo.open_rows(cfg, tokenizer)
    n_batches = -(-len(rows) // cfg.batch_size)
    batches = rows.batches(cfg.batch_size)
    for batch in tqdm(batches, "driving sites", n_batches, unit=" batches", mininterval=1):
        hidden = hooks.read(model, batch.to(cfg.device), sae.sites())
        yield sae.gather({site: state.float() for site, state in hidden.items()})


def measure(cfg: Any) -> dict[str, Any]:
    """Return all that can be said of the checkpoints of a parsed command line."""
    saes = checkpoint.open_all(cfg)
    opened = [Opened(recipe["title"], sae, recipe) for sae, recipe in saes]
    results: dict[str, Any] = {}
    for name, group in single_sites(opened).items():
        by_site = {site: directions(sae) for site, sae in sorted(group.items())}
        results[f"{name} at {len(by_site)} sites"] = twins(by_site)
    for one, other in seed_pairs(opened):
        name = f"{one.title} and {other.title}"
        results[name] = matching(directions(one.sae), directions(other.sae))
    demo.use_demo_defaults(cfg)
    config.complete(cfg)
    for each in opened:
        if each.sae.site_profile() is not None:
            results[each.title] = driving_sites(each.sae, inputs_of(cfg, opened, each.sae))
    return results


def summary(result: dict[str, Any]) -> str:
    """Return the numbers of a result in one line; of a distribution its mean."""
    parts = []
    for name, value in result.items():
        if isinstance(value, dict):
            value = value.get("mean")
        if value is not None:
            parts.append(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3f}")
    return ", ".join(parts)


def main() -> None:
    parser = config.small_parser("experiments.features", __doc__)
    parser.epilog = "Further options are those of evaluate.py."
    parser.add_argument("SAE", nargs="*", help="checkpoints; default: the newest")
    parser.parse_known_args()  # for its help; it cannot tell a path from an unknown option's value
    paths = list(itertools.takewhile(lambda part: not part.startswith("-"), sys.argv[1:]))
    named = ["--SAE_path", *paths] if paths else []
    cfg = config.parse("evaluate", [*named, *sys.argv[1 + len(paths) :]])
    require_sklearn()
    results = measure(cfg)
    if not results:
        raise ValueError(
            "nothing to measure: name SAEs of one site at several sites, one SAE with two seeds, "
            "or a model with one code for several sites"
        )
    path = Path(cfg.output_dir) / "features.json"
    save_json(results, path)
    for name, result in results.items():
        print(f"{name}: {summary(result)}")
    print(f"results in {path}")


if __name__ == "__main__":
    raise SystemExit(exit_code("features", main))
