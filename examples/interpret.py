"""Labels for latents, made by a rule and tested on contexts that the rule has not seen.

The rule (--engine heuristic) needs no endpoint. For labels by a language model use
--engine NAME --api_base http://localhost:8000/v1, with the key in OPENAI_API_KEY.
"""

# %%
import sys

from src import config
from src.interpreter import Interpreter

# %%
flags = ["--engine", "heuristic", "--score", "detection", "--sample_latents", "50"]
cfg = config.parse("interpret", [*flags, *sys.argv[1:]])
labels = Interpreter(cfg).run()
