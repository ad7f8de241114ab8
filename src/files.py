"""Names and places of outputs, and writing that a killed process cannot leave half done.

Uses the standard library only and knows nothing of models or data.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import glob
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

ROOT = Path(__file__).resolve().parent.parent
DEMO_LM = ROOT / "assets" / "demo_lm"
IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()  # else this is an installed package

# Folders under the output folder, one for each kind of result.
SAE_DIR = "SAE_models"
EVAL_DIR = "eval"
CONTEXT_DIR = "contexts"
INTERPRET_DIR = "interpret"
RUN_DIR = "runs"
CLAMP_DIR = "clamp"
EXPORT_DIR = "export"

# Environment variables whose values must never be printed or written.
SECRETS = (
    "OPENAI_API_KEY",
    "AZURE_OPENAI_API_KEY",
    "AZURE_OPENAI_AD_TOKEN",
    "OPENAI_ADMIN_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
)
BAR_MOVES = re.compile(r"(\n|\x1b\[A|\r)+")  # between the bars of tqdm
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)
# What file systems answer that cannot sync a folder.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, in three ways
SHORTEST_SECRET = 6  # characters; shorter values are placeholders and occur inside words
MAX_PACKING = 200  # times that gzip may make a JSON file smaller; usual are 5 to 50
TURN_SECONDS = 60
TEMPORARY = ".tmp"  # end of the names of files that are being written
LEFTOVER = re.compile(r"\..+\.\w+\.tmp", re.S)  # their whole names
LONGEST_NAME = 120  # bytes of a file name; file systems allow 255, suffixes need some


class Unusable(ValueError):
    """A file that exists but cannot be used."""

    exit_code = 3


# ------------------------------------------------------------------------------- names and text


def data_dir() -> Path:
    """Folder of downloaded and built text: $DATA_DIR, else data in the checkout or in ./."""
    return Path(os.environ.get("DATA_DIR") or (ROOT / "data" if IS_CHECKOUT else "data"))


def safe_name(name: str) -> str:
    """Turn a name into a file name that stays inside its folder.

    Names of models, data sets and runs come from users and from downloaded files. Raises
    ValueError for path separators and control characters, and if no usable character is left.
    """
    cleaned = re.sub(r"[^\w.+=-]+", "_", name.strip(), flags=re.UNICODE).strip("._")
    if not cleaned or re.search(r"[/\\\x00-\x1f\x7f]", name):
        shown = name if len(name) < 80 else name[:80] + "..."
        raise ValueError(f"{shown!r} cannot name a file; use letters, digits, '-', '_' or '.'")
    encoded = cleaned.encode()
    if len(encoded) <= LONGEST_NAME:
        return cleaned
    # Long names that differ only at the end must stay different: 12 digits of a hash replace it.
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    start = encoded[: LONGEST_NAME - 13].decode("utf-8", "ignore")
    return f"{start}-{digest}"


def data_name(path: str | os.PathLike) -> str:
    """Short name of a data source for titles.

    `data/openwebtext2/` gives `openwebtext2`, `x/train.jsonl.gz` gives `train`, and a glob such as
    `texts/*.jsonl` takes the name of its folder.
    """
    for part in reversed(re.split(r"[/\\]", str(path))):
        stem = re.sub(r"(\.(jsonl|json|parquet|gz|zst))+$", "", part)
        name = re.sub(r"[*?\[\]\x00-\x1f\x7f]+", "_", stem).strip("_")
        if re.search(r"[^\W_]", name):
            return safe_name(name)
    return "data"


def contexts_name(path: Path) -> str:
    """The name that labels share with their contexts file: its own without `_contexts.json`."""
    return re.sub(r"(_contexts)?(\.json(\.gz)?)?$", "", path.name)


def digest(content: bytes) -> str:
    """The sum by which results name the file that they were made from."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def redacted(text: str, *secrets: str | None) -> str:
    """Replace the given secrets and those of the environment in a text by `[key]`.

    Every form in which an error or a server may quote them is replaced: their parts between white
    space, and each part as Python, JSON, an address and a Basic header spell it.
    """
    forms: set[str] = set()
    for secret in (*secrets, *map(os.environ.get, SECRETS)):
        forms.update(*map(_spellings, [secret, *secret.split()] if secret else []))
    for form in sorted(forms, key=len, reverse=True):
        if len(form) >= SHORTEST_SECRET:
            text = text.replace(form, "[key]")
    return text


def _spellings(secret: str) -> set[str]:
    encoded = secret.encode("utf-8", "replace")
    return {
        secret,
        repr(secret)[1:-1],
        ascii(secret)[1:-1],
        json.dumps(secret)[1:-1],
        urllib.parse.quote(secret, safe=""),
        base64.b64encode(encoded).decode(),
        encoded.hex(),
    }


def printable(text: str) -> str:
    """Text that is safe for a terminal; only line breaks and tabs stay as they are.

    Other characters that could move the cursor, change colours or set the title are escaped.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: Any) -> str:
    """Text for a message that names a file of others: printable, and without line breaks."""
    return printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def first_line(text: str | BaseException) -> str:
    """The first line of a text, or of an error's, that is not blank; else the name of its type."""
    lines = (line.strip() for line in str(text).split("\n"))
    return next(filter(None, lines), type(text).__name__)


def error_text(error: BaseException) -> str:
    """An error as a sentence: one of the system names the file, and not its own number."""
    if not (isinstance(error, OSError) and error.filename and error.strerror):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"there is no {error.filename}; check the name"
    return f"cannot use {error.filename} ({error.strerror})"


def text_records(text: str) -> list[str]:
    """The lines of a JSONL or prompt file that are not blank.

    Only "\\n" ends a line. str.splitlines would also cut at U+2028, U+2029, U+0085, form feeds and
    others, which may stand inside a JSON string.
    """
    lines = text.removeprefix("\ufeff").split("\n")
    return [line.removesuffix("\r") for line in lines if line.strip()]


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for whatever json.loads does not read.

    json.loads raises ValueError for integers of more than 4,300 digits, and RecursionError for
    deep nesting.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


class Unfailing:
    """A stream for words that nobody has to read.

    A terminal that is gone, a closed pipe or a full disk must not end the work that is reported.
    """

    def __init__(self, stream: TextIO | None) -> None:
        # Python sets a stream to None whose descriptor is closed when it starts.
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, work: Callable[..., Any], *values: Any) -> Any:
        try:
            return work(*values)
        except (OSError, ValueError):  # ValueError: the stream was closed
            # What is left in its buffer would fail again when the process ends.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class PrintableStream(Unfailing):
    """A stream that writes printable() text only. The stages print through one.

    What they print may quote recipes, file names and texts of other people.
    """

    def write(self, text: str) -> int:
        super().write(printable(text))
        return len(text)


class ErrorStream(Unfailing):
    """Standard error: printable() text, and the movements of tqdm's bars.

    A bar is written as a carriage return and its text; a bar below others is reached by writes
    that hold nothing but line feeds and steps upwards.
    """

    def write(self, text: str) -> int:
        if not BAR_MOVES.fullmatch(text):
            is_bar = text.startswith("\r")
            text = "\r" * is_bar + printable(text[is_bar:])
        super().write(text)
        return len(text)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Let everything that is printed inside be printable, and end no work. Also a decorator.

    What the streams still hold is written at the end, so that a failure then changes no exit code.
    """
    stdout, stderr = PrintableStream(sys.stdout), ErrorStream(sys.stderr)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            yield
        finally:
            stdout.flush()
            stderr.flush()


def say(text: str) -> None:
    """Print a line that may quote files and servers. It never fails."""
    print(printable(text), file=Unfailing(sys.stdout), flush=True)


# ------------------------------------------------------------------------------- single files


def umask() -> int:
    """The permission bits that new files of this process do not get."""
    current = os.umask(0)
    os.umask(current)
    return current


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> Path:
    """Call write(file) on a temporary file beside path, then rename it to path.

    Whatever happens, path holds either its old content or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    handle, temporary = _temporary_beside(path)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives 0600, which would lock out the other members of a group on a cluster.
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        _name_file(error, path)
        raise
    return path


def _name_file(error: BaseException, path: Path) -> None:
    """Add the path to an error of writing, such as that of a full disk, which names no file."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def save_through(save: Callable[[Any], Any], file: BinaryIO) -> HashingFile:
    """Call save(file) for a function that hides why a write failed, such as torch.save.

    Raises the OSError itself; returns the file with its size and sum.
    """
    hashing = HashingFile(file)
    try:
        save(hashing)
    except RuntimeError as error:
        raise (hashing.error or error) from error
    return hashing


def _temporary_prefix(name: str) -> str:
    return f".{name[:40]}."


def _temporary_beside(path: Path) -> tuple[int, str]:
    """(handle, name) of a new temporary file, which carries the kernel's lock of this process."""
    while True:
        handle, name = tempfile.mkstemp(
            prefix=_temporary_prefix(path.name), suffix=TEMPORARY, dir=path.parent
        )
        _kernel_lock(handle)
        # Another process may have taken it for a leftover before it was locked.
        if os.path.exists(name):
            return handle, name
        os.close(handle)


def remove_leftovers(folder: str | os.PathLike, name: str = "") -> None:
    """Remove the temporary files of killed writers: of one file, or of all files in a folder.

    The kernel's lock on a temporary file ends with its writer. Where the file system has no locks
    nothing is removed.
    """
    prefix = _temporary_prefix(name) if name else "."
    for path in Path(folder).iterdir():
        if not (path.name.startswith(prefix) and LEFTOVER.fullmatch(path.name)):
            continue
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _kernel_lock(handle):
                    path.unlink()
            finally:
                os.close(handle)


def save_text(text: str, path: str | os.PathLike) -> Path:
    """Write text as UTF-8, atomically. Unpaired surrogates become '?'."""
    return write_atomic(path, lambda file: file.write(text.encode("utf-8", "replace")))


def save_json(data: Any, path: str | os.PathLike, indent: int | None = 2) -> Path:
    """Write UTF-8 JSON, atomically; a name that ends in `.gz` is compressed.

    Raises ValueError for NaN and infinity, naming their place.
    """

    def write(file: BinaryIO) -> None:
        file.writelines(json_pieces(data, indent))
        file.write(b"\n")

    def pack(file: BinaryIO) -> None:
        with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
            write(packed)

    with _naming_what_is_not_finite(data):
        return write_atomic(path, pack if str(path).endswith(".gz") else write)


def json_pieces(data: Any, indent: int | None = None, depth: int = 2) -> Iterator[bytes]:
    """Yield UTF-8 JSON in pieces: those of each entry of an object, and of the objects in it.

    As one text a large file takes four bytes for each character, if one of them is an emoji.
    """
    is_split = indent is None and depth and isinstance(data, dict) and data
    if is_split and all(isinstance(key, str) for key in data):
        before = b"{"
        for key, value in data.items():
            yield before
            yield from json_pieces(key)
            yield b": "
            yield from json_pieces(value, depth=depth - 1)
            before = b", "
        yield b"}"
        return
    options = {"indent": indent, "allow_nan": False}
    try:
        yield json.dumps(data, ensure_ascii=False, **options).encode("utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8; escaped, it is read as it was
        yield json.dumps(data, **options).encode()


def json_text(data: Any, indent: int | None = None) -> str:
    """JSON of data. Raises ValueError for NaN and infinity, naming their place."""
    with _naming_what_is_not_finite(data):
        return json.dumps(data, ensure_ascii=False, indent=indent, allow_nan=False)


@contextlib.contextmanager
def _naming_what_is_not_finite(data: Any) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        place = next(_not_finite(data), None)
        if place is None:
            raise
        raise ValueError(
            f"{place} is no finite number: weights or states are too large, or damaged"
        ) from error


def _not_finite(data: Any, place: str = "") -> Iterator[str]:
    """The places of NaN and infinity, as names and numbers from the outside in."""
    if isinstance(data, float) and not math.isfinite(data):
        yield place.strip()
    items = enumerate(data) if isinstance(data, list | tuple) else ()
    for key, value in data.items() if isinstance(data, dict) else items:
        yield from _not_finite(value, f"{place} {key}")


def is_finite(value: Any) -> bool:
    """Whether a value for JSON holds neither NaN nor infinity."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def check_regular(path: str | os.PathLike) -> None:
    """Raise Unusable for a pipe, a device or a folder: to read it may never end."""
    # Asked once: a writer beside this process may remove the file between two questions.
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Unusable(f"{path} is no regular file")


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a regular file. Raises Unusable for anything else."""
    check_regular(path)
    return Path(path).read_bytes()


def load_json(path: str | os.PathLike, content: bytes | None = None) -> Any:
    """Read a JSON file, also a compressed one (`.gz`). Raises Unusable for a damaged file.

    content: the bytes of the file, if they were read before.
    """
    content = read_bytes(path) if content is None else content
    try:
        if str(path).endswith(".gz"):
            content = _unpacked(content)
        return parse_json(content.decode("utf-8"))
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Unusable(f"{path} is not readable JSON ({error})") from error


def _unpacked(content: bytes) -> bytes:
    """The content of a gzip file. Raises ValueError where it is larger than any JSON packs."""
    limit = MAX_PACKING * len(content) + 2**24
    with gzip.open(io.BytesIO(content)) as file:
        unpacked = file.read(limit + 1)
    if len(unpacked) > limit:
        raise ValueError(f"it unpacks to more than {limit:,} bytes")
    return unpacked


def open_to_append(path: str | os.PathLike, mode: str = "a", **options: Any) -> Any:
    """Open a file that grows.

    Raises ValueError for a symbolic link, which could lead out of the output folder.
    """

    def without_links(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    try:
        return open(path, mode, opener=without_links, **options)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a symbolic link; remove it") from error
        raise


def append(file: BinaryIO, data: bytes) -> None:
    """Add data to an unbuffered file, all of it or nothing. Raises OSError that names the file."""
    size = os.fstat(file.fileno()).st_size  # the position stays where a failed write left it
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        file.truncate(size)
        raise OSError(
            f"cannot write {file.name} ({error.strerror or error}); "
            "mend that and run the same command again"
        ) from error


def is_stale_result(result: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether two results of one title come from different weights, as far as both record it."""
    sums = result.get("weights_sum"), known.get("weights_sum")
    return None not in sums and sums[0] != sums[1]


def newest(folder: str | os.PathLike, pattern: str) -> Path | None:
    """The most recently written file in folder that matches pattern, or None.

    Names of users in the pattern must go through glob.escape or safe_name.
    """
    times = {}
    for path in Path(folder).glob(pattern):
        # A killed writer leaves a hidden temporary file; another process may remove a file.
        with contextlib.suppress(FileNotFoundError):
            if not path.name.startswith(".") and path.is_file():
                times[path] = path.stat().st_mtime
    return max(times, key=times.__getitem__, default=None)


# ------------------------------------------------------------------------- folders with a manifest


class HashingFile:
    """Pass data on to a file and keep its size and SHA-256.

    torch.save hides why a write failed; `error` keeps the reason.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the file system can.

    Raises OSError that names the folder if the disk fails.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            _name_file(error, folder)
            raise
    finally:
        os.close(handle)


def _exchange(path: Path, other: Path) -> bool:
    """Exchange two names in one step, so that no kill falls in between. False if impossible."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(path), os.fsencode(other)
        result = libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE)
        return result == 0
    return False


def _replace_folder(work: Path, path: Path) -> None:
    """Give `path` the content of `work`; a folder that is there is removed afterwards."""
    old = _old_folder(path)
    if not path.exists():
        os.replace(work, path)
    elif _exchange(work, path):
        shutil.rmtree(work)
    else:
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(work, path)
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old_folder(path: Path) -> Path:
    return path.with_name(f".old-{path.name}")


def restore_folder(path: Path) -> None:
    """Put back a folder whose replacement was killed in between."""
    old = _old_folder(path)
    if old.exists() and not path.exists():
        os.replace(old, path)


def _write_hashed(path: Path, write: Callable[[Any], Any]) -> dict[str, Any]:
    """Call write(file) for a new file; returns its size and SHA-256 as the manifest lists them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "wb") as file:
            hashing = save_through(write, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        _name_file(error, path)
        raise
    return {"size": hashing.size, "sha256": hashing.hash.hexdigest()}


def _is_running(number: str) -> bool:
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError, OverflowError):
        return True
    return True


def work_folder(path: Path) -> Path:
    """A new folder beside `path`, to be renamed to it. Those of killed processes are removed."""
    for leftover in path.parent.glob(f".tmp-{glob.escape(path.name)}-*"):
        if not _is_running(leftover.name.rpartition("-")[2]):
            shutil.rmtree(leftover, ignore_errors=True)
    work = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def write_folder(
    path: str | os.PathLike, writers: Mapping[str, Callable[[Any], Any]], manifest: bool = True
) -> Path:
    """Write a folder that is either complete or absent, and return its path.

    Calls write(file) for each name, adds a manifest of sizes and SHA-256 sums (unless `manifest`
    is False) and renames the folder to path. A folder that already exists at path is replaced.
    """
    path = Path(path)
    restore_folder(path)
    work = work_folder(path)
    try:
        entries = {name: _write_hashed(work / name, write) for name, write in writers.items()}
        if manifest:
            listing = json.dumps({"folder": path.name, "files": entries}).encode()
            _write_hashed(work / "manifest.json", lambda file: file.write(listing))
        _sync_folder(work)
        _replace_folder(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return path


def seal(folder: str | os.PathLike, name: str) -> None:
    """Add the manifest to a folder that is about to be renamed to `name`.

    For files that grow over hours, which write_folder could only write a second time.
    """
    entries = {}
    for path in sorted(Path(folder).iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[path.name] = {"size": path.stat().st_size, "sha256": digest}
    save_json({"folder": name, "files": entries}, Path(folder) / "manifest.json")
    _sync_folder(Path(folder))


def verify_folder(path: str | os.PathLike) -> None:
    """Raise ValueError, naming the file, if a folder differs from its manifest."""
    path = Path(path)
    for name, (size, digest) in _read_manifest(path).items():
        file_path = path / name
        try:
            with open(file_path, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{file_path}: {error.strerror}") from error
        if actual != digest or file_path.stat().st_size != size:
            raise ValueError(f"{file_path}: its content is not what was written")


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """{file name: (size, SHA-256)}. Raises ValueError if the manifest is damaged or another's."""
    path = folder / "manifest.json"
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        if manifest["folder"] != folder.name:
            raise ValueError(f"it is the manifest of {manifest['folder']}")
        entries = manifest["files"].items()
        return {name: (entry["size"], entry["sha256"]) for name, entry in entries}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {type(error).__name__}") from error


# ------------------------------------------------------------------------------- one writer


def probe(folder: str | os.PathLike, keep: bool = True) -> None:
    """Make the folder, then write, rename and remove a file in it, before hours are spent.

    Without `keep`, folders that did not exist are removed again. Temporary files of killed writers
    are removed. Raises OSError that says what to check.
    """
    folder = Path(folder)
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        test_file = folder / f".probe-{os.getpid()}"
        write_atomic(test_file, lambda file: file.write(b"x" * 4096)).unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to {folder} ({error.strerror or error}); "
            "check --output_dir, its permissions and free space"
        ) from error
    if not keep:
        with contextlib.suppress(OSError):  # another process may use it by now
            for path in new:
                path.rmdir()


@contextlib.contextmanager
def locked(
    folder: str | os.PathLike, name: str = "lock", advice: str = "use --tag NAME"
) -> Iterator[None]:
    """Hold folder/name as the only writer; the file names this host and process.

    Raises ValueError that names the present writer, and gives `advice`, if there is one.

    Two mechanisms are needed. Where the kernel's lock reaches every process that can open the
    file, it decides; it ends with its holder, so it never goes stale. That is so on one machine,
    whatever host name a container has, and on file systems that one machine mounts, or that pass
    locks on. Elsewhere the host and process in the file decide.
    """
    path = Path(folder) / name
    with open_to_append(path, "a+", encoding="utf-8") as file:
        has_kernel_lock = _kernel_lock(file)
        owner = _read_owner(file)
        # A writer that the kernel's lock reaches would still hold it.
        is_stale = has_kernel_lock and (_on_this_machine(owner) or _locks_reach_all(path))
        if has_kernel_lock is False or (owner and not is_stale and _may_be_running(owner)):
            pid, host, since = (owner.get(key, "?") for key in ("pid", "host", "since"))
            raise ValueError(
                f"{folder} is being written by process {pid} on {host} since {since}; "
                f"wait for it or {advice} (if it is gone, delete {path})"
            )
        file.truncate(0)
        try:
            # Not through the buffer, whose rest would fail again where the file is closed.
            os.write(file.fileno(), json.dumps(_this_process()).encode())
        except OSError as error:
            _name_file(error, path)
            raise
        try:
            yield
        finally:
            # The empty file stays. Were it removed, a process that still has it open and one
            # that makes it anew could both hold a lock.
            file.truncate(0)


@contextlib.contextmanager
def turn(folder: str | os.PathLike) -> Iterator[None]:
    """Wait until no other process changes the results in a folder, which takes milliseconds.

    For results that are read, joined and written again. Raises ValueError after TURN_SECONDS.
    """
    deadline = time.monotonic() + TURN_SECONDS
    Path(folder).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder, ".lock", "try again"))
                break
            except ValueError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield


# File systems that one machine mounts at a time.
LOCAL_FILE_SYSTEMS = frozenset("ext2 ext3 ext4 xfs btrfs zfs f2fs tmpfs overlay ramfs apfs".split())


def _boot_id() -> str:
    """What all containers of a machine share, and what changes when it starts anew; or ""."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _on_this_machine(owner: Mapping[str, Any]) -> bool:
    if owner.get("host") == socket.gethostname():
        return True
    return bool(owner.get("boot")) and owner.get("boot") == _boot_id()


def _file_system(path: Path) -> tuple[str, str]:
    """(type, options) of the file system that a path lies on; ("", "") if it cannot be told."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        return "", ""
    for line in text_records(mounts):
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            kind, _, options = after.split(" ", 2)
            return kind, options
    return "", ""


def _locks_reach_all(path: Path) -> bool:
    """Whether a kernel's lock is seen by every machine that can open a file."""
    kind, options = _file_system(path)
    return kind in LOCAL_FILE_SYSTEMS or (kind == "nfs4" and "local_lock=none" in options)


def _kernel_lock(file: TextIO | int) -> bool | None:
    """Try to lock a file: True if it is ours, False if another process has it, None if unknown."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _read_owner(file: TextIO) -> dict[str, Any]:
    """The writer that a lock file names; {} if it is empty or was cut off by a kill."""
    file.seek(0)
    try:
        return dict(parse_json(file.read() or "{}"))
    except (ValueError, TypeError):
        return {}


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
    }


def _may_be_running(owner: Mapping[str, Any]) -> bool:
    """Whether the process that a lock names may still run. On other hosts nobody can tell."""
    if owner.get("host") != socket.gethostname():
        return not _is_earlier_start_of_this_job(owner)
    try:
        pid = int(owner["pid"])
        os.kill(pid, 0)
    except PermissionError:  # it runs, as another user
        return True
    except (ProcessLookupError, KeyError, ValueError, TypeError, OverflowError):
        return False
    return pid != os.getpid()


def _is_earlier_start_of_this_job(owner: Mapping[str, Any]) -> bool:
    """Whether Slurm has ended that process: a requeued job keeps its id and counts its starts."""
    job = owner.get("job")
    if job is None or job != os.environ.get("SLURM_JOB_ID"):
        return False
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return restarts > int(owner.get("restart") or 0)
