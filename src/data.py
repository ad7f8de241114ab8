"""Text is tokenised once, cached, and cut into rows of fixed length when it is read.

A source becomes one flat, memory-mapped token stream (document, EOS, document, EOS ...). Since rows
are cut from the stream, only the very last row is padded, and no text is lost. This module knows
nothing of SAEs.

Shapes: B rows, S positions per row, N counted tokens, V token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from src.files import (
    DISK_ERRORS,
    data_dir,
    load_json,
    locked,
    one_line,
    save_json,
    seal,
    verify_folder,
    write_atomic,
)
from src.sources import (
    CHUNK,
    SAVE_SECONDS,
    SPLITS,
    Chat,
    DataError,
    Documents,
    Report,
    StreamError,
    find_files,
    is_local,
    split_files,
)

PIECE_CHARS = 2**20  # characters tokenised in one call: each takes about 150 bytes of memory
MAX_PIECES = 256  # pieces tokenised in one call at most
HUB_TOKENS = 100_000_000  # default limit for data sets of the hub: some of them do not end
NOT_SPECIAL = "\ufdd0"  # no character; inside what looks like a special token and is text
CHAT_RULE = 2  # of how conversations become tokens; part of the key of cached tokens
ABANDONED_SECONDS = 30 * 86_400  # unfinished caches without a change for so long are removed


class Batch(NamedTuple):
    """Rows of tokens. Padding is on the right, so a causal language model needs no other mask."""

    input_ids: Tensor  # int64 [B,S]
    mask: Tensor  # bool  [B,S]; True where a token counts: no special token, position 0, padding
    document: Tensor  # int64 [B,S]; number of the document each token comes from
    row: Tensor  # int64 [B]

    def part(self, rows: slice) -> Batch:
        """Some of the rows. If empty, one fully masked row, so that a language model can run."""
        selected = Batch(*(value[rows] for value in self))
        if len(selected.row):
            return selected
        first = Batch(*(value[:1] for value in self))
        return first._replace(mask=torch.zeros_like(first.mask))

    def to(self, device: str | torch.device) -> Batch:
        return Batch(*(value.to(device, non_blocking=True) for value in self))

    def token_keys(self) -> Tensor:
        """A number for each counted token that does not depend on the batching: int64 [N]."""
        length = self.input_ids.shape[1]
        keys = self.row[:, None] * length + torch.arange(length, device=self.row.device)
        return keys[self.mask]


# ---------------------------------------------------------------------------------------- tokens


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """{id: text} of the special tokens.

    Tokens with a role, such as EOS, are named in one list. Others, such as the turn markers of
    Llama 3, are only marked as special among the added tokens.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tokens = {token: entry.content for token, entry in added.items() if entry.special}
    return tokens | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def special_token_table(tokenizer: Any) -> Tensor:
    """bool [V]: True at the ids of special tokens; the last entry, False, serves all larger ids."""
    ids = list(special_tokens(tokenizer))
    table = torch.zeros(max(ids, default=-1) + 2, dtype=torch.bool)
    table[ids] = True
    return table


def count_mask(input_ids: Tensor, is_special: Tensor, first_counts: bool = False) -> Tensor:
    """True where a token counts: bool [...,S] for input_ids [...,S]. The one place of this rule.

    Special tokens do not count, nor does the first token of a text, because it is an attention sink
    whatever it is. is_special: from special_token_table. first_counts: set it where input_ids
    continue a text.
    """
    # A table, because torch.isin took 130 ms for 64 x 512 tokens and 256 special ones.
    mask = ~is_special[input_ids.clamp(max=len(is_special) - 1)]
    if not first_counts:
        mask[..., 0] = False
    return mask


def tokenizer_hash(tokenizer: Any) -> str:
    """Changes when the tokenizer would give other ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    else:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    text += str(tokenizer.all_special_ids)
    chat_template = getattr(tokenizer, "chat_template", None)
    if chat_template:
        text += f"{chat_template}{CHAT_RULE}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _special_pattern(tokenizer: Any) -> re.Pattern:
    """Matches the special tokens in a text, the longest first."""
    names = sorted(filter(None, special_tokens(tokenizer).values()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _with_marks(turns: list, tokenizer: Any) -> list:
    """The turns with NOT_SPECIAL inside each special token that a user has written."""
    pattern = _special_pattern(tokenizer)

    def marked(value: Any) -> Any:
        # Templates also render what lies inside, such as the names and arguments of tool calls.
        if isinstance(value, dict):
            return {marked(key): marked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [marked(item) for item in value]
        if not isinstance(value, str):
            return value
        value = value.replace(NOT_SPECIAL, "")
        return pattern.sub(lambda match: match[0][:1] + NOT_SPECIAL + match[0][1:], value)

    return marked(turns)


def chat_renderer(tokenizer: Any, **options: Any) -> Callable[[list], str]:
    """A function that renders a conversation in the tokenizer's chat template, for encode_chat.

    The function raises DataError if the tokenizer has no template, TypeError if the template
    refuses the turns. options: arguments of apply_chat_template.
    """

    def render(turns: list) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the text is conversations, and this model's tokenizer has no chat template; use a "
                "model that has one (-Instruct, -chat), or name a key of plain text with --text_key"
            )
        try:
            turns = _with_marks(turns, tokenizer)
            return tokenizer.apply_chat_template(turns, tokenize=False, **options)
        except Exception as error:  # a template may raise any error for turns it does not expect
            raise TypeError(str(error)) from error

    return render


def encode_texts(tokenizer: Any, texts: list[str], parse_special: bool = False) -> list[list[int]]:
    """Token ids of each text. "<|end_of_text|>" in it is text, unless parse_special is set."""
    # Prompts may hold unpaired surrogates, which no tokenizer takes.
    texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if getattr(tokenizer, "is_fast", False):
        options["split_special_tokens"] = not parse_special
    return tokenizer(texts, **options)["input_ids"]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, in which special tokens are text."""
    return encode_texts(tokenizer, [text])[0]


def encode_chat(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text of chat_renderer: the template's special tokens, and users' text."""
    if NOT_SPECIAL not in text:
        return encode_texts(tokenizer, [text], parse_special=True)[0]
    ids = []
    start = 0
    # The stretches between the special tokens of the template are plain text.
    for match in _special_pattern(tokenizer).finditer(text):
        ids += encode_text(tokenizer, text[start : match.start()].replace(NOT_SPECIAL, ""))
        ids += encode_texts(tokenizer, [match[0]], parse_special=True)[0]
        start = match.end()
    return ids + encode_text(tokenizer, text[start:].replace(NOT_SPECIAL, ""))


class Piece(NamedTuple):
    """A part of a document that is tokenised by itself."""

    text: str
    is_last: bool  # of its document
    is_chat: bool


def _cut_document(text: str, words: int | None) -> Iterator[Piece]:
    """Pieces of `words` words; if None, of PIECE_CHARS characters. Joined they are the text again.

    Long documents are cut, because one line of 100 MB would fill the memory when tokenised.
    """
    if words:
        starts = (match.start() for match in re.finditer(r"\S+", text))
        cuts: Any = islice(starts, words, None, words)
    else:
        cuts = range(PIECE_CHARS, len(text), PIECE_CHARS)
    start = 0
    for stop in chain(cuts, [len(text)]):
        yield Piece(text[start:stop], stop == len(text), isinstance(text, Chat))
        start = stop


def _piece_batches(texts: Iterator[str], words: int | None) -> Iterator[list[Piece]]:
    """The pieces of all documents, in lists that are tokenised in one call."""
    batch: list[Piece] = []
    size = 0
    for text in texts:
        for piece in _cut_document(text, words):
            batch.append(piece)
            size += len(piece.text)
            if len(batch) == MAX_PIECES or size >= PIECE_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode(pieces: list[Piece], tokenizer: Any) -> list[list[int]]:
    """Token ids of each piece."""
    ids: list[list[int]] = []
    for is_chat, group in groupby(pieces, key=lambda piece: piece.is_chat):
        texts = [piece.text for piece in group]
        if is_chat and any(NOT_SPECIAL in text for text in texts):
            ids += [encode_chat(tokenizer, text) for text in texts]
        else:
            ids += encode_texts(tokenizer, texts, parse_special=is_chat)
    return ids


# ----------------------------------------------------------------------------------- token cache


class StreamOptions(NamedTuple):
    """What determines a token stream."""

    source: str
    tokenizer: Any
    split: str
    text_key: str
    chunking: str
    row_length: int  # tokens of the stream in a row
    limit: int | None  # tokens
    max_bad_frac: float

    def key(self) -> list:
        """What a cached stream must agree in; the limit is last."""
        files: list = [self.source]
        if is_local(self.source):
            paths, _ = split_files(find_files(self.source), self.split)
            stats = [(path, path.stat()) for path in paths]
            files = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        return [
            1,
            files,
            tokenizer_hash(self.tokenizer),
            self.split,
            self.text_key,
            self.chunking,
            self.words or 0,
            self.limit,
        ]

    @property
    def words(self) -> int | None:
        """Words of a piece; None if the stream is packed."""
        return self.row_length if self.chunking == "words" else None


class StreamBuilder:
    """A token stream while it is written: tokens.bin (uint32), documents.npy and chunks.npy.

    The two arrays hold the indices in the stream at which documents and chunks start. Everything is
    saved from time to time, with the position of the source. A later process continues from there
    if this one is killed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved_at = time.monotonic()
        self.total = 0  # tokens
        self.documents = [0]
        self.chunks = [0]
        self.position: dict[str, Any] | None = None
        self.hash = hashlib.sha256()  # of all tokens
        if (folder / "progress.json").exists():
            try:
                self._load()
            except Exception as error:  # damaged headers of arrays have no common class of errors
                print(f"warning: the unfinished token cache is damaged ({error}); tokenising again")
                shutil.rmtree(folder)
                folder.mkdir()
                StreamBuilder.__init__(self, folder)
                return
        self.file = open(folder / "tokens.bin", "ab")
        self.file.truncate(4 * self.total)

    def _load(self) -> None:
        """Raises ValueError if what is there is not what was saved."""
        progress = load_json(self.folder / "progress.json")
        self.total = progress["total"]
        self.position = progress["position"]
        for name in ("documents", "chunks"):
            starts = np.load(self.folder / f"{name}.npy")[: progress[name]]
            setattr(self, name, starts.tolist())
        # A finished cache does not list where the next document would start.
        if len(self.documents) < progress["documents"]:
            self.documents.append(self.total)
        with open(self.folder / "tokens.bin", "rb") as file:
            rest = 4 * self.total
            while block := file.read(min(rest, CHUNK)):
                self.hash.update(block)
                rest -= len(block)
        if rest or self._progress() != progress:
            raise ValueError("its content is not what was written")

    def _progress(self) -> dict[str, Any]:
        """What was done so far; `sum` is over all of it."""
        progress = {
            "total": self.total,
            "documents": len(self.documents),
            "chunks": len(self.chunks),
            "position": self.position,
        }
        digest = self.hash.copy()
        digest.update(json.dumps([progress, self.documents, self.chunks]).encode())
        return progress | {"sum": digest.hexdigest()}

    def save(self, position: dict[str, Any]) -> None:
        """Saves the tokens first, because on loading those that are not counted are cut off."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.position = position
        self.saved_at = time.monotonic()
        self._save_starts()
        save_json(self._progress(), self.folder / "progress.json", indent=None)

    def _save_starts(self) -> None:
        for name in ("documents", "chunks"):
            starts = np.asarray(getattr(self, name), dtype=np.int64)
            path = self.folder / f"{name}.npy"
            write_atomic(path, lambda file, starts=starts: np.save(file, starts))

    def _append(self, ids: list[int], words: int | None) -> None:
        content = np.asarray(ids, dtype=np.uint32).tobytes()
        self.file.write(content)
        self.hash.update(content)
        if words:  # a piece of many tokens takes several rows
            self.chunks += range(self.total + words, self.total + len(ids), words)
            self.chunks.append(self.total + len(ids))
        self.total += len(ids)

    def run(self, texts: Documents, options: StreamOptions) -> None:
        """Tokenises until the texts end or the limit is reached."""
        eos = options.tokenizer.eos_token_id
        separator = [] if options.words or eos is None else [eos]
        style = {"unit": " tokens", "unit_scale": True, "mininterval": 1}
        with tqdm(desc="tokenising", initial=self.total, **style) as bar, self.file:
            batches = _piece_batches(iter(texts), options.words)
            while options.limit is None or self.total < options.limit:
                pieces = next(batches, None)
                if pieces is None:
                    break
                before = self.total
                for piece, ids in zip(pieces, _encode(pieces, options.tokenizer), strict=True):
                    self._append(ids + separator if piece.is_last else ids, options.words)
                    if piece.is_last:
                        self.documents.append(self.total)
                bar.update(self.total - before)
                overdue = time.monotonic() - self.saved_at >= SAVE_SECONDS
                if overdue and pieces[-1].is_last:
                    self.save(texts.position())
            texts.report.tokens = self.total
            texts.report.check(final=True)
            if self.documents[-1] == self.total:  # the limit did not cut a document
                self.save(texts.position())  # where a longer cache continues
                self.documents.pop()
            self._save_starts()


def _is_complete(folder: Path, max_bad_frac: float) -> bool:
    """Whether a token cache exists; a damaged one is removed.

    Raises DataError if more was skipped when it was made than max_bad_frac accepts.
    """
    try:
        verify_folder(folder)
        state = load_json(folder / "report.json")
    except ValueError as error:
        if folder.exists():
            print(f"warning: the token cache is damaged ({error}); tokenising again")
            shutil.rmtree(folder, ignore_errors=True)
        return False
    report = Report("", max_bad_frac)
    report.restore(state | {"max_bad_frac": max_bad_frac})
    report.check(final=True)
    return True


def _remove_abandoned(caches: Path) -> None:
    """Removes the unfinished caches of killed processes that were not continued."""
    for folder in caches.glob(".building-*"):
        changed = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        if time.time() - changed > ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _open_cache(options: StreamOptions, key: list, folder: Path) -> None:
    """Makes sure that `folder` holds the token stream; waits if another process prepares it."""
    work = folder.with_name(f".building-{folder.name}")
    waiting = False
    with ExitStack() as stack:
        while not _is_complete(folder, options.max_bad_frac):
            try:
                _remove_abandoned(folder.parent)
                (work / "made").mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(work))
            except OSError as error:
                raise OSError(
                    f"cannot write the token cache in {folder.parent} ({error.strerror}); "
                    "set DATA_DIR to a folder that can be written"
                ) from error
            except ValueError as error:  # another process has the lock
                if not waiting:
                    print(f"waiting: {error}")
                waiting = True
                time.sleep(1)
                continue
            if not folder.exists():  # the other process may just have finished
                _build_cache(options, key, work, folder)
            shutil.rmtree(work, ignore_errors=True)
            return


def _build_cache(options: StreamOptions, key: list, work: Path, folder: Path) -> None:
    """Tokenises into `work` and renames the result to `folder`.

    Continues a killed process, or a shorter cache of the same text.
    """
    source = options.source
    unfinished = work / "made"
    if not (unfinished / "progress.json").exists():
        _copy_shorter_cache(unfinished, key)
    builder = StreamBuilder(unfinished)
    if builder.total:
        print(f"{source}: continuing after {builder.total:,} tokens that are already prepared")
    report = Report(options.text_key, options.max_bad_frac)
    render = chat_renderer(options.tokenizer)
    texts = Documents(source, options.split, report, builder.position, render)
    try:
        builder.run(texts, options)
        if not report.tokens:
            raise _no_text(report, options)
    except StreamError:
        raise
    except DataError:
        shutil.rmtree(work)
        raise
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise OSError(
            f"the token cache in {folder.parent} does not fit ({error.strerror}); "
            "make room or set DATA_DIR"
        ) from error
    if report.parts_left_out:
        print(f"{source}: left out {report.parts_left_out} parts of conversations that are no text")
    if report.bad:
        print(f"{source}: skipped {report.reasons()}; first at {one_line(report.first_bad)}")
    save_json({"key": key} | vars(report), unfinished / "report.json")
    seal(unfinished, folder.name)
    os.replace(unfinished, folder)


def _no_text(report: Report, options: StreamOptions) -> DataError:
    reason, advice = report.reasons(), ""
    if not report.lines:
        reason = reason or "it is empty"
    elif not reason:
        reason = "all of them are in other splits"
        advice = "; name the folder that holds the other splits too, or add --split all"
    return DataError(
        f"no usable text for split {options.split!r} in {options.source} "
        f"({report.lines} lines read, {reason}){advice}"
    )


def _copy_shorter_cache(folder: Path, key: list) -> None:
    """Copies the longest complete cache that differs only in a smaller limit, to continue it."""
    *wanted, wanted_limit = json.loads(json.dumps(key))
    shorter = []
    for path in folder.parent.parent.glob("*/progress.json"):
        try:
            report = load_json(path.with_name("report.json"))
            *other, limit = report["key"]
        except (ValueError, KeyError, TypeError, OSError):  # its next use reports the damage
            continue
        if other != wanted or limit is None:
            continue
        if wanted_limit is None or limit < wanted_limit:
            shorter.append((report["tokens"], path.parent))
    if not shorter:
        return
    _, longest = max(shorter)
    try:
        verify_folder(longest)
    except ValueError:  # its next use reports the damage
        return
    for name in ("tokens.bin", "documents.npy", "chunks.npy", "progress.json"):
        shutil.copyfile(longest / name, folder / name)


# ------------------------------------------------------------------------------------------ rows


def _token_limit(source: str, max_tokens: int | None, sample_tokens: int) -> int | None:
    """The smaller of two limits, each of which may be missing; the hub is never read to its end."""
    limit = min(filter(None, (max_tokens, sample_tokens)), default=None)
    if limit is None and not is_local(source):
        limit = HUB_TOKENS
        print(f"{source}: no --max_tokens given; using the first {limit:,} tokens")
    return limit


class Rows(Dataset):
    """Rows of one split of a source, tokenised on first use and then read from a mapped cache.

    Each row is BOS (if the tokenizer has one) and the next stretch of the stream. With
    `chunking="words"`, the documented form, each piece of `max_length` words starts a row of its
    own, padded on the right.

    Raises FileNotFoundError or DataError if the source cannot be used, ValueError for bad options.
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
            raise ValueError(
                f"split {split!r}, chunking {chunking!r}; "
                f"known are {', '.join(SPLITS)} and pack, words"
            )
        self.max_length = max_length
        self.include_special = include_special
        self.prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(token for token in pad_ids if token is not None)
        self.is_special = special_token_table(tokenizer)
        row_length = max_length - len(self.prefix)
        limit = _token_limit(str(source), max_tokens, (max_samples or 0) * row_length)
        options = StreamOptions(
            str(source), tokenizer, split, text_key, chunking, row_length, limit, max_bad_frac
        )
        self._open(options)
        self.n_rows = min(len(self.cuts) - 1, max_samples or len(self.cuts))
        self._order: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0))

    def _open(self, options: StreamOptions) -> None:
        """Maps the stream, and sets `cuts`: row i is tokens cuts[i] to cuts[i + 1]."""
        key = options.key()
        self.fingerprint = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
        folder = data_dir() / "cache" / self.fingerprint
        _open_cache(options, key, folder)
        self.tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
        self.documents = np.load(folder / "documents.npy", mmap_mode="r")
        if options.words:
            self.cuts = np.load(folder / "chunks.npy", mmap_mode="r")
        else:
            length = min(options.limit or len(self.tokens), len(self.tokens))
            self.cuts = np.append(np.arange(0, length, options.row_length), length)

    def __len__(self) -> int:
        return self.n_rows

    def _stretch(self, row: int) -> tuple[int, int]:
        """(start, stop) of the tokens of a row, without a BOS that would follow that of the row."""
        start, stop = int(self.cuts[row]), int(self.cuts[row + 1])
        if start < stop and self.tokens[start] in self.prefix:
            # A chat template begins a conversation with BOS. Elsewhere the same id may be EOS.
            document = np.searchsorted(self.documents, start)
            if document < len(self.documents) and self.documents[document] == start:
                start += 1
        return start, stop

    def batch(self, rows: np.ndarray | list[int]) -> Batch:
        """The rows with these numbers, as a Batch."""
        shape = (len(rows), self.max_length)
        ids = np.full(shape, self.pad, dtype=np.int64)
        index = np.full(shape, -1, dtype=np.int64)  # in the stream; -1 at BOS and padding
        offset = len(self.prefix)
        for i, row in enumerate(rows):
            start, stop = self._stretch(row)
            columns = slice(offset, offset + stop - start)
            ids[i, :offset] = self.prefix
            ids[i, columns] = self.tokens[start:stop]
            index[i, columns] = np.arange(start, stop)
        document = np.searchsorted(self.documents, index, side="right") - 1
        input_ids = torch.from_numpy(ids)
        mask = torch.from_numpy(index >= 0)
        if self.include_special:
            mask[:, :offset] = True
        else:
            mask &= count_mask(input_ids, self.is_special)
        numbers = np.asarray(rows, dtype=np.int64)
        return Batch(input_ids, mask, torch.from_numpy(document), torch.from_numpy(numbers))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Row numbers in the order of one epoch, which depends on (seed, epoch) alone."""
        # Kept, because every step asks for it, and 200,000 rows take milliseconds.
        if self._order[0] != (seed, epoch):
            order = np.random.default_rng([seed, epoch]).permutation(self.n_rows)
            self._order = ((seed, epoch), order)
        return self._order[1]

    def batches(
        self, batch_size: int, order: np.ndarray | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """Batches from number `start` on, one in `every`; the last may have fewer rows."""
        order = np.arange(self.n_rows) if order is None else order
        for first in range(start * batch_size, self.n_rows, every * batch_size):
            yield self.batch(order[first : first + batch_size])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(input_ids [S], attention_mask [S]), the documented form: 1 on all but padding."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self)
        attention_mask = torch.zeros(self.max_length, dtype=torch.long)
        start, stop = self._stretch(row)
        attention_mask[: len(self.prefix) + stop - start] = 1
        return self.batch([row]).input_ids[0], attention_mask


class OpenWebTextDataset(Rows):
    """The documented data set: all of a folder, as (input_ids [S], attention_mask [S]) items."""

    def __init__(
        self,
        folder_path: str,
        tokenizer: Any,
        max_length: int,
        max_samples: int | None = None,
        keyword: str = "text",
    ) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if not os.path.exists(folder_path):
            raise FileNotFoundError(
                f"no folder {folder_path}; run scripts/download_data.sh or check the path"
            )
        super().__init__(
            folder_path, tokenizer, max_length, "all", text_key=keyword, max_samples=max_samples
        )


def create_dataloader(
    folder_path: str,
    tokenizer: Any,
    batch_size: int,
    max_length: int,
    max_samples: int | None = None,
    keyword: str = "text",
) -> DataLoader:
    """DataLoader of (input_ids [B,S], attention_mask [B,S]) over OpenWebTextDataset, in order."""
    rows = OpenWebTextDataset(folder_path, tokenizer, max_length, max_samples, keyword)
    return DataLoader(rows, batch_size=batch_size)


def open_rows(cfg: Namespace, tokenizer: Any) -> Rows:
    """The rows that the text options of a stage name."""
    return Rows(
        cfg.data_path,
        tokenizer,
        cfg.max_length,
        cfg.split,
        text_key=cfg.text_key,
        chunking=cfg.chunking,
        max_samples=cfg.max_samples,
        max_tokens=cfg.max_tokens,
        max_bad_frac=cfg.max_bad_frac,
        include_special=cfg.include_special,
    )
