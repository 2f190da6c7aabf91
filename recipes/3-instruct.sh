#!/usr/bin/env bash
# Fine-tunes the whole base on a third of the training tasks, by category, so that it follows instructions, as Flan
# does for T5. The frozen base of the comparison.
source "$(dirname "$0")/settings.sh"
train "$INSTRUCTED" --method full --model "$BASE/model" $DATA --splits instruct --steps "$INSTRUCT_STEPS" \
    --batch-size 16 --lr-full 1e-3 --eval-every 250 --eval-instances 1000
