#!/usr/bin/env bash
# All methods on tasks of the other two thirds, seen and unseen: three seeds, 10, 30 and 100 instances a task.
source "$(dirname "$0")/settings.sh"
python compare.py --out "$OUT/compare" --model "$INSTRUCTED/model" $DATA --splits adapt --steps "$STEPS" $EXTRA $DEVICE \
    --methods orchmoe,lora,moe-lora,poly,mhr,c-poly,full
