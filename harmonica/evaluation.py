"""What evaluate.py does: image error of routers and baselines on the same held-out seeds."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from harmonica.backbone import Backbone, load_backbone, load_decoder
from harmonica.baselines import evenly_spaced, random_schedule
from harmonica.config import EvaluateConfig
from harmonica.errors import HarmonicaError
from harmonica.files import write_atomically
from harmonica.plots import error_plot
from harmonica.randomness import Draws
from harmonica.report import ImageError, check_output, load_schedule, select_device
from harmonica.sampling import sample
from harmonica.schedule import Schedule

REPORT = "evaluation.json"


def contenders(config: EvaluateConfig, backbone: Backbone) -> dict[str, Schedule]:
    """The routers, and at the CUR of each of them the baselines of equal cost."""
    steps, costs = config.num_sampling_steps, backbone.costs
    chosen = {}
    for path in config.paths or ():
        schedule = load_schedule(path, config.threshold, backbone)
        chosen[f"router {path}"] = schedule
        name = f"{100 * schedule.cur:g} %"
        chosen[f"evenly spaced steps, {name}"] = evenly_spaced(steps, costs, schedule.cur)
        for k in range(config.random_schedules):
            chosen[f"random {k}, {name}"] = random_schedule(steps, costs, schedule.cur, k)
    return chosen


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
    schedules = contenders(config, backbone)
    decode = load_decoder(config, device)
    draws, indices = Draws(config.seed, "sample"), range(config.num_images)

    def run(schedule: Schedule | None, name: str) -> Tensor:
        return sample(backbone, schedule, draws, indices, None, config.batch_size, name)

    reference = run(None, "uncached")
    results = _measure(schedules, run, reference, decode)
    write_atomically(
        config.out / REPORT,
        json.dumps(
            {
                "config": {k: str(v) for k, v in vars(config).items()},
                "weights_hash": backbone.weights_hash,
                "torch": torch.__version__,
                "results": [
                    {"name": name, "schedule": schedules[name].to_dict(), **asdict(error)}
                    for name, error in results.items()
                ],
            },
            indent=1,
        ).encode(),
    )
    picture = config.out / "evaluation.png"
    error_plot(
        picture,
        {name: (schedules[name].theoretical_speedup, e.mse_mean) for name, e in results.items()},
    )
    header = f"{'schedule':48} {'CUR':>6} {'MACs':>6} {'MSE mean':>9} {'median':>9} {'PSNR':>8}"
    lines = [
        f"{name[-48:]:48} {schedules[name].cur:6.1%} {schedules[name].theoretical_speedup:5.2f}x "
        f"{e.mse_mean:9.5f} {e.mse_median:9.5f} {e.psnr:5.1f} dB"
        for name, e in results.items()
    ]
    footer = f"{config.num_images} seeds, weights {backbone.weights_hash}; {picture}"
    return "\n".join([header, *lines, footer])


def _measure(
    schedules: dict[str, Schedule],
    run: Callable[[Schedule, str], Tensor],
    reference: Tensor,
    decode: Callable[[Tensor], Tensor],
) -> dict[str, ImageError]:
    reference_images = decode(reference)
    results = {}
    for name, schedule in schedules.items():
        latents = run(schedule, Path(name).name)
        results[name] = ImageError.between(latents, reference, decode(latents), reference_images)
    return results
