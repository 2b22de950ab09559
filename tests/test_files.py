"""Files from anybody: a correct load or one sentence; and that nothing goes past the one door."""

import argparse
import ast
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import random
import re
import signal
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from families import DIT, tiny
from PIL import Image
from safetensors.torch import load, save, save_file

from harmonica.conditions import PromptList
from harmonica.errors import HarmonicaError
from harmonica.files import (
    Npz,
    confined_extraction,
    read_array,
    read_safetensors,
    read_torch,
    read_yaml,
    write_atomically,
)
from harmonica.flops import Costs
from harmonica.labelled_images import LabelledImages
from harmonica.metrics.images import open_images
from harmonica.metrics.reference import open_reference
from harmonica.options import build_parser, read_preset, resolve, to_yaml
from harmonica.prompts import EncodedPrompts, load_prompts, save_prompts
from harmonica.router_file import (
    RouterFile,
    RouterInfo,
    _content_hash,
    load_router,
    load_schedule_file,
    save_router,
)
from harmonica.sample_config import SampleConfig
from harmonica.schedule import Schedule
from harmonica.shards import Origin, ShardFolder, divide
from harmonica.training.checkpoint import unpack
from harmonica.training.config import TrainConfig
from harmonica.training.trainer import Trainer
from harmonica.weights import load_weights
from models.dit import DiT

COSTS = Costs(("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"), (100, 200, 100), 50)
INFO = RouterInfo(
    model="DiT-Ti/4", image_size=32, height=32, width=32, num_classes=10, sampler="ddim", eta=0.0,
    num_sampling_steps=4, timesteps=(9.0, 6.0, 3.0, 0.0), cfg_scale=1.5, guide_all_channels=False,
    threshold=0.1, weights_hash="0" * 16, hyperparameters={"lr": 0.1},
)  # fmt: skip
SHARD = np.zeros((3, 8, 8, 3), np.uint8)
ORIGIN = Origin({"seed": 0}, "weights", None)
# Calls that open or run something; each has one place.
DOORS = {
    "torch.load", "np.load", "numpy.load", "yaml.load", "yaml.safe_load", "yaml.unsafe_load",
    "json.load", "json.loads", "pickle.load", "pickle.loads", "Image.open", "zipfile.ZipFile",
    "safe_open", "load_file", "tarfile.open", "shutil.unpack_archive", "eval", "exec", "os.system",
    "os.popen",
}  # fmt: skip
# Of these, what runs what it reads: that has no place at all.
NOWHERE = {
    "yaml.load", "yaml.unsafe_load", "pickle.load", "pickle.loads", "eval", "exec", "os.system",
    "os.popen",
}  # fmt: skip


def test_every_file_goes_through_one_door():
    """Also: no shell, no extraction, no weights that could be pickles."""
    found, loads, safe = [], 0, 0
    sources = [*ROOT.glob("*.py")]
    for folder in ("harmonica", "models", "scripts"):
        sources += (ROOT / folder).rglob("*.py")
    assert len(sources) > 50
    for source in sources:
        is_door = source.parent == ROOT / "harmonica" / "files"
        for node in ast.walk(ast.parse(source.read_text())):
            loads += isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
            if not isinstance(node, ast.Call):
                continue
            name, words = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            place = f"{source.relative_to(ROOT)}:{node.lineno} {name}"
            if name in NOWHERE:
                found.append(place)
            if name in DOORS and not is_door and "ZipFile(file, 'w'" not in ast.unparse(node):
                found.append(place)
            if name == "torch.load" and ast.unparse(words["weights_only"]) != "True":
                found.append(place)
            if "shell" in words or name.endswith((".extractall", ".extract")):
                found.append(place)
            said = {word: ast.unparse(value) for word, value in words.items()}
            made = [name, *map(ast.unparse, node.args[:1])]  # called, or kept for a call
            if any(of.endswith(".from_pretrained") for of in made):
                safe += 1
                # A processor has no weights, and diffusers' own class no code of its own.
                if not name.endswith("Processor.from_pretrained"):
                    assert said.get("use_safetensors") == "True", place
                if not name.startswith("AutoencoderKL"):
                    assert said.get("trust_remote_code") == "False", place
    assert not found
    assert safe == loads


# Every kind of file, made whole.


def _schedule() -> Schedule:
    compute = np.array([[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=bool)
    return Schedule(compute, COSTS)


def _router(path: Path) -> None:
    save_router(path, RouterFile(torch.randn(4, 3), INFO, _schedule()))


def _published(path: Path) -> None:
    torch.save(
        {
            "routers": {f"{i}.prob": torch.randn(1, 3) for i in range(4)},
            "args": argparse.Namespace(model="DiT-XL/2", image_size=256, cfg_scale=1.5),
        },
        path,
    )


def _statistics(path: Path) -> None:
    np.savez(
        path, mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(3), sigma_s=np.eye(3),
        extractor=np.array("abc"),
    )  # fmt: skip


def _images(path: Path) -> None:
    np.savez_compressed(
        path, arr_0=np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), "uint8")
    )


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros((3, 8, 8, 3), np.uint8))


@functools.cache
def trainer_of(objective: str) -> Trainer:
    """Of a run that has learned a little; no file is written before it runs."""
    ways = {"trajectory": {"predictor": "learned", "held_out_batch_size": 2, "held_out_every": 1}}
    config = TrainConfig(
        objective=objective, num_sampling_steps=3, global_batch_size=2, cfg_scale=1.0, lambda_c=4,
        **ways.get(objective, {}),
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.learner.sweep()
    return trainer


@functools.cache
def checkpoint_of(objective: str) -> bytes:
    return saved(trainer_of(objective)._state())


def _picture(path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, format="PNG")


def _manifest(path: Path) -> None:
    path.write_text(json.dumps(asdict(ORIGIN)))


def _shard_manifest(path: Path) -> None:
    digest = hashlib.sha256(npy(SHARD)).hexdigest()
    record = {**ORIGIN.hashes, "start": 0, "stop": 3, "shape": [3, 8, 8, 3], "sha256": digest}
    path.write_text(json.dumps(record))


def _pictures_record(path: Path) -> None:
    picture = io.BytesIO()
    Image.fromarray(SHARD[0]).save(picture, format="PNG")
    digests = [hashlib.sha256(picture.getvalue()).hexdigest()] * 3
    shard = hashlib.sha256(npy(SHARD)).hexdigest()
    path.write_text(json.dumps({"shard": shard, "pictures": digests}))


def _diffusers(path: Path) -> None:
    """The tiny DiT under diffusers' names."""
    state, renamed = tiny("dit").state_dict(), {}
    del state["pos_embed"]
    names = (
        ("x_embedder.proj", "pos_embed.proj"),
        ("t_embedder.mlp.0", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2"),
        ("y_embedder", "transformer_blocks.0.norm1.emb.class_embedder"),
        ("final_layer.adaLN_modulation.1", "proj_out_1"),
        ("final_layer.linear", "proj_out_2"),
        (r"blocks\.(\d+)\.adaLN_modulation.1", r"transformer_blocks.\1.norm1.linear"),
        (r"blocks\.(\d+)\.attn.proj", r"transformer_blocks.\1.attn1.to_out.0"),
        (r"blocks\.(\d+)\.mlp.fc1", r"transformer_blocks.\1.ff.net.0.proj"),
        (r"blocks\.(\d+)\.mlp.fc2", r"transformer_blocks.\1.ff.net.2"),
    )
    for key, value in state.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", key):
            block, kind = found.groups()
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                renamed[f"transformer_blocks.{block}.attn1.to_{part}.{kind}"] = tensor.clone()
            continue
        for ours, theirs in names:
            key = re.sub(f"^{ours}", theirs, key)
        renamed[key] = value
    save_file(renamed, path)


def _prompts(path: Path) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    tokens = torch.ones(3, 4, dtype=torch.float16)
    null_mask = mask[1].clone()
    prompts = EncodedPrompts(("a", "b"), tokens, mask, tokens[:1].clone(), null_mask, "t5", True)
    save_prompts(path, prompts)


# And what takes it in.


def use_router(path: Path) -> None:
    resolve(SampleConfig, build_parser(SampleConfig, "").parse_args(["--path", str(path)]))
    router = load_router(path)
    schedule = router.to_schedule(COSTS if router.logits.shape[1] == 3 else _costs_of(router))
    use(schedule)


def _costs_of(router: RouterFile) -> Costs:
    count = router.logits.shape[1]
    return Costs(tuple(map(str, range(count))), (1,) * count, 1)


def use(schedule: Schedule) -> None:
    assert schedule.compute[0].all()
    assert 0 <= schedule.cur <= 1 and schedule.theoretical_speedup >= 1
    assert Schedule.from_dict(schedule.to_dict()) == schedule


def use_schedule(path: Path) -> None:
    resolve(SampleConfig, build_parser(SampleConfig, "").parse_args(["--path", str(path)]))
    use(load_schedule_file(path)[0])


def use_statistics(path: Path) -> None:
    open_reference(str(path))


def use_images(path: Path) -> None:
    images = open_images(path, "--samples")
    images.read(range(len(images)))


def use_npy(path: Path) -> None:
    read_array(path)


def use_checkpoint(path: Path, objective: str) -> None:
    """What loads can be learned from."""
    trainer = trainer_of(objective)
    trainer._load_state(unpack(path.read_bytes()))
    trainer.learner.sweep(1)


def use_picture(path: Path) -> None:
    folder = path.parent / "pictures"
    folder.mkdir(exist_ok=True)
    (folder / "0.png").write_bytes(path.read_bytes())
    use_images(folder)


def use_weights(path: Path) -> None:
    load_weights(DiT(DIT), path, "DiT")


def use_prompts(path: Path) -> None:
    prompts = PromptList(load_prompts(path), (8, 8))
    assert prompts.of(torch.tensor([0])).embeddings.isfinite().all() and prompts.content_hash()


def use_preset(path: Path) -> None:
    TrainConfig(**read_preset(TrainConfig, path)).check()


def use_manifest(path: Path) -> None:
    folder = path.parent / "samples"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(path.read_bytes())
    ShardFolder(folder, ORIGIN).make()


def use_of_shard(path: Path, name: str) -> None:
    """A whole shard, but for the file of this name; what is done can be read."""
    folder = ShardFolder(path.parent / "folder", ORIGIN)
    folder.make()
    shard = divide(3, 3)[0]
    folder.write(shard, SHARD)
    folder.write_pictures(shard)
    (folder.root / "shards" / name).write_bytes(path.read_bytes())
    folder.is_done(shard, pictures=True, thorough=False)
    if not folder.is_done(shard, pictures=True):
        raise HarmonicaError("it is made again")
    assert (folder.read(shard) == SHARD).all()


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "router.safetensors": (_router, use_router),
    "published.pt": (_published, use_router),
    "schedule.json": (lambda path: _schedule().save(path, asdict(INFO)), use_schedule),
    "statistics.npz": (_statistics, use_statistics),
    "images.npz": (_images, use_images),
    "images.npy": (_npy, use_npy),
    "checkpoint.pt": (
        lambda path: path.write_bytes(checkpoint_of("sdt")),
        functools.partial(use_checkpoint, objective="sdt"),
    ),
    "trajectory.pt": (
        lambda path: path.write_bytes(checkpoint_of("trajectory")),
        functools.partial(use_checkpoint, objective="trajectory"),
    ),
    "picture.png": (_picture, use_picture),
    "weights.pt": (lambda path: torch.save({"ema": tiny("dit").state_dict()}, path), use_weights),
    "diffusers.safetensors": (_diffusers, use_weights),
    "prompts.safetensors": (_prompts, use_prompts),
    "preset.yaml": (lambda path: path.write_text(to_yaml(TrainConfig())), use_preset),
    "manifest.json": (_manifest, use_manifest),
    "shard.json": (_shard_manifest, functools.partial(use_of_shard, name="000000.json")),
    "pictures.json": (_pictures_record, functools.partial(use_of_shard, name="000000.png.json")),
}

# How they are spoilt.


def spoil_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits, stretches, ends."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data)) if data else 0
        other = draw.randrange(len(data)) if data else 0
        length = draw.choice((1, 2, 4, 8, 64))
        match draw.randrange(7):
            case 0 if data:
                data[place] ^= 1 << draw.randrange(8)
            case 1:
                data[place : place + length] = draw.randbytes(length)
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = draw.randbytes(length)
            case 4:
                data[place : place + length] = data[other : other + length]
            case 5:
                del data[place:]
            case 6:
                extreme = draw.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"9" * 30))
                data[place : place + len(extreme)] = extreme
    return bytes(data)


VALUES = (
    None, True, -1, 0, 2**31, 2**63, 10**30, 10**400, 1e308, float("nan"), float("inf"), "", "x",
    "1" * 5000, "../../x", "!!python/object:os.system", [], [[]], [None], {}, {"a": 1},
    "2001-99-99", "\0", "é",
)  # fmt: skip


def spoil_values(value, draw: random.Random, others: Sequence = VALUES):
    """One value somewhere in a tree becomes one of the others, goes, or is doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        changed, key = dict(value), draw.choice(list(value))
        match draw.randrange(4):
            case 0:
                del changed[key]
            case 1:
                changed[draw.choice(("x", "format", "compute"))] = draw.choice(others)
            case _:
                changed[key] = spoil_values(changed[key], draw, others)
        return changed
    if isinstance(value, list | tuple) and value and draw.random() < 0.9:
        changed, place = list(value), draw.randrange(len(value))
        match draw.randrange(4):
            case 0:
                del changed[place]
            case 1:
                changed.append(changed[place])
            case _:
                changed[place] = spoil_values(changed[place], draw, others)
        return changed
    return draw.choice(others)


def reseal_router(path: Path, draw: random.Random) -> None:
    """A router file whose record was changed by somebody who knows how its hash is made."""
    tensors, metadata = read_safetensors(path)
    part = draw.choice(("info", "schedule"))
    metadata[part] = json.dumps(spoil_values(json.loads(metadata[part]), draw))
    logits = tensors["logits"]
    if draw.random() < 0.3:
        others = (
            logits[:0],
            logits[0],
            logits[:, :2],
            logits.double(),
            logits / 0,
            logits.int(),
            logits.bfloat16(),
            logits.to(torch.complex64),
        )
        logits = draw.choice(others).contiguous()
    hashed = logits.float() if logits.dtype == torch.bfloat16 else logits  # numpy has none
    metadata["content_hash"] = _content_hash(hashed, metadata["schedule"], metadata["info"])
    path.write_bytes(save({"logits": logits}, metadata))
    assert load(path.read_bytes())


def reseal_schedule(path: Path, draw: random.Random) -> None:
    """A schedule that was changed, with the hash that belongs to it where there is one."""
    content = spoil_values(json.loads(path.read_text()), draw)
    path.write_text(json.dumps(content))
    if isinstance(content, dict):
        try:
            Schedule.from_dict({**content, "hash": None})
        except HarmonicaError as error:
            if "does not match" in str(error):
                costs = Costs(tuple(map(str, content["branch_names"])), (1,) * 3, 1)
                rows = [[c == "1" for c in row] for row in content["compute"]]
                digest = Schedule(np.array(rows), costs, content.get("reuses", "branches")).hash
                path.write_text(json.dumps({**content, "hash": digest}))


def reseal_tree(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(spoil_values(json.loads(path.read_text()), draw)))


LONG_NUMBERS = {
    "hexadecimal": "0x" + "f" * 5000,
    "decimal": "9" * 400,
    "binary": "0b" + "1" * 20_000,
    "in base 60": ":".join("1" * 120_000),
    "a fraction in base 60": ":".join("1" * 120_000) + ".5",
    "called one": f"!!int '{':'.join('1' * 120_000)}'",
}


@pytest.mark.parametrize("kind", LONG_NUMBERS)
@pytest.mark.parametrize("place", ["lr: {}", "model: {}", "? {}\n: 1", "classes: [1, {}]"])
def test_long_numbers_are_refused_at_once(tmp_path, kind, place):
    (tmp_path / "preset.yaml").write_text(place.format(LONG_NUMBERS[kind]))
    with within(2), pytest.raises(HarmonicaError, match="a number has more than 100 digits"):
        read_preset(SampleConfig, tmp_path / "preset.yaml")


def reseal_preset(path: Path, draw: random.Random) -> None:
    """A preset with another value, or one that a tag would have a command make."""
    content = read_yaml(path)
    if draw.random() < 0.5:
        path.write_text(json.dumps(spoil_values(content, draw)))
        return
    if draw.random() < 0.3:
        key, value = draw.choice(list(content)), draw.choice(list(LONG_NUMBERS.values()))
        path.write_text(f"{draw.choice((key, '? ' + value))}: {value}\n")
        return
    command = f"touch {path.parent / 'executed'}"
    tag = draw.choice(
        (f'!!python/object/apply:os.system ["{command}"]',
         f'!!python/object/new:os.system ["{command}"]',
         f'!!python/object/apply:subprocess.check_call [[{", ".join(command.split())}]]',
         f'!!python/object/apply:builtins.eval ["__import__(\'os\').system(\'{command}\')"]')
    )  # fmt: skip
    key = draw.choice(list(content))
    rest = {name: value for name, value in content.items() if name != key}
    path.write_text(f"{yaml.safe_dump(rest)}{key}: {tag}\n")


def npy(array: np.ndarray, **header) -> bytes:
    """An array as a file, with something else in its header."""
    buffer = io.BytesIO()
    if array.dtype.hasobject:
        np.save(buffer, array)
        return buffer.getvalue()
    told = {**np.lib.format.header_data_from_array_1_0(array), **header}
    np.lib.format.write_array_header_1_0(buffer, told)
    return buffer.getvalue() + array.tobytes("A")


def reseal_npz(path: Path, draw: random.Random) -> None:
    """Arrays of other shapes and types, in an archive that is whole."""
    with np.load(path) as file:
        arrays = dict(file)
    members = {name: npy(array) for name, array in arrays.items()}
    name = draw.choice(list(arrays))
    array = arrays[name]
    others = (
        (array[..., None], array.astype(object), array.astype("M8[s]"), array.ravel()[:0],
         np.asfortranarray(array), np.array("text"), array.astype(complex), array.astype(">i8"),
         np.full_like(array.astype(float), np.nan))
        if array.dtype.kind != "U"
        else (np.zeros(3), np.array([1, 2]), np.array("\ud800"))
    )  # fmt: skip
    nothing = array.ravel()[:0]
    members[name] = draw.choice(
        (*map(npy, others), npy(nothing, descr="<U0", shape=array.shape),
         npy(nothing, descr="|V0", shape=()), npy(array, descr=("|u1", (array.itemsize,))),
         *(npy(np.array(code, "<u4"), descr="<U1") for code in (0x110000, 2**31, 2**32 - 1)))
    )  # fmt: skip
    if draw.random() < 0.3:
        del members[draw.choice(list(members))]
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(f"{member}.npy", content)


class Malicious:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def rezipped(content: bytes, compression: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    """A zip file again, with other content in some of its members, by the ends of their names."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as earlier,
        zipfile.ZipFile(buffer, "w", compression) as archive,
    ):
        for entry in earlier.infolist():
            stem = entry.filename.rpartition("/")[2].partition(".")[0]
            archive.writestr(entry.filename, members.get(stem, earlier.read(entry)))
    return buffer.getvalue()


def two_faced(content: bytes) -> bytes:
    """A zip file with a second directory, of empty files, where Python looks for the first."""
    end, start = content[-22:], int.from_bytes(content[-6:-2], "little")
    other = bytearray(content[start:-22].replace(b".pkl", b".txt"))
    for found in re.finditer(b"PK\1\2", other):
        other[found.start() + 24 : found.start() + 28] = bytes(4)
    return content[:-22] + other + end


def pickled(program: bytes) -> bytes:
    """A file of PyTorch whose pickle is this program."""
    return rezipped(saved({}), zipfile.ZIP_STORED, data=b"\x80\x02" + program + b".")


def laughs(depth: int) -> list:
    """A list that is short as references and endless without them."""
    found = ["x"]
    for _ in range(depth):
        found = [found] * 9
    return found


ROW = torch.zeros(1 << 20)
# What would take much more memory than it takes on disk, or has no numbers at all.
OVERSIZED = {
    "expanded": (saved({"0.prob": torch.zeros(1).expand(1, 10**13)}), "more comes out"),
    "referred to": (saved({f"{i}.prob": ROW for i in range(200)}), "more comes out"),
    "endless": (saved({"versions": laughs(40)}), "more comes out"),
    "circular": (saved({"a": (circle := [])} | {"b": circle.append(circle)}), "recursion"),
    "deflated": (rezipped(saved({"0.prob": ROW})), "compressed"),
    "two-faced": (two_faced(rezipped(saved({"0.prob": ROW}))), "directory is not where"),
    "constructed": (pickled(b"c__builtin__\nbytearray\n(J\0\0\0\x10tR"), "no part of weights"),
    "built of lists": (pickled(b"ctorch\nFloatTensor\n(]tR"), "no part of weights"),
    "without numbers": (saved({"0.prob": torch.zeros(3, device="meta")}), "no part of weights"),
    "sparse": (saved({"0.prob": torch.zeros(3).to_sparse()}), "no part of weights"),
}


@pytest.mark.parametrize("name", OVERSIZED)
def test_a_pt_file_gives_no_more_than_it_holds(tmp_path, name):
    path, (content, reason) = tmp_path / "router.pt", OVERSIZED[name]
    path.write_bytes(content)
    with within(20), pytest.raises(HarmonicaError, match=f"was not loaded .*{reason}"):
        load_router(path)


def test_a_pt_file_has_no_say_in_what_methods_do(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(pickled(b"ccollections\nOrderedDict\n)R}X\5\0\0\0itemsK\3sb"))
    with pytest.raises(HarmonicaError, match="is missing"):
        load_weights(DiT(DIT), path, "DiT")


def test_what_pytorch_saves_is_read_as_it_was(tmp_path):
    """In both formats, and of training by others."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    rates = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "opt": optimizer.state_dict(),
        "rates": rates.state_dict(),
        "args": argparse.Namespace(lr=0.1, names=["a", "b"]),
        "size": (torch.Size((1, 2)), None, True, b"x"),
    }
    for zipped in (True, False):
        (tmp_path / "state.pt").write_bytes(saved(state, _use_new_zipfile_serialization=zipped))
        found = read_torch(tmp_path / "state.pt")
        assert repr(found["model"]) == repr(dict(state["model"]))
        assert repr(found["opt"]) == repr(state["opt"])
        assert found["rates"] == state["rates"] and found["args"] == state["args"]
        assert torch.equal(found["half"], state["half"]) and found["size"] == state["size"]
        assert type(found["parameter"]) is torch.Tensor and type(found["model"]) is dict


def reseal_pickle(path: Path, draw: random.Random) -> None:
    """A file that would run a command, or grow, in every wrapping that PyTorch knows."""
    bomb = Malicious(f"touch {path.parent / 'executed'}")
    match draw.randrange(5):
        case 0:
            path.write_bytes(pickle.dumps(bomb, protocol=draw.randrange(2, 6)))
        case 1:
            torch.save({"routers": bomb, "args": {}}, path)
        case 2:
            torch.save([bomb], path, _use_new_zipfile_serialization=False)
        case 3:
            state = draw.choice(
                ([], 3, {"0.prob": 3}, {"0.prob": torch.zeros(3).to_sparse()}, {1: torch.zeros(2)},
                 {"0.prob": torch.zeros(2, dtype=torch.complex64)}, {"0.prob": torch.zeros(0)},
                 {"0.prob": torch.tensor(3.0)}, {"routers": {}}, {"routers": [torch.zeros(3)]})
            )  # fmt: skip
            torch.save(state, path)
        case 4:
            path.write_bytes(draw.choice(list(OVERSIZED.values()))[0])


TENSORS = (
    torch.zeros(0), torch.zeros(()), torch.zeros(3), torch.zeros(2, 3), torch.ones(3, 24),
    -torch.ones(24), torch.zeros(1).expand(24), torch.zeros(1).expand(3, 24),
    torch.zeros(1).expand(10**13), torch.full((24,), torch.nan), torch.full((3,), torch.inf),
    torch.ones(24, dtype=torch.int64), torch.ones(24, dtype=torch.bfloat16),
    torch.ones(24, dtype=torch.complex64), torch.zeros(24).to_sparse(),
    torch.zeros(24, device="meta"),
)  # fmt: skip


def put(state: dict, place: str, value) -> dict:
    """The state with something else in a place, by its keys."""
    part, (*way, last) = state, place.split()
    for key in way:
        part = part[int(key) if key.isdecimal() else key]
    part[last] = value
    return state


@pytest.mark.parametrize(
    "objective, place, value, reason",
    [
        ("sdt", "format", torch.zeros(2), "ambiguous"),
        ("sdt", "weights_hash", ["x"] * 1000, "trained on weights"),
        ("sdt", "hashes", [], "has no attribute"),
        ("sdt", "learner", {}, "router"),
        ("sdt", "learner router", {"rows.0": torch.zeros(24)}, "missing or unknown"),
        ("sdt", "learner router rows.1", torch.full((24,), torch.nan), "not finite"),
        ("sdt", "learner weights", torch.zeros(2), r"not of shape \(3,\)"),
        ("sdt", "learner updates", -2, "a count in it is none"),
        ("sdt", "learner beta", 10**400, "too large"),
        ("sdt", "learner refreshes", [(0, [1.0])], "does not hold 3 numbers"),
        ("sdt", "learner optimizer state 0 exp_avg", torch.zeros(3), r"not of shape \(24,\)"),
        ("sdt", "learner optimizer state 0 exp_avg_sq", -torch.ones(24), "no state that training"),
        ("sdt", "learner optimizer param_groups", [], "other parameters"),
        ("sdt", "learner values base", {"name": "taylorseer", "order": 1}, "puts taylorseer1"),
        ("sdt", "effort", {"evaluations": "x"}, "a count in it is none"),
        ("trajectory", "learner history", [], "ever tried"),
        ("trajectory", "learner best_logits", torch.zeros(2, 24), r"not of shape \(3, 24\)"),
        ("trajectory", "learner best_coefficients", [], "has no attribute"),
        ("trajectory", "learner best", Schedule.full(3, COSTS).to_dict(), "of another model"),
        ("trajectory", "learner values coefficients level.0", torch.zeros(24, 9), "not of shape"),
    ],
)
def test_a_checkpoint_is_what_the_run_put_there(objective, place, value, reason):
    trainer, state = trainer_of(objective), unpack(checkpoint_of(objective))
    trainer._load_state(state)
    with pytest.raises(HarmonicaError, match=reason) as refusal:
        trainer._load_state(put(unpack(checkpoint_of(objective)), place, value))
    assert len(str(refusal.value)) < 300


def test_the_scale_of_half_precision_is_a_number(monkeypatch):
    trainer, scaler = trainer_of("sdt"), torch.amp.GradScaler("cpu", init_scale=4.0)
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    state = unpack(checkpoint_of("sdt")) | {"scaler": scaler.state_dict() | {"scale": 2.0}}
    trainer._load_state(state)
    assert scaler.get_scale() == 2
    with pytest.raises(HarmonicaError, match="a number in it is none"):
        trainer._load_state(put(state, "scaler scale", "x"))


def test_a_checkpoint_holds_more_than_its_format():
    with pytest.raises(HarmonicaError, match="does not fit this version"):
        trainer_of("sdt")._load_state({"format": 1})


def reseal_checkpoint(path: Path, draw: random.Random) -> None:
    """A checkpoint that somebody changed who can compute a checksum."""
    if draw.random() < 0.1:
        reseal_pickle(path, draw)
        return
    state, others = read_torch(path), VALUES + TENSORS
    if draw.random() < 0.3:
        state = spoil_values(state, draw, others)
    else:
        state["learner"] = spoil_values(state["learner"], draw, others)
    torch.save(state, path)


def reseal_tensors(path: Path, draw: random.Random) -> None:
    """A file of tensors, some of which are others."""
    if path.suffix == ".pt" and draw.random() < 0.3:
        reseal_pickle(path, draw)
        return
    is_safe = path.suffix == ".safetensors"
    tensors, metadata = read_safetensors(path) if is_safe else (read_torch(path)["ema"], {})
    key, other = draw.choice(list(tensors)), draw.choice(list(tensors))
    value = tensors[key]
    others = [value[:1], value[None], value.int(), value.double(), value / 0, value.bfloat16()]
    others += [tensors[other], torch.zeros(()), torch.zeros(0), value.to(torch.complex64)]
    if not is_safe:
        others += [value.to_sparse(), value.to("meta"), 3, None, "x"]
    match draw.randrange(4):
        case 0:
            del tensors[key]
        case 1:
            tensors[draw.choice(("x", "transformer_blocks.9999999999.x", "blocks.0"))] = value
        case _:
            tensors[key] = draw.choice(others)
    if metadata and draw.random() < 0.3:
        metadata["texts"] = json.dumps(spoil_values(json.loads(metadata["texts"]), draw))
    if is_safe:
        path.write_bytes(save({k: v.clone().contiguous() for k, v in tensors.items()}, metadata))
    else:
        torch.save({"ema": tensors if draw.random() < 0.9 else {1: value}}, path)


RESEAL = {
    "weights.pt": reseal_tensors,
    "diffusers.safetensors": reseal_tensors,
    "prompts.safetensors": reseal_tensors,
    "router.safetensors": reseal_router,
    "published.pt": reseal_pickle,
    "checkpoint.pt": reseal_checkpoint,
    "trajectory.pt": reseal_checkpoint,
    "schedule.json": reseal_schedule,
    "statistics.npz": reseal_npz,
    "images.npz": reseal_npz,
    "preset.yaml": reseal_preset,
    "manifest.json": reseal_tree,
    "shard.json": reseal_tree,
    "pictures.json": reseal_tree,
}


class Hang(BaseException):
    """No exception that a reader could take for a fault of its file."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Hang where what it holds takes longer."""

    def hang(*_):
        raise Hang

    earlier = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def test_a_reader_that_hangs_is_no_refusal(tmp_path):
    os.mkfifo(tmp_path / "endless.npy")
    with pytest.raises(Hang), within(0.1):
        outcome(use_npy, tmp_path / "endless.npy")


def outcome(use: Callable[[Path], None], path: Path) -> str:
    """Loaded or refused; everything else is raised."""
    try:
        use(path)
    except HarmonicaError as error:
        said = str(error)
        assert said and said.isprintable() and len(said) < 1000, said
        return "refused"
    return "loaded"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_spoilt_files_load_or_are_refused(name, tmp_path, request, faults):
    soak = request.config.getoption("--soak")
    count = (10_000 if soak else 500) // len(KINDS) + 1
    make, use = KINDS[name]
    path, draw, found = tmp_path / name, random.Random(name), {"loaded": 0, "refused": 0}
    torch.manual_seed(0)
    make(path)
    whole = path.read_bytes()
    assert outcome(use, path) == "loaded"
    for number in range(count):
        path.write_bytes(whole)
        if name in RESEAL and number % 2:
            RESEAL[name](path, draw)
        else:
            path.write_bytes(spoil_bytes(whole, draw))
        try:
            with within(20):
                found[outcome(use, path)] += 1
        except BaseException:
            (Path(os.environ.get("FUZZ_KEEP", tmp_path)) / f"failed-{name}").write_bytes(
                path.read_bytes()
            )
            raise
        assert not (tmp_path / "executed").exists()
    assert found["refused"] > count / 10
    faults.add("spoilt files", count)


@pytest.mark.parametrize("code", [0x80, 0xD800, 0x110000, 2**31, 2**32 - 1])
def test_a_name_is_made_of_plain_characters(tmp_path, code):
    path = tmp_path / "statistics.npz"
    _statistics(path)
    assert open_reference(str(path)).extractor_sha256 == "abc"
    with np.load(path) as file:
        members = {name: npy(array) for name, array in file.items()}
    members["extractor"] = npy(np.array(code, "<u4"), descr="<U1")
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(f"{member}.npy", content)
    with pytest.raises(HarmonicaError, match="extractor is no text"):
        open_reference(str(path))


def test_bombs_are_refused_without_being_unpacked(tmp_path):
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 200_000)
    with pytest.raises(HarmonicaError, match="not readable JSON"):
        load_schedule_file(deep)[0]
    laughs = tmp_path / "laughs.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    laughs.write_text("\n".join([*lines, "lr: *a29"]))
    with pytest.raises(HarmonicaError, match="more comes out of it than it holds"):
        read_yaml(laughs)
    laughs.write_text("lr: &a [*a]")
    with pytest.raises(HarmonicaError, match="more comes out of it than it holds"):
        read_yaml(laughs)
    laughs.write_text("lr: &a 1\nbeta: [*a, *a]")
    assert read_yaml(laughs) == {"lr": 1, "beta": [1, 1]}
    laughs.write_text("")
    assert read_yaml(laughs) is None
    large = tmp_path / "large.yaml"
    large.write_bytes(b"# " + b"x" * (2 << 20))
    with pytest.raises(HarmonicaError, match="larger than 1 MB"):
        read_preset(TrainConfig, large)
    # A megabyte of zeros that says that it is a hundred gigabytes of image.
    header = io.BytesIO()
    shape = (1, 200_000, 200_000, 3)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(1 << 20))
    with pytest.raises(HarmonicaError, match="shorter or longer"):
        Npz(bomb, "--samples")["arr_0"]
    content = bytearray(bomb.read_bytes())
    size = (120_000_000_000 + len(header.getvalue())) & 0xFFFFFFFF
    for place in (22, content.rindex(b"PK\x01\x02") + 24):  # uncompressed size, both headers
        content[place : place + 4] = size.to_bytes(4, "little")
    write_atomically(bomb, bytes(content))
    with pytest.raises(HarmonicaError):
        Npz(bomb, "--samples")["arr_0"].rows(range(1))


def test_labelled_images_go_through_the_door_too(tmp_path):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "0.png"
    Image.new("CMYK", (9, 8), (0, 255, 255, 0)).save(path, format="JPEG")
    image, label = LabelledImages(str(tmp_path), 8)[0]
    assert image.shape == (3, 8, 8) and label == 0 and image[0].min() > 200 > image[1].max()
    # A picture of two gigapixels, if one believes its first bytes.
    _picture(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 50_000, 50_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    with pytest.raises(HarmonicaError, match=r"--data: .*0\.png cannot be read .*pixels"):
        LabelledImages(str(tmp_path), 8)[0]


def test_archives_stay_in_their_folder(tmp_path):
    with tarfile.open(tmp_path / "archive.tar", "w") as archive:
        entry = tarfile.TarInfo("../outside")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    (tmp_path / "inside").mkdir()
    with (
        confined_extraction(),
        tarfile.open(tmp_path / "archive.tar") as archive,
        pytest.raises(tarfile.TarError),
    ):
        archive.extractall(tmp_path / "inside")
    assert not (tmp_path / "outside").exists()
