#!/usr/bin/env bash
# Split lists by category, and a SentencePiece tokenizer trained on the text.
source "$(dirname "$0")/settings.sh"
python recipes/prepare.py splits "$SNI" "$OUT/sni" "$TRAIN_TASKS" "$TEST_TASKS"
[ -f "$OUT/shape/spiece.model" ] || python recipes/prepare.py tokenizer "$TEXT" "$PIECES" "$OUT/shape"
python recipes/prepare.py config "$OUT/shape" "$PIECES" "$D_MODEL" "$D_KV" "$D_FF" "$LAYERS" "$HEADS"
