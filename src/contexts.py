"""Where a latent is active and what stands there: the best few events of every latent, token windows, sentence bounds. No LM, no SAE.

E events, F latents, W tokens in a window, S tokens in a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OPEN, CLOSE = "<ACTIVATED>", "</ACTIVATED>"
SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f][\"'\u201d\u2019)\]]*(?=\s|$)|\n")


class Events(NamedTuple):
    """Activations of latents at tokens, one entry each."""

    latent: Tensor  # int64 [E]
    value: Tensor  # strength [E]
    group: Tensor  # token class [E]
    row: Tensor  # int64 [E]
    position: Tensor  # in the row, int64 [E]
    site: Tensor  # index into the SAE's sites, -1 where a code belongs to all of them [E]
    weight: Tensor  # router weight, 1 without a router [E]
    score: Tensor  # what is kept best of: the value, or a random number for a sample [E]
    around: Tensor  # float16 [E,W]: strength at each token of the window

    def take(self, index: Tensor) -> Events:
        return Events(
            *(part.index_select(0, index) for part in self)
        )  # on a CPU faster than part[index]


def rank_in_group(group: Tensor) -> Tensor:
    """Place of each entry within its run of equal neighbours, from 0. int64 [E] -> [E]"""
    at = torch.arange(len(group), device=group.device)
    starts = torch.ones_like(group, dtype=torch.bool)
    starts[1:] = group[1:] != group[:-1]
    return at - torch.where(starts, at, 0).cummax(0).values if len(group) else at


def best(
    latent: Tensor, group: Tensor, score: Tensor, per_group: int | None, per_latent: int
) -> Tensor:
    """Indices of the per_latent best events of every latent of which at most per_group share a group; by latent, best first.

    Equal scores keep their order. Applied to kept events and new ones again and again it keeps what one call over all would.
    """
    order = score.argsort(descending=True, stable=True)
    if per_group is not None:
        key = (latent * (int(group.max()) + 1 if len(group) else 1) + group)[order]
        runs = key.argsort(stable=True)
        stays = torch.empty_like(key, dtype=torch.bool)
        stays[runs] = rank_in_group(key[runs]) < per_group
        order = order[stays]
    order = order[latent[order].argsort(stable=True)]
    return order[rank_in_group(latent[order]) < per_latent]


class Table:
    """The best events of every latent over a stream of batches, in bounded memory: per_latent x F kept, half as many waiting to be merged.

    Merging sorts, so it is put off until there is enough of it; a latent's floor, what an event has to exceed, is that of the last merge.
    """

    def __init__(self, n_latents: int, per_latent: int, per_group: int | None = None) -> None:
        self.per_latent, self.per_group, self.n_latents = per_latent, per_group, n_latents
        self.floor: Tensor | None = None
        self._kept: Events | None = None
        self._waiting: list[Events] = []

    def candidates(self, latent: Tensor, group: Tensor, score: Tensor) -> Tensor:
        """Which of new events may be kept: those above the last one of a latent that has its full number; the best of them where they are many."""
        index = (
            torch.arange(len(latent), device=latent.device)
            if self.floor is None
            else (score > self.floor[latent]).nonzero()[:, 0]
        )
        if len(index) > self.n_latents * self.per_latent // 4:
            index = index[
                best(latent[index], group[index], score[index], self.per_group, self.per_latent)
            ]
        return index

    def add(self, new: Events) -> None:
        self._waiting.append(new)
        if (
            sum(len(events.latent) for events in self._waiting)
            >= self.n_latents * self.per_latent // 2
        ):
            self._merge()

    @property
    def kept(self) -> Events | None:
        """By latent, then by falling score; None before the first event."""
        self._merge()
        return self._kept

    def merge(self, others: list[Events]) -> None:
        """Takes in what tables over other rows of the same text kept: then it holds what one table over all of it would."""
        if others:
            parts = [*([self.kept] if self.kept is not None else []), *others]
            merged = Events(*(torch.cat(part) for part in zip(*parts, strict=True)))
            for key in (
                "site",
                "position",
                "row",
            ):  # as they stand in the text, since the first of equal scores is kept
                merged = merged.take(getattr(merged, key).argsort(stable=True))
            self._kept, self._waiting = None, [merged]
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        parts = [*([self._kept] if self._kept is not None else []), *self._waiting]
        merged = Events(*(torch.cat(part) for part in zip(*parts, strict=True)))
        self._waiting = []
        self._kept = kept = merged.take(
            best(merged.latent, merged.group, merged.score, self.per_group, self.per_latent)
        )
        last = torch.bincount(kept.latent, minlength=self.n_latents).cumsum(0) - 1
        full = torch.diff(last, prepend=last.new_tensor([-1])) >= self.per_latent
        self.floor = torch.full(
            (self.n_latents,), -float("inf"), dtype=kept.score.dtype, device=kept.score.device
        )
        self.floor[full] = kept.score[last[full]]


class TokenText:
    """Text of every token id as it stands inside a text, and its class: stripped and lower-cased, so that ' The' and 'the' are one."""

    def __init__(self, decode: Callable[[list[int]], str], vocabulary: int, anchor: int) -> None:
        """decode: ids -> text. anchor: an ordinary token that goes before, since some tokenizers drop a text's first space."""
        self.decode, self.anchor = decode, anchor
        self.prefix = decode([anchor])
        self.text = [self._alone([i]) for i in range(vocabulary)]
        names: dict[str, int] = {}
        self.group = torch.tensor(
            [names.setdefault(self.name_of(i), len(names)) for i in range(vocabulary)]
        )
        self.names = list(names)

    def _alone(self, ids: list[int]) -> str:
        text = self.decode([self.anchor, *ids])
        return text[len(self.prefix) :] if text.startswith(self.prefix) else self.decode(ids)

    def name_of(self, token: int) -> str:
        text = self.text[token]
        return (
            text.strip().lower() or text or f"<{token}>"
            if "\ufffd" not in text
            else f"<bytes {token}>"
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Texts of consecutive tokens; a character spread over several tokens stands whole at its first one, '' at the others."""
        pieces = [self.text[token] for token in ids]
        if "\ufffd" not in "".join(pieces):
            return pieces
        pieces, i = [], 0
        while i < len(ids):
            n, text = 1, self.text[ids[i]]
            while "\ufffd" in text and n < 8 and i + n < len(ids):
                longer = self._alone(list(ids[i : i + n + 1]))
                n, text = n + 1, longer
            if "\ufffd" in text:  # cut off at the window's end, or bytes that are no character
                n, text = 1, self.text[ids[i]]
            pieces += [text] + [""] * (n - 1)
            i += n
        return pieces


def sentence(pieces: Sequence[str], at: int) -> str:
    """The sentence of token `at` with the token marked. Bounds are looked for in the text, not in tokens."""
    while at and not pieces[at]:  # inside a character that began earlier
        at -= 1
    text, begin = "".join(pieces), len("".join(pieces[:at]))
    stop = begin + len(pieces[at])
    begin += len(pieces[at]) - len(pieces[at].lstrip()) if pieces[at].strip() else 0
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    first = max((end for end in ends if end <= begin), default=0)
    last = min((end for end in ends if end >= stop), default=len(text))
    left, token, right = text[first:begin], text[begin:stop], text[stop:last]
    return f"{neutral(left.lstrip())}{OPEN}{neutral(token)}{CLOSE}{neutral(right.rstrip())}"


def neutral(text: str) -> str:
    """Text in which our own marks, should it hold them, are broken up."""
    return re.sub(r"<(/?)ACTIVATED>", r"<\1 ACTIVATED>", text)


def marked(pieces: Sequence[str], at: int | Sequence[int]) -> str:
    """The whole window with the given tokens marked."""
    chosen = {at} if isinstance(at, int) else set(at)
    return "".join(
        f"{OPEN}{neutral(piece)}{CLOSE}" if i in chosen else neutral(piece)
        for i, piece in enumerate(pieces)
    )
