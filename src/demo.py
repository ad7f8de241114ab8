"""The built-in language model and its text: how both were made, and when they stand in for real ones.

`python -m src.demo` trains the language model from scratch (resumable); `python -m src.demo --corpus` makes the text only,
`--score` prints the perplexity of the committed weights.

The text is the documentation of the Python standard library and of this project's pinned packages, read out of their
source files with `ast` - never imported, and never any other package of the user's.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from src import distributed
from src.data import Rows
from src.files import DEMO_LM, data_dir, save_json, save_text
from src.lm import get_language_model, mean_loss
from src.sources import SPLITS, in_split

# A fixed list: what is installed beside these on a user's machine never enters the text.
PACKAGES = (
    "torch transformers datasets numpy pandas matplotlib sympy networkx mpmath fsspec huggingface_hub openai pydantic PIL "
    "fontTools tqdm anyio click filelock jinja2 packaging pyparsing rich pygments typer safetensors setuptools dill"
).split()
CONTEXT, VOCABULARY, SEED = 256, 4096, 42
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


# ----------------------------------------------------------------------------------------------------------- text


def _docstrings(path: str) -> list[str]:
    """Docstrings of a source file in order, and long string tables of the pydoc kind."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (
        SyntaxError,
        ValueError,
        RecursionError,
    ):  # test data of the standard library is broken on purpose
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 400
        ):
            text = node.value if " " in node.value else None
        else:
            text = None
        if text and len(text) > 40 and text not in found[-3:]:
            found.append(text.strip())
    return found


def source_files() -> list[tuple[str, Path]]:
    """(package, file) of everything the corpus is read from, sorted."""
    paths = sysconfig.get_paths()
    stdlib = Path(paths["stdlib"])
    files = [
        ("python", f)
        for f in stdlib.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(f.parts)
    ]
    for package in PACKAGES:
        files += [(package, f) for f in (Path(paths["purelib"]) / package).rglob("*.py")]
    return sorted((name, f) for name, f in files if "_pytest" not in f.parts)


def build_corpus() -> Path:
    """Writes train/eval/apply.jsonl ({"text", "source"}) to <data>/demo, once; returns the folder.

    One document is one source file's documentation. A paragraph seen before is dropped (torch and numpy repeat theirs
    hundreds of times) before documents are assigned to splits by hash, so no text is in two splits.
    """
    folder = data_dir() / "demo"
    if (folder / "about.json").exists():
        return folder
    files = source_files()
    seen: set[bytes] = set()
    splits: dict[str, list[str]] = {"train": [], "eval": [], "apply": []}
    characters: dict[str, int] = {}
    with ProcessPoolExecutor(2) as pool:
        strings = pool.map(_docstrings, [str(f) for _, f in files], chunksize=64)
        for (package, file), texts in tqdm(
            zip(files, strings, strict=True), "demo text", len(files), unit=" files", mininterval=1
        ):
            kept = []
            for text in texts:
                paragraphs = []
                for paragraph in re.split(r"\n\s*\n", text):
                    normal = re.sub(r"\W+", " ", paragraph).lower().strip()
                    digest = hashlib.blake2b(
                        normal.encode("utf-8", "replace"), digest_size=8
                    ).digest()
                    if normal and digest not in seen:
                        seen.add(digest)
                        paragraphs.append(paragraph)
                kept.append("\n\n".join(paragraphs))
            document = "\n\n".join(text for text in kept if len(text) > 40)
            if len(document) < 200:
                continue
            characters[package] = characters.get(package, 0) + len(document)
            line = json.dumps(
                {"text": document, "source": f"{package}/{file.stem}"}, ensure_ascii=False
            )
            splits[next(name for name in splits if in_split(document, name))].append(line)
    for name, lines in splits.items():
        save_text("\n".join(lines) + "\n", folder / f"{name}.jsonl")
    save_json(
        {
            "characters": characters,
            "documents": {name: len(lines) for name, lines in splits.items()},
            "split": SPLITS,
        },
        folder / "about.json",
    )
    return folder


def use_demo_defaults(cfg: Any) -> None:
    """Fills in the demo LM and text where neither a flag, nor the environment, nor a download names others; says so."""
    missing = [
        name
        for name in ("model_path", "data_path")
        if hasattr(cfg, name) and not getattr(cfg, name)
    ]
    if not missing:
        return
    said = []
    if "model_path" in missing:
        cfg.model_path = str(DEMO_LM)
        said.append(
            "language model: the built-in demo LM (set MODEL_PATH or --model_path for another)"
        )
    if "data_path" in missing:
        cfg.data_path = str(distributed.main_first(build_corpus))
        said.append("text: the built-in demo text (set DATA_PATH or --data_path)")
    print("; ".join(said))


# ------------------------------------------------------------------------------------------------- language model


def train_tokenizer(folder: Path, out: Path) -> Any:
    """Byte-level BPE over the training split; special tokens are the last ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").open(encoding="utf-8")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet
        ),
    )
    bos = SPECIAL[0]
    bpe.post_processor = processors.TemplateProcessing(
        f"{bos} $A", None, [(bos, bpe.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    return fast


def new_model(tokenizer: Any) -> nn.Module:
    """A Llama of 16 blocks and 3.7M parameters: the depth, and so the routed sites, of Llama-3.2-1B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for (
        block
    ) in model.model.layers:  # residual branches start at zero: 16 blocks train from the first step
        nn.init.zeros_(block.self_attn.o_proj.weight)
        nn.init.zeros_(block.mlp.down_proj.weight)
    return model


def score(model: nn.Module, tokenizer: Any, folder: Path, rows: int = 400) -> dict[str, float]:
    """Held-out perplexity and bits per byte over the first rows of the eval split."""
    data = Rows(folder / "eval.jsonl", tokenizer, CONTEXT, "all", max_samples=rows)
    total = count = text_bytes = 0
    for batch in tqdm(data.batches(16), "scoring", math.ceil(len(data) / 16), mininterval=1):
        loss, n = mean_loss(model, batch.input_ids, batch.mask)
        total, count = total + float(loss) * int(n), count + int(n)
        text_bytes += sum(
            len(tokenizer.decode(ids[m].tolist()).encode())
            for ids, m in zip(batch.input_ids, batch.mask, strict=True)
        )
    return {
        "perplexity": math.exp(total / count),
        "bits_per_byte": total / math.log(2) / text_bytes,
        "tokens": count,
    }


def train_lm(tokens: int, out: Path) -> None:
    """Trains the demo LM: Muon for the matrices, AdamW for embeddings and norms, 16 rows of 256 tokens a step, bf16 autocast."""
    folder = build_corpus()
    work = data_dir() / "demo_lm"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(folder, work)
    data = Rows(folder / "train.jsonl", tokenizer, CONTEXT, "all")
    model = new_model(tokenizer)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices, lr=0.02, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"
    )
    adam = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    peaks = [(muon, 0.02), (adam, 4e-3)]
    batch_size = 16
    steps = max(1, tokens // (batch_size * CONTEXT))
    per_epoch = len(data) // batch_size
    step, seconds, state = 0, 0.0, work / "training.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["steps"] == steps:
            model.load_state_dict(saved["model"])
            for (optimizer, _), s in zip(peaks, saved["optimizers"], strict=True):
                optimizer.load_state_dict(s)
            step, seconds = saved["step"], saved["seconds"]
            print(f"continuing at step {step} of {steps}")
    print(f"{len(data)} rows, {len(data) * CONTEXT / 1e6:.1f}M tokens an epoch, {steps} steps")
    started = time.time() - seconds
    bar = tqdm(total=steps, initial=step, unit=" steps", mininterval=5)
    model.train()
    while step < steps:
        epoch, at = divmod(step, per_epoch)
        order = data.order(SEED, epoch)[at * batch_size : (at + 1) * batch_size]
        batch = data.batch(order)
        progress = step / steps
        rate = min(1.0, (step + 1) / 100) * min(1.0, (1 - progress) / 0.5)
        for optimizer, peak in peaks:
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch.input_ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch.input_ids[:, 1:].flatten()
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in peaks:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss):.3f}")
        if step % 250 == 0 or step == steps:
            seconds = time.time() - started
            saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o, _ in peaks]}
            saved |= {"step": step, "steps": steps, "seconds": seconds}
            torch.save(saved, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
            print(f"step {step}  loss {float(loss):.3f}  {seconds:.0f} s", flush=True)
    bar.close()
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    figures = score(model, tokenizer, folder) | {
        "trained_tokens": steps * batch_size * CONTEXT,
        "seconds": round(seconds),
    }
    save_json(figures, out / "score.json")
    print(figures)


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens",
        type=int,
        default=20_000_000,
        help="tokens to train on (default: 20 million, about an hour on 2 cores)",
    )
    parser.add_argument(
        "--out", type=Path, default=DEMO_LM, help="where the model goes (default: assets/demo_lm)"
    )
    parser.add_argument("--corpus", action="store_true", help="only make the text")
    parser.add_argument(
        "--score",
        action="store_true",
        help="only print the held-out perplexity of the model at --out",
    )
    args = parser.parse_args()
    if args.corpus:
        print(build_corpus())
    elif args.score:
        tokenizer, model = get_language_model(str(args.out), "cpu", dtype="bfloat16")
        print(score(model, tokenizer, build_corpus()))
    else:
        train_lm(args.tokens, args.out)


if __name__ == "__main__":
    main()
