"""An SAE at one site as other libraries see it, and the names that they give to sites.

Knows no model by name. The forward pass of SiteSAE is the documented one of SAELens; an SAE is
exported only after the two have given the same latents.

Shapes: N tokens, D hidden, F latents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.sae import SAE, StandardForm

OWN_CONFIG = "config.json"
OWN_WEIGHTS = "model.safetensors"
LENS_CONFIG = "cfg.json"
LENS_WEIGHTS = "sae_weights.safetensors"
NORM_EPS = 1e-5  # what SAELens and OpenAI add to the standard deviation; neither has an option
# TransformerLens changes the weights of a language model so that no state has a mean. It does so
# only where layers normalise by the mean; in families with RMSNorm it leaves them.
CENTRED = "center_writing_weights"
# dictionary_learning, by class: {name of its tensor: standard name}. Those of linear layers, which
# end in ".weight", are transposed.
LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
_PLAIN = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_TOPK = LINEAR | {"encoder.bias": "b_enc", "b_dec": "b_dec"}
_GATED = {"decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"}
LEARNED_NAMES: dict[str, dict[str, str]] = {
    "AutoEncoder": LINEAR | {"encoder.bias": "b_enc", "bias": "b_dec"},
    "AutoEncoderNew": LINEAR | {"encoder.bias": "b_enc", "decoder.bias": "b_dec"},
    "GatedAutoEncoder": LINEAR | _GATED,
    "JumpReluAutoEncoder": _PLAIN | {"threshold": "threshold"},
    "AutoEncoderTopK": _TOPK,
    "BatchTopKSAE": _TOPK,
    "MatryoshkaBatchTopKSAE": _PLAIN,
}
HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?P<folder>(/[\w.=-]+)*)(@(?P<revision>[\w./-]+))?"
)


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
    (r"[\w.]*\b(?:layers|h)\.(\d+)(?:\.output)?", 1),
)
# What else SAEs are published for, by a part of the hook's name.
OTHER_PLACES = (
    (r"resid_mid|post_attn", "the residual stream inside a block"),
    (r"attn|attention|hook_z|o_proj|-att\b", "attention"),
    (r"mlp|feedforward|ln2", "an MLP"),
    (r"embed|resid_pre", "the embeddings"),
)


def site_of(hook: str) -> int:
    """The site that a hook's name means. Raises ValueError for one off the residual stream."""
    for pattern, shift in HOOK_PATTERNS:
        match = re.fullmatch(pattern, hook)
        site = int(match[1]) + shift if match else 0
        if site > 0:
            return site
    places = [f" ({place})" for pattern, place in OTHER_PLACES if re.search(pattern, hook)]
    raise ValueError(
        f"it reads {hook!r}{''.join(places[:1])}, which is the output of no decoder block; "
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
