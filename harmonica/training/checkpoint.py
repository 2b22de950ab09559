"""Checkpoints of a run: whole or absent, checked when read, the newest few kept."""

import contextlib
import io
import re
import threading
from pathlib import Path
from typing import Any

import torch

from harmonica.errors import HarmonicaError
from harmonica.files import read_checked, read_torch, record_of, write_checked

_NAME = re.compile(r"\d{7,}\.pt")


class Checkpoints:
    """The folder of a run's checkpoints, and the one that could be written now.

    Training is held between two sweeps, as bytes, so that it can be written at any moment and by
    any thread while the next sweep changes everything.
    """

    def __init__(self, folder: Path, every: int, keep: int):
        """At most ``every`` updates, or a sweep if that is more, lie between two checkpoints."""
        self.folder, self.every, self.keep = folder, every, keep
        self._held: tuple[int, bytes] | None = None
        self._saved: int | None = None
        self._writing = threading.RLock()

    def path(self, updates: int) -> Path:
        return self.folder / f"{updates:07d}.pt"

    @property
    def last(self) -> Path | None:
        """The one on disk from which training would go on."""
        return None if self._saved is None else self.path(self._saved)

    def hold(self, updates: int, state: dict[str, Any], sweep_length: int) -> None:
        """Keep the state after ``updates``; write it if it has to be before the next sweep ends."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._held = (updates, buffer.getvalue())
        if updates - (self._saved or 0) + sweep_length > self.every and updates > 0:
            self.save()

    def save(self) -> None:
        """Write what is held, unless it is on disk.

        Raises:
            HarmonicaError: it cannot be written; the earlier ones stand.
        """
        with self._writing:
            if self._held is None or self._held[0] == self._saved:
                return
            updates, content = self._held
            write_checked(self.path(updates), content)
            self._saved = updates
            for path in self._found()[: -self.keep]:
                path.unlink(missing_ok=True)
                record_of(path).unlink(missing_ok=True)

    def latest(self) -> tuple[bytes | None, list[str]]:
        """The newest whole checkpoint, None if there never was one; and what is to be said of it.

        Those that are damaged are renamed, so that they stay and are not taken again.

        Raises:
            HarmonicaError: all of them are, or were found to be when one was last looked for.
        """
        for stale in self.folder.glob(".*.tmp"):  # of a process that was killed
            stale.unlink(missing_ok=True)
        said = []
        for path in reversed(self._found()):
            try:
                content = read_checked(path)
            except HarmonicaError as error:
                said.append(f"{error}, it was set aside as {path.name}.damaged")
                with contextlib.suppress(OSError):
                    path.rename(path.with_name(f"{path.name}.damaged"))
                continue
            self._saved = int(path.stem)
            return content, [*said, f"going on from {path}"]
        if any(self.folder.glob("*.pt.damaged")):
            raise HarmonicaError(
                f"no checkpoint in {self.folder} is whole; start a new run without --resume"
            )
        return None, [f"{self.folder} holds no checkpoint; training starts at its beginning"]

    def _found(self) -> list[Path]:
        """Files by number of updates."""
        files = [path for path in self.folder.glob("*.pt") if _NAME.fullmatch(path.name)]
        return sorted(files, key=lambda path: int(path.stem))


def unpack(content: bytes) -> dict[str, Any]:
    """What was held.

    Raises:
        HarmonicaError: it is no checkpoint.
    """
    state = read_torch(io.BytesIO(content), "the checkpoint")
    if not isinstance(state, dict):
        raise HarmonicaError("the checkpoint holds no training state; start a new run")
    return state
