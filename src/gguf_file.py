"""A language model in one GGUF file, converted once into a folder that transformers reads.

The weights are dequantised and kept in bfloat16, so that everything after this file sees an
ordinary model folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

import torch

from src.files import data_dir, work_folder

MAGIC = b"GGUF"
SUFFIX = ".gguf"
NEEDED = ("gguf", "accelerate")  # optional packages that transformers reads these files with


def is_gguf(path: str | os.PathLike) -> bool:
    """Return whether a path names a GGUF file that is present."""
    return str(path).lower().endswith(SUFFIX) and os.path.isfile(path)


def as_folder(path: str | os.PathLike) -> Path:
    """Return the folder of a converted GGUF file under $DATA_DIR/cache; convert it if needed.

    Raises ValueError for a file that is no GGUF, for missing packages and for an architecture
    that transformers does not read.
    """
    path = Path(path).resolve()
    state = path.stat()
    key = hashlib.blake2b(f"{path} {state.st_size} {state.st_mtime_ns}".encode(), digest_size=6)
    folder = data_dir() / "cache" / f"gguf-{path.stem}-{key.hexdigest()}"
    if not (folder / "config.json").exists():
        convert(path, folder)
    return folder


def convert(path: Path, folder: Path) -> None:
    """Write the model in `path` to `folder` as config, tokenizer and bfloat16 safetensors.

    The folder appears whole or not at all. Raises ValueError as as_folder does.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file; check --model_path")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"reading {path.name} needs {' and '.join(missing)}; run: "
            f"pip install {' '.join(missing)}"
        )
    print(f"converting {path} to {folder} (once)")
    made = work_folder(folder)
    try:
        _write(path, made)
        if not (folder / "config.json").exists():  # another process may have been quicker
            os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(path: Path, folder: Path) -> None:
    import transformers

    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except Exception as error:  # damaged files and unknown architectures have no common class
        lines = str(error).strip().split("\n")
        reason = lines[0] or type(error).__name__
        raise ValueError(f"cannot read {path} ({reason}); choose another --model_path") from error
    # transformers refuses to save what it has read from a GGUF file, so a new model takes its
    # configuration, without the mark of the quantisation, and its weights
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    plain = transformers.AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
