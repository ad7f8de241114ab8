"""A union of trained SAEs of one site each: every token is coded by the SAE of one site.

It is the control of a shared dictionary: L dictionaries of F/L latents, one a site, have as many
latents as one dictionary of F for all sites. N tokens, L sites, D hidden, F latents of the union.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from src import names
from src.model import TokenRouted
from src.router import Router, normalised, one_hot_argmax
from src.sae import SAE, WHOLE_BATCH, SAEOutput
from src.sparse import SparseCode, active

# What gives a token its site, besides the router of an SAE: its least NormMSE, or a draw.
DRAWN = "random"
WITHOUT_ROUTER = ("oracle", DRAWN)

Opened = tuple[SAE, dict[str, Any]]  # an SAE and its recipe


class Union(TokenRouted):
    """SAEs of one site each, of which each token uses one.

    router: what gives tokens their sites where routing is "hard"; with "random" only its shares
    count, with "oracle" nothing of it. The latents of all members are numbered one after another,
    in the order of the sites.
    """

    evaluation_options = ()

    def __init__(
        self, members: Sequence[SAE], router: Router, routing: str = "hard", seed: int = 42
    ) -> None:
        sizes = [member.latent_size for member in members]
        super().__init__(members[0].hidden_size, sum(sizes), members[0].norm_eps)
        self.input_norm = members[0].input_norm
        self.members = nn.ModuleList(members)
        self.router = router
        self.routed = [site for member in members for site in member.sites()]
        self.routing = routing
        self.seed = seed
        self.first_latents = [sum(sizes[:index]) for index in range(len(sizes))]
        ks = {member.k for member in members}
        self.k = ks.pop() if len(ks) == 1 else None

    def route_weights(self, x, batch):
        """Return 1 at the site that a token is given and 0 elsewhere. [...,L,D] -> [...,L]"""
        return one_hot_argmax(super().route_weights(x, batch))

    def autoencode_at(self, index, x, batch=WHOLE_BATCH):
        out = self.members[index].autoencode(x, batch)
        token, latent, values = active(out.code)
        flat_index = token * self.latent_size + self.first_latents[index] + latent
        code = SparseCode(values, flat_index, torch.Size([*x.shape[:-1], self.latent_size]))
        return SAEOutput(out.target, code, out.x_hat)

    def autoencode(self, x, batch=WHOLE_BATCH):
        """Code each token's state at its site. [N,L,D]"""
        weights = self.route_weights(x, batch)
        site_index = weights.argmax(-1)
        tokens, parts = [], []
        for index in site_index.unique().tolist():
            of_site = (site_index == index).nonzero()[:, 0]
            tokens.append(of_site)
            parts.append(self.autoencode_at(index, x[of_site, index], batch.part(of_site)))
        if not parts:  # no token
            tokens, parts = [site_index], [self.autoencode_at(0, x[:, 0], batch)]
        out = _in_order(SAEOutput.cat(parts), torch.cat(tokens))
        return out.replace(weights=weights, scale=torch.ones_like(weights[..., 0]), inputs=x)

    def contribution(self, latents):
        sizes = [member.latent_size for member in self.members]
        parts = zip(self.members, latents.split(sizes, -1), strict=True)
        return sum(member.contribution(part) for member, part in parts)


def _in_order(out: SAEOutput, place: Tensor) -> SAEOutput:
    """Return the output of tokens in another order: place [N] says where each of them belongs."""
    order = place.argsort()
    token, latent, values = active(out.code)
    token = place[token]
    by_token = token.argsort(stable=True)
    flat_index = (token * out.code.shape[-1] + latent)[by_token]
    code = SparseCode(values[by_token], flat_index, out.code.shape)
    return SAEOutput(out.target[order], code, out.x_hat[order])


# ---------------------------------------------------------------------------------- assembling


def assemble(
    members: Sequence[Opened],
    assign: str,
    by: Opened | None = None,
    *,
    shares: list[float] | None = None,
    seed: int = 42,
) -> tuple[Union, dict[str, Any]]:
    """Return (union, recipe: its title, and of what it was made) of trained SAEs.

    assign: "oracle", "random" (with shares [L], or uniform), or the place of the SAE `by`, whose
    router gives the sites. Raises ValueError for SAEs that cannot be joined.
    """
    members = sorted(members, key=lambda opened: opened[0].sites())
    _check_members(members)
    saes = [sae for sae, _ in members]
    sites = [site for sae in saes for site in sae.sites()]
    routing, router = assign, None
    if by is not None:
        _check_router(by, saes[0], sites, assign)
        routing, router = "hard", by[0].router
    if router is None:
        router = Router(saes[0].hidden_size, len(sites))
        nn.init.zeros_(router.weight)  # unused; a draw would make each union another one
        if assign == DRAWN and shares:
            router.shares = torch.tensor(shares)
            normalised(router.shares, len(sites))  # checks their number
    # The weights are on one device already, and a new router is not.
    union = Union(saes, router, routing, seed).to(saes[0].tokens_seen.device).eval()
    made_of = {"members": [recipe["title"] for _, recipe in members], "assign": assign}
    if by is not None:
        made_of["assign"] = by[1]["title"]
    elif assign == DRAWN:
        made_of |= {"shares": shares, "seed": seed}
    title = _title(members, sites, assign, by, bool(shares))
    return union, {"title": title, "union": made_of}


def _check_members(members: Sequence[Opened]) -> None:
    """Raise ValueError unless these are SAEs of one site each, at sites of their own."""
    holders: dict[int, str] = {}
    first, first_recipe = members[0]
    for sae, recipe in members:
        title = recipe["title"]
        if len(sae.sites()) > 1:
            where = names.sites(sae.sites())
            raise ValueError(f"--union: {title} reads {where}; it joins SAEs of one site each")
        (site,) = sae.sites()
        if site in holders:
            both = f"{holders[site]} and {title}"
            raise ValueError(f"--union: {both} are both at site {site}; name one for each site")
        holders[site] = title
        if _form(sae) != _form(first):
            both = f"{first_recipe['title']} has {_form(first)}, {title} has {_form(sae)}"
            raise ValueError(f"--union: {both}; they must read states of one form")


def _form(sae: SAE) -> str:
    return f"hidden size {sae.hidden_size}, input_norm {sae.input_norm}, norm_eps {sae.norm_eps}"


def _check_router(by: Opened, member: SAE, sites: list[int], assign: str) -> None:
    """Raise ValueError unless the router of an SAE can give tokens these sites."""
    sae, recipe = by
    if not isinstance(sae, TokenRouted) or sae.routing in WITHOUT_ROUTER:
        known = ", ".join(WITHOUT_ROUTER)
        raise ValueError(
            f"--assign {assign}: {recipe['title']} has no trained router; name an SAE that has "
            f"one, or give {known}"
        )
    if sae.sites() != sites:
        there, here = names.sites(sae.sites()), names.sites(sites)
        raise ValueError(
            f"--assign {assign}: its router chooses between {there}, but the SAEs of --union are "
            f"at {here}; they must be the same"
        )
    if _form(sae) != _form(member):
        raise ValueError(
            f"--assign {assign}: its router reads {_form(sae)}, the SAEs of --union {_form(member)}"
        )


def _title(
    members: Sequence[Opened], sites: list[int], assign: str, by: Opened | None, has_shares: bool
) -> str:
    """Return a title such as Union_16x256_TopK_text_sites7-22_oracle."""
    sizes = {sae.latent_size for sae, _ in members}
    size = sizes.pop() if len(sizes) == 1 else "various"
    words, *others = (names.SWEPT.sub("", recipe["title"]).split("_") for _, recipe in members)
    shared = [word for word in words if all(word in other for other in others)]
    how = assign
    if by is not None:
        of_router = names.SWEPT.sub("", by[1]["title"]).split("_")
        own_words = [word for word in of_router if word not in shared]
        how = "-".join(own_words) or "router"
    elif assign == DRAWN and has_shares:
        how = f"{DRAWN}-shares"
    where = f"sites{sites[0]}-{sites[-1]}"
    return "_".join(["Union", f"{len(sites)}x{size}", *shared, where, how])
