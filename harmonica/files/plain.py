"""What a file gave, in plain types and in proportion to the file."""

import argparse
from typing import Any

import torch
from torch import Tensor

# How much may come out for a byte of a file: tensors may share numbers, and things their names.
MOST_PER_BYTE = 4


def plain(content: Any, size: int) -> Any:
    """A copy without subclasses and attributes, in which nothing is shared but tensors' numbers.

    Args:
        size: of the file, in bytes.

    Raises:
        ValueError: it is much larger than that, or holds tensors without numbers.
        RecursionError: it holds itself.
    """
    return _Copy(MOST_PER_BYTE * (1 + size)).of(content)


class _Copy:
    """Makes copies; ``room`` is how many bytes they may take."""

    def __init__(self, room: int):
        self._room = room

    def _take(self, amount: int) -> None:
        self._room -= amount
        if self._room < 0:
            raise ValueError("more comes out of it than it holds")

    def of(self, value: Any) -> Any:
        self._take(1)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, str | bytes):
            self._take(len(value))
        elif isinstance(value, dict):  # whose own methods may be hidden by attributes
            return {self.of(key): self.of(item) for key, item in dict.items(value)}
        elif isinstance(value, list):
            return [self.of(item) for item in value]
        elif type(value) is tuple:
            return tuple(self.of(item) for item in value)
        elif isinstance(value, argparse.Namespace):
            return argparse.Namespace(**self.of(vars(value)))
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        is_plain = value.layout == torch.strided and value.device.type == "cpu"
        if type(value) not in (Tensor, torch.nn.Parameter) or not is_plain:
            raise ValueError("it holds tensors without numbers of their own")
        self._take(Tensor.numel(value) * Tensor.element_size(value))
        return Tensor.detach(value)
