#!/usr/bin/env bash
# Train a router on the bundled backbone, then sample the same seeds with and without it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install_project

said="$(.venv/bin/python train_router.py --config configs/demo.yaml)"
echo "$said"
run="${said##*router and pictures: }"
.venv/bin/python sample.py --path "$run" --compare --num-images 32 --batch-size 32 --repeats 5 \
  --seed 1000000 --out "$run/samples"
echo "router: $run/router.png, image error while learning: $run/held_out.png"
