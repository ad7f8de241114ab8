"""An SAE at hand in Python: text in, codes, routing and contexts out. For notebooks and scripts; no stage needs it.

N counted tokens, L sites, F latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src import checkpoint, config, demo, files, hooks
from src.data import Batch
from src.ops import squared_errors
from src.sparse import dense


class Reading(NamedTuple):
    """What an SAE sees in one text. Special tokens and position 0 do not count and are left out."""

    tokens: list[str]  # [N]
    latents: Tensor  # strengths [N,F]; [N,L,F] of an SAE with a code for every site
    sites: list[int] | None  # where the router read each token [N]; None without a router
    weights: Tensor | None  # the router's weight of each site [N,L], None without a router
    NormMSE: Tensor  # share of each token's standardised input that the SAE misses [N]

    def strongest(self, n: int = 5) -> list[list[tuple[int, float]]]:
        """The n largest latents of each token, (latent, strength); over all sites of an SAE with a code for every site."""
        flat = self.latents if self.latents.dim() == 2 else self.latents.amax(1)
        values, index = flat.topk(min(n, flat.shape[-1]))
        return [
            [(i, v) for i, v in zip(*pair, strict=True) if v > 0]
            for pair in zip(index.tolist(), values.tolist(), strict=True)
        ]

    def __str__(self) -> str:
        lines = [f"{'token':<16}{'site':>5}{'NormMSE':>9}  strongest latents"]
        for i, (token, error, best) in enumerate(
            zip(self.tokens, self.NormMSE.tolist(), self.strongest(), strict=True)
        ):
            site = self.sites[i] if self.sites else ""
            lines.append(
                f"{token!r:<16}{site:>5}{error:>9.3f}  "
                + "  ".join(f"{latent}:{value:.2f}" for latent, value in best)
            )
        return "\n".join(lines)


class Reader:
    """An SAE and the language model it was trained on.

    SAE_path: a checkpoint, a folder or a hub name; without one the newest under output_dir. options: any of apply.py's
    (model_path, device, dtype, output_dir, infer_k ...). Raises ValueError for unknown options and unusable files.
    """

    def __init__(self, SAE_path: str | Path | None = None, **options: Any) -> None:
        cfg = config.parse("apply", [])
        unknown = sorted(set(options) - set(vars(cfg)))
        if unknown:
            raise ValueError(f"no option {', '.join(unknown)}; `python apply.py --help` lists them")
        vars(cfg).update(options | ({"SAE_path": [str(SAE_path)]} if SAE_path else {}))
        cfg.typed = set(options)
        config.check(cfg)
        opened = checkpoint.open_all(cfg)
        self.cfg, (self.sae, self.recipe) = cfg, opened[0]
        demo.use_demo_defaults(cfg)
        self.tokenizer, self.language_model = hooks.open_language_model(cfg, [self.sae])

    @torch.no_grad()
    def read(self, text: str) -> Reading:
        """The text's codes, in one forward pass that ends after the SAE's last site. Raises ValueError for a text without a counted token."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if (
            self.tokenizer.bos_token_id is not None
        ):  # without one it is the text's first token that does not count
            ids = [self.tokenizer.bos_token_id, *ids]
        special = set(self.tokenizer.all_special_ids)
        mask = torch.tensor([[at > 0 and token not in special for at, token in enumerate(ids)]])
        if not mask.any():
            raise ValueError(f"{text[:40]!r} has no token that counts; give a word or more")
        batch = Batch(
            torch.tensor([ids]),
            mask,
            torch.zeros_like(mask, dtype=torch.long),
            torch.zeros(1, dtype=torch.long),
        ).to(self.cfg.device)
        hidden = hooks.read(self.language_model, batch, self.sae.sites())
        p = self.sae.autoencode(self.sae.gather(hidden), hooks.batch_info(self.cfg, batch))
        error = squared_errors(p.target, p.x_hat).view(len(p.target), -1).mean(1)
        weights = self.sae.site_weights(p)
        sites = None
        if weights is not None:
            sites = [self.sae.sites()[i] for i in weights.argmax(-1).tolist()]
            weights = weights.cpu()
        tokens = [
            self.tokenizer.decode([token])
            for token, counts in zip(ids, mask[0].tolist(), strict=True)
            if counts
        ]
        return Reading(tokens, dense(self.sae.strength(p)).cpu(), sites, weights, error.cpu())

    def contexts(self, latent: int) -> list[tuple[float, str]]:
        """(strength, text) of the latent's strongest contexts, as apply.py found them; empty where it kept none.

        Raises ValueError where apply.py has not run.
        """
        folder = Path(self.cfg.output_dir) / files.CONTEXT_DIR
        path = files.newest(folder, f"{files.safe_name(self.recipe['title'])}_contexts.json*")
        if path is None:
            raise ValueError(
                f"no contexts of {self.recipe['title']} in {folder}; run: python apply.py --SAE_path {self.cfg.SAE_path[0]}"
            )
        entry = files.load_json(path)["latent_context_map"].get(str(latent))
        return (
            []
            if entry is None
            else list(zip(entry["activations"], map("".join, entry["tokens"]), strict=True))
        )
