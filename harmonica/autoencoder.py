"""Latents to images and back: the autoencoders of latent models, through diffusers."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.config import BackboneConfig
from harmonica.errors import HarmonicaError, HarmonicaWarning
from harmonica.files import first_line
from harmonica.hub import part_folder, whole
from harmonica.weights import state_sha256
from models import MODELS, PIXELS, LatentSpace

# Side in latent pixels of what is decoded at once, a whole image or a tile of it: 1024 pixels.
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
        HarmonicaError: it cannot be loaded, or has other latents than the model.
    """
    from diffusers import AutoencoderKL  # heavy, and only latent models need it

    source, subfolder, remedy = _source(config)
    try:
        loaded = AutoencoderKL.from_pretrained(
            source, subfolder=subfolder, use_safetensors=True, output_loading_info=True
        )
        autoencoder = whole(loaded).to(device).eval()
    except Exception as error:  # what is wrong in a config fails wherever it is first used
        raise HarmonicaError(
            f"--vae {config.vae} cannot be loaded ({first_line(error)}); {remedy}"
        ) from None
    _check_fit(autoencoder.config, config)
    return autoencoder


def _check_fit(found: Any, config: BackboneConfig) -> None:
    """Refuse an autoencoder with latents of another shape; warn of one that scales them otherwise.

    Args:
        found: its own configuration.

    Raises:
        HarmonicaError: other channels, or another factor between images and latents.
    """
    spec = MODELS[config.model]
    remedy = f"use {' or '.join(spec.latent.autoencoders)}, or one of that latent space"
    shape = (found.latent_channels, 2 ** (len(found.block_out_channels) - 1))
    expected = (spec.config.in_channels, spec.latent_factor)
    if shape != expected:
        raise HarmonicaError(
            f"--vae {config.vae} has latents of {shape[0]} channels at 1/{shape[1]} of the image, "
            f"and --model {config.model} of {expected[0]} at 1/{expected[1]}; {remedy}"
        )
    if found.scaling_factor != spec.latent.scale:
        warnings.warn(
            f"--vae {config.vae} scales latents by {found.scaling_factor}, --model {config.model} "
            f"by {spec.latent.scale}: its images may be wrong; {remedy}",
            HarmonicaWarning,
            stacklevel=3,
        )


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
            self._enable_tiling()
        latents = (x / self.space.scale).float().to(vae.device)
        images = [((vae.decode(one[None]).sample + 1) / 2).clamp(0, 1).cpu() for one in latents]
        return torch.cat(images).float()

    def _enable_tiling(self) -> None:
        """Overlapping tiles of the size that the autoencoder names, unless that is too large."""
        vae = self.autoencoder
        vae.enable_tiling()
        if vae.tile_latent_min_size > LARGEST_WHOLE:
            vae.tile_latent_min_size = LARGEST_WHOLE
            vae.tile_sample_min_size = LARGEST_WHOLE * self.space.factor

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
