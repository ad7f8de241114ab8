# Every script sources this file. It sets strict mode, changes to the root of the repository and
# installs the environment. From here on `python` is the one of .venv.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
if [ ! -f .venv/installed ] || [ constraints.txt -nt .venv/installed ]; then
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Python 3.11 or newer is needed (found $(python3 -V))" >&2
    exit 2
  fi
  [ -x .venv/bin/python ] || python3 -m venv .venv
  echo "installing into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r requirements.txt -r requirements-dev.txt -c constraints.txt
  touch .venv/installed
fi
export PATH="$ROOT/.venv/bin:$PATH"
export OUTPUT_DIR="${OUTPUT_DIR:-$ROOT/outputs}"
