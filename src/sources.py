"""Reads the documents of one split, from files or the hub, in a fixed order and from any position.

This module does not tokenise. `python -m src.sources NAME FOLDER` writes a source as three disjoint
splits.
"""

from __future__ import annotations

import contextlib
import glob as globbing
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard
from tqdm import tqdm

from src import hub
from src.files import (
    data_dir,
    digest,
    error_text,
    first_line,
    load_json,
    locked,
    one_line,
    parse_json,
    printable,
    printable_output,
    save_json,
)

SPLITS = {"train": (0.0, 0.7), "eval": (0.7, 0.8), "apply": (0.8, 1.0), "all": (0.0, 1.0)}
SPLIT_NAMES = ("train", "eval", "apply")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DAMAGED = "damaged archive"
CHAT_KEYS = ("messages", "conversations")  # keys under which data sets keep conversations
SAVE_SECONDS = 5.0  # a killed process loses at most this much work
CHUNK = 2**20  # bytes of text that are read in one call
MAX_LINE = 2**28  # bytes; a longer line is skipped, since reading it would fill the memory
PARQUET_ROWS = 256  # rows of a parquet file that are in memory at one time
CONTINUES = "what is prepared so far is kept, and the same command continues from there"
ABOUT = ".downloaded.json"  # beside what write_splits wrote: the request, and the documents
MIN_CHARS = 100  # write_splits leaves out texts that are not longer


class DataError(ValueError):
    """The data cannot be used: nothing is found, nothing can be read, or the text key is wrong."""

    exit_code = 3


class StreamError(DataError):
    """The hub stopped while it was read. What was read is kept; the same command continues."""

    exit_code = 4


class Chat(str):
    """A conversation rendered by its template, whose special tokens are to be read as such."""


def find_files(path: str | os.PathLike) -> list[Path]:
    """The readable files behind a file, folder or glob, sorted by name.

    Raises FileNotFoundError if nothing exists at the path, DataError if no file can be read.
    """
    text = str(path)
    if globbing.has_magic(text) and not os.path.exists(text):
        names = globbing.glob(text, recursive=True)
        files = [Path(name) for name in names if not os.path.isdir(name)]
    elif os.path.isfile(text):
        files = [Path(text)]
    elif os.path.isdir(text):
        files = [entry for entry in Path(text).iterdir() if entry.is_file()]
        if not any(file.name.endswith(SUFFIXES) for file in files):
            files = [entry for entry in Path(text).rglob("*") if entry.is_file()]
    else:
        raise FileNotFoundError(f"no file, folder or glob at {text}; check --data_path")
    usable = [f for f in files if f.name.endswith(SUFFIXES) and not f.name.startswith(".")]
    if not usable:
        kinds = Counter(file.suffix or "no suffix" for file in files)
        summary = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(3)) or "nothing"
        readable = ", ".join(SUFFIXES)
        raise DataError(f"no .jsonl file in {text} (found {summary}); readable are {readable}")
    return sorted(usable)


def _starts_with_word(file: Path, words: str) -> bool:
    return re.match(rf"({words})([._-]|$)", file.name) is not None


def split_files(files: list[Path], split: str) -> tuple[list[Path], str]:
    """(files to read, split that their documents must belong to).

    If there are files named train*, eval* and apply*, they are the splits, and no document is left
    out. Otherwise the hash of each document gives its split.
    """
    named = {name: [f for f in files if _starts_with_word(f, name)] for name in SPLIT_NAMES}
    if all(named.values()) and split != "all":
        return named[split], "all"
    return files, split


def in_split(text: str, split: str) -> bool:
    """Whether a text belongs to a split, which is a range of hashes."""
    low, high = SPLITS[split]
    if (low, high) == (0.0, 1.0):
        return True
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return low <= int.from_bytes(digest, "big") / 2**64 < high


def _zst_chunks(path: Path) -> Iterator[bytes]:
    # decompressobj, because stream_reader takes a truncated file for a complete one. Small blocks,
    # because 4 bytes may stand for 128 KB: 1 KB cannot become more than 32 MB.
    decoder = zstandard.ZstdDecompressor().decompressobj()
    in_frame = False
    with open(path, "rb") as file:
        while block := file.read(1 << 10):
            while block:
                output = decoder.decompress(block)
                yield from (output[i : i + CHUNK] for i in range(0, len(output), CHUNK))
                in_frame = not decoder.eof
                block = b"" if in_frame else decoder.unused_data
                if not in_frame:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
    if in_frame:
        raise EOFError("the compressed file ends in the middle of a frame")


def _chunks(path: Path) -> Iterator[bytes]:
    """The content of a file, decompressed, in pieces of limited size."""
    if path.name.endswith(".zst"):
        yield from _zst_chunks(path)
        return
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as file:
        # read would lose the last piece of an archive that was cut short.
        while chunk := file.read1(CHUNK):
            yield chunk


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line that is not blank. Only "\\n" ends a line.

    A line of more than MAX_LINE bytes, which may be a decompression bomb, is cut to MAX_LINE + 1.
    """
    number = 1
    parts: list[bytes] = []  # of the line that has not ended
    size = 0
    for chunk in _chunks(path):
        if not parts and not chunk.strip():  # millions of blank lines are passed over at once
            number += chunk.count(b"\n")
            continue
        *ended, rest = chunk.split(b"\n")
        for end in ended:
            line = b"".join([*parts, end])[: MAX_LINE + 1]
            if line.strip():
                yield number, line
            number += 1
            parts, size = [], 0
        if rest and size <= MAX_LINE:
            parts.append(rest)
            size += len(rest)
    line = b"".join(parts)[: MAX_LINE + 1]
    if line.strip():
        yield number, line


class Report:
    """Counts what was read and what was skipped, by reason, and remembers the first bad line.

    Its attributes are stored beside the tokens, so their names are part of the file format.
    """

    def __init__(self, text_key: str, max_bad_frac: float) -> None:
        self.text_key = text_key
        self.max_bad_frac = max_bad_frac
        self.documents = 0
        self.tokens = 0
        self.lines = 0
        self.files = 1
        self.bad: Counter[str] = Counter()
        self.first_bad = ""
        self.first_damaged = ""
        self.parts_left_out = 0  # of conversations: images and the like
        self.keys = ""  # of the first record that lacks the text key

    def state(self) -> dict[str, Any]:
        """What was counted so far, as JSON."""
        names = "documents lines bad first_bad first_damaged parts_left_out keys"
        return {name: getattr(self, name) for name in names.split()}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"bad": Counter(state["bad"])})

    def skip(self, reason: str, place: str) -> None:
        self.bad[reason] += 1
        self.first_bad = self.first_bad or f"{place} ({reason})"
        if reason == DAMAGED:
            self.first_damaged = self.first_damaged or place

    def check(self, final: bool = False) -> None:
        """Raises DataError if too many lines are bad; before the end only on a large sample."""
        wrong_key = self.bad[f"no key {self.text_key!r}"]
        if wrong_key and wrong_key == self.lines and (final or wrong_key >= 1000):
            raise DataError(
                f"no line has the text key {self.text_key!r}; the first has {self.keys}; "
                "set --text_key"
            )
        # Files are counted here, since nobody knows how many lines a damaged file has lost.
        if final and self.bad[DAMAGED] > self.max_bad_frac * self.files:
            raise DataError(
                f"{self.bad[DAMAGED]} of {self.files} files cannot be read to their end, first "
                f"{self.first_damaged}; fetch them again or raise --max_bad_frac "
                f"(now {self.max_bad_frac})"
            )
        # Before the end, fewer than 10,000 lines are too small a sample to judge by.
        if self.lines < (1 if final else 10_000):
            return
        damaged = sum(self.bad.values()) - self.bad["empty"]
        if damaged > self.max_bad_frac * self.lines:
            raise DataError(
                f"{damaged} of {self.lines} lines are damaged ({self.reasons()}), first at "
                f"{self.first_bad}; repair them or raise --max_bad_frac (now {self.max_bad_frac})"
            )

    def reasons(self) -> str:
        return ", ".join(f"{n} {reason}" for reason, n in self.bad.most_common())


def _text_key(record: dict, text_key: str, can_render: bool) -> str | None:
    """The key of the record's text. A conversation may stand in for the default key, `text`."""
    if text_key in record:
        return text_key
    if text_key != "text" or not can_render:
        return None
    return next((key for key in CHAT_KEYS if isinstance(record.get(key), list)), None)


def _text_of(
    record: Any, place: str, report: Report, render: Callable[[list], str] | None
) -> str | None:
    """The text of a record, through `render` if it is a conversation. None if it is skipped."""
    if not isinstance(record, dict):
        return report.skip("not an object", place)
    key = _text_key(record, report.text_key, render is not None)
    if key is None:
        report.keys = report.keys or ", ".join(map(str, record)) or "no key at all"
        return report.skip(f"no key {report.text_key!r}", place)
    text = record[key]
    if isinstance(text, list) and render is not None:
        try:
            text = Chat(render(chat_turns(text, report)))
        except (KeyError, TypeError, AttributeError):
            return report.skip("not a conversation", place)
    if not isinstance(text, str):
        return report.skip("text is not a string", place)
    if not text.strip():
        return report.skip("empty", place)
    # JSON may spell unpaired surrogates, which no tokenizer takes.
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return Chat(clean) if isinstance(text, Chat) else clean


def chat_turns(messages: list, report: Report) -> list[dict[str, str]]:
    """Turns as templates take them: {"role", "content"}. ShareGPT's {"from", "value"} is converted.

    Raises KeyError or TypeError if the messages have neither form.
    """
    roles = {"human": "user", "gpt": "assistant"}
    turns = []
    for turn in messages:
        if "role" not in turn:
            role = roles.get(turn["from"], turn["from"])
            turn = {"role": role, "content": turn["value"]}
        if isinstance(turn["content"], list):
            turn = {**turn, "content": _text_parts(turn["content"], report)}
        turns.append(turn)
    if not all(isinstance(turn["content"], str) for turn in turns):
        raise TypeError("turns that are not text")
    if not any(turn["content"].strip() for turn in turns):
        raise TypeError("no turn with a text")
    return turns


def _text_parts(parts: list, report: Report) -> str:
    """The text of a content that is a list of parts; images and other parts are counted."""
    texts = [part if isinstance(part, str) else part.get("text") for part in parts]
    kept = [text for text in texts if isinstance(text, str)]
    report.parts_left_out += len(texts) - len(kept)
    return "\n".join(kept)


def _parquet_records(file: Path, report: Report) -> Iterator[tuple[Any, str]]:
    """(record, place) of one parquet file; a damaged file is counted once.

    It is read with pyarrow, because the loaders of `datasets` take the name for a pattern.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    with open(file, "rb") as stream:
        try:
            table = ParquetFile(stream)
            wanted = (report.text_key, *CHAT_KEYS)
            names = [name for name in table.schema_arrow.names if name in wanted] or None
            for batch in table.iter_batches(PARQUET_ROWS, columns=names):
                for row in range(len(batch)):
                    number += 1
                    report.lines += 1
                    place = f"{file}:{number}"
                    cells = [column[row] for column in batch.columns]
                    if any(map(_is_too_long, cells)):
                        report.skip("line too long", place)
                        continue
                    try:
                        values = [cell.as_py() for cell in cells]
                        record = dict(zip(batch.schema.names, values, strict=True))
                    except UnicodeDecodeError:
                        report.skip("not UTF-8", place)
                        continue
                    yield record, place
        except (pyarrow.ArrowException, OSError) as error:
            # pyarrow raises plain OSErrors for damaged pages; those of the system have a number.
            if getattr(error, "errno", None):
                raise
            report.lines += 1
            report.skip(DAMAGED, f"{file}:{number}")


def _is_too_long(cell: Any) -> bool:
    """Whether a cell of parquet holds a text so long that it could fill the memory."""
    content = cell.as_buffer() if hasattr(cell, "as_buffer") else None
    return content is not None and content.size > MAX_LINE


def _json_records(file: Path, report: Report) -> Iterator[tuple[Any, str]]:
    """(record, place) of one JSONL file; damaged lines are counted and skipped."""
    number = 0
    try:
        for number, line in _lines(file):
            place = f"{file}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
            report.lines += 1
            if len(line) > MAX_LINE:
                report.skip("line too long", place)
                continue
            try:
                yield parse_json(line.decode("utf-8")), place
            except UnicodeDecodeError:
                report.skip("not UTF-8", place)
            except ValueError:
                report.skip("not JSON", place)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError):
        report.lines += 1
        report.skip(DAMAGED, f"{file}:{number}")


def _hub_failure(error: Exception, name: str) -> str:
    """Why the hub did not give a data set, in one line, and what to do where that is known."""
    known = hub.reason(error, name, "datasets/")
    if known:
        return known
    message = first_line(error)
    if "scripts are no longer supported" in message:
        message += "; take a copy of it in parquet or JSONL"
    return message


class Documents:
    """Texts of one split of a source, in a fixed order.

    source: a file, folder, glob, or hub name `owner/name[:config]`. render: turns conversations
    into text. After each text, `position()` is where another Documents of the same source
    continues. Raises DataError if the source cannot be used, StreamError if the hub stops.
    """

    def __init__(
        self,
        source: str,
        split: str,
        report: Report,
        position: dict[str, Any] | None = None,
        render: Callable[[list], str] | None = None,
    ) -> None:
        self.source = source
        self.split = split
        self.report = report
        self.start = position
        self.render = render
        self.stream: Any = None  # the data set of the hub, once it is open

    def position(self) -> dict[str, Any]:
        """As JSON: what was counted, and the state of the hub's stream."""
        if self.stream is None:  # it could not be opened again
            stream = (self.start or {}).get("stream")
        else:
            stream = self.stream.state_dict()
        return {"report": self.report.state(), "stream": stream}

    def __iter__(self) -> Iterator[str]:
        if is_local(self.source):
            records, split = self._local_records()
        else:
            records, split = self._hub_records(), self.split
        if self.start:
            self.report.restore(self.start["report"])
        for record, place in records:
            text = _text_of(record, place, self.report, self.render)
            self.report.check()
            if text is not None and in_split(text, split):
                self.report.documents += 1
                yield text

    def _local_records(self) -> tuple[Iterator[tuple[Any, str]], str]:
        """(records of all files from the start position on, split to filter them by)"""
        report = self.report
        all_files = find_files(self.source)
        files, split = split_files(all_files, self.split)
        report.files = len(files)
        if split == self.split != "all":
            self._warn_of_split_names(all_files)
        self._warn_of_folders(all_files)

        def read() -> Iterator[tuple[Any, str]]:
            for file in files:
                parse = _parquet_records if file.suffix == ".parquet" else _json_records
                yield from parse(file, report)

        records = read()
        if self.start:
            # Reading the first part again takes little time compared with tokenising it.
            skipped = self.start["report"]["lines"]
            while report.lines < skipped and next(records, None) is not None:
                pass
        return records, split

    def _warn_of_split_names(self, files: list[Path]) -> None:
        words = "eval|apply|val|valid|validation|dev|test"
        names = [file.name for file in files if _starts_with_word(file, words)]
        if names:
            print(
                f"warning: {one_line(', '.join(names[:3]))} is not used as a split (that needs "
                "files train*, eval* and apply*); the documents of all files are split by their "
                "hash"
            )

    def _warn_of_folders(self, files: list[Path]) -> None:
        """Says that a folder with files of text has more of them in sub folders."""
        if not os.path.isdir(self.source) or any(f.parent != Path(self.source) for f in files):
            return
        folder = Path(self.source)
        inside = sorted(f for f in folder.glob("*/**/*") if f.name.endswith(SUFFIXES))
        unread = []
        for file in inside:
            is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if not is_hidden and data_dir() / "demo" not in file.parents:
                unread.append(file)
        if unread:
            print(
                f"warning: {len(unread)} files in sub folders of {folder} are not read, such as "
                f"{one_line(unread[0])}; --data_path '{folder}/**/*' reads them too"
            )

    def _hub_records(self) -> Iterator[tuple[Any, str]]:
        from datasets import load_dataset

        name, _, config = self.source.partition(":")
        # The hub client raises a dozen kinds of errors; the message tells them apart.
        try:
            if not hub.reachable():
                raise ConnectionError
            self.stream = load_dataset(name, config or None, split="train", streaming=True)
            if self.start:
                self.stream.load_state_dict(self.start["stream"])
            records = iter(self.stream)
            record = next(records, None)
        except Exception as error:
            why = f"cannot be read from the hub: {_hub_failure(error, name)}"
            if self.start:
                raise StreamError(f"{self.source} {why}; {CONTINUES}") from error
            raise DataError(f"{self.source} is not a local file and {why}") from error
        while record is not None:
            self.report.lines += 1
            yield record, f"{self.source}:{self.report.lines}"
            try:
                record = next(records, None)
            except Exception as error:
                raise StreamError(
                    f"{self.source}: the hub stopped after {self.report.lines} records "
                    f"({_hub_failure(error, name)}); {CONTINUES}"
                ) from error


def is_local(source: str) -> bool:
    """False for what can only be a hub name: `owner/name` without a file behind it."""
    if os.path.exists(source) or globbing.has_magic(source) or source.endswith(SUFFIXES):
        return True
    hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source)
    return not hub_name or source.startswith((".", "/"))


def _sum_of_start(path: Path, size: int) -> Any:
    """The SHA-256 of the first bytes of a file, as far as it has them."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while size and (block := file.read(min(size, CHUNK))):
            total.update(block)
            size -= len(block)
    return total


class _SplitFiles:
    """The three files of write_splits while they grow; what `save` has saved survives a kill."""

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self.folder = folder
        self.path = folder / "progress.json"
        self.request = request
        self._begin()
        if self.path.exists():
            self._continue()
        self.files = {name: open(folder / f"{name}.jsonl", "ab") for name in SPLIT_NAMES}
        for name, file in self.files.items():
            file.truncate(self.sizes[name])

    def _begin(self) -> None:
        self.sizes = dict.fromkeys(SPLIT_NAMES, 0)  # bytes
        self.counts = dict.fromkeys(SPLIT_NAMES, 0)  # documents
        self.sums = {name: hashlib.sha256() for name in SPLIT_NAMES}
        self.position: dict[str, Any] | None = None

    def _continue(self) -> None:
        """Takes over what was saved for the same request, if the files hold it."""
        try:
            progress = load_json(self.path)
            if progress["what"] != self.request:
                return
            self.sizes, self.counts = progress["sizes"], progress["counts"]
            for name in SPLIT_NAMES:
                path = self.folder / f"{name}.jsonl"
                self.sums[name] = _sum_of_start(path, self.sizes[name])
            if self._progress(progress["position"]) != progress:
                raise ValueError("its files are not what was saved")
            self.position = progress["position"]
        except (ValueError, TypeError, KeyError, OSError) as error:
            print(f"warning: the unfinished download is damaged ({error}); beginning again")
            self._begin()

    def _progress(self, position: Any) -> dict[str, Any]:
        """What was done so far; `sum` is over all of it."""
        progress = {
            "what": self.request,
            "sizes": self.sizes,
            "counts": self.counts,
            "position": position,
        }
        sums = [value.hexdigest() for value in self.sums.values()]
        return progress | {"sum": digest(json.dumps([progress, sums]).encode())}

    def add(self, text: str) -> int:
        """Writes a text into the file of its split; returns the number of bytes."""
        split = next(name for name in SPLIT_NAMES if in_split(text, name))
        line = json.dumps({"text": text}).encode() + b"\n"
        size = self.files[split].write(line)
        self.sums[split].update(line)
        self.counts[split] += 1
        self.sizes[split] += size
        return size

    def fill(self, texts: Documents, max_bytes: int) -> None:
        """Adds long texts until there are max_bytes, and saves from time to time."""
        saved_at = time.monotonic()
        written = sum(self.sizes.values())
        units = {"unit": "B", "unit_scale": True, "mininterval": 1}
        with tqdm(desc="downloading", initial=written, total=max_bytes, **units) as bar:
            for text in texts:
                if len(text) > MIN_CHARS:
                    size = self.add(text)
                    written += size
                    bar.update(size)
                    if written >= max_bytes:
                        break
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    self.save(texts.position())
                    saved_at = time.monotonic()

    def save(self, position: dict[str, Any]) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        save_json(self._progress(position), self.path, indent=None)

    def close(self) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):  # of a full disk, which save() or add() has told
                file.close()


def write_splits(
    source: str, folder: str | os.PathLike, max_bytes: int, text_key: str = "text"
) -> dict[str, int]:
    """Writes a source to folder/{train,eval,apply}.jsonl; returns the documents of each split.

    Only texts of more than MIN_CHARS characters are written, until there are max_bytes of JSONL.
    The files appear once all three are complete; the same call continues a killed one, and returns
    at once after a finished one. Raises DataError if the source cannot be read or gives too few
    such texts, and StreamError if the hub stops or is out of reach for the rest.
    """
    folder = Path(folder)
    work = folder / ".downloading"
    request = {"source": str(source), "max_bytes": max_bytes, "text_key": text_key}
    finished = work / "finished.json"  # of a process that was killed while it moved the files
    if not finished.exists():
        counts = _written_before(folder, request)
        if counts is not None:
            return counts
        _refuse_to_replace(source, folder)
    work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        if not finished.exists():
            counts = _fill_splits(work, request)
            save_json({"what": request, "documents": counts}, finished)
        counts = load_json(finished)["documents"]
        for name in SPLIT_NAMES:
            if (work / f"{name}.jsonl").exists():
                os.replace(work / f"{name}.jsonl", folder / f"{name}.jsonl")
        os.replace(finished, folder / ABOUT)
        shutil.rmtree(work)
    return counts


def _written_before(folder: Path, request: dict[str, Any]) -> dict[str, int] | None:
    """The documents of each split, if the same request has already written them."""
    about = folder / ABOUT
    if not about.exists() or not all((folder / f"{name}.jsonl").exists() for name in SPLIT_NAMES):
        return None
    written = load_json(about)
    is_same = isinstance(written, dict) and written.get("what") == request
    return written["documents"] if is_same else None


def _fill_splits(work: Path, request: dict[str, Any]) -> dict[str, int]:
    """Reads the source into the three files of `work`; returns the documents of each."""
    source = request["source"]
    files = _SplitFiles(work, request)
    texts = Documents(source, "all", Report(request["text_key"], 0.01), files.position)
    try:
        files.fill(texts, request["max_bytes"])
        texts.report.check(final=True)
        if not all(files.counts.values()):
            raise DataError(
                f"{source} gave {sum(files.counts.values())} texts of over {MIN_CHARS} "
                "characters, too few for three splits"
            )
        files.save(texts.position())
    except (StreamError, KeyboardInterrupt):
        files.save(texts.position())
        raise
    except DataError:
        shutil.rmtree(work)
        raise
    except OSError as error:
        error.filename = error.filename or str(work)
        raise
    finally:
        files.close()
    return files.counts


def _refuse_to_replace(source: str, folder: Path) -> None:
    """Raises DataError if files of the user lie where write_splits puts its own."""
    targets = [folder / f"{name}.jsonl" for name in SPLIT_NAMES]
    existing = [path for path in targets if os.path.lexists(path)]
    if existing:
        raise DataError(
            f"{existing[0]} exists and would be replaced by a part of {source}; "
            "name another folder, or move it away"
        )
    if is_local(source) and any(f.resolve().parent == folder.resolve() for f in find_files(source)):
        raise DataError(f"{source} lies in the folder to write, {folder}; name another folder")


@printable_output()
def main() -> int:
    from src.config import small_parser

    parser = small_parser("src.sources", "Write a source of text as three disjoint splits.")
    parser.add_argument("source", help="file, folder, glob, or hub name owner/name[:config]")
    parser.add_argument("folder", help="where train.jsonl, eval.jsonl and apply.jsonl go")
    parser.add_argument(
        "--max_mb", type=float, default=2000, help="stop after this much text (default: 2000)"
    )
    parser.add_argument("--text_key", default="text", help="key of the text in each record")
    args = parser.parse_args()
    try:
        counts = write_splits(args.source, args.folder, int(args.max_mb * 1e6), args.text_key)
    except (ValueError, OSError) as error:
        print(f"download_data: error: {printable(error_text(error))}", file=sys.stderr)
        return getattr(error, "exit_code", 3)
    summary = ", ".join(f"{name}.jsonl {count} documents" for name, count in counts.items())
    print(summary, f"in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
