"""The contract of a sparse autoencoder: it answers questions, so that nobody need ask its name.

N tokens (any leading dimensions), L sites, D hidden, F latents. Sites are 1-based, indices into routed sites 0-based.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import distributed
from src.ops import (
    Sparse,
    apply_inference_cut,
    dense,
    firings,
    geometric_median,
    linear,
    pre_process,
    squared_errors,
    standardised,
)

Patch = Callable[[Tensor], Tensor]  # raw residual of the counted tokens [N,D] -> what replaces it
WARM_START = 8192  # tokens that warm_start looks at


@dataclasses.dataclass(frozen=True)
class SAEOutput:
    """One trip through an SAE."""

    target: Tensor  # what x_hat should equal [N,D] or [N,L,D]
    code: Tensor | Sparse  # of shape [N,F] or [N,L,F], dense or by its entries
    x_hat: Tensor  # reconstruction, shape of target
    pre_acts: Tensor | None = None  # before the activation; what penalties read
    weights: Tensor | None = None  # share of each site (routed models) [N,L]
    scale: Tensor | None = None  # what multiplied the routed site's state: p, or 1 [N]
    inputs: Tensor | None = None  # the states of all sites (routed models) [N,L,D]

    @cached_property
    def latents(self) -> Tensor:
        """The dense code. [N,F] or [N,L,F]"""
        return dense(self.code)

    @cached_property
    def fired(self) -> Tensor:
        """In how many codes each latent is not 0. int64 [F]"""
        return firings(self.code)

    def replace(self, **changed: Any) -> SAEOutput:
        return dataclasses.replace(self, **changed)

    @staticmethod
    def cat(passes: list[SAEOutput]) -> SAEOutput:
        """The passes of consecutive tokens as one."""
        join = {
            field.name: [getattr(p, field.name) for p in passes]
            for field in dataclasses.fields(SAEOutput)
        }
        codes = join.pop("code")
        code = Sparse.cat(codes) if isinstance(codes[0], Sparse) else torch.cat(codes)
        return SAEOutput(
            code=code,
            **{
                name: None if parts[0] is None else torch.cat(parts) for name, parts in join.items()
            },
        )

    def detach_code(self) -> SAEOutput:
        """What is read after the backward pass: the code and where it was routed, without graph. target, x_hat and pre_acts are None."""
        held = {name: getattr(self, name) for name in ("code", "weights", "scale", "inputs")}
        return SAEOutput(
            None,
            x_hat=None,
            **{
                name: value.detach() if isinstance(value, Tensor) else value
                for name, value in held.items()
            },
        )


class StandardForm(NamedTuple):
    """An SAE at one site in the terms libraries share: ReLU, TopK, JumpReLU or gate over (input - b_dec) W_enc, and W_dec back."""

    architecture: (
        str  # "standard", "topk" (negative values among the k clipped), "jumprelu" or "gated"
    )
    tensors: dict[
        str, Tensor
    ]  # W_enc [D,F], W_dec [F,D], b_dec [D]; by architecture b_enc, threshold, b_gate, b_mag, r_mag [F]
    code: Callable[
        [Tensor], Tensor
    ]  # the SAE's own code of a standardised state [N,D] -> [N,F], to compare with
    k: int | None = None
    caveat: str = ""  # what the plain form leaves out


STANDARD_NAMES = {  # of the tensors -> of our parameters; matrices are transposed
    "W_enc": "encoder.weight",
    "W_dec": "decoder.weight",
    "b_dec": "pre_bias",
    "b_enc": "latent_bias",
    "threshold": "threshold",
    "b_gate": "gate_bias",
    "b_mag": "mag_bias",
    "r_mag": "r_mag",
}


def routed_sites(
    n_layers: int, start_layer: int | None = None, end_layer: int | None = None
) -> list[int]:
    """Sites n//4 ... 3n//4 (4 ... 12 of 16); end_layer is exclusive. Raises ValueError for a model too shallow, or a range outside it."""
    if start_layer is not None and end_layer is not None and not 1 <= start_layer < end_layer:
        raise ValueError(
            f"--start_layer {start_layer} --end_layer {end_layer}; sites run from start to before end, and begin at 1"
        )
    if n_layers is None or (n_layers < 4 and (start_layer is None or end_layer is None)):
        raise ValueError(
            f"{n_layers} blocks; a model over several sites needs a language model of at least 4"
        )
    start = n_layers // 4 if start_layer is None else start_layer
    end = 3 * n_layers // 4 + 1 if end_layer is None else end_layer
    if not 1 <= start < end <= n_layers + 1:
        raise ValueError(
            f"routed sites {start} ... {end - 1} of a {n_layers}-block model; sites run from 1 to {n_layers}"
        )
    return list(range(start, end))


class SAE(nn.Module):
    """The contract. Subclasses say what differs."""

    architecture = ""  # of the plain form
    input_norm = "token"  # each token's state standardised, or "none": taken as it is

    def __init__(self, hidden_size: int, latent_size: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        if hidden_size <= 0 or latent_size <= 0:
            raise ValueError(
                f"hidden_size {hidden_size}, latent_size {latent_size}; both must be positive"
            )
        self.hidden_size, self.latent_size, self.norm_eps = hidden_size, latent_size, norm_eps
        self.config: dict[str, Any] = {}
        self.first, self.whole = 0, None
        self.register_buffer(
            "tokens_since_fired", torch.zeros(latent_size), persistent=False
        )  # tokens since a latent was last active
        self.register_buffer("tokens_seen", torch.zeros(()), persistent=False)

    @property
    def name(self) -> str:
        return type(self).__name__

    def sites(self) -> list[int]:
        """The residual-stream sites it reads."""
        raise NotImplementedError

    def standardise(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, mean, std) of raw states: h = x * std + mean. [...,D] -> [...,D], [...,1], [...,1]"""
        if self.input_norm == "none":
            h = h.float()
            return h, torch.zeros_like(h[..., :1]), torch.ones_like(h[..., :1])
        x, mean, std = pre_process(h, self.norm_eps)
        return x, mean, std + self.norm_eps  # what x has to be multiplied by to get h back exactly

    def gather(self, hidden: Mapping[int, Tensor]) -> Tensor:
        """{site: [N,D]} -> its standardised input."""
        states = [hidden[site] for site in self.sites()]
        return (
            standardised(states, self.norm_eps)
            if self.input_norm == "token"
            else torch.stack(states, dim=-2).float()
        )

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def autoencode(
        self,
        x: Tensor,
        infer_k: int | None = None,
        theta: float | None = None,
        token: Tensor | None = None,
    ) -> SAEOutput:
        raise NotImplementedError

    def part_of(self, whole: int | None, first: int = 0) -> None:
        """Says that what comes next is a part of a batch of `whole` tokens, its token `first` and what follows (None: all of it).

        A batch is shared out to several processes, and to slices where memory is short. The terms of its parts add up to its loss.
        """
        for module in self.modules():
            if isinstance(module, SAE):
                module.whole, module.first = whole, first

    def mean(self, x: Tensor) -> Tensor:
        """This part's share of the mean over the tokens of the whole batch: [N,...] -> []"""
        return x.mean() if self.whole is None else x.sum() / (self.whole * x.shape[1:].numel())

    def total(self, x: Tensor) -> Tensor:
        """Sum over the processes that share a training step (in evaluation each works alone)."""
        return distributed.all_sum(x) if self.training else x

    def average(self, x: Tensor) -> Tensor:
        """Mean over the tokens here and in the other processes, nan where there are none. No gradient. [N,...] -> [...]"""
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        sums = self.total(torch.cat([x.sum(0).flatten(), x.new_full((1,), len(x))]))
        return (sums[:-1] / sums[-1]).view(x.shape[1:])

    def penalty(self, p: SAEOutput) -> dict[str, Tensor]:
        """Weighted extra terms of the loss, by name."""
        return {}

    def loss(self, p: SAEOutput) -> dict[str, Tensor]:
        """Terms that add up to the training loss, over the parts of a batch too (part_of)."""
        return {"NormMSE": self.mean(squared_errors(p.target, p.x_hat)), **self.penalty(p)}

    def strength(self, p: SAEOutput) -> Tensor | Sparse:
        """The code in units that compare between tokens and models."""
        return p.code

    def patches(
        self,
        hidden,
        *,
        infer_k=None,
        theta=None,
        edit=None,
        token=None,
        keep_error=True,
        clean=None,
    ) -> Iterator[dict[int, Patch]]:
        """One {site: function(h [N,D]) -> h'} per patched run: the residual replaced by its reconstruction.

        `clean`: what autoencode gave for `hidden`, where the caller has it (its latents only where there is an edit); it is not computed again.

        `edit` maps a code in units of `strength` to the code wanted. The residual then keeps what the SAE misses: only the change is
        decoded and added, so that an edit without effect is none bit for bit. With keep_error=False the edited code replaces all.
        """

        def at(index: int) -> Patch:
            known = (
                None
                if clean is None or edit is not None
                else clean.x_hat
                if clean.x_hat.dim() == 2
                else clean.x_hat[:, index]
            )
            return lambda h: self._substitute(h, infer_k, theta, edit, token, keep_error, known)

        for index, site in enumerate(self.sites()):
            yield {site: at(index)}

    def _substitute(
        self, h: Tensor, infer_k, theta, edit, token, keep_error, known: Tensor | None
    ) -> Tensor:
        x, mean, std = self.standardise(h)
        if known is not None:
            return known * std + mean
        p = self.autoencode(x, infer_k, theta, token)
        if edit is None:
            return p.x_hat * std + mean
        x_hat = self.decode(edit(p.latents))
        return h + (x_hat - self.decode(p.latents)) * std if keep_error else x_hat * std + mean

    def decoders(self) -> list[nn.Linear]:
        """Those whose columns are kept at unit norm."""
        return []

    def adam_parameters(self) -> list[Tensor]:
        """Those that are no part of a dictionary and keep the papers' Adam whatever trains the rest."""
        return []

    def warm_start(self, x: Tensor) -> None:
        """Initialisation from the first tokens of a first batch of inputs, the same in every process."""

    @torch.no_grad()
    def after_step(self, p: SAEOutput, progress: float) -> None:
        """Counters and schedules, over all processes; progress is the share of the run that is done.

        Numbers are filled in, not copied from the host, for which CUDA would be waited for.
        """
        counts = self.total(torch.cat([p.fired, p.fired.new_full((1,), p.code.shape[:-1].numel())]))
        self.tokens_seen += counts[-1]
        self.tokens_since_fired += counts[-1]
        self.tokens_since_fired.masked_fill_(counts[:-1] > 0, 0)

    def dead_fraction(self) -> float:
        """Share of latents silent for the last tenth of what was seen."""
        return float((self.tokens_since_fired > 0.1 * self.tokens_seen).float().mean())

    def diagnostics(self, p: SAEOutput) -> dict[str, Any]:
        """More to log, by name."""
        return {}

    def title(self, data_name: str) -> str:
        return f"{self.name}_{data_name}"

    def to_standard_form(self) -> dict[int, StandardForm]:
        """{site: plain form}. Raises ValueError with the reason where it has none."""
        raise ValueError(
            f"the code of a {self.name} is read from sites {self.sites()} together; an SAE of one site cannot hold it"
        )


class Dictionary(SAE):
    """An encoder, a decoder and two biases at one site: what TopK, Vanilla, JumpReLU and Gated share."""

    def __init__(
        self,
        hidden_size,
        latent_size,
        *,
        layer=12,
        n_layers=None,
        norm_eps=1e-5,
        b_pre_init="geom_median",
        unit_encoder=True,
        input_norm="token",
    ):
        super().__init__(hidden_size, latent_size, norm_eps)
        if input_norm not in ("token", "none"):
            raise ValueError(f"input_norm {input_norm!r}; known are token, none")
        self.input_norm = input_norm
        if n_layers is not None and not 1 <= layer <= n_layers:
            raise ValueError(
                f"layer {layer} of a {n_layers}-block model; sites run from 1 to {n_layers}"
            )
        self.layer, self.b_pre_init = layer, b_pre_init
        self.pre_bias = nn.Parameter(torch.zeros(hidden_size))
        self.latent_bias = nn.Parameter(torch.zeros(latent_size))
        self.encoder = nn.Linear(hidden_size, latent_size, bias=False)
        self.decoder = nn.Linear(latent_size, hidden_size, bias=False)
        with torch.no_grad():
            unit = (
                F.normalize(torch.randn(latent_size, hidden_size), dim=1)
                if unit_encoder
                else self.encoder.weight
            )
            self.encoder.weight.copy_(unit)
            self.decoder.weight.copy_(F.normalize(unit, dim=1).T)

    def sites(self):
        return [self.layer]

    def gather(self, hidden):
        return self.standardise(hidden[self.layer])[0]

    def pre_acts(self, x: Tensor) -> Tensor:
        return linear(x, self.encoder.weight, self.latent_bias, self.pre_bias)

    def activate(self, pre_acts: Tensor, token: Tensor | None = None) -> Tensor:
        return F.relu(pre_acts)

    def get_latents(
        self,
        pre_acts: Tensor,
        infer_k: int | None = None,
        theta: float | None = None,
        token: Tensor | None = None,
    ) -> Tensor:
        """Activation, then the cut asked for at inference."""
        return apply_inference_cut(self.activate(pre_acts, token), infer_k, theta)

    def encode(
        self,
        x: Tensor,
        infer_k: int | None = None,
        theta: float | None = None,
        token: Tensor | None = None,
    ) -> Tensor:
        return self.get_latents(self.pre_acts(x), infer_k, theta, token)

    def decode(self, latents: Tensor) -> Tensor:
        return linear(latents, self.decoder.weight, self.pre_bias)

    def forward(
        self, x: Tensor, infer_k: int | None = None, theta: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """(latents, x_hat): the documented form."""
        p = self.autoencode(x, infer_k, theta)
        return p.latents, p.x_hat

    def autoencode(self, x, infer_k=None, theta=None, token=None):
        pre_acts = self.pre_acts(x)
        latents = self.get_latents(pre_acts, infer_k, theta, token)
        return SAEOutput(x, latents, self.decode(latents), pre_acts)

    def to_standard_form(self):
        state = self.state_dict()
        tensors = {
            theirs: state[ours].T if state[ours].dim() == 2 else state[ours]
            for theirs, ours in STANDARD_NAMES.items()
            if ours in state
        }
        return {
            site: StandardForm(self.architecture, tensors, self.encode, getattr(self, "k", None))
            for site in self.sites()
        }

    def decoders(self):
        return [self.decoder]

    @torch.no_grad()
    def warm_start(self, x):
        x = x.flatten(0, -2)[:WARM_START]
        if self.b_pre_init != "zero":
            self.pre_bias.copy_(x.mean(0) if self.b_pre_init == "mean" else geometric_median(x))
