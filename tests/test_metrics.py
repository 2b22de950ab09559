"""Metrics: formulas against closed forms, features against the networks, files as they come."""

import hashlib
import io
import json
import shutil
import tracemalloc
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import alexnet

from harmonica.errors import HarmonicaError
from harmonica.evaluation import evaluate_and_report
from harmonica.files import Npz
from harmonica.metrics import distribution
from harmonica.metrics.classifier import CifarClassifier, CifarFeatures
from harmonica.metrics.clip import ClipScore
from harmonica.metrics.collect import collect
from harmonica.metrics.config import EvaluateConfig
from harmonica.metrics.distribution import (
    Moments,
    all_the_same,
    frechet_distance,
    inception_score,
    precision_recall,
)
from harmonica.metrics.extractor import load_extractor
from harmonica.metrics.images import Batch, FolderImages, NpzImages
from harmonica.metrics.inception import Inception
from harmonica.metrics.paired import load_lpips, paired_rows
from harmonica.metrics.reference import open_reference, save_reference
from harmonica.metrics.weights import METRIC_WEIGHTS
from harmonica.prompts import read_prompts
from models import WeightSource

CPU = torch.device("cpu")


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """(count, size, size, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def as_batch(images: np.ndarray) -> Batch:
    return Batch(torch.from_numpy(images).permute(0, 3, 1, 2))


# Formulas.


def test_frechet_distance_of_gaussians_in_closed_form():
    """Commuting covariances: |mu1 - mu2|^2 + sum (sqrt(a) - sqrt(b))^2."""
    rotation = np.linalg.qr(seeded(5, 5).numpy().astype(np.float64))[0]
    a, b = np.array([1.0, 4, 9, 16, 25]), np.array([4.0, 4, 1, 0, 100])
    first = Moments(np.zeros(5), rotation @ np.diag(a) @ rotation.T, None)
    second = Moments(np.full(5, 2.0), rotation @ np.diag(b) @ rotation.T, None)
    expected = 5 * 4 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_features_against_scipy():
    samples, reference = seeded(60, 8), 1.3 * seeded(90, 8, seed=1) + 0.2
    means = [features.double().mean(0).numpy() for features in (samples, reference)]
    covariances = [np.cov(features.double().numpy().T) for features in (samples, reference)]
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(
        covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real
    )
    found = frechet_distance(Moments.of(samples, "a"), Moments.of(reference, "b"))
    assert found == pytest.approx(expected, rel=1e-8)


def test_what_is_no_covariance_gives_no_distance():
    with pytest.raises(HarmonicaError, match="no covariance"):
        Moments.of(seeded(1, 3), "the set of samples")
    negative = Moments(np.zeros(2), -np.eye(2), None)
    with pytest.raises(HarmonicaError, match="covariance of features"):
        frechet_distance(negative, Moments(np.zeros(2), np.zeros((2, 2)), None))
    empty = Moments(np.full(2, np.nan), np.eye(2), None)
    with pytest.raises(HarmonicaError, match="nan"):
        frechet_distance(empty, Moments(np.zeros(2), np.eye(2), None))


def test_inception_score_of_certain_and_uncertain_predictions():
    labels = torch.arange(12) % 4
    certain = 100.0 * torch.eye(4)[labels]
    assert inception_score(certain).mean == pytest.approx(4, rel=1e-9)
    assert inception_score(torch.zeros(12, 4)).mean == pytest.approx(1, rel=1e-9)


def test_inception_score_splits_are_contiguous(monkeypatch):
    monkeypatch.setattr(distribution, "SPLIT", 5)
    logits = 2 * seeded(11, 3)

    def direct(part: torch.Tensor) -> float:
        p = part.double().softmax(1)
        return (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()

    score = inception_score(logits)
    parts = [direct(logits[:5]), direct(logits[5:])]  # 11 images: two splits, none left over
    assert score.splits == 2
    assert score.mean == pytest.approx(np.mean(parts), rel=1e-9)
    assert score.std == pytest.approx(np.std(parts), rel=1e-6)
    assert inception_score(logits[:4]).splits == 1
    assert inception_score(logits[:4]).mean == pytest.approx(direct(logits[:4]), rel=1e-9)


def test_precision_and_recall_by_hand():
    """Balls around 0 1 2 3 reach to their third neighbour: 3, 2, 2, 3."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    samples = torch.tensor([[-3.0], [-2.5], [-3.2], [50.0], [5.9], [6.1]])
    precision, recall = precision_recall(samples, reference)
    assert precision == pytest.approx(3 / 6)  # -3, -2.5 and 5.9 are near
    assert recall == pytest.approx(1.0)  # the ball around 50 reaches back over everything
    with pytest.raises(HarmonicaError, match="at least 4 samples and there are 3"):
        precision_recall(samples[:3], reference)
    with pytest.raises(HarmonicaError, match="at least 4 reference images"):
        precision_recall(samples, reference[:3])


def test_precision_and_recall_in_tiles_against_brute_force(monkeypatch):
    monkeypatch.setattr(distribution, "DISTANCE_ROWS", 7)
    samples, reference = seeded(40, 3), 0.6 * seeded(30, 3, seed=1)

    def share_near(points, centres):
        radii = torch.cdist(centres, centres).sort(dim=1).values[:, 3]
        return (torch.cdist(points, centres) <= radii).any(1).double().mean().item()

    expected = share_near(samples, reference), share_near(reference, samples)
    assert expected[0] != expected[1]
    assert precision_recall(samples, reference) == pytest.approx(expected)


def test_images_that_do_not_differ_are_noticed():
    row = seeded(1, 16)
    assert all_the_same(row.repeat(5, 1) * (1 + 1e-7 * seeded(5, 1)))
    assert not all_the_same(seeded(5, 16))


# Networks.


class Untrained(FeatureExtractorInceptionV3):
    """Torch-fidelity's network with the weights it was made with."""

    def load_state_dict(self, *arguments):
        pass


@pytest.fixture(scope="module")
def inception_weights() -> dict[str, torch.Tensor]:
    """A state dict of the right names and shapes, with activations that do not die out."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    buffer.seek(0)
    torch.manual_seed(0)
    network = Untrained("inception", ["2048"], feature_extractor_weights_path=buffer)
    for name, value in network.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value.requires_grad_(False), nonlinearity="relu")
    return network.state_dict()


def test_inception_features_and_their_layout(inception_weights):
    images = as_batch(pictures(2, 40)).images
    extractor = Inception(inception_weights, "", CPU)
    with torch.inference_mode():
        rows = extractor(images)
        again = extractor(images[:1])
    assert rows["pooled"].shape == (2, 2048) and rows["logits"].shape == (2, 1008)
    # Logits have no bias.
    expected = rows["pooled"] @ inception_weights["fc.weight"].T
    assert torch.allclose(rows["logits"], expected, rtol=1e-4, atol=1e-5)
    # The same map, taken another way: what is concatenated begins with it.
    maps = []
    extractor._network.Mixed_6d.register_forward_hook(lambda m, i, output: maps.append(output))
    with torch.inference_mode():
        extractor(images)
    nchw = maps[0][:, :7]
    assert nchw.shape == (2, 7, 17, 17) and rows["spatial"].shape == (2, 2023)
    assert torch.equal(rows["spatial"], nchw.permute(0, 2, 3, 1).reshape(2, -1))
    assert not torch.allclose(rows["spatial"], nchw.reshape(2, -1))
    assert torch.allclose(again["pooled"], rows["pooled"][:1], rtol=1e-4, atol=1e-5)


@pytest.fixture
def inception_file(inception_weights, tmp_path, monkeypatch):
    """The weights in a cache, as if they were the published ones."""
    path = tmp_path / "inception.pth"
    torch.save(inception_weights, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = WeightSource(path.name, ("https://127.0.0.1:9/x",), 1, "inception", digest)
    monkeypatch.setitem(METRIC_WEIGHTS, "inception", source)
    monkeypatch.setattr("harmonica.downloads.CACHE", tmp_path)
    return path


def test_inception_weights_are_checked(inception_file):
    extractor = load_extractor("inception", CPU)
    assert extractor.sha256 == METRIC_WEIGHTS["inception"].sha256
    content = bytearray(inception_file.read_bytes())
    content[-1000] ^= 1
    inception_file.write_bytes(content)
    with pytest.raises(HarmonicaError, match="not the published file"):
        load_extractor("inception", CPU)
    inception_file.unlink()
    with pytest.raises(HarmonicaError) as refused:
        load_extractor("inception", CPU)
    for named in (inception_file.name, str(inception_file.parent), "download.py inception"):
        assert named in str(refused.value)


def test_scores_through_inception_have_plain_names(inception_file, tmp_path):
    np.savez(tmp_path / "a.npz", pictures(5, 40))
    np.savez(tmp_path / "r.npz", pictures(6, 48))
    config = EvaluateConfig(
        samples=tmp_path / "a.npz",
        reference=str(tmp_path / "r.npz"),
        metrics=("is", "recall"),
        out=tmp_path / "out",
    )
    table = evaluate_and_report(config)
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(record["scores"]) == ["IS", "recall"]
    digest = METRIC_WEIGHTS["inception"].sha256
    assert record["extractor"] == {"name": "inception", "sha256": digest}
    assert f"inception, {digest[:16]}" in table
    assert "the samples are 40x40 and --reference is 48x48" in record["warnings"][0]


def test_published_hashes_begin_as_their_file_names_say():
    for source in METRIC_WEIGHTS.values():
        assert source.sha256.startswith(source.file.rsplit("-", 1)[1].removesuffix(".pth"))
        assert len(source.sha256) == 64


@pytest.fixture(scope="module")
def classifier() -> CifarClassifier:
    torch.manual_seed(0)
    network = CifarClassifier()
    with torch.no_grad():
        for _ in range(3):  # running statistics of something
            network(as_batch(pictures(16)).images.float())
    return network


def test_classifier_features_do_not_depend_on_the_batch(classifier):
    extractor = CifarFeatures(classifier, "", CPU)
    images = as_batch(pictures(6)).images
    with torch.inference_mode():
        whole, again = extractor(images), extractor(images)
        parts = [extractor(images[i : i + 1]) for i in range(6)]
    sizes = {"pooled": 128, "spatial": 448, "logits": 10}
    assert {name: value.shape[1] for name, value in whole.items()} == sizes
    assert (extractor.pooled_size, extractor.spatial_size) == (128, 448)
    for name, value in whole.items():
        assert torch.equal(value, again[name])
        assert torch.allclose(
            value, torch.cat([part[name] for part in parts]), rtol=1e-4, atol=1e-4
        )


def test_classifier_spatial_features_are_nhwc(classifier):
    images = as_batch(pictures(2)).images
    with torch.inference_mode():
        spatial = CifarFeatures(classifier, "", CPU)(images)["spatial"]
        _, _, maps = classifier(images.float())
    assert torch.equal(spatial, maps[:, :7].permute(0, 2, 3, 1).reshape(2, -1))


def test_the_classifier_fits_into_five_megabytes():
    assert sum(value.numel() for value in CifarClassifier().parameters()) <= 2_500_000


# Rows from processes.


def test_rows_come_in_order_and_must_be_finite():
    state = PartialState(cpu=True)

    def measure(indices):
        return {"x": torch.tensor([float(i) for i in indices])}

    assert collect(7, 3, measure, state)["x"].tolist() == list(range(7))

    def broken(indices):
        values = torch.zeros(len(indices), 2)
        values[[i == 5 for i in indices], 1] = float("nan")
        return {"pooled": values}

    with pytest.raises(HarmonicaError, match="pooled of image 5 is not finite"):
        collect(7, 3, broken, state)


# Files of images.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_streamed_npz_is_what_numpy_loads(save, tmp_path):
    images, path = pictures(11, 8), tmp_path / "a.npz"
    save(path, images, np.arange(11))
    found = NpzImages(path, "--samples")
    assert len(found) == 11 and found.size == (8, 8)
    for indices in (range(4), range(4, 8), range(8, 11), range(2, 3)):  # also backwards
        expected = np.load(path)["arr_0"][indices.start : indices.stop].transpose(0, 3, 1, 2)
        assert np.array_equal(found.read(indices).images.numpy(), expected)


def test_an_npz_is_not_read_as_a_whole(tmp_path):
    path = tmp_path / "large.npz"
    np.savez(path, np.zeros((400, 128, 128, 3), np.uint8))  # 20 MB
    found = NpzImages(path, "--samples")
    tracemalloc.start()
    for i in range(0, 400, 4):
        found.read(range(i, i + 4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def save_arrays(path, **arrays):
    np.savez(path, **arrays)
    return path


def truncated(path, keep: float):
    np.savez(path, pictures(20))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    return path


def short_member(path):
    """A whole zip archive of an array that ends before its header says."""
    buffer = io.BytesIO()
    np.save(buffer, pictures(4))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-100])
    return path


def test_npz_files_that_hold_no_images_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    images = pictures(4)
    for make, said in (
        (lambda: truncated(path, 0.6), "not a whole npz"),
        (lambda: short_member(path), "shorter or longer"),
        (lambda: path.write_bytes(b"no zip"), "not a whole npz"),
        (lambda: save_arrays(path, arr_0=images.astype(object)), "pickled objects"),
        (lambda: save_arrays(path, arr_0=images.astype(np.float32) / 255), "float32"),
        (lambda: save_arrays(path, arr_0=images.transpose(0, 3, 1, 2).copy()), r"\(4, 3, 32, 32\)"),
        (lambda: save_arrays(path, arr_0=images[0]), r"\(32, 32, 3\)"),
        (lambda: save_arrays(path, arr_0=images[:0]), r"\(0, 32, 32, 3\)"),
        (lambda: save_arrays(path, arr_0=np.asfortranarray(images)), "Fortran"),
        (lambda: save_arrays(path, images=images), "holds no array arr_0, but images"),
    ):
        make()
        with pytest.raises(HarmonicaError, match=f"--samples.*{said}"):
            NpzImages(path, "--samples")
    with pytest.raises(HarmonicaError, match="not a file"):
        NpzImages(tmp_path / "absent.npz", "--samples")


def test_a_damaged_member_is_noticed_when_it_is_read(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, pictures(50))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    path.write_bytes(content)
    found = NpzImages(path, "--samples")
    with pytest.raises(HarmonicaError, match="not a whole npz"):
        found.read(range(50))


def save_folder(folder, images, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}{suffix}")
    return folder


def test_a_folder_holds_what_was_saved(tmp_path):
    images = pictures(5)
    found = FolderImages(save_folder(tmp_path / "a", images), "--samples")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    assert len(found) == 5 and found.size == (32, 32)
    assert torch.equal(found.read(range(1, 4)).images, as_batch(images[1:4]).images)


def test_folders_that_hold_no_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HarmonicaError, match=r"--samples .*empty holds no images"):
        FolderImages(tmp_path / "empty", "--samples")
    folder = save_folder(tmp_path / "mixed", pictures(3))
    Image.fromarray(pictures(1, 16)[0]).save(folder / "0003.png")
    with pytest.raises(HarmonicaError, match=r"0003\.png is 16x16 and 0000\.png 32x32"):
        FolderImages(folder, "--samples").read(range(4))
    (folder / "0003.png").write_bytes((folder / "0000.png").read_bytes()[:200])
    with pytest.raises(HarmonicaError, match=r"0003\.png cannot be read"):
        FolderImages(folder, "--samples").read(range(4))
    Image.fromarray(pictures(1)[0]).convert("RGBA").save(folder / "0003.png")
    with pytest.raises(HarmonicaError, match="mode is RGBA"):
        FolderImages(folder, "--samples").read(range(4))


# Reference sets.


def test_a_saved_reference_comes_back(classifier, tmp_path):
    extractor = CifarFeatures(classifier, "a" * 64, CPU)
    rows = {"pooled": seeded(30, 128), "spatial": seeded(30, 448, seed=1)}
    path = tmp_path / "reference.npz"
    save_reference(path, rows, extractor, 10)
    reference = open_reference(str(path))
    reference.check(extractor)
    assert reference.allows() == ("fid", "sfid", "is", "precision", "recall")
    assert not reference.columns(reference.allows())
    assert np.array_equal(reference.pooled.mean, rows["pooled"].double().numpy().mean(0))
    assert np.allclose(reference.spatial.covariance, np.cov(rows["spatial"].T), atol=1e-5)
    assert reference.pooled.count == 30
    assert torch.allclose(reference.features[[0, -1]], rows["pooled"][[0, -1]], atol=2e-3)
    with pytest.raises(HarmonicaError, match="other weights"):
        reference.check(CifarFeatures(classifier, "b" * 64, CPU))
    with pytest.raises(HarmonicaError, match="128 features and --extractor inception gives 2048"):
        reference.check(Inception)


def test_a_reference_allows_what_it_holds(tmp_path):
    statistics = {"mu": np.zeros(4), "sigma": np.eye(4)}
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    both = ("fid", "is", "precision", "recall")
    for arrays, allowed in (
        (statistics, ("fid", "is")),
        ({**statistics, **spatial}, ("fid", "sfid", "is")),
        # The images beside statistics are a part of the set: no sFID from them.
        ({**statistics, "arr_0": pictures(4)}, both),
        ({"arr_0": pictures(4)}, ("fid", "sfid", "is", "precision", "recall")),
    ):
        reference = open_reference(str(save_arrays(tmp_path / "r.npz", **arrays)))
        assert reference.allows() == allowed
    assert reference.columns(("fid",)) == {"pooled"}
    assert reference.columns(("sfid", "is")) == {"spatial"}
    features = {"pooled": seeded(4, 4), "spatial": seeded(4, 3)}
    complete = replace(reference, pooled=Moments(np.ones(4), np.eye(4), None)).completed(features)
    assert complete.pooled.mean.tolist() == [1, 1, 1, 1]  # the file's own statistics stand
    assert complete.spatial.count == 4 and torch.equal(complete.features, features["pooled"])


def test_references_that_hold_no_statistics_are_refused(tmp_path):
    good = {"mu": np.zeros(4), "sigma": np.eye(4)}
    crooked = np.eye(4)
    crooked[0, 1] = 1.0
    for changed, said in (
        ({"sigma": np.eye(3)}, "no mean and covariance"),
        ({"mu": np.zeros((2, 2))}, "no mean and covariance"),
        ({"mu": np.full(4, np.nan)}, "no mean and covariance"),
        ({"sigma": crooked}, "no mean and covariance"),
        ({"sigma": np.eye(4, dtype=int)}, "no mean and covariance"),
        ({"mu": np.array([None] * 4)}, "pickled objects"),
        ({"mu_s": np.zeros(3)}, "holds no array sigma_s"),
        ({"features": np.zeros(4)}, "no table of numbers"),
    ):
        path = save_arrays(tmp_path / "r.npz", **{**good, **changed})
        with pytest.raises(HarmonicaError, match=f"--reference.*{said}"):
            open_reference(str(path))


# Pairs of images.


def test_psnr_and_ssim_per_image():
    images, others = pictures(3), pictures(3)
    others[1] = np.clip(images[1].astype(int) + np.where(images[1] < 128, 10, -10), 0, 255)
    rows = paired_rows(as_batch(images), as_batch(others.copy()), None)
    assert rows.keys() == {"psnr", "ssim"}
    assert rows["psnr"][0] == 120 and rows["ssim"][0] == pytest.approx(1)
    assert rows["psnr"][1].item() == pytest.approx(-20 * np.log10(10 / 255), rel=1e-5)
    alone = paired_rows(as_batch(images[1:2]), as_batch(others[1:2].copy()), None)
    assert alone["ssim"].item() == pytest.approx(rows["ssim"][1].item(), abs=1e-5)
    assert alone["ssim"] < 0.999


def test_sampled_pairs_have_the_error_of_their_latents():
    batch = as_batch(pictures(2))
    first, second = (replace(batch, latents=seeded(2, 4, 8, 8, seed=seed)) for seed in (0, 1))
    rows = paired_rows(first, second, None)
    expected = (first.latents - second.latents).square().mean((1, 2, 3))
    assert torch.allclose(rows["mse"], expected)


def test_lpips_looks_through_the_weights_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("harmonica.metrics.paired.CACHE", tmp_path)
    assert load_lpips(CPU) is None
    torch.manual_seed(0)
    features = alexnet(weights=None).features.eval()
    path = tmp_path / "alexnet.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = WeightSource(path.name, (), 1, "lpips", digest)
    monkeypatch.setitem(METRIC_WEIGHTS, "lpips", source)
    lpips = load_lpips(CPU)
    assert lpips.sha256 == digest
    images, others = (as_batch(pictures(2, 64, seed)).images / 255 for seed in (0, 1))
    with torch.inference_mode():
        for depth, found in zip((2, 5, 8, 10, 12), lpips._network.net(images), strict=True):
            assert torch.allclose(found, features[:depth](images), atol=1e-6)
        distance, none = lpips(images, others), lpips(images, images)
    assert distance.shape == (2,) and (distance > 0).all() and (none == 0).all()
    monkeypatch.setitem(METRIC_WEIGHTS, "lpips", replace(source, sha256="0" * 64))
    with pytest.raises(HarmonicaError, match="not the published file"):
        load_lpips(CPU)


# Prompts.


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A random CLIP with a vocabulary of letters, as its folder."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    text = {
        **sizes, "vocab_size": len(pieces), "max_position_embeddings": 12,
        "bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1,
    }  # fmt: skip
    vision = {**sizes, "image_size": 24, "patch_size": 8}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    square = {"height": 24, "width": 24}
    images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=square)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_against_a_direct_computation(tiny_clip):
    from transformers import CLIPModel, CLIPProcessor

    prompts = ["a cat", "dogs in rain", "abc", "zebra", "a cat on a mat far away"]
    images = as_batch(pictures(5, 24)).images
    clip = ClipScore(str(tiny_clip), prompts, CPU)
    with torch.inference_mode():
        scores = torch.cat([clip(images[:3], range(3)), clip(images[3:], range(3, 5))])
    model, processor = (kind.from_pretrained(str(tiny_clip)) for kind in (CLIPModel, CLIPProcessor))
    cosines = []
    for image, prompt in zip(images, prompts, strict=True):
        tokens = processor.tokenizer(prompt, truncation=True, max_length=12, return_tensors="pt")
        pixels = processor.image_processor(image, return_tensors="pt")
        with torch.inference_mode():
            text = model.text_projection(model.text_model(**tokens).pooler_output)
            seen = model.visual_projection(model.vision_model(**pixels).pooler_output)
        cosines.append(torch.cosine_similarity(text, seen).item())
    expected = 100 * torch.tensor(cosines).clamp(min=0)
    assert torch.allclose(scores, expected, atol=1e-3)
    assert min(cosines) < 0 < max(cosines)  # both sides of the clamp
    assert clip.truncated == 1


def test_a_clip_that_is_not_whole_is_refused(tiny_clip, tmp_path):
    """What is missing would be random numbers, and the score noise."""
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(HarmonicaError, match=r"--clip-model .*text_projection\.weight is missing"):
        ClipScore(str(folder), ["a"], CPU)
    (folder / "config.json").write_text("[]")
    with pytest.raises(HarmonicaError, match=r"--clip-model .* cannot be loaded"):
        ClipScore(str(folder), ["a"], CPU)


def test_prompts_and_models_that_are_not_there_are_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HarmonicaError, match="UTF-8"):
        read_prompts(path)
    with pytest.raises(HarmonicaError, match=r"--prompts .*absent"):
        read_prompts(tmp_path / "absent")
    with pytest.raises(HarmonicaError) as refused:
        ClipScore(str(tmp_path / "clip"), ["a"], CPU)
    assert "\n" not in str(refused.value) and "--clip-model" in str(refused.value)


def test_npz_members_can_be_listed(tmp_path):
    npz = Npz(save_arrays(tmp_path / "a.npz", mu=np.zeros(3)), "--reference")
    assert "mu" in npz and "sigma" not in npz
    assert npz["mu"].whole().tolist() == [0, 0, 0]
