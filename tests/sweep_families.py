"""A sweep over the causal language models of transformers: which families work, and why not others.

Usage: python -m tests.sweep_families [FAMILY ...] [--json FILE]

Every entry of MODEL_FOR_CAUSAL_LM_MAPPING is built with a few small random weights. Its logits are
compared with ours, its blocks are patched, a TopK and a RouteSAE take one training step, and the KL
of their patches is measured. The result is a line for each family. It is no part of the tests of
every change: it takes minutes, and a new version of transformers changes its result.
"""

import json
import math
import signal
import sys
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager

import torch
import transformers

from src import hooks, lm, metrics
from src.config import small_parser
from src.data import Batch
from src.files import first_line
from src.model import build
from src.sae import BatchInfo

SECONDS = 20  # for one family
PARAMETERS = 20_000_000  # a model of more is not built
ROWS, LENGTH, VOCABULARY, WIDTH, DEPTH = 2, 24, 64, 32, 4
LOGITS_TOLERANCE = 1e-4  # a share of the largest logit

# Values by the names of options. Only options that a family has are set.
SMALL = {
    "vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    "image_token_id": 60,
    "video_token_id": 61,
    "audio_token_id": 62,
    "image_token_index": 60,
    "boi_token_id": 57,
    "eoi_token_id": 58,
    "boa_token_id": 56,
    "eoa_token_id": 59,
    "vision_start_token_id": 57,
    "vision_end_token_id": 58,
    "sep_token_id": 2,
    "mask_token_id": 3,
    "num_hidden_layers": DEPTH,
    "num_layers": DEPTH,
    "n_layer": DEPTH,
    "n_layers": DEPTH,
    "decoder_layers": DEPTH,
    "num_decoder_layers": DEPTH,
    "encoder_layers": DEPTH,
    "num_encoder_layers": DEPTH,
    "num_blocks": DEPTH,
    "num_kv_shared_layers": 0,
    "num_mem_blocks": 1,
    "num_layers_per_stack": 1,
    "hidden_size": WIDTH,
    "d_model": WIDTH,
    "n_embd": WIDTH,
    "emb_dim": WIDTH,
    "embedding_size": WIDTH,
    "embedding_dim": WIDTH,
    "input_embedding_size": 16,
    "output_embedding_size": 16,
    "word_embed_proj_dim": WIDTH,
    "attention_hidden_size": WIDTH,
    "hidden_size_per_layer_input": 8,
    "lru_width": WIDTH,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "expert_ffn_hidden_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "dff": 48,
    "dim_ff": 48,
    "d_inner": 48,
    "n_inner": 48,
    "feed_forward_size": 48,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "num_query_groups": 2,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "global_head_dim": 8,
    "kv_channels": 8,
    "d_head": 8,
    "dim_head": 8,
    "attention_head_dim": 8,
    "attention_head_size": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "rotary_dim": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "zero_expert_num": 2,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_nextn_predict_layers": 0,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_mamba_heads": 2,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_headdim": 8,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_chunk_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "mamba_d_ssm": 64,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "context_length": 64,
    "max_target_positions": 64,
    "max_source_positions": 64,
    "model_max_length": 64,
    "sliding_window": 8,
    "attention_window_size": 8,
    "local_attention": 8,
    "attention_chunk_size": 8,
    "image_size": 16,
    "patch_size": 8,
    "num_mel_bins": 8,
    "mm_tokens_per_image": 4,
    "laurel_rank": 4,
    "adapter_rank": 4,
    "router_hidden_size": 16,
}
# Options that the table does not get right.
FAMILIES = {
    "Llama4": {"num_local_experts": 2},
    "Llama4Text": {"num_local_experts": 2},
    "Bert": {"is_decoder": True},
    "Qwen2Moe": {"decoder_sparse_step": 1},
    "Bamba": {"attn_layer_indices": [1, 3]},
    "Mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "xLSTM": {"num_heads": 4, "qk_dim_factor": 0.5},
    "Reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "is_decoder": True,
    },
    "GPTNeo": {"attention_types": [[["global", "local"], 2]]},
    "Xmod": {"default_language": "en_XX"},
    "RecurrentGemma": {"block_types": ["recurrent", "attention"]},
}
# Options under which blocks of a family differ by depth, as in some published models.
VARIANTS = {
    "Gemma4Text, shared keys": (
        "Gemma4Text",
        {"num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "Jamba, attention": ("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "Mllama, first block": ("Mllama", {"text_config": {"cross_attention_layers": [0]}}),
}
DECODERS = (  # encoders that transformers lists as causal models if they are told to be
    *("Bert", "BertGeneration", "BigBird", "Camembert", "Data2VecText", "Electra", "Ernie"),
    *("MegatronBert", "RemBert", "Roberta", "RobertaPreLayerNorm", "RoCBert", "RoFormer"),
    *("XLMRoberta", "XLMRobertaXL", "Xmod"),
)


class TooLong(Exception):
    """One family has taken more than SECONDS."""


@contextmanager
def time_limit(seconds):
    """Inside, TooLong is raised after so many seconds."""

    def stop(*_):
        raise TooLong(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def default_config(cls):
    """The configuration of a family as transformers makes it, or None if it cannot."""
    try:
        return cls()
    except Exception:  # some families have no default; their own errors say what is missing
        return None


def small_options(config):
    """Options that make a configuration small, with its nested configurations."""
    options = {}
    depth = getattr(config, "num_hidden_layers", None)
    for name in set(config.to_dict()) | set(config.attribute_map):
        target = config.attribute_map.get(name, name)
        if isinstance(getattr(type(config), target, None), property):
            continue
        value = value_of(config, name)
        if isinstance(value, transformers.PreTrainedConfig):
            options[name] = type(value)(**small_options(value)).to_dict()
        elif name in SMALL and not isinstance(value, (list, dict, bool)):
            options[name] = SMALL[name]
        elif isinstance(value, list) and len(value) == depth and depth > DEPTH:
            options[name] = layer_list(value)
    if "kv_lora_rank" in options:  # latent attention has as many key heads as query heads
        options["num_key_value_heads"] = options["num_attention_heads"]
    return without_aliases(config, options)


def value_of(config, name):
    """The value of an option, from the dictionary where blocks have values of their own."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers refuses to read an option that differs between blocks
        return config.to_dict().get(name)


def layer_list(values):
    """A list with an entry for each block, cut to DEPTH; every kind of block stays if it can."""
    if any(isinstance(value, (list, dict)) for value in values):
        return values[:DEPTH]
    kinds = list(dict.fromkeys(values))
    return (kinds * DEPTH)[:DEPTH]


def without_aliases(config, options):
    """Leaves out names that are aliases of others in the options."""
    return {
        name: value
        for name, value in options.items()
        if config.attribute_map.get(name) not in options
    }


def small_config(cls, variant=None):
    """A small configuration of the family, with the options of a variant."""
    family = cls.__name__.removesuffix("Config")
    default = default_config(cls)
    options = small_options(default) if default is not None else dict(SMALL)
    if family in DECODERS:
        options["is_decoder"] = True
    options |= FAMILIES.get(family, {})
    for name, value in (variant or {}).items():
        is_nested = isinstance(value, dict) and isinstance(options.get(name), dict)
        options[name] = options[name] | value if is_nested else value
    return cls(**options)


def small_model(cls, variant=None):
    """A model of the family with random weights; ValueError if it is not small."""
    config = small_config(cls, variant)
    auto = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(weight.numel() for weight in auto.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = auto.from_config(config).float().eval()
    for weight in model.parameters():
        # The initial weights of some families are so small that every logit is nearly equal.
        if weight.dim() == 2:
            weight.data.normal_(0, 0.15)
    return model.requires_grad_(False)


def make_batch():
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(4, VOCABULARY - 8, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[:, 0] = False
    return Batch(input_ids, mask, torch.zeros_like(input_ids), torch.arange(ROWS))


@torch.no_grad()
def logits_error(model, batch):
    """The largest difference of our logits from the model's own, as a share of the largest."""
    own = model(input_ids=batch.input_ids, use_cache=False).logits.float().flatten(0, 1)
    ours = lm.logits_of(model, lm.final_states(model, batch.input_ids).flatten(0, 1))
    return float((ours - own).abs().max() / own.abs().max())


def train_and_measure(name, model, batch):
    """Takes one training step with an SAE and returns the KL of its patches."""
    width, depth = lm.text_config(model).hidden_size, len(lm.blocks(model))
    torch.manual_seed(0)
    sae = build(name, width, depth, {"latent_size": 64, "k": 4})
    sae.check_language_model(width, depth)
    info = BatchInfo(token_keys=batch.token_keys())
    hidden = hooks.read(model, batch, sae.sites())
    hidden = {site: states.float() for site, states in hidden.items()}
    x = sae.gather(hidden)
    sae.warm_start(x)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    loss = sum(sae.loss(sae.autoencode(x, info), info).values())
    loss.backward()
    loss = loss.item()
    optimizer.step()
    clean = lm.final_states(model, batch.input_ids)[batch.mask]
    clean = lm.logits_of(model, clean)
    kls = []
    with torch.no_grad():
        for patches in sae.patches(hidden, info):
            states = hooks.patched_states(model, batch, patches)[batch.mask]
            kls.append(float(metrics.KLDiv(clean, lm.logits_of(model, states))))
    if not math.isfinite(loss) or not all(kl > 0 and math.isfinite(kl) for kl in kls):
        raise AssertionError(f"{name}: loss {loss}, KL {kls}")
    return max(kls)


def try_family(cls, variant):
    """(state, reason) of one family. States: works, refused, wrong, fails, not built, too long."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = small_model(cls, variant)
            model(input_ids=make_batch().input_ids, use_cache=False)
    except TooLong:
        raise
    except Exception as error:
        return "not built", first_line(error)[:200]
    batch = make_batch()
    try:
        lm.check_family(model)
        hooks.self_check(model, batch, list(range(1, len(lm.blocks(model)) + 1)))
        error = logits_error(model, batch)
        if not error < LOGITS_TOLERANCE:
            return "wrong", f"logits differ by {error:.1%}"
        kls = [train_and_measure(name, model, batch) for name in ("TopK", "RouteSAE")]
    except ValueError as refusal:
        return "refused", first_line(refusal)
    except TooLong:
        raise
    except Exception as error:
        return "fails", f"{type(error).__name__}: {first_line(error)} {last_place(error)}"
    return "works", f"logits {error:.0e}, KL {max(kls):.3f}"


def last_place(error):
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"


def families(names):
    """{name: (configuration, options)} of the mapping and the variants, in the order of names."""
    classes = {cls.__name__.removesuffix("Config"): cls for cls in causal_configs()}
    known = {name: (cls, {}) for name, cls in classes.items()}
    known |= {name: (classes[of], options) for name, (of, options) in VARIANTS.items()}
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"no such family: {', '.join(unknown)}")
    return {name: known[name] for name in sorted(names or known, key=str.lower)}


def causal_configs():
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.keys()


def main():
    parser = small_parser("tests.sweep_families", __doc__)
    parser.add_argument("families", nargs="*", help="names such as Llama; default: all")
    parser.add_argument("--json", help="file for the result")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results = {}
    for family, (cls, variant) in families(args.families).items():
        try:
            with time_limit(SECONDS):
                results[family] = try_family(cls, variant)
        except TooLong as error:
            results[family] = "too long", str(error)
        state, reason = results[family]
        print(f"{family:24} {state:10} {reason}", flush=True)
    counts = Counter(state for state, _ in results.values())
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: {dict(counts)}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
