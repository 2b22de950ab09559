"""Noise and labels as functions of (seed, purpose, sample index), never of ambient state.

So a sample is the same whatever the batch it is in, whichever process draws it, and however much
randomness was used before. Numbers are drawn on the CPU: devices disagree about generators.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Streams of one sample: its start noise is 0, the noise of step s is 2 + s, s < 1000.
STREAMS = {"label": 1, "image": 2000, "mirrored": 2001, "unlabelled": 2002, "row": 2003}
PURPOSES = ("sample", "train", "lambda", "calibration", "held-out")


@dataclass(frozen=True)
class Draws:
    """The random numbers of one purpose: one of ``PURPOSES``."""

    seed: int
    purpose: str

    def _generator(self, index: int, stream: int) -> torch.Generator:
        entropy = [self.seed, PURPOSES.index(self.purpose), index, stream]
        key = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(key))

    def _normal(self, indices: Sequence[int], shape: tuple[int, ...], stream: int) -> Tensor:
        return torch.stack(
            [torch.randn(shape, generator=self._generator(i, stream)) for i in indices]
        )

    def initial_noise(self, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """x_T of the samples with these indices, (n, *shape) float32."""
        return self._normal(indices, shape, stream=0)

    def step_noise(self, step: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Noise that a stochastic sampler adds after evaluation ``step``, (n, *shape)."""
        return self._normal(indices, shape, stream=2 + step)

    def integers(self, what: str, indices: Sequence[int], high: int) -> Tensor:
        """Uniform integers below ``high``, (n,) int64; ``what`` is a key of ``STREAMS``."""
        stream = STREAMS[what]
        drawn = [torch.randint(high, (), generator=self._generator(i, stream)) for i in indices]
        return torch.stack(drawn)

    def labels(self, indices: Sequence[int], num_classes: int) -> Tensor:
        """Uniform class labels, (n,) int64."""
        return self.integers("label", indices, num_classes)
