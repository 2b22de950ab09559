"""The command-line programs: parse, resolve the configuration, call one function."""

from pathlib import Path

from harmonica.config import (
    CommandParser,
    EvaluateConfig,
    SampleConfig,
    TrainConfig,
    parse,
)
from harmonica.errors import HarmonicaError, run_command
from harmonica.files import sha256
from models import MODELS


@run_command
def train() -> None:
    config = parse(TrainConfig, "Train a caching router by step-wise denoising (HarmoniCa).")
    from harmonica.trainer import Trainer  # heavy; not needed for --help and --dry-run

    directory = Trainer(config).run()
    if directory is not None:
        print(f"router and pictures: {directory.path}")


@run_command
def sample() -> None:
    config = parse(SampleConfig, "Sample with and without a caching router.")
    from harmonica.report import sample_and_report

    print(sample_and_report(config))


@run_command
def evaluate() -> None:
    config = parse(EvaluateConfig, "Compare routers with baselines at equal cost.")
    from harmonica.evaluation import evaluate_and_report

    print(evaluate_and_report(config))


@run_command
def download() -> None:
    from harmonica.downloads import fetch

    parser = CommandParser(description="Fetch published weights.")
    parser.add_argument("model", nargs="?", help="model of the zoo with published weights")
    parser.add_argument("--image-size", type=int, help="default: the model's")
    parser.add_argument("--list", action="store_true", help="show what there is and its state")
    arguments = parser.parse_args()
    if arguments.list or arguments.model is None:
        print(listing())
        return
    spec = MODELS.get(arguments.model)
    size = arguments.image_size or (spec.image_size if spec else 0)
    source = spec.weights.get(size) if spec else None
    if source is None:
        known = [f"{m.name} --image-size {s}" for m in MODELS.values() for s in m.weights]
        raise HarmonicaError(
            f"no weights are published for {arguments.model} at --image-size {size}; there are "
            f"{', '.join(known)}"
        )
    path = source if isinstance(source, Path) else fetch(source)
    print(f"{path}  sha256 {sha256(path)}")


def listing() -> str:
    """One line per model with weights: name, image size, where it is."""
    from harmonica.downloads import CACHE, state

    return "\n".join(
        f"{spec.name:10} {size:5} px  {state(source, CACHE)}"
        for spec in MODELS.values()
        for size, source in spec.weights.items()
    )
