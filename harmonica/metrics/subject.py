"""What is judged: images in files or sampled, and those of the same seeds to hold against them."""

from dataclasses import dataclass, replace

import torch

from harmonica.autoencoder import load_decoder
from harmonica.backbone import load_backbone
from harmonica.baselines import Plan
from harmonica.errors import HarmonicaError
from harmonica.metrics.config import EvaluateConfig
from harmonica.metrics.images import FolderImages, ImageSet, open_images, pixels
from harmonica.metrics.sampled import SampledImages
from harmonica.plans import choose_plan

# The window of SSIM and the pools of LPIPS do not fit smaller images.
SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Subject:
    """The first ``count`` of ``samples``, and of ``against`` if there is something.

    Attributes:
        plan: where the samples come from if they are not in files.
        speedup: of the plan in multiply-accumulates, if it saves any.
    """

    samples: ImageSet
    count: int
    against: ImageSet | None = None
    plan: Plan | None = None
    speedup: float | None = None


def open_subject(config: EvaluateConfig, device: torch.device) -> Subject:
    """The images that the flags name.

    Raises:
        HarmonicaError: there are none, too few, or none that could be compared.
    """
    flags = {
        "--samples": config.samples,
        "--path": config.path,
        "--method": config.method,
        "--uncached": config.uncached,
    }
    given = [flag for flag, value in flags.items() if value]
    if not given:
        raise HarmonicaError(
            "nothing to evaluate; pass --samples FILE, --path ROUTER, --method NAME or --uncached"
        )
    if len(given) > 1:
        raise HarmonicaError(f"{' and '.join(given)} exclude each other; pass one")
    subject = _from_files(config) if config.samples is not None else _sampled(config, device)
    if config.against is not None:
        against = open_images(config.against, "--against")
        subject = replace(subject, against=against)
        _check_pairs(subject, config)
    return subject


def _from_files(config: EvaluateConfig) -> Subject:
    samples = open_images(config.samples, "--samples")
    count = len(samples) if config.num_images is None else config.num_images
    if count > len(samples):
        raise HarmonicaError(
            f"--num-images {count} is more than the {len(samples)} of --samples {config.samples}; "
            "lower it or leave it out"
        )
    return Subject(samples, count)


def _sampled(config: EvaluateConfig, device: torch.device) -> Subject:
    backbone, decode = load_backbone(config, device), load_decoder(config, device)

    def images(name: str, plan: Plan) -> SampledImages:
        return SampledImages(
            name, plan.backbone, plan.schedule, decode, config.seed, config.num_images
        )

    whole, chosen = Plan(backbone), choose_plan(config, backbone)
    uncached = images("sampled, uncached", whole)
    if chosen is None:
        return Subject(uncached, config.num_images, plan=whole)
    name, plan = chosen
    against = uncached if config.against is None else None
    samples = images(f"sampled with {name}", plan)
    return Subject(samples, config.num_images, against, plan, plan.speedup_over(whole))


def _check_pairs(subject: Subject, config: EvaluateConfig) -> None:
    """Refuse images that are not those of the same seeds, as far as can be seen."""
    samples, against, count = subject.samples, subject.against, subject.count
    flag = f"--against {config.against}"
    if against.size != samples.size:
        raise HarmonicaError(
            f"{flag} has images of {pixels(against.size)} and the samples have "
            f"{pixels(samples.size)}; pass images of the same seeds"
        )
    if min(samples.size) < SMALLEST_SIDE:
        raise HarmonicaError(
            f"{flag}: images of {pixels(samples.size)} are too small for SSIM and LPIPS; use at "
            f"least {SMALLEST_SIDE} pixels a side"
        )
    if len(against) < count or (config.num_images is None and len(against) > count):
        raise HarmonicaError(
            f"{flag} has {len(against)} images for {count} samples; pass as many of the same "
            "seeds, or --num-images for the first so many of both"
        )
    if isinstance(samples, FolderImages) and isinstance(against, FolderImages):
        for a, b in zip(samples.names()[:count], against.names()[:count], strict=True):
            if a != b:
                raise HarmonicaError(
                    f"{flag} holds {b} where the samples hold {a}; name images of the same seed "
                    "alike"
                )
