"""What a skipped branch returns: a linear combination of the values computed before.

The combination depends on the step, the branch and the steps at which the values were computed. A
schedule fixes all of them, so the weights are known before sampling starts and a forecast costs
little more than reading another cached tensor.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from harmonica.samplers import Sampler

# A number, or a tensor (d,): one number for every channel.
Weight = float | Tensor
ORDERS = (1, 2)


class Predictor(Protocol):
    """Maker of the weights.

    Attributes:
        name: what ``--predictor`` calls it.
        depth: how many computed values it wants at most.
    """

    name: str
    depth: int

    def weights(self, s: int, i: int, computed: Sequence[int]) -> tuple[Weight, ...]:
        """Weights at step s for branch i of the values of the steps ``computed``, newest first.

        There are at least one and at most ``depth`` of them: with fewer a predictor does what it
        can.
        """
        ...


@dataclass(frozen=True)
class LastValue:
    """The published predictor: the last computed value, unchanged."""

    name = "last"
    depth = 1

    def weights(self, s: int, i: int, computed: Sequence[int]) -> tuple[Weight, ...]:
        return (1.0,)


LAST = LastValue()


@dataclass(frozen=True)
class Extrapolation:
    """The polynomial through the last ``order + 1`` values, in a coordinate of the steps.

    Attributes:
        coordinate: (T,) what distances between steps are measured in.
    """

    order: int
    coordinate: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"taylor{self.order}"

    @property
    def depth(self) -> int:
        return self.order + 1

    def weights(self, s: int, i: int, computed: Sequence[int]) -> tuple[Weight, ...]:
        # Lagrange's form: exact for polynomials of degree len(computed) - 1.
        u, places = self.coordinate[s], [self.coordinate[c] for c in computed]
        return tuple(
            math.prod(
                ((u - other) / (place - other) for other in places if other != place), start=1.0
            )
            for place in places
        )


@dataclass(frozen=True)
class TaylorSeer:
    """TaylorSeer (Liu et al., 2025): Taylor's series with derivatives by backward differences.

    Distances are counted in steps; each derivative is the difference of the lower ones over the
    distance of the last two computed steps. Of order 1 it is the linear extrapolation.
    """

    order: int

    @property
    def name(self) -> str:
        return f"taylorseer{self.order}"

    @property
    def depth(self) -> int:
        return self.order + 1

    def weights(self, s: int, i: int, computed: Sequence[int]) -> tuple[Weight, ...]:
        # Every derivative as its weights of the values; lower ones at each computed step.
        derivatives = list(np.eye(len(computed)))
        forecast, ahead = derivatives[0].copy(), s - computed[0]
        for order in range(1, len(computed)):
            derivatives = [
                (newer - older) / (computed[k] - computed[k + 1])
                for k, (newer, older) in enumerate(itertools.pairwise(derivatives))
            ]
            forecast += derivatives[0] * ahead**order / math.factorial(order)
        return tuple(float(weight) for weight in forecast)


@dataclass(frozen=True, eq=False)
class Learned:
    """Coefficients per step and branch on the last value and on its last difference.

    ``base`` forecasts ``v + rho * (v - w)`` from the last values v and w; this one returns
    ``(1 + level) * v + (rho + slope) * (v - w)``, so zeros are ``base``. Where only v exists, the
    difference is left out.

    Attributes:
        base: ``LastValue`` or an ``Extrapolation`` of order 1.
        level: (T, N, 1) or (T, N, d), for every channel; a list of T rows while they learn.
        slope: likewise.
    """

    base: LastValue | Extrapolation
    level: Tensor | list[Tensor]
    slope: Tensor | list[Tensor]
    name = "learned"
    depth = 2

    @classmethod
    def start(
        cls, base: LastValue | Extrapolation, num_steps: int, num_branches: int, channels: int
    ) -> "Learned":
        """Equal to ``base``; ``channels`` is 1 for scalars."""
        zeros = torch.zeros(num_steps, num_branches, channels)
        return cls(base, zeros, zeros.clone())

    def weights(self, s: int, i: int, computed: Sequence[int]) -> tuple[Weight, ...]:
        level = 1.0 + self.level[s][i]
        if len(computed) == 1:
            return (level,)
        older = self.base.weights(s, i, computed)[1:]
        slope = self.slope[s][i] - (older[0] if older else 0.0)
        return (level + slope, -slope)

    def to(self, device: torch.device) -> "Learned":
        return replace(self, level=self.level.to(device), slope=self.slope.to(device))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a file holds besides ``to_dict``, on the CPU."""
        pair = {"level": self.level, "slope": self.slope}
        return {name: value.detach().float().cpu().contiguous() for name, value in pair.items()}


def to_dict(predictor: Predictor) -> dict[str, Any]:
    """JSON form, without the tensors of a learned one, which are named by their hash."""
    match predictor:
        case LastValue():
            return {"name": "last"}
        case Extrapolation(order, coordinate):
            return {"name": "extrapolation", "order": order, "coordinate": list(coordinate)}
        case TaylorSeer(order):
            return {"name": "taylorseer", "order": order}
        case Learned(base=base):
            digest = hashlib.sha256()
            for value in predictor.tensors.values():
                digest.update(str(tuple(value.shape)).encode() + value.numpy().tobytes())
            return {"name": "learned", "base": to_dict(base), "hash": digest.hexdigest()[:16]}
    raise TypeError(f"{type(predictor).__name__} has no JSON form")


def from_dict(
    content: dict[str, Any], shape: tuple[int, int], tensors: Mapping[str, Tensor] | None = None
) -> Predictor:
    """Inverse of :func:`to_dict`.

    Args:
        shape: (T, N) of the schedule.
        tensors: of the file that ``content`` comes from.

    Raises:
        ValueError: malformed, of another shape, or without its tensors.
    """
    name = content["name"]
    if name == "last":
        return LAST
    if name in ("extrapolation", "taylorseer"):
        order = content["order"]
        if type(order) is not int or order not in ORDERS:
            raise ValueError(f"order {order} of {name}")
        if name == "taylorseer":
            return TaylorSeer(order)
        coordinate = tuple(float(u) for u in content["coordinate"])
        if len(set(coordinate)) != shape[0] or not all(map(math.isfinite, coordinate)):
            raise ValueError("coordinates are not one finite number a step")
        return Extrapolation(order, coordinate)
    if name != "learned":
        raise ValueError(f"unknown predictor {name!r}")
    if tensors is None or not {"level", "slope"} <= tensors.keys():
        raise ValueError("learned coefficients are in the router file; pass that one")
    level, slope = tensors["level"], tensors["slope"]
    if level.shape != slope.shape or level.ndim != 3 or tuple(level.shape[:2]) != shape:
        raise ValueError(f"coefficients of shapes {tuple(level.shape)} and {tuple(slope.shape)}")
    if not (level.isfinite().all() and slope.isfinite().all()):
        raise ValueError("coefficients that are not finite")
    base = from_dict(content["base"], shape)
    if base.depth > Learned.depth or isinstance(base, TaylorSeer):
        raise ValueError(f"learned on {base.name}")
    learned = Learned(base, level, slope)
    if to_dict(learned)["hash"] != content.get("hash"):
        raise ValueError("coefficients do not match their hash")
    return learned


PREDICTORS = ("last", "taylor1", "taylor2")
# What distances between steps are measured in.
COORDINATES = ("step", "time", "log-snr")
# Learned coefficients per (step, branch): one, or one per channel.
COEFFICIENTS = ("scalar", "channel")


def coordinate_of(kind: str, sampler: Sampler) -> tuple[float, ...]:
    """(T,) one number per step: its index, its time, or its log-SNR; ``kind`` says which."""
    if kind == "step":
        return tuple(float(s) for s in range(len(sampler.timesteps)))
    if kind == "time":
        return tuple(float(t) for t in sampler.timesteps)
    return tuple(math.log(bar) - math.log1p(-bar) for bar in sampler.alphas_bar)


def create_predictor(name: str, kind: str, sampler: Sampler) -> LastValue | Extrapolation:
    """The predictor that ``--predictor`` calls ``name``, without anything learned."""
    if name == "last":
        return LAST
    return Extrapolation(PREDICTORS.index(name), coordinate_of(kind, sampler))


def combine(weights: Sequence[Weight], values: Sequence[Tensor]) -> Tensor:
    """``sum_j weights[j] * values[j]``, values (B, L, d); a lone weight of 1 costs nothing.

    Summed in float32 at least, since half precision would round small coefficients away. The sum
    comes in the precision of the values; replay, which folds weights into gates, does not round it.
    """
    if len(weights) == 1 and isinstance(weights[0], float) and weights[0] == 1.0:
        return values[0]
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    terms = [weight * value.to(dtype) for weight, value in zip(weights, values, strict=True)]
    return sum(terms[1:], terms[0]).to(values[0].dtype)
