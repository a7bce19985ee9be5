#!/usr/bin/env bash
# Runs the tests, in .venv, which is made if it is missing. Arguments go to pytest: ./run_scripts/test.sh -k flambe
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1
# Half as many processes again as there are cores: tests that start others wait for them.
processes=$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0)) * 3 // 2))')
exec python -m pytest --dist loadgroup --no-loadscope-reorder --numprocesses "$processes" "$@"
