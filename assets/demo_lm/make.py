"""How the demo language model beside this file was trained: from scratch, on the demo text.

python assets/demo_lm/make.py            train it; the same command continues a killed training
python assets/demo_lm/make.py --corpus   only write the text
python assets/demo_lm/make.py --score    only print the held-out perplexity of the weights
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from src.data import Rows  # noqa: E402
from src.demo import build_corpus  # noqa: E402
from src.files import DEMO_LM, data_dir, save_json  # noqa: E402
from src.lm import get_language_model, mean_loss  # noqa: E402

CONTEXT = 256  # tokens of a row
BATCH_ROWS = 16
VOCABULARY = 4096
SEED = 42
MATRIX_LR = 0.02
OTHER_LR = 4e-3
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def train_tokenizer(folder: Path, out: Path) -> Any:
    """A byte-level BPE of the training split, saved to `out`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    lines = (folder / "train.jsonl").open(encoding="utf-8")
    texts = [json.loads(line)["text"] for line in lines]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    bos, eos, pad = SPECIAL
    special = [(bos, bpe.token_to_id(bos))]
    bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", None, special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    return tokenizer


def new_model(tokenizer: Any) -> nn.Module:
    """A Llama of 3.7M parameters and 16 blocks: the depth, and so the sites, of Llama-3.2-1B."""
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
    # The residual branches start at zero, so that 16 blocks train from the first step.
    for block in model.model.layers:
        nn.init.zeros_(block.self_attn.o_proj.weight)
        nn.init.zeros_(block.mlp.down_proj.weight)
    return model


def score(model: nn.Module, tokenizer: Any, folder: Path, rows: int = 400) -> dict[str, float]:
    """Held-out perplexity and bits per byte on the first rows of the eval split."""
    data = Rows(folder / "eval.jsonl", tokenizer, CONTEXT, "all", max_samples=rows)
    total = 0.0  # nats
    tokens = 0
    text_bytes = 0
    batches = math.ceil(len(data) / BATCH_ROWS)
    for batch in tqdm(data.batches(BATCH_ROWS), "scoring", batches, mininterval=1):
        loss, n = mean_loss(model, batch.input_ids, batch.mask)
        total += float(loss) * int(n)
        tokens += int(n)
        for ids, mask in zip(batch.input_ids, batch.mask, strict=True):
            text_bytes += len(tokenizer.decode(ids[mask].tolist()).encode())
    return {
        "perplexity": math.exp(total / tokens),
        "bits_per_byte": total / math.log(2) / text_bytes,
        "tokens": tokens,
    }


class Training:
    """The model with its optimizers: Muon for the matrices, AdamW for embeddings and norms."""

    def __init__(self, model: nn.Module, steps: int, path: Path) -> None:
        self.model = model
        self.steps = steps
        self.path = path  # where the state is saved
        self.step = 0
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim == 2 and "embed" not in name
            (matrices if is_matrix else others).append(parameter)
        muon = torch.optim.Muon(
            matrices, lr=MATRIX_LR, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"
        )
        adam = torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizers = [muon, adam]
        self.peak_lrs = [MATRIX_LR, OTHER_LR]
        seconds = self._load() if path.exists() else 0.0
        self.started = time.time() - seconds

    def _load(self) -> float:
        """Continues a saved training of the same length; returns the seconds that it took."""
        saved = torch.load(self.path, weights_only=True)
        if saved["steps"] != self.steps:
            return 0.0
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step = saved["step"]
        print(f"continuing at step {self.step} of {self.steps}")
        return saved["seconds"]

    def save(self) -> float:
        """Saves the state; returns the seconds that the training has taken."""
        seconds = time.time() - self.started
        saved = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "steps": self.steps,
            "seconds": seconds,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(saved, temporary)
        temporary.replace(self.path)
        return seconds

    def update(self, input_ids: Tensor) -> Tensor:
        """One step on rows of tokens [B,S]; returns the mean next-token loss in nats."""
        # Warm-up over 100 steps; linear decay over the second half.
        warmup = min(1.0, (self.step + 1) / 100)
        rate = warmup * min(1.0, (1 - self.step / self.steps) / 0.5)
        for optimizer, peak in zip(self.optimizers, self.peak_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids, use_cache=False).logits
        predicted = logits[:, :-1].float().flatten(0, 1)
        loss = nn.functional.cross_entropy(predicted, input_ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()


def train_lm(tokens: int, out: Path) -> None:
    """Trains the demo LM on so many tokens, and writes it with its score to `out`."""
    folder = build_corpus()
    work = data_dir() / "demo_lm"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(folder, work)
    data = Rows(folder / "train.jsonl", tokenizer, CONTEXT, "all")
    model = new_model(tokenizer)
    steps = max(1, tokens // (BATCH_ROWS * CONTEXT))
    per_epoch = len(data) // BATCH_ROWS
    training = Training(model, steps, work / "training.pt")
    print(f"{len(data)} rows, {len(data) * CONTEXT / 1e6:.1f}M tokens an epoch, {steps} steps")
    seconds = time.time() - training.started
    model.train()
    with tqdm(total=steps, initial=training.step, unit=" steps", mininterval=5) as bar:
        while training.step < steps:
            epoch, index = divmod(training.step, per_epoch)
            rows = data.order(SEED, epoch)[index * BATCH_ROWS : (index + 1) * BATCH_ROWS]
            loss = training.update(data.batch(rows).input_ids)
            bar.update()
            if training.step % 50 == 0:
                bar.set_postfix(loss=f"{float(loss):.3f}")
            if training.step % 250 == 0 or training.step == steps:
                seconds = training.save()
                print(f"step {training.step}  loss {float(loss):.3f}  {seconds:.0f} s", flush=True)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    result = score(model, tokenizer, folder)
    result["trained_tokens"] = steps * BATCH_ROWS * CONTEXT
    result["seconds"] = round(seconds)
    save_json(result, out / "score.json")
    print(result)


def main() -> None:
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
    parser.add_argument("--corpus", action="store_true", help="only write the text")
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
