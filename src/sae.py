"""The interface of a sparse autoencoder (SAE): what it is told, what it returns, what it answers.

N tokens (any leading dimensions), L sites, D hidden, F latents. Sites are numbered from 1; a
site index counts a model's own sites from 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.ops import (
    apply_inference_cut,
    geometric_median,
    hold_cosine_,
    linear,
    pre_process,
    squared_errors,
    stack_standardised,
)
from src.sparse import SparseCode, cat_tokens, dense, firings

Patch = Callable[[Tensor], Tensor]  # raw residual of the counted tokens [N,D] -> its replacement
# the strength of a dense code (SAE.strength) [...,F] -> the strength that is wanted
Edit = Callable[[Tensor], Tensor]
Hold = Callable[[Tensor], None]  # changes values of a weight, in place
Reduction = Callable[[Tensor], Tensor]  # over the processes that share a batch
WARM_START_TOKENS = 8192  # what warm_start looks at
# A latent is reported dead if it was silent for this share of all tokens. AuxK has a threshold of
# its own (src/auxk.py).
REPORTED_DEAD_SHARE = 0.1
# What a training may hold fast, as controls (arXiv:2602.14111).
FROZEN = ("decoder", "soft_decoder", "encoder")
LEAST_COSINE = 0.8  # of a soft-frozen decoder's columns with their start


def _identity(x: Tensor) -> Tensor:
    return x


@dataclasses.dataclass(frozen=True)
class BatchInfo:
    """What an SAE is told about the tokens it gets, besides their states.

    The tokens may be a part of a larger batch: batches are divided between processes, and into
    slices where memory is short. The loss terms of all parts add up to the loss of the batch.
    """

    token_keys: Tensor | None = None  # int64 [N], a number of its own for each token of the data
    infer_k: int | None = None  # keep this many latents instead of the trained rule
    theta: float | None = None  # keep latents above this value instead
    batch_tokens: int | None = None  # tokens of the whole batch; None: these are all of it
    token_offset: int = 0  # index in the whole batch of the first token here
    all_sum: Reduction = _identity  # adds over the processes
    all_max: Reduction = _identity  # takes the maximum over them, entry by entry

    @property
    def has_cut(self) -> bool:
        """Whether infer_k or theta replaces the trained rule."""
        return self.infer_k is not None or self.theta is not None

    def cut_only(self) -> BatchInfo:
        """Return the same cut for other tokens."""
        return BatchInfo(infer_k=self.infer_k, theta=self.theta)

    def part(self, tokens: Tensor) -> BatchInfo:
        """Return the same cut for some of the tokens [n], and the keys of those."""
        keys = None if self.token_keys is None else self.token_keys.flatten()[tokens]
        return dataclasses.replace(self.cut_only(), token_keys=keys)

    def cut(self, latents: Tensor) -> Tensor:
        """Apply the cut that was asked for."""
        return apply_inference_cut(latents, self.infer_k, self.theta)

    def keys_of(self, flat: Tensor) -> Tensor:
        """Return the keys of tokens [N,...]; their index in the batch if none were given."""
        if self.token_keys is None:
            return torch.arange(len(flat), device=flat.device)
        return self.token_keys.flatten()

    def share_of_mean(self, x: Tensor) -> Tensor:
        """Return what these tokens add to the mean over the whole batch. [N,...] -> []

        Gradients pass through it.
        """
        if self.batch_tokens is None:
            return x.mean()
        return x.sum() / (self.batch_tokens * x.shape[1:].numel())

    def mean_over_processes(self, x: Tensor) -> Tensor:
        """Return the mean over these tokens in all processes, without gradient. [N,...] -> [...]

        It is nan where there are no tokens.
        """
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        count = x.new_full((1,), len(x))
        # One reduction for the sum and the count: each waits for the slowest process.
        sums = self.all_sum(torch.cat([x.sum(0).flatten(), count]))
        mean = sums[:-1] / sums[-1]
        return mean.view(x.shape[1:])


WHOLE_BATCH = BatchInfo()


@dataclasses.dataclass(frozen=True)
class SAEOutput:
    """One pass through an SAE."""

    target: Tensor  # what x_hat should equal [N,D] or [N,L,D]
    code: Tensor | SparseCode  # of shape [N,F] or [N,L,F]
    x_hat: Tensor  # reconstruction, shape of target
    pre_acts: Tensor | None = None  # before the activation; penalties read it
    weights: Tensor | None = None  # share of each site (routed models) [N,L]
    scale: Tensor | None = None  # what multiplied the routed site's state: p, or 1 [N]
    # what was subtracted from each state before it was coded, where sites differ; shape of target
    pre_bias: Tensor | None = None
    inputs: Tensor | None = None  # the states of all sites (routed models) [N,L,D]

    @cached_property
    def latents(self) -> Tensor:
        """The dense code. [N,F] or [N,L,F]"""
        return dense(self.code)

    @cached_property
    def fired(self) -> Tensor:
        """In how many codes each latent is not 0. int64 [F]"""
        return firings(self.code)

    @property
    def n_codes(self) -> int:
        """Number of codes: N, or N L."""
        return self.code.shape[:-1].numel()

    def replace(self, **changed: Any) -> SAEOutput:
        """Return a copy with other values."""
        return dataclasses.replace(self, **changed)

    @staticmethod
    def cat(outputs: list[SAEOutput]) -> SAEOutput:
        """Return the outputs of consecutive tokens as one."""
        joined = {}
        for field in dataclasses.fields(SAEOutput):
            parts = [getattr(out, field.name) for out in outputs]
            joined[field.name] = None if parts[0] is None else cat_tokens(parts)
        return SAEOutput(**joined)

    def detach_code(self) -> SAEOutput:
        """Return what is read after the backward pass: the code and the routing, without graph.

        target, x_hat, pre_acts and pre_bias are None.
        """
        kept = {}
        for name in ("code", "weights", "scale", "inputs"):
            value = getattr(self, name)
            kept[name] = value.detach() if isinstance(value, Tensor) else value
        return SAEOutput(target=None, x_hat=None, **kept)


class StandardForm(NamedTuple):
    """An SAE at one site in the terms that libraries share.

    It applies ReLU, TopK, JumpReLU or a gate to (input - b_dec) W_enc, and decodes with W_dec.
    """

    architecture: str  # "standard", "topk" (negative values clipped), "jumprelu" or "gated"
    # W_enc [D,F], W_dec [F,D], b_dec [D]; by architecture also b_enc, threshold, b_gate, b_mag,
    # r_mag [F]
    tensors: dict[str, Tensor]
    code: Callable[[Tensor], Tensor]  # the SAE's own code of a standardised state [N,D] -> [N,F]
    k: int | None = None
    caveat: str = ""  # what the standard form leaves out


STANDARD_NAMES = {  # standard name -> our parameter; matrices are transposed
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
    n_layers: int,
    start_layer: int | None = None,
    end_layer: int | None = None,
    sites: list[int] | None = None,
) -> list[int]:
    """Return the sites n//4 ... 3n//4 (4 ... 12 of 16), a range, or the sites that are listed.

    end_layer is exclusive. Raises ValueError for a model that is too shallow, for sites outside
    it, and for a list beside a range.
    """
    if sites:
        if start_layer is not None or end_layer is not None:
            raise ValueError("--sites and --start_layer, --end_layer exclude each other; give one")
        listed = sorted(set(sites))
        if listed[0] < 1 or (n_layers is not None and listed[-1] > n_layers):
            given = " ".join(map(str, sites))
            raise ValueError(f"--sites {given}; sites of this model run from 1 to {n_layers}")
        return listed
    if start_layer is not None and end_layer is not None and not 1 <= start_layer < end_layer:
        given = f"--start_layer {start_layer} --end_layer {end_layer}"
        raise ValueError(f"{given}; sites run from start to before end, and begin at 1")
    if n_layers is None or (n_layers < 4 and (start_layer is None or end_layer is None)):
        needed = "a model over several sites needs a language model of at least 4"
        raise ValueError(f"{n_layers} blocks; {needed}")
    start = n_layers // 4 if start_layer is None else start_layer
    end = 3 * n_layers // 4 + 1 if end_layer is None else end_layer
    if not 1 <= start < end <= n_layers + 1:
        sites = f"routed sites {start} ... {end - 1} of a {n_layers}-block model"
        raise ValueError(f"{sites}; sites run from 1 to {n_layers}")
    return list(range(start, end))


def edited_code(
    code: Tensor,
    strength: Tensor,
    edit: Edit,
    to_code: Callable[[Tensor], Tensor],
) -> Tensor:
    """Apply an edit to a code of this strength; entries that it leaves stay bit-identical."""
    wanted = edit(strength)
    return torch.where(wanted == strength, code, to_code(wanted))


class SAE(nn.Module):
    """Base class of all SAEs. Trainer, evaluator, applier and steerer use only this interface."""

    architecture = ""  # what other programs call it; of a standard form it may differ
    # Each token's state is standardised; "mean": its mean is subtracted; "none": as it is.
    input_norm = "token"
    evaluation_options: tuple[str, ...] = ()  # attributes that an evaluation may change
    k: int | None = None  # latents that the trained rule keeps; None: no fixed number

    def __init__(self, hidden_size: int, latent_size: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        if hidden_size <= 0 or latent_size <= 0:
            sizes = f"hidden_size {hidden_size}, latent_size {latent_size}"
            raise ValueError(f"{sizes}; both must be positive")
        self.hidden_size = hidden_size
        self.latent_size = latent_size
        self.norm_eps = norm_eps
        self.config: dict[str, Any] = {}
        self.register_buffer("tokens_since_fired", torch.zeros(latent_size), persistent=False)
        self.register_buffer("tokens_seen", torch.zeros(()), persistent=False)

    @property
    def name(self) -> str:
        return type(self).__name__

    # ---------------------------------------------------------------- reading and coding

    def sites(self) -> list[int]:
        """Return the residual-stream sites that it reads."""
        raise NotImplementedError

    @property
    def encoders_per_token(self) -> int:
        """Return how many products of a state with an encoder the code of a token takes."""
        return len(self.sites())

    def check_language_model(self, width: int, depth: int) -> None:
        """Raise ValueError if it cannot read a language model of these sizes."""
        last = max(self.sites())
        if self.hidden_size != width or last > depth:
            sizes = f"hidden size {self.hidden_size}, sites up to {last}"
            raise ValueError(
                f"this {self.name} ({sizes}) does not fit the language model "
                f"(hidden size {width}, {depth} blocks)"
            )

    def standardise(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x, mean, std) of raw states, with h = x std + mean.

        [...,D] -> [...,D], [...,1], [...,1]
        """
        if self.input_norm == "none":
            h = h.float()
            first = h[..., :1]
            return h, torch.zeros_like(first), torch.ones_like(first)
        if self.input_norm == "mean":
            h = h.float()
            mean = h.mean(-1, keepdim=True)
            return h - mean, mean, torch.ones_like(mean)
        x, mean, std = pre_process(h, self.norm_eps)
        return x, mean, std + self.norm_eps  # exactly what x has to be multiplied by

    def gather(self, hidden: Mapping[int, Tensor]) -> Tensor:
        """Return its standardised input. {site: [N,D]} -> [N,D] or [N,L,D]"""
        states = [hidden[site] for site in self.sites()]
        if self.input_norm == "token":
            return stack_standardised(states, self.norm_eps)
        return torch.stack([self.standardise(h)[0] for h in states], dim=-2)

    def contribution(self, latents: Tensor) -> Tensor:
        """Return what the latents of a dense code add to the reconstruction: it without biases."""
        raise NotImplementedError

    def autoencode(self, x: Tensor, batch: BatchInfo = WHOLE_BATCH) -> SAEOutput:
        """Code an input of gather() and reconstruct it."""
        raise NotImplementedError

    def autoencode_at(self, index: int, x: Tensor, batch: BatchInfo = WHOLE_BATCH) -> SAEOutput:
        """Code the standardised states of one of its sites, given by its index. [N,D]"""
        return self.autoencode(x, batch)

    def strength(self, out: SAEOutput) -> Tensor | SparseCode:
        """Return the code in units that compare between tokens and models."""
        return out.code

    # ------------------------------------------------------------------------- training

    def penalty(self, out: SAEOutput, batch: BatchInfo = WHOLE_BATCH) -> dict[str, Tensor]:
        """Return the weighted extra terms of the loss, by name."""
        return {}

    def loss(self, out: SAEOutput, batch: BatchInfo = WHOLE_BATCH) -> dict[str, Tensor]:
        """Return the terms that add up to the training loss, over the parts of a batch too."""
        error = batch.share_of_mean(squared_errors(out.target, out.x_hat))
        return {"NormMSE": error, **self.penalty(out, batch)}

    def decoders(self) -> list[nn.Linear]:
        """Return the decoders whose columns are kept at unit norm."""
        return []

    def held(self) -> dict[Tensor, Hold]:
        """Return the weights that are held within a bound, and what brings values back to it."""
        return {}

    def lr_unit(self) -> float:
        """Return the default learning rate of signum, in units of that of most models."""
        return 1.0

    def lr_factors(self) -> dict[Tensor, float]:
        """Return what multiplies the learning rate of signum, of parameters that are no weights."""
        return {}

    def adam_parameters(self) -> list[Tensor]:
        """Return the parameters that are not part of a dictionary.

        They keep the papers' Adam whatever trains the rest.
        """
        return []

    def warm_start(self, x: Tensor) -> None:
        """Initialise from the first tokens of the first batch; every process gets the same."""

    @torch.no_grad()
    def after_step(self, out: SAEOutput, progress: float, batch: BatchInfo = WHOLE_BATCH) -> None:
        """Update counters and schedules; progress is the share of the run that is done.

        Nothing here copies a number from the host, because CUDA would wait for it.
        """
        n_codes = out.fired.new_full((1,), out.n_codes)
        counts = batch.all_sum(torch.cat([out.fired, n_codes]))
        fired = counts[:-1] > 0
        self.tokens_seen += counts[-1]
        self.tokens_since_fired += counts[-1]
        self.tokens_since_fired.masked_fill_(fired, 0)

    def dead_fraction(self) -> float:
        """Return the share of latents that did not fire in the last tenth of all tokens seen."""
        dead = self.tokens_since_fired > REPORTED_DEAD_SHARE * self.tokens_seen
        return float(dead.float().mean())

    def diagnostics(self, out: SAEOutput, batch: BatchInfo = WHOLE_BATCH) -> dict[str, Any]:
        """Return more to log, by name."""
        return {}

    # ------------------------------------------------------------------------- patching

    def patches(
        self,
        hidden: Mapping[int, Tensor],
        batch: BatchInfo = WHOLE_BATCH,
        *,
        edit: Edit | None = None,
        keep_error: bool = True,
        clean: SAEOutput | None = None,
    ) -> Iterator[dict[int, Patch]]:
        """Yield {site: patch} for each run of the language model that measures this SAE.

        A patch replaces the residual by its reconstruction. With `edit` the residual keeps what
        the SAE misses: only the change of the code is decoded and added, so that an edit without
        effect changes no bit. With keep_error=False the decoded edited code replaces everything.

        `clean` is what autoencode gave for `hidden`, if the caller has it; nothing is then
        computed twice.
        """
        options = {"batch": batch, "edit": edit, "keep_error": keep_error}
        for index, site in enumerate(self.sites()):
            known = None
            if clean is not None and edit is None:
                known = clean.x_hat if clean.x_hat.dim() == 2 else clean.x_hat[:, index]
            yield {site: functools.partial(self.substitute, index=index, known=known, **options)}

    def substitute(
        self,
        h: Tensor,
        batch: BatchInfo = WHOLE_BATCH,
        *,
        index: int = 0,
        edit: Edit | None = None,
        keep_error: bool = True,
        known: Tensor | None = None,
    ) -> Tensor:
        """Return what replaces the raw residual h [N,D] of a site; known: its x_hat."""
        x, mean, std = self.standardise(h)
        if known is not None:
            return known * std + mean
        out = self.autoencode_at(index, x, batch)
        if edit is None:
            return out.x_hat * std + mean
        change = self.contribution(edit(out.latents)) - self.contribution(out.latents)
        if keep_error:
            return h + change * std
        return (out.x_hat + change) * std + mean

    # -------------------------------------------------------- questions that stages ask

    def code_sites(self, out: SAEOutput) -> Tensor:
        """Return the site index that each code was read from; -1: from all sites. int64 [codes]

        A model with a code for every (token, site) lists them token by token.
        """
        n_tokens, *sites, _ = out.code.shape
        device = out.target.device if out.target is not None else self.tokens_seen.device
        if sites:
            return torch.arange(*sites, device=device).repeat(n_tokens)
        only = 0 if len(self.sites()) == 1 else -1
        return torch.full((n_tokens,), only, device=device)

    def site_weights(self, out: SAEOutput) -> Tensor | None:
        """Return the router's weight of each site [N,L]; None for a model without a router."""
        return out.weights

    def routing_errors(self, out: SAEOutput, batch: BatchInfo = WHOLE_BATCH) -> Tensor | None:
        """Return each site's error had every token gone there [N,L]; None without a router."""
        return None

    def site_profile(self) -> Tensor | None:
        """Return the decoder norm of each latent at each site [L,F]; None with one decoder."""
        return None

    def site_drive(self, index: int, x: Tensor) -> Tensor | None:
        """Return what the states of one site add to the pre-activations of a code of all sites.

        [N,L,D] -> [N,F]; None for a model whose codes read one state each.
        """
        return None

    def edit_site(self, out: SAEOutput, latents: list[int]) -> int | None:
        """Return the site at which these latents are edited best.

        None if all patches of a run belong together.
        """
        return None

    def to_standard_form(self) -> dict[int, StandardForm]:
        """Return {site: standard form}. Raises ValueError with the reason if there is none."""
        code = f"the code of a {self.name} is read from sites {self.sites()} together"
        raise ValueError(f"{code}; an SAE of one site cannot hold it")


@torch.no_grad()
def centre_(bias: Tensor, x: Tensor, kind: str) -> None:
    """Make a bias the centre of states. [D], [N,D]

    kind: "geom_median", "mean", or "zero", which leaves the bias as it is.
    """
    if kind != "zero":
        x = x[:WARM_START_TOKENS]
        bias.copy_(x.mean(0) if kind == "mean" else geometric_median(x))


@torch.no_grad()
def _begin_here(sae: Dictionary, _keys: Any) -> None:
    """Take the weights of another SAE, now loaded, as the start of a soft-frozen decoder."""
    sae.decoder_start.copy_(sae.decoder.weight)


class Dictionary(SAE):
    """An encoder, a decoder and two biases: the base of TopK, Vanilla, JumpReLU, Gated.

    pre_acts = W_enc (x - b_pre) + b_latent; x_hat = W_dec latents + b_pre. With n_biases, b_pre is
    one of so many: a model that reads states of several sites has one for each of them, and says
    which one belongs to a state (`bias`, of the shape of the states).

    freeze, for controls (arXiv:2602.14111): "decoder" or "encoder" keep the weights of that matrix
    as they are at the start of the training, random or from another SAE; with "soft_decoder" each
    column keeps a cosine of at least .8 with its start. All else trains, biases and thresholds
    too. Raises ValueError for another value.
    """

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        *,
        layer: int = 12,
        n_layers: int | None = None,
        norm_eps: float = 1e-5,
        b_pre_init: str = "geom_median",
        unit_encoder: bool = True,
        input_norm: str = "token",
        n_biases: int | None = None,
        freeze: str | None = None,
    ) -> None:
        super().__init__(hidden_size, latent_size, norm_eps)
        if input_norm not in ("token", "mean", "none"):
            raise ValueError(f"input_norm {input_norm!r}; known are token, mean, none")
        if n_layers is not None and not 1 <= layer <= n_layers:
            where = f"layer {layer} of a {n_layers}-block model"
            raise ValueError(f"{where}; sites run from 1 to {n_layers}")
        self.input_norm = input_norm
        self.layer = layer
        self.b_pre_init = b_pre_init
        shape = (hidden_size,) if n_biases is None else (n_biases, hidden_size)
        self.pre_bias = nn.Parameter(torch.zeros(shape))
        self.latent_bias = nn.Parameter(torch.zeros(latent_size))
        self.encoder = nn.Linear(hidden_size, latent_size, bias=False)
        self.decoder = nn.Linear(latent_size, hidden_size, bias=False)
        with torch.no_grad():
            start = self.encoder.weight
            if unit_encoder:
                start = F.normalize(torch.randn(latent_size, hidden_size), dim=1)
            self.encoder.weight.copy_(start)
            self.decoder.weight.copy_(F.normalize(start, dim=1).T)
        self._freeze(freeze)

    def _freeze(self, part: str | None) -> None:
        if part not in (None, *FROZEN):
            raise ValueError(f"freeze {part!r}; known are {', '.join(FROZEN)}")
        self.encoder.weight.requires_grad_(part != "encoder")
        self.decoder.weight.requires_grad_(part != "decoder")
        self.register_buffer("decoder_start", None, persistent=False)
        if part == "soft_decoder":
            self.decoder_start = self.decoder.weight.detach().clone()
            self.register_load_state_dict_post_hook(_begin_here)

    def sites(self):
        return [self.layer]

    def gather(self, hidden):
        return self.standardise(hidden[self.layer])[0]

    def pre_acts(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return W_enc (x - b_pre) + b_latent. [...,D] -> [...,F]"""
        bias = self.pre_bias if bias is None else bias
        if bias.dim() == 1:
            return linear(x, self.encoder.weight, self.latent_bias, bias)
        return linear(x - bias, self.encoder.weight, self.latent_bias)

    def activate(self, pre_acts: Tensor, batch: BatchInfo = WHOLE_BATCH) -> Tensor:
        """Return the code of pre-activations by the trained rule. [...,F] -> [...,F]"""
        return F.relu(pre_acts)

    def cut_latents(self, pre_acts: Tensor, batch: BatchInfo = WHOLE_BATCH) -> Tensor:
        """Return the code with the cut that was asked for at inference. [...,F] -> [...,F]"""
        return batch.cut(self.activate(pre_acts, batch))

    def get_latents(
        self,
        pre_acts: Tensor,
        infer_k: int | None = None,
        theta: float | None = None,
    ) -> Tensor:
        """Return the dense code of pre-activations, as the reference does. [...,F] -> [...,F]"""
        return self.cut_latents(pre_acts, BatchInfo(infer_k=infer_k, theta=theta))

    def encode(
        self,
        x: Tensor,
        infer_k: int | None = None,
        theta: float | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return the dense code. [...,D] -> [...,F]"""
        return self.get_latents(self.pre_acts(x, bias), infer_k, theta)

    def decode(self, latents: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return W_dec latents + b_pre. [...,F] -> [...,D]"""
        bias = self.pre_bias if bias is None else bias
        if bias.dim() == 1:
            return linear(latents, self.decoder.weight, bias)
        return self.contribution(latents) + bias

    def contribution(self, latents):
        return linear(latents, self.decoder.weight)

    def forward(
        self,
        x: Tensor,
        infer_k: int | None = None,
        theta: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (latents, x_hat), as the reference does."""
        out = self.autoencode(x, BatchInfo(infer_k=infer_k, theta=theta))
        return out.latents, out.x_hat

    def autoencode(self, x, batch=WHOLE_BATCH, bias=None):
        pre_acts = self.pre_acts(x, bias)
        latents = self.cut_latents(pre_acts, batch)
        return SAEOutput(x, latents, self.decode(latents, bias), pre_acts, pre_bias=bias)

    def bias_at(self, index: int) -> Tensor:
        """Return the pre_bias of one of its sites. [D]"""
        return self.pre_bias if self.pre_bias.dim() == 1 else self.pre_bias[index]

    def standard_form_at(self, index: int) -> StandardForm:
        """Return the standard form that it has at one of its sites."""
        state = self.state_dict() | {"pre_bias": self.bias_at(index).detach()}
        tensors = {}
        for standard_name, name in STANDARD_NAMES.items():
            if name in state:
                tensors[standard_name] = state[name].t()  # a vector stays as it is
        code = functools.partial(self.encode, bias=self.bias_at(index))
        return StandardForm(self.architecture, tensors, code, self.k)

    def to_standard_form(self):
        return {site: self.standard_form_at(index) for index, site in enumerate(self.sites())}

    def decoders(self):
        return [self.decoder]

    def held(self):
        if self.decoder_start is None:
            return {}
        hold = functools.partial(hold_cosine_, start=self.decoder_start, least=LEAST_COSINE)
        return {self.decoder.weight: hold}

    @torch.no_grad()
    def warm_start(self, x):
        """Centre the states [N,D], or those of each site [N,L,D] where sites have biases."""
        if self.pre_bias.dim() > 1:
            for bias, states in zip(self.pre_bias, x.unbind(-2), strict=True):
                centre_(bias, states, self.b_pre_init)
        else:
            centre_(self.pre_bias, x.flatten(0, -2), self.b_pre_init)
