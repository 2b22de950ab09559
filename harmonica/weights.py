"""Weights of backbones: where they are, and how they get into a model."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from harmonica.downloads import fetch
from harmonica.errors import HarmonicaError
from harmonica.files import (
    existing_file,
    first_line,
    is_safetensors,
    read_json,
    read_safetensors,
    read_torch,
)
from models import ModelSpec
from models.transformer import DiffusionTransformer

# Where a folder in the layout of diffusers keeps the weights of its transformer.
IN_FOLDERS = tuple(
    f"{subfolder}diffusion_pytorch_model.{suffix}"
    for subfolder in ("transformer/", "")
    for suffix in ("safetensors", "bin")
)


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """sha256 of names and numbers, of whatever precision, in the order of names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_file(ckpt: Path | None, spec: ModelSpec, image_size: int) -> Path:
    """The file that ``--ckpt`` names or whose folder it is, or the bundled or fetched one.

    Raises:
        HarmonicaError: there is none, or the folder is of another size.
    """
    if ckpt is not None and ckpt.is_dir():
        found = [ckpt / name for name in IN_FOLDERS if (ckpt / name).is_file()]
        if not found:
            raise HarmonicaError(
                f"--ckpt {ckpt} holds no {' or '.join(IN_FOLDERS[:2])}; pass a checkpoint or the "
                "folder of a diffusers model"
            )
        _check_folder(found[0].parent / "config.json", spec, image_size)
        return found[0]
    if ckpt is not None:
        return existing_file(ckpt, "--ckpt")
    if image_size not in spec.weights:
        raise HarmonicaError(
            f"no weights are published for --model {spec.name} at --image-size {image_size}; "
            "pass yours with --ckpt"
        )
    source = spec.weights[image_size]
    return source if isinstance(source, Path) else fetch(source)


def _check_folder(path: Path, spec: ModelSpec, image_size: int) -> None:
    """Refuse weights for other positions, of which nothing is in the weights themselves.

    Args:
        path: where a folder of diffusers has its configuration.

    Raises:
        HarmonicaError: they are of another image size, or of a relative.
    """
    if not path.is_file():
        return
    found, config = read_json(path), spec.config_at(image_size)
    if not isinstance(found, dict) or type(found.get("sample_size")) is not int:
        raise HarmonicaError(f"--ckpt {path} does not say a sample_size; fetch the folder again")
    size = found["sample_size"]
    if size != config.input_size:
        raise HarmonicaError(
            f"--ckpt {path.parent} is of {size * spec.latent_factor} pixels, not of --image-size "
            f"{image_size}; pass that size, or the folder of this one"
        )
    # What diffusers takes where nothing is said.
    scale = found.get("interpolation_scale") or max(size // 64, 1)
    wanted = getattr(config, "interpolation", scale)
    if scale != wanted:
        raise HarmonicaError(
            f"--ckpt {path.parent} has an interpolation_scale of {scale}, and --model {spec.name} "
            f"{wanted:g} at --image-size {image_size}; pass the model and size of the folder"
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, or in a ``.pt`` file, alone or by its usual names."""
    if is_safetensors(path):
        state, _ = read_safetensors(path)
    else:
        state = read_torch(path)
        for key in ("ema", "model", "state_dict"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
                break
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise HarmonicaError(f"--ckpt {path} holds no state dict; pass a model checkpoint")
    return state


def load_weights(model: DiffusionTransformer, path: Path, name: str) -> None:
    """Load strictly; every name and shape must fit.

    Raises:
        HarmonicaError: one sentence with the first tensor that does not fit.
    """
    state, expected = read_weights(path), model.state_dict()
    try:
        state = model.under_published_names(state)
    except (KeyError, ValueError, RuntimeError) as error:  # parts are missing or do not fit
        raise HarmonicaError(
            f"--ckpt {path} is not a whole checkpoint of diffusers ({first_line(error)}); fetch it "
            "again"
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
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise HarmonicaError(
            f"--ckpt {path} holds tensors without numbers in them; fetch it again"
        ) from None
