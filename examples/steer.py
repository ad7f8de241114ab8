"""A text continued twice: unchanged, and with one latent held at a high activation."""

# %%
import os
import sys

from src import config
from src.reader import Reader
from src.steerer import Steerer

# %% The latent with the largest activation in a text.
output_dir = os.environ.get("OUTPUT_DIR", "outputs")
trained = os.path.join(output_dir, "SAE_models", "RouteSAE_demo_example.pt")
reading = Reader(trained).read("Raises ValueError if the array is empty.")
strongest = [latents[0] for latents in reading.strongest(1) if latents]
latent, strength = max(strongest, key=lambda pair: pair[1])

# %% It is held at twice that activation.
flags = ["--SAE_path", trained, "--set", f"{latent}={2 * strength:.2f}"]
flags += ["--prompt", "Returns the number of", "--max_new_tokens", "12"]
result = Steerer(config.parse("steer", [*flags, *sys.argv[1:]])).run()
