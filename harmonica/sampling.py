"""Sampling from a backbone, plainly or by replaying a schedule."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from harmonica.backbone import Backbone
from harmonica.budget import Budget
from harmonica.denoise import Trajectories
from harmonica.engine import Engine
from harmonica.errors import HarmonicaError
from harmonica.predictors import create_predictor
from harmonica.randomness import Draws
from harmonica.router_file import load_router, load_schedule_file
from harmonica.schedule import Schedule


def load_schedule(
    path: Path,
    threshold: float | None,
    backbone: Backbone,
    semantics: str = "harmonica",
    force: bool = False,
    flag: str = "--path",
    budget: Budget | None = None,
    needs_schedule: bool = False,
) -> Schedule:
    """The schedule of a router file, schedule JSON or run directory, checked to fit the backbone.

    Args:
        threshold, semantics, budget: see ``RouterFile.to_schedule``.
        force: take one that was trained for another sampler.
        needs_schedule: refuse published routers, of which the file does not say how they are read.

    Raises:
        HarmonicaError: it does not.
    """
    if path.suffix == ".json":
        if threshold is not None or semantics != "harmonica" or budget is not None:
            asked = "--threshold or --semantics" if budget is None else budget
            raise HarmonicaError(
                f"{flag} {path} is a schedule, which has no scores for {asked}; pass the router"
            )
        schedule, info = load_schedule_file(path, flag)
        info.check(backbone.router_info(), force)
        steps = len(backbone.sampler.timesteps)
        if (schedule.num_steps, schedule.costs) != (steps, backbone.costs):
            raise HarmonicaError(
                f"{flag} {path} is a schedule of {schedule.num_steps} steps and "
                f"{len(schedule.costs.names)} branches, which does not fit --model "
                f"{backbone.name} with --num-sampling-steps {steps}; pass the matching one"
            )
        return schedule
    router = load_router(path, flag)
    router.check(backbone.model, backbone.router_info(), force)
    if needs_schedule and router.schedule is None:
        raise HarmonicaError(
            f"{flag} {path} holds scores without a schedule; make one with "
            "scripts/inspect_router.py --schedule, and pass that"
        )
    return router.to_schedule(backbone.costs, threshold, semantics, budget)


def with_predictor(
    schedule: Schedule, name: str | None, coordinate: str, backbone: Backbone
) -> Schedule:
    """The schedule with a predictor of ``PREDICTORS`` in place of its own; None keeps that.

    Raises:
        HarmonicaError: the schedule reuses differences of whole blocks.
    """
    if name is None:
        return schedule
    if schedule.reuses != "branches":
        raise HarmonicaError(
            f"--predictor {name} forecasts branches, which this method does not reuse; drop it"
        )
    predictor = create_predictor(name, coordinate, backbone.sampler)
    return replace(schedule, predictor=predictor)


def trajectories(
    backbone: Backbone, draws: Draws, indices: Sequence[int], labels: Tensor | None = None
) -> Trajectories:
    """The batch of samples with these indices.

    Args:
        labels: (n,) int64 classes, or places in the list of prompts; drawn if None.
    """
    shape, device = backbone.latent_shape, backbone.device
    if labels is None:
        labels = draws.labels(indices, backbone.conditions.count)
    return Trajectories(
        backbone.model,
        backbone.sampler,
        backbone.guidance,
        y=backbone.conditions.of(labels).to(device),
        x_T=draws.initial_noise(indices, shape).to(device),
        noise=lambda s: draws.step_noise(s, indices, shape).to(device),
        indices=indices,
    )


@torch.inference_mode()
def sample(
    backbone: Backbone,
    schedule: Schedule | None,
    draws: Draws,
    indices: Sequence[int],
    labels: Tensor | None = None,
    batch_size: int = 64,
    progress: str | None = None,
    engine: Engine | None = None,
) -> Tensor:
    """Final latents (n, C, H, W) of the samples with these indices, on the CPU.

    Args:
        schedule: None computes everything.
        labels: (n,), aligned with ``indices``; drawn if None.
        progress: label of a progress bar; None shows none.
        engine: one that ran this schedule before, whose CUDA graphs can be used again.
    """
    engine, done = engine or Engine(schedule, backbone.how), []
    # What is compiled or captured is for one shape: a last, smaller batch is filled up.
    fills = (backbone.how.compiles or backbone.how.captures) and len(indices) > batch_size
    for start in tqdm(
        range(0, len(indices), batch_size), desc=progress, disable=progress is None, unit="batch"
    ):
        wanted = range(start, min(start + batch_size, len(indices)))
        places = [*wanted, *[wanted[-1]] * (batch_size - len(wanted))] if fills else list(wanted)
        batch = trajectories(
            backbone,
            draws,
            [indices[place] for place in places],
            None if labels is None else labels[places],
        )
        done.append(engine(batch)[: len(wanted)].cpu())
    return torch.cat(done)


def check_finite(
    latents: Tensor, images: Tensor, indices: Sequence[int], name: str | None = None
) -> None:
    """Refuse a batch in which a number is not finite.

    Raises:
        HarmonicaError: naming the first such image by its index; ``name`` says of which set.
    """
    broken = ~(latents.flatten(1).isfinite().all(1) & images.flatten(1).isfinite().all(1))
    if broken.any():
        which = f"{indices[int(broken.nonzero()[0])]}" + (f" ({name})" if name else "")
        raise HarmonicaError(
            f"sampled image {which} is not finite; use --mixed-precision no, or check --ckpt and "
            "--cfg-scale"
        )


def eight_bit(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded, as image files have them."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
