#!/usr/bin/env bash
# Downloads web text from the hub to $DATA_DIR/{train,eval,apply}.jsonl.
# The three splits share no document. Only texts over 100 characters are kept.
# A stopped download continues when the same command is run again.
# You may set DATASET (owner/name[:config]; parquet or JSONL without a loading script) and MAX_MB
# (default 2000).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
dataset="${DATASET:-HuggingFaceFW/fineweb:sample-10BT}"
python -m src.sources "$dataset" "$DATA_DIR" --max_mb "${MAX_MB:-2000}" "$@"
