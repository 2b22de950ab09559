"""How a run starts, goes on and ends: its directory, its checkpoints, its last words.

The main process alone has a directory; the others are told.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from harmonica.errors import HarmonicaError, Interrupted
from harmonica.interruption import Interruption
from harmonica.training.checkpoint import Checkpoints, Stage, unpack
from harmonica.training.config import TrainConfig
from harmonica.training.consensus import peers
from harmonica.training.run_directory import RunDirectory


def choose_run(config: TrainConfig, weights_hash: str) -> RunDirectory:
    """The run that --resume means, or a new one.

    Raises:
        HarmonicaError: it was trained otherwise, or there can be no new one.
    """
    if config.resume == "auto":
        found = RunDirectory.newest_like(config.results_dir, config, weights_hash)
        if found is not None:
            return found
    elif config.resume is not None:
        return RunDirectory.open(Path(config.resume), config)
    return RunDirectory.create(config.results_dir, config)


class Progress:
    """A run under way, for as long as it is entered; nobody else has its directory meanwhile.

    Attributes:
        directory: None on all but the main process.
    """

    def __init__(
        self, config: TrainConfig, weights_hash: str, interruption: Interruption, is_main: bool
    ):
        """``weights_hash``: of what is trained for."""
        self.config, self.weights_hash = config, weights_hash
        self.interruption, self.is_main = interruption, is_main
        self.directory: RunDirectory | None = None
        self._checkpoints: Checkpoints | None = None
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def start(
        self,
        load: Callable[[dict[str, Any]], None],
        prepare: Callable[[RunDirectory], None],
    ) -> None:
        """Open the directory. It is of this run only when its checkpoint, if any, was taken.

        Args:
            load: is called, on every process, with the state that training goes on from, unless it
                is at its beginning; it may refuse that.
            prepare: is called with the directory, on the main process.

        Raises:
            HarmonicaError: on every process, if the main one cannot have the directory, or there
                are checkpoints and all are damaged or refused.
        """
        content = self._by_main(self._open)
        if content is not None:
            load(unpack(content))
        self._by_main(lambda: self._begin(prepare))

    def _by_main(self, action: Callable[[], Any]) -> Any:
        """What comes of it on the main process, which alone does it; on every process."""
        found, refusal = None, None
        if self.is_main:
            try:
                found = action()
            except HarmonicaError as error:
                refusal = str(error)
        refusal, found = broadcast_object_list([refusal, found])
        if refusal is not None:
            raise HarmonicaError(refusal)
        return found

    def _begin(self, prepare: Callable[[RunDirectory], None]) -> None:
        self.directory.record(replace(self.config, resume=None), self.weights_hash)
        prepare(self.directory)

    def _open(self) -> bytes | None:
        config = self.config
        self.directory = choose_run(config, self.weights_hash)
        self._lock.enter_context(self.directory.exclusive())
        self._checkpoints = Checkpoints(
            self.directory.checkpoints, config.ckpt_every, config.keep_ckpts
        )
        content, said = self._checkpoints.latest()
        if config.resume is not None:
            print(*said, sep="\n", file=sys.stderr)
        return content

    def hold(self, stage: Stage, state: Callable[[], dict[str, Any]], sweep_length: int) -> None:
        """Keep what training stands on between two sweeps; write it where it is time."""
        if self._checkpoints is not None:
            self._checkpoints.hold(stage, state(), sweep_length)

    def save(self) -> None:
        """Write what is held, from whichever thread."""
        if self._checkpoints is not None:
            self._checkpoints.save()

    @contextlib.contextmanager
    def secured(self) -> Iterator[None]:
        """However training ends, what it stands on is on disk, and it says how to go on."""
        self.interruption.secure, self.interruption.standing = self.save, self._standing
        with self.interruption:
            try:
                with peers():
                    yield
                self.save()
            except Interrupted as stop:
                self.save()
                raise Interrupted(stop.signal, self._standing()) from None
            except HarmonicaError as error:
                with contextlib.suppress(HarmonicaError):  # a full disk has been reported
                    self.save()
                said = filter(None, [str(error), self._standing()])
                raise HarmonicaError("; ".join(said)) from None

    def _standing(self) -> str:
        """Where a run that ended early stands; nothing on processes that do not know."""
        if self.directory is None or self._checkpoints is None:
            return ""
        last = self._checkpoints.last
        if last is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {last}: go on with --resume {self.directory.path}"
