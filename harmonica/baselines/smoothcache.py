"""SmoothCache (Liu et al., 2024): reuse while the outputs seen in a calibration pass barely change.

All branches of one kind decide together. With kind errors ``e(s, k)``, the relative L1 change of
outputs from step s - k to step s averaged over layers, step s reuses what step s - k computed as
long as ``e(s, k) < alpha`` and k is at most three.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from harmonica.backbone import Backbone
from harmonica.budget import Budget
from harmonica.flops import Costs
from harmonica.randomness import Draws
from harmonica.samplers import State
from harmonica.sampling import trajectories
from harmonica.schedule import Schedule

MAX_AGE = 3
CALIBRATION_SAMPLES = 10  # as published


@torch.inference_mode()
def output_changes(backbone: Backbone, seed: int) -> np.ndarray:
    """(T, MAX_AGE, N) relative L1 change of each branch's output from step s - k, k = 1, 2, ...

    One uncached pass over ``CALIBRATION_SAMPLES`` samples; NaN where there is no step s - k.
    """
    batch = trajectories(backbone, Draws(seed, "calibration"), range(CALIBRATION_SAMPLES))
    steps, branches = batch.num_steps, len(backbone.costs.names)
    changes: dict[tuple[int, int, int], Tensor] = {}
    history: list[list[Tensor]] = [[] for _ in range(branches)]

    def watching(s: int, i: int) -> Callable:
        def branch(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            value = fn(x)
            for k, earlier in enumerate(reversed(history[i])):
                change = (value - earlier).float().abs().sum() / value.float().abs().sum()
                changes[s, k, i] = change
            history[i] = [*history[i], value][-MAX_AGE:]
            return value

        return branch

    state = State(batch.x_T)
    batch.walk(state, lambda s, x: batch.predict(s, x, [watching(s, i) for i in range(branches)]))
    # Read back from the device once, after the trajectory.
    table = np.full((steps, MAX_AGE, branches), np.nan)
    if changes:
        table[tuple(np.array(list(changes)).T)] = torch.stack(list(changes.values())).cpu().numpy()
    return table


def smoothcache(changes: np.ndarray, costs: Costs, alpha: float) -> Schedule:
    """The schedule at one threshold, from the changes (T, MAX_AGE, N) of a calibration pass."""
    kinds = np.array(costs.kinds)
    compute = np.ones((len(changes), len(kinds)), dtype=bool)
    for kind in dict.fromkeys(kinds):
        errors = changes[:, :, kinds == kind].mean(axis=2)  # (T, MAX_AGE)
        age = 0
        for s in range(1, len(errors)):
            reuses = age < MAX_AGE and errors[s, age] < alpha
            age = age + 1 if reuses else 0
            compute[s, kinds == kind] = not reuses
    return Schedule(compute, costs)


def nearest_smoothcache(changes: np.ndarray, costs: Costs, budget: Budget) -> tuple[Schedule, str]:
    """The threshold whose schedule is nearest to a budget, and what it is."""
    kinds = np.array(costs.kinds)
    errors = [changes[:, :, kinds == kind].mean(axis=2) for kind in dict.fromkeys(kinds)]
    values = np.unique(np.concatenate(errors, axis=None))
    values = values[np.isfinite(values)]
    # Decisions change only where alpha passes one of the errors.
    thresholds = [0.0, *(values[1:] + values[:-1]) / 2, values[-1] * 1.01]
    found = [(smoothcache(changes, costs, alpha), alpha) for alpha in thresholds]
    schedule, alpha = min(found, key=lambda pair: budget.distance(pair[0]))
    return schedule, f"alpha = {alpha:.3f}"
