"""The command-line programs: parse, resolve the configuration, call one function."""

import os
from pathlib import Path

from harmonica.errors import HarmonicaError, run_command
from harmonica.metrics.config import EvaluateConfig
from harmonica.metrics.weights import METRIC_WEIGHTS
from harmonica.options import CommandParser, parse
from harmonica.sample_config import SampleConfig
from harmonica.training.config import TrainConfig
from models import HUB_PARTS, MODELS, T5, HubFolder, WeightSource


@run_command
def train() -> None:
    config = parse(TrainConfig, "Train a caching router.")
    from harmonica.training.trainer import Trainer  # heavy; not needed for --help and --dry-run

    directory = Trainer(config).run()
    if directory is not None:
        print(f"router and pictures: {directory.path}")


@run_command
def sample() -> None:
    config = parse(SampleConfig, "Sample with and without a caching router.")
    if config.num_samples is not None:
        from harmonica.many_samples import sample_many

        said = sample_many(config)
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise HarmonicaError(
            "several processes share the work of --num-samples only; add it, or start one process"
        )
    else:
        from harmonica.report import sample_and_report

        said = sample_and_report(config)
    if said is not None:
        print(said)


@run_command
def evaluate() -> None:
    config = parse(EvaluateConfig, "Judge images by FID, sFID, IS, precision, recall and more.")
    from harmonica.evaluation import evaluate_and_report

    table = evaluate_and_report(config)
    if table is not None:
        print(table)


@run_command
def download() -> None:
    from harmonica.downloads import fetch, verify

    parser = CommandParser(description="Fetch published weights.")
    parts = ", ".join([*HUB_PARTS, *METRIC_WEIGHTS])
    parser.add_argument("model", nargs="?", help=f"model of the zoo, or one of {parts}")
    parser.add_argument("--image-size", type=int, help="default: the model's")
    parser.add_argument("--list", action="store_true", help="show what there is and its state")
    arguments = parser.parse_args()
    if arguments.list or arguments.model is None:
        print(listing())
        return
    source = published(arguments.model, arguments.image_size)
    if isinstance(source, HubFolder):
        from harmonica.hub import fetch_part

        print(fetch_part(source))
    elif isinstance(source, Path):
        print(f"{source}  sha256 {verify(source)}")
    else:
        path = fetch(source)
        print(f"{path}  sha256 {verify(path, source.sha256)}")


def published(name: str, image_size: int | None) -> WeightSource | HubFolder | Path:
    """Where the weights of a model, of its autoencoder or text encoder, or of a network that
    metrics look through, come from.

    Raises:
        HarmonicaError: from nowhere.
    """
    others = {**METRIC_WEIGHTS, **HUB_PARTS}
    if name in others and image_size is None:
        return others[name]
    spec = MODELS.get(name)
    size = image_size or (spec.image_size if spec else 0)
    source = spec.weights.get(size) if spec else None
    if source is None:
        known = [f"{m.name} --image-size {s}" for m in MODELS.values() for s in m.weights]
        raise HarmonicaError(
            f"no weights are published for {name} at --image-size {size}; there are "
            f"{', '.join([*known, *others])}"
        )
    return source


def listing() -> str:
    """One line per checkpoint: name, image size of a model or kind of a part, where it is."""
    from harmonica.downloads import CACHE, state
    from harmonica.hub import state_of_part

    rows = [
        (spec.name, f"{size} px", state(source, CACHE))
        for spec in MODELS.values()
        for size, source in spec.weights.items()
    ]
    for name, part in HUB_PARTS.items():
        kind = "text" if part is T5 else "decoder"
        rows.append((name, kind, state_of_part(part)))
    rows += [(name, "metrics", state(source, CACHE)) for name, source in METRIC_WEIGHTS.items()]
    width = max(len(name) for name, *_ in rows)
    return "\n".join(f"{name:{width}} {kind:>8}  {where}" for name, kind, where in rows)
