"""Router: learnable scores per (step, branch), and the schedules that are made of them."""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor, nn

from harmonica.budget import Budget
from harmonica.flops import Costs
from harmonica.schedule import Schedule

LOGIT_BOUND = 5.0
DECIDED = 0.5  # logits that start from decisions: these, and their negative


def every_row(num_steps: int) -> range:
    """HarmoniCa: every step but the first may reuse."""
    return range(1, num_steps)


def alternate_rows(num_steps: int) -> range:
    """Learning-to-Cache: steps of an odd respaced index compute everything, the others may reuse.

    The respaced index counts from the last step, which is 0 and may reuse.
    """
    return range(1 + num_steps % 2, num_steps, 2)


# How a file's scores are read: number of steps to the rows that may reuse.
SEMANTICS = {"harmonica": every_row, "ltc": alternate_rows}


class Router(nn.Module):
    """Scores r = sigmoid(logit) of computing a branch at a step.

    Row 0, the first step, is not a parameter: it always computes. Every other row is a parameter
    of its own, so that each has its own optimiser state.
    """

    def __init__(self, logits: Tensor):
        """``logits``: (T, N); row 0 is ignored."""
        super().__init__()
        self.rows = nn.ParameterList(row.clone() for row in logits[1:].float())

    @classmethod
    def initial(
        cls,
        num_steps: int,
        num_branches: int,
        seed: int,
        mean: float,
        std: float,
        rows: Collection[int] | None = None,
    ) -> "Router":
        """Normally distributed logits; mean 0 and deviation 1 is the published start.

        Args:
            rows: steps that learn, default all; the others stand at the upper bound.
        """
        generator = torch.Generator().manual_seed(seed)
        logits = mean + std * torch.randn(num_steps, num_branches, generator=generator)
        for s in range(num_steps):
            if rows is not None and s not in rows:
                logits[s] = LOGIT_BOUND
        return cls(logits.clamp(-LOGIT_BOUND, LOGIT_BOUND))

    @classmethod
    def deciding(cls, compute: np.ndarray) -> "Router":
        """Logits that stand, not far from one half, for decisions (T, N) bool."""
        return cls(torch.from_numpy(np.where(compute, DECIDED, -DECIDED)))

    @property
    def num_steps(self) -> int:
        return len(self.rows) + 1

    def row(self, s: int) -> Tensor:
        """Logits (N,) of step s >= 1."""
        return self.rows[s - 1]

    def logits(self) -> Tensor:
        """(T, N), detached, row 0 at the upper bound."""
        rows = torch.stack([row.detach() for row in self.rows])
        return torch.cat([torch.full_like(rows[:1], LOGIT_BOUND), rows])

    def clamp(self, s: int) -> None:
        """Keep the logits of a row in the published range."""
        with torch.no_grad():
            self.row(s).clamp_(-LOGIT_BOUND, LOGIT_BOUND)


def threshold_schedule(
    logits: Tensor, costs: Costs, threshold: float, rows: Collection[int] | None = None
) -> Schedule:
    """Compute where the score is above the threshold.

    Args:
        logits: (T, N), sampling order.
        rows: steps that may reuse anything; default: all but the first.
    """
    compute = (logits.float().sigmoid() > threshold).cpu().numpy()
    compute[[s for s in range(len(compute)) if s == 0 or (rows is not None and s not in rows)]] = (
        True
    )
    return Schedule(compute, costs)


def highest_reused(logits: Tensor, schedule: Schedule) -> float:
    """The score above which a schedule made of the lowest-scored branches computes."""
    reused = ~torch.from_numpy(schedule.compute.copy())
    scores = logits.sigmoid().cpu()[reused]
    return scores.max().item() if len(scores) else 0.0


def budget_schedule(
    logits: Tensor, costs: Costs, budget: Budget, rows: Collection[int] | None = None
) -> Schedule:
    """Reuse the lowest-scored branches until the budget is met.

    Args:
        logits: (T, N), sampling order; row 0 is ignored.
        rows: steps that may reuse anything; default: all but the first.

    Raises:
        HarmonicaError: reusing everything in those rows is not enough.
    """
    table = logits.detach().float().cpu().numpy()
    steps = range(1, len(table)) if rows is None else sorted(rows)
    lowest = np.argsort(table[list(steps)], axis=None, kind="stable")
    order = [(steps[int(k) // table.shape[1]], int(k) % table.shape[1]) for k in lowest]
    return budget.in_order(order, len(table), costs)
