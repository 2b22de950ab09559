"""Learns schedule and coefficients on the error of the final image, at a budget met exactly.

Started from whole reused steps, evenly spaced; a schedule replaces the best one so far only if it
does better on held-out seeds, so noise in the gradient cannot make it worse. Coefficients learn
along, and then alone: a schedule that moves gives them no time to fit to it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from harmonica.training.exchanges import Exchanges, restored_search
from harmonica.training.restored import count, moments, number, tensor, tensors
from harmonica.training.sdt import optimizer_of
from harmonica.training.trajectory import Rollout
from harmonica.training.values import Values

AVERAGING = 0.8  # decay of the average of logits that is tried on held-out seeds
TINY = 1e-8  # of a squared error: keeps the slope of its root finite


@dataclass(frozen=True)
class Best:
    """The schedule that does best on held-out seeds, its scores, and how it came about.

    Attributes:
        history: (update, error of the best by then).
    """

    schedule: Schedule
    logits: Tensor
    history: tuple[tuple[int, float], ...]

    @property
    def error(self) -> float:
        return self.history[-1][1]


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
        starts = [frozen] if frozen is not None else self._starts()
        self.values = Values(config, batches, starts[0], self.samples)
        starts = [replace(start, predictor=self.values.frozen()) for start in starts]
        errors = [self.values.held_out.error(start) for start in starts]
        first = starts[errors.index(min(errors))]
        self.router = Router.deciding(first.compute).to(self.accelerator.device)
        self.optimizer = self.accelerator.prepare(
            optimizer_of(config, self.router, self.values.parameters)
        )
        self.average = self.router.logits()
        self.updates = 0
        self.learned = Best(first, self.router.logits(), ((0, min(errors)),))
        self.finished: Best | None = None
        # Of exchanges, as far as they have been tried since the last update.
        self.search: dict[str, Any] | None = None

    def _starts(self) -> list[Schedule]:
        """Evenly spaced ones, which differ in where they reuse what is no whole step."""
        config, costs = self.config, self.backbone.costs
        late, early = (
            evenly_spaced(config.num_sampling_steps, costs, config.budget, is_early)
            for is_early in (False, True)
        )
        return [late] if (late.compute == early.compute).all() else [late, early]

    @property
    def learns(self) -> bool:
        return not self.is_frozen or bool(self.values.parameters)

    def _moves(self, update: int) -> bool:
        """Whether this update, counted from 0, is of the schedule."""
        end = self.config.schedule_updates
        return not self.is_frozen and (end is None or update < end)

    def _schedule_of(self, logits: Tensor, update: int) -> Schedule:
        """What an update takes the scores for."""
        if self._moves(update):
            return budget_schedule(logits, self.backbone.costs, self.config.budget)
        return self.learned.schedule

    @property
    def best(self) -> Best:
        """At the end, what was made of what was learned."""
        return self.finished or self.learned

    @property
    def trials(self) -> int:
        return 0 if self.search is None else self.search["trials"]

    def schedule(self) -> Schedule:
        return self.best.schedule

    def logits(self) -> Tensor:
        return self.best.logits

    def cut(self) -> float:
        return highest_reused(self.best.logits, self.best.schedule)

    # Learning.

    def sweep(self, remaining: int | None = None) -> dict[str, float]:
        """One batch of trajectories, one update."""
        if self.updates == self.config.schedule_updates:
            self._settle()
        moves = self._moves(self.updates)
        batch = self.batches("train", self.updates, self.samples)
        with torch.no_grad():
            reference = self.values.held_out.uncached(batch)
        logits = self.router.logits()
        schedule = self._schedule_of(logits, self.updates)
        decisions = None
        if moves:
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
        origin = Origin(f"update {self.updates}", batch.indices, errors.detach().isfinite())
        self._average_gradients(loss, origin)
        self.optimizer.step()
        for s in range(1, len(logits)):
            self.router.clamp(s)
        self.updates += 1
        self.search = None
        if moves:
            self.average.lerp_(self.router.logits(), 1 - AVERAGING)
        if self.updates % self.config.held_out_every == 0:
            self.learned = self._tried()
        means = self.accelerator.reduce(
            torch.stack([loss.detach(), errors.detach().mean()]), "mean"
        )
        values = dict(zip(("loss", "mse"), means.tolist(), strict=True))
        return {**values, "held_out_mse": self.learned.error}

    def _average_gradients(self, loss: Tensor, origin: Origin) -> None:
        """Over processes; of the scores without what is common to all: the budget takes it back."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.consensus.average_all([p for p in parameters if p.grad is not None], loss, origin)
        rows = [row.grad for row in self.router.rows if row.grad is not None]
        if rows:
            common = torch.stack(rows).mean()
            for grad in rows:
                grad -= common

    def _settle(self) -> None:
        """From now on coefficients learn alone, at the best schedule so far."""
        if self.updates % self.config.held_out_every:
            self.learned = self._tried()
        self.values.go_on_from(self.learned.schedule.predictor)

    def _tried(self) -> Best:
        """What the last update left, with averaged scores, if held-out seeds say so."""
        last = self.updates - 1
        schedule = self._schedule_of(self.average, last)
        schedule = replace(schedule, predictor=self.values.frozen())
        best, error = self.learned, self.values.held_out.error(schedule)
        if error < best.error:
            logits = self.average.clone() if self._moves(last) else best.logits
            return Best(schedule, logits, (*best.history, (self.updates, error)))
        return replace(best, history=(*best.history, (self.updates, best.error)))

    # After learning.

    def draw(self, folder: Path) -> None:
        learning_curve(folder / "held_out.png", self.best.history)

    def finish(self, hold: Callable[[], None]) -> None:
        """A last trial; exchanges, and coefficients in closed form, as far as they were asked for.

        What was learned stays as it is, so that a longer run can go on with it. Of what is made
        here exchanges alone take long, and are part of a checkpoint.

        Raises:
            Interrupted: a process was asked to end.
        """
        counted, is_begun = self.batches.tally.evaluations, self.search is not None
        best = self._tried() if self.updates % self.config.held_out_every else self.learned
        if self.config.refine:
            search = self._search(best)
            if is_begun:  # what it has come to was counted before it was interrupted
                self.batches.tally.evaluations = counted
            best = self._refined(best, search, hold)
        self.consensus.stop_if_asked()
        schedule = self.values.decided(best.schedule)
        history = (*best.history, (self.updates, self.values.held_out.error(schedule)))
        self.finished = Best(schedule, best.logits, history)

    def _search(self, best: Best) -> Exchanges:
        """One that begins at the best, or goes on."""
        held_out = self.values.held_out
        if self.search is not None:
            return Exchanges.going_on(held_out, best.schedule, self.search)
        return Exchanges(held_out, best.schedule, best.logits, self.config.global_seed)

    def _refined(self, best: Best, search: Exchanges, hold: Callable[[], None]) -> Best:
        """Exchange computed for reused branches, one or two pairs at a time, where it helps."""
        trials = tqdm(
            range(search.trials, self.config.refine),
            desc="exchanges",
            total=self.config.refine,
            initial=search.trials,
            disable=not self.accelerator.is_main_process,
        )
        for trial in trials:
            self.consensus.stop_if_asked()
            search.attempt(1 + trial % 2)
            self.search = search.state_dict()
            hold()
        better = ((self.updates, error) for error in search.errors[1:])
        return Best(search.schedule, search.logits, (*best.history, *better))

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        return {
            "router": self.router.state_dict(),
            "values": self.values.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "average": self.average,
            "best": self.learned.schedule.to_dict(),
            "best_coefficients": getattr(self.learned.schedule.predictor, "tensors", None),
            "best_logits": self.learned.logits,
            "history": self.learned.history,
            "search": self.search,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.router.load_state_dict(tensors(state["router"], self.router.state_dict()))
        self.values.load_state_dict(state["values"])
        self.optimizer.load_state_dict(moments(state["optimizer"], self.optimizer))
        self.updates = count(state["updates"])
        history = tuple((count(update), number(error)) for update, error in state["history"])
        if not history:
            raise ValueError("no schedule was ever tried")
        self.average = tensor(state["average"], self.average)
        best, mine = Schedule.from_dict(state["best"], state["best_coefficients"]), self.learned
        if best.compute.shape != mine.schedule.compute.shape or best.reuses != mine.schedule.reuses:
            raise ValueError("its schedule is of another model or sampler")
        self.values.check(best.predictor)
        best = replace(best, costs=self.backbone.costs)
        self.learned = Best(best, tensor(state["best_logits"], mine.logits), history)
        search = state.get("search")
        self.search = None if search is None else restored_search(search, mine.logits)
