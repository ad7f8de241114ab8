#!/usr/bin/env bash
# Trains what is missing of the eight models (and random routing) at equal tokens, evaluates all, writes docs/evaluation_results.md and the picture.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
tokens="${TOKENS:-1500000}"
python train.py --model TopK RouteSAE RandomK MLSAE Vanilla Gated JumpReLU Crosscoder --target_l0 "${TARGET_L0:-16}" --max_tokens "$tokens" --tag compare "$@"
python train.py --model RouteSAE --routing random --max_tokens "$tokens" --tag compare_random_routing "$@"
python evaluate.py --SAE_path "$OUTPUT_DIR"/SAE_models/*_compare*.pt --metric all --max_tokens "${EVAL_TOKENS:-50000}"
python -m src.plots "$OUTPUT_DIR/eval" docs/evaluation_results.png --table docs/evaluation_results.md --only compare
