"""How a router sends each token to one of L sites, and what it learns from. Functions without state; RouteSAE calls them.

N tokens (any leading dimensions), L sites. weights [N,L] is the router's softmax p over logits a = W v, v the joined states of a token's sites;
errors [N,L] holds e_l, the NormMSE of each site's state had the token gone there, as a constant. W's gradient is the sum over tokens of
(d loss / d a) v^T, so an objective is told by its d loss / d a_j; i is the chosen site, the argmax of p.

published  NormMSE(p_i x_i, SAE(p_i x_i)) alone. With s = p_i, u = x_i, S the active latents, A = W_dec,S W_enc,S and beta all of x_hat that
           does not scale with s, x_hat = s A u + beta and r = s u - x_hat; the loss is |(I - A) u - beta / s|^2 / |u|^2, so that
               d loss / d a_j = s (1[j = i] - p_j) 2 <r, beta> / (s^3 |u|^2).
           Without biases beta = 0: no gradient, whatever the sites. With them p_i is fitted to the biases' size; e_l of the sites not chosen
           never enters.
expected   adds the error the router can expect, sum_l p_l e_l (`expected_error_loss`).
advantage  the same against what each site costs on average (`advantage_loss`): or it learns which site is easy, not which suits the token.
ste        the chosen state enters with weight 1 and p's gradient (`straight_through`), target included.
frozen     nothing: the router stays as it was drawn, but for a shift of its logits where shares are given. A control.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from src.ops import random_integers

Mean = Callable[
    [Tensor], Tensor
]  # over tokens; where the batch is shared out, over all of it or this part's share of that
ROUTINGS = ("hard", "soft", "random", "permuted", "oracle")
OBJECTIVES, BALANCES, SCALES = (
    ("published", "expected", "advantage", "ste", "frozen"),
    ("none", "switch", "bias"),
    ("p", "one", "ste"),
)


def one_hot(site: Tensor, weights: Tensor) -> Tensor:
    """Sites [N] as rows of zeros and a one, like weights [N,L]."""
    return F.one_hot(site, weights.shape[-1]).to(weights.dtype)


def normalised(shares: Tensor, n_sites: int) -> Tensor:
    """Shares that add up to 1, in float64. Raises ValueError for those of another number of sites."""
    if len(shares) != n_sites:
        raise ValueError(f"route_shares has {len(shares)} numbers for {n_sites} routed sites")
    return shares.double() / shares.double().sum()


def sample_sites(keys: Tensor, seed: int, n_sites: int, shares: Tensor | None = None) -> Tensor:
    """A site for each key, uniform or with the shares [L] given: a function of (key, seed) alone. int64 [N] -> [N]"""
    if shares is None:
        return random_integers(keys, seed, n_sites)
    fine = 1 << 53
    ends = (normalised(shares, n_sites).cumsum(0) * fine).round().long()[:-1]
    return torch.searchsorted(ends, random_integers(keys, seed, fine), right=True)


def logit_shifts(logits: Tensor, shares: Tensor, rounds: int = 300) -> Tensor:
    """What to add to each site's logit for its share of argmax choices among these tokens to be the one wanted. [N,L], [L] -> [L]"""
    wanted, shift, least = (
        normalised(shares, logits.shape[-1]),
        torch.zeros_like(logits[0]),
        1 / len(logits),
    )
    for i in range(
        rounds
    ):  # steps shrink: the share of a site jumps where many tokens are about to change it
        shift += (
            (1 - i / rounds)
            * 0.5
            * ((wanted + least) / (load(logits + shift) + least)).log().to(shift.dtype)
        )
    return shift


def shuffled(site: Tensor, keys: Tensor, seed: int) -> Tensor:
    """The same sites dealt to other tokens of the batch, so that the shares stay. [N] -> [N]"""
    return site[random_integers(keys, seed, 2**62).argsort()]


def expected_error_loss(weights: Tensor, errors: Tensor, mean: Mean = torch.mean) -> Tensor:
    """Mean of sum_l p_l e_l. d / d a_j = p_j (e_j - sum_l p_l e_l): away from sites above the token's expected error, towards those below."""
    return mean((weights * errors).sum(-1))


def advantage_loss(
    weights: Tensor, errors: Tensor, mean_site_error: Tensor, mean: Mean = torch.mean
) -> Tensor:
    """expected() of (e_l - E_l) / E_l, E_l [L] the running mean of e_l: towards sites where this token does better than tokens usually do there."""
    return expected_error_loss(
        weights, (errors - mean_site_error) / mean_site_error.clamp_min(1e-12), mean
    )


def straight_through(weights: Tensor) -> Tensor:
    """1 at the argmax, 0 elsewhere, with the gradient of p: d / d a_j = p_j (g_j - sum_l p_l g_l), g_l = <d loss / d routed state, x_l>."""
    return one_hot(weights.argmax(-1), weights) + (weights - weights.detach())


def switch_loss(weights: Tensor, load: Tensor, mean: Mean = torch.mean) -> Tensor:
    """L sum_l load_l mean p_l, 1 where the load is even (Fedus et al. 2021). load [L], the share of tokens of each site, is a constant:
    d / d a_j = L p_j (load_j - sum_l p_l load_l) for each token, over N."""
    return weights.shape[-1] * mean((load * weights).sum(-1))


def load(weights: Tensor, mean: Mean = lambda each: each.mean(0)) -> Tensor:
    """Share of tokens that choose each site. [N,L] -> [L]"""
    return mean(one_hot(weights.argmax(-1), weights).flatten(0, -2))


def entropy(shares: Tensor) -> Tensor:
    """Entropy of distributions over sites, 1 for a uniform one. [...,L] -> [...]"""
    if shares.shape[-1] == 1:
        return torch.zeros_like(shares[..., 0])
    return torch.special.entr(shares).sum(-1) / torch.tensor(float(shares.shape[-1])).log()


def regret(site: Tensor, errors: Tensor) -> Tensor:
    """Error at the chosen site less that at the best. [N], [N,L] -> [N]"""
    return errors.gather(-1, site[..., None])[..., 0] - errors.min(-1).values


def summary(weights: Tensor, errors: Tensor, sampled: Tensor, mean: Mean) -> dict[str, Tensor]:
    """Share of tokens and mean p per site, largest p, entropy of the shares and mean entropy of p (1: uniform); of sampled tokens, whose weights
    are `sampled`, the error of each site, regret (error at the chosen site less that at the best) and how often the two agree."""
    share, site = load(weights, mean), sampled.argmax(-1)
    found = {
        "share": share,
        "mean_p": mean(weights),
        "p_max": mean(weights.max(-1).values),
        "share_entropy": entropy(share),
    }
    found |= {"p_entropy": mean(entropy(weights)), "regret": mean(regret(site, errors))}
    if found["regret"].isnan():  # no token was sampled
        del found["regret"]
        return found
    return found | {"NormMSE_per_site": mean(errors), "agreement": mean(site == errors.argmin(-1))}


def information(counts: Tensor) -> float:
    """Mutual information in nats of the row and the column of a table of counts [V,L]."""
    joint = counts.double() / counts.sum()
    return float(
        torch.special.entr(joint.sum(0)).sum()
        + torch.special.entr(joint.sum(1)).sum()
        - torch.special.entr(joint).sum()
    )
