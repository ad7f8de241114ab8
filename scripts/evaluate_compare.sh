#!/usr/bin/env bash
# Trains the models and controls that are missing, all with equal tokens, and evaluates them.
# Writes docs/evaluation_results.md and its picture. The controls are:
# - TopK at the first, middle and last routed site
# - random routing
# - RouteSAE with its sites shuffled over the tokens
# - RandomK
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
tokens="${TOKENS:-1500000}" l0="${TARGET_L0:-16}" sites="${SITES:-4 8 12}"
k_sparse=(RouteSAE MLSAE BatchTopK RandomK)
penalised=(Vanilla Gated JumpReLU Crosscoder)
common=(--max_tokens "$tokens" --tag compare "$@")
# shellcheck disable=SC2086  # $sites is a list
python train.py --model TopK --layer $sites --k "$l0" "${common[@]}"
python train.py --model "${k_sparse[@]}" --k "$l0" "${common[@]}"
python train.py --model RouteSAE --routing random --k "$l0" "${common[@]}" \
  --tag compare_random_routing
# Three sparsities are trained, because the frontier is read off between them.
targets=($((l0 * 3 / 4)) "$l0" $((l0 * 3 / 2)))
python train.py --model "${penalised[@]}" --target_l0 "${targets[@]}" "${common[@]}"
measure=(--metric all --max_tokens "${EVAL_TOKENS:-50000}")
python evaluate.py --SAE_path "$OUTPUT_DIR"/SAE_models/*_compare*.pt "${measure[@]}"
python evaluate.py --SAE_path "$OUTPUT_DIR"/SAE_models/RouteSAE_*_compare.pt \
  --routing permuted "${measure[@]}"
python -m src.plots "$OUTPUT_DIR/eval" docs/evaluation_results.png \
  --table docs/evaluation_results.md --only compare
