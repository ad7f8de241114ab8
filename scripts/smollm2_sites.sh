#!/usr/bin/env bash
# RouteSAE beside a TopK at each of its sites, on SmolLM2: about an hour and a half on 2 CPU cores.
# Every part continues where it was stopped. Writes docs/smollm2_sites.{png,md}, and the course of
# the training to docs/smollm2_curves.{png,md}.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
bash scripts/download_model.sh smollm2
bash scripts/download_data.sh
size=(--model_path "$DATA_DIR/model" --data_path "$DATA_DIR" --latent_size 4096 --k 32
  --batch_size 16 --max_length 256 --max_tokens "${TOKENS:-1000000}")
python train.py --model RouteSAE TopK --layer {7..22} "${size[@]}" --tag sites "$@"
python train.py --model RouteSAE --routing random "${size[@]}" --tag sites_random "$@"
measure=(--metric NormMSE KLDiv L0 Dead FVU Routing --max_tokens "${EVAL_TOKENS:-50000}")
python evaluate.py --SAE_path "$OUTPUT_DIR"/SAE_models/*_sites{,_random}.pt "${measure[@]}"
python -m experiments.smollm2_sites "$OUTPUT_DIR/eval" docs/smollm2_sites
python -m experiments.smollm2_curves "$OUTPUT_DIR/runs/sites/metrics.jsonl" docs/smollm2_curves
