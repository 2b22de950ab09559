"""The caching branches: Blend, for training; Replay, which decides; Reuse, which runs nothing.

They stand on a :class:`Cache`, which holds the last values of every branch along one trajectory
and is dropped with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harmonica.denoise import Trajectories, join_rows, part_rows
from harmonica.predictors import LAST, Predictor, combine

MASKS = ("soft", "hard")


class Cache:
    """Computed values per branch along one trajectory, as many as the predictor asks for.

    Tensors in it are never written in place: ``branched`` copies references only.
    """

    def __init__(self, num_branches: int, predictor: Predictor = LAST):
        self.predictor = predictor
        # Per branch (step, value), newest first.
        self._values: list[tuple[tuple[int, Tensor], ...]] = [()] * num_branches

    def __len__(self) -> int:
        return len(self._values)

    def store(self, i: int, s: int, value: Tensor) -> None:
        """What branch i computed at step s."""
        self._values[i] = ((s, value), *self._values[i])[: self.predictor.depth]

    def entries(self, i: int) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
        """Steps and values of branch i, newest first."""
        steps, values = zip(*self._values[i], strict=True)
        return steps, values

    def predict(self, i: int, s: int) -> Tensor:
        """What stands in for branch i at step s."""
        steps, values = self.entries(i)
        return combine(self.predictor.weights(s, i, steps), values)

    def is_empty(self, i: int) -> bool:
        return not self._values[i]

    def branched(self) -> "Cache":
        """A cache with the same values that goes its own way from here."""
        other = Cache(len(self), self.predictor)
        other._values = list(self._values)
        return other


class Replay:
    """Hard choice: compute and store, or return what the predictor makes of the cache."""

    def __init__(self, cache: Cache, i: int, s: int, computes: bool):
        self.cache, self.i, self.s, self.computes = cache, i, s, computes

    def __call__(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self.computes:
            return self.cache.predict(self.i, self.s)
        value = fn(x)
        self.cache.store(self.i, self.s, value)
        return value


class Blend:
    """Soft choice, HarmoniCa eq. 3: ``weight * f(x) + (1 - weight) * cached``.

    It only remembers what it computed: the cache is written after the step, so that a step can run
    again for its gradients, and in compiled blocks.

    Args:
        cached: what stands in for f(x); None computes plainly.
        weight: () router score in [0, 1], differentiable; of no account where nothing is cached.
        keeps_fresh: remember f(x) rather than the blend.
        is_stored: whether it is going to be asked. No affair of the call: every choice of branches
            would be another graph where that is compiled.
    """

    def __init__(
        self,
        cached: Tensor | None,
        weight: Tensor | None,
        keeps_fresh: bool = True,
        is_stored: bool = True,
    ):
        self.cached, self.weight = cached, weight
        self.keeps_fresh, self.is_stored = keeps_fresh, is_stored
        self.kept: Tensor | None = None

    def __call__(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        value = blended = fn(x)
        if self.cached is not None:
            blended = torch.lerp(self.cached, value, self.weight.to(value.dtype))
        self.kept = (value if self.keeps_fresh else blended).detach()
        return blended


class Reuse:
    """What stands in for a branch, known before the step."""

    def __init__(self, cached: Tensor):
        self.cached = cached

    def __call__(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.cached


def fill(cache: Cache, batch: Trajectories, s: int, x: Tensor) -> Tensor:
    """Guided output of a step that computes everything; its values enter the cache."""
    branches = [Blend(None, None) for _ in range(len(cache))]
    output = batch.predict(s, x, branches)
    for i, branch in enumerate(branches):
        cache.store(i, s, branch.kept)
    return output


@dataclass(frozen=True)
class Masking:
    """How router scores act in the student along one trajectory.

    Attributes:
        computes: (T, N) bool, what counts as computed, so that its value enters the cache; known
            before the trajectory starts, so that nothing is read back from the device on the way.
        kind: "soft" blends with the score, as published; "hard" decides, as replay will, and
            passes the gradient straight through to the score; "fixed" decides, and scores learn
            nothing.
        stores_fresh: with "soft", store the computed value rather than the (published) blend.
        predictor: what is made of the cache; its coefficients may be learning.
    """

    computes: np.ndarray
    kind: str
    stores_fresh: bool
    predictor: Predictor = LAST

    def cache(self) -> Cache:
        """An empty one, for one trajectory."""
        return Cache(self.computes.shape[1], self.predictor)

    def branches(
        self, caches: Sequence[Cache], s: int, logits: Tensor, halves: int = 1
    ) -> list[Blend | Reuse]:
        """Branches of step s, whose router row is ``logits`` (N,).

        A branch that a decision leaves out runs only for the gradient of its score.

        Args:
            caches: of trajectories that run side by side; see ``denoise.join_rows``.
        """
        weights = logits.sigmoid()
        is_fixed = self.kind == "fixed" or (self.kind == "hard" and not torch.is_grad_enabled())
        if self.kind == "hard":
            decided = torch.tensor(self.computes[s], dtype=weights.dtype, device=weights.device)
            weights = decided + (weights - weights.detach())
        branches: list[Blend | Reuse] = []
        for i, weight in enumerate(weights.unbind()):
            keeps = self.stores_fresh, bool(self.computes[s, i])
            if caches[0].is_empty(i) or (is_fixed and self.computes[s, i]):
                branches.append(Blend(None, None, *keeps))
                continue
            cached = join_rows([cache.predict(i, s) for cache in caches], halves)
            branches.append(Reuse(cached) if is_fixed else Blend(cached, weight, *keeps))
        return branches

    def store(
        self, caches: Sequence[Cache], s: int, branches: Sequence[Blend | Reuse], halves: int = 1
    ) -> None:
        """After step s has run with these branches: what counts as computed enters the caches."""
        for i, branch in enumerate(branches):
            if self.computes[s, i]:
                parts = part_rows(branch.kept, len(caches), halves)
                for cache, part in zip(caches, parts, strict=True):
                    cache.store(i, s, part)
