"""Metrics of a set of images: FID, sFID, IS, precision and recall, from features already gathered.

The formulas are torch-fidelity's; what is refused, and what is said beside a number, is ours.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    isc_features_to_metric,
)
from torch_fidelity.metric_prc import (
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)

from harmonica.errors import HarmonicaError

SPLIT = 5000
NEIGHBOUR = 3
# Rows of the distance matrix at a time: 50,000 columns of float64 are 200 MB.
DISTANCE_ROWS = 500


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of features, float64.

    Attributes:
        count: images that they were taken from; None where that is not known.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None

    @classmethod
    def of(cls, features: Tensor, what: str) -> "Moments":
        """Of features (n, D).

        Raises:
            HarmonicaError: fewer than two images, named by ``what``.
        """
        if len(features) < 2:
            raise HarmonicaError(
                f"{what} has {len(features)} image, which has no covariance; pass more images"
            )
        values = features.double().numpy()
        return cls(values.mean(axis=0), np.cov(values, rowvar=False), len(values))


def frechet_distance(samples: Moments, reference: Moments) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel et al. (2017)."""
    pair = [
        {"mu": moments.mean.astype(np.float64), "sigma": moments.covariance.astype(np.float64)}
        for moments in (samples, reference)
    ]
    distance = fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID]
    if not np.isfinite(distance) or distance < -1e-3 * sum(np.trace(m["sigma"]) for m in pair):
        raise HarmonicaError(
            f"the Frechet distance came out as {distance:g}; check the images, and that sigma in "
            "the reference is the covariance of features"
        )
    return max(distance, 0.0)  # below zero is rounding


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over splits."""

    mean: float
    std: float
    splits: int


def number_of_splits(count: int) -> int:
    """Of ``SPLIT`` images each, as in the ADM suite, or of a few more where that is uneven."""
    return max(1, count // SPLIT)


def inception_score(logits: Tensor) -> InceptionScore:
    """exp of the mean divergence of p(y|x) from p(y), over contiguous splits (Salimans, 2016).

    Args:
        logits: (n, classes), in the order of the images.
    """
    splits = number_of_splits(len(logits))
    found = isc_features_to_metric(logits, splits=splits, shuffle=False)
    return InceptionScore(found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD], splits)


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Share of samples (n, D) near reference features (m, D), and the other way round.

    Near is within the distance to the third nearest neighbour (Kynkäänniemi et al., 2019).

    Raises:
        HarmonicaError: a set without a third neighbour.
    """
    for what, features in (("samples", samples), ("reference images", reference)):
        if len(features) <= NEIGHBOUR:
            raise HarmonicaError(
                f"precision and recall need at least {NEIGHBOUR + 1} {what} and there are "
                f"{len(features)}; pass more, or leave them out with --metrics"
            )
    # Distances come from inner products, which cancel badly in single precision.
    found = prc_features_to_metric(
        samples.double(),
        reference.double(),
        prc_neighborhood=NEIGHBOUR,
        prc_batch_size=DISTANCE_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def all_the_same(features: Tensor) -> bool:
    """Whether features (n, D) of several images do not differ by more than rounding."""
    spread = (features - features[0]).abs().max()
    return len(features) > 1 and bool(spread <= 1e-5 * features.abs().max())
