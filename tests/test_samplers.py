"""Samplers against published trajectories and against diffusers' schedulers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Golden, relative
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SASolverScheduler,
)

from harmonica.denoise import Guidance, denoise, guide
from harmonica.diffusion import NOISE_SCHEDULES, Diffusion, linear_betas, respaced_timesteps
from harmonica.errors import HarmonicaError
from harmonica.samplers import DDIM, SAMPLERS, State, create_sampler
from harmonica.samplers.singlestep import SinglestepDPMSolver, step_evaluations
from models import MODELS


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


def dpm_solver_of_pixart(euler_at_final: bool) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        final_sigmas_type="sigma_min", lower_order_final=False, euler_at_final=euler_at_final
    )


def sa_solver_of_pixart(count: int) -> SASolverScheduler:
    """The library takes tau where a step starts, PixArt where it leads."""
    sampler = create_sampler("sa-solver", count)
    taus = dict(zip(sampler.timesteps, sampler.taus, strict=True))
    return SASolverScheduler(tau_func=lambda t: taus[float(t)])


# By the number of evaluations.
LIBRARY = {
    "dpm-solver++": lambda count: dpm_solver_of_pixart(euler_at_final=count < 10),
    "dpm-solver++-euler": lambda count: dpm_solver_of_pixart(euler_at_final=True),
    "dpm-solver++-zero": lambda count: DPMSolverMultistepScheduler(final_sigmas_type="zero"),
    "sa-solver": sa_solver_of_pixart,
}


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("count", [2, 3, 10, 20])
def test_multistep_solvers_equal_the_library_and_can_be_branched(name, count):
    library = LIBRARY[name](count)
    library.set_timesteps(count)
    sampler, generator = create_sampler(name, count), torch.Generator().manual_seed(0)
    assert sampler.timesteps == tuple(library.timesteps.tolist())
    theirs = torch.randn(2, 3, 4, 4, generator=generator)
    state = State(theirs)
    for s, t in enumerate(library.timesteps):
        output, other = torch.randn(2, 2, 6, 4, 4, generator=generator)
        noise = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(s))
        sampler.step(s, state, other, -noise)  # a branch that leaves no trace
        state = sampler.step(s, state, output, noise)
        options = {"generator": torch.Generator().manual_seed(s)} if sampler.stochastic else {}
        theirs = library.step(output[:, :3], t, theirs, **options).prev_sample
        assert relative(state.x, theirs) < 2e-6
    assert state.x.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (PixArtAlphaPipeline, "dpm-solver++"),
        (PixArtAlphaPipeline, "sa-solver"),
        (PixArtSigmaPipeline, "dpm-solver++-euler"),
    ],
)
def test_a_pipeline_of_the_library_walks_the_same_trajectory(kind, name):
    """PixArt's, with a random transformer: the same latents after every step."""
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    latent = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = PixArtTransformer2DModel(
            **sizes, **latent, cross_attention_dim=16, caption_channels=8
        )
        x_T, prompts = torch.randn(1, 4, 8, 8), torch.randn(2, 5, 8)
    pipeline = kind(None, None, AutoencoderKL(), transformer, LIBRARY[name](7))
    pipeline.set_progress_bar_config(disable=True)
    mask, theirs = torch.tensor([[1.0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]), []
    pipeline(
        prompt=None, negative_prompt=None, num_inference_steps=7, guidance_scale=4.5,
        height=64, width=64, use_resolution_binning=False, output_type="latent", latents=x_T,
        prompt_embeds=prompts[:1], negative_prompt_embeds=prompts[1:],
        prompt_attention_mask=mask[:1], negative_prompt_attention_mask=mask[1:],
        generator=torch.Generator().manual_seed(3),
        callback=lambda step, t, latents: theirs.append(latents), callback_steps=1,
    )  # fmt: skip
    sampler, generator = create_sampler(name, 7), torch.Generator().manual_seed(3)
    guidance = Guidance(4.5, channels=None)

    @torch.inference_mode()
    def predict(s: int, x: torch.Tensor) -> torch.Tensor:
        t, sizes = (
            torch.full((2,), sampler.timesteps[s]),
            {"resolution": None, "aspect_ratio": None},
        )
        output = transformer(torch.cat([x, x]), prompts, t, sizes, encoder_attention_mask=mask)
        return guide(output.sample, 4, guidance)

    state = State(x_T)
    for s, latents in enumerate(theirs):
        noise = torch.randn(x_T.shape, generator=generator)
        state = denoise(
            sampler, state, predict, start=s, stop=s + 1, noise=lambda s, noise=noise: noise
        )
        assert relative(state.x, latents) < 1e-5
    assert len(theirs) == 7


@pytest.mark.parametrize(
    "model, count, is_of_first_order",
    [
        ("PixArt-alpha-XL/2", 9, True),
        ("PixArt-alpha-XL/2", 10, False),
        ("PixArt-alpha-XL/2", 20, False),
        ("PixArt-Sigma-XL/2", 10, True),
        ("PixArt-Sigma-XL/2", 20, True),
    ],
)
def test_the_last_step_of_a_pixart_has_its_published_order(model, count, is_of_first_order):
    """alpha's solver lowers the order below ten evaluations, Sigma's always."""
    sampler = create_sampler(MODELS[model].sampler, count)
    before, eps = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    state = sampler.step(count - 2, State(before), eps.flip(1), None)
    bar, end = sampler.alphas_bar[-1], NOISE_SCHEDULES["linear"].alphas_bar[0]
    x0 = (state.x - (1 - bar) ** 0.5 * eps) / bar**0.5
    first_order = end**0.5 * x0 + (1 - end) ** 0.5 * eps
    last = sampler.step(count - 1, state, eps, None).x
    assert (relative(last, first_order) < 1e-5) == is_of_first_order


def test_sa_solver_is_noisy_where_the_published_one_is():
    """Where a step leads to a t from 0.2 to 0.8, and not where it starts from one."""
    sampler = create_sampler("sa-solver", 25)
    assert [s for s, tau in enumerate(sampler.taus) if tau] == list(range(5, 20))
    assert create_sampler("sa-solver", 2).taus == (1, 0)
    x, output, noise = torch.zeros(3, 1, 1, 2, 2)
    noisy = [
        s
        for s in range(25)
        if not torch.equal(
            sampler.step(s, State(x), output, noise).x,
            sampler.step(s, State(x), output, noise + 1).x,
        )
    ]
    assert noisy == list(range(5, 20))


@pytest.mark.parametrize(
    "name, count, orders",
    [
        ("dpm-solver", 4, [2, 2]),
        ("dpm-solver", 5, [2, 2, 1]),
        ("dpm-solver-3", 2, [2]),
        ("dpm-solver-3", 3, [2, 1]),
        ("dpm-solver-3", 7, [3, 3, 1]),
        ("dpm-solver-3", 8, [3, 3, 2]),
        ("dpm-solver-3", 9, [3, 3, 2, 1]),
    ],
)
def test_steps_of_dpm_solver_share_out_the_evaluations(name, count, orders):
    """A step of order k covers k parts of t: DPM-Solver, section 3.4."""
    sampler = create_sampler(name, count, noise_schedule="u-vit")
    firsts = [evaluation.time for evaluation in sampler.evaluations if evaluation.together is None]
    starts = np.cumsum([0, *orders[:-1]])
    assert firsts == pytest.approx((1000 - 999 * starts / count).tolist())


def test_dpm_solver_of_order_three_evaluates_on_the_grid():
    """U-ViT's solver takes the inner nodes of its steps from the even grid of t."""
    for count in (20, 50):
        times = create_sampler("dpm-solver-3", count, noise_schedule="u-vit").timesteps
        assert times == pytest.approx([1000 - 999 * k / count for k in range(count)])
    assert times[:3] == pytest.approx([1000, 980.02, 960.04])


# Of nine evaluations, the order of the library's update that each of them is.
UPDATES = {"dpm-solver": [1, 2] * 4 + [1], "dpm-solver-3": [1, 2, 3, 1, 2, 3, 1, 2, 1]}


@pytest.mark.parametrize("name", UPDATES)
def test_dpm_solver_equals_the_library_on_its_times(name):
    sampler, updates = create_sampler(name, 9), UPDATES[name]
    library = DPMSolverSinglestepScheduler(final_sigmas_type="sigma_min", solver_order=max(updates))
    library.set_timesteps(9)
    bars = [*sampler.alphas_bar, NOISE_SCHEDULES["linear"].alphas_bar[0]]
    library.sigmas = torch.tensor([(1 / bar - 1) ** 0.5 for bar in bars])
    library.order_list = updates
    library.set_begin_index(0)
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(2, 3, 4, 4, generator=generator)
    state = State(theirs)
    for s, t in enumerate(library.timesteps):
        output, other = torch.randn(2, *theirs.shape, generator=generator)
        sampler.step(s, state, other, None)  # a branch that leaves no trace
        state = sampler.step(s, state, output, None)
        # Inside a step of order 3 the published solver takes the data as linear in log-SNR, which
        # the library calls heun; a step of order 2 takes them as constant, and ends by midpoint.
        is_inside = updates[s] == 2 and updates[s + 1] == 3
        library.register_to_config(solver_type="heun" if is_inside else "midpoint")
        theirs = library.step(output, t, theirs).prev_sample
        assert relative(state.x, theirs) < 1e-5


class Gaussian:
    """Data from N(0.4, 0.6^2) in every number: noise and trajectories are known exactly."""

    mean, std = 0.4, 0.6

    def noise(self, x: torch.Tensor, bar: float) -> torch.Tensor:
        return (1 - bar) ** 0.5 * self.standard(x, bar) / (bar * self.std**2 + 1 - bar) ** 0.5

    def standard(self, x: torch.Tensor, bar: float) -> torch.Tensor:
        """Constant along exact trajectories without noise."""
        return (x - bar**0.5 * self.mean) / (bar * self.std**2 + 1 - bar) ** 0.5

    def sample(self, sampler, x: torch.Tensor, noise=None) -> torch.Tensor:
        def predict(s: int, x: torch.Tensor) -> torch.Tensor:
            return self.noise(x, sampler.alphas_bar[s])

        return denoise(sampler, State(x), predict, noise=noise).x


@pytest.mark.parametrize("noise_schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "iddpm"])
def test_more_evaluations_come_nearer_to_the_exact_solution(name, noise_schedule):
    data, x = Gaussian(), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def error(count: int) -> float:
        sampler = create_sampler(name, count, noise_schedule=noise_schedule)
        if name == "sa-solver":
            sampler = replace(sampler, taus=(0.0,) * count)  # without noise it solves the same one
        to_zero = name in ("ddim", "dpm-solver++-zero")
        end = 1.0 if to_zero else NOISE_SCHEDULES[noise_schedule].alphas_bar[0]
        exact = data.standard(x, sampler.alphas_bar[0])
        noise = data.sample(sampler, x, lambda s: torch.zeros_like(x))
        return (data.standard(noise, end) - exact).square().mean().sqrt().item()

    few, many = error(12), error(192)
    # 16 times as many: 16 at first order. Higher orders gain more, less so where log-SNR, in which
    # they count, moves fast at the end.
    assert few / many > (12 if name == "ddim" else 15)
    assert many < 0.02


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_step_of_dpm_solver_has_its_order(order):
    """Its local error shrinks by 2^(order + 1) when it is halved."""
    data, schedule = Gaussian(), NOISE_SCHEDULES["linear"]
    x = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, None]

    def error(length: float) -> float:
        step = tuple(step_evaluations(schedule, np.linspace(0.6, 0.6 - length, order + 1)))
        end = float(np.exp(2 * schedule.log_alpha(0.6 - length)))
        solver = SinglestepDPMSolver("", step)
        exact = data.standard(x, solver.alphas_bar[0])
        return (data.standard(data.sample(solver, x), end) - exact).norm().item()

    assert np.log2(error(0.1) / error(0.05)) == pytest.approx(order + 1, abs=0.35)


def test_sa_solver_keeps_the_distribution():
    data, sampler = Gaussian(), create_sampler("sa-solver", 25)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, 2, 2, generator=generator)
    end = data.sample(sampler, x, lambda s: torch.randn(x.shape, generator=generator))
    assert end.mean().item() == pytest.approx(data.mean, abs=0.02)
    assert end.std().item() == pytest.approx(data.std, abs=0.03)
    # And it is not the trajectory without noise.
    assert np.corrcoef(x.flatten(), end.flatten())[0, 1] < 0.5


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("iddpm", "sa-solver")])
def test_without_history_a_trajectory_starts_anew_at_first_order(name):
    """As Learning-to-Cache starts it, from a noised image at any step: with a step of DDIM."""
    sampler = create_sampler(name, 12)
    x, eps = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for s in range(11):
        bar, following = sampler.alphas_bar[s : s + 2]
        x0 = (x - (1 - bar) ** 0.5 * eps) / bar**0.5
        expected = following**0.5 * x0 + (1 - following) ** 0.5 * eps
        assert relative(sampler.step(s, State(x), eps, None).x, expected) < 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("noise_schedule", NOISE_SCHEDULES)
def test_alphas_bar_are_those_of_the_timesteps(name, noise_schedule):
    schedule = NOISE_SCHEDULES[noise_schedule]
    sampler = create_sampler(name, 10, noise_schedule=noise_schedule)
    first, last = schedule.times
    t = ((np.array(sampler.timesteps) - first) / (last - first) * 999 + 1) / 1000
    expected = np.exp(2 * schedule.log_alpha(t))
    assert len(sampler.alphas_bar) == 10 and sampler.name == name
    assert np.allclose(sampler.alphas_bar, expected, rtol=1e-5)


def test_noise_schedules_are_those_of_their_models():
    linear, uvit, continuous = NOISE_SCHEDULES.values()
    ddpm = DDIMScheduler(beta_schedule="linear")
    diffusion = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.0120)
    assert np.allclose(linear.alphas_bar, ddpm.alphas_cumprod, rtol=1e-4)
    assert np.allclose(uvit.alphas_bar, diffusion.alphas_cumprod, rtol=1e-4)
    # The SDE, whose variance of noise grows at 0.1 + 19.9 t, solved by small steps.
    rate = 0.1 + 19.9 * (np.arange(10**6) + 0.5) / 10**6
    left = np.exp(-np.cumsum(rate) / 10**6)[999::1000]
    assert np.allclose(continuous.alphas_bar, left, rtol=1e-6)
    assert np.allclose(continuous.model_time(np.arange(1000)), 999 * np.arange(1, 1001) / 1000)
    assert linear.model_time(np.array([0, 999])).tolist() == [0, 999]
    assert uvit.model_time(np.array([0, 999])).tolist() == [1, 1000]
    for schedule in (linear, uvit, continuous):
        t = np.linspace(0.002, 0.999, 7)
        log_alpha = schedule.log_alpha(t)
        log_snr = log_alpha - 0.5 * np.log(1 - np.exp(2 * log_alpha))
        assert np.allclose(schedule.time_at(log_snr), t)


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_numbers_of_evaluations_that_are_allowed_work(name):
    x, output = torch.ones(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)
    for count in (2, 3, 4, 5, 999):
        sampler = create_sampler(name, count)
        assert len(sampler.timesteps) == len(set(sampler.timesteps)) == count
        steps = range(count) if count < 10 else (0, count // 2, count - 1)
        state = State(x)
        for s in steps:
            state = sampler.step(s, state if count < 10 else State(x), output, x)
        assert state.x.isfinite().all()
