"""Cost of router training: `python scripts/bench_training.py`, with the flags of train_router.py.

Prints the time of one router update as a multiple of one plain forward of the same rows (3 is the
ideal: teacher, student, backward), the model evaluations of one lambda refresh, and peak memory.
Forwards and updates are timed in turn, so that a busy moment hits both; ratios are per pair.
"""

import resource
import statistics
import time

import torch

from harmonica.config import TrainConfig
from harmonica.errors import HarmonicaError, run_command
from harmonica.options import parse
from harmonica.trainer import Trainer

TRAJECTORIES = 6


@run_command
def bench() -> None:
    config = parse(TrainConfig, __doc__.split("\n")[0])
    if config.method != "harmonica":
        raise HarmonicaError(f"--method {config.method} has no trajectories to time; drop it")
    measure(Trainer(config))


def seconds(run, device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(trainer: Trainer) -> None:
    device, steps = trainer.backbone.device, trainer.config.num_sampling_steps
    learner = trainer.learner
    batch = learner.batches("train", 0, learner.samples)

    @torch.no_grad()
    def forwards() -> None:
        for s in range(steps):
            batch.predict(s, batch.x_T)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    calls: list[int] = []
    hook = trainer.backbone.model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    learner.refresh_weights()
    hook.remove()
    ratios, per_update = [], []
    for k in range(TRAJECTORIES + 1):
        forward = seconds(forwards, device) / steps
        # The first step of a trajectory is one plain forward without an update.
        update = (seconds(lambda: learner.sweep(), device) - forward) / (steps - 1)
        if k > 0:  # the first pair warms up
            ratios.append(update / forward)
            per_update.append(update)
    rows = learner.samples * trainer.backbone.guidance.halves
    print(f"device                   {device}, {torch.get_num_threads()} threads, {rows} rows")
    print(f"one router update        {statistics.median(per_update) * 1e3:.1f} ms")
    print(
        f"in plain forwards        {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {TRAJECTORIES} trajectories; ideal 3)"
    )
    limit = steps + steps * (steps - 1) // 2
    print(f"lambda refresh           {len(calls)} model evaluations (T + T(T-1)/2 = {limit})")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"peak memory, GPU         {peak:.2f} GiB")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory, process     {peak:.2f} GiB")


if __name__ == "__main__":
    bench()
