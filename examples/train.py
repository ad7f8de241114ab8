"""Two SAEs trained in one pass over the demo text."""

# %%
import sys

from src import config, files
from src.trainer import Trainer

# %% Every stage is a class. `config.parse` takes the options of the command line.
flags = ["--model", "RouteSAE", "TopK", "--max_tokens", "100000", "--tag", "example"]
cfg = config.parse("train", [*flags, *sys.argv[1:]])
loss = Trainer(cfg).run()

# %% The recipe beside the weights holds all that is needed to train the same SAE again.
recipe = files.load_json(f"{cfg.output_dir}/{files.SAE_DIR}/RouteSAE_demo_example.json")
print(f"loss {loss:.3f}; sites {recipe['sites']}; {recipe['tokens']:,} tokens")
print(f"NormMSE of the last step {recipe['final']['NormMSE']:.3f}")
