#!/usr/bin/env bash
# Writes the contexts of each latent of the newest SAE, or of --SAE_path.
# Further arguments go to apply.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
python apply.py "$@"
