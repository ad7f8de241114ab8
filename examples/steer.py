"""A text continued as it is, and with one latent held high."""

# %%
import os
import sys

from src import config
from src.reader import Reader
from src.steerer import Steerer

# %% The latent that is strongest somewhere in a text, at twice its strength there.
trained = os.path.join(
    os.environ.get("OUTPUT_DIR", "outputs"), "SAE_models", "RouteSAE_demo_example.pt"
)
reader = Reader(trained)
reading = reader.read("Raises ValueError if the array is empty.")
latent, strength = max((best[0] for best in reading.strongest(1) if best), key=lambda pair: pair[1])

# %%
flags = [
    "--SAE_path",
    trained,
    "--set",
    f"{latent}={2 * strength:.2f}",
    "--prompt",
    "Returns the number of",
    "--max_new_tokens",
    "12",
]
result = Steerer(config.parse("steer", [*flags, *sys.argv[1:]])).run()
