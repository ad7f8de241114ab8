"""An SAE in Python, for notebooks and scripts: codes and routing of a text, contexts of a latent.

N counted tokens, L sites, F latents.
"""

from __future__ import annotations

import html
from argparse import Namespace
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src import checkpoint, config, demo, files, hooks, lm, names
from src.contexts import TokenText, text_decoder
from src.data import Batch, count_mask, encode_text, special_token_table
from src.feature_files import contexts_of, read_features
from src.ops import squared_errors
from src.page import site_colours
from src.rule_labels import BY_RULE_MARK
from src.sae import SAE
from src.sparse import dense

STRIP_LATENTS = 3  # latents that a token of the strip names when it is pointed at
LABEL_CHARS = 80  # of their labels


class Feature(NamedTuple):
    """A latent that is active in a text."""

    latent: int
    strength: float  # at the token where it is strongest
    token: int  # index of that token
    label: str | None  # None without a label


class Reading(NamedTuple):
    """What an SAE reads in one text. Special tokens and position 0 are left out.

    A notebook shows it as a strip of tokens, coloured by the site where the router read each.
    """

    tokens: list[str]  # [N]; a character over several tokens stands whole at its first one
    latents: Tensor  # strengths [N,F]; [N,L,F] of an SAE with a code for every site
    sites: list[int] | None  # where the router read each token [N]; None without a router
    weights: Tensor | None  # the router's weight of each site [N,L]; None without a router
    NormMSE: Tensor  # share of each token's standardised input that the SAE misses [N]
    labels: Mapping[int, str] = {}  # {latent: label} of those that have one

    @property
    def strengths(self) -> Tensor:
        """The strength of each latent at each token, the largest over the sites. [N,F]"""
        return self.latents.reshape(len(self.tokens), -1, self.latents.shape[-1]).amax(1)

    def strongest(self, n: int = 5) -> list[list[tuple[int, float]]]:
        """Return up to n (latent, strength) of each token, by falling strength.

        If there is a code for every site, the strength is the largest over the sites.
        """
        strength = self.strengths
        values, indices = strength.topk(min(n, strength.shape[1]))
        result = []
        for row in zip(indices.tolist(), values.tolist(), strict=True):
            pairs = zip(*row, strict=True)
            result.append([(latent, value) for latent, value in pairs if value > 0])
        return result

    def features(self, n: int = 10) -> list[Feature]:
        """Return the n latents that are strongest in the text, each at its strongest token."""
        largest, token = self.strengths.max(0)
        values, latents = largest.topk(min(n, len(largest)))
        return [
            Feature(latent, value, int(token[latent]), self.labels.get(latent))
            for latent, value in zip(latents.tolist(), values.tolist(), strict=True)
            if value > 0
        ]

    def _short_label(self, latent: int) -> str:
        return names.shortened(self.labels.get(latent, ""))[:LABEL_CHARS]

    def __str__(self) -> str:
        lines = [f"{'token':<16}{'site':>5}{'NormMSE':>9}  strongest latents"]
        sites = self.sites or [""] * len(self.tokens)
        rows = zip(self.tokens, sites, self.NormMSE.tolist(), self.strongest(), strict=True)
        for token, site, error, pairs in rows:
            latents = "  ".join(f"{latent}:{value:.2f}" for latent, value in pairs)
            lines.append(f"{token!r:<16}{site:>5}{error:>9.3f}  {latents}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the strip. Pointing at a token shows its strongest latents and their labels."""
        used = sorted(set(self.sites or []))
        colours = site_colours(used) if used else {}
        spans = []
        for index, pairs in enumerate(self.strongest(STRIP_LATENTS)):
            site = self.sites[index] if self.sites else None
            facts = [] if site is None else [f"site {site}"]
            facts += [
                f"{latent}: {value:.2f} {self._short_label(latent)}" for latent, value in pairs
            ]
            red, green, blue = colours.get(str(site), (128, 128, 128))
            style = (
                f"background:rgba({red},{green},{blue},.3);"
                f"border-bottom:3px solid rgb({red},{green},{blue})"
            )
            text = html.escape(self.tokens[index].replace("\n", "\u23ce"))
            title = html.escape("\n".join(facts))
            spans.append(f'<span style="{style}" title="{title}">{text}</span>')
        legend = "".join(
            f'<span style="border-bottom:3px solid rgb({red},{green},{blue});margin-left:6px">'
            f"{site}</span>"
            for site, (red, green, blue) in colours.items()
        )
        above = f"<small>site{legend}</small><br>" if used else ""
        style = "white-space:pre-wrap;font-family:monospace;line-height:1.9"
        return f'<div>{above}<div style="{style}">{"".join(spans)}</div></div>'


class Reader:
    """An SAE and the language model it was trained on.

    SAE_path: a checkpoint, a folder or a hub name; by default the newest under output_dir.
    options: those of apply.py (model_path, device, dtype, output_dir, infer_k ...). Raises
    ValueError for unknown options and unusable files.
    """

    def __init__(self, SAE_path: str | Path | None = None, **options: Any) -> None:
        cfg = config.parse("apply", [])
        unknown = sorted(set(options) - set(vars(cfg)))
        if unknown:
            raise ValueError(f"no option {', '.join(unknown)}; `python apply.py --help` lists them")
        vars(cfg).update(options)
        if SAE_path:
            cfg.SAE_path = [str(SAE_path)]
        cfg.typed = set(options)
        config.check(cfg)
        sae, recipe = checkpoint.open_all(cfg)[0]
        demo.use_demo_defaults(cfg)
        self._set(cfg, sae, recipe, *hooks.open_language_model(cfg, [(sae, recipe)]))

    @classmethod
    def of(
        cls, cfg: Namespace, sae: SAE, recipe: Mapping[str, Any], tokenizer: Any, model: nn.Module
    ) -> Reader:
        """Return a reader of what is already open, so that readers can share a language model."""
        reader = object.__new__(cls)
        reader._set(cfg, sae, recipe, tokenizer, model)
        return reader

    def _set(
        self, cfg: Namespace, sae: SAE, recipe: Mapping[str, Any], tokenizer: Any, model: nn.Module
    ) -> None:
        self.cfg = cfg
        self.sae = sae
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.language_model = model

    @torch.no_grad()
    def read(self, text: str) -> Reading:
        """Return the codes of a text, from one forward pass that ends after the SAE's last site.

        Raises ValueError if no token of the text counts, or if the text is longer than the position
        table of the language model.
        """
        batch = self.batch(text)
        return self.reading(batch, hooks.read(self.language_model, batch, self.sae.sites()))

    @torch.no_grad()
    def reading(self, batch: Batch, hidden: Mapping[int, Tensor]) -> Reading:
        """Return the codes of a batch of batch() whose states {site: [N,D]} are known."""
        out = self.sae.autoencode(self.sae.gather(hidden), hooks.batch_info(self.cfg, batch))
        tokens = self._text.pieces(batch.input_ids[batch.mask].tolist())
        errors = squared_errors(out.target, out.x_hat)
        errors = errors.view(len(tokens), -1).mean(1)  # over the sites, if each has its own
        sites = None
        weights = self.sae.site_weights(out)
        if weights is not None:
            sites = [self.sae.sites()[index] for index in weights.argmax(-1).tolist()]
            weights = weights.cpu()
        latents = dense(self.sae.strength(out)).cpu()
        return Reading(tokens, latents, sites, weights, errors.cpu(), self.labels)

    def batch(self, text: str) -> Batch:
        """Return the tokens of a text, from the begin-of-text token on if there is one. [1,S]

        Raises ValueError if no token counts, or if the text is longer than learned positions.
        """
        ids = encode_text(self.tokenizer, text)
        if self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id, *ids]
        input_ids = torch.tensor([ids], dtype=torch.long)
        if ids:
            mask = count_mask(input_ids, special_token_table(self.tokenizer))
        if not ids or not mask.any():
            raise ValueError(f"{text[:40]!r} has no token that counts; give a word or more")
        lm.check_length(self.language_model, len(ids))
        row = torch.zeros(1, dtype=torch.long)
        return Batch(input_ids, mask, torch.zeros_like(input_ids), row).to(self.cfg.device)

    @cached_property
    def _text(self) -> TokenText:
        return TokenText.of_few(*text_decoder(self.tokenizer))

    @property
    def contexts_path(self) -> Path | None:
        """The contexts file of apply.py for this SAE, if there is one."""
        return contexts_of(self.cfg.output_dir, self.recipe["title"])

    @cached_property
    def feature_files(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contexts of apply.py and the labels of interpret.py for this SAE.

        Raises ValueError if apply.py has not run.
        """
        path = self.contexts_path
        if path is None:
            title = self.recipe["title"]
            folder = Path(self.cfg.output_dir) / files.CONTEXT_DIR
            command = f"python apply.py --SAE_path {self.cfg.SAE_path[0]}"
            raise ValueError(f"no contexts of {title} in {folder}; run: {command}")
        return read_features(path)

    @cached_property
    def labels(self) -> dict[int, str]:
        """The labels of interpret.py, {latent: label}; empty if it has not run."""
        if self.contexts_path is None:
            return {}
        return {
            int(latent): label["description"].removeprefix(BY_RULE_MARK).strip()
            for latent, label in self.feature_files[1].items()
            if label.get("description") and latent.isdecimal()
        }

    def contexts(self, latent: int) -> list[tuple[float, str]]:
        """Return (strength, text) of the latent's strongest contexts, as apply.py found them.

        The list is empty if apply.py kept none. Raises ValueError if it has not run.
        """
        entry = self.feature_files[0]["latent_context_map"].get(str(latent))
        if entry is None:
            return []
        texts = ["".join(tokens) for tokens in entry["tokens"]]
        return list(zip(entry["activations"], texts, strict=True))
