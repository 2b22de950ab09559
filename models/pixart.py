"""PixArt-alpha and PixArt-Sigma (Chen et al., 2023 and 2024): text to image, one definition.

Published Sigma weights, the 2048-pixel ones too, compress no keys or values and do not normalise
queries and keys, so there is none of either here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp, PatchEmbed
from torch import Tensor, nn

from models.branch import Branch
from models.layers import (
    Modulation,
    TimestepEmbedder,
    gated,
    initialize_projections,
    modulate,
    sincos_position_embedding,
    unpatchify,
)
from models.prompts import Prompts
from models.transformer import Conditioning, DiffusionTransformer


@dataclass(frozen=True)
class PixArtConfig:
    """Everything that fixes the shapes of a PixArt.

    ``input_size`` is the side of the square latent that positions are laid out for;
    ``interpolation`` the factor that it is larger by than what they were first trained for. Other
    shapes stretch the same positions. With ``has_micro_conditions`` the model is told the size of
    the image.
    """

    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch_size: int = 2
    input_size: int = 32
    in_channels: int = 4
    caption_channels: int = 4096
    max_tokens: int = 120
    interpolation: float = 1.0
    has_micro_conditions: bool = False
    mlp_ratio: float = 4.0

    def __post_init__(self):
        if self.input_size < 1 or self.input_size % self.patch_size:
            raise ValueError(
                f"input size {self.input_size} is not a multiple of the patch size "
                f"{self.patch_size}"
            )
        if self.has_micro_conditions and self.hidden_size % 3:
            raise ValueError(f"hidden size {self.hidden_size} is not a multiple of 3")

    @property
    def out_channels(self) -> int:
        """Noise and the learned variance."""
        return 2 * self.in_channels


class Caption(NamedTuple):
    """What cross-attention takes: the projected prompt, the same at every timestep.

    Attributes:
        tokens: (B, L, d).
        mask: (B, 1, 1, L) bool.
    """

    tokens: Tensor
    mask: Tensor
    gate: None = None

    def rows(self, part: slice) -> "Caption":
        return self


class Context(NamedTuple):
    """What does not depend on the timestep: the caption, and the embedded image size (B, d)."""

    caption: Caption
    size: Tensor | None


class CrossAttention(nn.Module):
    """Queries from the image (B, N, d), keys and values from the caption (B, L, d)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, caption: Caption) -> Tensor:
        heads = (self.num_heads, -1)
        q = self.q_linear(x).unflatten(-1, heads).transpose(1, 2)
        k, v = self.kv_linear(caption.tokens).chunk(2, dim=-1)
        k, v = (value.unflatten(-1, heads).transpose(1, 2) for value in (k, v))
        # q (B, heads, N, d / heads); k, v (B, heads, L, d / heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=caption.mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class PixArtBlock(nn.Module):
    """Three branches; the modulation of all blocks is one, apart from a table of their own."""

    branch_names = ("attn", "cross_attn", "mlp")

    def __init__(self, config: PixArtConfig):
        super().__init__()
        d = config.hidden_size
        self.norm1 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(d, num_heads=config.num_heads, qkv_bias=True)
        self.cross_attn = CrossAttention(d, config.num_heads)
        self.norm2 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(d, int(d * config.mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.scale_shift_table = nn.Parameter(torch.randn(6, d) / d**0.5)

    def attention_update(self, x: Tensor, m: Modulation) -> Tensor:
        return self.attn(modulate(self.norm1(x), m.shift, m.scale))

    def cross_attention_update(self, x: Tensor, caption: Caption) -> Tensor:
        return self.cross_attn(x, caption)

    def mlp_update(self, x: Tensor, m: Modulation) -> Tensor:
        return self.mlp(modulate(self.norm2(x), m.shift, m.scale))

    @property
    def updates(self) -> tuple[Callable, ...]:
        """The function of every branch, in the order of ``branch_names``."""
        return self.attention_update, self.cross_attention_update, self.mlp_update

    def forward(
        self,
        x: Tensor,
        parts: tuple[Modulation, Caption, Modulation],
        attn: Branch,
        cross_attn: Branch,
        mlp: Branch,
    ) -> Tensor:
        a, c, m = parts
        x = gated(x, a.gate, attn(lambda h: self.attention_update(h, a), x))
        x = x + cross_attn(lambda h: self.cross_attention_update(h, c), x)
        x = gated(x, m.gate, mlp(lambda h: self.mlp_update(h, m), x))
        return x


class CaptionEmbedder(nn.Module):
    """Text embeddings (B, L, c) to tokens (B, L, d)."""

    def __init__(self, caption_channels: int, hidden_size: int):
        super().__init__()
        gelu = partial(nn.GELU, approximate="tanh")
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size, act_layer=gelu)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.y_proj(embeddings.to(self.y_proj.fc1.weight.dtype))


class PixArtFinalLayer(nn.Module):
    """Tokens (B, L, d) to patches (B, L, patch_size**2 * out_channels)."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        d = config.hidden_size
        self.norm_final = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(d, config.patch_size**2 * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, d) / d**0.5)

    def modulation(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale (B, 1, d) for an embedded timestep (B, d)."""
        shift, scale = (self.scale_shift_table + c[:, None]).chunk(2, dim=1)
        return shift, scale

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PixArt(DiffusionTransformer):
    """Text-conditional diffusion transformer with adaLN-single."""

    is_stretchable = True

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.x_embedder = PatchEmbed(None, config.patch_size, config.in_channels, d)
        self.t_embedder = TimestepEmbedder(d)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.y_embedder = CaptionEmbedder(config.caption_channels, d)
        if config.has_micro_conditions:
            self.csize_embedder = TimestepEmbedder(d // 3)
            self.ar_embedder = TimestepEmbedder(d // 3)
        grid = config.input_size // config.patch_size
        self.register_buffer("positions", self._positions(grid, grid), persistent=False)
        self.blocks = nn.ModuleList(PixArtBlock(config) for _ in range(config.depth))
        self.final_layer = PixArtFinalLayer(config)
        self.initialize_weights()

    @property
    def conditioning_size(self) -> int:
        return (6 * self.config.depth + 2) * self.config.hidden_size

    def initialize_weights(self) -> None:
        """Initialisation of the PixArt paper: cross-attention and output start at zero."""
        initialize_projections(self, self.x_embedder.proj)
        embedders = [self.t_embedder, self.t_block, self.y_embedder]
        if self.config.has_micro_conditions:
            embedders += [self.csize_embedder, self.ar_embedder]
        for embedder in embedders:
            for module in embedder.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def _positions(self, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
        """Position embedding (1, rows * columns, d) of a token grid."""
        base = self.config.input_size / self.config.patch_size / self.config.interpolation
        down, across = (
            torch.arange(n, dtype=torch.float64, device=device) * (base / n)
            for n in (rows, columns)
        )
        return sincos_position_embedding(self.config.hidden_size, down, across)[None]

    def under_published_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if "proj_out.weight" in state:
            state = from_diffusers(state)
        return weights_of(state, self.config.max_tokens)

    def with_null(self, y: Prompts) -> Prompts:
        return y.with_null()

    def placeholder(self, rows: int) -> Prompts:
        length, channels = self.config.max_tokens, self.config.caption_channels
        return Prompts(
            torch.zeros(rows, length, channels),
            torch.ones(rows, length, dtype=torch.bool),
            torch.zeros(1, length, channels),
            torch.ones(1, length, dtype=torch.bool),
            torch.ones(rows, 2),
        )

    def context(self, y: Prompts) -> Context:
        """Projected captions, and the embedded image size of models that are told."""
        caption = Caption(self.y_embedder(y.embeddings), y.mask[:, None, None])
        if not self.config.has_micro_conditions:
            return Context(caption, None)
        height, width = y.size.unbind(dim=1)
        sides = self.csize_embedder(y.size.flatten()).view(len(y), -1)  # (B, 2 d / 3)
        return Context(caption, torch.cat([sides, self.ar_embedder(height / width)], dim=1))

    def condition(self, t: Tensor, context: Context) -> Conditioning:
        c = self.t_embedder(t)
        if context.size is not None:
            c = c + context.size.repeat(len(t) // len(context.size), 1)
        # adaLN-single, PixArt-alpha section 2.3: one modulation, shifted by every block's table.
        tables = torch.stack([block.scale_shift_table for block in self.blocks])
        shared = self.t_block(c).unflatten(1, (1, 6, -1))
        every = (tables + shared).unsqueeze(3)  # (B, depth, 6, 1, d)
        blocks = []
        for of_block in every.unbind(1):
            parts = of_block.unbind(1)
            blocks.append((Modulation(*parts[:3]), context.caption, Modulation(*parts[3:])))
        return Conditioning(tuple(blocks), self.final_layer.modulation(c))

    def embed(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        grid = [side // self.config.patch_size for side in x.shape[-2:]]
        default = self.config.input_size // self.config.patch_size
        is_default = grid == [default, default]
        positions = self.positions if is_default else self._positions(*grid, x.device)
        # The convolution leaves channels before tokens in memory, and every block would keep that.
        return (self.x_embedder(x) + positions).contiguous()

    def head(self, x: Tensor, conditioning: Conditioning, size: tuple[int, int]) -> Tensor:
        return unpatchify(self.final_layer(x, *conditioning.ends), self.config.patch_size, size)


# diffusers' names to the published ones.
_RENAMED = {
    "pos_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_projection.y_embedding": "y_embedder.y_embedding",
    "adaln_single.linear": "t_block.1",
    "adaln_single.emb.timestep_embedder": "t_embedder",
    "adaln_single.emb.resolution_embedder": "csize_embedder",
    "adaln_single.emb.aspect_ratio_embedder": "ar_embedder",
    "linear_1": "mlp.0",
    "linear_2": "mlp.2",
    "transformer_blocks": "blocks",
    "attn1.to_out.0": "attn.proj",
    "attn2.to_out.0": "cross_attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "proj_out": "final_layer.linear",
}


def from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published parameter names for a state dict of diffusers' PixArtTransformer2DModel.

    Queries, keys and values of an attention, which stand apart there, are put together.

    Raises:
        KeyError: a part of an attention is missing.
    """
    published = {}
    for key, value in state.items():
        if ".attn1.to_q." in key:
            parts = [state[key.replace("to_q", f"to_{p}")] for p in "qkv"]
            key, value = key.replace("attn1.to_q", "attn.qkv"), torch.cat(parts)
        elif ".attn2.to_k." in key:
            parts = [value, state[key.replace("to_k", "to_v")]]
            key, value = key.replace("attn2.to_k", "cross_attn.kv_linear"), torch.cat(parts)
        elif ".attn1.to_k." in key or ".attn1.to_v." in key or ".attn2.to_v." in key:
            continue
        for theirs, ours in _RENAMED.items():
            key = key.replace(theirs, ours)
        published["final_layer." + key if key == "scale_shift_table" else key] = value
    return published


def weights_of(state: dict[str, Tensor], max_tokens: int) -> dict[str, Tensor]:
    """What of a published checkpoint is weights: positions follow from the configuration, and the
    null caption is the encoded empty prompt.

    Published files have that caption, those of diffusers too, though diffusers drops it. One of
    another length, by which alpha and Sigma differ, stays: it is no part of this model.
    """
    caption = state.get("y_embedder.y_embedding")
    fits = caption is not None and len(caption) == max_tokens
    dropped = {"pos_embed"} | ({"y_embedder.y_embedding"} if fits else set())
    return {key: value for key, value in state.items() if key not in dropped}
