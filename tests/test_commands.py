"""The command-line files as a user runs them: what they make, and what they refuse."""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_command
from PIL import Image

from harmonica import commands
from harmonica.comparison.config import CompareConfig
from harmonica.flops import Costs
from harmonica.options import CommandParser, build_parser, resolve
from harmonica.router_file import (
    RouterFile,
    RouterInfo,
    load_router,
    load_schedule_file,
    save_router,
)
from harmonica.sample_config import SampleConfig
from harmonica.schedule import Schedule
from harmonica.training.config import TrainConfig
from models import MODELS

TINY = ["--num-sampling-steps", "4", "--global-batch-size", "4"]
PUBLISHED_TRAIN = shlex.split(
    "--results-dir results --model DiT-XL/2 --image-size 256 --num-classes 1000 --epochs 2000 "
    "--global-batch-size 64 --global-seed 42 --vae ema --num-works 8 --log-every 100 "
    "--ckpt-every 1000 --wandb --num-sampling-steps 10 --l1 7e-8 --lr 0.01 --max-steps 20000 "
    "--cfg-scale 1.5 --ste-threshold 0.1 --lambda-c 500"
)
PUBLISHED_SAMPLE = shlex.split(
    "--model DiT-XL/2 --vae ema --image-size 256 --num-classes 1000 --cfg-scale 4 "
    "--num-sampling-steps 10 --seed 42 --accelerate-method dynamiclayer --ddim-sample "
    "--path Path/To/The/Trained/Router/ --thres 0.1"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished training run; its folder."""
    folder = tmp_path_factory.mktemp("run")
    done = run_command(
        "train_router.py", *TINY, "--max-steps", "7", "--lambda-c", "4", "--target-cur", "0.5",
        "--log-every", "2", "--ckpt-every", "3", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "results" / "000-DiT-Ti-4-T4"


def test_a_run_directory_holds_everything(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["target_cur"] == 0.5 and config["max_steps"] == 7
    assert (run / "commit.txt").read_text().strip()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["update"] == 7
    assert all(np.isfinite(list(record.values())).all() for record in metrics)
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] == "0000006.pt.sha256"
    router = load_router(run)
    assert router.info.model == "DiT-Ti/4" and router.info.sampler == "ddim"
    assert router.schedule.cur == 0.5
    assert load_schedule_file(run / "schedule.json")[0] == router.schedule
    assert load_schedule_file(run / "schedule.json")[1].sampler == "ddim"
    for picture in ("router.png", "lambda.png", "samples.png"):
        assert np.asarray(Image.open(run / picture)).std() > 0


def test_wandb_is_touched_only_when_asked_for(run, tmp_path):
    assert not list(run.parent.parent.rglob("*wandb*"))
    done = run_command(
        "train_router.py", *TINY, "--max-steps", "3", "--wandb", "--log-every", "1", cwd=tmp_path,
        WANDB_MODE="offline",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results" / "000-DiT-Ti-4-T4" / "wandb"
    assert list(folder.glob("offline-run-*/run-*.wandb"))


def test_the_resolved_config_is_a_preset(run, tmp_path):
    done = run_command(
        "train_router.py", "--config", run / "config.yaml", "--dry-run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (run / "config.yaml").read_text()


def test_sampling_with_and_without_the_router(run, tmp_path):
    done = run_command(
        "sample.py", "--path", run, "--compare", "--classes", "3", "5",
        "--repeats", "2", "--out", "out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in (
        "CUR",
        "theoretical speed-up",
        "measured speed-up",
        "image error",
        "comparison.png",
    ):
        assert line in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["image_error"]["mse_mean"] > 0
    assert report["schedule"]["cur"] == 0.5
    assert Image.open(tmp_path / "out" / "with_router" / "000001.png").size == (32, 32)
    assert Image.open(tmp_path / "out" / "uncached.png").width > 64


def test_a_full_schedule_gives_the_uncached_images(run, tmp_path):
    router = load_router(run)
    save_router(
        tmp_path / "full.safetensors",
        RouterFile(
            torch.full_like(router.logits, 5.0), router.info,
            Schedule.full(4, router.schedule.costs),
        ),
    )  # fmt: skip
    done = run_command(
        "sample.py", "--path", "full.safetensors", "--compare",
        "--num-images", "2", "--repeats", "1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "samples" / "report.json").read_text())
    assert report["image_error"]["mse_mean"] == 0


def test_iddpm_samples(tmp_path):
    done = run_command(
        "sample.py", "--sampler", "iddpm", "--num-sampling-steps", "3", "--num-images", "2",
        "--repeats", "1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples" / "uncached" / "000001.png").is_file()


def test_sampling_with_a_method_that_needs_no_training(tmp_path):
    done = run_command(
        "sample.py", "--method", "fora", "--target-speedup", "2", "--compare",
        "--num-sampling-steps", "4", "--num-images", "2", "--repeats", "1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "N = 2" in done.stdout and "50.0%" in done.stdout
    report = json.loads((tmp_path / "samples" / "report.json").read_text())
    assert report["schedule"]["compute"] == ["1" * 24, "0" * 24] * 2
    assert (tmp_path / "samples" / "with_fora" / "000001.png").is_file()
    assert (tmp_path / "samples" / "comparison.png").is_file()


def test_fewer_images_leave_none_of_an_earlier_run(tmp_path):
    for count in ("3", "2"):
        done = run_command(
            "sample.py", "--num-sampling-steps", "2", "--num-images", count, "--repeats", "1",
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (tmp_path / "samples" / "mine").mkdir(exist_ok=True)
        (tmp_path / "samples" / "mine" / "000007.png").write_bytes(b"kept")
    assert (tmp_path / "samples" / "mine" / "000007.png").read_bytes() == b"kept"
    names = sorted(p.name for p in (tmp_path / "samples" / "uncached").iterdir())
    assert names == ["000000.png", "000001.png"]


def test_flags_replace_the_budget_of_a_preset(tmp_path):
    demo = ROOT / "configs" / "demo.yaml"
    for flag, name in (("--target-speedup", "target_speedup"), ("--l1", "l1")):
        done = run_command(
            "train_router.py", "--config", demo, flag, "1.5", "--dry-run", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        config = yaml.safe_load(done.stdout)
        assert config[name] == 1.5 and config["target_cur"] is None
    # With a price by hand another objective learns, for which the preset's length is too short.
    assert config["objective"] == "sdt" and config["max_steps"] == 1000


def test_another_objective_replaces_what_a_preset_says_of_the_first():
    preset = str(ROOT / "configs" / "dit_xl2_256_t20.yaml")

    def resolved(objective):
        arguments = ["--config", preset, "--objective", objective]
        return resolve(TrainConfig, build_parser(TrainConfig, "").parse_args(arguments))

    same, other = resolved("sdt"), resolved("trajectory")
    assert (same.lr, same.max_steps, same.lambda_c) == (0.01, 20000, 500)
    defaults = TrainConfig(objective="trajectory")
    assert (other.lr, other.max_steps) == (defaults.lr, defaults.max_steps)
    assert other.target_cur == same.target_cur and other.model == same.model


def test_flags_on_a_resolved_config_act_as_on_the_defaults(run, tmp_path):
    """What follows from an option by default follows from the flag, not from the earlier run."""

    def resolved(*arguments):
        parser = build_parser(TrainConfig, "")
        return resolve(TrainConfig, parser.parse_args([str(word) for word in arguments]))

    fresh, again = TINY, ("--config", run / "config.yaml")
    for flags, names in (
        (("--l1", "7e-8"), ("lambda_form", "compares_all", "target_cur")),
        (("--epochs", "500"), ("max_steps",)),
        (("--global-batch-size", "64"), ("lambda_batch_size",)),
    ):
        a, b = resolved(*fresh, *flags), resolved(*again, *flags)
        assert [getattr(a, name) for name in names] == [getattr(b, name) for name in names]


def test_options_that_a_flag_makes_idle_go_with_it(tmp_path):
    """Nobody is refused for what a preset or a router says of an option that the flag replaces."""
    preset = tmp_path / "preset.yaml"
    preset.write_text("l1: 1.0e-7\nthreshold: 0.3\neta: 0.5\n")

    def resolved(*flags):
        arguments = ["--config", str(preset), *flags]
        return resolve(TrainConfig, build_parser(TrainConfig, "").parse_args(arguments))

    assert (resolved().threshold, resolved().eta) == (0.3, 0.5)
    assert resolved("--l1", "2e-7").threshold == 0.3
    assert resolved("--target-cur", "0.4").threshold == 0.1
    assert resolved("--freeze-schedule", "x.json", "--predictor", "learned").threshold == 0.1
    assert resolved("--sampler", "iddpm").eta == 0
    info = RouterInfo(sampler="ddim", eta=0.5)
    save_router(tmp_path / "router.safetensors", RouterFile(torch.zeros(20, 6), info))

    def replayed(*flags):
        arguments = ["--path", str(tmp_path / "router.safetensors"), *flags]
        return resolve(SampleConfig, build_parser(SampleConfig, "").parse_args(arguments))

    assert replayed().eta == 0.5
    assert replayed("--sampler", "iddpm", "--force").eta == 0


@pytest.mark.parametrize("script", ["sample.py", "evaluate.py"])
def test_every_resolved_config_is_yaml(script, tmp_path):
    done = run_command(
        script, "--path", "a.json", "--threshold", "0.5", "--out", "o", "--dry-run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "a.json" in str(yaml.safe_load(done.stdout))


def test_inspecting_a_router(run, tmp_path):
    script = "scripts/inspect_router.py"
    done = run_command(script, run, "--out", "heat.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CUR                    50.0%" in done.stdout
    assert (tmp_path / "heat.png").is_file()
    # A published file that does not say its model has no cost without the flag.
    logits = torch.zeros(10, 1, 56)
    logits[:9, 0, :14] = -3.0
    torch.save({f"{i}.prob": row for i, row in enumerate(logits)}, tmp_path / "published.pt")
    done = run_command(
        script, "published.pt", "--threshold", "0.1", "--semantics", "ltc", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "computed per step      56 42 56" in done.stdout and "with --model" in done.stdout
    done = run_command(
        script, "published.pt", "--threshold", "0.1", "--model", "DiT-XL/2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"CUR                    {100 * 9 * 14 / 560:.1f}%" in done.stdout
    assert "computed per step      56 42 42 42 42 42 42 42 42 42" in done.stdout
    # Read as Learning-to-Cache means it, only every other step reuses anything.
    done = run_command(
        script, "published.pt", "--threshold", "0.1", "--model", "DiT-XL/2", "--semantics", "ltc",
        cwd=tmp_path,
    )  # fmt: skip
    assert "computed per step      56 42 56 42 56 42 56 42 56 42" in done.stdout


def test_published_command_lines_parse(tmp_path):
    done = run_command("train_router.py", *PUBLISHED_TRAIN, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    expected = {"threshold": 0.1, "l1": 7e-8, "num_workers": 8, "wandb": True, "lambda_c": 500}
    expected |= {"target_cur": None, "lambda_form": "published"}
    assert {name: config[name] for name in expected} == expected
    done = run_command("sample.py", *PUBLISHED_SAMPLE, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["threshold"] == 0.1 and config["cfg_scale"] == 4.0


# Of HarmoniCa (ICML 2025), by preset: what is sampled; CUR in percent, FID without and with the
# router, seconds without and with it; None where it is not published.
PUBLISHED = {
    "dit_xl2_256_t10": ("DiT-XL/2", 256, "DDIM", 10, 1.5, 22.86, 12.16, 13.35, 0.332, 0.270),
    "dit_xl2_256_t20": ("DiT-XL/2", 256, "DDIM", 20, 1.5, 37.50, 3.52, 4.88, 0.658, 0.456),
    "dit_xl2_256_t50": ("DiT-XL/2", 256, "DDIM", 50, 1.5, 23.68, 2.27, 2.36, 1.767, 1.361),
    "dit_xl2_512_t20": ("DiT-XL/2", 512, "DDIM", 20, 1.5, 25.98, 5.10, 5.72, 3.356, 2.574),
    "pixart_alpha_256_dpm_t20": (
        "PixArt-alpha-XL/2", 256, "DPM-Solver++", 20, 4.5, 56.01, 27.68, 26.33, 0.553, 0.346,
    ),
    "pixart_alpha_256_iddpm_t100": (
        "PixArt-alpha-XL/2", 256, "IDDPM", 100, 4.5, 53.24, 24.15, 23.73, 2.572, 1.523,
    ),
    "pixart_alpha_256_sa_t25": (
        "PixArt-alpha-XL/2", 256, "SA-Solver", 25, 4.5, 54.19, 26.78, 27.07, 0.891, 0.561,
    ),
    "pixart_alpha_512_dpm_t20": (
        "PixArt-alpha-XL/2", 512, "DPM-Solver++", 20, 4.5, 54.64, 23.96, 24.81, 1.759, 1.072,
    ),
    "pixart_alpha_512_sa_t25": (
        "PixArt-alpha-XL/2", 512, "SA-Solver", 25, 4.5, 54.24, 25.43, 25.74, 2.263, 1.406,
    ),
    "pixart_alpha_1024_dpm_t20": (
        "PixArt-alpha-XL/2", 1024, "DPM-Solver++", 20, 4.5, 55.06, 25.01, 23.02, 9.470, 5.786,
    ),
    "pixart_alpha_1024_sa_t25": (
        "PixArt-alpha-XL/2", 1024, "SA-Solver", 25, 4.5, 53.98, 23.65, 23.77, 11.931, 7.551,
    ),
    "pixart_sigma_2048_dpm_t20": (
        "PixArt-Sigma-XL/2", 2048, "DPM-Solver++", 20, 4.5, None, None, None, 14, 8,
    ),
    "uvit_h2_256_dpm_t20": (
        "U-ViT-H/2", 256, "DPM-Solver", 20, 1.4, None, 2.57, 2.61, 7.60, 4.60,
    ),
}  # fmt: skip
PUBLISHED_SAMPLERS = {
    "ddim": "DDIM", "iddpm": "IDDPM", "dpm-solver": "DPM-Solver", "dpm-solver++": "DPM-Solver++",
    "dpm-solver++-euler": "DPM-Solver++", "sa-solver": "SA-Solver",
}  # fmt: skip


def read_preset_file(path: Path) -> tuple[TrainConfig | CompareConfig, list[str]]:
    """What it resolves to, and the lines of its header."""
    cls = CompareConfig if path.stem.startswith("compare") else TrainConfig
    config = resolve(cls, build_parser(cls, "").parse_args(["--config", str(path)]))
    lines = path.read_text().splitlines()
    return config, [line.removeprefix("# ") for line in lines if line.startswith("#")]


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_resolves_and_says_what_it_gave(preset):
    config, header = read_preset_file(preset)
    spec = MODELS[config.model]
    assert config.image_size is None or spec.sizes is None or config.image_size in spec.sizes
    assert any(preset.name in line or "demo.sh" in line for line in header)
    assert any("not measured yet" in line or "Measured" in line for line in header)


def test_every_published_experiment_has_a_preset():
    own = {path.stem for path in (ROOT / "configs").glob("compare_*.yaml")} | {"demo"}
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == own | set(PUBLISHED)


def numbers_in(text: str, pattern: str) -> list[float] | None:
    """The groups of the first match."""
    match = re.search(pattern, text)
    return match and [float(group) for group in match.groups()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_experiment_and_quotes_it(name):
    model, size, sampler, steps, guidance, *numbers = PUBLISHED[name]
    config, header = read_preset_file(ROOT / "configs" / f"{name}.yaml")
    assert header[0] == (
        f"{model} at {size}, {sampler}, T = {steps}, guidance {guidance}, four GPUs."
    )
    assert (config.model, config.image_size) == (model, size)
    assert PUBLISHED_SAMPLERS[config.sampler] == sampler
    assert (config.num_sampling_steps, config.cfg_scale) == (steps, guidance)
    text = " ".join(header)
    cur, before, after, slow, fast = numbers
    assert numbers_in(text, r"CUR ([\d.]+) %") == (cur and [cur])
    assert numbers_in(text, r"FID ([\d.]+) \(uncached ([\d.]+)\)") == (after and [after, before])
    assert numbers_in(text, r"([\d.]+) -> ([\d.]+) s") == [slow, fast]
    if config.target_cur is not None:
        assert config.target_cur == pytest.approx(cur / 100)


def refusals(tmp_path):
    """(command line, what the sentence must name)."""
    (tmp_path / "bad.yaml").write_text("no_such_option: 1\n")
    (tmp_path / "type.yaml").write_text("lr: fast\n")
    (tmp_path / "empty.yaml").write_text("classes: []\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("x")
    save_router(tmp_path / "other.safetensors", RouterFile(torch.zeros(20, 6), RouterInfo()))
    costs = Costs(tuple(f"blocks.{i}.attn" for i in range(6)), (1,) * 6, 1)
    save_router(
        tmp_path / "with_schedule.safetensors",
        RouterFile(torch.zeros(20, 6), RouterInfo(), Schedule.full(20, costs)),
    )
    train, sample = "train_router.py", "sample.py"
    return [
        ([train, "--model", "DiT-XXL/2"], "--model DiT-XXL/2"),
        ([train, "--image-size", "33"], "--image-size 33"),
        ([train, "--model", "DiT-XL/2", "--image-size", "260"], "--image-size 260"),
        ([train, "--image-size", "64"], "--ckpt"),
        ([train, "--num-classes", "7"], "--num-classes"),
        ([train, "--global-seed", "99999999999999999999"], "--global-seed"),
        ([train, "--num-sampling-steps", "1"], "--num-sampling-steps 1"),
        ([train, "--num-sampling-steps", "1001"], "--num-sampling-steps 1001"),
        ([train, "--lr", "nan"], "--lr nan"),
        ([train, "--lr", "-1"], "--lr -1"),
        ([train, "--l1=-1e-8"], "--l1 -1e-08"),
        ([train, "--threshold", "1.5"], "--threshold 1.5"),
        ([train, "--global-batch-size", "5"], "--global-batch-size 5"),
        ([train, "--global-batch-size", "x"], "--global-batch-size"),
        ([train, "--target-cur", "0.99"], "--target-cur 0.99"),
        ([train, "--target-speedup", "40"], "--target-speedup 40"),
        ([train, "--target-cur", "0.5", "--target-speedup", "2"], "--target-speedup"),
        ([train, "--target-cur", "0.5", "--l1", "1e-7"], "--l1"),
        ([train, "--adam-eps", "0"], "--adam-eps"),
        ([train, "--method", "learning-to-cache"], "--data"),
        ([train, "--method", "learning-to-cache", "--data", "absent", "--target-cur", "0.2"],
         "--data absent"),
        ([train, "--data", "absent"], "--data"),
        ([train, "--cuda-graphs"], "--cuda-graphs is for --objective trajectory"),
        ([train, "--objective", "trajectory", "--cuda-graphs"], "--cuda-graphs needs a GPU"),
        ([train, "--threshold", "0.3"], "--threshold is for --l1"),
        ([train, "--sampler", "iddpm", "--eta", "0.5"], "--eta is for --sampler ddim"),
        ([sample, "--sampler", "dpm-solver++", "--eta", "1"], "--eta is for --sampler ddim"),
        ([sample, "--shard-size", "64"], "--shard-size is for --num-samples"),
        ([sample, "--timeout", "60"], "--timeout is for --num-samples"),
        (["scripts/inspect_router.py", "with_schedule.safetensors", "--image-size", "32"],
         "--image-size 32 is for --model"),
        ([train, "--resume", "absent"], "--resume absent"),
        ([train, "--resume", "foreign"], "--resume foreign"),
        ([train, "--keep-ckpts", "1"], "--keep-ckpts 1"),
        ([train, "--timeout", "0"], "--timeout 0"),
        ([sample, "--num-samples", "4", "--out", "foreign"], "--out foreign"),
        ([sample, "--num-samples", "4", "--out", "file"], "--out file"),
        ([sample, "--num-samples", "4", "--out", "file/below"], "--out file/below"),
        ([sample, "--num-samples", "4", "--classes", "10"], "--classes 10"),
        ([sample, "--num-samples", "4", "--num-images", "4"], "--num-images"),
        ([sample, "--num-samples", "0"], "--num-samples 0"),
        ([sample, "--png"], "--png"),
        (["scripts/compare.py", "--curs", "0.99"], "--curs 0.99"),
        (["scripts/compare.py", "--methods", "guess"], "--methods guess"),
        (["scripts/compare.py", "--exact-steps", "1"], "--exact-steps 1"),
        (["scripts/compare.py", "--out", "foreign", "--num-images", "0"], "--out foreign"),
        ([sample, "--semantics", "ltc"], "--path"),
        ([sample, "--config", "empty.yaml"], "classes"),
        ([train, "--mixed-precision", "fp8"], "--mixed-precision"),
        ([train, "--config", "bad.yaml"], "no_such_option"),
        ([train, "--config", "type.yaml"], "lr"),
        ([train, "--config", "broken.yaml"], "broken.yaml"),
        ([train, "--config", "absent.yaml"], "absent.yaml"),
        ([train, "--no-such-flag"], "--no-such-flag"),
        ([train, "--results-dir", "foreign"], "--results-dir foreign"),
        ([train, "--results-dir", "file"], "--results-dir file"),
        ([train, "--results-dir", "file/below"], "--results-dir file/below"),
        ([train, "--ckpt", "absent.pt"], "--ckpt absent.pt"),
        ([train, "--ckpt", "file"], "file"),
        ([train, "--model", "DiT-S/2"], "--ckpt"),
        ([train, "--model", "DiT-Ti/2", "--image-size", "32", "--ckpt", "other.safetensors"],
         "other.safetensors"),
        ([sample, "--path", "absent"], "--path absent"),
        ([sample, "--path", "other.safetensors"], "branches"),
        ([sample, "--classes", "10"], "--classes 10"),
        ([sample, "--compare"], "--path"),
        ([sample, "--method", "fora"], "--target-speedup"),
        ([sample, "--method", "guess", "--target-cur", "0.5"], "--method guess"),
        ([sample, "--target-cur", "0.5"], "--target-cur 0.5"),
        ([sample, "--method", "random", "--target-cur", "0.99"], "--target-cur 0.99"),
        ([sample, "--method", "fora", "--target-cur", "0.5", "--path", "x"], "--path"),
        ([sample, "--out", "foreign"], "--out foreign"),
        ([sample, "--num-images", "0"], "--num-images 0"),
        ([sample, "--threshold", "0"], "--path"),
        ([sample, "--out", "file/below"], "--out file/below"),
        (["evaluate.py", "--samples", "x", "--metrics", "fid", "kid"], "--metrics kid"),
        (["evaluate.py", "--samples", "x", "--extractor", "vgg"], "--extractor vgg"),
        (["evaluate.py", "--samples", "absent.npz"], "--samples absent.npz"),
        (["scripts/train_backbone.py", "--data", "absent", "--out", "b"], "--data absent"),
        (["scripts/train_classifier.py", "--data", "absent", "--out", "b"], "--test-data"),
        (["scripts/train_classifier.py", "--data", "absent", "--test-data", "absent", "--out", "b"],
         "--data absent"),
        (["evaluate.py"], "--path"),
        (["download.py", "DiT-S/2"], "DiT-S/2"),
        (["download.py", "inception", "--image-size", "299"], "inception"),
        (["scripts/inspect_router.py", "absent"], "absent"),
    ]  # fmt: skip


def test_bad_input_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    """Run in this process, the files being the same ones: three dozen imports of torch are slow."""
    cases = refusals(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for (script, *arguments), named in cases:
        monkeypatch.setattr("sys.argv", [script, *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        message = capsys.readouterr().err
        assert stopped.value.code == 2, (script, arguments, message)
        assert message.startswith("error: ") and message.count("\n") == 1, message
        assert named in message, (named, message)
        assert sorted(tmp_path.rglob("*")) == before, f"{arguments} left files behind"


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        (commands.train, ["--results-dir", "out"]),
        (commands.sample, ["--num-samples", "2", "--out", "out"]),
        (commands.evaluate, ["--uncached", "--out", "out"]),
    ],
    ids=["train", "sample", "evaluate"],
)
def test_more_processes_than_gpus_are_refused(program, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("sys.argv", ["program", *flags])
    with pytest.raises(SystemExit) as refusal:
        program()
    said = "error: --nproc_per_node 4 is more than the 2 GPUs of this machine; use 2\n"
    assert refusal.value.code == 2 and capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())


def test_a_missing_checkpoint_offline_says_what_to_do(tmp_path):
    done = run_command(
        "train_router.py", "--model", "DiT-XL/2", "--image-size", "256", cwd=tmp_path,
        HTTPS_PROXY="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "download.py" in done.stderr
    assert not (tmp_path / "results").exists()


def test_the_published_way_to_say_ddim(tmp_path):
    done = run_command(
        "sample.py", "--sampler", "iddpm", "--ddim-sample", "--num-sampling-steps", "2",
        "--num-images", "1", "--repeats", "1", "--out", "a", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run_command(
        "sample.py", "--num-sampling-steps", "2", "--num-images", "1", "--repeats", "1", "--out",
        "b", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    a, b = (np.asarray(Image.open(tmp_path / n / "uncached" / "000000.png")) for n in "ab")
    assert (a == b).all()


def shell(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a script with bash as the shell scripts run: any failure ends it."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


# A Python without ensurepip, as Debian and Ubuntu have it: `-m venv` leaves half an environment.
# Its pip, if it has one, installs an empty module where it is told to.
DEBIAN = f"""
case "$1 $2" in
  "-m venv")
    {sys.executable} -m venv --without-pip .venv
    [ "$3" = --without-pip ] || {{ echo "ensurepip is not available"; exit 1; }} ;;
  "-m pip") $HAS_PIP && mkdir -p "${{@: -1}}/pip" && touch "${{@: -1}}/pip/__init__.py" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


def test_an_environment_is_made_without_ensurepip_or_not_at_all(tmp_path):
    python = executable(tmp_path / "debian", DEBIAN)
    make = f"source {ROOT}/scripts/environment.sh; make_environment"
    done = shell(make, tmp_path, PYTHON=str(python), HAS_PIP="false")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()
    done = shell(f"{make}; has_pip", tmp_path, PYTHON=str(python), HAS_PIP="true")
    assert done.returncode == 0, done.stderr
    # Half an environment, which an earlier version left behind, is made whole.
    done = shell(
        f"{sys.executable} -m venv --without-pip --clear .venv; {make}; has_pip", tmp_path,
        PYTHON=str(python), HAS_PIP="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_old_python_is_refused(tmp_path):
    old = "exit 1"  # to whether it is new enough
    python = executable(tmp_path / "old", old)
    install = f"source {ROOT}/scripts/environment.sh; install_project"
    done = shell(install, tmp_path, PYTHON=str(python))
    assert done.returncode == 2 and "set PYTHON" in done.stderr
    assert not (tmp_path / ".venv").exists()
    executable(tmp_path / ".venv" / "bin" / "python", old)
    done = shell(install, tmp_path)
    assert done.returncode == 2 and "remove it" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_demo_samples_with_the_router_that_it_trained(tmp_path):
    """Not with another run beside it, whatever its name."""
    for name in ("demo.sh", "environment.sh"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("")
    for run in ("999-DiT-Ti-4-T20", "1001-DiT-Ti-4-T20"):
        (tmp_path / "results" / run).mkdir(parents=True)
    trained = "results/1000-DiT-Ti-4-T20"
    executable(
        tmp_path / ".venv" / "bin" / "python",
        f"""
        case "$1" in
          train_router.py) echo "a line before"; echo "router and pictures: {trained}" ;;
          sample.py) echo "$@" > sampled ;;
        esac
        """,
    )
    done = shell("bash scripts/demo.sh", tmp_path)
    assert done.returncode == 0, done.stderr
    sampled = (tmp_path / "sampled").read_text()
    assert f"--path {trained} " in sampled and f"--out {trained}/samples" in sampled
    assert "a line before" in done.stdout and f"router: {trained}/router.png" in done.stdout


def documented_commands() -> list[tuple[str, ...]]:
    """Every command of the documents and presets, from the script on, without what launches it."""
    texts = [path.read_text() for path in (ROOT / "README.md", ROOT / "models/weights/README.md")]
    lines = "\n".join(texts).splitlines()
    for preset in sorted((ROOT / "configs").glob("*.yaml")):
        lines += [line.removeprefix("#").strip() for line in preset.read_text().splitlines()]
    # Commands in prose may run over a line's end.
    prose = re.sub(r"```.*?```", "", "\n".join(texts), flags=re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    launches = re.compile(r"(\.venv/bin/\S+ |python |bash |sbatch )")
    found = [line for line in lines if launches.match(line)]
    found += [span for span in spans if re.match(r"((python|bash|sbatch) )?\S+\.(py|sh)\b", span)]
    words = [shlex.split(line, comments=True) for line in found]
    return sorted({tuple(command[_place_of_script(command) :]) for command in words})


def _place_of_script(command: list[str]) -> int:
    return next(i for i, word in enumerate(command) if word.endswith((".py", ".sh")))


DOCUMENTED = documented_commands()


def parse_only(script: str, flags: tuple[str, ...], monkeypatch) -> None:
    """Run a script with its own parser and configuration, up to where its work would begin."""

    def parse_args(parser: CommandParser) -> argparse.Namespace:
        known, parse = parser._option_string_actions, argparse.ArgumentParser.parse_args
        if flags[-1] in known and known[flags[-1]].nargs != 0:
            # Prose names the flag without a value.
            parse(parser, flags[:-1])
            sys.exit(0)
        arguments = parse(parser, flags)
        if "--dry-run" not in known:
            sys.exit(0)
        arguments.dry_run = True
        return arguments

    monkeypatch.setattr(CommandParser, "parse_args", parse_args)
    monkeypatch.setattr("sys.argv", [script, *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 0


@pytest.mark.parametrize("command", DOCUMENTED, ids=" ".join)
def test_documented_commands_resolve(command, tmp_path, monkeypatch):
    script, *flags = command
    assert (ROOT / script).is_file()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    of_sbatch = {
        "scripts/slurm_train.sh": "train_router.py", "scripts/slurm_sample.sh": "sample.py",
    }  # fmt: skip
    script = of_sbatch.get(script, script)
    if flags and script.endswith(".py"):
        parse_only(script, tuple(flags), monkeypatch)


def test_documented_commands_were_found():
    scripts = {script for script, *_ in DOCUMENTED}
    assert {path.name for path in ROOT.glob("*.py")} <= scripts
    of_scripts = {f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")}
    assert of_scripts | {"scripts/demo.sh", "scripts/slurm_train.sh"} <= scripts
    # In prose, over the end of a line.
    timed = [command for command in DOCUMENTED if command[0] == "scripts/bench_sampling.py"]
    assert any(len(command) > 10 for command in timed)


@pytest.mark.parametrize("flags", [("--no-such-flag",), ("--lr", "x"), ("--model", "DiT-XXL/2")])
def test_a_documented_command_that_does_not_work_would_be_found(flags, monkeypatch):
    with pytest.raises(AssertionError):
        parse_only("train_router.py", flags, monkeypatch)
