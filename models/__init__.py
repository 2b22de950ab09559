"""Registry of models: name -> constructor, latent space, text encoder, defaults, weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.dit import DiT, DiTConfig
from models.pixart import PixArt, PixArtConfig
from models.transformer import DiffusionTransformer
from models.uvit import UViT, UViTConfig

BUNDLED_WEIGHTS = Path(__file__).parent / "weights" / "dit_ti4_cifar10.safetensors"
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class WeightSource:
    """One published checkpoint.

    Attributes:
        file: its name in ``checkpoints/``.
        urls: addresses in the order in which they are tried.
        size: lower bound in bytes that tells a truncated file or an error page from a checkpoint.
        arguments: what download.py calls it.
        sha256: what the file must hash to, where that is known beforehand.
    """

    file: str
    urls: tuple[str, ...]
    size: int
    arguments: str = ""
    sha256: str | None = None


@dataclass(frozen=True)
class HubFolder:
    """Part of a repository on the Hub, in the layout of diffusers.

    Attributes:
        subfolder: where its config is.
        patterns: files that belong to it.
        size: lower bound in bytes of what is whole.
        arguments: what download.py calls it.
    """

    repository: str
    subfolder: str = ""
    patterns: tuple[str, ...] = ("config.json", "diffusion_pytorch_model.safetensors")
    size: int = 300_000_000
    arguments: str = ""


@dataclass(frozen=True)
class LatentSpace:
    """What a model denoises.

    Attributes:
        factor: image pixels per latent pixel; 1 means that the model works in pixel space.
        scale: what latents of the autoencoder are multiplied by.
        autoencoders: names of ``--vae`` and where they are; the first is the default.
    """

    factor: int
    scale: float = 1.0
    autoencoders: Mapping[str, HubFolder] = field(default_factory=dict)


PIXELS = LatentSpace(1)
STABLE_DIFFUSION = LatentSpace(
    8,
    0.18215,
    {
        "ema": HubFolder("stabilityai/sd-vae-ft-ema", arguments="ema"),
        "mse": HubFolder("stabilityai/sd-vae-ft-mse", arguments="mse"),
    },
)
_SIGMA_PARTS = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"
SDXL = LatentSpace(
    8, 0.13025, {"sdxl": HubFolder(_SIGMA_PARTS, "vae", ("vae/*",), arguments="sdxl")}
)
# T5 v1.1 XXL, the same for alpha and Sigma.
T5 = HubFolder(
    _SIGMA_PARTS,
    "text_encoder",
    ("tokenizer/*", "text_encoder/*"),
    size=18_000_000_000,
    arguments="t5",
)
# By what download.py calls them.
HUB_PARTS = {**STABLE_DIFFUSION.autoencoders, **SDXL.autoencoders, "t5": T5}


@dataclass(frozen=True)
class ModelSpec:
    """What a model name stands for.

    Attributes:
        config: shapes at the default image size and class count.
        image_size: default side in pixels.
        weights: image size -> published weights; a Path is a file in this repository.
        sizes: image sizes that there are, and what of the shapes differs there; None: any.
        sampler, num_steps, guidance: what is sampled with by default.
        num_steps_with: samplers that are published with another number of steps, and which.
        guided_channels: latent channels that are guided, the others are not; None: all.
        guided_with: samplers with which that is so, all channels being guided with others; None:
            with every sampler.
        noise_schedule: what the model was trained on.
        text_encoder: pipeline on the Hub with the encoder of its prompts; None: it takes classes.
        lowercases_prompts: whether that encoder gets them in lower case.
    """

    name: str
    constructor: type[DiffusionTransformer]
    config: Any
    image_size: int
    latent: LatentSpace
    weights: Mapping[int, WeightSource | Path]
    sizes: Mapping[int, Mapping[str, Any]] | None = None
    sampler: str = "ddim"
    num_steps: int = 20
    num_steps_with: Mapping[str, int] = field(default_factory=dict)
    guidance: float = 1.5
    guided_channels: int | None = None
    guided_with: tuple[str, ...] | None = None
    noise_schedule: str = "linear"
    text_encoder: str | None = None
    lowercases_prompts: bool = False

    @property
    def latent_factor(self) -> int:
        return self.latent.factor

    def config_at(self, image_size: int) -> Any:
        """The shapes at an image size.

        Raises:
            ValueError: the size is none of the model's.
        """
        if image_size < 1 or image_size % self.latent_factor:
            raise ValueError(
                f"image size {image_size} is not a multiple of the latent factor "
                f"{self.latent_factor}"
            )
        if self.sizes is not None and image_size not in self.sizes:
            known = ", ".join(map(str, self.sizes))
            raise ValueError(f"image size {image_size} is not one of {known}")
        of_size = {} if self.sizes is None else self.sizes[image_size]
        return replace(self.config, input_size=image_size // self.latent_factor, **of_size)

    def channels_guided_with(self, sampler: str) -> int | None:
        """Latent channels that are guided, as published; None: all."""
        is_so = self.guided_with is None or sampler in self.guided_with
        return self.guided_channels if is_so else None


def _dit_weights(size: int) -> WeightSource:
    file = f"DiT-XL-2-{size}x{size}.pt"
    return WeightSource(
        file,
        (
            f"https://dl.fbaipublicfiles.com/DiT/models/{file}",
            f"{HUB}/facebook/DiT-XL-2-{size}/resolve/main/transformer/diffusion_pytorch_model.bin",
        ),
        size=2_600_000_000,
        arguments=f"DiT-XL/2 --image-size {size}",
    )


_DIT_SIZES = {
    # name: hidden size, depth, heads
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


def _dits() -> dict[str, ModelSpec]:
    specs = {}
    for size, (hidden, depth, heads) in _DIT_SIZES.items():
        for patch in (2, 4, 8):
            name = f"DiT-{size}/{patch}"
            config = DiTConfig(hidden, depth, heads, patch)
            weights = {px: _dit_weights(px) for px in (256, 512)} if name == "DiT-XL/2" else {}
            # DiT guides three of the four latent channels; kept so that published FIDs are
            # reproduced.
            specs[name] = ModelSpec(
                name, DiT, config, 256, STABLE_DIFFUSION, weights, guided_channels=3
            )
    # The bundled backbone works on CIFAR-10 pixels.
    tiny = replace(specs["DiT-Ti/4"].config, in_channels=3, num_classes=10)
    specs["DiT-Ti/4"] = replace(
        specs["DiT-Ti/4"], config=tiny, image_size=32, latent=PIXELS, weights={32: BUNDLED_WEIGHTS}
    )
    return specs


def _uvit(
    name: str, config: UViTConfig, image_size: int, file: str, key: str, size: int, **rest: Any
) -> ModelSpec:
    """A published U-ViT; ``key`` is that of its file on Google Drive."""
    address = f"https://drive.usercontent.google.com/download?id={key}&export=download&confirm=t"
    weights = {image_size: WeightSource(file, (address,), size, name)}
    factor = image_size // config.input_size
    latent = PIXELS if factor == 1 else STABLE_DIFFUSION
    fields = {"sizes": {image_size: {}}, "sampler": "dpm-solver", **rest}
    return ModelSpec(name, UViT, config, image_size, latent, weights, **fields)


def _uvits() -> list[ModelSpec]:
    """U-ViT's guidance 0.4 is 1.4 here: it counts from the conditional output, not from the null.

    H was trained on Stable Diffusion's noise schedule, L and S in continuous time.

    H samples with order 2: HarmoniCa names DPM-Solver with 20 evaluations and no order, and they
    are ten whole steps of that one. U-ViT's own evaluation takes order 3 and 50 of them. That of L
    takes order 3 too, 50 evaluations even in log-SNR down to t = 1e-4, and that of S 1000 steps of
    Euler-Maruyama; this project has neither and gives both DPM-Solver++, which ends at t = 1e-3.
    """
    return [
        _uvit(
            "U-ViT-H/2", UViTConfig(1152, 28, 16, 2), 256, "imagenet256_uvit_huge.pth",
            "13StUdrjaaSXjfqqF7M47BzPyhMAArQ4u", 1_900_000_000, guidance=1.4,
            num_steps_with={"dpm-solver-3": 50}, noise_schedule="u-vit",
        ),
        _uvit(
            "U-ViT-H/4", UViTConfig(1152, 28, 16, 4, input_size=64), 512,
            "imagenet512_uvit_huge.pth", "1uegr2o7cuKXtf2akWGAN2Vnlrtw5YKQq", 1_900_000_000,
            guidance=1.7, num_steps_with={"dpm-solver-3": 50}, noise_schedule="u-vit",
        ),
        _uvit(
            "U-ViT-L/2", UViTConfig(1024, 20, 16, 2, has_conv=True), 256,
            "imagenet256_uvit_large.pth", "1w7T1hiwKODgkYyMH9Nc9JNUThbxFZgs3", 1_100_000_000,
            guidance=1.4, sampler="dpm-solver++", noise_schedule="u-vit-continuous",
        ),
        _uvit(
            "U-ViT-S/2",
            UViTConfig(512, 12, 8, 2, in_channels=3, num_classes=0, has_conv=True), 32,
            "cifar10_uvit_small.pth", "1yoYyuzR_hQYWU0mkTj659tMTnoCWCMv-", 170_000_000,
            guidance=1.0, sampler="dpm-solver++", noise_schedule="u-vit-continuous",
        ),
    ]  # fmt: skip


def _pixart(name: str, files: Mapping[int, tuple[str, str]], **fields: Any) -> ModelSpec:
    """A PixArt; ``files`` is image size to (repository of the originals, name of the weights)."""
    weights = {
        size: WeightSource(
            f"{file}.safetensors",
            (
                f"{HUB}/PixArt-alpha/{file}/resolve/main/transformer/"
                "diffusion_pytorch_model.safetensors",
                f"{HUB}/PixArt-alpha/{repository}/resolve/main/{file}.pth",
            ),
            size=1_200_000_000,
            arguments=f"{name} --image-size {size}",
        )
        for size, (repository, file) in files.items()
    }
    return ModelSpec(
        name,
        PixArt,
        image_size=256,
        weights=weights,
        num_steps_with={"iddpm": 100, "sa-solver": 25},
        guidance=4.5,
        # PixArt's IDDPM is that of DiT, with its guidance; its other samplers guide all channels.
        guided_channels=3,
        guided_with=("iddpm",),
        text_encoder=T5.repository,
        **fields,
    )


def _pixarts() -> list[ModelSpec]:
    alpha = {256: "256x256", 512: "512x512", 1024: "1024-MS"}
    sigma = {256: "256x256", 512: "512-MS", 1024: "1024-MS", 2048: "2K-MS"}
    return [
        _pixart(
            "PixArt-alpha-XL/2",
            {size: ("PixArt-alpha", f"PixArt-XL-2-{end}") for size, end in alpha.items()},
            config=PixArtConfig(),
            latent=STABLE_DIFFUSION,
            sampler="dpm-solver++",
            lowercases_prompts=True,
            sizes={256: {}, 512: {}, 1024: {"interpolation": 2.0, "has_micro_conditions": True}},
        ),
        _pixart(
            "PixArt-Sigma-XL/2",
            {size: ("PixArt-Sigma", f"PixArt-Sigma-XL-2-{end}") for size, end in sigma.items()},
            config=PixArtConfig(max_tokens=300, interpolation=0.5),
            latent=SDXL,
            sampler="dpm-solver++-euler",
            sizes={size: {"interpolation": size / 512} for size in sigma},
        ),
    ]


MODELS = _dits() | {spec.name: spec for spec in (*_uvits(), *_pixarts())}


def create_model(
    name: str, *, image_size: int | None = None, **changes: Any
) -> DiffusionTransformer:
    """A freshly initialised model of the zoo.

    Args:
        name: a key of ``MODELS``.
        image_size: side in pixels; must be a multiple of the latent factor.
        changes: fields of the model's config, such as ``num_classes``; None leaves one as it is.

    Raises:
        KeyError: unknown name.
        ValueError: the sizes do not fit.
    """
    spec = MODELS[name]
    config = spec.config_at(spec.image_size if image_size is None else image_size)
    given = {field: value for field, value in changes.items() if value is not None}
    return spec.constructor(replace(config, **given))
