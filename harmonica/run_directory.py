"""The folder of a run: resolved config, commit, metrics, checkpoints, router, pictures."""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from harmonica.config import BackboneConfig, to_yaml
from harmonica.errors import HarmonicaError
from harmonica.files import write_atomically

_NAME = re.compile(r"\d{3,}-")


def commit() -> str:
    """Commit of the source tree, with a mark if it was changed; "unknown" outside of git."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
            entries = [entry.name for entry in parent.iterdir()] if parent.exists() else []
            runs = [name for name in entries if _NAME.match(name)]
            if entries and not runs:
                raise HarmonicaError(
                    f"--results-dir {parent} holds files that are not runs; pass an empty or new "
                    "folder"
                )
            number = 1 + max((int(name.split("-")[0]) for name in runs), default=-1)
            name = f"{number:03d}-{config.model.replace('/', '-')}-T{config.num_sampling_steps}"
            path = parent / name
            path.mkdir(parents=True)
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
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
