#!/usr/bin/env bash
# Runs the tests, in .venv, which is made if it is missing. Arguments go to pytest: ./run_scripts/test.sh -k flambe
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1 # a test process on each core
exec python -m pytest --dist loadgroup --numprocesses "$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')" "$@"
