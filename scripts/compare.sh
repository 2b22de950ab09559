#!/usr/bin/env bash
# The comparison table of the README: three routers on the bundled backbone against FORA and random
# schedules at 25, 37.5 and 50 % reuse, 512 held-out seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install_project

out="results/comparison"
if [ -e "$out" ]; then
  echo "error: $out exists; move it away first" >&2
  exit 2
fi
for seed in 0 1 2; do
  .venv/bin/python train_router.py --config configs/demo.yaml --global-seed "$seed" \
    --mixed-precision bf16 --results-dir "$out/routers"
done
.venv/bin/python evaluate.py --path "$out"/routers/0* --target-cur 0.25 0.375 0.5 \
  --num-images 512 --out "$out/evaluation"
