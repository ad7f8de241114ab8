#!/usr/bin/env bash
# How much text does an SAE need? Trains RouteSAE and TopK at three sites of SmolLM2 on 100k to 2M
# tokens, and writes error, KL and dead latents by the number of tokens: docs/smollm2_curves.{md,png}.
# About an hour and a half on one CPU core; a part that was stopped continues when the same command
# is run again. Further arguments go to train.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
bash scripts/download_model.sh smollm2
bash scripts/download_data.sh
results="$OUTPUT_DIR/smollm2_curves"
model=(--model_path "$DATA_DIR/model" --data_path "$DATA_DIR" --max_length 256)
for tokens in ${TOKENS:-100k 200k 500k 1M 2M}; do
  python train.py --model RouteSAE TopK --layer 7 14 22 --latent_size 4096 --k 32 --batch_size 16 \
    "${model[@]}" --max_tokens "$tokens" --tag "$tokens" --output_dir "$results" "$@"
done
python evaluate.py --SAE_path "$results"/SAE_models/*.pt --metric NormMSE Dead KLDiv \
  --max_tokens "${EVAL_TOKENS:-50k}" --batch_size 16 "${model[@]}" --output_dir "$results"
python -m experiments.smollm2_curves "$results/eval" docs/smollm2_curves
