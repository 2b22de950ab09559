"""How far cached images are from uncached ones: `python evaluate.py --path RUN`."""

from harmonica.config import EvaluateConfig, parse
from harmonica.errors import run_command


def evaluate() -> None:
    config = parse(EvaluateConfig, "Compare routers with baselines at equal cost.")
    from harmonica.evaluation import evaluate_and_report  # heavy; not needed for --help

    print(evaluate_and_report(config))


def main() -> None:
    run_command(evaluate)


if __name__ == "__main__":
    main()
