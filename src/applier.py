"""The contexts in which each latent is active: one pass over text; only the best are decoded.

B rows, S positions per row, N counted tokens, L sites, D hidden, F latents, V token ids.
"""

from __future__ import annotations

import gzip
import itertools
import math
import time
import zlib
from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from src import (
    checkpoint,
    config,
    demo,
    device,
    distributed,
    estimate,
    files,
    hooks,
    identity,
    lm,
)
from src.contexts import BROKEN, TokenText, sentence_bounds, text_decoder
from src.data import Batch, Rows, special_tokens
from src.estimate import Estimate
from src.events import SAMPLE_SIZE, ContextCollector, Events, Pieces, Table, Windows
from src.metrics import token_kl
from src.sae import SAE

QUARTERS = 4  # of a latent's sample, ordered by activation
PER_QUARTER = 3  # contexts shown from each, beside the best
# Best events kept per context wanted: several may mark the same token of the same text, which is
# shown once.
EVENTS_PER_CONTEXT = 3
# Latents whose logits exist at one time: 1,024 took 0.7 GB with 49,152 words (docs/LOG.md).
PROMOTED_CHUNK = 128
PROMOTED_COPIES = 4  # of those logits
PROMOTED = 8  # tokens named whose logits a decoder direction raises and lowers most
LOGIT_BINS = 24  # of the histogram of what a direction adds to the logits
NEAREST = 8  # latents named whose decoder directions are closest
EFFECT_CONTEXTS = 4  # best events of a latent at which it is removed
# Numbers in one dense code; longer batches are divided. On a CPU it is what the cache holds, which
# halves the time of encoding.
CODE_NUMBERS = {"cpu": 2**21}
CODE_NUMBERS_ELSEWHERE = 2**28
EVENT_BYTES = 48  # of an event beside the float16 strengths of its window
EVENT_COPIES = 2  # of all events while those of a batch are merged with them
# Of a token in a context, with its share of the lists; the JSON is written in pieces (docs/LOG.md).
CONTEXT_BYTES = 17
CONTEXT_TOKENS = 60  # of a usual context of whole sentences, where the window is longer
HEADER_BYTES = 2**20  # of a contexts file, in which its header ends
# What contexts share that replace others, and what of them must not be less, or more.
SAME_TEXT = ("source_model", "data_path", "split", "infer_k", "theta")
NO_LESS = ("tokens", "total_latents", "top_n", "max_length", "effects")
NO_MORE = ("threshold",)
GZIP_BYTES = 20_000_000  # of the contexts, above which their file is compressed by default
# Fields of a context that a latent's entry holds as one list each.
COLUMNS = (
    "tokens",
    "position",
    "token_activations",
    "token_class",
    "layer",
    "router_weight",
    "document",
    "row",
    "start",
)

Context = dict[str, Any]
Entry = dict[str, Any]  # of a latent in the JSON
Marked = tuple[Pieces, int]  # a text, and the index of its active token


class ContextOptions(NamedTuple):
    """Which contexts are kept."""

    threshold: float  # strength that an activation must exceed
    max_length: int  # tokens shown on each side
    max_per_token: int  # contexts of a latent with the same token class
    lines: int  # contexts that a latent needs


def split_batch(
    batch: Batch, states: Mapping[int, Tensor], sae: SAE
) -> Iterator[tuple[Batch, dict[int, Tensor]]]:
    """Yield parts of a batch in which a token counts, small enough for a dense code.

    states: {site: [B,S,D]}. Each part comes with {site: states of its counted tokens [N,D]}.
    """
    numbers_per_row = batch.input_ids.shape[1] * sae.latent_size * len(sae.sites())
    numbers = CODE_NUMBERS.get(batch.input_ids.device.type, CODE_NUMBERS_ELSEWHERE)
    n_rows = max(1, numbers // numbers_per_row)
    for start in range(0, len(batch.row), n_rows):
        rows = slice(start, start + n_rows)
        part = batch.part(rows)
        if part.mask.any():
            yield part, {site: state[rows][part.mask].float() for site, state in states.items()}


def token_text(tokenizer: Any) -> TokenText:
    """Return the texts of a tokenizer's tokens."""
    decode, ordinary = text_decoder(tokenizer)
    return TokenText(decode, len(tokenizer), ordinary)


def columns(contexts: list[Context]) -> Entry:
    """Return each field of the contexts as a list."""
    entry: Entry = {"activations": [context["activation"] for context in contexts]}
    return entry | {name: [context[name] for context in contexts] for name in COLUMNS}


class Applier:
    """Finds the contexts of one SAE's latents. The first get_context() loads the language model."""

    def __init__(self, cfg: Namespace) -> None:
        self.cfg = cfg
        self.tokenizer = self.language_model = None
        opened = checkpoint.open_all(cfg)
        if len(opened) != 1:
            names = f"--SAE_path names {len(opened)} checkpoints"
            raise ValueError(f"{names}; contexts are made of one at a time")
        self.sae, self.recipe = opened[0]
        demo.use_demo_defaults(cfg)
        config.complete(cfg)

    def run(self) -> tuple[int, Path]:
        """Call get_context with the values of the options."""
        cfg = self.cfg
        return self.get_context(self.threshold(), cfg.context_length, cfg.max_per_token, cfg.lines)

    def threshold(self) -> float:
        """Return the strength that an activation must exceed, by the options."""
        if self.cfg.threshold_rel is not None:
            # By this measure strength grows with the width: 0.22 is 10 at 2,048.
            return self.cfg.threshold_rel * math.sqrt(self.sae.hidden_size)
        return self.cfg.act_threshold or 0.0

    @torch.no_grad()
    def get_context(
        self,
        threshold: float = 10.0,
        max_length: int = 64,
        max_per_token: int = 2,
        lines: int = 4,
        output_path: str | Path | None = None,
    ) -> tuple[int, Path]:
        """Write the contexts; return (number of latents that have enough, path of the JSON).

        threshold: in units of strength. max_length: tokens shown on each side. max_per_token:
        contexts of a latent with the same token. lines: contexts that a latent needs.
        Raises ValueError if no token counts.
        """
        cfg = self.cfg
        if self.language_model is None:
            self.tokenizer, self.language_model = hooks.open_language_model(
                cfg, [(self.sae, self.recipe)]
            )
        lm.check_length(self.language_model, cfg.max_length)
        rows = demo.open_rows(cfg, self.tokenizer)
        self.text = token_text(self.tokenizer)
        options = ContextOptions(threshold, max_length, max_per_token, lines)
        collector, expected, seconds = self._collect(rows, options)
        states = distributed.to_main(collector.state(), cfg.device)
        written = distributed.from_main(
            lambda: self._write(collector, states[1:], rows, options, output_path)
        )
        expected.compare(seconds)
        return written

    def _collect(
        self, rows: Rows, options: ContextOptions
    ) -> tuple[ContextCollector, Estimate, float]:
        """Read this process's share of the text; return also the estimate and the seconds."""
        cfg, sae = self.cfg, self.sae
        n_top = EVENTS_PER_CONTEXT * cfg.top_n
        collector = ContextCollector(
            sae, rows, options.max_length, n_top, options.max_per_token, cfg.seed
        )
        world = distributed.world()
        # Whole batches are shared, so that each is coded as it would be in one process.
        batches = rows.batches(cfg.batch_size, start=distributed.rank(), every=world)
        n_batches = math.ceil(len(rows) / cfg.batch_size / world)
        lm.compile_if_it_pays(cfg, self.language_model, cfg.batch_size, n_batches)
        groups = torch.tensor(self.text.group, device=cfg.device)
        expected = self._announce(rows, options)
        started = time.perf_counter()
        for batch in tqdm(batches, "applying", n_batches, unit=" batches", mininterval=1):
            batch = batch.to(cfg.device)
            if not batch.mask.any():
                continue
            states = lm.read_sites(self.language_model, batch.input_ids, sae.sites())
            for part, hidden in split_batch(batch, states, sae):
                hooks.check_finite(hidden, self.language_model)
                out = sae.autoencode(sae.gather(hidden), hooks.batch_info(cfg, part))
                collector.update(part, sae, out, groups, options.threshold)
            device.limit_freed_memory()
        return collector, expected, time.perf_counter() - started

    def _announce(self, rows: Rows, options: ContextOptions) -> Estimate:
        """Print what the stage will need, from trials on a few of its rows."""

        def time_rows(n: int) -> float:
            started = time.perf_counter()
            batch = rows.batch(list(range(n))).to(self.cfg.device)
            states = lm.read_sites(self.language_model, batch.input_ids, self.sae.sites())
            for part, hidden in split_batch(batch, states, self.sae):
                self.sae.autoencode(self.sae.gather(hidden), hooks.batch_info(self.cfg, part))
            device.wait(self.cfg.device)
            return time.perf_counter() - started

        window = 2 * options.max_length + 1
        n_events = self.sae.latent_size * (EVENTS_PER_CONTEXT * self.cfg.top_n + SAMPLE_SIZE)
        n_contexts = self.sae.latent_size * (self.cfg.top_n + QUARTERS * PER_QUARTER)
        n_logits = PROMOTED_CHUNK * lm.n_logits(self.language_model)
        needs = {
            "events": EVENT_COPIES * n_events * (2 * window + EVENT_BYTES),
            "contexts of all latents": CONTEXT_BYTES * n_contexts * min(window, CONTEXT_TOKENS),
            "logits of the latents": 4 * PROMOTED_COPIES * n_logits,
        }
        return estimate.of_reading(self.cfg, rows, time_rows, needs)

    def _write(
        self,
        collector: ContextCollector,
        others: list[dict[str, Any]],
        rows: Rows,
        options: ContextOptions,
        output_path: str | Path | None,
    ) -> tuple[int, Path]:
        """Write the JSON and return what get_context() returns.

        others: states of the other processes' collectors.
        """
        collector.merge(others)
        if not collector.n_tokens:
            raise ValueError("no counted token in the rows; use more text or longer rows")
        entries = self._describe(collector, options.lines)
        self._add_promoted(entries)
        self._add_nearest(entries)
        self._add_partners(entries, collector)
        if self.cfg.effect:
            self._add_effects(entries, collector.top, rows)
        result = self._header(collector, rows, len(entries), options)
        negatives = self._pool_windows(collector)
        result |= {"negatives": negatives, "latent_context_map": entries}
        path = self._save(result, output_path)
        print(
            f"{result['latents_that_fire']:,} of {self.sae.latent_size:,} latents fired, "
            f"{len(entries):,} kept (those with at least {options.lines} different contexts whose "
            f"activation is above {options.threshold:.4g}); {collector.n_tokens:,} tokens of split "
            f"{self.cfg.split}"
        )
        if not entries:
            largest = collector.largest
            print(
                f"nothing kept: the largest of {int(collector.fired.sum())} activations is "
                f"{largest:.4g}; --act_threshold {0.5 * largest:.3g} --lines 1 would keep some"
            )
        return len(entries), path

    def _pool_windows(self, collector: ContextCollector) -> list[dict[str, Any]]:
        """Return the windows of the pool, cut as those of the contexts are."""
        windows = []
        for window in collector.pool:
            pieces, first = self._whole_sentences(window.ids, window.center)
            windows.append({"tokens": pieces, "position": window.center - first})
        return windows

    def _save(self, result: dict[str, Any], output_path: str | Path | None) -> Path:
        """Write the contexts; return their path. Contexts are not replaced by none.

        Contexts that hold more, or are of another text, keep their name; these get their own.
        """
        if output_path is not None:
            path = Path(output_path)
            former = path
        else:
            path, former = self._free_name(result)
        for existing in (path, former):
            if not result["latent_context_map"] and existing.exists():
                print(f"{existing} is left unchanged")
                return existing
        files.save_json(result, path, indent=None)
        if former != path:
            former.unlink(missing_ok=True)  # the same contexts from before, in the other form
        return path

    def _free_name(self, result: dict[str, Any]) -> tuple[Path, Path]:
        """Return (path for the contexts, path of the other form, compressed or not)."""
        compress = self.cfg.gzip
        if compress is None:
            compress = sum(map(len, files.json_pieces(result))) > GZIP_BYTES
        suffixes = (".json.gz", ".json") if compress else (".json", ".json.gz")
        folder = Path(self.cfg.output_dir) / files.CONTEXT_DIR
        title = self.recipe["title"]
        for number in itertools.count(1):
            name = title if number == 1 else f"{title}_{number}"
            paths = [folder / f"{files.safe_name(name)}_contexts{suffix}" for suffix in suffixes]
            is_free = all(_may_replace(result, _header_of(path)) for path in paths)
            if is_free or not result["latent_context_map"]:
                break
        if name != title:
            print(
                f"the contexts of {title} that are there hold more, or are of another text, and "
                f"stay; these are in {paths[0]}"
            )
        return paths[0], paths[1]

    # -------------------------------------------------------------------- contexts of a latent

    def _describe(self, collector: ContextCollector, lines: int) -> dict[str, Entry]:
        """Return {latent: contexts and statistics} of the latents with enough contexts."""
        top, sample = collector.top, collector.sample
        if top.kept is None or sample.kept is None:
            return {}
        n_latents = self.sae.latent_size
        profile = self.sae.site_profile()
        pool_texts = [tuple(window["tokens"]) for window in self._pool_windows(collector)]
        latents = tqdm(range(n_latents), "decoding", unit=" latents", mininterval=1)
        entries = {}
        for latent, best, drawn in zip(latents, top.by_latent(), sample.by_latent(), strict=True):
            shown: set[Marked] = set()
            contexts = self._best_contexts(collector.windows, best, drawn, shown)
            if len(contexts) < lines:
                continue
            activations = drawn.value.sort(descending=True).values.tolist()
            spread = self._contexts_by_quarter(collector.windows, drawn, shown)
            entries[str(latent)] = {
                **columns(contexts),
                **self._statistics(collector, profile, latent),
                "sample_activations": [round(activation, 4) for activation in activations],
                "sample": spread,
                "negatives": collector.negatives(
                    latent, pool_texts, {pieces for pieces, _ in shown}
                ),
            }
        return entries

    @staticmethod
    def _statistics(collector: ContextCollector, profile: Tensor | None, latent: int) -> Entry:
        """profile: decoder norms by site [L,F]; without it, firings by site are counted."""
        fired = collector.fired_at_site[latent]
        norms = None
        if profile is not None:
            norms = [round(norm, 4) for norm in profile[:, latent].tolist()]
        means = collector.strength_at_site[latent] / fired.clamp_min(1)
        return {
            "density": float(fired.sum() / collector.n_codes),
            "max_activation": round(float(collector.maximum[latent]), 4),
            "site_counts": fired.tolist() if norms is None else None,
            "site_strengths": [round(mean, 4) for mean in means.tolist()],
            "decoder_norms": norms,
        }

    def _best_contexts(
        self, windows: Windows, best: Events, sample: Events, shown: set[Marked]
    ) -> list[Context]:
        """Return the best contexts of a latent, above the quantile of its sample if one is set."""
        quantile = self.cfg.quantile
        cut = -math.inf
        if quantile is not None and len(sample.value):
            cut = float(sample.value.quantile(quantile))
        index = (best.value >= cut).nonzero()[:, 0]
        return self._contexts(windows, best, index, self.cfg.top_n, shown)

    def _contexts_by_quarter(
        self, windows: Windows, sample: Events, shown: set[Marked]
    ) -> list[Context]:
        """Return a few contexts from each quarter of a latent's sample, the strongest first."""
        rank = sample.value.argsort(descending=True, stable=True).argsort()
        quarter = rank * QUARTERS // max(1, len(rank))
        result = []
        for number in range(QUARTERS):
            index = (quarter == number).nonzero()[:, 0]  # in the random order of the sample
            contexts = self._contexts(windows, sample, index, PER_QUARTER, shown)
            contexts.sort(key=lambda context: -context["activation"])
            result += [context | {"quarter": number + 1} for context in contexts]
        return result

    def _contexts(
        self,
        windows: Windows,
        events: Events,
        index: Tensor,
        n: int,
        shown: set[Marked],
    ) -> list[Context]:
        """Return up to n contexts of some events, and add them to those shown.

        A text that is already shown with the same token marked is left out.
        """
        contexts: list[Context] = []
        for number in index.tolist():
            if len(contexts) == n:
                break
            event = Events(*(part[number] for part in events))
            ids, start, document = windows.around(int(event.row), int(event.position))
            pieces, first = self._whole_sentences(ids, int(event.position) - start)
            position = int(event.position) - start - first
            if (tuple(pieces), position) not in shown:
                shown.add((tuple(pieces), position))
                around = event.around[windows.reach - position :][: len(pieces)]
                place = {"document": document, "row": int(event.row), "start": start + first}
                contexts.append(self._context(event, pieces, position, around) | place)
        return contexts

    def _whole_sentences(self, ids: list[int], position: int) -> tuple[list[str], int]:
        """Return (texts of the tokens of whole sentences around one, index of the first)."""
        pieces = self.text.pieces(ids)
        if not ids:
            return pieces, 0
        first, end = sentence_bounds(pieces, position)
        return pieces[first:end], first

    def _context(self, event: Events, pieces: list[str], position: int, around: Tensor) -> Context:
        """Describe an event. position: its token's index in the window; around: strengths [W]."""
        site = int(event.site)
        active = around.nonzero()[:, 0].tolist()
        return {
            "activation": round(float(event.value), 4),
            "tokens": pieces,
            "position": position,
            "token_activations": [[index, round(float(around[index]), 3)] for index in active],
            "token_class": self.text.names[int(event.group)],
            "layer": self.sae.sites()[site] if site >= 0 else None,
            "router_weight": round(float(event.weight), 4),
        }

    # ---------------------------------------------------------------------- what a latent does

    def _directions(self, latents: list[int]) -> Tensor:
        """Return what one unit of each latent adds at the last of the SAE's sites. [n,D]"""
        one_hot = torch.zeros(len(latents), self.sae.latent_size, device=self.cfg.device)
        one_hot[torch.arange(len(latents)), torch.tensor(latents)] = 1
        added = self.sae.contribution(one_hot)
        return added.reshape(len(latents), -1, self.sae.hidden_size)[:, -1]

    def _add_promoted(self, entries: dict[str, Entry]) -> None:
        """Name the tokens whose logits each decoder direction raises and lowers most.

        The direction is read through the final norm and the head alone. What all latents have in
        common there, their mean, is subtracted: it names the same tokens for each.
        """
        model = self.language_model
        latents = [int(latent) for latent in entries]
        chunks = [
            latents[start : start + PROMOTED_CHUNK]
            for start in range(0, len(latents), PROMOTED_CHUNK)
        ]
        states = [self._final_states(chunk) for chunk in chunks]
        if not states:
            return
        # The head is linear: the logits of the mean state are the mean logits.
        mean = torch.cat(states).mean(0, keepdim=True)
        common = lm.logits_of(model, mean)
        for chunk, chunk_states in zip(chunks, states, strict=True):
            changes = lm.logits_of(model, chunk_states) - common
            hooks.check_logits(changes)
            for latent, change in zip(chunk, changes, strict=True):
                entry = entries[str(latent)]
                change = change - change.mean()
                self._name_tokens(entry, "", change)
                entry["logit_histogram"] = _logit_histogram(change)

    def _final_states(self, latents: list[int]) -> Tensor:
        """Return what the final norm makes of the decoder directions. [n,D]"""
        model = self.language_model
        states = self._directions(latents)[:, None].to(next(model.parameters()).dtype)
        ids = torch.zeros(len(latents), 1, dtype=torch.long, device=states.device)
        with lm.resumed_at(model, len(lm.blocks(model)), states):
            return lm.final_states(model, ids)[:, 0]

    def _add_nearest(self, entries: dict[str, Entry]) -> None:
        """Name the latents whose decoder directions have the largest cosine with each one's."""
        latents = [int(latent) for latent in entries]
        if len(latents) < 2:
            return
        chunks = [
            latents[start : start + lm.HEAD_CHUNK]
            for start in range(0, len(latents), lm.HEAD_CHUNK)
        ]
        directions = F.normalize(torch.cat([self._directions(chunk) for chunk in chunks]), dim=1)
        first = 0
        for chunk in chunks:
            own = torch.arange(first, first + len(chunk))
            cosines = directions[own] @ directions.T
            cosines[torch.arange(len(chunk)), own] = -math.inf
            values, indices = cosines.topk(min(NEAREST, len(latents) - 1))
            for latent, row, near in zip(chunk, values.tolist(), indices.tolist(), strict=True):
                entries[str(latent)]["nearest"] = [
                    [latents[index], round(cosine, 3)]
                    for index, cosine in zip(near, row, strict=True)
                ]
            first += len(chunk)

    @staticmethod
    def _add_partners(entries: dict[str, Entry], collector: ContextCollector) -> None:
        """Name the latents that are active on the same tokens, with the share of the tokens."""
        partners = collector.together.partners([int(latent) for latent in entries])
        for latent, pairs in partners.items():
            entries[str(latent)]["partners"] = [[other, round(share, 3)] for other, share in pairs]

    def _name_tokens(self, entry: Entry, prefix: str, change: Tensor) -> None:
        """Add the tokens of largest and of smallest change [V] to an entry.

        Special tokens are left out, and tokens that are no whole characters.
        """
        named = self._named[self._named < len(change)]
        change = change[named]
        for name, sign in (("promoted", 1), ("suppressed", -1)):
            values, index = (sign * change).topk(min(PROMOTED, len(change)))
            entry[prefix + name] = [
                [self.text.text[token], round(sign * value, 4)]
                for token, value in zip(named[index].tolist(), values.tolist(), strict=True)
            ]

    @cached_property
    def _named(self) -> Tensor:
        """The tokens that a list of tokens may name. int64 [n]"""
        special = set(special_tokens(self.tokenizer))
        tokens = [
            token
            for token, text in enumerate(self.text.text)
            if text and BROKEN not in text and token not in special
        ]
        return torch.tensor(tokens, device=self.cfg.device)

    def _add_effects(self, entries: dict[str, Entry], top: Table, rows: Rows) -> None:
        """Measure what the removal of a latent does at its best events.

        Only the latents of largest activation are removed. An entry gets the KL and the tokens
        that lose and gain most probability.
        """
        strongest = sorted(entries, key=lambda latent: -entries[latent]["max_activation"])
        strongest = strongest[: self.cfg.effect]
        for latent in tqdm(strongest, "effects", unit=" latents", mininterval=1):
            index = (top.kept.latent == int(latent)).nonzero()[:EFFECT_CONTEXTS, 0]
            batch = rows.batch(top.kept.row[index].tolist()).to(self.cfg.device)
            kl, change = self._effect(int(latent), batch, top.kept.position[index])
            entries[latent]["effect_KL"] = round(kl, 6)
            self._name_tokens(entries[latent], "effect_", change)

    def _effect(self, latent: int, batch: Batch, position: Tensor) -> tuple[float, Tensor]:
        """Return (KL, probability that each token loses [V]) if a latent is removed.

        Both are means over one position of each row [B].
        """
        model, sae = self.language_model, self.sae

        def log_probs(states: Tensor) -> Tensor:
            rows = torch.arange(len(position), device=states.device)
            return lm.logits_of(model, states[rows, position]).log_softmax(-1)

        states = lm.read_sites(model, batch.input_ids, sae.sites())
        hidden = {site: state[batch.mask].float() for site, state in states.items()}
        clean = log_probs(lm.final_states(model, batch.input_ids))
        remove = hooks.edit_latents([("set", latent, 0.0)])
        runs = list(sae.patches(hidden, hooks.batch_info(self.cfg, batch), edit=remove))
        kl, change = 0.0, torch.zeros_like(clean[0])
        for patches in runs:
            edited = log_probs(hooks.patched_states(model, batch, patches, states))
            kl += float(token_kl(clean, edited).mean()) / len(runs)
            change += (clean.exp() - edited.exp()).mean(0) / len(runs)
        return kl, change

    # ------------------------------------------------------------------------------ the header

    def _header(
        self, collector: ContextCollector, rows: Rows, n_latents: int, options: ContextOptions
    ) -> dict[str, Any]:
        """Return the fields of the JSON that describe the whole run."""
        cfg, sae = self.cfg, self.sae
        header = {
            "model": sae.name,
            "source_model": str(cfg.model_path),
            "sae_path": cfg.SAE_path[0],
            "title": self.recipe["title"],
            "total_latents": n_latents,
            "latent_size": sae.latent_size,
            "threshold": options.threshold,
            "quantile": cfg.quantile,
            "max_length": options.max_length,
            "max_per_token": options.max_per_token,
            "lines": options.lines,
            "top_n": cfg.top_n,
            "effects": cfg.effect,
            "sites": sae.sites(),
            "tokens": collector.n_tokens,
            "rows": len(rows),
            "split": cfg.split,
            "data_path": str(cfg.data_path),
            "data_fingerprint": rows.fingerprint,
            "largest_activation": round(collector.largest, 4),
            "latents_above_threshold": int((collector.maximum > options.threshold).sum()),
            "latents_that_fire": int((collector.fired > 0).sum()),
            "firings": collector.fired.tolist(),
            "codes": collector.n_codes,
            "tokens_of_partners": collector.together.n_tokens,
            "seed": cfg.seed,
            "infer_k": cfg.infer_k,
            "theta": cfg.theta,
            "weights_sum": self.recipe["weights_sum"],
        }
        return header | self._text_sample(collector) | checkpoint.environment()

    def _text_sample(self, collector: ContextCollector) -> dict[str, Any]:
        """Return what was read in a sample of the text; with a router, the shares of its sites."""
        sample = collector.text_sample
        tokens = self.text.pieces(sample.ids.tolist())
        result = {"sample": {"tokens": tokens, "strongest": _rounded(sample.strongest)}}
        if sample.weights is not None:
            shares = [count / collector.n_codes for count in collector.codes_at_site.tolist()]
            weights = [[round(weight, 3) for weight in token] for token in sample.weights.tolist()]
            result["routing"] = {
                "share": [round(share, 5) for share in shares],
                "sample": {"tokens": tokens, "weights": weights},
            }
        return result


def _rounded(strongest: list[list[tuple[int, float]]]) -> list[list[list[float]]]:
    """Return the (latent, strength) of each token as they are written."""
    return [[[latent, round(value, 3)] for latent, value in token] for token in strongest]


def _header_of(path: Path) -> dict[str, Any]:
    """Return what a contexts file says of its run; nothing if it is damaged or of another kind.

    Only its beginning is read.
    """
    if path.is_symlink() or not path.is_file():
        return {}
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            start, marker, _ = file.read(HEADER_BYTES).partition(b', "negatives": ')
        header = files.parse_json(start.decode("utf-8") + "}") if marker else {}
    except (OSError, EOFError, ValueError, zlib.error):
        return {}
    return header if isinstance(header, dict) else {}


def _may_replace(result: dict[str, Any], earlier: dict[str, Any]) -> bool:
    return identity.may_replace(result, earlier, SAME_TEXT, NO_LESS, NO_MORE)


def _logit_histogram(change: Tensor) -> Entry:
    """Return {"from", "to", "counts"} of what a direction adds to the logits [V]."""
    change = change.float()
    low, high = float(change.min()), float(change.max())
    counts = torch.histc(change, LOGIT_BINS, low, high).long().tolist()
    return {"from": round(low, 4), "to": round(high, 4), "counts": counts}
