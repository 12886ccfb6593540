#!/usr/bin/env bash
# Scores the base model and one site's merged model with lmms-eval. See docs/evaluate.md.
#
#   examples/lmms_eval/score.sh RUN CLIENT BASE [TASKS] [MODEL]
#   examples/lmms_eval/score.sh runs/qwen2.5-vl-3b-vqarad client-0 Qwen/Qwen2.5-VL-3B-Instruct vqa_rad,slake_en qwen2_5_vl
#
# TASKS is vqa_rad by default. MODEL is lmms-eval's name of the family: huggingface (any family with a
# chat template) by default. Both packages must be installed. Never run against lmms-eval itself.
set -euo pipefail

run=$1 client=$2 base=$3 tasks=${4:-vqa_rad} model=${5:-huggingface}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fedvlm export "$run" --client "$client" --merge
for weights in "$base" "$run/export/$client-merged"; do
  python -m lmms_eval --model "$model" --model_args "pretrained=$weights" \
    --tasks "$tasks" --include_path "$here" --batch_size 1 \
    --log_samples --output_path "$run/lmms_eval/$(basename "$weights")"
done
