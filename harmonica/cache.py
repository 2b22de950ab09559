"""The two caching branches: Blend, for training, and Replay, which decides.

Both stand on a :class:`Cache`, which holds the last value of every branch along one trajectory
and is dropped with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.branch import Branch

MASKS = ("soft", "hard")


class Predictor(Protocol):
    """What a skipped branch returns, from the values computed before.

    Attributes:
        depth: how many computed values the cache must keep.
    """

    depth: int

    def __call__(self, values: tuple[Tensor, ...]) -> Tensor: ...


class LastValue:
    """The published predictor: the last computed value, unchanged."""

    depth = 1

    def __call__(self, values: tuple[Tensor, ...]) -> Tensor:
        return values[-1]


class Cache:
    """Computed values per branch along one trajectory, oldest first, at most ``predictor.depth``.

    Tensors in it are never written in place: ``branched`` copies references only.
    """

    def __init__(self, num_branches: int, predictor: Predictor | None = None):
        self.predictor = predictor or LastValue()
        self._values: list[tuple[Tensor, ...]] = [()] * num_branches

    def __len__(self) -> int:
        return len(self._values)

    def store(self, i: int, value: Tensor) -> None:
        self._values[i] = (*self._values[i], value)[-self.predictor.depth :]

    def predict(self, i: int) -> Tensor:
        return self.predictor(self._values[i])

    def is_empty(self, i: int) -> bool:
        return not self._values[i]

    def branched(self) -> "Cache":
        """A cache with the same values that goes its own way from here."""
        other = Cache(len(self), self.predictor)
        other._values = list(self._values)
        return other


class Replay:
    """Hard choice: compute and store, or return what the predictor makes of the cache."""

    def __init__(self, cache: Cache, i: int, computes: bool):
        self.cache, self.i, self.computes = cache, i, computes

    def __call__(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self.computes:
            return self.cache.predict(self.i)
        value = fn(x)
        self.cache.store(self.i, value)
        return value


class Blend:
    """Soft choice, HarmoniCa eq. 3: ``weight * f(x) + (1 - weight) * cached``.

    Gradients reach ``weight`` but not the cache: what is stored is detached. Where nothing is
    cached yet the branch computes plainly.

    Args:
        weight: () router score in [0, 1], differentiable.
        replaces: whether the cache takes a new value (score above the threshold).
        stores_fresh: store f(x), as in replay, rather than the blend, as published.
    """

    def __init__(self, cache: Cache, i: int, weight: Tensor, replaces: bool, stores_fresh: bool):
        self.cache, self.i, self.weight = cache, i, weight
        self.replaces, self.stores_fresh = replaces, stores_fresh

    def __call__(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        value = fn(x)
        blended = value
        if not self.cache.is_empty(self.i):
            cached = self.cache.predict(self.i)
            weight = self.weight.to(value.dtype)
            blended = weight * value + (1 - weight) * cached
        if self.replaces:
            self.cache.store(self.i, (value if self.stores_fresh else blended).detach())
        return blended


def computing_branches(cache: Cache) -> list[Branch]:
    """Branches of a step that computes everything and fills the cache."""
    return replay_branches(cache, [True] * len(cache))


def replay_branches(cache: Cache, row: Sequence[bool]) -> list[Branch]:
    """One Replay per branch for a step whose schedule row is ``row``."""
    return [Replay(cache, i, bool(computes)) for i, computes in enumerate(row)]


@dataclass(frozen=True)
class Masking:
    """How router scores act in the student along one trajectory.

    Attributes:
        computes: (T, N) bool, what counts as computed, so that its value enters the cache; known
            before the trajectory starts, so that nothing is read back from the device on the way.
        kind: "soft" blends with the score, as published; "hard" decides, as replay will, and
            passes the gradient straight through to the score.
        stores_fresh: with "soft", store the computed value rather than the (published) blend.
    """

    computes: np.ndarray
    kind: str
    stores_fresh: bool

    def branches(self, cache: Cache, s: int, logits: Tensor) -> list[Branch]:
        """Branches of step s, whose router row is ``logits`` (N,)."""
        weights = logits.sigmoid()
        if self.kind == "hard":
            decided = torch.tensor(self.computes[s], dtype=weights.dtype, device=weights.device)
            weights = decided + (weights - weights.detach())
        return [
            Blend(cache, i, weight, bool(replaces), self.stores_fresh)
            for i, (weight, replaces) in enumerate(
                zip(weights.unbind(), self.computes[s], strict=True)
            )
        ]
