#!/usr/bin/env bash
# Sample many images on several nodes, through preemption:
#   sbatch scripts/slurm_sample.sh --path results/000-DiT-XL-2-T20 --num-samples 50000 --out samples
# Flags go to sample.py. What a job leaves undone the next one finishes, on any number of GPUs.
#SBATCH --job-name=harmonica-sample
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

if [ $# -eq 0 ]; then
  echo "error: no flags for sample.py; pass --num-samples and --out" >&2
  exit 2
fi
source scripts/slurm_launch.sh
launch sample.py "$@"
