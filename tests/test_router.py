"""Router files and schedules: what is kept, what is refused, and that targets are met exactly."""

import argparse
import hashlib
import json
import os
import pickle
import runpy
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT, Golden
from families import tiny_specs
from safetensors.torch import save

from harmonica.backbone import Backbone, load_backbone
from harmonica.budget import Budget
from harmonica.errors import HarmonicaError
from harmonica.flops import Costs
from harmonica.options import build_parser, resolve
from harmonica.plans import choose_plan
from harmonica.predictors import LAST, Learned
from harmonica.router import Router, alternate_rows, budget_schedule, threshold_schedule
from harmonica.router_file import (
    RouterFile,
    RouterInfo,
    load_router,
    load_schedule_file,
    save_router,
)
from harmonica.sample_config import SampleConfig
from harmonica.sampling import load_schedule
from harmonica.schedule import Schedule
from harmonica.training.config import TrainConfig
from harmonica.training.trainer import Trainer
from models import MODELS

CPU = torch.device("cpu")
COSTS = Costs(tuple(f"blocks.{i}.{k}" for i in range(3) for k in ("attn", "mlp")), (5, 9) * 3, 4)
INFO = RouterInfo(model="DiT-Ti/4", num_sampling_steps=7, timesteps=(6.0, 5, 4, 3, 2, 1, 0))


@pytest.fixture
def router() -> RouterFile:
    logits = Router.initial(7, 6, seed=0, mean=0.0, std=1.0).logits()
    return RouterFile(logits, INFO, budget_schedule(logits, COSTS, Budget(cur=0.4)))


@pytest.fixture
def backbone() -> Backbone:
    config = SampleConfig(sampler="iddpm", num_sampling_steps=4, guide_all_channels=True)
    return load_backbone(config, CPU, random_weights=True)


def resolved(*arguments) -> SampleConfig:
    parser = build_parser(SampleConfig, "")
    return resolve(SampleConfig, parser.parse_args([str(word) for word in arguments]))


@pytest.fixture
def saved(router, tmp_path):
    path = tmp_path / "router.safetensors"
    save_router(path, router)
    return path


def test_a_router_file_comes_back_whole(router, saved):
    loaded = load_router(saved)
    assert torch.equal(loaded.logits, router.logits)
    assert loaded.info == router.info
    assert loaded.schedule == router.schedule


def test_a_schedule_comes_back_whole(router, tmp_path):
    router.schedule.save(tmp_path / "s.json")
    loaded = load_schedule_file(tmp_path / "s.json")[0]
    assert loaded == router.schedule and loaded.hash == router.schedule.hash
    # Readable: one row of 0 and 1 per step.
    rows = json.loads((tmp_path / "s.json").read_text())["compute"]
    assert rows[0] == "111111" and len(rows) == 7


@pytest.mark.parametrize("keep", [0, 1, 7, 9, 100, -1, -20])
def test_truncated_files_are_refused(saved, keep):
    content = saved.read_bytes()
    saved.write_bytes(content[:keep])
    with pytest.raises(HarmonicaError):
        load_router(saved)


def test_every_flipped_bit_is_noticed_or_harmless(router, saved):
    content = saved.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        position, bit = int(generator.integers(len(content))), int(generator.integers(8))
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        saved.write_bytes(damaged)
        try:
            loaded = load_router(saved)
        except HarmonicaError as error:
            assert "\n" not in str(error)
        else:
            assert torch.equal(loaded.logits, router.logits) and loaded.schedule == router.schedule


class Hostile:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", ["torch", "legacy", "pickle"])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, protocol):
    path, target = tmp_path / "router.pt", tmp_path / "owned"
    content = {"0.prob": torch.zeros(1, 6), "args": Hostile(target)}
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "torch")
    with pytest.raises(HarmonicaError, match="not loaded"):
        load_router(path)
    assert not target.exists()


@pytest.mark.parametrize("layout", ["routers", "bare"])
def test_published_files_load_with_their_rows_reversed(tmp_path, layout):
    rows = {f"{i}.prob": torch.full((1, 6), float(i)) for i in range(5)}
    arguments = argparse.Namespace(model="DiT-Ti/4", ste_threshold=0.1, image_size="huge")
    whole = {"routers": rows, "opt": {"state": {}}, "args": arguments}
    path = tmp_path / "ckpt.pt"
    torch.save(whole if layout == "routers" else rows, path)
    router = load_router(path)
    assert router.logits[:, 0].tolist() == [4, 3, 2, 1, 0]
    assert router.info.model == ("DiT-Ti/4" if layout == "routers" else None)
    assert router.info.image_size is None and router.schedule is None


def test_published_arguments_of_another_kind_are_ignored(tmp_path):
    torch.save({"routers": {"0.prob": torch.zeros(1, 6)}, "args": {"model": 3}}, tmp_path / "x.pt")
    assert load_router(tmp_path / "x.pt").info.model is None


def test_a_run_directory_stands_for_its_newest_published_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for update in (1000, 20000):
        rows = {f"{i}.prob": torch.full((1, 6), update / 1e4) for i in range(5)}
        torch.save(rows, tmp_path / "checkpoints" / f"{update:07d}.pt")
    assert load_router(tmp_path).logits[0, 0] == 2.0


def test_an_unfinished_run_says_so(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(HarmonicaError, match="has not exported"):
        load_router(tmp_path)


def test_other_weights_are_pointed_out(golden_b: Golden):
    info = RouterInfo(num_sampling_steps=10, weights_hash="a")
    file = RouterFile(torch.zeros(10, len(golden_b.costs.names)), info)
    with pytest.warns(UserWarning, match="trained on weights a"):
        file.check(golden_b.model, replace(info, weights_hash="b"))
    with pytest.raises(HarmonicaError, match="timesteps"):
        RouterFile(file.logits, replace(info, timesteps=(1.0,))).check(golden_b.model, info)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"routers": 3},
        {"0.prob": "x"},
        {"1.prob": torch.zeros(1, 6)},
        {"0.prob": torch.zeros(1, 6), "1.prob": torch.zeros(1, 5)},
        {"0.prob": torch.full((1, 6), torch.nan)},
        {"0.prob": torch.zeros(1, 0)},
    ],
)
def test_pt_files_without_a_router_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(HarmonicaError):
        load_router(tmp_path / "x.pt")


def test_a_router_of_format_1_takes_last_values(router, tmp_path):
    """As the first version wrote it, which knew neither predictors nor images beyond squares."""
    info = {
        "model": "DiT-Ti/4", "image_size": 32, "num_classes": 10, "sampler": "ddim", "eta": 0.0,
        "num_sampling_steps": 7, "timesteps": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0],
        "cfg_scale": 1.5, "threshold": 0.1, "weights_hash": "0" * 16, "hyperparameters": {},
        "source": "harmonica", "version": "0.1.0",
    }  # fmt: skip
    schedule = router.schedule.to_dict()
    for later in ("predictor", "join_macs"):
        schedule.pop(later, None)
    logits, texts = router.logits, (json.dumps(schedule), json.dumps(info, sort_keys=True))
    digest = hashlib.sha256(logits.numpy().tobytes() + "".join(texts).encode()).hexdigest()
    metadata = {"format": "harmonica-router-1", "schedule": texts[0], "info": texts[1]}
    path = tmp_path / "first.safetensors"
    path.write_bytes(save({"logits": logits}, metadata | {"content_hash": digest}))
    loaded = load_router(path)
    assert loaded.schedule == router.schedule and loaded.schedule.predictor == LAST
    assert loaded.info.model == "DiT-Ti/4" and loaded.info.timesteps == INFO.timesteps
    assert loaded.info.height is None and loaded.info.guide_all_channels is None


WRONG = {
    "model": [], "image_size": "x", "height": 1.5, "num_classes": True, "sampler": 3,
    "eta": "0", "cfg_scale": [1.5], "timesteps": ["9"], "guide_all_channels": 1,
    "hyperparameters": [], "threshold": float("nan"), "num_sampling_steps": 10**400,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_records_of_other_types_are_refused(router, tmp_path, name, kind):
    info = replace(INFO, **{name: WRONG[name]})
    path = tmp_path / f"router.{kind}"
    if kind == "json":
        router.schedule.save(path, asdict(info))
    else:
        save_router(path, replace(router, info=info))
    with pytest.raises(HarmonicaError, match=rf"malformed (metadata|record) \(its {name} is"):
        resolved("--path", path)


def test_a_router_for_images_of_other_sides_is_refused(tmp_path, monkeypatch):
    spec = tiny_specs()["tiny-PixArt"]
    monkeypatch.setitem(MODELS, spec.name, spec)
    config = SampleConfig(model=spec.name, height=96, width=48)
    backbone = load_backbone(config, CPU, random_weights=True)
    router = RouterFile(torch.zeros(4, len(backbone.costs.names)), backbone.router_info())
    save_router(tmp_path / "router.safetensors", router)
    found = resolved("--path", tmp_path / "router.safetensors")
    assert (found.model, found.height, found.width) == (spec.name, 96, 48)
    square = load_backbone(replace(config, height=None, width=None), CPU, random_weights=True)
    with pytest.raises(HarmonicaError, match="--height 96, not 64"):
        router.check(square.model, square.router_info())
    earlier = replace(router, info=replace(router.info, height=None, width=None))
    earlier.check(square.model, square.router_info())


def test_a_schedule_says_what_it_was_trained_for(backbone, tmp_path):
    path, schedule = tmp_path / "schedule.json", Schedule.full(4, backbone.costs)
    schedule.save(path, asdict(backbone.router_info()))
    assert load_schedule(path, None, backbone) == schedule
    found = resolved("--path", path)
    assert (found.sampler, found.num_sampling_steps) == ("iddpm", 4)
    assert found.guide_all_channels
    other = backbone.sampled_by("ddim", 4)
    with pytest.raises(HarmonicaError, match=r"--sampler iddpm, not ddim.*--force"):
        load_schedule(path, None, other)
    with pytest.warns(UserWarning, match="--sampler iddpm, not ddim"):
        assert load_schedule(path, None, other, force=True) == schedule
    schedule.save(path)  # as earlier versions did
    assert load_schedule(path, None, other) == schedule


def test_a_router_is_cut_at_another_budget(backbone, tmp_path):
    costs, info = backbone.costs, backbone.router_info()
    logits = Router.initial(4, len(costs.names), seed=0, mean=0.0, std=1.0).logits()
    exported = budget_schedule(logits, costs, Budget(cur=0.4))
    path = tmp_path / "router.safetensors"
    save_router(path, RouterFile(logits, info, exported))

    def cut(*flags) -> Schedule:
        return choose_plan(resolved("--path", path, *flags), backbone)[1].schedule

    assert cut() == exported
    for flags, budget in (
        (("--target-speedup", "1.6"), Budget(speedup=1.6)),
        (("--target-cur", "0.25"), Budget(cur=0.25)),
    ):
        assert cut(*flags) == budget_schedule(logits, costs, budget)
    half = cut("--target-cur", "0.25", "--semantics", "ltc")
    assert half.cur == 0.25 and half.compute[2].all() and not half.compute[3].all()
    with pytest.raises(HarmonicaError, match=r"--target-cur 0\.9 is out of reach"):
        cut("--target-cur", "0.9")
    with pytest.raises(HarmonicaError, match="--threshold and --target-cur"):
        cut("--target-cur", "0.2", "--threshold", "0.1")
    # Coefficients belong to the schedule that they were learned for.
    learned = replace(exported, predictor=Learned.start(LAST, 4, len(costs.names), 1))
    save_router(path, RouterFile(logits, info, learned))
    for flags in (("--target-cur", "0.25"), ("--threshold", "0.5"), ("--semantics", "ltc")):
        with pytest.raises(HarmonicaError, match="--predictor last"):
            cut(*flags)
    assert cut("--target-cur", "0.25", "--predictor", "last").cur == 0.25
    # A schedule has no scores.
    exported.save(tmp_path / "schedule.json")
    path = tmp_path / "schedule.json"
    with pytest.raises(HarmonicaError, match=r"no scores for --target-cur 0\.25"):
        cut("--target-cur", "0.25", "--sampler", "iddpm")


def test_coefficients_of_another_width_are_refused(backbone):
    size = len(backbone.costs.names)
    schedule = Schedule.full(4, backbone.costs)
    for channels in (1, 192):
        learned = replace(schedule, predictor=Learned.start(LAST, 4, size, channels))
        router = RouterFile(torch.zeros(4, size), backbone.router_info(), learned)
        router.check(backbone.model, backbone.router_info())
    learned = replace(schedule, predictor=Learned.start(LAST, 4, size, 7))
    with pytest.raises(HarmonicaError, match="7 channels"):
        replace(router, schedule=learned).check(backbone.model, backbone.router_info())


def test_a_missing_file_names_the_flag(tmp_path):
    with pytest.raises(HarmonicaError, match="--path"):
        load_router(tmp_path / "none.safetensors")


def test_a_router_for_something_else_is_refused(golden_b: Golden):
    branches = len(golden_b.costs.names)
    info = RouterInfo(model="DiT-B/2", num_sampling_steps=10, sampler="ddim")
    logits = torch.zeros(10, branches)
    RouterFile(logits, info).check(golden_b.model, info)
    for changed, word in (
        (replace(info, model="DiT-S/2"), "--model"),
        (replace(info, sampler="iddpm"), "--sampler"),
        (replace(info, num_sampling_steps=11), "--num-sampling-steps"),
    ):
        with pytest.raises(HarmonicaError, match=word):
            RouterFile(logits, info).check(golden_b.model, changed)
    with pytest.raises(HarmonicaError, match="branches"):
        RouterFile(torch.zeros(10, branches + 2), info).check(golden_b.model, info)
    # A published file may not say its T; its rows do.
    with pytest.raises(HarmonicaError, match="--num-sampling-steps 9"):
        RouterFile(torch.zeros(9, branches), RouterInfo()).check(golden_b.model, info)


def test_another_sampler_is_refused_unless_forced(golden_b: Golden):
    info = RouterInfo(num_sampling_steps=10, sampler="ddim", eta=0.0, timesteps=(9.0, 1.0))
    file = RouterFile(torch.zeros(10, len(golden_b.costs.names)), info)
    for changed, misfit in (
        (replace(info, sampler="sa-solver", eta=None, timesteps=(8.0, 1.0)), "--sampler ddim, not"),
        (replace(info, eta=1.0), "--eta 0.0, not 1.0"),
        (replace(info, timesteps=(8.0, 1.0)), "at other timesteps"),
    ):
        with pytest.raises(HarmonicaError, match=f"{misfit}.*--force"):
            file.check(golden_b.model, changed)
        with pytest.warns(UserWarning, match=misfit):
            file.check(golden_b.model, changed, force=True)
    # Another processor rounds otherwise.
    file.check(golden_b.model, replace(info, timesteps=(9.0 + 1e-12, 1.0 - 1e-13)))
    # A schedule of other steps fits nothing.
    with pytest.raises(HarmonicaError, match="--num-sampling-steps 10, not 11"):
        file.check(golden_b.model, replace(info, num_sampling_steps=11), force=True)


def test_other_guidance_is_pointed_out(golden_b: Golden):
    info = RouterInfo(num_sampling_steps=10, cfg_scale=1.5)
    file = RouterFile(torch.zeros(10, len(golden_b.costs.names)), info)
    with pytest.warns(UserWarning, match=r"--cfg-scale 1\.5, not 4\.0"):
        file.check(golden_b.model, replace(info, cfg_scale=4.0))
    info = replace(info, guide_all_channels=True)
    file = replace(file, info=info)
    with pytest.warns(UserWarning, match="with --guide-all-channels"):
        file.check(golden_b.model, replace(info, guide_all_channels=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file.check(golden_b.model, info)


@pytest.mark.parametrize("target", [0.0, 0.1, 0.25, 0.375, 0.5, 0.8])
def test_target_cur_is_met_within_one_branch(target):
    logits = Router.initial(20, 6, seed=3, mean=0.0, std=1.0).logits()
    schedule = budget_schedule(logits, COSTS, Budget(cur=target))
    assert abs(schedule.cur - target) <= 0.5 / logits.numel() + 1e-9
    # Whatever is reused scores no higher than whatever is computed.
    scores, compute = logits[1:].numpy(), schedule.compute[1:]
    if target > 0:
        assert scores[~compute].max() <= scores[compute].min()


@pytest.mark.parametrize("target", [1.0, 1.2, 1.6, 2.5])
def test_target_speedup_is_met_within_one_branch(target):
    logits = Router.initial(20, 6, seed=3, mean=0.0, std=1.0).logits()
    schedule = budget_schedule(logits, COSTS, Budget(speedup=target))
    assert schedule.theoretical_speedup >= target
    assert schedule.macs + max(COSTS.macs) > 20 * COSTS.total / target


def test_targets_out_of_reach_say_what_is_possible():
    logits = Router.initial(2, 6, seed=0, mean=0.0, std=1.0).logits()
    with pytest.raises(HarmonicaError, match=r"--target-cur.*0\.500"):
        budget_schedule(logits, COSTS, Budget(cur=0.6))
    with pytest.raises(HarmonicaError, match="--target-speedup"):
        budget_schedule(logits, COSTS, Budget(speedup=3.0))


def test_the_first_step_is_always_computed():
    logits = torch.full((4, 6), -5.0)
    assert threshold_schedule(logits, COSTS, 0.1).compute[0].all()
    with pytest.raises(ValueError):
        Schedule(np.zeros((4, 6), dtype=bool), COSTS)


@pytest.mark.parametrize("reuses", ["blocks", "outputs"])
def test_blocks_are_reused_whole(reuses):
    compute = np.ones((4, 6), dtype=bool)
    compute[1, :2] = False
    assert Schedule(compute, COSTS, reuses).block_compute[1].tolist() == [False, True, True]
    document = Schedule(compute, COSTS, reuses).to_dict()
    document["compute"][1] = "011111"
    with pytest.raises(HarmonicaError, match="for all branches of one alike"):
        Schedule.from_dict(document)


def test_a_schedule_cannot_be_changed():
    schedule = Schedule.full(4, COSTS)
    with pytest.raises(ValueError):
        schedule.compute[1, 0] = False


def test_macs_and_speedup_by_hand():
    compute = np.ones((4, 6), dtype=bool)
    compute[1, 0] = compute[2, 1] = False
    schedule = Schedule(compute, COSTS)
    assert schedule.macs == 4 * (3 * 14 + 4) - 5 - 9
    assert schedule.theoretical_speedup == pytest.approx(184 / 170)
    assert schedule.cur == pytest.approx(2 / 24)


@pytest.fixture
def inspected(tmp_path, monkeypatch, capsys):
    """Runs scripts/inspect_router.py in this process and returns what it says."""

    def run(*arguments) -> str:
        words = ["inspect_router.py", *map(str, arguments), "--out", str(tmp_path / "heat.png")]
        monkeypatch.setattr("sys.argv", words)
        runpy.run_path(str(ROOT / "scripts" / "inspect_router.py"), run_name="__main__")
        assert (tmp_path / "heat.png").stat().st_size > 0
        return capsys.readouterr().out

    return run


def test_inspecting_what_does_not_say_everything(router, tmp_path, inspected, capsys):
    # A schedule is its own scores, and has no others.
    router.schedule.save(tmp_path / "schedule.json", asdict(INFO))
    said = inspected(tmp_path / "schedule.json")
    assert f"CUR                    {router.schedule.cur:.1%}" in said and "DiT-Ti/4" in said
    with pytest.raises(SystemExit):
        inspected(tmp_path / "schedule.json", "--semantics", "ltc")
    assert "no scores" in capsys.readouterr().err
    # Nothing is reused at the steps that count, and the file does not say its cut.
    path = tmp_path / "router.safetensors"
    save_router(path, replace(router, logits=torch.zeros(7, 6)))
    assert "nothing that counts scores below 0.100" in inspected(path, "--semantics", "ltc")
    # Without a model there is no cost.
    rows = {f"{i}.prob": torch.tensor([[1.0, -5.0, 1.0]]) for i in range(4)}
    torch.save(rows, tmp_path / "published.pt")
    said = inspected(tmp_path / "published.pt", "--threshold", "0.1", "--semantics", "ltc")
    assert "computed per step      3 2 3 2" in said and "with --model" in said


def test_published_scores_are_frozen_as_a_schedule_that_says_how_they_are_read(
    backbone, tmp_path, inspected
):
    rows = {f"{i}.prob": torch.full((1, 24), -5.0) for i in range(4)}
    torch.save(rows, tmp_path / "published.pt")
    config = TrainConfig(
        num_sampling_steps=4, predictor="learned", freeze_schedule=tmp_path / "published.pt"
    )
    with pytest.raises(HarmonicaError, match=r"--freeze-schedule .*inspect_router\.py --schedule"):
        Trainer(config)
    flags = ("--semantics", "ltc", "--model", "DiT-Ti/4", "--schedule", tmp_path / "half.json")
    assert "half.json" in inspected(tmp_path / "published.pt", *flags)
    schedule = load_schedule(tmp_path / "half.json", None, backbone, needs_schedule=True)
    assert schedule.compute.all(axis=1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_learning_to_cache_computes_all_at_odd_respaced_indices(steps):
    rows = alternate_rows(steps)
    indices = [steps - 1 - s for s in rows]
    assert indices == [i for i in reversed(range(steps - 1)) if i % 2 == 0]
    logits = torch.full((steps, 6), -5.0)
    schedule = RouterFile(logits, RouterInfo()).to_schedule(COSTS, 0.1, "ltc")
    assert schedule.compute[[s for s in range(steps) if s not in rows]].all()
    assert not schedule.compute[list(rows)].any()


@pytest.mark.parametrize("name", ["num_classes", "image_size", "height", "width"])
def test_sizes_that_no_memory_holds_are_refused(name, tmp_path):
    info = RouterInfo(model="PixArt-alpha-XL/2", image_size=512, sampler="ddim", eta=0.0)
    save_router(tmp_path / "r.safetensors", RouterFile(torch.randn(4, 84), info))
    resolved("--path", tmp_path / "r.safetensors")
    save_router(
        tmp_path / "r.safetensors", RouterFile(torch.randn(4, 84), replace(info, **{name: 2**40}))
    )
    with pytest.raises(HarmonicaError, match=f"--{name.replace('_', '-')} {2**40}"):
        resolved("--path", tmp_path / "r.safetensors")


def test_a_router_of_an_unconditional_model_is_replayed_without_naming_classes(tmp_path):
    path = tmp_path / "router.safetensors"
    info = RouterInfo(model="U-ViT-S/2", image_size=32, num_classes=0, sampler="ddim", eta=0.0)
    save_router(path, RouterFile(torch.randn(4, 26), info))
    config = resolved("--path", path)
    config.check()
    assert (config.model, config.num_classes) == ("U-ViT-S/2", None)
