"""The router of RouteSAE: it gives each token one of L sites. What it computes and learns from.

N tokens (any leading dimensions), L sites, D hidden. weights [N,L] is the softmax p over logits
a = W v, where v [D] pools the states of a token's sites. errors [N,L] holds e_l, the NormMSE of
each site's state if the token were sent there, as a constant. The gradient of W is the sum over
tokens of (d loss / d a) v^T, so each objective is given by its d loss / d a_j. The chosen site i
is the argmax of p.

published  Only NormMSE(p_i x_i, SAE(p_i x_i)). Write s = p_i and u = x_i. S are the active
           latents and A = W_dec,S W_enc,S. All of x_hat that does not scale with s is beta, so
           x_hat = s A u + beta and r = s u - x_hat. The loss is
           |(I - A) u - beta / s|^2 / |u|^2, so that
               d loss / d a_j = s (1[j = i] - p_j) 2 <r, beta> / (s^3 |u|^2).
           Without biases beta = 0: there is no gradient, whatever the sites. With biases, p_i is
           fitted to their size. The errors of the other sites never enter.
expected   Adds the error that the router can expect, sum_l p_l e_l (expected_error_loss).
advantage  Compares it with what each site costs on average (advantage_loss). Otherwise the
           router learns which site is easy, not which site suits the token.
ste        The chosen state enters with weight 1 and the gradient of p (straight_through), in the
           target too.
frozen     Nothing: the router stays as it was drawn, except for a shift of its logits where
           shares are given. This is a control.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.draws import random_integers

# What these tokens add to a mean over the whole batch, with gradient (BatchInfo.share_of_mean)
Mean = Callable[[Tensor], Tensor]
# The mean over these tokens in all processes, without gradient (BatchInfo.mean_over_processes)
Average = Callable[[Tensor], Tensor]
ROUTINGS = ("hard", "soft", "random", "permuted", "oracle")
LEARNING_ROUTINGS = ("hard", "permuted")  # the others choose no site that could be learned
OBJECTIVES = ("published", "expected", "advantage", "ste", "frozen")
BALANCES = ("none", "switch", "bias")
SCALES = ("p", "one", "ste")
AGGREGATIONS = ("sum", "mean")
BALANCE_COEFFICIENTS = {"none": 0.0, "switch": 0.02, "bias": 1e-3}
ERROR_MEMORY = 0.95  # of the running mean of each site's error
FINE = 1 << 53  # steps into which shares are divided; exact in float64
SHIFT_STEP = 0.5  # first step of logit_shifts; the steps shrink to 0


def check_choice(name: str, value: object, known: tuple) -> None:
    """Raise ValueError for a value that is not known."""
    if value not in known:
        raise ValueError(f"{name} {value!r}; known are {', '.join(map(str, known))}")


# ----------------------------------------------------------------------------- choosing a site


def one_hot(site: Tensor, weights: Tensor) -> Tensor:
    """Return sites [N] as rows of zeros and a one, in the form of weights [N,L]."""
    n_sites = weights.shape[-1]
    return F.one_hot(site, n_sites).to(weights.dtype)


def one_hot_argmax(weights: Tensor) -> Tensor:
    """Return 1 at the largest of each row of weights [N,L] and 0 elsewhere."""
    return one_hot(weights.argmax(-1), weights)


def normalised(shares: Tensor, n_sites: int) -> Tensor:
    """Return shares [L] that add up to 1, in float64. Raises ValueError for another number."""
    if len(shares) != n_sites:
        raise ValueError(f"route_shares has {len(shares)} numbers for {n_sites} routed sites")
    shares = shares.double()
    return shares / shares.sum()


def shuffled(site: Tensor, keys: Tensor, seed: int) -> Tensor:
    """Return the same sites dealt to other tokens, so that the shares stay. [N] -> [N]"""
    order = random_integers(keys, seed, 2**62).argsort()
    return site[order]


def logit_shifts(logits: Tensor, shares: Tensor, rounds: int = 300) -> Tensor:
    """Return what to add to each logit so that the argmax has these shares. [N,L], [L] -> [L]"""
    wanted = normalised(shares, logits.shape[-1])
    shift = torch.zeros_like(logits[0])
    one_token = 1 / len(logits)
    for i in range(rounds):
        share = load(logits + shift)
        ratio = (wanted + one_token) / (share + one_token)
        # Steps shrink, because a share jumps where many tokens are about to change their site.
        step = (1 - i / rounds) * SHIFT_STEP
        shift += step * ratio.log().to(shift.dtype)
    return shift


# ---------------------------------------------------------------------------------- objectives


def expected_error_loss(weights: Tensor, errors: Tensor, mean: Mean = torch.mean) -> Tensor:
    """Return the mean of sum_l p_l e_l.

    d / d a_j = p_j (e_j - sum_l p_l e_l): away from sites above the token's expected error,
    towards those below it.
    """
    return mean((weights * errors).sum(-1))


def advantage_loss(
    weights: Tensor, errors: Tensor, mean_site_error: Tensor, mean: Mean = torch.mean
) -> Tensor:
    """Return expected_error_loss of (e_l - E_l) / E_l; E_l [L] is the running mean of e_l.

    It moves towards sites where this token does better than tokens usually do.
    """
    relative = (errors - mean_site_error) / mean_site_error.clamp_min(1e-12)
    return expected_error_loss(weights, relative, mean)


def straight_through(weights: Tensor) -> Tensor:
    """Return 1 at the argmax and 0 elsewhere, with the gradient of p.

    d / d a_j = p_j (g_j - sum_l p_l g_l), with g_l = <d loss / d routed state, x_l>.
    """
    zero_with_gradient = weights - weights.detach()
    return one_hot_argmax(weights) + zero_with_gradient


def switch_loss(weights: Tensor, load: Tensor, mean: Mean = torch.mean) -> Tensor:
    """Return L sum_l load_l mean p_l, which is 1 where the load is even (Fedus et al. 2021).

    load [L], the share of tokens of each site, is a constant:
    d / d a_j = L p_j (load_j - sum_l p_l load_l) for each token, over N.
    """
    n_sites = weights.shape[-1]
    return n_sites * mean((load * weights).sum(-1))


# ------------------------------------------------------------------------------------ measures


def load(weights: Tensor, mean: Average = lambda rows: rows.mean(0)) -> Tensor:
    """Return the share of tokens that choose each site. [N,L] -> [L]"""
    return mean(one_hot_argmax(weights).flatten(0, -2))


def entropy(shares: Tensor) -> Tensor:
    """Return the entropy of distributions over sites, 1 for a uniform one. [...,L] -> [...]"""
    n_sites = shares.shape[-1]
    if n_sites == 1:
        return torch.zeros_like(shares[..., 0])
    largest = torch.tensor(float(n_sites)).log()
    return torch.special.entr(shares).sum(-1) / largest


def regret(site: Tensor, errors: Tensor) -> Tensor:
    """Return the error at the chosen site minus the error at the best. [N], [N,L] -> [N]"""
    chosen = errors.gather(-1, site[..., None])[..., 0]
    best = errors.min(-1).values
    return chosen - best


def information(counts: Tensor) -> float:
    """Return the mutual information, in nats, of row and column of a table of counts [V,L]."""
    joint = counts.double() / counts.sum()
    of_rows = torch.special.entr(joint.sum(1)).sum()
    of_columns = torch.special.entr(joint.sum(0)).sum()
    of_both = torch.special.entr(joint).sum()
    return float(of_columns + of_rows - of_both)


def summary(
    weights: Tensor,
    errors: Tensor,
    sampled: Tensor,
    mean: Average,
) -> dict[str, Tensor]:
    """Return what is logged of the routing of some tokens.

    Of weights [N,L]: the share of tokens and the mean p of each site, the largest p, and the
    entropies of the shares and of p (1 is uniform). Of sampled tokens, with weights `sampled`
    [n,L] and errors [n,L]: the error of each site, the regret, and how often the chosen site is
    the best one.
    """
    share = load(weights, mean)
    site = sampled.argmax(-1)
    result = {
        "share": share,
        "mean_p": mean(weights),
        "p_max": mean(weights.max(-1).values),
        "share_entropy": entropy(share),
        "p_entropy": mean(entropy(weights)),
        "regret": mean(regret(site, errors)),
    }
    if result["regret"].isnan():  # no token was sampled
        del result["regret"]
        return result
    result["NormMSE_per_site"] = mean(errors)
    result["agreement"] = mean(site == errors.argmin(-1))
    return result


# ---------------------------------------------------------------------------------- the module


class Router(nn.Module):
    """A linear router over L sites. Its public parameter is `weight` [L,D].

    objective: what its gradient comes from (see the module). balance: "switch" adds
    coefficient x switch_loss; "bias" moves a bias of each logit by the coefficient against its
    load, without gradient (Wang et al. 2024; here p feels the bias too). shares: with a frozen
    router, the logits are shifted once so that its choices have these shares.
    """

    def __init__(
        self,
        hidden_size: int,
        n_sites: int,
        *,
        objective: str = "published",
        balance: str = "none",
        balance_coefficient: float | None = None,
        aggre: str = "sum",
        shares: list[float] | None = None,
        keep_bias: bool = False,
    ) -> None:
        super().__init__()
        check_choice("aggre", aggre, AGGREGATIONS)
        check_choice("router_objective", objective, OBJECTIVES)
        check_choice("router_balance", balance, BALANCES)
        if balance_coefficient is None:
            balance_coefficient = BALANCE_COEFFICIENTS[balance]
        self.objective = objective
        self.balance = balance
        self.balance_coefficient = balance_coefficient
        self.aggre = aggre
        self.shares = torch.tensor(shares) if shares else None
        weight = nn.Linear(hidden_size, n_sites, bias=False).weight
        self.weight = weight.requires_grad_(objective != "frozen")
        self.register_buffer("load_bias", torch.zeros(n_sites), persistent=keep_bias)
        site_error = torch.full((n_sites,), float("nan"))  # running mean of each site's error
        self.register_buffer("site_error", site_error, persistent=False)

    @property
    def n_sites(self) -> int:
        return len(self.weight)

    @property
    def needs_errors(self) -> bool:
        """Whether the objective compares the errors of all sites."""
        return self.objective in ("expected", "advantage")

    def forward(self, x: Tensor, aggre: str | None = None) -> Tensor:
        """Return the softmax over sites of the routed states' sum or mean. [...,L,D] -> [...,L]"""
        aggre = self.aggre if aggre is None else aggre
        check_choice("aggre", aggre, AGGREGATIONS)
        pooled = x.sum(-2) if aggre == "sum" else x.mean(-2)
        logits = F.linear(pooled, self.weight) + self.load_bias
        return logits.softmax(-1)

    def sample(self, keys: Tensor, seed: int) -> Tensor:
        """Draw a site index for each key, uniformly or with the shares. int64 [N] -> [N]

        It is a function of (key, seed) alone.
        """
        if self.shares is None:
            return random_integers(keys, seed, self.n_sites)
        shares = normalised(self.shares.to(keys.device), self.n_sites)
        ends = (shares.cumsum(0) * FINE).round().long()
        drawn = random_integers(keys, seed, FINE)
        return torch.searchsorted(ends[:-1], drawn, right=True)

    def error_loss(
        self,
        weights: Tensor,
        errors: Tensor,
        count: int,
        average: Average,
    ) -> Tensor:
        """Return the objective over sampled tokens; `count` is their number in the whole batch.

        weights, errors [n,L]. Also updates the running mean of each site's error.
        """
        self._update_site_error(average(errors))

        def mean(values: Tensor) -> Tensor:
            return values.sum() / count

        if self.objective == "advantage":
            return advantage_loss(weights, errors, self.site_error, mean)
        return expected_error_loss(weights, errors, mean)

    def _update_site_error(self, mean_error: Tensor) -> None:
        """Take the mean error of each site in a batch into the running mean. [L]"""
        old = self.site_error
        decayed = ERROR_MEMORY * old + (1 - ERROR_MEMORY) * mean_error
        new = torch.where(old.isnan(), mean_error, decayed)
        # A slice of the batch may have no sampled token; its mean is nan.
        old.copy_(torch.where(mean_error.isnan(), old, new))

    def balance_loss(self, weights: Tensor, mean: Mean, average: Average) -> Tensor | None:
        """Return the weighted switch loss; None if the load is balanced in another way."""
        if self.balance != "switch" or not self.balance_coefficient:
            return None
        share = load(weights, average)
        return self.balance_coefficient * switch_loss(weights, share, mean)

    @torch.no_grad()
    def fit_shares(self, x: Tensor) -> None:
        """Shift the logits so that the choices among these tokens have the shares. x [N,L,D]"""
        logits = self(x).clamp_min(1e-30).log()
        shares = self.shares.to(x.device)
        self.load_bias.copy_(logit_shifts(logits, shares))

    @torch.no_grad()
    def update_bias(self, weights: Tensor, average: Average) -> None:
        """Move each logit's bias against its load, if that is how the load is balanced."""
        if self.balance == "bias":
            excess = 1 / self.n_sites - load(weights, average)
            self.load_bias += self.balance_coefficient * excess.sign()
