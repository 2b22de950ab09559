"""What every model of the zoo offers to samplers, caches and engines, and the walk over its blocks.

An evaluation is ``embed``, the blocks, ``head``. Whatever of it does not depend on x is made
beforehand: ``context`` once per trajectory, ``condition`` once per timestep.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.branch import Branch, compute


class Condition(Protocol):
    """What n samples are of: a Tensor of labels (n,), or prompts, which act like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: Any) -> "Condition": ...

    def to(self, device: torch.device) -> "Condition": ...

    def clone(self) -> "Condition": ...

    def copy_(self, other: "Condition") -> "Condition": ...


class Part(Protocol):
    """What the condition says to one branch.

    Attributes:
        gate: (B, 1, d) factor of its update; None adds the update as it is.
    """

    gate: Tensor | None

    def rows(self, part: slice) -> "Part":
        """Of some rows of the timesteps."""
        ...


class Conditioning(NamedTuple):
    """Everything in an evaluation that does not depend on x.

    Attributes:
        blocks: what every branch of every block takes.
        ends: what embedding and head take, (B, ...) each.
    """

    blocks: tuple[tuple[Part, ...], ...]
    ends: tuple[Tensor, ...]

    def rows(self, part: slice) -> "Conditioning":
        """Of some rows of the timesteps."""
        return Conditioning(
            tuple(tuple(of_branch.rows(part) for of_branch in block) for block in self.blocks),
            tuple(value[part] for value in self.ends),
        )


class Block(Protocol):
    """A transformer block: residual updates, one branch each.

    Attributes:
        branch_names: kind of every branch, in the order of execution.
        updates: (x, part) to the update, of every branch.
    """

    branch_names: tuple[str, ...]
    updates: tuple[Callable[[Tensor, Part], Tensor], ...]

    def __call__(self, x: Tensor, parts: tuple[Part, ...], *branches: Branch) -> Tensor: ...


def call_block(
    block: Block, x: Tensor, parts: tuple[Part, ...], branches: tuple[Branch, ...]
) -> Tensor:
    """The way to run a block that does nothing else."""
    return block(x, parts, *branches)


class DiffusionTransformer(nn.Module):
    """A model with a branch handed in for every residual update.

    Attributes:
        config: typed dataclass that fixes all shapes, with ``hidden_size``, ``patch_size``,
            ``input_size``, ``in_channels`` and ``out_channels``.
        blocks: in the order of execution.
        is_stretchable: whether latents may have other shapes than the configured square.
        joins: long skip connections: block to the earlier block whose output its ``join`` takes in
            before its first branch. They are outside of the branches.
    """

    config: Any
    blocks: Sequence[Block]
    is_stretchable: bool = False
    joins: Mapping[int, int] = MappingProxyType({})

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(f"blocks.{i}" for i in range(len(self.blocks)))

    @property
    def branch_names(self) -> tuple[str, ...]:
        """Names of the branches in the order in which ``forward`` takes them."""
        named = zip(self.block_names, self.blocks, strict=True)
        return tuple(f"{name}.{kind}" for name, block in named for kind in block.branch_names)

    @property
    def conditioning_size(self) -> int:
        """Numbers per row of a Conditioning, the context left out."""
        raise NotImplementedError

    def tokens_at(self, height: int, width: int) -> int:
        """Length of the residual stream of latents of this size."""
        return (height // self.config.patch_size) * (width // self.config.patch_size)

    @property
    def num_tokens(self) -> int:
        """Length of the residual stream at the default size."""
        return self.tokens_at(self.config.input_size, self.config.input_size)

    def under_published_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of any layout that checkpoints come in, as ``load_state_dict`` wants it.

        Raises:
            KeyError, ValueError: parts are missing.
        """
        return state

    def with_null(self, y: Condition) -> Condition:
        """The condition of 2n rows: that of n samples, then their unconditional halves."""
        raise NotImplementedError

    def placeholder(self, rows: int) -> Condition:
        """Some condition of so many rows, for counting operations."""
        raise NotImplementedError

    def context(self, y: Condition) -> Any:
        """What of the conditioning depends on neither x nor the timestep."""
        raise NotImplementedError

    def condition(self, t: Tensor, context: Any) -> Conditioning:
        """The conditioning of timesteps (S * B,) on the training scale, B rows of every one.

        Args:
            context: of B rows.
        """
        raise NotImplementedError

    def embed(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """Latents (B, C, H, W) to the residual stream (B, L, d)."""
        raise NotImplementedError

    def head(self, x: Tensor, conditioning: Conditioning, size: tuple[int, int]) -> Tensor:
        """The residual stream (B, L, d) to the output (B, out_channels, H, W) of this size."""
        raise NotImplementedError

    def evaluate(
        self,
        x: Tensor,
        conditioning: Conditioning,
        branches: Sequence[Branch] | None = None,
        run: Callable[..., Tensor] = call_block,
    ) -> Tensor:
        """One model evaluation where the conditioning is known already; see ``forward``.

        Args:
            run: takes what ``call_block`` takes; compiled, or with checkpoints.
        """
        count = len(self.branch_names)
        if branches is None:
            branches = [compute] * count
        if len(branches) != count:
            raise ValueError(f"{len(branches)} branches were handed in for {count}")
        size, following, joins = x.shape[-2:], iter(branches), self.joins
        x = self.embed(x, conditioning)
        outputs: dict[int, Tensor] = {}
        for k, (block, parts) in enumerate(zip(self.blocks, conditioning.blocks, strict=True)):
            if k in joins:
                x = block.join(x, outputs.pop(joins[k]))
            x = run(block, x, parts, tuple(islice(following, len(parts))))
            if k in joins.values():
                outputs[k] = x
        return self.head(x, conditioning, size)

    def forward(
        self, x: Tensor, t: Tensor, y: Condition, branches: Sequence[Branch] | None = None
    ) -> Tensor:
        """One model evaluation.

        Args:
            x: (B, C, H, W) latents.
            t: (B,) timesteps on the training scale [0, 1000), possibly fractional.
            y: the condition of B rows.
            branches: one Branch per entry of ``branch_names``; None computes everything.

        Returns:
            (B, out_channels, H, W): noise and, with learned variance, the variance channels.
        """
        return self.evaluate(x, self.condition(t, self.context(y)), branches)


class ClassConditional(DiffusionTransformer):
    """A model of labels, ``config.num_classes`` of them; the label after the last is the null."""

    @property
    def null_label(self) -> int:
        """The class of the unconditional half."""
        return self.config.num_classes

    def with_null(self, y: Tensor) -> Tensor:
        return torch.cat([y, torch.full_like(y, self.null_label)])

    def placeholder(self, rows: int) -> Tensor:
        return torch.zeros(rows, dtype=torch.long)
