"""Hundreds of kills, signals, damages and faulty servers: `python -m tests.campaign --trials 200`.

The campaign is not a part of the test suite. One trial is a training of three SAEs on a tiny
language model with a state saved after every step, or a stage before or after training
(tests/campaign_stages.py). A trial is disturbed, then run to its end, and its result is compared
with that of an undisturbed run. The same faults also hit a baseline: saving in place, or the
nearest plain way. Trials are forked from a process that has imported torch and transformers.

Each finished trial is a line of OUT/trials.jsonl, so that the same command continues after an
interruption. The last step writes OUT/campaign.json and OUT/table.md.

SIGKILL cannot test fsync, because the kernel keeps what was written. Only a power cut could.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import mmap
import os
import random
import shlex
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
from src.config import run_stage, small_parser
from src.trainer import Trainer

MODELS = ["TopK", "RouteSAE", "Vanilla"]
STEPS = 24
CONDITIONS = ["ok", "unreadable", "mixed", "none"]
CANARY = "sk-canary-5e1f0c27d9a84b36"  # stands for every secret in the environment of every child


class Shared:
    """Two numbers in memory that a process shares with its children.

    0: the newest step whose save returned. 1: the step a training continued from, or the number of
    calls counted.
    """

    def __init__(self):
        self.memory = mmap.mmap(-1, 16)

    def __setitem__(self, index, value):
        struct.pack_into("q", self.memory, 8 * index, value)

    def __getitem__(self, index):
        return struct.unpack_from("q", self.memory, 8 * index)[0]


SHARED = Shared()


# -------------------------------------------------------------------------------------- processes


def fork(work, log=None):
    """Run work() in a child process and return its pid.

    The exit code is what work() returns, or 99 if it raises. Output goes to the log file.
    """
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
    """Wait for a child and return its exit code, negative if a signal ended it.

    A child that hangs gets SIGABRT, so that its log ends with a traceback; RuntimeError is raised.
    """
    started = time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - started > limit:
            os.kill(pid, signal.SIGABRT)
            raise RuntimeError(f"a child hung for {limit} s; its log ends with its traceback")
        time.sleep(0.002)


def kill_after(pid, seconds):
    """Send SIGKILL after some seconds. Return whether the child was still running."""
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return wait(pid) == -signal.SIGKILL


# --------------------------------------------------------------------------------- saving in place


def naive_save(folder, step, meta, parts, keep=2):
    """Save a state in place, as most training loops do."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        torch.save({"step": step, "part": part}, folder / f"{name}.pt")
    (folder / "meta.json").write_text(json.dumps({"step": step, "format_version": 1} | meta))
    return folder


def naive_find(folder):
    """(folder, meta) of the saved state, or None."""
    meta = folder / "meta.json"
    return (folder, json.loads(meta.read_text())) if meta.exists() else None


def naive_load_part(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)["part"]


def naive_condition(folder):
    """Index into CONDITIONS of a state saved in place; "mixed" means files of different steps."""
    if not folder.exists() or not any(folder.iterdir()):
        return CONDITIONS.index("none")
    try:
        steps = {torch.load(path, weights_only=True)["step"] for path in folder.glob("*.pt")}
        steps.add(json.loads((folder / "meta.json").read_text())["step"])
    except Exception:  # for any reason: the state cannot be read
        return CONDITIONS.index("unreadable")
    return CONDITIONS.index("ok" if len(steps) == 1 else "mixed")


class DiskCalls:
    """Counts the calls that change the disk, twice each: before and after the call.

    Sends SIGKILL at number kill_at. If kill_at is negative, SHARED[1] gets the number of calls.
    """

    def __init__(self, kill_at):
        self.kill_at = kill_at
        self.calls = 0
        self.counting = False

    def count(self):
        if not self.counting:
            return
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        if self.kill_at < 0:
            SHARED[1] = self.calls

    def wrap(self, owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            self.count()
            result = original(*args, **kwargs)
            self.count()
            return result

        setattr(owner, name, call)


def count_boundaries(kill_at, naive):
    """Count disk calls in this process, and kill it at number kill_at.

    Calls are counted during the third save and, unless states are saved in place, from the end of
    training on.
    """
    disk = DiskCalls(kill_at)
    if naive:
        disk.wrap(torch, "save")
        disk.wrap(Path, "write_text")
    else:
        for name in ("fsync", "replace", "mkdir", "unlink", "rmdir", "rename"):
            disk.wrap(os, name)
        disk.wrap(files.HashingFile, "__init__")
    save_state = checkpoint.save_state
    saves = 0

    def save_and_count(*args, **kwargs):
        nonlocal saves
        saves += 1
        if saves in (3, 4):
            disk.counting = saves == 3  # counting one save is enough
        return save_state(*args, **kwargs)

    checkpoint.save_state = save_and_count
    if not naive:
        finish = Trainer._finish

        def finish_and_count(*args):
            disk.counting = True  # the final weights are written now
            return finish(*args)

        Trainer._finish = finish_and_count


# --------------------------------------------------------------------------------------- trainings


class Trainings:
    """Trials of a training in the folder `work`.

    seconds: duration of one training. reference: its result, which every trial must reach.
    boundaries: {saving in place: number of calls counted by DiskCalls}.
    """

    def __init__(self, work):
        self.work = work
        assert wait(fork(lambda: self.save_language_model(work / "lm"))) == 0
        sentence = "Return the {}th of {} values, or raise ValueError. "
        lines = [json.dumps({"text": sentence.format(i, i * 7) * 8}) for i in range(120)]
        (work / "text.jsonl").write_text("\n".join(lines))
        out = work / "reference"
        assert wait(self.start(out)) == 0, self.log_of(out)  # tokenises; the second run is timed
        self.reference = self.result(out)
        started = time.monotonic()
        timed = work / "timed"
        assert wait(self.start(timed)) == 0, self.log_of(timed)
        assert self.result(timed) == self.reference, self.log_of(timed)
        self.seconds = time.monotonic() - started
        self.boundaries = {}
        for naive in (False, True):
            wait(self.start(work / "counted" / str(naive), naive, kill_at=-1))
            self.boundaries[naive] = SHARED[1]

    @staticmethod
    def save_language_model(folder):
        """Save a tiny random Llama. Called in a child, because saving starts a thread."""
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(files.DEMO_LM)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    @staticmethod
    def log_of(out):
        return out.with_suffix(".log").read_text()

    def argv(self, out):
        """Options of train.py for one training."""
        options = {
            "model_path": self.work / "lm",
            "data_path": self.work / "text.jsonl",
            "output_dir": out,
            "dtype": "float32",
            "latent_size": 512,
            "k": 8,
            "max_length": 32,
            "batch_size": 4,
            "max_samples": 4 * STEPS,
            "tag": "t",
            "save_every": 1,
            "target_l0": 8,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return ["--model", *MODELS, *flags]

    def start(self, out, naive=False, kill_at=None):
        """Fork a training that writes to `out`, and return its pid."""
        SHARED[1] = 0
        out.parent.mkdir(parents=True, exist_ok=True)

        def work():
            if naive:
                checkpoint.save_state = naive_save
                checkpoint.find_state = naive_find
                checkpoint.load_part = naive_load_part
            if kill_at is not None:
                count_boundaries(kill_at, naive)
            save_state = checkpoint.save_state
            find_state = checkpoint.find_state

            def save_and_share(folder, step, *rest):
                path = save_state(folder, step, *rest)
                SHARED[0] = step
                return path

            def find_and_share(folder):
                state = find_state(folder)
                if kill_at is None:
                    SHARED[1] = state[1]["step"] if state else 0
                return state

            checkpoint.save_state = save_and_share
            checkpoint.find_state = find_and_share
            return run_stage("train", lambda cfg: Trainer(cfg).run(), self.argv(out))

        return fork(work, out.with_suffix(".log"))

    def result(self, out):
        """SHA-256 of the final weights and of all metrics that do not depend on time."""
        digest = hashlib.sha256()
        for path in sorted((out / "SAE_models").glob("*.pt")):
            digest.update(path.name.encode() + path.read_bytes())
        for line in (out / "runs" / "t" / "metrics.jsonl").read_text().splitlines():
            metrics = {k: v for k, v in json.loads(line).items() if "tokens_per_s" not in k}
            digest.update(json.dumps(metrics).encode())
        return digest.hexdigest()

    def finish(self, out, naive=False):
        """Run the training to its end: whether it ends, and whether its result is the reference."""
        code = wait(self.start(out, naive))
        return {"ended": code == 0, "identical": code == 0 and self.result(out) == self.reference}

    def condition(self, states, naive):
        """One of CONDITIONS: what a kill left in the folder of states."""
        if naive:
            # in a child: torch.load starts threads, and children forked later would lack them
            return CONDITIONS[wait(fork(lambda: naive_condition(states)))]
        saved = checkpoint.states(states) if states.exists() else []
        return "ok" if not saved or any(not is_damaged(path) for path in saved) else "unreadable"

    def kill(self, out, key, naive=False):
        """Kill a training twice at random times, then run it to its end."""
        draw = random.Random(key)
        states = out / "runs" / "t" / "state"
        result = {"kills": 0, "condition": "ok", "lost": 0}
        for _ in range(2):
            SHARED[0] = 0
            result["kills"] += kill_after(self.start(out, naive), draw.uniform(0, self.seconds))
            condition = self.condition(states, naive)
            if condition in ("unreadable", "mixed"):
                result["condition"] = condition
            if condition == "ok" and not naive and SHARED[0] and states.exists():
                intact = [path for path in checkpoint.states(states) if not is_damaged(path)]
                newest = max(int(path.name.removeprefix("step-")) for path in intact)
                result["lost"] += max(0, SHARED[0] - newest)
        return result | self.finish(out, naive)

    def kill_in_place(self, out, key):
        return self.kill(out, key, naive=True)

    def boundary(self, out, kill_at, naive=False):
        """Kill a training at one disk call (DiskCalls), then run it to its end."""
        killed = wait(self.start(out, naive, kill_at)) == -signal.SIGKILL
        condition = self.condition(out / "runs" / "t" / "state", naive)
        return {"killed": killed, "condition": condition} | self.finish(out, naive)

    def boundary_in_place(self, out, kill_at):
        return self.boundary(out, kill_at, naive=True)

    def stop(self, out, key):
        """Send a signal at a random time: exit code, seconds to the end, result after resuming."""
        draw = random.Random(key)
        number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        SHARED[0] = 0
        pid = self.start(out)
        time.sleep(draw.uniform(0.1, self.seconds))
        started = time.monotonic()
        os.kill(pid, number)
        code = wait(pid)
        seconds = time.monotonic() - started
        log = self.log_of(out)
        saved = f"step {SHARED[0]} of {STEPS} is saved" in log or "nothing was trained yet" in log
        stopped = saved and code == (130 if number == signal.SIGINT else 143)
        # -number: the signal came before the training handled signals
        right = code in (0, -number) or stopped
        return {"code": code, "right": right, "seconds": seconds} | self.finish(out)

    def two(self, out, key):
        """Start a second training in the folder of a running one, which may be killed then.

        A third training takes over the lock that a killed one left.
        """
        draw = random.Random(key)
        first = self.start(out)
        lock = out / "runs" / "t" / "lock"
        while not (lock.exists() and lock.read_text()):
            time.sleep(0.005)
        second = wait(self.start(out))
        refused = second == 2 and f"process {first} on" in self.log_of(out)
        killed = draw.random() < 0.5 and kill_after(first, draw.uniform(0, self.seconds / 2))
        if not killed:
            with contextlib.suppress(ChildProcessError):
                wait(first)
        return {"refused": refused, "killed": killed} | self.finish(out)


def is_damaged(folder):
    """Whether a folder fails its manifest."""
    try:
        files.verify_folder(folder)
    except ValueError:
        return True
    return False


# ---------------------------------------------------------------------------------------- the whole


def tasks(trainings, stages, pairs, trials):
    """{kind: (trial(folder, key), keys)}"""
    return pairs.tasks(trials) | {
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


def schedule(table, finished, only):
    """[(kind, key)] of the trials still to do, in an order that advances all kinds equally."""
    order = []
    for kind, (_, keys) in table.items():
        if only and kind not in only:
            continue
        order += [(i / len(keys), kind, key) for i, key in enumerate(keys)]
    return [(kind, key) for _, kind, key in sorted(order) if key not in finished.get(kind, {})]


def finished_trials(out):
    """{kind: {key: result}} of OUT/trials.jsonl; a line torn by a kill is skipped."""
    path = out / "trials.jsonl"
    results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            trial = json.loads(line)
            result = trial["result"] | {"commit": trial.get("commit", "")}
            results.setdefault(trial["kind"], {})[trial["key"]] = result
    return results


def worker(table, todo, out, work, deadline, commit):
    """Run trials until the deadline. Returns 1 if trials are left, else 0.

    Each result is written at once, with the number of files that contain a secret.
    """
    for kind, key in todo:
        if time.monotonic() > deadline:
            return 1
        folder = work / "trials" / f"{kind.replace(' ', '_')}-{key}" / "out"
        folder.parent.mkdir(parents=True)
        run_trial, _ = table[kind]
        result = run_trial(folder, key)
        written = [path for path in folder.parent.rglob("*") if path.is_file()]
        result["files"] = len(written)
        result["secrets"] = sum(CANARY[3:].encode() in path.read_bytes() for path in written)
        line = json.dumps({"kind": kind, "key": key, "commit": commit, "result": result})
        with open(out / "trials.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        shutil.rmtree(folder.parent)
    return 0


# --------------------------------------------------------------------------------------- the table


def share(results, key):
    """`n of m` trials for which a key holds."""
    return f"{sum(bool(result[key]) for result in results)} of {len(results)}"


def total(results, key):
    return sum(result[key] for result in results)


def total_of(results, key, whole):
    """`n of m`, both summed over trials."""
    return f"{total(results, key)} of {total(results, whole)}"


def training_rows(results):
    """[(fault, this program, the plain way)] of the trials in this file. results: {kind: list}."""
    rows = []
    if kills := results.get("kills"):
        in_place = results.get("kills, in place", [])
        name = f"{total(kills, 'kills')} kills at random moments of {len(kills)} trainings"
        plain = f"{share(in_place, 'identical')} (saving in place)"
        rows.append((f"{name}: ended as if undisturbed", share(kills, "identical"), plain))
        name = "states unreadable, of mixed steps"
        rows.append((name, bad_states(kills), bad_states(in_place)))
        rows.append(("steps lost beyond the last save", total(kills, "lost"), ""))
    if boundaries := results.get("boundaries"):
        name = "a kill at every boundary of a save and of the end: as if undisturbed"
        plain = share(results.get("boundaries, in place", []), "identical")
        rows.append((name, share(boundaries, "identical"), plain))
    if stops := results.get("signals"):
        name = "SIGTERM, SIGINT, SIGUSR1 at random moments: right exit code, step saved"
        rows.append((name, share(stops, "right"), ""))
        rows.append(("continued after them: as if undisturbed", share(stops, "identical"), ""))
        seconds = [result["seconds"] for result in stops]
        slowest = f"{max(seconds):.2f} s, {statistics.median(seconds):.2f} s"
        rows.append(("slowest stop, median", slowest, ""))
    if two := results.get("two trainings"):
        rows.append(("a second training in one folder: refused", share(two, "refused"), ""))
        name = "the first unharmed, or killed and its lock taken over: as if undisturbed"
        rows.append((name, share(two, "identical"), ""))
    if ranks := results.get("torchrun"):
        slowest = f"{max(result['seconds'] for result in ranks):.1f} s"
        rows.append(("one of two torchrun ranks killed: slowest end of the job", slowest, ""))
        rows.append(("continued after it: as if undisturbed", share(ranks, "identical"), ""))
    return rows


def bad_states(kills):
    """`n, m`: numbers of trainings with an unreadable state, and with a state of mixed steps."""
    conditions = [result["condition"] for result in kills]
    return f"{conditions.count('unreadable')}, {conditions.count('mixed')}"


def text_rows(results):
    """Rows of damaged files, texts and caches."""
    rows = []
    if damage := results.get("damage"):
        for part, name in (
            ("state", "files of states flipped in a bit, cut, grown, exchanged: noticed"),
            ("cache", "files of cached tokens: noticed"),
        ):
            noticed = total_of(damage, f"{part}_noticed", f"{part}_tried")
            rows.append((name, noticed, f"{total(damage, f'{part}_plain')} (loading alone)"))
    if lines := results.get("lines"):
        name = "rows kept of texts with 1 % of their lines damaged"
        plain = f"{total(lines, 'plain')} (load_dataset, json)"
        rows.append((name, total_of(lines, "kept", "expected"), plain))
    if archives := results.get("archives"):
        rows.append((".gz and .zst cut short: refused by default", share(archives, "refused"), ""))
        kept = total_of(archives, "kept", "expected")
        rows.append(("rows kept of them where accepted", kept, ""))
    if tokenising := results.get("tokenising killed"):
        kills = total(tokenising, "kills")
        name = f"{kills} kills while tokenising: no half cache, then the same tokens"
        rows.append((name, share(tokenising, "identical"), ""))
    if endless := results.get("endless line"):
        name = f"memory for one line of {endless[0]['megabytes']} MB"
        rows.append((name, f"{endless[0]['growth_mb']:.0f} MB", ""))
    return rows


def pair_rows(results):
    """Rows of pairs, dying output, unfinished work and changed identities."""
    rows = []
    if pairs := results.get("recipe and weights"):
        name = f"{total(pairs, 'between')} kills between recipe and weights: one whole SAE loads"
        plain = f"{len(pairs) - total(pairs, 'between')} of {len(pairs)} (without the sum)"
        rows.append((name, share(pairs, "whole"), plain))
        rows.append(("saved again: the new SAE, no leftover", share(pairs, "identical"), ""))
    for kind, name in (
        ("exports", "kills of {} `export --overwrite`: the old or the new one, whole"),
        ("labels and contexts", "kills of {} runs that relabel: no mixed label, none paid lost"),
    ):
        if trials := results.get(kind):
            name = f"{total(trials, 'killed')} " + name.format(len(trials))
            rows.append((name, share(trials, "whole"), ""))
            rows.append(("run again: the new result", share(trials, "identical"), ""))
    if output := results.get("output"):
        name = "output that dies (pipe, full, closed, terminal, hangup): right exit code"
        rows.append((name, share(output, "right"), ""))
        rows.append(("and the whole result", share(output, "identical"), ""))
    for kind, name in (
        ("unfinished tokens", "unfinished tokens damaged: the right tokens in the end"),
        ("torn contexts", "torn contexts files: passed over, and removed"),
    ):
        if trials := results.get(kind):
            rows.append((name, share(trials, "identical"), ""))
    if identity := results.get("other language model or text"):
        name = "resumed with another language model, dtype or text: refused, nothing touched"
        rows.append((name, share(identity, "refused"), ""))
        rows.append(("then continued with the right one", share(identity, "identical"), ""))
    return rows


def endpoint_rows(results):
    """Rows of the endpoint that fails three times in ten."""
    endpoint = results.get("endpoint")
    if not endpoint:
        return []
    at_the_end = results.get("endpoint, written at the end", [])
    features, kills = total(endpoint, "features"), total(endpoint, "kills")
    name = f"{features} features of an endpoint with 30 % faults, {kills} kills: lost, twice"
    paid_twice = total_of(endpoint, "paid_twice", "features")
    plain = f"{total_of(at_the_end, 'paid_twice', 'features')} (written at the end)"
    tokens = f"{total(endpoint, 'counted')}, {total(endpoint, 'billed')}"
    return [
        (name, f"{total(endpoint, 'lost')}, {total(endpoint, 'twice')}", ""),
        ("answers on disk asked for again", total(endpoint, "again"), ""),
        ("answers paid for twice (up to four are in flight at a kill)", paid_twice, plain),
        ("tokens counted, tokens billed without those", tokens, ""),
    ]


def report(results, trainings):
    """(figures, Markdown table) of {kind: {key: result}}."""
    by_kind = {kind: list(by_key.values()) for kind, by_key in results.items()}
    rows = training_rows(by_kind) + pair_rows(by_kind)
    rows += text_rows(by_kind) + endpoint_rows(by_kind)
    everything = [result for of_kind in by_kind.values() for result in of_kind]
    name = f"secrets found in {total(everything, 'files')} files written"
    rows.append((name, total(everything, "secrets"), ""))
    if cost := by_kind.get("cost"):
        name = "saving 67M parameters every ten minutes, share of the time"
        safe, plain = (f"{100 * cost[0][key] / 600:.2f} %" for key in ("save_s", "plain_s"))
        rows.append((name, safe, f"{plain} (in place)"))
    figures = {kind: len(of_kind) for kind, of_kind in by_kind.items()}
    figures["seconds_of_a_training"] = round(trainings.seconds, 2)
    figures["boundaries"] = trainings.boundaries[False]
    lines = ["| fault | this program | plain way |", "|---|---|---|"]
    lines += [f"| {fault} | {value} | {plain} |" for fault, value, plain in rows]
    return figures, "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------- command line


def parse_args():
    parser = small_parser("tests.campaign", __doc__)
    add = parser.add_argument
    trials_help = "trainings killed twice each; other faults in proportion (200)"
    add("--trials", type=int, default=200, help=trials_help)
    add("--minutes", type=float, default=25, help="start no trial after this long (25)")
    cores = os.cpu_count() or 1
    add("--jobs", type=int, default=cores, help="trials at one time (the number of cores)")
    add("--only", nargs="+", help="kinds of trials, as named in OUT/trials.jsonl (all)")
    out = Path("outputs/campaign")
    add("--out", type=Path, default=out, help="folder of the results (outputs/campaign)")
    add("--publish", action="store_true", help="write to docs/fault_campaign.json too")
    return parser.parse_args()


def prepare_environment(work):
    """Settings that every child inherits."""
    os.environ |= {
        "DATA_DIR": str(work / "data"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "no_proxy": "127.0.0.1",
    }
    os.environ |= dict.fromkeys(files.SECRETS, CANARY)
    # No thread may exist where children are forked: a lock it held would stay locked in the child.
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0


def run_workers(args, table, todo, work, deadline):
    """Share the trials among args.jobs processes; their exit codes."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=files.ROOT).stdout.strip()

    def start(index):
        def run():
            global SHARED
            SHARED = Shared()  # not shared with the other workers
            return worker(table, todo[index :: args.jobs], args.out, work, deadline, commit)

        return fork(run, args.out / f"worker{index}.log")

    pids = [start(index) for index in range(args.jobs)]
    return [wait(pid, 60 * args.minutes + 900) for pid in pids]


def write_results(args, results, trainings):
    """Write campaign.json and table.md, and print the table."""
    figures, markdown = report(results, trainings)
    commits = {result["commit"] for by_key in results.values() for result in by_key.values()}
    command = f"python -m tests.campaign --trials {args.trials}"
    if args.only:
        command += " --only " + " ".join(map(shlex.quote, args.only))
    summary = {
        "command": command,
        "commits": sorted(commits),
        "trials": figures,
        "table": markdown.splitlines(),
    }
    files.save_json(summary | {"results": results}, args.out / "campaign.json", indent=None)
    files.save_text(markdown, args.out / "table.md")
    if args.publish:  # beside those of other commands
        path = files.ROOT / "docs" / "fault_campaign.json"
        published = [old for old in files.load_json(path) if old["command"] != command]
        files.save_json([*published, summary], path)
    print(markdown)


def main():
    args = parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="campaign-"))
    prepare_environment(work)
    from tests.campaign_pairs import Pairs
    from tests.campaign_stages import Stages

    trainings, stages = Trainings(work), Stages(work, args.out)
    pairs = Pairs(work)
    boundaries = list(trainings.boundaries.values())
    print(f"one training takes {trainings.seconds:.2f} s; boundaries {boundaries}", flush=True)
    table = tasks(trainings, stages, pairs, args.trials)
    todo = schedule(table, finished_trials(args.out), args.only)
    codes = run_workers(args, table, todo, work, deadline)
    results = finished_trials(args.out)
    write_results(args, results, trainings)
    if max(codes) < 2:
        shutil.rmtree(work, ignore_errors=True)
    if any(codes):
        why = "time is up"
        if max(codes) > 1:
            why = f"a worker failed, see {args.out}/worker*.log and {work}"
        n_done = sum(len(by_key) for by_key in results.values())
        print(f"{why}: {n_done} trials are done; the same command continues")
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
