"""The Inception network of the TensorFlow evaluation suites, with the features of sFID."""

import io

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from harmonica.metrics.collect import Rows
from harmonica.precision import single_precision

SPATIAL_CHANNELS = 7


class Inception:
    """2048 pooled features, 2023 spatial ones, and 1008 logits without bias.

    Source: the evaluation suite of ADM (Dhariwal & Nichol, 2021); spatial features are those of
    Nash et al. (2021), the first 7 channels of ``mixed_6/conv`` in NHWC order.
    """

    name, suffix, image_size = "inception", "", None
    pooled_size, spatial_size = 2048, SPATIAL_CHANNELS * 17 * 17

    def __init__(self, weights: dict[str, Tensor], sha256: str, device: torch.device):
        self.sha256, self._device = sha256, device
        # The library unpickles what it is given, so it is given our own copy of plain tensors.
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        buffer.seek(0)
        self._network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
        ).to(device)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._map: Tensor | None = None

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._map = output[:, :SPATIAL_CHANNELS]

    def __call__(self, images: Tensor) -> Rows:
        """Rows of images (n, 3, H, W) uint8; the network resizes them itself."""
        with single_precision():
            pooled, logits = self._network(images.to(self._device))
        spatial = self._map.permute(0, 2, 3, 1).flatten(1)  # (n, 7, 17, 17) to (n, 17 * 17 * 7)
        return {"pooled": pooled, "spatial": spatial, "logits": logits}
