#!/usr/bin/env bash
# Web text from the hub to $DATA_DIR/{train,eval,apply}.jsonl: three disjoint splits by document, texts over 100 characters. A stopped
# download goes on when the same command is run again. DATASET (owner/name[:config]; parquet or JSONL, no loading script) and MAX_MB
# (default 2000) may be set.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
python -m src.sources "${DATASET:-HuggingFaceFW/fineweb:sample-10BT}" "$DATA_DIR" --max_mb "${MAX_MB:-2000}" "$@"
