"""What sample.py does: images, pictures, honest timing, and the table that sums it up."""

import io
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from harmonica.autoencoder import load_decoder
from harmonica.backbone import Backbone, load_backbone, select_device
from harmonica.baselines import CALIBRATED, METHODS, Plan
from harmonica.engine import Engine, planned_cache_bytes
from harmonica.errors import HarmonicaError
from harmonica.files import write_atomically
from harmonica.image_error import ImageError, readable
from harmonica.options import plain
from harmonica.output import check_output
from harmonica.plans import choose_plan
from harmonica.plots import comparison, image_grid
from harmonica.randomness import Draws
from harmonica.sample_config import SampleConfig
from harmonica.sampling import check_finite, eight_bit, sample, trajectories
from harmonica.timing import Timing, machine, timed

REPORT = "report.json"
DEFAULT_IMAGES = 16


def check_classes(config: SampleConfig, num_classes: int) -> None:
    """Refuse classes that the model does not have.

    Raises:
        HarmonicaError: there is one.
    """
    wrong = [label for label in config.classes or () if not 0 <= label < num_classes]
    if wrong:
        raise HarmonicaError(f"--classes {wrong[0]} is out of range; use 0 to {num_classes - 1}")


def choose_labels(config: SampleConfig, known: int) -> Tensor:
    """(n,) the label of every image, of ``known`` ones; drawn from the seed if nothing says."""
    chosen = config.classes
    if chosen is None and config.names_prompts:
        chosen = range(known)
    if chosen is None and config.num_images is not None:
        return Draws(config.seed, "sample").labels(range(config.num_images), known)
    if chosen is None:
        chosen = range(min(known, DEFAULT_IMAGES))
    check_classes(config, known)
    count = len(chosen) if config.num_images is None else config.num_images
    return torch.tensor([chosen[i % len(chosen)] for i in range(count)])


def save_images(folder: Path, images: Tensor) -> None:
    """``000000.png`` ... in sample order."""
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        to_pil_image(eight_bit(image)).save(buffer, format="PNG")
        write_atomically(folder / f"{i:06d}.png", buffer.getvalue())


def _remove_pictures(out: Path) -> None:
    """Remove what an earlier run into the same folder drew, and nothing else."""
    ways = ["uncached", "with router", *(f"with {method}" for method in METHODS)]
    for name in ("comparison", *(way.replace(" ", "_") for way in ways)):
        (out / f"{name}.png").unlink(missing_ok=True)
        for image in (out / name).glob("[0-9]" * 6 + ".png"):
            image.unlink()


def sample_and_report(config: SampleConfig) -> str:
    """Sample, write pictures and ``report.json`` into ``config.out``; returns the printed table.

    Raises:
        HarmonicaError: bad input, a folder that already holds files of another kind, or an image
            that is not finite.
    """
    if config.ddim_sample:
        config = replace(config, sampler="ddim")
    check_output(config.out, REPORT)
    device = select_device()
    choose = partial(choose_labels, config)
    wanted = None if config.method in CALIBRATED else choose
    backbone = load_backbone(config, device, wanted=wanted)
    labels = choose(backbone.conditions.count)
    decode = load_decoder(config, device)  # refuses before anything is sampled
    chosen = choose_plan(config, backbone)
    draws, indices = Draws(config.seed, "sample"), range(len(labels))

    plans: dict[str, Plan] = {}
    if chosen is None or config.compare:
        plans["uncached"] = Plan(backbone)
    if chosen is not None:
        plans[f"with {chosen[0]}"] = chosen[1]
    latents = {
        name: sample(plan.backbone, plan.schedule, draws, indices, labels, config.batch_size, name)
        for name, plan in plans.items()
    }
    images = {name: decode(x) for name, x in latents.items()}
    for name, shown in images.items():
        check_finite(latents[name], shown, indices, name)
    part = slice(0, config.batch_size)
    with torch.inference_mode():
        times = timed(
            {
                name: partial(
                    Engine(plan.schedule, plan.backbone.how),
                    trajectories(plan.backbone, draws, indices[part], labels[part]),
                )
                for name, plan in plans.items()
            },
            config.repeats,
            device,
        )

    _remove_pictures(config.out)
    pictures, error = [], None
    for name, shown in images.items():
        folder = config.out / name.replace(" ", "_")
        save_images(folder, shown)
        pictures.append(config.out / f"{folder.name}.png")
        image_grid(pictures[-1], shown, columns=min(len(shown), 10))
    if len(plans) > 1:
        pictures.append(config.out / "comparison.png")
        comparison(pictures[-1], images)
        error = ImageError.between(*reversed(latents.values()), *reversed(images.values()))
    plan = None if chosen is None else chosen[1]
    cached = None if plan is None else _cache_bytes(plan, len(indices[part]))
    record = {**_record(config, backbone, plan, times, error), "cache_bytes": cached}
    write_atomically(config.out / REPORT, json.dumps(record, indent=1).encode())
    lines = [f"{'weights':38} {backbone.weights_hash}"]
    lines += _table(plan, Plan(backbone), times, error, len(indices[part]))
    if cached is not None:
        lines.append(f"{'cache at its peak, as planned':38} {cached / 2**20:.1f} MiB")
    return "\n".join([*lines, "pictures:", *(f"  {path}" for path in pictures)])


def _cache_bytes(plan: Plan, samples: int) -> int | None:
    """What replay of a batch keeps at most; None without a schedule of single branches."""
    if plan.schedule is None:
        return None
    backbone = plan.backbone
    rows = samples * backbone.guidance.halves
    size = backbone.latent_shape[1:]
    return planned_cache_bytes(plan.schedule, backbone.model, size, rows)


def _record(
    config: SampleConfig,
    backbone: Backbone,
    plan: Plan | None,
    times: dict[str, Timing],
    error: ImageError | None,
) -> dict:
    schedule = None if plan is None else plan.schedule
    return {
        "config": plain(config),
        "weights_hash": backbone.weights_hash,
        "machine": machine(backbone.device),
        "acceleration": asdict(backbone.how),
        "setting": None if plan is None else plan.setting,
        "schedule": None if schedule is None else schedule.to_dict(),
        "seconds_per_batch": {name: vars(timing) for name, timing in times.items()},
        "image_error": None if error is None else error.to_dict(),
    }


def _table(
    plan: Plan | None,
    uncached: Plan,
    times: dict[str, Timing],
    error: ImageError | None,
    rows: int,
) -> list[str]:
    lines = [f"{'time of ' + name + f', batch of {rows}':38} {t}" for name, t in times.items()]
    if plan is not None and plan.setting:
        lines.append(f"{'setting':38} {plan.setting}")
    if plan is not None and plan.schedule is not None:
        lines.append(f"{'cache-utilisation ratio (CUR)':38} {plan.schedule.cur:.1%}")
        lines.append(f"{'in place of what is skipped':38} {plan.schedule.predictor.name}")
    if plan is not None:
        lines.append(f"{'theoretical speed-up (MACs)':38} {plan.speedup_over(uncached):.2f}x")
    if len(times) == 2:
        slow, fast = times.values()
        lines.append(f"{'measured speed-up':38} {slow.median / fast.median:.2f}x")
    if error is not None:
        lines += [
            f"{'image error, MSE mean / median':38} {readable(error.mse_mean)} / "
            f"{readable(error.mse_median)}",
            f"{'image error, PSNR':38} {error.psnr_mean:.1f} dB",
        ]
    return lines
