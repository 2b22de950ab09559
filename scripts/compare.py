"""Compare all methods at equal cost.

    python scripts/compare.py --config configs/compare_demo.yaml

Finished cells are kept in ``--out`` and not computed again; ``--quick`` takes a few minutes.
"""

from harmonica.comparison.config import CompareConfig
from harmonica.comparison.run import Comparison
from harmonica.errors import run_command
from harmonica.options import parse


@run_command
def main() -> None:
    config = parse(CompareConfig, "Compare caching methods with each other and with fewer steps.")
    print(Comparison(config).run())


if __name__ == "__main__":
    main()
