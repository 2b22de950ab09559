"""Training of the bundled networks: what it leaves behind, and that it resumes."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.distributions import Normal, kl_divergence

from harmonica import network_training
from harmonica.diffusion import TRAIN_STEPS, Diffusion
from harmonica.errors import HarmonicaError
from harmonica.evaluation import evaluate_and_report
from harmonica.files import read_safetensors, read_torch, sha256, write_torch
from harmonica.metrics.classifier import load_classifier
from harmonica.metrics.config import EvaluateConfig
from harmonica.metrics.reference import open_reference
from harmonica.metrics.weights import CLASSIFIER, REFERENCES
from harmonica.network_training import Batches, NetworkConfig, train_network
from models import MODELS

CPU = torch.device("cpu")
# Flags of short trainings.
SHORT = {
    "train_classifier": "--data train --test-data test --epochs 4 --batch-size 12 --lr 0.02 "
    "--neighbours 20",
    "train_backbone": "--data train --epochs 3 --batch-size 12 --warmup 2 --ema-decay 0.8 "
    "--export-every 2 --no-compile",
}
BOTH = pytest.mark.parametrize("name", SHORT)


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch):
    """A backbone that trains in a moment, under the name of the bundled one."""
    spec = MODELS["DiT-Ti/4"]
    config = replace(spec.config, hidden_size=24, depth=1, num_heads=2)
    monkeypatch.setitem(MODELS, "DiT-Ti/4", replace(spec, config=config))


@pytest.fixture
def load(monkeypatch):
    """Makes a module of a file in scripts/, which is no package; the same one within a test."""

    def module(name: str):
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, made)  # where dataclasses look for it
        spec.loader.exec_module(made)
        return made

    return module


@pytest.fixture
def train(load, monkeypatch):
    """Runs one of the scripts, with the short flags and some more."""

    def run(name: str, out: str, *flags: str) -> None:
        words = [f"{name}.py", *SHORT[name].split(), "--out", out, *flags]
        monkeypatch.setattr("sys.argv", words)
        load(name).main()

    return run


@pytest.fixture
def refused(train, capsys):
    """Runs one of the scripts and returns the sentence that it ends with."""

    def run(name: str, out: str, *flags: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            train(name, out, *flags)
        said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert stopped.value.code == 2 and len(said) == 1
        return said[0]

    return run


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """Class folders of noise around three colours, and a working folder of their own."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 6)):
        for label, colour in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200))):
            folder = Path(split) / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                image = (colour + draw.normal(0, 30, (32, 32, 3))).clip(0, 255)
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")


def test_a_classifier_is_trained_exported_and_used(train, load, monkeypatch, capsys):
    train("train_classifier", "out")
    tensors, metadata = read_safetensors(Path("out/cifar10_classifier.safetensors"))
    floating = [value for value in tensors.values() if value.is_floating_point()]
    assert all(value.dtype == torch.float16 for value in floating)
    assert metadata["epochs"] == "4" and metadata["training_images"].startswith("48, sha256")
    # The recorded accuracy is that of the stored weights.
    classifier = load_classifier(Path("out/cifar10_classifier.safetensors")).eval()
    images, labels, _ = load("train_classifier").load_labelled_images("test", 32)
    with torch.inference_mode():
        found = (classifier(images.float())[0].argmax(1) == labels).double().mean().item()
    assert metadata["test_accuracy"] == f"{found:.4f}"
    assert found > 0.6
    assert f"{found:.2%}" in capsys.readouterr().out
    # Statistics are of the training images as evaluate.py sees them.
    reference = open_reference("out/cifar10_reference.npz")
    assert reference.pooled.count == 48 and len(reference.features) == 20
    monkeypatch.setattr(
        "harmonica.metrics.extractor.CLASSIFIER", Path("out/cifar10_classifier.safetensors")
    )
    monkeypatch.setitem(REFERENCES, "cifar10", Path("out/cifar10_reference.npz"))
    evaluate_and_report(EvaluateConfig(samples=Path("train")))
    scores = json.loads(Path("evaluation/evaluation.json").read_text())["scores"]
    assert scores["FID-cifar"] == pytest.approx(0, abs=1e-3)
    assert scores["sFID-cifar"] == pytest.approx(0, abs=1e-2)


def test_the_shipped_classifier_and_reference_belong_together():
    _, metadata = read_safetensors(CLASSIFIER)
    assert float(metadata["test_accuracy"]) >= 0.88
    assert CLASSIFIER.stat().st_size <= 5e6
    assert open_reference("cifar10").extractor_sha256 == sha256(CLASSIFIER)


def test_a_backbone_is_trained_and_exported(train, monkeypatch):
    train("train_backbone", "out")
    weights, _ = read_safetensors(Path("out/weights.safetensors"))
    state = read_torch(Path("out/checkpoint.pt"))
    assert state["step"] == 12
    # What is exported is the average, in half precision.
    assert weights.keys() == state["ema"].keys()
    assert all(torch.equal(weights[name], value.half()) for name, value in state["ema"].items())
    moved = [not torch.equal(value, state["model"][name]) for name, value in state["ema"].items()]
    assert any(moved)
    # One row of ten samples per class.
    width, height = Image.open("out/samples.png").size
    assert width > 3 * height
    record = json.loads(Path("out/metrics.jsonl").read_text())
    assert record["step"] == 12 and math.isfinite(record["mse"] + record["bound"])


def test_a_backbone_starts_from_weights(train, load, monkeypatch):
    monkeypatch.setattr(load("train_backbone"), "export", lambda *_: None)
    train("train_backbone", "first")
    flags = ("--init", "first/checkpoint.pt", "--lr", "0")
    for _ in range(2):  # repeated, the command goes on
        train("train_backbone", "second", *flags)
        first, second = (read_torch(Path(out) / "checkpoint.pt") for out in ("first", "second"))
        for name, value in first["ema"].items():
            assert torch.equal(second["model"][name], value)


@BOTH
def test_an_interrupted_training_resumes_where_it_was(name, train, load, monkeypatch):
    monkeypatch.setattr(load(name), "export", lambda *_: 0.0)
    train(name, "whole", "--epochs", "2")
    write, written = network_training.write_torch, []

    def stop_after_the_first(path, state):
        write(path, state)
        written.append(state["step"])
        raise KeyboardInterrupt

    monkeypatch.setattr(network_training, "write_torch", stop_after_the_first)
    with pytest.raises(SystemExit):
        train(name, "parts", "--epochs", "2", "--save-every", "5")
    monkeypatch.setattr(network_training, "write_torch", write)
    assert written == [5]
    train(name, "parts", "--epochs", "2")
    whole, parts = (read_torch(Path(out) / "checkpoint.pt") for out in ("whole", "parts"))
    for part in {"model", "ema"} & whole.keys():
        assert all(torch.equal(value, parts[part][key]) for key, value in whole[part].items())


@pytest.fixture
def toy():
    """Trains two numbers for some epochs of four updates."""

    def run(images: torch.Tensor | None = None, **options) -> None:
        if images is None:
            images = torch.arange(48, dtype=torch.uint8).reshape(16, 3, 1, 1)
        config = NetworkConfig(**{"out": Path("out"), "epochs": 1, "batch_size": 4, **options})
        model = torch.nn.Linear(3, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)

        def update(step):
            loss = model(batches(step)[0].flatten(1)).square().mean()
            loss.backward()
            optimizer.step()
            return {"loss": loss}

        batches = Batches(images, torch.zeros(16), config.batch_size, config.seed)
        parts = {"model": model, "optimizer": optimizer}
        train_network(config, batches, parts, update, log_every=4)

    return run


def test_a_run_goes_on_only_as_it_began(toy):
    toy()
    path = Path("out/checkpoint.pt")
    before = sha256(path)
    for changes, named in (
        ({"lr": 0.5}, "--lr 0.001"),
        ({"seed": 1}, "--seed 0"),
        ({"images": torch.zeros(16, 3, 1, 1, dtype=torch.uint8)}, "other images or labels"),
    ):
        with pytest.raises(HarmonicaError, match=f"--out out was trained with {named}"):
            toy(**changes)
    assert sha256(path) == before
    # Images may lie elsewhere, and the run may become longer.
    toy(data="elsewhere", epochs=3, save_every=2)
    assert read_torch(path)["step"] == 12
    lines = Path("out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]


def test_a_checkpoint_that_does_not_fit_is_refused(toy):
    toy()
    path = Path("out/checkpoint.pt")
    state = read_torch(path)
    options = {name: value for name, value in state["options"].items() if name != "lr"}
    for damaged, named in (
        ({**state, "model": {}}, "does not fit"),
        ({name: value for name, value in state.items() if name != "step"}, "does not fit"),
        ({**state, "options": options}, "not of this command"),
        ({"model": state["model"]}, "not of this command"),
    ):
        write_torch(path, damaged)
        with pytest.raises(HarmonicaError, match=rf"checkpoint.pt .*{named}.*--out"):
            toy()
    path.write_bytes(b"nothing")
    with pytest.raises(HarmonicaError, match=r"checkpoint.pt"):
        toy()


@BOTH
def test_flags_that_cannot_work_are_refused(name, refused):
    Path("file").write_text("mine")
    for flags in (("--lr", "nan"), ("--lr", "-1"), ("--epochs", "0"), ("--batch-size", "49")):
        assert " ".join(flags) in refused(name, "out", *flags)
    assert "--out file" in refused(name, "file")
    assert "--out file/below" in refused(name, "file/below")
    assert not Path("out").exists() and Path("file").read_text() == "mine"


def test_flags_of_one_script_are_refused_too(refused):
    for flags in (("--ema-decay", "2.0"), ("--warmup", "0"), ("--init", "absent")):
        assert " ".join(flags) in refused("train_backbone", "out", *flags)
    Path("test/class2").rename("test/class9")
    assert "--test-data test" in refused("train_classifier", "out")


def test_batches_are_a_function_of_the_step(load):
    images, labels, _ = load("train_classifier").load_labelled_images("train", 32)
    batches = Batches(images, labels, 12, seed=0)
    assert batches.per_epoch == 4
    epoch = [batches(step) for step in range(4)]
    assert sorted(torch.cat([y for _, y, _ in epoch]).tolist()) == sorted(labels.tolist())
    again, _, draw = batches(2)
    assert torch.equal(again, epoch[2][0])
    assert torch.equal(torch.rand(3, generator=draw), torch.rand(3, generator=epoch[2][2]))
    assert not torch.equal(batches(4)[0], epoch[0][0])


def test_learning_rates_rise_and_fall(load):
    one_cycle = load("train_classifier").one_cycle
    rates = [one_cycle(step, 100, 0.4) for step in range(100)]
    assert max(rates) == rates[24] == 0.4 and rates[0] == pytest.approx(0.016)
    assert rates[-1] < 1e-3 and sorted(rates[25:], reverse=True) == rates[25:]
    learning_rate = load("train_backbone").learning_rate
    rates = [learning_rate(step, 100, 0.4, 10) for step in range(100)]
    assert max(rates) == rates[9] == rates[10] == 0.4 and rates[0] == pytest.approx(0.04)
    assert rates[-1] < 1e-3 and sorted(rates[10:], reverse=True) == rates[10:]


def test_noised_batches_cover_times_and_drop_labels(load):
    images, labels = torch.full((1000, 3, 2, 2), 255.0), torch.zeros(1000, dtype=torch.long)
    with_noise = load("train_backbone").with_noise
    x0, y, t, noise = with_noise(images, labels, torch.Generator().manual_seed(0), null=7)
    assert torch.equal(x0, torch.ones_like(x0))
    assert torch.equal(t, torch.arange(1000))  # one per stratum
    assert 60 < (y == 7).sum() < 140 and ((y == 7) | (y == 0)).all()
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_the_hybrid_loss_is_the_divergence_of_posteriors(load):
    """Ho et al. (2020), eq. 5 to 7, with the variance of Nichol & Dhariwal (2021), eq. 15."""
    loss = load("train_backbone").HybridLoss(Diffusion.respaced(TRAIN_STEPS), CPU)
    draw = torch.Generator().manual_seed(0)
    x0 = torch.rand((1, 3, 4, 4), generator=draw) * 1.9 - 0.95
    noise, eps, v = torch.randn((3, 1, 3, 4, 4), generator=draw)
    betas = torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64)
    bars = (1 - betas).cumprod(0)
    for step in (3, 400, 999):
        t, beta, bar, before = torch.tensor([step]), betas[step], bars[step], bars[step - 1]
        xt = loss.add_noise(x0, t, noise)
        expected = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
        torch.testing.assert_close(xt, expected, rtol=1e-5, atol=1e-5)
        true_variance = (1 - before) / (1 - bar) * beta
        fraction = (v.double() + 1) / 2
        variance = (fraction * beta.log() + (1 - fraction) * true_variance.log()).exp()

        def mean(clean, xt=xt, beta=beta, bar=bar, before=before):
            weighted = before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * xt
            return weighted.double() / (1 - bar)

        predicted = (xt - (1 - bar).sqrt() * eps) / bar.sqrt()
        kl = kl_divergence(
            Normal(mean(x0), true_variance.sqrt()), Normal(mean(predicted), variance.sqrt())
        )
        mse, bound = loss(torch.cat([eps, v], dim=1), x0, xt, t, noise)
        assert mse.item() == pytest.approx((eps - noise).square().mean().item(), rel=1e-5)
        assert bound.item() == pytest.approx(kl.mean().item() / math.log(2), rel=1e-3)


def test_the_last_step_of_the_hybrid_loss_is_a_likelihood_of_pixels(load):
    loss = load("train_backbone").HybridLoss(Diffusion.respaced(TRAIN_STEPS), CPU)
    x0 = torch.tensor([-1.0, 0.2, 1.0]).reshape(1, 3, 1, 1)
    t, noise, v = torch.tensor([0]), torch.full((1, 3, 1, 1), 0.5), torch.ones(1, 3, 1, 1)
    xt = loss.add_noise(x0, t, noise)
    _, bound = loss(torch.cat([noise + 0.3, v], dim=1), x0, xt, t, noise)
    # The predicted noise is 0.3 off, so the mean of x0 is; v = 1 takes the larger variance.
    off = Normal(x0.double() - 0.3 * (1e-4 / (1 - 1e-4)) ** 0.5, 1e-4**0.5)
    inside = off.cdf(x0 + 1 / 255) - off.cdf(x0 - 1 / 255)
    inside[0, 0], inside[0, 2] = off.cdf(x0 + 1 / 255)[0, 0], 1 - off.cdf(x0 - 1 / 255)[0, 2]
    assert bound.item() == pytest.approx(-inside.log2().mean().item(), rel=1e-3)
    # The noise is learned by its own error alone: the bound moves the variance.
    output = torch.cat([noise + 0.3, v], dim=1).requires_grad_()
    loss(output, x0, xt, t, noise)[1].backward()
    assert output.grad[:, :3].abs().max() == 0 and output.grad[:, 3:].abs().max() > 0
