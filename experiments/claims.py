"""What the RouteSAE paper says, beside what the figures' JSON holds: each verdict follows from the values by the rule written beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from src.plots import interpolate

PAPER_ROW = 512  # tokens of a sequence there; its KL is a sum over a sequence
LLAMA = {"hidden_size": 2048, "n_layers": 16}  # of Llama-3.2-1B-Instruct, which it measures
NOT_HERE = "not testable here"
FEWEST = 20  # features of the better of two SAEs, for their numbers to be compared
ROUTE, RANDOM, UNTRAINED = "RouteSAE", "RouteSAE, random sites", "RouteSAE, untrained router"

# arXiv:2503.08200 as its prose states its graphs, at L0 48 to 72: NormMSE, KL summed over a sequence, features above 15, score of 1 to 5.
PUBLISHED: dict[str, tuple[str, str, str, str]] = {
    "TopK": (".15", "< 150", "> 3000", "4.0 to 3.7"),
    ROUTE: (".18", "< 150, the lowest", "> 4000", "> 4.4"),
    RANDOM: (".25", "above TopK and RouteSAE", "", ""),
    "Vanilla": (".25", "400 to 350", "> 1000", ""),
    "Gated": (".25", "400 to 350", "> 1000", ""),
    "Crosscoder": (".35", "not measured", "about 200", "3.9"),
}
# The public reproduction (10,000 rows of 512 tokens; single-site models at site 16 of 16, which its KL does not patch): NormMSE, KL of a sequence.
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


class Found:
    """The values of the figures, read off where the models are compared: at L0 = middle."""

    def __init__(self, figures: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
        self.figures, self.about, self.middle = figures, about, about["middle"]
        self.seeds, self.points = about["seeds"], figures["fig4_kl"]["points"]

    def at(
        self, label: str, name: str, seed: int | None = None, l0: float | None = None
    ) -> float | None:
        """A point within 10 % of the L0, else the frontier read off between two; None without either."""
        seed, l0 = self.seeds[0] if seed is None else seed, l0 or self.middle
        mine = sorted(
            (p for p in self.points if p["label"] == label and p["seed"] == seed),
            key=lambda p: p["L0"],
        )
        near = [p for p in mine if abs(p["L0"] / l0 - 1) <= 0.1]
        if near:
            return min(near, key=lambda p: abs(p["L0"] / l0 - 1))[name]
        read = interpolate(mine, l0)
        return None if read is None else read[name]

    def below(self, name: str, low: str, high: Sequence[str]) -> tuple[list[bool], str]:
        """Whether `low` is below every one of `high`, seed by seed; a seed in which one was not trained takes that one's first seed."""
        held, said = [], []
        missing = [label for label in (low, *high) if self.at(label, name) is None]
        if missing:
            return [], f"no L0 near {self.middle:g}: {', '.join(missing)}"
        for seed in self.seeds:
            mine = self.at(low, name, seed)
            others = {label: self.at(label, name, seed) for label in high}
            others = {
                label: self.at(label, name) if value is None else value
                for label, value in others.items()
            }
            if mine is None:
                continue
            held.append(all(mine < value for value in others.values()))
            said.append(
                f"{mine:.3f} against " + ", ".join(f"{value:.3f}" for value in others.values())
            )
        return held, "; ".join(dict.fromkeys(said))

    def read(self, label: str, name: str) -> float | None:
        """Features or score of the SAE whose L0 is nearest; None where that is off by more than half."""
        mine = [p for p in self.figures["fig6_features"]["points"] if p["label"] == label]
        nearest = min(
            mine, key=lambda p: abs(math.log(max(p["L0"], 1e-9) / self.middle)), default=None
        )
        return (
            None
            if nearest is None or not 2 / 3 <= nearest["L0"] / self.middle <= 3 / 2
            else nearest[name]
        )

    def shares(self, label: str, seed: int) -> list[float] | None:
        found = [
            run["share"]
            for run in self.figures["fig9_routing"]["inference"]
            if run["label"] == label and run["seed"] == seed
        ]
        return found[0] if found else None


class Claim(NamedTuple):
    text: str
    rule: str
    test: Callable[
        [Found], tuple[list[bool], str]
    ]  # (whether it held, once a seed; the values); nothing held: not testable


def u(shares: Sequence[float]) -> float:
    """The smaller of the first and last site's shares, less the mean of the middle third: above 0 where the shares form a U, not a slope."""
    third = len(shares) // 3
    middle = shares[third : len(shares) - third]
    return min(shares[0], shares[-1]) - sum(middle) / len(middle)


def _u_shape(found: Found) -> tuple[list[bool], str]:
    held, said = [], []
    for seed in found.seeds:
        trained, untrained = found.shares(ROUTE, seed), found.shares(UNTRAINED, seed)
        if trained and untrained:
            ends = trained[0], trained[-1]
            held.append(min(ends) > 1 / len(trained) and u(trained) > max(0.0, u(untrained)))
            said.append(
                f"U {u(trained):.3f} (ends {ends[0]:.3f}, {ends[1]:.3f}), untrained {u(untrained):.3f}"
            )
    return held, "; ".join(said)


def _more(labels: Sequence[str]) -> Callable[[Found], tuple[list[bool], str]]:
    def test(found: Found) -> tuple[list[bool], str]:
        counts = [found.read(label, "features") for label in labels]
        missing = [label for label, n in zip(labels, counts, strict=True) if n is None]
        if missing:
            return [], f"no L0 near {found.middle:g}: {', '.join(missing)}"
        ratio = f" ({counts[0] / counts[1] - 1:+.1%})" if len(counts) == 2 and counts[1] else ""
        said = ", ".join(f"{label} {n:g}" for label, n in zip(labels, counts, strict=True))
        if max(counts) < FEWEST:
            return [], f"too few to compare, below {FEWEST} ({said})"
        return [all(a > b for a, b in zip(counts, counts[1:], strict=False))], said + ratio

    return test


def _alike(found: Found) -> tuple[list[bool], str]:
    a, b = found.at("Vanilla", "NormMSE"), found.at("Gated", "NormMSE")
    return (
        ([], "no common L0")
        if a is None or b is None
        else ([abs(a / b - 1) <= 0.05], f"{a:.3f} and {b:.3f}")
    )


def _falls(found: Found) -> tuple[list[bool], str]:
    held, said = [], []
    for label in ("Vanilla", "Gated"):
        mine = sorted(
            (p["L0"], p["KLDiv"])
            for p in found.points
            if p["label"] == label and p["seed"] == found.seeds[0]
        )
        if any(
            not 0.5 <= l0 / k <= 2
            for (l0, _), k in zip(mine, sorted(found.about["sweep"]), strict=True)
        ):
            return [], f"L0 of {label} is far from what was asked for: " + ", ".join(
                f"{l0:.2g}" for l0, _ in mine
            )
        held.append(all(a > b for (_, a), (_, b) in zip(mine, mine[1:], strict=False)))
        said.append(f"{label} " + ", ".join(f"{kl:.3f}" for _, kl in mine))
    return [all(held)], "; ".join(said)


def _absolute(found: Found) -> tuple[list[bool], str]:
    if any(found.about[key] != value for key, value in LLAMA.items()):
        return (
            [],
            f"another language model ({found.about['language_model']}, {found.about['n_layers']} blocks of {found.about['hidden_size']})",
        )
    values = [found.at(label, "KLDiv") for label in ("TopK", ROUTE)]
    return (
        ([], "no common L0")
        if None in values
        else ([max(values) < 150 / PAPER_ROW], ", ".join(f"{value:.3f}" for value in values))
    )


def _scores(found: Found) -> tuple[list[bool], str]:
    mine = {label: found.read(label, "score") for label in (ROUTE, "TopK")}
    said = ", ".join(f"{label} {value:.2f}" for label, value in mine.items() if value is not None)
    if found.about["engine"] == "heuristic" or None in mine.values():
        return [], f"labels by rule, no language model ({said})"
    return [mine[ROUTE] > mine["TopK"]], said


def _score_falls(found: Found) -> tuple[list[bool], str]:
    mine = sorted(
        (p["asked"], p["score"])
        for p in found.figures["fig8_scores"]["points"]
        if p["label"] == "TopK" and p["score"] is not None
    )
    said = ", ".join(f"k {k:g}: {score:.2f}" for k, score in mine)
    if found.about["engine"] == "heuristic" or len(mine) < 2:
        return [], f"labels by rule, no language model ({said})"
    return [mine[0][1] > mine[-1][1]], said


def claims_of(found: Found) -> list[Claim]:
    """The paper's claims, then the controls it does not have."""
    sites = [p["label"] for p in found.points if p["label"].startswith("TopK at site")]
    first = min(sites, key=lambda label: int(label.split()[-1]), default="TopK")

    def below(name: str, low: str, *high: str) -> Callable[[Found], tuple[list[bool], str]]:
        return lambda view: view.below(name, low, high)

    def not_here(why: str) -> Callable[[Found], tuple[list[bool], str]]:
        return lambda _: ([], why)

    return [
        Claim(
            "TopK has a lower NormMSE than RouteSAE (Fig. 12)",
            "TopK < RouteSAE",
            below("NormMSE", "TopK", ROUTE),
        ),
        Claim(
            "RouteSAE has a lower NormMSE than random routing (Fig. 12)",
            "RouteSAE < random routing",
            below("NormMSE", ROUTE, RANDOM),
        ),
        Claim(
            "RouteSAE has a lower NormMSE than ReLU and Gated (Fig. 12)",
            "RouteSAE < each",
            below("NormMSE", ROUTE, "Vanilla", "Gated"),
        ),
        Claim(
            "random routing has a lower NormMSE than the Crosscoder (Fig. 12)",
            "random < Crosscoder",
            below("NormMSE", RANDOM, "Crosscoder"),
        ),
        Claim(
            "ReLU has a lower NormMSE than the Crosscoder (Fig. 12)",
            "ReLU < Crosscoder",
            below("NormMSE", "Vanilla", "Crosscoder"),
        ),
        Claim("ReLU and Gated are nearly the same (Figs. 4, 12)", "NormMSE within 5 %", _alike),
        Claim(
            "RouteSAE has a lower KL than TopK (Fig. 4)",
            "RouteSAE < TopK",
            below("KLDiv", ROUTE, "TopK"),
        ),
        Claim(
            "RouteSAE has a lower KL than ReLU and Gated (Fig. 4)",
            "RouteSAE < each",
            below("KLDiv", ROUTE, "Vanilla", "Gated"),
        ),
        Claim(
            "random routing has a higher KL than TopK (Fig. 4)",
            "TopK < random routing",
            below("KLDiv", "TopK", RANDOM),
        ),
        Claim(
            "random routing has a higher KL than RouteSAE (Fig. 4)",
            "RouteSAE < random routing",
            below("KLDiv", ROUTE, RANDOM),
        ),
        Claim(
            "ReLU and Gated have a much higher KL than TopK (Fig. 4)",
            "TopK < each",
            below("KLDiv", "TopK", "Vanilla", "Gated"),
        ),
        Claim("their KL falls as L0 grows (Fig. 4)", "falls from point to point for both", _falls),
        Claim(
            "KL of TopK and RouteSAE is below 150 a sequence, .29 a token (Fig. 4)",
            "both < 150 / 512 on Llama-3.2-1B's shape",
            _absolute,
        ),
        Claim(
            "RouteSAE gives more features than TopK, +22.5 % (Fig. 6)",
            "RouteSAE > TopK",
            _more((ROUTE, "TopK")),
        ),
        Claim(
            "TopK gives more features than ReLU (Fig. 6)", "TopK > ReLU", _more(("TopK", "Vanilla"))
        ),
        Claim(
            "TopK gives more features than Gated (Fig. 6)", "TopK > Gated", _more(("TopK", "Gated"))
        ),
        Claim(
            "the Crosscoder gives the fewest (Fig. 6)",
            "ReLU > Crosscoder",
            _more(("Vanilla", "Crosscoder")),
        ),
        Claim(
            "RouteSAE's features score higher than TopK's, +22.3 % (Fig. 8)",
            "RouteSAE > TopK, scored by a language model",
            _scores,
        ),
        Claim(
            "TopK's score falls as k grows (Fig. 8)",
            "first > last, scored by a language model",
            _score_falls,
        ),
        Claim("people agree with the scores (Fig. 7)", "-", not_here("needs people")),
        Claim(
            "the router's shares form a U over the sites (Fig. 9)",
            "both ends above an equal share; U, the smaller end less the mean of the middle third, > 0 and above untrained",
            _u_shape,
        ),
        Claim(
            "steering with features changes the text as their labels say (Fig. 10)",
            "-",
            not_here("no rule decides it; see fig10_steering.md"),
        ),
        Claim(
            "control: RouteSAE has a lower KL than TopK at the first routed site",
            f"RouteSAE < {first}",
            below("KLDiv", ROUTE, first),
        ),
        Claim(
            "control: RouteSAE has a lower KL than with an untrained router",
            "RouteSAE < untrained",
            below("KLDiv", ROUTE, UNTRAINED),
        ),
    ]


def verdict(held: Sequence[bool]) -> str:
    """Of one truth value a seed."""
    if not held:
        return NOT_HERE
    seeds = f"{sum(held)} of {len(held)} seeds" if len(held) > 1 else "1 seed"
    return (
        f"holds ({seeds})"
        if all(held)
        else f"depends on the seed ({seeds})"
        if any(held)
        else f"does not hold ({seeds})"
    )


def judge(figures: dict[str, dict[str, Any]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a claim: text, rule, held (once a seed), verdict, values."""
    found = Found(figures, about)
    records = []
    for claim in claims_of(found):
        held, said = claim.test(found)
        records.append(
            {
                "claim": claim.text,
                "rule": claim.rule,
                "held": held,
                "verdict": verdict(held),
                "values": said,
            }
        )
    return records


# ------------------------------------------------------------------------------------------------------ as text


def _list(values: Sequence[Any]) -> str:
    return " / ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


def caption(about: dict[str, Any], title: str) -> str:
    """What stands below a figure: how it was made."""
    seeds = " ".join(map(str, about["seeds"]))
    lines = f"{title}. {about['command']}\n{about['language_model']} on {about['data']}; each SAE {_list(about['trained_tokens'])} training tokens, "
    lines += f"measured on {_list(about['evaluated_tokens'])} held-out tokens, contexts from {_list(about['applied_tokens'])}; seeds {seeds}; "
    return (
        lines
        + f"{about['device']}, threads {about['threads']}; trained at commit {', '.join(about['git_commit'])}"
    )


def _paragraph(about: dict[str, Any], title: str) -> str:
    head, rest = caption(about, title).split("\n", 1)
    command = about["command"]
    return f"{head.removesuffix(command)}`{command}`  \n{rest}"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _rows(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(
        lines + ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    )


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def per_token(published: str) -> str:
    """A published KL of a sequence in nats a token: "400 to 350" -> ".78 to .68"."""
    return re.sub(
        r"\d+", lambda number: f"{int(number.group()) / PAPER_ROW:.2f}".removeprefix("0"), published
    )


def table(
    figures: dict[str, dict[str, Any]], verdicts: Sequence[dict[str, Any]], about: dict[str, Any]
) -> str:
    """table.md: values beside the published ones, then the claims."""
    found, middle, rows = Found(figures, about), about["middle"], []
    for label in dict.fromkeys(point["label"] for point in found.points):
        nmse, kl, features = (
            found.at(label, "NormMSE"),
            found.at(label, "KLDiv"),
            found.read(label, "features"),
        )
        paper, again = PUBLISHED.get(label, ("", "", "", "")), REPRODUCED.get(label, (None, None))
        rows.append(
            [
                label,
                paper[0] or "-",
                _number(again[0]),
                _number(nmse),
                paper[1] or "-",
                per_token(paper[1]) or "-",
                _number(again[1] and again[1] / PAPER_ROW, ".3f"),
                _number(kl, ".3f"),
                _number(kl and kl * PAPER_ROW, ".0f"),
                paper[2] or "-",
                "-" if features is None else f"{features:g}",
            ]
        )
    off = [
        p
        for p in found.points
        if p["seed"] == found.seeds[0] and not 2 / 3 <= p["L0"] / p["asked"] <= 3 / 2
    ]
    missed = [f"{p['label']} {p['L0']:.3g} for {p['asked']:g}" for p in off]
    head = [
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
    marks = [
        [record["claim"], record["rule"], record["values"], f"**{record['verdict']}**"]
        for record in verdicts
    ]
    return f"""# The paper's figures, measured here

{_paragraph(about, f"Values at L0 {middle:g}")}

## Values

At L0 {middle:g} (the paper: 48 to 72), first seed; a model without a point within 10 % of it is read off its frontier, linear in log L0,
or has a dash. The paper's KL is a sum over the 512 positions of a sequence, padding included; divided by 512 it is nats a token, as ours.
Features: latents with at least {figures["fig6_features"]["lines"]} contexts whose strength exceeds 15 at hidden size 2,048, at other sizes
15 sqrt(hidden / 2048); of the SAE whose L0 is nearest, if within half; how many depends on the latents there are
(the paper: 16,384) and on the text read. Absolute values of another language
model do not compare; orders may.

{_rows(head, rows)}

The reproduction's single-site models sit at site 16 of 16, after the final norm in training and before it in its KL; its L1 models are nearly dense.
L0 missed by more than half: {", ".join(missed) or "none"}.
KL follows the depth of the patched site: only rows patched at the same sites compare. A Crosscoder's code has read later sites too.

## Claims

At L0 {middle:g}. A claim holds if its rule holds in every seed that was run for it, does not hold if in none; several values are those of the
seeds in order.

{_rows(["claim", "rule", "values here", "verdict"], marks)}
"""


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
    head = [
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
    body = _rows(head, rows) if rows else "No latent had enough contexts above the threshold."
    return f"# {data['title']}\n\n{_paragraph(about, data['title'])}\n\n{body}\n\n{data['note']}\n"
