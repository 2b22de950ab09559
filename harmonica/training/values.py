"""What a training run puts in place of skipped branches: fixed, learned along, or fitted after."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harmonica.baselines.fixed import evenly_spaced
from harmonica.budget import Budget
from harmonica.predictors import (
    Extrapolation,
    LastValue,
    Learned,
    Predictor,
    TaylorSeer,
    create_predictor,
    from_dict,
    to_dict,
)
from harmonica.schedule import Schedule
from harmonica.training.batches import Batches
from harmonica.training.coefficients import Coefficients, fit_coefficients
from harmonica.training.config import TrainConfig
from harmonica.training.held_out import HeldOut, forwards
from harmonica.training.restored import tensors


class Values:
    """The predictor of a run, as its options say.

    Learned coefficients start from last values or from linear forecasts, whichever does better on
    held-out seeds with the schedule that the run starts from; where it has none, with whole reused
    steps, evenly spaced.
    """

    def __init__(self, config: TrainConfig, batches: Batches, start: Schedule | None, samples: int):
        """``samples``: of one forward of this process."""
        self.config, self.batches, self.samples = config, batches, samples
        model, sampler = batches.backbone.model, batches.backbone.sampler
        self.channels = 1 if config.coefficients == "scalar" else model.config.hidden_size
        self._held_out: HeldOut | None = None
        self._coefficients: Coefficients | None = None
        if config.predictor != "learned":
            self.base = create_predictor(config.predictor, config.coordinate, sampler)
            return
        if start is None:
            steps, costs = config.num_sampling_steps, batches.backbone.costs
            start = evenly_spaced(steps, costs, config.budget or Budget(cur=0.5))
        self.base = self._better_base(start)
        if config.fit == "gradient":
            shape = start.compute.shape
            device = batches.accelerator.device
            self._coefficients = Coefficients(self.base, *shape, self.channels).to(device)

    @property
    def held_out(self) -> HeldOut:
        """Made when it is first needed: it costs some uncached images."""
        if self._held_out is None:
            self._held_out = HeldOut(self.config, self.batches, self.samples)
        return self._held_out

    @property
    def parameters(self) -> list[Tensor]:
        """What learns by gradient."""
        return [] if self._coefficients is None else list(self._coefficients.parameters())

    def row(self, s: int) -> tuple[Tensor, ...]:
        """Those of step s."""
        return () if self._coefficients is None else self._coefficients.row(s)

    def live(self) -> Predictor:
        """Through which gradients reach ``parameters``."""
        return self.base if self._coefficients is None else self._coefficients.live()

    def frozen(self) -> Predictor:
        """As it stands now."""
        return self.base if self._coefficients is None else self._coefficients.frozen()

    def go_on_from(self, predictor: Predictor) -> None:
        """Gradients change from now on what they made of it earlier."""
        if self._coefficients is not None:
            self._coefficients.go_on_from(predictor)

    def decided(self, schedule: Schedule) -> Schedule:
        """At the end: with what held-out seeds prefer, if anything learned.

        Coefficients by gradient or in closed form, or what they start from. The fit takes as many
        samples as decide here, others than they; its sums are over processes.
        """
        config = self.config
        if config.predictor != "learned":
            return schedule
        base = self._better_base(schedule)
        choices: list[Predictor] = [schedule.predictor, base]
        if config.fit == "least-squares":
            batches = forwards(self.batches, "calibration", config, self.samples)
            reduce = self.batches.accelerator.reduce
            learned = fit_coefficients(batches, schedule, base, self.channels, reduce)
            choices.append(learned.to(torch.device("cpu")))
        return self.held_out.best([replace(schedule, predictor=choice) for choice in choices])

    def _better_base(self, schedule: Schedule) -> LastValue | Extrapolation:
        sampler = self.batches.backbone.sampler
        return self.held_out.better_base(schedule, self.config.coordinate, sampler)

    def state_dict(self) -> dict[str, Any]:
        coefficients = self._coefficients
        return {
            "base": to_dict(self.base),
            "coefficients": None if coefficients is None else coefficients.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        base = from_dict(state["base"], (self.config.num_sampling_steps, 0))
        self.check(base)
        self.base = base
        if self._coefficients is not None:
            mine = self._coefficients.state_dict()
            self._coefficients.base = base
            self._coefficients.load_state_dict(tensors(state["coefficients"], mine))

    def check(self, predictor: Predictor) -> None:
        """Refuse what no run with these options puts in place of skipped branches.

        Raises:
            ValueError: so it is.
        """
        if isinstance(predictor, Learned):
            fits = self.config.predictor == "learned" and predictor.level.shape[2] == self.channels
        elif self.config.predictor == "learned":
            fits = not isinstance(predictor, TaylorSeer) and predictor.depth <= Learned.depth
        else:
            fits = predictor.name == self.base.name
        if not fits:
            raise ValueError(f"it puts {predictor.name} in place of skipped branches")
