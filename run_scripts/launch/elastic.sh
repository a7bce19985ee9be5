#!/bin/bash
# NODES=1:4 ADDRESS=host0:29400 run_scripts/launch/elastic.sh run_scripts/pretrain_bert.py --output_dir runs/bert ...
# On each machine. When a worker dies, or machines come or go between the two numbers of NODES, all workers start again
# from the newest complete checkpoint, up to RESTARTS times: at most the steps since then are lost. On one machine neither
# NODES nor ADDRESS is needed. WORKERS is the number of processes of a machine, by default its GPUs.
set -euo pipefail

# torch 2.13 lets all starts share one store, where a worker that is started again may find the addresses of dead ones and
# wait for them; each start gets a store of its own by this.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${WORKERS:-gpu}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${ADDRESS:-localhost:0}" --rdzv-id "${JOB:-hf-fnl}" \
    "$@" --resume_from_checkpoint true
