"""Singlestep DPM-Solver in continuous time, as U-ViT uses it.

Our own: the library's scheduler visits other times. T counts evaluations. A grid of T equal parts
of t goes from 1 to the least noise of training; a step of order k covers k parts and takes k
evaluations. The published solver of order 2 puts the second one at the middle of the step in
log-SNR, that of order 3 ("fast") evaluates at the nodes of the grid.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from harmonica.diffusion import NOISE_SCHEDULES, NoiseSchedule
from harmonica.samplers.sampler import State


class Evaluation(NamedTuple):
    """An evaluation at x = alpha * data + sigma * noise, and what x at the next one is made of.

    Attributes:
        time: what the model is given.
        alone: weights of x and of the data predicted here, at first order.
        together: weights of x at the start of the step, of the data predicted there, and of the
            data predicted here; None at the start of a step.
        continues: whether the next evaluation is of the same step.
    """

    time: float
    alpha: float
    sigma: float
    alone: tuple[float, float]
    together: tuple[float, float, float] | None
    continues: bool


@dataclass(frozen=True)
class SinglestepDPMSolver:
    """DPM-Solver (Lu et al., 2022), in its form with data prediction.

    History, inside a step: x at its start, and the data predicted there.
    """

    name: str
    evaluations: tuple[Evaluation, ...]
    stochastic = False
    uses_variance = False

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(evaluation.time for evaluation in self.evaluations)

    @property
    def alphas_bar(self) -> tuple[float, ...]:
        return tuple(evaluation.alpha**2 for evaluation in self.evaluations)

    def step(self, s: int, state: State, output: Tensor, noise: Tensor | None) -> State:
        here, x, history = self.evaluations[s], state.x, state.history
        data = (x - here.sigma * output[:, : x.shape[1]]) / here.alpha
        if here.together is None or not history:
            following = here.alone[0] * x + here.alone[1] * data
        else:
            start, first = history
            following = here.together[0] * start + here.together[1] * first
            following = following + here.together[2] * data
        if here.together is None:
            history = (x, data)
        return State(following, history if here.continues else ())


def _orders(num_steps: int, order: int) -> list[int]:
    """Orders of the steps: as many of the highest as fit, and what is left over at the end.

    A step of order k covers k of ``num_steps`` equal parts of t (DPM-Solver, section 3.4).
    """
    rest = num_steps % order
    if order == 3 and rest == 0:  # as published: where log-SNR moves fast, steps are short
        return [3] * (num_steps // 3 - 1) + [2, 1]
    return [order] * (num_steps // order) + [rest] * (rest > 0)


def _data_weights(r: float, node: float, h: float, order: int) -> tuple[float, float]:
    """Weights of the data predicted at the start and at ``node``, for x at ``r``, over its alpha.

    DPM-Solver++ eq. 9 with data that change linearly in log-SNR; ``r`` and ``node`` are fractions
    of the step's change of log-SNR, h. The step of order 2 takes what they are at its middle as
    constant, like Algorithm 1 there.
    """
    constant = -np.expm1(-r * h)
    linear = constant / 2 if order == 2 else r - constant / h
    return constant - linear / node, linear / node


def step_evaluations(schedule: NoiseSchedule, nodes: np.ndarray) -> list[Evaluation]:
    """Those of one step, of order k, through k + 1 nodes in continuous time."""
    order, log_snr = len(nodes) - 1, _log_snr(schedule, nodes)
    h = float(log_snr[-1] - log_snr[0])
    fractions = ((log_snr - log_snr[0]) / h).tolist()
    times = schedule.model_time(schedule.step_at(nodes)).tolist()
    alphas = np.exp(schedule.log_alpha(nodes)).tolist()
    sigmas = [float(np.sqrt(1 - alpha**2)) for alpha in alphas]
    evaluations = []
    for k in range(order):
        alpha, ratio = alphas[k + 1], sigmas[k + 1] / sigmas[k]
        together = None
        if k > 0:
            weights = _data_weights(fractions[k + 1], fractions[k], h, order)
            together = (sigmas[k + 1] / sigmas[0], *(float(alpha * weight) for weight in weights))
        evaluations.append(
            Evaluation(
                time=times[k],
                alpha=alphas[k],
                sigma=sigmas[k],
                alone=(ratio, alpha - ratio * alphas[k]),
                together=together,
                continues=k + 1 < order,
            )
        )
    return evaluations


def _log_snr(schedule: NoiseSchedule, t: np.ndarray) -> np.ndarray:
    """log(alpha / sigma)."""
    log_alpha = schedule.log_alpha(t)
    return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))


def _even_in_log_snr(schedule: NoiseSchedule, nodes: np.ndarray) -> np.ndarray:
    """As many nodes between the same ends."""
    start, end = _log_snr(schedule, nodes[[0, -1]])
    inner = schedule.time_at(np.linspace(start, end, len(nodes))[1:-1])
    return np.array([nodes[0], *inner, nodes[-1]])


def dpm_solver(num_steps: int, order: int, noise_schedule: str = "linear") -> SinglestepDPMSolver:
    """DPM-Solver of order 2 or 3 with ``num_steps`` evaluations."""
    schedule = NOISE_SCHEDULES[noise_schedule]
    grid = np.linspace(1.0, 1 / len(schedule.betas), num_steps + 1)
    evaluations: list[Evaluation] = []
    for first, last in pairwise(np.cumsum([0, *_orders(num_steps, order)])):
        nodes = grid[first : last + 1]
        if order == 2:
            nodes = _even_in_log_snr(schedule, nodes)
        evaluations += step_evaluations(schedule, nodes)
    name = "dpm-solver" if order == 2 else f"dpm-solver-{order}"
    return SinglestepDPMSolver(name, tuple(evaluations))
