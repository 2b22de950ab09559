"""What every sampler is: pure steps from one state of a trajectory to the next."""

from typing import NamedTuple, Protocol

from torch import Tensor


class State(NamedTuple):
    """Where a trajectory stands. Never written in place, so keeping one is branching.

    ``history`` is what the sampler remembers of earlier evaluations, noise included.
    """

    x: Tensor
    history: tuple[Tensor, ...] = ()


class Sampler(Protocol):
    """Model evaluations s = 0..T-1, row 0 the noisiest.

    Attributes:
        name: the value of ``--sampler``.
        timesteps: (T,) the time the model is given at every evaluation, in sampling order.
        alphas_bar: (T,) share of the signal's variance in x at every evaluation.
        stochastic: whether ``step`` wants noise.
        uses_variance: whether ``step`` reads the learned variance channels.
    """

    name: str
    timesteps: tuple[float, ...]
    alphas_bar: tuple[float, ...]
    stochastic: bool
    uses_variance: bool

    def step(self, s: int, state: State, output: Tensor, noise: Tensor | None) -> State:
        """The state after evaluation ``s``.

        Without history, as at noised images, a trajectory starts anew: at first order.

        Args:
            state: x is (n, C, H, W).
            output: (n, C or 2C, H, W) guided model output, noise channels first.
            noise: (n, C, H, W) standard normal, for stochastic samplers.
        """
        ...
