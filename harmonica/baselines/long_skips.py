"""DeepCache and Faster Diffusion, for models with long skip connections: U-ViT here.

Both compute every N-th step whole. Between, they put outputs of that step in place of blocks, long
skips included, and compute the rest, which meets them at fresh skips or a fresh decoder.
"""

from collections.abc import Iterator

import numpy as np

from harmonica.baselines.nearest import Candidate, nearest_setting
from harmonica.budget import Budget
from harmonica.errors import OutOfReach
from harmonica.flops import Costs
from harmonica.schedule import Schedule


def _every(num_steps: int, costs: Costs, interval: int, reused: range) -> Schedule:
    """Every ``interval``-th step whole; the others reuse the outputs of these blocks."""
    blocks = costs.blocks
    order = list(dict.fromkeys(blocks))
    compute = np.ones((num_steps, len(blocks)), dtype=bool)
    is_reused = np.array([order.index(block) in reused for block in blocks])
    for s in range(num_steps):
        if s % interval:
            compute[s] = ~is_reused
    return Schedule(compute, costs, reuses="outputs")


def _encoder(costs: Costs) -> range:
    """Blocks before the first that joins a long skip: the way down and the middle.

    Raises:
        OutOfReach: a model without long skips.
    """
    if not any(costs.joins):
        raise OutOfReach(
            "--method deepcache and --method faster-diffusion stand on long skip connections, "
            "which this --model does not have; use another method, or a U-ViT"
        )
    return range(int(np.flatnonzero(costs.joins)[0]))


def faster_diffusion(num_steps: int, costs: Costs, interval: int) -> Schedule:
    """Faster Diffusion (Li et al., 2024): between key steps only the decoder is computed.

    Key steps are evenly spaced here. The time token, which a U-ViT's decoder gets from its encoder,
    is that of the key step.
    """
    return _every(num_steps, costs, interval, _encoder(costs))


def deepcache(num_steps: int, costs: Costs, interval: int, outer: int) -> Schedule:
    """DeepCache (Ma et al., 2024): between full steps the ``outer`` first and last blocks run.

    The last ones take the stream as the blocks inside left it at the full step, and fresh skips.
    """
    depth = len(_encoder(costs)) - 1
    return _every(num_steps, costs, interval, range(outer, 2 * depth + 1 - outer))


def nearest_faster_diffusion(num_steps: int, costs: Costs, budget: Budget) -> tuple[Schedule, str]:
    """The interval nearest to a budget, and what it is."""
    return nearest_setting(
        budget,
        ((n, faster_diffusion(num_steps, costs, n), f"N = {n}") for n in range(2, num_steps + 1)),
    )


def nearest_deepcache(num_steps: int, costs: Costs, budget: Budget) -> tuple[Schedule, str]:
    """The interval and number of outer blocks nearest to a budget, and what they are."""

    def candidates() -> Iterator[Candidate]:
        for n in range(2, num_steps + 1):
            for outer in range(1, len(_encoder(costs))):
                setting = f"N = {n}, {outer} outer blocks"
                yield n, deepcache(num_steps, costs, n, outer), setting

    return nearest_setting(budget, candidates())
