"""Worlds of planted features: states whose features, and the sites where they live, are known.

A world with one site is SynthSAEBench (arXiv:2602.14687) with fewer features. Over several sites
features are also born, kept, rotated and dropped.

N samples, L sites, D width, G features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# SynthSAEBench-16k has 16,384 features in 768 dimensions, of which 10,880 stand in 128 trees.
# These are its values as its authors' program sets them.
MAX_RATE, MIN_RATE, ZIPF = 0.4, 5e-4, 0.5  # of the feature of rank 1 and the last; exponent
BRANCHES, DEPTH = 4, 3  # a tree has 1 + 4 + 16 + 64 features
TREE_SHARE = 128 / 16384  # roots of trees per feature
FACTORS, LOADING = 25, 0.1  # hidden causes of firing, and the standard deviation of a loading
MIN_OWN = 0.01  # least share of the variance of firing that a feature has for itself
FIRST_SIZE, LAST_SIZE = 5.0, 4.0  # mean size of the feature of rank 1, of the last
SPREAD = 0.5  # each feature's size varies by |normal(SPREAD, SPREAD)|
SPREADING_STEPS, SPREADING_LR = 100, 3e-4  # of gradient descent that parts the directions


class Level(NamedTuple):
    """How large and how hard a world is."""

    width: int
    n_features: int
    latents: int  # of the SAEs that are compared
    k: int
    n_sites: int = 1


# The proportions of SynthSAEBench-16k hold for `synth` and `medium`: a latent for 4 features. There
# k is 25, and 34 features are active; here 7 of `synth`, and over several sites about 4 at a site.
LEVELS = {
    "synth": Level(128, 1024, 256, 5),
    "easy": Level(128, 512, 256, 4, 6),
    "medium": Level(128, 1024, 256, 4, 6),
    "hard": Level(128, 2048, 256, 4, 6),
}


class Stream(NamedTuple):
    """What the states of several sites have in common, and what changes from site to site."""

    offset: float  # norm of the constant part of the states of a site
    growth: float = 1.0  # of the norm of states from one site to the next
    born_first: float = 1.0  # share of the features that are there at the first site
    dropped: float = 0.0  # share of the features at a site that are gone at the next one
    rotated: float = 0.0  # share of the features that turn
    angle: float = 0.0  # by which these turn from one site to the next, in radians


# SynthSAEBench-16k has one site, and an offset of norm 0.5.
ONE_SITE = Stream(0.5)
# Six sites stand for sites 7, 10 ... 22 of SmolLM2-135M, as experiments/smollm2_features.py
# measured them: norms grow from 97 to 290; 44 % of the latents of a RouteSAE live at site 7; a
# life ends with 9.4 % at a site, so with 26 % at three.
SEVERAL_SITES = Stream(11.0, 1.244, 0.44, 0.26, 0.5, 0.3)


class Samples(NamedTuple):
    """States, and the features that made them."""

    values: Tensor  # size of each feature, 0 where it does not fire [N,G]
    hidden: dict[int, Tensor]  # {site: [N,D]}

    @property
    def fires(self) -> Tensor:
        """Which features fire, at whatever site they live. bool [N,G]"""
        return self.values > 0


class World:
    """Planted features in order of their planned rates, the most frequent first.

    `directions` [L,G,D] have norm 1; `present` [L,G] says at which sites a feature stream.
    """

    def __init__(self, level: Level, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.level = level
        self.n_sites = level.n_sites
        stream = SEVERAL_SITES if level.n_sites > 1 else ONE_SITE
        self.parent = forest(level.n_features)
        self.loadings, self.own = self._causes(level.n_features)
        rates = planned_rates(level.n_features)
        self.threshold = torch.special.ndtri(1 - compensated(rates, self.parent))
        self.size = torch.linspace(FIRST_SIZE, LAST_SIZE, level.n_features)
        self.spread = (SPREAD + SPREAD * self._normal(level.n_features)).abs()
        self.present = self._lives(stream)
        self.directions = self._directions(stream)
        self.offset = stream.offset * F.normalize(self._normal(self.n_sites, level.width), dim=1)
        self.norms = stream.growth ** torch.arange(self.n_sites)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _causes(self, n_features: int) -> tuple[Tensor, Tensor]:
        """Return (loadings on the hidden causes [G,FACTORS], weight of a feature's own noise)."""
        loadings = LOADING * self._normal(n_features, FACTORS)
        shared = (loadings**2).sum(1, keepdim=True)
        loadings = loadings * ((1 - MIN_OWN) / shared).clamp_max(1).sqrt()
        return loadings, (1 - (loadings**2).sum(1)).sqrt()

    def _lives(self, stream: Stream) -> Tensor:
        """Return where each feature is present [L,G].

        A child lives within its parent's life, and the root of a tree at all sites. If all roots
        had lives of their own, those of children would be far shorter than the measured ones.
        """
        n_features = self.level.n_features
        sites = torch.arange(self.n_sites)[:, None]
        chance = torch.rand(2, n_features, generator=self.generator)
        later = 1 + torch.randint(max(1, self.n_sites - 1), (n_features,), generator=self.generator)
        birth = torch.where(chance[0] < stream.born_first, 0, later.clamp_max(self.n_sites - 1))
        # A life ends after each site with the same chance.
        rate = torch.tensor(-stream.dropped).log1p().clamp_max(-1e-9)  # of features that stay
        length = chance[1].log() / rate
        present = (sites >= birth) & (sites < birth + 1 + length.floor())
        parents = self.parent[self.parent >= 0].unique()
        present[:, parents[self.parent[parents] < 0]] = True
        for feature, parent in enumerate(self.parent.tolist()):
            if parent >= 0:
                inside = present[:, feature] & present[:, parent]
                present[:, feature] = inside if inside.any() else present[:, parent]
        return present

    def _directions(self, stream: Stream) -> Tensor:
        shape = (self.level.n_features, self.level.width)
        first, other = (spread_out(self._normal(*shape)) for _ in range(2))
        if self.n_sites == 1:
            return first[None]
        other = F.normalize(other - (other * first).sum(1, keepdim=True) * first, dim=1)
        turns = torch.rand(shape[0], 1, generator=self.generator) < stream.rotated
        angle = stream.angle * turns * torch.arange(self.n_sites)[:, None, None]
        return angle.cos() * first + angle.sin() * other

    def sample(self, n: int, generator: torch.Generator | None = None) -> Samples:
        """Return n samples, drawn with the world's own generator or with this one."""
        values = self.values(n, generator or self.generator)
        return Samples(values, {site: self.states(values, site) for site in self.sites()})

    def sites(self) -> range:
        """Return the numbers of the sites, from 1."""
        return range(1, self.n_sites + 1)

    def values(self, n: int, generator: torch.Generator) -> Tensor:
        """Return the sizes of the features in n samples. [N,G]"""
        n_features = len(self.parent)
        score = torch.randn(n, n_features, generator=generator).mul_(self.own)
        score.addmm_(torch.randn(n, FACTORS, generator=generator), self.loadings.T)
        sample, feature = (score > self.threshold).nonzero(as_tuple=True)
        noise = torch.randn(len(sample), generator=generator)
        values = torch.zeros(n, n_features)
        values[sample, feature] = (self.size[feature] + self.spread[feature] * noise).relu()
        self._apply_hierarchy(values, generator)
        return values

    def _apply_hierarchy(self, values: Tensor, generator: torch.Generator) -> None:
        """A child fires only with its parent, in its proportion, and without a sibling."""
        for children in levels_of(self.parent):
            parent = self.parent[children]
            group = (values[:, children] * values[:, parent] / self.size[parent]).view(
                len(values), -1, BRANCHES
            )
            chance = torch.rand(group.shape, generator=generator).mul_(group > 0)
            winner = chance.argmax(-1, keepdim=True)
            alone = torch.zeros_like(group).scatter_(-1, winner, group.gather(-1, winner))
            values[:, children] = alone.flatten(1)

    def states(self, values: Tensor, site: int) -> Tensor:
        """Return the states that these values make at a site. [N,G] -> [N,D]"""
        alive = (values * self.present[site - 1]).to_sparse()
        states = torch.sparse.mm(alive, self.directions[site - 1]) + self.offset[site - 1]
        return states * self.norms[site - 1]

    def alive(self, values: Tensor) -> Tensor:
        """Return the share of each sample's active features that live at each site. [N,L]"""
        fires = (values > 0).float()
        return (fires @ self.present.float().T) / fires.sum(1, keepdim=True).clamp_min(1)


def planned_rates(n_features: int) -> Tensor:
    """Return the rates by Zipf's law, scaled to MAX_RATE ... MIN_RATE. [G]"""
    law = torch.arange(1, n_features + 1).float() ** -ZIPF
    return MIN_RATE + (MAX_RATE - MIN_RATE) * (law - law[-1]) / (law[0] - law[-1])


def compensated(rates: Tensor, parent: Tensor) -> Tensor:
    """Return the rates to draw with, so that the hierarchy leaves about the planned ones. [G]

    A child is drawn more often by 1 / its parent's rate, and by 1 + the rate of its siblings
    given their parent. Rates end at 1, so children of rare parents stay below their plan.
    """
    drawn = rates.clone()
    for children in levels_of(parent):
        of_parent = rates[parent[children]]
        siblings = rates[children].view(-1, BRANCHES).sum(1).repeat_interleave(BRANCHES)
        drawn[children] = (
            rates[children] / of_parent * (1 + (siblings - rates[children]) / of_parent)
        )
    return drawn.clamp_max(1 - 1e-6)


def forest(n_features: int) -> Tensor:
    """Return the parent of each feature, -1 for none. int64 [G]

    Trees grow by levels: the roots come first, then all their children, and so on. The rest are
    free features. Siblings follow each other. A world that is too small has shorter trees.
    """
    roots = max(1, round(TREE_SHARE * n_features))
    parents, level = [-1] * roots, range(roots)
    for _ in range(DEPTH):
        first = len(parents)
        if first + BRANCHES * len(level) > n_features:
            break
        parents += [parent for parent in level for _ in range(BRANCHES)]
        level = range(first, len(parents))
    return torch.tensor(parents + [-1] * (n_features - len(parents)))


def levels_of(parent: Tensor) -> list[Tensor]:
    """Return the features by their depth in a tree, without the roots and the free ones."""
    depth = torch.zeros_like(parent)
    for feature, above in enumerate(parent.tolist()):
        if above >= 0:
            depth[feature] = depth[above] + 1
    return [(depth == level).nonzero()[:, 0] for level in range(1, int(depth.max()) + 1)]


@torch.enable_grad()
def spread_out(directions: Tensor) -> Tensor:
    """Return unit vectors [G,D] near these that lie farther from each other."""
    directions = torch.nn.Parameter(F.normalize(directions, dim=1))
    optimizer = torch.optim.Adam([directions], SPREADING_LR)
    for _ in range(SPREADING_STEPS):
        unit = F.normalize(directions, dim=1)
        optimizer.zero_grad()
        (unit @ unit.T).fill_diagonal_(0).pow(2).sum().backward()
        optimizer.step()
    return F.normalize(directions.detach(), dim=1)
