# Sourced by the Slurm scripts: run one of the command-line files on all nodes of the job, a process
# per GPU, through preemption. A signal before the time is up ends it well, and the job comes back.
# A plain scancel looks the same from here: `scancel --signal=KILL --full JOB` should end one.
export MASTER_ADDR
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# With the store of the rendezvous shared, a restart can meet what the last attempt left in it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# srun does not take it over from sbatch.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# Of its own: jobs may share a node.
PORT=$((10000 + SLURM_JOB_ID % 20000))

launch() {
  srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv_endpoint="$MASTER_ADDR:$PORT" --max-restarts=3 "$@" &
  local running=$! status ending=0 interrupted=1

  # Not to srun, which answers SIGTERM by killing what it runs. This goes to the processes of all
  # steps: what there is is made safe, and all leave.
  trap 'ending=1 interrupted=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM
  # A signal interrupts the waiting. The status of srun is to be had even if it has ended meanwhile.
  while [ "$interrupted" -eq 1 ]; do
    interrupted=0 status=0
    wait "$running" || status=$?
  done
  if [ "$ending" -eq 1 ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}
