#!/usr/bin/env bash
# Downloads a language model to $DATA_DIR/model (default: the gated Llama-3.2-1B-Instruct; set HF_TOKEN for it).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
model="${1:-meta-llama/Llama-3.2-1B-Instruct}"
hf download "$model" --local-dir "${DATA_DIR:-data}/model" --exclude "original/*" || {
  echo "could not download $model: is the name right, is its licence accepted on the hub, is HF_TOKEN set, is there a network?" >&2; exit 2; }
