"""Distance of images to others of the same seeds, a number per image: PSNR, SSIM, LPIPS."""

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from harmonica.downloads import CACHE, verify
from harmonica.errors import HarmonicaError
from harmonica.files import first_line, read_torch
from harmonica.image_error import ImageError
from harmonica.metrics.collect import Rows
from harmonica.metrics.images import Batch
from harmonica.metrics.weights import METRIC_WEIGHTS
from harmonica.precision import single_precision


class Lpips:
    """LPIPS v0.1 with AlexNet (Zhang et al., 2018), through torchmetrics.

    Attributes:
        sha256: of the AlexNet weights; those of the layers on top come with torchmetrics.
    """

    name = "alex"

    def __init__(self, weights: dict[str, Tensor], sha256: str, device: torch.device):
        self.sha256, self._device = sha256, device
        # The public class downloads AlexNet on its own; this one is given what was verified.
        from torchmetrics.image.lpip import _NoTrainLpips

        network = _NoTrainLpips(net="alex", pnet_rand=True)
        network.net.load_state_dict(
            {
                name: weights["features." + name.split(".", 1)[1]]
                for name in network.net.state_dict()
            }
        )
        self._network: nn.Module = network.to(device)

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """(n,), from images (n, 3, H, W) in [0, 1]."""
        pair = (images.to(self._device), reference.to(self._device))
        with single_precision():
            return self._network(*pair, normalize=True).flatten().cpu()


def load_lpips(device: torch.device) -> Lpips | None:
    """LPIPS if its weights are on disk; they are never downloaded from here.

    Raises:
        HarmonicaError: the file there is another one.
    """
    source = METRIC_WEIGHTS["lpips"]
    path = CACHE / source.file
    if not path.is_file():
        return None
    digest = verify(path, source.sha256)
    try:
        return Lpips(read_torch(path), digest, device)
    except (KeyError, RuntimeError) as error:
        raise HarmonicaError(f"{path} does not fit ({first_line(error)}); fetch it again") from None


def lpips_left_out() -> str:
    """Why there is no LPIPS, when there is none."""
    source = METRIC_WEIGHTS["lpips"]
    return (
        f"{source.file} is not in {CACHE}; fetch it with `download.py {source.arguments}` or copy "
        "it there"
    )


def paired_rows(batch: Batch, reference: Batch, lpips: Lpips | None) -> Rows:
    """Per image: "psnr" in dB, "ssim", "lpips" if given, and "mse" on the model's own scale where
    both were sampled."""
    images, others = batch.images.float() / 255, reference.images.float() / 255
    sampled = batch.latents is not None and reference.latents is not None
    latents = (batch.latents, reference.latents) if sampled else (images, others)
    error = ImageError.between(*latents, images, others)
    ssim = structural_similarity_index_measure(images, others, data_range=1.0, reduction="none")
    rows = {"psnr": torch.tensor(error.psnr), "ssim": ssim.reshape(len(images))}
    if lpips is not None:
        rows["lpips"] = lpips(images, others)
    if sampled:
        rows["mse"] = torch.tensor(error.mse)
    return rows
