"""Reuse of whole blocks: a stretch of blocks does not run; what it gave before stands in for it.

That is either the difference it made to its input (Delta-DiT), which holds the gates of the step at
which it was computed and so is no branch's value, or its output itself, whatever came in
(DeepCache, Faster Diffusion). The same goes for outputs that leave a stretch by long skips.
"""

from collections import defaultdict
from functools import partial

import numpy as np
from torch import Tensor

from harmonica.denoise import Trajectories
from harmonica.fusion import embed, fused_if, head, join
from harmonica.schedule import Schedule
from models.branch import compute
from models.transformer import Conditioning, call_block

Stretch = tuple[int, int]  # first block, one past the last


def reused_stretches(row: np.ndarray) -> list[Stretch]:
    """Maximal runs of blocks that are not computed."""
    edges = np.flatnonzero(np.diff(np.concatenate([[1], row.astype(int), [1]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


class BlockReplay:
    """One trajectory of a schedule of blocks; built for it and dropped with it."""

    def __init__(self, batch: Trajectories, schedule: Schedule, compiles: bool):
        self.batch, self.adds = batch, schedule.reuses == "blocks"
        self._run = partial(fused_if, compiles)
        decisions = schedule.block_compute
        self.reused = [dict(reused_stretches(row)) for row in decisions]
        # A stretch is stored at the last step before its reuse that computes all of it.
        self.stored: dict[int, set[Stretch]] = defaultdict(set)
        for s, stretches in enumerate(self.reused):
            for a, b in stretches.items():
                self.stored[int(np.flatnonzero(decisions[:s, a:b].all(axis=1))[-1])].add((a, b))
        # (stretch, block in it) to what stands in for that block's output.
        self.values: dict[tuple[Stretch, int], Tensor] = {}

    def predict(self, s: int, x: Tensor) -> Tensor:
        """Guided output of evaluation s."""
        return self.batch.evaluate(lambda rows, c: self._evaluate(s, rows, c), s, x)

    def _leaving(self, stretch: Stretch) -> list[int]:
        """Blocks of a stretch whose output is read outside of it."""
        inside, joins = range(*stretch), self.batch.model.joins
        skips = [source for k, source in joins.items() if source in inside and k not in inside]
        return sorted({inside[-1], *skips})

    def _evaluate(self, s: int, x: Tensor, conditioning: Conditioning) -> Tensor:
        model, size, ends = self.batch.model, x.shape[-2:], conditioning.ends
        blocks, joins = model.blocks, model.joins
        x, skips, inputs, k = self._run(embed)(model, x, ends), {}, {}, 0
        while k < len(blocks):
            if any(k == first for first, _ in self.stored[s]):
                inputs[k] = x
            if k in self.reused[s]:
                stretch = (k, self.reused[s][k])
                for j in self._leaving(stretch):
                    value = self.values[stretch, j]
                    skips[j] = x + value if self.adds else value
                x, k = skips[stretch[1] - 1], stretch[1]
                continue
            if k in joins:
                x = self._run(join)(blocks[k], x, skips.pop(joins[k]))
            branches = (compute,) * len(blocks[k].updates)
            x = self._run(call_block)(blocks[k], x, conditioning.blocks[k], branches)
            if k in joins.values():
                skips[k] = x
            self._store(s, k, x, inputs)
            k += 1
        return self._run(head)(model, x, [], ends, size)

    def _store(self, s: int, k: int, x: Tensor, inputs: dict[int, Tensor]) -> None:
        """Keep the output of block k, if a stretch that is reused later gives it."""
        for stretch in self.stored[s]:
            if k in self._leaving(stretch):
                self.values[stretch, k] = x - inputs[stretch[0]] if self.adds else x
