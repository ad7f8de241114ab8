"""A language model whose residual stream is a planted world, for train.py and the other stages.

Its text only says which samples are drawn: a row of tokens seeds the generator of its states, so
the same row has the same states in any batch. Block i adds to the stream what site i has and the
site before has not. `write` makes its folder, which holds a copy of this file; it works where this
repository is the working directory.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from experiments.planted_world import LEVELS, Level, World

WORDS = 1000  # of the vocabulary, beside the mark that ends a text
DOCUMENT = 1024  # words
HASH = 6_364_136_223_846_793_005  # odd; products with it wrap around at 64 bits


class PlantedConfig(PreTrainedConfig):
    """Which world it is."""

    model_type = "planted"

    def __init__(self, level: list[int] | None = None, seed: int = 1, **rest: Any) -> None:
        self.level = level or list(LEVELS["easy"])
        self.seed = seed
        sizes = Level(*self.level)
        self.hidden_size = sizes.width
        self.num_hidden_layers = sizes.n_sites
        self.vocab_size = WORDS + 1
        super().__init__(**{"tie_word_embeddings": False, "eos_token_id": WORDS} | rest)


class Block(nn.Module):
    """Adds an update to the stream."""

    def forward(self, hidden_states: Tensor, update: Tensor) -> Tensor:
        return hidden_states + update


class PlantedModel(PreTrainedModel):
    """The stream from an embedding of zeros to the last site."""

    config_class = PlantedConfig

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block() for _ in range(config.num_hidden_layers))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.zeros_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    @cached_property
    def world(self) -> World:
        """The world, made when it is first asked for."""
        return World(Level(*self.config.level), self.config.seed)

    def sizes(self, row: Tensor) -> Tensor:
        """Return the sizes of the features in the tokens of a row. int64 [S] -> [S,G]"""
        seed = 0
        for token in row.tolist():
            seed = (seed * HASH + token + 1) % 2**63
        return self.world.values(len(row), torch.Generator().manual_seed(seed))

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids)
        values = torch.cat([self.sizes(row) for row in input_ids.cpu()])
        before = torch.zeros_like(hidden)
        for site, block in enumerate(self.layers, start=1):
            states = self.world.states(values, site).view_as(hidden).to(hidden)
            hidden = block(hidden, states - before)
            before = states
        return BaseModelOutputWithPast(last_hidden_state=hidden)


class PlantedForCausalLM(PreTrainedModel):
    """The stream and a random head."""

    config_class = PlantedConfig

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.model = PlantedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    _init_weights = PlantedModel._init_weights

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def get_decoder(self) -> PlantedModel:
        return self.model

    def forward(self, input_ids: Tensor, **rest: Any) -> CausalLMOutputWithPast:
        states = self.model(input_ids, **rest).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(states))


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words: w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(WORDS)} | {"<end>": WORDS}
    plain = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")


def write(folder: Path, level: Level, seed: int, n_tokens: int) -> None:
    """Write the model, its tokenizer, and a text of random words."""
    PlantedConfig.register_for_auto_class()
    PlantedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    torch.manual_seed(seed)
    model = PlantedForCausalLM(PlantedConfig(level=list(level), seed=seed))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for _ in range(-(-n_tokens // DOCUMENT)):
            words = torch.randint(WORDS, (DOCUMENT,), generator=generator).tolist()
            text = " ".join(f"w{word}" for word in words)
            file.write(json.dumps({"text": text}) + "\n")
