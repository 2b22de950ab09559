"""What samples are judged with: metrics that the reference allows, and networks for them."""

from dataclasses import dataclass

import torch

from harmonica.errors import HarmonicaError
from harmonica.files import is_safetensors
from harmonica.metrics import NAMES
from harmonica.metrics.clip import ClipScore
from harmonica.metrics.config import EvaluateConfig
from harmonica.metrics.extractor import KINDS, Extractor, load_extractor
from harmonica.metrics.images import pixels
from harmonica.metrics.paired import Lpips, load_lpips, lpips_left_out
from harmonica.metrics.reference import Reference, open_reference
from harmonica.metrics.sampled import SampledImages
from harmonica.metrics.subject import Subject
from harmonica.options import flag_of
from harmonica.prompts import load_prompts, read_prompts
from models import BUNDLED_WEIGHTS, MODELS


@dataclass(frozen=True)
class Instruments:
    """None stands where nothing asks for it.

    Attributes:
        metrics: of the whole set of samples.
        left_out: what could have been asked for and why it is not here.
    """

    metrics: tuple[str, ...]
    reference: Reference | None
    extractor: Extractor | None
    clip: ClipScore | None
    lpips: Lpips | None
    left_out: tuple[str, ...]


def choose_instruments(
    config: EvaluateConfig, subject: Subject, device: torch.device
) -> Instruments:
    """Open the reference and load the networks that the flags ask for, or that suit the samples.

    Raises:
        HarmonicaError: something is missing or does not go together.
    """
    is_bundled = subject.samples.size == bundled_size(config.model)
    reference = None
    implied = is_bundled and config.extractor != "inception" and config.metrics != ("is",)
    if config.reference is not None or implied:
        reference = open_reference(config.reference or "cifar10")
    metrics, left_out = _choose_metrics(config, subject, reference)
    extractor = None
    if metrics:
        name = config.extractor or suitable_extractor(reference, is_bundled)
        check_size(name, subject.samples.size, reference)
        extractor = load_extractor(name, device)
        if reference is not None:
            reference.check(extractor)
    lpips = load_lpips(device) if subject.against is not None else None
    if subject.against is not None and lpips is None:
        left_out = (*left_out, f"LPIPS: {lpips_left_out()}")
    clip = None
    if config.prompts is not None:
        clip = ClipScore(config.clip_model, _prompts(config, subject), device)
    return Instruments(metrics, reference, extractor, clip, lpips, left_out)


def bundled_size(model: str) -> tuple[int, int] | None:
    """Size of the images of the bundled backbone, if this is its name."""
    sizes = [size for size, source in MODELS[model].weights.items() if source == BUNDLED_WEIGHTS]
    return (sizes[0], sizes[0]) if sizes else None


def _choose_metrics(
    config: EvaluateConfig, subject: Subject, reference: Reference | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Metrics of the set, and a line about those that were left out."""
    allowed = ("is",) if reference is None else reference.allows()
    if config.metrics is not None:
        missing = [metric for metric in config.metrics if metric not in allowed]
        if missing and reference is None:
            raise HarmonicaError(f"--metrics {missing[0]} compares; pass a --reference")
        if missing:
            raise HarmonicaError(
                f"--metrics {missing[0]} cannot be had with --reference {reference.name}, which "
                "lacks the statistics or images for it; pass another reference or leave it out"
            )
        return config.metrics, ()
    if reference is None and subject.against is None and config.prompts is None:
        raise HarmonicaError(
            "nothing to judge the samples by; pass --reference, --against, --prompts, or "
            "--metrics is"
        )
    if reference is None:
        return (), (f"{', '.join(NAMES.values())}: no --reference was given",)
    missing = [NAMES[metric] for metric in NAMES if metric not in allowed]
    lines = (f"{', '.join(missing)}: not in --reference {reference.name}",) if missing else ()
    return allowed, lines


def suitable_extractor(reference: Reference | None, is_bundled: bool) -> str:
    """The extractor that statistics were made with; else the one for images of this size."""
    if reference is not None and reference.pooled is not None:
        for kind in KINDS.values():
            if kind.pooled_size == len(reference.pooled.mean):
                return kind.name
    return "cifar" if is_bundled else "inception"


def check_size(
    name: str, size: tuple[int, int], reference: Reference | None, what: str = "the samples are"
) -> None:
    """Refuse images that an extractor does not take.

    Args:
        size: (height, width) of the images, called ``what`` in the refusal.

    Raises:
        HarmonicaError: they, or those of the reference, are of another size.
    """
    side = KINDS[name].image_size
    sets = [(what, size)]
    if reference is not None and reference.images is not None:
        sets.append((f"--reference {reference.name} is", reference.images.size))
    for subject, found in sets:
        if side is not None and found != (side, side):
            raise HarmonicaError(
                f"--extractor {name} takes images of {side}x{side} and {subject} {pixels(found)}; "
                "use --extractor inception"
            )


def _prompts(config: EvaluateConfig, subject: Subject) -> list[str]:
    """Of every sample: what it was sampled of, or its line of the file."""
    if isinstance(subject.samples, SampledImages):
        sampled_of = subject.samples.texts()
        if sampled_of is not None:
            return sampled_of
    count, path = subject.count, config.prompts
    is_encoded = path.is_file() and is_safetensors(path)
    prompts = list(load_prompts(path).texts) if is_encoded else read_prompts(path)
    if len(prompts) < count or (config.num_images is None and len(prompts) > count):
        raise HarmonicaError(
            f"--prompts {config.prompts} has {len(prompts)} lines for {count} samples; give every "
            f"image its line, or pass {flag_of('num_images')} for the first so many of both"
        )
    return prompts
