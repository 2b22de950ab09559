"""The command-line programs in processes of their own, started from one that has imported them."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["harmonica.training.trainer", "harmonica.many_samples", "processes"]
)


def _run(program: str, arguments: list[str], folder: Path, environment: dict, fault) -> None:
    from harmonica import commands

    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(f"rank{environment['RANK']}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [program, *arguments]
    if fault is not None:
        fault()
    getattr(commands, program)()


class Group:
    """Processes of one run, without a launcher that would look after them."""

    def __init__(
        self,
        program: str,
        *arguments: str,
        folder: Path,
        ranks: int = 2,
        fault: Callable[[], None] | None = None,
    ):
        shared = {
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.folder = folder
        for log in folder.glob("rank*.log"):
            log.unlink()
        self.processes = []
        for rank in range(ranks):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if ranks == 1:
                environment = {"RANK": "0"}
            process = CONTEXT.Process(
                target=_run, args=(program, list(map(str, arguments)), folder, environment, fault)
            )
            process.start()
            self.processes.append(process)

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> bool:
        """Whether the process was still there to get the signal."""
        process = self.processes[rank]
        if not process.is_alive():
            return False
        os.kill(process.pid, signum)
        return True

    @property
    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> bool:
        """Whether it came true before every process ended."""
        end = time.monotonic() + timeout
        while not condition():
            if not self.is_running:
                return condition()
            assert time.monotonic() < end, self.said()
            time.sleep(0.005)
        return True

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes; none may take longer than ``timeout`` seconds."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, f"{len(hanging)} processes hang: {self.said()}"
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        logs = sorted(self.folder.glob("rank*.log"))
        return "\n".join(log.read_text(errors="replace") for log in logs)
