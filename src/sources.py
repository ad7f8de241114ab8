"""Text from files or the hub -> documents of one split, in a fixed order, from any position on. Knows no tokenizer and no rows.

`python -m src.sources NAME FOLDER` writes a source as three disjoint splits.
"""

from __future__ import annotations

import argparse
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import zstandard
from tqdm import tqdm

from src import hub
from src.files import load_json, locked, save_json

SPLITS = {"train": (0.0, 0.7), "eval": (0.7, 0.8), "apply": (0.8, 1.0), "all": (0.0, 1.0)}
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DAMAGED = "damaged archive"
CHATS = ("messages", "conversations")  # keys under which data sets keep conversations
SAVE_SECONDS = 5.0  # work that a kill may cost


class DataError(ValueError):
    """Data that cannot be used: nothing there, nothing readable, the wrong key."""

    exit_code = 3


class StreamError(DataError):
    """The hub stopped in the middle: what was read so far is kept, and the same command goes on from there."""


class Chat(str):
    """A conversation in the form of its template, whose special tokens are meant as such."""


def find_files(path: str | os.PathLike) -> list[Path]:
    """The readable files behind a file, folder or glob, sorted by name.

    Raises FileNotFoundError where nothing is there, DataError where nothing there can be read.
    """
    text = str(path)
    if globbing.has_magic(text) and not os.path.exists(text):
        found = [Path(name) for name in globbing.glob(text, recursive=True)]
    elif os.path.isfile(text):
        found = [Path(text)]
    elif os.path.isdir(text):
        entries = list(Path(text).iterdir())
        if not any(entry.name.endswith(SUFFIXES) for entry in entries):
            entries = list(Path(text).rglob("*"))
        found = [entry for entry in entries if entry.is_file()]
    else:
        raise FileNotFoundError(f"no file, folder or glob at {text}; check --data_path")
    usable = sorted(f for f in found if f.name.endswith(SUFFIXES) and not f.name.startswith("."))
    if not usable:
        kinds = Counter(f.suffix or "no suffix" for f in found)
        there = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(3)) or "nothing"
        raise DataError(
            f"no .jsonl file in {text} (found {there}); readable are {', '.join(SUFFIXES)}"
        )
    return usable


def split_files(files: list[Path], split: str) -> tuple[list[Path], str]:
    """Files named train*, eval*, apply* are the splits, if all three are there; else documents are split by hash."""
    named = {
        name: [f for f in files if re.match(rf"{name}([._-]|$)", f.name)]
        for name in ("train", "eval", "apply")
    }
    if all(named.values()) and split != "all":
        return named[split], "all"
    return files, split


def in_split(text: str, split: str) -> bool:
    low, high = SPLITS[split]
    if (low, high) == (0.0, 1.0):
        return True
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return low <= int.from_bytes(digest, "big") / 2**64 < high


def _zst_lines(path: Path) -> Iterator[bytes]:
    # decompressobj instead of stream_reader: the latter takes a truncated file for a finished one
    decoder, open_frame, rest = zstandard.ZstdDecompressor().decompressobj(), False, b""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            while block:
                open_frame = True
                pieces = (rest + decoder.decompress(block)).split(b"\n")
                rest = pieces.pop()
                yield from pieces
                block = b""
                if decoder.eof:
                    block, open_frame = decoder.unused_data, False
                    decoder = zstandard.ZstdDecompressor().decompressobj()
    if rest:
        yield rest
    if open_frame:
        raise EOFError("the compressed file ends in the middle of a frame")


def _lines(path: Path) -> Iterator[bytes]:
    if path.name.endswith(".zst"):
        yield from _zst_lines(path)
    else:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            yield from file


class Report:
    """What was read and what was skipped, by reason; says where the first bad line stands."""

    def __init__(self, text_key: str, max_bad_frac: float) -> None:
        self.text_key, self.max_bad_frac = text_key, max_bad_frac
        self.documents = self.tokens = self.lines = 0
        self.files = 1
        self.bad: Counter[str] = Counter()
        self.first_bad = self.first_damaged = self.keys = ""

    def state(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {
            name: getattr(self, name)
            for name in ("documents", "lines", "bad", "first_bad", "first_damaged", "keys")
        }

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"bad": Counter(state["bad"])})

    def skip(self, reason: str, place: str) -> None:
        self.bad[reason] += 1
        self.first_bad = self.first_bad or f"{place} ({reason})"
        if reason == DAMAGED:
            self.first_damaged = self.first_damaged or place

    def check(self, final: bool = False) -> None:
        """Raises DataError once too many lines are damaged; early only where the sample is large enough to tell."""
        damaged = sum(self.bad.values()) - self.bad["empty"]
        wrong_key = self.bad[f"no key {self.text_key!r}"]
        if wrong_key and wrong_key == self.lines and (final or wrong_key >= 1000):
            raise DataError(
                f"no line has the text key {self.text_key!r}; the first has {self.keys}; set --text_key"
            )
        if (
            final and self.bad[DAMAGED] > self.max_bad_frac * self.files
        ):  # nobody knows how many lines such a file has lost
            raise DataError(
                f"{self.bad[DAMAGED]} of {self.files} files cannot be read to their end, first {self.first_damaged}; "
                f"fetch them again or raise --max_bad_frac (now {self.max_bad_frac})"
            )
        if (
            self.lines
            and (final or self.lines >= 10_000)
            and damaged > self.max_bad_frac * self.lines
        ):
            raise DataError(
                f"{damaged} of {self.lines} lines are damaged ({self.reasons()}), first at {self.first_bad}; "
                f"mend them or raise --max_bad_frac (now {self.max_bad_frac})"
            )

    def reasons(self) -> str:
        return ", ".join(f"{n} {reason}" for reason, n in self.bad.most_common())


def _text_of(
    record: Any, place: str, report: Report, render: Callable[[list], str] | None
) -> str | None:
    """The text of a record, a conversation through `render`; None where it is skipped, with the reason counted."""
    if not isinstance(record, dict):
        return report.skip("not an object", place)
    key = (
        report.text_key
        if report.text_key in record
        else next((key for key in CHATS if isinstance(record.get(key), list)), None)
    )
    if key is None or (key != report.text_key and (render is None or report.text_key != "text")):
        report.keys = report.keys or ", ".join(map(str, record)) or "no key at all"
        return report.skip(f"no key {report.text_key!r}", place)
    text = record[key]
    if isinstance(text, list) and render is not None:
        try:
            text = Chat(render(_turns(text)))
        except (KeyError, TypeError, AttributeError):
            return report.skip("not a conversation", place)
    if not isinstance(text, str):
        return report.skip("text is not a string", place)
    if not text.strip():
        return report.skip("empty", place)
    clean = text.encode("utf-8", "replace").decode(
        "utf-8"
    )  # JSON may spell unpaired surrogates, which no tokenizer takes
    return Chat(clean) if isinstance(text, Chat) else clean


def _turns(messages: list) -> list[dict[str, str]]:
    """Turns as templates take them: {"role", "content"}, or ShareGPT's {"from", "value"}. Raises KeyError or TypeError for others."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = [
        turn
        if "role" in turn
        else {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
        for turn in messages
    ]
    if not turns or not all(isinstance(turn["content"], str) for turn in turns):
        raise TypeError("no turns, or turns that are not text")
    return turns


def _records(file: Path, report: Report) -> Iterator[tuple[Any, str]]:
    """(record, place) of one file; damaged lines are counted and passed over."""
    if file.suffix == ".parquet":
        from datasets import load_dataset

        number = 0
        try:
            for number, record in enumerate(
                load_dataset("parquet", data_files=str(file), split="train", streaming=True), 1
            ):
                report.lines += 1
                yield record, f"{file}:{number}"
        except ValueError:  # pyarrow's kinds are of it
            report.lines += 1
            report.skip(DAMAGED, f"{file}:{number}")
        return
    number = 0
    try:
        for number, line in enumerate(_lines(file), 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            report.lines += 1
            try:
                yield json.loads(line.decode("utf-8")), f"{file}:{number}"
            except UnicodeDecodeError:
                report.skip("not UTF-8", f"{file}:{number}")
            except (json.JSONDecodeError, RecursionError):
                report.skip("not JSON", f"{file}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError):
        report.lines += 1
        report.skip(DAMAGED, f"{file}:{number}")


class Documents:
    """Texts of one split of a source (file, folder, glob, or hub name `owner/name[:config]`), in a fixed order.

    After each text, `position()` is what another Documents of the same source goes on from. Raises DataError for a source that cannot be
    used, StreamError where the hub breaks off.
    """

    def __init__(
        self,
        source: str,
        split: str,
        report: Report,
        position: dict[str, Any] | None = None,
        render: Callable[[list], str] | None = None,
    ) -> None:
        self.source, self.split, self.report, self.render, self.rows = (
            source,
            split,
            report,
            render,
            None,
        )
        self.start = position

    def position(self) -> dict[str, Any]:
        """As JSON: what was counted, and where a stream stands."""
        return {
            "report": self.report.state(),
            "stream": self.rows.state_dict() if self.rows is not None else None,
        }

    def __iter__(self) -> Iterator[str]:
        report, split = self.report, self.split
        if is_local(self.source):
            found = find_files(self.source)
            files, split = split_files(found, split)
            report.files = len(files)
            apart = [
                file.name
                for file in found
                if re.match(r"(eval|apply|val|valid|validation|dev|test)([._-]|$)", file.name)
            ]
            if apart and split == self.split != "all":
                print(
                    f"warning: {', '.join(apart[:3])} is no split of its own here (files train*, eval* and apply* are, if all three are there); "
                    "the documents of all files are split by their text"
                )
            records = (pair for file in files for pair in _records(file, report))
            if self.start:  # reading again what is there costs little beside tokenising it
                passed = self.start["report"]["lines"]
                while report.lines < passed and next(records, None) is not None:
                    pass
        else:
            records = self._streamed()
        if self.start:
            report.restore(self.start["report"])
        for record, place in records:
            text = _text_of(record, place, report, self.render)
            report.check()
            if text is not None and in_split(text, split):
                report.documents += 1
                yield text

    def _streamed(self) -> Iterator[tuple[Any, str]]:
        from datasets import load_dataset

        name, _, config = self.source.partition(":")
        try:
            self.rows = load_dataset(name, config or None, split="train", streaming=True)
            if self.start:
                self.rows.load_state_dict(self.start["stream"])
            records = iter(self.rows)
            first = next(records, None)
        except Exception as error:  # the hub client raises a dozen kinds; all mean the same to the user, and the line says which
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            todo = (
                "; take a copy of it in parquet or JSONL"
                if "scripts are no longer supported" in said
                else ""
            )
            reason = hub.reason(error, name, "datasets/") or said + todo
            raise DataError(
                f"{self.source} is no file here and cannot be read from the hub: {reason}"
            ) from error
        while first is not None:
            self.report.lines += 1
            yield first, f"{self.source}:{self.report.lines}"
            try:
                first = next(records, None)
            except Exception as error:  # as above, hours later
                reason = (
                    hub.reason(error, name, "datasets/")
                    or (str(error).splitlines() or [type(error).__name__])[0]
                )
                kept = "what is prepared so far is kept, and the same command goes on from there"
                raise StreamError(
                    f"{self.source}: the hub broke off after {self.report.lines} records ({reason}); {kept}"
                ) from error


def is_local(source: str) -> bool:
    """True for paths and globs; False for what can only be a hub name (`owner/name` without a file behind it)."""
    looks_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) and not source.startswith(
        (".", "/")
    )
    return (
        os.path.exists(source)
        or globbing.has_magic(source)
        or source.endswith(SUFFIXES)
        or not looks_like_hub
    )


def write_splits(
    source: str, folder: str | os.PathLike, max_bytes: int, text_key: str = "text"
) -> dict[str, int]:
    """Writes folder/{train,eval,apply}.jsonl from a source, texts over 100 characters, until max_bytes are written; returns documents by split.

    The files appear when all three are complete; a killed call is continued by the next. Raises DataError where the source cannot be read
    or holds no such text.
    """
    names, folder = ("train", "eval", "apply"), Path(folder)
    work = folder / ".downloading"
    work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        what = {"source": str(source), "max_bytes": max_bytes, "text_key": text_key}
        saved = load_json(work / "progress.json") if (work / "progress.json").exists() else {}
        saved = saved if saved.get("what") == what else {}
        sizes, counts = (
            saved.get("sizes", dict.fromkeys(names, 0)),
            saved.get("counts", dict.fromkeys(names, 0)),
        )
        texts = Documents(str(source), "all", Report(text_key, 0.01), saved.get("position"))
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(open(work / f"{name}.jsonl", "ab")) for name in names
            }
            for name, file in files.items():
                file.truncate(sizes[name])
            done = sum(sizes.values())
            bar = stack.enter_context(
                tqdm(
                    total=max_bytes,
                    initial=done,
                    desc="downloading",
                    unit="B",
                    unit_scale=True,
                    mininterval=1,
                )
            )

            def save() -> None:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                progress = {
                    "what": what,
                    "sizes": sizes,
                    "counts": counts,
                    "position": texts.position(),
                }
                save_json(progress, work / "progress.json", indent=None)

            saved_at = time.monotonic()
            try:
                for text in texts:
                    if len(text) > 100:
                        split = next(name for name in names if in_split(text, name))
                        size = files[split].write(json.dumps({"text": text}).encode() + b"\n")
                        counts[split], sizes[split] = counts[split] + 1, sizes[split] + size
                        bar.update(size)
                        if sum(sizes.values()) >= max_bytes:
                            break
                    if time.monotonic() - saved_at >= SAVE_SECONDS:
                        save()
                        saved_at = time.monotonic()
                texts.report.check(final=True)
                if not all(counts.values()):
                    raise DataError(
                        f"{source} gave {sum(counts.values())} texts of over 100 characters, too few for three splits"
                    )
            except (StreamError, KeyboardInterrupt):
                save()
                raise
            except DataError:
                shutil.rmtree(work)
                raise
        for name in names:
            os.replace(work / f"{name}.jsonl", folder / f"{name}.jsonl")
        shutil.rmtree(work)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.sources", description="Write a source of text as three disjoint splits."
    )
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
        print(f"download_data: error: {error}", file=sys.stderr)
        return 3
    print(
        ", ".join(f"{name}.jsonl {count} documents" for name, count in counts.items()),
        f"in {args.folder}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
