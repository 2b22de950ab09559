"""Compare methods at equal cost.

    python scripts/compare.py --config configs/compare_demo.yaml

Finished cells are kept in ``--out`` and not computed again; ``--quick`` takes a few minutes.
"""

import os

from harmonica.comparison.config import CompareConfig
from harmonica.comparison.run import Comparison
from harmonica.errors import HarmonicaError, run_command
from harmonica.options import parse


@run_command
def main() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise HarmonicaError("scripts/compare.py is one process; start it without torchrun")
    config = parse(CompareConfig, "Compare caching methods with each other and with fewer steps.")
    print(Comparison(config).run())


if __name__ == "__main__":
    main()
