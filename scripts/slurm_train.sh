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
export MASTER_ADDR
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# With the store of the rendezvous shared, a restart can meet what the last attempt left in it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --rdzv_endpoint="$MASTER_ADDR:29500" --max-restarts=3 \
  train_router.py --resume auto "$@" &
launch=$!

# torchrun passes SIGTERM on: a checkpoint is written, all processes leave, the job comes back.
ending=0
trap 'ending=1; kill -TERM "$launch" 2>/dev/null' USR1 TERM
status=0
wait "$launch" || status=$?
# A signal interrupts the waiting; the processes want a moment to end.
while kill -0 "$launch" 2>/dev/null; do
  status=0
  wait "$launch" || status=$?
done
if [ "$ending" -eq 1 ] && [ "$status" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
