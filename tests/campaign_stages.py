"""The campaign's trials around training.

Endpoints that misbehave, damaged texts, caches and states, and what saving costs.
"""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai  # noqa: F401  imported before forking, so that no child spends a second on it
import torch
import zstandard
from transformers import AutoTokenizer

from src import checkpoint, data, files
from src.config import run_stage
from src.data import Rows
from src.interpreter import Interpreter
from src.sources import DataError, Documents, Report
from tests.campaign import fork, is_damaged, kill_after, wait

FEATURES = 40  # in the contexts file that is interpreted
TOKENS_BILLED = 110  # by the endpoint for one answer
LABEL = json.dumps(
    {"category": "low-level", "score": 4, "polysemantic": False, "explanation": "the word fox"}
)
FAULTS = ["429", "500", "html", "hang", "cut", "no json", "list", "prose"]


def call_in_child(work):
    """What work() returns (as JSON). In a child, because its threads and memory end with it."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer", Path(folder) / "log"
        code = wait(fork(lambda: answer.write_text(json.dumps(work())) and 0, log))
        assert code == 0, log.read_text()
        return json.loads(answer.read_text())


class Endpoint(BaseHTTPRequestHandler):
    """Answers seven requests in ten; the others are refused, cut, delayed or garbled.

    Errors quote the headers of the request. The ledger lists the feature of every billed answer.
    """

    ledger: Path

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        feature = body.split("feature-")[1].split("-")[0]
        draw = random.Random(time.time_ns())
        fault = draw.choice(FAULTS) if draw.random() < 0.3 else None
        headers = json.dumps(str(self.headers))
        garbled = {"html": f"<html>{headers}</html>", "no json": "{" + headers, "list": "[1]"}
        if fault == "hang":
            time.sleep(3)
            return self.close()
        if fault in ("429", "500"):
            error = {"error": {"message": f"you sent {headers}", "code": None}}
            return self.answer(int(fault), json.dumps(error))
        if fault in garbled:
            return self.answer(200, garbled[fault])
        text = self.completion(LABEL if fault != "prose" else f"I cannot tell. {headers}")
        if fault == "cut":
            return self.answer(200, text, len(text) // 2)
        with open(self.ledger, "a") as file:  # the answer is billed from here on
            file.write(feature + "\n")
        self.answer(200, text)

    @staticmethod
    def completion(content):
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {
            "prompt_tokens": TOKENS_BILLED - 10,
            "completion_tokens": 10,
            "total_tokens": TOKENS_BILLED,
        }
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        return json.dumps(head | {"usage": usage, "choices": [choice]})

    def answer(self, status, text, cut=None):
        """Send an answer; `cut` ends it after so many bytes."""
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Retry-After-Ms", "5")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode()[:cut])
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            pass
        if cut:
            self.close()

    def close(self):
        self.close_connection = True

    def log_message(self, *_):
        pass


def contexts_of_features():
    """A contexts file of FEATURES features, whose contexts name their feature."""

    def context(feature, index):
        text = f"feature-{feature}- <ACTIVATED>fox</ACTIVATED> {index}"
        return {"activation": 9.0 - index, "context": text}

    table = {}
    for feature in range(FEATURES):
        contexts = [context(feature, index) for index in range(4)]
        table[str(feature)] = {"contexts": {"fox": contexts}}
    return {"latent_context_map": table}


def damage_line(line, draw):
    """One line of JSON, cut, with a bad byte, or replaced by something that is no document."""
    cut = draw.randrange(1, len(line) - 1)
    bad_byte = line[:cut] + b"\xff" + line[cut:]
    choices = [line[:cut], bad_byte, b"[" + line + b"]", b"17", b'{"text": null}', b"}"]
    return draw.choice(choices)


def damaged_copies(content, other, draw):
    """26 damaged forms of a file's content; `other` is the content of its twin elsewhere."""
    for i in range(26):
        changed = bytearray(content)
        if i < 20:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        elif i == 24:
            changed = b""
        elif i == 25:
            changed = other
        elif i % 2:
            changed = changed[: draw.randrange(len(changed))]
        else:
            changed += draw.randbytes(draw.randrange(1, 99))
        if changed != content:
            yield changed


class Stages:
    """Trials of the stages. Each gets a folder that does not exist yet, and a key for its draws."""

    def __init__(self, work, disk):
        self.work, self.disk = work, disk
        self.tokenizer = AutoTokenizer.from_pretrained(files.DEMO_LM)
        self.has_ranks = (files.ROOT / "src" / "distributed.py").exists()
        text = "Document {}: the {}th value of {} is {}, or its size where that is larger."
        texts = [text.format(i, i % 97, i * i, i * 7) for i in range(6000)]
        (work / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        self.tokens = call_in_child(lambda: self.tokenise(work / "data-of-texts"))

    # ------------------------------------------------------------------------------------ endpoint

    def endpoint(self, out, key, at_the_end=False):
        """An interpretation by an endpoint with 30 % faults, killed twice, then run to its end.

        at_the_end: answers are not written as they come, but with the final result.
        """
        out.mkdir()
        draw = random.Random(key)
        files.save_json(contexts_of_features(), out / "S_contexts.json")
        ledger, log = out / "ledger", out / "interpret" / "interp_S.jsonl"
        ledger.write_text("")
        handler = type("EndpointOfTrial", (Endpoint,), {"ledger": ledger})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        serving = fork(server.serve_forever, out / "server.log")
        url = f"http://127.0.0.1:{server.server_port}/v1"
        argv = [str(out / "S_contexts.json"), "--api_base", url, "--output_dir", str(out)]
        argv += "--engine m --timeout 2 --concurrency 4 --debug".split()

        def interpret():
            if at_the_end:
                discard_logs()
            return run_stage("interpret", lambda cfg: Interpreter(cfg).run(), argv)

        kills = again = 0
        for i in range(12):
            kept, before = set(self.kept(log)), len(ledger.read_text().split())
            pid = fork(interpret, out / "interpret.log")
            if i < 2:
                kills += kill_after(pid, draw.uniform(0, 1.5))
                code = 9
            else:
                code = wait(pid)
            again += sum(feature in kept for feature in ledger.read_text().split()[before:])
            if code == 0 or (at_the_end and i == 2):
                break
        os.kill(serving, signal.SIGKILL)
        wait(serving)
        server.server_close()
        result = {"kills": kills, "features": FEATURES, "ended": code == 0, "again": again}
        return result | self.accounts(out, ledger, log)

    def endpoint_at_the_end(self, out, key):
        return self.endpoint(out, key, at_the_end=True)

    def accounts(self, out, ledger, log):
        """Features lost, recorded twice and paid for twice; tokens counted and billed."""
        billed = collections.Counter(ledger.read_text().split())
        records = collections.Counter(self.kept(log))
        final = files.load_json(out / "interpret" / "interp_S.json")
        summary = files.load_json(out / "interpret" / "interp_S.summary.json")
        paid_twice = sum(billed.values()) - len(billed)
        return {
            "paid_twice": paid_twice,
            "lost": FEATURES - sum(label["status"] != "failed" for label in final.values()),
            "twice": sum(n > 1 for n in records.values()),
            "counted": summary["prompt_tokens"] + summary["completion_tokens"],
            "billed": TOKENS_BILLED * (sum(billed.values()) - paid_twice),
        }

    @staticmethod
    def kept(log):
        """Features whose answers are on disk."""
        features = []
        for line in log.read_text().splitlines() if log.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["status"] != "failed":
                features.append(record["latent"])
        return features

    # ---------------------------------------------------------------------------------------- text

    def tokenise(self, data_dir, source="texts.jsonl", **options):
        """[number of documents, SHA-256 of the tokens]"""
        os.environ["DATA_DIR"] = str(data_dir)
        rows = Rows(self.work / source, self.tokenizer, 64, "all", **options)
        return [len(rows.documents), hashlib.sha256(rows.tokens.tobytes()).hexdigest()]

    def lines(self, out, key):
        """20,000 lines, of which one in a hundred is damaged. How many rows are kept."""
        out.mkdir()
        draw = random.Random(key)
        path = out / "text.jsonl"
        expected = 0
        with open(path, "wb") as file:
            for i in range(20_000):
                line = json.dumps({"text": f"Document {i} says {draw.randrange(10**9)}."}).encode()
                if draw.random() < 0.01:
                    line = damage_line(line, draw)
                else:
                    expected += 1
                file.write(line + b"\n")

        def load_dataset_rows():
            from datasets import load_dataset

            n = 0
            try:
                for _ in load_dataset("json", data_files=str(path), split="train", streaming=True):
                    n += 1
            except Exception:  # rows before the first failure are counted
                pass
            return n

        def kept():
            return len(list(Documents(str(path), "all", Report("text", 0.02))))

        plain = call_in_child(load_dataset_rows)
        return {"kept": call_in_child(kept), "expected": expected, "plain": plain}

    def archives(self, out, key):
        """A .gz (odd keys) or .zst (even keys) file, cut at a random place."""
        out.mkdir()
        draw = random.Random(key)
        is_gzip = key % 2
        texts = [f"Document {i}: {draw.randbytes(200).hex()}" for i in range(3000)]
        text = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        packed = gzip.compress(text, 1) if is_gzip else zstandard.compress(text)
        packed = packed[: draw.randrange(len(packed) // 10, len(packed) - 1)]
        path = out / ("text.jsonl.gz" if is_gzip else "text.jsonl.zst")
        path.write_bytes(packed)
        gzip_window = 31  # of zlib: the gzip format
        unpacker = zlib.decompressobj(gzip_window)
        if not is_gzip:
            unpacker = zstandard.ZstdDecompressor().decompressobj()
        expected = unpacker.decompress(packed).count(b"\n")

        def refused():
            try:
                self.tokenise(out / "data", path)
            except DataError:
                return True
            return False

        def kept():
            return sum(1 for _ in Documents(str(path), "all", Report("text", 1.0)))

        kept_rows = call_in_child(kept)
        return {"kept": kept_rows, "expected": expected, "refused": call_in_child(refused)}

    def tokenising(self, out, key):
        """Kill two tokenisations. The cache is then absent or complete, and the next one agrees."""
        draw = random.Random(key)

        def killed():
            pid = fork(lambda: self.tokenise(out / "data") and 0)
            return kill_after(pid, draw.uniform(0, 0.6))

        kills = sum(killed() for _ in range(2))
        cache = out / "data" / "cache"
        folders = cache.iterdir() if cache.exists() else []
        half = sum(is_damaged(path) for path in folders if not path.name.startswith("."))
        identical = not half and call_in_child(lambda: self.tokenise(out / "data")) == self.tokens
        return {"kills": kills, "half": half, "identical": identical}

    def endless(self, out, _):
        """Memory to tokenise one line of 20 MB."""
        megabytes = 20
        words = "The value of the array, or its size where that is larger. "
        out.mkdir()
        path = out / "line.jsonl"
        path.write_text(json.dumps({"text": words * (megabytes * 10**6 // len(words))}))

        def growth():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            self.tokenise(out / "data", path)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

        result = {"megabytes": megabytes, "growth_mb": call_in_child(growth) / 1024}
        path.unlink()
        return result

    # -------------------------------------------------------------------------------------- damage

    def damage(self, out, key):
        """Damage every file of a state and of a token cache. How often it is noticed.

        Bits are flipped, files cut, grown, emptied, and exchanged with those of another folder.
        """
        return call_in_child(lambda: self._damage(out, random.Random(key)))

    def _damage(self, out, draw):
        for step in (1, 2):
            parts = {name: {"t": torch.randn(1000)} for name in ("a", "b")}
            checkpoint.save_state(out, step, {"x": step}, parts)
        self.tokenise(out / "data")
        shutil.copy(self.work / "texts.jsonl", out / "again.jsonl")
        self.tokenise(out / "data", out / "again.jsonl", max_tokens=5000)
        caches = sorted(
            (out / "data" / "cache").iterdir(),
            key=lambda path: (path / "tokens.bin").stat().st_size,
        )
        states = checkpoint.states(out)[::-1]
        of_states = self.damage_folder("state", *states, draw)
        return of_states | self.damage_folder("cache", *caches, draw)

    def damage_folder(self, what, other, folder, draw):
        """Numbers of damages, of those that the manifest shows, and of those that loading shows."""
        tried = noticed = plain = 0
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            for changed in damaged_copies(content, (other / path.name).read_bytes(), draw):
                path.write_bytes(changed)
                tried += 1
                noticed += is_damaged(folder)
                plain += self.loading_fails(path)
            path.write_bytes(content)
        assert not is_damaged(folder)
        return {f"{what}_tried": tried, f"{what}_noticed": noticed, f"{what}_plain": plain}

    @staticmethod
    def loading_fails(path):
        """Whether a damaged file fails to open: all that a program without a manifest notices."""
        try:
            if path.suffix == ".pt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".npy":
                data.np.load(path)
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
            else:
                data.np.memmap(path, dtype=data.np.uint32, mode="r")
        except Exception:  # every failure counts
            return True
        return False

    def cost(self, _out, _key):
        """Seconds to save and verify the state of an SAE of 67M parameters (2,048 x 16,384).

        Measured on the disk of the results, beside the seconds of a plain torch.save.
        """
        out = self.disk / "cost"

        def measure():
            part = {"sae": {"w": torch.zeros(67_000_000)}, "z": torch.zeros(67_000_000)}
            started = time.monotonic()
            path = checkpoint.save_state(out, 1, {}, {"a": part})
            saved = time.monotonic()
            files.verify_folder(path)
            verified = time.monotonic()
            torch.save(part, out / "plain.pt")
            return {
                "save_s": saved - started,
                "verify_s": verified - saved,
                "plain_s": time.monotonic() - verified,
            }

        result = call_in_child(measure)
        shutil.rmtree(out)
        return result

    # --------------------------------------------------------------------------------------- ranks

    def ranks(self, out, key):
        """Kill one of two torchrun processes. When the job ends, and how the same command ends."""
        out.mkdir()
        draw = random.Random(key)
        lines = out / "runs" / "t" / "metrics.jsonl"
        job = self.torchrun(out)
        while job.poll() is None and not (lines.exists() and lines.stat().st_size):
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1))
        ranks = []
        if job.poll() is None:
            ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        started = time.monotonic()
        if ranks:
            os.kill(int(draw.choice(ranks)), signal.SIGKILL)
        code = job.wait(300)
        seconds = time.monotonic() - started
        undisturbed = self.torchrun(out / "straight").wait(600)
        again = self.torchrun(out).wait(600)
        identical = self.weights(out) == self.weights(out / "straight")
        return {
            "killed": bool(ranks),
            "code": code,
            "seconds": seconds,
            "ended": again == 0,
            "identical": bool(code and not again and not undisturbed and identical),
        }

    def torchrun(self, out):
        """Start a training of two processes in `out`."""
        out.mkdir(exist_ok=True)
        options = {
            "model_path": self.work / "lm",
            "data_path": self.work / "text.jsonl",
            "output_dir": out,
            "dtype": "float32",
            "latent_size": 512,
            "k": 8,
            "max_length": 32,
            "batch_size": 4,
            "max_samples": 160,
            "save_every": 2,
            "tag": "t",
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
        training = ["train.py", "--model", "TopK", "Vanilla", *flags]
        with open(out / "log", "a") as log:
            return subprocess.Popen(
                [sys.executable, *launcher, *training], cwd=files.ROOT, stdout=log, stderr=log
            )

    @staticmethod
    def weights(out):
        return [path.read_bytes() for path in sorted((out / "SAE_models").glob("*.pt"))]


def discard_logs():
    """In this process, records of single answers are lost: the final result alone stays."""
    open_to_append = files.open_to_append

    def open_or_discard(path, *args, **kwargs):
        if path.suffix == ".jsonl":
            return tempfile.TemporaryFile("w")
        return open_to_append(path, *args, **kwargs)

    files.open_to_append = open_or_discard
