"""The folder of a run: config, metrics, checkpoints, router, pictures."""

import contextlib
import json
import re
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from harmonica.config import BackboneConfig
from harmonica.errors import HarmonicaError
from harmonica.files import keep_lines, read_json, read_text, write_atomically
from harmonica.lock import held
from harmonica.options import read_preset, to_yaml
from harmonica.output import commit
from harmonica.training.config import LENGTH_AND_OUTPUT, REMEDIES, TrainConfig

_NAME = re.compile(r"\d{3,}-")


def _number(path: Path) -> int:
    return int(path.name.split("-")[0])


def _recorded(path: Path) -> TrainConfig:
    """What a run was started with."""
    return TrainConfig(**read_preset(TrainConfig, path / "config.yaml"))


def _next_folder(parent: Path, number: int, label: str) -> Path:
    """Make ``NNN-label``, with the next number where another run took this one meanwhile."""
    while True:
        path = parent / f"{number:03d}-{label}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not parent.is_dir():
                raise
            number += 1


@dataclass(frozen=True)
class Effort:
    """What training took.

    Attributes:
        evaluations: of the model, see ``Tally``; of all processes.
        seconds: from the start of every part of the run to its end.
    """

    evaluations: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run's files."""

    path: Path

    @classmethod
    def create(cls, parent: Path, config: BackboneConfig) -> "RunDirectory":
        """The next numbered folder under ``parent``; earlier runs are never touched.

        Raises:
            HarmonicaError: ``parent`` cannot be written to or holds something else than runs.
        """
        if parent.exists() and not parent.is_dir():
            raise HarmonicaError(f"--results-dir {parent} is a file; pass a folder")
        try:
            entries = list(parent.iterdir()) if parent.exists() else []
            foreign = [e.name for e in entries if e.is_file() and not e.name.startswith(".")]
            if foreign:
                raise HarmonicaError(
                    f"--results-dir {parent} holds files that are not runs ({foreign[0]}); pass an "
                    "empty or new folder"
                )
            numbers = [_number(entry) for entry in entries if _NAME.match(entry.name)]
            label = f"{config.model.replace('/', '-')}-T{config.num_sampling_steps}"
            path = _next_folder(parent, 1 + max(numbers, default=-1), label)
        except OSError as error:
            raise HarmonicaError(
                f"--results-dir {parent} cannot be written to ({error.strerror}); pass another"
            ) from None
        return cls(path)

    @classmethod
    def open(cls, path: Path, config: TrainConfig) -> "RunDirectory":
        """An earlier run, to go on with.

        Raises:
            HarmonicaError: it was trained otherwise.
        """
        different = config.differences(_recorded(path), LENGTH_AND_OUTPUT + REMEDIES)
        if different:
            raise HarmonicaError(
                f"--resume {path} was trained with {', '.join(different)}; drop what says "
                "otherwise, or start a new run"
            )
        return cls(path)

    @classmethod
    def newest_like(
        cls, parent: Path, config: TrainConfig, weights_hash: str
    ) -> "RunDirectory | None":
        """The run under ``parent`` with the highest number that was started with these options, on
        these weights, wherever their file is by now.
        """
        folders = [path for path in parent.glob("*") if _NAME.match(path.name)]
        for path in sorted(folders, key=_number, reverse=True):
            with contextlib.suppress(HarmonicaError):  # not a run of this version
                if config.differences(_recorded(path), LENGTH_AND_OUTPUT):
                    continue
                if cls(path).is_of_weights(weights_hash):
                    return cls(path)
        return None

    @property
    def _weights(self) -> Path:
        return self.path / "weights.txt"

    def is_of_weights(self, weights_hash: str) -> bool:
        """Whether it may be: of earlier versions a checkpoint has to tell."""
        return not self._weights.is_file() or read_text(self._weights).strip() == weights_hash

    def record(self, config: BackboneConfig, weights_hash: str) -> None:
        """What the run is, on which weights, and by which commit; a line for every start."""
        write_atomically(self.path / "config.yaml", to_yaml(config).encode())
        write_atomically(self._weights, f"{weights_hash}\n".encode())
        known = self.path / "commit.txt"
        earlier = known.read_bytes() if known.exists() else b""
        write_atomically(known, earlier + f"{commit()}\n".encode())

    def exclusive(self) -> AbstractContextManager[None]:
        """The run to oneself.

        Raises:
            HarmonicaError: another process has it.
        """
        return held(self.path / ".lock", f"the run {self.path}")

    @property
    def router(self) -> Path:
        return self.path / "router.safetensors"

    @property
    def schedule(self) -> Path:
        return self.path / "schedule.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def record_effort(self, effort: Effort) -> None:
        """What training took, in ``effort.json``."""
        write_atomically(self.path / "effort.json", json.dumps(asdict(effort)).encode())

    def effort(self) -> Effort:
        """The same, read.

        Raises:
            HarmonicaError: the run is not finished, or of an earlier version.
        """
        path = self.path / "effort.json"
        try:
            return Effort(**read_json(path))
        except (HarmonicaError, TypeError):
            raise HarmonicaError(
                f"{path} does not say what training took; remove that run to train again"
            ) from None

    def forget_after(self, updates: int) -> None:
        """Drop lines of ``metrics.jsonl`` that training will write again, and one cut short."""
        keep_lines(self.path / "metrics.jsonl", lambda line: line["update"] <= updates)

    def log(self, record: dict) -> None:
        """Append one line to ``metrics.jsonl``."""
        try:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise HarmonicaError(
                f"cannot write {self.path / 'metrics.jsonl'} ({error.strerror}); make room and "
                "start again"
            ) from None
