"""Starts contenders, gives them turns and times them.

Each contender is a process. One works at a time, and their order changes from round to round.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from src.files import ROOT


class Failed(RuntimeError):
    """A contender has ended or has sent an unexpected answer."""

    def __init__(self, message, contender=None):
        super().__init__(message)
        self.contender = contender  # its name


class Contender:
    """A contender in its own process; see gate.py for the conversation."""

    def __init__(self, name, job, folder, python=sys.executable, module="contenders"):
        self.name, self.job = name, job
        self.turns, self.qualities = [], []  # answers to `go` and `profile`, to `measure`
        self.stages = None  # {stage: seconds a token} of the profiled turn
        self.log = Path(folder) / f"{name.replace(' ', '_').replace('/', '_')}.log"
        command = [python, "-m", f"benchmarks.{module}", json.dumps(job)]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        started = time.perf_counter()
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env=environment,
            )
        self._answer("ready")
        self.loading = time.perf_counter() - started

    def _answer(self, event):
        line = self.process.stdout.readline()
        # Libraries may print before the contender opens its gate.
        while line and not line.startswith('{"event"'):
            line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-12:])
            code = self.process.wait()
            raise Failed(f"{self.name} ended with code {code}; {self.log} ends:\n{tail}", self.name)
        message = json.loads(line)
        if message["event"] != event:
            raise Failed(f"{self.name}: expected {event}, got {message['event']}", self.name)
        return message

    def ask(self, command, event="turn"):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer(event)

    def go(self, tokens, counted=True):
        """Let the contender train until it has done `tokens`. Returns the turn.

        counted: whether the turn counts for the rate; the turn that ends the work never does.
        """
        turn = self.ask(f"go {tokens}")
        turn["counted"] = counted and not turn.get("final")
        self.turns.append(turn)
        return turn

    def profile(self, tokens):
        """A turn under the profiler, which does not count for the rate."""
        turn = self.ask(f"profile {tokens}")
        self.turns.append(turn | {"counted": False})
        self.stages = turn["stages"]

    def measure(self, path):
        """Record the quality on held-out states, with the tokens and seconds of training so far."""
        seconds = sum(turn["seconds"] for turn in self.turns)
        spent = {"tokens": self.turns[-1]["done"], "seconds": seconds}
        self.qualities.append(self.ask(f"measure {path}", "quality") | spent)

    def end(self):
        try:
            self.process.stdin.write("end\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def costs(self):
        """Seconds a token of every counted turn."""
        return [turn["seconds"] / turn["tokens"] for turn in self.turns if turn["counted"]]

    def result(self):
        """Everything measured of this contender, as benchmark.json has it."""
        rates = [1 / cost for cost in self.costs()]
        last = self.qualities[-1] if self.qualities else {}
        return {
            "name": self.name,
            "tokens_per_s": statistics.median(rates) if rates else None,
            "spread": [min(rates), max(rates)] if rates else None,
            "turns": len(rates),
            "first_step_s": self.loading + self.turns[0]["seconds"],
            "peak_bytes": max(turn["peak"] for turn in self.turns),
            "NormMSE": last.get("NormMSE"),
            "dead": last.get("dead"),
            "L0": last.get("L0"),
            "curve": self.qualities,
            "stages": self.stages,
            "rates": rates,
        }


def play(contenders, tokens, rounds, held_out=None, curves=(), profiled=0):
    """Give all contenders rounds of turns of equal tokens. Returns their results.

    The first round warms up and is not counted; the last round ends the training. Quality on
    `held_out` is measured then, and after every round for the names in `curves`. `profiled` tokens
    are trained under the profiler before the second round.
    """
    for contender in contenders:
        contender.go(1, counted=False)
    for round_number in range(1, rounds + 1):
        shift = round_number % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            if round_number == 2 and profiled and contender.job.get("stages"):
                contender.profile(contender.turns[-1]["done"] + profiled)
            until = tokens * round_number / rounds
            last = contender.turns[-1]
            if last["done"] < until and not last.get("final"):
                contender.go(until, counted=round_number > 1)
            if held_out and (contender.name in curves or round_number == rounds):
                contender.measure(held_out)
    return [contender.result() for contender in contenders]


def ratios(slow, fast):
    """How many times as many tokens a second `fast` does: {"median", "low", "high", "turns"}.

    slow, fast: seconds a token of every turn. Turns of the same round are compared. None if there
    are no turns.
    """
    return spread_of([a / b for a, b in zip(slow, fast, strict=False)])


def spread_of(values):
    """{"median", "low", "high", "turns"} of one value per turn; None without values."""
    if not values:
        return None
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "turns": len(values),
    }
