"""Images that a backbone samples, as a set like any other; only the batch at hand is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from harmonica.backbone import Backbone
from harmonica.conditions import PromptList
from harmonica.engine import Engine
from harmonica.metrics.images import Batch
from harmonica.randomness import Draws
from harmonica.sampling import check_finite, eight_bit, sample
from harmonica.schedule import Schedule


@dataclass(frozen=True)
class SampledImages:
    """The images of ``count`` seeds, with classes drawn from them, or of prompts in their order.

    Attributes:
        schedule: None computes everything.
        decode: latents to images (n, 3, H, W) in [0, 1].
    """

    name: str
    backbone: Backbone
    schedule: Schedule | None
    decode: Callable[[Tensor], Tensor]
    seed: int
    count: int

    @cached_property
    def _engine(self) -> Engine:
        """One for all batches: what it captured is used again."""
        return Engine(self.schedule, self.backbone.how)

    @property
    def size(self) -> tuple[int, int]:
        return self.backbone.pixels

    def labels(self, indices: range) -> Tensor | None:
        """Image i is of prompt i; None draws classes."""
        if isinstance(self.backbone.conditions, PromptList):
            return torch.tensor(indices) % self.backbone.conditions.count
        return None

    def texts(self) -> list[str] | None:
        """The prompt of every image, of models that take them."""
        if not isinstance(self.backbone.conditions, PromptList):
            return None
        known = self.backbone.conditions.encoded.texts
        return [known[label] for label in self.labels(range(self.count)).tolist()]

    def __len__(self) -> int:
        return self.count

    def read(self, indices: range) -> Batch:
        """Sample these; pixels are rounded to 8 bits, as image files would have them.

        Raises:
            HarmonicaError: an image is not finite.
        """
        draws = Draws(self.seed, "sample")
        latents = sample(
            self.backbone,
            self.schedule,
            draws,
            indices,
            self.labels(indices),
            batch_size=max(1, len(indices)),
            engine=self._engine,
        )
        images = self.decode(latents)
        check_finite(latents, images, indices, self.name)
        return Batch(eight_bit(images), latents)

    def content_hash(self) -> None:
        return None
