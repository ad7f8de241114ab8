#!/usr/bin/env bash
# Serves a page on this machine on which to type a text and steer it. Arguments go to explore.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
python explore.py "$@"
