"""Text from files or the hub -> documents -> splits -> tokens -> rows of fixed length. Has never heard of an SAE.

A source is tokenised once into a flat memory-mapped stream (document, EOS, document, EOS ...); rows are cut from the
stream when they are read, so nothing is padded except the very last row and no text is lost.

Shapes: B rows, S positions per row.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from src.files import data_dir, load_json, locked, save_json, seal, verify_folder, write_atomic
from src.sources import (
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

CHUNK_CHARS = 2**20  # characters tokenised at one time: about 150 bytes of memory each
HUB_TOKENS = (
    100_000_000  # what a hub data set is cut to where no limit is given: some of them do not end
)


class Batch(NamedTuple):
    """Rows of tokens. `mask` is True where a token counts; a causal LM needs nothing more, since padding is on the right."""

    input_ids: Tensor  # int64 [B,S]
    mask: Tensor  # bool  [B,S]; False on special tokens, position 0 and padding
    document: Tensor  # int64 [B,S]; number of the document each token comes from
    row: Tensor  # int64 [B]

    def part(self, rows: slice) -> Batch:
        """Some of the rows. Of none at least the first with no token counted, so that a language model has something to run on."""
        some = Batch(*(value[rows] for value in self))
        return (
            some
            if len(some.row)
            else Batch(*(value[:1] for value in self))._replace(
                mask=torch.zeros_like(self.mask[:1])
            )
        )

    def to(self, device: str | torch.device) -> Batch:
        return Batch(*(part.to(device, non_blocking=True) for part in self))

    def token_keys(self) -> Tensor:
        """A number for every counted token that does not depend on how rows are batched: int64 [N]."""
        length = self.input_ids.shape[1]
        keys = self.row[:, None] * length + torch.arange(length, device=self.row.device)
        return keys[self.mask]


# --------------------------------------------------------------------------------------------------------- tokens


def tokenizer_hash(tokenizer: Any) -> str:
    """Changes when the tokenizer would give other ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = (
        backend.to_str()
        if backend is not None
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return hashlib.blake2b(
        (text + str(tokenizer.all_special_ids) + template).encode(), digest_size=8
    ).hexdigest()


def chat_renderer(tokenizer: Any) -> Callable[[list], str]:
    """Conversations as text in the tokenizer's template. Raises DataError, at the first conversation, where it has none."""

    def render(turns: list) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the text is conversations, and this model's tokenizer has no chat template; take one that has (an -Instruct or -chat "
                "model), or name the key of plain text with --text_key"
            )
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except (
            Exception
        ) as error:  # templates raise what they like where the turns are not as they want them
            raise TypeError(str(error)) from error
        return text.removeprefix(tokenizer.bos_token or "")  # every row begins with it

    return render


def _word_pieces(text: str, words: int) -> Iterator[str]:
    """Pieces of `words` whitespace-separated words; joined they are the text again, whitespace included."""
    start = 0
    for match in islice(re.finditer(r"\S+", text), words, None, words):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _pieces(texts: Iterator[str], words: int | None) -> Iterator[list[tuple[str, bool, bool]]]:
    """(piece of a document, whether it is its last, whether it is of a conversation), in lists of up to 256 pieces and about CHUNK_CHARS characters:
    what is tokenised at one time.

    Pieces are of `words` words, or where that is None whole documents; longer ones are cut, as one line of 100 MB would fill the memory.
    """
    gathered, size = [], 0
    for text in texts:
        pieces = (
            _word_pieces(text, words)
            if words
            else (text[at : at + CHUNK_CHARS] for at in range(0, len(text), CHUNK_CHARS))
        )
        piece = next(pieces)
        while piece is not None:
            following = next(pieces, None)
            gathered.append((piece, following is None, isinstance(text, Chat)))
            size += len(piece)
            if len(gathered) == 256 or size >= CHUNK_CHARS:
                yield gathered
                gathered, size = [], 0
            piece = following
    if gathered:
        yield gathered


class Preparation:
    """The token stream of a source on its way: tokens.bin (uint32), and the places in it where documents and chunks start.

    What stands in `folder` is saved now and then, with the position of the source, so that a killed process is continued by the next.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved_at = folder, time.monotonic()
        self.total, self.documents, self.chunks, self.position = 0, [0], [0], None
        path = folder / "progress.json"
        if path.exists():
            found = load_json(path)
            self.total, self.position = found["total"], found["position"]
            self.documents, self.chunks = (
                np.load(folder / f"{name}.npy")[: found[name]].tolist()
                for name in ("documents", "chunks")
            )
            if (
                len(self.documents) < found["documents"]
            ):  # a finished cache does not list where the next document would start
                self.documents.append(self.total)
        self.file = open(folder / "tokens.bin", "ab")
        self.file.truncate(4 * self.total)

    def save(self, position: dict[str, Any]) -> None:
        """Tokens first, then what points into them: a kill in between leaves more tokens than are counted, which are cut off."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.position, self.saved_at = position, time.monotonic()
        self._save_places()
        counts = {"total": self.total, "documents": len(self.documents), "chunks": len(self.chunks)}
        save_json(counts | {"position": position}, self.folder / "progress.json", indent=None)

    def _save_places(self) -> None:
        for name, places in (("documents", self.documents), ("chunks", self.chunks)):
            write_atomic(
                self.folder / f"{name}.npy",
                lambda file, places=places: np.save(file, np.asarray(places, dtype=np.int64)),
            )

    def run(
        self, texts: Documents, tokenizer: Any, row_length: int, chunking: str, limit: int | None
    ) -> None:
        """Tokenises until the texts end or limit tokens are there."""
        separator = (
            []
            if chunking == "words" or tokenizer.eos_token_id is None
            else [tokenizer.eos_token_id]
        )
        encode = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        fast = getattr(tokenizer, "is_fast", False)
        with (
            tqdm(
                desc="tokenising",
                unit=" tokens",
                unit_scale=True,
                mininterval=1,
                initial=self.total,
            ) as bar,
            self.file,
        ):
            batches = _pieces(iter(texts), row_length if chunking == "words" else None)
            while limit is None or self.total < limit:
                pieces = next(batches, None)
                if pieces is None:
                    break
                before, ids_of = self.total, [[]] * len(pieces)
                for chat in {
                    chat for _, _, chat in pieces
                }:  # "<|end_of_text|>" written in a text is text; in a template it is a command
                    mine = [i for i, piece in enumerate(pieces) if piece[2] == chat]
                    how = encode | ({"split_special_tokens": not chat} if fast else {})
                    for i, ids in zip(
                        mine,
                        tokenizer([pieces[i][0] for i in mine], **how)["input_ids"],
                        strict=True,
                    ):
                        ids_of[i] = ids
                for ids, (_, last, _) in zip(ids_of, pieces, strict=True):
                    ids = ids + separator if last else ids
                    self.file.write(np.asarray(ids, dtype=np.uint32).tobytes())
                    if chunking == "words":
                        self.chunks += [
                            self.total + cut for cut in range(row_length, len(ids), row_length)
                        ] + [self.total + len(ids)]
                    self.total += len(ids)
                    if last:
                        self.documents.append(self.total)
                bar.update(self.total - before)
                if pieces[-1][1] and time.monotonic() - self.saved_at >= SAVE_SECONDS:
                    self.save(texts.position())
            texts.report.tokens = self.total
            texts.report.check(final=True)
            if self.documents[-1] == self.total:  # else the limit came in the middle of a document
                self.save(texts.position())  # where a longer cache goes on
                self.documents.pop()
            self._save_places()


def _whole(folder: Path, max_bad_frac: float) -> bool:
    """Whether a token cache is there; a damaged one is removed. Raises DataError where more was skipped in its making than is accepted now."""
    try:
        verify_folder(folder)
        report = Report("", max_bad_frac)
        vars(report).update({**load_json(folder / "report.json"), "max_bad_frac": max_bad_frac})
    except ValueError as error:
        if folder.exists():
            print(f"warning: the token cache is damaged ({error}); tokenising again")
            shutil.rmtree(folder, ignore_errors=True)
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
            raise ValueError(
                f"split {split!r}, chunking {chunking!r}; known are {', '.join(SPLITS)} and pack, words"
            )
        self.max_length, self.include_special = max_length, include_special
        self.prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.pad = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
        )
        self.special = np.asarray(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        body = max_length - len(self.prefix)  # tokens of the stream per row
        wanted = [
            n for n in (max_tokens, max_samples * body if max_samples else None) if n is not None
        ]
        limit = min(wanted) if wanted else None
        if limit is None and not is_local(str(source)):
            limit = HUB_TOKENS
            print(f"{source}: no --max_tokens given; using the first {limit:,} tokens")
        key = self._key(str(source), tokenizer, split, text_key, chunking, body, limit)
        self.fingerprint = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
        folder = self._cached(
            str(source), tokenizer, split, text_key, chunking, body, limit, max_bad_frac, key
        )
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
    def _key(
        source: str,
        tokenizer: Any,
        split: str,
        text_key: str,
        chunking: str,
        body: int,
        limit: int | None,
    ) -> list:
        files = [source]
        if is_local(source):
            stats = [(f, f.stat()) for f in split_files(find_files(source), split)[0]]
            files = [[str(f.resolve()), stat.st_size, stat.st_mtime_ns] for f, stat in stats]
        return [
            1,
            files,
            tokenizer_hash(tokenizer),
            split,
            text_key,
            chunking,
            body if chunking == "words" else 0,
            limit,
        ]

    def _cached(
        self, source, tokenizer, split, text_key, chunking, body, limit, max_bad_frac, key
    ) -> Path:
        folder = data_dir() / "cache" / self.fingerprint
        work = folder.with_name(f".building-{folder.name}")
        with ExitStack() as stack:
            waiting = False
            while not _whole(folder, max_bad_frac):
                try:
                    for rest in folder.parent.glob(
                        ".building-*"
                    ):  # of killed processes nobody went on with
                        if (
                            time.time()
                            - max(path.stat().st_mtime for path in (rest, *rest.iterdir()))
                            > 30 * 86_400
                        ):
                            shutil.rmtree(rest, ignore_errors=True)
                    (work / "made").mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(work))
                except OSError as error:
                    todo = "set DATA_DIR to a folder that can be"
                    raise OSError(
                        f"cannot write the token cache in {folder.parent} ({error.strerror}); {todo}"
                    ) from error
                except ValueError as error:  # another process prepares the same text
                    if not waiting:
                        print(f"waiting: {error}")
                    waiting = True
                    time.sleep(1)
                    continue
                if not folder.exists():  # else that process was just done
                    self._prepare(
                        source,
                        tokenizer,
                        split,
                        text_key,
                        chunking,
                        body,
                        limit,
                        max_bad_frac,
                        key,
                        work,
                        folder,
                    )
                shutil.rmtree(work, ignore_errors=True)
                break
        return folder

    def _prepare(
        self,
        source,
        tokenizer,
        split,
        text_key,
        chunking,
        body,
        limit,
        max_bad_frac,
        key,
        work: Path,
        folder: Path,
    ) -> None:
        """Tokenises into `work`, from where a killed process stopped or a shorter cache of the same text ends, and renames it to `folder`."""
        made = work / "made"
        if not (made / "progress.json").exists():
            self._begin_from_shorter(made, key)
        preparation, report = Preparation(made), Report(text_key, max_bad_frac)
        if preparation.total:
            print(f"{source}: going on after {preparation.total:,} tokens that are there")
        texts = Documents(source, split, report, preparation.position, chat_renderer(tokenizer))
        try:
            preparation.run(texts, tokenizer, body, chunking, limit)
            if not report.tokens:
                empty = f"{report.lines} lines read, {report.reasons() or ('all in other splits' if report.lines else 'nothing in it')}"
                todo = (
                    "; name the folder that holds the other splits too, or add --split all"
                    if report.lines and not report.reasons()
                    else ""
                )
                raise DataError(f"no usable text for split {split!r} in {source} ({empty}){todo}")
        except DataError as error:
            if not isinstance(error, StreamError):
                shutil.rmtree(work)
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    f"the token cache in {folder.parent} does not fit ({error.strerror}); make room or set DATA_DIR"
                ) from error
            raise
        if report.bad:
            print(f"{source}: skipped {report.reasons()}; first at {report.first_bad}")
        save_json({"key": key} | vars(report), made / "report.json")
        seal(made, folder.name)
        os.replace(made, folder)

    @staticmethod
    def _begin_from_shorter(made: Path, key: list) -> None:
        """Copies the longest complete cache that differs in its limit alone, with the position it ended at."""
        found = []
        for path in made.parent.parent.glob("*/progress.json"):
            about = load_json(path.with_name("report.json"))
            *same, limit = about["key"]
            if (
                same == json.loads(json.dumps(key[:-1]))
                and limit is not None
                and (key[-1] is None or limit < key[-1])
            ):
                found.append((about["tokens"], path.parent))
        for _, shorter in sorted(found, reverse=True)[:1]:
            try:
                verify_folder(shorter)
            except ValueError:  # its next use will say so
                return
            for name in ("tokens.bin", "documents.npy", "chunks.npy", "progress.json"):
                shutil.copyfile(shorter / name, made / name)

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
        return Batch(
            *(torch.from_numpy(a) for a in (ids, mask, document, np.asarray(rows, dtype=np.int64)))
        )

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Row numbers in the order of one epoch: a function of (seed, epoch) alone."""
        if self._order[0] != (
            seed,
            epoch,
        ):  # asked for at every step; takes milliseconds for 200,000 rows
            self._order = (
                (seed, epoch),
                np.random.default_rng([seed, epoch]).permutation(self.n_rows),
            )
        return self._order[1]

    def batches(
        self, batch_size: int, order: np.ndarray | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Batch]:
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
        real[
            : len(self.prefix)
            + int(self.cuts[index % len(self) + 1] - self.cuts[index % len(self)])
        ] = 1
        return batch.input_ids[0], real


class OpenWebTextDataset(Rows):
    """The documented data set: a folder of JSONL, all of it, as (input_ids [S], attention_mask [S]) items."""

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
    return DataLoader(
        OpenWebTextDataset(folder_path, tokenizer, max_length, max_samples, keyword),
        batch_size=batch_size,
    )


def open_rows(cfg: Namespace, tokenizer: Any) -> Rows:
    """The rows that a stage's text options name."""
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
