"""The language model: loaded frozen, its blocks found, run no further than needed, its head applied in chunks.

The only importer of transformers besides the recipe of the demo LM. Knows nothing of SAEs.

Shapes: B rows, S positions, D hidden, V vocabulary, N counted tokens.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import hub
from src.ops import fast_bfloat16

COMPILE_FROM = 200  # passes that make up for compiling: on one H200 it took 6 s and saved 30 ms of 115 each (docs/LOG.md)
HEAD_CHUNK = (
    1024  # tokens whose logits exist at one time: 1024 x 128k x 4 bytes = 0.5 GB in float32
)


class _Stop(Exception):
    """Ends a forward pass after the last block that is needed."""


def pick_dtype(dtype: str, device: str) -> torch.dtype | str:
    """`auto`: the checkpoint's own on CUDA; on a CPU bfloat16 where it computes in it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if str(device).startswith("cuda"):
        return "auto"
    return torch.bfloat16 if fast_bfloat16() else torch.float32


def get_language_model(
    model_path: str,
    device: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device_map: Any = None,
) -> tuple[Any, nn.Module]:
    """(tokenizer, language model) from a folder or a hub name: frozen, in eval mode, on device or where device_map puts its parts.

    A quantised checkpoint is loaded as its own configuration says. Raises ValueError where there is no such model, it is gated, the hub
    cannot be reached, or a package it needs is missing.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ValueError(
            "--device_map needs the package accelerate, which is not installed; pip install accelerate, or leave the flag out"
        )
    trust = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_path, **trust)
        kind = type(transformers.AutoConfig.from_pretrained(model_path, **trust))
        pictures = (
            kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            and kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        )
        auto = (
            transformers.AutoModelForImageTextToText
            if pictures
            else transformers.AutoModelForCausalLM
        )
        model = auto.from_pretrained(
            model_path, dtype=pick_dtype(dtype, device), device_map=device_map, **trust
        )
    except (
        OSError,
        ValueError,
        ImportError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        if isinstance(error, pickle.UnpicklingError):
            reason = "its weights hold other things than tensors, or are damaged; nothing in them was run"
        there = os.path.isdir(model_path)
        here = (
            "the folder is there but is not a complete model"
            if there
            else "no such folder, and the hub gave"
        )
        todo = "check --model_path, or run scripts/download_model.sh"
        if "custom code" in reason:
            todo = "add --trust_remote_code if you trust it to run code of its own here"
        reason = (None if there else hub.reason(error, model_path)) or reason
        raise ValueError(
            f"cannot load language model {model_path!r} ({here}: {reason}); {todo}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False).eval()
    placed = device_map is not None or getattr(
        model, "is_quantized", False
    )  # it is where it belongs, and may refuse to be moved
    return tokenizer, model if placed else model.to(device)


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder, also inside a multimodal wrapper."""
    return (
        model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    )


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the outermost ModuleList in the decoder as long as the model is deep. Raises ValueError where there is none."""
    depth = text_config(model).num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(
            f"no list of {depth} decoder blocks in {type(model).__name__}; this architecture is not supported"
        )
    return lists[0]


def block_at(model: nn.Module, site: int) -> nn.Module:
    """The module whose output is residual-stream site `site` (1 ... n). The one place where a site becomes an index."""
    found = blocks(model)
    if not 1 <= site <= len(found):
        raise ValueError(
            f"layer {site} of a {len(found)}-block model; sites run from 1 to {len(found)}"
        )
    return found[site - 1]


def check_length(model: nn.Module, length: int) -> None:
    """Raises ValueError for rows longer than the positions this model has learned; warns where longer ones than it was made for go through."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if not limit or length <= limit:
        return
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    tables = (
        m
        for m in decoder.modules()
        if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()
    )
    if any(limit <= table.num_embeddings <= limit + 2 for table in tables):  # OPT's has two more
        raise ValueError(
            f"{length} tokens in a row, and the language model has {limit} positions; lower --max_length, or write less text"
        )
    print(f"warning: {length} tokens in a row, and the language model was made for {limit}")


def compile_if_it_pays(cfg: Namespace, model: nn.Module, rows: int, passes: int) -> None:
    """Compiles the blocks for batches of so many rows where --compile_lm says so: by default on CUDA, for at least COMPILE_FROM passes."""
    often = (
        "cuda" in str(cfg.device)
        and passes >= COMPILE_FROM
        and not getattr(cfg, "deterministic", False)
    )
    if cfg.compile_lm == "yes" or (cfg.compile_lm == "auto" and often):
        compile_blocks(model, rows, cfg.max_length)


def compile_blocks(model: nn.Module, rows: int, length: int) -> None:
    """Compiles the blocks for batches [rows, length], which fuses their elementwise work.

    Other shapes, and what cannot be compiled here, go through them as before.
    """
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    for block in blocks(model):
        plain, *shape = getattr(block.forward, "compiled", (block.forward,))
        if shape == [rows, length]:
            continue
        fast = torch.compile(plain, dynamic=False)

        def forward(
            hidden_states: Tensor, *args: Any, plain=plain, fast=fast, **kwargs: Any
        ) -> Any:
            return (fast if hidden_states.shape[:2] == (rows, length) else plain)(
                hidden_states, *args, **kwargs
            )

        forward.compiled = plain, rows, length
        block.forward = forward  # not block.compile(): hooks on the block, one of which ends the pass, stay outside


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returned: a tensor, or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """`output` with its hidden state replaced, in the dtype and on the device it had."""
    hidden = hidden.to(hidden_of(output))
    return hidden if isinstance(output, Tensor) else type(output)([hidden, *output[1:]])


@contextmanager
def hooked(
    model: nn.Module, at: dict[int, Callable[[Any], Any]], stop: bool = False
) -> Iterator[None]:
    """Calls at[site](block output) at each site; a returned value replaces the output. Hooks are gone on leaving, whatever happens.

    With `stop`, the forward pass ends after the last of the sites.
    """
    handles, last = [], max(at, default=0)
    try:
        for site, function in at.items():

            def hook(_module, _args, output, function=function, site=site):
                changed = function(output)
                if stop and site == last:
                    raise _Stop
                return changed

            handles.append(block_at(model, site).register_forward_hook(hook))
        yield
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _decode(model: nn.Module, input_ids: Tensor, **more: Any) -> Any:
    """What the decoder makes of input_ids, which are brought to where its embeddings are (on `meta`: accelerate brings them)."""
    device = model.get_input_embeddings().weight.device
    return model.get_decoder()(
        input_ids=input_ids if device.type == "meta" else input_ids.to(device), **more
    )


def _keeping(
    input_ids: Tensor, sites: list[int]
) -> tuple[dict[int, Tensor], dict[int, Callable[[Any], None]]]:
    """(what will be {site: hidden [B,S,D]} on the device of input_ids, the hooks that fill it)"""
    found: dict[int, Tensor] = {}

    def keep(output: Any, site: int) -> None:
        found[site] = hidden_of(output).to(input_ids.device)

    return found, {site: functools.partial(keep, site=site) for site in sites}


@torch.no_grad()
def read_sites(
    model: nn.Module, input_ids: Tensor, sites: list[int], **more: Any
) -> dict[int, Tensor]:
    """{site: hidden [B,S,D]} from one forward pass that ends after the last site: no later block, no head, no cache.

    The states are brought to the device of input_ids, wherever the blocks are.
    """
    found, keep = _keeping(input_ids, sites)
    with hooked(model, keep, stop=True):
        _decode(model, input_ids, **({"use_cache": False} | more))
    return found


@torch.no_grad()
def read_through(
    model: nn.Module, input_ids: Tensor, sites: list[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """What read_sites and final_states give, from one forward pass."""
    found, keep = _keeping(input_ids, sites)
    with hooked(model, keep):
        return found, final_states(model, input_ids)


@torch.no_grad()
def final_states(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The decoder's last hidden state, after the final norm: what the head reads. [B,S,D]"""
    return _decode(model, input_ids, use_cache=False)[0].to(input_ids.device)


@torch.no_grad()
def logits_of(model: nn.Module, states: Tensor) -> Tensor:
    """Logits in float32 of final states: [N,D] -> [N,V], soft-capped where the model caps them."""
    head = model.get_output_embeddings()
    logits = (
        head(states if head.weight.device.type == "meta" else states.to(head.weight.device))
        .float()
        .to(states.device)
    )
    cap = getattr(text_config(model), "final_logit_softcapping", None)
    scale = (getattr(text_config(model), "logit_scale", None) or 1.0) / (
        getattr(text_config(model), "logits_scaling", None) or 1.0
    )
    logits = logits if scale == 1 else logits * scale  # Cohere multiplies, Granite divides
    return torch.tanh(logits / cap) * cap if cap else logits


@contextmanager
def resumed_at(model: nn.Module, site: int, hidden: Tensor) -> Iterator[None]:
    """Inside, a forward pass takes `hidden` [B,S,D] for the output of block `site` without computing the blocks up to there."""
    skipped = list(blocks(model))[:site]
    originals = [block.forward for block in skipped]
    probe = {}

    def skip(hidden_states, *args, **kwargs):
        return probe["like"](hidden_states)

    def last(hidden_states, *args, **kwargs):
        return probe["like"](hidden.to(hidden_states.device))

    probe["like"] = (lambda h: (h,)) if _returns_tuple(model) else (lambda h: h)
    try:
        for block in skipped[:-1]:
            block.forward = skip
        skipped[-1].forward = last
        yield
    finally:
        for block, original in zip(skipped, originals, strict=True):
            if "forward" in block.__dict__:
                del block.__dict__["forward"]
            if (
                block.forward != original
            ):  # it was an instance attribute before (a compiled or wrapped block)
                block.forward = original


def _returns_tuple(model: nn.Module) -> bool:
    """Whether this model's blocks return tuples; asked once, of one token, and remembered on the model."""
    known = getattr(model, "_blocks_return_tuples", None)
    if known is None:
        kind = []
        first = torch.zeros((1, 1), dtype=torch.long)
        with (
            torch.no_grad(),
            hooked(
                model, {1: lambda output: kind.append(not isinstance(output, Tensor))}, stop=True
            ),
        ):
            _decode(model, first, use_cache=False)
        known = model._blocks_return_tuples = kind[0]
    return known


@torch.no_grad()
def next_logits(model: nn.Module, input_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """(logits [B,V] after the last token, cache) of new tokens [B,S] that follow what the cache holds (None: nothing)."""
    out = _decode(model, input_ids, past_key_values=cache, use_cache=True)
    return logits_of(model, out[0][:, -1].to(input_ids.device)), out.past_key_values


@torch.no_grad()
def peek(model: nn.Module, input_ids: Tensor, cache: Any, sites: list[int]) -> dict[int, Tensor]:
    """{site: hidden [B,S,D]} of new tokens; the cache stays as it is, since the tokens are to be run again."""
    return read_sites(
        model, input_ids, sites, past_key_values=copy.deepcopy(cache), use_cache=cache is not None
    )


@torch.no_grad()
def mean_loss(model: nn.Module, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mean next-token cross-entropy in nats, number of targets) over counted targets, head in chunks."""
    states = final_states(model, input_ids)[:, :-1]
    keep, targets = mask[:, 1:], input_ids[:, 1:]
    states, targets = states[keep], targets[keep]
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(states.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        total += F.cross_entropy(logits_of(model, s), t, reduction="sum").double().cpu()
    return total / max(1, len(targets)), keep.sum()
