"""Everything about speed in sampling: planned replay, compiled blocks, CUDA graphs.

The eager path computes what the model's own forward computes with caching branches, with last
values bit for bit in float32; forecasts, which are folded into the gates, and compiled blocks round
elsewhere.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from harmonica.block_reuse import BlockReplay
from harmonica.denoise import Trajectories, precision_of
from harmonica.errors import HarmonicaError, HarmonicaWarning
from harmonica.files import first_line
from harmonica.fusion import Update, add_updates, embed, fused_if, head, join, run_branches
from harmonica.memory import is_out_of_memory
from harmonica.predictors import LAST, Predictor
from harmonica.replay_plan import Add, Compute, Join, plan_replay
from harmonica.samplers import State
from harmonica.schedule import Schedule
from models.transformer import Conditioning, DiffusionTransformer

# Updates that a compiled block adds to the stream before it reads it, at most. Every number is a
# graph of its own: at least five times as many graphs as choices of branches, for fewer passes over
# the stream.
ABSORBED = 4
# Of how many updates a kernel of nothing but sums is; it reads no more values than the first.
ARITIES = (8, 4, 2, 1)


@dataclass(frozen=True)
class Acceleration:
    """How replay runs.

    Attributes:
        compiles: fuse blocks, embedding and head with torch.compile, which takes a C++ compiler or
            Triton.
        captures: replay the whole trajectory as one CUDA graph.
    """

    compiles: bool = False
    captures: bool = False


EAGER = Acceleration()


# What the values of a reused branch are multiplied with, by (evaluation, branch).
Factors = dict[tuple[int, int], tuple[Tensor | None, ...]]


class Recipe:
    """A schedule made ready for a model: its plan, and the predictor's weights on the device."""

    def __init__(self, schedule: Schedule | None, batch: Trajectories):
        names, predictor = batch.model.branch_names, LAST
        compute = np.ones((batch.num_steps, len(names)), dtype=bool)
        if schedule is not None:
            compute, predictor = schedule.compute, schedule.predictor
        self.depth = predictor.depth
        self.plan = plan_replay(compute, names, self.depth, batch.model.joins)
        self._places = [
            [place for added in step if isinstance(added, Add) for place in added.branches]
            for step in self.plan.steps
        ]
        self._weights: dict[int, Tensor] = {}  # evaluation to (N, depth, 1 or d)
        for s, places in enumerate(self._places):
            if places and predictor != LAST:
                weights = [_padded_weights(predictor, s, i, steps) for i, _, _, steps in places]
                self._weights[s] = torch.stack(weights).to(batch.x_T.device)

    def factors(self, window: dict[int, Conditioning]) -> Factors:
        """Of all branches that are reused at the evaluations whose conditioning this is.

        Weights are folded into gates for all of them at once, in float32: what stands in for a
        branch is then one pass over its values.
        """
        gates = {
            (s, i): conditioning.blocks[block][k].gate
            for s, conditioning in window.items()
            for i, block, k, _ in self._places[s]
        }
        weights = [self._weights[s] for s in window if s in self._weights]
        if not weights:
            return {place: (gate,) for place, gate in gates.items()}
        folded = torch.cat(weights)
        a_gate = next(iter(window.values())).blocks[0][0].gate
        if a_gate is not None:  # where some branches have gates, forecasts of all have
            one = torch.ones_like(a_gate)
            every = torch.stack([one if gate is None else gate for gate in gates.values()])
            folded = every[:, None] * folded[:, :, None, None]  # (N, depth, B, 1, d)
        return {place: tuple(factors) for place, factors in zip(gates, folded, strict=True)}


def _padded_weights(predictor: Predictor, s: int, i: int, steps: tuple[int, ...]) -> Tensor:
    """(depth, 1 or d), zeros where there are fewer values."""
    weights = [
        torch.as_tensor(weight, dtype=torch.float32).reshape(-1)
        for weight in predictor.weights(s, i, steps)
    ]
    return torch.stack(weights + [torch.zeros_like(weights[0])] * (predictor.depth - len(weights)))


def planned_cache_bytes(
    schedule: Schedule, model: DiffusionTransformer, size: tuple[int, int], rows: int
) -> int | None:
    """Most that replay keeps of branches at once; None where it reuses something else.

    Values that are read for the last time are not counted: they stay until the stream is next read.
    Nor are gates with the weights of forecasts, which are per row, not per token.

    Args:
        size: height and width of the latents.
        rows: of the model, guidance halves counted.
    """
    if schedule.reuses != "branches":
        return None
    plan = plan_replay(schedule.compute, schedule.costs.names, schedule.predictor.depth)
    numbers = rows * model.tokens_at(*size) * model.config.hidden_size
    return plan.peak_values * numbers * precision_of(model).itemsize


class PlannedReplay:
    """One trajectory of a planned schedule; built for it and dropped with it."""

    def __init__(self, batch: Trajectories, recipe: Recipe, how: Acceleration):
        self.batch, self.recipe, self.compiles = batch, recipe, how.compiles
        self._run = partial(fused_if, how.compiles)
        self.kept: dict[tuple[int, int], Tensor] = {}  # (branch, step it was computed at)
        self._factors: Factors = {}  # those of a window that are still to be read, once each

    def predict(self, s: int, x: Tensor) -> Tensor:
        """Guided output of evaluation s."""
        return self.batch.evaluate(lambda rows, c: self._evaluate(s, rows, c), s, x)

    def _evaluate(self, s: int, x: Tensor, conditioning: Conditioning) -> Tensor:
        model, size, ends = self.batch.model, x.shape[-2:], conditioning.ends
        skips: dict[int, Tensor] = {}
        x, lacking = self._run(embed)(model, x, ends), []
        for operation in self.recipe.plan.steps[s]:
            if isinstance(operation, Compute):
                x, lacking = self._within_reach(x, lacking, conditioning)
                x, lacking = self._compute(s, operation, x, lacking, conditioning)
            elif isinstance(operation, Add):
                lacking += self._reused(s, operation)
            else:
                x, lacking = self._complete(x, lacking), []
                if isinstance(operation, Join):
                    skip = skips.pop(operation.source)
                    x = self._run(join)(model.blocks[operation.block], x, skip)
                else:
                    skips[operation.block] = x
        x, lacking = self._within_reach(x, lacking, conditioning)
        return self._run(head)(model, x, lacking, ends, size)

    def _compute(
        self,
        s: int,
        operation: Compute,
        x: Tensor,
        lacking: list[Update],
        conditioning: Conditioning,
    ) -> tuple[Tensor, list[Update]]:
        """The stream after some branches, and what it lacks then."""
        block = self.batch.model.blocks[operation.block]
        parts = conditioning.blocks[operation.block]
        which = tuple(k for _, k, _ in operation.branches)
        x, values = self._run(run_branches)(block, which, x, lacking, parts)
        for (i, _, keeps), value in zip(operation.branches, values, strict=True):
            if keeps:
                self.kept[i, s] = value
        return x, [Update((values[-1],), (parts[which[-1]].gate,))]

    def _reused(self, s: int, operation: Add) -> list[Update]:
        """What stands in for branches."""
        updates = []
        for i, _, _, steps in operation.branches:
            if (s, i) not in self._factors:
                self._factors = self.recipe.factors(self.batch.window(s))
            values = tuple(self.kept[i, step] for step in steps)
            updates.append(Update(values, self._factors.pop((s, i))[: len(values)]))
        for place in operation.dropped:
            del self.kept[place]
        return updates

    def _within_reach(
        self, x: Tensor, lacking: list[Update], conditioning: Conditioning
    ) -> tuple[Tensor, list[Update]]:
        """The stream, and what it lacks: of the model's kind and no more than a graph adds."""
        if not self.compiles:
            return self._complete(x, lacking), []
        has_gate, depth = conditioning.blocks[0][0].gate is not None, self.recipe.depth
        fitting, others = [], []
        for k, update in enumerate(lacking):
            # The first may be of one value anyway: a branch that was just computed. Further back, a
            # forecast from fewer values would make a graph for every place that it can take.
            fits = update.is_gated is has_gate and (k == 0 or len(update.values) == depth)
            (fitting if fits and len(fitting) < ABSORBED else others).append(update)
        return self._complete(x, others), fitting

    def _complete(self, x: Tensor, lacking: list[Update]) -> Tensor:
        """The stream that lacks nothing."""
        if not self.compiles:
            return add_updates(x, lacking)
        # Each kind by itself: every mixture would be a graph of its own.
        for kind in dict.fromkeys(update.kind for update in lacking):
            rest = [update for update in lacking if update.kind == kind]
            while rest:
                most = min(len(rest), ARITIES[0] // kind[0])
                arity = next(n for n in ARITIES if n <= most)
                x = self._run(add_updates)(x, rest[:arity])
                rest = rest[arity:]
        return x


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Around a capture: one that fails leaves torch's generators, which wait for its end, as they
    were.
    """
    kept = [(generator, generator.clone_state()) for generator in torch.cuda.default_generators]
    try:
        yield
    except RuntimeError:
        for generator, state in kept:
            generator.graphsafe_set_state(state)
        raise


class CapturedTrajectory:
    """A whole trajectory as one CUDA graph, for batches of one shape.

    Args:
        run: has run such a batch before. Capture wants no more than that: code is compiled and
            loaded, libraries have their handles, and their work space on the stream of the capture
            comes from the memory of the graph.
    """

    # They share one memory, since nothing is left in it that is read after a replay. torch takes
    # memory away whose graphs are all gone, so it is that of any graph that is there.
    _all: ClassVar[WeakSet["CapturedTrajectory"]] = WeakSet()

    def __init__(self, batch: Trajectories, run: Callable[[Trajectories], Tensor]):
        steps = range(batch.num_steps) if batch.sampler.stochastic else ()
        self.y, self.x_T = batch.y.clone(), batch.x_T.clone()
        self.noise = [batch.noise(s).clone() for s in steps]
        inputs = replace(batch, y=self.y, x_T=self.x_T, noise=self.noise.__getitem__, tally=None)
        self.graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in self._all), None)
        # The stream's context, because a capture that fails does not give it back.
        with (
            generators_kept(),
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(self.graph, pool=pool),
        ):
            self.final = run(inputs)
        self._all.add(self)

    def __call__(self, batch: Trajectories) -> Tensor:
        self.y.copy_(batch.y)
        self.x_T.copy_(batch.x_T)
        for s, noise in enumerate(self.noise):
            noise.copy_(batch.noise(s))
        self.graph.replay()
        if batch.tally is not None:
            batch.tally.evaluations += batch.num_steps * len(batch.x_T)
        return self.final.clone()


class Engine:
    """Samples trajectories with one schedule; CUDA graphs are kept between batches.

    A graph is captured at the second batch of a shape: a single one would only pay for it.

    Attributes:
        how: what it does; no more graphs are captured once that has failed.
        most: samples that fit into memory, once more did not; until then None.
    """

    def __init__(self, schedule: Schedule | None, how: Acceleration = EAGER):
        """``schedule``: None computes everything."""
        self.schedule, self.how = schedule, how
        self.most: int | None = None
        self._recipe: Recipe | None = None
        self._seen: set[torch.Size] = set()
        self._captured: dict[torch.Size, CapturedTrajectory] = {}

    def __call__(self, batch: Trajectories) -> Tensor:
        """Final latents (n, C, H, W) of a batch; all batches are of one model and sampler.

        What does not fit into the memory of a GPU is halved until it does, and so are later ones.

        Raises:
            HarmonicaError: not even one sample fits.
        """
        wanted = len(batch.x_T)
        size = tried = min(wanted, self.most or wanted)
        while (final := self._within_memory(batch, size)) is None:
            size = (size + 1) // 2
        if size < tried:
            self.most = size
            print(
                f"{tried} images do not fit into the memory of the GPU at once; going on with "
                f"{size} at a time",
                file=sys.stderr,
            )
        return final

    def _within_memory(self, batch: Trajectories, size: int) -> Tensor | None:
        """Final latents of a batch, so many samples at a time; None if those are too many."""
        try:
            return self._in_parts(batch, size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise HarmonicaError(
                    "not even one image fits into the memory of the GPU; use --mixed-precision "
                    "bf16, a smaller --image-size, or another GPU"
                ) from None
        # Not in the handler, whose exception holds on to what the attempt has allocated.
        self._seen.clear()
        self._captured.clear()
        torch.cuda.empty_cache()
        return None

    def _in_parts(self, batch: Trajectories, size: int) -> Tensor:
        count = len(batch.x_T)
        if size == count:
            return self._whole(batch)
        final = torch.empty_like(batch.x_T)
        for start in range(0, count, size):
            # All of one size, for which blocks are compiled: the last may overlap its neighbour.
            start = min(start, count - size)
            part = slice(start, start + size)
            final[part] = self._whole(batch.part(part))
        return final

    def _whole(self, batch: Trajectories) -> Tensor:
        shape = batch.x_T.shape
        if self.how.captures and shape in self._seen and shape not in self._captured:
            self._capture(batch)
        if shape in self._captured:
            return self._captured[shape](batch)
        self._seen.add(shape)
        return self._run(batch)

    def _capture(self, batch: Trajectories) -> None:
        """Keep a graph for batches of this shape, or give graphs up."""
        try:
            self._captured[batch.x_T.shape] = CapturedTrajectory(batch, self._run)
        except RuntimeError as error:
            self.how = replace(self.how, captures=False)
            warnings.warn(
                f"no CUDA graph could be captured ({first_line(error)}); going on without, as "
                "--no-cuda-graphs does",
                HarmonicaWarning,
                stacklevel=2,
            )

    def _run(self, batch: Trajectories) -> Tensor:
        batch = replace(batch)  # conditioning known from an earlier run would make this one cheaper
        if self.schedule is not None and self.schedule.reuses != "branches":
            replay = BlockReplay(batch, self.schedule, self.how.compiles)
        else:
            replay = PlannedReplay(batch, self._recipe_for(batch), self.how)
        return batch.walk(State(batch.x_T), replay.predict).x

    def _recipe_for(self, batch: Trajectories) -> Recipe:
        """Made at the first batch; the others are of the same model and number of steps."""
        if self._recipe is None:
            self._recipe = Recipe(self.schedule, batch)
        return self._recipe
