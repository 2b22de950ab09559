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
export MASTER_ADDR
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --rdzv_endpoint="$MASTER_ADDR:29500" --max-restarts=3 \
  sample.py "$@" &
launch=$!

ending=0
trap 'ending=1; kill -TERM "$launch" 2>/dev/null' USR1 TERM
status=0
wait "$launch" || status=$?
while kill -0 "$launch" 2>/dev/null; do
  status=0
  wait "$launch" || status=$?
done
if [ "$ending" -eq 1 ] && [ "$status" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
