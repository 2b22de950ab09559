"""Functions that torch.compile fuses, and how training runs blocks.

Each function is one graph for every choice of branches and updates.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harmonica.cache import Blend
from models.layers import gated
from models.transformer import Block, Conditioning, DiffusionTransformer, Part, call_block

# Graphs of a function before torch refuses to make more. PixArt's blocks have up to 72 with last
# values and one kind of forecast, at one batch size; a comparison has more kinds and several sizes.
GRAPHS = 1024


@cache
def fused(function: Callable) -> Callable:
    """The function compiled; its graphs are shared by all blocks and models."""
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), GRAPHS))
    return torch.compile(function, fullgraph=True, dynamic=False)


def fused_if(compiles: bool, function: Callable) -> Callable:
    """The function compiled if ``compiles``, else as it is."""
    return fused(function) if compiles else function


class Update(NamedTuple):
    """What is added to the stream for a branch: the sum of factor * value.

    Attributes:
        values: (B, L, d) each.
        factors: of each: (B, 1, d) gates, maybe with weights folded in, or weights (1,) or (d,)
            alone, or None for 1.
    """

    values: tuple[Tensor, ...]
    factors: tuple[Tensor | None, ...]

    @property
    def is_gated(self) -> bool:
        return self.factors[0] is not None and self.factors[0].ndim == 3

    @property
    def kind(self) -> tuple:
        """Updates of one kind differ in nothing that a graph is made for."""
        return len(self.values), *(f if f is None else (f.dtype, f.stride()) for f in self.factors)


def add_updates(x: Tensor, updates: list[Update]) -> Tensor:
    """The stream x (B, L, d) with updates added in this order."""
    for values, factors in updates:
        for value, factor in zip(values, factors, strict=True):
            x = gated(x, factor, value)
    return x


def run_branches(
    block: Block, which: tuple[int, ...], x: Tensor, lacking: list[Update], parts: tuple[Part, ...]
) -> tuple[Tensor, list[Tensor]]:
    """Some branches of a block, on the stream x (B, L, d) that still lacks some updates.

    Returns:
        The stream, which now lacks the update of the last of these branches alone: adding it where
        the stream is read next saves a pass over it. And the values of all of them.
    """
    x, values = add_updates(x, lacking), []
    for before, k in zip((None, *which[:-1]), which, strict=True):
        if before is not None:
            x = gated(x, parts[before].gate, values[-1])
        values.append(block.updates[k](x, parts[k]))
    return x, values


def join(block: Block, x: Tensor, skip: Tensor) -> Tensor:
    """The stream (B, L, d) with the output of an earlier block mixed in by a long skip."""
    return block.join(x, skip)


def embed(model: DiffusionTransformer, x: Tensor, ends: tuple[Tensor, ...]) -> Tensor:
    """``model.embed``, which takes of the conditioning its ends alone."""
    return model.embed(x, Conditioning((), ends))


def head(
    model: DiffusionTransformer,
    x: Tensor,
    lacking: list[Update],
    ends: tuple[Tensor, ...],
    size: tuple[int, int],
) -> Tensor:
    """``model.head`` on the stream that still lacks some updates."""
    return model.head(add_updates(x, lacking), Conditioning((), ends), size)


def block_runner(compiles: bool, checkpoints: bool) -> Callable[..., Tensor]:
    """How a training step runs the blocks of a model; see ``models.transformer.call_block``.

    Args:
        compiles: one graph for all blocks and each kind of branch.
        checkpoints: keep a block's input alone, and run it again for its gradients.
    """
    run = fused_if(compiles, call_block)
    if checkpoints:
        # Nothing in a block draws numbers: no generator has to be kept for running it again.
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    return partial(_run_forgetting, run)


def _run_forgetting(
    run: Callable[..., Tensor], block: Block, x: Tensor, parts: tuple[Part, ...], branches: tuple
) -> Tensor:
    """``run``, after which blends that nothing will be stored of remember nothing."""
    x = run(block, x, parts, branches)
    for branch in branches:
        if isinstance(branch, Blend) and not branch.is_stored:
            branch.kept = None
    return x
