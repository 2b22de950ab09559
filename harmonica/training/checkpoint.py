"""Checkpoints of a run: whole or absent, checked when read, the newest few kept."""

import contextlib
import io
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harmonica.errors import HarmonicaError
from harmonica.files import (
    DamagedFile,
    read_checked,
    read_torch,
    record_of,
    remove_unfinished,
    write_checked,
)

_NAME = re.compile(r"(\d{7,})(?:-(\d{4,}))?\.pt")


class Stage(NamedTuple):
    """How far a run has come: its updates, and exchanges that were tried after the last of them."""

    updates: int
    trials: int = 0

    @property
    def file(self) -> str:
        return f"{self.updates:07d}{f'-{self.trials:04d}' if self.trials else ''}.pt"

    @classmethod
    def of_file(cls, name: str) -> "Stage | None":
        """None if it is no checkpoint's."""
        found = _NAME.fullmatch(name)
        return found and cls(*map(int, found.groups(default="0")))

    def since(self, earlier: "Stage") -> int:
        """Updates and trials from an earlier stage to this one."""
        if self.updates == earlier.updates:
            return self.trials - earlier.trials
        return self.updates - earlier.updates + self.trials


class Checkpoints:
    """The folder of a run's checkpoints, and the one that could be written now.

    Training is held between two sweeps, as bytes, so that it can be written at any moment and by
    any thread while the next sweep changes everything.
    """

    def __init__(self, folder: Path, every: int, keep: int):
        """At most ``every`` updates and trials, or a sweep if that is more, lie between two
        checkpoints.
        """
        self.folder, self.every, self.keep = folder, every, keep
        self._held: tuple[Stage, bytes] | None = None
        self._saved: Stage | None = None
        self._writing = threading.RLock()

    def path(self, stage: Stage) -> Path:
        return self.folder / stage.file

    @property
    def last(self) -> Path | None:
        """The one on disk from which training would go on."""
        return None if self._saved is None else self.path(self._saved)

    def hold(self, stage: Stage, state: dict[str, Any], sweep_length: int) -> None:
        """Keep the state at a stage; write it if it has to be before the next sweep ends."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._held = (stage, buffer.getvalue())
        unsaved = stage.since(self._saved or Stage(0))
        if unsaved + sweep_length > self.every and stage.updates > 0:
            self.save()

    def save(self) -> None:
        """Write what is held, unless it is on disk.

        Raises:
            HarmonicaError: it cannot be written; the earlier ones stand.
        """
        with self._writing:
            if self._held is None or self._held[0] == self._saved:
                return
            stage, content = self._held
            write_checked(self.path(stage), content)
            self._saved = stage
            for path in self._found()[: -self.keep]:
                path.unlink(missing_ok=True)
                record_of(path).unlink(missing_ok=True)

    def latest(self) -> tuple[bytes | None, list[str]]:
        """The newest whole checkpoint, None if there never was one; and what is to be said of it.

        Those that are damaged are renamed, so that they stay and are not taken again.

        Raises:
            HarmonicaError: all of them are, or were found to be when one was last looked for; or
                one cannot be read, which may pass.
        """
        remove_unfinished(self.folder)
        said = []
        for path in reversed(self._found()):
            try:
                content = read_checked(path)
            except DamagedFile as error:
                said.append(f"{error}, it was set aside as {path.name}.damaged")
                with contextlib.suppress(OSError):
                    path.rename(path.with_name(f"{path.name}.damaged"))
                continue
            self._saved = Stage.of_file(path.name)
            return content, [*said, f"going on from {path}"]
        if any(self.folder.glob("*.pt.damaged")):
            raise HarmonicaError(
                f"no checkpoint in {self.folder} is whole; start a new run without --resume"
            )
        return None, [f"{self.folder} holds no checkpoint; training starts at its beginning"]

    def _found(self) -> list[Path]:
        """Files by stage."""
        files = [path for path in self.folder.glob("*.pt") if Stage.of_file(path.name)]
        return sorted(files, key=lambda path: Stage.of_file(path.name))


def unpack(content: bytes) -> dict[str, Any]:
    """What was held.

    Raises:
        HarmonicaError: it is no checkpoint.
    """
    state = read_torch(io.BytesIO(content), "the checkpoint")
    if not isinstance(state, dict):
        raise HarmonicaError("the checkpoint holds no training state; start a new run")
    return state
