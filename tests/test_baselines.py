"""Baselines: each schedule is what its paper says, at the cost that was asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Golden

from harmonica.backbone import load_backbone
from harmonica.baselines import METHODS, OF_LONG_SKIPS, Plan
from harmonica.baselines.delta_dit import delta_dit
from harmonica.baselines.fixed import evenly_spaced, fora, random_schedule, taylorseer
from harmonica.baselines.smoothcache import (
    MAX_AGE,
    nearest_smoothcache,
    output_changes,
    smoothcache,
)
from harmonica.block_reuse import reused_stretches
from harmonica.budget import Budget
from harmonica.config import BackboneConfig
from harmonica.engine import Engine
from harmonica.errors import HarmonicaError
from harmonica.flops import Costs
from harmonica.predictors import TaylorSeer
from harmonica.randomness import Draws
from harmonica.router_file import load_schedule_file
from harmonica.samplers import State
from harmonica.sampling import sample
from harmonica.schedule import Schedule

COSTS = Costs(tuple(f"blocks.{i}.{k}" for i in range(3) for k in ("attn", "mlp")), (5, 9) * 3, 4)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(BackboneConfig(num_sampling_steps=8), torch.device("cpu"))


@pytest.mark.parametrize("cur", [0.1, 0.25, 0.375, 0.5, 0.75, 0.85, 0.9, 0.95])
def test_exact_baselines_have_the_cur_that_was_asked_for(cur):
    budget = Budget(cur=cur)
    for schedule in (evenly_spaced(20, COSTS, budget), random_schedule(20, COSTS, budget, seed=1)):
        assert abs(schedule.cur - cur) <= 0.5 / 120 + 1e-9


@pytest.mark.parametrize("speedup", [1.0, 1.25, 2.0, 3.0])
def test_exact_baselines_have_the_speedup_that_was_asked_for(speedup):
    budget = Budget(speedup=speedup)
    for schedule in (evenly_spaced(20, COSTS, budget), random_schedule(20, COSTS, budget, seed=1)):
        assert schedule.theoretical_speedup >= speedup
        assert schedule.macs + max(COSTS.macs) > 20 * COSTS.total / speedup


def test_a_budget_out_of_reach_is_refused():
    for budget in (Budget(cur=0.99), Budget(speedup=30.0)):
        for make in (evenly_spaced, lambda *a: random_schedule(*a, seed=0)):
            with pytest.raises(HarmonicaError, match=f"{str(budget).split()[0]}.*out of reach"):
                make(20, COSTS, budget)


def test_evenly_spaced_at_one_half_is_fora():
    assert evenly_spaced(20, COSTS, Budget(cur=0.5)) == fora(20, COSTS, 2)
    steps = fora(9, COSTS, 3).compute.all(axis=1).nonzero()[0]
    assert steps.tolist() == [0, 3, 6]


def test_delta_dit_reuses_rear_blocks_first_and_front_blocks_later():
    blocks = delta_dit(8, COSTS, interval=2, span=1, boundary=4).block_compute
    assert blocks[::2].all()
    assert blocks[[1, 3]].tolist() == [[True, True, False]] * 2
    assert blocks[[5, 7]].tolist() == [[False, True, True]] * 2


def test_stretches_are_maximal_runs():
    assert reused_stretches(np.array([1, 0, 0, 1, 0], dtype=bool)) == [(1, 3), (4, 5)]
    assert reused_stretches(np.array([1, 1], dtype=bool)) == []


def test_reusing_blocks_adds_the_difference_they_made(golden: Golden):
    """By hand: the last two blocks of step 1 add what they added at step 0."""
    batch, names = golden.trajectories(), golden.costs.names
    depth = len(batch.model.blocks)
    compute = np.ones((golden.num_steps, len(names)), dtype=bool)
    compute[1, 2 * (depth - 2) :] = False
    seen: dict[tuple[int, int], torch.Tensor] = {}
    step = 0

    def record(place):
        return lambda block, inputs, output: seen.__setitem__((step, place), output)

    def expect(s, x):
        nonlocal step
        step = s
        if s != 1:
            return batch.predict(s, x)
        difference = seen[0, depth - 1] - seen[0, depth - 3]
        hook = batch.model.blocks[-1].register_forward_hook(
            lambda block, inputs, output: seen[1, depth - 3] + difference
        )
        output = batch.predict(s, x)
        hook.remove()
        return output

    hooks = [batch.model.blocks[i].register_forward_hook(record(i)) for i in (depth - 3, depth - 1)]
    with torch.no_grad():
        expected = batch.walk(State(batch.x_T), expect).x
        for hook in hooks:
            hook.remove()
        schedule = Schedule(compute, golden.costs, reuses="blocks")
        assert torch.allclose(Engine(schedule)(batch), expected, atol=1e-5)
        # The gates of the two steps differ, so the branches' last values are something else.
        assert not torch.allclose(
            Engine(replace(schedule, reuses="branches"))(batch), expected, atol=1e-5
        )
    assert not any(block._forward_hooks for block in batch.model.blocks)


def test_a_schedule_of_blocks_decides_for_whole_blocks(golden: Golden):
    compute = np.ones((golden.num_steps, len(golden.costs.names)), dtype=bool)
    compute[1, 0] = False
    with pytest.raises(ValueError, match="branches of one alike"):
        Engine(Schedule(compute, golden.costs, reuses="blocks"))(golden.trajectories())


def test_what_is_reused_is_part_of_a_schedule(tmp_path):
    schedule = delta_dit(8, COSTS, 2, 1, 4)
    schedule.save(tmp_path / "schedule.json")
    assert load_schedule_file(tmp_path / "schedule.json")[0] == schedule
    assert schedule.hash != replace(schedule, reuses="branches").hash
    with pytest.raises(HarmonicaError, match="malformed"):
        Schedule.from_dict({**schedule.to_dict(), "reuses": "dreams"})


def test_smoothcache_reuses_while_the_error_stays_below_alpha():
    kinds = np.array(COSTS.kinds)
    changes = np.full((7, MAX_AGE, 6), 0.1)
    changes[:, :, kinds == "mlp"] = [[0.1], [0.2], [0.3]]
    changes[4, 0] = 0.9
    compute = smoothcache(changes, COSTS, 0.15).compute
    # Attention ages three steps at most, unless a large change comes before.
    assert compute[:, kinds == "attn"].all(axis=1).tolist() == [1, 0, 0, 0, 1, 0, 0]
    # MLPs change too much over two steps.
    assert compute[:, kinds == "mlp"].all(axis=1).tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert smoothcache(changes, COSTS, 0.0).cur == 0


def test_smoothcache_measures_relative_changes_of_outputs(backbone):
    changes = output_changes(backbone, seed=0)
    assert changes.shape == (8, MAX_AGE, 24)
    assert np.isnan(changes[1, 1:]).all() and np.isfinite(changes[MAX_AGE:]).all()
    # Older values differ more, all in all.
    assert (np.diff(np.nanmean(changes, axis=(0, 2))) > 0).all()
    schedule, setting = nearest_smoothcache(changes, backbone.costs, Budget(cur=0.4))
    assert abs(schedule.cur - 0.4) < 0.1 and setting.startswith("alpha = ")


@pytest.mark.parametrize("name", sorted(METHODS.keys() - set(OF_LONG_SKIPS)))
def test_every_method_samples_near_its_budget(name, backbone):
    plan = METHODS[name](backbone, Budget(speedup=1.6), 0)
    speedup = plan.speedup_over(Plan(backbone))
    assert 1.3 < speedup < 2.1
    x = sample(plan.backbone, plan.schedule, Draws(0, "sample"), range(2))
    assert x.isfinite().all()
    reference = sample(backbone, None, Draws(0, "sample"), range(2))
    assert 0 < (x - reference).square().mean() < 0.5 * reference.square().mean()


def test_fora_of_the_model_reuses_whole_steps(backbone):
    plan = METHODS["fora"](backbone, Budget(speedup=2.0), 0)
    assert plan.setting == "N = 2" and plan.schedule.cur == 0.5


def test_taylorseer_computes_the_first_steps_and_then_every_nth():
    schedule = taylorseer(10, COSTS, interval=3, order=2)
    assert np.flatnonzero(schedule.compute.all(axis=1)).tolist() == [0, 1, 4, 7]
    assert not schedule.compute[[2, 3, 5, 6, 8, 9]].any()
    assert schedule.predictor == TaylorSeer(2)


@torch.no_grad()
def test_forecasts_come_nearer_than_last_values(backbone):
    draws, errors = Draws(0, "sample"), {}
    reference = sample(backbone, None, draws, range(4))
    for name in ("fora", "fora-taylor1"):
        plan = METHODS[name](backbone, Budget(cur=0.5), 0)
        x = sample(backbone, plan.schedule, draws, range(4))
        errors[name] = (x - reference).square().mean()
    assert errors["fora-taylor1"] < 0.5 * errors["fora"]
