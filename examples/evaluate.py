"""What two SAEs miss, and what their errors cost the language model, on held-out text."""

# %%
import sys

from src import config, files
from src.evaluator import Evaluator

# %% Several SAEs share one clean pass of the language model.
cfg = config.parse("evaluate", ["--metric", "all", "--max_tokens", "20000", *sys.argv[1:]])
cfg.SAE_path = cfg.SAE_path or [
    f"{cfg.output_dir}/{files.SAE_DIR}/{name}_demo_example.pt" for name in ("RouteSAE", "TopK")
]
results = Evaluator(cfg).run()

# %% A dictionary by title. The share of tokens at each site says whether a router uses its sites or has settled on one.
for title, result in results.items():
    print(
        f"{title}: NormMSE {result['NormMSE']:.3f}, KL {result['KLDiv']:.3f} nats a token, L0 {result['L0']:.1f}"
    )
routing = results["RouteSAE_demo_example"]["Routing"]
print(
    "share of tokens by site:",
    {site: round(share, 2) for site, share in zip(routing["sites"], routing["share"], strict=True)},
)
