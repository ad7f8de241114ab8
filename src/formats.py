"""SAEs in the formats of SAELens, the Hugging Face hub and SAEBench, written and read.

Knows no model by name. The forward pass of SiteSAE is the documented one of SAELens; an SAE is
exported only after the two have given the same latents.

Shapes: N tokens, D hidden, F latents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import files, hub, metric_table, model
from src.sae import SAE, STANDARD_NAMES, StandardForm

LENS_CONFIG = "cfg.json"
LENS_WEIGHTS = "sae_weights.safetensors"
HUB_CONFIG = "config.json"
HUB_WEIGHTS = "model.safetensors"
LENS_EPS = 1e-5  # what SAELens adds to the standard deviation; it has no option for it
# TransformerLens changes the weights of a language model so that no state has a mean. It does so
# only where layers normalise by the mean; in families with RMSNorm it leaves them.
CENTRED = "center_writing_weights"
RMS_FAMILIES = re.compile(
    r"llama|mistral|mixtral|gemma|qwen|olmo-2|yi-|deepseek|smollm|baichuan|internlm", re.I
)
LENS_VERSION = "6.54.12"  # of the layout written here; older layouts are read too
HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?P<folder>(/[\w.=-]+)*)(@(?P<revision>[\w./-]+))?"
)
DEMO_LM_NAME = str(files.DEMO_LM.relative_to(files.ROOT))

Writers = dict[str, Callable[[Any], Any]]  # {file name: function that writes to an open file}


WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ValueError, naming the tensor, if a state dict cannot be the weights of an SAE."""
    for name, value in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"{source} is not a state dict: it has the key {name!r}")
        if problem := _problem_of(value):
            raise ValueError(f"{source}: {name} {problem}")


def _problem_of(value: Tensor) -> str | None:
    """Why a tensor cannot hold weights, or None."""
    if value.layout is not torch.strided or value.is_meta or value.is_nested:
        return "is no dense tensor"
    if value.dtype not in WEIGHT_TYPES:
        return f"holds {value.dtype} values; weights are floating-point numbers"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return f"has the shape {tuple(value.shape)} and fewer values than that"
    # A scalar may be unset, which is NaN.
    n_bad = int((~value.float().isfinite()).sum()) if value.dim() else 0
    if n_bad:
        return f"has {n_bad} values that are not finite: its training failed, or it is damaged"
    return None


# ------------------------------------------------------------------------------- an SAE of one site


def _topk(pre_acts: Tensor, k: int) -> Tensor:
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_acts).scatter(-1, indices, values.relu())


def _jumprelu(pre_acts: Tensor, threshold: Tensor) -> Tensor:
    return F.relu(pre_acts) * (pre_acts > threshold)


# Latents from product = (x - b_dec) W_enc [N,F], by architecture.
ACTIVATIONS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "standard": lambda product, sae: F.relu(product + sae.b_enc),
    "topk": lambda product, sae: _topk(product + sae.b_enc, sae.k),
    "jumprelu": lambda product, sae: _jumprelu(product + sae.b_enc, sae.threshold),
    "gated": lambda product, sae: (
        (product + sae.b_gate > 0) * F.relu(sae.r_mag.exp() * product + sae.b_mag)
    ),
}


class SiteSAE(nn.Module):
    """The standard form of an SAE at one site, applied to raw residual states.

    SAEBench takes it as an SAE object (encode, decode, W_enc ..., cfg). `model_name` is what
    SAEBench loads, `hook_name` the language model's own name of the site (default: that of
    TransformerLens). decode uses the mean and standard deviation of the states encoded last.
    """

    def __init__(
        self,
        sae: SAE,
        site: int,
        form: StandardForm,
        model_name: str | None = None,
        hook_name: str | None = None,
    ) -> None:
        super().__init__()
        self.architecture = form.architecture
        self.k = form.k
        self.caveat = form.caveat
        self._standardise = sae.standardise
        self._moments: tuple[Tensor, Tensor] | None = None
        for name, value in form.tensors.items():
            # Detached, not copied: the memory is shared with the SAE.
            setattr(self, name, nn.Parameter(value.detach(), requires_grad=False))
        d_in, d_sae = self.W_enc.shape
        self.cfg = _Config(
            architecture=form.architecture,
            architecture_str=form.architecture,
            d_in=d_in,
            d_sae=d_sae,
            model_name=model_name,
            hook_name=hook_name or hook_of(site),
            hook_layer=site - 1,
            hook_head_index=None,
            dtype="float32",
            device=str(self.device),
            context_size=128,
            prepend_bos=True,
            normalize_activations="none",
            dataset_path="",
            seqpos_slice=(None,),
            model_from_pretrained_kwargs={},
            dataset_trust_remote_code=False,
            exclude_special_tokens=None,
        )

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    def encode(self, h: Tensor) -> Tensor:
        """Raw states -> latents. [...,D] -> [...,F]"""
        x, mean, std = self._standardise(h)
        self._moments = mean, std
        return ACTIVATIONS[self.architecture]((x.to(self.dtype) - self.b_dec) @ self.W_enc, self)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> raw states. [...,F] -> [...,D]

        Raises ValueError if the last call of encode had states of another shape.
        """
        if self._moments is None or self._moments[0].shape[:-1] != latents.shape[:-1]:
            raise ValueError(
                "decode needs mean and standard deviation of the states: encode them first, "
                "then decode a code of the same tokens"
            )
        mean, std = self._moments
        return (latents @ self.W_dec + self.b_dec) * std.to(self.dtype) + mean.to(self.dtype)

    def forward(self, h: Tensor) -> Tensor:
        return self.decode(self.encode(h))


class _Config(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        """All fields but the `metadata` that SAEBench adds."""
        return {key: value for key, value in vars(self).items() if key != "metadata"}


def hook_of(site: int) -> str:
    """TransformerLens' name of a site."""
    return f"blocks.{site - 1}.hook_resid_post"


# Names of residual-stream sites in TransformerLens and transformers; index + shift is the site.
HOOK_PATTERNS = (
    (r"blocks\.(\d+)\.hook_resid_post", 1),
    (r"blocks\.(\d+)\.hook_resid_pre", 0),
    (r"[\w.]*\b(?:layers|h)\.(\d+)", 1),
)


def site_of(hook: str) -> int:
    """The site that a hook's name means. Raises ValueError for one off the residual stream."""
    for pattern, shift in HOOK_PATTERNS:
        match = re.fullmatch(pattern, hook)
        site = int(match[1]) + shift if match else 0
        if site > 0:
            return site
    raise ValueError(
        f"it reads {hook!r}, which is the output of no decoder block; "
        "SAEs of this program read such outputs only"
    )


def site_saes(
    sae: SAE, model_name: str | None = None, hook_names: Mapping[int, str] | None = None
) -> dict[int, SiteSAE]:
    """{site: SiteSAE} of an SAE.

    Raises ValueError with the reason if the SAE has no standard form or its latents differ.
    """
    hook_names = hook_names or {}
    forms = sae.to_standard_form()
    result = {
        site: SiteSAE(sae, site, form, model_name, hook_names.get(site))
        for site, form in forms.items()
    }
    for site, form in forms.items():
        compare(sae, form, result[site])
    return result


@torch.no_grad()
def compare(sae: SAE, form: StandardForm, site_sae: SiteSAE, tokens: int = 1024) -> None:
    """Raise ValueError if latents of random states differ from the SAE's own beyond rounding."""
    below_0 = int((form.tensors["threshold"] < 0).sum()) if "threshold" in form.tensors else 0
    if below_0:
        raise ValueError(
            f"{below_0} thresholds lie below 0 and let negative values through, "
            f"which the {form.architecture} of SAELens clips"
        )
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, sae.hidden_size, generator=generator).to(site_sae.device)
    expected, latents = form.code(sae.standardise(h)[0]), site_sae.encode(h)
    if (expected < 0).any():
        share = float((expected < 0).any(-1).float().mean())
        raise ValueError(
            f"negative values are among the latents (on {share:.1%} of random states) "
            "and SAELens clips them; train with --topk_relu 1"
        )
    tolerance = 1e-4 * expected.amax().clamp_min(1)
    # The negation counts NaN as wrong.
    wrong = float((~((expected - latents).abs() <= tolerance)).any(-1).float().mean())
    # At a tie, rounding may choose another latent; that must stay rare.
    if wrong > 1e-3:
        raise ValueError(f"the exported form gives other latents on {wrong:.1%} of random states")


# ------------------------------------------------------------------------------- export


def export(
    sae: SAE, recipe: Mapping[str, Any], output_dir: str | Path, kind: str, overwrite: bool = False
) -> Path:
    """Write the folder export/<kind>/<title> under output_dir, completely or not at all.

    kind: "saelens" or "hf". Returns the folder. Raises ValueError if the format cannot hold the
    SAE, or if the folder exists and is not to be overwritten.
    """
    folder = Path(output_dir) / files.EXPORT_DIR / kind / files.safe_name(recipe["title"])
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists already; --overwrite replaces it")
    check_tensors(sae.state_dict(), recipe["title"])
    evaluation = _read_evaluation(Path(output_dir) / files.EVAL_DIR / f"{folder.name}.json", recipe)
    shown = public_recipe(recipe)
    writers, how_to_load = {"saelens": _lens_files, "hf": _hub_files}[kind](sae, shown)
    text = card(sae, shown, evaluation, how_to_load)
    writers["README.md"] = lambda file: file.write(text.encode())
    return files.write_folder(folder, writers, manifest=False)


def _read_evaluation(path: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation of this SAE, or {} if there is none or it belongs to other weights."""
    evaluation = files.load_json(path) if path.exists() else {}
    if not files.is_stale_result(evaluation, recipe):
        return evaluation
    print(
        f"{path}: the results of another SAE that had this name; the card leaves them out. "
        "Run evaluate.py and export again with --overwrite"
    )
    return {}


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe that can be published: hub names stay, local paths become short names."""
    shown = json.loads(json.dumps(dict(recipe)))
    paths = ("model_path", "data_path")
    shown["options"] = {
        key: value
        for key, value in shown.get("options", {}).items()
        if key not in paths and not (isinstance(value, str) and Path(value).is_absolute())
    }
    for key in paths:
        value = shown.pop(key, None)
        if not value or value == "None":
            continue
        if Path(value).resolve() == files.DEMO_LM:
            shown[key] = DEMO_LM_NAME
        elif not Path(value).exists() and HUB_NAME.fullmatch(value):
            shown[key] = value
        shown[key.replace("path", "name")] = shown.get(key) or files.data_name(value)
    return shown


def _safetensors(module: nn.Module) -> Callable[[Any], Any]:
    """Writes the state dict in float32; the copy is made only then."""
    from safetensors.torch import save

    def write(file: Any) -> None:
        weights = module.state_dict().items()
        tensors = {name: value.cpu().float().contiguous().clone() for name, value in weights}
        file.write(save(tensors, {"format": "pt"}))

    return write


def _json(data: Any) -> Callable[[Any], Any]:
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    return lambda file: file.write(text.encode())


LENS_LOADING = """\
```python
from sae_lens import SAE

sae = SAE.load_from_disk("{hook}")  # in this folder
sae = SAE.from_pretrained("user/repository", "{hook}")  # once it is pushed
```
"""
LENS_EXACT = "Same latents as the original."
LENS_ROUNDED = (
    "Same latents as the original up to float32 rounding, checked on random states when this was "
    "written. Reconstructions differ by 1e-5 of a standard deviation, which SAELens leaves out "
    "when it scales back."
)


def _lens_files(sae: SAE, recipe: dict[str, Any]) -> tuple[Writers, list[str]]:
    """(files of a folder for SAELens, lines of the card on how to load it)."""
    norm = "layer_norm" if sae.input_norm == "token" else "none"
    if norm == "layer_norm" and sae.norm_eps != LENS_EPS:
        raise ValueError(
            f"it standardises with norm_eps {sae.norm_eps:g}, SAELens with {LENS_EPS:g}, and the "
            f"codes differ; --norm_eps {LENS_EPS:g} exports it as if trained so"
        )
    writers: Writers = {}
    by_site = site_saes(sae)
    for site_sae in by_site.values():
        folder = site_sae.cfg.hook_name
        config = _lens_config(site_sae, norm, recipe, sae.name)
        if sae.input_norm == "mean":
            config["metadata"]["model_from_pretrained_kwargs"] = {CENTRED: True}
        writers[f"{folder}/{LENS_CONFIG}"] = _json(config)
        writers[f"{folder}/{LENS_WEIGHTS}"] = _safetensors(site_sae)
    first = next(iter(by_site.values()))
    lines = LENS_LOADING.format(hook=first.cfg.hook_name).split("\n")
    lines += [LENS_ROUNDED if norm == "layer_norm" else LENS_EXACT]
    if first.caveat:
        lines += ["", first.caveat]
    return writers, lines


def _lens_config(
    site_sae: SiteSAE, norm: str, recipe: Mapping[str, Any], model_name: str
) -> dict[str, Any]:
    """The cfg.json of SAELens for one site."""
    config = {
        "architecture": site_sae.architecture,
        "d_in": site_sae.cfg.d_in,
        "d_sae": site_sae.cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": norm,
        "reshape_activations": "none",
    }
    if site_sae.architecture == "topk":
        config["k"] = site_sae.k
        # With rows of norm 1 the scaling changes nothing, and SAELens' tools may fold it.
        norm_errors = (site_sae.W_dec.norm(dim=-1) - 1).abs()
        config["rescale_acts_by_decoder_norm"] = bool(norm_errors.max() < 1e-5)
    config["metadata"] = {
        "sae_lens_version": LENS_VERSION,
        "model_name": recipe.get("model_name"),
        "hook_name": site_sae.cfg.hook_name,
        "hook_layer": site_sae.cfg.hook_layer,
        "hook_head_index": None,
        "model_class_name": "HookedTransformer",
        "prepend_bos": True,
        "context_size": recipe.get("options", {}).get("max_length"),
        "dataset_path": recipe.get("data_name"),
        "source": "RouteSAE-repro",
        "source_model": model_name,
        "source_title": recipe["title"],
        "caveat": site_sae.caveat or None,
    }
    return config


HUB_LOADING = f"""\
In a checkout of RouteSAE-repro:

```python
from src import checkpoint

sae, recipe = checkpoint.load("user/repository")  # or the path of this folder
```

```bash
python evaluate.py --SAE_path user/repository --metric NormMSE KLDiv
```

`{HUB_WEIGHTS}` is the state dict, `{HUB_CONFIG}` the recipe: constructor values, options, """
HUB_LOADING += "data fingerprint, versions."


def _hub_files(sae: SAE, recipe: dict[str, Any]) -> tuple[Writers, list[str]]:
    """(files of a Hugging Face repository, lines of the card on how to load it)."""
    writers = {HUB_CONFIG: _json(recipe), HUB_WEIGHTS: _safetensors(sae)}
    return writers, HUB_LOADING.split("\n")


def card(
    sae: SAE,
    recipe: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    how_to_load: list[str],
) -> str:
    """A model card in Markdown. `evaluation`: the JSON of an evaluation, or {}."""
    tags = ["tags:", "- sparse-autoencoder", "- interpretability", f"- {sae.name.lower()}"]
    base = recipe.get("model_path")
    if base and HUB_NAME.fullmatch(base) and base != DEMO_LM_NAME:
        tags += [f"base_model: {base}"]
    lines = ["---", "# license: (yours to choose)", *tags, "---", "", f"# {recipe['title']}", ""]
    lines += ["A sparse autoencoder of a language model's residual stream.", ""]
    lines += ["| | |", "|---|---|"]
    for name, value in _card_facts(sae, recipe).items():
        if value is not None:
            lines += [f"| {name} | {_cell(value)} |"]
    lines += ["", "## Loading", "", *how_to_load, "", "## Measured", ""]
    lines += _card_results(evaluation)
    return "\n".join([*lines, ""])


def _card_facts(sae: SAE, recipe: Mapping[str, Any]) -> dict[str, Any]:
    options = recipe.get("options", {})
    inputs = {
        "token": f"each token standardised, eps {sae.norm_eps:g}",
        "mean": "each token without its mean",
        "none": "raw states",
    }
    return {
        "model": sae.name,
        "language model": recipe.get("model_name"),
        "sites (1 = output of the first block)": ", ".join(map(str, sae.sites())),
        "hidden size": sae.hidden_size,
        "latents": sae.latent_size,
        "active latents a token (k)": sae.k,
        "input": inputs[sae.input_norm],
        "training text": recipe.get("data_name"),
        "training tokens": recipe.get("tokens"),
        "tokens a row": options.get("max_length"),
        "recipe": options.get("recipe"),
        "seed": recipe.get("seed"),
        "commit of the training program": recipe.get("git_commit"),
    }


def _card_results(evaluation: Mapping[str, Any]) -> list[str]:
    if not evaluation:
        command = "run `evaluate.py` on the checkpoint and export again with `--overwrite`"
        return [f"Not measured: {command}."]
    units = evaluation.get("units", {})
    split = _cell(evaluation.get("split"))
    held_out = " held-out" if split == "eval" else ""
    lines = [f"On {evaluation.get('tokens')}{held_out} tokens (`{split}` split):", ""]
    lines += ["| metric | value | unit |", "|---|---|---|"]
    for name in metric_table.shown_in(metric_table.CARD):
        value = evaluation.get(name)
        if isinstance(value, float):
            lines += [f"| {name} | {value:.4g} | {_cell(units.get(name, ''))} |"]
    return lines


def _cell(value: Any) -> str:
    """One cell of a table. Names that users chose lose line breaks, bars and markup."""
    return re.sub(r"[\s|<>`]+", " ", str(value)).strip()


# ------------------------------------------------------------------------------- import


def locate(name: str | Path) -> Path:
    """The file or folder of that name.

    `user/repository[/folder][@revision]` that is no local path is fetched from the hub, or taken
    from its cache. Raises ValueError that says why a repository cannot be had.
    """
    path, hub_name = Path(name), HUB_NAME.fullmatch(str(name))
    has_file_suffix = path.suffix in (".pt", ".json", ".safetensors")
    is_relative = bool({".", ".."} & set(str(name).split("/")))
    if path.exists() or has_file_suffix or is_relative or not hub_name:
        return path
    import huggingface_hub

    repo, folder = hub_name["repo"], hub_name["folder"].strip("/")
    wanted = (LENS_CONFIG, LENS_WEIGHTS, HUB_CONFIG, HUB_WEIGHTS)
    patterns = [f"{folder}/{file}" for file in wanted] if folder else [*wanted, f"*/{LENS_CONFIG}"]
    try:
        snapshot = huggingface_hub.snapshot_download(
            repo, revision=hub_name["revision"], allow_patterns=patterns
        )
    except (OSError, ValueError) as error:
        reason = hub.reason(error, repo) or f"the hub answered: {files.first_line(error)[:160]}"
        raise ValueError(f"no file or folder {name}; {reason}") from error
    return Path(snapshot) / folder


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, recipe) of a folder that `export` wrote as "hf", or of one of SAELens.

    Raises ValueError with the reason for anything else.
    """
    if (path / HUB_CONFIG).is_file() and (path / HUB_WEIGHTS).is_file():
        return _load_safetensors(path / HUB_WEIGHTS), files.load_json(path / HUB_CONFIG)
    if (path / LENS_CONFIG).is_file() and (path / LENS_WEIGHTS).is_file():
        try:
            tensors = _load_safetensors(path / LENS_WEIGHTS)
            return _read_lens(tensors, files.load_json(path / LENS_CONFIG))
        except ValueError as error:
            raise ValueError(
                f"{path}: this SAE of SAELens cannot be held exactly here: {error}"
            ) from error
    inside = sorted(file.parent.name for file in path.glob(f"*/{LENS_CONFIG}"))
    hint = ""
    if inside:
        names = ", ".join(inside[:5]) + (" ..." if len(inside) > 5 else "")
        hint = f"; it has SAEs in {names}: name one"
    raise ValueError(
        f"{path} holds neither {HUB_CONFIG} and {HUB_WEIGHTS} "
        f"nor {LENS_CONFIG} and {LENS_WEIGHTS}{hint}"
    )


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    check_tensors(tensors, path)
    return tensors


def _read_lens(
    tensors: dict[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, recipe) of an SAE of SAELens. Raises ValueError if no model here equals it."""
    if not isinstance(config, dict):
        raise ValueError(f"its {LENS_CONFIG} holds no options")
    metadata = config.get("metadata")
    # Before version 6 there was only one level.
    about = metadata if isinstance(metadata, dict) and metadata else config
    architecture, k = _lens_architecture(config)
    name = _model_of(architecture)
    input_norm = _lens_input_norm(config, about)
    site = site_of(str(about.get("hook_name") or about.get("hook_point") or ""))
    tensors = _without_scaling(tensors)
    _check_lens_shapes(tensors)
    weights = _state_dict(_folded(tensors, config, architecture))
    latent_size, hidden_size = weights["encoder.weight"].shape
    values = {
        "hidden_size": hidden_size,
        "n_layers": None,
        "latent_size": latent_size,
        "layer": site,
        "norm_eps": LENS_EPS,
        "input_norm": input_norm,
    }
    if architecture == "topk":
        values |= {"k": k, "topk_relu": True}
    recipe = {"model": name, "config": values, "options": {}}
    language_model = about.get("model_name")
    if isinstance(language_model, str) and HUB_NAME.fullmatch(language_model):
        recipe["model_path"] = language_model
    return weights, recipe


def _lens_architecture(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """(architecture, k of a topk). Old versions name the activation function beside it."""
    architecture, k = config.get("architecture") or "standard", config.get("k")
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if activation == "topk":
        arguments = config.get("activation_fn_kwargs")
        architecture, k = "topk", arguments.get("k") if isinstance(arguments, dict) else None
    elif activation != "relu":
        raise ValueError(f"its activation is {activation!r}")
    if architecture == "topk" and (not isinstance(k, int) or isinstance(k, bool)):
        raise ValueError("it does not say k")
    return architecture, k


def _model_of(architecture: str) -> str:
    """The first model that defines this architecture itself, instead of inheriting it."""
    for name, cls in model.CLASSES.items():
        if vars(cls).get("architecture") == architecture:
            return name
    known = sorted({cls.architecture for cls in model.CLASSES.values()} - {""})
    raise ValueError(f"its architecture is {architecture!r}; known are {', '.join(known)}")


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
    if factor is not None and not bool((factor == 1).all()):
        raise ValueError("it rescales its latents by a scaling_factor other than 1")
    return rest


def _check_lens_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors whose shapes do not go together."""
    encoder = tensors.get("W_enc")
    if encoder is None or encoder.dim() != 2:
        raise ValueError(f"its tensors are {', '.join(sorted(tensors))}")
    width, n_latents = encoder.shape
    expected = {"W_enc": (width, n_latents), "W_dec": (n_latents, width), "b_dec": (width,)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected.get(name, (n_latents,)):
            raise ValueError(f"its {name} has the shape {tuple(tensor.shape)}")


def _folded(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], architecture: str
) -> dict[str, Tensor]:
    """Tensors of an SAE without options of SAELens that the models here lack.

    Two are folded into the encoder, which leaves the code the same up to rounding: a decoder bias
    that is not subtracted from the input, and the norms of decoder rows that TopK ranks by.
    Raises ValueError for other tensors than those of a standard form.
    """
    if not {"W_enc", "W_dec", "b_dec"} <= tensors.keys() <= STANDARD_NAMES.keys():
        raise ValueError(f"its tensors are {', '.join(sorted(tensors))}")
    folded = {name: value.float() for name, value in tensors.items()}
    if architecture == "topk" and config.get("rescale_acts_by_decoder_norm"):
        norms = folded["W_dec"].norm(dim=-1)
        folded["W_enc"] = folded["W_enc"] * norms
        folded["b_enc"] = folded["b_enc"] * norms
        folded["W_dec"] = folded["W_dec"] / norms[:, None]
    if not config.get("apply_b_dec_to_input", True):
        # x W + b = (x - b_dec) W + (b_dec W + b); a gated SAE scales the product by exp(r_mag).
        shift = folded["b_dec"] @ folded["W_enc"]
        for bias in ("b_enc", "b_gate"):
            if bias in folded:
                folded[bias] = folded[bias] + shift
        if "b_mag" in folded:
            scale = folded["r_mag"].exp() if "r_mag" in folded else 1.0
            folded["b_mag"] = folded["b_mag"] + shift * scale
    if "threshold" in folded:
        # SAELens clips negative values, which a threshold below 0 would let through here.
        folded["threshold"] = folded["threshold"].clamp_min(0)
    return folded


def _state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a standard form under the names and in the orientation of our parameters."""
    return {
        ours: tensors[name].T if tensors[name].dim() == 2 else tensors[name]
        for name, ours in STANDARD_NAMES.items()
        if name in tensors
    }
