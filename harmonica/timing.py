"""Honest timing: warmed up, synchronised, in turn; and reports of it."""

import contextlib
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harmonica import __version__
from harmonica.files import write_atomically
from harmonica.output import commit

# Of every function before it is timed: on a GPU an engine captures its graph in the second run.
WARM_UPS = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class Timing:
    """Seconds over repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, taken: Sequence[float]) -> "Timing":
        return cls(statistics.median(taken), min(taken), max(taken))

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


def in_turn(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of functions, warmed up and called in turn, so that a busy moment hits them alike."""
    for run in runs.values():
        for _ in range(WARM_UPS[device.type]):
            seconds(run, device)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(seconds(run, device))
    return taken


def timed(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Timing]:
    """``in_turn``, with the median and range of every function."""
    return {name: Timing.of(taken) for name, taken in in_turn(runs, repeats, device).items()}


def peak_process_bytes() -> int:
    """Most that this process has held of the main memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_report(found: dict[str, Any], config: dict[str, Any], out: Path | None) -> None:
    """Print what was found, and write it to ``out``, if given, with what it was found for."""
    for name, value in found.items():
        print(f"{name:32} {_shown(name, value)}")
    if out is not None:
        write_atomically(out, json.dumps({"config": config, **found}, indent=1).encode())


def _shown(name: str, value: Any) -> str:
    """The value, in the unit that goes with the name."""
    if name.startswith("profile_"):
        return ", ".join(f"{kind} {taken:.4f} s" for kind, taken in value.items())
    if isinstance(value, dict):
        return str(Timing(**value))
    if name.endswith("_range"):
        return " to ".join(f"{bound:.2f}" for bound in value)
    if "_bytes" in name and value is not None:
        return f"{value / 2**20:.1f} MiB"
    if name.endswith("_per_second"):
        return f"{value / 1e9:.1f} GMAC/s"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
