"""Cost of router training: `python scripts/bench_training.py`, with the flags of train_router.py.

Prints the time of one router update as a multiple of one plain forward of the same rows (3 is the
ideal: teacher, student, backward), what a lambda refresh costs, peak memory, and how long as many
updates as were published would take with these flags. Forwards and updates are timed in turn, so
that a busy moment hits both; ratios are per pair.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from harmonica.denoise import Trajectories
from harmonica.errors import HarmonicaError, run_command
from harmonica.options import option, parse, plain
from harmonica.output import check_new_file
from harmonica.timing import Timing, machine, peak_process_bytes, print_report, seconds
from harmonica.training.config import TrainConfig
from harmonica.training.learner import StepwiseLearner
from harmonica.training.trainer import Trainer

PUBLISHED_UPDATES = 20_000


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """What is timed."""

    random_weights: bool = option(False, "speed does not depend on weights: draw them")
    repeats: int = option(6, "timed trajectories and refreshes after one of each as warm-up", low=1)
    out: Path | None = option(None, "JSON report")

    def check(self) -> None:
        """Also: a report that is not there yet and can be written."""
        super().check()
        if self.out is not None:
            check_new_file(self.out)


@run_command
def bench() -> None:
    config = parse(BenchConfig, __doc__.split("\n")[0])
    if config.method != "harmonica" or config.objective != "sdt" or config.freeze_schedule:
        raise HarmonicaError(
            "this times step-wise denoising training; drop --method, --objective and "
            "--freeze-schedule"
        )
    trainer = Trainer(config, random_weights=config.random_weights)
    found = measure(config, trainer.learner)
    print_report(found, plain(config), config.out)


@contextmanager
def counted_forwards() -> Iterator[list[int]]:
    """One entry, its samples, for every forward of any batch in this context."""
    counts, evaluate = [], Trajectories.evaluate

    def counting(batch: Trajectories, forward, s: int, x: torch.Tensor) -> torch.Tensor:
        counts.append(len(x))
        return evaluate(batch, forward, s, x)

    Trajectories.evaluate = counting
    try:
        yield counts
    finally:
        Trajectories.evaluate = evaluate


def measure(config: BenchConfig, learner: StepwiseLearner) -> dict:
    """Everything that is printed, by name; times in seconds."""
    backbone, steps = learner.backbone, config.num_sampling_steps
    device, batch = backbone.device, learner.batches("train", 0, learner.samples)
    rows = learner.samples * backbone.guidance.halves

    @torch.inference_mode()
    def forwards() -> None:
        fresh = replace(batch)  # a sweep makes its conditioning, too
        for s in range(steps):
            fresh.predict(s, fresh.x_T)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    tally = learner.batches.tally
    before = tally.evaluations
    with counted_forwards() as of_refresh:
        learner.refresh_weights()
    evaluations = tally.evaluations - before
    refreshes = [seconds(learner.refresh_weights, device) for _ in range(config.repeats)]
    # Later trajectories do not refresh: what is timed is updates alone.
    learner.refresh_at = float("inf")
    ratios, updates = [], []
    for k in range(config.repeats + 1):
        forward = seconds(forwards, device) / steps
        # The first step of a trajectory is one plain forward without an update.
        update = (seconds(learner.sweep, device) - forward) / (steps - 1)
        if k > 0:  # the first pair warms up
            ratios.append(update / forward)
            updates.append(update)
    per_update, refresh = Timing.of(updates), Timing.of(refreshes)
    trajectories = PUBLISHED_UPDATES / (steps - 1)
    found = {
        **machine(device),
        **asdict(backbone.how),
        "rows": rows,
        "seconds_per_update": vars(per_update),
        "forwards_per_update": statistics.median(ratios),
        "forwards_per_update_range": [min(ratios), max(ratios)],
        "refresh_evaluations": evaluations / learner.lambda_samples,
        "refresh_evaluations_limit": steps + steps * (steps + 1) // 2,
        "refresh_forwards": len(of_refresh),
        "refresh_rows_at_once": learner.lambda_rows,
        "seconds_per_refresh": vars(refresh),
        "hours_projected": (
            PUBLISHED_UPDATES * per_update.median
            + trajectories * per_update.median / statistics.median(ratios)
            + PUBLISHED_UPDATES / config.lambda_c * refresh.median
        )
        / 3600,
        "projected_for": (
            f"{PUBLISHED_UPDATES} updates of {rows} rows a process, and a refresh of "
            f"{config.lambda_batch_size} rows in all every {config.lambda_c} updates"
        ),
        "peak_process_bytes": peak_process_bytes(),
    }
    if device.type == "cuda":
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


if __name__ == "__main__":
    bench()
