"""One of our SAEs in the core evaluation of SAEBench. Needs SAEBench: pip install sae-bench"""

# %%
import json
import os
import sys
import tempfile
from pathlib import Path

from sae_bench.evals.core import main as core
from transformer_lens.model_bridge import TransformerBridge

from src import checkpoint, demo, formats

output_dir = os.environ.get("OUTPUT_DIR", "outputs")
trained = os.path.join(output_dir, "SAE_models", "TopK_demo_example.pt")
sae, recipe = checkpoint.load(sys.argv[1] if sys.argv[1:] else trained)


# %% SAEBench opens language models by the names of TransformerLens. For one of those, such as
# "pythia-70m-deduped", leave this cell out. It opens any folder.
class FromFolder:
    @staticmethod
    def from_pretrained_no_processing(name, device, dtype):
        return TransformerBridge.boot_transformers(name, device=device, dtype=dtype)


core.HookedTransformer = FromFolder

# %% {site: an object that SAEBench takes in place of an SAE}. A text is a data set of the hub, or a
# folder; here it is held-out text of the demo, or DATA_PATH.
objects = formats.site_saes(sae, recipe["model_path"])
text = Path(tempfile.mkdtemp())
source = Path(os.environ.get("DATA_PATH") or demo.build_corpus("eval", 2e6) / "eval.jsonl")
(text / "train.jsonl").write_bytes(source.read_bytes())
results = Path(output_dir) / "saebench"
core.multiple_evals(
    [(f"{recipe['title']}_{site}", site_sae) for site, site_sae in objects.items()],
    2,  # batches for reconstruction; use 200 for figures that you keep
    2,  # batches for sparsity and variance
    eval_batch_size_prompts=8,
    exclude_special_tokens_from_reconstruction=True,
    dataset=str(text),
    context_size=64,
    output_folder=str(results),
    device="cpu",
    compute_featurewise_density_statistics=True,
    compute_featurewise_weight_based_metrics=True,
)

# %%
for path in sorted(results.glob(f"{recipe['title']}_*.json")):
    metrics = json.loads(path.read_text())["eval_result_metrics"]
    kl = metrics["model_behavior_preservation"]["kl_div_score"]
    explained = metrics["reconstruction_quality"]["explained_variance"]
    print(f"{path.stem}: KL score {kl:.4f}, explained variance {explained:.4f}")
