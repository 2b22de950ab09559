"""Samplers behind one interface: a step is a pure function of the state and the model's output.

A trajectory has to be branched at any step, so state is explicit, and its noise is handed in per
sample. Where a scheduler of diffusers visits the published timesteps and can take that noise, it
does the work.
"""

from collections.abc import Callable

from harmonica.diffusion import TRAIN_STEPS, Diffusion
from harmonica.errors import HarmonicaError
from harmonica.samplers.discrete import DDIM, IDDPM
from harmonica.samplers.multistep import DPM_SOLVERS_PP, dpm_solver_pp, sa_solver
from harmonica.samplers.sampler import Sampler, State
from harmonica.samplers.singlestep import dpm_solver

__all__ = ["DDIM", "IDDPM", "SAMPLERS", "Sampler", "State", "create_sampler"]

# Name to maker: (number of evaluations, noise schedule, eta).
SAMPLERS: dict[str, Callable[[int, str, float], Sampler]] = {
    "ddim": lambda steps, noise, eta: DDIM(Diffusion.respaced(steps, noise), eta),
    "iddpm": lambda steps, noise, eta: IDDPM(Diffusion.respaced(steps, noise)),
    "dpm-solver": lambda steps, noise, eta: dpm_solver(steps, 2, noise),
    "dpm-solver-3": lambda steps, noise, eta: dpm_solver(steps, 3, noise),
    **{
        name: lambda steps, noise, eta, name=name: dpm_solver_pp(steps, noise, name)
        for name in DPM_SOLVERS_PP
    },
    "sa-solver": lambda steps, noise, eta: sa_solver(steps, noise),
}
# The library's solvers space T + 1 timesteps in what training had.
MOST_STEPS = dict.fromkeys((*DPM_SOLVERS_PP, "sa-solver"), TRAIN_STEPS - 1)


def create_sampler(
    name: str, num_steps: int, eta: float = 0.0, noise_schedule: str = "linear"
) -> Sampler:
    """The sampler called ``name`` with ``num_steps`` model evaluations.

    Args:
        eta: of DDIM.
        noise_schedule: a key of ``harmonica.diffusion.NOISE_SCHEDULES``: the model family's.

    Raises:
        HarmonicaError: no such sampler, or a number of evaluations that it cannot have.
    """
    if name not in SAMPLERS:
        raise HarmonicaError(f"--sampler {name} is unknown; use one of {', '.join(SAMPLERS)}")
    most = MOST_STEPS.get(name, TRAIN_STEPS)
    if not 2 <= num_steps <= most:
        raise HarmonicaError(
            f"--num-sampling-steps {num_steps} does not fit --sampler {name}; use 2 to {most}"
        )
    return SAMPLERS[name](num_steps, noise_schedule, eta)
