"""U-ViT (Bao et al., 2023): everything is a token, and shallow blocks reach deep ones directly."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.layers import Attention, Mlp, PatchEmbed
from torch import Tensor, nn

from models.branch import Branch
from models.layers import timestep_embedding, unpatchify
from models.transformer import Block, ClassConditional, Conditioning


@dataclass(frozen=True)
class UViTConfig:
    """Everything that fixes the shapes of a U-ViT.

    ``depth`` counts the blocks on both sides of the middle one. ``num_classes`` leaves out the null
    class; 0 is an unconditional model, which has no token for a label. ``has_conv`` smooths the
    output with a 3 x 3 convolution.
    """

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int
    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    has_conv: bool = False

    def __post_init__(self):
        if self.input_size < 1 or self.input_size % self.patch_size:
            raise ValueError(
                f"input size {self.input_size} is not a multiple of the patch size "
                f"{self.patch_size}"
            )
        if self.depth % 2 or self.depth < 2:
            raise ValueError(f"depth {self.depth} is not even and positive")
        if self.num_classes < 0 or self.in_channels < 1:
            raise ValueError("num_classes must be at least 0 and in_channels at least 1")

    @property
    def out_channels(self) -> int:
        return self.in_channels

    @property
    def num_extra_tokens(self) -> int:
        """Tokens that stand before the patches: label, if there are classes, and time."""
        return 2 if self.num_classes else 1


class Unconditioned(NamedTuple):
    """The condition says nothing to a branch: it reached the tokens already."""

    gate: None = None

    def rows(self, part: slice) -> "Unconditioned":
        return self


class UViTBlock(nn.Module):
    """Two branches, attention and MLP; a block on the way up takes in a long skip before them."""

    branch_names = ("attn", "mlp")

    def __init__(self, config: UViTConfig, joins: bool = False):
        super().__init__()
        d = config.hidden_size
        self.norm1 = nn.LayerNorm(d)
        self.attn = Attention(d, num_heads=config.num_heads)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = Mlp(d, int(d * config.mlp_ratio))
        if joins:
            self.skip_linear = nn.Linear(2 * d, d)

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """The stream with the output of an earlier block mixed in, (B, L, d) all."""
        # In half precision the product is half; the stream goes on in its own precision.
        return self.skip_linear(torch.cat([x, skip], dim=-1)).to(x.dtype)

    def attention_update(self, x: Tensor, _: Unconditioned) -> Tensor:
        return self.attn(self.norm1(x))

    def mlp_update(self, x: Tensor, _: Unconditioned) -> Tensor:
        return self.mlp(self.norm2(x))

    @property
    def updates(self) -> tuple[Callable[[Tensor, Unconditioned], Tensor], ...]:
        """The function of every branch, in the order of ``branch_names``."""
        return self.attention_update, self.mlp_update

    def forward(
        self, x: Tensor, parts: tuple[Unconditioned, ...], attn: Branch, mlp: Branch
    ) -> Tensor:
        a, m = parts
        x = x + attn(lambda h: self.attention_update(h, a), x)
        x = x + mlp(lambda h: self.mlp_update(h, m), x)
        return x


class UViT(ClassConditional):
    """Blocks on the way down, one in the middle, blocks on the way up with long skips."""

    def __init__(self, config: UViTConfig):
        super().__init__()
        self.config = config
        d, half = config.hidden_size, config.depth // 2
        self.patch_embed = PatchEmbed(config.input_size, config.patch_size, config.in_channels, d)
        if config.num_classes:
            self.label_emb = nn.Embedding(config.num_classes + 1, d)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, d))
        self.in_blocks = nn.ModuleList(UViTBlock(config) for _ in range(half))
        self.mid_block = UViTBlock(config)
        self.out_blocks = nn.ModuleList(UViTBlock(config, joins=True) for _ in range(half))
        self.norm = nn.LayerNorm(d)
        self.decoder_pred = nn.Linear(d, config.patch_size**2 * config.in_channels)
        channels = config.in_channels
        self.final_layer = (
            nn.Conv2d(channels, channels, 3, padding=1) if config.has_conv else nn.Identity()
        )
        self.initialize_weights()

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (*self.in_blocks, self.mid_block, *self.out_blocks)

    @property
    def block_names(self) -> tuple[str, ...]:
        places = range(self.config.depth // 2)
        down, up = ([f"{side}_blocks.{i}" for i in places] for side in ("in", "out"))
        return (*down, "mid_block", *up)

    @property
    def joins(self) -> Mapping[int, int]:
        """The last block joins the first, the last but one the second, and so on."""
        half = self.config.depth // 2
        return {half + 1 + i: half - 1 - i for i in range(half)}

    def tokens_at(self, height: int, width: int) -> int:
        return super().tokens_at(height, width) + self.config.num_extra_tokens

    @property
    def conditioning_size(self) -> int:
        return self.config.num_extra_tokens * self.config.hidden_size

    def initialize_weights(self) -> None:
        """Initialisation of the U-ViT paper: truncated normal weights, no bias."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def context(self, y: Tensor) -> Tensor:
        """Label tokens (B, 1, d) of labels (B,); (B, 0, d) in an unconditional model."""
        if not self.config.num_classes:
            return self.pos_embed.new_zeros(len(y), 0, self.config.hidden_size)
        return self.label_emb(y)[:, None]

    def condition(self, t: Tensor, context: Tensor) -> Conditioning:
        times = timestep_embedding(t, self.config.hidden_size)[:, None]
        labels = context.repeat(len(t) // len(context), 1, 1)
        nothing = ((Unconditioned(), Unconditioned()),) * len(self.blocks)
        return Conditioning(nothing, (torch.cat([labels, times], dim=1),))

    def embed(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        (extra,) = conditioning.ends
        return torch.cat([extra, self.patch_embed(x).to(extra.dtype)], dim=1) + self.pos_embed

    def head(self, x: Tensor, conditioning: Conditioning, size: tuple[int, int]) -> Tensor:
        patches = self.decoder_pred(self.norm(x))[:, self.config.num_extra_tokens :]
        return self.final_layer(unpatchify(patches, self.config.patch_size, size))
