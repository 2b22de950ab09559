"""The only denoising loop, and the only classifier-free guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harmonica.samplers import Sampler, State
from models.branch import Branch


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


def evaluate(
    model: nn.Module, x: Tensor, t: Tensor, y: Tensor, branches: Sequence[Branch] | None = None
) -> Tensor:
    """One model evaluation in the precision of its weights, float32 in and out.

    In half precision the matrix products alone are: what they add up to, the residual stream,
    stays float32, without which images drift.
    """
    dtype = next(part.weight.dtype for part in model.modules() if isinstance(part, nn.Linear))
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        return model(x, t, y, branches).float()


def guided(
    model: nn.Module,
    x: Tensor,
    t: float,
    y: Tensor,
    guidance: Guidance,
    branches: Sequence[Branch] | None = None,
) -> Tensor:
    """One guided model evaluation.

    Args:
        x: (n, C, H, W) latents.
        t: timestep, the same for all.
        y: (n,) labels.
        branches: one per branch of the model, None to compute everything.

    Returns:
        (n * halves, C or 2C, H, W) float32. The first n rows are what a sampler uses. The guided
        noise is the same in both halves; channels that are not guided, the learned variance
        among them, are each half's own.
    """
    time = torch.full((len(x) * guidance.halves,), float(t), device=x.device)
    if guidance.halves == 1:
        return evaluate(model, x, time, y, branches)
    null = torch.full_like(y, model.config.num_classes)
    output = evaluate(model, torch.cat([x, x]), time, torch.cat([y, null]), branches)
    k = x.shape[1] if guidance.channels is None else min(guidance.channels, x.shape[1])
    conditional, unconditional = output[:, :k].chunk(2)
    noise = unconditional + guidance.scale * (conditional - unconditional)
    return torch.cat([torch.cat([noise, noise]), output[:, k:]], dim=1)


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


@dataclass(frozen=True)
class Trajectories:
    """A batch of trajectories: everything a rollout needs apart from the branches.

    Attributes:
        y: (n,) labels.
        x_T: (n, C, H, W) start noise.
        noise: s to the noise added after evaluation s; None for deterministic samplers.
        compares_all: whether ``output_error`` takes every row and channel, as published, or only
            those that the sampler uses.
    """

    model: nn.Module
    sampler: Sampler
    guidance: Guidance
    y: Tensor
    x_T: Tensor
    noise: Callable[[int], Tensor] | None = None
    compares_all: bool = True

    @property
    def num_steps(self) -> int:
        return len(self.sampler.timesteps)

    def predict(self, s: int, x: Tensor, branches: list[Branch] | None = None) -> Tensor:
        """Guided model output at evaluation s, (n * halves, C or 2C, H, W)."""
        return guided(self.model, x, self.sampler.timesteps[s], self.y, self.guidance, branches)

    def walk(
        self,
        state: State,
        predict: Callable[[int, Tensor], Tensor],
        start: int = 0,
        stop: int | None = None,
    ) -> State:
        return denoise(self.sampler, state, predict, start=start, stop=stop, noise=self.noise)

    def output_error(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Mean squared difference of two guided outputs, ()."""
        difference = teacher - student
        if not self.compares_all:
            # Both halves carry the same guided noise; the variance is not every sampler's affair.
            channels = self.x_T.shape[1] * (2 if self.sampler.uses_variance else 1)
            difference = difference[: len(self.x_T), :channels]
        return difference.square().mean()
