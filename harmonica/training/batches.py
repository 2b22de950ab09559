"""This process's part of global batches."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from accelerate import Accelerator
from torch import Tensor

from harmonica.backbone import Backbone
from harmonica.denoise import Tally, Trajectories
from harmonica.errors import HarmonicaError
from harmonica.memory import is_out_of_memory
from harmonica.randomness import Draws
from harmonica.sampling import trajectories
from models.transformer import call_block


def samples_per_process(rows: int, halves: int, processes: int, flag: str) -> int:
    """Samples per process for a number of model rows over all processes.

    Raises:
        HarmonicaError: they cannot be shared out evenly.
    """
    unit = halves * processes
    if rows % unit:
        lower, upper = rows // unit * unit, -(-rows // unit) * unit
        fitting = f"{lower} or {upper}" if lower else f"{upper}"
        what = f"{processes} process{'es' if processes > 1 else ''}"
        if halves == 2:
            what += " of two guidance halves"
        raise HarmonicaError(f"{flag} {rows} is not divisible by {what}; use {fitting}")
    return rows // unit


@contextlib.contextmanager
def within_memory(objective: str) -> Iterator[None]:
    """Batches that are too large for a GPU are said so in a sentence: smaller ones learn otherwise.

    Raises:
        HarmonicaError: so it is.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        refresh = ", or --lambda-batch-size and --lambda-rows if it was a refresh of lambda"
        raise HarmonicaError(
            "training does not fit into the memory of the GPU; add --activation-checkpointing or "
            f"lower --global-batch-size{refresh if objective == 'sdt' else ''}"
        ) from None


@dataclass(frozen=True)
class Batches:
    """Batch ``number`` is the same samples whatever the number of processes.

    Attributes:
        seed: of noise and conditions.
        compares_all: see ``Trajectories``.
        run: likewise.
        tally: of this process, on all its batches.
    """

    accelerator: Accelerator
    backbone: Backbone
    seed: int
    compares_all: bool
    run: Callable[..., Tensor] = call_block
    tally: Tally = field(default_factory=Tally)

    def samples(self, rows: int, flag: str, *, halves: int | None = None) -> int:
        """Samples of this process in a batch of ``rows`` model rows; ``flag`` says how many."""
        halves = self.backbone.guidance.halves if halves is None else halves
        return samples_per_process(rows, halves, self.accelerator.num_processes, flag)

    def indices(self, number: int, samples: int) -> range:
        """Global sample indices of this process in batch ``number``."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        first = (number * processes + rank) * samples
        return range(first, first + samples)

    def draws(self, purpose: str) -> Draws:
        return Draws(self.seed, purpose)

    def of(self, purpose: str, indices: range) -> Trajectories:
        """The trajectories of these samples."""
        batch = trajectories(self.backbone, self.draws(purpose), indices)
        return replace(batch, compares_all=self.compares_all, run=self.run, tally=self.tally)

    def __call__(self, purpose: str, number: int, samples: int) -> Trajectories:
        """This process's trajectories of batch ``number``."""
        return self.of(purpose, self.indices(number, samples))
