"""Honest timing: warmed up, synchronised, in turn."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per batch over repetitions."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} s ({self.low:.3f} to {self.high:.3f})"


def machine(device: torch.device) -> dict[str, object]:
    """What a measurement was made on, and when."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
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
    """Time several functions in turn, so that a busy moment hits them alike; one warm-up each."""
    for run in runs.values():
        seconds(run, device)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(seconds(run, device))
    return {name: Timing(statistics.median(t), min(t), max(t)) for name, t in taken.items()}
