"""Any number of checkpoints measured on the same held-out rows, sharing the language model's clean forward pass."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from src import checkpoint, config, demo, distributed, files, hooks, lm, metrics
from src.data import Batch, Rows, open_rows
from src.sae import SAE, Patch, SAEOutput

OF_THE_MODEL = {"KLDiv", "DeltaCE", "Recovered"}  # need the language model patched


class EvaluatedSAE:
    """One checkpoint and what has been measured of it."""

    def __init__(self, path: str, sae: SAE, recipe: dict[str, Any]) -> None:
        self.path, self.sae, self.recipe, self.title = path, sae, recipe, recipe["title"]
        self.reconstruction, self.activity, self.routing = (
            metrics.Reconstruction(),
            metrics.Activity(),
            metrics.Routing(),
        )
        self.kl: dict[str, metrics.Mean] = {}
        self.ce: dict[str, metrics.Mean] = {}

    def note(self, table: dict[str, metrics.Mean], name: str, values: Tensor) -> None:
        table.setdefault(name, metrics.Mean()).update(values)

    def measured(self) -> dict[str, metrics.Measure]:
        """All of it by name, apart from the SAE."""
        tables = {
            f"{kind} {name}": mean
            for kind in ("kl", "ce")
            for name, mean in getattr(self, kind).items()
        }
        return tables | {
            "reconstruction": self.reconstruction,
            "activity": self.activity,
            "routing": self.routing,
        }

    def merge(self, measured: dict[str, metrics.Measure]) -> None:
        """Adds what another process has measured."""
        for key, theirs in measured.items():
            kind, _, name = key.partition(" ")
            (
                getattr(self, kind).setdefault(name, metrics.Mean())
                if name
                else getattr(self, kind)
            ).merge(theirs)


class LogitComparison:
    """The language model's head over one batch: final states of patched runs wait here, so that those of the clean run go through it once."""

    HELD = 16  # states [N,D] that wait at most

    def __init__(self, model: torch.nn.Module, clean: Tensor, batch: Batch) -> None:
        self.at = torch.zeros_like(batch.mask)
        self.at[:, :-1] = batch.mask[
            :, 1:
        ]  # predictions of counted tokens, from the position before
        self.at &= batch.mask  # made where the residual may be replaced
        self.model, self.clean, self.targets = (
            model,
            clean[self.at],
            batch.input_ids.roll(-1, 1)[self.at],
        )
        self.waiting: list[tuple[list[tuple[EvaluatedSAE, str]], Tensor]] = []

    def add(self, subscribers: list[tuple[EvaluatedSAE, str]], states: Tensor) -> None:
        """states [B,S,D] of one patched run, and whose run of what name it is."""
        self.waiting.append((subscribers, states[self.at]))
        if len(self.waiting) == self.HELD:
            self.measure()

    def measure(self) -> None:
        for start in range(0, len(self.targets), lm.HEAD_CHUNK):
            here = slice(start, start + lm.HEAD_CHUNK)
            clean = metrics.Prediction(
                lm.logits_of(self.model, self.clean[here]), self.targets[here]
            )
            for subscribers, states in self.waiting:
                kl, ce = clean.compare(lm.logits_of(self.model, states[here]))
                for subject, label in subscribers:
                    subject.note(subject.kl, label, kl)
                    subject.note(subject.ce, label, ce)
                    if "/" not in label:
                        subject.note(subject.ce, f"{label}/clean", clean.ce)
        self.waiting = []


class Evaluator:
    """`run()` writes eval/<title>.json per checkpoint, prints a table, and returns a float for one checkpoint and one metric, else a dict."""

    KLDiv = staticmethod(metrics.KLDiv)

    def __init__(self, cfg: Namespace) -> None:
        self.cfg = cfg
        if "all" in cfg.metric:
            cfg.metric = [name for name in config.METRICS if name != "all"]
        self.subjects = [
            EvaluatedSAE(path, *opened)
            for opened, path in zip(
                checkpoint.open_all(cfg), dict.fromkeys(cfg.SAE_path), strict=True
            )
        ]
        for subject in self.subjects:
            self._vary(subject)
        titles = [subject.title for subject in self.subjects]
        twice = next((title for title in titles if titles.count(title) > 1), None)
        if twice:  # results are named by title: one would overwrite the other
            same = ", ".join(subject.path for subject in self.subjects if subject.title == twice)
            raise ValueError(
                f"several checkpoints are called {twice} ({same}); evaluate them apart, with their own --output_dir"
            )
        demo.use_demo_defaults(cfg)
        config.complete(cfg)
        if cfg.split == "train":
            print("warning: evaluating on the training split")

    def _vary(self, subject: EvaluatedSAE) -> None:
        """Options that make this another measurement of the same SAE; they join the title, so that no result replaces another."""
        for name in ("routing", "route_patch"):
            value = getattr(self.cfg, name)
            if name in self.cfg.typed and getattr(subject.sae, name, value) != value:
                setattr(subject.sae, name, value)
                subject.title += f"_{value}"
        for name in ("infer_k", "theta"):
            if getattr(self.cfg, name) is not None:
                subject.title += f"_{name}{getattr(self.cfg, name):g}"

    @torch.no_grad()
    def run(self) -> float | dict[str, dict[str, Any]]:
        cfg = self.cfg
        tokenizer, model = hooks.open_language_model(
            cfg, [subject.sae for subject in self.subjects]
        )
        lm.check_length(model, cfg.max_length)
        rows = distributed.main_first(lambda: open_rows(cfg, tokenizer))
        sites = sorted({site for subject in self.subjects for site in subject.sae.sites()})
        patching = bool(OF_THE_MODEL & set(cfg.metric))
        batches = math.ceil(len(rows) / cfg.batch_size / distributed.world())
        lm.compile_if_it_pays(
            cfg, model, cfg.batch_size, batches * (1 + patching * len(self.subjects))
        )
        checked, tokens = False, 0
        ablations: dict[str, dict[int, Tensor]] = {}  # what takes the place of a site's states
        if "Recovered" in cfg.metric:
            means = self._site_means(model, rows, sites)
            ablations = {
                "zero": {site: torch.zeros_like(mean) for site, mean in means.items()},
                "mean": means,
            }
        mine = rows.batches(
            cfg.batch_size, start=distributed.rank(), every=distributed.world()
        )  # whole batches: each is coded as it would be alone
        for batch in tqdm(mine, "evaluating", batches, unit=" batches", mininterval=1):
            batch = batch.to(cfg.device)
            if not batch.mask.any():
                continue
            checked = checked or (patching and hooks.self_check(model, batch, sites))
            full, final = (
                lm.read_through(model, batch.input_ids, sites)
                if patching
                else (lm.read_sites(model, batch.input_ids, sites), None)
            )
            hidden = {site: state[batch.mask].float() for site, state in full.items()}
            tokens += int(batch.mask.sum())
            head = None if final is None else LogitComparison(model, final, batch)
            whole: dict[tuple[str, int], list[tuple[EvaluatedSAE, str]]] = {}
            for subject in self.subjects:
                p = self._measure_code(subject, hidden, batch)
                if head is not None:
                    self._measure_patched(
                        subject, p, model, batch, full, hidden, ablations, head, whole
                    )
            for (kind, site), subscribers in whole.items():
                head.add(
                    subscribers,
                    hooks.patched_states(
                        model, batch, self._ablated([site], {}, ablations[kind]), full
                    ),
                )
            if head is not None:
                head.measure()
        measured = distributed.to_main(
            (tokens, checked, [subject.measured() for subject in self.subjects]), cfg.device
        )
        return distributed.from_main(lambda: self._conclude(measured, rows, patching))

    def _conclude(
        self,
        parts: list[tuple[int, bool, list[dict[str, metrics.Measure]]]],
        rows: Rows,
        patching: bool,
    ) -> float | dict[str, Any]:
        """Files, table and value of run() from what each process has measured."""
        cfg, tokens, checked = (
            self.cfg,
            sum(part[0] for part in parts),
            any(part[1] for part in parts),
        )
        for _, _, measured in parts[1:]:
            for subject, theirs in zip(self.subjects, measured, strict=True):
                subject.merge(theirs)
        if not tokens or (
            patching
            and not all(
                subject.kl and all(mean.count for mean in subject.kl.values())
                for subject in self.subjects
            )
        ):
            what = "prediction between counted tokens" if tokens else "counted token"
            raise ValueError(
                f"no {what} in the evaluation rows (--max_length {cfg.max_length}); use longer rows or more text"
            )
        if patching and not checked:
            raise ValueError(
                "no evaluation row has a counted token to check the hooks with; use longer rows"
            )
        results = {
            subject.title: self._result(subject, tokens, len(rows), rows.fingerprint)
            for subject in self.subjects
        }
        self._show(results)
        if len(results) == 1 and len(cfg.metric) == 1:
            (result,) = results.values()
            value = result.get(
                cfg.metric[0], result.get(f"{cfg.metric[0]}_mean")
            )  # Recovered: against mean ablation
            if isinstance(value, float):
                return value
        return results

    def _site_means(
        self, model: torch.nn.Module, rows: Rows, sites: list[int]
    ) -> dict[int, Tensor]:
        """Mean raw residual per site over the first rows: what mean ablation puts in place."""
        sums, count = {site: 0.0 for site in sites}, 0
        for batch in rows.batches(self.cfg.batch_size):
            hidden = hooks.read(model, batch.to(self.cfg.device), sites)
            sums = {site: sums[site] + hidden[site].float().sum(0) for site in sites}
            count += len(hidden[sites[0]])
            if count > 20_000:
                break
        return {site: total / count for site, total in sums.items()}

    def _measure_code(
        self, subject: EvaluatedSAE, hidden: dict[int, Tensor], batch: Batch
    ) -> SAEOutput:
        info = hooks.batch_info(self.cfg, batch)
        p = subject.sae.autoencode(subject.sae.gather(hidden), info)
        subject.reconstruction.update(p.target, p.x_hat)
        subject.activity.update(p.code)
        weights = subject.sae.site_weights(p)
        if weights is not None and "Routing" in self.cfg.metric:
            errors = subject.sae.routing_errors(p, info)  # codes the states of all sites
            routed = metrics.squared_errors(p.target, p.x_hat)
            subject.routing.update(weights, errors, routed, batch.input_ids[batch.mask])
        return p

    def _measure_patched(
        self,
        subject: EvaluatedSAE,
        p: SAEOutput,
        model,
        batch: Batch,
        full,
        hidden,
        ablations,
        head: LogitComparison,
        whole,
    ) -> None:
        """Adds to `whole` which ablations it needs of all tokens at one site: these are the same for every SAE there, and are run once."""
        for number, patches in enumerate(
            subject.sae.patches(hidden, hooks.batch_info(self.cfg, batch), clean=p)
        ):
            runs = {f"run_{number}": patches}
            if len(patches) == 1:
                for kind in ablations:
                    whole.setdefault((kind, *patches), []).append((subject, f"run_{number}/{kind}"))
            elif ablations:
                kept = {
                    site: (patch(hidden[site]) == hidden[site]).all(-1, keepdim=True)
                    for site, patch in patches.items()
                }
                runs |= {
                    f"run_{number}/{kind}": self._ablated(patches, kept, put)
                    for kind, put in ablations.items()
                }
            for label, run in runs.items():
                head.add([(subject, label)], hooks.patched_states(model, batch, run, full))

    def _ablated(
        self, sites: Iterable[int], kept: dict[int, Tensor], put: dict[int, Tensor]
    ) -> dict[int, Patch]:
        """The same tokens at the same sites, replaced by put[site]; kept[site] [N,1] says which tokens stay as they are."""
        return {
            site: lambda h, s=site: (
                torch.where(kept[s], h, put[s]) if s in kept else put[s].expand_as(h)
            )
            for site in sites
        }

    def _result(
        self, subject: EvaluatedSAE, tokens: int, n_rows: int, fingerprint: str
    ) -> dict[str, Any]:
        cfg, sae = self.cfg, subject.sae
        found: dict[str, Any] = subject.reconstruction.compute() | subject.activity.compute()
        if subject.routing.chosen.count:
            found["Routing"] = subject.routing.compute() | {"sites": sae.sites()}
        runs = [label for label in subject.kl if "/" not in label]
        if runs:
            kl = [subject.kl[run].compute() for run in runs]
            count = subject.kl[runs[0]].count
            found |= {"KLDiv": sum(kl) / len(kl), "KLDiv_seq": sum(kl) / len(kl) * count / n_rows}
            delta = [
                subject.ce[run].compute() - subject.ce[f"{run}/clean"].compute() for run in runs
            ]
            found |= {
                "DeltaCE": sum(delta) / len(delta),
                "CE_clean": subject.ce[f"{runs[0]}/clean"].compute(),
            }
            if len(runs) > 1:
                found |= {"KLDiv_per_site": kl, "DeltaCE_per_site": delta}
            for kind in ("zero", "mean"):
                if f"{runs[0]}/{kind}" in subject.ce:
                    worse = [
                        subject.ce[f"{run}/{kind}"].compute() - subject.ce[f"{run}/clean"].compute()
                        for run in runs
                    ]
                    found[f"Recovered_{kind}"] = 1 - sum(delta) / sum(worse)
                    found[f"KLDiv_{kind}_ablation"] = sum(
                        subject.kl[f"{run}/{kind}"].compute() for run in runs
                    ) / len(runs)
        norms = sae.site_profile()
        if norms is not None:
            found["decoder_norms_per_site"] = norms.mean(1).tolist()
            found["decoder_norms_per_latent"] = [
                [round(float(norm), 4) for norm in latent] for latent in norms.T.tolist()
            ]  # [F][L]
        target = getattr(sae, "k", None)
        header = {
            "title": subject.title,
            "model": sae.name,
            "sites": sae.sites(),
            "tokens": tokens,
            "rows": n_rows,
            "split": cfg.split,
            "k": target,
            "data_path": str(cfg.data_path),
            "data_fingerprint": fingerprint,
            "model_path": str(cfg.model_path),
            "infer_k": cfg.infer_k,
            "theta": cfg.theta,
            "weights_sum": subject.recipe["weights_sum"],
            "trained_tokens": subject.recipe.get("tokens"),
            "step_tokens_per_s": subject.recipe.get("final", {}).get("step_tokens_per_s"),
        }
        units = {name: unit for name, unit in metrics.UNITS.items() if name in found}
        result = header | found | {"units": units}
        files.save_json(
            result | checkpoint.environment(),
            Path(cfg.output_dir) / files.EVAL_DIR / f"{files.safe_name(subject.title)}.json",
        )
        return result

    def _show(self, results: dict[str, dict[str, Any]]) -> None:
        columns = [
            name for name in metrics.UNITS if any(name in result for result in results.values())
        ]
        wide = max(len(title) for title in results) + 2
        print(" " * wide + "".join(f"{name:>16}" for name in columns))
        for title, result in results.items():
            print(
                f"{title:<{wide}}"
                + "".join(
                    f"{result[name]:>16.4f}"
                    if isinstance(result.get(name), float)
                    else f"{'-':>16}"
                    for name in columns
                )
            )
        for title, routing in (
            (title, result["Routing"]) for title, result in results.items() if "Routing" in result
        ):
            share = ", ".join(
                f"{site}: {share:.2f}"
                for site, share in zip(routing["sites"], routing["share"], strict=True)
            )
            print(
                f"{title}: share of tokens at each site {share}; entropy (1: even) of the shares {routing['share_entropy']:.2f}, "
                f"of a token's p {routing['p_entropy']:.2f}; agreement with the best site {routing['agrees_with_best_site_unscaled']:.2f}"
            )
        print(
            "NormMSE: below 0.1 very good (look at L0), 0.1 to 0.3 good, 0.3 to 0.6 fair, above 0.8 failed. KLDiv: nats per real token."
        )
