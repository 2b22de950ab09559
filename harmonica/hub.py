"""Autoencoders and text encoders: folders of the Hub, kept in the cache of its own client."""

from fnmatch import fnmatch
from pathlib import Path

from harmonica.errors import HarmonicaError
from models import HubFolder


def _present(part: HubFolder) -> tuple[Path | None, int]:
    """Where the folder is on this machine, if it is, and the bytes of it that are."""
    from huggingface_hub import snapshot_download  # heavy, and only latent models need it
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(part.repository, local_files_only=True))
    except LocalEntryNotFoundError:
        return None, 0
    files = [file for file in path.rglob("*") if file.is_file()]
    wanted = [
        file
        for file in files
        if any(fnmatch(file.relative_to(path).as_posix(), p) for p in part.patterns)
    ]
    return path, sum(file.stat().st_size for file in wanted)


def fetch_part(part: HubFolder) -> Path:
    """The folder in the cache, downloaded as far as it is not there; an interrupted one resumes.

    Raises:
        HarmonicaError: it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(part.repository, allow_patterns=list(part.patterns)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise HarmonicaError(
            f"{part.repository} could not be fetched ({reason}); repeat the command where there is "
            "a network"
        ) from None


def state_of_part(part: HubFolder) -> str:
    """Where a folder stands: in the cache, partly fetched, or not fetched."""
    path, size = _present(part)
    if size >= part.size:
        return f"{path}, {size / 1e6:.1f} MB"
    if size:
        return f"partly fetched, {size / 1e6:.1f} MB; repeat the command to resume"
    return f"not fetched, at least {part.size / 1e9:.1f} GB"
