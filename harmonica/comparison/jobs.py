"""A comparison by several processes: each does what no other does, a piece at a time.

Who does what is settled by locks, which end with their holder, and what is finished by the folder.
So the others go on with what a process leaves that is killed. Times are not theirs to measure.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from harmonica.comparison.config import LEARNED, REFINED, Cell, CompareConfig
from harmonica.errors import HarmonicaWarning, Interrupted, OutOfReach, run_command
from harmonica.interruption import GRACE_S, Interruption
from harmonica.lock import held_if_free
from harmonica.options import read_preset
from harmonica.output import make_folder

if TYPE_CHECKING:  # it imports this module
    from harmonica.comparison.run import Comparison

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


def pieces(comparison: "Comparison") -> list[Piece]:
    """All of a comparison, in the order in which they are best begun: what takes long, or is waited
    for, first.
    """
    cells = list(comparison.cells())
    refined = [cell for cell in cells if cell.method in REFINED]
    bases = [replace(cell, method=REFINED[cell.method]) for cell in refined]
    learned = [cell for cell in cells if cell.method in LEARNED]
    # Cells of several levels may share a router.
    routers = {
        piece.name: piece
        for cell in (*refined, *bases, *learned)
        for piece in [_router(comparison, cell)]
    }
    return [*routers.values(), *(_images(comparison, cell) for cell in cells)]


def _router(comparison: "Comparison", cell: Cell) -> Piece:
    routers, base = comparison.routers, REFINED.get(cell.method)
    return Piece(
        _router_name(comparison, cell),
        lambda: routers.is_finished(cell),
        lambda: routers.run(cell),
        base and _router_name(comparison, replace(cell, method=base)),
    )


def _router_name(comparison: "Comparison", cell: Cell) -> str:
    return f"router_{comparison.routers.name(cell)}"


def _images(comparison: "Comparison", cell: Cell) -> Piece:
    return Piece(
        f"images_{cell.key}",
        lambda: comparison.has_images(cell),
        lambda: comparison.measure_images(cell),
        _router_name(comparison, cell) if cell.method in LEARNED else None,
    )


# The main process.


def side_by_side(comparison: "Comparison") -> None:
    """Have ``--jobs`` processes train routers and measure images. One that fails is told of, and
    what it leaves is left.

    Raises:
        Interrupted: a signal came; no process is left, and the same call goes on.
    """
    config, folder = comparison.config, comparison.config.out / "jobs"
    lacking = [piece for piece in pieces(comparison) if not piece.is_finished()]
    make_folder(folder)
    with (
        Interruption() as interruption,
        tqdm(total=len(lacking), desc="comparison", unit="piece") as bar,
        contextlib.ExitStack() as stack,
    ):
        running: dict[Path, subprocess.Popen] = {}
        stack.callback(lambda: _end(running.values()))
        for number in range(min(config.jobs, len(lacking))):
            log = folder / f"{number}.log"
            running[log] = _start(config.out, log, _environment(number, config.jobs))
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
        "from harmonica.comparison.jobs import work; work()"
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


@run_command
def work() -> None:
    """Do pieces of the comparison whose folder is the argument, until all are finished."""
    from harmonica.comparison.run import Comparison  # it imports this module

    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(sys.argv[1])
    config = CompareConfig(**read_preset(CompareConfig, folder / "config.yaml"))
    lacking = pieces(Comparison(config))
    while lacking:
        finished = _finish_one(lacking, folder)
        if finished is None:
            time.sleep(PAUSE_S)
        else:
            lacking.remove(finished)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written: returns when the parent is gone
    os.kill(os.getpid(), signal.SIGTERM)


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
