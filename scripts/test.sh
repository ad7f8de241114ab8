#!/usr/bin/env bash
# Environment, then tests: all of them, or the quick part with `test.sh fast`. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -m venv --help >/dev/null || { echo "python3 with the venv module is needed" >&2; exit 2; }
if [ ! -f .venv/installed ] || [ constraints.txt -nt .venv/installed ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/pip install --quiet -r requirements.txt -r requirements-dev.txt -c constraints.txt
  touch .venv/installed
fi
select="not gpu"
if [ "${1:-}" = fast ]; then select="not gpu and not slow"; shift; fi
.venv/bin/ruff check src tests ./*.py
exec .venv/bin/python -m pytest -q -m "$select" tests "$@"
