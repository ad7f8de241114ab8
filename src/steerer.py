"""Steering: text that the language model writes while latents are edited, beside its own text.

S positions, T new tokens, V words, N counted tokens, D hidden. One text at a time: rows are [1,S].
"""

from __future__ import annotations

import math
import re
import shutil
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from src import checkpoint, config, demo, files, hooks, latent_notes, names
from src.metrics import token_kl
from src.sae import Edit
from src.sources import CHAT_KEYS, Report, chat_turns
from src.steering import SteeredText

EXPECTED = 'lines of text, {"prompt"}, {"messages"} or {"chosen", "rejected"}'
TURN = re.compile(r"\n\n(Human|Assistant):")

# ---------------------------------------------------------------------------------- prompts


def conversations(path: Path) -> list[dict[str, Any]]:
    """Read the prompts of a file: .txt with one a line, .json or .jsonl.

    JSON records are strings, {"prompt"}, conversations under "messages" or "conversations", or
    {"chosen", "rejected"} with texts of HH-RLHF or lists of turns. A .json file holds one record, a
    list of them, or a mapping of names to them. An answer at the end of a conversation is returned
    as "chosen". Raises ValueError for a file without prompts.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}; check --prompts")
    report = Report("prompt", 1.0)
    prompts = []
    for number, record in enumerate(_records(path), 1):
        try:
            prompts.append(_prompt_of(record, report))
        except (KeyError, TypeError, AttributeError):
            report.skip("no prompt", f"record {number}")
    if not prompts:
        raise ValueError(f"{path} holds no prompt; expected {EXPECTED}")
    if report.bad:
        print(f"warning: {path}: left out {report.reasons()}; the first is {report.first_bad}")
    if report.parts_left_out:
        print(f"{path}: left out {report.parts_left_out} parts of conversations that are no text")
    return prompts


def _records(path: Path) -> list[Any]:
    """Return the lines of a text file, or the records of a JSON file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = files.text_records(text)
    if path.suffix == ".txt":
        return lines
    try:
        if path.suffix != ".json":
            return [files.parse_json(line) for line in lines]
        loaded = files.parse_json(text.removeprefix("\ufeff"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error})") from error
    if isinstance(loaded, dict) and not _is_record(loaded):
        return list(loaded.values())
    return loaded if isinstance(loaded, list) and not _is_turn(loaded[:1]) else [loaded]


def _is_record(loaded: dict[str, Any]) -> bool:
    """Whether an object is one record, not a mapping of names to records."""
    has_text = any(isinstance(value, str) for value in loaded.values())
    return has_text or any(key in loaded for key in (*CHAT_KEYS, "prompt", "chosen"))


def _is_turn(items: list[Any]) -> bool:
    """Whether a list begins with a turn of a conversation."""
    return any(isinstance(item, dict) and {"role", "from"} & set(item) for item in items)


def _prompt_of(record: Any, report: Report) -> dict[str, Any]:
    """Return {"prompt"} or {"messages"} of a record, with the answers that it holds.

    Raises KeyError, TypeError or AttributeError if it has neither.
    """
    if isinstance(record, str | list):
        record = {"prompt": record}
    answers = {name: _answer(record.get(name), report) for name in ("chosen", "rejected")}
    for key in ("prompt", *CHAT_KEYS):
        if record.get(key):
            return _conversation(record[key], answers, report)
    if isinstance(record["chosen"], str):
        return _preference(record["chosen"], record.get("rejected"))
    return _conversation(record["chosen"], answers, report)


def _conversation(value: Any, answers: dict[str, Any], report: Report) -> dict[str, Any]:
    """Return the prompt of a text or of a list of turns, whose last answer is left to write."""
    if isinstance(value, str):
        if not value.strip():
            raise TypeError("an empty prompt")
        return {"prompt": value} | answers
    turns = chat_turns(value, report)
    if turns[-1]["role"] == "assistant":
        answers = answers | {"chosen": turns.pop()["content"]}
    if not turns:
        raise TypeError("an answer without a question")
    return {"messages": turns} | answers


def _answer(value: Any, report: Report) -> str | None:
    """Return the text of an answer, or of the last turn of a conversation."""
    if isinstance(value, list):
        return chat_turns(value, report)[-1]["content"]
    return value if isinstance(value, str) else None


def _preference(chosen: str, rejected: Any) -> dict[str, Any]:
    """Split a conversation of HH-RLHF into its turns and both last answers."""
    _, *parts = TURN.split(chosen)
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    contents = [text.strip() for text in parts[1::2]]
    turns = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]
    answer = ""
    if roles and roles[-1] == "assistant":
        answer = turns.pop()["content"]
    if not turns:
        raise TypeError("an answer without a question")
    rejected = TURN.split(rejected)[-1].strip() if isinstance(rejected, str) else ""
    return {"messages": turns, "chosen": answer, "rejected": rejected}


# --------------------------------------------------------------------------------- steering


class Steerer(SteeredText):
    """run() writes clamp/clamp_<sae>.json, prints the texts side by side and returns the result.

    The file has the newest run at its top level, and those before it under "earlier_runs".
    """

    def __init__(self, cfg: Namespace) -> None:
        if not cfg.prompt and not cfg.prompts:
            raise ValueError('no text to continue; give --prompt "..." or --prompts FILE')
        self.prompts = [{"prompt": text} for text in cfg.prompt or []]
        if cfg.prompts:
            self.prompts += conversations(Path(cfg.prompts))
        if not any((cfg.set, cfg.add, cfg.multiply, cfg.zero)):
            raise ValueError(
                "no latent to edit; give --set LATENT=VALUE, --add, --multiply or --zero LATENT"
            )
        opened = checkpoint.open_all(cfg)
        if len(opened) != 1:
            raise ValueError(
                f"--SAE_path names {len(opened)} checkpoints; one is steered at a time"
            )
        sae, self.recipe = opened[0]
        super().__init__(cfg, sae, self.recipe["title"])
        self.notes = latent_notes.of_sae(cfg.output_dir, self.title, self.recipe["weights_sum"])
        self.operations = self._operations()
        if cfg.site is not None and cfg.site not in self.sae.sites():
            raise ValueError(f"--site {cfg.site}: {self.title} reads {self.sae.sites()}")
        demo.use_demo_defaults(cfg)
        config.complete(cfg)

    def _operations(self) -> list[tuple[str, int, float]]:
        """Return (kind, latent, value) of every edit that was asked for."""
        operations = []
        for kind in ("set", "add", "multiply"):
            operations += [(kind, *pair) for pair in getattr(self.cfg, kind) or []]
        operations += [("set", latent, 0.0) for latent in self.cfg.zero or []]
        self.check_operations(operations)
        return [(kind, latent, self._strength(latent, value)) for kind, latent, value in operations]

    def _strength(self, latent: int, value: float) -> float:
        """Return a value in units of strength; 1.5x is one and a half times the maximum."""
        if not isinstance(value, config.TimesMaximum):
            return value
        maximum = self.notes.get(latent, latent_notes.Note()).maximum
        if maximum is None:
            raise ValueError(
                f"{latent}={value:g}x needs the maximum of latent {latent}, which no contexts file "
                f"of {self.title} in {self.cfg.output_dir} holds; run apply.py first, or type "
                "the value itself"
            )
        return value * maximum

    def _site(self, ids: Tensor) -> int | None:
        return self.site(ids, [latent for _, latent, _ in self.operations])

    @property
    def edit(self) -> Edit:
        """The edit of a code, in units of strength."""
        return hooks.edit_latents(self.operations)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        folder = Path(self.cfg.output_dir) / files.CLAMP_DIR
        path = folder / f"clamp_{files.safe_name(self.title)}.json"
        _runs_in(path)  # a damaged file is refused before the work
        self.attach(*hooks.open_language_model(self.cfg, [(self.sae, self.recipe)]))
        progress = tqdm(self.prompts, "steering", unit=" texts", mininterval=1)
        texts = [self._compare(prompt) for prompt in progress]
        result = self._result(texts)
        with files.turn(folder):
            earlier = {"earlier_runs": _runs_in(path)}
            files.save_json(result | checkpoint.environment() | earlier, path)
        for kind, latent, value in self.operations:
            note = self.notes.get(latent, latent_notes.Note())
            print(files.printable(f"latent {latent}: {kind} {value:.4g};{note}"))
        for text in texts:
            _print_comparison(text, self.sae.sites())
        print(f"\n{path}")
        return result

    def _compare(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Continue one prompt with the edit and without, and measure the difference."""
        ids = self.ids(prompt)
        site = self._site(ids)
        original = self._continue(ids, None, site)
        steered = self._continue(ids, self.edit, site)
        clean = self._logits_of_new(ids, original, None, site)
        edited = self._logits_of_new(ids, original, self.edit, site)
        clean_of_steered = self._logits_of_new(ids, steered, None, site)
        turns = prompt.get("messages")
        return {
            "Human": turns[-1]["content"] if turns else prompt["prompt"],
            "chosen": prompt.get("chosen"),
            "rejected": prompt.get("rejected"),
            "original_output": self.tokenizer.decode(original[0], skip_special_tokens=True),
            "clamped_output": self.tokenizer.decode(steered[0], skip_special_tokens=True),
            "site": site,
            "KL": float(token_kl(clean, edited).mean()),
            "perplexity_original": _perplexity(clean, original),
            "perplexity_clamped": _perplexity(clean_of_steered, steered),
        }

    def _result(self, texts: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what is written to the file."""
        low = [(latent, value) for kind, latent, value in self.operations if kind == "set"]
        low = [pair for pair in low if pair[1] == 0]
        return {
            "sae": self.title,
            "weights_sum": self.recipe["weights_sum"],
            "model_path": str(self.cfg.model_path),
            "sequences": len(texts),
            "max_length": self.cfg.max_new_tokens,
            "operations": self.operations,
            "set_high": [operation for operation in self.operations if operation[1:] not in low],
            "set_low": low,
            "mode": self.cfg.mode,
            "temperature": self.cfg.temperature,
            "seed": self.cfg.seed,
            "outputs": {str(number): [text] for number, text in enumerate(texts)},
        }


def _runs_in(path: Path) -> list[dict[str, Any]]:
    """Return the runs in a file of results, the newest first. Raises Unusable if it is damaged."""
    if not path.exists():
        return []
    newest = files.load_json(path)
    earlier = newest.pop("earlier_runs", []) if isinstance(newest, dict) else None
    if not isinstance(earlier, list) or not files.is_finite([newest, *earlier]):
        raise files.Unusable(f"{path} is no file of steer.py; move it away")
    return [newest, *earlier]


def _perplexity(logits: Tensor, new: Tensor) -> float:
    """Return the perplexity of tokens [1,T] under the logits [T,V] that predict them.

    It is at most 1e304, the largest that a file can hold.
    """
    log_p = logits.log_softmax(-1).gather(1, new[0][:, None])
    return math.exp(min(700.0, float(-log_p.mean())))


def _print_comparison(text: dict[str, Any], sites: list[int]) -> None:
    before, after = text["perplexity_original"], text["perplexity_clamped"]
    edited = names.sites(sites if text["site"] is None else [text["site"]])
    measures = f"{edited}, KL {text['KL']:.3f} nats a token, perplexity {before:.1f} -> {after:.1f}"
    print(f"\n{files.printable(text['Human'])}")
    for name, shown in (
        ("as it is", repr(text["original_output"])),
        ("steered", repr(text["clamped_output"])),
        ("change", measures),
    ):
        width = shutil.get_terminal_size().columns
        print(
            textwrap.fill(shown, width, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
        )
