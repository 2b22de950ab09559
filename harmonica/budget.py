"""Budget: how much of a trajectory is reused, and the schedules that reuse just that."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harmonica.errors import OutOfReach
from harmonica.flops import Costs
from harmonica.schedule import Schedule


@dataclass(frozen=True)
class Budget:
    """A share of reused branch outputs (CUR), or a theoretical speed-up: exactly one is set."""

    cur: float | None = None
    speedup: float | None = None

    def __post_init__(self):
        if (self.cur is None) == (self.speedup is None):
            raise ValueError("a budget is either a CUR or a speed-up")

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"--target-speedup {self.speedup:g}"
        return f"--target-cur {self.cur:g}"

    def _is_met(self, reused: int, macs: int, num_steps: int, costs: Costs) -> bool:
        if self.speedup is not None:
            return macs <= num_steps * costs.total / self.speedup
        return reused >= round(self.cur * num_steps * len(costs.names))

    def is_met(self, schedule: Schedule) -> bool:
        """Whether a schedule reuses enough: to the nearest branch, or at least the speed-up."""
        reused = int((~schedule.compute).sum())
        return self._is_met(reused, schedule.macs, schedule.num_steps, schedule.costs)

    def _refusal(self, num_steps: int, costs: Costs, reused: int, macs: int) -> OutOfReach:
        most = f"{reused / (num_steps * len(costs.names)):.3f} can be reused"
        if self.speedup is not None:
            most = f"{num_steps * costs.total / macs:.2f} is possible"
        return OutOfReach(
            f"{self} is out of reach: with {num_steps} steps at most {most}; lower it or add steps"
        )

    def in_order(self, order: Sequence[tuple[int, int]], num_steps: int, costs: Costs) -> Schedule:
        """Reuse (step, branch) outputs in this order until the budget is met.

        Raises:
            OutOfReach: all of them are not enough.
        """
        compute = np.ones((num_steps, len(costs.names)), dtype=bool)
        reused, macs = 0, num_steps * costs.total
        for s, i in order:
            if self._is_met(reused, macs, num_steps, costs):
                break
            compute[s, i] = False
            reused, macs = reused + 1, macs - costs.macs[i]
        if not self._is_met(reused, macs, num_steps, costs):
            raise self._refusal(num_steps, costs, reused, macs)
        return Schedule(compute, costs)

    def first(self, candidates: Iterable[Schedule]) -> Schedule:
        """The first of some schedules, in the order of growing reuse, that meets the budget.

        Raises:
            OutOfReach: none does.
        """
        candidate = None
        for candidate in candidates:
            if self.is_met(candidate):
                return candidate
        reused = int((~candidate.compute).sum())
        raise self._refusal(candidate.num_steps, candidate.costs, reused, candidate.macs)

    def distance(self, schedule: Schedule) -> float:
        """How far a schedule is from the budget, for methods that cannot meet it exactly."""
        if self.speedup is not None:
            return abs(schedule.theoretical_speedup / self.speedup - 1)
        return abs(schedule.cur - self.cur)
