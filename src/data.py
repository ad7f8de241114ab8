"""Text from files or the hub -> documents -> splits -> tokens -> rows of fixed length. Has never heard of an SAE.

A source is tokenised once into a flat memory-mapped stream (document, EOS, document, EOS ...); rows are cut from the
stream when they are read, so nothing is padded except the very last row and no text is lost.

Shapes: B rows, S positions per row.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import glob as globbing
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from src.files import data_dir, load_json, save_json, seal, umask, verify_folder

SPLITS = {"train": (0.0, 0.7), "eval": (0.7, 0.8), "apply": (0.8, 1.0), "all": (0.0, 1.0)}
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DAMAGED = "damaged archive"
LONGEST = 2**20  # characters tokenised at one time: about 150 bytes of memory each
HUB_TOKENS = 100_000_000  # what a hub data set is cut to where no limit is given: some of them do not end


class DataError(ValueError):
    """Data that cannot be used: nothing there, nothing readable, the wrong key."""

    exit_code = 3


class Batch(NamedTuple):
    """Rows of tokens. `mask` is True where a token counts; a causal LM needs nothing more, since padding is on the right."""

    input_ids: Tensor  # int64 [B,S]
    mask: Tensor  # bool  [B,S]; False on special tokens, position 0 and padding
    document: Tensor  # int64 [B,S]; number of the document each token comes from
    row: Tensor  # int64 [B]

    def part(self, rows: slice) -> Batch:
        """Some of the rows. Of none at least the first with no token counted, so that a language model has something to run on."""
        some = Batch(*(value[rows] for value in self))
        return some if len(some.row) else Batch(*(value[:1] for value in self))._replace(mask=torch.zeros_like(self.mask[:1]))

    def to(self, device: str | torch.device) -> Batch:
        return Batch(*(part.to(device, non_blocking=True) for part in self))

    def token_keys(self) -> Tensor:
        """A number for every counted token that does not depend on how rows are batched: int64 [N]."""
        length = self.input_ids.shape[1]
        keys = self.row[:, None] * length + torch.arange(length, device=self.row.device)
        return keys[self.mask]


# ---------------------------------------------------------------------------------------------------------- files


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
        raise DataError(f"no .jsonl file in {text} (found {there}); readable are {', '.join(SUFFIXES)}")
    return usable


def _split_files(files: list[Path], split: str) -> tuple[list[Path], str]:
    """Files named train*, eval*, apply* are the splits, if all three are there; else documents are split by hash."""
    named = {name: [f for f in files if re.match(rf"{name}([._-]|$)", f.name)] for name in ("train", "eval", "apply")}
    if all(named.values()) and split != "all":
        return named[split], "all"
    return files, split


def _in_split(text: str, split: str) -> bool:
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
            raise DataError(f"no line has the text key {self.text_key!r}; the first has {self.keys}; set --text_key")
        if final and self.bad[DAMAGED] > self.max_bad_frac * self.files:  # nobody knows how many lines such a file has lost
            raise DataError(f"{self.bad[DAMAGED]} of {self.files} files cannot be read to their end, first {self.first_damaged}; "
                            f"fetch them again or raise --max_bad_frac (now {self.max_bad_frac})")
        if self.lines and (final or self.lines >= 10_000) and damaged > self.max_bad_frac * self.lines:
            raise DataError(
                f"{damaged} of {self.lines} lines are damaged ({self.reasons()}), first at {self.first_bad}; "
                f"mend them or raise --max_bad_frac (now {self.max_bad_frac})"
            )

    def reasons(self) -> str:
        return ", ".join(f"{n} {reason}" for reason, n in self.bad.most_common())


def _text_of(record: Any, place: str, report: Report) -> str | None:
    if not isinstance(record, dict):
        return report.skip("not an object", place)
    if report.text_key not in record:
        report.keys = report.keys or ", ".join(map(str, record)) or "no key at all"
        return report.skip(f"no key {report.text_key!r}", place)
    text = record[report.text_key]
    if not isinstance(text, str):
        return report.skip("text is not a string", place)
    if not text.strip():
        return report.skip("empty", place)
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON may spell unpaired surrogates, which no tokenizer takes


def _records(file: Path, report: Report) -> Iterator[tuple[Any, str]]:
    """(record, place) of one file; damaged lines are counted and passed over."""
    if file.suffix == ".parquet":
        from datasets import load_dataset

        number = 0
        try:
            for number, record in enumerate(load_dataset("parquet", data_files=str(file), split="train", streaming=True), 1):
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


def documents(source: str, split: str, report: Report) -> Iterator[str]:
    """Texts of one split of a source (file, folder, glob, or hub name `owner/name[:config]`), in a fixed order."""
    if is_local(source):
        files, split = _split_files(find_files(source), split)
        report.files = len(files)
        records = (pair for file in files for pair in _records(file, report))
    else:
        records = _hub_records(source, report)
    for record, place in records:
        text = _text_of(record, place, report)
        report.check()
        if text is not None and _in_split(text, split):
            report.documents += 1
            yield text


def is_local(source: str) -> bool:
    """True for paths and globs; False for what can only be a hub name (`owner/name` without a file behind it)."""
    looks_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) and not source.startswith((".", "/"))
    return os.path.exists(source) or globbing.has_magic(source) or source.endswith(SUFFIXES) or not looks_like_hub


def _hub_records(source: str, report: Report) -> Iterator[tuple[Any, str]]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        rows = iter(load_dataset(name, config or None, split="train", streaming=True))
        first = next(rows, None)
    except Exception as error:  # the hub client raises a dozen kinds; all mean the same to the user, and the first line names which
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        todo = "; take a copy of it in parquet or JSONL" if "scripts are no longer supported" in reason else ""
        raise DataError(f"{source} is no file here and cannot be read from the hub: {reason}{todo}") from error
    for number, record in enumerate([] if first is None else [first], 1):
        report.lines += 1
        yield record, f"{source}:{number}"
    for number, record in enumerate(rows, 2):
        report.lines += 1
        yield record, f"{source}:{number}"


# --------------------------------------------------------------------------------------------------------- tokens


def tokenizer_hash(tokenizer: Any) -> str:
    """Changes when the tokenizer would give other ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.blake2b((text + str(tokenizer.all_special_ids)).encode(), digest_size=8).hexdigest()


def _word_pieces(text: str, words: int) -> Iterator[str]:
    """Pieces of `words` whitespace-separated words; joined they are the text again, whitespace included."""
    start = 0
    for match in islice(re.finditer(r"\S+", text), words, None, words):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _pieces(texts: Iterator[str], words: int | None) -> Iterator[list[tuple[str, bool]]]:
    """(piece of a document, whether it is its last), in lists of up to 256 pieces and about LONGEST characters: what is tokenised at one time.

    Pieces are of `words` words, or where that is None whole documents; longer ones are cut, as one line of 100 MB would fill the memory.
    """
    gathered, size = [], 0
    for text in texts:
        pieces = _word_pieces(text, words) if words else (text[at : at + LONGEST] for at in range(0, len(text), LONGEST))
        piece = next(pieces)
        while piece is not None:
            following = next(pieces, None)
            gathered.append((piece, following is None))
            size += len(piece)
            if len(gathered) == 256 or size >= LONGEST:
                yield gathered
                gathered, size = [], 0
            piece = following
    if gathered:
        yield gathered


def _tokenise(texts: Iterator[str], tokenizer: Any, row_length: int, chunking: str, limit: int | None, folder: Path, report: Report) -> None:
    """Writes tokens.bin (uint32 stream), documents.npy and chunks.npy (offsets into it) to folder."""
    separator = [] if chunking == "words" or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    starts, chunks, total = [0], [0], 0
    encode = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if getattr(tokenizer, "is_fast", False):
        encode["split_special_tokens"] = True  # "<|end_of_text|>" written in a text is text, not a command
    bar = tqdm(desc="tokenising", unit=" tokens", unit_scale=True, mininterval=1)
    with open(folder / "tokens.bin", "wb") as file:
        for pieces in _pieces(texts, row_length if chunking == "words" else None):
            before = total
            encoded = tokenizer([piece for piece, _ in pieces], **encode)["input_ids"]
            for ids, (_, last) in zip(encoded, pieces, strict=True):
                ids = ids + separator if last else ids
                file.write(np.asarray(ids, dtype=np.uint32).tobytes())
                if chunking == "words":
                    chunks += [total + cut for cut in range(row_length, len(ids), row_length)] + [total + len(ids)]
                total += len(ids)
                if last:
                    starts.append(total)
            bar.update(total - before)
            if limit is not None and total >= limit:
                break
    bar.close()
    report.check(final=True)
    report.tokens = total
    starts = starts[:-1] if starts[-1] == total else starts  # the limit can come in the middle of a document
    np.save(folder / "documents.npy", np.asarray(starts, dtype=np.int64))
    np.save(folder / "chunks.npy", np.asarray(chunks, dtype=np.int64))


def _whole(folder: Path, max_bad_frac: float) -> bool:
    """Whether a token cache is there and undamaged. Raises DataError where more was skipped in its making than is accepted now."""
    try:
        verify_folder(folder)
        report = Report("", max_bad_frac)
        vars(report).update({**load_json(folder / "report.json"), "max_bad_frac": max_bad_frac})
    except ValueError as error:
        if folder.exists():
            print(f"warning: the token cache is damaged ({error}); tokenising again")
        return False
    report.bad = Counter(report.bad)
    report.check(final=True)
    return True


class Rows(Dataset):
    """Rows of one split of a source, tokenised on first use and then read from a memory-mapped cache.

    Each row is BOS (where the tokenizer has one) and the next stretch of the stream. `chunking="words"` is the
    documented form: pieces of `max_length` words, each starting a row of its own, padded on the right.

    Raises FileNotFoundError or DataError (nothing usable, wrong key, too many damaged lines), ValueError (bad options).
    """

    def __init__(
        self,
        source: str | os.PathLike,
        tokenizer: Any,
        max_length: int,
        split: str = "train",
        *,
        text_key: str = "text",
        chunking: str = "pack",
        max_samples: int | None = None,
        max_tokens: int | None = None,
        max_bad_frac: float = 0.01,
        include_special: bool = False,
    ) -> None:
        for name, value in (("max_samples", max_samples), ("max_tokens", max_tokens)):
            if value is not None and value <= 0:
                raise ValueError(f"--{name} {value}; it must be positive (leave it out to use all)")
        if max_length < 2:
            raise ValueError(f"--max_length {max_length}; a row needs at least two positions")
        if split not in SPLITS or chunking not in ("pack", "words"):
            raise ValueError(f"split {split!r}, chunking {chunking!r}; known are {', '.join(SPLITS)} and pack, words")
        self.max_length, self.include_special = max_length, include_special
        self.prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self.special = np.asarray(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        body = max_length - len(self.prefix)  # tokens of the stream per row
        wanted = [n for n in (max_tokens, max_samples * body if max_samples else None) if n is not None]
        limit = min(wanted) if wanted else None
        if limit is None and not is_local(str(source)):
            limit = HUB_TOKENS
            print(f"{source}: no --max_tokens given; using the first {limit:,} tokens")
        key = self._key(str(source), tokenizer, split, text_key, chunking, body, limit)
        self.fingerprint = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
        folder = self._cached(str(source), tokenizer, split, text_key, chunking, body, limit, max_bad_frac, key)
        self.tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
        self.documents = np.load(folder / "documents.npy", mmap_mode="r")
        stream = len(self.tokens) if limit is None else min(limit, len(self.tokens))
        if chunking == "words":
            self.cuts = np.load(folder / "chunks.npy", mmap_mode="r")
        else:
            self.cuts = np.append(np.arange(0, stream, body), stream)
        self.n_rows = min(len(self.cuts) - 1, max_samples or len(self.cuts))
        self._order: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0))

    @staticmethod
    def _key(source: str, tokenizer: Any, split: str, text_key: str, chunking: str, body: int, limit: int | None) -> list:
        files = [source]
        if is_local(source):
            stats = [(f, f.stat()) for f in _split_files(find_files(source), split)[0]]
            files = [[str(f.resolve()), stat.st_size, stat.st_mtime_ns] for f, stat in stats]
        return [1, files, tokenizer_hash(tokenizer), split, text_key, chunking, body if chunking == "words" else 0, limit]

    def _cached(self, source, tokenizer, split, text_key, chunking, body, limit, max_bad_frac, key) -> Path:
        folder = data_dir() / "cache" / self.fingerprint
        if _whole(folder, max_bad_frac):
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for rest in folder.parent.glob(".building-*"):  # of killed processes; one at work writes every few seconds
                if time.time() - max(path.stat().st_mtime for path in (rest, *rest.iterdir())) > 86_400:
                    shutil.rmtree(rest, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
            os.chmod(work, 0o777 & ~umask())  # mkdtemp's 0700 would lock out those who share the cache
        except OSError as error:
            raise OSError(f"cannot write the token cache in {folder.parent} ({error.strerror}); set DATA_DIR to a folder that can be") from error
        try:
            report = Report(text_key, max_bad_frac)
            _tokenise(documents(source, split, report), tokenizer, body, chunking, limit, work, report)
            if not report.tokens:
                empty = f"{report.lines} lines read, {report.reasons() or ('all in other splits' if report.lines else 'nothing in it')}"
                raise DataError(f"no usable text for split {split!r} in {source} ({empty})")
            if report.bad:
                print(f"{source}: skipped {report.reasons()}; first at {report.first_bad}")
            save_json({"key": key} | vars(report), work / "report.json")
            seal(work, folder.name)
            if not _whole(folder, max_bad_frac):  # else another process was faster, and may be reading it
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(work, folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(f"the token cache in {folder.parent} does not fit ({error.strerror}); make room or set DATA_DIR") from error
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return folder

    def __len__(self) -> int:
        return self.n_rows

    def batch(self, rows: np.ndarray | list[int]) -> Batch:
        """The rows with these numbers, as a Batch."""
        shape = (len(rows), self.max_length)
        ids, where = np.full(shape, self.pad, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        offset = len(self.prefix)
        for i, row in enumerate(rows):
            start, stop = int(self.cuts[row]), int(self.cuts[row + 1])
            ids[i, :offset] = self.prefix
            ids[i, offset : offset + stop - start] = self.tokens[start:stop]
            where[i, offset : offset + stop - start] = np.arange(start, stop)
        real = where >= 0
        mask = real & ~np.isin(ids, self.special)
        mask[:, 0] = False  # the attention sink, whatever stands there
        if self.include_special:
            mask = real.copy()
            mask[:, :offset] = True
        document = np.searchsorted(self.documents, where, side="right") - 1
        return Batch(*(torch.from_numpy(a) for a in (ids, mask, document, np.asarray(rows, dtype=np.int64))))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Row numbers in the order of one epoch: a function of (seed, epoch) alone."""
        if self._order[0] != (seed, epoch):  # asked for at every step; takes milliseconds for 200,000 rows
            self._order = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(self.n_rows)
        return self._order[1]

    def batches(self, batch_size: int, order: np.ndarray | None = None, start: int = 0, every: int = 1) -> Iterator[Batch]:
        """Batches of batch_size rows from batch number `start` on, each or one in `every`; the last may be smaller."""
        order = np.arange(self.n_rows) if order is None else order
        for at in range(start * batch_size, self.n_rows, every * batch_size):
            yield self.batch(order[at : at + batch_size])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(input_ids [S], attention_mask [S]), the documented form: 1 on every token that is not padding."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        batch = self.batch([index % len(self)])
        real = torch.zeros(self.max_length, dtype=torch.long)
        real[: len(self.prefix) + int(self.cuts[index % len(self) + 1] - self.cuts[index % len(self)])] = 1
        return batch.input_ids[0], real


class OpenWebTextDataset(Rows):
    """The documented data set: a folder of JSONL, all of it, as (input_ids [S], attention_mask [S]) items."""

    def __init__(self, folder_path: str, tokenizer: Any, max_length: int, max_samples: int | None = None, keyword: str = "text") -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if not os.path.exists(folder_path):
            raise FileNotFoundError(f"no folder {folder_path}; run scripts/download_data.sh or check the path")
        super().__init__(folder_path, tokenizer, max_length, "all", text_key=keyword, max_samples=max_samples)


def create_dataloader(
    folder_path: str, tokenizer: Any, batch_size: int, max_length: int, max_samples: int | None = None, keyword: str = "text"
) -> DataLoader:
    """DataLoader of (input_ids [B,S], attention_mask [B,S]) over OpenWebTextDataset, in order."""
    return DataLoader(OpenWebTextDataset(folder_path, tokenizer, max_length, max_samples, keyword), batch_size=batch_size)


def open_rows(cfg: Namespace, tokenizer: Any) -> Rows:
    """The rows that a stage's text options name."""
    return Rows(
        cfg.data_path, tokenizer, cfg.max_length, cfg.split, text_key=cfg.text_key, chunking=cfg.chunking, max_samples=cfg.max_samples,
        max_tokens=cfg.max_tokens, max_bad_frac=cfg.max_bad_frac, include_special=cfg.include_special,
    )


def write_splits(source: str, folder: str | os.PathLike, max_bytes: int, text_key: str = "text") -> dict[str, int]:
    """Writes folder/{train,eval,apply}.jsonl from a source, texts over 100 characters, until max_bytes are written; returns documents by split.

    The files appear when all three are complete. Raises DataError where the source cannot be read or holds no such text.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, counts, written = ("train", "eval", "apply"), dict.fromkeys(("train", "eval", "apply"), 0), 0
    work = Path(tempfile.mkdtemp(prefix=".downloading-", dir=folder))
    try:
        with contextlib.ExitStack() as stack, tqdm(total=max_bytes, desc="downloading", unit="B", unit_scale=True, mininterval=1) as bar:
            files = {name: stack.enter_context(open(work / f"{name}.jsonl", "w", encoding="utf-8")) for name in names}
            for text in documents(source, "all", Report(text_key, 0.01)):
                if len(text) <= 100:
                    continue
                split = next(name for name in names if _in_split(text, name))
                size = files[split].write(json.dumps({"text": text}) + "\n")
                counts[split] += 1
                written += size
                bar.update(size)
                if written >= max_bytes:
                    break
        if not all(counts.values()):
            raise DataError(f"{source} gave {sum(counts.values())} texts of over 100 characters, too few for three splits")
        for name in names:
            os.replace(work / f"{name}.jsonl", folder / f"{name}.jsonl")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m src.data", description="Write a source of text as three disjoint splits.")
    parser.add_argument("source", help="file, folder, glob, or hub name owner/name[:config]")
    parser.add_argument("folder", help="where train.jsonl, eval.jsonl and apply.jsonl go")
    parser.add_argument("--max_mb", type=float, default=2000, help="stop after this much text (default: 2000)")
    parser.add_argument("--text_key", default="text", help="key of the text in each record")
    args = parser.parse_args()
    try:
        counts = write_splits(args.source, args.folder, int(args.max_mb * 1e6), args.text_key)
    except (DataError, OSError) as error:
        print(f"download_data: error: {error}", file=sys.stderr)
        return 3
    print(", ".join(f"{name}.jsonl {count} documents" for name, count in counts.items()), f"in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
