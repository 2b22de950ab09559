"""Where output goes, and the folder of a run: config, metrics, checkpoints, router, pictures."""

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from harmonica.config import BackboneConfig
from harmonica.errors import HarmonicaError
from harmonica.files import read_json, write_atomically
from harmonica.options import to_yaml

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
            numbers = [int(e.name.split("-")[0]) for e in entries if _NAME.match(e.name)]
            label = f"{config.model.replace('/', '-')}-T{config.num_sampling_steps}"
            path = _next_folder(parent, 1 + max(numbers, default=-1), label)
        except OSError as error:
            raise HarmonicaError(
                f"--results-dir {parent} cannot be written to ({error.strerror}); pass another"
            ) from None
        run = cls(path)
        write_atomically(run.path / "config.yaml", to_yaml(config).encode())
        write_atomically(run.path / "commit.txt", f"{commit()}\n".encode())
        return run

    @property
    def router(self) -> Path:
        return self.path / "router.safetensors"

    @property
    def schedule(self) -> Path:
        return self.path / "schedule.json"

    def checkpoint(self, updates: int) -> Path:
        return self.path / "checkpoints" / f"{updates:07d}.pt"

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
