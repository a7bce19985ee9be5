#!/bin/bash
# sbatch --nodes 4 run_scripts/launch/slurm.sh run_scripts/pretrain_bert.py --bf16 --output_dir runs/bert ...
# Any script with its flags, from the root of the repository, on all GPUs of the nodes. With CONFIG=fsdp2 in the
# environment under another configuration of this folder than multi_node.
#SBATCH --job-name=hf-fnl
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export LAUNCH="run_scripts/launch/${CONFIG:-multi_node}.yaml"
export ADDRESS PORT GPUS
ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))
GPUS=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))

# A job that is requeued goes on from its newest whole checkpoint.
srun --kill-on-bad-exit=1 bash -c '
    accelerate launch --config_file "$LAUNCH" --num_machines "$SLURM_NNODES" --num_processes "$GPUS" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$ADDRESS" --main_process_port "$PORT" \
        --rdzv_backend static "$@" --resume_from_checkpoint true
' launch "$@"
