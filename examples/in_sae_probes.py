"""Sparse probes on the latents of one of our SAEs, by sae-probes (Kantamneni et al. 2025).

Needs sae-probes: pip install sae-probes. The language model of this example is tiny, and its
figures mean little.
"""

# %%
import json
import os
import sys
from pathlib import Path

from sae_probes import run_sae_evals
from sae_probes.generate_model_activations import ensure_dataset_activations
from transformer_lens.model_bridge import TransformerBridge

from src import checkpoint, formats

DATASET = "105_click_bait"  # DATASETS of sae_probes lists them all

output_dir = os.environ.get("OUTPUT_DIR", "outputs")
trained = os.path.join(output_dir, "SAE_models", "TopK_demo_example.pt")
sae, recipe = checkpoint.load(sys.argv[1] if sys.argv[1:] else trained)
site, site_sae = next(iter(formats.site_saes(sae, recipe["model_path"]).items()))

# %% The states of the data set's texts. A model that TransformerLens knows by name needs no bridge.
model = TransformerBridge.boot_transformers(recipe["model_path"], device="cpu")
model_name = Path(recipe["model_path"]).name
cache, results = Path(output_dir) / "sae_probes" / "states", Path(output_dir) / "sae_probes"
options = {"model_name": model_name, "model_cache_path": cache, "device": "cpu"}
hook = formats.hook_of(site)
ensure_dataset_activations(
    dataset_short_names=[DATASET], hook_names=[hook], max_seq_len=64, model=model, **options
)

# %% A logistic regression on the k latents whose means differ most between the classes.
run_sae_evals(
    sae=site_sae,
    hook_name=hook,
    reg_type="l1",
    setting="normal",
    ks=[1, 16],
    datasets=[DATASET],
    results_path=results,
    **options,
)

# %%
for path in sorted(results.rglob(f"*{DATASET}*.json")):
    for row in json.loads(path.read_text()):
        print(f"{DATASET}: k {row['k']}, test AUC {row['test_auc']:.3f}")
