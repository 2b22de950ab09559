"""Learns schedule and coefficients on the error of the final image, at a budget met exactly.

Started from whole reused steps, evenly spaced; a schedule replaces the best one so far only if it
does better on held-out seeds, so noise in the gradient cannot make it worse.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from harmonica.baselines.fixed import evenly_spaced
from harmonica.plots import learning_curve
from harmonica.router import Router, budget_schedule, highest_reused
from harmonica.schedule import Schedule
from harmonica.training.batches import Batches
from harmonica.training.config import TrainConfig
from harmonica.training.consensus import Consensus, Origin
from harmonica.training.exchanges import Exchanges
from harmonica.training.sdt import optimizer_of, restore_optimizer
from harmonica.training.trajectory import Rollout
from harmonica.training.values import Values

AVERAGING = 0.8  # decay of the average of logits that is tried on held-out seeds
TINY = 1e-8  # of a squared error: keeps the slope of its root finite


class TrajectoryLearner:
    """One update per batch of trajectories, of all rows at once."""

    sweep_length = 1

    def __init__(
        self,
        config: TrainConfig,
        batches: Batches,
        consensus: Consensus,
        frozen: Schedule | None = None,
    ):
        """``frozen``: a schedule for which coefficients alone are learned."""
        self.config, self.batches, self.consensus = config, batches, consensus
        self.is_frozen = frozen is not None
        self.accelerator, self.backbone = batches.accelerator, batches.backbone
        self.samples = batches.samples(config.global_batch_size, "--global-batch-size")
        steps, costs = config.num_sampling_steps, self.backbone.costs
        start = frozen or evenly_spaced(steps, costs, config.budget)
        self.router = Router.deciding(start.compute).to(self.accelerator.device)
        self.values = Values(config, batches, start, self.samples)
        self.optimizer = self.accelerator.prepare(
            optimizer_of(config, self.router, self.values.parameters)
        )
        self.average = self.router.logits()
        self.updates = 0
        self.best = replace(start, predictor=self.values.frozen())
        self.best_logits = self.router.logits()
        # (update, error of the best so far on held-out seeds)
        self.history = [(0, self.values.held_out.error(self.best))]

    @property
    def learns(self) -> bool:
        return not self.is_frozen or bool(self.values.parameters)

    def _schedule_of(self, logits: Tensor) -> Schedule:
        if self.is_frozen:
            return self.best
        return budget_schedule(logits, self.backbone.costs, self.config.budget)

    def schedule(self) -> Schedule:
        return self.best

    def logits(self) -> Tensor:
        return self.best_logits

    def cut(self) -> float:
        return highest_reused(self.best_logits, self.best)

    # Learning.

    def sweep(self, remaining: int | None = None) -> dict[str, float]:
        """One batch of trajectories, one update."""
        batch = self.batches("train", self.updates, self.samples)
        with torch.no_grad():
            reference = self.values.held_out.uncached(batch)
        logits = self.router.logits()
        schedule = self._schedule_of(logits)
        decisions = None
        if not self.is_frozen:
            rows = torch.cat([logits[:1], torch.stack(list(self.router.rows))])
            hard = torch.from_numpy(schedule.compute.copy()).to(rows)
            decisions = hard + (rows - rows.detach())
        checkpoints = self.config.activation_checkpointing
        rollout = Rollout(schedule.compute, self.values.live(), checkpoints)
        images = rollout(batch, decisions)
        # The root: a few seeds with large errors shall not decide alone.
        errors = (images - reference).square().flatten(1).mean(1)
        loss = (errors + TINY).sqrt().mean()
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        finite = images.detach().flatten(1).isfinite().all(1)
        origin = Origin(f"update {self.updates}", batch.indices, finite)
        self._average_gradients(loss, origin)
        self.optimizer.step()
        for s in range(1, len(logits)):
            self.router.clamp(s)
        self.updates += 1
        self.average.lerp_(self.router.logits(), 1 - AVERAGING)
        if self.updates % self.config.held_out_every == 0:
            self._try(self._schedule_of(self.average), self.average.clone())
        means = self.accelerator.reduce(
            torch.stack([loss.detach(), errors.detach().mean()]), "mean"
        )
        values = dict(zip(("loss", "mse"), means.tolist(), strict=True))
        return {**values, "held_out_mse": self.history[-1][1]}

    def _average_gradients(self, loss: Tensor, origin: Origin) -> None:
        """Over processes; of the scores without what is common to all: the budget takes it back."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.consensus.average_all([p for p in parameters if p.grad is not None], loss, origin)
        if not self.is_frozen:
            rows = [row.grad for row in self.router.rows]
            common = torch.stack(rows).mean()
            for grad in rows:
                grad -= common

    def _try(self, schedule: Schedule, logits: Tensor) -> None:
        """Keep a schedule, with the coefficients of now, if held-out seeds say so."""
        schedule = replace(schedule, predictor=self.values.frozen())
        error, best = self.values.held_out.error(schedule), self.history[-1][1]
        is_better = error < best
        if is_better:
            self.best, self.best_logits = schedule, logits
        self.history.append((self.updates, error if is_better else best))

    # After learning.

    def draw(self, folder: Path) -> None:
        learning_curve(folder / "held_out.png", self.history)

    def finish(self) -> None:
        """A last trial; flips, and coefficients in closed form, as far as they were asked for.

        None of it is part of a checkpoint: a run that goes on makes all of it.

        Raises:
            Interrupted: a process was asked to end.
        """
        if self.updates % self.config.held_out_every:
            self._try(self._schedule_of(self.average), self.average.clone())
        if self.config.refine:
            self._refine()
        self.consensus.stop_if_asked()
        self.best = self.values.decided(self.best)
        self.history.append((self.updates, self.values.held_out.error(self.best)))

    def _refine(self) -> None:
        """Exchange computed for reused branches, one or two pairs at a time, where it helps."""
        search = Exchanges(
            self.values.held_out, self.best, self.best_logits, self.config.global_seed
        )
        trials = range(self.config.refine)
        for trial in tqdm(trials, desc="exchanges", disable=not self.accelerator.is_main_process):
            self.consensus.stop_if_asked()
            if search.attempt(1 + trial % 2):
                self.history.append((self.updates, search.error))
        self.best, self.best_logits = search.schedule, search.logits

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        return {
            "router": self.router.state_dict(),
            "values": self.values.state_dict(),
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
        self.values.load_state_dict(state["values"])
        restore_optimizer(self.optimizer, state["optimizer"], self.config)
        self.updates, self.history = state["updates"], [tuple(p) for p in state["history"]]
        device = self.accelerator.device
        self.average = state["average"].to(device)
        self.best_logits = state["best_logits"].to(device)
        self.best = Schedule.from_dict(state["best"], state["best_coefficients"])
