#!/usr/bin/env bash
# Train a router on several nodes, through preemption: sbatch scripts/slurm_train.sh [flags]
# Flags go to train_router.py; the default is the DiT-XL/2 preset with 20 steps.
#SBATCH --job-name=harmonica-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Three minutes before the time is up, to this script alone.
#SBATCH --signal=B:USR1@180
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

if [ $# -eq 0 ]; then
  set -- --config configs/dit_xl2_256_t20.yaml
fi
source scripts/slurm_launch.sh
launch train_router.py --resume auto "$@"
