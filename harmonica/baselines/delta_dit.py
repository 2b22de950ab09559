"""Delta-DiT (Chen et al., 2024): between full steps a span of blocks is replaced by its difference.

Rear blocks, which draw details, are reused while the image is mostly noise; front blocks, which
draw outlines, after that.
"""

from collections.abc import Iterator

import numpy as np

from harmonica.baselines.nearest import Candidate, nearest_setting
from harmonica.budget import Budget
from harmonica.flops import Costs
from harmonica.schedule import Schedule


def delta_dit(num_steps: int, costs: Costs, interval: int, span: int, boundary: int) -> Schedule:
    """Every ``interval``-th step is computed whole; the others reuse ``span`` blocks.

    Args:
        span: number of blocks: the rear ones before step ``boundary``, the front ones from it on.
        boundary: step in sampling order; the paper's b is its time.
    """
    blocks = costs.blocks
    order = list(dict.fromkeys(blocks))
    rear, front = (
        np.array([block in chosen for block in blocks]) for chosen in (order[-span:], order[:span])
    )
    compute = np.ones((num_steps, len(blocks)), dtype=bool)
    for s in range(num_steps):
        if s % interval:
            compute[s] = ~(rear if s < boundary else front)
    return Schedule(compute, costs, reuses="blocks")


def nearest_delta_dit(num_steps: int, costs: Costs, budget: Budget) -> tuple[Schedule, str]:
    """The setting nearest to a budget, and what it is.

    The span changes from rear to front half way.
    """
    depth = len(set(costs.blocks))

    def candidates() -> Iterator[Candidate]:
        for interval in range(2, num_steps + 1):
            for span in range(1, depth + 1):
                schedule = delta_dit(num_steps, costs, interval, span, num_steps // 2)
                yield interval, schedule, f"N = {interval}, {span} blocks"

    return nearest_setting(budget, candidates())
