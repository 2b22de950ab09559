"""Schedules that nobody had to learn: what a router has to beat at equal cost."""

import numpy as np

from harmonica.flops import Costs
from harmonica.schedule import Schedule


def fora(num_steps: int, costs: Costs, interval: int) -> Schedule:
    """FORA (Selvaraju et al., 2024): compute every ``interval``-th step whole, reuse between."""
    compute = np.zeros((num_steps, len(costs.names)), dtype=bool)
    compute[::interval] = True
    return Schedule(compute, costs)


def evenly_spaced(num_steps: int, costs: Costs, cur: float) -> Schedule:
    """FORA for any share of reuse: whole reused steps, spread evenly.

    Where the share is no whole number of steps, the last of them reuses its first branches only.
    With half the steps reused and an even T this is FORA with interval 2.
    """
    branches = len(costs.names)
    count = round(cur * num_steps * branches)
    steps = -(-count // branches)
    compute = np.ones((num_steps, branches), dtype=bool)
    # The k-th reused step ends the k-th of equal parts; the first step is never among them.
    for k in range(steps):
        step = max(k + 1, round((k + 1) * num_steps / steps) - 1)
        compute[step, : min(branches, count - k * branches)] = False
    return Schedule(compute, costs)


def random_schedule(num_steps: int, costs: Costs, cur: float, seed: int) -> Schedule:
    """Reuse a share ``cur`` of all (step, branch) outputs, drawn uniformly after the first step."""
    branches = len(costs.names)
    drawn = np.random.default_rng(seed).permutation((num_steps - 1) * branches)
    compute = np.ones(num_steps * branches, dtype=bool)
    compute[branches + drawn[: round(cur * num_steps * branches)]] = False
    return Schedule(compute.reshape(num_steps, branches), costs)
