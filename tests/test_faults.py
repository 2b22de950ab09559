"""Faults while it runs: what was made stands, what is lost is bounded, what comes out is the same.

``--soak`` is the nightly form: many rounds of every fault, and a table at the end.
"""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from permissions import obey_permissions
from processes import Group
from test_resume import content, without_pictures

from harmonica.files import sha256
from harmonica.training.checkpoint import Checkpoints, unpack

CKPT_EVERY = 2
TRAIN = [
    "--num-sampling-steps", "3", "--global-batch-size", "4", "--cfg-scale", "1", "--lambda-c", "8",
    "--log-every", "1", "--ckpt-every", CKPT_EVERY, "--resume", "auto", "--results-dir", "runs",
]  # fmt: skip
SAMPLE = [
    "--num-sampling-steps", "2", "--cfg-scale", "1", "--num-samples", "40", "--shard-size", "4",
    "--out", "out", "--png",
]  # fmt: skip


def run_of(folder: Path) -> Path:
    return folder / "runs" / "000-DiT-Ti-4-T3"


def learned(folder: Path) -> str:
    """Hash of the newest whole checkpoint's training state."""
    found, _ = Checkpoints(run_of(folder) / "checkpoints", 1, 2).latest()
    return content(unpack(found)["learner"])


def updates(folder: Path) -> int:
    """How far the run has come, whether it is safe or not."""
    metrics = run_of(folder) / "metrics.jsonl"
    return 2 * metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def broken_sample() -> None:
    """One sample of the second process is not a number in the third trajectory."""
    from harmonica.training.batches import Batches

    sound = Batches.__call__

    def broken(self, purpose, number, samples):
        batch = sound(self, purpose, number, samples)
        if (purpose, number, self.accelerator.process_index) == ("train", 2, 1):
            batch.x_T[0] = torch.nan
        return batch

    Batches.__call__ = broken


def slow_disk() -> None:
    """Files take a while to be written, checkpoints among them."""
    without_pictures()
    sync = os.fsync

    def slow(descriptor):
        time.sleep(0.05)
        sync(descriptor)

    os.fsync = slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, rounds) -> tuple[str, int]:
    """What two processes learn without any fault, and in how many updates."""
    folder, total = tmp_path_factory.mktemp("trained"), 4 + 2 * rounds
    group = Group("train", *TRAIN, "--max-steps", total, folder=folder, fault=without_pictures)
    assert group.wait() == [0, 0], group.said()
    return learned(folder), total


def test_kill_9_of_a_training_process(trained, tmp_path, rounds, faults):
    """At random moments: the others end, what is lost is bounded, what is learned is the same."""
    expected, total = trained
    draw, killed, number = random.Random(rounds), 0, 0

    def start() -> Group:
        return Group(
            "train", *TRAIN, "--max-steps", total, "--timeout", 15, folder=tmp_path / str(number),
            fault=without_pictures,
        )  # fmt: skip

    (tmp_path / "0").mkdir()
    while killed < rounds:
        group, folder = start(), tmp_path / str(number)
        if killed % 4 == 3:  # while it starts
            time.sleep(2 * draw.random())
        else:
            further = updates(folder) + draw.randint(1, 3)
            group.wait_until(lambda: updates(folder) >= further)  # noqa: B023
            time.sleep(draw.random() / 8)
        victim = draw.randrange(2)
        if all(process.is_alive() for process in group.processes) and group.kill(victim):
            faults.add("kill -9 of a training process")
            assert group.wait()[1 - victim] in (0, 2), group.said()
            assert "Traceback" not in group.said()
            killed += 1
            saved = [int(path.stem) for path in folder.rglob("checkpoints/*.pt")]
            assert updates(folder) - max(saved, default=0) <= CKPT_EVERY
        else:  # it was done before it could be killed
            assert group.wait() == [0, 0], group.said()
            assert learned(folder) == expected
            number += 1
            (tmp_path / str(number)).mkdir()
    group = start()
    assert group.wait() == [0, 0], group.said()
    assert learned(tmp_path / str(number)) == expected


def test_kill_9_of_a_sampling_process(tmp_path, rounds, faults):
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir(), many.mkdir()
    assert Group("sample", *SAMPLE, folder=one, ranks=1).wait() == [0]
    draw, shards = random.Random(rounds), many / "out" / "shards"
    count = lambda: len(list(shards.glob("??????.json")))  # noqa: E731
    for number in range(rounds):
        if count() >= 8:  # begin again: there has to be something to do
            for path in draw.sample(sorted(shards.glob("??????.json")), 6):
                path.unlink()
                path.with_suffix(".png.json").unlink(missing_ok=True)
        group = Group("sample", *SAMPLE, folder=many, ranks=2 + number % 2)
        before = count()
        group.wait_until(lambda: count() > before)  # noqa: B023
        time.sleep(draw.random() / 8)
        for rank in range(len(group.processes)):
            if (rank == number % 2 or draw.random() < 0.5) and group.kill(rank):
                faults.add("kill -9 of a sampling process")
        # Whoever is left makes what is missing.
        assert set(group.wait()) <= {0, -signal.SIGKILL}, group.said()
        assert "Traceback" not in group.said()
    group = Group("sample", *SAMPLE, "--batch-size", "3", folder=many, ranks=2)
    assert group.wait() == [0, 0], group.said()
    name = "out/samples_40x32x32x3.npz"
    assert sha256(many / name) == sha256(one / name)
    pictures = "out/images/*.png"
    assert [sha256(path) for path in sorted(many.glob(pictures))] == [
        sha256(path) for path in sorted(one.glob(pictures))
    ]
    assert not list(many.rglob("*.tmp"))


def test_a_sample_that_is_not_finite_on_one_process_stops_all(trained, tmp_path, faults):
    expected, total = trained
    group = Group("train", *TRAIN, "--max-steps", total, folder=tmp_path, fault=broken_sample)
    faults.add("a sample that is not finite")
    assert group.wait() == [2, 2]
    said = group.said()
    # Batches of four, two to a process: the first of the second process's third is 10.
    assert "not finite at step 1 of trajectory 2, update 4 (samples 10)" in said
    assert "the last good checkpoint is runs/000-DiT-Ti-4-T3/checkpoints/0000004.pt" in said
    assert "Traceback" not in said
    # Nothing of it is left in what stands.
    group = Group("train", *TRAIN, "--max-steps", total, folder=tmp_path, fault=without_pictures)
    assert group.wait() == [0, 0], group.said()
    assert learned(tmp_path) == expected


@pytest.mark.slow
def test_signals_while_a_checkpoint_is_written(trained, tmp_path, rounds, faults):
    expected, total = trained
    folder = run_of(tmp_path) / "checkpoints"
    for number in range(rounds):
        group = Group("train", *TRAIN, "--max-steps", total, folder=tmp_path, fault=slow_disk)
        group.wait_until(lambda: list(folder.glob(".*.tmp")))
        signum = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[number % 3]
        # The other one hears of it at the next update.
        if group.kill(number % 2, signum):
            faults.add("SIGTERM, SIGUSR1, Ctrl-C while writing")
        codes = group.wait(30)
        assert set(codes) <= {0, 128 + signum}, group.said()
        assert "Traceback" not in group.said()
        assert not list(folder.glob(".*.tmp"))
    group = Group("train", *TRAIN, "--max-steps", total, folder=tmp_path, fault=without_pictures)
    assert group.wait() == [0, 0], group.said()
    assert learned(tmp_path) == expected


def long_work() -> None:
    """Something takes longer than the grace of a signal."""
    from harmonica import interruption
    from harmonica.many_samples import Maker
    from harmonica.training.learner import StepwiseLearner

    def long(self, *_):
        Path("busy").touch()
        time.sleep(60)

    interruption.GRACE_S, Maker._batch, StepwiseLearner.refresh_weights = 0.2, long, long


@pytest.mark.parametrize(
    ("program", "arguments", "standing"),
    [
        ("train", TRAIN, "the last good checkpoint is .*: go on with --resume runs/"),
        ("sample", SAMPLE, "images of its shard are lost; .* a smaller --shard-size"),
    ],
)
def test_what_has_to_be_ended_says_where_it_stands(program, arguments, standing, tmp_path):
    group = Group(program, *arguments, folder=tmp_path, ranks=1, fault=long_work)
    group.wait_until((tmp_path / "busy").exists)
    group.kill(0, signal.SIGTERM)
    assert group.wait(30) == [128 + signal.SIGTERM], group.said()
    assert re.search(f"^stopped by SIGTERM; .*{standing}", group.said(), re.MULTILINE), group.said()


def test_a_process_that_does_not_answer_ends_the_run(tmp_path, nightly, faults):
    group = Group(
        "train",
        *TRAIN,
        "--max-steps",
        4000,
        "--timeout",
        2,
        folder=tmp_path,
        fault=without_pictures,
    )
    group.wait_until(lambda: updates(tmp_path) >= 4)
    assert group.kill(1, signal.SIGSTOP)
    faults.add("a process that does not answer")
    group.processes[0].join(60)
    group.kill(1)
    assert group.processes[0].exitcode == 2, group.said()
    assert "another process of the run ended or does not answer" in group.said()
    group.wait()


def test_a_folder_that_cannot_be_written_to(tmp_path, faults):
    for folder in ("runs", "out"):
        (tmp_path / folder).mkdir(mode=0o555)
    for program, arguments, flag in (
        ("train", [*TRAIN, "--max-steps", 2], "--results-dir runs"),
        ("sample", SAMPLE, "--out out"),
    ):
        faults.add("a folder that cannot be written to")
        group = Group(program, *arguments, folder=tmp_path, ranks=1, fault=obey_permissions)
        assert group.wait() == [2], group.said()
        assert f"error: {flag} cannot be written to (Permission denied)" in group.said()
        assert group.said().count("error: ") == 1 and "Traceback" not in group.said()


def test_elastic_restarts_go_on(tmp_path, nightly, faults):
    """torchrun starts all processes again when one dies, and the run goes on by itself."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "--max-restarts=3", str(ROOT / "train_router.py"), *map(str, TRAIN), "--max-steps", "16",
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            while updates(tmp_path) < 4:
                assert launcher.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.01)
            holder = (run_of(tmp_path) / ".lock").read_text().split()[1]
            os.kill(int(holder), signal.SIGKILL)
            faults.add("restart by torchrun")
            assert launcher.wait(180) == 0, (tmp_path / "log").read_text()
        finally:
            launcher.kill()
    said = (tmp_path / "log").read_text(errors="replace")
    assert "going on from" in said
    assert (run_of(tmp_path) / "router.safetensors").is_file()
    lines = (run_of(tmp_path) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == list(range(2, 17, 2))
    whole = tmp_path / "whole"
    whole.mkdir()
    group = Group("train", *TRAIN, "--max-steps", 16, folder=whole, fault=without_pictures)
    assert group.wait() == [0, 0], group.said()
    assert learned(tmp_path) == learned(whole)


# Like the real one, it kills what it started when it is asked to end.
SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
echo $SRUN_CPUS_PER_TASK > cpus
"$@" & step=$!
echo $step > step; echo $$ > srun
trap 'kill -KILL $step $(cat /proc/$step/task/$step/children)' TERM HUP
wait $step
"""
SCANCEL = """
[ "$*" = "--signal=TERM 7" ] || exit 1
step=$(cat step)
kill -TERM $step $(cat /proc/$step/task/$step/children)
"""
UNTIL_SRUN_ENDED = "while kill -0 $(cat srun); do sleep 0.02; done"


def stand_ins_for_slurm(folder: Path, **changes: str) -> dict[str, str]:
    """One node: srun starts the one task here, scancel signals it and its children, scontrol knows
    the host and notes a requeue.
    """
    scripts = {
        "bin/srun": SRUN,
        "bin/scancel": SCANCEL,
        "bin/scontrol": 'case "$1" in show) echo 127.0.0.1;; *) echo "$@" >> requeued;; esac',
        ".venv/bin/python": f'exec {sys.executable} "$@"',
        **changes,
    }
    for name, script in scripts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    for name in ("train_router.py", "sample.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return {
        **os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "3",
    }  # fmt: skip


def slurm_job(folder: Path, environment: dict[str, str], script: str, *arguments):
    return subprocess.Popen(
        [str(ROOT / "scripts" / script), *map(str, arguments)], cwd=folder, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize(
    ("status", "scancel"),
    [(143, ""), (0, ""), (0, UNTIL_SRUN_ENDED)],
    ids=["cut short", "done", "done at once"],
)
def test_a_job_is_asked_to_end_and_comes_back_unless_it_was_done(tmp_path, signum, status, scancel):
    """What ends it takes a moment, or is over before the script looks again."""
    asked = f"trap 'sleep 0.1; touch safe; exit {status}' TERM; touch started; while sleep 0.02"
    environment = stand_ins_for_slurm(
        tmp_path,
        **{".venv/bin/python": f"{asked}; do :; done", "bin/scancel": f"{SCANCEL}{scancel}"},
    )
    job = slurm_job(tmp_path, environment, "slurm_train.sh")
    while not (tmp_path / "started").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    job.send_signal(signum)
    said, _ = job.communicate(timeout=30)
    assert (tmp_path / "safe").exists(), said
    assert job.returncode == status, said
    assert (tmp_path / "requeued").exists() == (status != 0)
    assert (tmp_path / "cpus").read_text() == "3\n"


def test_jobs_that_share_a_node_meet_at_ports_of_their_own(tmp_path):
    environment = stand_ins_for_slurm(tmp_path, **{".venv/bin/python": 'echo "$@" >> started'})
    for number in ("7", "8", "20007"):
        job = slurm_job(tmp_path, {**environment, "SLURM_JOB_ID": number}, "slurm_train.sh")
        said, _ = job.communicate(timeout=30)
        assert job.returncode == 0, said
    ports = re.findall(r"--rdzv_endpoint=127\.0\.0\.1:(\d+)", (tmp_path / "started").read_text())
    assert ports == ["10007", "10008", "10007"]


def test_a_preempted_job_comes_back(tmp_path, nightly, faults):
    job = functools.partial(slurm_job, tmp_path, stand_ins_for_slurm(tmp_path))
    training = [*TRAIN[:-4], "--results-dir", "runs"]
    first = job("slurm_train.sh", *training, "--max-steps", "400")
    while updates(tmp_path) < 6:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGUSR1)
    faults.add("preemption of a Slurm job")
    said, _ = first.communicate(timeout=60)
    assert first.returncode != 0 and "stopped by SIGTERM" in said, said
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    done = updates(tmp_path)
    second = job("slurm_train.sh", *training, "--max-steps", done + 4)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and "going on from" in said, said

    many = [*SAMPLE[:5], "4000", *SAMPLE[6:]]
    first = job("slurm_sample.sh", *many)
    while len(list((tmp_path / "out" / "shards").glob("*.json"))) < 2:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGUSR1)
    faults.add("preemption of a Slurm job")
    said, _ = first.communicate(timeout=60)
    assert first.returncode != 0 and "run the same command again" in said, said
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" * 2
