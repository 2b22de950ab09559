"""Samplers against published trajectories and against diffusers' schedulers."""

import pytest
import torch
from conftest import Golden, relative
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from harmonica.diffusion import Diffusion, linear_betas, respaced_timesteps
from harmonica.errors import HarmonicaError
from harmonica.samplers import DDIM, State, create_sampler


def states(batch) -> torch.Tensor:
    state, xs = State(batch.x_T), []
    for s in range(batch.num_steps):
        state = batch.walk(state, batch.predict, start=s, stop=s + 1)
        xs.append(state.x)
    return torch.stack(xs)


def test_respacing_keeps_the_published_timesteps(golden: Golden):
    kept = golden.arrays["timestep_map"].tolist()
    assert list(respaced_timesteps(golden.num_steps)) == kept


def test_respacing_to_all_steps_changes_nothing():
    diffusion = Diffusion.respaced(1000)
    assert diffusion.timesteps == tuple(range(1000))
    assert abs(diffusion.betas - linear_betas()).max() < 1e-12


@pytest.mark.parametrize("count", [-1, 0, 1, 1001])
def test_step_counts_out_of_range_are_refused(count):
    with pytest.raises(HarmonicaError, match="--num-sampling-steps"):
        create_sampler("ddim", count)


def test_ddim_equals_the_published_trajectory(golden: Golden):
    assert relative(states(golden.trajectories()), golden.arrays["ddim/x"]) < 1e-5


def test_iddpm_equals_the_published_trajectory(golden: Golden):
    batch = golden.trajectories(
        create_sampler("iddpm", golden.num_steps), noise=lambda s: golden.arrays["iddpm/noise"][s]
    )
    assert relative(states(batch), golden.arrays["iddpm/x"]) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_equals_the_library_on_respaced_betas(eta):
    diffusion = Diffusion.respaced(20)
    library = DDIMScheduler(
        num_train_timesteps=20, trained_betas=diffusion.betas, clip_sample=False
    )
    library.set_timesteps(20)
    sampler, generator = DDIM(diffusion, eta), torch.Generator().manual_seed(0)
    x = theirs = torch.randn(2, 3, 4, 4, generator=generator)
    for s, t in enumerate(library.timesteps):
        eps, noise = torch.randn(2, *x.shape, generator=generator)
        x = sampler.step(s, State(x), eps, noise).x
        theirs = library.step(eps, t, theirs, eta=eta, variance_noise=noise).prev_sample
    assert relative(x, theirs) < 1e-5


def test_ddim_with_eta_one_has_the_posterior_variance():
    diffusion = Diffusion.respaced(10)
    x = torch.zeros(1, 1, 1, 1)
    for s in range(9):
        step = DDIM(diffusion, eta=1.0).step(s, State(x), x, torch.ones_like(x)).x.item()
        assert step**2 == pytest.approx(diffusion.posterior_variance[9 - s], rel=1e-5)


def test_the_last_step_adds_no_noise():
    x, noise = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), torch.nan)
    for sampler in (create_sampler("ddim", 5, eta=1.0), create_sampler("iddpm", 5)):
        output = torch.zeros(1, 2, 2, 2)
        assert sampler.step(4, State(x), output, noise).x.isfinite().all()


@pytest.mark.parametrize("count", [2, 10, 20])  # below 15 steps the library lowers its last orders
def test_a_multistep_solver_equals_the_library_and_can_be_branched(count):
    library = DPMSolverMultistepScheduler(trained_betas=linear_betas(), final_sigmas_type="zero")
    library.set_timesteps(count)
    sampler, generator = create_sampler("dpm-solver++", count), torch.Generator().manual_seed(0)
    assert sampler.timesteps == tuple(library.timesteps.tolist())
    theirs = torch.randn(2, 3, 4, 4, generator=generator)
    state = State(theirs)
    for s, t in enumerate(library.timesteps):
        output, other = torch.randn(2, 2, 6, 4, 4, generator=generator)
        sampler.step(s, state, other, None)  # a branch that leaves no trace
        state = sampler.step(s, state, output, None)
        theirs = library.step(output[:, :3], t, theirs).prev_sample
        assert relative(state.x, theirs) < 1e-6
    assert state.x.isfinite().all()
