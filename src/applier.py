"""The contexts in which each latent is active: one pass over text, the best few kept on the device, only those decoded.

N counted tokens, L sites, F latents, W tokens in a window, E events.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from src import checkpoint, config, demo, distributed, files, hooks, lm
from src.contexts import TokenText, sentence
from src.data import Batch, Rows, open_rows
from src.draws import random_integers, random_subset
from src.events import Events, Table
from src.metrics import token_kl
from src.sae import SAE, SAEOutput
from src.sparse import active

SAMPLE = 64  # activations of each latent drawn uniformly: its histogram, its quantiles
QUARTERS, EACH = (
    4,
    3,
)  # contexts shown beside the strongest: so many from each quarter of that sample
POOL, NEGATIVES = (
    256,
    12,
)  # windows drawn once for all latents; how many of them, without the latent, each one gets
COUNTS = ("tokens", "samples", "density", "at_site", "tokens_at_site")
PROMOTED = 8  # tokens named whose logits a decoder direction raises and lowers most
BUDGET = {
    "cpu": 2**21
}  # numbers in one dense code, longer batches are taken apart: on a CPU what its cache holds (encoding in half the time)


class Windows:
    """The text around tokens; the rows read last are kept."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.read = rows, lru_cache(4096)(self._read)

    def _read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [S], document [S], -1 where no token counts)."""
        batch = self.rows.batch([row])
        return batch.input_ids[0].numpy(), batch.document[0].masked_fill(~batch.mask[0], -1).numpy()

    def __call__(self, row: int, at: int, reach: int) -> tuple[list[int], int, int]:
        """(token ids, position of the first, document) of the window around a token."""
        ids, document = self.read(row)
        first, last = window(document, at, reach)
        return ids[first:last].tolist(), first, int(document[at])


def window(document: np.ndarray, at: int, reach: int) -> tuple[int, int]:
    """(first, end) of the window around a token, cut where its document or the counted text (-1 outside) ends."""
    other = document != document[at]
    first, end = max(0, at - reach), min(len(document), at + reach + 1)
    before, after = other[first:at][::-1], other[at:end]
    return at - int(before.argmax()) if before.any() else first, at + int(
        after.argmax()
    ) if after.any() else end


def parts(
    batch: Batch, full: Mapping[int, Tensor], sae: SAE
) -> Iterator[tuple[Batch, dict[int, Tensor]]]:
    """A batch and its states {site: [B,S,D]} in pieces whose dense codes fit the budget: (rows, {site: states of their counted tokens [N,D]})."""
    per_row = batch.input_ids.shape[1] * sae.latent_size * len(sae.sites())
    size = max(1, BUDGET.get(batch.input_ids.device.type, 2**28) // per_row)
    for start in range(0, len(batch.row), size):
        some = Batch(*(value[start : start + size] for value in batch))
        if some.mask.any():
            yield (
                some,
                {
                    site: state[start : start + size][some.mask].float()
                    for site, state in full.items()
                },
            )


def around_each(key: Tensor, value: Tensor, length: int, index: Tensor, reach: int) -> Tensor:
    """The values around some of the entries of a code, from its entries alone: float16 [E, 2 reach + 1].

    key: of every entry, (latent x rows + row) x length + position, so that the entries around one are its neighbours in the order of keys.
    """
    around = torch.zeros(len(index), 2 * reach + 1, dtype=torch.float16, device=key.device)
    if len(index):
        ordered, order = key.sort()
        centre = key[index]
        position = centre % length
        first = torch.searchsorted(ordered, centre - position.clamp_max(reach))
        count = (
            torch.searchsorted(
                ordered, centre + (length - 1 - position).clamp_max(reach), right=True
            )
            - first
        )
        event = torch.repeat_interleave(torch.arange(len(index), device=key.device), count)
        near = (
            torch.arange(len(event), device=key.device) + (first - count.cumsum(0) + count)[event]
        )
        around[event, ordered[near] - centre[event] + reach] = value[order[near]].half()
    return around


class ContextCollector:
    """What one pass over the text leaves behind: the best events, a sample, counts. Its size does not depend on the length of the text."""

    def __init__(
        self, sae: SAE, rows: Rows, reach: int, top: Table, sample: Table, seed: int
    ) -> None:
        size, n_sites, device = sae.latent_size, len(sae.sites()), next(sae.parameters()).device
        self.top, self.sample, self.reach, self.seed, self.window = (
            top,
            sample,
            reach,
            seed,
            Windows(rows),
        )
        self.tokens = self.samples = 0
        self.density = torch.zeros(size, dtype=torch.long, device=device)
        self.maximum = torch.zeros(size, device=device)
        self.at_site = torch.zeros(size, n_sites, dtype=torch.long, device=device)
        self.tokens_at_site = torch.zeros(n_sites, dtype=torch.long, device=device)
        self.routing: tuple[Tensor, Batch] | None = None
        drawn = (
            random_subset(torch.tensor([seed]), seed, len(rows), min(POOL, len(rows)))[0]
            .sort()
            .values
        )
        self.pool = {int(row): i for i, row in enumerate(drawn)}
        self.windows: list[tuple[list[int], Tensor]] = [
            ([], torch.zeros(size, dtype=torch.bool)) for _ in self.pool
        ]

    @property
    def largest(self) -> float:
        return float(self.maximum.max())

    def update(
        self,
        batch: Batch,
        sae: SAE,
        out: SAEOutput,
        groups: Tensor,
        threshold: float,
    ) -> None:
        """Take in one batch and its output."""
        strength = sae.strength(out)
        weights = sae.site_weights(out)
        site = sae.code_sites(out)
        n, n_sites, size = int(batch.mask.sum()), self.at_site.shape[1], strength.shape[-1]
        per_token = strength.shape[1] if len(strength.shape) == 3 else 1
        device = batch.mask.device
        weight = torch.ones(n, device=device) if weights is None else weights.max(-1).values
        sample, latent, value = active(strength)
        token = sample // per_token
        self.tokens += n
        self.samples += n * per_token
        self.density += torch.bincount(latent, minlength=size)
        self.maximum.scatter_reduce_(0, latent, value.to(self.maximum.dtype), "amax")
        self.at_site += torch.bincount(
            latent * n_sites + site[sample].clamp_min(0), minlength=self.at_site.numel()
        ).view_as(self.at_site)
        self.tokens_at_site += torch.bincount(site.clamp_min(0), minlength=n_sites)
        if weights is not None and self.routing is None:
            first = int(batch.mask[0].sum())
            self.routing = (
                weights[: min(first, 200)].cpu(),
                Batch(*(part[:1].cpu() for part in batch)),
            )
        row, position = batch.mask.nonzero(as_tuple=True)
        classes = groups[batch.input_ids[batch.mask]][token]
        strong = (value > threshold).nonzero()[:, 0]
        strong = strong[self.top.candidates(latent[strong], classes[strong], value[strong])]
        keys = batch.token_keys() * per_token
        key = (keys[token] + (site[sample] if per_token > 1 else 0)) * size + latent
        drawn = random_integers(key, self.seed, 2**24).float()
        chosen = (value > 0).nonzero()[:, 0]
        chosen = chosen[self.sample.candidates(latent[chosen], classes[chosen], drawn[chosen])]
        own = latent if per_token == 1 else latent * per_token + sample % per_token
        length = batch.mask.shape[1]
        around = around_each(
            own * batch.mask.numel() + (row * length + position)[token],
            value,
            length,
            torch.cat([strong, chosen]),
            self.reach,
        )
        for table, index, score, near in (
            (self.top, strong, value, around[: len(strong)]),
            (self.sample, chosen, drawn, around[len(strong) :]),
        ):
            where = token[index]
            table.add(
                Events(
                    latent[index],
                    value[index],
                    classes[index],
                    batch.row[row[where]],
                    position[where],
                    site[sample[index]],
                    weight[where],
                    score[index],
                    near,
                )
            )
        self._look_into_pool(batch, sample, latent, per_token)

    def _look_into_pool(self, batch: Batch, sample: Tensor, latent: Tensor, per_token: int) -> None:
        """Which latents are active in the window of each row of the pool: one window in a row, its place drawn."""
        documents = batch.document.masked_fill(~batch.mask, -1).cpu().numpy()
        before = F.pad(
            batch.mask.sum(1).cumsum(0), (1, 0)
        ).tolist()  # counted tokens of the rows above
        for i, number in enumerate(batch.row.tolist()):
            if number in self.pool and batch.mask[i].any():
                counted = batch.mask[i].nonzero()[:, 0]
                at = int(
                    counted[int(random_integers(torch.tensor([number]), self.seed, len(counted)))]
                )
                first, last = window(documents[i], at, self.reach)
                inside = before[i] + torch.searchsorted(counted, counted.new_tensor([first, last]))
                begin, end = torch.searchsorted(sample, inside * per_token).tolist()
                there = torch.zeros(
                    len(self.density), dtype=torch.bool, device=latent.device
                ).index_fill_(0, latent[begin:end], True)
                self.windows[self.pool[number]] = (
                    batch.input_ids[i, first:last].tolist(),
                    there.cpu(),
                )

    def merge(self, others: list[dict[str, Any]]) -> None:
        """Adds what other processes have seen in other rows, each as its kept()."""
        for name, table in (("top", self.top), ("sample", self.sample)):
            table.merge([other[name] for other in others if other[name] is not None])
        for other in others:
            for name in COUNTS:
                setattr(self, name, getattr(self, name) + other[name])
            self.maximum = torch.maximum(self.maximum, other["maximum"])
            self.windows = [
                mine if mine[0] else theirs
                for mine, theirs in zip(self.windows, other["windows"], strict=True)
            ]
        there = [
            routing
            for routing in (self.routing, *(other["routing"] for other in others))
            if routing is not None
        ]
        self.routing = min(there, key=lambda routing: int(routing[1].row[0]), default=None)

    def kept(self) -> dict[str, Any]:
        """What merge() takes."""
        same = {name: getattr(self, name) for name in (*COUNTS, "maximum", "windows", "routing")}
        return same | {"top": self.top.kept, "sample": self.sample.kept}

    @cached_property
    def silent(self) -> np.ndarray:
        """Whether a latent is off in a window that has a text. bool [windows,F]; looked at when all are in."""
        return np.stack([~there.numpy() & bool(ids) for ids, there in self.windows])

    def without(
        self, latent: int, texts: list[tuple[str, ...]], shown: set[tuple[str, ...]]
    ) -> list[int]:
        """Numbers of up to NEGATIVES windows in which the latent is silent, another choice for each latent.

        None whose text, of `texts`, is among those shown: what went before may set a latent off in one of two windows with the same text.
        """
        silent = [i for i in self.silent[:, latent].nonzero()[0].tolist() if texts[i] not in shown]
        order = (
            random_integers(torch.tensor(silent, dtype=torch.long), self.seed, 2**24, latent)
            .argsort()
            .tolist()
        )
        return [silent[i] for i in order[:NEGATIVES]]


class Applier:
    """`get_context()` writes contexts/<sae>_contexts.json. The language model is loaded at that moment, not before."""

    def __init__(self, cfg: Namespace) -> None:
        self.cfg = cfg
        self.tokenizer = self.language_model = None
        opened = checkpoint.open_all(cfg)
        if len(opened) != 1:
            raise ValueError(
                f"--SAE_path names {len(opened)} checkpoints; contexts are made of one at a time"
            )
        self.sae, self.recipe = opened[0]
        demo.use_demo_defaults(cfg)
        config.complete(cfg)

    def run(self) -> tuple[int, Path]:
        """get_context with the values of the options."""
        cfg, root = self.cfg, math.sqrt(self.sae.hidden_size)
        threshold = (
            cfg.act_threshold
            if cfg.act_threshold is not None
            else root * (0.22 if cfg.threshold_rel is None else cfg.threshold_rel)
        )
        return self.get_context(
            0.0 if cfg.quantile is not None else threshold,
            cfg.context_length,
            cfg.max_per_token,
            cfg.lines,
        )

    @torch.no_grad()
    def get_context(
        self,
        threshold: float = 10.0,
        max_length: int = 64,
        max_per_token: int = 2,
        lines: int = 4,
        output_path: str | Path | None = None,
    ) -> tuple[int, Path]:
        """(latents kept, path of the JSON). max_length: tokens shown on each side; lines: contexts a latent needs.

        threshold is in units of `strength`. Raises ValueError where no token counts.
        """
        cfg = self.cfg
        if self.language_model is None:
            self.tokenizer, self.language_model = hooks.open_language_model(cfg, [self.sae])
        lm.check_length(self.language_model, cfg.max_length)
        rows = distributed.main_first(lambda: open_rows(cfg, self.tokenizer))
        self.text = self._token_text()
        self.top: Events | None = None
        seen = self._collect(rows, threshold, max_length, max_per_token)
        found = distributed.to_main(seen.kept(), cfg.device)
        return distributed.from_main(
            lambda: self._write(
                seen, found[1:], rows, (threshold, max_length, max_per_token, lines), output_path
            )
        )

    def _write(
        self,
        seen: ContextCollector,
        others: list[dict[str, Any]],
        rows: Rows,
        given: tuple[float, int, int, int],
        output_path,
    ) -> tuple[int, Path]:
        """The value of get_context() from what this process and the others have seen."""
        cfg, (threshold, max_length, max_per_token, lines) = self.cfg, given
        seen.merge(others)
        if not seen.tokens:
            raise ValueError("no counted token in the rows; use more text or longer rows")
        latents = self._describe(seen, max_length, lines)
        self._read_out(latents)
        if cfg.effect:
            self._effects(latents, rows)
        header = self._header(seen, rows, len(latents), threshold, max_length, max_per_token, lines)
        negatives = [{"tokens": self.text.pieces(ids)} for ids, _ in seen.windows]
        result = header | {"negatives": negatives, "latent_context_map": latents}
        if output_path is None:
            name = f"{files.safe_name(self.recipe['title'])}_contexts.json" + (
                ".gz" if cfg.gzip else ""
            )
            output_path = Path(cfg.output_dir) / files.CONTEXT_DIR / name
        path = Path(output_path)
        if latents or not path.exists():
            files.save_json(result, path, indent=None)
        else:
            print(f"{path} stays as it was")
        if not latents:
            hint = f"the largest of {int(seen.density.sum())} activations is {seen.largest:.4g}"
            print(
                f"nothing kept: {hint}; --act_threshold {0.5 * seen.largest:.3g} --lines 1 would keep some"
            )
        return len(latents), path

    # ------------------------------------------------------------------------------------------------ one pass

    def _collect(
        self, rows: Rows, threshold: float, reach: int, max_per_token: int
    ) -> ContextCollector:
        cfg, sae = self.cfg, self.sae
        seen = ContextCollector(
            sae,
            rows,
            reach,
            Table(sae.latent_size, 3 * cfg.top_n, max_per_token),
            Table(sae.latent_size, SAMPLE),
            cfg.seed,
        )
        mine = rows.batches(
            cfg.batch_size, start=distributed.rank(), every=distributed.world()
        )  # whole batches: each is coded as it would be alone
        batches = math.ceil(len(rows) / cfg.batch_size / distributed.world())
        lm.compile_if_it_pays(cfg, self.language_model, cfg.batch_size, batches)
        groups = torch.tensor(self.text.group, device=cfg.device)
        for batch in tqdm(mine, "applying", batches, unit=" batches", mininterval=1):
            batch = batch.to(cfg.device)
            if not batch.mask.any():
                continue
            full = lm.read_sites(self.language_model, batch.input_ids, sae.sites())
            for some, hidden in parts(batch, full, sae):
                p = sae.autoencode(sae.gather(hidden), hooks.batch_info(cfg, some))
                seen.update(some, sae, p, groups, threshold)
        return seen

    # ------------------------------------------------------------------------------------------- what was kept

    def _describe(
        self, seen: ContextCollector, reach: int, lines: int
    ) -> dict[str, dict[str, Any]]:
        """{latent: contexts and figures}, for the latents with enough contexts."""
        top, sample = seen.top.kept, seen.sample.kept
        if top is None or sample is None:
            return {}
        starts = [
            torch.searchsorted(
                t.latent, torch.arange(self.sae.latent_size + 1, device=t.latent.device)
            ).tolist()
            for t in (top, sample)
        ]
        top, sample = (Events(*(part.cpu() for part in t)) for t in (top, sample))
        self.top = top
        profile = self.sae.site_profile()
        profile = None if profile is None else profile.T.tolist()
        texts = [tuple(self.text.pieces(ids)) for ids, _ in seen.windows]
        found: dict[str, dict[str, Any]] = {}
        for latent in tqdm(range(self.sae.latent_size), "decoding", unit=" latents", mininterval=1):
            (a, b), (c, d) = ((s[latent], s[latent + 1]) for s in starts)
            cut = -math.inf
            if self.cfg.quantile is not None and d > c:
                cut = float(sample.value[c:d].quantile(self.cfg.quantile))
            shown: set[tuple[str, ...]] = set()
            strong = (top.value[a:b] >= cut).nonzero()[:, 0].add(a).tolist()
            kept = self._contexts(top, strong, seen.window, reach, self.cfg.top_n, shown)
            if len(kept) < lines:
                continue
            entry: dict[str, Any] = {
                "activations": [c["activation"] for c in kept],
                "tokens": [c["tokens"] for c in kept],
                "position": [c["position"] for c in kept],
                "token_activations": [c["token_activations"] for c in kept],
                "token_class": [c["token_class"] for c in kept],
                "layer": [c["layer"] for c in kept],
                "router_weight": [c["router_weight"] for c in kept],
                "document": [c["document"] for c in kept],
                "contexts": {},
            }
            for one in kept:
                entry["contexts"].setdefault(one["token_class"], []).append(
                    {"activation": one["activation"], "context": one["context"]}
                )
            values = sample.value[c:d]
            rank = values.argsort(
                descending=True, stable=True
            ).argsort()  # 0: the strongest of the sample
            others = []
            for quarter in range(QUARTERS):
                drawn = (
                    (rank * QUARTERS // max(1, d - c) == quarter).nonzero()[:, 0].add(c).tolist()
                )  # in random order
                some = self._contexts(sample, drawn, seen.window, reach, EACH, shown)
                others += [
                    one | {"quarter": quarter + 1}
                    for one in sorted(some, key=lambda one: -one["activation"])
                ]
            entry |= {
                "density": float(seen.density[latent] / seen.samples),
                "max_activation": round(float(seen.maximum[latent]), 4),
                "site_counts": [int(n) for n in seen.at_site[latent]] if profile is None else None,
                "decoder_norms": [round(n, 4) for n in profile[latent]]
                if profile is not None
                else None,
                "sample_activations": [
                    round(float(v), 4) for v in values.sort(descending=True).values
                ],
                "sample": others,
                "negatives": seen.without(latent, texts, shown),
            }
            found[str(latent)] = entry
        return found

    def _contexts(
        self,
        events: Events,
        chosen: list[int],
        window: Windows,
        reach: int,
        n: int,
        texts: set[tuple[str, ...]],
    ) -> list[dict[str, Any]]:
        """Up to n of the chosen events with their text; none of those in `texts`, which grows by them."""
        kept: list[dict[str, Any]] = []
        for i in chosen:
            if len(kept) == n:
                break
            row, at = int(events.row[i]), int(events.position[i])
            ids, first, document = window(row, at, reach)
            pieces = self.text.pieces(ids)
            if tuple(pieces) in texts:
                continue
            texts.add(tuple(pieces))
            around = events.around[i, first - at + reach :][: len(ids)].float()
            site = int(events.site[i])
            kept.append(
                {
                    "activation": round(float(events.value[i]), 4),
                    "tokens": pieces,
                    "position": at - first,
                    "token_activations": [
                        [j, round(float(around[j]), 3)] for j in around.nonzero()[:, 0].tolist()
                    ],
                    "token_class": self.text.names[int(events.group[i])],
                    "layer": self.sae.sites()[site] if site >= 0 else None,
                    "router_weight": round(float(events.weight[i]), 4),
                    "document": document,
                    "context": sentence(pieces, at - first),
                }
            )
        return kept

    def _token_text(self) -> TokenText:
        size = len(self.tokenizer)

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )

        ordinary = self.tokenizer.encode("a", add_special_tokens=False)
        return TokenText(decode, size, ordinary[-1])

    # ------------------------------------------------------------------------------------- what a latent does

    def _directions(self, latents: list[int]) -> Tensor:
        """[E,D]: what one unit of each latent adds, at the last of the SAE's sites."""
        one_hot = torch.zeros(len(latents), self.sae.latent_size, device=self.cfg.device)
        one_hot[torch.arange(len(latents)), torch.tensor(latents)] = 1
        added = self.sae.decode(one_hot) - self.sae.decode(torch.zeros_like(one_hot[:1]))
        return added if added.dim() == 2 else added[:, -1]

    def _read_out(self, latents: dict[str, dict[str, Any]]) -> None:
        """The tokens whose logits each decoder direction raises and lowers most, read directly through the final norm and the head."""
        model, numbers = self.language_model, [int(latent) for latent in latents]
        depth, dtype = len(lm.blocks(model)), next(model.parameters()).dtype
        for start in range(0, len(numbers), lm.HEAD_CHUNK):
            some = numbers[start : start + lm.HEAD_CHUNK]
            states = self._directions(some)[:, None].to(dtype)
            ids = torch.zeros(len(some), 1, dtype=torch.long, device=states.device)
            with lm.resumed_at(model, depth, states):
                logits = lm.logits_of(model, lm.final_states(model, ids)[:, 0])
            for latent, row in zip(some, logits - logits.mean(-1, keepdim=True), strict=True):
                self._name_tokens(latents[str(latent)], "", row)

    def _name_tokens(self, entry: dict[str, Any], prefix: str, change: Tensor) -> None:
        for name, sign in (("promoted", 1), ("suppressed", -1)):
            values, ids = (sign * change[: len(self.text.text)]).topk(min(PROMOTED, len(change)))
            entry[prefix + name] = [
                [self.text.text[i], round(sign * v, 4)]
                for i, v in zip(ids.tolist(), values.tolist(), strict=True)
            ]

    def _effects(self, latents: dict[str, dict[str, Any]], rows: Rows) -> None:
        """For the first latents: KL and the tokens that lose and gain most when the latent is removed at its strongest contexts."""
        model, sae = self.language_model, self.sae
        strongest = sorted(latents, key=lambda latent: -latents[latent]["max_activation"])[
            : self.cfg.effect
        ]
        for name in tqdm(strongest, "effects", unit=" latents", mininterval=1):
            latent, entry = int(name), latents[name]
            index = (self.top.latent == latent).nonzero()[:4, 0]
            some, at = self.top.row[index].tolist(), self.top.position[index]
            batch = rows.batch(some).to(self.cfg.device)
            full = lm.read_sites(model, batch.input_ids, sae.sites())
            hidden = {site: state[batch.mask].float() for site, state in full.items()}
            lines = torch.arange(len(some), device=batch.mask.device)
            clean = lm.logits_of(
                model, lm.final_states(model, batch.input_ids)[lines, at]
            ).log_softmax(-1)
            kl, change = 0.0, 0.0
            runs = list(
                sae.patches(
                    hidden,
                    hooks.batch_info(self.cfg, batch),
                    edit=hooks.edit_latents([("set", latent, 0.0)]),
                )
            )
            for patches in runs:
                without = lm.logits_of(
                    model, hooks.patched_states(model, batch, patches, full)[lines, at]
                ).log_softmax(-1)
                kl += float(token_kl(clean, without).mean()) / len(runs)
                change = change + (clean.exp() - without.exp()).mean(0) / len(runs)
            entry["effect_KL"] = round(kl, 6)
            self._name_tokens(entry, "effect_", change)

    def _header(
        self,
        seen: ContextCollector,
        rows: Rows,
        kept: int,
        threshold: float,
        reach: int,
        max_per_token: int,
        lines: int,
    ) -> dict[str, Any]:
        cfg = self.cfg
        header = {
            "model": self.sae.name,
            "source_model": str(cfg.model_path),
            "sae_path": cfg.SAE_path[0],
            "title": self.recipe["title"],
            "total_latents": kept,
            "latent_size": self.sae.latent_size,
            "threshold": threshold,
            "quantile": cfg.quantile,
            "max_length": reach,
            "max_per_token": max_per_token,
            "lines": lines,
            "top_n": cfg.top_n,
            "sites": self.sae.sites(),
            "tokens": seen.tokens,
            "rows": len(rows),
            "split": cfg.split,
            "data_path": str(cfg.data_path),
            "data_fingerprint": rows.fingerprint,
            "largest_activation": round(seen.largest, 4),
            "latents_above_threshold": int((seen.maximum > threshold).sum()),
            "latents_that_fire": int((seen.density > 0).sum()),
            "seed": cfg.seed,
            "infer_k": cfg.infer_k,
            "theta": cfg.theta,
            "weights_sum": self.recipe["weights_sum"],
        }
        if seen.routing is not None:
            weights, batch = seen.routing
            ids = batch.input_ids[0][batch.mask[0]][: len(weights)].tolist()
            header["routing"] = {
                "share": [round(float(n) / seen.samples, 5) for n in seen.tokens_at_site],
                "sample": {
                    "tokens": self.text.pieces(ids),
                    "weights": [[round(w, 3) for w in line] for line in weights.tolist()],
                },
            }
        return header | checkpoint.environment()
