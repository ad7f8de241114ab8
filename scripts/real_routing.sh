#!/usr/bin/env bash
# Does routing help on SmolLM2? Trains RouteSAE and its baselines, and writes tables and pictures,
# docs/real_routing*. Three seeds take hours on 2 CPU cores; every part continues where it was
# stopped. Further arguments go to the experiment, such as --seeds 42 or --only measure report.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
bash scripts/download_model.sh smollm2
bash scripts/download_data.sh
python -m experiments.real_routing --model_path "$DATA_DIR/model" --data_path "$DATA_DIR" \
  --batch_size 16 --max_length 256 --output_dir "$OUTPUT_DIR/real_routing" --docs docs "$@"
