"""Where each latent of an SAE is active."""

# %%
import sys

from src import config, files
from src.applier import Applier

# %%
cfg = config.parse("apply", ["--max_tokens", "50000", "--context_length", "12", *sys.argv[1:]])
cfg.SAE_path = cfg.SAE_path or [f"{cfg.output_dir}/{files.SAE_DIR}/RouteSAE_demo_example.pt"]
kept, path = Applier(cfg).run()

# %% A JSON file: {latent: contexts, tokens, strengths, sites ...}; here the latent with the strongest activation.
latents = files.load_json(path)["latent_context_map"]
print(f"{kept} latents with contexts")
if latents:
    strongest = max(latents, key=lambda latent: latents[latent]["max_activation"])
    for value, tokens in list(
        zip(latents[strongest]["activations"], latents[strongest]["tokens"], strict=True)
    )[:5]:
        print(f"latent {strongest}  {value:6.2f}  {''.join(tokens)!r}")
