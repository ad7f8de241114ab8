"""An SAE in Python, for notebooks and scripts: codes and routing of a text, contexts of a latent.

N counted tokens, L sites, F latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src import checkpoint, config, demo, files, hooks, lm
from src.data import Batch, count_mask, encode_text, special_token_table
from src.ops import squared_errors
from src.sparse import dense


class Reading(NamedTuple):
    """What an SAE reads in one text. Special tokens and position 0 are left out."""

    tokens: list[str]  # [N]
    latents: Tensor  # strengths [N,F]; [N,L,F] of an SAE with a code for every site
    sites: list[int] | None  # where the router read each token [N]; None without a router
    weights: Tensor | None  # the router's weight of each site [N,L]; None without a router
    NormMSE: Tensor  # share of each token's standardised input that the SAE misses [N]

    def strongest(self, n: int = 5) -> list[list[tuple[int, float]]]:
        """Return up to n (latent, strength) of each token, by falling strength.

        If there is a code for every site, the strength is the largest over the sites.
        """
        latent_size = self.latents.shape[-1]
        strength = self.latents.reshape(len(self.tokens), -1, latent_size).amax(1)
        values, indices = strength.topk(min(n, latent_size))
        result = []
        for row in zip(indices.tolist(), values.tolist(), strict=True):
            pairs = zip(*row, strict=True)
            result.append([(latent, value) for latent, value in pairs if value > 0])
        return result

    def __str__(self) -> str:
        lines = [f"{'token':<16}{'site':>5}{'NormMSE':>9}  strongest latents"]
        sites = self.sites or [""] * len(self.tokens)
        rows = zip(self.tokens, sites, self.NormMSE.tolist(), self.strongest(), strict=True)
        for token, site, error, pairs in rows:
            latents = "  ".join(f"{latent}:{value:.2f}" for latent, value in pairs)
            lines.append(f"{token!r:<16}{site:>5}{error:>9.3f}  {latents}")
        return "\n".join(lines)


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
        self.cfg = cfg
        self.sae, self.recipe = checkpoint.open_all(cfg)[0]
        demo.use_demo_defaults(cfg)
        self.tokenizer, self.language_model = hooks.open_language_model(cfg, [self.sae])

    @torch.no_grad()
    def read(self, text: str) -> Reading:
        """Return the codes of a text, from one forward pass that ends after the SAE's last site.

        Raises ValueError if no token of the text counts, or if the text is longer than the position
        table of the language model.
        """
        batch = self._batch(text)
        hidden = hooks.read(self.language_model, batch, self.sae.sites())
        out = self.sae.autoencode(self.sae.gather(hidden), hooks.batch_info(self.cfg, batch))
        tokens = [self.tokenizer.decode([token]) for token in batch.input_ids[batch.mask].tolist()]
        errors = squared_errors(out.target, out.x_hat)
        errors = errors.view(len(tokens), -1).mean(1)  # over the sites, if each has its own
        sites = None
        weights = self.sae.site_weights(out)
        if weights is not None:
            sites = [self.sae.sites()[index] for index in weights.argmax(-1).tolist()]
            weights = weights.cpu()
        latents = dense(self.sae.strength(out)).cpu()
        return Reading(tokens, latents, sites, weights, errors.cpu())

    def _batch(self, text: str) -> Batch:
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

    def contexts(self, latent: int) -> list[tuple[float, str]]:
        """Return (strength, text) of the latent's strongest contexts, as apply.py found them.

        The list is empty if apply.py kept none. Raises ValueError if it has not run.
        """
        title = self.recipe["title"]
        folder = Path(self.cfg.output_dir) / files.CONTEXT_DIR
        path = files.newest(folder, f"{files.safe_name(title)}_contexts.json*")
        if path is None:
            command = f"python apply.py --SAE_path {self.cfg.SAE_path[0]}"
            raise ValueError(f"no contexts of {title} in {folder}; run: {command}")
        entry = files.load_json(path)["latent_context_map"].get(str(latent))
        if entry is None:
            return []
        texts = ["".join(tokens) for tokens in entry["tokens"]]
        return list(zip(entry["activations"], texts, strict=True))
