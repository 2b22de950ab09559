"""Learns schedule and coefficients on the error of the final image, at a budget met exactly.

Started from whole reused steps, evenly spaced; a schedule replaces the best one so far only if it
does better on held-out seeds, so noise in the gradient cannot make it worse.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from harmonica.baselines.fixed import evenly_spaced
from harmonica.batches import Batches
from harmonica.budget import Budget
from harmonica.coefficients import Coefficients, fit_coefficients
from harmonica.config import TrainConfig
from harmonica.held_out import HeldOut
from harmonica.predictors import Predictor, create_predictor
from harmonica.router import Router, budget_schedule
from harmonica.samplers import State
from harmonica.schedule import Schedule
from harmonica.sdt import router_optimizer
from harmonica.trajectory import Rollout

START = 0.5  # logits of what the periodic schedule computes; their negative where it reuses
AVERAGING = 0.8  # decay of the average of logits that is tried on held-out seeds
TINY = 1e-8  # of a squared error: keeps the slope of its root finite


class TrajectoryLearner:
    """One update per batch of trajectories, of all rows at once."""

    sweep_length = 1

    def __init__(self, config: TrainConfig, batches: Batches, frozen: Schedule | None = None):
        """``frozen``: a schedule for which coefficients alone are learned."""
        self.config, self.batches, self.is_frozen = config, batches, frozen is not None
        self.accelerator, self.backbone = batches.accelerator, batches.backbone
        self.samples = batches.samples(config.global_batch_size, "--global-batch-size")
        steps, costs = config.num_sampling_steps, self.backbone.costs
        if frozen is None:
            frozen = evenly_spaced(steps, costs, config.budget)
            # A first round of held-out seeds would be wasted on a target out of reach.
            budget_schedule(torch.zeros(frozen.compute.shape), costs, config.budget)
        start = torch.from_numpy(np.where(frozen.compute, START, -START)).float()
        self.router = Router(start).to(self.accelerator.device)
        self.held_out = HeldOut(config, batches, self.samples)
        self.coefficients: Coefficients | None = None
        self.base = self._base(frozen)
        self.optimizer = self._optimizer()
        self.average = self.router.logits()
        self.refreshes: list[tuple[int, list[float]]] = []
        self.updates = 0
        self.best = replace(frozen, predictor=self._predictor())
        self.best_logits = self.router.logits()
        self.history = [(0, self.held_out.error(self.best))]

    def _base(self, schedule: Schedule) -> Predictor:
        config, timesteps = self.config, self.backbone.sampler.timesteps
        if config.predictor != "learned":
            return create_predictor(config.predictor, config.coordinate, timesteps)
        base = self.held_out.better_base(schedule, config.coordinate, timesteps)
        if config.fit == "gradient":
            self.coefficients = Coefficients(base, *schedule.compute.shape, self._channels).to(
                self.accelerator.device
            )
        return base

    @property
    def _channels(self) -> int:
        return 1 if self.config.coefficients == "scalar" else self.backbone.model.config.hidden_size

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = router_optimizer(self.router, self.config.lr, self.config.adam_eps)
        if self.coefficients is not None:
            optimizer.add_param_group(
                {"params": list(self.coefficients.parameters()), "lr": self.config.coefficient_lr}
            )
        return self.accelerator.prepare(optimizer)

    @property
    def learns(self) -> bool:
        """Whether there is anything to do before ``finish``."""
        return not self.is_frozen or self.coefficients is not None

    def _predictor(self) -> Predictor:
        return self.base if self.coefficients is None else self.coefficients.frozen()

    def _schedule_of(self, logits: Tensor) -> Schedule:
        if self.is_frozen:
            return self.best
        return budget_schedule(logits, self.backbone.costs, self.config.budget)

    def schedule(self) -> Schedule:
        return self.best

    def cut(self) -> float:
        reused = ~torch.from_numpy(self.best.compute.copy())
        scores = self.best_logits.sigmoid().cpu()[reused]
        return scores.max().item() if len(scores) else 0.0

    # Learning.

    def sweep(self, remaining: int | None = None) -> dict[str, float]:
        """One batch of trajectories, one update."""
        batch = self.batches("train", self.updates, self.samples)
        with torch.no_grad():
            reference = batch.walk(State(batch.x_T), batch.predict).x
        logits = self.router.logits()
        schedule = self._schedule_of(logits)
        decisions = None
        if not self.is_frozen:
            rows = torch.cat([logits[:1], torch.stack(list(self.router.rows))])
            hard = torch.from_numpy(schedule.compute.copy()).to(rows)
            decisions = hard + (rows - rows.detach())
        predictor = self.base if self.coefficients is None else self.coefficients.live()
        rollout = Rollout(schedule.compute, predictor, self.config.activation_checkpointing)
        images = rollout(batch, decisions)
        # The root: a few seeds with large errors shall not decide alone.
        errors = (images - reference).square().flatten(1).mean(1)
        loss = (errors + TINY).sqrt().mean()
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self._average_gradients()
        self.optimizer.step()
        for s in range(1, len(logits)):
            self.router.clamp(s)
        self.updates += 1
        self.average.lerp_(self.router.logits(), 1 - AVERAGING)
        last = remaining is not None and remaining <= 1
        if last or self.updates % self.config.held_out_every == 0:
            self._try(self._schedule_of(self.average), self.average.clone())
        means = self.accelerator.reduce(
            torch.stack([loss.detach(), errors.detach().mean()]), "mean"
        )
        values = dict(zip(("loss", "mse"), means.tolist(), strict=True))
        return {**values, "held_out_mse": self.history[-1][1]}

    def _average_gradients(self) -> None:
        """Over processes; and of the scores, what is common to all: the budget takes it back."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        learning = [p for p in parameters if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in learning])
        flat = self.accelerator.reduce(flat, "mean")
        for p, grad in zip(learning, flat.split([p.numel() for p in learning]), strict=True):
            p.grad = grad.view_as(p)
        if not self.is_frozen:
            rows = [row.grad for row in self.router.rows]
            common = torch.stack(rows).mean()
            for grad in rows:
                grad -= common

    def _try(self, schedule: Schedule, logits: Tensor) -> bool:
        """Keep a schedule, with the coefficients of now, if held-out seeds say so."""
        schedule = replace(schedule, predictor=self._predictor())
        return self._keep_better(schedule, logits)

    def _keep_better(self, schedule: Schedule, logits: Tensor) -> bool:
        error, best = self.held_out.error(schedule), self.history[-1][1]
        is_better = error < best
        if is_better:
            self.best, self.best_logits = schedule, logits
        self.history.append((self.updates, min(error, best)))
        return is_better

    # After learning.

    def finish(self) -> None:
        """Flips, and coefficients in closed form, as far as they were asked for."""
        if self.config.refine:
            self._refine()
        if self.config.predictor == "learned" and self.config.fit == "least-squares":
            batch = self.batches("calibration", 0, self.samples)
            fitted = fit_coefficients(batch, self.best, self.base, self._channels)
            self._keep_better(self._averaged(fitted), self.best_logits)

    def _averaged(self, schedule: Schedule) -> Schedule:
        """Coefficients averaged over processes."""
        device = self.accelerator.device
        learned = schedule.predictor.to(device)
        level, slope = (
            self.accelerator.reduce(value, "mean").cpu() for value in (learned.level, learned.slope)
        )
        return replace(schedule, predictor=replace(learned, level=level, slope=slope))

    def _refine(self) -> None:
        """Exchange one computed for one reused branch of the same cost, where it helps.

        Candidates are drawn with a preference for scores near the cut, the same on all processes.
        """
        generator = np.random.default_rng(self.config.global_seed)
        macs = np.array(self.backbone.costs.macs)
        for _ in tqdm(
            range(self.config.refine),
            desc="flips",
            disable=not self.accelerator.is_main_process,
        ):
            logits = self.best_logits.cpu().numpy()
            compute = self.best.compute
            edge = logits[~compute].max()
            doubt = np.exp(-np.abs(logits - edge))
            doubt[0] = 0.0
            down = self._drawn(generator, doubt * compute)
            fitting = ~compute & (macs == macs[down[1]])[None]
            if not fitting.any() or not (doubt * fitting).sum():
                continue
            up = self._drawn(generator, doubt * fitting)
            changed, swapped = compute.copy(), self.best_logits.clone()
            changed[down], changed[up] = False, True
            swapped[down], swapped[up] = self.best_logits[up], self.best_logits[down]
            self._keep_better(replace(self.best, compute=changed), swapped)

    @staticmethod
    def _drawn(generator: np.random.Generator, weights: np.ndarray) -> tuple[int, int]:
        place = generator.choice(weights.size, p=weights.ravel() / weights.sum())
        return int(place) // weights.shape[1], int(place) % weights.shape[1]

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        coefficients = None if self.coefficients is None else self.coefficients.state_dict()
        return {
            "router": self.router.state_dict(),
            "coefficients": coefficients,
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "average": self.average,
            "best": self.best.to_dict(),
            "best_coefficients": getattr(self.best.predictor, "tensors", None),
            "best_logits": self.best_logits,
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.router.load_state_dict(state["router"])
        if self.coefficients is not None:
            self.coefficients.load_state_dict(state["coefficients"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates, self.history = state["updates"], [tuple(p) for p in state["history"]]
        device = self.accelerator.device
        self.average = state["average"].to(device)
        self.best_logits = state["best_logits"].to(device)
        self.best = Schedule.from_dict(state["best"], state["best_coefficients"])
