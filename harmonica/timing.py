"""Honest timing: warmed up, synchronised, in turn."""

import contextlib
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from harmonica import __version__
from harmonica.output import commit

# Of every function before it is timed: on a GPU an engine captures its graph in the second run.
WARM_UPS = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class Timing:
    """Seconds per batch over repetitions."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} s ({self.low:.3f} to {self.high:.3f})"


def _processor() -> str:
    """The model of the CPU, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, object]:
    """What a measurement was made on, with what, and when."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "float32_products": torch.get_float32_matmul_precision(),
        "harmonica": __version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, its work on the device included."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def timed(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Timing]:
    """Time several functions in turn, so that a busy moment hits them alike, after warming up."""
    for run in runs.values():
        for _ in range(WARM_UPS[device.type]):
            seconds(run, device)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(seconds(run, device))
    return {name: Timing(statistics.median(t), min(t), max(t)) for name, t in taken.items()}
