"""What `--help` says of each stage: the options that matter, and two examples.

`--help all` shows every option. The options themselves are in config.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# At most fifteen of each stage, in the order in which they are shown.
MAIN: dict[str, str] = {
    "train": "model model_path data_path k layer sites latent_size target_l0 max_tokens "
    "batch_size max_length lr tag device output_dir",
    "evaluate": "SAE_path metric model_path data_path split max_tokens infer_k theta routing "
    "batch_size max_length dtype device output_dir",
    "apply": "SAE_path model_path data_path split max_tokens context_length top_n max_per_token "
    "lines act_threshold effect batch_size max_length device output_dir",
    "interpret": "engine api_base api_key_file sample_latents score concurrency "
    "requests_per_minute budget_usd budget_tokens timeout dry_run seed output_dir",
    "steer": "SAE_path set add multiply zero prompt prompts max_new_tokens temperature mode site "
    "model_path device output_dir",
    "export": "SAE_path format license overwrite output_dir",
    "explore": "SAE_path model_path port max_new_tokens mode site dtype device output_dir",
}
EXAMPLES: dict[str, tuple[str, str]] = {
    "train": (
        "--model TopK RouteSAE --k 32 64 --max_tokens 1M",
        "--model_path data/model --data_path data --model RouteSAE --sites 7 10 13 16 19 22",
    ),
    "evaluate": (
        "--metric KLDiv --max_tokens 50k",
        "--SAE_path outputs/SAE_models/*.pt --metric all",
    ),
    "apply": (
        "--max_tokens 1M",
        "--SAE_path outputs/SAE_models/RouteSAE_demo.pt --context_length 24 --effect 20",
    ),
    "interpret": (
        "--engine heuristic --score detection fuzzing",
        "outputs/contexts/RouteSAE_demo_contexts.json --engine gpt-4o-mini --budget_usd 1",
    ),
    "steer": (
        '--set 46=1.5x --prompt "Returns the number of"',
        "--zero 46 --prompts prompts.txt --max_new_tokens 60",
    ),
    "export": (
        "--format hf",
        "--SAE_path outputs/SAE_models/TopK_demo.pt --format saelens",
    ),
    "explore": (
        "--SAE_path outputs/SAE_models/RouteSAE_demo.pt",
        "--SAE_path outputs/SAE_models/*.pt --model_path data/model --port 8000",
    ),
}
SECTIONS = {
    "lm": "language model",
    "sae": "sparse autoencoder",
    "inference": "trained SAEs",
    "unlabelled": "for checkpoints without a recipe",
    "common": "every stage",
}


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean ...?" with the known word that is nearest, or "" if none is near."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, 1, 0.6)
    return f"; did you mean {prefix}{by_lower[near[0]]}?" if near else ""
