#!/usr/bin/env bash
# Remakes tiny/: the tokenizer, and a T5 v1.1-shaped base of 2.7 M parameters pre-trained from scratch on the miniature's
# pre-training tasks and on span corruption of its text. Some 20 minutes on two CPU cores.
#
#     bash tiny/make_tiny.sh [WORK_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-runs/tiny}
mkdir -p "$work"
python sni/make_sni.py --text "$work/text.txt" --lines 200000
python sni/make_sni.py --out "$work/sni" --pretrain 2000
python tiny/make_tokenizer.py "$work/text.txt" sni tiny/spiece.model
python -m experiments.pretrain --model tiny --device cpu --out "$work/base" \
    --data "$work/sni" --splits pretrain --train-instances 2000 \
    --text "$work/text.txt" --text-ratio 0.1 --text-length 96 \
    --steps "${STEPS:-9000}" --batch-size 16 --lr-full 1e-2 --beta2 0.98 --warmup 200 --eval-every 1000 --eval-instances 860
python -c "
import torch, checkpoint
checkpoint.save(checkpoint.load('$work/base/model').half(), 'tiny')"
