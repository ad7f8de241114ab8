#!/usr/bin/env bash
# Measures everything that needs a GPU, in about twelve minutes on one H200. Nothing is installed.
#   benchmarks/gpu.sh [PART ...] [--dry] [--peers DIR]
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
