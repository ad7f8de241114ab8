"""The strongest activations of every latent, kept on the device in bounded memory.

E events, F latents, W tokens in a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Events(NamedTuple):
    """Activations of latents at tokens, one entry each."""

    latent: Tensor  # int64 [E]
    value: Tensor  # strength [E]
    group: Tensor  # token class [E]
    row: Tensor  # int64 [E]
    position: Tensor  # index of the token in its row, int64 [E]
    site: Tensor  # index into the SAE's sites; -1 if the code belongs to all of them [E]
    weight: Tensor  # router weight; 1 without a router [E]
    score: Tensor  # the events of highest score are kept: the value, or a random number [E]
    around: Tensor  # float16 [E,W]: strength at each token of the window

    def take(self, index: Tensor) -> Events:
        # On a CPU index_select is faster than part[index].
        return Events(*(part.index_select(0, index) for part in self))

    @staticmethod
    def concatenate(parts: list[Events]) -> Events:
        return Events(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def rank_in_group(group: Tensor) -> Tensor:
    """Return the rank of each entry within its run of equal neighbours, from 0. int64 [E] -> [E]"""
    index = torch.arange(len(group), device=group.device)
    if not len(group):
        return index
    starts = torch.ones_like(group, dtype=torch.bool)
    starts[1:] = group[1:] != group[:-1]
    return index - torch.where(starts, index, 0).cummax(0).values


def best(
    latent: Tensor, group: Tensor, score: Tensor, per_group: int | None, per_latent: int
) -> Tensor:
    """Return the indices of the per_latent best events of every latent, at most per_group a group.

    The result is ordered by latent, then by falling score; equal scores keep their order.
    Applied again and again to the kept events and new ones, it keeps what one call on all would.
    """
    order = score.argsort(descending=True, stable=True)
    if per_group is not None:
        n_groups = int(group.max()) + 1 if len(group) else 1
        key = (latent * n_groups + group)[order]
        by_key = key.argsort(stable=True)
        keep = torch.empty_like(key, dtype=torch.bool)
        keep[by_key] = rank_in_group(key[by_key]) < per_group
        order = order[keep]
    order = order[latent[order].argsort(stable=True)]
    return order[rank_in_group(latent[order]) < per_latent]


class Table:
    """The best events of every latent over a stream of batches.

    At most per_latent x F events are kept, and half as many wait to be merged. Merging sorts, so
    it waits until there is enough to merge. A new event must exceed the latent's `floor`, which is
    the score of its last kept event at the last merge.
    """

    def __init__(self, n_latents: int, per_latent: int, per_group: int | None = None) -> None:
        self.n_latents = n_latents
        self.per_latent = per_latent
        self.per_group = per_group
        self.floor: Tensor | None = None
        self._kept: Events | None = None
        self._waiting: list[Events] = []

    def candidates(self, latent: Tensor, group: Tensor, score: Tensor) -> Tensor:
        """Return the indices of the new events that may be kept: those above their latent's floor.

        If they are many, only the best of them are returned.
        """
        if self.floor is None:
            index = torch.arange(len(latent), device=latent.device)
        else:
            index = (score > self.floor[latent]).nonzero()[:, 0]
        if len(index) <= self.n_latents * self.per_latent // 4:
            return index
        return index[self._best(latent[index], group[index], score[index])]

    def add(self, new: Events) -> None:
        self._waiting.append(new)
        n_waiting = sum(len(events.latent) for events in self._waiting)
        if n_waiting >= self.n_latents * self.per_latent // 2:
            self._merge()

    @property
    def kept(self) -> Events | None:
        """The kept events by latent, then by falling score; None before the first event."""
        self._merge()
        return self._kept

    def merge(self, others: list[Events]) -> None:
        """Add the events that tables over other rows of the text kept.

        Afterwards the table holds what one table over all rows would hold.
        """
        if not others:
            return
        kept = self.kept
        merged = Events.concatenate([*([] if kept is None else [kept]), *others])
        # Order the events as in the text, because the first of equal scores is kept.
        for key in ("site", "position", "row"):
            merged = merged.take(getattr(merged, key).argsort(stable=True))
        self._kept = None
        self._waiting = [merged]
        self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        merged = Events.concatenate([*([] if self._kept is None else [self._kept]), *self._waiting])
        self._waiting = []
        self._kept = kept = merged.take(self._best(merged.latent, merged.group, merged.score))
        last = torch.bincount(kept.latent, minlength=self.n_latents).cumsum(0) - 1
        full = torch.diff(last, prepend=last.new_tensor([-1])) >= self.per_latent
        self.floor = kept.score.new_full((self.n_latents,), -float("inf"))
        self.floor[full] = kept.score[last[full]]

    def _best(self, latent: Tensor, group: Tensor, score: Tensor) -> Tensor:
        return best(latent, group, score, self.per_group, self.per_latent)
