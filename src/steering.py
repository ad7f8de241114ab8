"""Text that a language model writes while latents of an SAE are edited: tokens, sites, passes.

S positions, T new tokens, V words, N counted tokens, D hidden. One text at a time: rows are [1,S].
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from src import hooks, lm
from src.data import (
    Batch,
    chat_renderer,
    count_mask,
    encode_chat,
    encode_text,
    special_token_table,
)
from src.sae import SAE, Edit

Operation = tuple[str, int, float]  # kind, latent, value; see hooks.edit_latents


class SteeredText:
    """Writes text with an edit or without one, under the options of steer.py."""

    def __init__(self, cfg: Namespace, sae: SAE, title: str) -> None:
        self.cfg = cfg
        self.sae = sae
        self.title = title

    def check_operations(self, operations: Sequence[Operation]) -> None:
        """Raise ValueError for a latent that the SAE does not have, or an endless value."""
        last = self.sae.latent_size - 1
        for _, latent, value in operations:
            if not 0 <= latent <= last or not math.isfinite(value):
                limits = f"{self.title} has latents 0 ... {last}, values are finite"
                raise ValueError(f"latent {latent} = {value}: {limits}")

    def attach(self, tokenizer: Any, model: nn.Module) -> None:
        """Set the language model that writes."""
        self.tokenizer, self.model = tokenizer, model
        self.end_tokens = lm.end_tokens(tokenizer, model)
        self.is_special = special_token_table(tokenizer).to(self.cfg.device)

    # ------------------------------------------------------------------------ tokens and sites

    def ids(self, prompt: dict[str, Any]) -> Tensor:
        """Return the tokens of a prompt, from the begin-of-text token on if there is one. [1,S]"""
        turns = prompt.get("messages")
        if not turns:
            ids = encode_text(self.tokenizer, prompt["prompt"])
        elif self.tokenizer.chat_template:
            render = chat_renderer(self.tokenizer, add_generation_prompt=True)
            try:
                text = render(turns)
            except TypeError as error:
                raise ValueError(f"the chat template refuses a conversation: {error}") from error
            ids = encode_chat(self.tokenizer, text)
        else:
            text = "\n\n".join(turn["content"] for turn in turns)
            ids = encode_text(self.tokenizer, text)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos]:  # a chat template may write it
            ids = [bos, *ids]
        if not ids:
            raise ValueError(
                "an empty prompt, and a tokenizer without a begin-of-text token; "
                "give at least one word"
            )
        lm.check_length(self.model, len(ids) + self.cfg.max_new_tokens)
        return torch.tensor([ids], device=self.cfg.device)

    def _counted_batch(self, ids: Tensor, start: int) -> Batch:
        """Return tokens [1,S], which begin at position `start` of their text, as a batch."""
        mask = count_mask(ids, self.is_special, first_counts=start > 0)
        row = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        return Batch(ids, mask, torch.zeros_like(ids), row)

    def site(self, ids: Tensor, latents: list[int]) -> int | None:
        """Return the site to edit; None if all patches of the SAE belong together.

        It is --site, or the one where the counted tokens activate the edited latents most.
        """
        hidden = hooks.read(self.model, self._counted_batch(ids, 0), self.sae.sites())
        out = self.sae.autoencode(self.sae.gather(hidden))
        best = self.sae.edit_site(out, latents)
        if best is not None and self.cfg.site is not None:
            return self.cfg.site
        return best

    # --------------------------------------------------------------------------------- passes

    def _hooks(
        self, ids: Tensor, start: int, cache: Any, edit: Edit | None, site: int | None
    ) -> dict[int, Any]:
        """Return hooks that edit new tokens [1,S], which begin at position `start`.

        The new tokens are run once before, because a router decides on their own states.
        """
        batch = self._counted_batch(ids, start)
        if edit is None or not batch.mask.any():
            return {}
        states = lm.peek(self.model, ids, cache, self.sae.sites())
        candidates = self.sae.patches(
            {site: state[batch.mask].float() for site, state in states.items()},
            hooks.batch_info(self.cfg, batch, start),
            edit=edit,
            keep_error=self.cfg.mode == "delta",
        )
        patches = next(patches for patches in candidates if site is None or site in patches)
        return hooks.patch_hooks(patches, batch.mask)

    def new_tokens(self, ids: Tensor, edit: Edit | None, site: int | None) -> Iterator[Tensor]:
        """Yield up to max_new_tokens new tokens [1,1], the end-of-text token included."""
        generator = torch.Generator(device=ids.device).manual_seed(self.cfg.seed)
        cache = None
        start = 0
        text = ids
        for _ in range(self.cfg.max_new_tokens):
            new = text[:, start:]
            with lm.hooked(self.model, self._hooks(new, start, cache, edit, site)):
                logits, cache = lm.next_logits(self.model, new, cache)
            hooks.check_logits(logits, edit is not None)
            # A model without a cache runs the whole text again for each token.
            start = 0 if cache is None else text.shape[1]
            if self.cfg.temperature:
                chances = (logits / self.cfg.temperature).softmax(-1)
                token = torch.multinomial(chances, 1, generator=generator)
            else:
                token = logits.argmax(-1, keepdim=True)
            text = torch.cat([text, token], 1)
            yield token
            if int(token) in self.end_tokens:
                return

    def _continue(self, ids: Tensor, edit: Edit | None, site: int | None) -> Tensor:
        """Return all new tokens. [1,T]"""
        return torch.cat(list(self.new_tokens(ids, edit, site)), 1)

    def _logits(self, ids: Tensor, edit: Edit | None, site: int | None) -> Tensor:
        """Return the logits of one pass without a cache. [1,S,V]"""
        with lm.hooked(self.model, self._hooks(ids, 0, None, edit, site)):
            logits = lm.logits_of(self.model, lm.final_states(self.model, ids))
        hooks.check_logits(logits, edit is not None)
        return logits

    def _logits_of_new(
        self, ids: Tensor, new: Tensor, edit: Edit | None, site: int | None
    ) -> Tensor:
        """Return the logits that predict new tokens [1,T] after ids. [T,V]"""
        logits = self._logits(torch.cat([ids, new], 1), edit, site)
        return logits[0, ids.shape[1] - 1 : -1]
