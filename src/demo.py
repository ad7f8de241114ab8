"""The built-in text, and when it and the built-in language model are used.

The text is the documentation of the Python standard library and of this project's pinned packages.
It is read from their source files with `ast`; nothing is imported, and no other package is read.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sysconfig
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src import data, distributed, identity
from src.files import DEMO_LM, Unusable, data_dir, load_json, save_json, save_text
from src.sources import SPLIT_NAMES, SPLITS, in_split

# A fixed list, so that other installed packages never enter the text.
PACKAGES = """
torch transformers datasets numpy pandas matplotlib sympy networkx mpmath fsspec huggingface_hub
openai pydantic PIL fontTools tqdm anyio click filelock jinja2 packaging pyparsing rich pygments
typer safetensors setuptools dill
""".split()
BLOCK_FILES = 128  # source files that one process reads at a time
PR_SET_PDEATHSIG = 1  # of prctl(2)
WORKERS = min(8, os.cpu_count() or 1)
BYTES_PER_TOKEN = 8  # of text made for a limit in tokens; usual tokenizers reach 3 to 5


def _documentation_of(node: ast.AST) -> str | None:
    """The docstring of a definition, or a long string with spaces, such as the tables of pydoc."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ast.get_docstring(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if len(node.value) > 400 and " " in node.value:
            return node.value
    return None


def _docstrings(path: str) -> list[str]:
    """The documentation in a source file, in order."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return []  # some test data of the standard library is broken on purpose
    texts: list[str] = []
    for node in ast.walk(tree):
        text = _documentation_of(node)
        if text and len(text) > 40 and text not in texts[-3:]:
            texts.append(text.strip())
    return texts


def source_files() -> list[tuple[str, Path]]:
    """(package, file) of all files that the text is read from, sorted."""
    paths = sysconfig.get_paths()
    files = []
    for file in Path(paths["stdlib"]).rglob("*.py"):
        if not {"site-packages", "dist-packages"} & set(file.parts):
            files.append(("python", file))
    for package in PACKAGES:
        files += [(package, file) for file in (Path(paths["purelib"]) / package).rglob("*.py")]
    return sorted((name, file) for name, file in files if "_pytest" not in file.parts)


def text_folder() -> Path:
    return data_dir() / "demo"


def _new_paragraphs(text: str, seen: set[bytes]) -> str:
    """The text without the paragraphs that were seen before."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.sub(r"\W+", " ", paragraph).lower().strip()
        digest = hashlib.blake2b(words.encode("utf-8", "replace"), digest_size=8).digest()
        if words and digest not in seen:
            seen.add(digest)
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _read_block(files: list[Path]) -> list[list[str]]:
    """The documentation in each of some source files."""
    return [_docstrings(str(file)) for file in files]


def _block_path(files: list[Path], folder: Path) -> Path:
    """Where the documentation in these files is kept until the whole text is made."""
    state = [(str(file), file.stat().st_size) for file in files]
    return folder / f"{hashlib.blake2b(repr(state).encode(), digest_size=8).hexdigest()}.json"


def _kept_block(path: Path, n_files: int) -> list[list[str]] | None:
    """What an earlier call has read from so many files; None if it is missing or damaged."""
    try:
        kept = load_json(path)
    except (FileNotFoundError, Unusable):
        return None
    return kept if isinstance(kept, list) and len(kept) == n_files else None


def _begin_worker() -> None:
    """Set up a process that reads source files. It ends with the process that started it."""
    # The trees of ast hold no cycles: looking for them takes most of the time.
    gc.disable()
    with suppress(OSError, AttributeError):  # another system
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _blocks(files: list[Path], folder: Path) -> Iterator[list[list[str]]]:
    """The documentation in each file, in blocks, which a later call does not read again."""
    waiting: deque[tuple[Path, list[list[str]] | None, Future | None]] = deque()

    def next_block() -> list[list[str]]:
        path, kept, future = waiting.popleft()
        if future is None:
            return kept
        save_json(future.result(), path, indent=None)
        return future.result()

    with ProcessPoolExecutor(WORKERS, initializer=_begin_worker) as pool:
        for start in range(0, len(files), BLOCK_FILES):
            block = files[start : start + BLOCK_FILES]
            path = _block_path(block, folder)
            kept = _kept_block(path, len(block))
            waiting.append((path, kept, pool.submit(_read_block, block) if kept is None else None))
            # What is read ahead is lost if the text is long enough before it.
            if len(waiting) > WORKERS + 1:
                yield next_block()
        while waiting:
            yield next_block()


def _documents(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """(package, file, documentation) of each source file that has enough of it.

    folder: where what was read from the files is kept.
    """
    files = source_files()
    seen: set[bytes] = set()
    blocks = _blocks([file for _, file in files], folder)
    with tqdm(desc="demo text", total=len(files), unit=" files", mininterval=1) as bar:
        for (package, file), texts in zip(files, chain.from_iterable(blocks), strict=True):
            bar.update()
            parts = [_new_paragraphs(text, seen) for text in texts]
            document = "\n\n".join(part for part in parts if len(part) > 40)
            if len(document) >= 200:
                yield package, file, document


def build_corpus(split: str = "all", n_bytes: float = math.inf) -> Path:
    """Makes the text in <data>/demo as far as it is asked for; returns the folder.

    The files are train, eval and apply.jsonl ({"text", "source"}). The file of `split` gets at
    least n_bytes if there is so much text. A shorter text is the beginning of the whole one. What
    an interrupted call has read is not read again.

    A document is the documentation of one source file. Paragraphs seen before are dropped, since
    torch and numpy repeat theirs hundreds of times. Then the hash of a document gives its split, so
    no text is in two splits.
    """
    folder = text_folder()
    path = folder / f"{split}.jsonl"
    if (folder / "about.json").exists() or (path.exists() and path.stat().st_size >= n_bytes):
        return folder
    splits: dict[str, list[str]] = {name: [] for name in SPLIT_NAMES}
    characters: Counter[str] = Counter()
    made = 0
    documents = _documents(folder / "made")
    with closing(documents):
        for package, file, document in documents:
            characters[package] += len(document)
            record = {"text": document, "source": f"{package}/{file.stem}"}
            name = next(name for name in SPLIT_NAMES if in_split(document, name))
            splits[name].append(json.dumps(record, ensure_ascii=False))
            made += len(document.encode("utf-8", "replace")) if name == split else 0
            if made >= n_bytes:
                # The other splits keep their bytes, so that what was made of them stays valid.
                save_text("\n".join(splits[split]) + "\n", path)
                for other in SPLIT_NAMES:
                    # Beside three files, each is read as the split that its name says.
                    if not (folder / f"{other}.jsonl").exists():
                        save_text("", folder / f"{other}.jsonl")
                return folder
    for name, lines in splits.items():
        save_text("\n".join(lines) + "\n", folder / f"{name}.jsonl")
    counts = {name: len(lines) for name, lines in splits.items()}
    about = {"characters": characters, "documents": counts, "split": SPLITS}
    save_json(about, folder / "about.json")
    shutil.rmtree(folder / "made")
    return folder


def use_demo_defaults(cfg: Any) -> None:
    """Fills in the demo model and text, if no flag, environment or download names others.

    The text itself is made by open_rows, after all that can be checked without it.
    """
    messages = []
    for name in {"model_path", "data_path"} & set(getattr(cfg, "typed", ())):
        if getattr(cfg, name) == "":  # as from an unset variable of a shell
            raise ValueError(f'--{name} ""; it is empty. Name one, or leave the option out')
    if hasattr(cfg, "model_path") and not cfg.model_path:
        cfg.model_path = str(DEMO_LM)
        messages.append(
            "language model: the built-in demo LM (set MODEL_PATH or --model_path for another)"
        )
    if hasattr(cfg, "data_path") and not cfg.data_path:
        cfg.data_path = str(text_folder())
        messages.append("text: the built-in demo text (set DATA_PATH or --data_path for another)")
    if messages:
        print("; ".join(messages))


def make_text(cfg: Any, whole: bool = False) -> None:
    """Make as much of the demo's text as a stage reads, or all of it, if that is its text."""
    # realpath passes over links in a circle, of which the reader of the text tells more.
    if os.path.realpath(cfg.data_path) == os.path.realpath(text_folder()):
        limits = [cfg.max_tokens, cfg.max_samples and cfg.max_samples * cfg.max_length]
        n_tokens = math.inf if whole else min(filter(None, limits), default=math.inf)
        distributed.main_first(lambda: build_corpus(cfg.split, BYTES_PER_TOKEN * n_tokens))


def open_rows(cfg: Any, tokenizer: Any) -> data.Rows:
    """The rows of a stage, of the demo's text or of another.

    Raises ValueError if another process reads another text.
    """
    make_text(cfg)
    rows = distributed.main_first(lambda: data.open_rows(cfg, tokenizer))
    if distributed.world() > 1:
        distributed.require_same({"a text of the sum": identity.of_tokens(rows.tokens)})
    return rows
