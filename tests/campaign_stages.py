"""The campaign's trials around training: endpoints that misbehave, damaged text, caches and states, what saving costs."""

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

import openai  # noqa: F401  here, so that no child spends a second on it
import torch
import zstandard
from transformers import AutoTokenizer

from src import checkpoint, data, files
from src.config import run_stage
from src.data import DataError, Report, Rows, documents
from src.interpreter import Interpreter
from tests.campaign import bad, fork, kill_after, wait

FEATURES, TOKENS = 40, 110  # features of one contexts file; what the server bills for an answer
LABEL = json.dumps(
    {"category": "low-level", "score": 4, "polysemantic": False, "explanation": "the word fox"}
)


def asked(work):
    """What work() returns, asked in a child: neither its threads nor its memory stay here."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer"
        code = wait(fork(lambda: path.write_text(json.dumps(work())) and 0, Path(folder) / "log"))
        assert code == 0, (Path(folder) / "log").read_text()
        return json.loads(path.read_text())


class Endpoint(BaseHTTPRequestHandler):
    """Answers seven requests in ten; the others are refused, cut, hung, garbled. Errors quote the headers. What it bills goes to a ledger."""

    ledger: Path

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        feature = body.split("feature-")[1].split("-")[0]
        draw, echo = random.Random(time.time_ns()), json.dumps(str(self.headers))
        error = json.dumps({"error": {"message": f"you sent {echo}", "code": None}})
        kind = (
            draw.choice(["429", "500", "html", "hang", "cut", "no json", "list", "prose"])
            if draw.random() < 0.3
            else "answer"
        )
        if kind == "hang":
            time.sleep(3)
            return self.close()
        if kind in ("429", "500"):
            return self.say(int(kind), error)
        if kind in ("html", "no json", "list"):
            return self.say(
                200, {"html": f"<html>{echo}</html>", "no json": "{" + echo, "list": "[1]"}[kind]
            )
        message = {
            "role": "assistant",
            "content": LABEL if kind != "prose" else f"I cannot tell. {echo}",
        }
        usage = {"prompt_tokens": TOKENS - 10, "completion_tokens": 10, "total_tokens": TOKENS}
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
        text = json.dumps(
            whole | {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        )
        if kind == "cut":
            return self.say(200, text, len(text) // 2)
        with open(self.ledger, "a") as file:  # billed from here on
            file.write(feature + "\n")
        self.say(200, text)

    def say(self, status, text, cut=None):
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


class Stages:
    """Trials in folders given one by one."""

    def __init__(self, work, disk):
        self.work, self.disk, self.tokenizer = (
            work,
            disk,
            AutoTokenizer.from_pretrained(files.DEMO_LM),
        )
        self.has_ranks = (files.ROOT / "src" / "distributed.py").exists()
        texts = [
            f"Document {i}: the {i % 97}th value of {i * i} is {i * 7}, or its size where that is larger."
            for i in range(6000)
        ]
        (work / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        self.tokens = asked(lambda: self.tokenise(work / "data-of-texts"))

    # ---------------------------------------------------------------------------------------------------- endpoint

    def endpoint(self, out, key, at_the_end=False):
        """An interpretation of FEATURES features by an endpoint with 30 % faults, killed twice, run until nothing is left to ask."""
        out.mkdir()
        draw = random.Random(key)
        table = {
            str(i): {
                "contexts": {
                    "fox": [
                        {
                            "activation": 9.0 - j,
                            "context": f"feature-{i}- <ACTIVATED>fox</ACTIVATED> {j}",
                        }
                        for j in range(4)
                    ]
                }
            }
            for i in range(FEATURES)
        }
        files.save_json({"latent_context_map": table}, out / "S_contexts.json")
        ledger, log, kills, again = out / "ledger", out / "interpret" / "interp_S.jsonl", 0, 0
        ledger.write_text("")
        server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Here", (Endpoint,), {"ledger": ledger})
        )
        serving = fork(server.serve_forever, out / "server.log")
        argv = [
            out / "S_contexts.json",
            "--api_base",
            f"http://127.0.0.1:{server.server_port}/v1",
            "--output_dir",
            out,
            "--engine",
            "m",
        ]
        argv = list(map(str, [*argv, "--timeout", "2", "--concurrency", "4", "--debug"]))

        def interpret():
            if at_the_end:
                real = files.open_to_append
                files.open_to_append = lambda path, *a, **k: (
                    tempfile.TemporaryFile("w") if path.suffix == ".jsonl" else real(path, *a, **k)
                )
            return run_stage("interpret", lambda cfg: Interpreter(cfg).run(), argv)

        for i in range(12):
            kept, before = set(self.kept(log)), len(ledger.read_text().split())
            pid = fork(interpret, out / "interpret.log")
            if i < 2:
                killed = kill_after(pid, draw.uniform(0, 1.5))
                kills, code = kills + killed, 9
            else:
                code = wait(pid)
            again += sum(feature in kept for feature in ledger.read_text().split()[before:])
            if code == 0 or (at_the_end and i == 2):
                break
        os.kill(serving, signal.SIGKILL)
        wait(serving)
        server.server_close()
        billed, records = (
            collections.Counter(ledger.read_text().split()),
            collections.Counter(self.kept(log)),
        )
        final = files.load_json(out / "interpret" / "interp_S.json")
        summary = files.load_json(out / "interpret" / "interp_S.summary.json")
        twice = sum(billed.values()) - len(billed)
        return {
            "kills": kills,
            "features": FEATURES,
            "ended": code == 0,
            "again": again,
            "paid_twice": twice,
            "lost": FEATURES - sum(one["status"] != "failed" for one in final.values()),
            "twice": sum(n > 1 for n in records.values()),
            "counted": summary["prompt_tokens"] + summary["completion_tokens"],
            "billed": TOKENS * (sum(billed.values()) - twice),
        }

    def endpoint_at_the_end(self, out, key):
        return self.endpoint(out, key, at_the_end=True)

    @staticmethod
    def kept(log):
        """Features whose answers are on disk."""
        found = []
        for line in log.read_text().splitlines() if log.exists() else []:
            try:
                one = json.loads(line)
            except ValueError:
                continue
            found += [one["latent"]] if one["status"] != "failed" else []
        return found

    # -------------------------------------------------------------------------------------------------------- text

    def tokenise(self, data_dir, source="texts.jsonl", **more):
        """[documents, SHA-256 of the tokens]"""
        os.environ["DATA_DIR"] = str(data_dir)
        rows = Rows(self.work / source, self.tokenizer, 64, "all", **more)
        return [len(rows.documents), hashlib.sha256(rows.tokens.tobytes()).hexdigest()]

    def lines(self, out, key):
        """20,000 lines, one in a hundred damaged in a way that is known."""
        out.mkdir()
        draw, path, expected = random.Random(key), out / "text.jsonl", 0
        with open(path, "wb") as file:
            for i in range(20_000):
                line = json.dumps({"text": f"Document {i} says {draw.randrange(10**9)}."}).encode()
                if draw.random() < 0.01:
                    cut = draw.randrange(1, len(line) - 1)
                    line = draw.choice(
                        [
                            line[:cut],
                            line[:cut] + b"\xff" + line[cut:],
                            b"[" + line + b"]",
                            b"17",
                            b'{"text": null}',
                            b"}",
                        ]
                    )
                else:
                    expected += 1
                file.write(line + b"\n")

        def plainly():
            from datasets import load_dataset

            n = 0
            try:
                for _ in load_dataset("json", data_files=str(path), split="train", streaming=True):
                    n += 1
            except Exception:  # that it ends here is what is counted
                pass
            return n

        kept = asked(lambda: len(list(documents(str(path), "all", Report("text", 0.02)))))
        return {"kept": kept, "expected": expected, "plain": asked(plainly)}

    def archives(self, out, key):
        """A .gz or .zst cut at a random place."""
        out.mkdir()
        draw = random.Random(key)
        text = b"".join(
            json.dumps({"text": f"Document {i}: {draw.randbytes(200).hex()}"}).encode() + b"\n"
            for i in range(3000)
        )
        packed = gzip.compress(text, 1) if key % 2 else zstandard.compress(text)
        packed = packed[: draw.randrange(len(packed) // 10, len(packed) - 1)]
        path = out / ("text.jsonl.gz" if key % 2 else "text.jsonl.zst")
        path.write_bytes(packed)
        whole = (
            zlib.decompressobj(31) if key % 2 else zstandard.ZstdDecompressor().decompressobj()
        ).decompress(packed)

        def refused():
            try:
                self.tokenise(out / "data", path)
            except DataError:
                return True
            return False

        kept = asked(lambda: sum(1 for _ in documents(str(path), "all", Report("text", 1.0))))
        return {"kept": kept, "expected": whole.count(b"\n"), "refused": asked(refused)}

    def tokenising(self, out, key):
        """Killed while a cache is being made: it is not there or whole, and made again it is the same."""
        draw = random.Random(key)
        kills = sum(
            kill_after(fork(lambda: self.tokenise(out / "data") and 0), draw.uniform(0, 0.6))
            for _ in range(2)
        )
        cache = out / "data" / "cache"
        there = (
            [path for path in cache.iterdir() if not path.name.startswith(".")]
            if cache.exists()
            else []
        )
        half = sum(map(bad, there))
        return {
            "kills": kills,
            "half": half,
            "identical": not half and asked(lambda: self.tokenise(out / "data")) == self.tokens,
        }

    def endless(self, out, _):
        """Memory that one line of 20 MB takes on its way to tokens."""
        megabytes, words = 20, "The value of the array, or its size where that is larger. "
        out.mkdir()
        (out / "line.jsonl").write_text(
            json.dumps({"text": words * (megabytes * 10**6 // len(words))})
        )

        def growth():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            self.tokenise(out / "data", out / "line.jsonl")
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

        found = {"megabytes": megabytes, "growth_mb": asked(growth) / 1024}
        (out / "line.jsonl").unlink()
        return found

    # ------------------------------------------------------------------------------------------------------ damage

    def damage(self, out, key):
        """Bits flipped in every file of a state and of a token cache, files cut, grown, emptied, exchanged with another's: who notices."""
        return asked(lambda: self._damage(out, random.Random(key)))

    def _damage(self, out, draw):
        for step in (1, 2):
            parts = {name: {"t": torch.randn(1000)} for name in ("a", "b")}
            checkpoint.save_state(out, step, {"x": step}, parts)
        self.tokenise(out / "data")
        shutil.copy(self.work / "texts.jsonl", out / "again.jsonl")
        self.tokenise(out / "data", out / "again.jsonl", max_tokens=5000)
        cache = sorted(
            (out / "data" / "cache").iterdir(),
            key=lambda path: (path / "tokens.bin").stat().st_size,
        )
        found = {}
        for what, (other, folder) in (("state", checkpoint.states(out)[::-1]), ("cache", cache)):
            tried = noticed = plain = 0
            for path in sorted(folder.iterdir()):
                content = path.read_bytes()
                for i in range(26):
                    changed = bytearray(content)
                    if i < 20:
                        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
                    elif i == 24:
                        changed = b""
                    elif i == 25:
                        changed = (other / path.name).read_bytes()
                    else:
                        changed = (
                            changed[: draw.randrange(len(changed))]
                            if i % 2
                            else changed + draw.randbytes(draw.randrange(1, 99))
                        )
                    if changed == content:
                        continue
                    path.write_bytes(changed)
                    tried, noticed, plain = (
                        tried + 1,
                        noticed + bad(folder),
                        plain + self.loading_notices(path),
                    )
                path.write_bytes(content)
            assert not bad(folder)
            found |= {f"{what}_tried": tried, f"{what}_noticed": noticed, f"{what}_plain": plain}
        return found

    @staticmethod
    def loading_notices(path):
        """Whether opening a damaged file fails: all that a program without sums would notice."""
        try:
            if path.suffix == ".pt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".npy":
                data.np.load(path)
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
            else:
                data.np.memmap(path, dtype=data.np.uint32, mode="r")
        except Exception:  # any refusal is a notice
            return True
        return False

    def cost(self, _out, _key):
        """Seconds to write and to verify the state of one SAE of 67M parameters (2,048 x 16,384) on the disk of the results; to write it plainly."""
        out = self.disk / "cost"

        def measure():
            part = {"sae": {"w": torch.zeros(67_000_000)}, "z": torch.zeros(67_000_000)}
            times = [time.monotonic()]
            path = checkpoint.save_state(out, 1, {}, {"a": part})
            times.append(time.monotonic())
            files.verify_folder(path)
            times.append(time.monotonic())
            torch.save(part, out / "plain.pt")
            return [b - a for a, b in zip(times, [*times[1:], time.monotonic()], strict=True)]

        found = dict(zip(("save_s", "verify_s", "plain_s"), asked(measure), strict=True))
        shutil.rmtree(out)
        return found

    # ------------------------------------------------------------------------------------------------------- ranks

    def ranks(self, out, key):
        """A training of two torchrun processes, one of them killed: when the job ends, and what the same command then makes of it."""
        out.mkdir()
        draw, lines = random.Random(key), out / "runs" / "t" / "metrics.jsonl"
        job = self.torchrun(out)
        while job.poll() is None and not (lines.exists() and lines.stat().st_size):
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1))
        ranks = (
            Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            if job.poll() is None
            else []
        )
        started = time.monotonic()
        if ranks:
            os.kill(int(draw.choice(ranks)), signal.SIGKILL)
        code = job.wait(300)
        took = time.monotonic() - started
        straight = self.torchrun(out / "straight").wait(600)
        again = self.torchrun(out).wait(600)
        same = (
            code
            and not again
            and not straight
            and self.weights(out) == self.weights(out / "straight")
        )
        return {
            "killed": bool(ranks),
            "code": code,
            "seconds": took,
            "ended": again == 0,
            "identical": bool(same),
        }

    def torchrun(self, out):
        out.mkdir(exist_ok=True)
        argv = [
            "--model",
            "TopK",
            "Vanilla",
            "--model_path",
            self.work / "lm",
            "--data_path",
            self.work / "text.jsonl",
            "--output_dir",
            out,
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
            "--max_samples",
            "160",
        ]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "train.py",
            *argv,
            "--save_every",
            "2",
        ]
        with open(out / "log", "a") as log:
            return subprocess.Popen(
                [*map(str, command), "--tag", "t"], cwd=files.ROOT, stdout=log, stderr=log
            )

    @staticmethod
    def weights(out):
        return [path.read_bytes() for path in sorted((out / "SAE_models").glob("*.pt"))]
