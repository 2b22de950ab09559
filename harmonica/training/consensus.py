"""What all processes decide together before every update, in the collective that they make anyway.

Their gradients are averaged. With them goes whether everything is finite, and whether a process was
asked to end: so all go on, or all stop before the same update, and none waits for one that left.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from harmonica.errors import HarmonicaError, Interrupted
from harmonica.interruption import Interruption


class NotFinite(HarmonicaError):
    """A loss, gradient or weight that is not a number, on any process."""


class LostProcess(HarmonicaError):
    """A collective failed."""


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """What torch raises where a process is gone or silent is said in a sentence.

    Raises:
        LostProcess: so it is.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise LostProcess("another process of the run ended or does not answer") from None
        raise


@dataclass(frozen=True)
class Origin:
    """Where a loss comes from, for people.

    Attributes:
        where: the step, as in "step 3 of trajectory 5".
        indices: (n,) global sample indices.
        finite: (n,) whether a sample's outputs are finite, where that is known.
    """

    where: str
    indices: Sequence[int]
    finite: Tensor | None = None

    def offending(self) -> list[int]:
        """The samples whose outputs are not finite; all of them where none is known to be."""
        finite = [] if self.finite is None else self.finite.tolist()
        found = [i for i, is_finite in zip(self.indices, finite, strict=False) if not is_finite]
        return found or list(self.indices)


class Consensus:
    """The collective before an update."""

    def __init__(self, accelerator: Accelerator, interruption: Interruption):
        self.accelerator, self.interruption = accelerator, interruption

    def stop_if_asked(self) -> None:
        """Where no update is due for long.

        Raises:
            Interrupted: on every process; one of them was asked to end.
        """
        signum = self.interruption.signal or 0
        asked = torch.tensor(float(signum > 0), device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum").item():
            raise Interrupted(max(self._of_all(signum)))

    def average(self, gradient: Tensor, loss: Tensor, origin: Origin) -> Tensor:
        """The mean over processes of a gradient of any shape; ``loss`` () is this process's.

        Raises, on every process alike:
            Interrupted: one of them was asked to end.
            NotFinite: the loss or the gradient of one is not.
        """
        signum = self.interruption.signal or 0
        news = torch.stack([loss.detach(), torch.full_like(loss, float(signum > 0))])
        packed = self.accelerator.reduce(torch.cat([gradient.flatten(), news]), "mean")
        finite = packed[-2].isfinite(), packed[:-2].isfinite().all()
        stops, loss_is_finite, gradient_is_finite = torch.stack([packed[-1], *finite]).tolist()
        if stops:
            raise Interrupted(max(self._of_all(signum)))
        if not (loss_is_finite and (gradient_is_finite or self._may_overflow())):
            self._refuse(torch.cat([loss.detach()[None], gradient.flatten()]), origin)
        return packed[:-2].view_as(gradient)

    def _may_overflow(self) -> bool:
        """Under fp16 scaled gradients do now and then. The scaler leaves out such an update and
        halves the scale, which below one is not the reason any more.
        """
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1

    def average_all(self, learning: Sequence[Tensor], loss: Tensor, origin: Origin) -> None:
        """``average`` for the gradients of several parameters, in one collective."""
        flat = torch.cat([parameter.grad.flatten() for parameter in learning])
        parts = self.average(flat, loss, origin).split([p.numel() for p in learning])
        for parameter, grad in zip(learning, parts, strict=True):
            parameter.grad = grad.view_as(parameter)

    def mean(self, values: Tensor, origin: Origin) -> Tensor:
        """The mean over processes of finite values of any shape.

        Raises:
            NotFinite: on every process; one of them has a value that is not finite.
        """
        mean = self.accelerator.reduce(values, "mean")
        if not mean.isfinite().all():
            self._refuse(values, origin)
        return mean

    def _refuse(self, own: Tensor, origin: Origin) -> None:
        """Say, on every process, whose values were not finite; ``own`` are this one's."""
        said = None if own.isfinite().all() else (origin.where, origin.offending())
        found = [answer for answer in self._of_all(said) if answer is not None]
        where = found[0][0] if found else origin.where  # finite numbers whose sum is not
        samples = sorted({index for _, offending in found for index in offending})
        shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        raise NotFinite(
            f"not finite at {where} (samples {shown or 'unknown'}): stopped before the update; "
            "lower --lr or use --mixed-precision no"
        )

    def _of_all(self, value: object) -> list:
        return gather_object([value])
