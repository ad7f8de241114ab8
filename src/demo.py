"""The built-in text, and when it and the built-in language model are used.

The text is the documentation of the Python standard library and of this project's pinned packages.
It is read from their source files with `ast`; nothing is imported, and no other package is read.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src import data, distributed, identity
from src.files import DEMO_LM, data_dir, save_json, save_text
from src.sources import SPLIT_NAMES, SPLITS, in_split

# A fixed list, so that other installed packages never enter the text.
PACKAGES = """
torch transformers datasets numpy pandas matplotlib sympy networkx mpmath fsspec huggingface_hub
openai pydantic PIL fontTools tqdm anyio click filelock jinja2 packaging pyparsing rich pygments
typer safetensors setuptools dill
""".split()


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


def _documents() -> Iterator[tuple[str, Path, str]]:
    """(package, file, documentation) of each source file that has enough of it."""
    files = source_files()
    seen: set[bytes] = set()
    with ProcessPoolExecutor(2) as pool:
        found = pool.map(_docstrings, [str(file) for _, file in files], chunksize=64)
        bar = tqdm(found, "demo text", len(files), unit=" files", mininterval=1)
        for (package, file), texts in zip(files, bar, strict=True):
            parts = [_new_paragraphs(text, seen) for text in texts]
            document = "\n\n".join(part for part in parts if len(part) > 40)
            if len(document) >= 200:
                yield package, file, document


def text_folder() -> Path:
    return data_dir() / "demo"


def build_corpus() -> Path:
    """Writes train/eval/apply.jsonl ({"text", "source"}) to <data>/demo, once; returns the folder.

    A document is the documentation of one source file. Paragraphs seen before are dropped, since
    torch and numpy repeat theirs hundreds of times. Then the hash of a document gives its split, so
    no text is in two splits.
    """
    folder = text_folder()
    if (folder / "about.json").exists():
        return folder
    splits: dict[str, list[str]] = {name: [] for name in SPLIT_NAMES}
    characters: Counter[str] = Counter()
    for package, file, document in _documents():
        characters[package] += len(document)
        record = {"text": document, "source": f"{package}/{file.stem}"}
        split = next(name for name in SPLIT_NAMES if in_split(document, name))
        splits[split].append(json.dumps(record, ensure_ascii=False))
    for name, lines in splits.items():
        save_text("\n".join(lines) + "\n", folder / f"{name}.jsonl")
    documents = {name: len(lines) for name, lines in splits.items()}
    about = {"characters": characters, "documents": documents, "split": SPLITS}
    save_json(about, folder / "about.json")
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


def make_text(cfg: Any) -> None:
    """Make the demo's text if a stage reads it and it does not exist."""
    if Path(cfg.data_path) == text_folder():
        distributed.main_first(build_corpus)


def open_rows(cfg: Any, tokenizer: Any) -> data.Rows:
    """The rows of a stage, of the demo's text or of another.

    Raises ValueError if another process reads another text.
    """
    make_text(cfg)
    rows = distributed.main_first(lambda: data.open_rows(cfg, tokenizer))
    if distributed.world() > 1:
        distributed.require_same({"a text of the sum": identity.of_tokens(rows.tokens)})
    return rows
