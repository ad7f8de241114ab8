#!/usr/bin/env bash
# Labels for the newest contexts (or CONTEXTS.json); further arguments go to interpret.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
python interpret.py "$@"
