#!/usr/bin/env bash
# Installs the environment and runs all tests, or the quick ones with `test.sh fast`.
# Further arguments go to pytest. The page is tested in Chromium, which is installed where apt can.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
select="not gpu and not interop"
if [ "${1:-}" = fast ]; then select="not gpu and not interop and not slow"; shift; fi
if ! command -v chromium chromium-browser google-chrome >/dev/null && [ "$(id -u)" = 0 ] &&
  command -v apt-get >/dev/null; then
  echo "installing chromium ..."
  apt-get install -y -qq chromium >/dev/null 2>&1 ||
    { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 ||
    echo "chromium could not be installed; the tests of the page will be skipped" >&2
fi
ruff check .
ruff format --check .
python -m pytest -q -m "$select" tests "$@"
