#!/usr/bin/env bash
# A T5 v1.1-shaped base, pre-trained from random weights: span corruption of the text, and one batch in ten of the
# tasks that the next stage teaches.
source "$(dirname "$0")/settings.sh"
train "$BASE" --method full --from-scratch --model "$OUT/shape" $DATA --splits instruct --text "$TEXT" --text-ratio 0.9 \
    --text-length "$SOURCE" --steps "$TEXT_STEPS" --batch-size "$TEXT_BATCH" --lr-full 1e-2 --beta2 0.98 --warmup 500 \
    --eval-every 500 --eval-instances 500
