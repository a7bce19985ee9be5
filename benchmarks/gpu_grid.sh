#!/usr/bin/env bash
# Grids of trainings, packed onto one GPU within a time; call it again and it goes on where its time ended. It needs torch,
# transformers, accelerate, pyarrow and pillow, and nothing is installed. benchmarks/grid_runs.py says what a plan is.
#
#   benchmarks/gpu_grid.sh PLAN... [--minutes N] [--out DIR] [--workers N] [--data DIR] [--archive FILE.tar.gz] [--status]
#   benchmarks/gpu_grid.sh PLAN... --device cpu --tiny --out DIR     # only to see that it runs
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
case " $* " in *" --device"*) ;; *) set -- "$@" --device cuda ;; esac
exec "${PYTHON:-python3}" -u -m benchmarks.grid "$@"
