"""Labels for latents: by rule, which needs no endpoint, and tested on contexts they were not made from."""

# %%
import sys

from src import config
from src.interpreter import Interpreter

# %% With a language model instead: --engine NAME --api_base http://localhost:8000/v1, its key in OPENAI_API_KEY.
cfg = config.parse(
    "interpret",
    ["--engine", "heuristic", "--score", "detection", "--sample_latents", "50", *sys.argv[1:]],
)
labels = Interpreter(cfg).run()
