"""Latents to images and back: the autoencoders of latent models, through diffusers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.config import BackboneConfig
from harmonica.errors import HarmonicaError
from harmonica.files import first_line
from harmonica.hub import part_folder, whole
from harmonica.weights import state_sha256
from models import MODELS, PIXELS, LatentSpace

# Sides in latent pixels above which an image is decoded in overlapping tiles: 1024 pixels.
LARGEST_WHOLE = 128


def _source(config: BackboneConfig) -> tuple[str, str, str]:
    """Folder or repository of the autoencoder, its subfolder, and what helps if it cannot be had.

    Raises:
        HarmonicaError: it is one of the model's family that cannot be fetched.
    """
    named = MODELS[config.model].latent.autoencoders
    if config.vae in named:
        part = named[config.vae]
        remedy = f"run `download.py {part.arguments}` where there is a network"
        return str(part_folder(part)), part.subfolder, remedy
    # The folder of a whole pipeline has it in a subfolder.
    subfolder = "vae" if (Path(config.vae) / "vae").is_dir() else ""
    return config.vae, subfolder, f"pass {', '.join(named)} or the folder of an autoencoder"


def load_autoencoder(config: BackboneConfig, device: torch.device) -> Any:
    """The AutoencoderKL of the configuration.

    Raises:
        HarmonicaError: it cannot be loaded.
    """
    from diffusers import AutoencoderKL  # heavy, and only latent models need it

    source, subfolder, remedy = _source(config)
    try:
        loaded = AutoencoderKL.from_pretrained(
            source, subfolder=subfolder, use_safetensors=True, output_loading_info=True
        )
        return whole(loaded).to(device).eval()
    except Exception as error:  # what is wrong in a config fails wherever it is first used
        raise HarmonicaError(
            f"--vae {config.vae} cannot be loaded ({first_line(error)}); {remedy}"
        ) from None


@dataclass(frozen=True)
class Decoder:
    """Latents (n, C, h, w) to images (n, 3, H, W) in [0, 1], on the CPU.

    Pixel-space models need no autoencoder; others use theirs, an image at a time, and large ones
    in tiles.
    """

    space: LatentSpace
    autoencoder: Any = None

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        vae = self.autoencoder
        if vae is None:
            return ((x.float() + 1) / 2).clamp(0, 1).cpu()
        if max(x.shape[-2:]) > LARGEST_WHOLE:
            vae.enable_tiling()
        latents = (x / self.space.scale).float().to(vae.device)
        images = [((vae.decode(one[None]).sample + 1) / 2).clamp(0, 1).cpu() for one in latents]
        return torch.cat(images).float()

    def weights_hash(self) -> str | None:
        """sha256 of what decodes, first 16 hex digits; None without an autoencoder."""
        if self.autoencoder is None:
            return None
        decodes = ("decoder.", "post_quant_conv.")
        state = self.autoencoder.state_dict()
        return state_sha256({k: v for k, v in state.items() if k.startswith(decodes)})[:16]


def load_decoder(config: BackboneConfig, device: torch.device) -> Decoder:
    """The decoder of the configuration."""
    space = MODELS[config.model].latent
    return Decoder(space, None if space is PIXELS else load_autoencoder(config, device))


def load_encoder(config: BackboneConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Images (n, 3, H, W) in [-1, 1] to latents (n, C, h, w), on the device."""
    space = MODELS[config.model].latent
    if space is PIXELS:
        return lambda images: images.to(device)
    vae = load_autoencoder(config, device)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        return vae.encode(images.to(device)).latent_dist.mode() * space.scale

    return encode
