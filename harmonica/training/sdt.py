"""Step-wise denoising training (SDT): the trajectory in which a router learns, and its price."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from harmonica.cache import Cache, Masking, fill
from harmonica.denoise import Trajectories
from harmonica.router import Router, every_row
from harmonica.samplers import State
from harmonica.training.config import TrainConfig


@dataclass(frozen=True)
class StepError:
    """One training step: error () of the student's output against the teacher's, scores (N,).

    Attributes:
        indices: (n,) global sample indices of the batch.
        finite: (n,) whether a sample's outputs are finite.
    """

    s: int
    error: Tensor
    scores: Tensor
    indices: Sequence[int]
    finite: Tensor


class TrainingMethod(Protocol):
    """Where a router meets the errors that it learns from.

    Attributes:
        rows: steps that learn; the others compute everything.
    """

    rows: Collection[int]

    def train(
        self,
        number: int,
        router: Router,
        masking: Masking,
        update: Callable[[StepError], None],
        limit: int | None,
    ) -> None:
        """One sweep over the rows: at most ``limit`` updates, on batch ``number``.

        ``update`` may change the router's row of its step.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it has learned or counted besides the router; by default nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``, before the first sweep."""


def learn_step(
    batch: Trajectories,
    s: int,
    x: Tensor,
    cache: Cache,
    router: Router,
    masking: Masking,
    update: Callable[[StepError], None],
) -> Tensor:
    """Teacher and student at step s from the same x; returns the student's output, detached."""
    batch.conditioning(s)  # shared with the student, whose gradients need it
    # Teacher.
    with torch.inference_mode():
        teacher = batch.predict(s, x)
    # Student.
    logits = router.row(s)
    branches = masking.branches([cache], s, logits)
    student = batch.predict(s, x, branches)
    masking.store([cache], s, branches)
    # Router update.
    finite = batch.finite(teacher) & batch.finite(student.detach())
    error = batch.output_error(teacher, student)
    update(StepError(s, error, logits.sigmoid(), batch.indices, finite))
    return student.detach()


def train_trajectory(
    batch: Trajectories,
    router: Router,
    masking: Masking,
    update: Callable[[StepError], None],
    stop: int | None = None,
) -> State:
    """Roll the student out from noise; after every step but the first, call ``update``.

    Teacher and student both start from the student's x_s, so errors of earlier reuse are in x and
    in the cache when later steps learn.
    """
    cache = masking.cache()

    def predict(s: int, x: Tensor) -> Tensor:
        # The first step computes everything and fills the cache.
        if s == 0:
            with torch.no_grad():
                return fill(cache, batch, s, x)
        return learn_step(batch, s, x, cache, router, masking, update)

    return batch.walk(State(batch.x_T), predict, stop=stop)


class StepwiseDenoising(TrainingMethod):
    """Step-wise denoising training (HarmoniCa, section 3.2): whole trajectories, from noise.

    ``batch`` gives this process's trajectories of a batch number.
    """

    def __init__(self, num_steps: int, batch: Callable[[int], Trajectories]):
        self.rows, self.batch = every_row(num_steps), batch

    def train(
        self,
        number: int,
        router: Router,
        masking: Masking,
        update: Callable[[StepError], None],
        limit: int | None,
    ) -> None:
        stop = None if limit is None else min(len(self.rows), limit) + 1
        train_trajectory(self.batch(number), router, masking, update, stop)


def router_optimizer(
    router: Router,
    lr: float,
    eps: float,
    coefficients: Sequence[Tensor] = (),
    coefficient_lr: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW that keeps its state per row: a row without gradient is left alone, moments and all.

    Args:
        coefficients: of a predictor, rows too, with a learning rate of their own.
    """
    groups = [{"params": list(router.parameters()), "lr": lr}]
    if coefficients:
        groups.append({"params": list(coefficients), "lr": coefficient_lr})
    return torch.optim.AdamW(groups, eps=eps, weight_decay=0.0)


def optimizer_of(
    config: TrainConfig, router: Router, coefficients: Sequence[Tensor]
) -> torch.optim.AdamW:
    """The optimiser that a run's options say."""
    return router_optimizer(router, config.lr, config.adam_eps, coefficients, config.coefficient_lr)


class BetaControl:
    """The price of a computed branch, fixed or steered towards a share of reused branches.

    Without a target beta stays as given. With one, the first trajectory goes without a price and
    shows what each branch is worth; beta starts as the quantile of those worths at the target, then
    follows ``log beta += gain * (target - share)`` after every trajectory. ``share`` counts scores
    below one half: so the scores that the target cuts between stay where the sigmoid is steepest,
    far from the bounds of the logits.

    A logit moves by about ``lr`` a trajectory, so the gain is a small multiple of ``lr``: a faster
    controller would wind up long before the scores can answer.
    """

    GAIN_PER_LR = 2.0

    def __init__(self, beta: float | None, has_target: bool, lr: float):
        self.has_target = has_target
        self.beta = 0.0 if beta is None else beta
        self.gain = self.GAIN_PER_LR * lr

    @property
    def is_unset(self) -> bool:
        return self.has_target and self.beta == 0.0

    def start(self, worths: Tensor, target: float) -> None:
        """Set the first price from what a unit of score saves in weighted error, any shape."""
        worths = worths[worths.isfinite()].double()
        if len(worths) == 0 or not worths.any():
            return  # nothing seen yet; the next trajectory will tell
        # Worths are noisy: where the quantile is not positive, a small price starts the steering.
        floor = 0.01 * worths.abs().mean().item()
        self.beta = max(torch.quantile(worths, target).item(), floor)

    def update(self, share: float, target: float) -> None:
        if self.has_target:
            self.beta *= math.exp(self.gain * (target - share))
