"""The pretrained model that is made faster: its weights, its latent space, its decoder."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.config import BackboneConfig
from harmonica.denoise import Guidance
from harmonica.downloads import fetch, verify
from harmonica.engine import EAGER, Acceleration
from harmonica.errors import HarmonicaError
from harmonica.files import existing_file, is_safetensors, read_safetensors, read_torch
from harmonica.flops import Costs, measure_costs
from harmonica.router import RouterInfo
from harmonica.samplers import Sampler, create_sampler
from models import MODELS, create_model
from models.dit import DiT, from_diffusers

SD_LATENT_SCALE = 0.18215
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


@dataclass(frozen=True)
class Backbone:
    """A frozen model with everything that sampling from it needs.

    Attributes:
        weights_hash: sha256 of the weights file, first 16 hex digits.
        costs: multiply-accumulates per branch, one row.
        how: what makes sampling fast.
    """

    name: str
    model: DiT
    sampler: Sampler
    guidance: Guidance
    image_size: int
    weights_hash: str
    costs: Costs
    device: torch.device
    how: Acceleration = EAGER

    def router_info(self, **rest: Any) -> RouterInfo:
        """What a router for this backbone records; ``rest`` are further fields."""
        return RouterInfo(
            model=self.name,
            image_size=self.image_size,
            num_classes=self.model.config.num_classes,
            sampler=self.sampler.name,
            eta=getattr(self.sampler, "eta", None),
            num_sampling_steps=len(self.sampler.timesteps),
            timesteps=tuple(self.sampler.timesteps),
            cfg_scale=self.guidance.scale,
            weights_hash=self.weights_hash,
            **rest,
        )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.model.config
        return (config.in_channels, config.input_size, config.input_size)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.pt`` file (also ``{"ema": ...}``) or a safetensors file."""
    if is_safetensors(path):
        state, _ = read_safetensors(path)
    else:
        state = read_torch(path)
        for key in ("ema", "model"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
                break
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise HarmonicaError(f"--ckpt {path} holds no state dict; pass a model checkpoint")
    return state


def load_weights(model: DiT, path: Path, name: str) -> None:
    """Load strictly; every name and shape must fit.

    Raises:
        HarmonicaError: one sentence with the first tensor that does not fit.
    """
    state, expected = read_weights(path), model.state_dict()
    if "proj_out_2.weight" in state:
        try:
            state = from_diffusers(state, expected["pos_embed"])
        except (KeyError, ValueError) as error:
            raise HarmonicaError(
                f"--ckpt {path} is not a whole diffusers DiT ({error}); fetch it again"
            ) from None
    missing, unknown = (
        sorted(expected.keys() - state.keys()),
        sorted(state.keys() - expected.keys()),
    )
    wrong = [
        key for key in expected.keys() & state.keys() if state[key].shape != expected[key].shape
    ]
    if missing or unknown or wrong:
        if wrong:
            key = min(wrong)
            what = f"{key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
        else:
            what = (
                f"{missing[0]} is missing" if missing else f"{unknown[0]} is not part of the model"
            )
        raise HarmonicaError(
            f"--ckpt {path} is not a checkpoint of --model {name} at this --image-size and "
            f"--num-classes: {what}; pass the matching file or flags"
        )
    model.load_state_dict(state)


def select_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _reduce_precision(model: DiT, dtype: torch.dtype) -> None:
    """Weights of matrix products in ``dtype``; embedding tables and positions stay float32."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(dtype)


def _acceleration(config: BackboneConfig, device: torch.device) -> Acceleration:
    """What the flags say; on a GPU everything by default, on a CPU nothing."""
    is_gpu = device.type == "cuda"
    if config.cuda_graphs and not is_gpu:
        raise HarmonicaError("--cuda-graphs needs a GPU; drop it")
    if config.compile and not is_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise HarmonicaError("--compile needs a C++ compiler on a CPU; install g++ or set CXX")
    return Acceleration(
        compiles=is_gpu if config.compile is None else config.compile,
        captures=is_gpu if config.cuda_graphs is None else config.cuda_graphs,
    )


def load_backbone(
    config: BackboneConfig, device: torch.device, *, random_weights: bool = False
) -> Backbone:
    """The model, frozen, in eval mode, on the device and in the precision of the configuration.

    Missing weights are downloaded. Sampler state and the model's residual stream stay float32
    whatever the precision.

    Args:
        random_weights: freshly initialised ones, for measuring speed.

    Raises:
        HarmonicaError: weights that cannot be had or do not fit, or sizes that do not.
    """
    spec = MODELS[config.model]
    size = spec.image_size if config.image_size is None else config.image_size
    how = _acceleration(config, device)
    sampler = create_sampler(config.sampler, config.num_sampling_steps, config.eta)
    model = create_model(config.model, image_size=size, num_classes=config.num_classes)
    weights_hash = "random"
    if not random_weights:
        path = _weights_file(config, size)
        weights_hash = verify(path)[:16]
        load_weights(model, path, config.model)
    model.requires_grad_(False).eval().to(device)
    _reduce_precision(model, DTYPES[config.mixed_precision])
    return Backbone(
        name=config.model,
        model=model,
        sampler=sampler,
        guidance=Guidance(config.cfg_scale, None if config.guide_all_channels else 3),
        image_size=size,
        weights_hash=weights_hash,
        costs=measure_costs(model),
        device=device,
        how=how,
    )


def _weights_file(config: BackboneConfig, size: int) -> Path:
    """The file that the configuration names, or the bundled or fetched one of its model."""
    if config.ckpt is not None:
        return existing_file(config.ckpt, "--ckpt")
    if size not in MODELS[config.model].weights:
        raise HarmonicaError(
            f"no weights are published for --model {config.model} at --image-size {size}; "
            "pass yours with --ckpt"
        )
    source = MODELS[config.model].weights[size]
    return source if isinstance(source, Path) else fetch(source)


def _load_vae(config: BackboneConfig, device: torch.device) -> Any:
    """The Stable Diffusion autoencoder, through diffusers."""
    from diffusers import AutoencoderKL  # heavy, and only latent models need it

    source = VAES.get(config.vae, config.vae)
    try:
        return AutoencoderKL.from_pretrained(source, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise HarmonicaError(
            f"--vae {config.vae}: {source} cannot be loaded ({reason}); connect to the internet "
            "once, or pass the path of a downloaded copy"
        ) from None


def load_decoder(config: BackboneConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Latents (n, C, h, w) to images (n, 3, H, W) in [0, 1], on the CPU.

    Pixel-space models need none; others use the Stable Diffusion autoencoder.
    """
    if MODELS[config.model].latent_factor == 1:
        return lambda x: ((x.float() + 1) / 2).clamp(0, 1).cpu()
    vae = _load_vae(config, device)

    @torch.inference_mode()
    def decode(x: Tensor) -> Tensor:
        images = [vae.decode(latent[None] / SD_LATENT_SCALE).sample for latent in x.float()]
        return ((torch.cat(images) + 1) / 2).clamp(0, 1).float().cpu()

    return decode


def load_encoder(config: BackboneConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Images (n, 3, H, W) in [-1, 1] to latents (n, C, h, w), on the device."""
    if MODELS[config.model].latent_factor == 1:
        return lambda images: images.to(device)
    vae = _load_vae(config, device)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        return vae.encode(images.to(device)).latent_dist.mode() * SD_LATENT_SCALE

    return encode
