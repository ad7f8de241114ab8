#!/usr/bin/env bash
# Draws the figures of the RouteSAE paper for any language model and text, by default the demo.
# It trains, measures, reads and steers what is missing, and then draws.
# --scale is smoke (a minute), demo (the default, 14 minutes on 2 cores) or paper (needs a GPU).
# Options that it does not know go to train.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
python -m experiments.paper_figures "$@"
