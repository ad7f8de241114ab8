#!/usr/bin/env bash
# Contexts of each latent of the newest SAE (or --SAE_path); further arguments go to apply.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/env_setup.sh
python apply.py "$@"
