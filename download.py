"""Fetch published weights: `python download.py DiT-XL/2 --image-size 512`."""

from pathlib import Path

from harmonica.config import CommandParser
from harmonica.downloads import CACHE, fetch, state, verify
from harmonica.errors import HarmonicaError, run_command
from models import MODELS


def download() -> None:
    parser = CommandParser(description="Fetch published weights into checkpoints/.")
    parser.add_argument("model", nargs="?", help="model of the zoo with published weights")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--list", action="store_true", help="show what there is and its state")
    arguments = parser.parse_args()
    if arguments.list or arguments.model is None:
        print(listing())
        return
    spec = MODELS.get(arguments.model)
    source = spec.weights.get(arguments.image_size) if spec else None
    if source is None:
        known = [f"{m.name} --image-size {s}" for m in MODELS.values() for s in m.weights]
        raise HarmonicaError(
            f"no weights are published for {arguments.model} at --image-size "
            f"{arguments.image_size}; there are {', '.join(known)}"
        )
    path = source if isinstance(source, Path) else fetch(source)
    print(f"{path}  sha256 {verify(path)}")


def listing() -> str:
    """One line per model with weights: name, image size, where it is."""
    return "\n".join(
        f"{spec.name:10} {size:5} px  {state(source, CACHE)}"
        for spec in MODELS.values()
        for size, source in spec.weights.items()
    )


def main() -> None:
    run_command(download)


if __name__ == "__main__":
    main()
