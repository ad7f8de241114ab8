"""Where each latent of an SAE is active."""

# %%
import sys

from src import config, files
from src.applier import Applier

# %%
flags = ["--max_tokens", "50000", "--context_length", "12"]
cfg = config.parse("apply", [*flags, *sys.argv[1:]])
cfg.SAE_path = cfg.SAE_path or [f"{cfg.output_dir}/{files.SAE_DIR}/RouteSAE_demo_example.pt"]
n_latents, path = Applier(cfg).run()

# %% The file is JSON: {latent: contexts, tokens, strengths, sites ...}.
latents = files.load_json(path)["latent_context_map"]
print(f"{n_latents} latents with contexts")

# %% The five strongest contexts of the latent with the largest activation.
if latents:
    strongest = max(latents, key=lambda latent: latents[latent]["max_activation"])
    contexts = latents[strongest]
    pairs = list(zip(contexts["activations"], contexts["tokens"], strict=True))
    for activation, tokens in pairs[:5]:
        print(f"latent {strongest}  {activation:6.2f}  {''.join(tokens)!r}")
