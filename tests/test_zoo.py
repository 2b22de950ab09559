"""Every family through the real loading paths, from tiny local files in the layout of the Hub."""

import hashlib
import json
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import PartialState
from families import RELATIVES, randomised, register_tiny, tiny, tiny_specs
from memory import Peak
from PIL import Image
from processes import Group
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from harmonica import hub
from harmonica.autoencoder import LARGEST_WHOLE, Decoder, load_decoder
from harmonica.backbone import load_backbone, reduce_precision
from harmonica.baselines.fixed import random_schedule
from harmonica.budget import Budget
from harmonica.conditions import load_conditions
from harmonica.config import BackboneConfig
from harmonica.denoise import Guidance, Trajectories
from harmonica.errors import HarmonicaError, HarmonicaWarning
from harmonica.evaluation import evaluate_and_report
from harmonica.flops import measure_costs
from harmonica.hub import fetch_part, part_folder
from harmonica.many_samples import sample_many
from harmonica.metrics.config import EvaluateConfig
from harmonica.metrics.subject import open_subject
from harmonica.options import flag_of
from harmonica.predictors import LastValue
from harmonica.prompts import save_prompts
from harmonica.randomness import Draws
from harmonica.replay_plan import plan_replay
from harmonica.report import choose_labels, sample_and_report
from harmonica.router_file import load_router
from harmonica.sample_config import SampleConfig
from harmonica.samplers import SAMPLERS, create_sampler
from harmonica.sampling import eight_bit, sample
from harmonica.text_encoder import Reading, TextEncoder, encode_prompts
from harmonica.training.config import TrainConfig
from harmonica.training.trainer import Trainer
from harmonica.training.trajectory import Rollout
from harmonica.weights import weights_file
from models import MODELS, SDXL, STABLE_DIFFUSION, T5, HubFolder, create_model

CPU = torch.device("cpu")
CONV = "decoder.conv_in.weight"
PROMPTS = "a cat\nЖёлтый кот, très élégants 🐈\nthe same cat, told at such length that it is cut\n"


def tiny_autoencoder(levels: int = 4, **changes):
    """A random one, whose latents have a pixel for 2^(levels - 1) of the image."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **{
            "block_out_channels": (4,) * levels, "norm_num_groups": 2, "layers_per_block": 1,
            "sample_size": 32, **changes,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_t5):
    """Weights, autoencoders and prompts of the tiny models."""
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    path = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=18, num_layers=2, cross_attention_dim=36,
        caption_channels=16, sample_size=8, interpolation_scale=1, use_additional_conditions=False,
    )  # fmt: skip
    randomised(pixart).save_pretrained(path / "pixart" / "transformer")
    # Published files have this, too, which diffusers drops.
    file = path / "pixart" / "transformer" / "diffusion_pytorch_model.safetensors"
    caption = torch.randn(RELATIVES["tiny-PixArt"][1].max_tokens, 16)
    save_file({**load_file(file), "caption_projection.y_embedding": caption}, file)
    torch.save({"state_dict": tiny("uvit").state_dict()}, path / "uvit.pth")
    save_file(tiny("dit").state_dict(), path / "dit.safetensors")
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        num_embeds_ada_norm=5, sample_size=8, patch_size=2, norm_type="ada_norm_zero",
    )  # fmt: skip
    randomised(dit).save_pretrained(path / "dit" / "transformer")
    for name in ("tiny-PixArt-1024", "tiny-Sigma", "tiny-U-ViT-L", "tiny-U-ViT-S"):
        published, config = RELATIVES[name]
        weights = randomised(MODELS[published].constructor(config)).state_dict()
        torch.save({"state_dict": weights}, path / f"{name}.pth")
    tiny_autoencoder().save_pretrained(path / "pipeline" / "vae")
    tiny_autoencoder(scaling_factor=SDXL.scale).save_pretrained(path / "sdxl" / "vae")
    (path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return path


@pytest.fixture
def zoo(monkeypatch, folder, tiny_t5):
    """Flags that every tiny model is loaded with, by its name; the names are in the registry."""
    monkeypatch.setattr("harmonica.downloads.CACHE", folder / "cache")
    for name, spec in tiny_specs().items():
        monkeypatch.setitem(MODELS, name, spec)
    vae = {"vae": str(folder / "pipeline")}
    text = {"prompts": folder / "prompts.txt", "text_encoder": str(tiny_t5), **vae}
    return {
        "tiny-DiT": {"ckpt": folder / "dit.safetensors", **vae},
        "tiny-U-ViT": {"ckpt": folder / "uvit.pth", **vae},
        "tiny-U-ViT-L": {"ckpt": folder / "tiny-U-ViT-L.pth", **vae},
        "tiny-U-ViT-S": {"ckpt": folder / "tiny-U-ViT-S.pth"},
        "tiny-PixArt": {"ckpt": folder / "pixart", **text},
        "tiny-PixArt-1024": {"ckpt": folder / "tiny-PixArt-1024.pth", **text},
        "tiny-Sigma": {"ckpt": folder / "tiny-Sigma.pth", **text, "vae": str(folder / "sdxl")},
    }


# Every model, and every sampler, once; a family's own sampler is not named.
TRAINED = [
    ("tiny-DiT", {}),
    ("tiny-U-ViT", {}),
    ("tiny-U-ViT-L", {}),
    ("tiny-U-ViT-S", {}),
    ("tiny-PixArt", {}),
    ("tiny-PixArt", {"sampler": "iddpm"}),
    ("tiny-PixArt-1024", {"sampler": "sa-solver"}),
    ("tiny-Sigma", {}),
    ("tiny-DiT", {"sampler": "iddpm"}),
    ("tiny-DiT", {"sampler": "dpm-solver++-zero"}),
    ("tiny-U-ViT", {"sampler": "dpm-solver-3"}),
]


@pytest.mark.parametrize(("name", "chosen"), TRAINED)
@pytest.mark.filterwarnings("ignore:.*were cut")
def test_a_router_is_trained_and_replayed(name, chosen, zoo, tmp_path):
    training = TrainConfig(
        model=name, results_dir=tmp_path / "runs", max_steps=3, global_batch_size=4,
        lambda_batch_size=4, target_cur=0.5, **chosen, **zoo[name],
    )  # fmt: skip
    training.check()
    run = Trainer(training).run().path
    sampling = SampleConfig(
        model=name, path=run, compare=True, repeats=1, num_images=2, out=tmp_path / "samples",
        **chosen, **zoo[name],
    )  # fmt: skip
    sampling.check()
    printed = sample_and_report(sampling)
    assert "50.0%" in printed
    report = json.loads((tmp_path / "samples" / "report.json").read_text())
    assert report["image_error"]["mse_mean"] > 0
    picture = np.asarray(Image.open(tmp_path / "samples" / "with_router" / "000001.png"))
    assert picture.shape == (MODELS[name].image_size, MODELS[name].image_size, 3)
    sampler = chosen.get("sampler", MODELS[name].sampler)
    assert f"sampler: {sampler}\n" in (run / "config.yaml").read_text()


def test_training_covers_every_sampler():
    own = {spec.name: spec.sampler for spec in tiny_specs().values()}
    assert {chosen.get("sampler", own[name]) for name, chosen in TRAINED} == set(SAMPLERS)


REST = [
    (name, sampler)
    for name in ("tiny-DiT", "tiny-U-ViT", "tiny-PixArt")
    for sampler in SAMPLERS
    if (name, sampler) != ("tiny-U-ViT", "iddpm")  # no learned variance
]


@pytest.mark.parametrize(("name", "sampler"), REST)
@pytest.mark.filterwarnings("ignore:.*were cut")
def test_every_family_is_sampled_with_every_sampler(name, sampler, zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("harmonica.report.comparison", lambda *_: None)  # drawn above
    config = SampleConfig(
        model=name, sampler=sampler, num_sampling_steps=3, method="uniform", target_cur=0.3,
        compare=True, repeats=1, num_images=1, out=tmp_path, **zoo[name],
    )  # fmt: skip
    config.check()
    sample_and_report(config)
    assert json.loads((tmp_path / "report.json").read_text())["image_error"]["mse_mean"] > 0


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_an_image_is_that_of_its_prompt(zoo, folder, tmp_path, tiny_t5):
    """Encoded before or now, in a list or alone, whatever else is in the batch."""
    encoded = tmp_path / "prompts.safetensors"
    reading = Reading.of(MODELS["tiny-PixArt"], str(tiny_t5))
    save_prompts(encoded, encode_prompts(PROMPTS.splitlines(), reading, CPU))
    of_list = zoo["tiny-PixArt"]
    alone = {k: v for k, v in of_list.items() if k != "prompts"} | {
        "prompt": PROMPTS.splitlines()[1]
    }
    pictures = {}
    for key, flags, chosen in (
        ("text", of_list, None),
        ("encoded", of_list | {"prompts": encoded}, None),
        ("chosen", of_list, (1, 1)),
        ("alone", alone | {"num_images": 2}, None),
    ):
        config = SampleConfig(
            model="tiny-PixArt", repeats=1, classes=chosen, out=tmp_path / key, **flags
        )
        config.check()
        sample_and_report(config)
        files = sorted((tmp_path / key / "uncached").glob("*.png"))
        pictures[key] = [np.asarray(Image.open(file)).astype(int) for file in files]
    assert len(pictures["text"]) == 3
    for a, b in zip(pictures["text"], pictures["encoded"], strict=True):
        assert np.array_equal(a, b)
    assert np.abs(pictures["text"][1] - pictures["chosen"][1]).max() <= 1
    assert np.abs(pictures["text"][1] - pictures["alone"][1]).max() <= 1
    assert np.abs(pictures["chosen"][0] - pictures["text"][0]).max() > 1


def test_a_family_is_sampled_with_its_own_noise_schedule_and_guidance(zoo):
    of_dit = load_backbone(BackboneConfig(model="tiny-DiT", **zoo["tiny-DiT"]), CPU)
    assert of_dit.guidance == Guidance(1.5, 3)
    backbone = load_backbone(BackboneConfig(model="tiny-U-ViT", **zoo["tiny-U-ViT"]), CPU)
    assert backbone.guidance == Guidance(1.4, None)
    assert backbone.sampler == create_sampler("dpm-solver", 4, noise_schedule="u-vit")
    assert backbone.sampled_by("ddim", 3).sampler.alphas_bar == (
        create_sampler("ddim", 3, noise_schedule="u-vit").alphas_bar
    )
    linear = create_sampler("dpm-solver", 4)
    assert backbone.sampler.alphas_bar != linear.alphas_bar


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_two_processes_train_a_router_of_prompts(zoo, tmp_path):
    """Like one: prompts belong to samples, not processes. And one of them encodes the prompts."""
    flags = {
        "model": "tiny-PixArt", "global_batch_size": 8, "max_steps": 6, "log_every": 3,
        **zoo["tiny-PixArt"],
    }  # fmt: skip
    alone = Trainer(TrainConfig(results_dir=tmp_path / "alone", **flags)).run()
    words = [word for name, value in flags.items() for word in (flag_of(name), value)]
    group = Group("train", *words, folder=tmp_path, fault=register_tiny)
    assert group.wait() == [0, 0], group.said()
    logs = [log.read_text() for log in sorted(tmp_path.glob("rank*.log"))]
    assert sum("prompts: 100%" in log for log in logs) == 1
    assert ["warning: 2 of 3 prompts are longer" in log for log in logs] == [True, False]
    together = tmp_path / "results" / alone.path.name
    # The losses: an update of Adam is as large for other prompts.
    a, b = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (alone.path, together)
    )
    assert len(a) == 2
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=2e-3)
    difference = load_router(alone.path).logits - load_router(together).logits
    assert difference.abs().max() < 5e-3


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_nobody_waits_in_a_collective_for_a_text_encoder(zoo, tmp_path, monkeypatch):
    """It takes longer than a collective may."""
    waiting, encoded, encode = [], [], TextEncoder.encode

    def main_process_first(self, is_main):
        waiting.append(is_main)
        yield
        waiting.pop()

    def watched(self, *rest):
        encoded.append(bool(waiting))
        return encode(self, *rest)

    monkeypatch.setattr(PartialState, "_goes_first", main_process_first)
    monkeypatch.setattr(TextEncoder, "encode", watched)
    flags = {"model": "tiny-PixArt", **zoo["tiny-PixArt"]}
    monkeypatch.setattr("harmonica.downloads.CACHE", tmp_path / "one")
    Trainer(TrainConfig(global_batch_size=4, **flags))
    monkeypatch.setattr("harmonica.downloads.CACHE", tmp_path / "other")
    monkeypatch.setattr("harmonica.evaluation.choose_instruments", Mock(side_effect=EOFError))
    with pytest.raises(EOFError):  # far enough
        evaluate_and_report(EvaluateConfig(uncached=True, out=tmp_path / "out", **flags))
    assert encoded == [False] * 4  # the null prompt and a batch, twice


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_evaluation_samples_image_i_of_prompt_i(zoo):
    config = EvaluateConfig(model="tiny-PixArt", uncached=True, num_images=5, **zoo["tiny-PixArt"])
    subject = open_subject(config, CPU)
    texts = subject.plan.backbone.conditions.encoded.texts
    labels = subject.samples.labels(range(5))
    assert labels.tolist() == [0, 1, 2, 0, 1] and len(texts) == 3
    assert subject.samples.texts() == [texts[i % 3] for i in range(5)]
    latents = subject.samples.read(range(3, 5)).latents
    draws = Draws(config.seed, "sample")
    assert torch.equal(
        latents, sample(subject.plan.backbone, None, draws, [3, 4], torch.tensor([0, 1]))
    )
    other = sample(subject.plan.backbone, None, draws, [3, 4], torch.tensor([1, 0]))
    assert not torch.allclose(latents, other)


@pytest.mark.filterwarnings("ignore:.*were (cut|encoded)")
def test_many_samples_are_of_prompts_in_turn(zoo, tmp_path, tiny_t5):
    """Encoded on another device, where numbers round otherwise, they are the same prompts."""
    encoded = encode_prompts(PROMPTS.splitlines(), Reading(str(tiny_t5), 9, lowercases=True), CPU)
    flags = {**zoo["tiny-PixArt"], "prompts": tmp_path / "prompts.safetensors"}
    config = SampleConfig(
        model="tiny-PixArt", num_samples=5, shard_size=2, num_sampling_steps=2,
        out=tmp_path / "out", **flags,
    )  # fmt: skip
    save_prompts(flags["prompts"], encoded)
    sample_many(config)
    made = np.load(config.out / "samples_5x64x64x3.npz")["arr_0"]
    backbone, decode = load_backbone(config, CPU), load_decoder(config, CPU)

    def difference(*labels: int) -> np.ndarray:
        """From the images of these prompts."""
        draws = Draws(config.seed, "sample")
        pixels = eight_bit(decode(sample(backbone, None, draws, range(5), torch.tensor(labels))))
        apart = np.abs(made - pixels.permute(0, 2, 3, 1).numpy().astype(int))
        return apart.max(axis=(1, 2, 3))

    assert difference(0, 1, 2, 0, 1).max() <= 1  # rounded otherwise in a batch
    assert difference(1, 2, 0, 1, 2).min() > 1

    save_prompts(flags["prompts"], replace(encoded, tokens=1.001 * encoded.tokens))
    (config.out / "shards" / "000002.json").unlink()
    sample_many(config)
    assert difference(0, 1, 2, 0, 1).max() <= 3
    with pytest.raises(HarmonicaError, match=r"--out .* holds images made with --text-encoder"):
        sample_many(replace(config, text_encoder="another"))
    for other in ({"texts": ("a dog", *encoded.texts[1:])}, {"encoder": "another"}):
        save_prompts(flags["prompts"], replace(encoded, **other))
        with pytest.raises(HarmonicaError, match=r"--out .* holds images made with --prompts"):
            sample_many(config)


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_images_need_not_be_square(zoo, tmp_path):
    flags = {"height": 96, "width": 48, **zoo["tiny-PixArt"]}
    config = SampleConfig(
        model="tiny-PixArt", method="fora", target_cur=0.5, compare=True, repeats=1, num_images=1,
        out=tmp_path, **flags,
    )  # fmt: skip
    config.check()
    sample_and_report(config)
    assert Image.open(tmp_path / "with_fora" / "000000.png").size == (48, 96)
    backbone = load_backbone(config, CPU)
    assert backbone.latent_shape == (4, 12, 6) and backbone.pixels == (96, 48)
    assert backbone.conditions.of(torch.tensor([0])).size.tolist() == [[96, 48]]
    square = load_backbone(replace(config, height=None, width=None), CPU)
    assert square.pixels == (64, 64)
    kind = backbone.costs.kinds.index("mlp")
    assert backbone.costs.macs[kind] * 64 == square.costs.macs[kind] * 72


def test_large_images_are_decoded_in_tiles(zoo, folder, monkeypatch):
    config = BackboneConfig(model="tiny-DiT", **zoo["tiny-DiT"])
    decode = load_decoder(config, CPU)
    latents = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    whole = decode(latents)
    monkeypatch.setattr("harmonica.autoencoder.LARGEST_WHOLE", 8)
    tiled = decode(latents)
    assert whole.shape == tiled.shape == (1, 3, 96, 96)
    # Group norms see a tile only, so tiles are near, not equal.
    assert (whole - tiled).abs().max() > 0 and (whole - tiled).abs().mean() < 0.2


@pytest.mark.parametrize(("named", "side"), [(32, 4), (64, 8), (1024, 8)])
def test_tiles_are_as_large_as_the_autoencoder_says_and_no_larger(named, side, monkeypatch):
    monkeypatch.setattr("harmonica.autoencoder.LARGEST_WHOLE", 8)
    vae, seen = tiny_autoencoder(sample_size=named).eval(), []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    image = Decoder(STABLE_DIFFUSION, vae)(torch.randn(1, 4, 12, 12))
    assert image.shape == (1, 3, 96, 96) and max(seen) == side and len(seen) > 1


def test_latents_are_scaled_as_the_autoencoder_wants(zoo, folder, monkeypatch):
    config = BackboneConfig(model="tiny-DiT", **zoo["tiny-DiT"])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = load_decoder(config, CPU)(x * STABLE_DIFFUSION.scale)
    monkeypatch.setitem(MODELS, "tiny-DiT", replace(MODELS["tiny-DiT"], latent=SDXL))
    with pytest.warns(HarmonicaWarning, match=r"scales latents by 0.18215, --model .* by 0.13025"):
        decode = load_decoder(config, CPU)
    assert torch.allclose(decode(x * SDXL.scale), plain, atol=1e-5)
    assert (STABLE_DIFFUSION.scale, SDXL.scale) == (0.18215, 0.13025)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HarmonicaWarning)
        load_decoder(replace(config, vae=str(folder / "sdxl")), CPU)


@pytest.mark.parametrize(
    ("autoencoder", "said"),
    [
        (partial(tiny_autoencoder, latent_channels=16), "16 channels at 1/8 of the image"),
        (partial(tiny_autoencoder, levels=3), "4 channels at 1/4 of the image"),
    ],
)
def test_an_autoencoder_of_other_latents_is_refused_before_anything_is_sampled(
    autoencoder, said, zoo, tmp_path, monkeypatch
):
    autoencoder().save_pretrained(tmp_path / "vae")
    for module in ("report", "many_samples"):  # a method may sample to choose its schedule
        monkeypatch.setattr(f"harmonica.{module}.choose_plan", None)
    flags = {"model": "tiny-DiT", **zoo["tiny-DiT"], "vae": str(tmp_path)}
    out = tmp_path / "out"
    config = SampleConfig(out=out, method="smoothcache", target_cur=0.3, **flags)
    for start in (
        lambda: sample_and_report(config),
        lambda: sample_many(replace(config, num_samples=4)),
        lambda: Trainer(TrainConfig(results_dir=out, **flags)),
    ):
        with pytest.raises(HarmonicaError, match=f"--vae .* latents of {said}.* use ema or mse"):
            start()


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": 4}, "9 tokens of 16 channels"),
        ({"caption_channels": 32}, "takes 9 of 32"),
    ],
)
def test_prompts_of_another_model_are_refused(changes, named, zoo, tmp_path, tiny_t5, monkeypatch):
    path = tmp_path / "prompts.safetensors"
    save_prompts(path, encode_prompts(["a"], Reading(str(tiny_t5), 9), CPU))
    spec = MODELS["tiny-PixArt"]
    monkeypatch.setitem(
        MODELS, "tiny-PixArt", replace(spec, config=replace(spec.config, **changes))
    )
    config = BackboneConfig(model="tiny-PixArt", **{**zoo["tiny-PixArt"], "prompts": path})
    with pytest.raises(HarmonicaError, match=named):
        load_conditions(config, (64, 64), CPU)


def test_prompts_of_another_reading_are_taken_with_a_warning(zoo, tmp_path, tiny_t5):
    """Of the same shape, as those of mT5 and FLAN-T5 are."""
    path = tmp_path / "prompts.safetensors"
    own = Reading.of(MODELS["tiny-PixArt"], str(tiny_t5))
    flags = {**zoo["tiny-PixArt"], "prompts": path}
    config = BackboneConfig(model="tiny-PixArt", **flags)

    def said(reading: Reading, config: BackboneConfig) -> list[str]:
        prompts = encode_prompts(["A cat"], own, CPU)
        encoder, case = reading.encoder, reading.lowercases
        save_prompts(path, replace(prompts, encoder=encoder, lowercased=case))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", HarmonicaWarning)
            load_conditions(config, (64, 64), CPU)
        return [str(warning.message) for warning in caught]

    assert said(own, config) == []
    flan = replace(own, encoder="google/flan-t5-xxl")
    (doubt,) = said(flan, config)
    assert f"by google/flan-t5-xxl, not by {tiny_t5}" in doubt
    assert said(flan, replace(config, text_encoder="google/flan-t5-xxl")) == []
    (doubt,) = said(replace(own, lowercases=False), config)
    assert "encoded as written, and --model tiny-PixArt wants them in lower case" in doubt
    (doubt,) = said(flan, replace(config, text_encoder=None))
    assert f"not by {T5.repository}" in doubt


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize("name", ["tiny-U-ViT", "tiny-PixArt"])
def test_weights_that_do_not_fit_are_named(name, zoo, folder, tmp_path):
    other = folder / "dit.safetensors"
    with pytest.raises(HarmonicaError, match=r"--ckpt .*dit\.safetensors is not a checkpoint"):
        load_backbone(BackboneConfig(model=name, **{**zoo[name], "ckpt": other}), CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HarmonicaError, match=r"--ckpt .*empty holds no transformer"):
        load_backbone(BackboneConfig(model=name, **{**zoo[name], "ckpt": tmp_path / "empty"}), CPU)


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize(("name", "part"), [("tiny-DiT", "dit"), ("tiny-PixArt", "pixart")])
def test_folders_of_diffusers_are_loaded(name, part, zoo, folder):
    flags = {**zoo[name], "ckpt": folder / part}
    model = load_backbone(BackboneConfig(model=name, **flags), CPU).model
    stored = load_file(folder / part / "transformer" / "diffusion_pytorch_model.safetensors")
    published = model.under_published_names(stored)
    assert len(published) == len(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(value, published[key])


@pytest.mark.parametrize(
    ("name", "part", "changes", "said"),
    [
        ("tiny-DiT", "dit", {"sample_size": 16}, "is of 128 pixels, not of --image-size 64"),
        ("tiny-PixArt", "pixart", {"sample_size": 4}, "is of 32 pixels, not of --image-size 64"),
        ("tiny-PixArt", "pixart", {"sample_size": None}, "does not say a sample_size"),
        ("tiny-PixArt", "pixart", {"interpolation_scale": None}, None),
        ("tiny-PixArt-1024", "pixart", {}, "of 1, and --model tiny-PixArt-1024 2 at"),
        ("tiny-Sigma", "pixart", {}, "of 1, and --model tiny-Sigma 0.5 at --image-size 64"),
    ],
)
def test_folders_of_another_size_are_refused(name, part, changes, said, zoo, folder, tmp_path):
    """alpha-256 and Sigma-256 have weights of the same shapes, and so have sizes of DiT."""
    shutil.copytree(folder / part, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    find = partial(weights_file, tmp_path, MODELS[name], 64)
    if said is None:
        assert find().is_file()
    else:
        with pytest.raises(HarmonicaError, match=f"--ckpt .* {said}"):
            find()


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("DiT")])
def test_published_models_have_the_published_sizes(name):
    spec = MODELS[name]
    assert set(spec.sizes) == set(spec.weights)
    for size in spec.sizes:
        with torch.device("meta"):
            model = create_model(name, image_size=size)
        assert model.config.input_size == size // spec.latent_factor
        time = torch.zeros(1, device="meta")
        with torch.device("meta"):
            y = model.placeholder(1)
            x = torch.empty(1, model.config.in_channels, *[model.config.input_size] * 2)
        out = model(x, time, y)
        assert out.shape == (1, model.config.out_channels, *x.shape[2:])
    if "alpha" in name:
        micro = {size for size, of in spec.sizes.items() if of.get("has_micro_conditions")}
        assert micro == {1024}


def test_an_image_of_2048_pixels_fits_24_gigabytes():
    """Half precision, guidance, 2.2x: cached values at their peak, weights, and a step's own."""
    with torch.device("meta"):
        model = create_model("PixArt-Sigma-XL/2", image_size=2048)
    costs = measure_costs(model)
    schedule = random_schedule(20, costs, Budget(speedup=2.2), seed=0)
    peak = plan_replay(schedule.compute, costs.names).peak_values
    stream = 2 * model.num_tokens * model.config.hidden_size  # numbers, of both guidance halves
    weights = sum(parameter.numel() for parameter in model.parameters())
    # The stream and a sum in float32; queries, keys, values and what they are made of; an MLP.
    step = stream * (2 * 4 + 5 * 2 + 2 * 4 * 2)
    assert round(2 * stream * peak / 1e9, 1) == 4.5 and round(2 * weights / 1e9, 1) == 1.2
    assert 2 * stream * peak + 2 * weights + step < 24e9


def fill(model: torch.nn.Module) -> None:
    """Give a model on the meta device tensors of the device at hand, in place."""
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype)
                module._parameters[key] = torch.nn.Parameter(empty, requires_grad=False)
        for key, value in module._buffers.items():
            module._buffers[key] = torch.empty(value.shape, dtype=value.dtype)


def test_decoding_an_image_of_2048_pixels_fits_24_gigabytes():
    """In float32, a tile of 1024 pixels at a time, beside the model's weights in half precision.

    Tensors are fake: they have a type and a size, and nothing is computed.
    """
    with torch.device("meta"):
        model = create_model("PixArt-Sigma-XL/2", image_size=2048)
        vae = tiny_autoencoder(
            block_out_channels=(128, 256, 512, 512), norm_num_groups=32, layers_per_block=2,
            sample_size=1024,
        )  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(vae)
        vae.enable_tiling()
        side = vae.tile_latent_min_size
        with Peak() as peak:
            Decoder(SDXL, vae)(torch.empty(1, 4, side, side))
    assert side == LARGEST_WHOLE == 128
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    assert (round(peak.bytes / 1e9, 1), round(weights / 1e9, 1)) == (3.2, 0.3)
    # Whoever writes out the attention of the middle, which has a token for every latent pixel.
    attention = 3 * 4 * side**4
    others = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert max(peak.bytes, attention) + weights + others < 24e9


def test_training_on_the_final_image_fits_24_gigabytes():
    """DiT-XL/2 at 256, T = 20, half reused, bf16, four images with guidance, checkpoints of steps.

    Tensors are fake: they have a type and a size, and nothing is computed.
    """
    sampler, steps = create_sampler("ddim", 20), 20
    with torch.device("meta"):
        model = create_model("DiT-XL/2").requires_grad_(False).eval()
    reduce_precision(model, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(model)
        branches = len(model.branch_names)
        batch = Trajectories(
            model, sampler, Guidance(1.5), torch.zeros(4, dtype=torch.long),
            torch.randn(4, 4, 32, 32),
        )  # fmt: skip
        rollout = Rollout(np.ones((steps, branches), bool), LastValue())
        decisions = torch.ones(steps, branches, requires_grad=True)
        positions = rollout.positions(batch, rollout.start(batch), decisions)
        next(positions), next(positions)  # the beginning; after the first step, which decides none
        own = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
        saved = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            position = next(positions)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # A value that is reused takes no more room than where it was computed.
    values = sum(value.nbytes for ((_, value),) in position.histories)
    cached = values * (1 + (steps - 1) / 2)
    # A step that computes everything again; gradients of the cache before and after it.
    step = sum(size for key, size in saved.items() if key not in own) + 2 * values
    sizes = [round(size / 1e9, 1) for size in (weights, cached, step)]
    assert sizes == [1.4, 2.8, pytest.approx(2.4, abs=0.3)]
    assert weights + cached + step < 24e9


REFUSED = [
    ({"model": "PixArt-alpha-XL/2", "image_size": 300}, "--image-size 300"),
    ({"model": "U-ViT-H/2", "image_size": 512}, "--image-size 512"),
    ({"model": "PixArt-alpha-XL/2", "num_classes": 3}, "--num-classes"),
    ({"model": "PixArt-alpha-XL/2", "width": 300}, "--width 300 is not a multiple of 16; use 288"),
    ({"model": "DiT-XL/2", "height": 256}, "--height 256"),
    ({"model": "PixArt-alpha-XL/2", "prompts": "a", "prompt": "b"}, "--prompts and --prompt"),
    ({"model": "DiT-XL/2", "prompt": "a cat"}, "--prompt is for"),
    ({"model": "PixArt-alpha-XL/2", "prompt": "a c\udce4t"}, "--prompt is not text"),
    ({"model": "U-ViT-S/2", "cfg_scale": 1.4}, "--cfg-scale 1.4"),
    ({"model": "U-ViT-H/2", "sampler": "iddpm"}, "--sampler iddpm"),
    ({"model": "PixArt-Sigma-XL/2", "vae": "ema"}, "--vae ema"),
    ({"model": "DiT-XL/2", "vae": "sdxl"}, "--vae sdxl"),
]


def test_learning_to_cache_takes_no_prompts():
    config = TrainConfig(model="PixArt-alpha-XL/2", method="learning-to-cache", data="images")
    with pytest.raises(HarmonicaError, match="takes prompts"):
        config.check()


def test_learning_to_cache_of_a_model_without_classes(zoo, labelled_images, tmp_path):
    config = TrainConfig(
        model="tiny-U-ViT-S", method="learning-to-cache", data=str(labelled_images), max_steps=2,
        global_batch_size=2, target_cur=0.2, results_dir=tmp_path, **zoo["tiny-U-ViT-S"],
    )  # fmt: skip
    config.check()
    assert load_router(Trainer(config).run().path).schedule.cur > 0


@pytest.mark.parametrize(("values", "named"), REFUSED)
def test_what_a_model_does_not_take_is_refused(values, named):
    with pytest.raises(HarmonicaError, match=named):
        BackboneConfig(**values).check()


def test_defaults_are_those_of_the_family():
    def resolved(name):
        config = BackboneConfig(model=name)
        config.check()
        names = ("sampler", "num_sampling_steps", "cfg_scale", "vae")
        return tuple(getattr(config, field) for field in names)

    assert resolved("DiT-XL/2") == ("ddim", 20, 1.5, "ema")
    assert resolved("DiT-Ti/4") == ("ddim", 20, 1.5, None)
    assert resolved("U-ViT-H/2") == ("dpm-solver", 20, 1.4, "ema")
    assert resolved("PixArt-alpha-XL/2") == ("dpm-solver++", 20, 4.5, "ema")
    assert resolved("PixArt-Sigma-XL/2") == ("dpm-solver++-euler", 20, 4.5, "sdxl")
    assert MODELS["DiT-XL/2"].guided_channels == 3
    assert MODELS["U-ViT-H/2"].guided_channels is None


@pytest.mark.parametrize(
    ("model", "sampler", "steps"),
    [
        ("PixArt-alpha-XL/2", "sa-solver", 25),
        ("PixArt-alpha-XL/2", "iddpm", 100),
        ("PixArt-alpha-XL/2", "ddim", 20),
        ("PixArt-Sigma-XL/2", "sa-solver", 25),
        ("U-ViT-H/2", "dpm-solver-3", 50),
        ("DiT-XL/2", "iddpm", 20),
    ],
)
def test_a_sampler_brings_the_number_of_steps_that_it_was_published_with(model, sampler, steps):
    assert BackboneConfig(model=model, sampler=sampler).num_sampling_steps == steps
    chosen = BackboneConfig(model=model, sampler=sampler, num_sampling_steps=7)
    assert chosen.num_sampling_steps == 7


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_pixart_is_guided_as_its_samplers_do(zoo):
    """Its IDDPM, which is that of DiT, guides three channels; its other samplers all four."""
    for sampler, channels in (("iddpm", 3), ("dpm-solver++", None), ("sa-solver", None)):
        config = BackboneConfig(model="tiny-PixArt", sampler=sampler, **zoo["tiny-PixArt"])
        assert load_backbone(config, CPU).guidance == Guidance(4.5, channels)
    everywhere = replace(config, sampler="iddpm", guide_all_channels=True)
    assert load_backbone(everywhere, CPU).guidance == Guidance(4.5, None)


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_a_text_encoder_is_gone_before_the_model_is_there(zoo, monkeypatch):
    order = []

    def watch(name, original):
        def watched(*arguments, **options):
            order.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(f"harmonica.backbone.{name}", watched)

    watch("load_conditions", load_conditions)
    watch("create_model", create_model)
    load_backbone(BackboneConfig(model="tiny-PixArt", **zoo["tiny-PixArt"]), CPU)
    assert order == ["load_conditions", "create_model"]


@pytest.mark.parametrize(
    ("flags", "labels"),
    [({"num_images": 2}, None), ({"classes": (5, 3, 5)}, (5, 3, 5)), ({}, tuple(range(16)))],
)
def test_sampling_encodes_only_the_prompts_it_draws(flags, labels, zoo, tmp_path, monkeypatch):
    """Of the project's list; and the images are those of the whole list encoded."""
    captions = [f"cap {letter}" for letter in "abcdefghijklmnopqrst"]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    monkeypatch.setattr("harmonica.conditions.BUNDLED_PROMPTS", tmp_path / "captions.txt")
    monkeypatch.setattr("harmonica.downloads.CACHE", tmp_path / "cache")
    own = {key: value for key, value in zoo["tiny-PixArt"].items() if key != "prompts"}
    config = SampleConfig(model="tiny-PixArt", repeats=1, **flags, **own)
    wanted = choose_labels(config, 20)
    if labels is None:
        assert torch.equal(wanted, Draws(config.seed, "sample").labels(range(2), 20))
    else:
        assert tuple(wanted.tolist()) == labels
    choose = partial(choose_labels, config)
    few = load_backbone(config, CPU, wanted=choose).conditions
    assert few.count == 20
    assert set(few.encoded.texts) == {captions[label] for label in wanted.tolist()}
    whole = load_backbone(config, CPU).conditions
    assert len(whole.encoded.texts) == 20
    a, b = few.of(wanted), whole.of(wanted)
    assert torch.equal(a.mask, b.mask)
    assert torch.allclose(a.embeddings.float(), b.embeddings.float(), atol=2e-3)
    # What is encoded already is taken as it is.
    assert len(load_backbone(config, CPU, wanted=choose).conditions.encoded.texts) == 20


def test_a_method_that_looks_at_samples_of_its_own_finds_their_prompts(zoo, tmp_path, monkeypatch):
    captions = "".join(f"cap {letter}\n" for letter in "abcdefghijklmnopqrst")
    (tmp_path / "captions.txt").write_text(captions)
    monkeypatch.setattr("harmonica.conditions.BUNDLED_PROMPTS", tmp_path / "captions.txt")
    own = {key: value for key, value in zoo["tiny-PixArt"].items() if key != "prompts"}
    config = SampleConfig(
        model="tiny-PixArt", method="smoothcache", target_cur=0.25, num_sampling_steps=3,
        num_images=1, repeats=1, out=tmp_path / "samples", **own,
    )  # fmt: skip
    assert "with smoothcache" in sample_and_report(config)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Of the Hub's client; empty, and without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def kept_by_the_hub(cache, part: HubFolder, name: str, content: bytes):
    """A file as the Hub's client keeps it: named by its content, linked from a revision."""
    root = cache / f"models--{part.repository.replace('/', '--')}"
    blob = root / "blobs" / hashlib.sha256(content).hexdigest()
    link = root / "snapshots" / "revision" / name
    for path in (blob, link, root / "refs" / "main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(blob)
    (root / "refs" / "main").write_text("revision")
    # Its client also keeps what else the repository has.
    sizes = {name: len(content), "other/weights.bin": 9000}
    files = {file: {"size": size, "blob_id": "0" * 40} for file, size in sizes.items()}
    (root / "trees").mkdir(exist_ok=True)
    (root / "trees" / "revision.json").write_text(json.dumps({"format_version": 1, "files": files}))
    return blob


def test_parts_of_the_hub_stay_as_they_were_fetched(hub_cache, monkeypatch):
    """Nothing asks whether there is a newer revision, and what has changed is noticed."""
    part = HubFolder("someone/vae", "vae", ("vae/*",), size=1000, arguments="some")
    blob = kept_by_the_hub(hub_cache, part, "vae/weights.safetensors", bytes(1000))
    with monkeypatch.context() as alone:
        alone.setattr("harmonica.hub.fetch_part", None)
        folder = part_folder(part)
    assert folder.name == "revision" and (folder / "vae" / "weights.safetensors").is_file()
    blob.write_bytes(bytes(999) + b"x")
    said = r"not what the Hub announced.*`download\.py some`"
    for find in (part_folder, fetch_part):
        with pytest.raises(HarmonicaError, match=said):
            find(part)


def test_parts_that_cannot_be_fetched_name_the_command(hub_cache, monkeypatch):
    for name, known in (("ema", "DiT-XL/2"), ("mse", "U-ViT-H/2"), ("sdxl", "PixArt-Sigma-XL/2")):
        with pytest.raises(HarmonicaError, match=rf"could not be fetched.*`download\.py {name}`"):
            load_decoder(BackboneConfig(model=known, vae=name), CPU)
    with pytest.raises(HarmonicaError, match=r"could not be fetched.*`download\.py t5`"):
        encode_prompts(["a cat"], Reading(T5.repository, 120), CPU)
    # One that is there, but not whole.
    kept_by_the_hub(hub_cache, T5, "tokenizer/tokenizer_config.json", b"{}")
    monkeypatch.setattr(hub, "fetch_part", lambda part: hub_cache)
    with pytest.raises(HarmonicaError, match=r"--text-encoder .*`download\.py t5`"):
        encode_prompts(["a cat"], Reading(T5.repository, 120), CPU)
    with pytest.raises(HarmonicaError, match=r"--vae ema cannot be loaded.*`download\.py ema`"):
        load_decoder(BackboneConfig(model="DiT-XL/2", vae="ema"), CPU)
    with pytest.raises(HarmonicaError, match=r"--vae .*absent cannot be loaded.*pass ema, mse or"):
        load_decoder(BackboneConfig(model="DiT-XL/2", vae=str(hub_cache / "absent")), CPU)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda weights, config: weights.pop(CONV), f"{CONV} is missing"),
        (lambda weights, config: weights.update(more=torch.ones(1)), "more is unexpected"),
        (lambda weights, config: weights.update({CONV: torch.ones(3)}), "expected shape"),
        (lambda weights, config: config["up_block_types"].pop(), "up_blocks.* is unexpected"),
        (lambda weights, config: config.update(block_out_channels="x"), ""),
        (lambda weights, config: config.update(block_out_channels=[]), "out of range"),
        (lambda weights, config: config.update(norm_num_groups=0), "by zero"),
        (lambda weights, config: config.update(latent_channels=None), "NoneType"),
    ],
)
def test_an_autoencoder_that_is_not_whole_is_refused(folder, tmp_path, spoil, reason):
    vae = shutil.copytree(folder / "pipeline", tmp_path / "pipeline") / "vae"
    path, weights = weights_of(vae)
    config = json.loads((vae / "config.json").read_text())
    spoil(weights, config)
    save_file(weights, path, {"format": "pt"})
    (vae / "config.json").write_text(json.dumps(config))
    with pytest.raises(HarmonicaError, match=f"--vae .*pipeline cannot be loaded .*{reason}"):
        load_decoder(BackboneConfig(model="DiT-XL/2", vae=str(tmp_path / "pipeline")), CPU)


def test_an_autoencoder_of_older_names_is_whole(folder, tmp_path):
    """Attention of the published ones is named as early versions of diffusers named it."""
    shutil.copytree(folder / "pipeline", tmp_path / "pipeline")
    path, weights = weights_of(tmp_path / "pipeline" / "vae")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in older.items():
        weights = {name.replace(f".{new}.", f".{old}."): w for name, w in weights.items()}
    save_file(weights, path, {"format": "pt"})
    hashes = [
        load_decoder(BackboneConfig(model="DiT-XL/2", vae=str(at / "pipeline")), CPU).weights_hash()
        for at in (folder, tmp_path)
    ]
    assert hashes[0] == hashes[1] and "proj_attn" in str(weights.keys())


def weights_of(vae: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = vae / "diffusion_pytorch_model.safetensors"
    return path, load_file(path)


def test_the_first_reason_is_told(monkeypatch):
    """Not that of the second place where a text encoder is looked for."""

    class Nowhere:
        def from_pretrained(source, subfolder=None, **_):
            raise OSError("no network" if subfolder else "no config.json at the top")

    monkeypatch.setattr("transformers.AutoTokenizer", Nowhere)
    with pytest.raises(HarmonicaError, match=r"--text-encoder some/t5 .*\(no network\)"):
        encode_prompts(["a cat"], Reading("some/t5", 120), CPU)
