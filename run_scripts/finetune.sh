#!/usr/bin/env bash
# Fine-tunes the pre-trained MG-3D module to write reports.
#   bash run_scripts/finetune.sh                          phantom studies: made, packed, learned, written, scored
#   bash run_scripts/finetune.sh data_root=DIR load_path=FILE num_gpus=1     the real thing: any words of main.py
set -euo pipefail
scripts="$(dirname "${BASH_SOURCE[0]}")"
task=task_finetune_clm_ctrg_chest_vision_only default=(task_finetune_clm_ct_rate_vision_only demo_reports)
if [[ $# -eq 0 ]]; then
  weights=
  for found in "$scripts"/../result/demo-seed0-from_/version_*/checkpoints/last.ckpt; do
    if [[ -f "$found" && (-z "$weights" || "$found" -nt "$weights") ]]; then weights="$found"; fi
  done
  weights="${weights#"$scripts/../"}" # as seen from the project's root
  if [[ -n "$weights" ]]; then
    default+=("load_path=$weights")
    echo "starting from the weights that pretrain.sh left: $weights" >&2
  else
    echo "no weights of pretrain.sh here: starting from a random image encoder" >&2
  fi
fi
# shellcheck source=run_scripts/pretrain.sh
source "$scripts/pretrain.sh" "$@"
