"""Seeds that nothing is trained on decide what is kept."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from harmonica.denoise import Trajectories
from harmonica.engine import Engine
from harmonica.predictors import LAST, Extrapolation, LastValue, create_predictor
from harmonica.samplers import Sampler
from harmonica.schedule import Schedule
from harmonica.training.batches import Batches
from harmonica.training.config import TrainConfig
from harmonica.training.consensus import NotFinite


def forwards(batches: Batches, name: str, config: TrainConfig, samples: int) -> list[Trajectories]:
    """``--held-out-batch-size`` model rows that nothing is trained on, a forward each."""
    rows, flag = config.held_out_batch_size, "--held-out-batch-size"
    mine = batches.indices(0, batches.samples(rows, flag))
    return [batches.of(name, mine[k : k + samples]) for k in range(0, len(mine), samples)]


class HeldOut:
    """Image error of schedules on the same seeds, averaged over processes.

    Attributes:
        uncached: samples what errors are measured against, here and in training.
    """

    def __init__(self, config: TrainConfig, batches: Batches, samples: int):
        """``samples``: most of one forward of this process."""
        self.accelerator, self.how = batches.accelerator, batches.backbone.how
        self.batches = forwards(batches, "held-out", config, samples)
        self.uncached = Engine(None, self.how)
        with torch.no_grad():
            self.references = [self.uncached(batch) for batch in self.batches]

    @torch.no_grad()
    def error(self, schedule: Schedule) -> float:
        """Mean squared error of the final latents against the uncached ones; infinite where it is
        not a number.
        """
        # These few batches are all that the schedule is run on: a graph would not pay.
        engine = Engine(schedule, replace(self.how, captures=False))
        return self.distance([engine(batch) for batch in self.batches])

    def distance(self, latents: Sequence[Tensor]) -> float:
        """The same of latents (n, C, H, W), one of every batch."""
        errors = [
            (mine - reference).square().flatten(1).mean(1)
            for mine, reference in zip(latents, self.references, strict=True)
        ]
        error = self.accelerator.reduce(torch.cat(errors).mean(), "mean").item()
        return error if math.isfinite(error) else math.inf  # nothing is less than NaN

    def best(self, schedules: Sequence[Schedule]) -> Schedule:
        """The one with the least error.

        Raises:
            NotFinite: none has an error that is a number.
        """
        errors = [self.error(schedule) for schedule in schedules]
        if min(errors) == math.inf:
            raise NotFinite(
                "images of held-out seeds are not finite whatever stands in for skipped branches; "
                "use --mixed-precision no, or check --ckpt and --cfg-scale"
            )
        return schedules[errors.index(min(errors))]

    def better_base(
        self, schedule: Schedule, coordinate: str, sampler: Sampler
    ) -> LastValue | Extrapolation:
        """What learned coefficients start from: the better of last values and linear forecasts."""
        bases = (LAST, create_predictor("taylor1", coordinate, sampler))
        return self.best([replace(schedule, predictor=base) for base in bases]).predictor
