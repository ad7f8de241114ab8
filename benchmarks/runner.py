"""Contenders started, given turns, timed: one process each, one of them working at a time, the order changing from round to round."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from src.files import ROOT


class Failed(RuntimeError):
    """A contender (who) ended or said something else than expected."""

    def __init__(self, said, who=None):
        super().__init__(said)
        self.who = who


class Contender:
    def __init__(self, name, job, folder, python=sys.executable, module="contenders"):
        self.name, self.job, self.turns, self.qualities, self.stages = name, job, [], [], None
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
        while line and not line.startswith(
            '{"event"'
        ):  # printed by a library before the gate was there
            line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-12:]
            raise Failed(
                f"{self.name} ended with code {self.process.wait()}; {self.log} ends:\n"
                + "\n".join(tail),
                self.name,
            )
        message = json.loads(line)
        if message["event"] != event:
            raise Failed(f"{self.name}: {event} expected, {message['event']} found", self.name)
        return message

    def ask(self, command, event="turn"):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer(event)

    def go(self, tokens, counted=True):
        """Trains until `tokens` are done. Returns the turn."""
        turn = self.ask(f"go {tokens}")
        turn["counted"] = counted and not turn.get("final")
        self.turns.append(turn)
        return turn

    def profile(self, tokens):
        turn = self.ask(f"profile {tokens}")
        self.turns.append(turn | {"counted": False})
        self.stages = turn["stages"]

    def measure(self, path):
        """Held-out quality, beside the tokens and seconds of training so far."""
        done, seconds = self.turns[-1]["done"], sum(turn["seconds"] for turn in self.turns)
        self.qualities.append(
            self.ask(f"measure {path}", "quality") | {"tokens": done, "seconds": seconds}
        )

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
    """Rounds of turns of equal tokens; the first round is warm-up, the last ends the training. Quality then, or after every round for `curves`."""
    for contender in contenders:
        contender.go(1, counted=False)
    for number in range(1, rounds + 1):
        shift = number % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            until = tokens * number / rounds
            if number == 2 and profiled and contender.job.get("stages"):
                contender.profile(contender.turns[-1]["done"] + profiled)
            if contender.turns[-1]["done"] < until and not contender.turns[-1].get("final"):
                contender.go(until, counted=number > 1)
            if held_out and (contender.name in curves or number == rounds):
                contender.measure(held_out)
    return [contender.result() for contender in contenders]


def ratios(slow, fast):
    """{"median", "low", "high"}: how many times as many tokens a second, turn by turn of the same round. Lists of seconds a token."""
    found = [a / b for a, b in zip(slow, fast, strict=False)]
    return (
        {
            "median": statistics.median(found),
            "low": min(found),
            "high": max(found),
            "turns": len(found),
        }
        if found
        else None
    )
