"""Many images as files of consecutive samples: whole or absent, known by content, put together.

A shard is an array of images and a manifest that says what they are and what they hash to. The
manifest is written last: without it a shard is not there. Any number of processes work on one
folder; who makes a shard holds a lock on it, which ends with the process.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harmonica.errors import HarmonicaError
from harmonica.files import (
    atomic_file,
    read_array,
    read_json,
    recorded,
    remove_unfinished,
    sha256,
    write_atomically,
    write_record,
)
from harmonica.options import flag_of

MANIFEST = "manifest.json"
SHARDS, PICTURES = "shards", "images"


class DamagedShard(HarmonicaError):
    """A shard that is not what was written."""


@dataclass(frozen=True)
class Shard:
    """Samples ``start`` up to (not including) ``stop``; ``number`` counts shards from 0."""

    number: int
    start: int
    stop: int

    @property
    def indices(self) -> range:
        return range(self.start, self.stop)


def divide(count: int, size: int) -> list[Shard]:
    """Shards of ``size`` samples each, the last one smaller."""
    starts = range(0, count, size)
    return [Shard(k, start, min(start + size, count)) for k, start in enumerate(starts)]


@dataclass(frozen=True)
class Origin:
    """What images follow from, apart from their index; two of the same content are equal.

    Attributes:
        config: options that change images, by field name.
        weights: hash of the backbone's.
        router: hash of the schedule that is replayed; None computes everything.
        autoencoder: hash of what makes pixels of latents; None where the model does.
        device: kind that rounds as it does.
    """

    config: dict[str, Any]
    weights: str
    router: str | None
    autoencoder: str | None = None
    device: str = "cpu"

    @property
    def config_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    @property
    def hashes(self) -> dict[str, str | None]:
        """What a manifest records of it."""
        return {**asdict(self), "config": self.config_hash}

    def difference(self, recorded: Any) -> str | None:
        """What a folder's manifest says otherwise, by name and value; None if nothing."""
        known = recorded if isinstance(recorded, dict) else {}
        config = known.get("config")
        config = config if isinstance(config, dict) else {}
        for name, value in self.config.items():
            if config.get(name) != value:
                return f"{flag_of(name)} {config.get(name)}, not {value}"
        for name in ("weights", "router", "autoencoder", "device"):
            if known.get(name) != getattr(self, name):
                return f"{name} {known.get(name)}, not {getattr(self, name)}"
        return None


def _holds_images(array: np.ndarray, count: int) -> bool:
    """Whether an array is (n, H, W, 3) uint8 with at least ``count`` images that have pixels."""
    if array.dtype != np.uint8 or array.ndim != 4:
        return False
    return len(array) >= count and array.shape[3] == 3 and array.size > 0


class ShardFolder:
    """The images of one origin under a folder; ``flag`` is the one that names it."""

    def __init__(self, root: Path, origin: Origin, flag: str = "--out"):
        self.root, self.origin, self._flag = root, origin, flag

    def make(self) -> None:
        """Write down what the folder is for, unless it says so.

        Raises:
            HarmonicaError: it is for something else, or cannot be written to.
        """
        self.refuse_foreign()
        if not (self.root / MANIFEST).exists():
            content = json.dumps(asdict(self.origin), indent=1).encode()
            write_atomically(self.root / MANIFEST, content)
        with self._writing():
            (self.root / SHARDS).mkdir(exist_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Where the folder cannot be written to, that is said."""
        try:
            yield
        except OSError as error:
            raise HarmonicaError(
                f"{self._flag} {self.root} cannot be written to ({error.strerror}); mend that or "
                "pass another folder"
            ) from None

    def refuse_foreign(self) -> None:
        """Refuse a folder of other images, or of something else; nothing is written.

        Raises:
            HarmonicaError: it is.
        """
        root, flag = self.root, self._flag
        if root.exists() and not root.is_dir():
            raise HarmonicaError(f"{flag} {root} is a file; pass a folder")
        # Before the manifest, with which another process may begin the folder meanwhile.
        files = list(root.glob("[!.]*")) if root.is_dir() else []
        if not (root / MANIFEST).exists():
            if files:
                raise HarmonicaError(
                    f"{flag} {root} holds files but no {MANIFEST} of images; pass another folder"
                )
            return
        different = self.origin.difference(read_json(root / MANIFEST))
        if different is not None:
            raise HarmonicaError(
                f"{flag} {root} holds images made with {different}; pass another folder or the "
                "same options"
            )

    # One shard.

    def _data(self, shard: Shard) -> Path:
        return self.root / SHARDS / f"{shard.start:06d}.npy"

    def _manifest(self, shard: Shard) -> Path:
        return self.root / SHARDS / f"{shard.start:06d}.json"

    def picture(self, index: int) -> Path:
        return self.root / PICTURES / f"{index:06d}.png"

    def _read_manifest(self, shard: Shard) -> dict[str, Any] | None:
        """What is recorded of a shard that covers this one; None if nothing usable is.

        Raises:
            HarmonicaError: it is of other images.
        """
        path = self._manifest(shard)
        if not path.exists():
            return None
        try:
            found = read_json(path)
        except HarmonicaError:
            return None  # damaged: made again
        if not isinstance(found, dict) or found.get("start") != shard.start:
            return None
        if any(found.get(name) != value for name, value in self.origin.hashes.items()):
            raise HarmonicaError(
                f"{self._flag} {self.root}: {path.name} is a shard of other images; remove it or "
                "pass another folder"
            )
        stop = found.get("stop")
        return found if isinstance(stop, int) and stop >= shard.stop else None

    def is_done(self, shard: Shard, pictures: bool, thorough: bool = True) -> bool:
        """Whether nothing of a shard is missing.

        Args:
            pictures: whether it has to be there as PNG files too.
            thorough: by content, which reads everything; else by what files there are.
        """
        manifest, data = self._read_manifest(shard), self._data(shard)
        if manifest is None or not data.is_file():
            return False
        digests = self._picture_digests(shard, manifest) if pictures else {}
        if digests is None:
            return False
        if not thorough:
            return all(path.is_file() for path in digests)
        try:
            self.read(shard)
        except DamagedShard:
            return False
        return all(path.is_file() and sha256(path) == digest for path, digest in digests.items())

    @property
    def _claims(self) -> Path:
        return self.root / SHARDS / ".claims"

    def show_life(self) -> None:
        """For processes that wait for this one: see ``life``."""
        with self._writing():
            os.utime(self._claims)

    def life(self) -> int:
        """Another number whenever any process has shown life; not a time, as clocks differ."""
        with self._writing():
            return self._claims.stat().st_mtime_ns

    @contextlib.contextmanager
    def claim(self, shard: Shard) -> Iterator[bool]:
        """Whether this process may make the shard, which nobody else does meanwhile."""
        with self._writing():
            file = self._claims.open("ab")
        with file:
            try:
                # A byte of one file stands for a shard, whether it is in the file or not.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard.number)
            except (BlockingIOError, PermissionError):
                yield False
                return
            except OSError as error:
                raise HarmonicaError(
                    f"{self._flag} {self.root} is on a file system without locks "
                    f"({error.strerror}); choose another"
                ) from None
            of_shard = f"{shard.start:06d}."
            remove_unfinished(self.root / SHARDS, lambda name: name.startswith(of_shard))
            yield True

    def write(self, shard: Shard, images: np.ndarray) -> None:
        """Images (n, H, W, 3) uint8 of the shard."""
        buffer = io.BytesIO()
        np.save(buffer, images, allow_pickle=False)
        content = buffer.getvalue()
        manifest = {
            **self.origin.hashes,
            "start": shard.start,
            "stop": shard.stop,
            "shape": list(images.shape),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        with self._writing():
            self._manifest(shard).unlink(missing_ok=True)  # of what is replaced
        write_atomically(self._data(shard), content)
        write_atomically(self._manifest(shard), json.dumps(manifest).encode())

    def read(self, shard: Shard) -> np.ndarray:
        """Images (n, H, W, 3) uint8 of a shard that is done.

        Raises:
            DamagedShard: it is not any more.
        """
        manifest = self._read_manifest(shard) or {}
        with contextlib.suppress(HarmonicaError):  # no whole file
            array, digest = read_array(self._data(shard))
            count = len(shard.indices)
            if digest == manifest.get("sha256") and _holds_images(array, count):
                return array[:count]
        raise DamagedShard(f"{self._data(shard)} has changed; run the same command again")

    # PNG files.

    def _pictures_record(self, shard: Shard) -> Path:
        return self.root / SHARDS / f"{shard.start:06d}.png.json"

    def _picture_digests(self, shard: Shard, manifest: dict[str, Any]) -> dict[Path, str] | None:
        """What the PNG files of a shard hash to; None unless they were made of what it is now."""
        try:
            record = read_json(self._pictures_record(shard))
        except HarmonicaError:
            return None
        if not isinstance(record, dict) or record.get("shard") != manifest.get("sha256"):
            return None
        digests = record.get("pictures")
        if not isinstance(digests, list) or len(digests) < len(shard.indices):
            return None
        return dict(zip(map(self.picture, shard.indices), digests, strict=False))

    def write_pictures(self, shard: Shard) -> None:
        """``images/000000.png`` ... of a shard that is done."""
        made_of = (self._read_manifest(shard) or {}).get("sha256")
        digests = []
        own = {self.picture(index).name for index in shard.indices}
        remove_unfinished(self.root / PICTURES, own.__contains__)
        for index, image in zip(shard.indices, self.read(shard), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="PNG")
            write_atomically(self.picture(index), buffer.getvalue())
            digests.append(hashlib.sha256(buffer.getvalue()).hexdigest())
        record = {"shard": made_of, "pictures": digests}
        write_atomically(self._pictures_record(shard), json.dumps(record).encode())

    # All together.

    def assemble(self, shards: list[Shard]) -> Path:
        """``arr_0`` (N, H, W, 3) uint8 in index order in one npz, a shard at a time in memory.

        Nothing in the file depends on when or by whom it was made.

        Raises:
            DamagedShard: one is not what was written, or is being made again.
        """
        count, shape = shards[-1].stop, self.read(shards[0]).shape[1:]
        size = "x".join(map(str, (count, *shape)))
        path = self.root / f"samples_{size}.npz"
        if path.is_file() and recorded(path) == sha256(path):
            return path
        remove_unfinished(self.root)
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
            "fortran_order": False,
            "shape": (count, *shape),
        }
        entry = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
        with (
            atomic_file(path) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(entry, "w", force_zip64=True) as array,
        ):
            np.lib.format.write_array_header_1_0(array, header)
            for shard in shards:
                images = self.read(shard)
                if images.shape != (len(shard.indices), *shape):
                    raise HarmonicaError(
                        f"{self._data(shard)} has images of another shape; remove it and run the "
                        "same command again"
                    )
                array.write(images.tobytes())
        write_record(path, sha256(path))
        return path
