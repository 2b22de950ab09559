"""Prompts as the condition of a text-to-image model."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts of n samples, and the one of their unconditional halves.

    It is indexed, moved and copied like the Tensor of labels that it stands in the place of.

    Attributes:
        embeddings: (n, L, c).
        mask: (n, L) bool, True at the tokens of a prompt; at least one in every row.
        null_embedding: (1, L, c), of the empty prompt.
        null_mask: (1, L) bool.
        size: (n, 2) float32, height and width in pixels, the micro-condition of models that take
            one.
    """

    embeddings: Tensor
    mask: Tensor
    null_embedding: Tensor
    null_mask: Tensor
    size: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, places: Any) -> "Prompts":
        return Prompts(
            self.embeddings[places],
            self.mask[places],
            self.null_embedding,
            self.null_mask,
            self.size[places],
        )

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, spec.name) for spec in fields(self)]

    def to(self, device: torch.device) -> "Prompts":
        return Prompts(*(tensor.to(device) for tensor in self._tensors()))

    def clone(self) -> "Prompts":
        return Prompts(*(tensor.clone() for tensor in self._tensors()))

    def copy_(self, other: "Prompts") -> "Prompts":
        """Take over the other's values, in place; for graphs that were captured on this."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs)
        return self

    def with_null(self) -> "Prompts":
        """Of 2n rows: these prompts, then the empty one for each of them."""
        rows = len(self)
        return Prompts(
            torch.cat([self.embeddings, self.null_embedding.expand(rows, -1, -1)]),
            torch.cat([self.mask, self.null_mask.expand(rows, -1)]),
            self.null_embedding,
            self.null_mask,
            self.size.repeat(2, 1),
        )
