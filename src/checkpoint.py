"""Weights and the recipe beside them: `X.pt` holds the state dict alone, `X.json` how it came about. Loading by path or hub name. Training states.

Also opens bare state dicts of the documented form, which have no recipe, from their names, parameter names and shapes; folders: formats.py.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import pickle
import platform
import re
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src import config, files, formats, model, zoo
from src.device import pick_device
from src.sae import SAE

FORMAT_VERSION = 1
RECIPE = {
    "model": str,
    "config": dict,
    "options": dict,
    "final": dict,
    "title": str,
    "model_path": str,
    "data_path": str,
    "format_version": int,
}


def environment() -> dict[str, Any]:
    """What a result may depend on beside its options: commit, package versions, threads."""
    return {**_program(), "threads": torch.get_num_threads()}


@functools.cache
def _program() -> dict[str, Any]:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=files.ROOT,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        commit = asked.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):  # no git here: the recipe then says null
        commit = None
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "datasets", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"git_commit": commit, "versions": versions}


# ---------------------------------------------------------------------------------------------- states of a training


def states(folder: str | Path) -> list[Path]:
    """Saved states, newest step first, whatever their condition."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)  # by step: clocks jump


def save_state(
    folder: str | Path, step: int, meta: Mapping[str, Any], parts: Mapping[str, Any], keep: int = 2
) -> Path:
    """Writes meta (JSON) and parts (name -> tensors and numbers in dicts and lists) of one step; the newest `keep` states stay."""
    text = json.dumps({"format_version": FORMAT_VERSION, "step": step} | dict(meta)).encode()
    writers = {"meta.json": lambda file: file.write(text)}
    writers |= {f"{name}.pt": functools.partial(torch.save, part) for name, part in parts.items()}
    path = files.write_folder(Path(folder) / f"step-{step:08d}", writers)
    for old in states(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def find_state(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """(folder, meta) of the newest state whose manifest verifies, with a warning for each newer one; None where none was ever saved.

    Damaged states are renamed, so that they count no more; what was left half written is removed. The caller holds the run's lock.
    Raises ValueError where there are states and all of them are damaged, or one is of a newer version.
    """
    for rest in Path(folder).glob(".tmp-*"):
        shutil.rmtree(rest, ignore_errors=True)
    damaged = []
    for path in states(folder):
        try:
            files.verify_folder(path)
        except ValueError as error:
            damaged.append((path, error))
            continue
        meta = files.load_json(path / "meta.json")
        if meta["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {meta['format_version']}, this program reads up to {FORMAT_VERSION}; update it"
            )
        for bad, error in damaged:
            print(f"warning: the state of {bad.name} is damaged ({error}); taking {path.name}")
            shutil.rmtree(bad.with_name(f"damaged-{bad.name}"), ignore_errors=True)
            bad.rename(bad.with_name(f"damaged-{bad.name}"))
        return path, meta
    if damaged:
        found = "; ".join(str(error) for _, error in damaged)
        raise ValueError(
            f"every saved state is damaged ({found}); restore one, or start again with --resume never --overwrite"
        )
    return None


def load_part(path: Path, name: str) -> Any:
    """One part of a verified state, on the CPU. Tensors and plain values only: nothing in it is run."""
    return torch.load(path / f"{name}.pt", map_location="cpu", weights_only=True)


# --------------------------------------------------------------------------------------------------- trained weights


def save(sae: SAE, recipe: Mapping[str, Any], folder: str | Path, title: str) -> Path:
    """Writes <title>.json, then <title>.pt, each atomically; returns the path of the weights."""
    path = Path(folder) / f"{files.safe_name(title)}.pt"
    weights = {name: value.detach().cpu() for name, value in sae.state_dict().items()}
    files.save_json(
        {"format_version": FORMAT_VERSION, "title": title} | dict(recipe), path.with_suffix(".json")
    )
    return files.write_atomic(path, lambda file: torch.save(weights, file))


def read_recipe(path: str | Path) -> dict[str, Any] | None:
    """The recipe beside a checkpoint, or None where there is none. Raises ValueError for one this version cannot read."""
    path = Path(path).with_suffix(".json")
    return _readable(files.load_json(path), path) if path.exists() else None


def _readable(recipe: Any, path: Path) -> dict[str, Any]:
    if not isinstance(recipe, dict) or not {"model", "config"} <= set(recipe):
        raise ValueError(f"{path} is no recipe of a checkpoint: it names no model")
    odd = [
        key for key, kind in RECIPE.items() if key in recipe and not isinstance(recipe[key], kind)
    ]
    if odd or not isinstance(recipe["config"].get("hidden_size"), int):
        raise ValueError(
            f"{path} is no recipe of a checkpoint: {odd[0] if odd else 'its hidden_size'} is missing or of the wrong kind"
        )
    files.safe_name(recipe.get("title", "none"))  # others name files by it
    if recipe.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {recipe['format_version']}, this program reads up to {FORMAT_VERSION}; update it"
        )
    return recipe


def newest(output_dir: str | Path) -> Path:
    """The most recently written checkpoint under an output folder. Raises ValueError where there is none."""
    found = files.newest(Path(output_dir) / files.SAE_DIR, "*.pt")
    if found is None:
        raise ValueError(
            f"no checkpoint in {Path(output_dir) / files.SAE_DIR}; run train.py first, or name one with --SAE_path"
        )
    return found


def _weights(path: Path, device: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}; check --SAE_path")
    try:
        weights = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds other things than tensors, or is damaged; nothing in it was run"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is no readable checkpoint ({str(error).splitlines()[0][:120] if str(error) else 'damaged'})"
        ) from error
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        raise ValueError(f"{path} is not a state dict of tensors")
    return weights


def weights_sum(sae: SAE) -> str:
    """What tells an SAE from another of the same title: results carry it."""
    found = hashlib.blake2b(digest_size=8)
    for name, value in sorted(sae.state_dict().items()):
        found.update(name.encode())
        found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


PUBLISHED_EPS = (
    1e-6  # of the standardisation in both public RouteSAE repositories; a bare file does not say
)
TITLES = {  # how swei2001/RouteSAEs names its files, and what the names say; beauefui/RouteSAE-repro begins them with the model's name
    r"L(?P<layer>\d+)_K(?P<k>\d+)_": "TopK",
    r"L(?P<layer>\d+)_VL": "Vanilla",
    r"L(?P<layer>\d+)_GL": "Gated",
    r"L(?P<layer>\d+)_JL": "JumpReLU",
    r"(?P<aggre>sum|mean)_(?P<routing>hard|soft)_K(?P<k>\d+)_": "RouteSAE",
    r"ML_K(?P<k>\d+)_": "MLSAE",
    r"RDM_K(?P<k>\d+)_": "TopK",
    r"Cross_CL": "Crosscoder",
}


def _title(stem: str) -> tuple[list[str], dict[str, Any]]:
    """(models a file's name may mean, likeliest first; what else it says)."""
    for pattern, name in TITLES.items():
        if found := re.match(pattern, stem):
            return [name], {
                key: int(value) if value.isdigit() else value
                for key, value in found.groupdict().items()
            }
    return sorted(
        (name for name in [*zoo.ZOO, *zoo.ALIASES] if stem.lower().startswith(name.lower())),
        key=len,
        reverse=True,
    ), {}


def _guess(path: Path, weights: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe of a bare state dict: sizes from shapes; the model from `given`, the file name, or the one set of keys that fits."""
    prefix = "sae." if any(key.startswith("sae.") for key in weights) else ""
    encoders = [
        value
        for key, value in weights.items()
        if key.startswith(f"{prefix}encoder.") and key.endswith("weight")
    ]
    if not encoders:
        raise ValueError(
            f"{path} holds no encoder (keys: {', '.join(list(weights)[:6])}); it is no SAE of this zoo"
        )
    latent_size, hidden_size = encoders[0].shape
    routed = weights["router.weight"].shape[0] if "router.weight" in weights else len(encoders)
    n_layers = given.get("n_layers") or (2 * (routed - 1) if routed > 1 else 16)
    named, told = _title(path.stem)
    typed = {key: value for key, value in given.items() if value is not None}
    options = (
        {"latent_size": latent_size, "k": min(64, latent_size), "norm_eps": PUBLISHED_EPS}
        | told
        | typed
    )
    order = [given["model"]] if given.get("model") else [*named, *zoo.ZOO]
    for name in dict.fromkeys(zoo.canonical(name) for name in order):
        candidate = model.build(name, hidden_size, n_layers, options)
        shapes = {key: tuple(value.shape) for key, value in candidate.state_dict().items()}
        if shapes == {key: tuple(value.shape) for key, value in weights.items()}:
            used = {
                key: value
                for key, value in candidate.config.items()
                if key not in ("hidden_size", "latent_size")
            }
            print(
                f"{path.name}: no recipe beside it; taken for {name} with {', '.join(f'{key} {value}' for key, value in used.items())}"
            )
            return {
                "model": name,
                "config": dict(candidate.config)
                | {"hidden_size": hidden_size, "n_layers": n_layers},
                "options": {},
            }
    raise ValueError(
        f"{path} fits no model of the zoo: {', '.join(f'{k} {tuple(v.shape)}' for k, v in list(weights.items())[:8])}"
    )


def load(
    path: str | Path, device: str = "cpu", given: Mapping[str, Any] | None = None
) -> tuple[SAE, dict[str, Any]]:
    """(SAE in eval mode on device, recipe) of a checkpoint file, a folder of export.py or SAELens, or a hub name (formats.locate).

    `given` helps bare files along: model, k, layer, n_layers ... Raises ValueError for a missing, foreign or damaged file, for a repository that
    cannot be had, and for weights that do not fit their recipe.
    """
    name, path = str(path), formats.locate(path)
    if path.is_dir():
        weights, recipe = formats.read_folder(path)
        _readable(recipe, path)
    else:
        weights = _weights(path, device)
        recipe = read_recipe(path) or _guess(path, weights, given or {})
    values = dict(recipe["config"])
    try:
        sae = model.build(
            zoo.canonical(recipe["model"]),
            values.pop("hidden_size"),
            values.pop("n_layers", None),
            values,
        )
    except TypeError as error:
        raise ValueError(
            f"{path.with_suffix('.json')}: its config makes no {recipe['model']} ({error})"
        ) from error
    for key, expected in sae.state_dict().items():
        there = tuple(weights[key].shape) if key in weights else "missing"
        if there != tuple(expected.shape):
            needs = f"the recipe of {recipe['model']} needs {tuple(expected.shape)}"
            raise ValueError(f"{path}: {key} is {there}, {needs}; weights and recipe do not match")
    extra = sorted(set(weights) - set(sae.state_dict()))
    if extra:
        raise ValueError(
            f"{path} holds what {recipe['model']} does not have: {', '.join(extra[:5])}"
        )
    sae.load_state_dict(weights)
    recipe = recipe | {"weights_sum": weights_sum(sae)}
    title = (
        path.stem
        if path.is_file()
        else files.safe_name("_".join(Path(name.partition("@")[0]).parts[-2:]))
    )
    return sae.to(device).eval(), recipe | {"title": recipe.get("title", title)}


def open_saes(cfg: Namespace) -> list[tuple[SAE, dict[str, Any]]]:
    """The SAEs that cfg.SAE_path names (default: the newest) and their recipes, on cfg.device (default: CPU). Raises ValueError for unusable ones."""
    if not cfg.SAE_path:
        cfg.SAE_path = [str(newest(cfg.output_dir))]
        print(f"taking the newest checkpoint: {cfg.SAE_path[0]}")
    cfg.device = pick_device(getattr(cfg, "device", "cpu"))
    given = {
        key: getattr(cfg, key, None)
        for key in (
            "k",
            "layer",
            "n_layers",
            "aggre",
            "routing",
            "start_layer",
            "end_layer",
            "norm_eps",
        )
    }
    given = {
        key: value[0] if isinstance(value, list) else value
        for key, value in given.items()
        if key in cfg.typed
    }
    opened = [load(path, cfg.device, given) for path in dict.fromkeys(cfg.SAE_path)]
    if all("format_version" in recipe for _, recipe in opened):
        for key in sorted(
            set(given) - {"routing", "norm_eps"}
        ):  # which evaluation and export can change
            print(
                f"warning: --{key} does nothing for a trained SAE, whose recipe says it"
                + ("; --infer_k is what you may want" * (key == "k"))
            )
    return opened


def open_all(cfg: Namespace) -> list[tuple[SAE, dict[str, Any]]]:
    """The SAEs a stage is to work on; what their recipes say fills the options nobody typed. Raises ValueError for SAEs of different LMs too."""
    opened = open_saes(cfg)
    models = {recipe.get("model_path") for _, recipe in opened} - {None}
    if len(models) > 1 and not cfg.model_path:
        raise ValueError(
            f"the checkpoints belong to different language models ({', '.join(sorted(models))}); take them apart"
        )
    for _, recipe in opened:
        known, named = recipe.get("model_path"), recipe.get("model_name")
        if named and not known and not cfg.model_path:
            raise ValueError(
                f"{recipe['title']} was trained on {named}, which its recipe gives no place of; name it with --model_path"
            )
        if (
            known
            and cfg.model_path
            and "model_path" in cfg.typed
            and Path(known).resolve() != Path(cfg.model_path).resolve()
        ):
            print(f"warning: {recipe['title']} was trained on {known}, not on {cfg.model_path}")
    config.fill_from_recipe(cfg, opened[0][1])
    return opened
