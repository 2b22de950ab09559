#!/usr/bin/env bash
# Train a router on the bundled backbone, then sample the same seeds with and without it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install_project

.venv/bin/python train_router.py --config configs/demo.yaml
run="$(ls -d results/[0-9]*-DiT-Ti-4-T20 | sort | tail -n 1)"
.venv/bin/python sample.py --path "$run" --compare --num-images 32 --batch-size 32 --repeats 5 \
  --seed 1000000 --out "$run/samples"
echo "router: $run/router.png, image error while learning: $run/held_out.png"
