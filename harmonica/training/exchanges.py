"""Search after learning: computed branches change places with reused ones of the same cost.

Held-out seeds decide. A candidate is rolled out from the step at which it first differs from the
best schedule so far; what comes before is shared.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from harmonica.schedule import Schedule
from harmonica.training.held_out import HeldOut
from harmonica.training.trajectory import Position, Rollout

Place = tuple[int, int]


class Exchanges:
    """The best schedule so far, and trials to better it.

    All positions of its rollouts are kept: x and the cache of every step, of all held-out samples.

    Attributes:
        schedule: the best so far.
        logits: (T, N) scores whose lowest are what it reuses; they are exchanged along.
        error: of its final latents on held-out seeds.
    """

    def __init__(self, held_out: HeldOut, schedule: Schedule, logits: Tensor, seed: int):
        """``seed``: of the candidates, which are the same on all processes."""
        self.held_out, self.schedule, self.logits = held_out, schedule, logits
        self._generator = np.random.default_rng(seed)
        self._macs = np.array(schedule.costs.macs)
        nothing: list[list[Position]] = [[] for _ in held_out.batches]
        self._positions, self.error = self._rolled_out(schedule, nothing, 0)

    @torch.no_grad()
    def _rolled_out(
        self, schedule: Schedule, before: list[list[Position]], first: int
    ) -> tuple[list[list[Position]], float]:
        """Positions of every batch, those before step ``first`` as they are given; their error."""
        rollout, rolled = Rollout(schedule.compute, schedule.predictor), []
        for batch, known in zip(self.held_out.batches, before, strict=True):
            start = known[first] if known else None
            rolled.append([*known[:first], *rollout.positions(batch, start=start)])
        return rolled, self.held_out.distance([positions[-1].state.x for positions in rolled])

    def attempt(self, count: int) -> bool:
        """Try ``count`` exchanges at once, drawn with a preference for scores near the cut.

        Returns:
            Whether they made the images better, and are kept.
        """
        compute, logits = self.schedule.compute.copy(), self.logits.clone()
        changed: list[Place] = []
        for _ in range(count):
            places = self._drawn(compute, logits)
            if places is None:
                break
            (down, up), changed = places, [*changed, *places]
            compute[down], compute[up] = False, True
            logits[down], logits[up] = logits[up].item(), logits[down].item()
        if not changed:
            return False
        schedule = replace(self.schedule, compute=compute)
        first = min(s for s, _ in changed)
        positions, error = self._rolled_out(schedule, self._positions, first)
        is_better = error < self.error
        if is_better:
            self.schedule, self.logits, self.error = schedule, logits, error
            self._positions = positions
        return is_better

    def _drawn(self, compute: np.ndarray, logits: Tensor) -> tuple[Place, Place] | None:
        """A computed branch and a reused one of its cost; None if there are none."""
        reused = ~compute
        if compute.all() or not compute[1:].any():
            return None
        scores = logits.cpu().numpy()
        doubt = np.exp(-np.abs(scores - scores[reused].max()))
        doubt[0] = 0.0  # the first step always computes
        exchangeable = np.isin(self._macs, self._macs[reused.any(axis=0)])
        if not (compute[1:] & exchangeable).any():
            return None
        down = self._place(doubt * compute * exchangeable)
        return down, self._place(doubt * (reused & (self._macs == self._macs[down[1]])))

    def _place(self, weights: np.ndarray) -> Place:
        place = self._generator.choice(weights.size, p=weights.ravel() / weights.sum())
        return int(place) // weights.shape[1], int(place) % weights.shape[1]
