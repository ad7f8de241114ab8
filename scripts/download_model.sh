#!/usr/bin/env bash
# Downloads a language model to $DATA_DIR/model, or says why it cannot.
# The default is the gated Llama-3.2-1B-Instruct; set HF_TOKEN for it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python -m src.hub "${1:-meta-llama/Llama-3.2-1B-Instruct}" "${DATA_DIR:-data}/model"
