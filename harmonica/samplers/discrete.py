"""DDIM and IDDPM at the published timesteps, our own few lines.

On respaced betas the library's schedulers take the same steps. But none of their settings visits
these timesteps by itself, its ancestral sampler draws noise for a whole batch and not per sample,
and its coefficients are of float32, which moves ancestral samples by 3e-4 to 7e-4.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from harmonica.diffusion import Diffusion
from harmonica.samplers.sampler import State


@dataclass(frozen=True)
class Discrete:
    """A sampler that visits the steps of a respaced diffusion."""

    diffusion: Diffusion

    @property
    def timesteps(self) -> tuple[float, ...]:
        return self.diffusion.timesteps[::-1]

    @property
    def alphas_bar(self) -> tuple[float, ...]:
        return tuple(self.diffusion.alphas_bar[::-1].tolist())


@dataclass(frozen=True)
class DDIM(Discrete):
    """DDIM (Song et al., 2021), eq. 12; eta 0 is deterministic, eta 1 is ancestral."""

    eta: float = 0.0
    name = "ddim"
    uses_variance = False

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
class IDDPM(Discrete):
    """Ancestral sampling with a learned variance between its bounds (Nichol & Dhariwal, 2021)."""

    name = "iddpm"
    stochastic = True
    uses_variance = True

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
