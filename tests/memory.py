"""What tensors take at their peak, of fake ones too, which have a size and no content."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Counts the bytes of what is made while it is entered; workspaces of kernels are not seen.

    Attributes:
        bytes: the most that were alive at once.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self._alive = 0
        self._tensors: Counter[int] = Counter()  # of every storage

    def __torch_dispatch__(self, function: Any, types, args=(), kwargs=None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), tensor)
        return made

    def _add(self, storage: torch.UntypedStorage, tensor: Tensor) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._tensors[key] += 1
        if self._tensors[key] == 1:
            self._alive += size
            self.bytes = max(self.bytes, self._alive)
        weakref.finalize(tensor, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            self._alive -= size
