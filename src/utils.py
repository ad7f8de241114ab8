"""The documented functions of the reference, built on the program's own.

The program itself calls none of them. B rows, S positions, D hidden, L sites, F latents.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src import lm
from src.config import parse_args
from src.files import load_json, save_json
from src.hooks import edit_latents
from src.interpreter import Context, by_token_class, read_entries
from src.lm import get_language_model
from src.ops import pre_process, squared_errors, unit_norm_decoder
from src.sae import SAE, BatchInfo, Edit
from src.sae_training import LinearWarmupLR
from src.tracking import wandb_init
from src.trainer import set_seed

__all__ = [
    "L1_loss",
    "LinearWarmupLR",
    "Normalized_MSE_loss",
    "RouteHook",
    "get_language_model",
    "get_outputs",
    "hook_RouteSAE",
    "hook_SAE",
    "load_contexts",
    "log_layers",
    "parse_args",
    "pre_process",
    "save_json",
    "set_seed",
    "unit_norm_decoder",
    "wandb_init",
]

Triple = tuple[int, float, int]  # (latent, value, mode): mode 0 adds, 1 multiplies


def Normalized_MSE_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Return the mean over tokens of ||x - x_hat||^2 / ||x||^2 (Gao et al. 2024)."""
    return squared_errors(x, x_hat).mean()


def L1_loss(latents: Tensor) -> Tensor:
    """Return the mean of |latents| over tokens and latents. Training sums over latents instead."""
    return latents.abs().mean()


def log_layers(layer_weights: Tensor) -> dict[str, float]:
    """Return the share of tokens at each site of routing weights [...,L]."""
    chosen = layer_weights.argmax(-1).flatten()
    counts = torch.bincount(chosen, minlength=layer_weights.shape[-1]).float()
    shares = counts / counts.sum()
    return {f"share_{i}": float(share) for i, share in enumerate(shares)}


def load_contexts(path: str | Path) -> dict[str, dict[str, list[Context]]]:
    """Return {latent: {token class: [{"activation", "context"}]}} of a contexts file.

    In a context the active token stands between <ACTIVATED> and </ACTIVATED>. Any form of file is
    read, compressed or not. Raises ValueError if the file holds no contexts.
    """
    entries = read_entries(load_json(path), Path(path))
    return {latent: by_token_class(entry["contexts"]) for latent, entry in entries.items()}


@torch.no_grad()
def get_outputs(
    cfg: Namespace,
    batch: tuple[Tensor, Tensor],
    language_model: nn.Module,
    device: str,
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Run the language model and return (input_ids, attention_mask, outputs, hidden_states).

    cfg.sites lists the sites to read; without it cfg.layer is read. hidden_states is [B,S,D] of
    one site, [B,S,L,D] of several.
    """
    input_ids, attention_mask = (part.to(device) for part in batch[:2])
    sites = list(getattr(cfg, "sites", None) or [cfg.layer])
    states: dict[int, Tensor] = {}

    def reader(site: int) -> Any:
        def read(output: Any) -> None:
            states[site] = lm.hidden_of(output).to(device)

        return read

    hooks = {site: reader(site) for site in sites}
    with lm.hooked(language_model, hooks):
        outputs = language_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        )
    hidden = torch.stack([states[site] for site in sites], dim=2)
    if len(sites) == 1:
        hidden = hidden[:, :, 0]
    return input_ids, attention_mask, outputs, hidden


def triples_edit(
    set_high: list[Triple] | None = None, set_low: list[Triple] | None = None
) -> Edit | None:
    """Return the edit of documented triples: set_high adds or multiplies, set_low undoes that."""
    operations = []
    for latent, value, mode in set_high or []:
        kind = "add" if mode == 0 else "multiply"
        operations.append((kind, latent, value))
    for latent, value, mode in set_low or []:
        if mode == 0:
            operations.append(("add", latent, -value))
        else:
            operations.append(("multiply", latent, 1 / value))
    return edit_latents(operations) if operations else None


def _cut(cfg: Namespace) -> BatchInfo:
    infer_k = getattr(cfg, "infer_k", None)
    theta = getattr(cfg, "theta", None)
    return BatchInfo(infer_k=infer_k, theta=theta)


def hook_SAE(
    cfg: Namespace,
    model: SAE,
    hooked_module: nn.Module,
    set_high: list[Triple] | None = None,
    set_low: list[Triple] | None = None,
    is_zero: bool = False,
) -> list[Any]:
    """Hook a module so that its hidden state becomes the SAE's reconstruction, or zero.

    Returns the handles to remove. Raises ValueError for an SAE over several sites, whose code
    needs the states of the other sites too.
    """
    if len(model.sites()) != 1:
        reads = f"{model.name} reads sites {model.sites()}"
        raise ValueError(f"{reads}; hook_SAE takes an SAE of one site (hook_RouteSAE a routed one)")
    edit = triples_edit(set_high, set_low)

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = lm.hidden_of(output)
        if is_zero:
            return lm.with_hidden(output, torch.zeros_like(hidden))
        rows = hidden.flatten(0, 1).float()
        new = model.substitute(rows, _cut(cfg), edit=edit)
        return lm.with_hidden(output, new.view_as(hidden))

    return [hooked_module.register_forward_hook(hook)]


class RouteHook:
    """A hook that replaces, at one site, the tokens whose weight [B,S] there is not 0.

    Weight 1 codes the state as it is; weight p codes p x and divides what is decoded by p. The
    index is that of the site among the model's own, for a model with a bias at each site.
    """

    def __init__(
        self,
        cfg: Namespace,
        model: Any,
        weights: Tensor,
        set_high: list[Triple] | None = None,
        set_low: list[Triple] | None = None,
        is_zero: bool = False,
        index: int = 0,
    ) -> None:
        self.cut = _cut(cfg)
        self.index = index
        self.model = model
        self.weights = weights
        self.is_zero = is_zero
        self.edit = triples_edit(set_high, set_low)

    @torch.no_grad()
    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = lm.hidden_of(output)
        routed = self.weights > 0
        if not routed.any():
            return output
        changed = hidden.clone()
        if self.is_zero:
            changed[routed] = 0
        else:
            scale = self.weights[routed].float()
            options = {"scale": scale, "edit": self._edit_at(scale[:, None]), "index": self.index}
            new = self.model.substitute(hidden[routed], self.cut, **options)
            changed[routed] = new.to(hidden.dtype)
        return lm.with_hidden(output, changed)

    def _edit_at(self, scale: Tensor) -> Edit | None:
        """Return the edit of strengths [n,F] that edits their code, which is scale [n,1] larger."""
        if self.edit is None:
            return None
        return lambda strength: self.edit(strength * scale) / scale


def hook_RouteSAE(
    cfg: Namespace,
    model: Any,
    language_model: nn.Module,
    batch_layer_weights: Tensor,
    set_high: list[Triple] | None = None,
    set_low: list[Triple] | None = None,
    is_zero: bool = False,
) -> list[Any]:
    """Hook every routed site with a RouteHook and return the handles to remove.

    batch_layer_weights [B,S,L] is 0/1 (published, unscaled) or 0/p (as in training).
    """
    weights = batch_layer_weights.unbind(-1)
    handles = []
    for index, (site, weight) in enumerate(zip(model.sites(), weights, strict=True)):
        hook = RouteHook(cfg, model, weight, set_high, set_low, is_zero, index)
        handles.append(lm.block_at(language_model, site).register_forward_hook(hook))
    return handles
