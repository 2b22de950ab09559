#!/usr/bin/env bash
# Nightly: many rounds of every fault, 10,000 spoilt files, and a table of what was survived.
# ROUNDS sets the rounds of each random fault (default 20). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install_project "[test]"

export HF_HUB_OFFLINE=1 WANDB_MODE=offline
echo "$(nproc) cores of $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1), $(date -u +%F)"
exec .venv/bin/python -m pytest tests/test_resume.py tests/test_shards.py tests/test_files.py \
  tests/test_faults.py --soak "$@"
