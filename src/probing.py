"""Sparse probing: how well few latents tell what a text says of its tokens and of itself.

For each label a logistic regression reads k latents. They are chosen, and it is trained, on one
half of the documents; it is tested on the others (Gurnee et al. 2023, arXiv:2305.01610; SAEBench,
arXiv:2503.09532; sae-probes, arXiv:2502.16681, whose choice of latents is the one here). Beside it
stand a regression on the whole state, which is the ceiling, and one on k random directions of it.

The measure is the area under the ROC curve (AUC): the probability that a token with the label gets
a higher value than one without. Unlike accuracy it needs no threshold, and chance is 0.5 however
rare the label is.

Probes read tokens, and passages (the tokens that one document has in a row), whose code is the
mean over their tokens. A model with a code for every site has the mean over the sites.

N tokens, U units (tokens or passages that are probed), T labels, F latents, D hidden.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from src.contexts import TokenText, text_decoder
from src.data import Batch, Rows
from src.draws import random_integers
from src.metrics import Measure
from src.sparse import SparseCode, active
from src.text_labels import document_labels, token_labels

KS = (1, 2, 5)  # latents of a probe
SEEDS = 3  # divisions of the documents into halves, with other random directions
TOKENS = 8192  # that are probed, about
READ_TOKENS = 2**18  # of the rows from which they are drawn: what labels cost 80 us a token
MIN_PASSAGE = 16  # tokens; shorter passages are left out
MIN_UNITS, MIN_DOCUMENTS = 20, 3  # with the label, and without it, in each half
MAX_VALUES = 4  # of a kind of label, such as the president: the most frequent ones
DOCUMENT_TOKENS = 20_000  # of a document that are read for its labels
QUOTE_TOKENS = 512  # in front of a row, in which a quotation may have begun
SPARSE_C, STATE_C = 1.0, 0.01  # inverse strength of the L2 penalty
MAX_STEPS = 1000
MAX_HALF = 65_504.0  # the largest number of half precision, in which states are kept
SAMPLE_SEED = 29


def require_sklearn() -> None:
    """Raise ValueError if scikit-learn, which fits the probes, is missing."""
    missing = [name for name in ("sklearn", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError("--metric Probing needs scikit-learn; run: pip install scikit-learn")


# ----------------------------------------------------------------------------- units and labels

# label -> whether a unit has it, or which value it has; None where the text does not tell
Labels = dict[str, bool | str | None]


class Units(NamedTuple):
    """The tokens, or the passages, of a batch that are probed."""

    of_token: Tensor  # which unit each counted token belongs to, -1: none. int64 [N]
    keys: list[int]  # a number of its own for each unit of the data. [U]
    documents: list[int]  # [U]
    labels: list[Labels]  # [U]


class Sample:
    """Which tokens and passages of the rows are probed, and what the text says of them."""

    def __init__(self, rows: Rows, tokenizer: Any) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.decode, anchor = text_decoder(tokenizer)
        self.pieces = TokenText.of_few(self.decode, anchor).pieces
        n_rows = min(len(rows), max(1, READ_TOKENS // rows.max_length))
        self.row_share = n_rows / len(rows)
        self.token_share = TOKENS / (n_rows * rows.max_length)
        self._text = functools.lru_cache(8)(self._document_text)
        self._labels = functools.lru_cache(2**14)(self._document_labels)

    def of(self, batch: Batch) -> dict[str, Units]:
        """Return the units of a batch: "tokens" and "passages"."""
        batch = batch.to("cpu")
        row = batch.row[:, None].expand_as(batch.mask)[batch.mask]
        is_read = _drawn(row, self.row_share)
        return {"tokens": self._tokens(batch, is_read), "passages": self._passages(batch, is_read)}

    def _tokens(self, batch: Batch, is_read: Tensor) -> Units:
        keys = batch.token_keys()
        is_unit = is_read & _drawn(keys, self.token_share)
        row, position = batch.mask.nonzero()[is_unit].unbind(1)
        labels: list[Labels] = []
        for i in row.unique().tolist():  # in order, as the tokens are
            of_row = self._row_labels(batch, i)
            labels += [of_row[place] for place in position[row == i].tolist()]
        document = batch.document[batch.mask][is_unit]
        return Units(_numbers(is_unit), keys[is_unit].tolist(), document.tolist(), labels)

    def _row_labels(self, batch: Batch, i: int) -> list[Labels]:
        """Return the labels of all positions of a row; those of padding mean nothing."""
        start = int(self.rows.cuts[int(batch.row[i])])
        before = self.rows.tokens[max(0, start - QUOTE_TOKENS) : start].tolist()
        return token_labels(self.pieces(batch.input_ids[i].tolist()), self.decode(before))

    def _passages(self, batch: Batch, is_read: Tensor) -> Units:
        row = batch.row[:, None].expand_as(batch.mask)[batch.mask]
        pairs = torch.stack([row, batch.document[batch.mask]], 1)[is_read]
        found, of_read, counts = pairs.unique(dim=0, return_inverse=True, return_counts=True)
        is_unit = counts >= min(MIN_PASSAGE, self.rows.max_length // 2)
        of_token = torch.full_like(row, -1)
        of_token[is_read] = _numbers(is_unit)[of_read]
        found = found[is_unit]
        keys = found[:, 0] * len(self.rows.documents) + found[:, 1]
        documents = found[:, 1].tolist()
        return Units(of_token, keys.tolist(), documents, [self._labels(n) for n in documents])

    def _document_text(self, number: int) -> str:
        """Return the beginning of a document; "" where there is none."""
        starts = self.rows.documents
        if not 0 <= number < len(starts):
            return ""
        start = int(starts[number])
        end = int(starts[number + 1]) if number + 1 < len(starts) else len(self.rows.tokens)
        tokens = self.rows.tokens[start : min(end, start + DOCUMENT_TOKENS)]
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def _document_labels(self, number: int) -> Labels:
        return document_labels(self._text(number), [self._text(number - 1), self._text(number + 1)])


def _drawn(keys: Tensor, share: float) -> Tensor:
    """Return a draw of this share of the keys, which depends on each key alone. bool [N]"""
    return random_integers(keys, SAMPLE_SEED, 2**30) < share * 2**30


def _numbers(is_unit: Tensor) -> Tensor:
    """Number what is True from 0; -1 for the rest. bool [N] -> int64 [N]"""
    return torch.where(is_unit, is_unit.cumsum(0) - 1, -1)


# ---------------------------------------------------------------------------------- the measure


class Task(NamedTuple):
    """One question to the units of a kind: which of them have a label."""

    name: str
    units: str  # "tokens" or "passages"
    has_label: np.ndarray  # 1, 0; -1 where it cannot be told. int8 [U]


class Data(NamedTuple):
    """Units of one kind in the order of the text."""

    codes: Any  # CSR [U,F]
    states: np.ndarray  # float32 [U,D]
    documents: np.ndarray  # [U]


class _Codes(Measure):
    """Codes, states and labels of the units of one kind; nothing dense in the latents is kept."""

    def __init__(self) -> None:
        self.codes: list[Any] = []  # scipy's CSR matrices [u,F]
        self.states: list[np.ndarray] = []  # half precision [u,D]
        self.keys: list[int] = []
        self.documents: list[int] = []
        self.labels: list[Labels] = []

    def update(self, code: Tensor | SparseCode, states: Tensor, units: Units) -> None:
        """Take in a batch: code [N,F] or [N,L,F], states [N,D] or [N,L,D]."""
        from scipy.sparse import csr_array

        if not units.keys:
            return
        n_units = len(units.keys)
        of_token = units.of_token.to(states.device)
        is_probed = of_token >= 0
        owner = of_token[is_probed]
        tokens = torch.bincount(owner, minlength=n_units)
        state = states[is_probed].float()
        state = state.reshape(len(owner), -1, state.shape[-1]).mean(1)
        total = state.new_zeros(n_units, state.shape[1]).index_add_(0, owner, state)
        means = (total / tokens[:, None]).clamp(-MAX_HALF, MAX_HALF)
        self.states.append(means.half().cpu().numpy())
        # A code for every site is a row of its own among the rows of its token.
        n_tokens, *sites, width = code.shape
        n_sites = math.prod(sites)
        entry, latent, value = active(code)
        entry_owner = of_token[entry.div(n_sites, rounding_mode="floor")]
        kept = entry_owner >= 0
        entry_owner = entry_owner[kept]
        value = value[kept].float() / (tokens[entry_owner] * n_sites)
        place = (entry_owner.cpu().numpy(), latent[kept].cpu().numpy())
        # Entries at the same place add up.
        self.codes.append(csr_array((value.cpu().numpy(), place), shape=(n_units, width)))
        self.keys += units.keys
        self.documents += units.documents
        self.labels += units.labels

    def in_order(self) -> tuple[Data, list[Labels]]:
        """Return all units in the order of the text, whichever process has read them."""
        from scipy.sparse import vstack

        order = np.argsort(self.keys)
        codes = vstack(self.codes, format="csr")[order]
        states = np.concatenate(self.states)[order].astype(np.float32)
        documents = np.array(self.documents)[order]
        return Data(codes, states, documents), [self.labels[i] for i in order]


class Probing(Measure):
    """Codes of sampled tokens and passages, and the probes that are fitted on them at the end."""

    def __init__(self) -> None:
        self.tokens = _Codes()
        self.passages = _Codes()

    def update(self, code: Tensor | SparseCode, states: Tensor, units: Mapping[str, Units]) -> None:
        """Take in a batch: code [N,F] or [N,L,F], states [N,D] or [N,L,D], what Sample.of gave."""
        for kind, of_kind in units.items():
            getattr(self, kind).update(code, states, of_kind)

    def has_units(self) -> bool:
        return bool(self.tokens.keys or self.passages.keys)

    def compute(self) -> dict[str, Any]:
        """Return the mean AUC over all labels, and what each label gave.

        Probing_noise is the standard deviation of the mean over the divisions of the documents,
        the largest of the numbers of latents. Without a label that can be probed there is no mean.
        """
        data: dict[str, Data] = {}
        tasks: list[Task] = []
        left_out: dict[str, str] = {}
        for kind in ("tokens", "passages"):
            codes: _Codes = getattr(self, kind)
            if not codes.keys:
                continue
            data[kind], labels = codes.in_order()
            added, without = _tasks(kind, labels, data[kind].documents)
            tasks += added
            left_out |= without
        results = _fit_all(tasks, data)
        units = {kind: len(of_kind.documents) for kind, of_kind in data.items()}
        documents = {int(number) for of_kind in data.values() for number in of_kind.documents}
        summary = {"seeds": SEEDS, "documents": len(documents), **units}
        details = summary | {"labels": results, "left_out": left_out}
        return _means(results) | {"Probing": details}


# ------------------------------------------------------------------------------- labels to tasks


def _halves(documents: np.ndarray, seed: int) -> np.ndarray:
    """Return which units train; no document is in both halves. bool [U]"""
    present = np.unique(documents)
    shuffled = np.random.default_rng(seed).permutation(present)
    return np.isin(documents, shuffled[: len(present) // 2])


def _tasks(
    kind: str, labels: list[Labels], documents: np.ndarray
) -> tuple[list[Task], dict[str, str]]:
    """Return the tasks of these labels, and {label: why it is left out}."""
    halves = [_halves(documents, seed) for seed in range(SEEDS)]
    tasks: list[Task] = []
    left_out: dict[str, str] = {}
    for label in labels[0]:
        values = [unit[label] for unit in labels]
        counts = Counter(value for value in values if value is not None)
        asked, rest = _asked(counts)
        if len(counts) < 2:
            left_out[label] = _only_value(counts, kind)
        elif rest:
            name = f"{label}: {', '.join(map(str, rest))}"
            left_out[name] = f"fewer than {2 * MIN_UNITS} {kind} each"
        for value in asked:
            name = label if value is True else f"{label}: {value}"
            has_label = [-1 if other is None else other == value for other in values]
            task = Task(name, kind, np.array(has_label, dtype=np.int8))
            if why := _too_few(task, documents, halves):
                left_out[name] = why
            else:
                tasks.append(task)
    return tasks, left_out


def _only_value(counts: Counter[bool | str], kind: str) -> str:
    """Say what a label is that has no two values."""
    if not counts:
        return "the text does not tell it"
    (value,) = counts
    if value is False:
        return f"none of the {kind}"
    return f"all {kind}" if value is True else f"all {kind} are {value}"


def _asked(counts: Counter[bool | str]) -> tuple[list[bool | str], list[bool | str]]:
    """Return the values of a label to ask for, and those that too few units have.

    Where there are two values, the second is the same question as the first.
    """
    if len(counts) < 2:
        return [], []
    if counts.keys() == {True, False}:
        return [True], []
    often = [value for value, n in counts.most_common(MAX_VALUES) if n >= 2 * MIN_UNITS]
    rest = [value for value, n in counts.items() if n < 2 * MIN_UNITS]
    others = counts.total() - sum(counts[value] for value in often)
    is_one_question = len(often) == 2 and others < 2 * MIN_UNITS
    return often[:1] if is_one_question else often, rest


def _too_few(task: Task, documents: np.ndarray, halves: list[np.ndarray]) -> str:
    """Say why a task cannot be probed; "" if it can."""
    for value, word in ((1, "with"), (0, "without")):
        chosen = task.has_label == value
        for trains in halves:
            for half in (trains, ~trains):
                n_units = int((chosen & half).sum())
                n_documents = len(np.unique(documents[chosen & half]))
                if n_units < MIN_UNITS or n_documents < MIN_DOCUMENTS:
                    return (
                        f"half of the documents has {n_units} {task.units} {word} it, from "
                        f"{n_documents} documents"
                    )
    return ""


# -------------------------------------------------------------------------------- fitting probes


def _fit_all(tasks: list[Task], data: dict[str, Data]) -> dict[str, Any]:
    """Return {name: what the probes of a task gave, one AUC for each seed}."""
    results = {}
    with tqdm(total=len(tasks) * SEEDS, desc="probing", unit=" probes", mininterval=1) as bar:
        for task in tasks:
            seeds = []
            for seed in range(SEEDS):
                seeds.append(_fit(task, data[task.units], seed))
                bar.update()
            latents = seeds[0].pop("latents")
            aucs = {key: [of_seed[key] for of_seed in seeds] for key in seeds[0]}
            known = task.has_label[task.has_label >= 0]
            results[task.name] = {
                "units": task.units,
                "n": len(known),
                "share": float(known.mean()),
                "latents": latents,
                "AUC": aucs,
            }
    return results


def _fit(task: Task, data: Data, seed: int) -> dict[str, Any]:
    """Return the AUC of each probe of one task, and the latents of the largest one."""
    trains = _halves(data.documents, seed)
    known = task.has_label >= 0
    train, test = known & trains, known & ~trains
    y_train, y_test = task.has_label[train] == 1, task.has_label[test] == 1
    order, size = choose_latents(data.codes[train], y_train)
    best = order[: max(KS)]
    latents = data.codes[:, best].toarray() / size[best]
    rng = np.random.default_rng([SEEDS, seed])
    states = data.states - data.states[train].mean(0)
    states /= data.states[train].std(0) + 1e-6
    random = states @ rng.standard_normal((states.shape[1], max(KS)), dtype=np.float32)

    def auc(x: np.ndarray, strength: float = SPARSE_C) -> float:
        return probe_auc(x[train], y_train, x[test], y_test, strength)

    result: dict[str, Any] = {f"k{k}": auc(latents[:, :k]) for k in KS}
    result |= {f"random{k}": auc(random[:, :k]) for k in KS}
    return result | {"state": auc(states, STATE_C), "latents": best.tolist()}


def choose_latents(codes: Any, has_label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the latents in the order in which a sparse probe takes them, and their sizes [F].

    codes: CSR [n,F], has_label: bool [n]. They are ordered by the difference of their means with
    and without the label, in units of their size, which is the mean where they are not 0. These
    are the rule and the units of sae-probes.
    """
    n_active = np.asarray((codes != 0).sum(0)).ravel()
    size = np.asarray(abs(codes).sum(0)).ravel() / np.maximum(n_active, 1)
    size[n_active == 0] = 1
    with_label = np.asarray(codes[has_label].mean(0)).ravel()
    without = np.asarray(codes[~has_label].mean(0)).ravel()
    difference = np.abs(with_label - without) / size
    return np.argsort(-difference, kind="stable"), size


def probe_auc(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    strength: float = SPARSE_C,
) -> float:
    """Return the AUC on the test part of a logistic regression fitted on the training part."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    probe = LogisticRegression(C=strength, max_iter=MAX_STEPS).fit(x_train, y_train)
    return float(roc_auc_score(y_test, probe.decision_function(x_test)))


def _means(results: dict[str, Any]) -> dict[str, float]:
    """Return the mean over the labels of each kind of probe, and the spread over the seeds."""
    if not results:
        return {}
    by_key: dict[str, list[float]] = {}  # a mean over the labels for each seed
    for key in next(iter(results.values()))["AUC"]:
        columns = zip(*(result["AUC"][key] for result in results.values()), strict=True)
        by_key[key] = [statistics.fmean(column) for column in columns]
    means = {f"Probing_k{k}": statistics.fmean(by_key[f"k{k}"]) for k in KS}
    means["Probing_state"] = statistics.fmean(by_key["state"])
    means["Probing_random"] = statistics.fmean(by_key[f"random{max(KS)}"])
    means["Probing_noise"] = max(statistics.stdev(by_key[f"k{k}"]) for k in KS)
    return means


def report(results: Iterable[Mapping[str, Any]], width: int) -> list[str]:
    """Return lines on what was probed, and on what was not and why; of one SAE also each label.

    width: characters of a line.
    """
    results = [result for result in results if "Probing" in result]
    if not results:
        return ["the text is too short: no token and no passage was probed"]
    first = results[0]["Probing"]
    counts = f"{first.get('tokens', 0):,} tokens and {first.get('passages', 0):,} passages"
    about = (
        f"probes of {len(first['labels'])} labels on {counts} of {first['documents']:,} documents: "
        "trained on half of the documents, tested on the others"
    )
    lines = textwrap.wrap(about, width)
    if len(results) == 1 and first["labels"]:
        keys = [*(f"k{k}" for k in KS), "state", f"random{max(KS)}"]
        lines.append(f"{'AUC':<34}" + "".join(f"{key:>9}" for key in keys))
        for name, label in first["labels"].items():
            aucs = [statistics.fmean(label["AUC"][key]) for key in keys]
            name = f"{name} ({label['units']})"
            lines.append(f"  {name:<32}" + "".join(f"{auc:>9.3f}" for auc in aucs))
    left_out = "; ".join(f"{name} ({why})" for name, why in first["left_out"].items())
    return lines + textwrap.wrap(f"left out: {left_out}", width) * bool(left_out)
