"""SAEs that other programs wrote, read as the models here that give the same codes.

FORMATS has one entry for each format. Its reader says what the files mean, in the terms of
published.py, which finds the model here that computes the same.

Shapes: D hidden, F latents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src import files, hub, tensor_files
from src.formats import (
    CENTRED,
    HUB_NAME,
    LEARNED_NAMES,
    LENS_CONFIG,
    LENS_WEIGHTS,
    LINEAR,
    OWN_CONFIG,
    OWN_WEIGHTS,
    hook_of,
    site_of,
)
from src.published import (
    BATCH_RULES,
    Published,
    Source,
    hold,
    number,
    refuse,
    renamed,
    state_of,
    typed_site,
    whole,
)

# Families whose layers normalise by the mean square, not by the mean.
RMS_FAMILIES = re.compile(
    r"llama|mistral|mixtral|gemma|qwen|olmo-2|yi-|deepseek|smollm|baichuan|internlm", re.I
)


class Format(NamedTuple):
    """A folder that another program writes."""

    name: str
    weights: str  # the file of the weights, from the folder of the SAE
    config: str | None  # a JSON file that must lie there too
    read: Callable[[Any, dict[str, Any], Source], Published]  # of the two files' contents


# ------------------------------------------------------------------------------- finding


def locate(name: str | Path) -> Path:
    """The file or folder of that name.

    `user/repository[/folder][@revision]` that is no local path is fetched from the hub, or taken
    from its cache. Raises ValueError that says why a repository cannot be had.
    """
    path, hub_name = Path(name), HUB_NAME.fullmatch(str(name))
    has_file_suffix = path.suffix in (".pt", ".json", ".safetensors", ".npz")
    is_relative = bool({".", ".."} & set(str(name).split("/")))
    if path.exists() or has_file_suffix or is_relative or not hub_name:
        return path
    import huggingface_hub

    repo, folder = hub_name["repo"], hub_name["folder"].strip("/")
    try:
        snapshot = huggingface_hub.snapshot_download(
            repo, revision=hub_name["revision"], allow_patterns=_hub_patterns(folder)
        )
    except (OSError, ValueError) as error:
        reason = hub.reason(error, repo) or f"the hub answered: {files.first_line(error)[:160]}"
        raise ValueError(f"no file or folder {name}; {reason}") from error
    return Path(snapshot) / folder


def _hub_patterns(folder: str) -> list[str]:
    """The files of a repository that an SAE in this folder of it may need."""
    wanted = {OWN_CONFIG, OWN_WEIGHTS, "lm_config.json"}
    for known in FORMATS:
        wanted |= {known.weights, known.config} - {None}
    if not folder:
        return [*sorted(wanted), f"*/{LENS_CONFIG}"]
    parent = folder.rpartition("/")[0]
    beside = f"{parent}/{OWN_CONFIG}".lstrip("/")  # sparsify keeps the training's options there
    return [*(f"{folder}/{file}" for file in sorted(wanted)), beside]


def read(path: Path, name: str, hints: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict] | None:
    """(state dict, recipe) of a folder, or of the file of weights in one.

    A folder that holds one SAE in a folder of its own is taken for that. Returns None for a file
    of no folder's format: that is a checkpoint, or one of OpenAI's. Raises ValueError with the
    reason for a folder that no model here holds.
    """
    if path.is_dir():
        return _read_folder(path, name, hints)
    for folder in path.parents[:2] if path.exists() else ():
        known = _format_of(folder)
        if known and folder / known.weights == path:
            return _read_folder(folder, name, hints)
    return None


def _read_folder(folder: Path, name: str, hints: Mapping[str, Any]) -> tuple[dict, dict]:
    if (folder / OWN_CONFIG).is_file() and (folder / OWN_WEIGHTS).is_file():
        weights = tensor_files.read_safetensors(folder / OWN_WEIGHTS)
        return weights, files.load_json(folder / OWN_CONFIG)
    known = _format_of(folder)
    if known:
        return _read_as(known, Source(folder, name, hints))
    # Of a repository without a folder in its name, the configurations alone were fetched.
    inside = sorted(
        path for path in folder.glob("*") if (path / LENS_CONFIG).is_file() or _format_of(path)
    )
    if len(inside) == 1 and _format_of(inside[0]):
        return _read_folder(inside[0], f"{name}/{inside[0].name}", hints)
    hint = f"; files of an SAE are {', '.join(sorted(known.weights for known in FORMATS))}"
    if inside:
        names = ", ".join(path.name for path in inside[:5]) + (" ..." if len(inside) > 5 else "")
        hint = f"; it has SAEs in {names}: name one"
    raise ValueError(f"{folder} holds no SAE{hint}")


def _format_of(folder: Path) -> Format | None:
    """The format whose files lie in a folder."""
    for known in FORMATS:
        needed = [known.weights, known.config] if known.config else [known.weights]
        if all((folder / file).is_file() for file in needed):
            return known
    return None


def _read_as(known: Format, source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config_path = source.folder / (known.config or OWN_CONFIG)
    try:
        config = files.load_json(config_path) if config_path.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError(f"its {config_path.name} holds no options")
        published = known.read(tensor_files.read(source.folder / known.weights), config, source)
        return hold(published, source)
    except ValueError as error:
        raise ValueError(
            f"{source.folder}: this SAE of {known.name} cannot be held exactly here: {error}"
        ) from error


def read_state(value: Any, path: Path, hints: Mapping[str, Any]) -> tuple[dict, dict] | None:
    """(state dict, recipe) of OpenAI's Autoencoder; None for what another program wrote.

    value: what the file holds. Raises ValueError with the reason if no model here holds it.
    """
    if not isinstance(value, dict) or "stats_last_nonzero" not in value:
        return None
    try:
        return hold(_openai(value, path, hints), Source(path, str(path), hints))
    except ValueError as error:
        raise ValueError(
            f"{path}: this SAE of OpenAI cannot be held exactly here: {error}"
        ) from error


# ------------------------------------------------------------------------------- SAELens


def _lens(tensors: Any, config: dict[str, Any], source: Source) -> Published:
    """A folder of SAELens, of version 3 or later."""
    metadata = config.get("metadata")
    # Before version 6 there was only one level.
    about = metadata if isinstance(metadata, dict) and metadata else config
    architecture, k = _lens_architecture(config)
    if about.get("hook_head_index") is not None:
        raise ValueError(
            f"it reads one attention head (hook_head_index {about['hook_head_index']})"
        )
    return Published(
        architecture,
        _without_scaling(tensors),
        site_of(str(about.get("hook_name") or about.get("hook_point") or "")),
        k,
        subtracts_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        unit_rows=architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm")),
        input_norm=_lens_input_norm(config, about),
        language_model=about.get("model_name"),
        notes=_lens_notes(about),
    )


def _lens_notes(about: Mapping[str, Any]) -> tuple[str, ...]:
    """What an SAE of SAELens was trained on that this program does not give it by itself."""
    notes = ()
    if about.get("prepend_bos") is False:
        notes = ("trained on rows without BOS; rows here begin with it, and it is never counted",)
    options = about.get("model_from_pretrained_kwargs")
    revision = options.get("revision") if isinstance(options, dict) else None
    if revision:
        notes += (f"trained on revision {revision!r} of the language model; give it as a folder",)
    return notes


def _lens_architecture(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """(architecture, k of a topk). Old versions name the activation function beside it."""
    architecture, k = config.get("architecture") or "standard", config.get("k")
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if activation == "topk":
        arguments = config.get("activation_fn_kwargs")
        architecture, k = "topk", arguments.get("k") if isinstance(arguments, dict) else None
    elif activation != "relu":
        raise ValueError(f"its activation is {activation!r}")
    return architecture, whole(k, "k") if architecture == "topk" else None


def _lens_input_norm(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The input_norm of the same meaning. Raises ValueError for other changes of the input."""
    norm = config.get("normalize_activations") or "none"
    if norm not in ("none", "layer_norm"):
        raise ValueError(
            f"its inputs are scaled by {norm!r}; known are none, layer_norm "
            "(fold_activation_norm_scaling_factor makes it none)"
        )
    if config.get("reshape_activations", "none") != "none":
        raise ValueError("it reshapes what it reads")
    if norm == "layer_norm":
        return "token"  # which subtracts the mean too
    options = about.get("model_from_pretrained_kwargs")
    is_centred = isinstance(options, dict) and bool(options.get(CENTRED))
    has_rms_norm = RMS_FAMILIES.search(str(about.get("model_name")))
    return "mean" if is_centred and not has_rms_norm else "none"


def _without_scaling(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without a factor of the latents, which must be 1. Raises ValueError otherwise."""
    rest = dict(tensors)
    factor = rest.pop("scaling_factor", None)
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise ValueError("it rescales its latents by a scaling_factor other than 1")
    return rest


# ------------------------------------------------------------------------------- sparsify


def _sparsify(tensors: Any, config: dict[str, Any], source: Source) -> Published:
    """A hookpoint of sparsify (EleutherAI): TopK of raw states, its name that of the module."""
    reasons = {
        "transcode": "it predicts what a module gives from what it gets",
        "skip_connection": "it adds a linear map of its input to the reconstruction",
        "signed": "it keeps the values of largest size, with their sign",
    }
    refuse(config, reasons)
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"its activation is {config['activation']!r}; known is topk")
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    hook = _sparsify_hook(source)
    run = source.folder.resolve().parent / OWN_CONFIG  # the options of the training
    run_options = files.load_json(run) if run.is_file() else {}
    language_model = run_options.get("model") if isinstance(run_options, dict) else None
    return Published(
        "topk",
        renamed(tensors, names),
        source.hints.get("layer") or site_of(hook),
        whole(config.get("k"), "k"),
        language_model=language_model,
    )


def _sparsify_hook(source: Source) -> str:
    """The name of the module: that of the folder, above the seed where several were trained."""
    *_, parent, last = ("", *source.parts)
    return parent if re.fullmatch(r"seed\d+", last) else last


# ---------------------------------------------------------------------- dictionary_learning

# By its class: (architecture, options of Published).
LEARNED: dict[str, tuple[str, dict[str, Any]]] = {
    # Loading it there divides the decoder by its norms and multiplies the codes by them.
    "AutoEncoder": ("standard", {"unit_rows": True}),
    "AutoEncoderNew": ("standard", {"subtracts_b_dec": False}),
    "GatedAutoEncoder": ("gated", {}),
    "JumpReluAutoEncoder": ("jumprelu", {"subtracts_b_dec": False}),
    "AutoEncoderTopK": ("topk", {}),
    # At inference these two are active above one threshold.
    "BatchTopKSAE": ("batchtopk", {}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", {}),
}


def _learned(value: Any, config: dict[str, Any], source: Source) -> Published:
    """A folder of dictionary_learning (Marks et al.), as its load_dictionary opens it."""
    trainer, buffer = config.get("trainer"), config.get("buffer")
    if not isinstance(trainer, dict):
        raise ValueError("its config.json has no trainer")
    dict_class = trainer.get("dict_class")
    if not isinstance(dict_class, str) or dict_class not in LEARNED:
        raise ValueError(f"its class is {dict_class!r}; known are {', '.join(LEARNED)}")
    (architecture, options), names = LEARNED[dict_class], LEARNED_NAMES[dict_class]
    state, k, group_sizes = value, trainer.get("k"), None
    if isinstance(value, dict):
        state = dict(value)
        k, group_sizes = state.pop("k", k), state.pop("group_sizes", None)
    state = state_of(state)
    # Its TopK keeps a threshold too, which its encode does not use.
    cut = None if "threshold" in names else state.pop("threshold", None)
    has_cut = architecture in BATCH_RULES and cut is not None and cut.dim() == 0
    return Published(
        architecture,
        renamed(state, names),
        _learned_site(trainer, buffer if isinstance(buffer, dict) else {}, source),
        whole(k, "k") if architecture in ("topk", *BATCH_RULES) else None,
        cut=float(cut) if has_cut else None,
        widths=_prefixes(group_sizes),
        language_model=trainer.get("lm_name"),
        **options,
    )


def _prefixes(group_sizes: Any) -> list[int] | None:
    """The numbers of first latents that reconstruct alone, from the sizes of the groups."""
    if not isinstance(group_sizes, Tensor) or group_sizes.dim() != 1:
        return None
    return group_sizes.cumsum(0)[:-1].tolist()


def _learned_site(trainer: dict[str, Any], buffer: dict[str, Any], source: Source) -> int:
    """The site of `layer`, counted from 0, if the module is a block. Raises ValueError else."""
    place, layer = str(trainer.get("submodule_name") or "resid_post"), trainer.get("layer")
    if buffer.get("io", "out") != "out":
        raise ValueError(f"it reads what goes into {place!r} (io {buffer['io']!r})")
    if source.hints.get("layer"):
        return source.hints["layer"]
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        return typed_site(source, f"its layer is {layer!r}")
    match = re.match(r"resid_(pre|post)(?!\w*_(?:mlp|attn))", place)
    return site_of(f"blocks.{layer}.hook_resid_{match[1]}" if match else place)


# ------------------------------------------------------------------------------- Gemma Scope


def _gemma_scope(tensors: Any, config: dict[str, Any], source: Source) -> Published:
    """params.npz of Gemma Scope (Lieberum et al. 2024). Only names of folders say what it reads."""
    typed = source.name.partition("@")[0]
    where = "/".join((*source.parts, typed))
    release = re.search(r"gemma-scope-(\d+b)-(pt|it)-(\w+)", where)
    place = release[3] if release else "res"
    if place != "res" or "embedding" in where:
        site_of("embedding" if place == "res" else release[0])  # which refuses it
    layer = re.search(r"layer_(\d+)(?!.*layer_\d)", where)
    site = source.hints.get("layer") or (layer and int(layer[1]) + 1)
    site = site or typed_site(source, "no folder is named layer_N")
    language_model, notes = None, ()
    if release:
        suffix = "-it" if release[2] == "it" else ""
        language_model = f"google/gemma-2-{release[1]}{suffix}"
    else:
        notes = (f"taken for an SAE of {hook_of(site)}, since no folder's name says more",)
    return Published(
        "jumprelu",
        tensors,
        site,
        subtracts_b_dec=False,
        language_model=language_model,
        title="_".join(source.parts[-3:]),
        notes=notes,
    )


def _gemma_scope_2(tensors: Any, config: dict[str, Any], source: Source) -> Published:
    """params.safetensors of Gemma Scope 2: the same SAE, for Gemma 3."""
    hook = config.get("hf_hook_point_in")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"its architecture is {config['architecture']!r}; known is jump_relu")
    if config.get("hf_hook_point_out", hook) != hook:
        raise ValueError(f"it reads {hook!r} and predicts {config['hf_hook_point_out']!r}")
    if hook is None:
        hook = _gemma_scope_2_hook(source)
    names = {"w_enc": "W_enc", "w_dec": "W_dec"}
    names |= {name: name for name in ("b_enc", "b_dec", "threshold")}
    language_model = str(config.get("model_name") or "").replace("-v3", "-3")
    if language_model and "/" not in language_model:
        language_model = f"google/{language_model}"
    return Published(
        "jumprelu",
        renamed(tensors, names),
        site_of(str(hook)),
        subtracts_b_dec=False,
        language_model=language_model,
    )


def _gemma_scope_2_hook(source: Source) -> str:
    """The place that the names of the folders say: resid_post/layer_12_width_16k_l0_medium."""
    where = "/".join((*source.parts[-3:], source.name))
    layer = re.search(r"layer_(\d+)", source.parts[-1])
    if "resid_post" in where and layer:
        return f"blocks.{layer[1]}.hook_resid_post"
    return where


# ------------------------------------------------------------------------------- Llama Scope


def _llama_scope(tensors: Any, config: dict[str, Any], source: Source) -> Published:
    """A folder of Llama Scope (He et al. 2024): hyperparams.json and checkpoints/final.safetensors.

    Inputs are scaled to a mean norm of sqrt(D). The one threshold was found on unscaled inputs.
    """
    refuse(config, {"use_glu_encoder": "its encoder has a second, gating layer"})
    activation = str(config.get("act_fn", "relu")).lower()
    if activation not in ("relu", "jumprelu", "topk"):
        raise ValueError(f"its activation is {activation!r}; known are relu, jumprelu, topk")
    scale = _norm_factor(config, config.get("dataset_average_activation_norm"), "in", "out")
    names = LINEAR | {"encoder.bias": "b_enc", "decoder.bias": "b_dec"}
    standard = renamed(tensors, names)
    if activation == "jumprelu":
        threshold = number(config.get("jump_relu_threshold"), "jump_relu_threshold") * scale
        standard["threshold"] = torch.full((standard["W_enc"].shape[-1],), threshold)
    published = _scope(standard, config, activation, scale)
    # Its loader gave the decoder rows of norm 1 before the threshold was found.
    return published._replace(
        unit_rows=bool(config.get("sparsity_include_decoder_norm", True)),
        language_model="meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in source.name else None,
        subtracts_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder", True)),
    )


def _llamascopium(tensors: Any, config: dict[str, Any], source: Source) -> Published:
    """A folder of Llamascopium (OpenMOSS; earlier lm_saes): config.json, sae_weights.safetensors.

    Codes are those of inputs scaled to a mean norm of sqrt(D).
    """
    if config.get("sae_type", "sae") != "sae":
        raise ValueError(f"its kind is {config['sae_type']!r}; known is sae")
    refuse(config, {"use_glu_encoder": "its encoder has a second, gating layer"})
    activation = str(config.get("act_fn", "relu")).lower()
    prefix = "dataset_average_activation_norm."
    norms = {
        name.removeprefix(prefix): float(value)
        for name, value in tensors.items()
        if name.startswith(prefix) and value.dim() == 0
    }
    hook_in, hook_out = str(config.get("hook_point_in")), str(config.get("hook_point_out"))
    scale = _norm_factor(config, norms, hook_in, hook_out)
    has_norms = bool(config.get("sparsity_include_decoder_norm", True))
    rest = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    standard = _llamascopium_tensors(rest, config, has_norms)
    published = _scope(standard, config, activation, scale)
    lm_config = source.folder / "lm_config.json"
    options = files.load_json(lm_config) if lm_config.is_file() else {}
    is_ranked = has_norms and activation == "topk"
    note = "its codes are given in units of decoder rows of norm 1, by which it ranks them"
    return published._replace(
        unit_rows=is_ranked,
        subtracts_b_dec=False,
        language_model=options.get("model_name") if isinstance(options, dict) else None,
        notes=(note,) if is_ranked else (),
    )


def _llamascopium_tensors(
    tensors: dict[str, Tensor], config: dict[str, Any], has_norms: bool
) -> dict[str, Tensor]:
    """Its tensors by standard names; the threshold that of the codes, without decoder norms."""
    names = {"W_E": "W_enc", "W_D": "W_dec", "b_E": "b_enc", "b_D": "b_dec"}
    if "encoder.weight" in tensors:  # written by lm_saes
        names = LINEAR | {"encoder.bias": "b_enc", "decoder.bias": "b_dec"}
    if not config.get("use_decoder_bias", True) and "W_D" in tensors:
        tensors["b_D"] = torch.zeros(tensors["W_D"].shape[-1])
    logarithm = next((name for name in tensors if name.endswith("log_jumprelu_threshold")), None)
    if logarithm is None:
        return renamed(tensors, names)
    standard = renamed(tensors, names | {logarithm: "threshold"})
    threshold = standard["threshold"].float().exp()
    # Compared with pre-activation times norm; the codes keep their own scale.
    norms = standard["W_dec"].float().norm(dim=-1) if has_norms else 1.0
    return standard | {"threshold": threshold / norms}


def _scope(
    standard: dict[str, Tensor], config: dict[str, Any], activation: str, scale: float
) -> Published:
    """What the SAEs of OpenMOSS have in common. Raises ValueError for a transcoder."""
    hook_in, hook_out = config.get("hook_point_in"), config.get("hook_point_out")
    if hook_out not in (None, hook_in):
        raise ValueError(f"it reads {hook_in!r} and predicts {hook_out!r}")
    architecture = {"relu": "standard"}.get(activation, activation)
    k = whole(config.get("top_k"), "top_k") if activation == "topk" else None
    return Published(architecture, standard, site_of(str(hook_in)), k, scale=scale)


def _norm_factor(config: dict[str, Any], norms: Any, hook_in: str, hook_out: str) -> float:
    """The factor of the input: sqrt(D) by the mean norm of states; 1 if weights hold it already."""
    kind = config.get("norm_activation", "dataset-wise")
    if kind == "inference":
        return 1.0
    if kind != "dataset-wise":
        raise ValueError(f"its inputs are scaled {kind}; known are dataset-wise, inference")
    norm_in, norm_out = (
        norms.get(hook) if isinstance(norms, dict) else None for hook in (hook_in, hook_out)
    )
    norm_in = number(norm_in, "dataset_average_activation_norm")
    if norm_out not in (None, norm_in):
        raise ValueError(f"it scales inputs by {norm_in} and outputs by {norm_out}")
    return math.sqrt(whole(config.get("d_model"), "d_model")) / norm_in


# ------------------------------------------------------------------------------- OpenAI

OPENAI_PLACES = r"(mlp_post_act|resid_delta_attn|resid_delta_mlp|resid_post_attn|resid_post_mlp)"
OPENAI_STATISTICS = (
    "stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"
)  # fmt: skip


def _openai(value: dict[str, Any], path: Path, hints: Mapping[str, Any]) -> Published:
    """A file of OpenAI's sparse_autoencoder (Gao et al. 2024), TopK or ReLU.

    Inputs of a TopK are standardised there, those of a ReLU are raw.
    """
    # Its writer repeats the options as activation.k and activation.postact_fn.
    state = {
        name: v
        for name, v in value.items()
        if name not in OPENAI_STATISTICS and not str(name).startswith("activation.")
    }
    activation = state.pop("activation", "ReLU")
    options = state.pop("activation_state_dict", {})
    if activation not in ("ReLU", "TopK"):
        raise ValueError(f"its activation is {activation!r}; known are ReLU, TopK")
    is_topk = activation == "TopK"
    after = options.get("postact_fn", "ReLU") if isinstance(options, dict) else None
    if after not in ("ReLU", "Identity"):
        raise ValueError(f"its values pass {after!r}; known are ReLU, Identity")
    names = LINEAR | {"latent_bias": "b_enc", "pre_bias": "b_dec"}
    source = Source(path, str(path), hints)
    place = re.search(OPENAI_PLACES, str(path.resolve()))
    language_model, notes = None, ()
    if place:
        site_of({"resid_post_mlp": "blocks.1.hook_resid_post"}.get(place[1], place[1]))
        language_model = "openai-community/gpt2"
    else:
        notes = ("taken for an SAE of what a block gives, since no folder's name says more",)
    site = int(path.stem) + 1 if path.stem.isdecimal() else None
    return Published(
        "topk" if is_topk else "standard",
        renamed(state_of(state), names),
        hints.get("layer") or site or typed_site(source, f"{path.name} is no number of a block"),
        whole(options.get("k"), "k") if is_topk else None,
        clips=after == "ReLU",
        input_norm="token" if is_topk else "none",
        language_model=language_model,
        notes=notes,
    )


FORMATS = (
    Format("SAELens", LENS_WEIGHTS, LENS_CONFIG, _lens),
    Format("sparsify", "sae.safetensors", "cfg.json", _sparsify),
    Format("dictionary_learning", "ae.pt", "config.json", _learned),
    Format("Gemma Scope", "params.npz", None, _gemma_scope),
    Format("Gemma Scope 2", "params.safetensors", None, _gemma_scope_2),
    Format("Llama Scope", "checkpoints/final.safetensors", "hyperparams.json", _llama_scope),
    Format("Llamascopium", LENS_WEIGHTS, "config.json", _llamascopium),
)
