"""The residual stream, read and rewritten at numbered sites. Knows nothing of SAEs' insides.

B rows, S positions, D hidden, L sites, N counted tokens (where the mask is True), V vocabulary.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from src import lm
from src.data import Batch
from src.sae import SAE

Triple = tuple[int, float, int]  # (latent, value, mode): mode 0 adds, 1 multiplies


def open_language_model(cfg: Namespace, saes: list[SAE]) -> tuple[Any, nn.Module]:
    """(tokenizer, language model) of a stage. Raises ValueError where one of the SAEs does not fit it."""
    tokenizer, model = lm.get_language_model(
        cfg.model_path, cfg.device, cfg.dtype, cfg.trust_remote_code, cfg.device_map
    )
    width, depth = lm.text_config(model).hidden_size, len(lm.blocks(model))
    for sae in saes:
        if sae.hidden_size != width or max(sae.sites()) > depth:
            there = f"hidden size {sae.hidden_size}, sites up to {max(sae.sites())}"
            raise ValueError(
                f"this {sae.name} ({there}) does not fit the language model (hidden size {width}, {depth} blocks)"
            )
    return tokenizer, model


def read(model: nn.Module, batch: Batch, sites: list[int]) -> dict[int, Tensor]:
    """{site: residual [N,D]} of the counted tokens as the model holds it, from one forward pass that ends after the last site."""
    at = batch.mask.flatten().nonzero()[
        :, 0
    ]  # once: on CUDA every use of the mask would wait for the device
    return {
        site: hidden.flatten(0, 1)[at]
        for site, hidden in lm.read_sites(model, batch.input_ids, sites).items()
    }


def patch_hooks(
    patches: Mapping[int, Callable[[Tensor], Tensor]], mask: Tensor
) -> dict[int, Callable[[Any], Any]]:
    """Hooks for lm.hooked that replace the residual of counted tokens by patch(residual); every other position stays bit for bit."""

    def hook(patch: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
        def replace(output: Any) -> Any:
            hidden = lm.hidden_of(output).to(mask.device)
            changed = hidden.clone()
            changed[mask] = patch(hidden[mask].float()).to(hidden.dtype)
            return lm.with_hidden(output, changed)

        return replace

    return {site: hook(patch) for site, patch in patches.items()}


@torch.no_grad()
def patched_states(
    model: nn.Module,
    batch: Batch,
    patches: Mapping[int, Callable[[Tensor], Tensor]],
    clean: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """The final states [B,S,D] with the patches in place. Given clean {site: hidden [B,S,D]}, blocks below the first patch are not run again."""
    first = min(patches)
    if clean is None or first not in clean:
        with lm.hooked(model, patch_hooks(patches, batch.mask)):
            return lm.final_states(model, batch.input_ids)
    start = patch_hooks({first: patches[first]}, batch.mask)[first](clean[first])
    later = {site: patch for site, patch in patches.items() if site != first}
    with lm.resumed_at(model, first, start), lm.hooked(model, patch_hooks(later, batch.mask)):
        return lm.final_states(model, batch.input_ids)


def self_check(model: nn.Module, batch: Batch, sites: list[int]) -> bool:
    """True once checked: at every site an identity patch leaves the final states bit-identical and another one changes them.

    Without it a hook that does nothing would pass for a perfect SAE. False where no token counts, so that nothing could be checked.
    Raises ValueError where a check fails.
    """
    if not batch.mask.any():
        return False
    row = int(batch.mask.any(1).nonzero()[0])
    small = Batch(*(part[row : row + 1] for part in batch))
    clean_sites = lm.read_sites(model, small.input_ids, sites)
    clean = lm.final_states(model, small.input_ids)
    for site in sites:
        if not torch.equal(patched_states(model, small, {site: lambda h: h}), clean):
            raise ValueError(
                f"self-check failed: writing site {site} back unchanged changes the language model's output"
            )
        if not torch.equal(patched_states(model, small, {site: lambda h: h}, clean_sites), clean):
            raise ValueError(
                f"self-check failed: resuming from site {site} changes the language model's output"
            )
        if torch.equal(patched_states(model, small, {site: lambda h: -h}, clean_sites), clean):
            raise ValueError(
                f"self-check failed: rewriting site {site} does not reach the language model's output"
            )
    return True


# ------------------------------------------------------------------------------------------- the documented forms


def get_outputs(
    cfg: Namespace, batch: tuple[Tensor, Tensor], language_model: nn.Module, device: str
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """(input_ids, attention_mask, outputs, hidden_states): [B,S,D] where cfg names one layer to read, [B,S,L,D] for models over several.

    cfg.sites lists the sites; without it cfg.layer is read.
    """
    input_ids, attention_mask = (part.to(device) for part in batch[:2])
    sites = list(getattr(cfg, "sites", None) or [cfg.layer])
    found: dict[int, Tensor] = {}
    with (
        torch.no_grad(),
        lm.hooked(
            language_model,
            {
                s: (lambda out, s=s: found.__setitem__(s, lm.hidden_of(out).to(device)))
                for s in sites
            },
        ),
    ):
        outputs = language_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        )
    hidden = torch.stack([found[site] for site in sites], dim=2)
    return input_ids, attention_mask, outputs, hidden[:, :, 0] if len(sites) == 1 else hidden


def edit_of(
    set_high: list[Triple] | None = None, set_low: list[Triple] | None = None
) -> Callable[[Tensor], Tensor] | None:
    """Function on latents for triples (latent, value, mode): set_high adds or multiplies, set_low subtracts or divides."""
    if not set_high and not set_low:
        return None

    def edit(latents: Tensor) -> Tensor:
        latents = latents.clone()
        for triples, sign in ((set_high or [], 1), (set_low or [], -1)):
            for latent, value, mode in triples:
                old = latents[..., latent]
                latents[..., latent] = old + sign * value if mode == 0 else old * value**sign
        return latents

    return edit


def hook_SAE(
    cfg: Namespace,
    model: SAE,
    hooked_module: nn.Module,
    set_high: list[Triple] | None = None,
    set_low: list[Triple] | None = None,
    is_zero: bool = False,
) -> list[Any]:
    """Hooks a module so that its hidden state becomes the SAE's reconstruction (or zero); returns handles to remove.

    For SAEs of one site. Raises ValueError for one over several sites, whose code needs the other sites' states too.
    """
    if len(model.sites()) != 1:
        raise ValueError(
            f"{model.name} reads sites {model.sites()}; hook_SAE takes an SAE of one site (hook_RouteSAE a routed one)"
        )
    edit = edit_of(set_high, set_low)

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = lm.hidden_of(output)
        (patch,) = next(
            iter(
                model.patches(
                    {},
                    infer_k=getattr(cfg, "infer_k", None),
                    theta=getattr(cfg, "theta", None),
                    edit=edit,
                )
            )
        ).values()
        new = (
            torch.zeros_like(hidden)
            if is_zero
            else patch(hidden.flatten(0, 1).float()).view_as(hidden)
        )
        return lm.with_hidden(output, new)

    return [hooked_module.register_forward_hook(hook)]


class RouteHook:
    """Substitutes, at one site, the tokens whose weight there is not 0: weight 1 codes the state as it is, weight p codes p x and divides by p."""

    def __init__(
        self,
        cfg: Namespace,
        model: Any,
        weights: Tensor,
        set_high=None,
        set_low=None,
        is_zero: bool = False,
    ) -> None:
        self.cfg, self.model, self.weights, self.is_zero = cfg, model, weights, is_zero
        self.edit = edit_of(set_high, set_low)

    @torch.no_grad()
    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = lm.hidden_of(output)
        here = self.weights > 0
        if not here.any():
            return output
        changed = hidden.clone()
        if self.is_zero:
            changed[here] = 0
            return lm.with_hidden(output, changed)
        x, mean, std = self.model.standardise(hidden[here])
        p = self.weights[here][:, None].float()
        latents, x_hat = self.model.sae(
            p * x, getattr(self.cfg, "infer_k", None), getattr(self.cfg, "theta", None)
        )
        new = (
            x_hat / p
            if self.edit is None
            else x + (self.model.sae.decode(self.edit(latents)) - x_hat) / p
        )
        changed[here] = (new * std + mean).to(hidden.dtype)
        return lm.with_hidden(output, changed)


def hook_RouteSAE(
    cfg: Namespace,
    model: Any,
    language_model: nn.Module,
    batch_layer_weights: Tensor,
    set_high=None,
    set_low=None,
    is_zero: bool = False,
) -> list[Any]:
    """Hooks every routed site; batch_layer_weights [B,S,L] is 0/1 (published, unscaled) or 0/p (as in training). Returns handles."""
    weights = batch_layer_weights.unbind(-1)
    return [
        lm.block_at(language_model, site).register_forward_hook(
            RouteHook(cfg, model, weight, set_high, set_low, is_zero)
        )
        for site, weight in zip(model.sites(), weights, strict=True)
    ]
