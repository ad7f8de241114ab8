"""The documented names in one place. A door, not a room: nothing is defined here, and nothing inside src imports it."""

from src.config import parse_args
from src.files import save_json
from src.hooks import RouteHook, get_outputs, hook_RouteSAE, hook_SAE
from src.lm import get_language_model
from src.ops import L1_loss, Normalized_MSE_loss, pre_process, unit_norm_decoder
from src.sae_training import LinearWarmupLR
from src.tracking import wandb_init
from src.trainer import log_layers, set_seed

__all__ = [
    "L1_loss",
    "LinearWarmupLR",
    "Normalized_MSE_loss",
    "RouteHook",
    "get_language_model",
    "get_outputs",
    "hook_RouteSAE",
    "hook_SAE",
    "log_layers",
    "parse_args",
    "pre_process",
    "save_json",
    "set_seed",
    "unit_norm_decoder",
    "wandb_init",
]
