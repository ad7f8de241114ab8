"""The errors of two SAEs on held-out text, and what the errors cost the language model."""

# %%
import sys

from src import config, files
from src.evaluator import Evaluator

# %% All SAEs share one pass of the unpatched language model.
cfg = config.parse("evaluate", ["--metric", "all", "--max_tokens", "20000", *sys.argv[1:]])
folder = f"{cfg.output_dir}/{files.SAE_DIR}"
cfg.SAE_path = cfg.SAE_path or [
    f"{folder}/RouteSAE_demo_example.pt",
    f"{folder}/TopK_demo_example.pt",
]
results = Evaluator(cfg).run()

# %% The results are a dictionary by title.
for title, result in results.items():
    error, kl, l0 = (result[metric] for metric in ("NormMSE", "KLDiv", "L0"))
    print(f"{title}: NormMSE {error:.3f}, KL {kl:.3f} nats a token, L0 {l0:.1f}")

# %% The share of tokens at each site shows whether a router uses all sites or only one.
routing = results["RouteSAE_demo_example"]["Routing"]
shares = zip(routing["sites"], routing["share"], strict=True)
print("share of tokens by site:", {site: round(share, 2) for site, share in shares})
