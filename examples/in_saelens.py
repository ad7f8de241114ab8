"""One of our SAEs in SAELens: exported, opened there, and the same latents.

Needs SAELens beside this program: pip install sae-lens
"""

# %%
import os
import sys

import torch
from sae_lens import SAE

from src import checkpoint, export_formats, formats, lm

# %% The SAE of the first example, or the one that is named. Its export is a folder for each site.
output_dir = os.environ.get("OUTPUT_DIR", "outputs")
trained = os.path.join(output_dir, "SAE_models", "TopK_demo_example.pt")
sae, recipe = checkpoint.load(sys.argv[1] if sys.argv[1:] else trained)
folder = export_formats.export(sae, recipe, output_dir, "saelens", overwrite=True)
site = sae.sites()[0]
in_saelens = SAE.load_from_disk(folder / formats.hook_of(site))

# %% The states of a text at that site, through both.
tokenizer, language_model = lm.get_language_model(recipe["model_path"], "cpu", "float32")
text = "Returns the number of bytes written to the file."
ids = tokenizer(text, return_tensors="pt").input_ids
states = lm.read_sites(language_model, ids, [site])[site][0]
with torch.no_grad():
    latents = in_saelens.encode(states)
    ours = sae.encode(sae.standardise(states)[0])
active = int((latents != 0).sum(1).float().mean())
print(f"SAELens: {active} active latents a token, {latents.shape[1]} in all")
print(f"largest difference from our latents: {float((latents - ours).abs().max()):.1e}")
