"""What an SAE of another program computes, and the model here that computes the same.

Published has the terms that other programs share. `hold` turns it into a state dict and a recipe,
or refuses it. Knows no model by name.

Shapes: D hidden, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src import files, model, tensor_files
from src.formats import HUB_NAME, NORM_EPS
from src.sae import STANDARD_NAMES

MIN_NUMBER, MAX_NUMBER = 1e-30, 1e30  # of an option, so that float32 holds its products
BATCH_RULES = ("batchtopk", "matryoshka")
SHIFT_LATENTS = 8192  # of which a bias is computed in float64 at one time


class Source(NamedTuple):
    """Where an SAE was found."""

    folder: Path
    name: str  # as it was typed: a path, or a hub name with repository and folder
    hints: Mapping[str, Any]  # options that were typed: layer, k ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the folders on the way, the innermost last."""
        return self.folder.resolve().parts


class Published(NamedTuple):
    """What an SAE of another program computes.

    With x the input times `scale`, its pre-activations are (x - b_dec) W_enc + b_enc, or
    x W_enc + b_enc, and its reconstruction is (latents W_dec + b_dec) / scale. With `unit_rows`
    the codes are multiplied by the norms of decoder rows before they are chosen, and divided by
    them where they are decoded.
    """

    architecture: str  # of a model here
    tensors: Mapping[str, Tensor]  # by the standard name: W_enc [D,F], W_dec [F,D] ...
    site: int
    k: int | None = None
    cut: float | None = None  # one threshold for all latents, of a rule over a batch
    widths: list[int] | None = None  # numbers of first latents that also reconstruct alone
    clips: bool = True  # negative values among the k largest become 0
    subtracts_b_dec: bool = True
    unit_rows: bool = False  # its codes, and thresholds, are those of decoder rows of norm 1
    scale: float = 1.0
    input_norm: str = "none"
    language_model: str | None = None
    title: str | None = None
    notes: tuple[str, ...] = ()  # what was assumed, or differs here


def hold(published: Published, source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, recipe) of the model here that gives the same codes and reconstructions.

    Raises ValueError, which names the tensor or the option, if there is none.
    """
    name = _model_of(published.architecture)
    if published.architecture in BATCH_RULES and published.cut is None:
        raise ValueError(
            f"its architecture {published.architecture!r} chooses over a batch, and it has no "
            "threshold for single tokens"
        )
    _check_shapes(published.tensors)
    k, n_latents = published.k, published.tensors["W_enc"].shape[1]
    if k is not None and not 0 < k <= n_latents:
        raise ValueError(f"its k is {k}, of {n_latents} latents")
    weights = _state_dict(_folded(published))
    latent_size, hidden_size = weights["encoder.weight"].shape
    values = {
        "hidden_size": hidden_size,
        "n_layers": None,
        "latent_size": latent_size,
        "layer": published.site,
        "norm_eps": source.hints.get("norm_eps") or NORM_EPS,
        "input_norm": published.input_norm,
    }
    if k is not None:
        values |= {"k": k, "topk_relu": published.clips}
    if published.widths:
        values["matryoshka_widths"] = published.widths
    if published.cut is not None:
        weights["cut"] = torch.tensor(max(0.0, published.cut))  # below 0 all positive values pass
    recipe = {"model": name, "config": values, "options": {}}
    if published.title:
        recipe["title"] = published.title
    language_model = published.language_model
    if isinstance(language_model, str) and language_model:
        is_hub_name = HUB_NAME.fullmatch(language_model)
        recipe["model_path" if is_hub_name else "model_name"] = language_model
    for note in published.notes:
        print(files.printable(f"{source.name}: {note}"))
    return weights, recipe


def _model_of(architecture: str) -> str:
    """The first model that defines this architecture itself, instead of inheriting it."""
    for name, cls in model.CLASSES.items():
        if vars(cls).get("architecture") == architecture:
            return name
    known = sorted({cls.architecture for cls in model.CLASSES.values()} - {""})
    raise ValueError(f"its architecture is {architecture!r}; known are {', '.join(known)}")


def _check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors that are missing, too many, or do not go together."""
    encoder = tensors.get("W_enc")
    is_complete = {"W_enc", "W_dec", "b_dec"} <= tensors.keys() <= STANDARD_NAMES.keys()
    if not is_complete or encoder.dim() != 2:
        raise ValueError(f"its tensors are {', '.join(sorted(tensors))}")
    width, n_latents = encoder.shape
    expected = {"W_enc": (width, n_latents), "W_dec": (n_latents, width), "b_dec": (width,)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected.get(name, (n_latents,)):
            raise ValueError(f"its {name} has the shape {tuple(tensor.shape)}")


def _folded(published: Published) -> dict[str, Tensor]:
    """Tensors that give the same codes without the options that the models here lack.

    A factor of the input, norms of decoder rows that scale the codes, and a decoder bias that is
    not subtracted from the input go into the weights and biases.
    """
    folded = {name: value.float() for name, value in published.tensors.items()}
    if published.unit_rows:
        norms = folded["W_dec"].norm(dim=-1)
        norms = torch.where(norms > 0, norms, 1)  # a row of zeros stays one
        folded["W_dec"] = folded["W_dec"] / norms[:, None]
        folded["W_enc"] = folded["W_enc"] * norms
        folded["b_enc"] = folded["b_enc"] * norms
    if published.scale != 1:
        folded["W_enc"] = folded["W_enc"] * published.scale
        folded["W_dec"] = folded["W_dec"] / published.scale
        folded["b_dec"] = folded["b_dec"] / published.scale
    if not published.subtracts_b_dec:
        # x W + b = (x - b_dec) W + (b_dec W + b); a gated SAE scales the product by exp(r_mag).
        shift = _product(folded["b_dec"], folded["W_enc"])
        for bias in folded.keys() & {"b_enc", "b_gate"}:
            folded[bias] = (folded[bias] + shift).float()
        if "b_mag" in folded:
            scale = folded["r_mag"].double().exp() if "r_mag" in folded else 1.0
            folded["b_mag"] = (folded["b_mag"] + shift * scale).float()
    if "threshold" in folded:
        # They clip negative values, which a threshold below 0 would let through here.
        folded["threshold"] = folded["threshold"].clamp_min(0)
    return folded


def _product(vector: Tensor, matrix: Tensor) -> Tensor:
    """vector @ matrix in float64, block by block, since the memory for all of it may be short."""
    blocks = matrix.split(SHIFT_LATENTS, dim=1)
    return torch.cat([vector.double() @ block.double() for block in blocks])


def _state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a standard form under the names and in the orientation of our parameters."""
    return {
        ours: tensors[name].T if tensors[name].dim() == 2 else tensors[name]
        for name, ours in STANDARD_NAMES.items()
        if name in tensors
    }


# ------------------------------------------------------------------------------- what readers share


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by their standard names; matrices of nn.Linear are transposed.

    names: {name in the file: standard name}. A linear layer's name ends in ".weight". Raises
    ValueError that lists what the file holds if a name is missing, or unknown.
    """
    if tensors.keys() != names.keys():
        raise ValueError(f"its tensors are {', '.join(sorted(map(str, tensors)))}")
    is_linear = {standard: name.endswith(".weight") for name, standard in names.items()}
    renamed = {standard: tensors[name] for name, standard in names.items()}
    return {
        standard: value.T if is_linear[standard] and value.dim() == 2 else value
        for standard, value in renamed.items()
    }


def state_of(value: Any) -> dict[str, Tensor]:
    """A state dict of weights that torch.save wrote. Raises ValueError for anything else."""
    is_dict = isinstance(value, dict) and value
    if not is_dict or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise ValueError("it is not a state dict of tensors")
    tensor_files.check_tensors(value, "its state dict")
    return value


def whole(value: Any, name: str) -> int:
    """A whole number above 0 from a configuration. Raises ValueError for anything else."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point():
        value = value.item()
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"it does not say {name}" if value is None else f"its {name} is {value!r}")
    return value


def refuse(config: Mapping[str, Any], unsupported: Mapping[str, str]) -> None:
    """Raise ValueError with the reason if one of these options is on. {option: reason}"""
    for name, reason in unsupported.items():
        if config.get(name):
            raise ValueError(f"{reason} ({name} {config[name]!r})")


def number(value: Any, name: str) -> float:
    """A number above 0 from a configuration. Raises ValueError for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not MIN_NUMBER < value < MAX_NUMBER:
        raise ValueError(f"its {name} is {value!r}; a number above 0 is needed")
    return float(value)


def typed_site(source: Source, what_is_missing: str) -> int:
    """The site of --layer. Raises ValueError that asks for it."""
    if not source.hints.get("layer"):
        raise ValueError(f"{what_is_missing}; say the site with --layer (block 0 ends at site 1)")
    return source.hints["layer"]
