#!/usr/bin/env bash
# The main job from nothing to a deployed model in some minutes; see quickstart.py. Arguments go there.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export HF_HUB_OFFLINE=1
exec python run_scripts/quickstart.py "$@"
