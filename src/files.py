"""Where outputs go, how they are named, and how they are written so that a killed process leaves nothing half done.

Standard library only; knows nothing of models or data.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
DEMO_LM = ROOT / "assets" / "demo_lm"

SAE_DIR, EVAL_DIR, CONTEXT_DIR, INTERPRET_DIR, RUN_DIR, CLAMP_DIR = "SAE_models", "eval", "contexts", "interpret", "runs", "clamp"


def data_dir() -> Path:
    """Folder of downloaded and built text: $DATA_DIR, else ./data in the checkout."""
    return Path(os.environ.get("DATA_DIR") or ROOT / "data")


def safe_name(name: str) -> str:
    """A file name without path parts or control characters; raises ValueError where nothing usable is left.

    Names of models, data sets and runs come from users; none of them may leave the output folder.
    """
    cleaned = re.sub(r"[^\w.+=-]+", "_", name.strip(), flags=re.UNICODE).strip("._")
    if not cleaned or any(part == ".." for part in re.split(r"[/\\]", name)):
        raise ValueError(f"{name!r} cannot name a file; use letters, digits, '-', '_' or '.'")
    return cleaned[:120]


def data_name(path: str | os.PathLike) -> str:
    """Short name of a data source for titles: `data/openwebtext2/` -> `openwebtext2`, `x/train.jsonl.gz` -> `train`."""
    name = os.path.basename(str(path).rstrip("/\\")) or "data"
    name = re.sub(r"(\.(jsonl|json|parquet|gz|zst))+$", "", name)
    return safe_name(re.sub(r"[*?\[\]]+", "_", name) or "data")


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> Path:
    """Calls write(file) on a temporary file in the same folder, then renames it to path: old content or new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600, which locks out a shared cluster's group
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def save_text(text: str, path: str | os.PathLike) -> Path:
    """Writes text as UTF-8, atomically. Unpaired surrogates become '?'."""
    return write_atomic(path, lambda file: file.write(text.encode("utf-8", "replace")))


def save_json(data: Any, path: str | os.PathLike, indent: int | None = 2) -> Path:
    """Writes JSON (UTF-8, two-space indent; `.gz` compresses), atomically. NaN and infinity raise ValueError."""
    text = json.dumps(data, ensure_ascii=False, indent=indent, allow_nan=False).encode("utf-8", "replace") + b"\n"
    if str(path).endswith(".gz"):
        text = gzip.compress(text, mtime=0)
    return write_atomic(path, lambda file: file.write(text))


def load_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file (`.gz` too); a damaged file raises ValueError naming it."""
    opened = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            return json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not readable JSON ({error})") from error


def newest(folder: str | os.PathLike, pattern: str) -> Path | None:
    """The most recently written file matching pattern in folder, or None."""
    found = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None
