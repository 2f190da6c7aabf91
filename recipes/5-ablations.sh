#!/usr/bin/env bash
# The router's ablations on the same base and tasks.
source "$(dirname "$0")/settings.sh"
python compare.py --out "$OUT/compare" --model "$INSTRUCTED/model" $DATA --splits adapt --steps "$STEPS" $EXTRA $DEVICE \
    --ablations --rows "router: token,router: none,w replaced by its mean,attention off,router start: normal,router rate 1e-3"
