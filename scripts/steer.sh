#!/usr/bin/env bash
# Continues texts while latents are edited, e.g. --prompt "Returns the" --set 12=5.
# Arguments go to steer.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
python steer.py "$@"
