"""Tiny random models of every family, for properties that all of them share."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from harmonica.cache import Cache, Replay
from harmonica.denoise import Guidance, Tally, Trajectories
from harmonica.samplers import Sampler, State, create_sampler
from harmonica.schedule import Schedule
from models import MODELS, ModelSpec
from models.branch import Branch
from models.dit import DiT, DiTConfig
from models.pixart import PixArt, PixArtConfig
from models.prompts import Prompts
from models.transformer import Condition, DiffusionTransformer
from models.uvit import UViT, UViTConfig

DIT = DiTConfig(32, 3, 2, 2, input_size=8, num_classes=5)
UVIT = UViTConfig(32, 4, 2, 2, input_size=8, num_classes=5)
PIXART = PixArtConfig(
    hidden_size=36, depth=2, num_heads=2, input_size=8, caption_channels=20, max_tokens=7
)
TOLD = PixArtConfig(
    hidden_size=36,
    depth=2,
    num_heads=2,
    input_size=8,
    caption_channels=20,
    max_tokens=7,
    has_micro_conditions=True,
)
CONFIGS = {
    "dit": (DiT, DIT),
    "uvit": (UViT, UVIT),
    "pixart": (PixArt, PIXART),
    "told": (PixArt, TOLD),
}


# Tiny model to its published relative, and its shapes at 64 pixels, or 8 without an autoencoder.
# One PixArt is alpha at 1024, which is told sizes.
READER = replace(PIXART, caption_channels=16, max_tokens=9)
RELATIVES = {
    "tiny-DiT": ("DiT-XL/2", DIT),
    "tiny-U-ViT": ("U-ViT-H/2", UVIT),
    "tiny-U-ViT-L": ("U-ViT-L/2", replace(UVIT, has_conv=True)),
    "tiny-U-ViT-S": ("U-ViT-S/2", replace(UVIT, in_channels=3, num_classes=0, has_conv=True)),
    "tiny-PixArt": ("PixArt-alpha-XL/2", READER),
    "tiny-PixArt-1024": (
        "PixArt-alpha-XL/2",
        replace(READER, interpolation=2.0, has_micro_conditions=True),
    ),
    "tiny-Sigma": ("PixArt-Sigma-XL/2", replace(READER, interpolation=0.5, max_tokens=12)),
}


def tiny_specs() -> dict[str, ModelSpec]:
    """Entries for the registry, which make tiny models as good as published ones."""
    specs = {}
    for name, (published, config) in RELATIVES.items():
        spec = MODELS[published]
        side = config.input_size * spec.latent_factor
        sizes = None if spec.sizes is None else {side: {}}
        specs[name] = replace(
            spec,
            name=name,
            config=config,
            image_size=side,
            num_steps=4,
            num_steps_with={},
            sizes=sizes,
        )
    return specs


def register_tiny() -> None:
    """In a process of its own."""
    MODELS.update(tiny_specs())


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights without the zeros of the initialisation, which would hide branches."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)
    return model.requires_grad_(False).eval()


def tiny(family: str) -> DiffusionTransformer:
    kind, config = CONFIGS[family]
    return randomised(kind(config))


def some_condition(model: DiffusionTransformer, rows: int, seed: int = 1) -> Condition:
    """Labels, or prompts of unequal lengths."""
    draw = torch.Generator().manual_seed(seed)
    config = model.config
    if not isinstance(model, PixArt):
        return torch.randint(config.num_classes, (rows,), generator=draw)
    length = config.max_tokens
    lengths = torch.arange(rows) % length + 1
    embeddings = torch.randn(rows + 1, length, config.caption_channels, generator=draw)
    return Prompts(
        embeddings[:rows],
        torch.arange(length) < lengths[:, None],
        embeddings[rows:],
        torch.arange(length)[None] < 2,
        torch.tensor([[64.0, 96.0]]).repeat(rows, 1),
    )


def tiny_trajectories(
    family: str, sampler: Sampler | None = None, rows: int = 3, **changes
) -> Trajectories:
    model = tiny(family)
    shape = (rows, model.config.in_channels, 8, 8)
    fields = {
        "model": model,
        "sampler": sampler or create_sampler("ddim", 5),
        "guidance": Guidance(1.5, None),
        "y": some_condition(model, rows),
        "x_T": torch.randn(shape, generator=torch.Generator().manual_seed(2)),
    }
    return Trajectories(**{**fields, **changes})


def other_batches(family: str, sampler: str, count: int = 4) -> list[Trajectories]:
    """Of one model and shape, with nothing else in common."""
    draw = torch.Generator().manual_seed(5)
    first = tiny_trajectories(family, create_sampler(sampler, 5))
    batches = []
    for k in range(count):
        noise = torch.randn(5, *first.x_T.shape, generator=draw)
        y = some_condition(first.model, len(first.x_T), seed=k)
        x_T = torch.randn(first.x_T.shape, generator=draw)
        batches.append(replace(first, y=y, x_T=x_T, noise=noise.__getitem__, tally=Tally()))
    return batches


def limit_windows(monkeypatch, batch: Trajectories, steps: int) -> None:
    """Have batches of this size make the conditioning of so many steps at once."""
    rows = batch.guidance.halves * len(batch.x_T)
    numbers = steps * rows * batch.model.conditioning_size
    monkeypatch.setattr("harmonica.denoise.CONDITIONING_NUMBERS", numbers)


def replay_branches(cache: Cache, s: int, row: Sequence[bool]) -> list[Branch]:
    """One Replay per branch for step s, whose schedule row is ``row``."""
    return [Replay(cache, i, s, bool(computes)) for i, computes in enumerate(row)]


def by_branches(batch: Trajectories, schedule: Schedule) -> torch.Tensor:
    """What the model's own forward makes of caching branches: what an engine is held against."""
    cache = Cache(len(batch.model.branch_names), schedule.predictor)

    def predict(s, x):
        return batch.predict(s, x, replay_branches(cache, s, schedule.compute[s]))

    return batch.walk(State(batch.x_T), predict).x
