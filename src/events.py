"""Where each latent is active: its best events, a sample of the others, and the text around them.

All of it is collected on the device in bounded memory. B rows, S positions per row, N counted
tokens, L sites, E events or active latents, F latents, V token ids, W tokens in a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.data import Batch, Rows
from src.draws import random_integers, random_subset
from src.sae import SAE, SAEOutput
from src.sparse import active, bag_bounds

SAMPLE_SIZE = 64  # activations of each latent drawn uniformly: its histogram, its quantiles
POOL_WINDOWS = 256  # windows drawn once for all latents, from which negatives are taken
NEGATIVES = 12  # windows without the latent that each latent gets
SAMPLE_TOKENS = 200  # tokens of the text sample
SAMPLE_LATENTS = 5  # latents named at each of its tokens
ROWS_IN_MEMORY = 4096
# Pairs of latents that are active on one token, up to which tokens are kept to count them: two
# seconds and 70 MB with 32 active latents, for 262,144 tokens.
PAIRS = 2**28
PARTNERS = 8  # latents named that are active on the same tokens as one
MIN_TOGETHER = 3  # tokens that a latent and its partner share at least
# Sums of a ContextCollector over the text.
SUMS = ("n_tokens", "n_codes", "fired_at_site", "strength_at_site", "codes_at_site")


Pieces = tuple[str, ...]  # the texts of the tokens of a window


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

    def candidates(self, latent: Tensor, group: Tensor, score: Tensor, allowed: Tensor) -> Tensor:
        """Return the indices of the new events that may be kept: those above their latent's floor.

        allowed: bool [E]. Of many events only the best are returned.
        """
        if self.floor is not None:
            allowed = allowed & (score > self.floor[latent])
        index = allowed.nonzero()[:, 0]
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

    def by_latent(self) -> Iterator[Events]:
        """Yield the kept events of each latent in turn, on the CPU; there must be at least one."""
        bounds = bag_bounds(self.kept.latent, self.n_latents).tolist()
        events = [part.cpu() for part in self.kept]
        for first, end in pairwise(bounds):
            yield Events(*(part[first:end] for part in events))

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


def counted_documents(batch: Batch, index: int) -> np.ndarray:
    """Return each token's document in one row of a batch, -1 where no token counts. int64 [S]"""
    return batch.document[index].masked_fill(~batch.mask[index], -1).cpu().numpy()


def window_bounds(documents: np.ndarray, center: int, reach: int) -> tuple[int, int]:
    """Return (first, end) of the window that reaches so many tokens to each side of a token.

    It is cut where the token's document ends, and before tokens that do not count.
    """
    first = max(0, center - reach)
    end = min(len(documents), center + reach + 1)
    outside = first + (documents[first:end] != documents[center]).nonzero()[0]
    before = outside[outside < center]
    after = outside[outside > center]
    return int(before.max(initial=first - 1)) + 1, int(after.min(initial=end))


class Windows:
    """The text around tokens. The rows that were read last stay in memory."""

    def __init__(self, rows: Rows, reach: int) -> None:
        self.rows = rows
        self.reach = reach  # tokens on each side of the centre
        self._read = lru_cache(ROWS_IN_MEMORY)(self._read_row)

    def _read_row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        batch = self.rows.batch([row])
        return batch.input_ids[0].numpy(), counted_documents(batch, 0)

    def around(self, row: int, position: int) -> tuple[list[int], int, int]:
        """Return (token ids, position of the first, document) of the window around a token."""
        ids, documents = self._read(row)
        first, end = window_bounds(documents, position, self.reach)
        return ids[first:end].tolist(), first, int(documents[position])


def values_around(key: Tensor, value: Tensor, length: int, index: Tensor, reach: int) -> Tensor:
    """Return the values of a latent around some of its entries, 0 where it is not active.

    key: a number k * length + position for each entry of a code, where k differs between latents,
    sites and rows. The entries around an entry are then its neighbours in the order of keys, and
    no dense code is needed. [E], [E], index [n] -> float16 [n, 2 reach + 1]
    """
    around = torch.zeros(len(index), 2 * reach + 1, dtype=torch.float16, device=key.device)
    if not len(index):
        return around
    ordered, order = key.sort()
    center = key[index]
    position = center % length
    to_the_right = (length - 1 - position).clamp_max(reach)
    first = torch.searchsorted(ordered, center - position.clamp_max(reach))
    end = torch.searchsorted(ordered, center + to_the_right, right=True)
    count = end - first
    # The neighbours of all windows lie in one list, one window after the other.
    window = torch.repeat_interleave(torch.arange(len(index), device=key.device), count)
    window_start = count.cumsum(0) - count
    neighbour = torch.arange(len(window), device=key.device) + (first - window_start)[window]
    offset = ordered[neighbour] - center[window]
    around[window, offset + reach] = value[order[neighbour]].half()
    return around


@dataclasses.dataclass(frozen=True)
class BatchActivations:
    """The active latents of a batch, one entry each, in the order of its codes."""

    batch: Batch
    codes_per_token: int  # 1, or one for each site
    latent: Tensor  # int64 [E]
    value: Tensor  # strength [E]
    token: Tensor  # index among the counted tokens, int64 [E]
    slot: Tensor  # index of the code among those of its token, int64 [E]
    site: Tensor  # index into the SAE's sites; -1 if the code belongs to all of them [E]
    group: Tensor  # token class [E]

    def draws(self, n_latents: int, seed: int) -> Tensor:
        """Return a random number for each entry, whatever the batching. float32 [E]"""
        code = self.batch.token_keys()[self.token] * self.codes_per_token + self.slot
        draws = random_integers(code * n_latents + self.latent, seed, 2**24)
        return draws.float()  # float32 holds these exactly

    def around(self, index: Tensor, reach: int) -> Tensor:
        """Return the latent's strength at each token around some entries. [n, 2 reach + 1]"""
        mask = self.batch.mask
        series = self.latent * self.codes_per_token + self.slot
        position = mask.flatten().nonzero()[:, 0][self.token]
        key = series * mask.numel() + position
        return values_around(key, self.value, mask.shape[1], index, reach)

    def events(self, index: Tensor, score: Tensor, weight: Tensor, around: Tensor) -> Events:
        """Return some entries as events. score: of all entries [E]; weight: of tokens [N]."""
        row, position = self.batch.mask.nonzero(as_tuple=True)
        token = self.token[index]
        return Events(
            latent=self.latent[index],
            value=self.value[index],
            group=self.group[index],
            row=self.batch.row[row[token]],
            position=position[token],
            site=self.site[index],
            weight=weight[token],
            score=score[index],
            around=around,
        )


class TextSample(NamedTuple):
    """What the SAE reads at the first counted tokens of a row."""

    row: int
    ids: Tensor  # token ids, int64 [n]
    weights: Tensor | None  # of the router [n,L]; None without a router
    strongest: list[list[tuple[int, float]]]  # (latent, strength) of each token, falling


class PoolWindow(NamedTuple):
    """A window that is drawn once for all latents."""

    ids: list[int]  # token ids; none if its row was not read
    active: Tensor  # which latents are active in it, bool [F]
    center: int = 0  # index of the token that it was drawn around


class Together:
    """Which latents are active on which of the first tokens, to tell those active together.

    Tokens are taken until they hold PAIRS pairs of latents, so that neither the memory nor the
    time of counting depends on the length of the text.
    """

    def __init__(self, n_latents: int) -> None:
        self.n_latents = n_latents
        self.n_tokens = 0
        self._room = PAIRS
        self._keys: list[Tensor] = []  # token * n_latents + latent, rising, int64

    def update(self, token: Tensor, latent: Tensor, n_tokens: int) -> None:
        """Take in a batch of n_tokens tokens. token, latent: of each active entry, int64 [E]"""
        if self._room <= 0:
            return
        # A latent may be active in several codes of a token.
        key = (token * self.n_latents + latent).unique()
        pairs = torch.bincount(key // self.n_latents, minlength=n_tokens).square().cumsum(0)
        kept = int((pairs <= self._room).sum())
        key = key[key < kept * self.n_latents].cpu()
        self._keys.append(key + self.n_tokens * self.n_latents)
        self.n_tokens += kept
        self._room = self._room - int(pairs[-1]) if kept == n_tokens else 0

    def merge(self, other: Together) -> None:
        """Add the tokens that another process read."""
        shift = self.n_tokens * self.n_latents
        self._keys += [key + shift for key in other._keys]
        self.n_tokens += other.n_tokens

    def partners(self, latents: list[int]) -> dict[int, list[tuple[int, float]]]:
        """Return up to PARTNERS partners among some latents, for each of them.

        A partner comes as (latent, share of the tokens of the first on which it is active too).
        They are ordered by n_ab / sqrt(n_a n_b), with n the number of tokens on which one, or
        both, are active (Ochiai's coefficient); a latent that is active everywhere stays low.
        """
        keys = torch.cat([*self._keys, torch.empty(0, dtype=torch.long)])
        token, latent = keys // self.n_latents, keys % self.n_latents
        token_bounds = bag_bounds(token, self.n_tokens)
        tokens_of = token[latent.argsort(stable=True)]
        count = torch.bincount(latent, minlength=self.n_latents)
        bounds = bag_bounds(latent.sort().values, self.n_latents).tolist()
        is_asked = torch.zeros(self.n_latents, dtype=torch.bool)
        is_asked[latents] = True
        result = {}
        for one in latents:
            own = tokens_of[bounds[one] : bounds[one + 1]]
            together = torch.bincount(
                latent[_ranges(token_bounds[own], token_bounds[own + 1])], minlength=self.n_latents
            )
            allowed = is_asked & (together >= MIN_TOGETHER)
            allowed[one] = False
            score = together / (count * len(own)).clamp_min(1).sqrt() * allowed
            values, indices = score.topk(min(PARTNERS, self.n_latents))
            result[one] = [
                (index, float(together[index] / len(own))) for index in indices[values > 0].tolist()
            ]
        return result


def _ranges(first: Tensor, end: Tensor) -> Tensor:
    """Return the numbers of all ranges first ... end - 1, one after the other. int64 [n] -> [m]"""
    count = end - first
    start = count.cumsum(0) - count
    total = int(count.sum())
    return torch.arange(total, device=first.device) + torch.repeat_interleave(first - start, count)


class ContextCollector:
    """Counts, the best events, a sample and a pool of windows, from one pass over the text.

    Its size does not depend on the length of the text.
    """

    def __init__(
        self, sae: SAE, rows: Rows, reach: int, n_top: int, max_per_token: int, seed: int
    ) -> None:
        """Keep n_top events of a latent, and of those max_per_token of one token class."""
        size, n_sites = sae.latent_size, len(sae.sites())
        device = next(sae.parameters()).device
        self.seed = seed
        self.windows = Windows(rows, reach)
        self.top = Table(size, n_top, max_per_token)
        self.sample = Table(size, SAMPLE_SIZE)
        self.n_tokens = 0
        self.n_codes = 0
        self.maximum = torch.zeros(size, device=device)
        self.fired_at_site = torch.zeros(size, n_sites, dtype=torch.long, device=device)
        self.codes_at_site = torch.zeros(n_sites, dtype=torch.long, device=device)
        self.strength_at_site = torch.zeros(size, n_sites, device=device)
        self.together = Together(size)
        self.text_sample: TextSample | None = None
        n_windows = min(POOL_WINDOWS, len(rows))
        pool_rows = random_subset(torch.tensor([seed]), seed, len(rows), n_windows)[0]
        self.pool_index = {row: index for index, row in enumerate(pool_rows.sort().values.tolist())}
        self.pool = [PoolWindow([], torch.zeros(size, dtype=torch.bool))] * n_windows

    @property
    def fired(self) -> Tensor:
        """In how many codes each latent is active. int64 [F]"""
        return self.fired_at_site.sum(1)

    @property
    def largest(self) -> float:
        """The largest activation."""
        return float(self.maximum.max())

    def update(
        self, batch: Batch, sae: SAE, out: SAEOutput, groups: Tensor, threshold: float
    ) -> None:
        """Take in the output for a batch in which at least one token counts.

        groups: token class of each token id [V]. threshold: the best events exceed it.
        """
        n_tokens = int(batch.mask.sum())
        sites = sae.code_sites(out)
        codes_per_token = len(sites) // n_tokens
        code, latent, value = active(sae.strength(out))
        token = code // codes_per_token
        activations = BatchActivations(
            batch=batch,
            codes_per_token=codes_per_token,
            latent=latent,
            value=value,
            token=token,
            slot=code % codes_per_token,
            site=sites[code],
            group=groups[batch.input_ids[batch.mask]][token],
        )
        self.n_tokens += n_tokens
        self._count(activations, sites)
        self.together.update(token, latent, n_tokens)
        weights = sae.site_weights(out)
        largest = torch.ones(n_tokens, device=latent.device)
        if weights is not None:
            largest = weights.max(-1).values
        self._add_events(activations, largest, threshold)
        if self.text_sample is None:
            self.text_sample = _sample_text(activations, weights)
        self._fill_pool(activations)

    def _count(self, activations: BatchActivations, sites: Tensor) -> None:
        """Update counts and maxima. sites: site index of each code [codes].

        A code that belongs to all sites counts at the first.
        """
        n_latents, n_sites = self.fired_at_site.shape
        latent = activations.latent
        cell = latent * n_sites + activations.site.clamp_min(0)
        counts = torch.bincount(cell, minlength=n_latents * n_sites)
        self.fired_at_site += counts.view(n_latents, n_sites)
        sums = torch.bincount(cell, activations.value.float(), minlength=n_latents * n_sites)
        self.strength_at_site += sums.view(n_latents, n_sites)
        self.codes_at_site += torch.bincount(sites.clamp_min(0), minlength=n_sites)
        self.n_codes += len(sites)
        self.maximum.scatter_reduce_(0, latent, activations.value.to(self.maximum.dtype), "amax")

    def _add_events(self, new: BatchActivations, weight: Tensor, threshold: float) -> None:
        """Offer new activations to both tables. weight: largest router weight of a token [N]."""
        draws = new.draws(self.top.n_latents, self.seed)
        top = self.top.candidates(new.latent, new.group, new.value, new.value > threshold)
        sample = self.sample.candidates(new.latent, new.group, draws, new.value > 0)
        # One call serves both tables, because it sorts all entries.
        around = new.around(torch.cat([top, sample]), self.windows.reach)
        self.top.add(new.events(top, new.value, weight, around[: len(top)]))
        self.sample.add(new.events(sample, draws, weight, around[len(top) :]))

    def _fill_pool(self, activations: BatchActivations) -> None:
        batch = activations.batch
        for index, row in enumerate(batch.row.tolist()):
            if row in self.pool_index and batch.mask[index].any():
                self.pool[self.pool_index[row]] = self._pool_window(activations, index, row)

    def _pool_window(self, activations: BatchActivations, index: int, row: int) -> PoolWindow:
        """Return the window around a token that is drawn from one row of the batch."""
        batch, latent = activations.batch, activations.latent
        counted = batch.mask[index].nonzero()[:, 0]
        draw = int(random_integers(torch.tensor([row]), self.seed, len(counted)))
        documents = counted_documents(batch, index)
        center = int(counted[draw])
        first, end = window_bounds(documents, center, self.windows.reach)
        # Bounds as positions become bounds among counted tokens, and then among entries.
        token_bounds = torch.searchsorted(counted, counted.new_tensor([first, end]))
        token_bounds += batch.mask[:index].sum()
        first_entry, end_entry = torch.searchsorted(activations.token, token_bounds).tolist()
        is_active = torch.zeros(self.top.n_latents, dtype=torch.bool, device=latent.device)
        is_active[latent[first_entry:end_entry]] = True
        ids = batch.input_ids[index, first:end].tolist()
        return PoolWindow(ids, is_active.cpu(), center - first)

    def state(self) -> dict[str, Any]:
        """Return what merge() takes."""
        names = (*SUMS, "maximum", "pool", "text_sample", "together")
        tables = {"top": self.top.kept, "sample": self.sample.kept}
        return {name: getattr(self, name) for name in names} | tables

    def merge(self, others: list[dict[str, Any]]) -> None:
        """Add the states of collectors that have read other rows."""
        for name in ("top", "sample"):
            events = [other[name] for other in others if other[name] is not None]
            getattr(self, name).merge(events)
        for other in others:
            for name in SUMS:
                setattr(self, name, getattr(self, name) + other[name])
            self.maximum = torch.maximum(self.maximum, other["maximum"])
            pairs = zip(self.pool, other["pool"], strict=True)
            self.pool = [window if window.ids else other_window for window, other_window in pairs]
            self.together.merge(other["together"])
        samples = [self.text_sample, *(other["text_sample"] for other in others)]
        samples = [sample for sample in samples if sample is not None]
        self.text_sample = min(samples, key=lambda sample: sample.row, default=None)

    @cached_property
    def _silent(self) -> np.ndarray:
        """Whether each latent is silent in a window that was read. bool [windows,F]

        It must not be asked for before all batches are in.
        """
        return np.stack([~window.active.numpy() & bool(window.ids) for window in self.pool])

    def negatives(self, latent: int, texts: list[Pieces], shown: set[Pieces]) -> list[int]:
        """Return the numbers of up to NEGATIVES windows of the pool in which a latent is silent.

        They are drawn for each latent anew. A window is left out if its text, of `texts`, is among
        those shown: a latent may be active in only one of two windows with the same text, because
        of what comes before them.
        """
        silent = self._silent[:, latent].nonzero()[0].tolist()
        silent = [number for number in silent if texts[number] not in shown]
        draws = random_integers(torch.tensor(silent, dtype=torch.long), self.seed, 2**24, latent)
        return [silent[index] for index in draws.argsort().tolist()[:NEGATIVES]]


def _sample_text(activations: BatchActivations, weights: Tensor | None) -> TextSample:
    """Return what was read in the first row of a batch that has counted tokens.

    weights: of the router, [N,L] or None.
    """
    batch = activations.batch
    row = int(batch.mask.any(1).nonzero()[0])
    ids = batch.input_ids[row][batch.mask[row]][:SAMPLE_TOKENS].cpu()
    # A latent that has a code at several sites counts with the strongest.
    strengths: list[dict[int, float]] = [{} for _ in ids]
    in_sample = activations.token < len(ids)
    columns = (activations.token, activations.latent, activations.value)
    for token, latent, value in zip(*(part[in_sample].tolist() for part in columns), strict=True):
        strengths[token][latent] = max(value, strengths[token].get(latent, value))
    strongest = [
        sorted(latents.items(), key=lambda pair: -pair[1])[:SAMPLE_LATENTS] for latents in strengths
    ]
    if weights is not None:
        weights = weights[: len(ids)].cpu()
    return TextSample(int(batch.row[row]), ids, weights, strongest)
