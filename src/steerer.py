"""Text continued with latents of an SAE held, raised, multiplied or switched off, beside the text without."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from src import checkpoint, config, demo, files, hooks, lm
from src.data import Batch
from src.metrics import token_kl
from src.sae import Edit

TURN = re.compile(r"\n\n(Human|Assistant):")


def conversations(path: Path) -> list[dict[str, Any]]:
    """Prompts of a file: .txt, one a line; .json and .jsonl of strings, {"prompt"}, {"messages": [...]} or HH-RLHF's {"chosen", "rejected"}.

    Raises ValueError for a file that holds none.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}; check --prompts")
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".txt":
        records: list[Any] = list(files.text_records(text))
    else:
        try:
            loaded = (
                files.parse_json(text.removeprefix("\ufeff"))
                if path.suffix == ".json"
                else [files.parse_json(line) for line in files.text_records(text)]
            )
        except ValueError as error:
            raise ValueError(f"{path} is not readable JSON ({error})") from error
        records = (
            list(loaded.values())
            if isinstance(loaded, dict) and "prompt" not in loaded
            else loaded
            if isinstance(loaded, list)
            else [loaded]
        )
    found = []
    for record in records:
        if isinstance(record, str):
            found.append({"prompt": record})
        elif isinstance(record, dict) and isinstance(record.get("chosen"), str):
            parts = TURN.split(record["chosen"])
            said = zip(parts[1::2], parts[2::2], strict=True)
            turns = [
                {"role": "user" if who == "Human" else "assistant", "content": what.strip()}
                for who, what in said
            ]
            answer = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else ""
            rejected = TURN.split(str(record.get("rejected", "")))[-1].strip()
            found.append({"messages": turns, "chosen": answer, "rejected": rejected})
        elif isinstance(record, dict) and (record.get("messages") or record.get("prompt")):
            found.append(record)
    if not found:
        raise ValueError(
            f'{path} holds no prompt; expected lines of text, {{"prompt"}}, {{"messages"}} or {{"chosen", "rejected"}}'
        )
    return found


class Steerer:
    """`run()` writes clamp/clamp_<sae>.json, prints the texts side by side and returns the result."""

    def __init__(self, cfg: Namespace) -> None:
        self.cfg = cfg
        if not cfg.prompt and not cfg.prompts:
            raise ValueError('no text to continue; give --prompt "..." or --prompts FILE')
        self.given = [{"prompt": text} for text in cfg.prompt or []] + (
            conversations(Path(cfg.prompts)) if cfg.prompts else []
        )
        opened = checkpoint.open_all(cfg)
        if len(opened) != 1:
            raise ValueError(
                f"--SAE_path names {len(opened)} checkpoints; one is steered at a time"
            )
        self.sae, self.recipe = opened[0]
        self.operations = [
            (kind, *pair)
            for kind in ("set", "add", "multiply")
            for pair in getattr(cfg, kind) or []
        ]
        self.operations += [("set", latent, 0.0) for latent in cfg.zero or []]
        for _, latent, value in self.operations:
            if not 0 <= latent < self.sae.latent_size or not math.isfinite(value):
                raise ValueError(
                    f"latent {latent} = {value}: {self.recipe['title']} has latents 0 ... {self.sae.latent_size - 1}, values are finite"
                )
        if cfg.site is not None and cfg.site not in self.sae.sites():
            raise ValueError(f"--site {cfg.site}: {self.recipe['title']} reads {self.sae.sites()}")
        demo.use_demo_defaults(cfg)
        config.complete(cfg)

    @property
    def edit(self) -> Edit:
        """The code wanted, in units of strength."""
        return hooks.edit_latents(self.operations)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        cfg = self.cfg
        self.tokenizer, self.model = hooks.open_language_model(cfg, [self.sae])
        self.special = torch.tensor(
            sorted(set(self.tokenizer.all_special_ids)), dtype=torch.long, device=cfg.device
        )
        outputs: dict[str, list[dict[str, Any]]] = {}
        for number, given in enumerate(tqdm(self.given, "steering", unit=" texts", mininterval=1)):
            ids = self._ids(given)
            site = self._site(ids)
            original, _ = self._continue(ids, None, site)
            steered, _ = self._continue(ids, self.edit, site)
            whole = torch.cat([ids, original], 1)
            clean, changed = (
                self._logits(whole, edit, site)[0, ids.shape[1] - 1 : -1]
                for edit in (None, self.edit)
            )
            outputs[str(number)] = [
                {
                    "Human": given["prompt"]
                    if "messages" not in given
                    else given["messages"][-1]["content"],
                    "chosen": given.get("chosen"),
                    "rejected": given.get("rejected"),
                    "original_output": self.tokenizer.decode(original[0], skip_special_tokens=True),
                    "clamped_output": self.tokenizer.decode(steered[0], skip_special_tokens=True),
                    "site": site,
                    "KL": float(token_kl(clean, changed).mean()),
                    "perplexity_original": self._perplexity(ids, original),
                    "perplexity_clamped": self._perplexity(ids, steered),
                }
            ]
        low = [
            (latent, value)
            for kind, latent, value in self.operations
            if kind == "set" and value == 0
        ]
        result = {
            "sae": self.recipe["title"],
            "sequences": len(outputs),
            "max_length": cfg.max_new_tokens,
            "operations": self.operations,
            "set_high": [op for op in self.operations if op[1:] not in low],
            "set_low": low,
            "mode": cfg.mode,
            "temperature": cfg.temperature,
            "seed": cfg.seed,
            "outputs": outputs,
        }
        path = (
            Path(cfg.output_dir)
            / files.CLAMP_DIR
            / f"clamp_{files.safe_name(self.recipe['title'])}.json"
        )
        files.save_json(result | checkpoint.environment(), path)
        for one in (entry[0] for entry in outputs.values()):
            print(
                f"\n{files.printable(one['Human'])}\n  as it is: {one['original_output']!r}\n  steered:  {one['clamped_output']!r}"
            )
            print(
                f"  KL {one['KL']:.3f} nats a token; perplexity {one['perplexity_original']:.1f} -> {one['perplexity_clamped']:.1f}"
            )
        print(f"\n{path}")
        return result

    def _ids(self, given: dict[str, Any]) -> Tensor:
        if given.get("messages") and self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                given["messages"], tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            text = (
                given["prompt"]
                if "messages" not in given
                else "\n\n".join(message["content"] for message in given["messages"])
            )
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        if not ids:
            raise ValueError(
                "an empty prompt, and a tokenizer without a begin-of-text token; give at least one word"
            )
        lm.check_length(self.model, len(ids) + self.cfg.max_new_tokens)
        return torch.tensor([ids], device=self.cfg.device)

    def _site(self, ids: Tensor) -> int | None:
        """Where an SAE whose runs are one per site is edited; None where its patches belong together."""
        sae = self.sae
        p = sae.autoencode(
            sae.gather(
                {s: h[0].float() for s, h in lm.read_sites(self.model, ids, sae.sites()).items()}
            )
        )
        best = sae.edit_site(p, [latent for _, latent, _ in self.operations])
        if best is not None and self.cfg.site is not None:
            return self.cfg.site
        return best

    def _hooks(
        self,
        ids: Tensor,
        start: int,
        cache: Any,
        edit: Callable[[Tensor], Tensor] | None,
        site: int | None,
    ) -> dict[int, Any]:
        """Hooks that edit the new tokens `ids`, which begin at position `start`. The site and its weight are chosen from this very state."""
        mask = ~torch.isin(ids, self.special)
        if start == 0:
            mask[:, 0] = False
        if edit is None or not mask.any():
            return {}
        full = lm.peek(self.model, ids, cache, self.sae.sites())
        row = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        batch = Batch(ids, mask, torch.zeros_like(ids), row)
        hidden = {s: state[mask].float() for s, state in full.items()}
        runs = self.sae.patches(
            hidden,
            hooks.batch_info(self.cfg, batch, start),
            edit=edit,
            keep_error=self.cfg.mode == "delta",
        )
        patches = next(run for run in runs if site is None or site in run)
        return hooks.patch_hooks(patches, mask)

    def _continue(
        self, ids: Tensor, edit: Callable[[Tensor], Tensor] | None, site: int | None
    ) -> tuple[Tensor, Tensor]:
        """(new tokens [1,T], the logits [T,V] they were taken from)."""
        generator = torch.Generator(device=ids.device).manual_seed(self.cfg.seed)
        cache, new, start, written, all_logits = None, ids, 0, [], []
        for _ in range(self.cfg.max_new_tokens):
            with lm.hooked(self.model, self._hooks(new, start, cache, edit, site)):
                logits, cache = lm.next_logits(self.model, new, cache)
            start += new.shape[1]
            if self.cfg.temperature:
                new = torch.multinomial(
                    (logits / self.cfg.temperature).softmax(-1), 1, generator=generator
                )
            else:
                new = logits.argmax(-1, keepdim=True)
            written.append(new)
            all_logits.append(logits[0])
            if int(new) == self.tokenizer.eos_token_id:
                break
        return torch.cat(written, 1), torch.stack(all_logits)

    def _logits(
        self, ids: Tensor, edit: Callable[[Tensor], Tensor] | None, site: int | None
    ) -> Tensor:
        with lm.hooked(self.model, self._hooks(ids, 0, None, edit, site)):
            return lm.logits_of(self.model, lm.final_states(self.model, ids))

    def _perplexity(self, ids: Tensor, new: Tensor) -> float:
        """Of new tokens after ids, in the model as it is."""
        whole = torch.cat([ids, new], 1)
        logp = self._logits(whole, None, None)[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        return math.exp(float(-logp.gather(1, new[0][:, None]).mean()))
