"""Replay and Blend: what is taken from the cache, and what it equals."""

import numpy as np
import pytest
import torch
from conftest import Golden, relative
from families import replay_branches

from harmonica.cache import Cache, Masking, Replay, fill
from harmonica.engine import Engine
from harmonica.fusion import block_runner
from harmonica.router import threshold_schedule
from harmonica.samplers import State, create_sampler
from harmonica.schedule import Schedule


def images(batch, schedule=None) -> torch.Tensor:
    with torch.no_grad():
        return Engine(schedule)(batch)


def test_all_true_replay_is_the_plain_model_bit_for_bit(golden: Golden):
    full = Schedule.full(golden.num_steps, golden.costs)
    batch = golden.trajectories()
    with torch.no_grad():
        plain = batch.walk(State(batch.x_T), batch.predict).x
    assert torch.equal(images(batch, full), plain)


def test_hard_replay_equals_the_published_trajectory(golden: Golden):
    threshold = float(golden.arrays["replay/threshold"])
    schedule = threshold_schedule(golden.logits, golden.costs, threshold)
    assert 0 < schedule.cur < 1
    batch, cache = golden.trajectories(), Cache(len(golden.costs.names))
    state, xs = State(batch.x_T), []
    for s in range(batch.num_steps):
        row = replay_branches(cache, s, schedule.compute[s])
        state = batch.walk(
            state, lambda s, x, row=row: batch.predict(s, x, row), start=s, stop=s + 1
        )
        xs.append(state.x)
    assert relative(torch.stack(xs), golden.arrays["replay/x"]) < 1e-5


def test_blend_with_weights_of_zero_and_one_is_replay(golden: Golden):
    schedule = threshold_schedule(golden.logits, golden.costs, 0.4)
    logits = torch.where(torch.from_numpy(schedule.compute.copy()), torch.inf, -torch.inf)
    batch, cache = golden.trajectories(), Cache(logits.shape[1])
    masking = Masking(schedule.compute, "soft", stores_fresh=False)

    def predict(s, x):
        branches = masking.branches([cache], s, logits[s])
        output = batch.predict(s, x, branches)
        masking.store([cache], s, branches)
        return output

    with torch.no_grad():
        blended = batch.walk(State(batch.x_T), predict).x
    assert torch.equal(blended, images(batch, schedule))


def test_hard_masks_replay_and_pass_gradients_through(golden: Golden):
    schedule = threshold_schedule(golden.logits, golden.costs, 0.4)
    batch, cache = golden.trajectories(), Cache(golden.logits.shape[1])
    logits = golden.logits.clone().requires_grad_()
    masking = Masking(schedule.compute, "hard", stores_fresh=False)

    def predict(s, x):
        branches = masking.branches([cache], s, logits[s])
        output = batch.predict(s, x, branches)
        masking.store([cache], s, branches)
        return output

    x = batch.walk(State(batch.x_T), predict).x
    assert torch.equal(x.detach(), images(batch, schedule))
    x.square().mean().backward()
    assert (logits.grad[1:] != 0).all()


def test_a_reused_branch_runs_nothing():
    def fail(x):
        raise AssertionError("computed")

    cache, x = Cache(1), torch.zeros(1)
    Replay(cache, 0, 0, True)(lambda x: x + 3, x)
    assert Replay(cache, 0, 1, False)(fail, x).item() == 3


def test_blend_stores_the_blend_or_the_fresh_value():
    for fresh, expected in ((False, 2.5), (True, 3.0)):
        masking, cache = Masking(np.ones((2, 1), dtype=bool), "soft", fresh), Cache(1)
        for s, plus, seen in ((0, 2, 2.0), (1, 3, 2.5)):
            branches = masking.branches([cache], s, torch.zeros(1))
            assert branches[0](lambda x, plus=plus: x + plus, torch.zeros(1)).item() == seen
            masking.store([cache], s, branches)
        assert cache.predict(0, 2).item() == expected


@pytest.mark.parametrize("stores_fresh", [False, True])
def test_only_what_is_stored_is_remembered_to_the_end_of_a_step(golden: Golden, stores_fresh):
    schedule = threshold_schedule(golden.logits, golden.costs, 0.4)
    masking = Masking(schedule.compute, "soft", stores_fresh)
    batch, cache = golden.trajectories(run=block_runner(False, False)), masking.cache()
    fill(cache, batch, 0, batch.x_T)
    branches = masking.branches([cache], 1, golden.logits[1])
    batch.predict(1, batch.x_T, branches)
    assert [branch.kept is not None for branch in branches] == schedule.compute[1].tolist()
    assert 0 < schedule.compute[1].sum() < len(branches)


def test_below_the_cut_the_cache_keeps_its_value():
    masking, cache = Masking(np.array([[True], [False]]), "soft", False), Cache(1)
    for s, plus in ((0, 2), (1, 9)):
        branches = masking.branches([cache], s, torch.zeros(1))
        branches[0](lambda x, plus=plus: x + plus, torch.zeros(1))
        masking.store([cache], s, branches)
    assert cache.predict(0, 2).item() == 2


def test_branched_caches_go_their_own_way():
    cache = Cache(1)
    cache.store(0, 0, torch.tensor(1.0))
    other = cache.branched()
    other.store(0, 1, torch.tensor(2.0))
    assert (cache.predict(0, 2).item(), other.predict(0, 2).item()) == (1.0, 2.0)


def test_replay_works_with_a_stochastic_sampler(golden: Golden):
    batch = golden.trajectories(
        create_sampler("iddpm", golden.num_steps), noise=lambda s: golden.arrays["iddpm/noise"][s]
    )
    schedule = threshold_schedule(golden.logits, golden.costs, 0.3)
    assert images(batch, schedule).isfinite().all()
    assert not torch.equal(images(batch, schedule), images(batch))


@pytest.mark.parametrize("kind", ["fixed", "hard"])
def test_decisions_that_learn_nothing_run_nothing_that_they_reuse(golden: Golden, kind):
    """Without a gradient for the scores, replay does: also of rollouts side by side."""
    schedule = threshold_schedule(golden.logits, golden.costs, 0.4)
    masking = Masking(schedule.compute, kind, stores_fresh=True)
    batch, caches, ran = golden.trajectories(), [masking.cache(), masking.cache()], []
    double = batch.repeated(2)

    def counting(branch, i):
        def call(fn, x):
            return branch(lambda h: ran.append(i) or fn(h), x)

        return call

    def predict(s, x):
        branches = masking.branches(caches, s, golden.logits[s], batch.guidance.halves)
        counted = [counting(branch, i) for i, branch in enumerate(branches)]
        output = double.predict(s, x, counted)
        masking.store(caches, s, branches, batch.guidance.halves)
        return output

    with torch.no_grad():
        final = double.walk(State(double.x_T), predict).x
    assert len(ran) == schedule.compute.sum()
    for part in final.chunk(2):
        assert relative(part, images(batch, schedule)) < 1e-6


def test_fixed_decisions_pass_gradients_to_what_stands_in():
    masking = Masking(np.array([[True], [False]]), "fixed", stores_fresh=True)
    cache, x = masking.cache(), torch.zeros(1)
    learning = torch.ones(1, requires_grad=True)
    cache.store(0, 0, 3 * learning)
    scores = torch.zeros(1, requires_grad=True)
    (branch,) = masking.branches([cache], 1, scores)
    branch(lambda x: x / 0, x).sum().backward()
    assert learning.grad.item() == 3 and scores.grad is None
