"""One row per image from every process, gathered exactly: in index order, none twice."""

from collections.abc import Callable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch import Tensor
from tqdm import tqdm

from harmonica.errors import HarmonicaError

# Name -> (n, ...): whatever is measured of n images, a row for each.
Rows = dict[str, Tensor]


@torch.inference_mode()
def collect(
    count: int,
    batch_size: int,
    measure: Callable[[range], Rows],
    state: PartialState,
    progress: str | None = None,
) -> Rows:
    """Measure images 0 to ``count`` - 1, batches dealt out to the processes in turn.

    The batches are the same whatever the number of processes, so the rows are too.

    Args:
        measure: consecutive indices to their rows.
        progress: label of a progress bar; None shows none.

    Returns:
        On every process all rows, (count, ...), on the CPU.

    Raises:
        HarmonicaError: on every process, what any of them raised, or a row that is not finite.
    """
    batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    parts: list[Rows] = []
    refusal = None
    shows_no_bar = progress is None or state.process_index > 0
    try:
        for indices in tqdm(mine, desc=progress, unit="batch", disable=shows_no_bar):
            rows = {name: value.cpu() for name, value in measure(indices).items()}
            _refuse_not_finite(rows, indices)
            parts.append(rows)
    except HarmonicaError as error:
        refusal = str(error)
    own = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}
    layouts = _agree(refusal, own)
    if state.num_processes == 1:
        return own
    return {
        name: _gather(own.get(name), layout, batches, batch_size, state)
        for name, layout in layouts.items()
    }


def _refuse_not_finite(rows: Rows, indices: range) -> None:
    for name, value in rows.items():
        broken = ~value.flatten(1).isfinite().all(dim=1) if value.ndim > 1 else ~value.isfinite()
        if broken.any():
            first = indices[int(broken.nonzero()[0])]
            raise HarmonicaError(
                f"{name} of image {first} is not finite; check the images, and the weights that "
                "are looked through"
            )


Layout = tuple[tuple[int, ...], torch.dtype]


def _agree(refusal: str | None, own: Rows) -> dict[str, Layout]:
    """Shape of a row and type of every column, also for processes that had no batch."""
    layout = {name: (tuple(value.shape[1:]), value.dtype) for name, value in own.items()}
    answers = gather_object([(refusal, layout)])
    refusals = [said for said, _ in answers if said is not None]
    if refusals:
        raise HarmonicaError(refusals[0])
    return answers[0][1]  # the first process has the first batch


def _gather(
    own: Tensor | None,
    layout: Layout,
    batches: Sequence[range],
    batch_size: int,
    state: PartialState,
) -> Tensor:
    """Rows of every process in index order; what processes are padded with is cut off again."""
    shape, dtype = layout
    processes = state.num_processes
    longest = sum(len(batch) for batch in batches[::processes])
    padded = torch.zeros((longest, *shape), dtype=dtype, device=state.device)
    if own is not None:
        padded[: len(own)] = own.to(state.device)
    everything = gather(padded).cpu().unflatten(0, (processes, longest))
    return torch.cat(
        [
            everything[k % processes, k // processes * batch_size :][: len(batch)]
            for k, batch in enumerate(batches)
        ]
    )
