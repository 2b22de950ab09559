"""Reuse of whole blocks: a stretch of blocks is replaced by the difference it made before.

What a stretch adds to its input holds the gates of the step at which it was computed, so it is no
branch's value: it is taken and put back at the blocks' own ends, by hooks that live for one model
evaluation.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from harmonica.denoise import Trajectories
from harmonica.schedule import Schedule
from models.branch import Branch, compute

Stretch = tuple[int, int]  # first block, one past the last


def block_decisions(schedule: Schedule) -> np.ndarray:
    """(T, blocks) bool: whether a block is computed.

    Raises:
        ValueError: a block computes some of its branches only.
    """
    blocks = schedule.costs.blocks
    rows = [schedule.compute[:, [b == block for b in blocks]] for block in dict.fromkeys(blocks)]
    if any((row != row[:, :1]).any() for row in rows):
        raise ValueError("a schedule that reuses blocks must decide for all branches of one alike")
    return np.stack([row[:, 0] for row in rows], axis=1)


def reused_stretches(row: np.ndarray) -> list[Stretch]:
    """Maximal runs of blocks that are not computed."""
    edges = np.flatnonzero(np.diff(np.concatenate([[1], row.astype(int), [1]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _skip(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The branch that adds nothing."""
    return x.new_zeros(())


class BlockReplay:
    """Predictor that replays a schedule of blocks along one trajectory."""

    def __init__(self, batch: Trajectories, schedule: Schedule):
        self.batch, self.table = batch, schedule.compute.tolist()
        decisions = block_decisions(schedule)
        self.reused = [reused_stretches(row) for row in decisions]
        # A stretch is stored at the last step before its reuse that computes all of it.
        self.stored: dict[int, set[Stretch]] = defaultdict(set)
        for s, stretches in enumerate(self.reused):
            for a, b in stretches:
                self.stored[int(np.flatnonzero(decisions[:s, a:b].all(axis=1))[-1])].add((a, b))
        self.differences: dict[Stretch, Tensor] = {}

    def __call__(self, s: int, x: Tensor) -> Tensor:
        branches: list[Branch] = [compute if computes else _skip for computes in self.table[s]]
        with self._hooked(s):
            return self.batch.predict(s, x, branches)

    @contextmanager
    def _hooked(self, s: int) -> Iterator[None]:
        blocks, handles = self.batch.model.blocks, []
        for stretch in self.stored[s]:
            handles += self._store(blocks, stretch)
        for stretch in self.reused[s]:
            handles.append(self._put_back(blocks, stretch))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _store(
        self, blocks: nn.ModuleList, stretch: Stretch
    ) -> list[torch.utils.hooks.RemovableHandle]:
        first, last = blocks[stretch[0]], blocks[stretch[1] - 1]

        def enter(block: nn.Module, inputs: tuple) -> None:
            self.differences[stretch] = inputs[0]

        def leave(block: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.differences[stretch] = output - self.differences[stretch]

        return [first.register_forward_pre_hook(enter), last.register_forward_hook(leave)]

    def _put_back(
        self, blocks: nn.ModuleList, stretch: Stretch
    ) -> torch.utils.hooks.RemovableHandle:
        def leave(block: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return output + self.differences[stretch]

        return blocks[stretch[1] - 1].register_forward_hook(leave)
