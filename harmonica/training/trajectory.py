"""The trajectory objective: the error of the final image, differentiated through every step.

What is trained is what is replayed: masks are hard in the forward pass. Gradients pass straight
through a decision as if it were a weight between computing and reusing. The decision also weighs
what enters the cache, so a refresh is credited for all the steps that reuse it, which an error
compared step by step cannot do.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harmonica.denoise import Trajectories
from harmonica.predictors import Predictor, combine
from harmonica.samplers import State


class _Decide(torch.autograd.Function):
    """``weight * computed + (1 - weight) * reused`` for a weight that is 0 or 1."""

    @staticmethod
    def forward(ctx, computed: Tensor, reused: Tensor, weight: Tensor, computes: bool) -> Tensor:
        ctx.computes = computes
        ctx.save_for_backward(computed - reused)
        return (computed if computes else reused).view_as(computed)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        (difference,) = ctx.saved_tensors
        of_weight = torch.dot(grad.flatten(), difference.to(grad.dtype).flatten()).float()
        of_computed, of_reused = (grad, None) if ctx.computes else (None, grad)
        return of_computed, of_reused, of_weight, None


# Values of one branch: (step at which it was computed, value), newest first.
History = tuple[tuple[int, Tensor], ...]


class _Decided:
    """A branch that decides as replay will and remembers what its history becomes.

    Args:
        weight: () 0 or 1, differentiable; None where only coefficients learn.
    """

    def __init__(
        self,
        history: History,
        predictor: Predictor,
        place: tuple[int, int],
        computes: bool,
        weight: Tensor | None,
    ):
        self.history, self.predictor, (self.s, self.i) = history, predictor, place
        self.computes, self.weight = computes, weight
        self.following: History = history

    def __call__(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self.history:
            value = fn(x)
            self.following = ((self.s, value),)
            return value
        steps, values = zip(*self.history, strict=True)
        if self.weight is None and self.computes:
            value = fn(x)
            self.following = ((self.s, value), *self.history)[: self.predictor.depth]
            return value
        reused = combine(self.predictor.weights(self.s, self.i, steps), values)
        if self.weight is None:
            return reused
        if self.computes:
            computed = fn(x)
        else:
            # Nothing of it is in the output: it only tells what computing would have changed.
            with torch.no_grad():
                computed = fn(x.detach())
        decided = _Decide.apply(computed, reused.to(computed.dtype), self.weight, self.computes)
        self._remember(computed, values, decided if reused is values[0] else None)
        return decided

    def _remember(self, computed: Tensor, values: Sequence[Tensor], newest: Tensor | None) -> None:
        """Every place of the history could hold what it would with the other decision.

        ``newest`` is the first of them, where it is known.
        """
        depth = self.predictor.depth
        shifted = (computed, *values)[:depth]
        kept = (*values, values[-1])[: len(shifted)]
        steps = [step for step, _ in self.history]
        steps = [self.s, *steps][:depth] if self.computes else steps
        decided = [newest] * (newest is not None)
        decided += [
            _Decide.apply(new, old.to(new.dtype), self.weight, self.computes)
            for new, old in zip(shifted[len(decided) :], kept[len(decided) :], strict=True)
        ]
        self.following = tuple(zip(steps, decided, strict=False))


@dataclass(frozen=True)
class Position:
    """Where a rollout stands before evaluation s."""

    s: int
    state: State
    histories: tuple[History, ...]


@dataclass(frozen=True)
class Rollout:
    """Differentiable sampling with a cache.

    Attributes:
        compute: (T, N) bool.
        predictor: what stands in for a skipped branch; may be learning.
        checkpoints: keep only x and the cache at step boundaries, and run every step again for
            its gradients: memory of one step for the time of one more forward.
    """

    compute: np.ndarray
    predictor: Predictor
    checkpoints: bool = False

    def __call__(self, batch: Trajectories, decisions: Tensor | None = None) -> Tensor:
        """Final latents (n, C, H, W); arguments are those of ``positions``."""
        positions = self.positions(batch, self.start(batch), decisions)
        return deque(positions, maxlen=1).pop().state.x

    def start(self, batch: Trajectories) -> Position:
        """Noise, and nothing in the cache."""
        return Position(0, State(batch.x_T), ((),) * self.compute.shape[1])

    def positions(
        self, batch: Trajectories, start: Position, decisions: Tensor | None = None
    ) -> Iterator[Position]:
        """Every position from ``start`` to the end, both included.

        Args:
            start: the beginning, or a position of a rollout that did the same up to there.
            decisions: (T, N) equal to ``compute``, differentiable; None to learn coefficients
                alone, which computes nothing that is reused.
        """
        yield start
        state, histories = start.state, start.histories

        def step(s: int, state: State, histories: tuple) -> tuple[State, tuple[History, ...]]:
            branches = [
                _Decided(
                    history,
                    self.predictor,
                    (s, i),
                    bool(self.compute[s, i]),
                    None if decisions is None or s == 0 else decisions[s, i],
                )
                for i, history in enumerate(histories)
            ]
            state = batch.walk(
                state, lambda s, x: batch.predict(s, x, branches), start=s, stop=s + 1
            )
            return state, tuple(branch.following for branch in branches)

        for s in range(start.s, batch.num_steps):
            batch.conditioning(s)  # known before anything is run twice
            if self.checkpoints:
                state, histories = checkpoint(
                    step, s, state, histories, use_reentrant=False, preserve_rng_state=False
                )
            else:
                state, histories = step(s, state, histories)
            yield Position(s + 1, state, histories)
