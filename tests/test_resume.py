"""Runs in parts end like runs in one; whatever ends a part, what it made stands."""

import contextlib
import errno
import hashlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import ROOT, free_port
from families import PIXART, tiny, tiny_specs
from permissions import read_only
from processes import Group
from safetensors.torch import load_file, save_file

from harmonica.backbone import load_backbone
from harmonica.baselines.fixed import evenly_spaced
from harmonica.budget import Budget
from harmonica.config import BackboneConfig
from harmonica.errors import HarmonicaError, Interrupted
from harmonica.files import record_of, sha256, write_checked
from harmonica.lock import held
from harmonica.options import build_parser, flag_of, resolve
from harmonica.prompts import EncodedPrompts, save_prompts
from harmonica.training.batches import Batches
from harmonica.training.checkpoint import Checkpoints, Stage, unpack
from harmonica.training.config import TrainConfig
from harmonica.training.exchanges import Exchanges
from harmonica.training.objective import ESTIMATORS
from harmonica.training.run_directory import RunDirectory
from harmonica.training.trainer import Trainer
from harmonica.training.trajectory_learner import Best
from models import MODELS

SMALL = {
    "num_sampling_steps": 3, "global_batch_size": 2, "cfg_scale": 1.0, "lambda_c": 4,
    "log_every": 1,
}  # fmt: skip


def without_pictures() -> None:
    """In processes of a group: they take longer than the training here."""
    Trainer._export = lambda self, directory: None


class Training(Trainer):
    """A run without pictures, which take longer than all the rest here."""

    def _export(self, directory):
        pass


def train(results: Path, **options) -> RunDirectory:
    return Training(TrainConfig(results_dir=results, **{**SMALL, **options})).run()


def content(value, digest=None) -> str:
    """Hash of everything in a state, bit by bit."""
    digest = digest or hashlib.sha256()
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            content(value[key], digest)
    elif isinstance(value, list | tuple):
        for item in value:
            content(item, digest)
    elif isinstance(value, torch.Tensor):
        digest.update(value.contiguous().numpy().tobytes())
    else:
        digest.update(repr(value).encode())
    return digest.hexdigest()


def learned(directory: RunDirectory) -> str:
    """Hash of all that training stands on at the newest checkpoint."""
    found, _ = Checkpoints(directory.checkpoints, 1, 2).latest()
    return content(unpack(found)["learner"])


def newest(directory: RunDirectory) -> Path:
    return sorted(directory.checkpoints.glob("*.pt"))[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunDirectory:
    """Seven updates, of which six are whole trajectories, in one go."""
    return train(tmp_path_factory.mktemp("whole"), max_steps=7)


@contextlib.contextmanager
def full_disk(room: int = 4096):
    """No file may grow beyond so many bytes, by default less than a checkpoint."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # pytest keeps it in a file
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_in_parts_ends_like_one_through_a_full_disk_and_damage(
    whole, tmp_path, capsys, faults
):
    directory = train(tmp_path, max_steps=3)
    good = newest(directory)
    faults.add("disk full")
    assert good.name == "0000002.pt"  # the second trajectory was cut short
    before = sha256(good)
    with (
        full_disk(),
        pytest.raises(HarmonicaError, match=r"cannot write .*; the last good checkpoint is"),
    ):
        train(tmp_path, max_steps=5, resume="auto")
    assert newest(directory) == good and sha256(good) == before
    assert not list(directory.path.rglob("*.tmp"))

    train(tmp_path, max_steps=5, resume=str(directory.path))
    assert newest(directory).name == "0000004.pt"
    flipped = bytearray(newest(directory).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    newest(directory).write_bytes(flipped)
    faults.add("checkpoint cut or with a bit flipped")
    capsys.readouterr()
    train(tmp_path, max_steps=7, resume="auto")
    said = capsys.readouterr().err
    assert "0000004.pt is damaged" in said and f"going on from {good}" in said
    assert (directory.checkpoints / "0000004.pt.damaged").read_bytes() == flipped
    assert learned(directory) == learned(whole)
    lines = [(run.path / "metrics.jsonl").read_text() for run in (directory, whole)]
    assert lines[0] == lines[1]

    for path in directory.checkpoints.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    faults.add("checkpoint cut or with a bit flipped")
    for _ in range(2):  # nor does the run begin anew when they have been set aside
        with pytest.raises(HarmonicaError, match=r"no checkpoint in .* is whole"):
            train(tmp_path, max_steps=7, resume="auto")
    assert (directory.path / "metrics.jsonl").read_text() == lines[0]


def test_a_checkpoint_that_cannot_be_read_for_now_is_not_given_up(tmp_path, monkeypatch):
    directory = train(tmp_path, max_steps=4, ckpt_every=1)
    files = sorted(directory.checkpoints.iterdir())
    good, read = newest(directory), Path.read_bytes

    def broken(path):
        if path == good:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", broken)
        with pytest.raises(HarmonicaError, match="cannot be read"):
            train(tmp_path, max_steps=6, resume="auto")
    assert sorted(directory.checkpoints.iterdir()) == files
    record = record_of(good).read_bytes()
    record_of(good).unlink()  # which was forgotten when the file was copied
    with pytest.raises(HarmonicaError, match=rf"without {record_of(good).name} beside it"):
        train(tmp_path, max_steps=6, resume="auto")
    record_of(good).write_bytes(record)
    (directory.path / "commit.txt").write_bytes(b"\xff\xfe\n")  # of somebody's system
    train(tmp_path, max_steps=6, resume="auto")
    assert sorted(directory.checkpoints.glob("*.damaged")) == []


def test_a_lock_holds_on_a_disk_without_any_room(tmp_path, faults):
    """Who holds it is not written down; what is to be written then is refused in a sentence."""
    faults.add("disk full")
    with full_disk(0):
        with (
            held(tmp_path / ".lock", "it"),
            pytest.raises(HarmonicaError, match="it is in use by another process; wait for it"),
            held(tmp_path / ".lock", "it"),
        ):
            pass
        with pytest.raises(HarmonicaError, match=r"cannot write .*config\.yaml: .*; make room"):
            train(tmp_path / "runs", max_steps=3)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_run_that_has_become_read_only_is_refused(whole, tmp_path, faults):
    """Its folder, or that of its checkpoints, in which a process was killed while it wrote."""
    directory = RunDirectory(tmp_path / whole.path.name)
    shutil.copytree(whole.path, directory.path)
    before = sha256(newest(directory))
    unfinished = directory.checkpoints / ".0000008.pt.0123abcd.tmp"
    unfinished.touch()
    faults.add("a folder that cannot be written to", 2)
    for paths, said in {
        (directory.path, directory.path / ".lock"): "the run .* cannot be written to",
        (directory.checkpoints,): r"cannot write .*0000008\.pt.*; the last good checkpoint is",
    }.items():
        with read_only(*paths), pytest.raises(HarmonicaError, match=said):
            train(tmp_path, max_steps=9, resume="auto")
    assert sha256(newest(directory)) == before and unfinished.is_file()


@pytest.mark.parametrize("way", ["learning-to-cache", "trajectory"])
def test_every_way_of_learning_in_parts_ends_like_one(way, tmp_path, labelled_images):
    options = {"objective": "trajectory", "predictor": "learned", "held_out_batch_size": 2,
               "held_out_every": 1}  # fmt: skip
    if way == "learning-to-cache":
        options = {"method": way, "data": str(labelled_images), "target_cur": 0.2}
    one = train(tmp_path / "one", max_steps=4, **options)
    two = train(tmp_path / "two", max_steps=3, **options)
    train(tmp_path / "two", max_steps=4, resume="auto", **options)
    assert learned(one) == learned(two)


def test_signals_make_it_safe_and_lose_nothing(whole, tmp_path):
    """All three end the run between two updates; it says where it stands and goes on."""
    for number, signum in enumerate((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)):
        trainer = Training(TrainConfig(results_dir=tmp_path, **SMALL, max_steps=7, resume="auto"))
        learner, update = trainer.learner, trainer.learner.update

        def at_update(step, learner=learner, update=update, number=number, signum=signum):
            if learner.updates == 2 * number + 1:  # the second update of a trajectory
                os.kill(os.getpid(), signum)
            return update(step)

        learner.update = at_update
        with pytest.raises(Interrupted, match="checkpoint") as stopped:
            trainer.run()
        assert stopped.value.signal == signum
        directory = next(tmp_path.iterdir())
        assert number == 0 or f"{2 * number:07d}.pt" in str(stopped.value)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert learned(train(tmp_path, max_steps=7, resume="auto")) == learned(whole)
    assert len(list(tmp_path.iterdir())) == 1 and directory.is_dir()


def test_a_signal_while_a_checkpoint_is_written_leaves_it_whole(
    whole, tmp_path, monkeypatch, faults
):
    def interrupted(path, content):
        monkeypatch.undo()
        faults.add("SIGTERM, SIGUSR1, Ctrl-C while writing")
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(0.1)  # the thread that makes things safe wants to write it too
        write_checked(path, content)

    monkeypatch.setattr("harmonica.training.checkpoint.write_checked", interrupted)
    with pytest.raises(Interrupted, match=r"0000002\.pt"):
        train(tmp_path, max_steps=7, ckpt_every=2)
    directory = train(tmp_path, max_steps=7, ckpt_every=2, resume="auto")
    assert learned(directory) == learned(whole)


def test_a_run_goes_on_with_another_number_of_processes(whole, tmp_path):
    arguments = [part for name, value in SMALL.items() for part in (flag_of(name), value)]
    group = Group("train", *arguments, "--max-steps", 3, "--results-dir", "runs", folder=tmp_path,
                  fault=without_pictures)  # fmt: skip
    assert group.wait() == [0, 0], group.said()
    directory = train(tmp_path / "runs", max_steps=7, resume="auto")
    assert len(list((tmp_path / "runs").iterdir())) == 1
    logits = [
        torch.stack(list(unpack(newest(run).read_bytes())["learner"]["router"].values()))
        for run in (directory, whole)
    ]
    # Sums over processes round otherwise.
    assert (logits[0] - logits[1]).abs().max() < 5e-3


@pytest.mark.slow
def test_accelerate_launches_it(tmp_path):
    """Two processes, as it starts them on a machine of two GPUs."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--main_process_port", str(free_port())]
    arguments = [str(ROOT / "train_router.py"), "--resume", "auto", "--num-sampling-steps", "3"]
    arguments += ["--cfg-scale", "1", "--max-steps", "2", "--lambda-batch-size", "2"]

    def launched(size: str) -> subprocess.CompletedProcess:
        words = [*launch, *arguments, "--global-batch-size", size]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    refused = launched("3")
    assert refused.returncode != 0 and "not divisible by 2 processes; use 2 or 4" in refused.stderr
    done = launched("2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "000-DiT-Ti-4-T3" / "router.safetensors").is_file()


def assert_same_end(one: tuple[Best, int], other: tuple[Best, int]) -> None:
    """Of two runs: the best, and evaluations that it took."""
    (best, effort), (best_of_other, effort_of_other) = one, other
    assert best.schedule == best_of_other.schedule and best.history == best_of_other.history
    assert torch.equal(best.logits, best_of_other.logits)
    assert effort == effort_of_other


def test_exchanges_end_at_a_signal_and_go_on(tmp_path, monkeypatch):
    options = {
        "objective": "trajectory", "held_out_batch_size": 2, "held_out_every": 3, "max_steps": 2,
        "refine": 6, "predictor": "learned", "coefficient_lr": 0.03,
    }  # fmt: skip
    attempt, attempts, ended = Exchanges.attempt, [], []

    def interrupted(self, count):
        attempts.append(count)
        if len(attempts) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return attempt(self, count)

    def finished(self, directory):
        ended.append((self.learner.best, self.effort.evaluations))

    monkeypatch.setattr(Training, "_export", finished)
    one = train(tmp_path / "one", **options)
    with monkeypatch.context() as patched:
        patched.setattr(Exchanges, "attempt", interrupted)
        with pytest.raises(Interrupted, match=r"0000002-0003\.pt: go on with --resume"):
            train(tmp_path / "two", **options)
        two = train(tmp_path / "two", resume="auto", **options)
    assert attempts == [1, 2] * 3
    assert learned(one) == learned(two)
    assert_same_end(*ended)
    # Further updates know nothing of exchanges before them.
    longer = {**options, "max_steps": 4}
    train(tmp_path / "two", resume="auto", **longer)
    assert learned(train(tmp_path / "whole", **longer)) == learned(two)
    assert_same_end(*ended[2:])


def test_a_run_does_not_go_on_with_other_files(tmp_path, labelled_images, bundled_costs):
    schedule = tmp_path / "schedule.json"
    evenly_spaced(3, bundled_costs, Budget(cur=0.5)).save(schedule)
    ways = {
        "--data": {"method": "learning-to-cache", "data": str(labelled_images), "target_cur": 0.2},
        "--freeze-schedule": {"freeze_schedule": schedule, "predictor": "learned"},
    }
    for flag, options in ways.items():
        train(tmp_path / flag, max_steps=2, **options)
    next(labelled_images.rglob("*.png")).unlink()
    evenly_spaced(3, bundled_costs, Budget(cur=0.3)).save(schedule)
    for flag, options in ways.items():
        before = sha256(newest(RunDirectory(tmp_path / flag / "000-DiT-Ti-4-T3")))
        with pytest.raises(HarmonicaError, match=f"--resume: {flag} .*start a new run"):
            train(tmp_path / flag, max_steps=4, resume="auto", **options)
        assert sha256(newest(RunDirectory(tmp_path / flag / "000-DiT-Ti-4-T3"))) == before


def test_a_run_does_not_go_on_with_other_prompts(tmp_path, monkeypatch):
    spec = replace(tiny_specs()["tiny-PixArt"], config=PIXART)
    monkeypatch.setitem(MODELS, spec.name, spec)
    monkeypatch.setattr("harmonica.training.trainer.load_decoder", lambda *_: None)
    weights, prompts = tmp_path / "weights.safetensors", tmp_path / "prompts.safetensors"
    save_file(tiny("pixart").state_dict(), weights)
    tokens, channels = PIXART.max_tokens, PIXART.caption_channels

    def encoded(*texts: str, scale: float) -> EncodedPrompts:
        null, *rest = torch.full((len(texts) + 1, tokens, channels), scale).half()
        mask = torch.ones(len(texts) + 1, tokens, dtype=torch.bool)
        return EncodedPrompts(texts, torch.cat(rest), mask[1:], null.clone(), mask[0], "T5", True)

    def train_on(*texts: str, scale: float = 1.0, **options) -> None:
        save_prompts(prompts, encoded(*texts, scale=scale))
        flags = {"model": spec.name, "ckpt": weights, "prompts": prompts, "text_encoder": "T5"}
        train(tmp_path / "runs", **flags, **options)

    train_on("a cat", "a dog", max_steps=2)
    with pytest.raises(HarmonicaError, match=r"--resume: --prompts .* put the earlier file back"):
        train_on("a cat", "a cow", max_steps=4, resume="auto")
    # Encoded again, where numbers round otherwise, they are the same prompts.
    train_on("a cat", "a dog", scale=1.001, max_steps=4, resume="auto")
    assert newest(RunDirectory(tmp_path / "runs" / "000-tiny-PixArt-T3")).stem == "0000004"


def test_a_run_that_is_busy_is_made_safe_all_the_same(tmp_path):
    """The checkpoint is written while the main thread is in something long."""
    options = {**SMALL, "lambda_c": 2, "max_steps": 7}
    trainer = Training(TrainConfig(results_dir=tmp_path, **options))
    learner, refresh = trainer.learner, trainer.learner.refresh_weights
    written = threading.Event()

    def long_refresh():
        if learner.updates == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(500):
                if list(tmp_path.glob("*/checkpoints/0000002.pt")):
                    written.set()
                    break
                threading.Event().wait(0.01)
        refresh()

    learner.refresh_weights = long_refresh
    with pytest.raises(Interrupted):
        trainer.run()
    assert written.is_set()


def test_a_run_goes_on_only_as_what_it_is(tmp_path, faults):
    directory = train(tmp_path, max_steps=2)
    resume = str(directory.path)
    faults.add("second run in the same directory")
    made = [path for path in directory.path.rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: sha256(path) for path in made}
    with (
        directory.exclusive(),
        pytest.raises(HarmonicaError, match=rf"in use by process {os.getpid()} on \S+, since"),
    ):
        train(tmp_path, max_steps=4, resume="auto")
    assert {path: sha256(path) for path in made} == before
    for option, value in {
        "num_sampling_steps": 4, "sampler": "iddpm", "cfg_scale": 2.0, "model": "DiT-Ti/2",
        "global_batch_size": 8, "global_seed": 1,
    }.items():  # fmt: skip
        flag = "--" + option.replace("_", "-")
        with pytest.raises(HarmonicaError, match=f"was trained with .*{flag}"):
            RunDirectory.open(
                directory.path, TrainConfig(results_dir=tmp_path, **{**SMALL, option: value})
            )
    # Asked for by name, it may take another learning rate; by itself it does not.
    trainer = Training(
        TrainConfig(results_dir=tmp_path, **SMALL, max_steps=4, lr=0.01, resume=resume)
    )
    trainer.run()
    assert trainer.learner.updates == 4
    assert all(group["lr"] == 0.01 for group in trainer.learner.optimizer.param_groups)
    other = train(tmp_path, max_steps=2, lr=0.02, resume="auto")
    assert other.path != directory.path
    trainer.backbone = type(trainer.backbone)(**{**vars(trainer.backbone), "weights_hash": "x"})
    with pytest.raises(HarmonicaError, match="was trained on weights"):
        trainer.run()


def files_of(directory: RunDirectory) -> dict[str, str]:
    """Content of what is recorded of a run."""
    return {
        str(path.relative_to(directory.path)): sha256(path)
        for path in directory.path.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_run_goes_on_with_its_weights_wherever_they_are_and_with_no_others(tmp_path):
    own, moved, others = (tmp_path / f"{name}.safetensors" for name in ("own", "moved", "others"))
    save_file(load_backbone(BackboneConfig(), torch.device("cpu")).model.state_dict(), own)
    weights = load_file(own)
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, others)

    def train_on(ckpt: Path, **options) -> RunDirectory:
        return train(tmp_path / "runs", ckpt=ckpt, **options)

    directory = train_on(own, max_steps=2, resume="auto")
    own.rename(moved)
    assert train_on(moved, max_steps=4, resume="auto").path == directory.path
    moved.rename(own)
    assert train_on(own, max_steps=6, resume=str(directory.path)).path == directory.path
    assert newest(directory).stem == "0000006"

    before = files_of(directory)
    assert train_on(others, max_steps=2, resume="auto").path != directory.path
    with pytest.raises(HarmonicaError, match=r"was trained on weights .* with --ckpt"):
        train_on(others, max_steps=8, resume=str(directory.path))
    assert files_of(directory) == before
    # Earlier versions did not write down which weights a run is on.
    for recorded in (tmp_path / "runs").glob("*/weights.txt"):
        recorded.unlink()
    assert train_on(others, max_steps=4, resume="auto").path.name.startswith("001-")


def test_the_newest_checkpoints_are_kept_and_lie_close_enough(tmp_path):
    directory = train(tmp_path, max_steps=6, ckpt_every=3, keep_ckpts=2)
    assert [path.name for path in sorted(directory.checkpoints.glob("*.pt"))] == [
        "0000004.pt", "0000006.pt",
    ]  # fmt: skip
    assert len(list(directory.checkpoints.iterdir())) == 4
    # Trajectories of two updates: a third checkpoint would come after four.
    checkpoints = Checkpoints(tmp_path / "other", every=5, keep=9)
    for updates in range(0, 20, 2):
        checkpoints.hold(Stage(updates), {}, sweep_length=2)
    saved = [path.stem for path in sorted((tmp_path / "other").glob("*.pt"))]
    assert [int(name) for name in saved] == [4, 8, 12, 16]
    # Exchanges after the last update, and updates after those.
    for stage in [*(Stage(18, trials) for trials in range(9)), Stage(19), Stage(20)]:
        checkpoints.hold(stage, {}, sweep_length=1)
    saved = [path.stem for path in checkpoints._found()[4:]]
    assert saved == ["0000018-0003", "0000018-0008"]
    assert checkpoints.latest()[1] == [f"going on from {tmp_path / 'other' / '0000018-0008.pt'}"]


def test_checkpoints_are_written_before_the_end_by_default():
    config = TrainConfig(objective="trajectory")
    assert 4 * config.ckpt_every < config.max_steps
    arguments = build_parser(TrainConfig, "").parse_args(
        ["--config", str(ROOT / "configs" / "dit_xl2_256_t20.yaml"), "--objective", "trajectory"]
    )
    assert resolve(TrainConfig, arguments).ckpt_every == config.ckpt_every


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_image_errors_that_are_not_finite_name_their_samples(estimator, tmp_path, monkeypatch):
    sound = Batches.__call__

    def broken(self, purpose, number, samples):
        batch = sound(self, purpose, number, samples)
        if purpose == "lambda":
            batch.x_T[2] = torch.nan
        return batch

    monkeypatch.setattr(Batches, "__call__", broken)
    with pytest.raises(HarmonicaError, match=r"image-error weights of update 0 \(samples 2\)"):
        train(tmp_path, max_steps=2, lambda_estimator=estimator)


class Scaled(Training):
    """As under fp16, which a CPU does not have, with gradients of a step that are not finite."""

    def __init__(self, config: TrainConfig, times: int):
        super().__init__(config)
        self.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        learner, left = self.learner, iter(range(times))
        learner.optimizer = AcceleratedOptimizer(learner.optimizer.optimizer, scaler=scaler)
        for row in learner.router.rows:
            row.register_hook(lambda grad: grad * (1 if next(left, None) is None else torch.inf))


def test_gradients_that_never_become_finite_stop_the_run_under_fp16_too(tmp_path):
    config = TrainConfig(results_dir=tmp_path, **SMALL, max_steps=8)
    trainer = Scaled(config, times=3)
    trainer.run()
    assert trainer.learner.updates == 8 and trainer.accelerator.scaler.get_scale() == 0.5
    trainer = Scaled(config, times=8)
    before = trainer.learner.router.logits()
    with pytest.raises(HarmonicaError, match="not finite at step 2 of trajectory 1, update 3 "):
        trainer.run()
    assert torch.equal(trainer.learner.router.logits(), before)


def test_numbers_that_are_not_finite_stop_the_run_before_the_update(tmp_path):
    trainer = Training(TrainConfig(results_dir=tmp_path, **SMALL, max_steps=7))
    learner, batches = trainer.learner, trainer.learner.batches
    batch = learner.method.batch

    def broken(number):
        found = batch(number)
        if number == 2:
            found.x_T[1] = torch.nan
        return found

    learner.method.batch = broken
    with pytest.raises(HarmonicaError) as refusal:
        trainer.run()
    index = batches.indices(2, learner.samples)[1]
    assert f"not finite at step 1 of trajectory 2, update 4 (samples {index})" in str(refusal.value)
    assert "0000004.pt" in str(refusal.value)
    assert learner.updates == 4 and learner.router.logits().isfinite().all()
