"""Where output goes, and which commit made it."""

import os
import subprocess
from pathlib import Path

from harmonica.errors import HarmonicaError
from harmonica.files import read_json


def commit() -> str:
    """Commit of the source tree, with a mark if it was changed; "unknown" outside of git."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # Installed inside somebody else's repository, there is no commit of ours.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown"
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def check_output(out: Path, report: str) -> None:
    """Refuse a folder that cannot be written to or holds other files than an earlier run's.

    Raises:
        HarmonicaError: it is a file, holds something else, or cannot be written to.
    """
    if out.exists() and not out.is_dir():
        raise HarmonicaError(f"--out {out} is a file; pass a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / report).exists():
            raise HarmonicaError(
                f"--out {out} holds files but no {report} of an earlier run; pass another folder"
            )
        earlier = read_json(out / report)
        if not isinstance(earlier, dict) or "weights_hash" not in earlier:
            raise HarmonicaError(f"--out {out} holds a foreign {report}; pass another folder")
    _check_writable(out, "folder")


def check_new_file(out: Path) -> None:
    """Refuse a file that is there, or cannot be written, before work begins that it is to hold.

    Raises:
        HarmonicaError: it names ``--out``.
    """
    if out.exists():
        raise HarmonicaError(f"--out {out} is there already; remove it, or pass another file")
    _check_writable(out, "file")


def _check_writable(out: Path, kind: str) -> None:
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise HarmonicaError(f"--out {out} cannot be written to; pass another {kind}")


def make_folder(out: Path) -> None:
    """Make the folder that ``--out`` names, unless it is there.

    Raises:
        HarmonicaError: it cannot be.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarmonicaError(
            f"--out {out} cannot be written to ({error.strerror}); pass another folder"
        ) from None
