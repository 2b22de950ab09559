"""Image error proxy objective: weights lambda(t), and the loss they enter.

A rollout that differs from another only from step s on needs only the steps from s on: each
estimator walks the base trajectory once and branches off it, T + T(T-1)/2 model evaluations in
all.
"""

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harmonica.cache import Cache, Masking, fill
from harmonica.denoise import Trajectories, part_rows
from harmonica.fusion import block_runner
from harmonica.memory import is_out_of_memory
from harmonica.samplers import State


@dataclass
class Fork:
    """A rollout of its own from step ``start`` on.

    Attributes:
        first: guided output at its first step, once that is done.
    """

    start: int
    state: State
    cache: Cache
    first: Tensor | None = None


@dataclass
class Student:
    """A router at work on a batch of trajectories, without gradient.

    Attributes:
        most_rows: of one forward, for rollouts that run side by side; fewer once so many did not
            fit into the memory of a GPU.
    """

    trajectories: Trajectories
    logits: Tensor  # (T, N)
    masking: Masking
    most_rows: int = 0

    def step(
        self, s: int, state: State, cache: Cache, forced: bool = False
    ) -> tuple[State, Tensor]:
        """The state after step s and the guided output there; ``forced`` computes everything."""
        outputs = []

        def predict(s: int, x: Tensor) -> Tensor:
            if s == 0 or forced:
                outputs.append(fill(cache, self.trajectories, s, x))
            else:
                branches = self.masking.branches([cache], s, self.logits[s])
                outputs.append(self.trajectories.predict(s, x, branches))
                self.masking.store([cache], s, branches)
            return outputs[0]

        return self.trajectories.walk(state, predict, start=s, stop=s + 1), outputs[0]

    @property
    def _rows(self) -> int:
        """Of one rollout."""
        return len(self.trajectories.x_T) * self.trajectories.guidance.halves

    @property
    def side_by_side(self) -> int:
        """Rollouts of one forward."""
        return max(1, self.most_rows // self._rows)

    def finish(self, forks: list[Fork], reuses: bool) -> list[Tensor]:
        """Final latents of some forks, which run side by side: a step in as few forwards as may be.

        Args:
            reuses: whether the router is active in them.
        """
        for s in range(min(fork.start for fork in forks), self.trajectories.num_steps):
            standing = [fork for fork in forks if fork.start <= s]
            while standing:
                part = standing[: self.side_by_side]
                if self._advance(part, s, reuses):
                    standing = standing[len(part) :]
        return [fork.state.x for fork in forks]

    def _advance(self, forks: list[Fork], s: int, reuses: bool) -> bool:
        """Step s of forks that stand there, in one forward; False if that takes too much memory."""
        try:
            self._forward(forks, s, reuses)
            return True
        except RuntimeError as error:
            if len(forks) == 1 or not is_out_of_memory(error):
                raise
        # Not in the handler, whose exception holds on to what the attempt has allocated.
        torch.cuda.empty_cache()
        self.most_rows = (len(forks) + 1) // 2 * self._rows
        print(
            f"{len(forks) * self._rows} rows of a refresh of lambda do not fit into the memory of "
            f"the GPU at once; going on with {self.most_rows}",
            file=sys.stderr,
        )
        return False

    def _forward(self, forks: list[Fork], s: int, reuses: bool) -> None:
        """The forks change where all of it has been done, and not before."""
        batch = self.trajectories.repeated(len(forks))
        if len(forks) not in (1, self.side_by_side):
            # While a group fills up its size changes at every step: too many shapes to compile.
            batch = replace(batch, run=block_runner(compiles=False, checkpoints=False))
        halves, outputs = batch.guidance.halves, []
        caches = [fork.cache.branched() for fork in forks] if reuses else []

        def predict(s: int, x: Tensor) -> Tensor:
            branches = None
            if reuses:
                branches = self.masking.branches(caches, s, self.logits[s], halves)
            outputs.append(batch.predict(s, x, branches))
            if reuses:
                self.masking.store(caches, s, branches, halves)
            return outputs[0]

        following = batch.walk(_joined([fork.state for fork in forks]), predict, s, s + 1)
        states = _parted(following, len(forks))
        firsts = part_rows(outputs[0], len(forks), halves)
        for fork, state, first in zip(forks, states, firsts, strict=True):
            fork.state = state
            fork.first = first if fork.start == s else fork.first
        for fork, cache in zip(forks, caches, strict=False):
            fork.cache = cache


def _joined(states: list[State]) -> State:
    """Of several batches, as that of one."""
    history = zip(*(state.history for state in states), strict=True)
    return State(torch.cat([state.x for state in states]), tuple(torch.cat(x) for x in history))


def _parted(state: State, count: int) -> list[State]:
    """Inverse of ``_joined``, for batches of one size."""
    histories = list(zip(*(kept.chunk(count) for kept in state.history), strict=True))
    xs = state.x.chunk(count)
    return [State(x, kept) for x, kept in zip(xs, histories or [()] * count, strict=True)]


@dataclass(frozen=True)
class ImageErrors:
    """What reuse at each step does, averaged over a batch; entry 0 is 0.

    Attributes:
        image: (T,) lambda, mean squared change of the final sample.
        output: (T,) mean squared difference of teacher and student outputs at that step, both at
            the student's x_s: the error that the loss sees. It costs no further evaluation.
        finite: (n,) whether all final samples of an index are finite.
    """

    image: Tensor
    output: Tensor
    finite: Tensor

    @classmethod
    def of(cls, image: list[Tensor], output: list[Tensor], samples: list[Tensor]) -> "ImageErrors":
        """``samples``: final ones (n, C, H, W), of every rollout."""
        zero = torch.zeros_like(image[0])
        finite = torch.stack([x.flatten(1).isfinite().all(dim=1) for x in samples]).all(dim=0)
        return cls(torch.stack([zero, *image]), torch.stack([zero, *output]), finite)


def leave_one_out(student: Student) -> ImageErrors:
    """Image-error weights, HarmoniCa eq. 7: what forcing step s to compute changes in the image."""
    batch, cache = student.trajectories, student.masking.cache()
    state, images, output_errors, waiting = State(batch.x_T), [], [], []
    for s in range(batch.num_steps):
        branched = cache.branched()
        following, here = student.step(s, state, cache)
        if s > 0:
            forced, computed = student.step(s, state, branched, forced=True)
            output_errors.append(batch.output_error(computed, here))
            waiting.append(Fork(s + 1, forced, branched))
        if len(waiting) == student.side_by_side or s == batch.num_steps - 1:
            images += student.finish(waiting, reuses=True)
            waiting = []
        state = following
    changes = [(state.x - image).square().mean() for image in images]
    return ImageErrors.of(changes, output_errors, [state.x, *images])


def cumulative(student: Student) -> ImageErrors:
    """Image-error weights as the released code takes them: what the router adds at step s.

    Compares the image with the router active up to and including step s to the image with it
    active only before s; after that everything is computed.
    """
    batch, cache = student.trajectories, student.masking.cache()
    state, images, forks, outputs = State(batch.x_T), [], [], []
    for s in range(batch.num_steps):
        state, here = student.step(s, state, cache)
        outputs.append(here)
        forks.append(Fork(s + 1, state, cache))
        waiting = forks[len(images) :]
        if len(waiting) == student.side_by_side or s == batch.num_steps - 1:
            images += student.finish(waiting, reuses=False)
    # A fork's first step is the teacher where the student took its own.
    steps = zip(forks[:-1], outputs[1:], strict=True)
    output_errors = [batch.output_error(fork.first, here) for fork, here in steps]
    pairs = zip(images[1:], images[:-1], strict=True)
    return ImageErrors.of([(a - b).square().mean() for a, b in pairs], output_errors, images)


ESTIMATORS = {"leave-one-out": leave_one_out, "cumulative": cumulative}
FORMS = ("published", "normalized", "sensitivity", "constant")


def image_error_weights(image: Tensor, output: Tensor, form: str) -> Tensor:
    """Weights (T,) of the loss from the errors of a refresh, (T,) each.

    Args:
        form: "published" takes lambda as it is; "normalized" scales it to mean 1, so that beta
            keeps its meaning between refreshes; "sensitivity" divides lambda by the step's own
            output error first. Lambda grows with that error, which the loss multiplies in again:
            the quotient is what one unit of output error does to the image. A step without output
            error, whose quotient is unknown, takes the mean of the others. "constant" is 1: the
            loss of Learning-to-Cache, which needs no refresh.
    """
    if form == "published":
        return image
    if form == "constant":
        return torch.cat([torch.zeros_like(image[:1]), torch.ones_like(image[1:])])
    weights = image[1:]
    if form == "sensitivity":
        known = output[1:] > 0
        quotients = weights[known] / output[1:][known]
        weights = torch.full_like(weights, quotients.mean() if known.any() else 1.0)
        weights[known] = quotients
    mean = weights.mean()
    weights = weights / mean if mean > 0 else torch.ones_like(weights)
    return torch.cat([torch.zeros_like(image[:1]), weights])


def iepo_loss(error: Tensor, scores: Tensor, weight: float, beta: float) -> Tensor:
    """HarmoniCa eq. 8: ``lambda_s * error_s + beta * sum_i r_{s,i}``.

    Args:
        error: () mean squared difference of teacher and student outputs at step s.
        scores: (N,) router scores of step s.
        weight: lambda_s.
    """
    return weight * error + beta * scores.sum()
