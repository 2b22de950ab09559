"""Schedules that look at nothing: FORA, evenly spaced steps, and random ones."""

from collections.abc import Iterator

import numpy as np

from harmonica.budget import Budget
from harmonica.flops import Costs
from harmonica.predictors import TaylorSeer
from harmonica.schedule import Schedule

FIRST_STEPS = 2  # that TaylorSeer computes whole, as published


def fora(num_steps: int, costs: Costs, interval: int) -> Schedule:
    """FORA (Selvaraju et al., 2024): compute every ``interval``-th step whole, reuse between."""
    compute = np.zeros((num_steps, len(costs.names)), dtype=bool)
    compute[::interval] = True
    return Schedule(compute, costs)


def taylorseer(num_steps: int, costs: Costs, interval: int, order: int) -> Schedule:
    """TaylorSeer (Liu et al., 2025): every ``interval``-th step whole, Taylor's series between.

    The first steps are computed, so that there is a derivative to start from.
    """
    compute = np.zeros((num_steps, len(costs.names)), dtype=bool)
    compute[:FIRST_STEPS] = True
    compute[FIRST_STEPS - 1 :: interval] = True
    return Schedule(compute, costs, predictor=TaylorSeer(order))


def _evenly_reused(num_steps: int, costs: Costs, count: int, is_early: bool) -> Schedule:
    """``count`` branch outputs reused: whole steps spread evenly, the rest in one more step."""
    steps, rest = divmod(count, len(costs.names))
    compute = np.ones((num_steps, len(costs.names)), dtype=bool)
    # The k-th reused step ends the k-th of equal parts; the first step is never among them.
    for k in range(steps):
        compute[max(k + 1, round((k + 1) * num_steps / steps) - 1)] = False
    if rest:
        computed = np.flatnonzero(compute.all(axis=1))
        compute[computed[1] if is_early and len(computed) > 1 else computed[-1], :rest] = False
    return Schedule(compute, costs)


def evenly_spaced(num_steps: int, costs: Costs, budget: Budget, is_early: bool = False) -> Schedule:
    """FORA for any budget: whole reused steps, spread evenly over the trajectory.

    The samplers' steps are evenly spaced in time, so these are uniform in time too. Where the
    budget is no whole number of steps, the last computed one reuses its first branches. With half
    the steps reused and an even T this is FORA with interval 2.

    Args:
        is_early: not the last computed step reuses the rest, but the first after the very first.

    Raises:
        HarmonicaError: more than everything after the first step would have to be reused.
    """

    def candidates() -> Iterator[Schedule]:
        for count in range((num_steps - 1) * len(costs.names) + 1):
            yield _evenly_reused(num_steps, costs, count, is_early)

    return budget.first(candidates())


def random_schedule(num_steps: int, costs: Costs, budget: Budget, seed: int) -> Schedule:
    """Reuse branch outputs drawn uniformly after the first step until the budget is met.

    Raises:
        HarmonicaError: more than everything after the first step would have to be reused.
    """
    branches = len(costs.names)
    drawn = np.random.default_rng(seed).permutation((num_steps - 1) * branches)
    order = [(int(i) // branches + 1, int(i) % branches) for i in drawn]
    return budget.in_order(order, num_steps, costs)
