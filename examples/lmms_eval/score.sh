#!/usr/bin/env bash
# Scores the base model and one site's merged model with lmms-eval. See docs/evaluate.md.
#
#   examples/lmms_eval/score.sh RUN CLIENT BASE [TASKS] [MODEL]
#   examples/lmms_eval/score.sh runs/mine client-0 HuggingFaceTB/SmolVLM-256M-Instruct vqa_rad
#
# TASKS is vqa_rad by default. MODEL is how lmms-eval asks: openai (the default) asks `transformers serve`,
# which this script starts on PORT (8071) and DEVICE (auto); any other name is one of lmms-eval's families,
# such as qwen2_5_vl. All three packages must be installed. More options of lmms-eval: LMMS_EVAL="--limit 8".
set -euo pipefail

run=$1 client=$2 base=$3 tasks=${4:-vqa_rad} model=${5:-openai}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
url=http://localhost:${PORT:-8071}

fedvlm export "$run" --client "$client" --merge
if [ "$model" = openai ]; then
  transformers serve --device "${DEVICE:-auto}" --port "${PORT:-8071}" &
  trap 'kill %1' EXIT
  until curl --silent --fail --output /dev/null "$url/health"; do
    kill -0 %1 || exit 1
    sleep 1
  done
fi
for weights in "$base" "$run/export/$client-merged"; do
  about="pretrained=$weights"
  [ "$model" != openai ] || about="model_version=$weights,base_url=$url/v1,api_key=none,timeout=600,num_concurrent=1"
  # shellcheck disable=SC2086
  python -m lmms_eval --model "$model" --model_args "$about" \
    --tasks "$tasks" --include_path "$here" --batch_size 1 \
    --log_samples --output_path "$run/lmms_eval/$(basename "$weights")" ${LMMS_EVAL:-}
done
