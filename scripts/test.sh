#!/usr/bin/env bash
# Install with the test extra, then ruff and the test suite, a process per core. Arguments go to
# pytest: `-m slow` runs the tests that take long, `-m "slow or not slow"` all of them. A GPU is
# hidden from those; `-m gpu --numprocesses 1` runs the ones that need it, one at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install_project "[test]"

# One thread per process: with more they would fight for the cores.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest --numprocesses auto --dist worksteal "$@"
