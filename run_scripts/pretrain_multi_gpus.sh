#!/usr/bin/env bash
# The same as pretrain.sh on several processes (CPU or GPU) and any number of machines.
#   here:     NPROC=4 bash run_scripts/pretrain_multi_gpus.sh data_root=DIR      (NPROC: all GPUs, or 2 on a CPU)
#   by hand:  NNODES=2 NODE_RANK=0 MASTER_ADDR=HOST bash ... on every machine, NODE_RANK counting up
#   SLURM:    sbatch --nodes=2 --ntasks-per-node=4 run_scripts/pretrain_multi_gpus.sh data_root=DIR
set -euo pipefail
scripts="$(dirname "${BASH_SOURCE[0]}")"
[[ -f "$scripts/setup_common.sh" ]] || scripts="${SLURM_SUBMIT_DIR:-.}/run_scripts" # sbatch runs a copy of this file
for word in "$@"; do
  case "$word" in num_gpus=[1-9]*) : "${NPROC:=${word#*=}}" ;; num_nodes=*) : "${NNODES:=${word#*=}}" ;; esac
done
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
: "${NPROC:=$((gpus > 0 ? gpus : 2))}" "${NNODES:=1}"
launcher=(python -m torch.distributed.run "--nproc-per-node=$NPROC" "--nnodes=$NNODES")
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
  list="${SLURM_JOB_NODELIST:-${SLURM_NODELIST:-localhost}}" NNODES="${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}"
  [[ ! "$list" =~ ^([^,\[]*)\[([0-9]+) ]] || list="${BASH_REMATCH[1]}${BASH_REMATCH[2]}" # gpu[03-05,9] -> gpu03
  NPROC=$((${SLURM_NTASKS:-$NNODES} / NNODES))
  export MASTER_ADDR="${MASTER_ADDR:-${list%%,*}}" MASTER_PORT="${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}"
  launcher=(srun --job-name=mg3d --kill-on-bad-exit=1 python)
  # one of the tasks; steps from 4294967280 on are batch scripts and shells
  if ((${SLURM_STEP_ID:-4294967291} < 4294967280)) || ! command -v srun >/dev/null; then launcher=(python); fi
elif ((NNODES > 1)); then
  launcher+=("--node-rank=${NODE_RANK:-0}" "--master-addr=${MASTER_ADDR:?HOST of node 0}" "--master-port=${MASTER_PORT:-29500}")
else
  launcher+=(--standalone)
fi
export NPROC
extra=("num_nodes=$NNODES")
source "$scripts/pretrain.sh" "$@"
