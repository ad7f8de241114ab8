"""Experiments: each is a command that trains, measures and writes its tables and pictures.

See `python -m experiments.routing --help`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from src.files import error_text


def exit_code(name: str, run: Callable[[], Any]) -> int:
    """Run an experiment and return its exit code. An error, or a stop, becomes one line."""
    try:
        run()
    except KeyboardInterrupt as stop:
        reason = f"; {stop}" if str(stop) else ""
        print(f"{name}: interrupted{reason}; the same command continues", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {error_text(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 0
