#!/bin/bash
# One training on any number of GPUs and nodes, from the same parameter file as the notebook's:
#
#     sbatch --nodes=4 --gpus-per-node=8 workflow/slurm_train.sh companion.papers.train_prior params.yaml
#
# Each node starts one torchrun, each torchrun one process a GPU (or PROCESSES of them, on CPUs). A rank that dies ends
# all; torchrun starts them again, RESTARTS times, and so does Slurm after a node was lost: training goes on from the last
# checkpoint, to the losses of one that was never stopped. grad_accumulation must be a multiple of the processes.
#SBATCH --job-name=companion-train
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@60
#SBATCH --output=train-%j.log
# Your cluster's: --partition, --account, --gpus-per-node=a100:8
set -euo pipefail
module="$1" file="$2"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${PROCESSES:-gpu}" --max-restarts="${RESTARTS:-3}" \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 20000))" \
  -m "$module" "$file"
