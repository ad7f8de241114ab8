#!/usr/bin/env bash
# OpenWebText-like text from the hub to $DATA_DIR/{train,eval,apply}.jsonl: three disjoint splits by document, texts over 100 characters.
# DATASET (default Skylion007/openwebtext), MAX_MB (default 2000) may be set.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
python -m src.data "${DATASET:-Skylion007/openwebtext}" "$DATA_DIR" --max_mb "${MAX_MB:-2000}" "$@"
