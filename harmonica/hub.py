"""Autoencoders and text encoders: folders of the Hub, kept in the cache of its own client."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from harmonica.errors import HarmonicaError
from harmonica.files import first_line, sha256
from models import HubFolder


def _present(part: HubFolder) -> tuple[Path | None, list[Path]]:
    """Where the folder is on this machine, if it is, and the files of it that are."""
    from huggingface_hub import snapshot_download  # heavy, and only latent models need it
    from huggingface_hub.errors import LocalEntryNotFoundError

    only = list(part.patterns)
    try:
        path = Path(snapshot_download(part.repository, allow_patterns=only, local_files_only=True))
    except LocalEntryNotFoundError as error:
        known = getattr(error, "snapshot_path", None)  # of one that is not whole
        if known is None:
            return None, []
        path = Path(known)
    files = [file for file in path.rglob("*") if file.is_file()]
    return path, [
        file
        for file in files
        if any(fnmatch(file.relative_to(path).as_posix(), p) for p in part.patterns)
    ]


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _verify(part: HubFolder, files: list[Path]) -> None:
    """Compare large files with the sha256 that the Hub announced.

    Its client keeps them under that name, and compares nothing but sizes itself.
    """
    for file in files:
        announced = file.resolve().name
        if len(announced) == 64 and sha256(file) != announced:
            raise HarmonicaError(
                f"{file.resolve()} is not what the Hub announced; delete it and run `download.py "
                f"{part.arguments}` again"
            )


def fetch_part(part: HubFolder) -> Path:
    """The folder in the cache, downloaded as far as it is not there; an interrupted one resumes.

    Raises:
        HarmonicaError: it cannot be had, or is not what the Hub announced.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = Path(snapshot_download(part.repository, allow_patterns=list(part.patterns)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise HarmonicaError(
            f"{part.repository} could not be fetched ({first_line(error)}); run `download.py "
            f"{part.arguments}` where there is a network"
        ) from None
    _verify(part, _present(part)[1])
    return path


def part_folder(part: HubFolder) -> Path:
    """The folder as it was fetched, whatever the Hub has by now; fetched if it was not.

    Raises:
        HarmonicaError: as :func:`fetch_part`.
    """
    path, files = _present(part)
    if path is None or _size(files) < part.size:
        return fetch_part(part)
    _verify(part, files)
    return path


def whole(loaded: tuple[Any, dict[str, Any]], may_hold_more: bool = False) -> Any:
    """A model that its files hold all of; the libraries make up what is missing, at random.

    Args:
        loaded: what ``from_pretrained`` gives with ``output_loading_info``.
        may_hold_more: whether the files may be those of a larger model.

    Raises:
        ValueError: a tensor is missing, or belongs to something else.
    """
    model, info = loaded
    for fault in ("missing",) if may_hold_more else ("missing", "unexpected"):
        if names := sorted(info[f"{fault}_keys"]):
            raise ValueError(f"{names[0]} is {fault}")
    return model


def state_of_part(part: HubFolder) -> str:
    """Where a folder stands: in the cache, partly fetched, or not fetched."""
    path, files = _present(part)
    size = _size(files)
    if size >= part.size:
        return f"{path}, {size / 1e6:.1f} MB"
    if size:
        return f"partly fetched, {size / 1e6:.1f} MB; repeat the command to resume"
    return f"not fetched, at least {part.size / 1e9:.1f} GB"
