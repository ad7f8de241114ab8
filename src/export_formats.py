"""SAEs written in the formats of other programs, each with a model card.

WRITERS has one entry for each format. What a format cannot express is refused with the reason.
Knows no model by name.

Shapes: D hidden, F latents.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src import feature_files, files, metric_table, neuronpedia
from src.formats import (
    CENTRED,
    HUB_NAME,
    LEARNED_NAMES,
    LENS_CONFIG,
    LENS_WEIGHTS,
    NORM_EPS,
    OWN_CONFIG,
    OWN_WEIGHTS,
    SiteSAE,
    site_saes,
)
from src.sae import SAE
from src.tensor_files import check_tensors

LENS_VERSION = "6.54.12"  # of the layout written here
DEMO_LM_NAME = str(files.DEMO_LM.relative_to(files.ROOT))

Writers = dict[str, Callable[[Any], Any]]  # {file name: function that writes to an open file}


class Folder(NamedTuple):
    """What a format makes of an SAE."""

    writers: Writers
    how_to_load: list[str]  # lines of the card
    library: str  # as the hub tags it


def export(
    sae: SAE,
    recipe: Mapping[str, Any],
    output_dir: str | Path,
    kind: str,
    overwrite: bool = False,
    licence: str | None = None,
) -> Path:
    """Write the folder export/<kind>/<title> under output_dir, completely or not at all.

    kind: a name in WRITERS. licence: the hub's name of one, such as "mit"; None leaves a line to
    fill in. Returns the folder. Raises ValueError if the format cannot hold the SAE, or if the
    folder exists and is not to be overwritten.
    """
    folder = Path(output_dir) / files.EXPORT_DIR / kind / files.safe_name(recipe["title"])
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists already; --overwrite replaces it")
    if licence and not re.fullmatch(r"[\w.+-]+", licence):
        raise ValueError(f"--license {licence!r}; write it as the hub does, such as apache-2.0")
    check_tensors(sae.state_dict(), recipe["title"])
    evaluation = _read_evaluation(Path(output_dir) / files.EVAL_DIR / f"{folder.name}.json", recipe)
    shown = public_recipe(recipe)
    made = WRITERS[kind](sae, shown, Path(output_dir))
    text = card(sae, shown, evaluation, made, licence)
    made.writers["README.md"] = lambda file: file.write(text.encode())
    return files.write_folder(folder, made.writers, manifest=False)


def _read_evaluation(path: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation of this SAE, or {} if there is none or it belongs to other weights."""
    evaluation = files.load_json(path) if path.exists() else {}
    if not isinstance(evaluation, dict) or not isinstance(evaluation.get("units", {}), dict):
        raise files.Unusable(f"{path} is no result of evaluate.py; move it away")
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


def _float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, which safetensors refuses to save."""
    return {name: value.cpu().float().contiguous().clone() for name, value in weights.items()}


def _safetensors(weights: Mapping[str, Tensor]) -> Callable[[Any], Any]:
    """Writes a state dict in float32; the copy is made only then."""
    from safetensors.torch import save

    return lambda file: file.write(save(_float32(weights), {"format": "pt"}))


def _json(data: Any) -> Callable[[Any], Any]:
    text = files.json_text(data, 2)
    return lambda file: file.write(text.encode())


SAME = "Same latents as the original."


def _how_to_load(text: str, site_sae: SiteSAE, exactness: str = SAME) -> list[str]:
    """Lines of a card: how to load, how exact it is, and what the format leaves out."""
    lines = [*text.split("\n"), exactness]
    return [*lines, "", site_sae.caveat] if site_sae.caveat else lines


# ------------------------------------------------------------------------------- SAELens

LENS_LOADING = """\
```python
from sae_lens import SAE

sae = SAE.load_from_disk("{hook}")  # in this folder
sae = SAE.from_pretrained("user/repository", "{hook}")  # once it is pushed
```
"""
LENS_ROUNDED = (
    "Same latents as the original up to float32 rounding, checked on random states when this was "
    "written. Reconstructions differ by 1e-5 of a standard deviation, which SAELens leaves out "
    "when it scales back."
)


def _lens_files(sae: SAE, recipe: dict[str, Any], _outputs: Path) -> Folder:
    """One folder for each site, with the names of TransformerLens."""
    norm = "layer_norm" if sae.input_norm == "token" else "none"
    if norm == "layer_norm" and sae.norm_eps != NORM_EPS:
        raise ValueError(
            f"it standardises with norm_eps {sae.norm_eps:g}, SAELens with {NORM_EPS:g}, and the "
            f"codes differ; --norm_eps {NORM_EPS:g} exports it as if trained so"
        )
    writers: Writers = {}
    by_site = site_saes(sae)
    for site_sae in by_site.values():
        folder = site_sae.cfg.hook_name
        config = _lens_config(site_sae, norm, recipe, sae.name)
        if sae.input_norm == "mean":
            config["metadata"]["model_from_pretrained_kwargs"] = {CENTRED: True}
        writers[f"{folder}/{LENS_CONFIG}"] = _json(config)
        writers[f"{folder}/{LENS_WEIGHTS}"] = _safetensors(site_sae.state_dict())
    first = next(iter(by_site.values()))
    text = LENS_LOADING.format(hook=first.cfg.hook_name)
    exactness = LENS_ROUNDED if norm == "layer_norm" else SAME
    lines = _how_to_load(text, first, exactness)
    return Folder(writers, lines, "saelens")


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
        config["rescale_acts_by_decoder_norm"] = _has_unit_rows(site_sae)
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


# ------------------------------------------------------------------------------- this program

HUB_LOADING = f"""\
In a checkout of RouteSAE-repro:

```python
from src import checkpoint

sae, recipe = checkpoint.load("user/repository")  # or the path of this folder
```

```bash
python evaluate.py --SAE_path user/repository --metric NormMSE KLDiv
```

`{OWN_WEIGHTS}` is the state dict, `{OWN_CONFIG}` the recipe: constructor values, options, """
HUB_LOADING += "data fingerprint, versions."


def _hub_files(sae: SAE, recipe: dict[str, Any], _outputs: Path) -> Folder:
    """The state dict and the recipe, of which this program makes the same SAE."""
    writers = {OWN_CONFIG: _json(recipe), OWN_WEIGHTS: _safetensors(sae.state_dict())}
    return Folder(writers, HUB_LOADING.split("\n"), "routesae-repro")


# ------------------------------------------------------------------------------- sparsify

SPARSIFY_LOADING = """\
```python
from sparsify import Sae

sae = Sae.load_from_disk("{hook}")  # in this folder
sae = Sae.load_from_hub("user/repository", hookpoint="{hook}")  # once it is pushed
```

Hookpoints have the names of modules in `model.base_model`. Rename `layers.N` to `h.N` for GPT-2.
"""


def _raw_states_only(sae: SAE, library: str) -> None:
    """Raise ValueError for an SAE whose input is changed first, which a library has no step for."""
    changes = {
        "token": "it standardises the state of each token",
        "mean": "it subtracts its mean from the state of each token",
    }
    if sae.input_norm in changes:
        raise ValueError(
            f"{changes[sae.input_norm]}, and {library} has no such step; "
            "--format saelens holds it, and --input_norm none trains one that needs none"
        )


def _sparsify_files(sae: SAE, recipe: dict[str, Any], _outputs: Path) -> Folder:
    """One hookpoint for each site: cfg.json and sae.safetensors, as sparsify saves them."""
    _raw_states_only(sae, "sparsify")
    writers: Writers = {}
    by_site = site_saes(sae)
    for site, site_sae in by_site.items():
        if site_sae.architecture != "topk":
            raise ValueError(
                f"it is a {site_sae.architecture} SAE, and sparsify knows topk alone; "
                "--format saelens or dictionary_learning holds it"
            )
        n_latents, width = site_sae.W_dec.shape
        config = {
            "activation": "topk",
            "expansion_factor": n_latents // width,
            "normalize_decoder": _has_unit_rows(site_sae),
            "num_latents": n_latents,
            "k": site_sae.k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": width,
        }
        weights = {
            "encoder.weight": site_sae.W_enc.T,
            "encoder.bias": site_sae.b_enc,
            "W_dec": site_sae.W_dec,
            "b_dec": site_sae.b_dec,
        }
        writers[f"layers.{site - 1}/cfg.json"] = _json(config)
        writers[f"layers.{site - 1}/sae.safetensors"] = _safetensors(weights)
    training = {
        "sae": config,
        "hookpoints": [f"layers.{site - 1}" for site in by_site],
        "model": recipe.get("model_name"),
        "dataset": recipe.get("data_name"),
        "ctx_len": recipe.get("options", {}).get("max_length"),
    }
    writers["config.json"] = _json(training)
    hook = f"layers.{next(iter(by_site)) - 1}"
    return Folder(writers, _how_to_load(SPARSIFY_LOADING.format(hook=hook), site_sae), "sparsify")


def _has_unit_rows(site_sae: SiteSAE) -> bool:
    norm_errors = (site_sae.W_dec.norm(dim=-1) - 1).abs()
    return bool(norm_errors.max() < 1e-5)


# ---------------------------------------------------------------------- dictionary_learning

LEARNED_LOADING = """\
```python
from dictionary_learning.utils import load_dictionary

dictionary, config = load_dictionary("{folder}", device="cpu")  # in this folder
```
"""
# By architecture: (class there, class of its trainer).
LEARNED_CLASSES = {
    "standard": ("AutoEncoder", "StandardTrainer"),
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
    "gated": ("GatedAutoEncoder", "GatedSAETrainer"),
}


def _learned_files(sae: SAE, recipe: dict[str, Any], _outputs: Path) -> Folder:
    """One folder for each site: ae.pt and config.json, as its trainers save them."""
    _raw_states_only(sae, "dictionary_learning")
    writers: Writers = {}
    by_site = site_saes(sae)
    for site, site_sae in by_site.items():
        folder = f"resid_post_layer_{site - 1}"
        writers[f"{folder}/config.json"] = _json(_learned_config(site_sae, recipe, folder))
        weights = _learned_weights(site_sae)
        writers[f"{folder}/ae.pt"] = functools.partial(torch.save, weights)
    folder = f"resid_post_layer_{next(iter(by_site)) - 1}"
    lines = _how_to_load(LEARNED_LOADING.format(folder=folder), site_sae)
    return Folder(writers, lines, "dictionary_learning")


def _learned_weights(site_sae: SiteSAE) -> dict[str, Tensor]:
    """The state dict of the class there. Raises ValueError if loading it would change the codes."""
    architecture = site_sae.architecture
    if architecture == "standard" and not _has_unit_rows(site_sae):
        raise ValueError(
            "its decoder rows have other norms than 1, and dictionary_learning multiplies the "
            "codes by them where it loads; --format saelens holds it"
        )
    standard = dict(site_sae.state_dict())
    if architecture == "jumprelu":
        # It subtracts no bias from the input: (x - b_dec) W + b = x W + (b - b_dec W).
        shift = standard["b_dec"].double() @ standard["W_enc"].double()
        standard["b_enc"] = standard["b_enc"] - shift
    names = LEARNED_NAMES[LEARNED_CLASSES[architecture][0]]
    weights = _float32(
        {
            name: standard[ours].T if name.endswith(".weight") else standard[ours]
            for name, ours in names.items()
        }
    )
    if architecture == "topk":
        weights |= {
            "k": torch.tensor(site_sae.k, dtype=torch.int),
            "threshold": torch.tensor(-1.0),  # none was found
        }
    return weights


def _learned_config(site_sae: SiteSAE, recipe: Mapping[str, Any], folder: str) -> dict[str, Any]:
    dict_class, trainer_class = LEARNED_CLASSES[site_sae.architecture]
    width, n_latents = site_sae.W_enc.shape
    trainer = {
        "trainer_class": trainer_class,
        "dict_class": dict_class,
        "activation_dim": width,
        "dict_size": n_latents,
        "layer": site_sae.cfg.hook_layer,
        "lm_name": recipe.get("model_name"),
        "submodule_name": folder,
        "seed": recipe.get("seed"),
    }
    if site_sae.k is not None:
        trainer["k"] = site_sae.k
    context = recipe.get("options", {}).get("max_length")
    buffer = {"d_submodule": width, "io": "out", "ctx_len": context}
    return {"trainer": trainer, "buffer": buffer}


# ------------------------------------------------------------------------------- Neuronpedia

NEURONPEDIA_LOADING = """\
Make the model and the source set on Neuronpedia, if it does not have them. Then upload with its
client, in this folder and with `NEURONPEDIA_API_KEY` set:

```python
import json
from pathlib import Path

from neuronpedia.np_source_set import SourceSet
from neuronpedia.requests.feature_request import FeatureRequest

SourceSet.new(model_id="{model_id}", name="{set_name}")
for path in sorted(Path(".").glob("*/batch-*.json")):
    FeatureRequest().send_request(uri="upload-batch", json=json.loads(path.read_text()))
```

`{model_id}` is the name of the language model without its owner. Write the name that Neuronpedia
has for it, where that is another one.
"""


def _neuronpedia_files(sae: SAE, recipe: dict[str, Any], outputs: Path) -> Folder:
    """One folder for each site, of the bodies that its upload takes."""
    path = feature_files.contexts_of(outputs, recipe["title"])
    if path is None:
        name = f"{files.safe_name(recipe['title'])}_contexts.json"
        missing = outputs / files.CONTEXT_DIR / name
        raise ValueError(f"there are no contexts at {missing}; run apply.py first")
    contexts, labels = feature_files.read_features(path)
    if files.is_stale_result(contexts, recipe):
        raise ValueError(f"{path} is of another SAE that had this name; run apply.py again")
    # A path of this machine is not published.
    contexts["source_model"] = str(recipe.get("model_name") or contexts["source_model"])
    writers: Writers = {}
    for source, body in neuronpedia.bodies(contexts, labels):
        number = sum(name.startswith(f"{source}/") for name in writers)
        writers[f"{source}/batch-{number:04d}.json"] = _json(body)
    if not writers:
        raise ValueError(
            f"{path} holds no latent; apply.py with a lower --act_threshold finds some"
        )
    text = NEURONPEDIA_LOADING.format(
        model_id=neuronpedia.model_id(contexts["source_model"]),
        set_name=neuronpedia.set_name(contexts["title"]),
    )
    return Folder(writers, text.split("\n"), "neuronpedia")


# ------------------------------------------------------------------------------- the card


def card(
    sae: SAE,
    recipe: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    made: Folder,
    licence: str | None = None,
) -> str:
    """A model card in Markdown. `evaluation`: the JSON of an evaluation, or {}."""
    tags = [
        f"library_name: {made.library}",
        "tags:",
        "- sparse-autoencoder",
        "- interpretability",
        f"- {sae.name.lower()}",
    ]
    base = recipe.get("model_path")
    if base and HUB_NAME.fullmatch(base) and base != DEMO_LM_NAME:
        tags += [f"base_model: {base}"]
    chosen = f"license: {licence}" if licence else "# license: (yours to choose)"
    lines = ["---", chosen, *tags, "---", "", f"# {recipe['title']}", ""]
    lines += ["A sparse autoencoder of a language model's residual stream.", ""]
    lines += ["| | |", "|---|---|"]
    for name, value in _card_facts(sae, recipe).items():
        if value is not None:
            lines += [f"| {name} | {_cell(value)} |"]
    lines += ["", "## Loading", "", *made.how_to_load, "", "## Measured", ""]
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


# Each gets the SAE, its recipe as it may be published, and the folder of the stages' results.
WRITERS: dict[str, Callable[[SAE, dict[str, Any], Path], Folder]] = {
    "hf": _hub_files,
    "saelens": _lens_files,
    "sparsify": _sparsify_files,
    "dictionary_learning": _learned_files,
    "neuronpedia": _neuronpedia_files,
}
