"""What tensors take at their peak, of fake ones too, which have a size and no content."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Counts the bytes of what is made while it is entered; workspaces of kernels are not seen.

    Attributes:
        bytes: the most that were alive at once, what is kept for gradients included.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types, args=(), kwargs=None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self._now += size
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self._now -= size
