#!/usr/bin/env bash
# Installs the environment and runs all tests, or the quick ones with `test.sh fast`.
# Further arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
select="not gpu and not interop"
if [ "${1:-}" = fast ]; then select="not gpu and not interop and not slow"; shift; fi
ruff check .
ruff format --check .
python -m pytest -q -m "$select" tests "$@"
