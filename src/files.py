"""Where outputs go, how they are named, and how they are written so that a killed process leaves nothing half done.

Standard library only; knows nothing of models or data.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
DEMO_LM = ROOT / "assets" / "demo_lm"

SECRETS = (
    "OPENAI_API_KEY",
    "AZURE_OPENAI_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
)  # environment variables
SAE_DIR, EVAL_DIR, CONTEXT_DIR, INTERPRET_DIR, RUN_DIR, CLAMP_DIR, EXPORT_DIR = (
    "SAE_models",
    "eval",
    "contexts",
    "interpret",
    "runs",
    "clamp",
    "export",
)


class Unusable(ValueError):
    """A file that was found but cannot be used."""

    exit_code = 3


def data_dir() -> Path:
    """Folder of downloaded and built text: $DATA_DIR, else ./data in the checkout."""
    return Path(os.environ.get("DATA_DIR") or ROOT / "data")


def safe_name(name: str) -> str:
    """A file name; raises ValueError for path parts and control characters, and where nothing usable is left.

    Names of models, data sets and runs come from users and from files of others; none of them may leave the output folder.
    """
    cleaned = re.sub(r"[^\w.+=-]+", "_", name.strip(), flags=re.UNICODE).strip("._")
    if not cleaned or re.search(r"[/\\\x00-\x1f\x7f]", name):
        shown = name if len(name) < 80 else name[:80] + "..."
        raise ValueError(f"{shown!r} cannot name a file; use letters, digits, '-', '_' or '.'")
    if (
        len(cleaned.encode()) > 120
    ):  # bytes, as file systems count; the sum keeps long names of different runs apart
        cleaned = (
            cleaned.encode()[:107].decode("utf-8", "ignore")
            + "-"
            + hashlib.sha256(cleaned.encode()).hexdigest()[:12]
        )
    return cleaned


def redacted(text: str, *secrets: str | None) -> str:
    """Text without the given secrets and those of the environment."""
    for secret in (*secrets, *(os.environ.get(name) for name in SECRETS)):
        if secret and len(secret) > 5:  # shorter ones are placeholders, and parts of words
            text = text.replace(secret, "[key]")
    return text


def printable(text: str) -> str:
    """Text for a terminal: characters that could move its cursor, colour or retitle it are spelt out; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def data_name(path: str | os.PathLike) -> str:
    """Short name of a data source for titles: `data/openwebtext2/` -> `openwebtext2`, `x/train.jsonl.gz` -> `train`."""
    for part in reversed(
        re.split(r"[/\\]", str(path))
    ):  # a glob such as `texts/*.jsonl` is named by its folder
        name = re.sub(
            r"[*?\[\]\x00-\x1f\x7f]+", "_", re.sub(r"(\.(jsonl|json|parquet|gz|zst))+$", "", part)
        ).strip("_")
        if re.search(r"[^\W_]", name):
            return safe_name(name)
    return "data"


def umask() -> int:
    """The permissions that new files of this process lack."""
    found = os.umask(0)
    os.umask(found)
    return found


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> Path:
    """Calls write(file) on a temporary file in the same folder, then renames it to path: old content or new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent
    )
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(
            temporary, 0o666 & ~umask()
        )  # mkstemp gives 0600, which locks out a shared cluster's group
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
    text = (
        json.dumps(data, ensure_ascii=False, indent=indent, allow_nan=False).encode(
            "utf-8", "replace"
        )
        + b"\n"
    )
    if str(path).endswith(".gz"):
        text = gzip.compress(text, mtime=0)
    return write_atomic(path, lambda file: file.write(text))


def load_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file (`.gz` too). Raises Unusable, naming it, for a damaged one."""
    opened = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            return json.load(file)
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        gzip.BadGzipFile,
        EOFError,
        RecursionError,
        zlib.error,
    ) as error:
        raise Unusable(f"{path} is not readable JSON ({error})") from error


def open_to_append(path: str | os.PathLike, mode: str = "a", **more: Any) -> Any:
    """Opens a file that grows. Raises ValueError for a symbolic link in its place: it may lead out of the output folder."""
    try:
        return open(
            path,
            mode,
            opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666),
            **more,
        )
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a symbolic link; remove it") from error
        raise


def append(file: BinaryIO, data: bytes) -> None:
    """Adds data to an unbuffered file, all of it or nothing. Raises OSError that names the file."""
    size = file.tell()
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        file.truncate(size)
        raise OSError(
            f"cannot write {file.name} ({error.strerror or error}); mend that and run the same command again"
        ) from error


def is_stale_result(result: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether two that bear one title were made with other weights, as far as both say."""
    both = result.get("weights_sum"), known.get("weights_sum")
    return None not in both and both[0] != both[1]


def newest(folder: str | os.PathLike, pattern: str) -> Path | None:
    """The most recently written file matching pattern in folder, or None."""
    found = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


# ------------------------------------------------------------------------------------------- folders, all or nothing


class _Summed:
    """A file being written that knows its size and SHA-256. torch.save hides why a write failed; `error` keeps it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum, self.size, self.error = file, hashlib.sha256(), 0, None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sum.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _sync(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(
    path: str | os.PathLike, writers: Mapping[str, Callable[[Any], Any]], manifest: bool = True
) -> Path:
    """Calls write(file) for each name, adds a manifest of sizes and SHA-256 sums (unless told not to), and renames the whole to path: complete or
    not there.

    What stands at path is replaced; write only where that is damaged or nothing.
    """
    path = Path(path)
    work = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        sums: dict[str, dict[str, Any]] = {}

        def put(name: str, write: Callable[[Any], Any]) -> None:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            with open(work / name, "wb") as file:
                summed = _Summed(file)
                try:
                    write(summed)
                except RuntimeError as error:
                    raise (summed.error or error) from error
                file.flush()
                os.fsync(file.fileno())
            sums[name] = {"size": summed.size, "sha256": summed.sum.hexdigest()}

        for name, write in writers.items():
            put(name, write)
        if manifest:
            listed = json.dumps({"folder": path.name, "files": sums}).encode()
            put("manifest.json", lambda file: file.write(listed))
        _sync(work)
        if path.exists():
            shutil.rmtree(path)
        os.replace(work, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return path


def seal(folder: str | os.PathLike, name: str) -> None:
    """Adds the manifest to a folder that is going to be renamed to `name`, for files too long to be written twice."""
    sums = {}
    for path in sorted(Path(folder).iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            sums[path.name] = {
                "size": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    save_json({"folder": name, "files": sums}, Path(folder) / "manifest.json")
    _sync(Path(folder))


def verify_folder(path: str | os.PathLike) -> None:
    """Raises ValueError, naming the file, where a folder is not what write_folder wrote there."""
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        expected = {
            name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
        if manifest["folder"] != path.name:
            raise ValueError(f"it is the manifest of {manifest['folder']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}/manifest.json: {error if isinstance(error, ValueError) else type(error).__name__}"
        ) from error
    for name, (size, digest) in expected.items():
        try:
            with open(path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{path / name}: {error.strerror}") from error
        if found != digest or (path / name).stat().st_size != size:
            raise ValueError(f"{path / name}: not what was written")


# ----------------------------------------------------------------------------------------------------- one writer


def probe(folder: str | os.PathLike) -> None:
    """Makes the folder and writes, renames and removes a file there. Raises OSError that says what to check, before hours are spent."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(
            folder / f".probe-{os.getpid()}", lambda file: file.write(b"x" * 4096)
        ).unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to {folder} ({error.strerror or error}); check --output_dir, its permissions and free space"
        ) from error


def _running(owner: Mapping[str, Any]) -> bool:
    """Whether the process a lock names may still run: it does on this host, or cannot be asked."""
    if owner.get("host") != socket.gethostname():
        requeued = owner.get("job") is not None and owner["job"] == os.environ.get(
            "SLURM_JOB_ID"
        )  # a requeued job keeps its id
        return not (
            requeued
            and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > int(owner.get("restart") or 0)
        )
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as someone else
        return True
    return int(owner["pid"]) != os.getpid()


@contextlib.contextmanager
def locked(
    folder: str | os.PathLike, name: str = "lock", instead: str = "use --tag NAME"
) -> Iterator[None]:
    """One writer per folder, named in folder/lock by host and process. Raises ValueError naming it where there is another.

    The kernel's lock on the file settles it among processes of one machine and ends with its holder, so that none goes stale; the
    names settle it among machines and on file systems without such locks.
    """
    import fcntl

    path = Path(folder) / name
    with open_to_append(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = "ours"
        except BlockingIOError:
            state = "taken"
        except OSError:
            state = "unknown"  # a file system without locks
        file.seek(0)
        try:
            owner = dict(json.loads(file.read() or "{}"))
        except (ValueError, TypeError):  # killed while writing it
            owner = {}
        dead = state == "ours" and owner.get("host") == socket.gethostname()
        if state == "taken" or (owner and not dead and _running(owner)):
            who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
            raise ValueError(
                f"{folder} is being written by {who}; wait for it or {instead} (if it is gone, delete {path})"
            )
        file.truncate(0)
        job = {
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": os.environ.get("SLURM_RESTART_COUNT"),
        }
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        } | job
        file.write(json.dumps(mine))
        file.flush()
        try:
            yield
        finally:
            file.truncate(
                0
            )  # kept, empty: a file that vanished could be locked twice, by whoever still has it open
