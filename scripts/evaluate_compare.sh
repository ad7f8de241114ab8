#!/usr/bin/env bash
# Trains the models and controls that are missing, all with equal tokens, and evaluates them.
#   evaluate_compare.sh            the language model of env_setup.sh, else the built-in demo model:
#                                  docs/evaluation_results.{md,png}
#   evaluate_compare.sh smollm2    SmolLM2-135M and real text: docs/smollm2_compare.{md,png}
# Further arguments go to train.py. The controls are:
# - TopK at several sites; with smollm2 at each site of RouteSAE
# - random routing
# - RouteSAE with its sites shuffled over the tokens
# - RandomK
# - TopK with a frozen decoder, a soft-frozen decoder, and a frozen encoder (arXiv:2602.14111)
# All models of one site are at $LAYER.
# A part that was stopped continues when the same command is run again.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
if [ "${1:-}" = smollm2 ]; then
  shift
  bash scripts/download_model.sh smollm2
  bash scripts/download_data.sh
  tokens="${TOKENS:-1000000}" l0="${TARGET_L0:-32}" result=docs/smollm2_compare
  # Every fourth site, because an MLSAE or a Crosscoder of all sixteen would cost as much as all
  # other SAEs together. One target, because a training takes many minutes and ends near it.
  sites="${SITES:-7 11 15 19}" layer="${LAYER:-15}" targets="${TARGETS:-$l0}"
  # Without Recovered, which takes more than half of the passes of the language model.
  metrics=(NormMSE FVU L0 Dead Density KLDiv DeltaCE Shrinkage Routing)
  # shellcheck disable=SC2086  # $sites is a list
  set -- --model_path "$DATA_DIR/model" --data_path "$DATA_DIR" --latent_size 4096 \
    --batch_size 16 --max_length 256 --sites $sites "$@"
else
  tokens="${TOKENS:-1500000}" l0="${TARGET_L0:-16}" result=docs/evaluation_results
  # Three targets, because the sparsity frontier is read off between them.
  sites="${SITES:-4 8 12}" layer="${LAYER:-12}" metrics=(all)
  targets="${TARGETS:-$((l0 * 3 / 4)) $l0 $((l0 * 3 / 2))}"
fi
common=(--max_tokens "$tokens" --k "$l0" --tag compare "$@")
# Each call reads the language model once, for all SAEs that it names.
# shellcheck disable=SC2086  # $sites and $targets are lists
python train.py --model RouteSAE TopK MLSAE --layer $sites "${common[@]}"
# shellcheck disable=SC2086
python train.py --model BatchTopK Matryoshka RandomK Vanilla Gated JumpReLU Crosscoder \
  --layer "$layer" --target_l0 $targets "${common[@]}"
python train.py --model RouteSAE --routing random "${common[@]}" --tag compare_random_routing
python train.py --model TopK --layer "$layer" --freeze decoder soft_decoder encoder "${common[@]}"
measure=(--metric "${metrics[@]}" --max_tokens "${EVAL_TOKENS:-50000}")
python evaluate.py --SAE_path "$OUTPUT_DIR"/SAE_models/*_compare*.pt "${measure[@]}"
python evaluate.py --SAE_path "$OUTPUT_DIR"/SAE_models/RouteSAE_*_compare.pt \
  --routing permuted "${measure[@]}"
python -m src.plots "$OUTPUT_DIR/eval" "$result.png" --table "$result.md" --only compare
