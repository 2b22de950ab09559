"""Distance of images to those of the same seeds without a cache."""

import math
import statistics
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageError:
    """Distance of images to those of the same seeds without the cache, one entry per seed.

    ``mse`` is on the model's own scale, latents or pixels in [-1, 1]; ``psnr`` is on images in
    [0, 1], in dB.
    """

    mse: tuple[float, ...]
    psnr: tuple[float, ...]

    @classmethod
    def between(
        cls, latents: Tensor, reference: Tensor, images: Tensor, reference_images: Tensor
    ) -> "ImageError":
        """From latents (n, C, h, w) and images (n, 3, H, W)."""
        errors = (latents - reference).square().flatten(1).mean(1)
        pixel = (images - reference_images).square().flatten(1).mean(1).clamp(min=1e-12)
        return cls(tuple(errors.tolist()), tuple((-10 * pixel.log10()).tolist()))

    @property
    def mse_mean(self) -> float:
        return statistics.fmean(self.mse)

    @property
    def mse_median(self) -> float:
        return statistics.median(self.mse)

    @property
    def psnr_mean(self) -> float:
        return statistics.fmean(self.psnr)

    def to_dict(self) -> dict:
        return {
            "mse_mean": self.mse_mean,
            "mse_median": self.mse_median,
            "psnr_mean": self.psnr_mean,
            "mse": self.mse,
            "psnr": self.psnr,
        }


def readable(error: float) -> str:
    """Three significant digits, never in scientific notation."""
    if error == 0 or not math.isfinite(error):
        return f"{error:g}"
    return f"{error:.{max(0, 2 - math.floor(math.log10(error)))}f}"
