#!/usr/bin/env bash
# Compares exports, imports and SAEBench's core evaluation with this program, in an environment of
# its own ($INTEROP_VENV, default .venv-interop).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv="${INTEROP_VENV:-$PWD/.venv-interop}"
if [ ! -f "$venv/installed" ] || [ tests/interop/requirements.txt -nt "$venv/installed" ]; then
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep ^torch tests/interop/requirements.txt)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r tests/interop/requirements.txt
  "$venv/bin/python" -m pip uninstall --quiet -y torchvision  # comes along, built for another torch; nothing here needs it
  touch "$venv/installed"
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
exec "$venv/bin/python" -m pytest -q -s -m interop tests/interop "$@"
