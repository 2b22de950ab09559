"""The pretrained model that is made faster, with everything that sampling from it needs."""

import os
import shutil
from dataclasses import dataclass, replace
from typing import Any

import torch

from harmonica.conditions import Conditions, Placeholders, Wanted, load_conditions
from harmonica.config import BackboneConfig
from harmonica.denoise import Guidance
from harmonica.downloads import verify
from harmonica.engine import EAGER, Acceleration
from harmonica.errors import HarmonicaError
from harmonica.flops import Costs, measure_costs
from harmonica.precision import set_rounding
from harmonica.router_file import RouterInfo
from harmonica.samplers import Sampler, create_sampler
from harmonica.weights import load_weights, weights_file
from models import MODELS, create_model
from models.transformer import DiffusionTransformer

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Backbone:
    """A frozen model with everything that sampling from it needs.

    Attributes:
        conditions: what its samples can be of.
        weights_hash: sha256 of the weights file, first 16 hex digits.
        costs: multiply-accumulates per branch, one row.
        how: what makes sampling fast.
        latent_size: height and width of the latents, where they are not the model's square.
    """

    name: str
    model: DiffusionTransformer
    conditions: Conditions
    sampler: Sampler
    guidance: Guidance
    image_size: int
    weights_hash: str
    costs: Costs
    device: torch.device
    how: Acceleration = EAGER
    latent_size: tuple[int, int] | None = None

    def router_info(self, **rest: Any) -> RouterInfo:
        """What a router for this backbone records; ``rest`` are further fields."""
        return RouterInfo(
            model=self.name,
            image_size=self.image_size,
            height=self.pixels[0],
            width=self.pixels[1],
            num_classes=getattr(self.model.config, "num_classes", None),
            sampler=self.sampler.name,
            eta=getattr(self.sampler, "eta", None),
            num_sampling_steps=len(self.sampler.timesteps),
            timesteps=tuple(self.sampler.timesteps),
            cfg_scale=self.guidance.scale,
            guide_all_channels=self.guidance.channels is None,
            weights_hash=self.weights_hash,
            **rest,
        )

    def sampled_by(self, sampler: str, num_steps: int, eta: float = 0.0) -> "Backbone":
        """The same model with another sampler or number of steps."""
        noise = MODELS[self.name].noise_schedule
        return replace(self, sampler=create_sampler(sampler, num_steps, eta, noise))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.model.config
        height, width = self.latent_size or (config.input_size, config.input_size)
        return (config.in_channels, height, width)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images."""
        factor = self.image_size // self.model.config.input_size
        _, height, width = self.latent_shape
        return height * factor, width * factor


def select_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_gpus() -> None:
    """Refuse more processes on this machine than it has GPUs, of which each takes one.

    Raises:
        HarmonicaError: there are.
    """
    if not torch.cuda.is_available():
        return
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus:
        raise HarmonicaError(
            f"--nproc_per_node {processes} is more than the {gpus} GPUs of this machine; use {gpus}"
        )


def reduce_precision(model: DiffusionTransformer, dtype: torch.dtype) -> None:
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


def set_float32_products(config: BackboneConfig, device: torch.device) -> None:
    """How this process multiplies in float32 from now on: on a GPU in TensorFloat-32 by default.

    Raises:
        HarmonicaError: the flag asks for what a CPU does not have.
    """
    is_gpu = device.type == "cuda"
    if config.tf32 and not is_gpu:
        raise HarmonicaError("--tf32 needs a GPU; drop it")
    set_rounding(is_gpu if config.tf32 is None else config.tf32)


def load_backbone(
    config: BackboneConfig,
    device: torch.device,
    *,
    random_weights: bool = False,
    wanted: Wanted | None = None,
) -> Backbone:
    """The model, frozen, in eval mode, on the device and in the precision of the configuration.

    Missing weights are downloaded. Sampler state and the model's residual stream stay float32
    whatever the precision.

    Args:
        random_weights: freshly initialised ones, for measuring speed.
        wanted: likewise of ``load_conditions``.

    Raises:
        HarmonicaError: weights that cannot be had or do not fit, or sizes that do not.
    """
    spec = MODELS[config.model]
    size = spec.image_size if config.image_size is None else config.image_size
    how = _acceleration(config, device)
    set_float32_products(config, device)
    sampler = create_sampler(
        config.sampler, config.num_sampling_steps, config.eta, spec.noise_schedule
    )
    pixels = (config.height or size, config.width or size)
    latent_size = (pixels[0] // spec.latent_factor, pixels[1] // spec.latent_factor)
    path = None if random_weights else weights_file(config.ckpt, spec, size)
    # A text encoder, far larger than the model, is gone before the model is there.
    conditions: Conditions | None = None
    if not random_weights or spec.text_encoder is None:
        conditions = load_conditions(config, pixels, device, wanted)
    model = create_model(config.model, image_size=size, num_classes=config.num_classes)
    weights_hash = "random"
    if path is not None:
        weights_hash = verify(path)[:16]
        load_weights(model, path, config.model)
    model.requires_grad_(False).eval().to(device)
    reduce_precision(model, DTYPES[config.mixed_precision])
    return Backbone(
        name=config.model,
        model=model,
        conditions=conditions or Placeholders(model),
        sampler=sampler,
        guidance=Guidance(
            config.cfg_scale,
            None if config.guide_all_channels else spec.channels_guided_with(config.sampler),
        ),
        image_size=size,
        weights_hash=weights_hash,
        costs=measure_costs(model, latent_size),
        device=device,
        how=how,
        latent_size=latent_size,
    )
