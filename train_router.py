"""Train a caching router: `python train_router.py`, or torchrun for several processes."""

from harmonica.config import TrainConfig, parse
from harmonica.errors import run_command


def train() -> None:
    config = parse(TrainConfig, "Train a caching router by step-wise denoising (HarmoniCa).")
    from harmonica.trainer import Trainer  # heavy; not needed for --help and --dry-run

    directory = Trainer(config).run()
    if directory is not None:
        print(f"router and pictures: {directory.path}")


def main() -> None:
    run_command(train)


if __name__ == "__main__":
    main()
