"""Trained SAEs on disk, loaded by path or hub name, and the states of an unfinished training.

`X.pt` holds the state dict alone, `X.json` the recipe: how the weights came about. State dicts
of the public RouteSAE repositories have no recipe; it is derived from the file's name, the
parameters' names and their shapes. Other programs' formats are read by import_formats.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import random
import re
import shutil
import subprocess
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src import config, distributed, files, import_formats, lm, model, tensor_files, zoo
from src.device import pick_device
from src.sae import SAE

FORMAT_VERSION = 1
RECIPE_TYPES = {
    "model": str,
    "config": dict,
    "options": dict,
    "final": dict,
    "title": str,
    "model_path": str,
    "data_path": str,
    "model_name": str,
    "data_name": str,
    "tokens": int,
    "sites": list,
    "weights_sum": str,
    "language_model": dict,
    "format_version": int,
}
FINAL_NUMBERS = ("loss", "tokens_per_s", "step_tokens_per_s")  # what later stages read of `final`
LAYER_NUMBERS = ("n_layers", "layer", "start_layer", "end_layer")
MAX_LAYERS = 10_000  # of a language model; lists of sites are built from what recipes say
MIXED_ADVICE = (
    "one of the two was replaced. Put the right one back, train again, or, if you changed the "
    "weights yourself, remove weights_sum from the recipe"
)
READ_ATTEMPTS = 5  # of weights and recipe beside a process that replaces both


def environment() -> dict[str, Any]:
    """What a result may depend on besides its options: commit, package versions, threads."""
    return {**_program(), "threads": torch.get_num_threads()}


@functools.cache
def _program() -> dict[str, Any]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "datasets", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"git_commit": _git_commit(), "versions": versions}


def _git_commit() -> str | None:
    """The commit of this checkout, or None without git, a repository or a checkout."""
    if not files.IS_CHECKOUT:
        return None  # the environment of an installed package may lie in another repository
    command = ["git", "rev-parse", "HEAD"]
    try:
        process = subprocess.run(
            command, cwd=files.ROOT, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None


def _check_version(saved: Mapping[str, Any], path: Path) -> None:
    version = saved.get("format_version", 0)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}; "
            "update it"
        )


# ------------------------------------------------------------------------------- training states


def states(folder: str | Path) -> list[Path]:
    """Saved states, newest step first, damaged ones included."""
    paths = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    # By step and not by modification time, because clocks can jump.
    return sorted(paths, key=lambda path: int(path.name[5:]), reverse=True)


def save_state(
    folder: str | Path, step: int, meta: Mapping[str, Any], parts: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write the state after one step, remove all but the newest `keep` states, return its folder.

    meta: anything JSON can hold. parts: {name: tensors and numbers in dicts and lists}.
    """
    text = json.dumps({"format_version": FORMAT_VERSION, "step": step} | dict(meta)).encode()
    writers = {"meta.json": lambda file: file.write(text)}
    writers |= {f"{name}.pt": functools.partial(torch.save, part) for name, part in parts.items()}
    path = files.write_folder(Path(folder) / f"step-{step:08d}", writers)
    for old in states(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def find_state(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """(folder, meta) of the newest undamaged state, or None if no state was ever saved.

    Damaged states that are newer are reported and renamed, so that they no longer count; folders
    that were never completed are removed. The caller must hold the lock of the run. Raises
    ValueError if all states are damaged, or if the state has a newer format version.
    """
    for incomplete in Path(folder).glob(".tmp-*"):
        shutil.rmtree(incomplete, ignore_errors=True)
    damaged: dict[Path, ValueError] = {}
    for path in states(folder):
        try:
            files.verify_folder(path)
        except ValueError as error:
            damaged[path] = error
            continue
        meta = files.load_json(path / "meta.json")
        _check_version(meta, path)
        for bad, error in damaged.items():
            print(f"warning: the state of {bad.name} is damaged ({error}); taking {path.name}")
            renamed = bad.with_name(f"damaged-{bad.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            bad.rename(renamed)
        return path, meta
    if damaged:
        reasons = "; ".join(map(str, damaged.values()))
        raise ValueError(
            f"every saved state is damaged ({reasons}); restore one, "
            "or start again with --resume never --overwrite"
        )
    return None


def load_part(path: Path, name: str) -> Any:
    """One part of a verified state, on the CPU. Only tensors and plain values; no code is run."""
    return torch.load(path / f"{name}.pt", map_location="cpu", weights_only=True)


def random_state() -> dict[str, Any]:
    """Return the states of all global generators, in types that load safely."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what random_state() returned."""
    torch.set_rng_state(state["torch"])
    # Another number of GPUs means another machine, where nobody expects the same bits.
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))


# ------------------------------------------------------------------------------- weights, recipes


def save(sae: SAE, recipe: Mapping[str, Any], folder: str | Path, title: str) -> Path:
    """Write <title>.json, then <title>.pt, each atomically; returns the path of the weights.

    The recipe holds the sum of its weights. The recipe of earlier weights stays beside them until
    both files are replaced: if the process is killed in between, the earlier SAE still loads.
    """
    path = Path(folder) / f"{files.safe_name(title)}.pt"
    earlier = _earlier_path(path)
    with contextlib.suppress(ValueError):  # weights that are none are replaced
        if (recipe_there := trained_recipe(path)) is not None:
            files.save_json(recipe_there, earlier)
    weights = {name: value.detach().cpu() for name, value in sae.state_dict().items()}
    about = {"format_version": FORMAT_VERSION, "title": title} | dict(recipe)
    recipe_path = path.with_suffix(".json")
    files.save_json(about | {"weights_sum": _sum_of(weights)}, recipe_path)
    write = functools.partial(torch.save, weights)
    try:
        files.write_atomic(path, functools.partial(files.save_through, write))
    except OSError:
        # A recipe must not stay without its weights, or beside earlier ones.
        if earlier.exists():
            earlier.replace(recipe_path)
        else:
            recipe_path.unlink()
        raise
    earlier.unlink(missing_ok=True)
    return path


def read_recipe(path: str | Path) -> dict[str, Any] | None:
    """The recipe beside a checkpoint, or None if there is none.

    Raises ValueError if this version cannot read it. It may be the recipe of other weights, see
    trained_recipe.
    """
    path = Path(path).with_suffix(".json")
    return _checked_recipe(files.load_json(path), path) if path.exists() else None


def language_model_name(path: str | Path) -> str | None:
    """The name of the language model in the recipe beside a checkpoint, None if it is not known."""
    try:
        recipe = read_recipe(path)
    except ValueError:  # what is damaged is told where it is needed
        return None
    place = (recipe or {}).get("model_path")
    return files.data_name(Path(place).resolve()) if place else None


def trained_recipe(path: str | Path) -> dict[str, Any] | None:
    """The recipe of the weights at path, or None if there are no weights.

    Raises ValueError for weights that have no recipe, or that belong to no recipe beside them:
    they may be anybody's, and are not replaced unless that was asked for.
    """
    path = Path(path)
    if not path.exists():
        return None
    _, recipe = _read_pair(path, "cpu")
    if recipe is None:
        raise ValueError(
            f"{path} has no recipe beside it, so it may be anybody's; "
            "move it, or give --tag NAME or --overwrite"
        )
    return recipe


def _earlier_path(path: Path) -> Path:
    return path.with_name(f".{path.stem}.earlier.json")


def _read_pair(path: Path, device: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(weights, their recipe) of a file; (what it holds, None) if there is no recipe beside it.

    Raises ValueError if the recipes beside it belong to other weights.
    """
    for attempt in range(READ_ATTEMPTS):
        weights = tensor_files.read_torch(path, device)
        recipe = read_recipe(path)
        if recipe is None:
            return weights, None
        weights = _state_dict(weights, path)
        weights_sum = _sum_of(weights)
        earlier = _earlier_path(path)
        try:
            candidates = [recipe]
            if earlier.exists():
                candidates.append(_checked_recipe(files.load_json(earlier), earlier))
        except FileNotFoundError:  # a writer beside this process has just finished
            continue
        for candidate in candidates:
            # Recipes of earlier versions hold no sum.
            if candidate.get("weights_sum", weights_sum) == weights_sum:
                return weights, candidate
        time.sleep(0.1 * attempt)
    # Other shapes are the clearer reason.
    _check_shapes(_outline(recipe, path), weights, recipe["model"], path)
    raise ValueError(f"{path} is not what its recipe describes; {MIXED_ADVICE}")


def _checked_recipe(recipe: Any, path: Path) -> dict[str, Any]:
    """The recipe itself. Raises ValueError if it lacks an entry, or an entry cannot be used."""
    if not isinstance(recipe, dict) or not {"model", "config"} <= set(recipe):
        raise ValueError(f"{path} is not the recipe of a checkpoint: it names no model")
    wrong = [
        key
        for key, kind in RECIPE_TYPES.items()
        if key in recipe and not isinstance(recipe[key], kind)
    ]
    final = recipe.get("final", {})
    wrong += [f"final {key}" for key in FINAL_NUMBERS if not _is_number(final, key)]
    if not wrong and not isinstance(recipe["config"].get("hidden_size"), int):
        wrong = ["its hidden_size"]
    if wrong:
        raise ValueError(
            f"{path} is not the recipe of a checkpoint: {wrong[0]} is missing or of the wrong type"
        )
    try:
        for name, value in recipe["config"].items():
            config.check_value(name, value)
            if name in LAYER_NUMBERS and value is not None and value > MAX_LAYERS:
                raise ValueError(f"{name} {value}: no language model has so many blocks")
    except ValueError as error:
        raise ValueError(f"{path} is not the recipe of a checkpoint: {error}") from error
    files.safe_name(recipe.get("title", "none"))  # later stages name their files by it
    _check_version(recipe, path)
    return recipe


def _is_number(values: Any, key: str) -> bool:
    value = values.get(key, 0) if isinstance(values, dict) else 0
    return value is None or isinstance(value, int | float)


def newest(output_dir: str | Path) -> Path:
    """The most recently written checkpoint of an output folder. Raises ValueError without one."""
    folder = Path(output_dir) / files.SAE_DIR
    path = files.newest(folder, "*.pt")
    if path is None:
        raise ValueError(
            f"no checkpoint in {folder}; run train.py first, or name one with --SAE_path"
        )
    return path


def _state_dict(value: Any, path: Path) -> dict[str, Tensor]:
    """What a file holds, if it is the state dict of an SAE. Raises ValueError for anything else."""
    is_dict = isinstance(value, dict) and value
    if not is_dict or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise ValueError(f"{path} is not a state dict of tensors")
    tensor_files.check_tensors(value, path)
    return value


def weights_sum(sae: SAE) -> str:
    """Hash of all parameters and buffers. Results carry it, so that they can be told from those
    of another SAE with the same title."""
    return _sum_of(sae.state_dict())


def _sum_of(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        values = value.cpu().float().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------- files without a recipe

# Epsilon of the standardisation in both public RouteSAE repositories; their files do not record it.
PUBLISHED_EPS = 1e-6
# How swei2001/RouteSAEs names its files. beauefui/RouteSAE-repro begins names with the model's.
FILE_NAMES = {
    r"L(?P<layer>\d+)_K(?P<k>\d+)_": "TopK",
    r"L(?P<layer>\d+)_VL": "Vanilla",
    r"L(?P<layer>\d+)_GL": "Gated",
    r"L(?P<layer>\d+)_JL": "JumpReLU",
    r"(?P<aggre>sum|mean)_(?P<routing>hard|soft)_K(?P<k>\d+)_": "RouteSAE",
    r"ML_K(?P<k>\d+)_": "MLSAE",
    r"RDM_K(?P<k>\d+)_": "TopK",
    r"Cross_CL": "Crosscoder",
}


def _read_file_name(stem: str) -> tuple[list[str], dict[str, Any]]:
    """(models that a file's name may mean, likeliest first; options that it states)."""
    for pattern, name in FILE_NAMES.items():
        if match := re.match(pattern, stem):
            options = match.groupdict().items()
            return [name], {key: int(v) if v.isdigit() else v for key, v in options}
    names = [name for name in [*zoo.ZOO, *zoo.ALIASES] if stem.lower().startswith(name.lower())]
    return sorted(names, key=len, reverse=True), {}


def _derive_recipe(
    path: Path, weights: Mapping[str, Tensor], hints: Mapping[str, Any]
) -> dict[str, Any]:
    """Recipe of a state dict that has none.

    Sizes come from shapes. The model is the one in `hints`, or the first whose parameters have
    these names and shapes, beginning with those that the file's name suggests. Raises ValueError
    if no model fits.
    """
    pattern = re.compile(r"(sae\.)?encoder\..*weight")
    encoders = [
        value for key, value in weights.items() if pattern.fullmatch(key) and value.dim() == 2
    ]
    if not encoders:
        keys = ", ".join(list(weights)[:6])
        raise ValueError(f"{path} holds no encoder (keys: {keys}); no model here has such weights")
    latent_size, hidden_size = encoders[0].shape
    n_layers = hints.get("n_layers") or _likely_depth(weights, encoders)
    likely, named_options = _read_file_name(path.stem)
    options = {"latent_size": latent_size, "k": min(64, latent_size), "norm_eps": PUBLISHED_EPS}
    options |= named_options
    options |= {key: value for key, value in hints.items() if value is not None}
    pre_bias = weights.get("sae.pre_bias", weights.get("pre_bias"))
    options["site_bias"] = pre_bias is not None and pre_bias.dim() > 1
    names = [hints["model"]] if hints.get("model") else [*likely, *zoo.ZOO]
    for name in dict.fromkeys(map(zoo.canonical, names)):
        with torch.device("meta"):
            candidate = model.build(name, hidden_size, n_layers, options)
        if shapes(candidate.state_dict()) == shapes(weights):
            sizes = {"hidden_size": hidden_size, "n_layers": n_layers}
            _report_derived(path, name, candidate.config)
            return {"model": name, "config": candidate.config | sizes, "options": {}}
    listed = ", ".join(f"{key} {shape}" for key, shape in list(shapes(weights).items())[:8])
    raise ValueError(f"{path} fits no model known here: {listed}")


def _likely_depth(weights: Mapping[str, Tensor], encoders: list[Tensor]) -> int:
    """Return the number of blocks: n blocks are routed at n / 2 + 1 sites, n / 4 to 3 n / 4."""
    router = weights.get("router.weight", encoders)
    n_sites = len(router) if router is encoders or router.dim() else 1
    return 2 * (n_sites - 1) if n_sites > 1 else 16


def _report_derived(path: Path, name: str, values: Mapping[str, Any]) -> None:
    # The sizes cannot be wrong: they come from the shapes.
    assumed = [f"{key} {value}" for key, value in values.items() if not key.endswith("_size")]
    stated = f"taken for {name} with {', '.join(assumed)}"
    print(files.printable(f"{path.name}: no recipe beside it; {stated}"))


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a state dict."""
    return {key: tuple(value.shape) for key, value in weights.items()}


# ------------------------------------------------------------------------------- loading


def load(
    path: str | Path, device: str = "cpu", hints: Mapping[str, Any] | None = None
) -> tuple[SAE, dict[str, Any]]:
    """(SAE in eval mode on device, recipe) of a checkpoint.

    path: a file, a folder of any format in import_formats.FORMATS, or a hub name (its locate).
    hints: model, k, layer, n_layers ... of files that do not say them. Raises ValueError for a
    missing, foreign or damaged file, for a repository that cannot be fetched, and for weights
    that do not fit their recipe.
    """
    name, path, hints = str(path), import_formats.locate(path), hints or {}
    if path.suffix == ".json" and path.with_suffix(".pt").exists():
        path = path.with_suffix(".pt")  # the weights beside the recipe that was named
    opened = import_formats.read(path, name, hints)
    if opened:
        weights, recipe = opened
        _checked_recipe(recipe, path)
        tensor_files.check_tensors(weights, path)
        if recipe.get("weights_sum") not in (None, _sum_of(weights)):
            raise ValueError(f"{path}: the weights are not those of the recipe; {MIXED_ADVICE}")
        title = files.safe_name("_".join(Path(name.partition("@")[0]).parts[-2:]))
    else:
        weights, recipe = _read_pair(path, device)
        title = path.stem
        files.safe_name(title)  # results are named by it, minutes later
        if recipe is None:
            weights, recipe = _without_recipe(weights, path, hints)
    _check_shapes(_outline(recipe, path), weights, recipe["model"], path)
    sae = _build(recipe, path)
    sae.load_state_dict(weights)
    about = {"weights_sum": weights_sum(sae), "title": recipe.get("title", title)}
    return sae.to(device).eval(), recipe | about


def _without_recipe(
    value: Any, path: Path, hints: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, recipe) of a file of another program, or of one that lost its recipe."""
    published = import_formats.read_state(value, path, hints)
    if published:
        return published
    weights = _state_dict(value, path)
    return weights, _derive_recipe(path, weights, hints)


def _outline(recipe: Mapping[str, Any], path: Path) -> SAE:
    """The SAE of a recipe without memory for its weights: a recipe may state any size."""
    try:
        with torch.device("meta"):
            return _build(recipe, path)
    except RuntimeError as error:
        raise ValueError(f"{path}: the sizes of the recipe are impossible ({error})") from error


def _build(recipe: Mapping[str, Any], path: Path) -> SAE:
    values = dict(recipe["config"])
    hidden_size, n_layers = values.pop("hidden_size"), values.pop("n_layers", None)
    try:
        return model.build(zoo.canonical(recipe["model"]), hidden_size, n_layers, values)
    except (TypeError, OverflowError, ValueError) as error:
        recipe_path = path.with_suffix(".json")
        raise ValueError(
            f"{recipe_path}: no {recipe['model']} can be built from its config ({error})"
        ) from error


def _check_shapes(sae: SAE, weights: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Raise ValueError, naming the parameter, if the weights are not those of the SAE."""
    found_shapes, expected_shapes = shapes(weights), shapes(sae.state_dict())
    for key, expected in expected_shapes.items():
        shape = found_shapes.get(key, "missing")
        if shape != expected:
            raise ValueError(
                f"{path}: {key} is {shape}, the recipe of {name} needs {expected}; "
                "weights and recipe do not match"
            )
    extra = sorted(set(found_shapes) - set(expected_shapes))
    if extra:
        raise ValueError(f"{path} holds parameters that {name} lacks: {', '.join(extra[:5])}")


# Options that a file without a recipe may need, and those that also change an SAE with a recipe.
HINTS = ("k", "layer", "n_layers", "aggre", "routing", "start_layer", "end_layer", "norm_eps")
CHANGEABLE = ("routing", "norm_eps")


def open_saes(cfg: Namespace) -> list[tuple[SAE, dict[str, Any]]]:
    """The SAEs of cfg.SAE_path (default: the newest) and their recipes, on cfg.device.

    Without cfg.device the CPU is used. Raises ValueError for SAEs that cannot be used.
    """
    if not cfg.SAE_path:
        cfg.SAE_path = [str(newest(cfg.output_dir))]
        print(f"taking the newest checkpoint: {cfg.SAE_path[0]}")
    cfg.device = pick_device(getattr(cfg, "device", "cpu"))
    hints = {key: getattr(cfg, key, None) for key in HINTS if key in cfg.typed}
    hints = {key: value[0] if isinstance(value, list) else value for key, value in hints.items()}
    opened = [load(path, cfg.device, hints) for path in dict.fromkeys(cfg.SAE_path)]
    distributed.require_same({"SAEs of the sums": [recipe["weights_sum"] for _, recipe in opened]})
    if all("format_version" in recipe for _, recipe in opened):
        for key in sorted(hints.keys() - CHANGEABLE):
            advice = "; --infer_k is what you may want" if key == "k" else ""
            print(f"warning: --{key} does nothing for a trained SAE with a recipe{advice}")
    return opened


def open_all(cfg: Namespace) -> list[tuple[SAE, dict[str, Any]]]:
    """The SAEs a stage works on. Options that were not typed are filled from their recipes.

    Raises ValueError also for SAEs that belong to different language models.
    """
    opened = open_saes(cfg)
    recipes = [recipe for _, recipe in opened]
    models = {recipe.get("model_path") for recipe in recipes} - {None}
    if len(models) > 1 and not cfg.model_path:
        raise ValueError(
            f"the checkpoints belong to different language models ({', '.join(sorted(models))}); "
            "run the stage once for each"
        )
    for recipe in recipes:
        _check_language_model(cfg, recipe)
    config.fill_from_recipe(cfg, recipes[0])
    sizes = lm.sizes_by_config(cfg.model_path or str(files.DEMO_LM), cfg.trust_remote_code)
    for sae, _ in opened if sizes else []:
        sae.check_language_model(*sizes)
    return opened


def _check_language_model(cfg: Namespace, recipe: Mapping[str, Any]) -> None:
    """Warn of a language model that differs from the recipe's; raise ValueError if it is lost."""
    path, name = recipe.get("model_path"), recipe.get("model_name")
    if name and not path and not cfg.model_path:
        raise ValueError(
            f"{recipe['title']} was trained on {name}, whose place its recipe does not say; "
            "name it with --model_path"
        )
    if recipe.get("language_model"):  # it is compared once it is loaded
        return
    if path and cfg.model_path and "model_path" in cfg.typed:
        if Path(path).resolve() != Path(cfg.model_path).resolve():
            print(
                files.printable(
                    f"warning: {recipe['title']} was trained on {path}, not on {cfg.model_path}"
                )
            )
