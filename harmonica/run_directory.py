"""Where output goes, and the folder of a run: config, metrics, checkpoints, router, pictures."""

import contextlib
import json
import os
import re
import subprocess
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from harmonica.config import LENGTH_AND_OUTPUT, REMEDIES, BackboneConfig, TrainConfig
from harmonica.denoise import Effort
from harmonica.errors import HarmonicaError
from harmonica.files import parse_json, read_json, write_atomically
from harmonica.lock import held
from harmonica.options import read_preset, to_yaml

_NAME = re.compile(r"\d{3,}-")


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
            foreign = [entry.name for entry in entries if entry.is_file()]
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
    def newest_like(cls, parent: Path, config: TrainConfig) -> "RunDirectory | None":
        """The run under ``parent`` with the highest number that was started with these options."""
        folders = [path for path in parent.glob("*") if _NAME.match(path.name)]
        for path in sorted(folders, key=_number, reverse=True):
            with contextlib.suppress(HarmonicaError):  # not a run of this version
                if not config.differences(_recorded(path), LENGTH_AND_OUTPUT):
                    return cls(path)
        return None

    def record(self, config: BackboneConfig) -> None:
        """What the run is, and by which commit; a line for every start."""
        write_atomically(self.path / "config.yaml", to_yaml(config).encode())
        known = self.path / "commit.txt"
        earlier = known.read_text() if known.exists() else ""
        write_atomically(known, f"{earlier}{commit()}\n".encode())

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
        return Effort(**read_json(self.path / "effort.json"))

    def forget_after(self, updates: int) -> None:
        """Drop lines of ``metrics.jsonl`` that training will write again, and one cut short."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            with contextlib.suppress(HarmonicaError, TypeError, KeyError):
                if line.endswith("\n") and parse_json(line, "a line")["update"] <= updates:
                    kept.append(line)
        write_atomically(path, "".join(kept).encode())

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
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise HarmonicaError(f"--out {out} cannot be written to; pass another folder")
