"""Cost of sampling: `python scripts/bench_sampling.py`, with the backbone flags of sample.py.

Prints the time of a batch without and with a cache, timed in turn after warm-up; the measured
speed-up, with the range of single pairs, the theoretical one, and their ratio, the efficiency;
arithmetic against the machine's own matrix products, measured in the same run; what the cache holds
at most, as planned; how many images ran at once; the most that the process held of the main memory,
and on a GPU the peak of a batch of either kind, without CUDA graphs, and of decoding an image. With
--profile also where the time of a batch of either kind goes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from harmonica.autoencoder import load_decoder
from harmonica.backbone import DTYPES, Backbone, load_backbone, select_device
from harmonica.baselines.fixed import random_schedule
from harmonica.budget import Budget
from harmonica.config import BackboneConfig
from harmonica.denoise import Trajectories
from harmonica.engine import Engine, planned_cache_bytes
from harmonica.errors import run_command
from harmonica.options import option, parse, plain
from harmonica.output import check_new_file
from harmonica.predictors import LAST, PREDICTORS, Learned, create_predictor
from harmonica.randomness import Draws
from harmonica.sample_config import known_from_router
from harmonica.sampling import load_schedule, trajectories, with_predictor
from harmonica.schedule import Schedule
from harmonica.timing import (
    Timing,
    in_turn,
    machine,
    peak_process_bytes,
    print_report,
    seconds,
    timed,
)

PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
# Kinds of kernels by what is in their names, the first that fits. On a CPU, where operators are
# told apart, what is compiled has no name and is among the others.
KINDS = {
    "fused by torch.compile": ("triton", "cpp_fused"),
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "matrix products": ("gemm", "gemv", "nvjet", "cutlass", "addmm", "bmm", "::mm", "convolution"),
}


@dataclass(frozen=True)
class BenchConfig(BackboneConfig):
    """What is timed."""

    path: Path | None = option(None, "router file, schedule JSON or run directory")
    predictor: str | None = option(
        None,
        "what stands in for a skipped branch; learned: coefficients of the least favourable kind",
        choices=(*PREDICTORS, "learned"),
    )
    target_cur: float = option(
        0.5,
        "without --path: share of reuse of a random schedule",
        aliases=("--cur",),
        low=0,
        high=1,
    )
    num_images: int = option(8, "images of the batch", aliases=("--batch-size",), low=1)
    repeats: int = option(5, "timed repetitions, after warming up", low=1)
    random_weights: bool = option(False, "speed does not depend on weights: draw them")
    profile: bool = option(False, "one more batch of each kind, to see where its time goes")
    out: Path | None = option(None, "JSON report")

    @classmethod
    def known_from_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        return known_from_router(values)

    def check(self) -> None:
        """Also: a report that is not there yet and can be written."""
        super().check()
        if self.out is not None:
            check_new_file(self.out)


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-accumulates a second of one large matrix product, the best of several."""
    size = PEAK_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    runs = {str(i): partial(torch.mm, a, b) for i in range(2)}
    return size**3 / min(timing.low for timing in timed(runs, 5, device).values())


def peak_memory(device: torch.device, runs: dict[str, Callable[[], object]]) -> dict[str, int]:
    """Bytes of the GPU at the peak of every run, by name."""
    peaks = {}
    for name, run in runs.items():
        run()  # what compilation takes does not count
        torch.cuda.reset_peak_memory_stats(device)
        run()
        peaks[f"peak_device_bytes_{name}"] = torch.cuda.max_memory_allocated(device)
    return peaks


def device_memory(
    config: BenchConfig,
    backbone: Backbone,
    schedules: dict[str, Schedule | None],
    batch: Trajectories,
) -> dict[str, int]:
    """What a GPU holds at the peak of a batch, for each schedule, and of decoding an image.

    Nothing on a CPU. Graphs are not captured: torch does not count their memory.
    """
    device, how = backbone.device, replace(backbone.how, captures=False)
    if device.type != "cuda":
        return {}
    runs = {name: partial(Engine(chosen, how), batch) for name, chosen in schedules.items()}
    peaks = peak_memory(device, runs)
    if config.random_weights:  # those of the decoder need not be there either
        return peaks
    decode = load_decoder(config, device)
    return peaks | peak_memory(device, {"decoding": partial(decode, batch.x_T[:1])})


def kind_of(kernel: str) -> str:
    """What a kernel, or on a CPU an operator, does."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "others")


def profiles(device: torch.device, runs: dict[str, Callable[[], object]]) -> dict[str, dict]:
    """Seconds of kernels by kind for every run, after those runs have warmed up."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would speak of GPUs that are not there
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    found, on_gpu = {}, device.type == "cuda"
    for name, run in runs.items():
        with profile(activities=activities) as profiled:
            seconds(run, device)
        taken: dict[str, float] = dict.fromkeys([*KINDS, "others"], 0.0)
        for event in profiled.key_averages():
            # On a GPU without the calls that start kernels or wait for them.
            time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            taken[kind_of(event.key)] += time / 1e6
        found[f"profile_{name}"] = taken
    return found


@torch.inference_mode()
def measure(config: BenchConfig, backbone: Backbone, schedule: Schedule) -> dict:
    """Everything that is printed, by name."""
    device, dtype = backbone.device, DTYPES[config.mixed_precision]
    rows = config.num_images * backbone.guidance.halves
    batch = trajectories(backbone, Draws(0, "sample"), range(config.num_images))
    schedules = {"uncached": None, "cached": schedule}
    memory = device_memory(config, backbone, schedules, batch)
    if schedule.predictor != LAST:
        schedules["cached, last values"] = replace(schedule, predictor=LAST)
    engines = {name: Engine(chosen, backbone.how) for name, chosen in schedules.items()}
    runs = {name: partial(engine, batch) for name, engine in engines.items()}
    taken = in_turn(runs, config.repeats, device)
    times = {name: Timing.of(repeats) for name, repeats in taken.items()}
    measured = times["uncached"].median / times["cached"].median
    pairs = [a / b for a, b in zip(taken["uncached"], taken["cached"], strict=True)]
    full = schedule.num_steps * schedule.costs.total * rows
    peak = matrix_peak(device, dtype)
    return {
        **machine(device),
        **_done(engines, config.num_images),
        "rows": rows,
        "cur": schedule.cur,
        "seconds_uncached": vars(times["uncached"]),
        "seconds_cached": vars(times["cached"]),
        **_against_last(times),
        "measured_speedup": measured,
        "measured_speedup_range": [min(pairs), max(pairs)],
        "theoretical_speedup": schedule.theoretical_speedup,
        "efficiency": measured / schedule.theoretical_speedup,
        "uncached_macs_per_second": full / times["uncached"].median,
        "cached_macs_per_second": schedule.macs * rows / times["cached"].median,
        "matrix_product_macs_per_second": peak,
        "cache_bytes": planned_cache_bytes(
            schedule, backbone.model, backbone.latent_shape[1:], rows
        ),
        "peak_process_bytes": peak_process_bytes(),
        **memory,
        **(profiles(device, runs) if config.profile else {}),
    }


def _done(engines: dict[str, Engine], wanted: int) -> dict:
    """What engines did in the end, which a GPU's memory may have kept from what was asked for."""
    return {
        "compiles": all(engine.how.compiles for engine in engines.values()),
        "captures": all(engine.how.captures for engine in engines.values()),
        "images_at_once": min(engine.most or wanted for engine in engines.values()),
    }


def _against_last(times: dict[str, Timing]) -> dict:
    """What forecasts cost, where there are any."""
    last = times.get("cached, last values")
    if last is None:
        return {}
    ratio = times["cached"].median / last.median
    return {"seconds_cached_last_values": vars(last), "time_over_last_values": ratio}


def _with_predictor(config: BenchConfig, schedule: Schedule, backbone: Backbone) -> Schedule:
    if config.predictor != "learned":
        return with_predictor(schedule, config.predictor, "time", backbone)
    line = create_predictor("taylor1", "time", backbone.sampler)
    width = backbone.model.config.hidden_size
    learned = Learned.start(line, *schedule.compute.shape, width)
    return replace(schedule, predictor=learned)


@run_command
def bench() -> None:
    config = parse(BenchConfig, __doc__.split("\n")[0])
    backbone = load_backbone(config, select_device(), random_weights=config.random_weights)
    if config.path is not None:
        schedule = load_schedule(config.path, None, backbone)
    else:
        budget = Budget(cur=config.target_cur)
        schedule = random_schedule(config.num_sampling_steps, backbone.costs, budget, seed=0)
    found = measure(config, backbone, _with_predictor(config, schedule, backbone))
    print_report(found, plain(config), config.out)


if __name__ == "__main__":
    bench()
