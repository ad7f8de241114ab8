#!/usr/bin/env bash
# Labels the newest contexts, or those of CONTEXTS.json. Further arguments go to interpret.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
python interpret.py "$@"
