#!/usr/bin/env bash
# Compares exports, imports and SAEBench's core evaluation with this program, and runs the examples
# of other libraries, in an environment of its own ($INTEROP_VENV, default .venv-interop).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
lists=tests/interop
venv="${INTEROP_VENV:-$PWD/.venv-interop}"
if [ ! -f "$venv/installed" ] || [ -n "$(find "$lists" -name '*.txt' -newer "$venv/installed")" ]; then
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
  pip install --quiet "$(grep ^torch $lists/requirements.txt)"
  pip install --quiet -r "$lists/requirements.txt"
  pip install --quiet --no-deps -r "$lists/without_dependencies.txt"
  # OpenAI's has no package; without it its test is skipped.
  openai="${OPENAI_SAE:-git+https://github.com/openai/sparse_autoencoder}"
  pip install --quiet --no-deps "$openai" || echo "$openai cannot be had; its test is skipped"
  pip uninstall --quiet -y torchvision  # comes along, built for another torch; nothing here needs it
  touch "$venv/installed"
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
exec "$venv/bin/python" -m pytest -q -s -m interop tests/interop "$@"
