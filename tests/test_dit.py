"""The DiT zoo against the published names, shapes and numbers."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, Golden, relative

from harmonica.backbone import load_backbone
from harmonica.config import BackboneConfig
from harmonica.denoise import Guidance
from models import MODELS, create_model
from models.dit import DiT, DiTConfig, from_diffusers


@pytest.mark.parametrize("size", [256, 512])
def test_xl2_has_exactly_the_published_tensors(size):
    published = json.loads((GOLDEN / f"keys_dit_xl2_{size}.json").read_text())
    with torch.device("meta"):
        model = create_model("DiT-XL/2", image_size=size)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == published


@pytest.mark.parametrize("name", sorted(name for name in MODELS if name.startswith("DiT")))
def test_every_size_runs(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=3, in_channels=2)
        side = model.config.input_size
        out = model(torch.empty(2, 2, side, side), torch.empty(2), torch.empty(2).long())
        plain = create_model(name, num_classes=3, in_channels=2, learn_sigma=False)
        noise = plain(torch.empty(2, 2, side, side), torch.empty(2), torch.empty(2).long())
    assert out.shape == (2, 4, side, side)
    assert noise.shape == (2, 2, side, side)


def guided(golden: Golden, time: float, guidance: Guidance) -> torch.Tensor:
    """One guided evaluation of the recorded x_T and labels."""
    batch = golden.trajectories(SimpleNamespace(timesteps=(time,)), guidance=guidance)
    return batch.predict(0, batch.x_T)


def test_guided_forward_equals_the_published_one(golden: Golden):
    time = float(golden.arrays["plain/t"])
    out = guided(golden, time, Guidance(golden.hparams["cfg_scale"]))
    assert relative(out, golden.arrays["plain/out"]) < 1e-5


def test_guidance_can_cover_every_channel(golden: Golden):
    x, y = golden.arrays["x_T"], golden.arrays["class_labels"]
    channels = x.shape[1]
    out = guided(golden, 500.0, Guidance(4.0, channels=None))
    null = torch.full_like(y, golden.model.config.num_classes)
    time = torch.full((len(x),), 500.0)
    cond, uncond = golden.model(x, time, y), golden.model(x, time, null)
    expected = uncond[:, :channels] + 4.0 * (cond - uncond)[:, :channels]
    assert relative(out[: len(x), :channels], expected) < 1e-6
    assert relative(out[: len(x), channels:], cond[:, channels:]) < 1e-6


def test_the_flag_guides_every_channel():
    for flag, channels in ((False, 3), (True, None)):
        config = BackboneConfig(guide_all_channels=flag, cfg_scale=4.0)
        backbone = load_backbone(config, torch.device("cpu"), random_weights=True)
        assert backbone.guidance == Guidance(4.0, channels)


def test_scale_one_runs_no_unconditional_half(golden: Golden):
    x, y = golden.arrays["x_T"], golden.arrays["class_labels"]
    out = guided(golden, 500.0, Guidance(1.0))
    assert torch.equal(out, golden.model(x, torch.full((len(x),), 500.0), y))


def test_position_embedding_equals_the_published_one(golden: Golden):
    fresh = DiT(DiTConfig(**golden.hparams["model"])).pos_embed
    assert torch.equal(fresh, golden.model.pos_embed)


def test_diffusers_checkpoints_carry_over():
    """Same function up to two known differences, which are undone in the library's model here."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        num_embeds_ada_norm=7, sample_size=8, patch_size=2, norm_type="ada_norm_zero",
    ).eval()  # fmt: skip
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.norm.eps = block.norm3.eps = 1e-6
    ours = DiT(DiTConfig(32, 3, 2, 2, input_size=8, in_channels=4, num_classes=7))
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours.state_dict()["pos_embed"]))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 7])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        out = ours.eval()(x, t, y)
    assert relative(out, expected) < 1e-5


@pytest.mark.parametrize("change", [{"image_size": 33}, {"num_classes": 0}])
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError):
        create_model("DiT-Ti/4", **change)
