"""Weights & Biases beside metrics.jsonl, which has every line anyway: optional, and never the end of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.files import redacted


class Tracked:
    """A run there. Its first error of any kind is printed, after which nothing more is sent."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def _send(self, call: str, *values: Any, **named: Any) -> None:
        if self.run is None:
            return
        try:
            getattr(self.run, call)(*values, **named)
        except Exception as error:  # a service outside: network, quota, disk and version errors all mean the same here
            self.run = None
            said = f"warning: wandb stopped ({type(error).__name__}: {error}); the training goes on, metrics.jsonl has every line"
            print(redacted(said))

    def log(self, values: dict[str, float], step: int) -> None:
        self._send("log", values, step=step)

    def finish(self) -> None:
        self._send("finish")


def wandb_init(
    project: str, config: dict[str, Any], name: str, folder: str | Path | None = None
) -> Tracked | None:
    """A Weights & Biases run, or None with the reason printed: logging there never stops a training."""
    try:
        import wandb

        return Tracked(wandb.init(project=project, config=config, name=name, dir=folder))
    except Exception as error:  # as above, and the package may not be installed
        todo = "; pip install wandb" if isinstance(error, ImportError) else ""
        print(
            redacted(
                f"warning: no wandb logging ({type(error).__name__}: {error}{todo}); metrics.jsonl has every line"
            )
        )
        return None
