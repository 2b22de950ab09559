"""What a training run needs of a way of learning; and the published way, one row at a time."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from harmonica.autoencoder import load_encoder
from harmonica.cache import Masking
from harmonica.labelled_images import LabelledImages
from harmonica.plots import lambda_curve
from harmonica.router import Router, budget_schedule, highest_reused, threshold_schedule
from harmonica.schedule import Schedule
from harmonica.training.batches import Batches
from harmonica.training.config import TrainConfig
from harmonica.training.consensus import Consensus, Origin
from harmonica.training.learning_to_cache import LearningToCache
from harmonica.training.objective import ESTIMATORS, Student, iepo_loss, image_error_weights
from harmonica.training.restored import count, moments, number, numbers, tensor, tensors
from harmonica.training.sdt import (
    BetaControl,
    StepError,
    StepwiseDenoising,
    TrainingMethod,
    optimizer_of,
)
from harmonica.training.values import Values


class Learner(Protocol):
    """Owns the router and all that changes while it learns.

    Attributes:
        router: the scores.
        updates: optimiser steps so far.
        trials: exchanges that were tried after the last of them.
        learns: whether there is any sweep to make; if not, ``finish`` does it all.
        sweep_length: most updates in a sweep.
    """

    router: Router
    updates: int
    trials: int
    learns: bool
    sweep_length: int

    def schedule(self) -> Schedule:
        """What would be exported now."""
        ...

    def logits(self) -> Tensor:
        """(T, N) of the scores that the exported schedule is made of."""
        ...

    def cut(self) -> float:
        """The score above which the exported schedule computes."""
        ...

    def sweep(self, remaining: int) -> dict[str, float]:
        """Learn from one batch, in at most ``remaining`` updates.

        Returns:
            Averages over its updates and all processes, for people; "loss" and "mse" among them.
        """
        ...

    def draw(self, folder: Path) -> None:
        """Pictures of how learning went."""
        ...

    def finish(self, hold: Callable[[], None]) -> None:
        """What is left to do after the last update, before the export.

        Args:
            hold: is called whenever ``state_dict`` has come further.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that training stands on, whether it goes on with updates or is at its end."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``; what is no such state raises, as a rule a ValueError."""
        ...


class StepwiseLearner:
    """Learns a row at every step of a trajectory, with the image error proxy objective.

    With a budget beta is steered to it; without one it stays as given.
    """

    trials = 0

    def __init__(
        self,
        config: TrainConfig,
        batches: Batches,
        consensus: Consensus,
        frozen: Schedule | None = None,
    ):
        """``frozen``: a schedule for which coefficients alone are learned."""
        self.config, self.batches, self.consensus = config, batches, consensus
        self.frozen = frozen
        self.accelerator, self.backbone = batches.accelerator, batches.backbone
        halves = None if config.method == "harmonica" else 1
        self.samples = batches.samples(
            config.global_batch_size, "--global-batch-size", halves=halves
        )
        self.lambda_samples = batches.samples(
            config.lambda_batch_size, "--lambda-batch-size", halves=halves
        )
        self.lambda_rows = config.lambda_rows
        self.method = self._training_method()
        self.router = self._first_router().to(self.accelerator.device)
        self._decided()  # a target out of reach is refused before anything is written
        self.values = Values(config, batches, frozen, self.samples)
        self.optimizer = self.accelerator.prepare(
            optimizer_of(config, self.router, self.values.parameters)
        )
        self.beta = BetaControl(config.l1, config.budget is not None, config.lr)
        self.weights = torch.zeros(config.num_sampling_steps)
        self.refreshes: list[tuple[int, list[float]]] = []
        self.updates = self.trajectories = self.refresh_at = 0
        self.finished: Schedule | None = None

    def _first_router(self) -> Router:
        config = self.config
        if self.frozen is not None:
            return Router.deciding(self.frozen.compute)
        return Router.initial(
            config.num_sampling_steps,
            len(self.backbone.costs.names),
            config.global_seed,
            config.init_mean,
            config.init_std,
            self.method.rows,
        )

    def _training_method(self) -> TrainingMethod:
        """Whole trajectories from noise, or pairs of steps from images."""
        config, batches = self.config, self.batches
        if config.method == "harmonica":
            return StepwiseDenoising(
                config.num_sampling_steps, lambda number: batches("train", number, self.samples)
            )
        # One process of a machine fetches missing images, the others find them.
        with self.accelerator.local_main_process_first():
            images = LabelledImages(config.data, self.backbone.image_size)
        encode = load_encoder(config, self.accelerator.device)
        return LearningToCache(batches, self.samples, images, encode, config.num_workers)

    @property
    def learns(self) -> bool:
        return self.frozen is None or bool(self.values.parameters)

    @property
    def sweep_length(self) -> int:
        return len(self.method.rows)

    def schedule(self) -> Schedule:
        """What the scores stand for now: at the target if there is one, else at the threshold."""
        if self.finished is not None:
            return self.finished
        return replace(self._decided(), predictor=self.values.frozen())

    def _decided(self) -> Schedule:
        if self.frozen is not None:
            return self.frozen
        config, logits, costs = self.config, self.router.logits(), self.backbone.costs
        if config.budget is not None:
            return budget_schedule(logits, costs, config.budget, self.method.rows)
        return threshold_schedule(logits, costs, config.threshold, self.method.rows)

    def masking(self) -> Masking:
        """How the scores act on the next trajectory: they cut where the exported schedule cuts."""
        kind = self.config.mask if self.frozen is None else "fixed"
        return Masking(self._decided().compute, kind, self.config.stores_fresh, self.values.live())

    def logits(self) -> Tensor:
        return self.router.logits()

    def cut(self) -> float:
        if self.config.budget is None and self.frozen is None:
            return self.config.threshold
        return highest_reused(self.logits(), self._decided())

    def refresh_weights(self) -> None:
        """Re-estimate lambda on a fresh batch, averaged over processes."""
        self.refresh_at = self.updates + self.config.lambda_c
        image = output = torch.zeros(self.config.num_sampling_steps)
        if self.config.lambda_form != "constant":  # which asks for no errors
            image, output = self._measured_errors()
        self.weights = image_error_weights(image, output, self.config.lambda_form)
        self.refreshes.append((self.updates, self.weights.tolist()))

    def _measured_errors(self) -> tuple[Tensor, Tensor]:
        """(T,) of the image, (T,) of the outputs; see ``ImageErrors``. On the CPU."""
        batch = self.batches("lambda", len(self.refreshes), self.lambda_samples)
        student = Student(batch, self.router.logits(), self.masking(), self.lambda_rows)
        with torch.no_grad():
            errors = ESTIMATORS[self.config.lambda_estimator](student)
        self.lambda_rows = student.most_rows  # fewer, if so many did not fit into memory
        where = f"the image-error weights of update {self.updates}"
        origin = Origin(where, batch.indices, errors.finite)
        image, output = self.consensus.mean(torch.stack([errors.image, errors.output]), origin)
        return image.cpu(), output.cpu()

    def update(self, step: StepError) -> tuple[Tensor, Tensor]:
        """One AdamW step of one row, which all processes make or none.

        Returns:
            (3,) loss, teacher-student error, sum of scores; and (N,) what a unit of each score
            saves in weighted error.
        """
        row, weight = self.router.row(step.s), self.weights[step.s].item()
        learning = [row, *self.values.row(step.s)]
        loss = iepo_loss(step.error, step.scores, weight, self.beta.beta)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        where = f"step {step.s} of trajectory {self.trajectories}, update {self.updates}"
        origin = Origin(where, step.indices, step.finite)
        self._average_gradients(learning, loss, origin)
        if self.frozen is not None:
            row.grad = None
        self.optimizer.step()
        self.router.clamp(step.s)
        self.updates += 1
        scores = step.scores.detach()
        worths = torch.zeros_like(scores)
        if row.grad is not None:
            worths = self.beta.beta - row.grad / (scores * (1 - scores))
        return torch.stack([loss.detach(), step.error.detach(), scores.sum()]), worths

    def _average_gradients(self, learning: list[Tensor], loss: Tensor, origin: Origin) -> None:
        for parameter in learning:
            if parameter.grad is None:  # a coefficient that nothing of this step reads
                parameter.grad = torch.zeros_like(parameter)
        self.consensus.average_all(learning, loss, origin)

    def draw(self, folder: Path) -> None:
        if self.refreshes:
            lambda_curve(folder / "lambda.png", self.refreshes)

    def finish(self, hold: Callable[[], None]) -> None:
        self.finished = self.values.decided(self.schedule())

    def sweep(self, remaining: int | None = None) -> dict[str, float]:
        """One trajectory; before it, every ``lambda_c`` updates, a refresh of the weights."""
        if self.updates >= self.refresh_at:
            self.refresh_weights()
        results: list[tuple[Tensor, Tensor]] = []
        self.method.train(
            self.trajectories,
            self.router,
            self.masking(),
            lambda step: results.append(self.update(step)),
            remaining,
        )
        self.trajectories += 1
        records, worths = (torch.stack(column) for column in zip(*results, strict=True))
        self._steer_beta(worths)
        means = self.accelerator.reduce(records, "mean").mean(dim=0).tolist()
        values = dict(zip(("loss", "mse", "l1"), means, strict=True))
        return {"trajectory": self.trajectories, **values, "beta": self.beta.beta}

    def _steer_beta(self, worths: Tensor) -> None:
        """After a trajectory: move beta towards the target share of reused branches."""
        if self.config.budget is None or self.frozen is not None:
            return
        rows = list(self.method.rows)
        target = 1.0 - float(self._decided().compute[rows].mean())
        if self.beta.is_unset:
            self.beta.start(worths, target)
        else:
            below = self.router.logits()[rows] <= 0
            self.beta.update(below.float().mean().item(), target)

    def state_dict(self) -> dict[str, Any]:
        return {
            "router": self.router.state_dict(),
            "values": self.values.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "trajectories": self.trajectories,
            "refreshes": self.refreshes,
            "refresh_at": self.refresh_at,
            "weights": self.weights,
            "beta": self.beta.beta,
            "method": self.method.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.router.load_state_dict(tensors(state["router"], self.router.state_dict()))
        self.values.load_state_dict(state["values"])
        self.optimizer.load_state_dict(moments(state["optimizer"], self.optimizer))
        self.updates, self.trajectories = count(state["updates"]), count(state["trajectories"])
        self.refreshes = [
            (count(update), numbers(weights, len(self.weights)))
            for update, weights in state["refreshes"]
        ]
        self.refresh_at = count(state["refresh_at"])
        self.weights = tensor(state["weights"], self.weights)
        self.beta.beta = number(state["beta"])
        self.method.load_state_dict(state["method"])
