#!/usr/bin/env bash
#SBATCH --job-name=sae
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Trains on every GPU of a SLURM job with one or several nodes. Two minutes before the time limit
# the run is saved and the job is queued again, which continues it.
# Submit it from the root of the repository:
#   sbatch [--nodes 2 ...] scripts/slurm_train.sh --model RouteSAE ...
cd "${SLURM_SUBMIT_DIR:-.}"
source scripts/common.sh
source scripts/env_setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# torchrun allows 30 s by default, which may be too short to save a large state.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
port=$((20000 + SLURM_JOB_ID % 10000))
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --rdzv_endpoint "$head:$port" train.py "$@" &
job=$!
stopped=""
code=0
# srun and torchrun pass SIGTERM on, and every process saves at the same step.
trap 'stopped=1; kill -TERM "$job"' USR1 TERM
while true; do
  wait "$job" && code=0 || code=$?
  kill -0 "$job" 2>/dev/null || break  # if the job still runs, the trap ended the wait
done
if [ "$code" = 143 ] || { [ -n "$stopped" ] && [ "$code" != 0 ]; }; then
  echo "stopped after saving (exit code $code); queued again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
