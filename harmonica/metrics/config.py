"""What is judged, by what and against what: flags, presets, and the record."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from harmonica.metrics import EXTRACTORS, METRICS
from harmonica.options import option
from harmonica.sample_config import ReplayConfig


@dataclass(frozen=True)
class EvaluateConfig(ReplayConfig):
    """How good images are: files, or sampled with a router or without.

    Prompts are what a model of text samples, image i of prompt i, and what the CLIP score is of.
    """

    READS_PROMPTS: ClassVar[bool] = True

    samples: Path | None = option(
        None, "images to judge: npz with arr_0 (N, H, W, 3) uint8, or a folder"
    )
    uncached: bool = option(False, "or sample them from the backbone without a cache")
    num_images: int | None = option(
        None,
        "images to sample (default: 5000), or the first so many of --samples (default: all)",
        aliases=("--num-samples",),
        low=1,
    )
    seed: int = option(
        1_000_000, "seed of noise and labels, apart from training's", low=0, high=2**32
    )
    batch_size: int = option(64, "images per forward", low=1)
    reference: str | None = option(
        None,
        "npz of statistics (mu, sigma, mu_s, sigma_s) or images (arr_0) or both, a folder, or "
        "cifar10, the default for images of the bundled backbone's size",
    )
    metrics: tuple[str, ...] | None = option(
        None, "default: all that the reference allows", choices=METRICS, many=True
    )
    extractor: str | None = option(
        None,
        "network whose features are compared; default: the one of the reference, else cifar for "
        "images of the bundled backbone's size, else inception",
        choices=EXTRACTORS,
    )
    against: Path | None = option(
        None,
        "npz or folder of uncached images of the same seeds, for PSNR, SSIM and LPIPS; default "
        "with --path and --method: sampled too",
    )
    clip_model: str = option(
        "openai/clip-vit-large-patch14", "CLIP of the Hub or a folder; its name is part of a score"
    )
    out: Path = option(Path("evaluation"), "folder for the report")

    def __post_init__(self):
        super().__post_init__()
        if self.samples is None and self.num_images is None:
            object.__setattr__(self, "num_images", 5000)
