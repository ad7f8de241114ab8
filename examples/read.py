"""One text, token by token."""

# %%
import os
import sys

from src.reader import Reader

# %% By path, folder or hub name; without a name the newest SAE. The language model is the one it was trained on.
trained = os.path.join(
    os.environ.get("OUTPUT_DIR", "outputs"), "SAE_models", "RouteSAE_demo_example.pt"
)
reader = Reader(sys.argv[1] if sys.argv[1:] else trained)
reading = reader.read("Returns the number of bytes written to the file.")
print(reading)

# %% The codes [tokens, latents] and, of an SAE with a router, the weight of every site [tokens, sites].
print(reading.latents.shape, None if reading.weights is None else reading.weights.shape)

# %% What else makes the strongest latent of the last word fire, if apply.py has been run.
latent, strength = reading.strongest()[-2][0]
for value, text in reader.contexts(latent)[:5]:
    print(f"latent {latent}  {value:6.2f}  {text!r}")
