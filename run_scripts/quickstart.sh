#!/usr/bin/env bash
# The main job from nothing to a deployed model in some minutes; see quickstart.py. Arguments go there.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # matrices of this size gain nothing from a second thread
exec python run_scripts/quickstart.py "$@"
