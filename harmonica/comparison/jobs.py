"""A comparison by several processes: each does what no other does, a piece at a time.

Who does what is settled by locks, which end with their holder, and what is finished by the folder.
So the others go on with what a process leaves that is killed. Times are not theirs to measure.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from harmonica.errors import HarmonicaWarning, Interrupted, OutOfReach
from harmonica.interruption import GRACE_S, Interruption
from harmonica.lock import held_if_free
from harmonica.output import make_folder

PAUSE_S = 1.0  # between two looks at what others do


@dataclass(frozen=True)
class Piece:
    """The training of a router, or the images of a cell.

    Attributes:
        name: also that of its lock.
        after: the piece that has to be finished before it can begin.
    """

    name: str
    is_finished: Callable[[], bool]
    finish: Callable[[], None]
    after: str | None = None


# The main process.


def side_by_side(pieces: list[Piece], jobs: int, out: Path) -> None:
    """Have so many processes do pieces. One that fails is told of, and what it leaves is left.

    Args:
        out: the comparison's folder.

    Raises:
        Interrupted: a signal came; no process is left, and the same call goes on.
    """
    lacking, folder = [piece for piece in pieces if not piece.is_finished()], out / "jobs"
    make_folder(folder)
    with (
        Interruption() as interruption,
        tqdm(total=len(lacking), desc="comparison", unit="piece") as bar,
        contextlib.ExitStack() as stack,
    ):
        running: dict[Path, subprocess.Popen] = {}
        stack.callback(lambda: _end(running.values()))
        for number in range(min(jobs, len(lacking))):
            log = folder / f"{number}.log"
            running[log] = _start(out, log, _environment(number, jobs))
        while running:
            if interruption.signal is not None:
                standing = "what is finished is kept: the same command goes on"
                raise Interrupted(interruption.signal, standing)
            time.sleep(PAUSE_S)
            for log in [log for log, process in running.items() if process.poll() is not None]:
                status = running.pop(log).returncode
                if status:
                    with bar.external_write_mode():
                        _say_failed(log, status)
            still = [piece for piece in lacking if not piece.is_finished()]
            bar.update(len(lacking) - len(still))
            lacking = still


def _environment(number: int, jobs: int) -> dict[str, str]:
    """That of a job: its share of the threads, and a GPU of those that this process sees."""
    threads, count = torch.get_num_threads(), torch.cuda.device_count()
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // jobs))}
    if count:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[number % count].strip()
    return environment


def _start(out: Path, log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """A job; what it says goes to its log, and its input ends when this process does."""
    # Its modules are this process's, whatever the folder it is started in holds.
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from harmonica.comparison.worker import work; work()"
    )
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", program, str(out)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which ends the others
        )


def _end(processes: Iterable[subprocess.Popen]) -> None:
    """End jobs that run: a training writes its checkpoint first."""
    for process in processes:
        process.terminate()
    # All within the grace that this process has.
    end = time.monotonic() + 0.75 * GRACE_S
    for process in processes:
        try:
            process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _say_failed(log: Path, status: int) -> None:
    """Warn of a job, with the last that it said: its refusal, or what was raised."""
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    said = log.read_text(errors="replace").strip().splitlines()
    last = f" ({said[-1].strip()})" if said and status > 0 else ""
    warnings.warn(
        f"a job ended {how}{last}, see {log}; what it left goes on without it",
        HarmonicaWarning,
        stacklevel=3,
    )


# A job.


def finish_all(pieces: list[Piece], folder: Path) -> None:
    """Do, of the pieces of the comparison in a folder, what no other process does."""
    lacking = list(pieces)
    while lacking:
        finished = _finish_one(lacking, folder)
        if finished is None:
            time.sleep(PAUSE_S)
        else:
            lacking.remove(finished)


def _finish_one(lacking: list[Piece], folder: Path) -> Piece | None:
    """The first piece that can be begun and that nobody else has, once it is finished; None if
    there is none.
    """
    names = {piece.name for piece in lacking}
    for piece in lacking:
        if piece.after in names:
            continue
        lock = folder / "jobs" / f"{piece.name}.lock"
        with held_if_free(lock, f"--out {folder}") as is_mine:
            if not is_mine:
                continue
            if not piece.is_finished():
                with contextlib.suppress(OutOfReach):  # the main process meets it again
                    piece.finish()
            return piece
    return None
