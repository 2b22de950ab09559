"""The one way in which caching enters a model.

A transformer block is a sum of residual updates ``x + gate * f(norm(x))``; each ``f`` is a
*branch*. A model does not decide whether a branch runs: it calls the Branch object that it was
handed, with the function and its input. Plain sampling hands in :func:`compute` everywhere;
training and replay hand in the caching branches of ``harmonica.cache``.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Branch(Protocol):
    """``branch(fn, x)`` returns ``fn(x)`` or something in its place, of the same shape."""

    def __call__(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor: ...


def compute(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The branch that always computes."""
    return fn(x)
