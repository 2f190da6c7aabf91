#!/usr/bin/env bash
# docs/evidence.md and its figures, from what the stages have left. What is written by hand there stays.
source "$(dirname "$0")/settings.sh"
python plot.py --results "$OUT/compare"
PYTHONPATH=. python recipes/report.py "$OUT" "$SCALE" docs
