"""Our labels of our latents, scored by delphi (EleutherAI), which caches the latents itself.

Needs delphi (pip install eai-delphi), the results of examples.apply and examples.interpret, and an
endpoint of OpenAI's protocol: API_BASE, ENGINE, and OPENAI_API_KEY where it wants a key.
"""

# %%
import asyncio
import json
import os
import sys
from pathlib import Path

import torch
from delphi.clients import OpenRouter
from delphi.config import CacheConfig, ConstructorConfig, SamplerConfig
from delphi.latents import LatentCache, LatentDataset
from delphi.scorers import DetectionScorer

from src import checkpoint, demo, formats, lm
from src.data import Rows

output_dir = os.environ.get("OUTPUT_DIR", "outputs")
trained = os.path.join(output_dir, "SAE_models", "TopK_demo_example.pt")
sae, recipe = checkpoint.load(sys.argv[1] if sys.argv[1:] else trained)
site, site_sae = next(iter(formats.site_saes(sae).items()))

# %% delphi reads the language model by hooks and takes any function from states to latents.
tokenizer, language_model = lm.get_language_model(recipe["model_path"], "cpu", "float32")
hookpoint = next(
    name for name, module in language_model.named_modules()
    if module is lm.blocks(language_model)[site - 1]
)  # fmt: skip
source = os.environ.get("DATA_PATH") or demo.build_corpus("eval", 2e6)
rows = Rows(source, tokenizer, 64, "eval", max_tokens=20000)
tokens = torch.cat([batch.input_ids for batch in rows.batches(8)])
config = CacheConfig(batch_size=8, cache_ctx_len=64, n_tokens=tokens.numel(), n_splits=1)
cache = LatentCache(language_model, {hookpoint: site_sae.encode}, batch_size=8)
cache.run(config.n_tokens, tokens)
folder = Path(output_dir) / "delphi" / "latents"
folder.mkdir(parents=True, exist_ok=True)
cache.save_splits(1, folder)
cache.save_config(folder, config, recipe["model_path"])

# %% Contexts by delphi of the latents that have a label of ours.
labels = json.loads(Path(output_dir, "interpret", f"interp_{recipe['title']}.json").read_text())
named = [int(latent) for latent, label in labels.items() if label["description"]][:5]
dataset = LatentDataset(
    folder,
    SamplerConfig(n_examples_train=8, n_examples_test=8, n_quantiles=4),
    ConstructorConfig(example_ctx_len=32, min_examples=16, n_non_activating=8),
    tokenizer,
    modules=[hookpoint],
    latents={hookpoint: torch.tensor(named)},
)

# %% The endpoint says of each context whether the label fits.
base = os.environ.get("API_BASE", "https://openrouter.ai/api/v1")
client = OpenRouter(
    os.environ.get("ENGINE", "openai/gpt-4o-mini"),
    os.environ.get("OPENAI_API_KEY"),
    base_url=f"{base.rstrip('/')}/chat/completions",
)
scorer = DetectionScorer(client, n_examples_shown=4)


async def score():
    async for record in dataset:
        latent = record.latent.latent_index
        record.explanation = labels[str(latent)]["description"]
        answers = (await scorer(record)).score
        right = [answer.correct for answer in answers if answer.correct is not None]
        share = sum(right) / max(1, len(right))
        print(
            f"latent {latent}: {share:.2f} of {len(right)} contexts right, {record.explanation!r}"
        )


asyncio.run(score())
