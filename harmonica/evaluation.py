"""What evaluate.py does: image error of routers and baselines on the same held-out seeds."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from harmonica.backbone import Backbone, load_backbone, load_decoder
from harmonica.baselines.fixed import evenly_spaced, random_schedule
from harmonica.budget import Budget
from harmonica.config import EvaluateConfig, plain
from harmonica.errors import HarmonicaError
from harmonica.files import write_atomically
from harmonica.plots import error_plot
from harmonica.randomness import Draws
from harmonica.report import ImageError, check_output, load_schedule, select_device
from harmonica.router import budget_schedule, load_router
from harmonica.sampling import sample
from harmonica.schedule import Schedule

REPORT = "evaluation.json"
# One line of the table: schedules that differ in their seed only.
Group = dict[str, list[Schedule]]


def contenders(config: EvaluateConfig, backbone: Backbone) -> Group:
    """The routers, and at every CUR among them the baselines of equal cost."""
    groups: Group = {}
    for path in config.paths or ():
        chosen = [load_schedule(path, config.threshold, backbone)]
        if config.curs is not None:
            if path.suffix == ".json" or config.threshold is not None:
                raise HarmonicaError(
                    "--target-cur makes schedules from the scores of a router; pass a router file "
                    "and no --threshold"
                )
            logits = load_router(path).logits
            chosen = [
                budget_schedule(logits, backbone.costs, Budget(cur=cur)) for cur in config.curs
            ]
        for schedule in chosen:
            groups.setdefault(f"learned router, {schedule.cur:.1%}", []).append(schedule)
    steps, costs = config.num_sampling_steps, backbone.costs
    for cur in sorted({schedules[0].cur for schedules in groups.values()}):
        even = evenly_spaced(steps, costs, Budget(cur=cur))
        name = "FORA, N = 2" if cur == 0.5 and steps % 2 == 0 else "evenly spaced steps"
        groups[f"{name}, {cur:.1%}"] = [even]
        if config.random_schedules:
            groups[f"random, {cur:.1%}"] = [
                random_schedule(steps, costs, Budget(cur=cur), seed)
                for seed in range(config.random_schedules)
            ]
    return groups


def evaluate_and_report(config: EvaluateConfig) -> str:
    """Sample everything, write ``evaluation.json`` and a picture; returns the printed table.

    Raises:
        HarmonicaError: bad input.
    """
    if not config.paths:
        raise HarmonicaError(
            "nothing to evaluate; name router files or run directories with --path"
        )
    check_output(config.out, REPORT)
    device = select_device()
    backbone = load_backbone(config, device)
    groups = contenders(config, backbone)
    decode = load_decoder(config, device)
    draws, indices = Draws(config.seed, "sample"), range(config.num_images)

    def run(schedule: Schedule | None, name: str) -> Tensor:
        return sample(backbone, schedule, draws, indices, None, config.batch_size, name)

    results = _measure(groups, run, decode)
    record = {
        "config": plain(config),
        "weights_hash": backbone.weights_hash,
        "torch": torch.__version__,
        "results": [
            {"name": name, "schedule": schedule.to_dict(), **error.to_dict()}
            for name, schedules in groups.items()
            for schedule, error in zip(schedules, results[name], strict=True)
        ],
    }
    write_atomically(config.out / REPORT, json.dumps(record, indent=1).encode())
    picture = config.out / "evaluation.png"
    error_plot(
        picture,
        {
            name: [
                (schedule.theoretical_speedup, error.mse_mean)
                for schedule, error in zip(groups[name], errors, strict=True)
            ]
            for name, errors in results.items()
        },
    )
    return "\n".join([*_table(groups, results), _footer(config, backbone, picture)])


def _measure(
    groups: Group,
    run: Callable[[Schedule | None, str], Tensor],
    decode: Callable[[Tensor], Tensor],
) -> dict[str, list[ImageError]]:
    reference = run(None, "uncached")
    reference_images = decode(reference)
    results: dict[str, list[ImageError]] = {name: [] for name in groups}
    for name, schedules in groups.items():
        for schedule in schedules:
            latents = run(schedule, name)
            results[name].append(
                ImageError.between(latents, reference, decode(latents), reference_images)
            )
    return results


def _table(groups: Group, results: dict[str, list[ImageError]]) -> list[str]:
    """Means over the schedules of a line; the range of their mean errors in brackets."""
    lines = [
        f"{'schedule':30} {'number':>6} {'MACs':>6} {'MSE, mean over seeds':>28} "
        f"{'median':>8} {'PSNR':>8}"
    ]
    for name, errors in results.items():
        speedup = statistics.fmean(schedule.theoretical_speedup for schedule in groups[name])
        means = [error.mse_mean for error in errors]
        spread = f"({min(means):.5f} to {max(means):.5f})" if len(means) > 1 else ""
        median = statistics.fmean(error.mse_median for error in errors)
        psnr = statistics.fmean(error.psnr_mean for error in errors)
        lines.append(
            f"{name:30} {len(errors):6} {speedup:5.2f}x {statistics.fmean(means):7.5f} {spread:20} "
            f"{median:8.5f} {psnr:5.1f} dB"
        )
    return lines


def _footer(config: EvaluateConfig, backbone: Backbone, picture: Path) -> str:
    return (
        f"{config.num_images} image seeds from seed {config.seed}, weights "
        f"{backbone.weights_hash}, {config.sampler} T = {config.num_sampling_steps}, guidance "
        f"{config.cfg_scale:g}; picture: {picture}"
    )
