"""What samples are of: the classes of a model, or a list of prompts.

Either way a sample has a label (a class, or a place in the list), drawn from its seed or chosen,
and the model gets what the label stands for.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from harmonica.config import BackboneConfig
from harmonica.errors import HarmonicaError
from harmonica.files import is_safetensors
from harmonica.prompts import (
    BUNDLED_PROMPTS,
    EncodedPrompts,
    encode_prompts,
    load_prompts,
    read_prompts,
)
from models import MODELS
from models.prompts import Prompts
from models.transformer import Condition, DiffusionTransformer


class Conditions(Protocol):
    """Labels and what they stand for.

    Attributes:
        count: labels are 0 to count - 1.
    """

    count: int

    def of(self, labels: Tensor) -> Condition:
        """What the model takes for labels (n,), on the CPU."""
        ...

    def content_hash(self) -> str | None:
        """sha256 of what labels stand for; None where that is the model's affair."""
        ...


@dataclass(frozen=True)
class Classes:
    """The classes of a model; an unconditional one has a single class, which it does not see."""

    count: int

    def of(self, labels: Tensor) -> Tensor:
        return labels

    def content_hash(self) -> None:
        return None


@dataclass(frozen=True)
class PromptList:
    """Encoded prompts.

    Attributes:
        size: height and width of the images in pixels.
    """

    encoded: EncodedPrompts
    size: tuple[int, int]

    @property
    def count(self) -> int:
        return len(self.encoded.texts)

    def of(self, labels: Tensor) -> Prompts:
        return Prompts(
            self.encoded.embeddings[labels],
            self.encoded.mask[labels],
            self.encoded.null_embedding[None],
            self.encoded.null_mask[None],
            torch.tensor([self.size], dtype=torch.float32).repeat(len(labels), 1),
        )

    def content_hash(self) -> str:
        encoded = self.encoded
        digest = hashlib.sha256("\n".join(encoded.texts).encode())
        kept = (
            encoded.embeddings[encoded.mask],
            encoded.mask,
            encoded.null_embedding[encoded.null_mask],
            encoded.null_mask,
        )
        for tensor in kept:
            digest.update(tensor.half().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Placeholders:
    """Some prompt, where only speed matters."""

    model: DiffusionTransformer
    count: int = 1

    def of(self, labels: Tensor) -> Condition:
        return self.model.placeholder(len(labels))

    def content_hash(self) -> None:
        return None


def _encoded(config: BackboneConfig, device: torch.device) -> EncodedPrompts:
    """The prompts that the flags name, or those of the project, encoded unless they are already."""
    spec, path = MODELS[config.model], config.prompts or BUNDLED_PROMPTS
    if config.prompt is None and path.is_file() and is_safetensors(path):
        return load_prompts(path)
    texts = [config.prompt] if config.prompt is not None else read_prompts(path)
    encoder = config.text_encoder
    return encode_prompts(texts, encoder, device, spec.config.max_tokens, progress="prompts")


def load_conditions(
    config: BackboneConfig, size: tuple[int, int], device: torch.device
) -> Classes | PromptList:
    """What the samples of a configuration can be of. A text encoder is gone when this returns.

    Args:
        size: height and width of the images in pixels.

    Raises:
        HarmonicaError: no prompts for a model of text, or prompts encoded for another model.
    """
    spec = MODELS[config.model]
    if spec.text_encoder is None:
        classes = spec.config.num_classes if config.num_classes is None else config.num_classes
        return Classes(max(1, classes))
    encoded = _encoded(config, device)
    tokens, channels = encoded.embeddings.shape[1:]
    expected = (spec.config.max_tokens, spec.config.caption_channels)
    if (tokens, channels) != expected:
        raise HarmonicaError(
            f"the prompts were encoded by {encoded.encoder} to {tokens} tokens of {channels} "
            f"channels, and --model {config.model} takes {expected[0]} of {expected[1]}; encode "
            "them for this model"
        )
    return PromptList(encoded, size)
