"""CLIP score: how well images fit the prompts that they were made from."""

import torch
from torch import Tensor

from harmonica.errors import HarmonicaError
from harmonica.files import first_line
from harmonica.hub import whole
from harmonica.precision import single_precision
from harmonica.weights import state_sha256


class ClipScore:
    """100 max(cos(image, text), 0) with one CLIP (Hessel et al., 2021).

    There is no agreed CLIP, so a score is worth nothing without ``name``.

    Attributes:
        sha256: of the weights as loaded.
        truncated: number of prompts that are longer than the text encoder reads.
    """

    def __init__(self, name: str, prompts: list[str], device: torch.device):
        """Load a CLIP of the Hub or of a folder.

        Raises:
            HarmonicaError: transformers is not installed, or there is no such CLIP.
        """
        try:
            from transformers import CLIPModel, CLIPProcessor  # heavy, and only prompts need it
        except ImportError:
            raise HarmonicaError(
                "--prompts needs transformers; install the project with its extra [text]"
            ) from None
        try:
            loaded = CLIPModel.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
            self._model = whole(loaded, may_hold_more=True).eval().to(device)
            self._processor = CLIPProcessor.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # what is wrong in a config fails wherever it is first used
            raise HarmonicaError(
                f"--clip-model {name} cannot be loaded ({first_line(error, 160)}); run `hf "
                f"download {name}` where there is a network, or pass the path of a whole copy"
            ) from None
        self.name, self._prompts, self._device = name, prompts, device
        self._longest = self._model.config.text_config.max_position_embeddings
        lengths = [len(self._processor.tokenizer(prompt).input_ids) for prompt in prompts]
        self.truncated = sum(length > self._longest for length in lengths)
        self.sha256 = state_sha256(self._model.state_dict())

    def __call__(self, images: Tensor, indices: range) -> Tensor:
        """Scores (n,) of images (n, 3, H, W) uint8 with the prompts of these indices."""
        inputs = self._processor(
            text=[self._prompts[i] for i in indices],
            images=[image.permute(1, 2, 0).numpy() for image in images],
            return_tensors="pt",
            # To one length, so that a score does not depend on the batch.
            padding="max_length",
            max_length=self._longest,
            truncation=True,
        )
        with single_precision():
            output = self._model(**inputs.to(self._device))
        cosine = (output.image_embeds * output.text_embeds).sum(dim=1)
        return 100 * cosine.clamp(min=0)
