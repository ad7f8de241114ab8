"""The campaign's trials of pairs of files, of output that dies, and of unfinished work.

A pair is killed between its two writes, standard streams fail under a stage, an unfinished
tokenisation is damaged, and a training is resumed with another language model or text.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import resource
import shutil
import signal
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from src import checkpoint, data, export_formats, files
from src.config import run_stage
from src.interpreter import Interpreter
from src.trainer import Trainer
from tests.campaign import DiskCalls, fork, wait
from tests.campaign_stages import call_in_child

DISK_CALLS = ("fsync", "replace", "chmod", "unlink")
DAMAGES = ("flipped", "cut", "grown", "emptied")
WAYS_TO_DIE = ("closed pipe", "pipe closed later", "full", "none", "terminal gone", "hangup")
STEPS = 6


class Pairs:
    """Trials. Each gets a folder that does not exist yet, and a key for its draws."""

    def __init__(self, work):
        self.work = work
        self.tokenizer = AutoTokenizer.from_pretrained(files.DEMO_LM)
        # Two SAEs of one title: saving the second over the first is the pair of writes.
        self.old, self.new = work / "old", work / "new"
        for out, k in ((self.old, 8), (self.new, 4)):
            assert wait(fork(lambda out=out, k=k: self.train(out, k), work / "pairs.log")) == 0
        self.trained = self.weights(self.old)
        self.title = next((self.old / "SAE_models").glob("*.pt")).stem
        self.sums = [
            call_in_child(lambda out=out: self.sum_and_k(out)) for out in (self.old, self.new)
        ]
        assert wait(fork(lambda: self.export(self.old), work / "pairs.log")) == 0
        text = "Document {}: the {}th value of {} is {}."
        texts = [text.format(i, i % 97, i * i, i * 7) for i in range(2500)]
        (work / "short.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        self.tokens = call_in_child(lambda: self.tokenise(work / "data-of-short"))
        self.unfinished = work / "data-unfinished"
        assert wait(fork(self.leave_tokens_unfinished)) == 9
        self.stopped = work / "stopped"
        assert wait(fork(lambda: self.train(self.stopped, kill_step=3))) == 9
        self.labelled = work / "labelled"
        self.contexts(self.labelled, "bear")

    def tasks(self, trials):
        """{kind: (trial(folder, key), keys)}, as in tests.campaign."""
        return {
            "recipe and weights": (self.checkpoint_pair, range(trials * 6 // 5)),
            "exports": (self.export_pair, range(max(4, trials // 4))),
            "labels and contexts": (self.labels_pair, range(max(4, trials // 4))),
            "output": (self.output, range(max(24, trials * 6 // 5))),
            "unfinished tokens": (self.unfinished_tokens, range(max(16, trials // 2))),
            "torn contexts": (self.torn_contexts, range(max(4, trials // 5))),
            "other language model or text": (self.identity, range(max(3, trials // 5))),
        }

    def argv(self, out, k=8, **changed):
        """Options of a training of one SAE, a few steps long."""
        options = {
            "model_path": self.work / "lm",
            "data_path": self.work / "text.jsonl",
            "output_dir": out,
            "dtype": "float32",
            "latent_size": 64,
            "k": k,
            "max_length": 32,
            "batch_size": 4,
            "max_samples": 4 * STEPS,
            "save_every": 1,
        }
        options |= changed
        return ["--model", "TopK"] + [f"--{name}={value}" for name, value in options.items()]

    def train(self, out, k=8, kill_step=None, **changed):
        """Run a training as train.py does; it dies after the save of kill_step. Its exit code."""
        save_state = checkpoint.save_state

        def save_and_die(folder, step, *rest):
            path = save_state(folder, step, *rest)
            if step == kill_step:
                os._exit(9)
            return path

        checkpoint.save_state = save_and_die

        def work(cfg):
            loss = Trainer(cfg).run()
            print(f"Training complete. Final loss: {loss:.4f}")

        return run_stage("train", work, self.argv(out, k, **changed))

    @staticmethod
    def weights(out):
        return [path.read_bytes() for path in sorted((out / "SAE_models").glob("*.pt"))]

    @staticmethod
    def load(out):
        """(SAE, recipe) in an output folder."""
        return checkpoint.load(next((out / "SAE_models").glob("*.pt")))

    def sum_and_k(self, out):
        """[sum of the weights that load, sum in their recipe, k of the recipe]"""
        sae, recipe = self.load(out)
        return [checkpoint.weights_sum(sae), recipe["weights_sum"], sae.k]

    # ------------------------------------------------------------------------ recipe and weights

    def checkpoint_pair(self, out, key):
        """Kill a save after its recipe and before its weights are in place.

        Even keys: at a call that changes the disk. Odd keys: after some bytes of the weights.
        """
        shutil.copytree(self.old / "SAE_models", out / "SAE_models")
        path = out / "SAE_models" / f"{self.title}.pt"
        recipe_before, weights_before = path.with_suffix(".json").read_bytes(), path.read_bytes()
        draw = random.Random(key)

        def save(is_killed):
            sae, recipe = self.load(self.new)
            recipe.pop("weights_sum")
            if is_killed:
                kill_after_recipe(path, draw, key % 2)
            checkpoint.save(sae, recipe, path.parent, self.title)

        killed = wait(fork(lambda: save(True), out / "log")) in (-signal.SIGKILL, -signal.SIGXFSZ)
        recipe_is_new = path.with_suffix(".json").read_bytes() != recipe_before
        between = recipe_is_new and path.read_bytes() == weights_before
        loaded = call_in_child(lambda: self.sum_and_k(out))
        assert wait(fork(lambda: save(False), out / "log")) == 0
        names = sorted(file.name for file in path.parent.iterdir())
        ended = call_in_child(lambda: self.sum_and_k(out)) == self.sums[1]
        tidy = names == [f"{self.title}.json", f"{self.title}.pt"]
        return {
            "killed": killed,
            "between": between,
            "whole": loaded in self.sums,
            "identical": ended and tidy,
        }

    # ---------------------------------------------------------------------------------- exports

    def export(self, out, source=None):
        sae, recipe = self.load(source or out)
        export_formats.export(sae, recipe, out, "hf", overwrite=True)

    def export_pair(self, out, key):
        """Kill `export --overwrite` somewhere; every second trial has no exchange in one step."""
        shutil.copytree(self.old / "export", out / "export")
        folder = out / "export" / "hf" / self.title
        draw = random.Random(key)
        whole = [self.sums[0][0], self.sums[1][0]]

        def export_killed():
            disk = DiskCalls(draw.randrange(30))
            for name in (*DISK_CALLS, "mkdir"):
                disk.wrap(os, name)
            disk.wrap(shutil, "rmtree")
            if key % 2:
                files._exchange = lambda *_: False
            else:
                disk.wrap(files, "_exchange")
            if draw.random() < 0.3:
                limit_file_size(draw.randrange(1, 16_000))
            disk.counting = True
            self.export(out, self.new)

        def exported_sum():
            files.restore_folder(folder)
            sae, recipe = checkpoint.load(folder)
            assert (folder / "README.md").exists()
            assert recipe["weights_sum"] == checkpoint.weights_sum(sae)
            return recipe["weights_sum"]

        killed = wait(fork(export_killed, out / "log")) < 0
        is_whole = call_in_child(exported_sum) in whole
        assert wait(fork(lambda: self.export(out, self.new), out / "log")) == 0
        tidy = [path.name for path in folder.parent.iterdir()] == [folder.name]
        ended = call_in_child(exported_sum) == whole[1]
        return {"killed": killed, "whole": is_whole, "identical": ended and tidy}

    # ----------------------------------------------------------------------- labels and contexts

    @staticmethod
    def contexts(out, word):
        """Write S_contexts.json, whose latents fire on `word`."""
        out.mkdir(exist_ok=True)
        table = {}
        for latent in range(8):
            contexts = [
                {"activation": 9.0 - i, "context": f"a <ACTIVATED>{word}</ACTIVATED> {latent} {i}"}
                for i in range(4)
            ]
            table[str(latent)] = {"contexts": {word: contexts}}
        files.save_json({"latent_context_map": table}, out / "S_contexts.json")

    @staticmethod
    def interpret(out):
        argv = [str(out / "S_contexts.json"), "--engine", "heuristic", "--output_dir", str(out)]
        return run_stage("interpret", lambda cfg: Interpreter(cfg).run(), argv)

    @staticmethod
    def labels(out):
        path = out / "interpret" / "interp_S.json"
        return files.load_json(path) if path.exists() else {}

    def labels_pair(self, out, key):
        """Labels that were paid for, then other contexts, whose interpretation is killed.

        No label may stand under the sum of contexts that it does not describe, and none that was
        paid for may be lost.
        """
        shutil.copytree(self.labelled, out)
        assert wait(fork(lambda: self.interpret(out), out / "log")) == 0
        paid = self.labels(out)
        for label in paid.values():
            label |= {"explanation": "paid: bear", "engine": "m", "score": 4}
        files.save_json(paid, out / "interpret" / "interp_S.json")
        self.contexts(out, "fox")
        new_sum = files.digest((out / "S_contexts.json").read_bytes())
        draw = random.Random(key)

        def interpret_killed():
            disk = DiskCalls(draw.randrange(24))
            for name in DISK_CALLS:
                disk.wrap(os, name)
            write = Interpreter._write

            def write_and_count(*args):
                disk.counting = True
                return write(*args)

            Interpreter._write = write_and_count
            return self.interpret(out)

        killed = wait(fork(interpret_killed, out / "log")) == -signal.SIGKILL

        def is_whole():
            kept = self.labels(out)
            own = [label for label in kept.values() if label["contexts_sum"] == new_sum]
            right = all("fox" in label["explanation"] for label in own)
            files_of_labels = (out / "interpret").glob("interp_S*.json")
            return right and any(files.load_json(path) == paid for path in files_of_labels)

        whole = is_whole()
        ended = wait(fork(lambda: self.interpret(out), out / "log")) == 0
        final = self.labels(out)
        of_new = all(label["contexts_sum"] == new_sum for label in final.values())
        identical = ended and is_whole() and of_new and len(final) == 8
        return {"killed": killed, "whole": whole, "identical": identical}

    # ------------------------------------------------------------------------- output that dies

    def output(self, out, key):
        """A stage whose output dies. It must end with code 0 and its whole result."""
        way = WAYS_TO_DIE[key % len(WAYS_TO_DIE)]
        stage = "interpret" if key // len(WAYS_TO_DIE) % 4 == 3 else "train"
        draw = random.Random(key)
        streams = draw.choice([(1,), (2,), (1, 2), (1, 2)])
        out.mkdir()
        if stage == "interpret":
            self.contexts(out, "fox")

        def run():
            return self.interpret(out) if stage == "interpret" else self.train(out)

        code = run_with_dying_output(run, way, streams, draw, out / "log")
        allowed = (0, 143, -signal.SIGHUP) if way == "hangup" else (0,)
        ended = code in allowed
        if code in (143, -signal.SIGHUP):  # the state is saved; the same command continues
            wait(fork(run, out / "log"))
        if stage == "interpret":
            labels = self.labels(out).values()
            identical = len(labels) == 8 and all("fox" in label["explanation"] for label in labels)
        else:
            identical = self.weights(out) == self.trained
        return {"way": way, "stage": stage, "code": code, "right": ended, "identical": identical}

    # -------------------------------------------------------------------------- unfinished work

    def tokenise(self, data_dir):
        """SHA-256 of all tokens."""
        os.environ["DATA_DIR"] = str(data_dir)
        rows = data.Rows(self.work / "short.jsonl", self.tokenizer, 64, "all")
        return data.hashlib.sha256(rows.tokens.tobytes()).hexdigest()

    def leave_tokens_unfinished(self):
        """Tokenise until the second save, then die."""
        data.SAVE_SECONDS, data.MAX_PIECES = 0, 200
        save = data.StreamBuilder.save

        def save_and_die(builder, position):
            save(builder, position)
            if builder.total > 20_000:
                builder.file.flush()
                os._exit(9)

        data.StreamBuilder.save = save_and_die
        self.tokenise(self.unfinished)

    def unfinished_tokens(self, out, key):
        """Damage one file of a tokenisation under way. The next process must not seal it."""
        shutil.copytree(self.unfinished, out / "data")
        draw = random.Random(key)
        paths = sorted((out / "data" / "cache").glob(".building-*/made/*"))
        path = paths[key % len(paths)]
        content = path.read_bytes()
        changed = damaged(content, DAMAGES[key // len(paths) % len(DAMAGES)], draw)
        path.write_bytes(changed)
        identical = call_in_child(lambda: self.tokenise(out / "data")) == self.tokens
        return {"file": path.name, "identical": identical}

    def torn_contexts(self, out, key):
        """Kill the write of a contexts file after some bytes. The whole one is taken after that."""
        folder = out / "contexts"
        folder.mkdir(parents=True)
        self.contexts(folder, "fox")
        draw = random.Random(key)
        size = (folder / "S_contexts.json").stat().st_size

        def rewrite():
            limit_file_size(draw.randrange(1, size))
            self.contexts(folder, "wolf")

        killed = wait(fork(rewrite)) == -signal.SIGXFSZ
        torn = len(list(folder.iterdir())) > 1

        def interpret():
            argv = ["--engine", "heuristic", "--output_dir", str(out)]
            return run_stage("interpret", lambda cfg: Interpreter(cfg).run(), argv)

        ended = wait(fork(interpret, out / "log")) == 0
        labels = self.labels(out).values()
        right = len(labels) == 8 and all("fox" in label["explanation"] for label in labels)
        tidy = [path.name for path in folder.iterdir()] == ["S_contexts.json"]
        return {"killed": killed, "torn": torn, "identical": ended and right and tidy}

    def identity(self, out, key):
        """Resume a stopped training with another language model, dtype or text, then the right one.

        One tensor of the language model is multiplied, or one letter of the text is changed.
        """
        shutil.copytree(self.stopped, out)
        what = ("weights", "text", "dtype")[key % 3]
        draw = random.Random(key)
        changed = {"dtype": "bfloat16"} if what == "dtype" else {}
        if what == "text":
            text = bytearray((self.work / "text.jsonl").read_bytes())
            letters = [i for i, byte in enumerate(text[:40_000]) if chr(byte).isalpha()]
            index = draw.choice([i for i in letters if text[i - 1 : i + 2].isalpha()])
            text[index] = ord("x") if text[index] != ord("x") else ord("y")
            changed = {"data_path": out.with_name("other") / "text.jsonl"}
        if what == "weights":
            changed = {"model_path": out.with_name("other")}
        out.with_name("other").mkdir()
        if what == "text":
            (out.with_name("other") / "text.jsonl").write_bytes(text)
        if what == "weights":
            number = draw.randrange(10**6)
            folder = out.with_name("other")
            assert wait(fork(lambda: self.save_other_lm(folder, number), out / "log")) == 0
        before = contents(out / "runs")
        code = wait(fork(lambda: self.train(out, **changed), out / "log"))
        refused = code == 2 and contents(out / "runs") == before
        ended = wait(fork(lambda: self.train(out), out / "log")) == 0
        identical = ended and self.weights(out) == self.trained
        return {"what": what, "code": code, "refused": refused, "identical": identical}

    def save_other_lm(self, folder, number):
        """Save the language model with one tensor, chosen by number, multiplied by 1.01."""
        model = AutoModelForCausalLM.from_pretrained(self.work / "lm")
        parameters = list(model.parameters())
        with torch.no_grad():
            parameters[number % len(parameters)].mul_(1.01)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self.work / "lm").save_pretrained(folder)


def contents(folder):
    """{name: content} of all files but locks, which name their last process."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def damaged(content, how, draw):
    changed = bytearray(content)
    if how == "flipped":
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        changed = changed[: draw.randrange(len(changed))]
    elif how == "grown":
        index = draw.randrange(len(changed))
        changed[index:index] = draw.randbytes(draw.randrange(1, 99))
    else:
        changed = b""
    return bytes(changed)


def limit_file_size(n_bytes):
    """The kernel kills this process when it writes more than n_bytes to a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def kill_after_recipe(path, draw, by_bytes):
    """Kill this process between the writes of a recipe and of the weights at path."""
    disk = DiskCalls(draw.randrange(8))
    for name in DISK_CALLS:
        disk.wrap(os, name)
    n_bytes = draw.randrange(1, path.stat().st_size)
    write_atomic = files.write_atomic

    def write_and_arm(target, write):
        if os.path.basename(target) == path.name:
            if by_bytes:
                limit_file_size(n_bytes)
            else:
                disk.counting = True
        return write_atomic(target, write)

    files.write_atomic = write_and_arm


def run_with_dying_output(run, way, streams, draw, log):
    """Exit code of run() in a child whose standard streams fail in one of WAYS_TO_DIE."""
    read_end, write_end = pty.openpty() if way in ("terminal gone", "hangup") else os.pipe()
    n_bytes = draw.randrange(1, 400)
    delay = draw.uniform(0, 0.3)

    def child():
        os.close(read_end)
        if way == "hangup":
            import fcntl
            import termios

            os.setsid()
            fcntl.ioctl(write_end, termios.TIOCSCTTY, 0)
        target = os.open("/dev/full", os.O_WRONLY) if way == "full" else write_end
        for number in streams:
            os.dup2(target, number)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        if way == "none":  # as Python begins where a descriptor is closed
            for number in streams:
                os.close(number)
                setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
        code = run()
        try:  # as Python ends
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except OSError:
            return 120
        return code

    pid = fork(child, log)
    os.close(write_end)
    if way == "pipe closed later":
        os.read(read_end, n_bytes)
    if way in ("terminal gone", "hangup"):
        with contextlib.suppress(OSError):
            os.read(read_end, n_bytes)
        time.sleep(delay)
    os.close(read_end)
    return wait(pid)
