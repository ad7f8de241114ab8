"""Which latents are active at each token of one text."""

# %%
import os
import sys

from src.reader import Reader

# %% An SAE is given by path, folder or hub name; Reader() takes the newest SAE.
# The language model is the one that the SAE was trained on.
output_dir = os.environ.get("OUTPUT_DIR", "outputs")
trained = os.path.join(output_dir, "SAE_models", "RouteSAE_demo_example.pt")
reader = Reader(sys.argv[1] if sys.argv[1:] else trained)
reading = reader.read("Returns the number of bytes written to the file.")
print(reading)

# %% The latents [tokens, latents]. An SAE with a router has weights [tokens, sites] too.
print(reading.latents.shape, None if reading.weights is None else reading.weights.shape)

# %% Other contexts of the strongest latent at the last word. Needs the results of apply.py.
latent, strength = reading.strongest()[-2][0]
for activation, context in reader.contexts(latent)[:5]:
    print(f"latent {latent}  {activation:6.2f}  {context!r}")
