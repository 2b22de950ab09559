"""From rows of all samples to the scores of a table, and what has to be said beside them."""

import statistics
from dataclasses import dataclass

from harmonica.metrics import METRICS, NAMES
from harmonica.metrics.collect import Rows
from harmonica.metrics.distribution import (
    SPLIT,
    Moments,
    all_the_same,
    frechet_distance,
    inception_score,
    number_of_splits,
    precision_recall,
)
from harmonica.metrics.extractor import Extractor
from harmonica.metrics.images import pixels
from harmonica.metrics.instruments import Instruments
from harmonica.metrics.reference import Reference
from harmonica.metrics.subject import Subject

# Columns of features that metrics of a set are made of.
COLUMNS = {
    "fid": "pooled",
    "sfid": "spatial",
    "is": "logits",
    "precision": "pooled",
    "recall": "pooled",
}
# Columns of distances within pairs: name, and how it is shown.
PAIRED = {
    "mse": ("MSE on the model's scale", "{:.5f}"),
    "psnr": ("PSNR", "{:.1f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS (alex)", "{:.4f}"),
}


@dataclass(frozen=True)
class Score:
    """One line of the table."""

    name: str
    value: float
    shown: str


def all_scores(rows: Rows, instruments: Instruments, reference: Reference | None) -> list[Score]:
    """Scores of the set, of pairs, of prompts, in this order.

    Raises:
        HarmonicaError: too few images, or a number that is none.
    """
    scores = set_scores(rows, instruments.metrics, instruments.extractor, reference)
    scores += _paired_scores(rows)
    if instruments.clip is not None:
        mean = rows["clip"].double().mean().item()
        scores.append(Score(f"CLIP score ({instruments.clip.name})", mean, f"{mean:.3f}"))
    return scores


def _name(metric: str, extractor: Extractor) -> str:
    """As reported: with the extractor in it, unless that is the usual one."""
    return NAMES[metric] + extractor.suffix


def set_scores(
    rows: Rows, metrics: tuple[str, ...], extractor: Extractor | None, reference: Reference | None
) -> list[Score]:
    """Scores of a set of images, in the order of ``METRICS``.

    Args:
        rows: features of the images.
        metrics: those wanted; none needs no extractor, and all but IS need a reference.
    """
    scores, near = [], {}
    if {"precision", "recall"} & set(metrics):
        both = precision_recall(rows["pooled"], reference.features)
        near = dict(zip(("precision", "recall"), both, strict=True))
    for metric in (metric for metric in METRICS if metric in metrics):
        if metric == "is":
            found = inception_score(rows["logits"])
            value, shown = found.mean, f"{found.mean:.3f} (one split)"
            if found.splits > 1:
                shown = f"{found.mean:.3f} (deviation {found.std:.3f}, {found.splits} splits)"
        elif metric in near:
            value, shown = near[metric], f"{near[metric]:.4f}"
        else:
            column = COLUMNS[metric]
            moments = Moments.of(rows[column], "the set of samples")
            value = frechet_distance(moments, getattr(reference, column))
            shown = f"{value:.4f}"
        scores.append(Score(_name(metric, extractor), value, shown))
    return scores


def _paired_scores(rows: Rows) -> list[Score]:
    """Means over images, and medians beside them: errors have heavy tails over seeds."""
    scores = []
    for column, (name, form) in PAIRED.items():
        if column in rows:
            values = rows[column].tolist()
            mean, median = statistics.fmean(values), statistics.median(values)
            shown = f"{form.format(mean)} (median {form.format(median)})"
            scores.append(Score(name, mean, shown))
    return scores


def warnings_about(
    rows: Rows, subject: Subject, instruments: Instruments, reference: Reference | None
) -> list[str]:
    """What makes scores unlike what their names promise, a sentence each."""
    found = []
    if instruments.metrics:
        found += _size_warnings(subject, instruments, reference)
        found += set_warnings(rows, instruments.metrics, instruments.extractor, reference)
    if instruments.clip is not None and instruments.clip.truncated:
        found.append(f"{instruments.clip.truncated} prompts are longer than CLIP reads, and cut")
    return found


def _size_warnings(
    subject: Subject, instruments: Instruments, reference: Reference | None
) -> list[str]:
    """Inception resizes whatever it is given; statistics do not say what size theirs were."""
    size = subject.samples.size
    if reference is None or reference.images is None or reference.images.size == size:
        return []
    return [
        f"the samples are {pixels(size)} and --reference is {pixels(reference.images.size)}: what "
        "is compared is also the scaling"
    ]


def set_warnings(
    rows: Rows, metrics: tuple[str, ...], extractor: Extractor, reference: Reference | None
) -> list[str]:
    """The same of a set of images alone: see ``set_scores``."""
    found = []
    for metric in ("fid", "sfid"):
        if metric not in metrics:
            continue
        name, column = _name(metric, extractor), COLUMNS[metric]
        count, size = rows[column].shape
        for what, images in (
            ("samples", count),
            ("reference images", getattr(reference, column).count),
        ):
            if images is not None and images <= size:
                found.append(
                    f"{name} from {images} {what} for {size} features is far too large: their "
                    "covariance is singular; use more"
                )
    if "is" in metrics:
        count, name = len(rows["logits"]), _name("is", extractor)
        size = count // number_of_splits(count)
        if count % SPLIT:
            found.append(
                f"{name} depends on the size of its splits, which is {size} images here and "
                f"{SPLIT} by definition"
            )
    features = {
        "samples": rows[COLUMNS[metrics[0]]],
        "reference images": None if reference is None else reference.features,
    }
    found += [
        f"all {what} look the same to the extractor; check them"
        for what, table in features.items()
        if table is not None and all_the_same(table)
    ]
    return found
