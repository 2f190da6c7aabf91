# Read by every stage, which runs from the root of the repository: where things are, and how large they are.
#
#     SNI=natural-instructions TEXT=text.txt.xz SCALE=full bash recipes/1-tokenizer.sh     # then 2-, 3-, ...
#
# SNI: a clone of the Super-NaturalInstructions repository. TEXT: lines of English, none of a test task. SCALE=small
# is for two CPU cores, SCALE=full for one GPU. A stage that was stopped goes on when it is started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SNI=${SNI:?the folder of Super-NaturalInstructions}
TEXT=${TEXT:?the file of plain text}
SCALE=${SCALE:-full}
OUT=${OUT:-results/evidence-$SCALE}
if [ "$SCALE" = small ]; then
    PIECES=8000 D_MODEL=128 D_KV=32 D_FF=320 LAYERS=3 HEADS=4          # 3.4 M parameters
    TEXT_STEPS=6000 TEXT_BATCH=16 INSTRUCT_STEPS=1500 STEPS=200
    TRAIN_TASKS=60 TEST_TASKS=20 SOURCE=256 DEVICE="--device cpu"
    PROMPT="--num-pos 0" EXTRA="--eval-instances 400"
else
    PIECES=8000 D_MODEL=384 D_KV=64 D_FF=1024 LAYERS=5 HEADS=6         # 27 M parameters
    TEXT_STEPS=20000 TEXT_BATCH=128 INSTRUCT_STEPS=4000 STEPS=3000
    TRAIN_TASKS=0 TEST_TASKS=0 SOURCE=512 DEVICE="--gpu 0"
    PROMPT="--num-pos 1" EXTRA="--eval-instances 4000"
fi
BASE=$OUT/base INSTRUCTED=$OUT/instructed
DATA="--data $OUT/sni $PROMPT --max-source-length $SOURCE --max-target-length 64 --cache $OUT/cache"

train() {  # --out of a run, its other flags: starts the run or goes on with it
    local resume=; [ -f "$1/config.json" ] && resume=--resume
    python train.py --out "$1" "${@:2}" $DEVICE $resume
}
