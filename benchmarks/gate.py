"""Turns: a contender trains in its own process until a number of tokens, then waits while the others have theirs.

Standard library and torch alone, since peers import it from their own environments. One JSON message a line: the runner writes `go TOKENS`,
`profile TOKENS`, `measure PATH` or `end`; the contender answers with an event. What libraries print goes to stderr.
"""

import json
import os
import sys
import time

import torch


class Enough(Exception):
    """Ends a contender in the middle of its work, at the runner's wish."""


class Gate:
    def __init__(self, out=None, wanted=None):
        """Talks over the files given, else over the process's own, whose stdout then is stderr."""
        self.out, self.wanted = out or os.fdopen(os.dup(1), "w"), wanted or os.fdopen(os.dup(0))
        if out is None:
            os.dup2(2, 1)
        self.cuda = torch.cuda.is_available()
        self.until, self.started, self.before, self.tokens, self.last, self.took = (
            None,
            0.0,
            0,
            0,
            0.0,
            [],
        )
        self.profiler, self.measure, self.breakdown = None, None, None

    def step(self, tokens):
        """Called where a step begins; `tokens`: useful ones done before it. Raises Enough once no more is wanted."""
        now, self.tokens = time.perf_counter(), tokens
        if self.until is None:
            self._wait({"event": "ready"})
        else:
            self.took.append(now - self.last)
            if tokens >= self.until:
                self._wait(self._turn())
        self.last = time.perf_counter()

    def finished(self, tokens):
        """Called where the work has ended by itself."""
        self.took.append(time.perf_counter() - self.last)
        self.tokens = tokens
        try:
            self._wait(self._turn() | {"final": True})
            raise RuntimeError("more was asked for than there is")
        except Enough:
            pass

    def _turn(self):
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        found = {
            "event": "turn",
            "seconds": seconds,
            "tokens": self.tokens - self.before,
            "steps": len(self.took),
            "done": self.tokens,
        }
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            found["stages"], self.profiler = (
                self.breakdown(self.profiler, seconds, found["tokens"]),
                None,
            )
        return found | {"peak": self.peak()}

    def peak(self):
        """Bytes: of this process, or of its CUDA device where there is one."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        with (
            open("/proc/self/status") as file
        ):  # getrusage would give what the runner had when it started this process, if that was more
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    def _wait(self, message):
        while True:
            print(json.dumps(message), file=self.out, flush=True)
            command, _, value = self.wanted.readline().strip().partition(" ")
            if command == "measure":
                message = {"event": "quality"} | self.measure(value)
                continue
            if command not in ("go", "profile"):  # also where the runner is gone
                raise Enough
            break
        self.until, self.before, self.took = float(value), self.tokens, []
        if command == "profile":
            kinds = [torch.profiler.ProfilerActivity.CPU] + [
                torch.profiler.ProfilerActivity.CUDA
            ] * self.cuda
            self.profiler = torch.profiler.profile(activities=kinds).__enter__()
        if self.cuda:
            torch.cuda.synchronize()
        self.started = time.perf_counter()


def score(states, reconstruct, piece=4096):
    """NormMSE of standardised states and shares of latents, over held-out raw states [N,D]: reconstruct(h) -> (raw h_hat, fired [F])."""
    errors, fired = [], 0
    with torch.no_grad():
        for h in states.split(piece):
            h_hat, active = reconstruct(h)
            mean = h.mean(-1, keepdim=True)
            errors.append((h - h_hat.float()).square().sum(-1) / (h - mean).square().sum(-1))
            fired = fired + active
    return {
        "NormMSE": float(torch.cat(errors).mean()),
        "dead": float((fired == 0).float().mean()),
        "L0": float(fired.sum()) / len(states),
    }


def job():
    """What the runner asks for."""
    return json.loads(sys.argv[1])
