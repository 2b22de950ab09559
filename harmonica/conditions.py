"""What samples are of: the classes of a model, or a list of prompts.

Either way a sample has a label (a class, or a place in the list), drawn from its seed or chosen,
and the model gets what the label stands for.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from harmonica.config import BackboneConfig
from harmonica.errors import HarmonicaError, HarmonicaWarning
from harmonica.files import is_safetensors
from harmonica.prompts import (
    BUNDLED_PROMPTS,
    EncodedPrompts,
    load_prompts,
    read_prompts,
    warn_of_cut,
)
from harmonica.text_encoder import Reading, encode_once, kept_file
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
        rows: (count,) the row of ``encoded`` of every label, one too large where it was not
            encoded; None: labels are rows.
    """

    encoded: EncodedPrompts
    size: tuple[int, int]
    rows: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.encoded.texts if self.rows is None else self.rows)

    def of(self, labels: Tensor) -> Prompts:
        rows = labels.tolist() if self.rows is None else self.rows[labels].tolist()
        return Prompts(
            self.encoded.embeddings(rows),
            self.encoded.mask[rows],
            self.encoded.null_embedding[None],
            self.encoded.null_mask[None],
            torch.tensor([self.size], dtype=torch.float32).repeat(len(rows), 1),
        )

    def content_hash(self) -> str:
        """Of the texts, and who read them how: numbers are rounded as the encoder's device does."""
        encoded = self.encoded
        read = [encoded.encoder, str(encoded.lowercased), *encoded.texts]
        return hashlib.sha256("\n".join(read).encode()).hexdigest()


@dataclass(frozen=True)
class Placeholders:
    """Some prompt, where only speed matters."""

    model: DiffusionTransformer
    count: int = 1

    def of(self, labels: Tensor) -> Condition:
        return self.model.placeholder(len(labels))

    def content_hash(self) -> None:
        return None


# Labels that will be asked for, of so many that there are.
Wanted = Callable[[int], Tensor]


def _prompts(
    config: BackboneConfig, size: tuple[int, int], device: torch.device, wanted: Wanted | None
) -> PromptList:
    """The prompts that the flags name, or those of the project, encoded unless they are already."""
    spec, path = MODELS[config.model], config.prompts or BUNDLED_PROMPTS
    if config.prompt is None and path.is_file() and is_safetensors(path):
        return PromptList(load_prompts(path), size)
    texts = [config.prompt] if config.prompt is not None else read_prompts(path)
    reading = Reading.of(spec, config.text_encoder)
    if wanted is None or kept_file(texts, reading).is_file():
        return PromptList(encode_once(texts, reading, device), size)
    labels = wanted(len(texts)).unique()
    rows = torch.full((len(texts),), len(labels))
    rows[labels] = torch.arange(len(labels))
    some = [texts[label] for label in labels.tolist()]
    return PromptList(encode_once(some, reading, device), size, rows)


def _check_encoded(encoded: EncodedPrompts, config: BackboneConfig) -> None:
    """Refuse prompts of another shape than the model takes; warn of others that it was not
    trained with.

    Raises:
        HarmonicaError: they are.
    """
    spec = MODELS[config.model]
    tokens, channels = len(encoded.null_mask), encoded.tokens.shape[1]
    expected = (spec.config.max_tokens, spec.config.caption_channels)
    if (tokens, channels) != expected:
        raise HarmonicaError(
            f"the prompts were encoded by {encoded.encoder} to {tokens} tokens of {channels} "
            f"channels, and --model {config.model} takes {expected[0]} of {expected[1]}; encode "
            "them for this model"
        )
    if encoded.encoder != config.text_encoder:
        warnings.warn(
            f"the prompts were encoded by {encoded.encoder}, not by {config.text_encoder}: --model "
            f"{config.model} may not understand them; encode them again, or pass --text-encoder "
            f"{encoded.encoder} if it is the same",
            HarmonicaWarning,
            stacklevel=3,
        )
    if encoded.lowercased != spec.lowercases_prompts:
        spelling = {True: "in lower case", False: "as written"}
        warnings.warn(
            f"the prompts were encoded {spelling[encoded.lowercased]}, and --model {config.model} "
            f"wants them {spelling[spec.lowercases_prompts]}; encode them again",
            HarmonicaWarning,
            stacklevel=3,
        )


def load_conditions(
    config: BackboneConfig,
    size: tuple[int, int],
    device: torch.device,
    wanted: Wanted | None = None,
) -> Classes | PromptList:
    """What the samples of a configuration can be of. A text encoder is gone when this returns.

    Args:
        size: height and width of the images in pixels.
        wanted: prompts that are not encoded yet are so only at these labels; None: all.

    Raises:
        HarmonicaError: no prompts for a model of text, or prompts encoded for another model.
    """
    spec = MODELS[config.model]
    if spec.text_encoder is None:
        classes = spec.config.num_classes if config.num_classes is None else config.num_classes
        return Classes(max(1, classes))
    prompts = _prompts(config, size, device, wanted)
    _check_encoded(prompts.encoded, config)
    warn_of_cut(prompts.encoded)
    return prompts
