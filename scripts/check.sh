#!/usr/bin/env bash
# Sets up and checks everything: style, types, layers, tests. bash scripts/check.sh [pytest options]
# With the tests that take minutes each: bash scripts/check.sh --long
# With coverage, for which tests of units take twice as long: bash scripts/check.sh --cov --cov-fail-under=90
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install all,dev

say "ruff"; ruff check .; ruff format --check .

# Types and layers are checked beside downloads and the first tests, which often wait. Errors are shown at once.
found=$(mktemp)
{ { nice mypy && nice lint-imports --no-cache; } >"$found" 2>&1 || { cat "$found" >&2; false; }; } &
types=$!
trap 'kill "$types" 2>/dev/null || true; rm -f "$found"' EXIT

# The report is looked at in a real browser, in Japanese too. Without them those tests are skipped, and counted.
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing Chromium and a Japanese font for the report's tests"
    { apt-get update && apt-get install -y --no-install-recommends chromium fonts-noto-cjk g++; } >/dev/null ||
        echo "   could not be installed: those tests will be skipped" >&2
fi

say "putting other trainers' parsers into .parsers"
bash scripts/parsers.sh || echo "   could not be installed: their tests will be skipped" >&2

# Tests start hundreds of processes: none should compile the modules of memfit anew.
unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=1 # two threads can be far slower than one on tiny operators when cores are shared

say "pytest, and beside it mypy and import-linter"
status=0
python -m pytest -n auto "$@" || status=$?
say "mypy and import-linter"
wait "$types" || status=1
cat "$found"
exit "$status"
