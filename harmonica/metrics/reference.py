"""What samples are compared with: statistics, features or images of a reference set."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harmonica.errors import HarmonicaError
from harmonica.files import Npz, sha256, write_atomically
from harmonica.metrics import METRICS
from harmonica.metrics.collect import Rows
from harmonica.metrics.distribution import Moments
from harmonica.metrics.extractor import Extractor
from harmonica.metrics.images import FolderImages, NpzImages
from harmonica.metrics.weights import REFERENCES, bundled

FLAG = "--reference"


@dataclass(frozen=True)
class Reference:
    """A reference set, as far as its file goes.

    Attributes:
        pooled, spatial: statistics for FID and sFID.
        features: (n, D) pooled features for precision and recall.
        images: from which features are taken where the file has none.
        extractor_sha256: of the network that statistics and features came from, if recorded.
    """

    name: str
    path: Path
    pooled: Moments | None = None
    spatial: Moments | None = None
    features: Tensor | None = None
    images: NpzImages | FolderImages | None = None
    extractor_sha256: str | None = None

    def content_hash(self) -> str:
        """sha256 of the file, or of the files in the folder."""
        return self.images.content_hash() if self.path.is_dir() else sha256(self.path)

    def allows(self) -> tuple[str, ...]:
        """The metrics that can be had with it."""
        has_images, has_features = self.images is not None, self.features is not None
        found = {
            "fid": self.pooled is not None or has_images,
            # Beside statistics, images are a part of the set that serves precision and recall.
            "sfid": self.spatial is not None or (has_images and self.pooled is None),
            "is": True,
            "precision": has_features or has_images,
            "recall": has_features or has_images,
        }
        return tuple(metric for metric in METRICS if found[metric])

    def check(self, extractor: Extractor) -> None:
        """Refuse statistics of another network than ``extractor``.

        Raises:
            HarmonicaError: they are.
        """
        for moments, size in (
            (self.pooled, extractor.pooled_size),
            (self.spatial, extractor.spatial_size),
        ):
            if moments is not None and len(moments.mean) != size:
                raise HarmonicaError(
                    f"{FLAG} {self.name} has statistics of {len(moments.mean)} features and "
                    f"--extractor {extractor.name} gives {size}; pass the extractor that they "
                    "were made with"
                )
        if self.extractor_sha256 not in (None, extractor.sha256):
            raise HarmonicaError(
                f"{FLAG} {self.name} was made with other weights of the {extractor.name} extractor "
                f"({self.extractor_sha256[:16]}, these are {extractor.sha256[:16]}); make it again"
            )

    def columns(self, metrics: tuple[str, ...]) -> set[str]:
        """What has to be extracted from its images for these metrics."""
        wanted = set()
        neighbours = {"precision", "recall"} & set(metrics)
        if ("fid" in metrics and self.pooled is None) or (neighbours and self.features is None):
            wanted.add("pooled")
        if "sfid" in metrics and self.spatial is None:
            wanted.add("spatial")
        return wanted

    def completed(self, rows: Rows) -> "Reference":
        """With what was extracted from its images; what the file said itself stands."""
        what = f"{FLAG} {self.name}"
        reference = self
        if "pooled" in rows and self.features is None:
            reference = replace(reference, features=rows["pooled"])
        if "pooled" in rows and self.pooled is None:
            reference = replace(reference, pooled=Moments.of(rows["pooled"], what))
        if "spatial" in rows and self.spatial is None:
            reference = replace(reference, spatial=Moments.of(rows["spatial"], what))
        return reference


def open_reference(name: str) -> Reference:
    """A bundled reference, an npz file or a folder of images.

    Raises:
        HarmonicaError: it is none of these, or what it holds is not what its name says.
    """
    path = bundled(REFERENCES[name]) if name in REFERENCES else Path(name)
    if path.is_dir():
        return Reference(name, path, images=FolderImages(path, FLAG))
    npz = Npz(path, FLAG)
    if "mu" not in npz:
        return Reference(name, path, images=NpzImages(path, FLAG))
    return Reference(
        name,
        path,
        pooled=_moments(npz, "mu", "sigma"),
        spatial=_moments(npz, "mu_s", "sigma_s") if "mu_s" in npz else None,
        features=_features(npz) if "features" in npz else None,
        images=NpzImages(path, FLAG) if "arr_0" in npz else None,
        extractor_sha256=_text(npz, "extractor") if "extractor" in npz else None,
    )


def _moments(npz: Npz, mean_name: str, covariance_name: str) -> Moments:
    mean, covariance = npz[mean_name].whole(), npz[covariance_name].whole()
    size = len(mean) if mean.ndim == 1 else 0
    if (
        covariance.shape != (size, size)
        or {mean.dtype.kind, covariance.dtype.kind} != {"f"}
        or not np.isfinite(mean).all()
        or not np.isfinite(covariance).all()
        or not np.allclose(
            covariance, covariance.T, rtol=1e-3, atol=1e-5 * np.abs(covariance).max()
        )
    ):
        raise HarmonicaError(
            f"{FLAG} {npz.path}: {mean_name} {mean.shape} and {covariance_name} {covariance.shape} "
            "are no mean and covariance of features; make the file again"
        )
    count = npz["count"].whole() if "count" in npz else np.array("unknown")
    return Moments(
        mean.astype(np.float64),
        covariance.astype(np.float64),
        int(count) if count.ndim == 0 and count.dtype.kind in "iu" else None,
    )


def _text(npz: Npz, name: str) -> str:
    array = npz[name].whole()
    is_text = array.dtype.kind == "U" and array.ndim == 0
    # Numbers that are no characters must not become a string.
    if not is_text or (array.reshape(1).view(f"{array.dtype.byteorder}u4") >= 128).any():
        raise HarmonicaError(f"{FLAG} {npz.path}: {name} is no text; make the file again")
    return array.item()


def _features(npz: Npz) -> Tensor:
    features = npz["features"].whole()
    if features.ndim != 2 or features.dtype.kind != "f" or not np.isfinite(features).all():
        raise HarmonicaError(
            f"{FLAG} {npz.path}: features {features.shape} are no table of numbers; make the file "
            "again"
        )
    return torch.from_numpy(features.astype(np.float32))


def save_reference(path: Path, rows: Rows, extractor: Extractor, neighbours: int) -> None:
    """Write statistics of all rows, and every so many features for precision and recall.

    The covariance of spatial features is stored in single and features in half precision, to keep
    the file small.

    Args:
        rows: "pooled" and "spatial" features of the reference images.
        neighbours: number of features to keep, evenly spaced.
    """
    what = "the reference set"
    pooled, spatial = Moments.of(rows["pooled"], what), Moments.of(rows["spatial"], what)
    kept = torch.linspace(0, len(rows["pooled"]) - 1, min(neighbours, len(rows["pooled"]))).long()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=pooled.mean,
        sigma=pooled.covariance,
        mu_s=spatial.mean,
        sigma_s=spatial.covariance.astype(np.float32),
        features=rows["pooled"][kept].half().numpy(),
        count=np.array(pooled.count),
        extractor=np.array(extractor.sha256),
    )
    write_atomically(path, buffer.getvalue())
