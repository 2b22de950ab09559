"""Multistep solvers of diffusers: what they remember travels in ``State.history``.

Their schedulers have their timesteps set and are never stepped: every step works on a shallow copy.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from harmonica.diffusion import NOISE_SCHEDULES, TRAIN_STEPS, NoiseSchedule
from harmonica.samplers.sampler import State


@dataclass(frozen=True)
class Multistep:
    """A sampler on the timesteps of a library scheduler.

    Attributes:
        scheduler: of diffusers.
        schedule: what the model was trained on.
    """

    name: str
    scheduler: Any
    schedule: NoiseSchedule
    uses_variance = False

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(self.schedule.model_time(self.scheduler.timesteps.numpy()).tolist())

    @property
    def alphas_bar(self) -> tuple[float, ...]:
        return tuple((1 / (1 + self.scheduler.sigmas[:-1].double() ** 2)).tolist())

    def _at(self, s: int) -> Any:
        """A scheduler of our own that is about to make step s."""
        solver = copy.copy(self.scheduler)
        solver.set_begin_index(s)
        solver._init_step_index(self.scheduler.timesteps[s])
        return solver


@dataclass(frozen=True)
class DPMSolverMultistep(Multistep):
    """DPM-Solver++(2M) (Lu et al., 2022). History: the data predicted before."""

    stochastic = False

    def step(self, s: int, state: State, output: Tensor, noise: Tensor | None) -> State:
        solver = self._at(s)
        order = solver.config.solver_order
        solver.model_outputs = [*[None] * (order - len(state.history)), *state.history]
        solver.lower_order_nums = len(state.history)
        x = solver.step(output[:, : state.x.shape[1]], None, state.x).prev_sample
        return State(x, tuple(m for m in solver.model_outputs if m is not None))


@dataclass(frozen=True)
class SASolver(Multistep):
    """SA-Solver (Xue et al., 2023): corrects where a step has led, then predicts the next.

    The predictor and the corrector are the library's; putting them together is ours, because its
    own step draws noise from a generator of the whole batch. History: the data predicted at one or
    two evaluations, the corrected x, and the noise of the last step, which the corrector repeats.

    Attributes:
        taus: (T,) share of the full noise that every step adds.
    """

    taus: tuple[float, ...]
    stochastic = True

    def step(self, s: int, state: State, output: Tensor, noise: Tensor | None) -> State:
        solver, x, before = self._at(s), state.x, []
        data = solver.convert_model_output(output[:, : x.shape[1]], sample=x)
        # Corrector.
        if state.history:
            *before, corrected, last_noise = state.history
            solver.model_outputs = before
            x = solver.stochastic_adams_moulton_update(
                this_model_output=data,
                last_sample=corrected,
                last_noise=last_noise,
                this_sample=x,
                order=solver.config.corrector_order,
                tau=self.taus[s - 1],
            )
        # Predictor; the last step is of first order.
        solver.model_outputs = [*before[-1:], data]
        following = solver.stochastic_adams_bashforth_update(
            model_output=data,
            sample=x,
            noise=noise,
            order=min(len(solver.model_outputs), len(self.timesteps) - s),
            tau=self.taus[s],
        )
        return State(following, (*solver.model_outputs, x, noise))


# They differ in how they end.
DPM_SOLVERS_PP = ("dpm-solver++", "dpm-solver++-euler", "dpm-solver++-zero")


def dpm_solver_pp(
    num_steps: int, noise_schedule: str = "linear", name: str = "dpm-solver++"
) -> DPMSolverMultistep:
    """DPM-Solver++(2M), evaluations evenly spaced in t.

    Args:
        name: says how it ends. ``dpm-solver++`` and ``dpm-solver++-euler`` end at the least noise
            of training, the one as PixArt-alpha does, with a last step of first order below ten
            evaluations, the other as PixArt-Sigma, with such a step always. ``dpm-solver++-zero``
            ends without noise.
    """
    from diffusers import DPMSolverMultistepScheduler  # heavy, and only this sampler needs it

    schedule = NOISE_SCHEDULES[noise_schedule]
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=schedule.betas,
        solver_order=2,
        final_sigmas_type="zero" if name == "dpm-solver++-zero" else "sigma_min",
        euler_at_final=name == "dpm-solver++-euler" or num_steps < 10,
        lower_order_final=False,  # the library would do so below 15 evaluations
    )
    scheduler.set_timesteps(num_steps)
    return DPMSolverMultistep(name, scheduler, schedule)


def published_taus(num_steps: int) -> tuple[float, ...]:
    """1 where a step leads to a t from 0.2 to 0.8, else 0, as PixArt chooses; 0 for the last."""
    ends = np.linspace(1, 1 / TRAIN_STEPS, num_steps + 1)[1:-1]
    return (*(float(0.2 <= t <= 0.8) for t in ends), 0.0)


def sa_solver(num_steps: int, noise_schedule: str = "linear") -> SASolver:
    """SA-Solver as PixArt has it: data prediction, predictor and corrector of order 2."""
    from diffusers import SASolverScheduler

    schedule = NOISE_SCHEDULES[noise_schedule]
    scheduler = SASolverScheduler(
        trained_betas=schedule.betas,
        predictor_order=2,
        corrector_order=2,
        algorithm_type="data_prediction",
    )
    scheduler.set_timesteps(num_steps)
    return SASolver("sa-solver", scheduler, schedule, published_taus(num_steps))
