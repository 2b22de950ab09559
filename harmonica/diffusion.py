"""Noise schedules and respacing: the constants of a diffusion, in float64.

Follows improved diffusion (Nichol & Dhariwal, 2021). In float32 the posterior variances alone
would move ancestral samples by up to 7e-4.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TRAIN_STEPS = 1000


def linear_betas(steps: int = TRAIN_STEPS) -> np.ndarray:
    """The linear schedule of DDPM (Ho et al., 2020), 1e-4 to 0.02 over 1000 steps, float64."""
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def scaled_linear_betas(steps: int = TRAIN_STEPS) -> np.ndarray:
    """The schedule of Stable Diffusion, linear in sqrt(beta), 0.00085 to 0.0120, float64."""
    return np.linspace(0.00085**0.5, 0.0120**0.5, steps, dtype=np.float64) ** 2


def continuous_betas(steps: int = TRAIN_STEPS) -> np.ndarray:
    """The variance-preserving SDE (Song et al., 2021) at ``steps`` even times, float64.

    Its rate of noise grows linearly, from 0.1 to 20.
    """
    ends = np.arange(steps + 1) / steps
    return -np.expm1(-np.diff(0.1 * ends + (20 - 0.1) / 2 * ends**2))


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise that a family of models was trained on, at discrete steps and between them.

    Step i = 0..N-1 stands at t = (i + 1) / N in continuous time, where log alpha is piecewise
    linear (DPM-Solver, appendix D).

    Attributes:
        betas: (N,) noise added at every step of training.
        times: what the model is given as time at the first and the last step.
    """

    betas: np.ndarray
    times: tuple[float, float] = (0, TRAIN_STEPS - 1)

    @cached_property
    def alphas_bar(self) -> np.ndarray:
        """(N,) share of the signal's variance left at every step."""
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.arange(1, len(self.betas) + 1) / len(self.betas)

    def log_alpha(self, t: np.ndarray) -> np.ndarray:
        """Logarithm of the signal's scale at continuous times 1/N to 1."""
        return np.interp(t, self._ends, 0.5 * np.log(self.alphas_bar))

    def time_at(self, log_snr: np.ndarray) -> np.ndarray:
        """Continuous time at which log(alpha / sigma) has these values."""
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * log_snr)
        return np.interp(log_alpha, 0.5 * np.log(self.alphas_bar)[::-1], self._ends[::-1])

    def step_at(self, t: np.ndarray) -> np.ndarray:
        """Step, possibly fractional, that stands at continuous times."""
        return t * len(self.betas) - 1

    def model_time(self, step: np.ndarray) -> np.ndarray:
        """What the model is given at steps, and between them."""
        first, last = self.times
        return first + (last - first) / (len(self.betas) - 1) * step


# DiT and PixArt; U-ViT, which counts its timesteps from 1; U-ViT in continuous time.
NOISE_SCHEDULES = {
    "linear": NoiseSchedule(linear_betas()),
    "u-vit": NoiseSchedule(scaled_linear_betas(), times=(1, 1000)),
    "u-vit-continuous": NoiseSchedule(continuous_betas(), times=(0.999, 999)),
}


def respaced_timesteps(count: int, total: int = TRAIN_STEPS) -> tuple[int, ...]:
    """The ``count`` timesteps, ascending, that the published respacing keeps out of ``total``.

    Fractional strides are accumulated rather than multiplied: where a position falls on a half,
    the rounding error of the sum decides which neighbour the published samplers keep.

    Raises:
        ValueError: ``count`` is not in 2..total.
    """
    if not 2 <= count <= total:
        raise ValueError(f"number of sampling steps {count} is not between 2 and {total}")
    stride = (total - 1) / (count - 1)
    position, kept = 0.0, []
    for _ in range(count):
        kept.append(round(position))
        position += stride
    return tuple(kept)


@dataclass(frozen=True)
class Diffusion:
    """A discrete diffusion over ``len(timesteps)`` steps; index 0 is the least noisy.

    Attributes:
        timesteps: the model's time at every step, ascending.
        betas: (T,) noise added at every step.
    """

    timesteps: tuple[float, ...]
    betas: np.ndarray

    @classmethod
    def respaced(cls, count: int, noise_schedule: str = "linear") -> "Diffusion":
        """Keep ``count`` steps of a schedule; betas are set so that alpha-bar is unchanged.

        Args:
            noise_schedule: a key of ``NOISE_SCHEDULES``.
        """
        schedule = NOISE_SCHEDULES[noise_schedule]
        kept = respaced_timesteps(count, len(schedule.betas))
        alphas_bar = schedule.alphas_bar[list(kept)]
        previous = np.append(1.0, alphas_bar[:-1])
        timesteps = tuple(schedule.model_time(np.array(kept)).tolist())
        return cls(timesteps, 1.0 - alphas_bar / previous)

    @cached_property
    def alphas_bar(self) -> np.ndarray:
        """(T,) share of the signal's variance left at every step."""
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_bar_previous(self) -> np.ndarray:
        """(T,) alpha-bar of the next less noisy step; 1 before the first."""
        return np.append(1.0, self.alphas_bar[:-1])

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """(T,) variance of q(x_{t-1} | x_t, x_0), DDPM eq. 7."""
        return self.betas * (1.0 - self.alphas_bar_previous) / (1.0 - self.alphas_bar)

    @cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """(T,) log of the posterior variance; the first, which is log 0, takes the second's."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def posterior_mean_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """(T,) weights of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7."""
        of_x0 = self.betas * np.sqrt(self.alphas_bar_previous) / (1.0 - self.alphas_bar)
        of_xt = (
            (1.0 - self.alphas_bar_previous) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_bar)
        )
        return of_x0, of_xt
