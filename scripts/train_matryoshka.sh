#!/usr/bin/env bash
# Trains Matryoshka. Further arguments go to train.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
python train.py --model Matryoshka "$@"
