"""DiT (Peebles & Xie, 2023): the one definition behind plain, training and replay forwards."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import Attention, Mlp, PatchEmbed
from torch import Tensor, nn

from models.branch import Branch
from models.layers import (
    FinalLayer,
    LabelEmbedder,
    Modulation,
    TimestepEmbedder,
    gated,
    initialize_projections,
    modulate,
    sincos_position_embedding,
    unpatchify,
)
from models.transformer import ClassConditional, Conditioning


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes the shapes of a DiT.

    ``input_size`` is the side of the (square) latent in latent pixels. With ``learn_sigma`` the
    model returns twice its input channels: noise, then the variance interpolation.
    """

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int
    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    learn_sigma: bool = True

    def __post_init__(self):
        if self.input_size < 1 or self.input_size % self.patch_size:
            raise ValueError(
                f"input size {self.input_size} is not a multiple of the patch size "
                f"{self.patch_size}"
            )
        if self.num_classes < 1 or self.in_channels < 1:
            raise ValueError("num_classes and in_channels must be at least 1")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class DiTBlock(nn.Module):
    """Two branches, attention and MLP, each modulated and gated by the condition (adaLN-Zero)."""

    branch_names = ("attn", "mlp")

    def __init__(self, config: DiTConfig):
        super().__init__()
        d = config.hidden_size
        self.norm1 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(d, num_heads=config.num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(d, int(d * config.mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def modulations(self, c: Tensor) -> tuple[Modulation, Modulation]:
        """For attention and MLP, from a condition (B, d)."""
        parts = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def attention_update(self, x: Tensor, m: Modulation) -> Tensor:
        return self.attn(modulate(self.norm1(x), m.shift, m.scale))

    def mlp_update(self, x: Tensor, m: Modulation) -> Tensor:
        return self.mlp(modulate(self.norm2(x), m.shift, m.scale))

    @property
    def updates(self) -> tuple[Callable[[Tensor, Modulation], Tensor], ...]:
        """The function of every branch, in the order of ``branch_names``."""
        return self.attention_update, self.mlp_update

    def forward(
        self, x: Tensor, modulations: tuple[Modulation, Modulation], attn: Branch, mlp: Branch
    ) -> Tensor:
        a, m = modulations
        x = gated(x, a.gate, attn(lambda h: self.attention_update(h, a), x))
        x = gated(x, m.gate, mlp(lambda h: self.mlp_update(h, m), x))
        return x


class DiT(ClassConditional):
    """Class-conditional diffusion transformer with a branch handed in for every residual update."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.x_embedder = PatchEmbed(config.input_size, config.patch_size, config.in_channels, d)
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = LabelEmbedder(config.num_classes, d)
        grid = torch.arange(config.input_size // config.patch_size, dtype=torch.float64)
        self.pos_embed = nn.Parameter(
            sincos_position_embedding(d, grid, grid).unsqueeze(0), requires_grad=False
        )
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch_size, config.out_channels)
        self.initialize_weights()

    @property
    def conditioning_size(self) -> int:
        return (6 * self.config.depth + 2) * self.config.hidden_size

    def initialize_weights(self) -> None:
        """Initialisation of the DiT paper: gates and output start at zero."""
        initialize_projections(self, self.x_embedder.proj)
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def under_published_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        is_diffusers = "proj_out_2.weight" in state
        return from_diffusers(state, self.pos_embed) if is_diffusers else state

    def context(self, y: Tensor) -> Tensor:
        """Embedded labels (B, d) of labels (B,)."""
        return self.y_embedder(y)

    def condition(self, t: Tensor, context: Tensor) -> Conditioning:
        c = self.t_embedder(t) + context.repeat(len(t) // len(context), 1)
        blocks = tuple(block.modulations(c) for block in self.blocks)
        return Conditioning(blocks, self.final_layer.modulation(c))

    def embed(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        # The convolution leaves channels before tokens in memory, and every block would keep that.
        return (self.x_embedder(x) + self.pos_embed).contiguous()

    def head(self, x: Tensor, conditioning: Conditioning, size: tuple[int, int]) -> Tensor:
        return unpatchify(self.final_layer(x, *conditioning.ends), self.config.patch_size, size)


def from_diffusers(state: dict[str, Tensor], pos_embed: Tensor) -> dict[str, Tensor]:
    """Published parameter names for a state dict of diffusers' DiTTransformer2DModel.

    diffusers repeats the timestep and label embedders in every block, of which the first is taken,
    and does not store the position embedding, which is handed in.
    """
    renamed = {
        "pos_embed.proj": "x_embedder.proj",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": (
            "y_embedder.embedding_table"
        ),
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    depth = len({k.split(".")[1] for k in state if k.startswith("transformer_blocks.")})
    for i in range(depth):
        old, new = f"transformer_blocks.{i}", f"blocks.{i}"
        renamed[f"{old}.norm1.linear"] = f"{new}.adaLN_modulation.1"
        renamed[f"{old}.attn1.to_out.0"] = f"{new}.attn.proj"
        renamed[f"{old}.ff.net.0.proj"] = f"{new}.mlp.fc1"
        renamed[f"{old}.ff.net.2"] = f"{new}.mlp.fc2"
    published = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module in renamed:
            published[f"{renamed[module]}.{kind}"] = value
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = [state[f"transformer_blocks.{i}.attn1.to_{p}.{kind}"] for p in "qkv"]
            published[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return published | {"pos_embed": pos_embed}
