"""The engine: the same images as the model's own forward, with what is kept planned ahead."""

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Golden, relative

from harmonica.backbone import load_backbone
from harmonica.baselines.delta_dit import delta_dit
from harmonica.baselines.fixed import fora, random_schedule
from harmonica.budget import Budget
from harmonica.cache import Cache, replay_branches
from harmonica.config import BackboneConfig
from harmonica.engine import (
    EAGER,
    Acceleration,
    Engine,
    PlannedReplay,
    Recipe,
    add_gated,
    run_branches,
)
from harmonica.flops import Costs
from harmonica.predictors import LAST, Extrapolation, Learned
from harmonica.randomness import Draws
from harmonica.replay_plan import Add, Compute, plan_replay
from harmonica.samplers import SAMPLERS, State, create_sampler
from harmonica.sampling import sample, trajectories
from harmonica.schedule import Schedule

NAMES = tuple(f"blocks.{i}.{k}" for i in range(3) for k in ("attn", "mlp"))
COSTS = Costs(NAMES, (5, 9) * 3, 4)


def schedules(golden: Golden) -> list[Schedule]:
    steps, costs = golden.num_steps, golden.costs
    return [
        Schedule.full(steps, costs),
        fora(steps, costs, 3),
        *(random_schedule(steps, costs, Budget(cur=cur), seed=1) for cur in (0.2, 0.5, 0.8)),
    ]


def by_branches(batch, schedule: Schedule) -> torch.Tensor:
    """What the model's own forward makes of caching branches."""
    cache = Cache(len(batch.model.branch_names), schedule.predictor)

    def predict(s, x):
        return batch.predict(s, x, replay_branches(cache, s, schedule.compute[s]))

    return batch.walk(State(batch.x_T), predict).x


@torch.no_grad()
def test_replay_equals_caching_branches_bit_for_bit(golden: Golden):
    for schedule in schedules(golden):
        batch = golden.trajectories()
        assert torch.equal(Engine(schedule)(batch), by_branches(batch, schedule))
    full = golden.trajectories()
    assert torch.equal(Engine(None)(full), full.walk(State(full.x_T), full.predict).x)


@torch.no_grad()
def test_forecasts_replay_like_caching_branches(golden: Golden):
    steps = golden.num_steps
    learned = Learned.start(LAST, steps, len(golden.costs.names), golden.model.config.hidden_size)
    generator = torch.Generator().manual_seed(0)
    learned = replace(
        learned,
        level=0.1 * torch.randn(learned.level.shape, generator=generator),
        slope=0.1 * torch.randn(learned.level.shape, generator=generator),
    )
    index = tuple(map(float, range(steps)))
    for predictor in (Extrapolation(1, index), Extrapolation(2, index), learned):
        plain = random_schedule(steps, golden.costs, Budget(cur=0.5), seed=1)
        schedule = replace(plain, predictor=predictor)
        batch = golden.trajectories()
        forecast = Engine(schedule)(batch)
        # The predictor's weights are folded into the gates, which rounds elsewhere.
        assert relative(forecast, by_branches(batch, schedule)) < 2e-6
        assert relative(forecast, Engine(plain)(batch)) > 2e-5


@torch.no_grad()
def test_stochastic_samplers_replay_too(golden: Golden):
    batch = golden.trajectories(
        create_sampler("iddpm", golden.num_steps), noise=lambda s: golden.arrays["iddpm/noise"][s]
    )
    schedule = schedules(golden)[3]
    assert torch.equal(Engine(schedule)(batch), by_branches(batch, schedule))


def test_a_value_is_kept_only_while_a_later_step_reads_it():
    """Walk random plans: every read finds the last computed values, and nothing is left over."""
    for seed, depth in itertools.product(range(10), (1, 2, 3)):
        schedule = random_schedule(9, COSTS, Budget(cur=0.6), seed)
        plan = plan_replay(schedule.compute, NAMES, depth)
        kept: set[tuple[int, int]] = set()
        most = 0
        for s, step in enumerate(plan.steps):
            seen = []
            for operation in step:
                for i, *_ in operation.branches:
                    seen.append(i)
                if isinstance(operation, Add):
                    for i, block, k, steps in operation.branches:
                        assert NAMES[i] == f"blocks.{block}.{('attn', 'mlp')[k]}"
                        assert not schedule.compute[s, i]
                        computed = np.flatnonzero(schedule.compute[:s, i])
                        assert list(steps) == computed[::-1][:depth].tolist()
                        assert kept >= {(i, step) for step in steps}
                    kept -= set(operation.dropped)
                else:
                    for i, k, keeps in operation.branches:
                        assert NAMES[i] == f"blocks.{operation.block}.{('attn', 'mlp')[k]}"
                        assert schedule.compute[s, i]
                        if keeps:
                            kept.add((i, s))
                most = max(most, len(kept))
            assert seen == list(range(len(NAMES)))  # every branch once, in the model's order
        assert not kept and most == plan.peak_values


def test_consecutive_reused_branches_are_one_operation():
    row = np.ones((2, 6), dtype=bool)
    row[1, 1:5] = False
    plan = plan_replay(row, NAMES)
    assert [type(operation) for operation in plan.steps[1]] == [Compute, Add, Compute]
    assert len(plan.steps[0]) == 3  # whole blocks
    assert len(plan.steps[1][1].branches) == 4 and plan.peak_values == 4


@torch.no_grad()
def test_the_peak_is_the_planned_one(golden: Golden):
    for schedule in schedules(golden):
        batch = golden.trajectories()
        recipe = Recipe(schedule, batch)
        plan, replay, most = recipe.plan, PlannedReplay(batch, recipe, EAGER), []

        def predict(s, x, replay=replay, most=most):
            output = replay.predict(s, x)
            most.append(len(replay.kept))
            return output

        batch.walk(State(batch.x_T), predict)
        # Within a step more may be kept than at its end, and every step ends with its reads done.
        assert max(most) <= plan.peak_values <= max(most) + len(schedule.costs.names)
        assert not replay.kept


@torch.no_grad()
def test_a_reused_block_runs_nothing(golden: Golden):
    calls = []
    hooks = [
        module.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(golden.model.blocks)
        for module in (block.norm1, block.attn, block.norm2, block.mlp)
    ]
    schedule = fora(golden.num_steps, golden.costs, golden.num_steps)
    Engine(schedule)(golden.trajectories())
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == sorted(list(range(len(golden.model.blocks))) * 4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@torch.no_grad()
def test_compiled_replay_is_the_same_up_to_rounding_with_few_graphs(golden_b: Golden):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = Acceleration(compiles=True)
    for schedule in schedules(golden_b):
        batch = golden_b.trajectories()
        assert relative(Engine(schedule, compiled)(batch), by_branches(batch, schedule)) < 1e-5
    blockwise = delta_dit(golden_b.num_steps, golden_b.costs, 2, 1, golden_b.num_steps // 2)
    replayed = Engine(blockwise)(golden_b.trajectories())
    assert relative(Engine(blockwise, compiled)(golden_b.trajectories()), replayed) < 1e-5
    # Whole blocks, attention, MLP, blocks by themselves; sums of 8, 4, 2, 1.
    assert counters["stats"]["unique_graphs"] <= 4 + 4
    assert not counters["graph_break"]


def test_adding_in_groups_is_adding_one_by_one():
    x, *values = torch.randn(6, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    gates = [value[:, :1] for value in values]
    expected = x
    for gate, value in zip(gates, values, strict=True):
        expected = torch.addcmul(expected, gate, value)
    assert torch.equal(add_gated(x, gates, values), expected)


def test_running_some_branches_gives_their_values(golden_b: Golden):
    batch = golden_b.trajectories()
    modulations, block = batch.conditioning(0).blocks[0], golden_b.model.blocks[0]
    rows = torch.cat([batch.x_T] * batch.guidance.halves)
    x = golden_b.model.embed(rows, batch.conditioning(0))
    after, (value,) = run_branches(block, (1,), x, modulations)
    assert torch.equal(value, block.mlp_update(x, modulations[1]))
    assert relative(after, x + modulations[1].gate * value) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_captured_trajectories_equal_eager_ones(sampler):
    device = torch.device("cuda")
    config = BackboneConfig(sampler=sampler, num_sampling_steps=6, compile=False)
    backbone = load_backbone(config, device)
    schedule = random_schedule(6, backbone.costs, Budget(cur=0.5), seed=0)
    eager, captured = Engine(schedule), Engine(schedule, Acceleration(captures=True))
    with torch.inference_mode():
        for first in (0, 4):  # the second batch replays the graph of the first
            batch = trajectories(backbone, Draws(0, "sample"), range(first, first + 4))
            assert torch.allclose(captured(batch), eager(batch), atol=1e-4)
    latents = sample(backbone, schedule, Draws(0, "sample"), range(6), batch_size=4)
    assert latents.isfinite().all()
