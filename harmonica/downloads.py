"""Published checkpoints: fetched once, resumed when interrupted, verified, kept by hash."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from harmonica.errors import HarmonicaError
from harmonica.files import recorded, sha256, write_atomically, write_record
from models import WeightSource

CACHE = Path(os.environ.get("HARMONICA_CACHE", "checkpoints"))
BLOCK = 1 << 20
TIMEOUT_S = 30


def _announced_hash(response: requests.Response) -> str | None:
    """The sha256 that the Hub announces for large files, if this is one."""
    for hop in (*response.history, response):
        tag = hop.headers.get("X-Linked-ETag", "").strip('"')
        if len(tag) == 64:
            return tag
    return None


def _refuse_open_line(url: str) -> None:
    """Refuse an address that anybody on the way could answer for; this machine is no way."""
    address = urlsplit(url)
    if address.scheme != "https" and address.hostname not in ("localhost", "127.0.0.1"):
        raise requests.exceptions.InvalidSchema("not https")


def _version(response: requests.Response) -> str | None:
    """What tells a file from another at the same address, if the server says."""
    tag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified") if tag.startswith("W/") else tag


def _version_file(partial: Path) -> Path:
    """Where the version that a partial file is of is kept."""
    return partial.with_suffix(".version")


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _version_file(partial).unlink(missing_ok=True)


def _download(url: str, partial: Path, name: str) -> str | None:
    """Complete ``partial`` from ``url``; returns the announced sha256, if any.

    What is there is gone on with only where it is of the version that the server has now, as far
    as the server tells versions apart.
    """
    have, kept = partial.stat().st_size if partial.exists() else 0, _version_file(partial)
    known = kept.read_text() if have and kept.exists() else ""
    headers = {"Range": f"bytes={have}-"} if have else {}
    if known:
        headers["If-Range"] = known
    _refuse_open_line(url)
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        for hop in (*response.history, response):
            _refuse_open_line(hop.url)
        if have and response.status_code == 416:  # nothing is left to fetch
            if response.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                return _announced_hash(response)
            _forget(partial)
            raise requests.ConnectionError("the partial file was longer than the whole")
        response.raise_for_status()
        resumed, version = response.status_code == 206, _version(response) or ""
        if resumed and known and version != known:  # a server that knows no If-Range
            _forget(partial)
            raise requests.ConnectionError("the partial file was of another version")
        if not resumed:
            have = 0
        total = have + int(response.headers.get("Content-Length", 0))
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=name) as bar,
        ):
            if not resumed:
                write_atomically(kept, version.encode("latin-1"))
            for block in response.iter_content(BLOCK):
                file.write(block)
                bar.update(len(block))
        if total and partial.stat().st_size < total:
            raise requests.ConnectionError("the connection closed early")
        return _announced_hash(response)


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """One process at a time makes what ``path`` is to hold; others wait, and find it.

    Raises:
        HarmonicaError: its folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise HarmonicaError(
            f"{path.parent} cannot be written to or has no locks ({error.strerror}); set "
            "HARMONICA_CACHE to a folder that can"
        ) from None
    with lock:
        yield


def fetch(source: WeightSource, folder: Path | None = None) -> Path:
    """The file in ``checkpoints/``, downloaded if absent.

    A partial file is kept and resumed, separately per address. The sha256 is compared with the one
    that is known beforehand or that the server announces, if there is one (the Hub announces it;
    the official address of DiT does not), and stored beside the file, for :func:`verify` at every
    later use.

    Raises:
        HarmonicaError: no address answers, or what came is not the file.
    """
    folder = CACHE if folder is None else folder
    path = folder / source.file
    if path.is_file():
        return path
    with in_turn(path):
        return path if path.is_file() else _fetch(source, path)


def _fetch(source: WeightSource, path: Path) -> Path:
    folder, reasons = path.parent, []
    for number, url in enumerate(source.urls):
        partial = folder / f".{source.file}.{number}.part"
        try:
            announced = _download(url, partial, source.file)
            digest = sha256(partial)
            expected = {None, digest}
            if partial.stat().st_size < source.size or not expected >= {announced, source.sha256}:
                _forget(partial)
                reasons.append(f"{url.split('/')[2]}: not the expected file")
                continue
            write_record(path, digest)
            os.replace(partial, path)
            _forget(partial)
        except (requests.RequestException, OSError) as error:
            reasons.append(f"{url.split('/')[2]}: {type(error).__name__}")
            continue
        return path
    raise HarmonicaError(
        f"{source.file} is not in {folder} and could not be fetched ({'; '.join(reasons)}); run "
        f"`download.py {source.arguments}` where there is a network, or copy the file there"
    )


def verify(path: Path, expected: str | None = None) -> str:
    """sha256 of a file, compared with the one stored when it was fetched, if it was.

    Raises:
        HarmonicaError: it differs from that, or from ``expected``, known beforehand.
    """
    digest, known = sha256(path), recorded(path)
    if expected not in (None, digest):
        raise HarmonicaError(
            f"{path} is not the published file of that name; delete it and fetch it again"
        )
    if known not in (None, digest):
        raise HarmonicaError(
            f"{path} has changed since it was fetched; delete it and fetch it again"
        )
    return digest


def state(source: WeightSource | Path, folder: Path) -> str:
    """Where a checkpoint stands: bundled, in the folder, partly fetched, or not fetched."""
    if isinstance(source, Path):
        return f"bundled, {source.stat().st_size / 1e6:.1f} MB"
    path = folder / source.file
    if path.is_file():
        return f"{path}, {path.stat().st_size / 1e6:.1f} MB"
    partial = sum(part.stat().st_size for part in folder.glob(f".{source.file}.*.part"))
    if partial:
        return f"partly fetched, {partial / 1e6:.1f} MB; repeat the command to resume"
    return f"not fetched, at least {source.size / 1e9:.1f} GB"
