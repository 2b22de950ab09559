"""The only denoising loop, and the only classifier-free guidance."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.diffusion import TRAIN_STEPS
from harmonica.samplers import Sampler, State
from models.branch import Branch
from models.transformer import Condition, Conditioning, DiffusionTransformer, call_block

# Most numbers of conditioning that are kept at once (one step's, if it alone has more): 512 MiB in
# float32, which PixArt's remain whatever the precision of the weights. With 8 guided samples of
# DiT-XL/2 these are 42 steps.
CONDITIONING_NUMBERS = 2**27


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans, 2022).

    ``channels`` is how many of the noise channels are guided, None for all of them.
    """

    scale: float
    # DiT guides three of the four latent channels; kept so that published FIDs are reproduced.
    channels: int | None = 3

    @property
    def halves(self) -> int:
        """Model rows per sample: 2 with an unconditional half, 1 at scale 1."""
        return 1 if self.scale == 1.0 else 2


def precision_of(model: nn.Module) -> torch.dtype:
    """Precision of the weights, which is that of the matrix products."""
    return next(part.weight.dtype for part in model.modules() if isinstance(part, nn.Linear))


def in_precision_of(model: nn.Module) -> AbstractContextManager[None]:
    """Matrix products in the precision of the model's weights.

    What they add up to, the residual stream, stays float32, without which images drift.
    """
    dtype = precision_of(model)
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def guide(output: Tensor, channels: int, guidance: Guidance) -> Tensor:
    """Guided noise in the place of both halves' own.

    Args:
        output: (n * halves, C or 2C, H, W), the unconditional half last.
        channels: C.

    Returns:
        Of the same shape. The first n rows are what a sampler uses. Channels that are not guided,
        the learned variance among them, are each half's own.
    """
    if guidance.halves == 1:
        return output
    k = channels if guidance.channels is None else min(guidance.channels, channels)
    conditional, unconditional = output[:, :k].chunk(2)
    noise = unconditional + guidance.scale * (conditional - unconditional)
    return torch.cat([torch.cat([noise, noise]), output[:, k:]], dim=1)


def join_rows(parts: list[Tensor], halves: int) -> Tensor:
    """Model rows of several batches of one size as those of one batch; see ``part_rows``."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.unflatten(0, (halves, -1)) for part in parts], dim=1).flatten(0, 2)


def part_rows(rows: Tensor, count: int, halves: int) -> list[Tensor]:
    """Model rows (halves * count * n, ...) of a repeated batch as those of ``count`` batches."""
    if count == 1:
        return [rows]
    return [part.flatten(0, 1) for part in rows.unflatten(0, (halves, count, -1)).unbind(1)]


def denoise(
    sampler: Sampler,
    state: State,
    predict: Callable[[int, Tensor], Tensor],
    *,
    start: int = 0,
    stop: int | None = None,
    noise: Callable[[int], Tensor] | None = None,
) -> State:
    """Walk a trajectory from evaluation ``start`` up to (not including) ``stop``.

    Args:
        state: where the trajectory stands before evaluation ``start``.
        predict: (s, x) to the guided model output at evaluation s; the first n rows are used.
        stop: T if None.
        noise: s to the noise (n, C, H, W) added after evaluation s; stochastic samplers only.
    """
    for s in range(start, len(sampler.timesteps) if stop is None else stop):
        output = predict(s, state.x)[: len(state.x)]
        state = sampler.step(s, state, output, noise(s) if sampler.stochastic else None)
    return state


@dataclass
class Tally:
    """Runs of the model on one sample, its guidance halves together.

    One that takes branches from a cache counts as any other, and so does a whole step that runs
    again for its gradients.
    """

    evaluations: int = 0


@dataclass(frozen=True)
class Trajectories:
    """A batch of trajectories: everything a rollout needs apart from the branches.

    Attributes:
        y: condition of the n samples: labels (n,), or prompts.
        x_T: (n, C, H, W) start noise.
        noise: s to the noise added after evaluation s; None for deterministic samplers.
        compares_all: whether ``output_error`` takes every row and channel, as published, or only
            those that the sampler uses.
        indices: (n,) global sample indices, for messages about single samples.
        run: how ``predict`` runs a block; see ``models.transformer.call_block``.
        steps_ahead: most steps whose conditioning is computed at once.
        tally: counts evaluations, if there is one.
    """

    model: DiffusionTransformer
    sampler: Sampler
    guidance: Guidance
    y: Condition
    x_T: Tensor
    noise: Callable[[int], Tensor] | None = None
    compares_all: bool = True
    indices: Sequence[int] = ()
    run: Callable[..., Tensor] = call_block
    steps_ahead: int = TRAIN_STEPS
    tally: Tally | None = None

    @property
    def num_steps(self) -> int:
        return len(self.sampler.timesteps)

    def conditioning(self, s: int) -> Conditioning:
        """Of evaluation s."""
        return self.window(s)[s]

    def window(self, s: int) -> dict[int, Conditioning]:
        """Of evaluation s and its neighbours, by evaluation.

        It does not depend on x: as many steps as memory is granted for are computed in one pass.
        """
        numbers = len(self.y) * self.guidance.halves * self.model.conditioning_size
        size = min(max(1, CONDITIONING_NUMBERS // numbers), self.steps_ahead)
        first = s // size * size
        if first not in self._windows:
            self._windows.clear()
            steps = range(first, min(first + size, self.num_steps))
            self._windows[first] = dict(zip(steps, self._condition(steps), strict=True))
        return self._windows[first]

    @cached_property
    def _windows(self) -> dict[int, dict[int, Conditioning]]:
        """The one at hand, by its first step."""
        return {}

    @cached_property
    def _context(self) -> Any:
        """Of the model's rows, the unconditional half last."""
        y = self.y if self.guidance.halves == 1 else self.model.with_null(self.y)
        with in_precision_of(self.model):
            return self.model.context(y)

    def _condition(self, steps: range) -> list[Conditioning]:
        rows, device = len(self.y) * self.guidance.halves, self.x_T.device
        # Filled on the device: nothing is copied there while a CUDA graph is captured.
        times = [
            torch.full((rows,), float(self.sampler.timesteps[s]), device=device) for s in steps
        ]
        with in_precision_of(self.model):
            every = self.model.condition(torch.cat(times), self._context)
        return [every.rows(slice(k * rows, (k + 1) * rows)) for k in range(len(steps))]

    def evaluate(
        self, forward: Callable[[Tensor, Conditioning], Tensor], s: int, x: Tensor
    ) -> Tensor:
        """Guided output at evaluation s of some way to run the model on rows of x."""
        if self.tally is not None:
            self.tally.evaluations += len(x)
        rows = torch.cat([x] * self.guidance.halves)
        with in_precision_of(self.model):
            output = forward(rows, self.conditioning(s)).float()
        return guide(output, x.shape[1], self.guidance)

    def predict(self, s: int, x: Tensor, branches: list[Branch] | None = None) -> Tensor:
        """Guided model output at evaluation s, (n * halves, C or 2C, H, W) float32."""
        return self.evaluate(
            lambda rows, conditioning: self.model.evaluate(rows, conditioning, branches, self.run),
            s,
            x,
        )

    def repeated(self, count: int) -> "Trajectories":
        """As many times the same samples: rows of the first copy, then of the second, ..."""
        if count == 1:
            return self
        n, noise = len(self.x_T), self.noise
        return replace(
            self,
            y=self.y[torch.arange(n, device=self.x_T.device).repeat(count)],
            x_T=self.x_T.repeat(count, 1, 1, 1),
            noise=None if noise is None else lambda s: noise(s).repeat(count, 1, 1, 1),
            indices=[*self.indices] * count,
            steps_ahead=1,  # so large a batch is not gone on with for long
        )

    def part(self, rows: slice) -> "Trajectories":
        """Some of the samples."""
        noise = self.noise
        return replace(
            self,
            y=self.y[rows],
            x_T=self.x_T[rows],
            noise=None if noise is None else lambda s: noise(s)[rows],
            indices=self.indices[rows],
        )

    def walk(
        self,
        state: State,
        predict: Callable[[int, Tensor], Tensor],
        start: int = 0,
        stop: int | None = None,
    ) -> State:
        return denoise(self.sampler, state, predict, start=start, stop=stop, noise=self.noise)

    def finite(self, output: Tensor) -> Tensor:
        """(n,) which samples have nothing but finite numbers in a guided output."""
        rows = output.flatten(1).isfinite().all(dim=1)
        return rows.unflatten(0, (-1, len(self.x_T))).all(dim=0)

    def output_error(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Mean squared difference of two guided outputs, ()."""
        difference = teacher - student
        if not self.compares_all:
            # Both halves carry the same guided noise; the variance is not every sampler's affair.
            channels = self.x_T.shape[1] * (2 if self.sampler.uses_variance else 1)
            difference = difference[: len(self.x_T), :channels]
        return difference.square().mean()
