#!/usr/bin/env bash
# Runs every check: formatting, lint, types, tests. Arguments go to pytest: `bash launch/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

ruff format --check .
ruff check .
mypy
# The tests start many processes: one thread each. Two tests run at a time, as their ranks often wait for each other.
export OMP_NUM_THREADS=1
if (($# == 0)); then
    set -- -m 'not slow' -n 2 --dist worksteal
fi
exec python -m pytest "$@"
