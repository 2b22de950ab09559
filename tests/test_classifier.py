"""Training of the bundled classifier: what it leaves behind, and that it resumes."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from harmonica.evaluation import evaluate_and_report
from harmonica.files import read_safetensors
from harmonica.metrics.classifier import load_classifier
from harmonica.metrics.config import EvaluateConfig
from harmonica.metrics.reference import open_reference
from harmonica.metrics.weights import REFERENCES


@pytest.fixture
def script():
    """scripts/train_classifier.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location(
        "train_classifier", ROOT / "scripts" / "train_classifier.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def run(script, monkeypatch, out: str, *flags: str) -> None:
    words = "--data train --test-data test --epochs 4 --batch-size 12 --lr 0.02 --neighbours 20"
    monkeypatch.setattr("sys.argv", ["train_classifier.py", *words.split(), "--out", out, *flags])
    script.main()


def test_a_classifier_is_trained_exported_and_used(script, monkeypatch, capsys):
    run(script, monkeypatch, "out")
    tensors, metadata = read_safetensors(Path("out/cifar10_classifier.safetensors"))
    floating = [value for value in tensors.values() if value.is_floating_point()]
    assert all(value.dtype == torch.float16 for value in floating)
    assert metadata["epochs"] == "4" and metadata["training_images"].startswith("48, sha256")
    # The recorded accuracy is that of the stored weights.
    classifier = load_classifier(Path("out/cifar10_classifier.safetensors")).eval()
    images, labels, _ = script.load_labelled_images("test", 32)
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


def test_an_interrupted_training_resumes_where_it_was(script, monkeypatch):
    run(script, monkeypatch, "whole")
    write, written = script.write_torch, []

    def stop_after_the_first(path, state):
        write(path, state)
        written.append(state["step"])
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "write_torch", stop_after_the_first)
    with pytest.raises(SystemExit):
        run(script, monkeypatch, "parts", "--save-every", "7")
    monkeypatch.setattr(script, "write_torch", write)
    assert written == [7] and not list(Path("parts").glob("*.safetensors"))
    run(script, monkeypatch, "parts", "--save-every", "7")
    whole, parts = (
        read_safetensors(Path(name) / "cifar10_classifier.safetensors")[0]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_batches_are_a_function_of_the_step(script):
    images, labels, _ = script.load_labelled_images("train", 32)
    batches = script.Batches(images, labels, 12, seed=0)
    assert batches.per_epoch == 4
    epoch = [batches(step) for step in range(4)]
    assert sorted(torch.cat([y for _, y in epoch]).tolist()) == sorted(labels.tolist())
    assert torch.equal(batches(2)[0], epoch[2][0])
    assert not torch.equal(batches(4)[0], epoch[0][0])


def test_learning_rate_rises_and_falls(script):
    rates = [script.one_cycle(step, 100, 0.4) for step in range(100)]
    assert max(rates) == rates[24] == 0.4 and rates[0] == pytest.approx(0.016)
    assert rates[-1] < 1e-3 and sorted(rates[25:], reverse=True) == rates[25:]


def test_other_classes_are_refused(script, monkeypatch, capsys):
    Path("test/class2").rename("test/class9")
    with pytest.raises(SystemExit) as stopped:
        run(script, monkeypatch, "out")
    assert stopped.value.code == 2 and "--test-data test" in capsys.readouterr().err
