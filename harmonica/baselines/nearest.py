"""The setting of a method with a knob beside its interval that is nearest to a budget."""

from collections.abc import Iterable

from harmonica.budget import Budget
from harmonica.schedule import Schedule

# Interval between whole steps, schedule, and what the setting is, for people.
Candidate = tuple[int, Schedule, str]
# Longer intervals reuse older values: one is taken only where it is nearer by more than this.
CLEARLY = 0.02


def nearest_setting(budget: Budget, candidates: Iterable[Candidate]) -> tuple[Schedule, str]:
    """Of the settings about as near to the budget as the nearest, that of the shortest interval."""
    found = [
        (budget.distance(schedule), interval, schedule, setting)
        for interval, schedule, setting in candidates
    ]
    best = min(distance for distance, *_ in found)
    near = [candidate for candidate in found if candidate[0] <= best + CLEARLY]
    _, _, schedule, setting = min(near, key=lambda candidate: (candidate[1], candidate[0]))
    return schedule, setting
