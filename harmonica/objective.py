"""Image error proxy objective: weights lambda(t), and the loss they enter.

A rollout that differs from another only from step s on needs only the steps from s on: each
estimator walks the base trajectory once and branches off it, T + T(T-1)/2 model evaluations in
all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harmonica.cache import Cache, Masking, computing_branches
from harmonica.denoise import Trajectories
from harmonica.samplers import State


@dataclass(frozen=True)
class Student:
    """A router at work on a batch of trajectories, without gradient."""

    trajectories: Trajectories
    logits: Tensor  # (T, N)
    masking: Masking

    def predict(self, cache: Cache, forced: int | None = None) -> Callable[[int, Tensor], Tensor]:
        """Predictor that blends through ``cache``; step ``forced`` computes everything."""

        def at(s: int, x: Tensor) -> Tensor:
            if s == 0 or s == forced:
                return self.trajectories.predict(s, x, computing_branches(cache, s))
            branches = self.masking.branches(cache, s, self.logits[s])
            output = self.trajectories.predict(s, x, branches)
            self.masking.store(cache, s, branches)
            return output

        return at


@dataclass(frozen=True)
class ImageErrors:
    """What reuse at each step does, averaged over a batch; entry 0 is 0.

    Attributes:
        image: (T,) lambda, mean squared change of the final sample.
        output: (T,) mean squared difference of teacher and student outputs at that step, both at
            the student's x_s: the error that the loss sees. It costs no further evaluation.
    """

    image: Tensor
    output: Tensor

    @classmethod
    def of(cls, image: list[Tensor], output: list[Tensor]) -> "ImageErrors":
        zero = torch.zeros_like(image[0])
        return cls(torch.stack([zero, *image]), torch.stack([zero, *output]))


def _recorded(
    predict: Callable[[int, Tensor], Tensor], outputs: dict[int, Tensor]
) -> Callable[[int, Tensor], Tensor]:
    """A predictor that keeps what it returned, by step."""

    def at(s: int, x: Tensor) -> Tensor:
        outputs[s] = predict(s, x)
        return outputs[s]

    return at


def leave_one_out(student: Student) -> ImageErrors:
    """Image-error weights, HarmoniCa eq. 7: what forcing step s to compute changes in the image."""
    batch, cache = student.trajectories, student.masking.cache()
    state, images, output_errors = State(batch.x_T), [], []
    for s in range(batch.num_steps):
        here: dict[int, Tensor] = {}
        branched = cache.branched()
        following = batch.walk(state, _recorded(student.predict(cache), here), start=s, stop=s + 1)
        if s > 0:
            forced: dict[int, Tensor] = {}
            predict = _recorded(student.predict(branched, forced=s), forced)
            images.append(batch.walk(state, predict, start=s).x)
            output_errors.append(batch.output_error(forced[s], here[s]))
        state = following
    return ImageErrors.of([(state.x - image).square().mean() for image in images], output_errors)


def cumulative(student: Student) -> ImageErrors:
    """Image-error weights as the released code takes them: what the router adds at step s.

    Compares the image with the router active up to and including step s to the image with it
    active only before s; after that everything is computed.
    """
    batch, cache = student.trajectories, student.masking.cache()
    state, images, output_errors = State(batch.x_T), [], []
    computed: dict[int, Tensor] = {}
    for s in range(batch.num_steps):
        here: dict[int, Tensor] = {}
        state = batch.walk(state, _recorded(student.predict(cache), here), start=s, stop=s + 1)
        if s > 0:
            output_errors.append(batch.output_error(computed[s], here[s]))
        images.append(batch.walk(state, _recorded(batch.predict, computed), start=s + 1).x)
    pairs = zip(images[1:], images[:-1], strict=True)
    return ImageErrors.of([(a - b).square().mean() for a, b in pairs], output_errors)


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
