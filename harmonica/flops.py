"""Multiply-accumulates per branch, counted by torch on the meta device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Costs:
    """What one model evaluation of one row costs, in multiply-accumulates.

    Attributes:
        names: (N,) branch names, in the model's order.
        macs: (N,) of every branch.
        rest: of everything that is never cached: embeddings, modulations, final layer.
    """

    names: tuple[str, ...]
    macs: tuple[int, ...]
    rest: int

    @property
    def total(self) -> int:
        return sum(self.macs) + self.rest

    @property
    def blocks(self) -> list[str]:
        """Block of every branch: ``blocks.3`` of ``blocks.3.attn``."""
        return [name.rpartition(".")[0] for name in self.names]

    @property
    def kinds(self) -> list[str]:
        """Kind of every branch: ``attn`` of ``blocks.3.attn``."""
        return [name.rpartition(".")[2] for name in self.names]


def measure_costs(model: nn.Module) -> Costs:
    """Count the branches of a model by running it once without computing anything."""
    config = model.config
    with torch.device("meta"):
        shadow = type(model)(config)
    macs = [0] * len(model.branch_names)
    with FlopCounterMode(display=False) as counter, torch.no_grad():

        def measured(i: int) -> Callable:
            def branch(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
                before = counter.get_total_flops()
                value = fn(x)
                macs[i] = (counter.get_total_flops() - before) // 2
                return value

            return branch

        shadow(
            torch.empty(1, config.in_channels, config.input_size, config.input_size, device="meta"),
            torch.zeros(1, device="meta"),
            torch.zeros(1, dtype=torch.long, device="meta"),
            [measured(i) for i in range(len(macs))],
        )
        rest = counter.get_total_flops() // 2 - sum(macs)
    return Costs(model.branch_names, tuple(macs), rest)
