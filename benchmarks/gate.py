"""Turns: a contender trains in its own process up to a number of tokens, then waits for the others.

The runner writes one command a line: `go TOKENS`, `profile TOKENS`, `measure PATH` or `end`. The
contender answers with one JSON event a line. What libraries print goes to stderr.

This file imports the standard library and torch alone, because peers import it from their own
environments.
"""

import json
import os
import sys
import time

import torch


class Enough(Exception):
    """Ends a contender in the middle of its work when the runner wants no more."""


class Gate:
    """The contender's side of the conversation.

    The contender sets `measure` (path of held-out states -> quality) and `breakdown`
    (profiler, seconds, tokens -> seconds by stage) if it can answer these commands.
    """

    def __init__(self, answers=None, commands=None):
        """Talks over two files, else over stdin and stdout; later prints to stdout go to stderr."""
        self.answers = answers or os.fdopen(os.dup(1), "w")
        self.commands = commands or os.fdopen(os.dup(0))
        if answers is None:
            os.dup2(2, 1)
        self.cuda = torch.cuda.is_available()
        self.until = None  # tokens at which the turn ends; None before the first turn
        self.tokens = self.tokens_before = 0  # now, and when the turn began
        self.turn_started = 0.0
        self.steps = 0  # of this turn
        self.profiler = self.measure = self.breakdown = None

    def step(self, tokens):
        """Called where a step begins. tokens: useful tokens before this step.

        Raises Enough when the runner wants no more.
        """
        self.tokens = tokens
        if self.until is None:
            self._wait({"event": "ready"})
            return
        self.steps += 1
        if tokens >= self.until:
            self._wait(self._turn())

    def finished(self, tokens):
        """Called where the work has ended by itself."""
        self.steps += 1
        self.tokens = tokens
        try:
            self._wait(self._turn() | {"final": True})
            raise RuntimeError("more was asked for than there is")
        except Enough:
            pass

    def _turn(self):
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.turn_started
        tokens = self.tokens - self.tokens_before
        turn = {
            "event": "turn",
            "seconds": seconds,
            "tokens": tokens,
            "steps": self.steps,
            "done": self.tokens,
        }
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            turn["stages"] = self.breakdown(self.profiler, seconds, tokens)
            self.profiler = None
        return turn | {"peak": self.peak()}

    def peak(self):
        """Peak memory in bytes: of the CUDA device if there is one, else of this process."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        # getrusage would report the memory of the runner at the fork if that was larger
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    def _wait(self, message):
        """Send a message, and answer commands until a turn begins."""
        command, value = self._ask(message)
        while command == "measure":
            command, value = self._ask({"event": "quality"} | self.measure(value))
        if command not in ("go", "profile"):  # `end`, or nothing if the runner has died
            raise Enough
        self.until = float(value)
        self.tokens_before = self.tokens
        self.steps = 0
        if command == "profile":
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.cuda:
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=kinds).__enter__()
        if self.cuda:
            torch.cuda.synchronize()
        self.turn_started = time.perf_counter()

    def _ask(self, message):
        print(json.dumps(message), file=self.answers, flush=True)
        command, _, value = self.commands.readline().strip().partition(" ")
        return command, value


def score(states, reconstruct, chunk_tokens=4096):
    """Quality on held-out raw states [N,D]: NormMSE of standardised states, dead share, L0.

    reconstruct(h) -> (raw reconstruction of h, number of tokens at which each latent fired [F])
    """
    errors, fired = [], 0
    with torch.no_grad():
        for h in states.split(chunk_tokens):
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
    """The job that the runner passes as an argument."""
    return json.loads(sys.argv[1])
