#!/usr/bin/env bash
# Preference-guided DPO in one command. Edit the variables, or set them for one call:
#   python load_helpsteer_dataset.py --tokenizer Qwen/Qwen2.5-1.5B-Instruct    # first: rows for POLICY_MODEL_PATH
#   ./train_helpsteer.sh
#   TRAINING_MODE=none LOSS_NAME=dpo BETA=0.1 GPUS=2 ./train_helpsteer.sh
#   DRY_RUN=1 ./train_helpsteer.sh    # only print the command
set -euo pipefail
cd "$(dirname "$0")"

TRAINING_MODE=${TRAINING_MODE:-text}                                 # none | text | embedding
POLICY_MODEL_PATH=${POLICY_MODEL_PATH:-Qwen/Qwen2.5-1.5B-Instruct}   # hub name or folder
MODEL_SHORT_NAME=${MODEL_SHORT_NAME:-}                               # in the name of the run, empty: from the path
LOSS_NAME=${LOSS_NAME:-new_pref_po}                                  # dpo | ipo | hinge | sipa | orpo | simpo | new_pref_po
BETA=${BETA:-0}                                                      # 0: the default of the loss, see below
ALPHA=${ALPHA:-0.1}
LAMBDA_KL=${LAMBDA_KL:-0.1}
PREFERENCE_TEXT=${PREFERENCE_TEXT-Please provide a helpful, honest, harmless, and concise response.}
PROMPT_EMBEDDING_PATH=${PROMPT_EMBEDDING_PATH:-}                     # .pt or .safetensors, empty: train new vectors
DATA_DIR=${DATA_DIR:-processed_helpsteer}                            # from load_helpsteer_dataset.py
LEARNING_RATE=${LEARNING_RATE:-}                                     # empty: the default of train_dpo.py
EPOCHS=${EPOCHS:-1}
BATCH_SIZE=${BATCH_SIZE:-4}
ACCUMULATION=${ACCUMULATION:-4}
USE_LORA=${USE_LORA:-false}
GPUS=${GPUS:-1}                                                      # more than one: accelerate launch
CONFIG=${CONFIG:-configs/multi_gpu.yaml}                             # or deepspeed_zero2, with PRECISION=fp32
PRECISION=${PRECISION:-}                                             # fp32 | bf16 | fp16, empty: by device
REPORT_TO=${REPORT_TO:-none}                                         # none | tensorboard | trackio | wandb
PYTHON=${PYTHON:-python}
DRY_RUN=${DRY_RUN:-}

[ "$GPUS" = 1 ] || [ -f "$CONFIG" ] || { echo "CONFIG = '$CONFIG' is not there, here: $(echo configs/*.yaml)" >&2; exit 1; }
if [[ "$BETA" =~ ^0*\.?0*$ ]]; then
    case "$LOSS_NAME" in new_pref_po) BETA=0.05 ;; simpo) BETA=2.0 ;; *) BETA=0.1 ;; esac # as in utils/training/losses.py
fi
names=$("$PYTHON" -m utils.runs "$DATA_DIR" "$TRAINING_MODE" "$MODEL_SHORT_NAME" "$POLICY_MODEL_PATH" \
    "$LOSS_NAME" "$BETA" "$ALPHA")
read -r PROJECT RUN <<<"$names"
echo "project  $PROJECT"
echo "run      $RUN"
echo "folder   model_output/$PROJECT/$RUN"

options=(
    --data_dir "$DATA_DIR" --model "$POLICY_MODEL_PATH" --model_short_name "$MODEL_SHORT_NAME"
    --loss "$LOSS_NAME" --beta "$BETA" --alpha "$ALPHA" --lambda_kl "$LAMBDA_KL" --guidance "$TRAINING_MODE"
    --preference_text "$PREFERENCE_TEXT" --prompt_embedding_path "$PROMPT_EMBEDDING_PATH"
    --epochs "$EPOCHS" --batch_size "$BATCH_SIZE" --accumulation "$ACCUMULATION" --use_lora "$USE_LORA"
    --report_to "$REPORT_TO"
)
[ -z "$LEARNING_RATE" ] || options+=(--learning_rate "$LEARNING_RATE")
[ -z "$PRECISION" ] || options+=(--precision "$PRECISION")
if [ "$GPUS" = 1 ]; then
    command=("$PYTHON" train_dpo.py)
else
    command=(accelerate launch --config_file "$CONFIG" --num_processes "$GPUS" train_dpo.py)
fi
echo "command  $(printf '%q ' "${command[@]}" "${options[@]}")"
[ -n "$DRY_RUN" ] || exec "${command[@]}" "${options[@]}" "$@"
