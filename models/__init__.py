"""Registry of models: name -> shapes, latent space, where weights come from."""

from dataclasses import dataclass, replace
from pathlib import Path

from models.dit import DiT, DiTConfig

BUNDLED_WEIGHTS = Path(__file__).parent / "weights" / "dit_ti4_cifar10.safetensors"

_SIZES = {
    # name: hidden size, depth, heads
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


@dataclass(frozen=True)
class WeightSource:
    """One published checkpoint.

    Attributes:
        file: its name in ``checkpoints/``.
        urls: addresses in the order in which they are tried.
        size: lower bound in bytes that tells a truncated file or an error page from a checkpoint.
        arguments: what download.py calls it.
        sha256: what the file must hash to, where that is known beforehand.
    """

    file: str
    urls: tuple[str, ...]
    size: int
    arguments: str = ""
    sha256: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """What a model name stands for.

    Attributes:
        config: shapes at the default image size and class count.
        image_size: default side in pixels.
        latent_factor: image pixels per latent pixel; 1 means that the model works in pixel space.
        weights: image size -> published weights; a Path is a file in this repository.
    """

    name: str
    config: DiTConfig
    image_size: int
    latent_factor: int
    weights: dict[int, WeightSource | Path]


def _published(size: int) -> WeightSource:
    file = f"DiT-XL-2-{size}x{size}.pt"
    return WeightSource(
        file,
        (
            f"https://dl.fbaipublicfiles.com/DiT/models/{file}",
            f"https://huggingface.co/facebook/DiT-XL-2-{size}/resolve/main/transformer/"
            "diffusion_pytorch_model.bin",
        ),
        size=2_600_000_000,
        arguments=f"DiT-XL/2 --image-size {size}",
    )


def _registry() -> dict[str, ModelSpec]:
    specs = {}
    for size, (hidden, depth, heads) in _SIZES.items():
        for patch in (2, 4, 8):
            name = f"DiT-{size}/{patch}"
            config = DiTConfig(hidden, depth, heads, patch)
            weights = {256: _published(256), 512: _published(512)} if name == "DiT-XL/2" else {}
            specs[name] = ModelSpec(name, config, 256, 8, weights)
    # The bundled backbone works on CIFAR-10 pixels.
    tiny = replace(specs["DiT-Ti/4"].config, in_channels=3, num_classes=10)
    specs["DiT-Ti/4"] = ModelSpec("DiT-Ti/4", tiny, 32, 1, {32: BUNDLED_WEIGHTS})
    return specs


MODELS = _registry()


def create_model(
    name: str,
    *,
    image_size: int | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    learn_sigma: bool = True,
) -> DiT:
    """A freshly initialised model of the zoo.

    Args:
        name: a key of ``MODELS``.
        image_size: side in pixels; must be a multiple of the latent factor.

    Raises:
        KeyError: unknown name.
        ValueError: the sizes do not fit.
    """
    spec = MODELS[name]
    size = spec.image_size if image_size is None else image_size
    if size < 1 or size % spec.latent_factor:
        raise ValueError(
            f"image size {size} is not a multiple of the latent factor {spec.latent_factor}"
        )
    return DiT(
        replace(
            spec.config,
            input_size=size // spec.latent_factor,
            in_channels=spec.config.in_channels if in_channels is None else in_channels,
            num_classes=spec.config.num_classes if num_classes is None else num_classes,
            learn_sigma=learn_sigma,
        )
    )
