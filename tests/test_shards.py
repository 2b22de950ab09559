"""Many samples: the same files whatever the processes, batches and accidents on the way."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import time
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny, tiny_specs
from permissions import read_only
from PIL import Image
from processes import CONTEXT, Group
from safetensors.torch import save
from test_resume import full_disk

from harmonica import commands, many_samples
from harmonica.autoencoder import load_decoder
from harmonica.backbone import load_backbone
from harmonica.errors import HarmonicaError, Interrupted
from harmonica.files import Npz, sha256, write_atomically, write_checked
from harmonica.lock import held
from harmonica.many_samples import Maker, sample_many
from harmonica.randomness import Draws
from harmonica.sample_config import SampleConfig
from harmonica.sampling import eight_bit, sample
from harmonica.shards import DamagedShard, Origin, ShardFolder, divide
from models import MODELS, WeightSource

FEW = SampleConfig(num_sampling_steps=2, cfg_scale=1.0, num_samples=10, shard_size=3, png=True)
NAME = "samples_10x32x32x3.npz"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Ten samples, made in one go."""
    out = tmp_path_factory.mktemp("made") / "samples"
    said = sample_many(replace(FEW, out=out))
    assert str(out / NAME) in said
    return out


def states(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and age of every file."""
    return {
        str(path.relative_to(folder)): (sha256(path), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def of_labels(backbone, labels: list[int]) -> np.ndarray:
    """Image i of label i, as signed numbers, which can be subtracted."""
    draws, indices = Draws(FEW.seed, "sample"), range(len(labels))
    latents = sample(backbone, None, draws, indices, torch.tensor(labels))
    pixels = eight_bit(load_decoder(FEW, torch.device("cpu"))(latents))
    return pixels.permute(0, 2, 3, 1).numpy().astype(int)


def test_samples_are_of_classes_in_turn(made, tmp_path):
    chosen = (3, 5, 7)
    sample_many(replace(FEW, out=tmp_path / "chosen", classes=chosen))
    backbone = load_backbone(FEW, torch.device("cpu"))
    for out, labels in (
        (made, list(range(10))),
        (tmp_path / "chosen", [chosen[i % 3] for i in range(10)]),
    ):
        images = Npz(out / NAME, "--samples")["arr_0"].whole()
        # In a batch they are rounded otherwise.
        assert np.abs(images - of_labels(backbone, labels)).max() <= 1
        others = np.abs(images - of_labels(backbone, [(label + 1) % 10 for label in labels]))
        assert others.max(axis=(1, 2, 3)).min() > 1


def test_samples_are_in_order(made):
    images = Npz(made / NAME, "--samples")["arr_0"]
    assert images.shape == (10, 32, 32, 3) and images.dtype == np.uint8
    for index, image in enumerate(images.whole()):
        with Image.open(made / "images" / f"{index:06d}.png") as picture:
            assert (np.asarray(picture) == image).all()
    assert len({image.tobytes() for image in images.whole()}) == 10
    with np.load(made / NAME, allow_pickle=False) as file:
        assert (file["arr_0"] == images.whole()).all()


def test_the_bar_shows_images_per_second_and_the_time_left(tmp_path, monkeypatch, capsys):
    """However slow it is, and of all images, of which some may be there."""
    out, clock, batch = tmp_path / "samples", [0.0], Maker._batch
    sample_many(replace(FEW, out=out, num_samples=3, png=False))

    def slow(self, indices):
        clock[0] += 100 * len(indices)
        return batch(self, indices)

    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr(Maker, "_batch", slow)
    capsys.readouterr()
    sample_many(replace(FEW, out=out, num_samples=6, png=False))
    shown = re.findall(r"samples: +\d+%\|.*?\| (\d/6 \[.*?\])", capsys.readouterr().err)
    assert shown[0] == "3/6 [00:00<?, ?image/s]"
    assert "4/6 [01:40<03:20,  0.01image/s]" in shown
    assert shown[-1] == "6/6 [05:00<00:00,  0.01image/s]"


def test_what_is_missing_or_damaged_is_made_again_and_nothing_else(made, tmp_path, faults):
    out = tmp_path / "samples"
    shutil.copytree(made, out)
    before = states(out)
    (out / "shards" / "000000.npy").unlink()
    data = (out / "shards" / "000003.npy").read_bytes()
    (out / "shards" / "000003.npy").write_bytes(data[:-1])
    (out / "shards" / "000006.npy").write_bytes(data)  # another shard in its place
    (out / "shards" / "000009.json").write_text("{")
    picture = out / "images" / "000001.png"
    picture.write_bytes(picture.read_bytes()[:-5])
    (out / NAME).write_bytes(b"PK")
    faults.add("shard, picture or npz deleted, cut, replaced", 6)
    sample_many(replace(FEW, out=out, batch_size=7))
    after = states(out)
    assert {name: digest for name, (digest, _) in after.items()} == {
        name: digest for name, (digest, _) in before.items()
    }
    # A whole folder is left alone.
    sample_many(replace(FEW, out=out))
    assert states(out) == after


def slowly() -> None:
    """The second process makes an image in a third of a second."""
    from harmonica.many_samples import Maker

    batch = Maker._batch

    def slow(self, indices):
        time.sleep(float(os.environ["RANK"]) / 3)
        return batch(self, indices)

    Maker._batch = slow


def test_pictures_of_another_process_have_to_be_there(tmp_path):
    folder, shard = ShardFolder(tmp_path / "out", Origin({}, "weights", None)), divide(4, 2)[1]
    folder.make()
    folder.write(shard, np.zeros((2, 4, 4, 3), np.uint8))
    folder.write_pictures(shard)
    for thorough in (False, True):
        assert folder.is_done(shard, True, thorough)
    folder.picture(shard.start).unlink()
    for thorough in (False, True):
        assert not folder.is_done(shard, True, thorough) and folder.is_done(shard, False, thorough)


def test_damage_in_the_part_of_another_process_is_mended(made, tmp_path, monkeypatch, faults):
    """By that one, while the main process waits; or by the main one, if that one is gone."""
    out = tmp_path / "samples"
    shutil.copytree(made, out)

    def damage():
        for name in (NAME, "shards/000003.npy", "shards/000009.npy"):
            (out / name).write_bytes((out / name).read_bytes()[:-1])
        faults.add("shard, picture or npz deleted, cut, replaced", 3)

    damage()
    arguments = ["--num-sampling-steps", 2, "--cfg-scale", 1, "--num-samples", 10, "--png"]
    arguments += ["--shard-size", 3, "--out", "samples"]
    group = Group("sample", *arguments, folder=tmp_path, fault=slowly)
    assert group.wait() == [0, 0], group.said()
    assert sha256(out / NAME) == sha256(made / NAME)

    damage()
    # A process was killed while it wrote pictures.
    (out / "shards" / "000003.png.json").unlink()
    (out / "images" / ".000004.png.0123abcd.tmp").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    sample_many(replace(FEW, out=out))
    assert sha256(out / NAME) == sha256(made / NAME)
    assert not list(out.rglob("*.tmp"))


def at_work(claims: Path, seconds: float, ready) -> None:
    """A process at the first shard that shows life, by a clock that goes backwards."""
    with claims.open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
        ready.set()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            os.utime(claims, (0, end - time.monotonic()))
            time.sleep(0.1)
        time.sleep(60 if seconds == 0 else 0)


@contextlib.contextmanager
def another_process(out: Path, seconds: float):
    """For so long it is at work; none: it does not answer."""
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=at_work, args=(out / "shards" / ".claims", seconds, ready))
    process.start()
    ready.wait(60)
    yield
    process.kill()
    process.join()


def test_a_slow_process_is_waited_for_and_a_silent_one_is_not(made, tmp_path, monkeypatch, faults):
    out = tmp_path / "samples"
    shutil.copytree(made, out)
    monkeypatch.setattr(many_samples, "POLL_S", 0.1)
    (out / "shards" / "000000.npy").unlink()
    config = replace(FEW, out=out, timeout=1)
    with (
        another_process(out, 0),
        pytest.raises(HarmonicaError, match=r"no image was made for 1 s: .*raise --timeout"),
    ):
        faults.add("a process that does not answer")
        sample_many(config)
    with another_process(out, 2):
        faults.add("clock going backwards")
        sample_many(config)
    assert sha256(out / NAME) == sha256(made / NAME)


def test_a_folder_that_another_process_begins_meanwhile_is_its_own(tmp_path, monkeypatch):
    folder, listed = ShardFolder(tmp_path / "new", Origin({}, "weights", None)), os.scandir
    folder.root.mkdir()

    def late(path):
        if Path(path) == folder.root:
            monkeypatch.undo()
            folder.make()
        return listed(path)

    monkeypatch.setattr("os.scandir", late)
    monkeypatch.setattr("os.listdir", lambda path: [entry.name for entry in late(path)])
    folder.refuse_foreign()
    assert (folder.root / "manifest.json").is_file()


def test_a_full_disk_ends_it_and_what_was_made_stands(made, tmp_path, faults):
    out = tmp_path / "samples"
    sample_many(replace(FEW, out=out, num_samples=3, png=False))
    before = states(out)
    faults.add("disk full")
    with (
        full_disk(),
        pytest.raises(HarmonicaError, match=r"cannot write .*000003.npy: .*make"),
    ):
        sample_many(replace(FEW, out=out))
    after = states(out)
    assert before.items() <= after.items() and not list(out.rglob("*.tmp"))
    with full_disk(0), pytest.raises(HarmonicaError, match=r"cannot write .*000003.npy: "):
        sample_many(replace(FEW, out=out))
    sample_many(replace(FEW, out=out))
    assert sha256(out / NAME) == sha256(made / NAME)


def test_a_folder_that_has_become_read_only_is_refused(made, tmp_path, faults):
    """All of it or a part, in which something is missing and something was left unfinished."""
    out = tmp_path / "samples"
    shutil.copytree(made, out)
    shards, images = out / "shards", out / "images"
    for folder, name in ((shards, "000003.npy"), (images, "000004.png"), (out, NAME)):
        (folder / name).write_bytes(b"")
        (folder / f".{name}.0123abcd.tmp").touch()
    for paths, said in {
        (out, out / ".lock"): "--out .* cannot be written to",
        (shards, shards / ".claims"): "--out .* cannot be written to",
        (shards,): "--out .* cannot be written to",
        (images,): "cannot write .*000003.png",
        (out,): f"cannot write .*{NAME}",
    }.items():
        faults.add("a folder that cannot be written to")
        with read_only(*paths), pytest.raises(HarmonicaError, match=rf"{said}.*Permission denied"):
            sample_many(replace(FEW, out=out))
    sample_many(replace(FEW, out=out))
    assert sha256(out / NAME) == sha256(made / NAME) and not list(out.rglob("*.tmp"))


def test_a_folder_that_is_gone_is_said(tmp_path):
    folder = ShardFolder(tmp_path / "out", Origin({}, "weights", None))
    for use in (folder.show_life, folder.life, folder.claim(divide(1, 1)[0]).__enter__):
        with pytest.raises(HarmonicaError, match=r"--out .* cannot be written to \(No such file"):
            use()


def test_a_signal_ends_it_between_batches_and_it_goes_on(made, tmp_path, monkeypatch, faults):
    out, config = tmp_path / "samples", replace(FEW, out=tmp_path / "samples", png=False)
    after = many_samples.Work._after

    def interrupted(self, bar, number):
        if len(self.checked) == 2:
            faults.add("SIGTERM while sampling")
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, bar, number)

    with monkeypatch.context() as patched:
        patched.setattr(many_samples.Work, "_after", interrupted)
        with pytest.raises(Interrupted, match=r"6 of 10 images .* run the same command again"):
            sample_many(config)
    assert not (out / NAME).exists()
    sample_many(config)
    assert sha256(out / NAME) == sha256(made / NAME)


@pytest.fixture
def cached_zoo_model(tmp_path, monkeypatch) -> str:
    """A latent model that was fetched before: its weights, and its autoencoder as the Hub's."""
    from diffusers import AutoencoderKL

    name = "tiny-DiT"
    source = WeightSource("tiny.safetensors", ("https://example.com/tiny.safetensors",), 1)
    monkeypatch.setitem(MODELS, name, replace(tiny_specs()[name], weights={64: source}))
    monkeypatch.setattr("harmonica.downloads.CACHE", tmp_path)
    write_checked(tmp_path / source.file, save(tiny("dit").state_dict()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    repository = tmp_path / "models--stabilityai--sd-vae-ft-ema"
    write_atomically(repository / "refs" / "main", b"0" * 40)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, sample_size=32,
    ).save_pretrained(repository / "snapshots" / ("0" * 40))  # fmt: skip
    return name


def test_what_was_fetched_is_sampled_without_a_network(
    cached_zoo_model, tmp_path, monkeypatch, faults
):
    refused = []

    def refuse(*address, **_):
        refused.append(address)
        raise OSError("the network is down")

    for name in ("socket.getaddrinfo", "socket.socket.connect"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the Hub's attempts
    monkeypatch.setattr("harmonica.hub._size", lambda files: 10**12 * len(files))  # not tiny
    faults.add("network down")
    config = SampleConfig(
        model=cached_zoo_model, num_samples=2, num_sampling_steps=2, out=tmp_path / "samples"
    )
    config.check()
    assert "samples_2x64x64x3.npz" in sample_many(config)
    assert not refused  # nor was anything asked for
    manifest = json.loads((config.out / "manifest.json").read_text())
    assert len(manifest["autoencoder"]) == 16
    with pytest.raises(HarmonicaError, match=r"ema could not be fetched .* run `download.py ema`"):
        shutil.rmtree(tmp_path / "models--stabilityai--sd-vae-ft-ema")
        sample_many(config)


@pytest.fixture
def folder(tmp_path) -> ShardFolder:
    """Three images, as a shard and as PNG files."""
    folder = ShardFolder(tmp_path / "folder", Origin({}, "weights", None))
    folder.make()
    (shard,) = divide(3, 3)
    folder.write(shard, np.zeros((3, 4, 4, 3), np.uint8))
    folder.write_pictures(shard)
    assert folder.is_done(shard, pictures=True)
    return folder


def test_pictures_are_those_of_the_shard(folder):
    """Not of one that was there before."""
    (shard,) = divide(3, 3)
    folder.write(shard, np.ones((3, 4, 4, 3), np.uint8))
    assert folder.is_done(shard, pictures=False)
    assert not any(folder.is_done(shard, pictures=True, thorough=t) for t in (True, False))
    folder.write_pictures(shard)
    assert folder.is_done(shard, pictures=True)
    with Image.open(folder.picture(2)) as picture:
        assert (np.asarray(picture) == 1).all()


@pytest.mark.parametrize(
    "shape", [(2, 4, 4, 3), (3, 4, 4, 5), (3, 4, 4, 1), (3, 0, 4, 3), (3, 4, 3), (0, 4, 4, 3), ()]
)
def test_a_shard_with_a_forged_manifest_is_made_again(folder, shape):
    (shard,) = divide(3, 3)
    folder.write(shard, np.zeros(shape, np.uint8))  # with a hash that fits
    manifest = folder.root / "shards" / "000000.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "shape": [3, 4, 4, 3]}))
    assert not folder.is_done(shard, pictures=False)
    for use in (folder.read, folder.write_pictures):
        with pytest.raises(DamagedShard, match=r"000000\.npy has changed"):
            use(shard)


def test_more_samples_are_added_to_fewer(made, tmp_path):
    out = tmp_path / "samples"
    sample_many(replace(FEW, out=out, num_samples=4))
    sample_many(replace(FEW, out=out))
    assert sha256(out / NAME) == sha256(made / NAME)
    assert (out / "samples_4x32x32x3.npz").is_file()


def test_other_images_and_other_files_are_refused(made, tmp_path, monkeypatch):
    before = states(made)
    for change, named in {
        "seed": (1, "--seed 0, not 1"),
        "num_sampling_steps": (3, "--num-sampling-steps 2, not 3"),
        "cfg_scale": (2.0, "--cfg-scale 1.0, not 2.0"),
        "classes": ((1, 2), "--classes"),
        "shard_size": (4, "--shard-size 3, not 4"),
    }.items():
        value, sentence = named
        with pytest.raises(HarmonicaError, match=sentence):
            sample_many(replace(FEW, out=made, **{change: value}))
    with pytest.raises(HarmonicaError, match="--method None, not fora"):
        sample_many(replace(FEW, out=made, method="fora", target_speedup=1.5))
    monkeypatch.setattr("harmonica.autoencoder.Decoder.weights_hash", lambda _: "another")
    with pytest.raises(HarmonicaError, match="autoencoder None, not another"):
        sample_many(replace(FEW, out=made))
    monkeypatch.undo()
    origin = Origin({"compile": True}, "weights", None, None, "cuda")
    assert origin.difference({"config": {"compile": False}}) == "--compile False, not True"
    assert origin.difference(asdict(origin) | {"device": "cpu"}) == "device cpu, not cuda"
    assert states(made) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(HarmonicaError, match=r"holds files but no manifest.json"):
        sample_many(replace(FEW, out=foreign))
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    # A shard that was brought in from elsewhere.
    mixed = tmp_path / "mixed"
    shutil.copytree(made, mixed)
    manifest = mixed / "shards" / "000003.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "weights": "others"}))
    with pytest.raises(HarmonicaError, match=r"000003.json is a shard of other images"):
        sample_many(replace(FEW, out=mixed))
    with (
        held(made / ".lock", "it"),
        pytest.raises(HarmonicaError, match=rf"in use by process {os.getpid()} "),
    ):
        sample_many(replace(FEW, out=made))


def test_putting_together_takes_the_memory_of_a_shard(tmp_path):
    folder = ShardFolder(tmp_path / "big", Origin({}, "weights", None))
    folder.make()
    shards = divide(128, 2)
    draw = np.random.default_rng(0)
    for shard in shards:
        folder.write(shard, draw.integers(0, 255, (2, 256, 256, 3), dtype=np.uint8))
    tracemalloc.start()
    path = folder.assemble(shards)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 128 * 256 * 256 * 3 > 5 * peak
    with np.load(path, allow_pickle=False) as file:
        assert (file["arr_0"][5] == folder.read(shards[2])[1]).all()


def test_several_processes_want_num_samples(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["sample.py", "--num-images", "2"])
    with pytest.raises(SystemExit):
        commands.sample()
    assert "--num-samples" in capsys.readouterr().err
