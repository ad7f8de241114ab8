"""The figures of the RouteSAE paper (arXiv:2503.08200): `bash scripts/paper_figures.sh`.

They can be made for any language model and text. The stages do the work, as their commands would.
What each gave is kept as JSON under OUTPUT_DIR/figures/steps, and a step whose JSON was made with
the same settings is not repeated. Figures and verdicts are made from that JSON alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import claims, exit_code
from experiments.figures import PAPER
from src import config, files

# Thresholds are in the paper's units: 15 there is 15 sqrt(d / 2048) at another hidden size d.
PAPER_WIDTH = 2048
THRESHOLDS = (5, 10, 15, 20)  # at these the labels are scored
MAIN_THRESHOLD = 15
GRID = tuple(range(5, 41))  # at these the features are counted
# No contexts are made of a control, and of a model that differs from TopK only by its batches.
NOT_APPLIED = ("RandomK", "BatchTopK")
RECORDED = files.ROOT / "docs" / "figures"  # the demo's results are copied to it
LINES = 4  # contexts a feature needs, apply's default
# Of a context, what labelling reads.
READ_COLUMNS = ("tokens", "position", "token_activations", "token_class")
STEERED = ("TopK", "RouteSAE")
STEERING_SHARE = 0.75  # of a latent's largest strength
PROMPTS = ("Returns the number of", "The reason for this is")
STRENGTH_UNIT = "strength x sqrt(2048 / hidden size)"
SAE_KEYS = ("title", "label", "model", "seed", "sites", "asked")
STEERING_NOTE = (
    "Latents: best-scored label, then most whole words among the promoted tokens, then strongest; "
    "held at three quarters of the largest strength seen, on every token, greedy. "
    "KL: of the steered next-token distributions along the unsteered text."
)

Row = dict[str, Any]  # one SAE: what it is and what was measured


class Scale(NamedTuple):
    """How much of everything. The numbers of the stages are tokens."""

    train: int
    evaluate: int
    apply: int
    sweep: tuple[int, ...]  # k of the k-sparse models, target L0 of the others
    middle: int  # the one of the sweep at which models are compared
    # The first seed trains everything; the others train, at the middle, what the claims compare.
    seeds: tuple[int, ...]
    # Rows of a training step and tokens of a row; None: train.py's own. To steer L0 takes more
    # than a hundred steps, so a small scale needs small steps.
    rows: tuple[int, int] | None
    shown: int  # tokens of context on each side
    steered: int  # latents of each SAE
    written: int  # tokens of each steered text


SCALES = {
    "smoke": Scale(10_000, 2_000, 2_000, (4, 8), 8, (42, 43), (8, 32), 8, 1, 6),
    "demo": Scale(250_000, 20_000, 30_000, (8, 16, 32), 16, (42, 43, 44), (8, 256), 16, 3, 24),
    "paper": Scale(
        100_000_000, 10_000_000, 10_000_000, (48, 56, 64, 72), 64, (42, 43, 44), None, 64, 5, 60
    ),
}


class Group(NamedTuple):
    """SAEs of one train.py call."""

    name: str
    seed: int
    argv: list[str]
    variant: str = ""  # follows the model's name in labels; {layer} is the SAE's site


class Figures:
    """All steps, in order; `run()` returns the verdicts."""

    def __init__(self, args: argparse.Namespace, extra: list[str]) -> None:
        self.args = args
        self.scale = SCALES[args.scale]
        self.seeds = args.seeds or list(self.scale.seeds)
        self.out = Path(args.output_dir)
        self.folder = self.out / "figures"
        rows = self.scale.rows
        row_options = ["--batch_size", str(rows[0]), "--max_length", str(rows[1])] if rows else []
        self.train_options = [*row_options, *extra]
        self.options = ["--output_dir", str(self.out)]  # of every stage
        for name in ("model_path", "device"):
            if getattr(args, name):
                self.options += [f"--{name}", getattr(args, name)]
        self.text_options = list(self.options)  # of the stages that read text
        if args.data_path:
            self.text_options += ["--data_path", args.data_path]
        self.done = self.made = self.total_steps = 0
        self.commands: list[str] = []
        self.started = time.monotonic()

    # ------------------------------------------------------------------------------------- steps

    def step(self, name: str, settings: dict[str, Any], work: Callable[[], Any]) -> Any:
        """Return work()'s result, or that in the step's JSON if its settings are the same."""
        path = self.folder / "steps" / f"{files.safe_name(name)}.json"
        settings = json.loads(json.dumps(settings))  # as they come back from the file
        self.done += 1
        heading = f"[{self.done}/{self.total_steps}] {name}"
        if path.exists():
            saved = files.load_json(path)
            if saved["settings"] == settings:
                self.commands += saved["commands"]
                print(f"{heading}: already there ({path})")
                return saved["result"]
        started = time.monotonic()
        print(f"{heading} ({started - self.started:.0f} s so far)", flush=True)
        n_commands = len(self.commands)
        result = work()
        self.made += 1
        record = {
            "settings": settings,
            "commands": self.commands[n_commands:],
            "seconds": round(time.monotonic() - started, 1),
            "result": result,
        }
        files.save_json(record, path, indent=None)
        return json.loads(json.dumps(result))

    def stage(self, program: str, argv: list[str], use: Callable[[Any], Any]) -> Any:
        """Return use(cfg), with cfg as `python PROGRAM.py ARGV` has it.

        If the stage fails, this program ends with its exit code.
        """
        results: list[Any] = []
        command = shlex.join(["python", f"{program}.py", *argv])
        self.commands.append(command.replace(str(self.out), "$OUTPUT_DIR"))
        code = config.run_stage(program, lambda cfg: results.append(use(cfg)), argv)
        if code:
            raise SystemExit(code)
        return results[0]

    # ------------------------------------------------------------------------ train and evaluate

    def groups(self) -> list[Group]:
        """Every train.py call but the one that has to know the routed sites."""
        sweep = [str(k) for k in self.scale.sweep]
        middle = str(self.scale.middle)
        routed = ["--model", "RouteSAE"]
        # The paper's router, whatever is this program's default.
        published = ["--router_objective", "published", "--router_balance", "none"]
        frozen = ["--router_objective", "frozen", "--router_balance", "none"]
        frozen_label = ", untrained router"
        first_seed, *other_seeds = self.seeds
        k_sparse = ["--model", "TopK", "RouteSAE", "MLSAE", "BatchTopK", "RandomK"]
        penalised = ["--model", "Vanilla", "Gated", "JumpReLU", "--target_l0", *sweep]
        random_sites = [*routed, "--routing", "random", "--k", *sweep]
        crosscoder = ["--model", "Crosscoder", "--target_l0", *sweep]
        groups = [
            Group("zoo", first_seed, [*k_sparse, "--k", *sweep, *published]),
            Group("random", first_seed, random_sites, ", random sites"),
            Group("frozen", first_seed, [*routed, *frozen, "--k", *sweep], frozen_label),
            Group("penalised", first_seed, penalised),
            Group("crosscoder", first_seed, crosscoder),
        ]
        for seed in other_seeds:
            compared = ["--model", "TopK", "RouteSAE", "--k", middle, *published]
            groups.append(Group("zoo", seed, compared))
            groups.append(Group("frozen", seed, [*routed, *frozen, "--k", middle], frozen_label))
        return groups

    def train(self, group: Group) -> dict[str, Any]:
        """{"saes": what was trained, "history": routing in training, by title}"""
        tag = f"fig-{group.name}-s{group.seed}"
        budget = ["--max_tokens", str(self.scale.train), "--seed", str(group.seed), "--tag", tag]
        argv = [*group.argv, *budget, *self.text_options, *self.train_options]

        def work() -> dict[str, Any]:
            from src.trainer import Trainer

            def use(cfg: Any) -> Any:
                trainer = Trainer(cfg)
                trainer.run()
                return trainer

            trainer = self.stage("train", argv, use)
            paths = [trainer.folder / f"{title}.pt" for title in trainer.titles]
            return {
                "saes": [describe_sae(path, group) for path in paths],
                "history": routing_history(trainer.log),
            }

        return self.step(f"train {group.name} seed {group.seed}", {"argv": argv}, work)

    def evaluate(self, group: Group, trained: dict[str, Any]) -> list[Row]:
        """One row for each SAE of a group."""
        saes = trained["saes"]
        metrics = ["NormMSE", "KLDiv", "L0", "Dead", "Routing"]
        argv = ["--SAE_path", *(sae["path"] for sae in saes), "--metric", *metrics]
        argv += ["--max_tokens", str(self.scale.evaluate), *self.text_options]
        measured = ["L0", "NormMSE", "KLDiv", "KLDiv_seq", "DeltaCE", "Dead", "FVU", "Routing"]

        def work() -> list[Row]:
            from src.evaluator import Evaluator

            results = self.stage("evaluate", argv, lambda cfg: Evaluator(cfg).run())
            rows = []
            for sae in saes:
                result = results[sae["title"]]
                keys = [key for key in (*measured, "tokens", "rows") if key in result]
                rows.append(sae | {key: result[key] for key in keys})
            return rows

        name = f"evaluate {group.name} seed {group.seed}"
        return self.step(name, {"argv": argv, "of": saes}, work)

    # --------------------------------------------------------------------------- apply and label

    def reads(self, model: str, seed: int) -> bool:
        """Whether contexts of this SAE are made."""
        return seed == self.seeds[0] and model not in NOT_APPLIED

    def read(self, sae: Row) -> dict[str, Any]:
        """{"contexts": path, "tokens", "features"}: features are counted at each of GRID."""
        unit = threshold_unit(sae)
        lowest = f"{GRID[0] * unit:.4f}"
        argv = ["--SAE_path", sae["path"], "--act_threshold", lowest]
        argv += ["--context_length", str(self.scale.shown)]
        argv += ["--max_tokens", str(self.scale.apply), *self.text_options]

        def work() -> dict[str, Any]:
            from src.applier import Applier

            _, path = self.stage("apply", argv, lambda cfg: Applier(cfg).run())
            contexts = files.load_json(path)
            return {
                "contexts": str(path),
                "tokens": contexts["tokens"],
                "features": [count(contexts, threshold * unit) for threshold in GRID],
            }

        return self.step(f"apply {sae['title']}", {"argv": argv, "of": sae}, work)

    def label(self, sae: Row, read: dict[str, Any], threshold: float) -> dict[str, Any]:
        """Summary of the labels of the contexts above a threshold (in the paper's units)."""
        title = f"{sae['title']}_t{threshold:g}"
        path = self.out / files.CONTEXT_DIR / f"{title}_contexts.json"
        labels_path = self.out / files.INTERPRET_DIR / f"interp_{title}.json"
        argv = [str(path), "--engine", self.args.engine]
        argv += ["--sample_latents", str(self.args.sample_latents), "--output_dir", str(self.out)]
        argv += ["--api_base", self.args.api_base] if self.args.api_base else []

        def work() -> dict[str, Any]:
            from src.interpreter import Interpreter

            contexts = above(files.load_json(read["contexts"]), threshold * threshold_unit(sae))
            summary = {
                "engine": self.args.engine,
                "features": len(contexts["latent_context_map"]),
                "scored": 0,
                "score": None,
                "labelled": 0.0,
            }
            if not summary["features"]:
                return summary
            files.save_json(contexts, path, indent=None)
            self.stage("interpret", argv, lambda cfg: Interpreter(cfg).run())
            scores = scores_in(labels_path)
            if scores:
                # Where only a sample is labelled, its share stands for all features.
                share = sum(score >= 3 for score in scores) / len(scores)
                summary["scored"] = len(scores)
                summary["score"] = sum(scores) / len(scores)
                summary["labelled"] = summary["features"] * share
            return summary | {"labels": str(labels_path), "above": str(path)}

        name = f"interpret {sae['title']} above {threshold:g}"
        return self.step(name, {"argv": argv, "of": read | {"sae": sae}}, work)

    # ------------------------------------------------------------------------------------- steer

    def steer(self, sae: Row, labelled: dict[str, Any]) -> list[Row]:
        """Rows of the steering table, for the first latents by steering_order().

        They are held at three quarters of their largest strength, at which the text still holds
        together.
        """
        settings = {
            "of": labelled,
            "sae": sae,
            "prompts": self.args.prompt,
            "latents": self.scale.steered,
            "tokens": self.scale.written,
        }

        def work() -> list[Row]:
            if not labelled["features"]:
                return []
            contexts = files.load_json(labelled["above"])["latent_context_map"]
            labels = files.load_json(labelled["labels"])
            rows = []
            for latent in steering_order(contexts, labels)[: self.scale.steered]:
                rows += self._steer_latent(sae, latent, contexts[latent], labels[latent])
            return rows

        return self.step(f"steer {sae['title']}", settings, work)

    def _steer_latent(
        self, sae: Row, latent: str, entry: dict[str, Any], label: dict[str, Any]
    ) -> list[Row]:
        from src.steerer import Steerer

        strength = round(STEERING_SHARE * entry["max_activation"], 2)
        argv = ["--SAE_path", sae["path"], "--set", f"{latent}={strength}"]
        argv += ["--max_new_tokens", str(self.scale.written)]
        argv += ["--prompt", *self.args.prompt, *self.options]
        result = self.stage("steer", argv, lambda cfg: Steerer(cfg).run())
        about = {
            "label": sae["label"],
            "latent": int(latent),
            "strength": strength,
            "description": label["description"],
            "promoted": [token for token, _ in entry["promoted"][:5]],
        }
        return [about | texts[0] for texts in result["outputs"].values()]

    # -------------------------------------------------------------------------------- everything

    def foresee(self) -> None:
        """Print what the paper's scale takes at least. Raises ValueError on a CPU unless forced."""
        from experiments import cost

        options = [*self.text_options, *self.train_options]
        floors = cost.floors(self.groups(), self.scale, options, self.reads)
        print(cost.summary(floors, self.scale), flush=True)
        if floors["device"] == "cpu" and not self.args.force:
            raise ValueError(
                "--scale paper is for a GPU, and this machine has none; "
                "--force starts it all the same"
            )

    def run(self) -> list[dict[str, Any]]:
        if self.args.scale == "paper":
            self.foresee()
        groups = self.groups()
        self.total_steps = 2 * (len(groups) + 1)
        trained = [self.train(groups[0])]
        sites = next(sae["sites"] for sae in trained[0]["saes"] if len(sae["sites"]) > 1)
        groups.insert(1, self._single_site_group(sites))
        trained += [self.train(group) for group in groups[1:]]
        rows: list[Row] = []
        history: dict[str, Any] = {}
        for group, result in zip(groups, trained, strict=True):
            rows += self.evaluate(group, result)
            history |= result["history"]
        reads, steered = self.understand(rows)
        return self.write(rows, history, reads, steered)

    def _single_site_group(self, routed_sites: list[int]) -> Group:
        """TopK at the first and at the middle one of the routed sites."""
        sites = [str(routed_sites[0]), str(routed_sites[len(routed_sites) // 2])]
        sweep = map(str, self.scale.sweep)
        argv = ["--model", "TopK", "--layer", *sites, "--k", *sweep]
        return Group("sites", self.seeds[0], argv, " at site {layer}")

    def understand(self, rows: list[Row]) -> tuple[dict[str, Any], list[Row]]:
        """({title: what was read and labelled}, rows of the steering table)"""
        keys = ("title", "path", "label", "seed", "asked", "hidden_size")
        saes = [
            {key: row[key] for key in keys} for row in rows if self.reads(row["model"], row["seed"])
        ]
        compared = {row["title"] for row in rows if row["asked"] == self.scale.middle}
        thresholds = {
            sae["title"]: THRESHOLDS if sae["title"] in compared else (MAIN_THRESHOLD,)
            for sae in saes
        }
        steered = [sae for sae in saes if sae["title"] in compared and sae["label"] in STEERED]
        self.total_steps += len(saes) + sum(map(len, thresholds.values())) + len(steered)
        reads = {}
        for sae in saes:
            read = self.read(sae)
            title = sae["title"]
            labels = {str(t): self.label(sae, read, t) for t in thresholds[title]}
            reads[title] = read | {"labels": labels}
        steering_rows = []
        for sae in steered:
            steering_rows += self.steer(sae, reads[sae["title"]]["labels"][str(MAIN_THRESHOLD)])
        return reads, steering_rows

    def write(
        self, rows: list[Row], history: dict[str, Any], reads: dict[str, Any], steered: list[Row]
    ) -> list[dict[str, Any]]:
        """Write JSON and PNG of every figure, the steering table and table.md."""
        folder = self.folder
        figures = assemble(rows, history, reads, steered, self.scale.middle, self.args.engine)
        about = self.about(rows, reads)
        for name, data in figures.items():
            content = {"figure": name} | data | {"about": about}
            files.save_json(content, folder / f"{name}.json", indent=1)
        for name, draw in PAPER.items():
            data = figures[name]
            draw(data, claims.figure_caption(data, about), folder / f"{name}.png")
        steering_table = claims.steering_table(figures["fig10_steering"], about)
        files.save_text(steering_table, folder / "fig10_steering.md")
        verdicts = claims.judge(figures, about)
        commands = list(dict.fromkeys(self.commands))
        content = {"about": about, "claims": verdicts, "commands": commands}
        files.save_json(content, folder / "table.json", indent=1)
        files.save_text(claims.table(figures, verdicts, about), folder / "table.md")
        if self.args.scale == "demo" and not (self.args.model_path or self.args.data_path):
            RECORDED.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.*"):
                shutil.copy(path, RECORDED)
        return verdicts

    def about(self, rows: list[Row], reads: dict[str, Any]) -> dict[str, Any]:
        """What every caption says, from the results themselves."""
        first = rows[0]
        return {
            "command": shlex.join(["bash", "scripts/paper_figures.sh", *self.args.given]),
            "language_model": files.data_name(first["model_path"]),
            "data": files.data_name(first["data_path"]),
            "hidden_size": first["hidden_size"],
            "n_layers": first["n_layers"],
            "row_tokens": first["max_length"],
            "trained_tokens": sorted({row["trained_tokens"] for row in rows}),
            "evaluated_tokens": sorted({row["tokens"] for row in rows}),
            "evaluated_rows": first["rows"],
            "applied_tokens": sorted({read["tokens"] for read in reads.values()}),
            "seeds": self.seeds,
            "middle": self.scale.middle,
            "sweep": list(self.scale.sweep),
            "engine": self.args.engine,
            "git_commit": sorted({str(row["git_commit"])[:10] for row in rows}),
            "device": first["device"],
            "threads": first["threads"],
        }


# ------------------------------------------------------------------ what the stages have written


def describe_sae(path: Path, group: Group) -> Row:
    """What a row of the results says of an SAE, from its recipe."""
    from src import checkpoint

    recipe = checkpoint.read_recipe(path)
    options = recipe["config"]
    sites = recipe["sites"]
    about = {
        "title": path.stem,
        "path": str(path),
        "label": recipe["model"] + group.variant.format(layer=sites[0]),
        "model": recipe["model"],
        "seed": group.seed,
        "sites": sites,
        "asked": options.get("k") or options.get("target_l0"),
        "hidden_size": options["hidden_size"],
        "n_layers": options["n_layers"],
        "trained_tokens": recipe["tokens"],
        "max_length": recipe["options"]["max_length"],
    }
    keys = ("model_path", "data_path", "git_commit", "threads", "device")
    return about | {key: recipe[key] for key in keys}


def routing_history(log: Path) -> dict[str, dict[str, list[Any]]]:
    """{title of a routed SAE: {"tokens", "share", "mean_p"}} from a metrics.jsonl."""
    history: dict[str, dict[str, list[Any]]] = {}
    for line in files.text_records(log.read_text(encoding="utf-8")):
        record = files.parse_json(line)
        if "share" not in record:
            continue
        columns = history.setdefault(record["sae"], {"tokens": [], "share": [], "mean_p": []})
        for key, column in columns.items():
            column.append(record[key])
    return history


def scores_in(labels_path: Path) -> list[int]:
    records = files.load_json(labels_path).values()
    return [record["score"] for record in records if record["score"] is not None]


def threshold_unit(sae: Row) -> float:
    """One unit of the paper's thresholds, as a strength at this SAE's hidden size."""
    return (sae["hidden_size"] / PAPER_WIDTH) ** 0.5


def count(contexts: dict[str, Any], threshold: float) -> int:
    """Return how many latents apply would keep above a threshold.

    contexts: made at a lower threshold. A latent is kept if LINES of its contexts are above it.
    """
    listed = (entry["activations"] for entry in contexts["latent_context_map"].values())
    return sum(
        len(activations) >= LINES and activations[LINES - 1] > threshold for activations in listed
    )


def above(contexts: dict[str, Any], threshold: float) -> dict[str, Any]:
    """Return the contexts above a higher threshold than they were made at.

    They hold what labelling and steering read.
    """
    kept = {}
    for latent, entry in contexts["latent_context_map"].items():
        activations = entry["activations"]
        strong = [index for index, value in enumerate(activations) if value > threshold]
        if len(strong) >= LINES:
            kept[latent] = {
                "max_activation": entry["max_activation"],
                "promoted": entry["promoted"],
            }
            for name in ("activations", *READ_COLUMNS):
                kept[latent][name] = [entry[name][index] for index in strong]
    return {"latent_context_map": kept}


def steering_order(contexts: dict[str, Any], labels: dict[str, Any]) -> list[str]:
    """Return the labelled latents in the order in which they are steered with.

    By their label's score, then by the whole words among the tokens that their direction promotes,
    then by their strength.
    """

    def key(latent: str) -> tuple[float, int, float]:
        tokens = [token for token, _ in contexts[latent]["promoted"]]
        n_words = sum(bool(re.fullmatch(r" [A-Za-z]{3,}", token)) for token in tokens)
        return labels[latent]["score"] or 0, n_words, contexts[latent]["max_activation"]

    return sorted(set(contexts) & set(labels), key=key, reverse=True)


# ------------------------------------------------------------------------------ from step to figure


def assemble(
    rows: list[Row],
    history: dict[str, Any],
    reads: dict[str, Any],
    steered: list[Row],
    middle: int,
    engine: str,
) -> dict[str, dict[str, Any]]:
    """Return {figure: its JSON}."""
    measured = ("L0", "NormMSE", "FVU", "KLDiv", "KLDiv_seq", "DeltaCE", "Dead")
    points = [pick(row, *SAE_KEYS, *measured) for row in rows]
    labelled = label_points(rows, reads)
    about_labels = {
        "unit": STRENGTH_UNIT,
        "scored_by": "by rule (heuristic)" if engine == "heuristic" else f"by {engine}",
    }
    return {
        "fig4_kl": {"title": "Fig. 4: KL against sparsity", "points": points},
        "fig5_thresholds": {
            "title": "Fig. 5: activation threshold against features and scores, "
            f"k or target L0 {middle}",
            "thresholds": list(GRID),
            **about_labels,
            "curves": threshold_curves([row for row in rows if row["asked"] == middle], reads),
        },
        "fig6_features": {
            "title": "Fig. 6: features against sparsity",
            "threshold": MAIN_THRESHOLD,
            "unit": STRENGTH_UNIT,
            "lines": LINES,
            "scored_by": about_labels["scored_by"],
            "points": labelled,
        },
        "fig8_scores": {
            "title": "Fig. 8: scores against sparsity",
            "threshold": MAIN_THRESHOLD,
            **about_labels,
            "points": labelled,
        },
        "fig9_routing": {
            "title": f"Fig. 9: which site the router takes, k {middle}",
            **routing_runs([row for row in rows if row["asked"] == middle], history),
        },
        "fig10_steering": {
            "title": "Fig. 10: text steered with single latents",
            "rows": steered,
            "note": STEERING_NOTE,
        },
        "fig12_normmse": {"title": "Fig. 12: NormMSE against sparsity", "points": points},
    }


def pick(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: record[key] for key in keys}


def label_points(rows: list[Row], reads: dict[str, Any]) -> list[Row]:
    points = []
    for row in rows:
        if row["title"] in reads:
            summary = reads[row["title"]]["labels"][str(MAIN_THRESHOLD)]
            counts = pick(summary, "features", "scored", "score", "labelled")
            points.append(pick(row, *SAE_KEYS, "L0") | counts)
    return points


def threshold_curves(rows: list[Row], reads: dict[str, Any]) -> dict[str, Any]:
    curves = {}
    for row in rows:
        if row["title"] in reads:
            read = reads[row["title"]]
            scores = {t: pick(summary, "score", "scored") for t, summary in read["labels"].items()}
            curves[row["label"]] = {
                "L0": row["L0"],
                "features": read["features"],
                "scores": scores,
            }
    return curves


def routing_runs(rows: list[Row], history: dict[str, Any]) -> dict[str, Any]:
    """Routing in training and on held-out text, of the models with a router."""
    routed = [row for row in rows if "Routing" in row and "random" not in row["label"]]
    return {
        "sites": routed[0]["sites"],
        "training": [
            pick(row, *SAE_KEYS) | history[row["title"]]
            for row in routed
            if row["label"] == "RouteSAE"
        ],
        "inference": [
            pick(row, *SAE_KEYS) | pick(row["Routing"], "share", "mean_p") for row in routed
        ],
    }


# --------------------------------------------------------------------------------- the command line


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(own options, those for train.py)"""
    parser = argparse.ArgumentParser(
        "paper_figures.sh",
        description=files.first_line(__doc__),
        epilog="Further options go to train.py.",
        allow_abbrev=False,
    )
    _add_options(parser.add_argument)
    args, extra = parser.parse_known_args(argv)
    endpoint = args.api_base or os.environ.get("OPENAI_API_KEY")
    args.engine = args.engine or ("gpt-4o-mini" if endpoint else "heuristic")
    if args.sample_latents is None:
        args.sample_latents = 0 if args.engine == "heuristic" else 100
    args.given = argv
    return args, extra


def _add_options(add: Callable[..., Any]) -> None:
    env = os.environ.get
    add(
        "--scale",
        choices=list(SCALES),
        default="demo",
        help="smoke: a minute; demo: 14 minutes on 2 cores; paper: the full protocol, on a GPU",
    )
    model_help = "language model ($MODEL_PATH, else the demo LM)"
    add("--model_path", default=env("MODEL_PATH"), help=model_help)
    add("--data_path", default=env("DATA_PATH"), help="text ($DATA_PATH, else the demo text)")
    out_help = "folder all results go to ($OUTPUT_DIR)"
    add("--output_dir", default=env("OUTPUT_DIR") or "outputs", help=out_help)
    add("--device", help="auto (default), cpu, cuda:0 ...")
    add(
        "--seeds",
        type=int,
        nargs="+",
        help="the first trains everything, the others TopK and RouteSAE for the claims "
        "(default: 42 43 44)",
    )
    add(
        "--api_base",
        help="OpenAI-compatible endpoint that labels the latents "
        "(default: OpenAI's with $OPENAI_API_KEY, else labels by rule)",
    )
    add("--engine", help="model there (default: gpt-4o-mini; heuristic without an endpoint)")
    sample_help = "latents labelled of each SAE (default: 100; by rule all)"
    add("--sample_latents", type=int, help=sample_help)
    add("--prompt", nargs="+", default=list(PROMPTS), help="texts to steer")
    add("--force", action="store_true", help="paper scale on a CPU all the same")


def main(argv: list[str] | None = None) -> int:
    args, extra = parse(sys.argv[1:] if argv is None else argv)
    return exit_code("paper_figures.sh", lambda: draw_all(Figures(args, extra)))


def draw_all(figures: Figures) -> None:
    for record in figures.run():
        print(f"{record['verdict']:>34}  {record['claim']}")
    seconds = time.monotonic() - figures.started
    print(
        f"{figures.made} of {figures.done} steps made, {seconds:.0f} s; "
        f"figures and table.md in {figures.folder}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
