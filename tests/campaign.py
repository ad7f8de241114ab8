"""Kills, signals, damage and misbehaving servers by the hundred: `python -m tests.campaign --trials 200`. Not a part of the test suite.

Processes are forked from one that has torch and transformers imported. A trial is a training of three SAEs at once on a tiny language
model that saves every step, or a stage around it (tests/campaign_stages.py); it ends with the work finished and compared with that of an
undisturbed run. Beside it the same faults meet saving in place, or the nearest plain way. Each finished trial is a line of
OUT/trials.jsonl: run again, it goes on where it stopped. At the end: OUT/campaign.json and OUT/table.md.

SIGKILL cannot test fsync: what was written survives in the kernel. Only a power cut would.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import tempfile
import time
import traceback
from pathlib import Path

import torch
import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from src import checkpoint, files
from src.config import run_stage
from src.trainer import Trainer

MODELS = ["TopK", "RouteSAE", "Vanilla"]
STEPS = 24
CONDITIONS = ["ok", "unreadable", "mixed", "none"]
CANARY = "sk-canary-5e1f0c27d9a84b36"  # stands for every secret in the environment of every child


class Shared:
    """Two numbers that a process and its children see: (newest step whose save returned; step continued from, or calls counted)."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 16)

    def __setitem__(self, i, value):
        self.memory[8 * i : 8 * i + 8] = struct.pack("q", value)

    def __getitem__(self, i):
        return struct.unpack("q", self.memory[8 * i : 8 * i + 8])[0]


SHARED = Shared()


# ------------------------------------------------------------------------------------------------------ processes


def fork(work, log=None):
    """Runs work() in a child; its pid. What it returns is the exit code, 99 where it fails. Its output goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        handle = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        faulthandler.enable(2)
        code = work() or 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid, limit=180):
    """Exit code of a child, negative for a signal; one that hangs is made to write down where, and raises RuntimeError."""
    started = time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - started > limit:
            os.kill(pid, signal.SIGABRT)
            raise RuntimeError(f"a child hung for {limit} s; its log ends with where")
        time.sleep(0.002)


def kill_after(pid, seconds):
    """Waits, then SIGKILL; whether it came before the child's own end."""
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return wait(pid) == -signal.SIGKILL


# ------------------------------------------------------------------------------------------------ saving in place


def naive_save(folder, step, meta, parts, keep=2):
    """Saving in place, as most training loops do."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        torch.save({"step": step, "part": part}, folder / f"{name}.pt")
    (folder / "meta.json").write_text(json.dumps({"step": step, "format_version": 1} | meta))
    return folder


def naive_find(folder):
    return (
        (folder, json.loads((folder / "meta.json").read_text()))
        if (folder / "meta.json").exists()
        else None
    )


def naive_condition(folder):
    """Number in CONDITIONS; mixed: files of different steps."""
    if not folder.exists() or not any(folder.iterdir()):
        return CONDITIONS.index("none")
    try:
        steps = {torch.load(path, weights_only=True)["step"] for path in folder.glob("*.pt")}
        steps.add(json.loads((folder / "meta.json").read_text())["step"])
    except Exception:  # whatever it is, the state cannot be read
        return CONDITIONS.index("unreadable")
    return CONDITIONS.index("ok" if len(steps) == 1 else "mixed")


def count_boundaries(kill_at, naive):
    """SIGKILL before or after the kill_at-th call that changes the disk, within the third save and all after it; calls are counted in SHARED."""
    counted = {"calls": 0, "saves": 0}

    def wrap(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            for half in range(2):  # before, after
                if counted["saves"] >= 3:
                    if counted["calls"] == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    counted["calls"] += 1
                    if kill_at < 0:
                        SHARED[1] = counted["calls"]
                if not half:
                    result = original(*args, **kwargs)
            return result

        setattr(owner, name, call)

    safe = (
        (os, ("fsync", "replace", "mkdir", "unlink", "rmdir", "rename")),
        (files._Summed, ("__init__",)),
    )
    for owner, names in ((torch, ("save",)), (Path, ("write_text",))) if naive else safe:
        for name in names:
            wrap(owner, name)
    save = checkpoint.save_state

    def third(*args, **kwargs):
        counted["saves"] += 1
        if counted["saves"] == 4:
            counted["saves"] = -(10**9)  # one save is enough; the final weights come after it
        return save(*args, **kwargs)

    checkpoint.save_state = third
    if not naive:
        finish = Trainer._finish

        def last(*args):
            counted["saves"] = 3
            return finish(*args)

        Trainer._finish = last


# -------------------------------------------------------------------------------------------------------- trainings


class Trainings:
    """Trials of a training in `work`; `seconds` is what one takes, `reference` what it ends with."""

    def __init__(self, work):
        self.work = work
        assert wait(fork(lambda: self.language_model(work / "lm"))) == 0
        lines = [
            json.dumps({"text": f"Return the {i}th of {i * 7} values, or raise ValueError. " * 8})
            for i in range(120)
        ]
        (work / "text.jsonl").write_text("\n".join(lines))
        out = work / "reference"
        assert wait(self.start(out)) == 0, self.said(out)  # tokenises; the second is timed
        self.reference, started = self.result(out), time.monotonic()
        assert (
            wait(self.start(work / "timed")) == 0 and self.result(work / "timed") == self.reference
        ), self.said(work / "timed")
        self.seconds = time.monotonic() - started
        self.boundaries = {}
        for naive in (False, True):
            wait(self.start(work / "counted" / str(naive), naive, kill_at=-1))
            self.boundaries[naive] = SHARED[1]

    @staticmethod
    def language_model(folder):
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(files.DEMO_LM)
        shape = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(
            folder
        )  # in a child: it starts a thread
        tokenizer.save_pretrained(folder)

    @staticmethod
    def said(out):
        return out.with_suffix(".log").read_text()

    def start(self, out, naive=False, kill_at=None):
        """Forks a training into out; its pid."""
        SHARED[1] = 0
        out.parent.mkdir(parents=True, exist_ok=True)

        def work():
            if naive:
                checkpoint.save_state, checkpoint.find_state = naive_save, naive_find
                checkpoint.load_part = lambda path, name: torch.load(
                    path / f"{name}.pt", weights_only=True
                )["part"]
            if kill_at is not None:
                count_boundaries(kill_at, naive)
            save, find = checkpoint.save_state, checkpoint.find_state

            def saving(folder, step, *rest):
                path = save(folder, step, *rest)
                SHARED[0] = step
                return path

            def finding(folder):
                found = find(folder)
                if kill_at is None:
                    SHARED[1] = found[1]["step"] if found else 0
                return found

            checkpoint.save_state, checkpoint.find_state = saving, finding
            argv = [
                "--model",
                *MODELS,
                "--model_path",
                str(self.work / "lm"),
                "--data_path",
                str(self.work / "text.jsonl"),
                "--output_dir",
                str(out),
            ]
            argv += [
                "--dtype",
                "float32",
                "--latent_size",
                "512",
                "--k",
                "8",
                "--max_length",
                "32",
                "--batch_size",
                "4",
            ]
            argv += [
                "--max_samples",
                str(4 * STEPS),
                "--tag",
                "t",
                "--save_every",
                "1",
                "--target_l0",
                "8",
            ]
            return run_stage("train", lambda cfg: Trainer(cfg).run(), argv)

        return fork(work, out.with_suffix(".log"))

    def result(self, out):
        """SHA-256 over the final weights and the metrics without what a clock says."""
        total = hashlib.sha256()
        for path in sorted((out / "SAE_models").glob("*.pt")):
            total.update(path.name.encode() + path.read_bytes())
        for line in (out / "runs" / "t" / "metrics.jsonl").read_text().splitlines():
            total.update(
                json.dumps(
                    {k: v for k, v in json.loads(line).items() if "tokens_per_s" not in k}
                ).encode()
            )
        return total.hexdigest()

    def finish(self, out, naive=False):
        """Whether the rest of the training ends as the undisturbed one did, and whether it ends at all."""
        code = wait(self.start(out, naive))
        return {"ended": code == 0, "identical": code == 0 and self.result(out) == self.reference}

    def condition(self, states, naive):
        """What a kill left: asked in a child, as torch.load starts threads that later children would miss."""
        if naive:
            return CONDITIONS[wait(fork(lambda: naive_condition(states)))]
        there = checkpoint.states(states) if states.exists() else []
        return "ok" if not there or any(not bad(path) for path in there) else "unreadable"

    def kill(self, out, key, naive=False):
        """Two kills at random times, then to the end."""
        draw, states, found = (
            random.Random(key),
            out / "runs" / "t" / "state",
            {"kills": 0, "condition": "ok", "lost": 0},
        )
        for _ in range(2):
            SHARED[0] = 0
            found["kills"] += kill_after(self.start(out, naive), draw.uniform(0, self.seconds))
            condition = self.condition(states, naive)
            found["condition"] = (
                condition if condition in ("unreadable", "mixed") else found["condition"]
            )
            if condition == "ok" and not naive and SHARED[0] and states.exists():
                found["lost"] += max(
                    0,
                    SHARED[0]
                    - max(
                        int(path.name[5:]) for path in checkpoint.states(states) if not bad(path)
                    ),
                )
        return found | self.finish(out, naive)

    def kill_in_place(self, out, key):
        return self.kill(out, key, naive=True)

    def boundary(self, out, k, naive=False):
        killed = wait(self.start(out, naive, kill_at=k)) == -signal.SIGKILL
        return {
            "killed": killed,
            "condition": self.condition(out / "runs" / "t" / "state", naive),
        } | self.finish(out, naive)

    def boundary_in_place(self, out, k):
        return self.boundary(out, k, naive=True)

    def stop(self, out, key):
        """A signal at a random time: the exit code, how long the stop took, steps not saved."""
        draw = random.Random(key)
        number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        SHARED[0] = 0
        pid = self.start(out)
        time.sleep(draw.uniform(0.1, self.seconds))
        started = time.monotonic()
        os.kill(pid, number)
        code, took, said = wait(pid), time.monotonic() - started, self.said(out)
        saved = f"step {SHARED[0]} of {STEPS} is saved" in said or "nothing was trained yet" in said
        right = code in (0, -number) or (
            saved and code == (130 if number == signal.SIGINT else 143)
        )  # -number: before training had begun
        return {"code": code, "right": right, "seconds": took} | self.finish(out)

    def two(self, out, key):
        """A second training enters the folder of a running one, which then is killed; a third takes over the lock it left."""
        draw = random.Random(key)
        first = self.start(out)
        lock = out / "runs" / "t" / "lock"
        while not (lock.exists() and lock.read_text()):
            time.sleep(0.005)
        second = wait(self.start(out))
        refused = second == 2 and f"process {first} on" in self.said(out)
        died = draw.random() < 0.5 and kill_after(first, draw.uniform(0, self.seconds / 2))
        if not died:
            with contextlib.suppress(ChildProcessError):
                wait(first)
        return {"refused": refused, "killed": died} | self.finish(out)


def bad(path):
    try:
        files.verify_folder(path)
    except ValueError:
        return True
    return False


# -------------------------------------------------------------------------------------------------------- the whole


def tasks(trainings, stages, trials):
    """{kind: (trial(folder, key), keys)}"""
    return {
        "kills": (trainings.kill, range(trials)),
        "boundaries": (trainings.boundary, range(trainings.boundaries[False])),
        "kills, in place": (trainings.kill_in_place, range(max(2, trials // 2))),
        "signals": (trainings.stop, range(max(4, trials // 4))),
        "endpoint": (stages.endpoint, range(max(2, trials // 10))),
        "endpoint, written at the end": (stages.endpoint_at_the_end, range(max(2, trials // 20))),
        "lines": (stages.lines, range(max(2, trials // 40))),
        "archives": (stages.archives, range(max(2, trials // 10))),
        "tokenising killed": (stages.tokenising, range(max(2, trials // 10))),
        "two trainings": (trainings.two, range(max(2, trials // 10))),
        "boundaries, in place": (trainings.boundary_in_place, range(trainings.boundaries[True])),
        "damage": (stages.damage, range(max(1, trials // 40))),
        "torchrun": (stages.ranks, range(trials // 40 if stages.has_ranks else 0)),
        "endless line": (stages.endless, [0]),
        "cost": (stages.cost, [0]),
    }


def done(out):
    """{kind: {key: result}} of OUT/trials.jsonl; a line torn by a kill is passed over."""
    found = {}
    if (out / "trials.jsonl").exists():
        for line in (out / "trials.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                one = json.loads(line)
                found.setdefault(one["kind"], {})[one["key"]] = one["result"] | {
                    "commit": one.get("commit", "")
                }
    return found


def worker(table, todo, out, work, deadline, commit):
    """Does trials until the time is up; each is written down as it ends, with the secrets found in what it left."""
    for kind, key in todo:
        if time.monotonic() > deadline:
            return 1
        folder = work / "trials" / f"{kind.replace(' ', '_')}-{key}" / "out"
        folder.parent.mkdir(parents=True)
        result = table[kind][0](folder, key)
        left = [path for path in folder.parent.rglob("*") if path.is_file()]
        result |= {
            "files": len(left),
            "secrets": sum(CANARY[3:].encode() in path.read_bytes() for path in left),
        }
        with open(out / "trials.jsonl", "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"kind": kind, "key": key, "commit": commit, "result": result}) + "\n"
            )
        shutil.rmtree(folder.parent)
    return 0


def share(found, key):
    """`n of m` trials for which a key holds."""
    return f"{sum(bool(one[key]) for one in found)} of {len(found)}"


def total(found, key):
    return sum(one[key] for one in found)


def report(results, trainings):
    """(figures, Markdown table: fault, here, saving in place or the plain way)"""
    of, rows = {kind: list(by_key.values()) for kind, by_key in results.items()}, []

    def row(said, here, plain=""):
        rows.append(f"| {said} | {here} | {plain} |")

    if kills := of.get("kills"):
        plain = of.get("kills, in place", [])
        bad_states, plain_bad = (
            ", ".join(
                str(sum(one["condition"] == what for one in found))
                for what in ("unreadable", "mixed")
            )
            for found in (kills, plain)
        )
        n = f"{total(kills, 'kills')} kills at random moments of {len(kills)} trainings"
        row(
            f"{n}: ended as if undisturbed",
            share(kills, "identical"),
            f"{share(plain, 'identical')} (saving in place)",
        )
        row("states unreadable, of mixed steps", bad_states, plain_bad)
        row("steps lost beyond the last save", total(kills, "lost"))
    if edges := of.get("boundaries"):
        plain = of.get("boundaries, in place", [])
        row(
            "a kill at every boundary of a save and of the end: as if undisturbed",
            share(edges, "identical"),
            share(plain, "identical"),
        )
    if stops := of.get("signals"):
        row(
            "SIGTERM, SIGINT, SIGUSR1 at random moments: right exit code, step saved",
            share(stops, "right"),
        )
        row("continued after them: as if undisturbed", share(stops, "identical"))
        times = [one["seconds"] for one in stops]
        row("slowest stop, median", f"{max(times):.2f} s, {statistics.median(times):.2f} s")
    if two := of.get("two trainings"):
        row("a second training in one folder: refused", share(two, "refused"))
        row(
            "the first unharmed, or killed and its lock taken over: as if undisturbed",
            share(two, "identical"),
        )
    if ranks := of.get("torchrun"):
        row(
            "one of two torchrun ranks killed: slowest end of the job",
            f"{max(one['seconds'] for one in ranks):.1f} s",
        )
        row("continued after it: as if undisturbed", share(ranks, "identical"))
    for what, said in (
        ("state", "files of states flipped in a bit, cut, grown, exchanged: noticed"),
        ("cache", "files of cached tokens: noticed"),
    ):
        if damage := of.get("damage"):
            tried = total(damage, f"{what}_tried")
            row(
                said,
                f"{total(damage, f'{what}_noticed')} of {tried}",
                f"{total(damage, f'{what}_plain')} (loading alone)",
            )
    if lines := of.get("lines"):
        plain = f"{total(lines, 'plain')} (load_dataset, json)"
        row(
            "rows kept of texts with 1 % of their lines damaged",
            f"{total(lines, 'kept')} of {total(lines, 'expected')}",
            plain,
        )
    if archives := of.get("archives"):
        row(".gz and .zst cut short: refused by default", share(archives, "refused"))
        row(
            "rows kept of them where accepted",
            f"{total(archives, 'kept')} of {total(archives, 'expected')}",
        )
    if tokenising := of.get("tokenising killed"):
        row(
            f"{total(tokenising, 'kills')} kills while tokenising: no half cache, then the same tokens",
            share(tokenising, "identical"),
        )
    if endless := of.get("endless line"):
        row(
            f"memory for one line of {endless[0]['megabytes']} MB",
            f"{endless[0]['growth_mb']:.0f} MB",
        )
    if here := of.get("endpoint"):
        plain = of.get("endpoint, written at the end", [])
        n = f"{total(here, 'features')} features of an endpoint with 30 % faults, {total(here, 'kills')} kills"
        row(f"{n}: lost, twice", f"{total(here, 'lost')}, {total(here, 'twice')}")
        row("answers on disk asked for again", total(here, "again"))
        twice = [
            f"{total(found, 'paid_twice')} of {total(found, 'features')}" for found in (here, plain)
        ]
        row(
            "answers paid for twice (up to four are in flight at a kill)",
            twice[0],
            f"{twice[1]} (written at the end)",
        )
        row(
            "tokens counted here, billed there without those",
            f"{total(here, 'counted')}, {total(here, 'billed')}",
        )
    everything = [one for found in of.values() for one in found]
    row(
        f"secrets found in {total(everything, 'files')} files written", total(everything, "secrets")
    )
    if cost := of.get("cost"):
        safe, plain = (f"{100 * cost[0][name] / 600:.2f} %" for name in ("save_s", "plain_s"))
        row(
            "saving 67M parameters every ten minutes, share of the time",
            safe,
            f"{plain} (in place)",
        )
    figures = {kind: len(found) for kind, found in of.items()}
    figures |= {
        "seconds_of_a_training": round(trainings.seconds, 2),
        "boundaries": trainings.boundaries[False],
    }
    return figures, "\n".join(["| fault | here | plain way |", "|---|---|---|", *rows]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--trials",
        type=int,
        default=200,
        help="trainings killed twice each; other faults in proportion (200)",
    )
    parser.add_argument(
        "--minutes", type=float, default=25, help="start no trial after this long (25)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="trials at one time (the number of cores)",
    )
    parser.add_argument(
        "--only", nargs="+", help="kinds of trials, as named in OUT/trials.jsonl (all)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/campaign"),
        help="folder of the results (outputs/campaign)",
    )
    parser.add_argument("--publish", action="store_true", help="write docs/fault_campaign.json too")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="campaign-"))
    os.environ |= {
        "DATA_DIR": str(work / "data"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "no_proxy": "127.0.0.1",
    }
    os.environ |= dict.fromkeys(files.SECRETS, CANARY)
    torch.set_num_threads(
        1
    )  # children are forked: no thread may exist here, its locks would stay locked in them
    tqdm.tqdm.monitor_interval = 0
    from tests.campaign_stages import Stages

    trainings, stages = Trainings(work), Stages(work, args.out)
    print(
        f"one training takes {trainings.seconds:.2f} s; boundaries {list(trainings.boundaries.values())}",
        flush=True,
    )
    table, finished = tasks(trainings, stages, args.trials), done(args.out)
    parts = [
        (i / len(keys), kind, key)
        for kind, (_, keys) in table.items()
        for i, key in enumerate(keys)
    ]  # of each kind an equal share at any time
    todo = [
        (kind, key)
        for _, kind, key in sorted(parts)
        if key not in finished.get(kind, {}) and (not args.only or kind in args.only)
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=files.ROOT
    ).stdout.strip()
    workers = []
    for i in range(args.jobs):

        def work_on(i=i):
            global SHARED
            SHARED = Shared()  # its own, not that of the other workers
            return worker(table, todo[i :: args.jobs], args.out, work, deadline, commit)

        workers.append(fork(work_on, args.out / f"worker{i}.log"))
    codes = [wait(pid, 60 * args.minutes + 900) for pid in workers]
    results = done(args.out)
    figures, markdown = report(results, trainings)
    commits = sorted({one["commit"] for found in results.values() for one in found.values()})
    summary = {
        "command": f"python -m tests.campaign --trials {args.trials}",
        "commits": commits,
        "trials": figures,
        "table": markdown.splitlines(),
    }
    files.save_json(summary | {"results": results}, args.out / "campaign.json", indent=None)
    files.save_text(markdown, args.out / "table.md")
    if args.publish:
        files.save_json(summary, files.ROOT / "docs" / "fault_campaign.json")
    print(markdown)
    if max(codes) < 2:
        shutil.rmtree(work, ignore_errors=True)
    if any(codes):
        why = (
            "time is up"
            if max(codes) == 1
            else f"a worker failed, see {args.out}/worker*.log and {work}"
        )
        print(
            f"{why}: {sum(len(found) for found in results.values())} trials are done; the same command goes on"
        )
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
