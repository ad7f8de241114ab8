"""The RouteSAE paper's claims, judged by the values in the figures' JSON.

Each verdict follows from the values by the rule written beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from src.plots import interpolate

PAPER_ROW = 512  # tokens of a sequence in the paper, whose KL is a sum over a sequence
# The shape of Llama-3.2-1B-Instruct, which the paper measures.
LLAMA = {"hidden_size": 2048, "n_layers": 16}
NOT_HERE = "not testable here"
NO_MODEL = "; labels and scores by rule (heuristic engine), not by a language model"
FEWEST = 20  # features that the better of two SAEs must have for a comparison
ROUTE, RANDOM, UNTRAINED = "RouteSAE", "RouteSAE, random sites", "RouteSAE, untrained router"

# What the prose of arXiv:2503.08200 states about its graphs, at L0 48 to 72:
# NormMSE, KL summed over a sequence, features above 15, score of 1 to 5.
PUBLISHED: dict[str, tuple[str, str, str, str]] = {
    "TopK": (".15", "< 150", "> 3000", "4.0 to 3.7"),
    ROUTE: (".18", "< 150, the lowest", "> 4000", "> 4.4"),
    RANDOM: (".25", "above TopK and RouteSAE", "", ""),
    "Vanilla": (".25", "400 to 350", "> 1000", ""),
    "Gated": (".25", "400 to 350", "> 1000", ""),
    "Crosscoder": (".35", "not measured", "about 200", "3.9"),
}
# NormMSE and KL of a sequence in the public reproduction, on 10,000 rows of 512 tokens. Its
# single-site models are at site 16 of 16, which its KL does not patch.
REPRODUCED = {
    "TopK": (0.1937, 371.16),
    ROUTE: (0.2129, 124.58),
    "MLSAE": (0.2510, 232.46),
    "Vanilla": (0.0080, 14.86),
    "Gated": (0.0077, 14.42),
    "JumpReLU": (0.1167, 233.35),
    "Crosscoder": (0.2487, None),
    "RandomK": (0.8638, 3672.05),
}


class Measured:
    """The values of the figures at the L0 at which models are compared (`middle`)."""

    def __init__(self, figures: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
        self.figures, self.about = figures, about
        self.middle, self.seeds = about["middle"], about["seeds"]
        self.points = figures["fig4_kl"]["points"]

    def curve(self, label: str, seed: int) -> list[dict[str, Any]]:
        """Points of an SAE by L0."""
        points = [p for p in self.points if p["label"] == label and p["seed"] == seed]
        return sorted(points, key=lambda p: p["L0"])

    def value(self, label: str, name: str, seed: int | None = None) -> float | None:
        """A metric at the middle L0, by default of the first seed.

        Taken from a point within 10 % of that L0, else interpolated between two; None without
        either.
        """
        curve = self.curve(label, self.seeds[0] if seed is None else seed)

        def distance(point: dict[str, Any]) -> float:
            return abs(point["L0"] / self.middle - 1)

        nearest = min(curve, key=distance, default=None)
        if nearest is not None and distance(nearest) <= 0.1:
            return nearest[name]
        interpolated = interpolate(curve, self.middle)
        return None if interpolated is None else interpolated[name]

    def nearest(self, label: str, name: str) -> float | None:
        """Features or score of the SAE with the nearest L0; None if it is off by more than half."""
        points = [p for p in self.figures["fig6_features"]["points"] if p["label"] == label]

        def distance(point: dict[str, Any]) -> float:
            return abs(math.log(max(point["L0"], 1e-9) / self.middle))

        nearest = min(points, key=distance, default=None)
        if nearest is None or not 2 / 3 <= nearest["L0"] / self.middle <= 3 / 2:
            return None
        return nearest[name]

    def shares(self, label: str, seed: int) -> list[float] | None:
        """Share of tokens that a router sends to each site."""
        for run in self.figures["fig9_routing"]["inference"]:
            if run["label"] == label and run["seed"] == seed:
                return run["share"]
        return None


class Evidence(NamedTuple):
    """Whether a claim's rule holds, once a seed (empty: not testable), and the values as text."""

    holds: list[bool]
    values: str


Test = Callable[[Measured], Evidence]


class Claim(NamedTuple):
    text: str
    rule: str
    test: Test


# ------------------------------------------------------------------------------------------- rules


def lower(name: str, low: str, *high: str) -> Test:
    """Whether the metric of `low` is below that of every one of `high`, seed by seed.

    For an SAE that was not trained with a seed its first seed stands in.
    """

    def test(measured: Measured) -> Evidence:
        missing = [label for label in (low, *high) if measured.value(label, name) is None]
        if missing:
            return Evidence([], f"no L0 near {measured.middle:g}: {', '.join(missing)}")
        holds, texts = [], []
        for seed in measured.seeds:
            value = measured.value(low, name, seed)
            if value is None:
                continue
            others = []
            for label in high:
                other = measured.value(label, name, seed)
                others.append(measured.value(label, name) if other is None else other)
            holds.append(all(value < other for other in others))
            texts.append(f"{value:.3f} against " + ", ".join(f"{other:.3f}" for other in others))
        return Evidence(holds, "; ".join(dict.fromkeys(texts)))

    return test


def more_features(*labels: str) -> Test:
    """Whether each SAE gives more features than the next one."""

    def test(measured: Measured) -> Evidence:
        counts = {label: measured.nearest(label, "features") for label in labels}
        missing = [label for label, n in counts.items() if n is None]
        if missing:
            return Evidence([], f"no L0 near {measured.middle:g}: {', '.join(missing)}")
        text = ", ".join(f"{label} {n:g}" for label, n in counts.items())
        if max(counts.values()) < FEWEST:
            return Evidence([], f"too few to compare, below {FEWEST} ({text})")
        numbers = list(counts.values())
        if len(numbers) == 2 and numbers[1]:
            text += f" ({numbers[0] / numbers[1] - 1:+.1%})"
        return Evidence([all(more > fewer for more, fewer in pairwise(numbers))], text)

    return test


def not_here(why: str) -> Test:
    return lambda _: Evidence([], why)


def u_depth(shares: Sequence[float]) -> float:
    """How far both ends of the shares are above the middle; positive for a U, not for a slope.

    The smaller of the first and the last site's share, less the mean of the middle third.
    """
    third = len(shares) // 3
    middle = shares[third : len(shares) - third]
    return min(shares[0], shares[-1]) - sum(middle) / len(middle)


def forms_a_u(measured: Measured) -> Evidence:
    """Whether training makes the router's shares a U, both ends above an equal share."""
    holds, texts = [], []
    for seed in measured.seeds:
        trained, untrained = measured.shares(ROUTE, seed), measured.shares(UNTRAINED, seed)
        if not trained or not untrained:
            continue
        first, last = trained[0], trained[-1]
        depth, untrained_depth = u_depth(trained), u_depth(untrained)
        high_ends = min(first, last) > 1 / len(trained)
        holds.append(high_ends and depth > max(0.0, untrained_depth))
        ends = f"ends {first:.3f}, {last:.3f}"
        texts.append(f"U {depth:.3f} ({ends}), untrained {untrained_depth:.3f}")
    return Evidence(holds, "; ".join(texts))


def same_error(measured: Measured) -> Evidence:
    """Whether the NormMSE of Vanilla and Gated differs by 5 % at most."""
    vanilla, gated = (measured.value(label, "NormMSE") for label in ("Vanilla", "Gated"))
    if vanilla is None or gated is None:
        return Evidence([], "no common L0")
    return Evidence([abs(vanilla / gated - 1) <= 0.05], f"{vanilla:.3f} and {gated:.3f}")


def kl_falls(measured: Measured) -> Evidence:
    """Whether the KL of Vanilla and Gated falls from point to point as L0 grows."""
    falls, texts = [], []
    for label in ("Vanilla", "Gated"):
        points = measured.curve(label, measured.seeds[0])
        points = sorted((point["L0"], point["KLDiv"]) for point in points)
        targets = sorted(measured.about["sweep"])
        reached = [0.5 <= l0 / target <= 2 for (l0, _), target in zip(points, targets, strict=True)]
        if not all(reached):
            l0s = ", ".join(f"{l0:.2g}" for l0, _ in points)
            return Evidence([], f"L0 of {label} is far from what was asked for: {l0s}")
        kls = [kl for _, kl in points]
        falls.append(all(before > after for before, after in pairwise(kls)))
        texts.append(f"{label} " + ", ".join(f"{kl:.3f}" for kl in kls))
    return Evidence([all(falls)], "; ".join(texts))


def kl_below_150(measured: Measured) -> Evidence:
    """Whether the KL of a sequence is below 150 for TopK and RouteSAE, on the paper's model."""
    about = measured.about
    if any(about[key] != value for key, value in LLAMA.items()):
        shape = f"{about['n_layers']} blocks of {about['hidden_size']}"
        return Evidence([], f"another language model ({about['language_model']}, {shape})")
    values = [measured.value(label, "KLDiv") for label in ("TopK", ROUTE)]
    if None in values:
        return Evidence([], "no common L0")
    return Evidence([max(values) < 150 / PAPER_ROW], ", ".join(f"{v:.3f}" for v in values))


def higher_score(measured: Measured) -> Evidence:
    """Whether a language model scores RouteSAE's features higher than TopK's."""
    scores = {label: measured.nearest(label, "score") for label in (ROUTE, "TopK")}
    known = [f"{label} {score:.2f}" for label, score in scores.items() if score is not None]
    text = ", ".join(known)
    if measured.about["engine"] == "heuristic" or None in scores.values():
        return Evidence([], f"labels by rule, no language model ({text})")
    return Evidence([scores[ROUTE] > scores["TopK"]], text)


def score_falls(measured: Measured) -> Evidence:
    """Whether the score of TopK's features is lower at the largest k than at the smallest."""
    points = [
        (point["asked"], point["score"])
        for point in measured.figures["fig8_scores"]["points"]
        if point["label"] == "TopK" and point["score"] is not None
    ]
    points.sort()
    text = ", ".join(f"k {k:g}: {score:.2f}" for k, score in points)
    if measured.about["engine"] == "heuristic" or len(points) < 2:
        return Evidence([], f"labels by rule, no language model ({text})")
    return Evidence([points[0][1] > points[-1][1]], text)


# ------------------------------------------------------------------------------------------ claims

ERROR_CLAIMS = [
    Claim(
        "TopK has a lower NormMSE than RouteSAE (Fig. 12)",
        "TopK < RouteSAE",
        lower("NormMSE", "TopK", ROUTE),
    ),
    Claim(
        "RouteSAE has a lower NormMSE than random routing (Fig. 12)",
        "RouteSAE < random routing",
        lower("NormMSE", ROUTE, RANDOM),
    ),
    Claim(
        "RouteSAE has a lower NormMSE than ReLU and Gated (Fig. 12)",
        "RouteSAE < each",
        lower("NormMSE", ROUTE, "Vanilla", "Gated"),
    ),
    Claim(
        "random routing has a lower NormMSE than the Crosscoder (Fig. 12)",
        "random < Crosscoder",
        lower("NormMSE", RANDOM, "Crosscoder"),
    ),
    Claim(
        "ReLU has a lower NormMSE than the Crosscoder (Fig. 12)",
        "ReLU < Crosscoder",
        lower("NormMSE", "Vanilla", "Crosscoder"),
    ),
    Claim("ReLU and Gated are nearly the same (Figs. 4, 12)", "NormMSE within 5 %", same_error),
]
KL_CLAIMS = [
    Claim(
        "RouteSAE has a lower KL than TopK (Fig. 4)",
        "RouteSAE < TopK",
        lower("KLDiv", ROUTE, "TopK"),
    ),
    Claim(
        "RouteSAE has a lower KL than ReLU and Gated (Fig. 4)",
        "RouteSAE < each",
        lower("KLDiv", ROUTE, "Vanilla", "Gated"),
    ),
    Claim(
        "random routing has a higher KL than TopK (Fig. 4)",
        "TopK < random routing",
        lower("KLDiv", "TopK", RANDOM),
    ),
    Claim(
        "random routing has a higher KL than RouteSAE (Fig. 4)",
        "RouteSAE < random routing",
        lower("KLDiv", ROUTE, RANDOM),
    ),
    Claim(
        "ReLU and Gated have a much higher KL than TopK (Fig. 4)",
        "TopK < each",
        lower("KLDiv", "TopK", "Vanilla", "Gated"),
    ),
    Claim("their KL falls as L0 grows (Fig. 4)", "falls from point to point for both", kl_falls),
    Claim(
        "KL of TopK and RouteSAE is below 150 a sequence, .29 a token (Fig. 4)",
        "both < 150 / 512 on Llama-3.2-1B's shape",
        kl_below_150,
    ),
]
FEATURE_CLAIMS = [
    Claim(
        "RouteSAE gives more features than TopK, +22.5 % (Fig. 6)",
        "RouteSAE > TopK",
        more_features(ROUTE, "TopK"),
    ),
    Claim(
        "TopK gives more features than ReLU (Fig. 6)",
        "TopK > ReLU",
        more_features("TopK", "Vanilla"),
    ),
    Claim(
        "TopK gives more features than Gated (Fig. 6)",
        "TopK > Gated",
        more_features("TopK", "Gated"),
    ),
    Claim(
        "the Crosscoder gives the fewest (Fig. 6)",
        "ReLU > Crosscoder",
        more_features("Vanilla", "Crosscoder"),
    ),
    Claim(
        "RouteSAE's features score higher than TopK's, +22.3 % (Fig. 8)",
        "RouteSAE > TopK, scored by a language model",
        higher_score,
    ),
    Claim(
        "TopK's score falls as k grows (Fig. 8)",
        "first > last, scored by a language model",
        score_falls,
    ),
    Claim("people agree with the scores (Fig. 7)", "-", not_here("needs people")),
    Claim(
        "the router's shares form a U over the sites (Fig. 9)",
        "both ends above an equal share; U, the smaller end less the mean of the middle third, "
        "> 0 and above untrained",
        forms_a_u,
    ),
    Claim(
        "steering with features changes the text as their labels say (Fig. 10)",
        "-",
        not_here("no rule decides it; see fig10_steering.md"),
    ),
]


def controls(measured: Measured) -> list[Claim]:
    """Controls that the paper does not have."""
    single_sites = [p["label"] for p in measured.points if p["label"].startswith("TopK at site")]
    first = min(single_sites, key=lambda label: int(label.split()[-1]), default="TopK")
    return [
        Claim(
            "control: RouteSAE has a lower KL than TopK at the first routed site",
            f"RouteSAE < {first}",
            lower("KLDiv", ROUTE, first),
        ),
        Claim(
            "control: RouteSAE has a lower KL than with an untrained router",
            "RouteSAE < untrained",
            lower("KLDiv", ROUTE, UNTRAINED),
        ),
    ]


def verdict(holds: Sequence[bool]) -> str:
    """The verdict on a claim, from one truth value a seed."""
    if not holds:
        return NOT_HERE
    seeds = f"{sum(holds)} of {len(holds)} seeds" if len(holds) > 1 else "1 seed"
    if all(holds):
        return f"holds ({seeds})"
    return f"depends on the seed ({seeds})" if any(holds) else f"does not hold ({seeds})"


def judge(figures: dict[str, dict[str, Any]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a claim: text, rule, whether it holds (once a seed), verdict, values."""
    measured = Measured(figures, about)
    records = []
    for claim in [*ERROR_CLAIMS, *KL_CLAIMS, *FEATURE_CLAIMS, *controls(measured)]:
        evidence = claim.test(measured)
        records.append(
            {
                "claim": claim.text,
                "rule": claim.rule,
                "held": evidence.holds,
                "verdict": verdict(evidence.holds),
                "values": evidence.values,
            }
        )
    return records


# ----------------------------------------------------------------------------------------- as text


def _list(values: Sequence[Any]) -> str:
    return " / ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


def caption(about: dict[str, Any], title: str) -> str:
    """How a figure was made, in the lines below it."""
    seeds = " ".join(map(str, about["seeds"]))
    return (
        f"{title}. {about['command']}\n"
        f"{about['language_model']} on {about['data']}; "
        f"each SAE {_list(about['trained_tokens'])} training tokens, "
        f"measured on {_list(about['evaluated_tokens'])} held-out tokens, "
        f"contexts from {_list(about['applied_tokens'])}; seeds {seeds}; "
        f"{about['device']}, threads {about['threads']}; "
        f"trained at commit {', '.join(about['git_commit'])}"
    )


def figure_caption(data: dict[str, Any], about: dict[str, Any]) -> str:
    """The caption of a figure, which says so if no language model wrote its labels."""
    by_rule = "scored_by" in data and about["engine"] == "heuristic"
    return caption(about, data["title"] + (NO_MODEL if by_rule else ""))


def _paragraph(about: dict[str, Any], title: str) -> str:
    """The caption in Markdown."""
    head, rest = caption(about, title).split("\n", 1)
    command = about["command"]
    return f"{head.removesuffix(command)}`{command}`  \n{rest}"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _rows(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def per_token(published: str) -> str:
    """Convert a published KL of a sequence to nats a token: "400 to 350" -> ".78 to .68"."""

    def divide(number: re.Match[str]) -> str:
        return f"{int(number.group()) / PAPER_ROW:.2f}".removeprefix("0")

    return re.sub(r"\d+", divide, published)


def _values_row(measured: Measured, label: str) -> list[str]:
    """Values of an SAE beside the published ones."""
    nmse, kl = measured.value(label, "NormMSE"), measured.value(label, "KLDiv")
    features = measured.nearest(label, "features")
    paper_nmse, paper_kl, paper_features, _ = PUBLISHED.get(label, ("", "", "", ""))
    other_nmse, other_kl = REPRODUCED.get(label, (None, None))
    return [
        label,
        paper_nmse or "-",
        _number(other_nmse),
        _number(nmse),
        paper_kl or "-",
        per_token(paper_kl) or "-",
        _number(other_kl and other_kl / PAPER_ROW, ".3f"),
        _number(kl, ".3f"),
        _number(kl and kl * PAPER_ROW, ".0f"),
        paper_features or "-",
        _number(features, "g"),
    ]


VALUES_HEAD = [
    "SAE",
    "NormMSE, paper",
    "reproduction",
    "**here**",
    "KL a sequence of 512, paper",
    "a token (/ 512)",
    "reproduction, a token",
    "**here, a token**",
    "here x 512",
    "features above 15, paper",
    "**here**",
]


def _missed(measured: Measured) -> str:
    """SAEs of the first seed whose L0 is off by more than half."""
    points = [p for p in measured.points if p["seed"] == measured.seeds[0]]
    missed = [p for p in points if not 2 / 3 <= p["L0"] / p["asked"] <= 3 / 2]
    return ", ".join(f"{p['label']} {p['L0']:.3g} for {p['asked']:g}" for p in missed) or "none"


def table(
    figures: dict[str, dict[str, Any]], verdicts: Sequence[dict[str, Any]], about: dict[str, Any]
) -> str:
    """table.md: values beside the published ones, then the claims."""
    measured, middle = Measured(figures, about), about["middle"]
    labels = dict.fromkeys(point["label"] for point in measured.points)
    rows = [_values_row(measured, label) for label in labels]
    judged = [
        [record["claim"], record["rule"], record["values"], f"**{record['verdict']}**"]
        for record in verdicts
    ]
    return f"""# The paper's figures, measured here

{_paragraph(about, f"Values at L0 {middle:g}")}

## Values

At L0 {middle:g} (the paper: 48 to 72), first seed. A model without a point within 10 % of this L0
is read off its frontier, linearly in log L0, or has a dash. The paper's KL is a sum over the 512
positions of a sequence, padding included; divided by 512 it is nats a token, as ours.

Features are latents with at least {figures["fig6_features"]["lines"]} contexts whose strength
exceeds 15 at hidden size 2,048, or 15 sqrt(hidden / 2048) at other sizes. They are those of the SAE
with the nearest L0, if that is off by less than half. Their number depends on the number of latents
(the paper: 16,384) and on the text that is read. Absolute values of another language model cannot
be compared; orders may.

{_rows(VALUES_HEAD, rows)}

The single-site models of the reproduction are at site 16 of 16: after the final norm in training,
and before it in its KL. Its L1 models are nearly dense.
L0 missed by more than half: {_missed(measured)}.
KL follows the depth of the patched site: compare only rows that are patched at the same sites.
A Crosscoder's code has read later sites too.

## Claims

At L0 {middle:g}. A claim holds if its rule holds in every seed that was run for it, and does not
hold if it holds in none. Several values are those of the seeds in order.

{_rows(["claim", "rule", "values here", "verdict"], judged)}
"""


STEERING_HEAD = [
    "SAE",
    "latent",
    "held at",
    "label",
    "promotes",
    "prompt",
    "as it is",
    "steered",
    "KL, nats a token",
    "perplexity",
]


def steering_table(data: dict[str, Any], about: dict[str, Any]) -> str:
    """fig10_steering.md"""
    rows = [
        [
            row["label"],
            row["latent"],
            row["strength"],
            row["description"],
            ", ".join(repr(word) for word in row["promoted"]),
            row["Human"],
            repr(row["original_output"]),
            repr(row["clamped_output"]),
            f"{row['KL']:.3f}",
            f"{row['perplexity_original']:.1f} -> {row['perplexity_clamped']:.1f}",
        ]
        for row in data["rows"]
    ]
    body = "No latent had enough contexts above the threshold."
    if rows:
        body = _rows(STEERING_HEAD, rows)
    return f"# {data['title']}\n\n{_paragraph(about, data['title'])}\n\n{body}\n\n{data['note']}\n"
