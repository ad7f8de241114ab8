"""Optional logging to Weights & Biases. It never ends a training: metrics.jsonl has every line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.files import redacted


class WandbRun:
    """A run at Weights & Biases. After its first error, which is printed, it sends nothing more."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def _send(self, call: str, *args: Any, **kwargs: Any) -> None:
        if self.run is None:
            return
        try:
            getattr(self.run, call)(*args, **kwargs)
        # An outside service: errors of network, quota, disk and version are all treated alike.
        except Exception as error:
            self.run = None
            message = f"warning: wandb stopped ({type(error).__name__}: {error}); "
            message += "the training goes on, metrics.jsonl has every line"
            print(redacted(message))

    def log(self, values: dict[str, float], step: int) -> None:
        self._send("log", values, step=step)

    def finish(self) -> None:
        self._send("finish")


def wandb_init(
    project: str, config: dict[str, Any], name: str, folder: str | Path | None = None
) -> WandbRun | None:
    """Start a run at Weights & Biases; returns None after printing the reason where that fails."""
    try:
        import wandb

        return WandbRun(wandb.init(project=project, config=config, name=name, dir=folder))
    except Exception as error:  # as in WandbRun; the package may be missing too
        advice = "; pip install wandb" if isinstance(error, ImportError) else ""
        message = f"warning: no wandb logging ({type(error).__name__}: {error}{advice}); "
        print(redacted(message + "metrics.jsonl has every line"))
        return None
