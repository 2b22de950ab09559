"""U-ViT against the published names, shapes and numbers."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, relative

from harmonica.denoise import Guidance, Trajectories
from harmonica.samplers import State, create_sampler
from models.uvit import UViT, UViTConfig

PUBLISHED = {
    "imagenet256_uvit_huge": UViTConfig(1152, 28, 16, 2),
    "imagenet512_uvit_huge": UViTConfig(1152, 28, 16, 4, input_size=64),
    "imagenet256_uvit_large": UViTConfig(1024, 20, 16, 2, has_conv=True),
    "cifar10_uvit_small": UViTConfig(512, 12, 8, 2, in_channels=3, num_classes=0, has_conv=True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_exactly_the_published_tensors(name):
    published = json.loads((GOLDEN / f"keys_{name}.json").read_text())
    with torch.device("meta"):
        model = UViT(PUBLISHED[name])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published


@pytest.fixture(scope="module")
def golden_uvit():
    """The recorded arrays, and the model that they were recorded from."""
    with np.load(GOLDEN / "uvit.npz") as file:
        hparams = json.loads(str(file["hparams"]))
        arrays = {k: torch.from_numpy(np.array(file[k])) for k in file.files if k != "hparams"}
    model = UViT(
        UViTConfig(
            hparams["embed_dim"],
            hparams["depth"],
            hparams["num_heads"],
            hparams["patch_size"],
            hparams["img_size"],
            hparams["in_chans"],
            hparams["num_classes"] - 1,
        )
    )
    weights = {k.removeprefix("weights/"): arrays[k] for k in arrays if k.startswith("weights/")}
    model.load_state_dict(weights)
    return arrays, model.requires_grad_(False).eval()


def test_a_forward_equals_the_published_one(golden_uvit):
    arrays, model = golden_uvit
    out = model(arrays["x_T"], arrays["forward/t"], arrays["class_labels"])
    assert relative(out, arrays["forward/out"]) < 1e-5


def test_the_null_class_is_the_published_one(golden_uvit):
    arrays, model = golden_uvit
    assert model.null_label == int(arrays["null_label"])
    labels = model.with_null(arrays["class_labels"])
    assert labels.tolist() == [*arrays["class_labels"].tolist(), 10, 10, 10]


def test_dpm_solver_gives_the_recorded_images(golden_uvit):
    arrays, model = golden_uvit
    evaluations = int(arrays["dpm_solver2/nfe"])
    batch = Trajectories(
        model,
        create_sampler("dpm-solver", evaluations, noise_schedule="u-vit"),
        # Recorded as cond + scale * (cond - uncond).
        Guidance(1 + float(arrays["cfg_scale"]), channels=None),
        arrays["class_labels"],
        arrays["x_T"],
    )
    assert batch.sampler.timesteps == pytest.approx(arrays["dpm_solver2/model_t"], abs=3e-4)
    assert relative(batch.walk(State(batch.x_T), batch.predict).x, arrays["dpm_solver2/x0"]) < 1e-5


def test_an_unconditional_model_looks_at_no_label():
    config = UViTConfig(16, 2, 2, 2, input_size=4, in_channels=3, num_classes=0, has_conv=True)
    model, x = UViT(config), torch.randn(2, 3, 4, 4)
    t = torch.tensor([1.0, 900.0])
    out = model(x, t, torch.tensor([0, 0]))
    assert out.shape == x.shape
    assert torch.equal(out, model(x, t, torch.tensor([4, 2])))


@pytest.mark.parametrize("wrong", [{"depth": 3}, {"input_size": 7}, {"num_classes": -1}])
def test_shapes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError):
        UViTConfig(**{"hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 2, **wrong})
