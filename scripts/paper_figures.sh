#!/usr/bin/env bash
# The RouteSAE paper's figures for any language model and text, the demo by default: trains, measures, reads and steers what is missing, then
# draws. --scale smoke (a minute) | demo (the default, 24 minutes on 2 cores) | paper (a GPU). Options it does not know go to train.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
python -m experiments.paper_figures "$@"
