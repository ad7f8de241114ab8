"""The language model: loaded frozen, run no further than needed, its head applied in chunks.

It is the only file of src that imports transformers. It knows nothing of SAEs.

Shapes: B rows, S positions, D hidden, V vocabulary, N counted tokens.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import itertools
import math
import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import gguf_file, hub
from src.device import fast_bfloat16
from src.files import first_line

# Passes that make up for compiling: on one H200 it took 6 s and saved 30 of 115 ms (docs/LOG.md).
COMPILE_FROM = 200
# Tokens whose logits exist at one time: 1024 x 128k x 4 bytes = 0.5 GB in float32.
HEAD_CHUNK = 1024
MAX_LISTED = 1000  # files of a folder that are looked at
TEXT_ENDINGS = (".jsonl", ".parquet", ".txt")
PROBE_TOKENS = 8  # with which a model is tried before it is used
# What the code of a family raises where it is used in a way that it does not know.
PROBE_ERRORS = (RuntimeError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)


class _StopForward(Exception):
    """Ends a forward pass after the last block that is needed."""


def pick_dtype(dtype: str, device: str) -> torch.dtype | str:
    """The dtype to load in.

    `auto`: that of the checkpoint on CUDA; bfloat16 on CPUs that compute in it, else float32.
    """
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
    """(tokenizer, language model) from a folder or a hub name, frozen and in eval mode.

    The model is on `device`, or its parts are where device_map puts them. A quantised checkpoint is
    loaded as its own configuration says. Raises ValueError if there is no such model, if it is
    gated, if the hub cannot be reached, or if a package that it needs is missing.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ValueError(
            "--device_map needs the package accelerate, which is not installed; "
            "pip install accelerate, or leave the flag out"
        )
    trust = {"trust_remote_code": trust_remote_code}
    if gguf_file.is_gguf(model_path):
        model_path = str(gguf_file.as_folder(model_path))
    try:
        tokenizer, model = _load(model_path, pick_dtype(dtype, device), device_map, trust)
    except (
        OSError,
        ValueError,
        ImportError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise ValueError(_why_not_loaded(model_path, error)) from error
    embeddings = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= embeddings:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False).eval()
    # Spread and quantised models are in their place already, and may refuse to be moved.
    in_place = device_map is not None or getattr(model, "is_quantized", False)
    return tokenizer, model if in_place else model.to(device)


def sizes_by_config(model_path: str, trust_remote_code: bool) -> tuple[int, int] | None:
    """(hidden size, number of blocks) as the configuration says, without the weights.

    None if it cannot be read or does not say: loading the model then tells why. Raises ValueError
    for a file or folder that can be no language model.
    """
    _check_place(Path(model_path))
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            model_path, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError):
        return None
    config = config.get_text_config()
    sizes = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None


def _check_place(path: Path) -> None:
    """Raise ValueError for a local file or folder that can be no language model."""
    if path.is_file() and not gguf_file.is_gguf(path):
        raise ValueError(
            f"--model_path {path} is a file; a language model is a folder, a hub name or a .gguf "
            "file. Text is named by --data_path, an SAE by --SAE_path"
        )
    if not path.is_dir() or (path / "config.json").exists():
        return
    names = [item.name for item in itertools.islice(path.iterdir(), MAX_LISTED)]
    advice = "check --model_path, or run scripts/download_model.sh"
    if any(name.removesuffix(".gz").removesuffix(".zst").endswith(TEXT_ENDINGS) for name in names):
        advice = "it holds text, which --data_path names"
    if any(name.endswith(gguf_file.SUFFIX) for name in names):
        advice = "name the .gguf file inside it"
    raise ValueError(f"--model_path {path} is no language model (it has no config.json); {advice}")


def _load(
    model_path: str, dtype: torch.dtype | str, device_map: Any, trust: dict[str, bool]
) -> tuple[Any, nn.Module]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path, **trust)
    config = transformers.AutoConfig.from_pretrained(model_path, **trust)
    auto = transformers.AutoModelForCausalLM
    if (
        type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(model_path, dtype=dtype, device_map=device_map, **trust)
    return tokenizer, model


def _why_not_loaded(model_path: str, error: Exception) -> str:
    """One line for the many errors of loading a model: the reason, and what to do."""
    reason = first_line(error)
    if isinstance(error, pickle.UnpicklingError):
        reason = "its weights contain other things than tensors, or are damaged; none of it was run"
    advice = "check --model_path, or run scripts/download_model.sh"
    if "custom code" in reason:
        advice = "add --trust_remote_code if you trust it to run its own code on this machine"
    if os.path.isdir(model_path):
        where = "the folder exists but is not a complete model"
    else:
        where = "no such folder, and the hub gave"
        reason = hub.reason(error, model_path) or reason
    return f"cannot load language model {model_path!r} ({where}: {reason}); {advice}"


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder, also inside a multimodal model."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _decoder(model: nn.Module) -> nn.Module:
    """The part of a model that ends with the final norm, before the head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if isinstance(decoder, nn.Linear):  # the head of ModernBERT's decoder has this name
        decoder = model.base_model
    # Where transformers knows no decoder it returns the whole model, as for Llama 4.
    while hasattr(decoder, "lm_head") and isinstance(getattr(decoder, "model", None), nn.Module):
        decoder = decoder.model
    return decoder


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the outermost ModuleList in the decoder that is as long as it is deep.

    Raises ValueError if there is none.
    """
    depth = text_config(model).num_hidden_layers
    for module in _decoder(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"no list of {depth} decoder blocks in {type(model).__name__}; "
        "this architecture is not supported"
    )


def block_at(model: nn.Module, site: int) -> nn.Module:
    """The module whose output is residual-stream site `site` (1 to n).

    Only here does a site become an index.
    """
    all_blocks = blocks(model)
    depth = len(all_blocks)
    if not 1 <= site <= depth:
        raise ValueError(f"layer {site} of a {depth}-block model; sites run from 1 to {depth}")
    return all_blocks[site - 1]


def check_length(model: nn.Module, length: int) -> None:
    """Raises ValueError if rows are longer than the learned position table of the model.

    Models without such a table run on longer rows, so these only give a warning.
    """
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if not limit or length <= limit:
        return
    words = model.get_input_embeddings()
    for table in _decoder(model).modules():
        if not isinstance(table, nn.Embedding) or table is words:
            continue
        if limit <= table.num_embeddings <= limit + 2:  # the table of OPT has two more rows
            raise ValueError(
                f"a row has {length} tokens, and the language model has {limit} positions; "
                "lower --max_length, or give a shorter text"
            )
    print(f"warning: a row has {length} tokens, and the language model was trained for {limit}")


def compile_if_it_pays(cfg: Namespace, model: nn.Module, rows: int, passes: int) -> bool:
    """Compiles the blocks for batches of so many rows if --compile_lm says so; returns whether.

    `auto`: on CUDA, for at least COMPILE_FROM passes.
    """
    wanted = cfg.compile_lm == "yes"
    if cfg.compile_lm == "auto" and not getattr(cfg, "deterministic", False):
        wanted = "cuda" in str(cfg.device) and passes >= COMPILE_FROM
    if wanted:
        compile_blocks(model, rows, cfg.max_length)
    return wanted


def compile_blocks(model: nn.Module, rows: int, length: int) -> None:
    """Compiles the blocks for batches [rows, length], which fuses their elementwise work.

    Other shapes, and what cannot be compiled on this machine, run as before.
    """
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    for block in blocks(model):
        original, *shape = getattr(block.forward, "compiled", (block.forward,))
        if shape == [rows, length]:
            continue
        fast = torch.compile(original, dynamic=False)

        def forward(
            hidden_states: Tensor, *args: Any, original=original, fast=fast, **kwargs: Any
        ) -> Any:
            function = fast if hidden_states.shape[:2] == (rows, length) else original
            return function(hidden_states, *args, **kwargs)

        forward.compiled = original, rows, length
        # Not block.compile(): hooks of the block must stay outside, since one of them may raise.
        block.forward = forward


def hidden_of(output: Any) -> Tensor:
    """The hidden state in the output of a block: a tensor, or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """`output` with another hidden state, in the dtype and on the device of the old one."""
    hidden = hidden.to(hidden_of(output))
    return hidden if isinstance(output, Tensor) else type(output)([hidden, *output[1:]])


@contextmanager
def hooked(
    model: nn.Module, functions: dict[int, Callable[[Any], Any]], stop: bool = False
) -> Iterator[None]:
    """Inside, functions[site] is called on the output of each site's block, and may replace it.

    A returned None keeps the output. With `stop`, the forward pass ends after the last of the
    sites. The hooks are removed on leaving, also after an error.
    """
    handles = []
    last = max(functions, default=0)
    try:
        for site, function in functions.items():

            def hook(_module, _args, output, function=function, site=site):
                changed = function(output)
                if stop and site == last:
                    raise _StopForward
                return changed

            handles.append(block_at(model, site).register_forward_hook(hook))
        yield
    except _StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _decode(model: nn.Module, input_ids: Tensor, **kwargs: Any) -> Any:
    """The output of the decoder for input_ids, which are moved to the device of its embeddings."""
    device = model.get_input_embeddings().weight.device
    if device.type != "meta":  # on `meta`, accelerate moves them
        input_ids = input_ids.to(device)
    try:
        return _decoder(model)(input_ids=input_ids, **kwargs)
    except IndexError as error:
        rows = model.get_input_embeddings().num_embeddings
        if int(input_ids.max()) < rows:
            raise
        raise ValueError(
            f"the text has token {int(input_ids.max())}, and the language model has embeddings for "
            f"{rows} tokens; its tokenizer belongs to another model"
        ) from error


def _collector(
    sites: list[int], device: torch.device
) -> tuple[dict[int, Tensor], dict[int, Callable[[Any], None]]]:
    """(states, functions for `hooked` that fill it with {site: hidden [B,S,D]} on the device)"""
    states: dict[int, Tensor] = {}

    def keep(output: Any, site: int) -> None:
        states[site] = hidden_of(output).to(device)

    return states, {site: functools.partial(keep, site=site) for site in sites}


@torch.no_grad()
def read_sites(
    model: nn.Module, input_ids: Tensor, sites: list[int], **kwargs: Any
) -> dict[int, Tensor]:
    """{site: hidden [B,S,D]} from one forward pass that ends after the last site, without a cache.

    The states are on the device of input_ids, wherever the blocks are.
    """
    states, functions = _collector(sites, input_ids.device)
    with hooked(model, functions, stop=True):
        _decode(model, input_ids, **({"use_cache": False} | kwargs))
    return states


@torch.no_grad()
def read_through(
    model: nn.Module, input_ids: Tensor, sites: list[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """The results of read_sites and final_states, from one forward pass."""
    states, functions = _collector(sites, input_ids.device)
    with hooked(model, functions):
        return states, final_states(model, input_ids)


def final_states(model: nn.Module, input_ids: Tensor, with_grad: bool = False) -> Tensor:
    """The last hidden state of the decoder, after the final norm: what the head reads. [B,S,D]

    with_grad: gradients pass through the frozen model, from where a hook brings them in.
    """
    with torch.set_grad_enabled(with_grad):
        return _decode(model, input_ids, use_cache=False)[0].to(input_ids.device)


def logits_of(model: nn.Module, states: Tensor, with_grad: bool = False) -> Tensor:
    """Logits in float32 of final states: [N,D] -> [N,V], as the model itself makes them.

    with_grad: gradients pass through. Raises ValueError if that cannot be done for this model.
    """
    with torch.set_grad_enabled(with_grad):
        if _head_is_enough(model):
            return _head_logits(model, states)
        return _own_logits(model, states)


def _head_logits(model: nn.Module, states: Tensor) -> Tensor:
    """The product with the head, scaled and soft-capped as by the families that are known."""
    head = model.get_output_embeddings()
    device = head.weight.device
    inputs = states if device.type == "meta" else states.to(device)
    logits = head(inputs).float().to(states.device)
    config = text_config(model)
    # Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling.
    multiplier = getattr(config, "logit_scale", None) or 1.0
    scale = multiplier / (getattr(config, "logits_scaling", None) or 1.0)
    if scale != 1:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def n_logits(model: nn.Module) -> int:
    """How many logits the head gives for a token."""
    head = model.get_output_embeddings()
    return len(head.weight) if head is not None else text_config(model).vocab_size


class _DecoderOutput(tuple):
    """(states,) in the form that models expect of their decoder; every other field is None."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def _own_logits(model: nn.Module, states: Tensor) -> Tensor:
    """The logits of the model's own forward, whose decoder gives these states. [N,D] -> [N,V]"""
    decoder = _decoder(model)
    weight = model.get_input_embeddings().weight
    device = states.device if weight.device.type == "meta" else weight.device
    ids = torch.zeros((1, len(states)), dtype=torch.long, device=device)
    output = _DecoderOutput([states[None].to(device)])
    original = decoder.__dict__.get("forward")
    decoder.forward = lambda *_args, **_kwargs: output
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        del decoder.forward
        if original is not None:  # accelerate puts one on the instance
            decoder.forward = original
    return logits[0].float().to(states.device)


def logits_error(own: Tensor, logits: Tensor) -> float:
    """The largest difference of logits [S,V] from a model's own, as a share of the largest.

    It is 0 if the model's logits are not finite, since nothing can be compared.
    """
    if logits.shape != own.shape:
        return float("inf")
    own = own.float().to(logits.device)
    largest = float(own.abs().max())
    if not math.isfinite(largest):
        return 0.0
    return float((logits - own).abs().max()) / max(largest, 1e-30)


@torch.no_grad()
def own_pass(model: nn.Module, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(final states [B,S,D], logits [B,S,V]) of a pass through the whole model, head included."""
    device = model.get_input_embeddings().weight.device
    ids = input_ids if device.type == "meta" else input_ids.to(device)
    outputs: list[Any] = []
    recorder = _decoder(model).register_forward_hook(lambda *args: outputs.append(args[-1]))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        recorder.remove()
    return outputs[0][0].to(input_ids.device), logits.to(input_ids.device)


def logits_tolerance(model: nn.Module) -> float:
    """The share by which logits may differ: soft caps are computed in the dtype of the model."""
    return 1e-4 if model.get_input_embeddings().weight.dtype == torch.float32 else 0.02


def _head_is_enough(model: nn.Module) -> bool:
    """Whether _head_logits are the model's own. Raises ValueError if _own_logits are not either."""
    if not hasattr(model, "_head_rule"):
        model._head_rule = _try_heads(model)
    if isinstance(model._head_rule, str):
        raise ValueError(model._head_rule)
    return model._head_rule


def _try_heads(model: nn.Module) -> bool | str:
    """Whether _head_logits (True) or _own_logits (False) are the model's own, else why not.

    It is tried with a few tokens. Some families do more than a product, such as a dense layer and
    a norm before it, or another scale.
    """
    ids = _probe_ids(model)
    states = final_states(model, ids)[0]
    reasons = []
    for is_head, function in ((True, _head_logits), (False, _own_logits)):
        try:
            error = logits_error(own_pass(model, ids)[1][0], function(model, states))
        except PROBE_ERRORS as problem:
            reasons.append(first_line(problem))
            continue
        if error <= logits_tolerance(model):
            return is_head
        reasons.append(f"a difference of {error:.1%}")
    return (
        f"{type(model).__name__}: the logits made from its last states are not its own "
        f"({'; '.join(reasons)}); this architecture is not supported"
    )


def _probe_ids(model: nn.Module) -> Tensor:
    return torch.arange(PROBE_TOKENS)[None] % model.get_input_embeddings().num_embeddings


@torch.no_grad()
def check_family(model: nn.Module) -> None:
    """Check with a few tokens that every block of a model can be read, and resumed after.

    It takes two passes, whatever the number of blocks. Raises ValueError that names the family and
    the block, and says what is missing.
    """
    ids = _probe_ids(model)
    try:
        sites = list(range(1, len(blocks(model)) + 1))
        states, final = read_through(model, ids, sites)
    except PROBE_ERRORS as error:
        raise _not_supported(model, f"its blocks cannot be read ({first_line(error)})") from error
    expected = (1, PROBE_TOKENS, text_config(model).hidden_size)
    for site in sites:
        if site not in states:
            # Mllama's blocks of cross-attention, for one.
            raise _not_supported(model, f"block {site} of {len(sites)} is not run on text alone")
        if states[site].shape != expected:
            shape = tuple(states[site].shape)
            raise _not_supported(model, f"the states of block {site} are {shape}, not {expected}")
    # OPT projects its last states to another width.
    if final.shape[:2] != expected[:2]:
        raise _not_supported(model, f"its last states are {tuple(final.shape)}, not {expected}")
    for site in sites:
        _check_resumes(model, ids, site, states, final)
    if not hasattr(model, "_head_rule"):  # tried now, because later hooks may be in place
        model._head_rule = _try_heads(model)


def _not_supported(model: nn.Module, problem: str) -> ValueError:
    return ValueError(f"{type(model).__name__}: {problem}; this architecture is not supported")


def _check_resumes(
    model: nn.Module, ids: Tensor, site: int, states: dict[int, Tensor], final: Tensor
) -> None:
    """Raise ValueError if the block after a site needs more of the earlier ones than its state.

    One block is run, or what follows the last one.
    """
    expected = states.get(site + 1, final)
    try:
        with resumed_at(model, site, states[site]):
            if site + 1 in states:
                resumed = read_sites(model, ids, [site + 1])[site + 1]
            else:
                resumed = final_states(model, ids)
        largest_change = float((resumed - expected).abs().max())  # NaN if the states overflow
        is_same = not largest_change > logits_tolerance(model) * float(expected.abs().max())
        problem = "another result"
    except (*PROBE_ERRORS, ValueError) as error:
        is_same, problem = False, first_line(error)
    if not is_same:
        raise _not_supported(
            model,
            f"its blocks do not pass one residual stream on: resumed after block {site} it gives "
            f"{problem}",
        )


@contextmanager
def resumed_at(model: nn.Module, site: int, hidden: Tensor) -> Iterator[None]:
    """Inside, forward passes do not compute the blocks up to `site`: its output is `hidden`.

    hidden: [B,S,D]
    """
    skipped = list(blocks(model))[:site]
    originals = [block.forward for block in skipped]
    n_outputs = _outputs_of_a_block(model)

    def skip(hidden_states, *_args, **_kwargs):
        # RWKV and xLSTM unpack what follows the hidden state.
        return (hidden_states, *[None] * (n_outputs - 1)) if n_outputs else hidden_states

    def last(hidden_states, *_args, **_kwargs):
        return skip(hidden.to(hidden_states.device))

    try:
        for block in skipped[:-1]:
            block.forward = skip
        skipped[-1].forward = last
        yield
    finally:
        for block, original in zip(skipped, originals, strict=True):
            block.__dict__.pop("forward", None)
            # It was an attribute of the instance before, if the block was compiled or wrapped.
            if block.forward != original:
                block.forward = original


def _outputs_of_a_block(model: nn.Module) -> int:
    """Of how many the tuple is that a block returns, 0 for a tensor; tried once with one token."""
    known = getattr(model, "_n_block_outputs", None)
    if known is None:
        outputs: list[Any] = []
        token = torch.zeros((1, 1), dtype=torch.long)
        with torch.no_grad(), hooked(model, {1: outputs.append}, stop=True):
            _decode(model, token, use_cache=False)
        known = 0 if isinstance(outputs[0], Tensor) else len(outputs[0])
        model._n_block_outputs = known
    return known


def end_tokens(tokenizer: Any, model: nn.Module) -> set[int]:
    """The tokens that end a text; the configuration for generation may list several."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = listed if isinstance(listed, list | tuple) else [listed]
    return {tokenizer.eos_token_id, *ids} - {None}


@torch.no_grad()
def next_logits(model: nn.Module, input_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """(logits [B,V] after the last token, cache) of new tokens [B,S] that follow the cached ones.

    cache: None at the beginning of a text. A returned None says that this model has no cache of
    keys and values (Mamba, for one), so that its text has to be run from the beginning.
    """
    options: dict[str, Any] = {"use_cache": False}
    if "past_key_values" in inspect.signature(model.get_decoder().forward).parameters:
        options = {"past_key_values": cache, "use_cache": True}
    out = _decode(model, input_ids, **options)
    logits = logits_of(model, out[0][:, -1].to(input_ids.device))
    return logits, getattr(out, "past_key_values", None)


@torch.no_grad()
def peek(model: nn.Module, input_ids: Tensor, cache: Any, sites: list[int]) -> dict[int, Tensor]:
    """{site: hidden [B,S,D]} of new tokens. The cache stays as it is, so they can be run again."""
    copied = copy.deepcopy(cache)
    return read_sites(model, input_ids, sites, past_key_values=copied, use_cache=cache is not None)


@torch.no_grad()
def mean_loss(model: nn.Module, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mean next-token cross-entropy in nats, number of targets) over the counted targets."""
    keep = mask[:, 1:]
    states = final_states(model, input_ids)[:, :-1][keep]
    targets = input_ids[:, 1:][keep]
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(states.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        total += F.cross_entropy(logits_of(model, s), t, reduction="sum").double().cpu()
    return total / max(1, len(targets)), keep.sum()
