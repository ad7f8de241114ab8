"""The figures of the RouteSAE paper (arXiv:2503.08200) for any language model and text: `bash scripts/paper_figures.sh`.

The stages do the work, as their commands would; what each gave is kept as JSON under OUTPUT_DIR/figures/steps, and a step whose JSON is there
with the same settings is not repeated. Figures and verdicts are made from that JSON alone.
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

from experiments import claims
from experiments.figures import PAPER
from src import config, files

PAPER_WIDTH = 2048  # thresholds are quoted in the paper's units: 15 there is 15 sqrt(d / 2048) at another hidden size d
THRESHOLDS = (5, 10, 15, 20)  # scored; counted at every whole number from the first of them on
GRID = tuple(range(5, 41))
UNREAD = (
    "RandomK",
    "BatchTopK",
)  # not read: a control, and a model that is TopK but for its batches
RECORDED = files.ROOT / "docs" / "figures"  # where the demo's results go too
LINES = 4  # contexts a feature needs, apply's default
STEERED = ("TopK", "RouteSAE")
NO_MODEL = "; labels and scores by rule (heuristic engine), not by a language model"
PROMPTS = ("Returns the number of", "The reason for this is")


class Scale(NamedTuple):
    """Tokens of each stage; k of the k-sparse models and target L0 of the others; the middle one, where models are compared."""

    train: int
    evaluate: int
    apply: int
    sweep: tuple[int, ...]
    middle: int
    seeds: tuple[
        int, ...
    ]  # the first trains everything, the others what the paper's claims compare, at the middle
    rows: (
        tuple[int, int] | None
    )  # rows a training step and tokens a row: over a hundred steps are needed for L0 to be steered; None: train.py's
    shown: int  # tokens of context on each side
    steered: int  # latents of each SAE
    written: int  # tokens


SCALES = {
    "smoke": Scale(10_000, 2_000, 2_000, (4, 8), 8, (42, 43), (8, 32), 8, 1, 6),
    "demo": Scale(250_000, 20_000, 30_000, (8, 16, 32), 16, (42, 43, 44), (8, 256), 16, 3, 24),
    "paper": Scale(
        100_000_000, 10_000_000, 10_000_000, (48, 56, 64, 72), 64, (42, 43, 44), None, 64, 5, 60
    ),
}


class Group(NamedTuple):
    """SAEs of one train.py call. `variant` follows the model's name in labels; {layer} is the SAE's site."""

    name: str
    seed: int
    argv: list[str]
    variant: str = ""


class Figures:
    """All steps, in order; `run()` returns the verdicts."""

    def __init__(self, args: argparse.Namespace, extra: list[str]) -> None:
        self.args, self.scale = args, SCALES[args.scale]
        rows = self.scale.rows
        self.extra = [
            *(["--batch_size", str(rows[0]), "--max_length", str(rows[1])] if rows else []),
            *extra,
        ]
        self.seeds = args.seeds or list(self.scale.seeds)
        self.out = Path(args.output_dir)
        self.folder = self.out / "figures"
        given = {
            name: getattr(args, name) for name in ("model_path", "device") if getattr(args, name)
        }
        self.textless = [
            "--output_dir",
            str(self.out),
            *(word for name, value in given.items() for word in (f"--{name}", value)),
        ]
        self.common = (
            [*self.textless, "--data_path", args.data_path] if args.data_path else self.textless
        )
        self.done = self.made = self.known = 0
        self.commands: list[str] = []
        self.started = time.monotonic()

    # ------------------------------------------------------------------------------------------------ the machinery

    def step(self, name: str, settings: dict[str, Any], work: Callable[[], Any]) -> Any:
        """work()'s result, from the step's JSON where that was made with the same settings."""
        path, settings = (
            self.folder / "steps" / f"{files.safe_name(name)}.json",
            json.loads(json.dumps(settings)),
        )
        self.done += 1
        if path.exists():
            saved = files.load_json(path)
            if saved["settings"] == settings:
                self.commands += saved["commands"]
                print(f"[{self.done}/{self.known}] {name}: already there ({path})")
                return saved["result"]
        print(
            f"[{self.done}/{self.known}] {name} ({time.monotonic() - self.started:.0f} s so far)",
            flush=True,
        )
        before, began = len(self.commands), time.monotonic()
        result = work()
        self.made += 1
        record = {
            "settings": settings,
            "commands": self.commands[before:],
            "seconds": round(time.monotonic() - began, 1),
            "result": result,
        }
        files.save_json(record, path, indent=None)
        return json.loads(json.dumps(result))

    def stage(self, program: str, argv: list[str], use: Callable[[Any], Any]) -> Any:
        """use(cfg) with the options of one stage, as `python PROGRAM.py ARGV` has them. Ends the program as that would."""
        found: list[Any] = []
        self.commands.append(
            shlex.join(["python", f"{program}.py", *argv]).replace(str(self.out), "$OUTPUT_DIR")
        )
        code = config.run_stage(program, lambda cfg: found.append(use(cfg)), argv)
        if code:
            raise SystemExit(code)
        return found[0]

    # --------------------------------------------------------------------------------------------- train and measure

    def groups(self) -> list[Group]:
        """Every train.py call but the one that needs to know the routed sites."""
        first, *others = self.seeds
        swept, middle = [str(k) for k in self.scale.sweep], str(self.scale.middle)
        published = [
            "--router_objective",
            "published",
            "--router_balance",
            "none",
        ]  # the paper's router, whatever this program's default
        random, frozen = (
            ["--routing", "random"],
            ["--router_objective", "frozen", "--router_balance", "none"],
        )
        found = [
            Group(
                "zoo",
                first,
                [
                    "--model",
                    "TopK",
                    "RouteSAE",
                    "MLSAE",
                    "BatchTopK",
                    "RandomK",
                    "--k",
                    *swept,
                    *published,
                ],
            ),
            Group(
                "random", first, ["--model", "RouteSAE", *random, "--k", *swept], ", random sites"
            ),
            Group(
                "frozen",
                first,
                ["--model", "RouteSAE", *frozen, "--k", *swept],
                ", untrained router",
            ),
            Group(
                "penalised",
                first,
                ["--model", "Vanilla", "Gated", "JumpReLU", "--target_l0", *swept],
            ),
            Group("crosscoder", first, ["--model", "Crosscoder", "--target_l0", *swept]),
        ]
        for seed in others:
            found.append(
                Group("zoo", seed, ["--model", "TopK", "RouteSAE", "--k", middle, *published])
            )
            found.append(
                Group(
                    "frozen",
                    seed,
                    ["--model", "RouteSAE", *frozen, "--k", middle],
                    ", untrained router",
                )
            )
        return found

    def train(self, group: Group) -> dict[str, Any]:
        """{"saes": what was trained, "history": routing in training, by title}"""
        argv = [
            *group.argv,
            "--max_tokens",
            str(self.scale.train),
            "--seed",
            str(group.seed),
            "--tag",
            f"fig-{group.name}-s{group.seed}",
        ]
        argv += [*self.common, *self.extra]

        def work() -> dict[str, Any]:
            from src import checkpoint
            from src.trainer import Trainer

            def use(cfg: Any) -> Any:
                trainer = Trainer(cfg)
                trainer.run()
                return trainer

            trainer = self.stage("train", argv, use)
            saes, history = [], {}
            for title in trainer.titles:
                path = trainer.folder / f"{title}.pt"
                recipe = checkpoint.read_recipe(path)
                sites, options = recipe["sites"], recipe["config"]
                label = recipe["model"] + group.variant.format(layer=sites[0])
                saes.append(
                    {
                        "title": title,
                        "path": str(path),
                        "label": label,
                        "model": recipe["model"],
                        "seed": group.seed,
                        "sites": sites,
                        "asked": options.get("k") or options.get("target_l0"),
                        "hidden_size": options["hidden_size"],
                        "n_layers": options["n_layers"],
                        "trained_tokens": recipe["tokens"],
                        "max_length": recipe["options"]["max_length"],
                    }
                    | {
                        key: recipe[key]
                        for key in ("model_path", "data_path", "git_commit", "threads", "device")
                    }
                )
            for line in trainer.log.read_text().splitlines():
                record = json.loads(line)
                if "share" in record:
                    kept = history.setdefault(
                        record["sae"], {"tokens": [], "share": [], "mean_p": []}
                    )
                    for key in kept:
                        kept[key].append(record[key])
            return {"saes": saes, "history": history}

        return self.step(f"train {group.name} seed {group.seed}", {"argv": argv}, work)

    def evaluate(self, group: Group, trained: dict[str, Any]) -> list[dict[str, Any]]:
        """One row a SAE: what it is and what was measured."""
        argv = [
            "--SAE_path",
            *(sae["path"] for sae in trained["saes"]),
            "--metric",
            "NormMSE",
            "KLDiv",
            "L0",
            "Dead",
            "Routing",
        ]
        argv += ["--max_tokens", str(self.scale.evaluate), *self.common]

        def work() -> list[dict[str, Any]]:
            from src.evaluator import Evaluator

            results = self.stage("evaluate", argv, lambda cfg: Evaluator(cfg).run())
            keep = (
                "L0",
                "NormMSE",
                "KLDiv",
                "KLDiv_seq",
                "DeltaCE",
                "Dead",
                "FVU",
                "Routing",
                "tokens",
                "rows",
            )
            return [
                sae
                | {key: results[sae["title"]][key] for key in keep if key in results[sae["title"]]}
                for sae in trained["saes"]
            ]

        return self.step(
            f"evaluate {group.name} seed {group.seed}", {"argv": argv, "of": trained["saes"]}, work
        )

    # ------------------------------------------------------------------------------------------------ read and label

    def reads(self, model: str, seed: int) -> bool:
        """Whether contexts of this SAE are made."""
        return seed == self.seeds[0] and model not in UNREAD

    def read(self, sae: dict[str, Any]) -> dict[str, Any]:
        """{"contexts": path, "features": latents with enough contexts above each threshold of GRID}"""
        unit = (sae["hidden_size"] / PAPER_WIDTH) ** 0.5
        argv = [
            "--SAE_path",
            sae["path"],
            "--act_threshold",
            f"{GRID[0] * unit:.4f}",
            "--context_length",
            str(self.scale.shown),
        ]
        argv += ["--max_tokens", str(self.scale.apply), *self.common]

        def work() -> dict[str, Any]:
            from src.applier import Applier

            _, path = self.stage("apply", argv, lambda cfg: Applier(cfg).run())
            contexts = files.load_json(path)
            return {
                "contexts": str(path),
                "tokens": contexts["tokens"],
                "features": [count(contexts, t * unit) for t in GRID],
            }

        return self.step(f"apply {sae['title']}", {"argv": argv, "of": sae}, work)

    def label(self, sae: dict[str, Any], read: dict[str, Any], threshold: float) -> dict[str, Any]:
        """Summary of the interpretation of the contexts above a threshold (in the paper's units)."""
        path = self.out / files.CONTEXT_DIR / f"{sae['title']}_t{threshold:g}_contexts.json"
        argv = [
            str(path),
            "--engine",
            self.args.engine,
            "--sample_latents",
            str(self.args.sample_latents),
            "--output_dir",
            str(self.out),
        ]
        argv += ["--api_base", self.args.api_base] if self.args.api_base else []

        def work() -> dict[str, Any]:
            from src.interpreter import Interpreter

            kept = above(
                files.load_json(read["contexts"]),
                threshold * (sae["hidden_size"] / PAPER_WIDTH) ** 0.5,
            )
            empty = {
                "engine": self.args.engine,
                "features": 0,
                "scored": 0,
                "score": None,
                "labelled": 0.0,
            }
            if not kept["latent_context_map"]:
                return empty
            files.save_json(kept, path, indent=None)
            self.stage("interpret", argv, lambda cfg: Interpreter(cfg).run())
            labels = self.out / files.INTERPRET_DIR / f"interp_{sae['title']}_t{threshold:g}.json"
            scores = [
                record["score"]
                for record in files.load_json(labels).values()
                if record["score"] is not None
            ]
            features = len(kept["latent_context_map"])
            share = sum(score >= 3 for score in scores) / len(scores) if scores else 0.0
            return empty | {
                "features": features,
                "scored": len(scores),
                "score": sum(scores) / len(scores) if scores else None,
                "labelled": features * share,
                "labels": str(labels),
                "above": str(path),
            }

        return self.step(
            f"interpret {sae['title']} above {threshold:g}",
            {"argv": argv, "of": read | {"sae": sae}},
            work,
        )

    def steer(self, sae: dict[str, Any], labelled: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows of the steering table: latents by rule(), held at three quarters of their largest strength, where the text still holds together."""
        settings = {
            "of": labelled,
            "sae": sae,
            "prompts": self.args.prompt,
            "latents": self.scale.steered,
            "tokens": self.scale.written,
        }

        def work() -> list[dict[str, Any]]:
            from src.steerer import Steerer

            if not labelled["features"]:
                return []
            contexts, labels = (
                files.load_json(labelled["above"])["latent_context_map"],
                files.load_json(labelled["labels"]),
            )
            rows = []
            for latent in rule(contexts, labels)[: self.scale.steered]:
                strength = round(0.75 * contexts[latent]["max_activation"], 2)
                argv = [
                    "--SAE_path",
                    sae["path"],
                    "--set",
                    f"{latent}={strength}",
                    "--max_new_tokens",
                    str(self.scale.written),
                ]
                argv += ["--prompt", *self.args.prompt, *self.textless]
                result = self.stage("steer", argv, lambda cfg: Steerer(cfg).run())
                about = {
                    "label": sae["label"],
                    "latent": int(latent),
                    "strength": strength,
                    "description": labels[latent]["description"],
                }
                about["promoted"] = [word for word, _ in contexts[latent]["promoted"][:5]]
                rows += [about | entry[0] for entry in result["outputs"].values()]
            return rows

        return self.step(f"steer {sae['title']}", settings, work)

    # ---------------------------------------------------------------------------------------------------- everything

    def foresee(self) -> None:
        """Prints what the paper's scale takes at least. Raises ValueError on a CPU, unless forced."""
        from experiments import cost

        found = cost.floors(self.groups(), self.scale, [*self.common, *self.extra], self.reads)
        print(cost.said(found, self.scale), flush=True)
        if found["device"] == "cpu" and not self.args.force:
            raise ValueError(
                "--scale paper is for a GPU, and this machine has none; --force starts it all the same"
            )

    def run(self) -> list[dict[str, Any]]:
        if self.args.scale == "paper":
            self.foresee()
        groups, rows, history = self.groups(), [], {}
        self.known = 2 * (len(groups) + 1)
        trained = [self.train(groups[0])]
        routed = next(sae["sites"] for sae in trained[0]["saes"] if len(sae["sites"]) > 1)
        at = ["--layer", str(routed[0]), str(routed[len(routed) // 2])]
        groups.insert(
            1,
            Group(
                "sites",
                self.seeds[0],
                ["--model", "TopK", *at, "--k", *map(str, self.scale.sweep)],
                " at site {layer}",
            ),
        )
        trained += [self.train(group) for group in groups[1:]]
        for group, result in zip(groups, trained, strict=True):
            rows += self.evaluate(group, result)
            history |= result["history"]
        reads, steered = self.understand(rows)
        return self.write(rows, history, reads, steered)

    def understand(self, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """({title: what was read and labelled}, rows of the steering table)"""
        middle = [row["title"] for row in rows if row["asked"] == self.scale.middle]
        kept = {
            row["title"]: {
                key: row[key] for key in ("title", "path", "label", "seed", "asked", "hidden_size")
            }
            for row in rows
            if self.reads(row["model"], row["seed"])
        }
        scored = {title: THRESHOLDS if title in middle else (15,) for title in kept}
        steered = [
            sae for title, sae in kept.items() if title in middle and sae["label"] in STEERED
        ]
        self.known += len(kept) + sum(map(len, scored.values())) + len(steered)
        reads = {}
        for title, sae in kept.items():
            read = self.read(sae)
            reads[title] = read | {
                "labels": {str(t): self.label(sae, read, t) for t in scored[title]}
            }
        return reads, [
            row for sae in steered for row in self.steer(sae, reads[sae["title"]]["labels"]["15"])
        ]

    def write(
        self,
        rows: list[dict[str, Any]],
        history: dict[str, Any],
        reads: dict[str, Any],
        steered: list[dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """JSON and PNG of every figure, the steering table and table.md, all of them from what the steps gave."""
        figures, about = (
            assemble(rows, history, reads, steered, self.scale.middle, self.args.engine),
            self.about(rows, reads),
        )
        for name, data in figures.items():
            files.save_json(
                {"figure": name} | data | {"about": about}, self.folder / f"{name}.json", indent=1
            )
        for name, draw in PAPER.items():
            title = figures[name]["title"] + (
                NO_MODEL if "scored_by" in figures[name] and self.args.engine == "heuristic" else ""
            )
            draw(figures[name], claims.caption(about, title), self.folder / f"{name}.png")
        files.save_text(
            claims.steering_table(figures["fig10_steering"], about),
            self.folder / "fig10_steering.md",
        )
        verdicts = claims.judge(figures, about)
        commands = list(dict.fromkeys(self.commands))
        files.save_json(
            {"about": about, "claims": verdicts, "commands": commands},
            self.folder / "table.json",
            indent=1,
        )
        files.save_text(claims.table(figures, verdicts, about), self.folder / "table.md")
        if self.args.scale == "demo" and not (self.args.model_path or self.args.data_path):
            RECORDED.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*.*"):
                shutil.copy(path, RECORDED)
        return verdicts

    def about(self, rows: list[dict[str, Any]], reads: dict[str, Any]) -> dict[str, Any]:
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


# -------------------------------------------------------------------------------------------------- from step to figure


def count(contexts: dict[str, Any], threshold: float) -> int:
    """Latents apply would keep above a threshold, from contexts made at a lower one: those with LINES contexts above it."""
    listed = (entry["activations"] for entry in contexts["latent_context_map"].values())
    return sum(
        len(activations) >= LINES and activations[LINES - 1] > threshold for activations in listed
    )


def above(contexts: dict[str, Any], threshold: float) -> dict[str, Any]:
    """Contexts above a higher threshold than they were made at, as far as labelling and steering read them."""
    kept = {}
    for latent, entry in contexts["latent_context_map"].items():
        groups = {
            name: [one for one in group if one["activation"] > threshold]
            for name, group in entry["contexts"].items()
        }
        groups = {name: group for name, group in groups.items() if group}
        if sum(map(len, groups.values())) >= LINES:
            kept[latent] = {"contexts": groups} | {
                key: entry[key] for key in ("max_activation", "promoted")
            }
    return {"latent_context_map": kept}


def rule(contexts: dict[str, Any], labels: dict[str, Any]) -> list[str]:
    """Latents in the order they are steered with: best-scored label, then most whole words among what the direction promotes, then strongest."""

    def key(latent: str) -> tuple[float, int, float]:
        words = sum(
            bool(re.fullmatch(r" [A-Za-z]{3,}", word)) for word, _ in contexts[latent]["promoted"]
        )
        return labels[latent]["score"] or 0, words, contexts[latent]["max_activation"]

    return sorted(set(contexts) & set(labels), key=key, reverse=True)


def assemble(
    rows: list[dict[str, Any]],
    history: dict[str, Any],
    reads: dict[str, Any],
    steered: list[dict[str, Any]],
    middle: int,
    engine: str,
) -> dict[str, dict[str, Any]]:
    """{figure: its JSON}"""
    about = ("title", "label", "model", "seed", "sites", "asked")
    points = [
        {
            key: row[key]
            for key in (*about, "L0", "NormMSE", "FVU", "KLDiv", "KLDiv_seq", "DeltaCE", "Dead")
        }
        for row in rows
    ]
    said_by = "by rule (heuristic)" if engine == "heuristic" else f"by {engine}"
    read = [(row, reads[row["title"]]) for row in rows if row["title"] in reads]
    curves = {
        row["label"]: {
            "L0": row["L0"],
            "features": found["features"],
            "scores": {
                t: {k: mean[k] for k in ("score", "scored")} for t, mean in found["labels"].items()
            },
        }
        for row, found in read
        if row["asked"] == middle
    }
    counts = ("features", "scored", "score", "labelled")
    labelled = [
        {key: row[key] for key in (*about, "L0")}
        | {key: found["labels"]["15"][key] for key in counts}
        for row, found in read
    ]
    routed = [
        row
        for row in rows
        if "Routing" in row and row["asked"] == middle and "random" not in row["label"]
    ]
    inference = [
        {key: row[key] for key in about} | {key: row["Routing"][key] for key in ("share", "mean_p")}
        for row in routed
    ]
    training = [
        {key: row[key] for key in about} | history[row["title"]]
        for row in routed
        if row["label"] == "RouteSAE"
    ]
    unit = "strength x sqrt(2048 / hidden size)"
    return {
        "fig4_kl": {"title": "Fig. 4: KL against sparsity", "points": points},
        "fig5_thresholds": {
            "title": f"Fig. 5: activation threshold against features and scores, k or target L0 {middle}",
            "thresholds": list(GRID),
            "unit": unit,
            "scored_by": said_by,
            "curves": curves,
        },
        "fig6_features": {
            "title": "Fig. 6: features against sparsity",
            "threshold": 15,
            "unit": unit,
            "lines": LINES,
            "scored_by": said_by,
            "points": labelled,
        },
        "fig8_scores": {
            "title": "Fig. 8: scores against sparsity",
            "threshold": 15,
            "unit": unit,
            "scored_by": said_by,
            "points": labelled,
        },
        "fig9_routing": {
            "title": f"Fig. 9: which site the router takes, k {middle}",
            "sites": routed[0]["sites"],
            "training": training,
            "inference": inference,
        },
        "fig10_steering": {
            "title": "Fig. 10: text steered with single latents",
            "rows": steered,
            "note": "Latents: best-scored label, then most whole words among the promoted tokens, then strongest; held at three quarters of the "
            "largest strength seen, on every token, greedy. KL: of the steered next-token distributions along the unsteered text.",
        },
        "fig12_normmse": {"title": "Fig. 12: NormMSE against sparsity", "points": points},
    }


# ------------------------------------------------------------------------------------------------------ what it will take


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(own options, those for train.py)"""
    about, more = __doc__.splitlines()[0], "Further options go to train.py."
    parser = argparse.ArgumentParser(
        "paper_figures.sh", description=about, epilog=more, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--scale",
        choices=list(SCALES),
        default="demo",
        help="smoke: a minute; demo: 24 minutes on 2 cores; paper: the full protocol, on a GPU",
    )
    add(
        "--model_path",
        default=os.environ.get("MODEL_PATH"),
        help="language model ($MODEL_PATH, else the demo LM)",
    )
    add(
        "--data_path",
        default=os.environ.get("DATA_PATH"),
        help="text ($DATA_PATH, else the demo text)",
    )
    add(
        "--output_dir",
        default=os.environ.get("OUTPUT_DIR") or "outputs",
        help="folder all results go to ($OUTPUT_DIR)",
    )
    add("--device", help="auto (default), cpu, cuda:0 ...")
    add(
        "--seeds",
        type=int,
        nargs="+",
        help="the first trains everything, the others TopK and RouteSAE for the claims (default: 42 43 44)",
    )
    add(
        "--api_base",
        help="OpenAI-compatible endpoint that labels the latents (default: OpenAI's with $OPENAI_API_KEY, else labels by rule)",
    )
    add("--engine", help="model there (default: gpt-4o-mini; heuristic without an endpoint)")
    add(
        "--sample_latents",
        type=int,
        help="latents labelled of each SAE (default: 100; by rule all)",
    )
    add("--prompt", nargs="+", default=list(PROMPTS), help="texts to steer")
    add("--force", action="store_true", help="paper scale on a CPU all the same")
    args, extra = parser.parse_known_args(argv)
    endpoint = args.api_base or os.environ.get("OPENAI_API_KEY")
    args.engine = args.engine or ("gpt-4o-mini" if endpoint else "heuristic")
    args.sample_latents = (
        args.sample_latents
        if args.sample_latents is not None
        else 0
        if args.engine == "heuristic"
        else 100
    )
    args.given = argv
    return args, extra


def main(argv: list[str] | None = None) -> int:
    args, extra = parse(sys.argv[1:] if argv is None else argv)
    figures = Figures(args, extra)
    try:
        verdicts = figures.run()
    except (ValueError, OSError) as error:
        print(f"paper_figures.sh: error: {error}", file=sys.stderr)
        return 2
    for record in verdicts:
        print(f"{record['verdict']:>34}  {record['claim']}")
    print(
        f"{figures.made} of {figures.done} steps made, {time.monotonic() - figures.started:.0f} s; figures and table.md in {figures.folder}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
