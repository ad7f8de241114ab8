"""The residual stream, read and rewritten at numbered sites, and the edits of a code.

B rows, S positions, D hidden, L sites, N counted tokens (where the mask is True), F latents.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src import distributed, identity, lm
from src.data import Batch
from src.metrics import token_kl
from src.sae import SAE, BatchInfo, Edit, Patch

CHECKED_TOKENS = 64  # of a row, whose logits are compared with the model's own
OUTPUT = "the language model's output"


def open_language_model(
    cfg: Namespace, opened: Sequence[tuple[SAE, Mapping[str, Any]]] = ()
) -> tuple[Any, nn.Module]:
    """Return (tokenizer, language model) of a stage.

    opened: the SAEs that read it, with their recipes. One that was trained on other weights gives
    a warning: to read a fine-tuned model is a use. Raises ValueError if an SAE does not fit the
    language model, or if another process has loaded other weights.
    """
    tokenizer, model = lm.get_language_model(
        cfg.model_path, cfg.device, cfg.dtype, cfg.trust_remote_code, cfg.device_map
    )
    loaded = identity.of_language_model(model)
    distributed.require_same({"language model": loaded})
    lm.check_family(model)
    width = lm.text_config(model).hidden_size
    depth = len(lm.blocks(model))
    for sae, recipe in opened:
        sae.check_language_model(width, depth)
        if identity.is_another_model(recipe.get("language_model"), loaded):
            print(
                f"warning: {recipe['title']} was trained on a language model with other weights "
                f"than {cfg.model_path}"
            )
    return tokenizer, model


def batch_info(cfg: Namespace, batch: Batch, start: int = 0) -> BatchInfo:
    """Return what an SAE is told of the counted tokens; `start` is the position of the first."""
    keys = batch.token_keys() + start
    return BatchInfo(token_keys=keys, infer_k=cfg.infer_k, theta=cfg.theta)


def edit_latents(operations: Sequence[tuple[str, int, float]]) -> Edit:
    """Return the edit of a code by operations (kind, latent, value), in their order.

    Kinds are "set", "add" and "multiply"; values of "set" and "add" are in units of strength.
    """

    def edit(latents: Tensor) -> Tensor:
        latents = latents.clone()
        for kind, latent, value in operations:
            old = latents[..., latent]
            if kind == "set":
                latents[..., latent] = value
            elif kind == "add":
                latents[..., latent] = old + value
            else:
                latents[..., latent] = old * value
        return latents

    return edit


def read(model: nn.Module, batch: Batch, sites: list[int]) -> dict[int, Tensor]:
    """Return {site: residual [N,D]} of the counted tokens, as the model holds it.

    It takes one forward pass that ends after the last site.
    """
    # one index for all sites: on CUDA every use of the mask would wait for the device
    index = batch.mask.flatten().nonzero()[:, 0]
    states = lm.read_sites(model, batch.input_ids, sites)
    return {site: hidden.flatten(0, 1)[index] for site, hidden in states.items()}


def patch_hooks(patches: Mapping[int, Patch], mask: Tensor) -> dict[int, Any]:
    """Return hooks for lm.hooked that replace the residual of counted tokens by patch(residual).

    Every other position stays bit for bit.
    """

    def hook(patch: Patch) -> Any:
        def replace(output: Any) -> Any:
            hidden = lm.hidden_of(output).to(mask.device)
            changed = hidden.clone()
            changed[mask] = patch(hidden[mask].float()).to(hidden.dtype)
            return lm.with_hidden(output, changed)

        return replace

    return {site: hook(patch) for site, patch in patches.items()}


def patched_states(
    model: nn.Module,
    batch: Batch,
    patches: Mapping[int, Patch],
    clean: Mapping[int, Tensor] | None = None,
    with_grad: bool = False,
) -> Tensor:
    """Return the final states [B,S,D] with the patches in place.

    With clean {site: hidden [B,S,D]}, the blocks below the first patch are not run again.
    with_grad: gradients reach the patches.
    """
    first = min(patches)
    with torch.set_grad_enabled(with_grad):
        if clean is None or first not in clean:
            with lm.hooked(model, patch_hooks(patches, batch.mask)):
                return lm.final_states(model, batch.input_ids, with_grad)
        start = patch_hooks({first: patches[first]}, batch.mask)[first](clean[first])
        later = {site: patch for site, patch in patches.items() if site != first}
        with lm.resumed_at(model, first, start), lm.hooked(model, patch_hooks(later, batch.mask)):
            return lm.final_states(model, batch.input_ids, with_grad)


def predictions(mask: Tensor) -> Tensor:
    """Return where predictions count. [B,S] -> bool [B,S]

    The next token counts, and the prediction is made where states may be patched.
    """
    predicts = torch.zeros_like(mask)
    predicts[:, :-1] = mask[:, 1:]
    return predicts & mask


class CleanPass:
    """One batch through the language model, and what patched passes of its rows change."""

    def __init__(self, model: nn.Module, batch: Batch, sites: list[int]) -> None:
        self.model = model
        self.batch = batch
        self.states, self.final = lm.read_through(model, batch.input_ids, sites)
        self.row_ends = batch.mask.sum(1).cumsum(0).tolist()  # counted tokens up to each row's end

    def hidden(self) -> dict[int, Tensor]:
        """Return {site: residual [N,D]} of the counted tokens."""
        return {site: state[self.batch.mask] for site, state in self.states.items()}

    def total_kl(self, tokens: slice, patches: Mapping[int, Patch]) -> Tensor:
        """Return the sum over predictions of KL(clean || patched), in nats. []

        tokens: the counted tokens of whole rows, which the patches replace. Gradients reach the
        patches through the frozen language model.
        """
        if not tokens.stop:
            return self.final.new_zeros(())
        starts = [0, *self.row_ends]
        rows = slice(starts.index(tokens.start or 0), starts.index(tokens.stop))
        batch = self.batch.part(rows)
        states = {site: state[rows] for site, state in self.states.items()}
        patched = patched_states(self.model, batch, patches, states, with_grad=True)
        predicts = predictions(batch.mask)
        clean = self.final[rows][predicts].split(lm.HEAD_CHUNK)
        total = self.final.new_zeros((), dtype=torch.float32)
        for clean_part, part in zip(clean, patched[predicts].split(lm.HEAD_CHUNK), strict=True):
            # The logits are made again in the backward pass: they would be the largest tensors.
            total = total + checkpoint(self._sum_kl, clean_part, part, use_reentrant=False)
        return total

    def _sum_kl(self, clean: Tensor, patched: Tensor) -> Tensor:
        logits = lm.logits_of(self.model, clean)
        return token_kl(logits, lm.logits_of(self.model, patched, with_grad=True)).sum()


def check_finite(states: Mapping[Any, Tensor], model: nn.Module) -> None:
    """Raise ValueError that names the first site whose states {site: [...,D]} are not finite."""
    for site, hidden in states.items():
        if not bool(hidden.isfinite().all()):
            raise ValueError(overflow(site, model))


def overflow(site: Any, model: nn.Module) -> str:
    """Say that the states at a site are not finite, and what to do."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    other = "bfloat16" if dtype == "float16" else "float32"
    advice = f"overflows in {dtype}; try --dtype {other}"
    if dtype == "float32":
        advice = "overflows, or has damaged weights"
    return f"the states at site {site} are not finite: {type(model).__name__} {advice}"


def check_logits(logits: Tensor, is_edited: bool = False) -> None:
    """Raise ValueError for logits that are NaN: nothing can be chosen or compared by them."""
    if not logits.isnan().any():
        return
    if is_edited:
        raise ValueError(
            "with this edit the language model gives no number as a logit: its states overflow; "
            "use smaller values"
        )
    raise ValueError(
        "the language model gives no number as a logit; check its weights, or try another --dtype"
    )


def _check_logits(model: nn.Module, states: Tensor, own: Tensor) -> None:
    """Raise ValueError if logits made from final states [S,D] differ from the model's own [S,V]."""
    error = lm.logits_error(own[:CHECKED_TOKENS], lm.logits_of(model, states[:CHECKED_TOKENS]))
    if error > lm.logits_tolerance(model):
        raise _failed(
            f"logits made from the last states of {type(model).__name__} differ "
            f"from its own by {error:.1%} of the largest"
        )


def self_check(model: nn.Module, batch: Batch, sites: list[int]) -> bool:
    """Check that patching works at every site; return True once that is checked.

    An identity patch must leave the final states bit-identical, and another patch must change
    them. Without this check a hook that does nothing would pass for a perfect SAE. Returns False
    if no token counts, so that nothing could be checked. Raises ValueError if a check fails.

    A model of n blocks computes at most 4 n of them, whatever the number of sites.
    """
    if not batch.mask.any():
        return False
    sites = sorted(sites)
    row = int(batch.mask.any(1).nonzero()[0])
    batch = batch.part(slice(row, row + 1))
    states, final = lm.read_through(model, batch.input_ids, sites)
    last = f"{sites[-1]} or after it"
    for site, hidden in [*states.items(), (last, final)]:
        check_finite({site: hidden[batch.mask]}, model)
    _check_identity(model, batch, sites, final)
    for site in sites:
        _check_start(model, batch, site, states[site])
    for site, following in zip(sites, [*sites[1:], None], strict=True):
        _check_resumed(model, batch, site, following, states, final)
    rewritten = patched_states(model, batch, {sites[-1]: _negated}, states)
    if torch.equal(rewritten, final):
        raise _failed(f"rewriting site {sites[-1]} does not reach {OUTPUT}")
    return True


def _failed(what: str) -> ValueError:
    return ValueError(f"self-check failed: {what}")


def _same(h: Tensor) -> Tensor:
    return h


def _negated(h: Tensor) -> Tensor:
    return -h


def _check_identity(model: nn.Module, batch: Batch, sites: list[int], final: Tensor) -> None:
    """Check that all sites can be written back unchanged, and that our logits are the model's own.

    Both take one pass through the whole model.
    """
    identity = patch_hooks(dict.fromkeys(sites, _same), batch.mask)
    with lm.hooked(model, identity):
        own_states, own_logits = lm.own_pass(model, batch.input_ids)
    _check_logits(model, own_states[0], own_logits[0])
    if torch.equal(own_states, final):
        return
    # The whole model may call its decoder in another way, which moves the last bits.
    if torch.equal(patched_states(model, batch, dict.fromkeys(sites, _same)), final):
        return
    for site in sites:  # which one it is
        if not torch.equal(patched_states(model, batch, {site: _same}), final):
            raise _failed(f"writing site {site} back unchanged changes {OUTPUT}")
    raise _failed(f"writing sites {sites} back unchanged together changes {OUTPUT}")


def _check_start(model: nn.Module, batch: Batch, site: int, state: Tensor) -> None:
    """Check that a rewritten state [1,S,D] is what a resumed pass starts from; no block is run."""
    written = patch_hooks({site: _negated}, batch.mask)[site](state)
    with lm.resumed_at(model, site, written):
        start = lm.read_sites(model, batch.input_ids, [site])[site]
    if torch.equal(start, state):
        raise _failed(f"rewriting site {site} does not reach {OUTPUT}")


def _check_resumed(
    model: nn.Module,
    batch: Batch,
    site: int,
    following: int | None,
    states: Mapping[int, Tensor],
    final: Tensor,
) -> None:
    """Check the blocks from a site to the next one, or to the end if that is None.

    Resumed from the site's own state, they must give what the clean pass gave, and a hook at their
    end must be able to rewrite it. If every stretch between two sites passes, so does the pass
    from each site to the end.
    """
    changed = f"resuming from site {site} changes {OUTPUT}"
    with lm.resumed_at(model, site, states[site]):
        if following is None:
            if not torch.equal(lm.final_states(model, batch.input_ids), final):
                raise _failed(changed)
            return
        negate = patch_hooks({following: _negated}, batch.mask)
        with lm.hooked(model, negate):
            reached = lm.read_sites(model, batch.input_ids, [following])[following]
    if torch.equal(reached, states[following]):
        raise _failed(f"rewriting site {following} does not reach {OUTPUT}")
    if not torch.equal(reached, negate[following](states[following])):
        raise _failed(changed)
