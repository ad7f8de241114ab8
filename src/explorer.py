"""A text of your own: what SAEs read in it, and how it goes on while latents are edited.

Several SAEs share one language model. One request uses it at a time.
"""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from src import checkpoint, demo, hooks, names
from src.page import SCRIPTS, fill_in, page_data, site_colours
from src.reader import Reader, Reading
from src.sae import Edit
from src.steering import Operation, SteeredText

MAX_CHARS = 4000  # of a text: what a page reads at every pause in typing
STRONGEST = 6  # latents named at a token
PATIENCE = 10.0  # seconds that a request waits for the language model
LARGEST_FLOAT = 1e30
KINDS = ("set", "add", "multiply")
# The scripts of the page, with the box before the one that starts them.
EXPLORE_SCRIPTS = (*SCRIPTS[:-1], "explore.js", SCRIPTS[-1])


class Busy(ValueError):
    """The language model is in use for longer than a request waits."""

    busy = True


class Explorer:
    """Answers the requests of explore.py's page. Its methods may be called from any thread."""

    def __init__(self, cfg: Namespace) -> None:
        self.cfg = cfg
        opened = checkpoint.open_all(cfg)
        demo.use_demo_defaults(cfg)
        cfg.temperature = 0.0  # beside each other, texts compare only if they are the likeliest
        saes = [sae for sae, _ in opened]
        self.tokenizer, self.model = hooks.open_language_model(cfg, opened)
        self.sites = sorted({site for sae in saes for site in sae.sites()})
        self.readers = []
        self.writers = []
        for sae, recipe in opened:
            self.readers.append(Reader.of(cfg, sae, recipe, self.tokenizer, self.model))
            writer = SteeredText(cfg, sae, recipe["title"])
            writer.attach(self.tokenizer, self.model)
            self.writers.append(writer)
        self._lock = threading.Lock()
        self._pages: dict[int, str] = {}
        self._last = "", Growing(iter(()))  # the last text that was continued without an edit
        self.page(0)  # what takes seconds is done before the address is printed

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the language model. Raises Busy if it does not become free in time."""
        if not self._lock.acquire(timeout=PATIENCE):
            raise Busy("the language model is busy")
        try:
            with torch.no_grad():
                yield
        finally:
            self._lock.release()

    def _number(self, index: Any) -> int:
        """Return the number of an SAE. Raises ValueError if there is none of that number."""
        last = len(self.readers) - 1
        if not isinstance(index, int) or not 0 <= index <= last:
            raise ValueError(f"SAE {str(index)[:20]}: there are 0 ... {last}")
        return index

    # ------------------------------------------------------------------------------ the page

    def page(self, index: int = 0) -> str:
        """Return the page of one of the SAEs, with the box."""
        index = self._number(index)
        if index not in self._pages:
            data = self._page_data(self.readers[index])
            data["about"]["colours"] = site_colours(self.sites)
            saes = [
                {"title": reader.recipe["title"], "sites": reader.sae.sites()}
                for reader in self.readers
            ]
            data["live"] = {"saes": saes, "current": index, "tokens": self.cfg.max_new_tokens}
            self._pages[index] = fill_in(data, EXPLORE_SCRIPTS, "'self'")
        return self._pages[index]

    def _page_data(self, reader: Reader) -> dict[str, Any]:
        """Return the data of an SAE's page; without contexts, of a page without features."""
        if reader.contexts_path is not None:
            return page_data(*reader.feature_files, [])
        nothing = {"total_latents": 0, "tokens": 0, "threshold": 0.0, "latent_context_map": {}}
        sae = reader.sae
        contexts = {
            "title": reader.recipe["title"],
            "model": sae.name,
            "source_model": str(self.cfg.model_path),
            "sites": sae.sites(),
            "latent_size": sae.latent_size,
        }
        return page_data(contexts | nothing, {}, [])

    # ------------------------------------------------------------------------------ reading

    def read(self, text: Any) -> dict[str, Any]:
        """Return {"tokens", "saes"}: what each SAE reads at each token of a text.

        Of each SAE it gives "sites" and "weights" of the router, or None, "NormMSE", and up to
        STRONGEST [latent, strength] of each token as "strongest", with their "labels". Raises
        ValueError for a text that cannot be read, and Busy.
        """
        text = _checked_text(text)
        with self._turn():
            batch = self.readers[0].batch(text)
            hidden = hooks.read(self.model, batch, self.sites)
            readings = [reader.reading(batch, hidden) for reader in self.readers]
        return {"tokens": readings[0].tokens, "saes": [_summary(reading) for reading in readings]}

    # ------------------------------------------------------------------------------ steering

    def steer(self, index: Any, text: Any, operations: Any) -> Iterator[dict[str, Any]]:
        """Yield {"as_is", "steered", "site", "step"} after each new token of the two texts.

        index: of the SAE. operations: [[kind, latent, value], ...] as hooks.edit_latents takes
        them, in units of strength. Raises ValueError for operations that are none, and Busy. The
        language model is free for others between two tokens.
        """
        writer = self.writers[self._number(index)]
        text = _checked_text(text)
        checked = _checked_operations(operations)
        writer.check_operations(checked)
        with self._turn():
            ids = writer.ids({"prompt": text})
            site = writer.site(ids, [latent for _, latent, _ in checked])
        plain = self._as_is(writer, text, ids)
        steered = Growing(self._texts(writer, ids, hooks.edit_latents(checked), site))
        for step in range(self.cfg.max_new_tokens):
            with self._turn():
                texts = {"as_is": plain.text(step), "steered": steered.text(step)}
            yield texts | {"site": site, "step": step + 1}

    def _as_is(self, writer: SteeredText, text: str, ids: Tensor) -> Growing:
        """Return the text without an edit. It is the same for all SAEs, and written once."""
        if text != self._last[0]:
            self._last = text, Growing(self._texts(writer, ids, None, None))
        return self._last[1]

    def _texts(
        self, writer: SteeredText, ids: Tensor, edit: Edit | None, site: int | None
    ) -> Iterator[str]:
        """Yield the new text after each of its tokens."""
        new: list[int] = []
        for token in writer.new_tokens(ids, edit, site):
            new.append(int(token))
            yield self.tokenizer.decode(new, skip_special_tokens=True)


class Growing:
    """A text that is written as far as somebody reads it."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source = source
        self._texts = [""]

    def text(self, step: int) -> str:
        """Return the text after token number `step`, from 0, or all of it if it is shorter."""
        while len(self._texts) <= step + 1:
            text = next(self._source, None)
            if text is None:
                break
            self._texts.append(text)
        return self._texts[min(step + 1, len(self._texts) - 1)]


def _checked_text(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no text; type a word or more")
    if len(text) > MAX_CHARS:
        raise ValueError(f"the text has {len(text):,} characters; at most {MAX_CHARS:,} are read")
    # A lone surrogate, which JSON can hold, is no text to a tokenizer.
    return text.encode("utf-8", "replace").decode()


def _checked_operations(operations: Any) -> list[Operation]:
    if not isinstance(operations, list) or not operations:
        raise ValueError("no edit; hold, add to or switch off a latent")
    return [_checked_operation(operation) for operation in operations]


def _checked_operation(operation: Any) -> Operation:
    """Raise ValueError if a value is no [kind, latent, value]."""
    if isinstance(operation, list) and len(operation) == 3:
        kind, latent, value = operation
        numbers = type(latent) is int and type(value) in (int, float)
        if kind in KINDS and numbers and abs(value) <= LARGEST_FLOAT:
            return kind, latent, float(value)
    raise ValueError(f"an edit is [kind, latent, value] with a kind of {', '.join(KINDS)}")


def _summary(reading: Reading) -> dict[str, Any]:
    """Return what the page shows of a reading."""
    strongest = reading.strongest(STRONGEST)
    named = {latent for pairs in strongest for latent, _ in pairs}
    weights = reading.weights
    return {
        "sites": reading.sites,
        "weights": None if weights is None else [_rounded(row) for row in weights.tolist()],
        "NormMSE": float(reading.NormMSE.mean()),
        "strongest": [[[latent, round(value, 3)] for latent, value in row] for row in strongest],
        "labels": {
            latent: names.shortened(reading.labels[latent])
            for latent in named
            if latent in reading.labels
        },
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]
