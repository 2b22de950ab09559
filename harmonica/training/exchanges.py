"""Search after learning: computed branches change places with reused ones of the same cost.

Held-out seeds decide. A candidate is rolled out from a position that the best schedule so far had
before the two differ; what comes before is shared.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonica.predictors import Learned
from harmonica.schedule import Schedule
from harmonica.training.held_out import HeldOut
from harmonica.training.restored import count, number, tensor
from harmonica.training.trajectory import Position, Rollout

Place = tuple[int, int]
# Of positions that are kept; while a candidate is tried, twice as much.
MOST_BYTES = 4 * 2**30


class Exchanges:
    """The best schedule so far, and trials to better it.

    Attributes:
        schedule: the best so far.
        logits: (T, N) scores whose lowest are what it reuses; they are exchanged along.
        trials: how many there were.
        errors: of the final latents on held-out seeds: where the search began, and whenever it
            came to something better.
    """

    def __init__(
        self,
        held_out: HeldOut,
        schedule: Schedule,
        logits: Tensor,
        seed: int,
        most_bytes: int = MOST_BYTES,
    ):
        """``seed``: of the candidates, which are the same on all processes."""
        self.held_out, self.schedule, self.logits = held_out, schedule, logits
        self.trials = 0
        self._generator = np.random.default_rng(seed)
        self._macs = np.array(schedule.costs.macs)
        self._predictor = schedule.predictor
        if isinstance(self._predictor, Learned):
            self._predictor = self._predictor.to(held_out.accelerator.device)
        rollout = self._rollout(schedule)
        self._stride = self._steps_apart(rollout, most_bytes)
        # Of every batch, by step.
        self._kept = [{0: rollout.start(batch)} for batch in held_out.batches]
        self._kept, error = self._rolled_out(schedule, 0)
        self.errors = [error]

    @classmethod
    def going_on(cls, held_out: HeldOut, start: Schedule, state: Mapping[str, Any]) -> "Exchanges":
        """The search that ``state_dict`` was taken of; it began at ``start``."""
        schedule = replace(start, compute=state["compute"].numpy())
        search = cls(held_out, schedule, state["logits"].to(held_out.accelerator.device), seed=0)
        search._generator.bit_generator.state = state["generator"]
        search.trials, search.errors = state["trials"], list(state["errors"])
        return search

    def state_dict(self) -> dict[str, Any]:
        """All that the next trials follow from."""
        return {
            "compute": torch.from_numpy(self.schedule.compute.copy()),
            "logits": self.logits,
            "generator": self._generator.bit_generator.state,
            "trials": self.trials,
            "errors": list(self.errors),
        }

    @property
    def error(self) -> float:
        return self.errors[-1]

    def _rollout(self, schedule: Schedule) -> Rollout:
        return Rollout(schedule.compute, self._predictor)

    @torch.no_grad()
    def _steps_apart(self, rollout: Rollout, most_bytes: int) -> int:
        """Steps between positions that are kept: x and the cache of all held-out samples."""
        batches = self.held_out.batches
        *_, last = rollout.positions(batches[0], rollout.start(batches[0]))
        values = [value for history in last.histories for _, value in history]
        size = len(batches) * sum(value.nbytes for value in (last.state.x, *values))
        return -(-rollout.compute.shape[0] // max(1, most_bytes // size))

    @torch.no_grad()
    def _rolled_out(
        self, schedule: Schedule, first: int
    ) -> tuple[list[dict[int, Position]], float]:
        """Positions to keep of a schedule that differs from the best at ``first``; its error."""
        rollout, rolled, latents = self._rollout(schedule), [], []
        for batch, known in zip(self.held_out.batches, self._kept, strict=True):
            kept = {s: position for s, position in known.items() if s <= first}
            for position in rollout.positions(batch, kept[max(kept)]):
                # Nothing starts from the end, whose cache is as large as any.
                if position.s % self._stride == 0 and position.s < batch.num_steps:
                    kept[position.s] = position
            rolled.append(kept)
            latents.append(position.state.x)
        return rolled, self.held_out.distance(latents)

    def attempt(self, count: int) -> bool:
        """Try ``count`` exchanges at once, drawn with a preference for scores near the cut.

        Returns:
            Whether they made the images better, and are kept.
        """
        self.trials += 1
        compute, logits = self.schedule.compute.copy(), self.logits.clone()
        for _ in range(count):
            places = self._drawn(compute, logits)
            if places is None:
                break
            down, up = places
            compute[down], compute[up] = False, True
            logits[down], logits[up] = logits[up].item(), logits[down].item()
        changed = np.flatnonzero((compute != self.schedule.compute).any(axis=1))
        if not len(changed):
            return False
        schedule = replace(self.schedule, compute=compute)
        kept, error = self._rolled_out(schedule, int(changed[0]))
        is_better = error < self.error
        if is_better:
            self.schedule, self.logits, self._kept = schedule, logits, kept
            self.errors.append(error)
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


def restored_search(state: Any, logits: Tensor) -> dict[str, Any]:
    """What ``Exchanges.state_dict`` gave and a checkpoint kept; ``logits``: of the same model.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    compute = state["compute"]
    if not isinstance(compute, Tensor) or compute.dtype != torch.bool:
        raise ValueError("its exchanges have no schedule")
    if compute.shape != logits.shape or not compute[0].all():
        raise ValueError("its exchanges are of another model or sampler")
    np.random.default_rng(0).bit_generator.state = state["generator"]  # or refuses it
    errors = [number(error) for error in state["errors"]]
    if not errors:
        raise ValueError("its exchanges began nowhere")
    return {
        "compute": compute,
        "logits": tensor(state["logits"], logits),
        "generator": state["generator"],
        "trials": count(state["trials"]),
        "errors": errors,
    }
