#!/usr/bin/env bash
# All themes on one GPU within 9 minutes; call it again and it goes on where its time ended. It needs torch, transformers,
# accelerate and safetensors, and nothing is installed. Results: benchmarks/results, or the folder that --out names.
#
#   benchmarks/gpu_suite.sh [--budget SECONDS] [--out DIR] [--archive FILE.tar.gz] [THEME ...]
#   benchmarks/gpu_suite.sh --device cpu --tiny --out DIR     # only to see that it runs
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -m benchmarks.gpu.suite "$@"
