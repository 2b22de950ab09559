"""evaluate.py: from images or a router to a table, on one process and on two, and its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import free_port, run_command
from PIL import Image
from safetensors.torch import save_file

from harmonica.backbone import load_backbone
from harmonica.baselines.fixed import fora
from harmonica.errors import HarmonicaError
from harmonica.evaluation import evaluate_and_report
from harmonica.files import sha256
from harmonica.metrics.classifier import CifarClassifier, CifarFeatures, load_classifier
from harmonica.metrics.collect import collect
from harmonica.metrics.config import EvaluateConfig
from harmonica.metrics.images import NpzImages
from harmonica.metrics.reference import save_reference
from harmonica.metrics.weights import REFERENCES
from harmonica.schedule import Schedule

SET_SCORES = ["FID-cifar", "sFID-cifar", "IS-cifar", "precision-cifar", "recall-cifar"]


def pictures(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth random images, (count, size, size, 3) uint8."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    images = torch.nn.functional.interpolate(noise, size, mode="bilinear") * 255
    return images.permute(0, 2, 3, 1).to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A folder with an untrained classifier, and statistics of its features of 40 images."""
    folder = tmp_path_factory.mktemp("bundle")
    torch.manual_seed(0)
    classifier = CifarClassifier()
    images = torch.from_numpy(pictures(40, seed=7)).permute(0, 3, 1, 2)
    classifier(images.float())  # running statistics of something
    save_file(classifier.state_dict(), folder / "classifier.safetensors")
    extractor = CifarFeatures(
        load_classifier(folder / "classifier.safetensors"), digest(folder), torch.device("cpu")
    )
    rows = collect(
        len(images), 16, lambda i: extractor(images[i.start : i.stop]), PartialState(cpu=True)
    )
    save_reference(folder / "reference.npz", rows, extractor, 20)
    return folder


def digest(folder: Path) -> str:
    return sha256(folder / "classifier.safetensors")


@pytest.fixture(autouse=True)
def bundled(bundle, tmp_path, monkeypatch):
    """Tests run in a folder of their own, and the project comes with the untrained classifier."""
    monkeypatch.setattr("harmonica.metrics.extractor.CLASSIFIER", bundle / "classifier.safetensors")
    monkeypatch.setitem(REFERENCES, "cifar10", bundle / "reference.npz")
    monkeypatch.chdir(tmp_path)


def evaluate(**flags) -> tuple[dict, str]:
    """The record and the printed table of one run."""
    out = flags.pop("out", Path("evaluation"))
    config = EvaluateConfig(out=out, **flags)
    config.check()
    table = evaluate_and_report(config)
    return json.loads((out / "evaluation.json").read_text()), table


def save_npz(name: str, images: np.ndarray) -> Path:
    np.savez(name, images)
    return Path(name)


def save_folder(name: str, images: np.ndarray) -> Path:
    Path(name).mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(Path(name) / f"{i:04d}.png")
    return Path(name)


def schedule_file(steps: int, cur: float) -> Path:
    """Of the bundled backbone; every branch of the last steps reused."""
    costs = load_backbone(EvaluateConfig(num_sampling_steps=steps), torch.device("cpu")).costs
    compute = np.ones((steps, len(costs.names)), dtype=bool)
    compute[steps - round(steps * cur) :] = False
    Schedule(compute, costs).save(Path("schedule.json"))
    return Path("schedule.json")


# What comes out.


def test_npz_and_folder_of_the_same_images_score_alike():
    images = pictures(12)
    first, table = evaluate(samples=save_npz("a.npz", images))
    second, _ = evaluate(samples=save_folder("b", images), batch_size=5)
    assert list(first["scores"]) == SET_SCORES
    assert first["scores"] == pytest.approx(second["scores"], rel=1e-3, abs=1e-3)
    again, _ = evaluate(samples=Path("a.npz"))
    assert again["scores"] == first["scores"]
    for name in SET_SCORES:
        assert name in table


def test_the_record_says_what_was_measured_with_what(bundle):
    record, table = evaluate(samples=save_npz("a.npz", pictures(12)))
    assert record["count"] == 12 and record["size"] == [32, 32]
    assert record["extractor"] == {"name": "cifar", "sha256": digest(bundle)}
    assert record["reference"]["name"] == "cifar10" and len(record["reference"]["sha256"]) == 64
    assert record["samples"]["name"] == "a.npz" and len(record["samples"]["sha256"]) == 64
    assert {"torch", "torch-fidelity", "torchmetrics"} <= record["versions"].keys()
    assert record["weights_hash"] is None and record["config"]["samples"] == "a.npz"
    assert digest(bundle)[:16] in table


def test_images_of_the_reference_itself_are_at_no_distance():
    save_npz("a.npz", pictures(300))
    record, _ = evaluate(samples=Path("a.npz"), reference="a.npz", extractor="cifar")
    assert record["scores"]["FID-cifar"] == pytest.approx(0, abs=1e-3)
    assert record["scores"]["sFID-cifar"] == pytest.approx(0, abs=1e-3)
    assert record["scores"]["precision-cifar"] == record["scores"]["recall-cifar"] == 1
    brighter = np.clip(pictures(300).astype(int) + 60, 0, 255).astype(np.uint8)
    changed, _ = evaluate(samples=save_npz("b.npz", brighter), reference="a.npz")
    assert changed["extractor"]["name"] == "cifar"  # for images of the bundled backbone's size
    assert changed["scores"]["FID-cifar"] > 10 * record["scores"]["FID-cifar"]


def test_few_and_equal_images_are_warned_about():
    record, table = evaluate(samples=save_npz("a.npz", pictures(12)))
    said = "\n".join(record["warnings"])
    for part in (
        "FID-cifar from 12 samples for 128 features",
        "sFID-cifar from 12 samples for 448 features",
        "FID-cifar from 40 reference images for 128 features",
        "IS-cifar depends on the size of its splits, which is 12 images here",
    ):
        assert part in said and part in table
    assert "look the same" not in said
    constant, _ = evaluate(samples=save_npz("b.npz", np.full((12, 32, 32, 3), 9, np.uint8)))
    assert any("all samples look the same" in line for line in constant["warnings"])
    save_npz("large.npz", pictures(8, 40))
    other, _ = evaluate(samples=Path("large.npz"), against=Path("large.npz"), out=Path("second"))
    assert other["scores"].keys() == {"PSNR", "SSIM"}
    assert other["left_out"][0].startswith("FID, sFID, IS, precision, recall: no --reference")


def test_metrics_can_be_chosen():
    record, _ = evaluate(samples=save_npz("a.npz", pictures(6)), metrics=("recall", "is"))
    assert list(record["scores"]) == ["IS-cifar", "recall-cifar"]
    np.savez("r.npz", mu=np.zeros(128), sigma=np.eye(128))
    record, table = evaluate(samples=Path("a.npz"), reference="r.npz")
    assert list(record["scores"]) == ["FID-cifar", "IS-cifar"]
    assert "left out: sFID, precision, recall: not in --reference r.npz" in table


def test_only_the_first_images_are_taken():
    save_npz("a.npz", pictures(12))
    save_npz("b.npz", pictures(5))
    first, _ = evaluate(samples=Path("a.npz"), num_images=5, against=Path("b.npz"))
    second, _ = evaluate(samples=Path("b.npz"), against=Path("b.npz"))
    assert first["scores"] == pytest.approx(second["scores"])
    assert first["scores"]["PSNR"] == 120 and len(first["per_image"]["PSNR"]) == 5


# Sampling.


def test_a_router_is_held_against_uncached_images():
    path = schedule_file(3, 2 / 3)
    flags = {"num_sampling_steps": 3, "num_images": 6, "batch_size": 4}
    record, table = evaluate(path=path, **flags)
    paired = ["MSE on the model's scale", "PSNR", "SSIM"]
    assert list(record["scores"]) == [*SET_SCORES, *paired]
    assert record["scores"]["MSE on the model's scale"] > 0
    assert record["scores"]["SSIM"] < 1
    assert record["schedule"]["cur"] == pytest.approx(2 / 3)
    assert record["weights_hash"] in table and "LPIPS: alexnet" in table
    full, _ = evaluate(path=schedule_file(3, 0), **flags)
    assert [full["scores"][name] for name in paired] == [0, 120, pytest.approx(1)]
    uncached, _ = evaluate(uncached=True, **flags)
    assert list(uncached["scores"]) == SET_SCORES and uncached["schedule"] is None
    assert uncached["scores"] == {name: full["scores"][name] for name in SET_SCORES}
    assert uncached["scores"]["FID-cifar"] != record["scores"]["FID-cifar"]


def test_a_method_without_training_is_judged_like_a_router():
    flags = {"num_sampling_steps": 4, "num_images": 4, "target_speedup": 2.0}
    record, table = evaluate(method="fora", **flags)
    assert record["schedule"]["cur"] == 0.5 and record["setting"] == "N = 2"
    assert record["scores"]["MSE on the model's scale"] > 0
    costs = load_backbone(EvaluateConfig(num_sampling_steps=4), torch.device("cpu")).costs
    fora(4, costs, 2).save(Path("fora.json"))
    replayed, _ = evaluate(path=Path("fora.json"), num_sampling_steps=4, num_images=4)
    assert replayed["scores"] == record["scores"]
    fewer, table = evaluate(method="fewer-steps", **flags)
    assert fewer["schedule"] is None and fewer["setting"] == "ddim, T = 2"
    assert "ddim, T = 2" in table and "2.00x" in table
    assert fewer["scores"]["MSE on the model's scale"] > 0


def test_a_sampled_image_that_is_not_finite_is_refused():
    state = load_backbone(EvaluateConfig(), torch.device("cpu")).model.state_dict()
    state["final_layer.linear.bias"][:] = float("nan")
    save_file(state, "broken.safetensors")
    with pytest.raises(HarmonicaError, match=r"sampled image 0 .* is not finite"):
        evaluate(uncached=True, ckpt=Path("broken.safetensors"), num_sampling_steps=2, num_images=2)


# Processes.

TWO_PROCESSES = """
import sys
from pathlib import Path

import torch
from accelerate import PartialState

import harmonica.metrics.extractor as extractor
from harmonica.commands import evaluate
from harmonica.errors import HarmonicaError
from harmonica.metrics.collect import collect
from harmonica.metrics.weights import REFERENCES

bundle = Path(sys.argv.pop(1))
extractor.CLASSIFIER = bundle / "classifier.safetensors"
REFERENCES["cifar10"] = bundle / "reference.npz"
state = PartialState(cpu=True)


def broken(indices):
    if indices.start == 3:  # a batch of the second process
        raise HarmonicaError("image 4 cannot be read")
    return {"x": torch.arange(indices.start, indices.stop)}


try:
    collect(7, 3, broken, state)
except HarmonicaError as error:
    Path(f"refused{state.process_index}").write_text(str(error))
alone = collect(2, 3, lambda i: {"x": torch.arange(i.start, i.stop)}, state)  # for one process
Path(f"alone{state.process_index}").write_text(str(alone["x"].tolist()))
evaluate()
"""


@pytest.mark.slow
def test_two_processes_measure_like_one(bundle, monkeypatch):
    images = pictures(11)
    flags = {"samples": save_npz("a.npz", images), "batch_size": 3}
    against = np.clip(images.astype(int) + np.arange(11)[:, None, None, None], 0, 255)
    flags["against"] = save_npz("b.npz", against.astype(np.uint8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun has it
    one, table = evaluate(**flags)
    torch.set_num_threads(threads)
    Path("two_processes.py").write_text(TWO_PROCESSES)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
            "--master_addr=127.0.0.1", f"--master_port={free_port()}", "two_processes.py", bundle,
            "--samples", "a.npz", "--against", "b.npz", "--batch-size", "3", "--out", "two",
        ],
        capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = json.loads(Path("two/evaluation.json").read_text())
    assert two["processes"] == 2 and one["processes"] == 1
    # A matrix root rounds as the number of LAPACK's threads would have it.
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-6)
    assert two["per_image"] == one["per_image"]
    assert done.stdout.count("FID-cifar  ") == table.count("FID-cifar  ")  # only one speaks
    for process in (0, 1):
        assert Path(f"refused{process}").read_text() == "image 4 cannot be read"
        assert Path(f"alone{process}").read_text() == "[0, 1]"


# As a command, and what it refuses.


def test_the_command_prints_a_table():
    save_npz("a.npz", pictures(4, 40))
    done = run_command("evaluate.py", "--samples", "a.npz", "--against", "a.npz", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "SSIM" in done.stdout and "evaluation/evaluation.json" in done.stdout


def files(tmp_path) -> None:
    save_npz("a.npz", pictures(6))
    save_npz("b.npz", pictures(5))
    save_npz("three.npz", pictures(3))
    save_npz("one.npz", pictures(1))
    save_npz("large.npz", pictures(6, 40))
    save_npz("small.npz", pictures(6, 16))
    save_folder("f", pictures(6))
    save_folder("g", pictures(6))
    Path("g/0005.png").rename("g/0009.png")
    Path("empty").mkdir()
    np.savez("r128.npz", mu=np.zeros(128), sigma=np.eye(128))
    np.savez("r2048.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez("r5.npz", mu=np.zeros(5), sigma=np.eye(5))
    Path("prompts.txt").write_text("a cat\n" * 5)
    Path("foreign").mkdir()
    Path("foreign/thesis.tex").write_text("mine")


REFUSALS = [
    ({}, "--samples"),
    ({"samples": "a.npz", "uncached": True}, "--samples and --uncached exclude"),
    ({"samples": "a.npz", "threshold": 0.5}, "--threshold"),
    ({"uncached": True, "method": "fora"}, "--method fora needs a cost"),
    ({"uncached": True, "target_cur": 0.5}, "--target-cur 0.5 is for a --method"),
    ({"path": "a", "method": "fora", "target_cur": 0.5}, "--path and --method exclude"),
    ({"samples": "absent.npz"}, "--samples absent.npz is not a file"),
    ({"samples": "empty"}, "--samples empty holds no images"),
    ({"samples": "a.npz", "num_images": 7}, "--num-images 7 is more than the 6"),
    ({"samples": "a.npz", "reference": "absent"}, "--reference absent"),
    ({"samples": "a.npz", "reference": "empty"}, "--reference empty"),
    ({"samples": "a.npz", "reference": "r5.npz"}, "5 features"),
    ({"samples": "a.npz", "reference": "r2048.npz", "extractor": "cifar"}, "2048 features"),
    ({"samples": "a.npz", "reference": "r128.npz", "metrics": ("recall",)}, "--metrics recall"),
    ({"samples": "large.npz", "metrics": ("fid",)}, "pass a --reference"),
    ({"samples": "large.npz"}, "pass --reference, --against, --prompts"),
    ({"samples": "large.npz", "reference": "cifar10"}, "the samples are 40x40"),
    ({"samples": "a.npz", "reference": "large.npz"}, "--reference large.npz is 40x40"),
    ({"samples": "three.npz"}, "at least 4 samples and there are 3"),
    ({"samples": "a.npz", "reference": "three.npz"}, "at least 4 reference images and there are 3"),
    ({"samples": "one.npz", "metrics": ("fid",)}, "no covariance"),
    ({"samples": "a.npz", "against": "b.npz"}, "5 images for 6 samples"),
    ({"samples": "b.npz", "against": "a.npz"}, "6 images for 5 samples"),
    ({"samples": "a.npz", "against": "large.npz"}, "images of 40x40"),
    ({"samples": "small.npz", "against": "small.npz"}, "too small"),
    ({"samples": "f", "against": "g"}, "0009 where the samples hold 0005"),
    ({"samples": "a.npz", "prompts": "prompts.txt"}, "5 lines for 6 samples"),
    ({"samples": "b.npz", "prompts": "prompts.txt", "clip_model": "no"}, "--clip-model no"),
    ({"path": "absent"}, "--path absent"),
    ({"samples": "a.npz", "out": "foreign"}, "--out foreign"),
]


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr("harmonica.downloads.CACHE", Path("checkpoints"))


@pytest.mark.parametrize(("flags", "named"), REFUSALS, ids=[named for _, named in REFUSALS])
def test_bad_input_is_refused_in_one_sentence(flags, named, tmp_path, offline):
    files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    names = ("samples", "path", "against", "prompts", "out")
    flags = {name: Path(value) if name in names else value for name, value in flags.items()}
    with pytest.raises(HarmonicaError) as refused:
        evaluate(**flags)
    message = str(refused.value)
    assert named in message and "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_networks_say_where_they_come_from(tmp_path, offline, monkeypatch):
    save_npz("a.npz", pictures(6))
    with pytest.raises(HarmonicaError) as refused:
        evaluate(samples=Path("a.npz"), extractor="inception", metrics=("is",), reference="a.npz")
    for named in ("weights-inception-2015-12-05-6726825d.pth", "checkpoints", "download.py"):
        assert named in str(refused.value)
    monkeypatch.setattr("harmonica.metrics.extractor.CLASSIFIER", tmp_path / "absent.safetensors")
    with pytest.raises(HarmonicaError, match=r"absent\.safetensors.*scripts/train_classifier\.py"):
        evaluate(samples=Path("a.npz"))
    monkeypatch.setitem(REFERENCES, "cifar10", tmp_path / "absent.npz")
    with pytest.raises(HarmonicaError, match=r"absent\.npz.*scripts/train_classifier\.py"):
        evaluate(samples=Path("a.npz"))


def test_a_corrupt_image_is_named_when_it_is_met(tmp_path):
    folder = save_folder("f", pictures(6))
    (folder / "0004.png").write_bytes((folder / "0004.png").read_bytes()[:300])
    with pytest.raises(HarmonicaError, match=r"--samples: f/0004\.png cannot be read"):
        evaluate(samples=folder)
    assert not Path("evaluation").exists()


def test_streaming_is_used_for_npz(monkeypatch):
    """Every batch is read once, none before it is needed."""
    read = []
    original = NpzImages.read
    monkeypatch.setattr(
        NpzImages, "read", lambda self, indices: read.append(indices) or original(self, indices)
    )
    evaluate(samples=save_npz("a.npz", pictures(7)), batch_size=3)
    assert read == [range(3), range(3, 6), range(6, 7)]
