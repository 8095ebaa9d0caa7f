#!/usr/bin/env bash
# Runs all tests; creates .venv first if it is missing. Arguments go to pytest: bash scripts/test.sh -k coss
set -euo pipefail
source "$(dirname -- "$0")/_env.sh"
environment
"$PYTHON" -m ruff check .
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
