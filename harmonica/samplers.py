"""Samplers behind one interface: a step is a pure function of the state and the model's output.

A trajectory has to be branched at any step, so state is explicit, and its noise is handed in per
sample. DDIM and IDDPM are our own few lines, because no setting of the library's schedulers visits
the published timesteps; ``tests/test_samplers.py`` holds them against the library all the same.
Multistep solvers are the library's, their state taken out.
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from harmonica.diffusion import Diffusion, linear_betas
from harmonica.errors import HarmonicaError


class State(NamedTuple):
    """Where a trajectory stands. Never written in place, so keeping one is branching."""

    x: Tensor
    history: tuple[Tensor, ...] = ()


class Sampler(Protocol):
    """Model evaluations s = 0..T-1, row 0 the noisiest.

    Attributes:
        name: the value of ``--sampler``.
        timesteps: (T,) the time the model is given at every evaluation, in sampling order.
        stochastic: whether ``step`` wants noise.
        uses_variance: whether ``step`` reads the learned variance channels.
    """

    name: str
    timesteps: tuple[float, ...]
    stochastic: bool
    uses_variance: bool

    def step(self, s: int, state: State, output: Tensor, noise: Tensor | None) -> State:
        """The state after evaluation ``s``.

        Args:
            state: x is (n, C, H, W).
            output: (n, C or 2C, H, W) guided model output, noise channels first.
            noise: (n, C, H, W) standard normal, for stochastic samplers.
        """
        ...


@dataclass(frozen=True)
class DDIM:
    """DDIM (Song et al., 2021), eq. 12; eta 0 is deterministic, eta 1 is ancestral."""

    diffusion: Diffusion
    eta: float = 0.0
    name = "ddim"
    uses_variance = False

    @property
    def timesteps(self) -> tuple[float, ...]:
        return self.diffusion.timesteps[::-1]

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, s: int, state: State, output: Tensor, noise: Tensor | None) -> State:
        i = len(self.timesteps) - 1 - s
        bar, previous = self.diffusion.alphas_bar[i], self.diffusion.alphas_bar_previous[i]
        eps = output[:, : state.x.shape[1]]
        sigma = self.eta * np.sqrt((1 - previous) / (1 - bar) * (1 - bar / previous))
        x0 = float(np.sqrt(1 / bar)) * state.x - float(np.sqrt(1 / bar - 1)) * eps
        x = float(np.sqrt(previous)) * x0 + float(np.sqrt(1 - previous - sigma**2)) * eps
        if self.stochastic and i > 0:
            x = x + float(sigma) * noise
        return State(x)


@dataclass(frozen=True)
class IDDPM:
    """Ancestral sampling with a learned variance between its bounds (Nichol & Dhariwal, 2021)."""

    diffusion: Diffusion
    name = "iddpm"
    stochastic = True
    uses_variance = True

    @property
    def timesteps(self) -> tuple[float, ...]:
        return self.diffusion.timesteps[::-1]

    def step(self, s: int, state: State, output: Tensor, noise: Tensor | None) -> State:
        i = len(self.timesteps) - 1 - s
        diffusion, bar = self.diffusion, self.diffusion.alphas_bar[i]
        eps, variance = output.chunk(2, dim=1)
        x0 = float(np.sqrt(1 / bar)) * state.x - float(np.sqrt(1 / bar - 1)) * eps
        of_x0, of_xt = (float(table[i]) for table in diffusion.posterior_mean_coefficients)
        x = of_x0 * x0 + of_xt * state.x
        if i > 0:
            low, high = (
                float(diffusion.posterior_log_variance[i]),
                float(np.log(diffusion.betas[i])),
            )
            log_variance = low + (variance + 1) / 2 * (high - low)
            x = x + (0.5 * log_variance).exp() * noise
        return State(x)


@dataclass(frozen=True)
class Multistep:
    """A multistep solver of diffusers: what it remembers travels in ``State.history``.

    ``scheduler`` has its timesteps set and is never stepped: every step works on a shallow copy.
    """

    name: str
    scheduler: Any
    stochastic = False
    uses_variance = False

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(self.scheduler.timesteps.tolist())

    def step(self, s: int, state: State, output: Tensor, noise: Tensor | None) -> State:
        solver = copy.copy(self.scheduler)
        order = solver.config.solver_order
        solver.set_begin_index(s)
        solver.model_outputs = [*[None] * (order - len(state.history)), *state.history]
        solver.lower_order_nums = len(state.history)
        x = solver.step(output[:, : state.x.shape[1]], None, state.x).prev_sample
        return State(x, tuple(m for m in solver.model_outputs if m is not None))


def dpm_solver_pp(num_steps: int) -> Multistep:
    """DPM-Solver++(2M) (Lu et al., 2022), evaluations evenly spaced in t, down to no noise."""
    from diffusers import DPMSolverMultistepScheduler  # heavy, and only this sampler needs it

    scheduler = DPMSolverMultistepScheduler(
        trained_betas=linear_betas(), solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    return Multistep("dpm-solver++", scheduler)


SAMPLERS = ("ddim", "iddpm", "dpm-solver++")


def create_sampler(name: str, num_steps: int, eta: float = 0.0) -> Sampler:
    """The sampler called ``name`` with ``num_steps`` model evaluations."""
    if name not in SAMPLERS:
        raise HarmonicaError(f"--sampler {name} is unknown; use one of {', '.join(SAMPLERS)}")
    try:
        diffusion = Diffusion.respaced(num_steps)
    except ValueError as error:
        raise HarmonicaError(
            f"--num-sampling-steps {num_steps} does not fit: {error}; use 2 to 1000"
        ) from None
    if name == "dpm-solver++":
        return dpm_solver_pp(num_steps)
    return DDIM(diffusion, eta) if name == "ddim" else IDDPM(diffusion)
