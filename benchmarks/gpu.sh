#!/usr/bin/env bash
# Measures everything that needs a GPU, in parts of at most three minutes. Nothing is installed.
#   benchmarks/gpu.sh [PART ...] [--dry] [--peers DIR]
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
