"""What a schedule makes run when, planned once, before anything runs.

A branch's value is kept only if a later step reads it, and dropped at its last reading. Reused
branches that follow each other are one operation, whatever blocks they are of. Nothing of a block
whose branches are all reused runs but that, and what is outside of its branches: its end of a long
skip connection.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np


@dataclass(frozen=True)
class Compute:
    """Run branches of one block, in the order of the model.

    Attributes:
        block: index of the block.
        branches: (index in the model, index in the block, whether the value is kept) of each.
    """

    block: int
    branches: tuple[tuple[int, int, bool], ...]


@dataclass(frozen=True)
class Add:
    """Add what stands in for consecutive branches, gated by the conditioning of this step.

    Attributes:
        branches: (index in the model, block, index in the block, steps whose values are read,
            newest first) of each.
        dropped: (index in the model, step) of values that nobody reads after this.
    """

    branches: tuple[tuple[int, int, int, tuple[int, ...]], ...]
    dropped: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Keep:
    """Keep the stream as it is after a block, for the long skip that starts there."""

    block: int


@dataclass(frozen=True)
class Join:
    """Mix the output of an earlier block into the stream, before the branches of a block."""

    block: int
    source: int


Operation = Compute | Add | Keep | Join


@dataclass(frozen=True)
class ReplayPlan:
    """Operations of every step, and the most values that are kept at once between steps."""

    steps: tuple[tuple[Operation, ...], ...]
    peak_values: int


def places_of(names: tuple[str, ...]) -> list[tuple[int, int]]:
    """(number of the block, index in the block) of every branch, from their names."""
    blocks = [name.rpartition(".")[0] for name in names]
    order = list(dict.fromkeys(blocks))
    return [(order.index(block), blocks[:i].count(block)) for i, block in enumerate(blocks)]


def sources(compute: np.ndarray, s: int, i: int, depth: int) -> tuple[int, ...]:
    """The last ``depth`` steps before s that computed branch i, newest first."""
    return tuple(int(step) for step in np.flatnonzero(compute[:s, i])[: -depth - 1 : -1])


def plan_replay(
    compute: np.ndarray,
    names: tuple[str, ...],
    depth: int = 1,
    joins: Mapping[int, int] = MappingProxyType({}),
) -> ReplayPlan:
    """The plan of decisions (T, N) bool about branches with these names.

    Args:
        depth: how many values the predictor wants.
        joins: long skip connections, block to the earlier block that it takes in.
    """
    places = places_of(names)
    ends = {block: i for i, (block, _) in enumerate(places)}
    read = {(int(s), int(i)): sources(compute, s, i, depth) for s, i in np.argwhere(~compute)}
    # Steps ascend, so the last entry stands.
    last_reader = {(i, source): s for (s, i), steps in read.items() for source in steps}
    planned = []
    for s, row in enumerate(compute):
        operations: list[Operation] = []
        for i, (block, k) in enumerate(places):
            if k == 0 and block in joins:
                operations.append(Join(block, joins[block]))
            last = operations[-1] if operations else None
            if row[i] and isinstance(last, Compute) and last.block == block:
                operations[-1] = Compute(block, (*last.branches, (i, k, (i, s) in last_reader)))
            elif row[i]:
                operations.append(Compute(block, ((i, k, (i, s) in last_reader),)))
            else:
                steps = read[s, i]
                dropped = [(i, step) for step in steps if last_reader[i, step] == s]
                before = last if isinstance(last, Add) else Add((), ())
                joined = Add((*before.branches, (i, block, k, steps)), (*before.dropped, *dropped))
                operations[-1:] = [joined] if isinstance(last, Add) else [*operations[-1:], joined]
            if i == ends[block] and block in joins.values():
                operations.append(Keep(block))
        planned.append(tuple(operations))
    return ReplayPlan(tuple(planned), _peak(planned))


def _peak(steps: list[tuple[Operation, ...]]) -> int:
    """Most values kept at once, walking the plan."""
    kept: set[tuple[int, int]] = set()
    peak = 0
    for s, operation in ((s, operation) for s, step in enumerate(steps) for operation in step):
        if isinstance(operation, Add):
            kept -= set(operation.dropped)
        elif isinstance(operation, Compute):
            kept |= {(i, s) for i, _, keeps in operation.branches if keeps}
        peak = max(peak, len(kept))
    return peak
