"""Embeddings, modulation and the final layer, under the parameter names of the published DiT."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Modulation(NamedTuple):
    """What the condition does to one residual update, (B, 1, d) each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def rows(self, part: slice) -> "Modulation":
        """Of some rows of the timesteps."""
        return Modulation(*(value[part] for value in self))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN modulation: x (B, L, d), shift and scale (B, 1, d)."""
    return x * (1 + scale) + shift


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps.

    Args:
        t: (B,) timesteps.
        dim: even embedding width; cosines fill the first half, sines the second.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _sincos(positions: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of positions (n,), (n, dim)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    omega = 1.0 / 10000**steps
    angles = positions[:, None] * omega[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_position_embedding(dim: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Fixed 2-D position embedding of a token grid (He et al., 2022), (h * w, dim) float32.

    The first half of the channels encodes the column, the second the row.

    Args:
        rows: (h,) positions, float64.
        columns: (w,) likewise.
    """
    across = _sincos(columns, dim // 2)[None].expand(len(rows), -1, -1)
    down = _sincos(rows, dim // 2)[:, None].expand(-1, len(columns), -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1).float()


def unpatchify(patches: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """(B, L, p * p * C), channels varying fastest, to (B, C, H, W) of this size."""
    p, (height, width) = patch_size, size
    patches = patches.unflatten(1, (height // p, width // p)).unflatten(3, (p, p, -1))
    # (B, h, w, p, p, C)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height, width)


def gated(x: Tensor, gate: Tensor | None, update: Tensor) -> Tensor:
    """The residual sum ``x + gate * update``: x, update (B, L, d), gate (B, 1, d).

    Without a gate the update is added as it is. On a GPU either is one pass in any precision.
    """
    if gate is None:
        return x + update
    if update.dtype == x.dtype:
        return torch.addcmul(x, gate, update)
    # addcmul converts as it reads; autocast would first write a float32 copy of the update.
    with torch.autocast(x.device.type, enabled=False):
        return torch.addcmul(x, gate, update)


def initialize_projections(model: nn.Module, patches: nn.Conv2d) -> None:
    """As DiT has them: Xavier's uniform weights, the patch embedding's too; zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) to conditioning vectors (B, d): sinusoids, then a two-layer MLP."""

    def __init__(self, hidden_size: int, frequency_dim: int = 256):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(
            nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, self.frequency_dim).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels (B,) to vectors (B, d). Label ``num_classes`` is the null class of guidance."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """Tokens (B, L, d) to patches (B, L, patch_size**2 * out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def modulation(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale (B, 1, d) for a condition (B, d)."""
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return shift, scale

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), shift, scale))
