"""Other homes of an SAE: folders of SAELens, folders and repositories of Hugging Face, objects for SAEBench. Knows no model by name.

N tokens, D hidden, F latents. The forward pass written here is the documented one of SAELens; every export is compared with it first.
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

from src import files, hub, model
from src.sae import SAE, STANDARD_NAMES, StandardForm

LENS_CONFIG, LENS_WEIGHTS, HUB_CONFIG, HUB_WEIGHTS = (
    "cfg.json",
    "sae_weights.safetensors",
    "config.json",
    "model.safetensors",
)
LENS_EPS = 1e-5  # what SAELens' layer_norm adds to the standard deviation; it cannot be set there
LENS_VERSION = "6.54.12"  # of the layout written here; older ones are read too
HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?P<folder>(/[\w.=-]+)*)(@(?P<revision>[\w./-]+))?"
)
CARD_METRICS = (
    "NormMSE",
    "FVU",
    "L0",
    "Dead",
    "KLDiv",
    "DeltaCE",
    "Recovered_zero",
    "Recovered_mean",
)


# ------------------------------------------------------------------------------------------------- one SAE at one site


def _topk(pre: Tensor, k: int) -> Tensor:
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


ACTIVATIONS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "standard": lambda product, sae: F.relu(product + sae.b_enc),
    "topk": lambda product, sae: _topk(product + sae.b_enc, sae.k),
    "jumprelu": lambda product, sae: (
        F.relu(product + sae.b_enc) * (product + sae.b_enc > sae.threshold)
    ),
    "gated": lambda product, sae: (
        (product + sae.b_gate > 0) * F.relu(sae.r_mag.exp() * product + sae.b_mag)
    ),
}


class SiteSAE(nn.Module):
    """A plain form at work on raw residual states: what SAEBench takes as an SAE object (encode, decode, W_enc ..., cfg).

    decode gives states back with the mean and standard deviation of the states encoded last. `hook_name` is the LM's own for the site
    (default: TransformerLens'); `model_name` what SAEBench is to load.
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
        self.k, self.caveat, self._standardise = form.k, form.caveat, sae.standardise
        self.architecture = form.architecture
        for name, value in form.tensors.items():
            setattr(
                self, name, nn.Parameter(value.detach(), requires_grad=False)
            )  # shared with the SAE
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
        self._moments: tuple[Tensor, Tensor] | None = None

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
        """Latents -> raw states. Raises ValueError where the states they are of were not the last to be encoded."""
        if self._moments is None or self._moments[0].shape[:-1] != latents.shape[:-1]:
            raise ValueError(
                "decode needs mean and standard deviation of the states: encode them first, then decode a code of the same tokens"
            )
        mean, std = self._moments
        return (latents @ self.W_dec + self.b_dec) * std.to(self.dtype) + mean.to(self.dtype)

    def forward(self, h: Tensor) -> Tensor:
        return self.decode(self.encode(h))


class _Config(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        return {
            key: value for key, value in vars(self).items() if key != "metadata"
        }  # which SAEBench adds


def hook_of(site: int) -> str:
    """TransformerLens' name of a site."""
    return f"blocks.{site - 1}.hook_resid_post"


def site_of(hook: str) -> int:
    """Site of a hook's name, TransformerLens' or a module's of transformers. Raises ValueError for one off the residual stream."""
    for pattern, shift in (
        (r"blocks\.(\d+)\.hook_resid_post", 1),
        (r"blocks\.(\d+)\.hook_resid_pre", 0),
        (r"[\w.]*\b(?:layers|h)\.(\d+)", 1),
    ):
        found = re.fullmatch(pattern, hook)
        if found and int(found[1]) + shift > 0:
            return int(found[1]) + shift
    raise ValueError(
        f"it reads {hook!r}, which is the output of no decoder block; SAEs here read those alone"
    )


def site_saes(
    sae: SAE, model_name: str | None = None, hook_names: Mapping[int, str] | None = None
) -> dict[int, SiteSAE]:
    """{site: SiteSAE}. Raises ValueError with the reason where the SAE has no plain form, or its code differs from it."""
    made = {
        site: SiteSAE(sae, site, form, model_name, (hook_names or {}).get(site))
        for site, form in sae.to_standard_form().items()
    }
    for site, form in sae.to_standard_form().items():
        compare(sae, form, made[site])
    return made


@torch.no_grad()
def compare(sae: SAE, form: StandardForm, made: SiteSAE, tokens: int = 1024) -> None:
    """Raises ValueError where the plain form's code of random states differs from the SAE's own by more than rounding."""
    below = int((form.tensors["threshold"] < 0).sum()) if "threshold" in form.tensors else 0
    if below:
        raise ValueError(
            f"{below} thresholds lie below 0 and let negative values through, which the {form.architecture} of SAELens clips"
        )
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, sae.hidden_size, generator=generator).to(made.device)
    ours, theirs = form.code(sae.standardise(h)[0]), made.encode(h)
    if (ours < 0).any():
        share = float((ours < 0).any(-1).float().mean())
        raise ValueError(
            f"negative values are among the latents (on {share:.1%} of random states) and SAELens clips them; train with --topk_relu 1"
        )
    wrong = float(((ours - theirs).abs() > 1e-4 * ours.amax().clamp_min(1)).any(-1).float().mean())
    if wrong > 1e-3:  # at a tie, rounding may choose another latent
        raise ValueError(f"the exported form gives other latents on {wrong:.1%} of random states")


# -------------------------------------------------------------------------------------------------------------- export


def export(
    sae: SAE, recipe: Mapping[str, Any], output_dir: str | Path, kind: str, overwrite: bool = False
) -> Path:
    """Writes export/<kind>/<title> under output_dir, complete or not at all, and returns it.

    Raises ValueError where the format cannot hold the SAE, and where the folder is there already.
    """
    folder = Path(output_dir) / files.EXPORT_DIR / kind / files.safe_name(recipe["title"])
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} is there already; --overwrite replaces it")
    found = (
        files.load_json(path)
        if (path := Path(output_dir) / files.EVAL_DIR / f"{folder.name}.json").exists()
        else {}
    )
    if files.is_stale_result(found, recipe):
        print(
            f"{path}: of another SAE that had this name; its figures are left out of the card. Run evaluate.py and export again with --overwrite"
        )
        found = {}
    contents, lines = {"saelens": _lens_files, "hf": _hub_files}[kind](sae, public(recipe))
    contents["README.md"] = card(sae, public(recipe), found, lines).encode
    return files.write_folder(
        folder,
        {name: (lambda file, make=make: file.write(make())) for name, make in contents.items()},
        manifest=False,
    )


def public(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as it may leave this machine: paths cut to their last part under other names, hub names kept."""
    shown = json.loads(json.dumps(dict(recipe)))
    paths = ("model_path", "data_path")
    options = shown.get("options", {}).items()
    shown["options"] = {
        key: value
        for key, value in options
        if key not in paths and not (isinstance(value, str) and Path(value).is_absolute())
    }
    for key in paths:
        value = shown.pop(key, None)
        if not value or value == "None":
            continue
        if Path(value).resolve() == files.DEMO_LM:
            shown[key] = str(files.DEMO_LM.relative_to(files.ROOT))
        elif not Path(value).exists() and HUB_NAME.fullmatch(value):
            shown[key] = value
        shown[key.replace("path", "name")] = shown.get(key) or files.data_name(value)
    return shown


def _tensors(module: nn.Module) -> Callable[[], bytes]:
    from safetensors.torch import save

    return lambda: save(
        {
            name: value.cpu().float().contiguous().clone()
            for name, value in module.state_dict().items()
        },
        {"format": "pt"},
    )


def _json(data: Any) -> Callable[[], bytes]:
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False).encode


def _lens_files(
    sae: SAE, recipe: dict[str, Any]
) -> tuple[dict[str, Callable[[], bytes]], list[str]]:
    norm = {"none": "none", "token": "layer_norm"}[sae.input_norm]
    if norm == "layer_norm" and sae.norm_eps != LENS_EPS:
        raise ValueError(
            f"it standardises with norm_eps {sae.norm_eps:g}, SAELens with {LENS_EPS:g}, and the codes differ; --norm_eps {LENS_EPS:g} exports it "
            "as if trained so"
        )
    contents = {}
    made = site_saes(sae)
    for site, one in made.items():
        config = {
            "architecture": one.architecture,
            "d_in": one.cfg.d_in,
            "d_sae": one.cfg.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": norm,
            "reshape_activations": "none",
            **(
                {"k": one.k, "rescale_acts_by_decoder_norm": _unit(one.W_dec)}
                if one.architecture == "topk"
                else {}
            ),
            "metadata": {
                "sae_lens_version": LENS_VERSION,
                "model_name": recipe.get("model_name"),
                "hook_name": one.cfg.hook_name,
                "hook_layer": site - 1,
                "hook_head_index": None,
                "model_class_name": "HookedTransformer",
                "prepend_bos": True,
                "context_size": recipe.get("options", {}).get("max_length"),
                "dataset_path": recipe.get("data_name"),
                "source": "RouteSAE-repro",
                "source_model": sae.name,
                "source_title": recipe["title"],
                "caveat": one.caveat or None,
            },
        }
        contents |= {
            f"{one.cfg.hook_name}/{LENS_CONFIG}": _json(config),
            f"{one.cfg.hook_name}/{LENS_WEIGHTS}": _tensors(one),
        }
    first = next(iter(made.values()))
    lines = [
        "```python",
        "from sae_lens import SAE",
        "",
        f'sae = SAE.load_from_disk("{first.cfg.hook_name}")  # in this folder',
        f'sae = SAE.from_pretrained("user/repository", "{first.cfg.hook_name}")  # once it is pushed',
        "```",
        "",
        "Same latents as the original up to float32 rounding, checked on random states when this was written. Reconstructions differ by 1e-5 of a "
        "standard deviation, which SAELens leaves out when it scales back."
        if norm == "layer_norm"
        else "Same latents as the original.",
    ]
    return contents, [*lines, *(["", first.caveat] if first.caveat else [])]


def _unit(W_dec: Tensor) -> bool:
    """Whether rows have norm 1: scaling by them is then no change, and SAELens' tools may fold them."""
    return bool((W_dec.norm(dim=-1) - 1).abs().max() < 1e-5)


def _hub_files(
    sae: SAE, recipe: dict[str, Any]
) -> tuple[dict[str, Callable[[], bytes]], list[str]]:
    contents = {HUB_CONFIG: _json(recipe), HUB_WEIGHTS: _tensors(sae)}
    lines = [
        "In a checkout of RouteSAE-repro:",
        "",
        "```python",
        "from src import checkpoint",
        "",
        'sae, recipe = checkpoint.load("user/repository")  # or the path of this folder',
        "```",
        "",
        "```bash",
        "python evaluate.py --SAE_path user/repository --metric NormMSE KLDiv",
        "```",
        "",
        f"`{HUB_WEIGHTS}` is the state dict, `{HUB_CONFIG}` the recipe: constructor values, options, data fingerprint, versions.",
    ]
    return contents, lines


def card(sae: SAE, recipe: Mapping[str, Any], found: Mapping[str, Any], lines: list[str]) -> str:
    """A model card in Markdown: what the recipe says, what was measured (`found`, an evaluation's JSON, may be empty), how to load it."""
    options, base = recipe.get("options", {}), recipe.get("model_path")
    head = ["tags:", "- sparse-autoencoder", "- interpretability", f"- {sae.name.lower()}"]
    if base and HUB_NAME.fullmatch(base) and base != str(files.DEMO_LM.relative_to(files.ROOT)):
        head += [f"base_model: {base}"]
    rows = {
        "model": sae.name,
        "language model": recipe.get("model_name"),
        "sites (1 = output of the first block)": ", ".join(map(str, sae.sites())),
        "hidden size": sae.hidden_size,
        "latents": sae.latent_size,
        "active latents a token (k)": getattr(sae, "k", None),
        "input": f"each token standardised, eps {sae.norm_eps:g}"
        if sae.input_norm == "token"
        else "raw states",
        "training text": recipe.get("data_name"),
        "training tokens": recipe.get("tokens"),
        "tokens a row": options.get("max_length"),
        "recipe": options.get("recipe"),
        "seed": recipe.get("seed"),
        "commit of the training program": recipe.get("git_commit"),
    }
    text = ["---", "# license: (yours to choose)", *head, "---", "", f"# {recipe['title']}", ""]
    text += [
        "A sparse autoencoder of a language model's residual stream.",
        "",
        "| | |",
        "|---|---|",
    ]
    text += [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    text += ["", "## Loading", "", *lines, "", "## Measured", ""]
    if found:
        measured = {
            name: found[name] for name in CARD_METRICS if isinstance(found.get(name), float)
        }
        units = found.get("units", {})
        split = _cell(found.get("split"))
        text += [
            f"On {found.get('tokens')}{' held-out' * (split == 'eval')} tokens (`{split}` split):",
            "",
        ]
        text += ["| metric | value | unit |", "|---|---|---|"]
        text += [
            f"| {name} | {value:.4g} | {_cell(units.get(name, ''))} |"
            for name, value in measured.items()
        ]
    else:
        text += [
            "Not measured: run `evaluate.py` on the checkpoint and export again with `--overwrite`."
        ]
    return "\n".join([*text, ""])


def _cell(value: Any) -> str:
    """One cell of a table: no line breaks, bars or markup out of names that users chose."""
    return re.sub(r"[\s|<>`]+", " ", str(value)).strip()


# -------------------------------------------------------------------------------------------------------------- import


def locate(name: str | Path) -> Path:
    """The file or folder of that name; for `user/repository[/folder][@revision]` its copy from the hub, downloaded where it is not cached.

    Raises ValueError that says which it was: nothing there, no such repository, gated, no token, offline.
    """
    path, found = Path(name), HUB_NAME.fullmatch(str(name))
    local = path.suffix in (".pt", ".json", ".safetensors") or {".", ".."} & set(
        str(name).split("/")
    )
    if path.exists() or local or not found:
        return path
    repo, folder = found["repo"], found["folder"].strip("/")
    import huggingface_hub

    wanted = (LENS_CONFIG, LENS_WEIGHTS, HUB_CONFIG, HUB_WEIGHTS)
    patterns = [f"{folder}/{file}" for file in wanted] if folder else [*wanted, f"*/{LENS_CONFIG}"]
    try:
        there = huggingface_hub.snapshot_download(
            repo, revision=found["revision"], allow_patterns=patterns
        )
    except (OSError, ValueError) as error:
        said = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        why = hub.reason(error, repo) or f"the hub answered: {said[:160]}"
        raise ValueError(f"no file or folder {name}; {why}") from error
    return Path(there) / folder


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, recipe) of a folder written by `export` in form hf, or one of SAELens. Raises ValueError for anything else, with the reason."""
    if (path / HUB_CONFIG).is_file() and (path / HUB_WEIGHTS).is_file():
        return _load(path / HUB_WEIGHTS), files.load_json(path / HUB_CONFIG)
    if (path / LENS_CONFIG).is_file() and (path / LENS_WEIGHTS).is_file():
        try:
            return _read_lens(_load(path / LENS_WEIGHTS), files.load_json(path / LENS_CONFIG))
        except ValueError as error:
            raise ValueError(
                f"{path}: this SAE of SAELens cannot be held exactly here: {error}"
            ) from error
    inside = sorted(file.parent.name for file in path.glob(f"*/{LENS_CONFIG}"))
    hint = (
        f"; it has SAEs in {', '.join(inside[:5])}{' ...' if len(inside) > 5 else ''}: name one"
        if inside
        else ""
    )
    raise ValueError(
        f"{path} holds neither {HUB_CONFIG} and {HUB_WEIGHTS} nor {LENS_CONFIG} and {LENS_WEIGHTS}{hint}"
    )


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file ({error})") from error


def _read_lens(
    tensors: dict[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Decoder bias not applied at the input, and norms that TopK chooses by, are folded into the encoder: the same code, up to rounding."""
    about = config.get("metadata") or config  # before version 6 one level held all
    kind = config.get("architecture") or "standard"
    function = config.get("activation_fn") or config.get("activation_fn_str") or "relu"  # as well
    if function == "topk":
        kind, config = "topk", {**config, "k": (config.get("activation_fn_kwargs") or {}).get("k")}
    elif function != "relu":
        raise ValueError(f"its activation is {function!r}")
    if kind == "topk" and not isinstance(config.get("k"), int):
        raise ValueError("it does not say k")
    name = next(
        (name for name, cls in model.CLASSES.items() if vars(cls).get("architecture") == kind), None
    )
    if name is None:
        known = sorted({cls.architecture for cls in model.CLASSES.values()} - {""})
        raise ValueError(f"its architecture is {kind!r}; known are {', '.join(known)}")
    norm = config.get("normalize_activations") or "none"
    if norm not in ("none", "layer_norm"):
        raise ValueError(
            f"its inputs are scaled by {norm!r}; known are none, layer_norm (fold_activation_norm_scaling_factor makes it none)"
        )
    if config.get("reshape_activations", "none") != "none" or config.get(
        "finetuning_scaling_factor"
    ):
        raise ValueError("it reshapes or rescales what it reads")
    site = site_of(about.get("hook_name") or about.get("hook_point") or "")
    missing = {"W_enc", "W_dec", "b_dec"} - set(tensors)
    unknown = set(tensors) - set(STANDARD_NAMES)
    if missing or unknown:
        raise ValueError(f"its tensors are {', '.join(sorted(tensors))}")
    found = {key: value.float() for key, value in tensors.items()}
    if kind == "topk" and config.get("rescale_acts_by_decoder_norm"):
        norms = found["W_dec"].norm(dim=-1)
        found |= {
            "W_enc": found["W_enc"] * norms,
            "b_enc": found["b_enc"] * norms,
            "W_dec": found["W_dec"] / norms[:, None],
        }
    if not config.get("apply_b_dec_to_input", True):
        shift = found["b_dec"] @ found["W_enc"]
        scales = {
            "b_enc": 1.0,
            "b_gate": 1.0,
            "b_mag": found["r_mag"].exp() if "r_mag" in found else 1.0,
        }
        found |= {key: found[key] + shift * scale for key, scale in scales.items() if key in found}
    if "threshold" in found:
        found["threshold"] = found["threshold"].clamp_min(0)  # SAELens clips negative values anyway
    weights = {
        ours: found[theirs].T if found[theirs].dim() == 2 else found[theirs]
        for theirs, ours in STANDARD_NAMES.items()
        if theirs in found
    }
    latent_size, hidden_size = weights["encoder.weight"].shape
    values = {
        "hidden_size": hidden_size,
        "n_layers": None,
        "latent_size": latent_size,
        "layer": site,
        "norm_eps": LENS_EPS,
    }
    values |= {"input_norm": "none" if norm == "none" else "token"} | (
        {"k": config["k"], "topk_relu": True} if kind == "topk" else {}
    )
    lm = about.get("model_name")
    return weights, {"model": name, "config": values, "options": {}} | (
        {"model_path": lm} if lm and HUB_NAME.fullmatch(lm) else {}
    )
