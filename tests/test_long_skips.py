"""DeepCache and Faster Diffusion on a tiny U-ViT: what runs, what it costs, what comes out."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import UVIT, randomised, tiny, tiny_trajectories

from harmonica.baselines import OF_LONG_SKIPS
from harmonica.baselines.long_skips import (
    deepcache,
    faster_diffusion,
    nearest_deepcache,
    nearest_faster_diffusion,
)
from harmonica.budget import Budget
from harmonica.comparison.config import CompareConfig
from harmonica.comparison.run import Comparison
from harmonica.engine import Engine
from harmonica.errors import OutOfReach
from harmonica.flops import measure_costs
from harmonica.samplers import State
from models import MODELS, PIXELS
from models.uvit import UViT


@pytest.fixture(scope="module")
def costs():
    return measure_costs(randomised(UViT(replace(UVIT, depth=8))))


def computed_blocks(schedule, s: int) -> list[int]:
    return np.flatnonzero(schedule.block_compute[s]).tolist()


def test_faster_diffusion_computes_the_decoder_between_key_steps(costs):
    schedule = faster_diffusion(6, costs, 3)
    for s in range(6):
        assert computed_blocks(schedule, s) == list(range(9) if s % 3 == 0 else range(5, 9))


def test_deepcache_computes_the_outer_blocks_between_full_steps(costs):
    schedule = deepcache(6, costs, 2, 2)
    for s in range(6):
        assert computed_blocks(schedule, s) == (list(range(9)) if s % 2 == 0 else [0, 1, 7, 8])
    inner = sum(costs.macs[4:14]) + sum(costs.joins[5:7])
    assert schedule.macs == 6 * costs.total - 3 * inner


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [lambda c: faster_diffusion(5, c, 2), lambda c: deepcache(5, c, 2, 1)]
)
def test_only_what_the_schedule_says_runs(make):
    batch = tiny_trajectories("uvit")
    model, schedule = batch.model, make(measure_costs(batch.model))
    calls = dict.fromkeys(range(len(model.blocks)), 0)
    joined = dict.fromkeys(model.joins, 0)
    for k, block in enumerate(model.blocks):
        for module in (block.attn, block.mlp):
            module.register_forward_hook(lambda *_, k=k: calls.__setitem__(k, calls[k] + 1))
        if k in model.joins:
            block.skip_linear.register_forward_hook(
                lambda *_, k=k: joined.__setitem__(k, joined[k] + 1)
            )
    x = Engine(schedule)(batch)
    runs = schedule.block_compute.sum(axis=0)
    assert list(calls.values()) == (2 * runs).tolist()
    assert joined == {k: runs[k] for k in model.joins}
    plain = batch.walk(State(batch.x_T), batch.predict).x
    assert 0 < (x - plain).norm() < plain.norm()


@pytest.mark.parametrize("speedup", [1.3, 1.6])
def test_the_setting_nearest_to_a_budget_is_found(speedup, costs):
    for nearest in (nearest_faster_diffusion, nearest_deepcache):
        schedule, setting = nearest(12, costs, Budget(speedup=speedup))
        assert abs(schedule.theoretical_speedup / speedup - 1) < 0.12
        assert setting.startswith("N = ")


def test_a_model_without_long_skips_is_refused():
    for nearest in (nearest_faster_diffusion, nearest_deepcache):
        with pytest.raises(OutOfReach, match="long skip connections"):
            nearest(6, measure_costs(tiny("dit")), Budget(cur=0.5))


def test_both_run_in_a_comparison(tmp_path, monkeypatch):
    """On a tiny model in the layout of the published ones, which works on pixels."""
    shapes = replace(UVIT, depth=8, in_channels=3)
    torch.save(randomised(UViT(shapes)).state_dict(), tmp_path / "uvit.pth")
    spec = replace(
        MODELS["U-ViT-H/2"], name="tiny-U-ViT", config=shapes, image_size=8, sizes={8: {}},
        latent=PIXELS,
    )  # fmt: skip
    monkeypatch.setitem(MODELS, spec.name, spec)
    config = CompareConfig(
        model=spec.name, ckpt=tmp_path / "uvit.pth", num_sampling_steps=6, num_images=0,
        num_paired=2, exact_steps=8, seeds=(0,), repeats=1, speedups=(1.5,),
        methods=("deepcache", "faster-diffusion"), out=tmp_path / "out",
    )  # fmt: skip
    config.check()
    Comparison(config).run()
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    results = {result["method"]: result for result in report["results"]}
    assert results.keys() == {"uncached", *OF_LONG_SKIPS}
    for name in OF_LONG_SKIPS:
        assert abs(results[name]["theoretical_speedup"] / 1.5 - 1) < 0.15
        assert results[name]["against_uncached"]["mse_mean"] > 0
        assert results[name]["measured_speedup"]["ratio"] > 0
