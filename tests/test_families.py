"""What holds for every family of models: DiT, U-ViT, PixArt without and with micro-conditions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import relative
from families import CONFIGS, by_branches, tiny, tiny_trajectories

from harmonica.backbone import reduce_precision
from harmonica.baselines.fixed import fora, random_schedule
from harmonica.budget import Budget
from harmonica.engine import Engine, PlannedReplay
from harmonica.flops import measure_costs
from harmonica.predictors import Extrapolation
from harmonica.replay_plan import Add, Join
from harmonica.samplers import State
from harmonica.schedule import Schedule
from models.branch import compute

every_family = pytest.mark.parametrize("family", CONFIGS)


@every_family
def test_planned_replay_equals_caching_branches_bit_for_bit(family):
    batch = tiny_trajectories(family)
    costs = measure_costs(batch.model)
    schedules = [Schedule.full(5, costs), fora(5, costs, 2)]
    schedules += [random_schedule(5, costs, Budget(cur=c), seed=1) for c in (0.2, 0.5, 0.8)]
    for schedule in schedules:
        assert torch.equal(Engine(schedule)(batch), by_branches(batch, schedule))
    plain = batch.walk(State(batch.x_T), batch.predict).x
    assert torch.equal(Engine(None)(batch), plain)
    assert not torch.allclose(Engine(schedules[1])(batch), plain)
    forecast = replace(schedules[1], predictor=Extrapolation(1, tuple(range(5))))
    assert relative(Engine(forecast)(batch), by_branches(batch, forecast)) < 1e-5


@every_family
def test_every_branch_is_called_once_in_its_order_and_changes_the_output(family):
    batch, seen = tiny_trajectories(family), []
    names = batch.model.branch_names
    plain = batch.predict(0, batch.x_T)

    def noting(i):
        def branch(fn, x):
            seen.append(i)
            return fn(x)

        return branch

    same = batch.predict(0, batch.x_T, [noting(i) for i in range(len(names))])
    assert seen == list(range(len(names))) and torch.equal(same, plain)
    for i in range(len(names)):
        branches = [compute] * len(names)
        branches[i] = lambda fn, x: 2 * fn(x)
        assert not torch.allclose(batch.predict(0, batch.x_T, branches), plain)
    with pytest.raises(ValueError, match="branches were handed in"):
        batch.predict(0, batch.x_T, [compute])


@every_family
def test_conditioning_of_many_steps_at_once_is_that_of_each(family):
    """Also the order of guidance halves: the forward of both is what guidance combines."""
    batch = tiny_trajectories(family)
    model, y = batch.model, batch.model.with_null(batch.y)
    for s in (0, 3):
        time = torch.full((len(y),), float(batch.sampler.timesteps[s]))
        cond, uncond = model(torch.cat([batch.x_T] * 2), time, y).chunk(2)
        c = model.config.in_channels
        expected = uncond[:, :c] + 1.5 * (cond[:, :c] - uncond[:, :c])
        got = batch.predict(s, batch.x_T)[: len(batch.x_T), :c]
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(cond, uncond)


@every_family
def test_costs_name_every_branch_and_add_up(family):
    model = tiny(family)
    costs, d, tokens = measure_costs(model), model.config.hidden_size, model.num_tokens
    assert costs.names == model.branch_names
    by_kind = dict(zip(costs.kinds, costs.macs, strict=True))
    assert by_kind["mlp"] == tokens * 8 * d * d
    assert by_kind["attn"] == tokens * 4 * d * d + 2 * tokens * tokens * d
    if "cross_attn" in by_kind:
        length = model.config.max_tokens
        expected = tokens * 2 * d * d + length * 2 * d * d + 2 * tokens * length * d
        assert by_kind["cross_attn"] == expected
    assert sum(costs.joins) <= costs.rest
    ends = [tokens * 2 * d * d if k in model.joins else 0 for k in range(len(model.blocks))]
    assert list(costs.joins) == (ends if model.joins else [])


@torch.no_grad()
def test_a_reused_block_of_uvit_runs_its_skip_connection_alone():
    batch = tiny_trajectories("uvit")
    schedule = fora(5, measure_costs(batch.model), 5)
    calls = []
    for name, module in batch.model.named_modules():
        if name.endswith(("attn", "mlp", "norm1", "norm2", "skip_linear")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    engine = Engine(schedule)
    engine(batch)
    counts = {name: calls.count(name) for name in set(calls)}
    assert {name: n for name, n in counts.items() if n > 1} == {
        f"out_blocks.{i}.skip_linear": 5 for i in range(2)
    }
    assert set(counts.values()) == {1, 5}
    # Sums are cut where a long skip starts or ends, and nowhere else.
    plan = engine._recipe_for(batch).plan
    assert [len(o.branches) for o in plan.steps[1] if isinstance(o, Add)] == [2, 2, 2, 2, 2]
    assert [(o.block, o.source) for o in plan.steps[1] if isinstance(o, Join)] == [(3, 1), (4, 0)]


@every_family
@torch.no_grad()
def test_nothing_is_kept_after_a_trajectory(family):
    batch = tiny_trajectories(family)
    schedule = random_schedule(5, measure_costs(batch.model), Budget(cur=0.6), seed=3)
    replay = PlannedReplay(batch, Engine(schedule)._recipe_for(batch), Engine(None).how)
    batch.walk(State(batch.x_T), replay.predict)
    assert not replay.kept


def blocks_reused(batch, blocks: list[int], reuses: str) -> Schedule:
    """Step 2 reuses these blocks."""
    costs = measure_costs(batch.model)
    order = list(dict.fromkeys(costs.blocks))
    compute = np.ones((5, len(costs.names)), dtype=bool)
    compute[2] = [order.index(block) not in blocks for block in costs.blocks]
    return Schedule(compute, costs, reuses)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [[0, 1, 2], [1, 2, 3], [1], [0, 1, 2, 3], [3, 4]])
@pytest.mark.parametrize("reuses", ["blocks", "outputs"])
def test_reused_blocks_of_uvit_give_what_they_gave_before(blocks, reuses):
    """Long skips included: every output that a computed block reads is from the step before."""
    batch = tiny_trajectories("uvit")
    model, seen, entering = batch.model, {}, {}

    def expect(s, x):
        def walk(rows, conditioning):
            stream, outputs = model.embed(rows, conditioning), {}
            before = dict(seen)
            for k, block in enumerate(model.blocks):
                if k == blocks[0]:
                    base, entering[s] = stream, stream
                if s == 2 and k in blocks:
                    stream = before[k] + (base - entering[1] if reuses == "blocks" else 0)
                else:
                    if k in model.joins:
                        stream = block.join(stream, outputs[model.joins[k]])
                    stream = block(stream, conditioning.blocks[k], compute, compute)
                outputs[k] = seen[k] = stream
            return model.head(stream, conditioning, rows.shape[-2:])

        return batch.evaluate(walk, s, x)

    expected = batch.walk(State(batch.x_T), expect).x
    schedule = blocks_reused(batch, blocks, reuses)
    got = Engine(schedule)(replace(batch))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, batch.walk(State(batch.x_T), batch.predict).x)


def test_blocks_that_do_not_run_cost_no_skip_connection():
    batch = tiny_trajectories("uvit")
    schedule = blocks_reused(batch, [3, 4], "outputs")
    costs = schedule.costs
    saved = sum(costs.macs[6:10]) + costs.joins[3] + costs.joins[4]
    assert schedule.macs == 5 * costs.total - saved
    assert replace(schedule, reuses="branches").macs == 5 * costs.total - sum(costs.macs[6:10])
    assert Schedule.from_dict(schedule.to_dict()) == schedule


@every_family
@torch.no_grad()
def test_half_precision_keeps_the_residual_stream_in_float32(family):
    batch = tiny_trajectories(family)
    exact, model = batch.predict(0, batch.x_T), tiny(family)
    reduce_precision(model, torch.bfloat16)
    half, seen = replace(batch, model=model), set()
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, x: seen.add((inputs[0].dtype, x.dtype)))
    rough = half.predict(0, half.x_T)
    assert 0 < relative(rough, exact) < 0.05
    assert seen == {(torch.float32, torch.float32)} and rough.dtype == torch.float32
    schedule = fora(5, measure_costs(model), 2)
    assert relative(Engine(schedule)(half), Engine(schedule)(batch)) < 0.1


@every_family
@torch.no_grad()
def test_every_block_reads_and_writes_tokens_that_lie_side_by_side(family):
    """Transposed ones would give the same images, several times slower."""
    batch = tiny_trajectories(family)
    layouts = []
    for block in batch.model.blocks:
        block.register_forward_hook(
            lambda module, inputs, x: layouts.append((inputs[0].is_contiguous(), x.is_contiguous()))
        )
    batch.predict(0, batch.x_T)
    assert layouts == [(True, True)] * len(batch.model.blocks)
