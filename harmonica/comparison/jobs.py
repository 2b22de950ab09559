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
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from harmonica.errors import HarmonicaError, HarmonicaWarning, Interrupted, OutOfReach
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
    folder = out / "jobs"
    lacking = [piece for piece in pieces if not _is_settled(piece, folder)]
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
            time.sleep(PAUSE_S)
            ended = [log for log, process in running.items() if process.poll() is not None]
            if interruption.signal is not None:  # the others may have had it, and have not failed
                standing = "what is finished is kept: the same command goes on"
                raise Interrupted(interruption.signal, standing)
            for log in ended:
                status = running.pop(log).returncode
                if status:
                    with bar.external_write_mode():
                        _say_failed(log, status)
            still = [piece for piece in lacking if not _is_settled(piece, folder)]
            bar.update(len(lacking) - len(still))
            lacking = still


def _is_settled(piece: Piece, folder: Path) -> bool:
    return piece.is_finished() or _out_of_reach(piece, folder).exists()


def _out_of_reach(piece: Piece, folder: Path) -> Path:
    """The mark of a piece that no setting comes near to: nothing of it will ever be finished."""
    return folder / f"{piece.name}.out-of-reach"


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


def _end(processes: Collection[subprocess.Popen]) -> None:
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
        f"a job ended {how}{last}, see {log}; what it left is for the others, or for the end",
        HarmonicaWarning,
        stacklevel=3,
    )


# A job.


def finish_all(pieces: list[Piece], out: Path) -> None:
    """Do, of the pieces of the comparison in a folder, what no other process does.

    Raises:
        HarmonicaError: of a piece, after all others but those that wait for it.
    """
    lacking, refusal = list(pieces), None
    while lacking:
        with _begun(lacking, out / "jobs") as piece:
            if piece is None:
                time.sleep(PAUSE_S)
                continue
            try:
                _finish(piece, out / "jobs")
                lacking.remove(piece)
            except HarmonicaError as error:
                print(f"{piece.name}: {error}", file=sys.stderr)
                lacking, refusal = _without(lacking, piece), error
    if refusal is not None:
        raise refusal


@contextlib.contextmanager
def _begun(lacking: list[Piece], folder: Path) -> Iterator[Piece | None]:
    """The first piece that can be begun and that nobody else has, held; None if there is none."""
    names = {piece.name for piece in lacking}
    with contextlib.ExitStack() as locks:
        for piece in lacking:
            lock = held_if_free(folder / f"{piece.name}.lock", f"--out {folder.parent}")
            if piece.after not in names and locks.enter_context(lock):
                yield piece
                return
        yield None


def _finish(piece: Piece, folder: Path) -> None:
    if not _is_settled(piece, folder):
        try:
            piece.finish()
        except OutOfReach:  # the main process meets it again
            _out_of_reach(piece, folder).touch()


def _without(lacking: list[Piece], piece: Piece) -> list[Piece]:
    """Without one, and without what waits for it."""
    for other in [other for other in lacking if other.after == piece.name]:
        lacking = _without(lacking, other)
    return [other for other in lacking if other is not piece]
