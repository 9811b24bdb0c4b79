#!/usr/bin/env bash
# Pre-trains MG-3D.
#   bash run_scripts/pretrain.sh                            phantom studies: made, packed, trained on, evaluated
#   bash run_scripts/pretrain.sh data_root=DIR num_gpus=1   the real thing: any named config or KEY=VALUE of main.py
set -euo pipefail
# shellcheck source=run_scripts/setup_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_common.sh"
# Sourced by pretrain_multi_gpus.sh, which sets what starts the processes and its own words, and by finetune.sh.
[[ -v launcher[@] ]] || launcher=(python) extra=()
[[ -v default[@] ]] || default=(demo) task=task_pretrain_mg3d
words=("$@")
[[ $# -gt 0 ]] || words=("${default[@]}")
names=" ${words[*]%%=*} "
[[ "$names" == *" task_"* || "$names" == *".json "* ]] || words=("$task" "${words[@]}")
words+=("${extra[@]}")
python main.py check with "${words[@]}" # a bad word is refused once, before anything starts
if [[ "$names" =~ " demo "|" demo_reports " ]]; then
  studies=data/phantom arrows=data/phantom_arrows
  [[ -f "$studies/manifest.json" ]] || python -m mg3d.phantoms --out "$studies"
  [[ -f "$arrows/clm_ct_rate_test.arrow" ]] ||
    python prepro/prepro_pretraining_data.py ct_rate --root "$studies/ct_rate" --out "$arrows" \
      --image-size 32 32 64 --target-spacing none
  [[ -f "$arrows/clm_chest_ctrg_test.arrow" ]] || python prepro/prepro_pretraining_data.py ctrg \
    --root "$studies/ctrg" --annotation "$studies/ctrg/annotation.json" --out "$arrows" --image-size 32 32 64
  if [[ "${launcher[*]}" == python && $cores -gt 1 && ! -e /dev/nvidia0 ]]; then # both halves of a batch at once
    launcher+=(-m torch.distributed.run --standalone --nproc-per-node=2) words+=(per_gpu_batchsize=8)
    export OMP_NUM_THREADS=$((cores / 2))
  fi
fi
exec "${launcher[@]}" main.py with "${words[@]}"
