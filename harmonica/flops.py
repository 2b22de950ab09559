"""Multiply-accumulates per branch, counted by torch on the meta device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.transformer import DiffusionTransformer


@dataclass(frozen=True)
class Costs:
    """What one model evaluation of one row costs, in multiply-accumulates.

    Attributes:
        names: (N,) branch names, in the model's order.
        macs: (N,) of every branch.
        rest: of everything outside of the branches: embeddings, modulations, long skip connections,
            final layer. What is computed once a trajectory, like the projection of a caption, is
            no part of it.
        joins: of every block's end of a long skip connection; empty in models without any.
    """

    names: tuple[str, ...]
    macs: tuple[int, ...]
    rest: int
    joins: tuple[int, ...] = ()

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


def measure_costs(model: DiffusionTransformer, size: tuple[int, int] | None = None) -> Costs:
    """Count the branches of a model by running it once without computing anything.

    Args:
        size: height and width in latent pixels; default: the model's.
    """
    config = model.config
    height, width = (config.input_size, config.input_size) if size is None else size
    with torch.device("meta"), torch.no_grad():
        shadow = type(model)(config)
        x = torch.empty(1, config.in_channels, height, width)
        stream = torch.empty(1, shadow.tokens_at(height, width), config.hidden_size)
        time, context = torch.zeros(1), shadow.context(shadow.placeholder(1))
    macs = [0] * len(model.branch_names)
    with FlopCounterMode(display=False) as counter, torch.no_grad():

        def counted(function: Callable[[], Tensor]) -> tuple[Tensor, int]:
            before = counter.get_total_flops()
            value = function()
            return value, (counter.get_total_flops() - before) // 2

        def measured(i: int) -> Callable:
            def branch(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
                value, macs[i] = counted(lambda: fn(x))
                return value

            return branch

        branches = [measured(i) for i in range(len(macs))]
        _, total = counted(lambda: shadow.evaluate(x, shadow.condition(time, context), branches))
        joins = ()
        if shadow.joins:
            joins = tuple(
                counted(lambda block=block: block.join(stream, stream))[1]
                if k in shadow.joins
                else 0
                for k, block in enumerate(shadow.blocks)
            )
    return Costs(model.branch_names, tuple(macs), total - sum(macs), joins)
