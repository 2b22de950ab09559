"""Many samples: the same files whatever the processes, batches and accidents on the way."""

import json
import os
import shutil
import signal
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harmonica import commands, many_samples
from harmonica.errors import HarmonicaError, Interrupted
from harmonica.files import Npz, sha256
from harmonica.lock import held
from harmonica.many_samples import sample_many
from harmonica.sample_config import SampleConfig
from harmonica.shards import Origin, ShardFolder, divide

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


def test_samples_are_in_order_with_classes_in_turn(made):
    images = Npz(made / NAME, "--samples")["arr_0"]
    assert images.shape == (10, 32, 32, 3) and images.dtype == np.uint8
    for index, image in enumerate(images.whole()):
        with Image.open(made / "images" / f"{index:06d}.png") as picture:
            assert (np.asarray(picture) == image).all()
    assert len({image.tobytes() for image in images.whole()}) == 10
    with np.load(made / NAME, allow_pickle=False) as file:
        assert (file["arr_0"] == images.whole()).all()


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
    sample_many(replace(FEW, out=out, batch_size=7))
    after = states(out)
    assert {name: digest for name, (digest, _) in after.items()} == {
        name: digest for name, (digest, _) in before.items()
    }
    # A whole folder is left alone.
    sample_many(replace(FEW, out=out))
    assert states(out) == after
    faults.add("shard, picture or npz deleted, cut, replaced", 6)


def test_a_signal_ends_it_between_batches_and_it_goes_on(made, tmp_path, monkeypatch, faults):
    out, config = tmp_path / "samples", replace(FEW, out=tmp_path / "samples", png=False)
    after = many_samples.Work._after

    def interrupted(self, bar, number):
        if len(self.checked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, bar, number)

    with monkeypatch.context() as patched:
        patched.setattr(many_samples.Work, "_after", interrupted)
        with pytest.raises(Interrupted, match=r"6 of 10 images .* run the same command again"):
            sample_many(config)
    assert not (out / NAME).exists()
    monkeypatch.setattr("socket.socket", None)  # nothing is fetched: everything is there
    sample_many(config)
    assert sha256(out / NAME) == sha256(made / NAME)
    faults.add("SIGTERM while sampling, then no network", 1)


def test_more_samples_are_added_to_fewer(made, tmp_path):
    out = tmp_path / "samples"
    sample_many(replace(FEW, out=out, num_samples=4))
    sample_many(replace(FEW, out=out))
    assert sha256(out / NAME) == sha256(made / NAME)
    assert (out / "samples_4x32x32x3.npz").is_file()


def test_other_images_and_other_files_are_refused(made, tmp_path):
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
