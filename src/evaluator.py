"""Any number of SAEs measured on the same rows; they share the clean pass of the language model.

B rows, S positions, D hidden, L sites, N counted tokens, P predictions of counted tokens.
"""

from __future__ import annotations

import itertools
import math
import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from src import (
    checkpoint,
    config,
    demo,
    device,
    distributed,
    estimate,
    files,
    hooks,
    identity,
    lm,
    metric_table,
    metrics,
    probing,
    result_table,
    union,
)
from src.data import Batch, Rows
from src.estimate import Estimate
from src.ops import squared_errors
from src.sae import SAE, BatchInfo, Patch, SAEOutput

ABLATION_TOKENS = 20_000  # the mean state of a site is taken over at least this many
ABLATIONS = ("zero", "mean")  # what replaces a state
LOGIT_COPIES = 7  # logits of two runs, their logarithms, p, and two products of them
HELD_OUT = config.STAGE_SPLIT["evaluate"]  # results of other splits have its name in their title
# What two results must share for one to take the place of the other.
# Of what reading a batch takes, while patched runs need their logits (docs/LOG.md).
HELD_WHILE_PATCHED = 1 / 3
SAME_TEXT = ("model_path", "split", "data_path", "infer_k", "theta", "union")
SAME_ROWS = (*SAME_TEXT, "data_fingerprint", "max_length", "rows", "tokens", "language_model")

Result = dict[str, Any]  # the JSON of one evaluation
Subscriber = tuple[metrics.PatchedRuns, metrics.Run]  # who takes in a run, and as which


class EvaluatedSAE:
    """One checkpoint and its measures."""

    def __init__(self, path: str, sae: SAE, recipe: dict[str, Any]) -> None:
        self.path = path
        self.sae = sae
        self.recipe = recipe
        self.title = recipe["title"]
        self.code = [measure() for measure in metrics.CODE_MEASURES]
        self.routing = metrics.Routing()
        self.patched_runs = metrics.PatchedRuns()
        self.probing = probing.Probing()

    def measures(self) -> list[metrics.Measure]:
        """Return all measures, in a fixed order."""
        return [*self.code, self.routing, self.patched_runs, self.probing]

    def merge(self, measures: list[metrics.Measure]) -> None:
        """Add the measures of another process."""
        for local, other in zip(self.measures(), measures, strict=True):
            local.merge(other)

    def results(self, n_rows: int) -> Result:
        """Return all metrics that were measured, by key."""
        result: Result = {}
        for measure in self.code:
            result |= measure.compute()
        if self.routing.chosen.count:
            result["Routing"] = self.routing.compute() | {"sites": self.sae.sites()}
        if self.patched_runs.has_predictions():
            result |= self.patched_runs.compute(n_rows)
        if self.probing.has_units():
            result |= self.probing.compute()
        profile = self.sae.site_profile()
        if profile is not None:
            result["decoder_norms_per_site"] = profile.mean(1).tolist()
            result["decoder_norms_per_latent"] = [
                [round(norm, 4) for norm in norms] for norms in profile.T.tolist()
            ]
        if names := [name for name, value in result.items() if not files.is_finite(value)]:
            raise ValueError(
                f"{self.title}: {', '.join(names)} cannot be computed in float32: its weights, or "
                "the states that it reads, are too large"
            )
        return result


def _open_subjects(cfg: Namespace) -> list[EvaluatedSAE]:
    """Return what is measured: the SAEs of --SAE_path and the unions of those of --union.

    Raises ValueError for SAEs that cannot be used.
    """
    measured, members, assigns = cfg.SAE_path, cfg.union or [], cfg.assign or []
    if assigns and not members:
        raise ValueError("--assign gives tokens to the SAEs of --union; name these too")
    routers = [assign for assign in assigns if assign not in union.WITHOUT_ROUTER]
    if members:
        measured = measured or []
        cfg.SAE_path = [*measured, *members, *routers]
    opened = checkpoint.open_all(cfg)  # fills in SAE_path
    by_path = dict(zip(dict.fromkeys(cfg.SAE_path), opened, strict=True))
    paths = cfg.SAE_path if measured is None else measured
    subjects = [EvaluatedSAE(path, *by_path[path]) for path in dict.fromkeys(paths)]
    shares = cfg.route_shares if "route_shares" in cfg.typed else None
    for assign in dict.fromkeys(assigns or union.WITHOUT_ROUTER) if members else []:
        joined, recipe = union.assemble(
            [by_path[path] for path in dict.fromkeys(members)],
            assign,
            by_path.get(assign),
            shares=shares,
            seed=cfg.seed,
        )
        recipe["weights_sum"] = checkpoint.weights_sum(joined)
        subjects.append(EvaluatedSAE(recipe["title"], joined, recipe))
        print(f"{recipe['title']}: {joined.encoders_per_token} encoders a token")
    return subjects


class LogitComparison:
    """Compares the predictions of patched runs over one batch with those of the clean run.

    Patched runs wait until several are there, so that the language model's head computes the
    clean logits once for all of them.
    """

    MAX_WAITING = 16  # runs whose final states are kept

    def __init__(self, model: nn.Module, final_states: Tensor, batch: Batch) -> None:
        self.model = model
        self.predicts = hooks.predictions(batch.mask)
        self.clean_states = final_states[self.predicts]
        self.targets = batch.input_ids.roll(-1, 1)[self.predicts]
        self.waiting: list[tuple[list[Subscriber], Tensor]] = []

    def add(self, subscribers: list[Subscriber], final_states: Tensor) -> None:
        """Take in the final states [B,S,D] of one patched run."""
        self.waiting.append((subscribers, final_states[self.predicts]))
        if len(self.waiting) == self.MAX_WAITING:
            self.measure()

    def measure(self) -> None:
        """Measure the runs that wait."""
        for start in range(0, len(self.targets), lm.HEAD_CHUNK):
            chunk = slice(start, start + lm.HEAD_CHUNK)
            logits = lm.logits_of(self.model, self.clean_states[chunk])
            clean = metrics.Prediction(logits, self.targets[chunk])
            for subscribers, states in self.waiting:
                kl, ce = clean.compare(lm.logits_of(self.model, states[chunk]))
                for patched_runs, run in subscribers:
                    patched_runs.update(run, kl, ce, clean.ce)
        self.waiting = []


class PatchedBatch:
    """One batch, over which the language model runs with the patches of every SAE.

    ablations: {kind: {site: state [D]}}, what replaces the states of a site.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        sites: list[int],
        ablations: dict[str, dict[int, Tensor]],
    ) -> None:
        self.model = model
        self.batch = batch
        self.ablations = ablations
        self.states, final_states = lm.read_through(model, batch.input_ids, sites)
        self.comparison = LogitComparison(model, final_states, batch)
        self.site_ablations: dict[tuple[str, int], list[Subscriber]] = {}

    def measure(
        self, subject: EvaluatedSAE, hidden: dict[int, Tensor], out: SAEOutput, info: BatchInfo
    ) -> None:
        """Run the patches of one SAE, and what has to be ablated to compare with each."""
        patch_sets = subject.sae.patches(hidden, info, clean=out)
        for index, patches in enumerate(patch_sets):
            self._run([(subject.patched_runs, metrics.Run(index))], patches)
            # A patch of one site is compared with the ablation of all its tokens. That is the
            # same for every SAE at this site, and is run once.
            shared_site = next(iter(patches)) if len(patches) == 1 else None
            for kind, replacements in self.ablations.items():
                subscriber = (subject.patched_runs, metrics.Run(index, kind))
                if shared_site is not None:
                    key = (kind, shared_site)
                    self.site_ablations.setdefault(key, []).append(subscriber)
                else:
                    self._run([subscriber], _ablate_same_tokens(patches, hidden, replacements))

    def finish(self) -> None:
        """Run the ablations that several SAEs share, and measure all runs that wait."""
        for (kind, site), subscribers in self.site_ablations.items():
            self._run(subscribers, {site: _ablation(self.ablations[kind][site])})
        self.comparison.measure()

    def _run(self, subscribers: list[Subscriber], patches: dict[int, Patch]) -> None:
        final_states = hooks.patched_states(self.model, self.batch, patches, self.states)
        self.comparison.add(subscribers, final_states)


def _ablation(replacement: Tensor, kept: Tensor | None = None) -> Patch:
    """Return the patch that puts a state [D] in the place of every token but those kept [N,1]."""

    def patch(h: Tensor) -> Tensor:
        ablated = replacement.expand_as(h)
        return ablated if kept is None else torch.where(kept, h, ablated)

    return patch


def _ablate_same_tokens(
    patches: dict[int, Patch], hidden: dict[int, Tensor], replacements: dict[int, Tensor]
) -> dict[int, Patch]:
    """Return the patches that ablate, at each site, the tokens that these patches change."""
    result = {}
    for site, patch in patches.items():
        kept = (patch(hidden[site]) == hidden[site]).all(-1, keepdim=True)
        result[site] = _ablation(replacements[site], kept)
    return result


class Evaluator:
    """Measures checkpoints on the rows of one split."""

    KLDiv = staticmethod(metrics.KLDiv)

    def __init__(self, cfg: Namespace) -> None:
        self.cfg = cfg
        if "all" in cfg.metric:
            cfg.metric = list(dict.fromkeys([*metric_table.ALL, *cfg.metric]))
            cfg.metric.remove("all")
        needs = metric_table.needs(cfg.metric)
        self.with_routing = metric_table.ROUTING in needs
        self.with_ablations = metric_table.ABLATED in needs
        self.with_patches = self.with_ablations or metric_table.PATCHED in needs
        self.with_probing = metric_table.PROBED in needs
        if self.with_probing:
            probing.require_sklearn()
        self.sample: probing.Sample | None = None
        self.subjects = _open_subjects(cfg)
        for subject in self.subjects:
            self._vary(subject)
        self._check_titles()
        demo.use_demo_defaults(cfg)
        config.complete(cfg)
        if cfg.split != HELD_OUT:
            for subject in self.subjects:
                subject.title += f"_{cfg.split}"
        if cfg.split == "train":
            print("warning: evaluating on the training split")

    def _vary(self, subject: EvaluatedSAE) -> None:
        """Apply the options that make this another measurement of the same SAE.

        They join the title, so that no result replaces another.
        """
        cfg = self.cfg
        for name in subject.sae.evaluation_options:
            value = getattr(cfg, name)
            if name in cfg.typed and getattr(subject.sae, name) != value:
                setattr(subject.sae, name, value)
                subject.title += f"_{value}"
        for name in ("infer_k", "theta"):
            if getattr(cfg, name) is not None:
                subject.title += f"_{name}{config.short_number(getattr(cfg, name))}"

    def _check_titles(self) -> None:
        """Raise ValueError if two SAEs have one title: it names the file of the result."""
        paths: dict[str, list[str]] = {}
        for subject in self.subjects:
            paths.setdefault(subject.title, []).append(subject.path)
        for title, same in paths.items():
            if len(same) > 1:
                raise ValueError(
                    f"several checkpoints are called {title} ({', '.join(same)}); "
                    "evaluate each of them with its own --output_dir"
                )

    @torch.no_grad()
    def run(self) -> float | dict[str, Result]:
        """Measure all SAEs, write eval/<title>.json for each, and print a table.

        Returns a number for one checkpoint and one metric, else {title: result}. Raises
        ValueError if the rows have no token or no prediction that counts.
        """
        cfg = self.cfg
        saes = [subject.sae for subject in self.subjects]
        opened = [(subject.sae, subject.recipe) for subject in self.subjects]
        tokenizer, model = hooks.open_language_model(cfg, opened)
        self.language_model = identity.of_language_model(model)
        lm.check_length(model, cfg.max_length)
        rows = demo.open_rows(cfg, tokenizer)
        sites = sorted({site for sae in saes for site in sae.sites()})
        n_batches = math.ceil(len(rows) / cfg.batch_size / distributed.world())
        passes = n_batches * (1 + self.with_patches * len(saes))
        lm.compile_if_it_pays(cfg, model, cfg.batch_size, passes)
        expected = self._announce(model, rows, sites)
        started = time.perf_counter()
        self.sample = probing.Sample(rows, tokenizer) if self.with_probing else None
        # Processes share whole batches: each is coded as it would be by one process.
        batches = rows.batches(cfg.batch_size, start=distributed.rank(), every=distributed.world())
        ablations = self._ablations(model, rows, sites) if self.with_ablations else {}
        shown = tqdm(batches, "evaluating", n_batches, unit=" batches", mininterval=1)
        n_tokens = self._measure_all(model, shown, sites, ablations)
        expected.compare(time.perf_counter() - started)
        measures = [subject.measures() for subject in self.subjects]
        parts = distributed.to_main((n_tokens, measures), cfg.device)
        return distributed.from_main(lambda: self._conclude(parts, rows))

    def _measure_all(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        sites: list[int],
        ablations: dict[str, dict[int, Tensor]],
    ) -> int:
        """Measure every batch; return how many tokens were counted."""
        n_tokens = 0
        checked = False
        for batch in batches:
            batch = batch.to(self.cfg.device)
            if not batch.mask.any():
                continue
            if self.with_patches and not checked:
                checked = hooks.self_check(model, batch, sites)
            n_tokens += int(batch.mask.sum())
            self._measure_batch(model, batch, sites, ablations)
            device.limit_freed_memory()
        return n_tokens

    def _announce(self, model: nn.Module, rows: Rows, sites: list[int]) -> Estimate:
        """Print what the evaluation will need, from trials on a few of its rows."""
        starts = {id(subject): [min(subject.sae.sites())] for subject in self.subjects}

        def time_rows(n: int) -> float:
            started = time.perf_counter()
            batch = rows.batch(list(range(n))).to(self.cfg.device)
            states = lm.read_sites(model, batch.input_ids, sites)
            hidden = {site: state[batch.mask].float() for site, state in states.items()}
            info = hooks.batch_info(self.cfg, batch)
            for subject in self.subjects if batch.mask.any() else []:
                out = subject.sae.autoencode(subject.sae.gather(hidden), info)
                patch_sets = subject.sae.patches(hidden, info, clean=out)
                starts[id(subject)] = [min(patches) for patches in patch_sets]
            device.wait(self.cfg.device)
            return time.perf_counter() - started

        needs: dict[str, float] = {}
        if self.with_patches:
            needs["patched runs"] = self._patched_bytes(model, rows)

        def patched_seconds(seconds: float) -> float:
            """Time of the blocks above the patched sites, from that of the blocks up to a site."""
            depth = len(lm.blocks(model))
            runs = [start for of_one in starts.values() for start in of_one]
            if self.with_ablations:
                runs *= 1 + len(ABLATIONS)
            n_blocks = depth - max(sites) + sum(depth - start for start in runs)
            return seconds * n_blocks / max(sites) if self.with_patches else 0.0

        return estimate.of_reading(
            self.cfg, rows, time_rows, needs, patched_seconds, HELD_WHILE_PATCHED
        )

    def _patched_bytes(self, model: nn.Module, rows: Rows) -> float:
        """Bytes of the final states that wait, and of the logits of a chunk with their products."""
        tokens = min(self.cfg.batch_size, len(rows)) * rows.max_length
        n_words = lm.n_logits(model)
        states = (LogitComparison.MAX_WAITING + 1) * lm.text_config(model).hidden_size
        element = next(model.parameters()).element_size()
        return tokens * states * element + 4 * LOGIT_COPIES * n_words * min(tokens, lm.HEAD_CHUNK)

    def _ablations(
        self, model: nn.Module, rows: Rows, sites: list[int]
    ) -> dict[str, dict[int, Tensor]]:
        """Return what replaces the states of a site: zeros, or their mean over the first rows."""
        sums = {site: 0.0 for site in sites}
        count = 0
        for batch in rows.batches(self.cfg.batch_size):
            hidden = hooks.read(model, batch.to(self.cfg.device), sites)
            for site in sites:
                sums[site] = sums[site] + hidden[site].float().sum(0)
            count += len(hidden[sites[0]])
            if count > ABLATION_TOKENS:
                break
        means = {site: total / count for site, total in sums.items()}
        zeros = {site: torch.zeros_like(mean) for site, mean in means.items()}
        return dict(zip(ABLATIONS, (zeros, means), strict=True))

    def _measure_batch(
        self,
        model: nn.Module,
        batch: Batch,
        sites: list[int],
        ablations: dict[str, dict[int, Tensor]],
    ) -> None:
        patched = PatchedBatch(model, batch, sites, ablations) if self.with_patches else None
        states = patched.states if patched else lm.read_sites(model, batch.input_ids, sites)
        hidden = {site: state[batch.mask].float() for site, state in states.items()}
        hooks.check_finite(hidden, model)
        info = hooks.batch_info(self.cfg, batch)
        units = self.sample.of(batch) if self.sample else {}
        for subject in self.subjects:
            out = subject.sae.autoencode(subject.sae.gather(hidden), info)
            for measure in subject.code:
                measure.update(out)
            if self.sample:
                subject.probing.update(subject.sae.strength(out), out.target, units)
            if self.with_routing:
                self._measure_routing(subject, out, info, batch)
            if patched:
                patched.measure(subject, hidden, out, info)
        if patched:
            patched.finish()

    def _measure_routing(
        self, subject: EvaluatedSAE, out: SAEOutput, info: BatchInfo, batch: Batch
    ) -> None:
        weights = subject.sae.site_weights(out)
        if weights is None:
            return
        errors = subject.sae.routing_errors(out, info)
        error = squared_errors(out.target, out.x_hat)
        subject.routing.update(weights, errors, error, batch.input_ids[batch.mask])

    def _conclude(
        self, parts: list[tuple[int, list[list[metrics.Measure]]]], rows: Rows
    ) -> float | dict[str, Result]:
        """Write the files, print the table and return the value of run().

        parts: (number of tokens, measures of each SAE) of each process.
        """
        for _, measures in parts[1:]:
            for subject, others in zip(self.subjects, measures, strict=True):
                subject.merge(others)
        n_tokens = sum(part[0] for part in parts)
        self._check_counts(n_tokens)
        results = {}
        for subject in self.subjects:
            result = _save(self._result(subject, n_tokens, rows), self.cfg.output_dir)
            results[result["title"]] = result
        print(f"{n_tokens:,} tokens of split {self.cfg.split} of {self.cfg.data_path}")
        width = result_table.line_width()
        print("\n".join(result_table.lines(list(results.values()), self.cfg.metric, width)))
        if self.with_probing:
            print("\n".join(probing.report(results.values(), width)))
        saved = ", ".join(f"{files.safe_name(title)}.json" for title in results)
        print(f"results in {Path(self.cfg.output_dir) / files.EVAL_DIR}: {saved}")
        if len(results) == 1 and len(self.cfg.metric) == 1:
            (result,) = results.values()
            value = result.get(metric_table.headline(self.cfg.metric[0]))
            if isinstance(value, float):
                return value
        return results

    def _check_counts(self, n_tokens: int) -> None:
        """Raise ValueError if there was nothing to measure."""
        predicts = all(subject.patched_runs.has_predictions() for subject in self.subjects)
        if n_tokens > 1 and (predicts or not self.with_patches):
            return
        if n_tokens == 1:
            raise ValueError(
                "only one token counts in the evaluation rows, and one has no variance to compare "
                "errors with; use more text"
            )
        missing = "prediction between counted tokens" if n_tokens else "counted token"
        raise ValueError(
            f"no {missing} in the evaluation rows (--max_length {self.cfg.max_length}); "
            "use longer rows or more text"
        )

    def _result(self, subject: EvaluatedSAE, n_tokens: int, rows: Rows) -> Result:
        """Return the result of one SAE: what was measured, how, and in which units."""
        cfg = self.cfg
        sae = subject.sae
        recipe = subject.recipe
        header = {
            "title": subject.title,
            "sae": recipe["title"],
            "model": sae.name,
            "sites": sae.sites(),
            "tokens": n_tokens,
            "rows": len(rows),
            "split": cfg.split,
            "k": sae.k,
            "encoders_per_token": sae.encoders_per_token,
            "union": recipe.get("union"),
            "data_path": str(cfg.data_path),
            "data_fingerprint": rows.fingerprint,
            "max_length": cfg.max_length,
            "model_path": str(cfg.model_path),
            "language_model": self.language_model,
            "infer_k": cfg.infer_k,
            "theta": cfg.theta,
            "weights_sum": recipe["weights_sum"],
            "trained_tokens": recipe.get("tokens"),
            "step_tokens_per_s": recipe.get("final", {}).get("step_tokens_per_s"),
        }
        measured = subject.results(len(rows))
        return header | measured | {"units": metric_table.units(measured)}


def _save(result: Result, output_dir: str) -> Result:
    """Write a result to its file; return it with the title that it got there.

    Metrics that were measured before on the same rows are kept in the file. A result of other
    text, of another language model, of fewer tokens or of fewer metrics than the one that has
    the name gets a name of its own.
    """
    folder = Path(output_dir) / files.EVAL_DIR
    title = result["title"]
    own_model = files.data_name(Path(result["model_path"]).resolve())
    name, numbers = title, itertools.count(2)
    with files.turn(folder):
        while True:
            path = folder / f"{files.safe_name(name)}.json"
            earlier = _earlier_result(path)
            if _may_replace(result, earlier):
                break
            other_model = files.data_name(Path(earlier.get("model_path") or own_model).resolve())
            is_of_another = name == title and other_model != own_model
            name = f"{title}_{own_model if is_of_another else next(numbers)}"
        if name != title:
            print(f"{title}.json holds another measurement, which stays; this one is in {path}")
        result = result | {"title": name}
        kept = earlier if identity.agrees(result, earlier, SAME_ROWS) else {}
        units = kept.get("units", {}) | result["units"]
        files.save_json(kept | result | {"units": units} | checkpoint.environment(), path)
    return result


def _earlier_result(path: Path) -> Result:
    """Return the result that a file holds; nothing if it is a link, damaged or of another kind."""
    if path.is_symlink() or not path.exists():
        return {}
    try:
        earlier = files.load_json(path)
    except files.Unusable as error:
        print(f"warning: {error}; it is replaced")
        return {}
    is_result = (
        isinstance(earlier, dict)
        and isinstance(earlier.get("tokens"), int)
        and isinstance(earlier.get("units"), dict)
    )
    return earlier if is_result else {}


def _may_replace(result: Result, earlier: Result) -> bool:
    """Whether nothing is lost when a result takes the place of an earlier one."""
    if earlier.get("sae", result["sae"]) != result["sae"]:
        return False  # another SAE, whose own name ends like that of this result
    # Metrics of the same rows are kept.
    no_less = () if identity.agrees(result, earlier, SAME_ROWS) else ("tokens", "units")
    return identity.may_replace(result, earlier, SAME_TEXT, no_less)
