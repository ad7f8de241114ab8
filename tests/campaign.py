"""Kills, signals and damage by the hundred: `python -m tests.campaign --trials 200`. Not a part of the test suite.

Children are forked from a process that has torch and transformers imported; each trains three SAEs at once on a tiny language model, saving
every step. Every trial ends with the training finished, and its weights and metrics are compared with an uninterrupted run's. Beside it the
same kills with saving in place. Run again, it goes on where it stopped. Writes OUT/campaign.json and prints the table.

SIGKILL cannot test fsync: what was written survives in the kernel. Only a power cut would.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import tempfile
import time
from pathlib import Path

import torch
import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from src import checkpoint, files
from src.config import run_stage
from src.trainer import Trainer

MODELS = ["TopK", "RouteSAE", "Vanilla"]
CONDITIONS = ["ok", "unreadable", "mixed", "none"]
SHARED = mmap.mmap(-1, 16)  # (newest step whose save returned, step continued from), seen by parent and child


def share(index, value):
    SHARED[8 * index : 8 * index + 8] = struct.pack("q", value)


def shared(index):
    return struct.unpack("q", SHARED[8 * index : 8 * index + 8])[0]


def naive_save(folder, step, meta, parts, keep=2):
    """Saving in place, as most training loops do."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        torch.save({"step": step, "part": part}, folder / f"{name}.pt")
    (folder / "meta.json").write_text(json.dumps({"step": step, "format_version": 1} | meta))
    return folder


def naive_find(folder):
    return (folder, json.loads((folder / "meta.json").read_text())) if (folder / "meta.json").exists() else None


def naive_condition(folder):
    """ok, unreadable, mixed (files of different steps) or none."""
    if not folder.exists() or not any(folder.iterdir()):
        return "none"
    try:
        steps = {torch.load(path, weights_only=True)["step"] for path in folder.glob("*.pt")}
        steps.add(json.loads((folder / "meta.json").read_text())["step"])
    except Exception:  # whatever it is, the state cannot be read
        return "unreadable"
    return "ok" if len(steps) == 1 else "mixed"


def count_boundaries(kill_at):
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
                        share(1, counted["calls"])
                if not half:
                    result = original(*args, **kwargs)
            return result

        setattr(owner, name, call)

    for owner, names in ((os, ("fsync", "replace", "mkdir", "unlink", "rmdir", "rename")), (files._Summed, ("__init__",))):
        for name in names:
            wrap(owner, name)
    save = checkpoint.save_state

    def third(*args, **kwargs):
        counted["saves"] += 1
        if counted["saves"] == 4:
            counted["saves"] = -(10**9)  # one save is enough; the final weights come after it
        return save(*args, **kwargs)

    checkpoint.save_state = third
    finish = Trainer._finish

    def last(*args):
        counted["saves"] = 3
        return finish(*args)

    Trainer._finish = last


class Campaign:
    def __init__(self, out, minutes):
        self.out, self.deadline = out, time.monotonic() + 60 * minutes
        self.file = out / "campaign.json"
        self.done = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.work = Path(tempfile.mkdtemp(prefix="campaign-"))
        os.environ |= {"DATA_DIR": str(self.work / "data"), "TOKENIZERS_PARALLELISM": "false"}
        torch.set_num_threads(1)  # children are forked: no thread may exist here, its locks would stay locked in them
        tqdm.tqdm.monitor_interval = 0
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(files.DEMO_LM)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(self.work / "lm")
        tokenizer.save_pretrained(self.work / "lm")
        lines = [json.dumps({"text": f"Return the {i}th of {i * 7} values, or raise ValueError. " * 8}) for i in range(120)]
        (self.work / "text.jsonl").write_text("\n".join(lines))

    def child(self, out, naive=False, kill_at=None, log=None):
        """Forks a training into out; its pid."""
        share(1, 0)
        pid = os.fork()
        if pid:
            return pid
        with contextlib.suppress(BaseException):
            handle = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            if naive:
                checkpoint.save_state, checkpoint.find_state = naive_save, naive_find
                checkpoint.load_part = lambda path, name: torch.load(path / f"{name}.pt", weights_only=True)["part"]
            if kill_at is not None:
                count_boundaries(kill_at)
            save, find = checkpoint.save_state, checkpoint.find_state

            def saving(folder, step, *rest):
                path = save(folder, step, *rest)
                share(0, step)
                return path

            def finding(folder):
                found = find(folder)
                if kill_at is None:
                    share(1, found[1]["step"] if found else 0)
                return found

            checkpoint.save_state, checkpoint.find_state = saving, finding
            argv = ["--model", *MODELS, "--model_path", str(self.work / "lm"), "--data_path", str(self.work / "text.jsonl"), "--output_dir", str(out)]
            argv += ["--dtype", "float32", "--latent_size", "512", "--k", "8", "--max_length", "32", "--batch_size", "4", "--max_samples", "160"]
            code = 99
            try:
                code = run_stage("train", lambda cfg: Trainer(cfg).run(), [*argv, "--tag", "t", "--save_every", "1", "--target_l0", "8"])
            finally:
                os._exit(code)
        os._exit(98)

    def wait(self, pid, limit=120):
        """Exit code of a child; one that hangs for `limit` seconds ends the campaign."""
        started = time.monotonic()
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() - started > limit:
                os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"a training hung for {limit} s")
            time.sleep(0.002)

    def naive_condition(self, folder):
        """The same, asked in a child: after torch.load in the parent a few per cent of its later children hung."""
        pid = os.fork()
        if not pid:
            os._exit(CONDITIONS.index(naive_condition(folder)))
        return CONDITIONS[self.wait(pid)]

    def result(self, out):
        """SHA-256 over the final weights and the metrics without what a clock says."""
        total = hashlib.sha256()
        for path in sorted((out / "SAE_models").glob("*.pt")):
            total.update(path.name.encode() + path.read_bytes())
        for line in (out / "runs" / "t" / "metrics.jsonl").read_text().splitlines():
            total.update(json.dumps({k: v for k, v in json.loads(line).items() if "tokens_per_s" not in k}).encode())
        return total.hexdigest()

    def kill_trial(self, out, seed, naive):
        """Two kills at random times, then to the end."""
        draw, states = random.Random(seed), out / "runs" / "t" / "state"
        found = {"condition": "ok", "lost": 0, "identical": False}
        for _ in range(2):
            share(0, 0)
            pid = self.child(out, naive)
            time.sleep(draw.uniform(0, self.seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.wait(pid)
            saved = shared(0)
            condition = self.naive_condition(states) if naive else "ok"
            if condition in ("unreadable", "mixed"):
                found["condition"] = condition
                if condition == "unreadable":
                    return found
            if not naive and saved and states.exists():
                try:
                    newest = max(int(path.name[5:]) for path in checkpoint.states(states) if not self.bad(path))
                    found["lost"] += max(0, saved - newest)
                except ValueError:
                    found["condition"] = "unreadable"
        code = self.wait(self.child(out, naive))
        if code:
            found["condition"] = "unreadable"
        found["identical"] = not code and self.result(out) == self.reference
        return found

    @staticmethod
    def bad(path):
        try:
            files.verify_folder(path)
        except ValueError:
            return True
        return False

    def boundary_trial(self, out, k):
        killed = self.wait(self.child(out, kill_at=k)) == -signal.SIGKILL
        code = self.wait(self.child(out))
        return {"killed": killed, "identical": not code and self.result(out) == self.reference}

    def signal_trial(self, out, seed):
        draw = random.Random(seed)
        number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        share(0, 0)
        pid = self.child(out)
        time.sleep(draw.uniform(0.1, self.seconds))
        started = time.monotonic()
        os.kill(pid, number)
        code = self.wait(pid)
        took = time.monotonic() - started
        right = code in (0, 130 if number == signal.SIGINT else 143, -number)  # -number: it came before training had begun
        rest = self.wait(self.child(out))
        return {"code": code, "right": right, "seconds": took, "identical": not rest and self.result(out) == self.reference}

    def corruption_trials(self, folder, n):
        """Bits flipped in each file of a state: by what share the manifest sees it, and what loading alone sees."""
        draw, found = random.Random(0), {"flips": 0, "detected": 0, "weights_flips": 0, "weights_detected_by_loading_alone": 0}
        path = checkpoint.save_state(folder, 1, {"x": 1}, {"a": {"t": torch.randn(1000)}, "b": {"t": torch.randn(1000)}})
        for file in sorted(path.iterdir()):
            content = file.read_bytes()
            for _ in range(n):
                changed = bytearray(content)
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
                file.write_bytes(changed)
                found["flips"] += 1
                found["detected"] += self.bad(path)
                if file.suffix == ".pt":
                    found["weights_flips"] += 1
                    try:
                        torch.load(file, weights_only=True)
                    except Exception:  # any refusal is a detection
                        found["weights_detected_by_loading_alone"] += 1
            file.write_bytes(content)
        return found

    def cost(self, folder):
        """Seconds to write and to verify the state of one SAE of 67M parameters (2,048 x 16,384), beside 10 minutes of training."""
        part = {"sae": {"w": torch.zeros(67_000_000)}, "z": torch.zeros(67_000_000)}
        started = time.monotonic()
        path = checkpoint.save_state(folder, 1, {}, {"a": part})
        wrote = time.monotonic() - started
        files.verify_folder(path)
        return {"save_s": wrote, "verify_s": time.monotonic() - started - wrote, "percent_of_10_minutes": 100 * wrote / 600}

    def each(self, kind, keys, trial):
        """Runs trial(folder, key) for the keys not done yet, as far as the time goes."""
        results = self.done.setdefault(kind, {})
        for key in keys:
            if str(key) in results:
                continue
            if time.monotonic() > self.deadline:
                print(f"{kind}: time is up at {len(results)}; run it again to go on")
                break
            folder = self.work / f"{kind}-{key}"
            results[str(key)] = trial(folder, key)
            shutil.rmtree(folder, ignore_errors=True)
            files.save_json(self.done, self.file)
        return list(results.values())

    def run(self, trials):
        out = self.work / "reference"
        self.wait(self.child(out, log=self.work / "log"))  # tokenises; the second is timed
        self.reference = self.result(out)
        started = time.monotonic()
        again = self.wait(self.child(self.work / "timed"))
        self.seconds = time.monotonic() - started
        assert again == 0 and self.result(self.work / "timed") == self.reference, (self.work / "log").read_text()
        self.wait(self.child(self.work / "counted", kill_at=-1))
        boundaries = shared(1)
        print(f"one training takes {self.seconds:.2f} s; its third save and its end have {boundaries} boundaries")
        rows = [("fault", "tried", "unreadable", "mixed", "steps lost beyond the last save", "end identical")]
        edges = self.each("boundaries", range(boundaries), self.boundary_trial)
        for name, naive in (("kills", False), ("kills, saving in place", True)):
            found = self.each(name, range(trials), lambda folder, seed, naive=naive: self.kill_trial(folder, seed, naive))
            counts = [sum(r["condition"] == what for r in found) for what in ("unreadable", "mixed")]
            lost = "" if naive else sum(r["lost"] for r in found)
            rows.append((f"{name}, two a trial", len(found), *counts, lost, sum(r["identical"] for r in found)))
        rows.append(("kill at a boundary of a save", len(edges), *[""] * 3, sum(r["identical"] for r in edges)))
        stops = self.each("signals", range(max(1, trials // 4)), self.signal_trial)
        rows.append(("SIGTERM, SIGINT, SIGUSR1", len(stops), *[""] * 3, sum(r["identical"] for r in stops)))
        flips = self.each("corruption", [100], self.corruption_trials)
        cost = self.each("cost", [0], lambda folder, _: self.cost(folder))
        print("\n".join("| " + " | ".join(map(str, row)) + " |" for row in [rows[0], ["---"] * 6, *rows[1:]]))
        if stops:
            wrong = sum(not r["right"] for r in stops)
            print(f"signals: {wrong} wrong exit codes, slowest stop {max(r['seconds'] for r in stops):.2f} s")
            print(f"boundaries where the kill came: {sum(r['killed'] for r in edges)} of {boundaries}")
        print(f"flipped bits: {flips}\ncost of a save: {cost}")
        shutil.rmtree(self.work)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200, help="random kills, for each way of saving (default: 200)")
    parser.add_argument("--minutes", type=float, default=25, help="stop after this long (default: 25)")
    parser.add_argument("--out", type=Path, default=Path("outputs/campaign"), help="folder of campaign.json (default: outputs/campaign)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    Campaign(args.out, args.minutes).run(args.trials)
