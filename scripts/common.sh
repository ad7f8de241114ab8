# Sourced by every script: strict mode, the repository's root, the environment. `python` is .venv's from here on.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
if [ ! -f .venv/installed ] || [ constraints.txt -nt .venv/installed ]; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed (found $(python3 -V))" >&2; exit 2; }
  [ -x .venv/bin/python ] || python3 -m venv .venv
  echo "installing into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -c constraints.txt
  touch .venv/installed
fi
export PATH="$ROOT/.venv/bin:$PATH"
export OUTPUT_DIR="${OUTPUT_DIR:-$ROOT/outputs}"
