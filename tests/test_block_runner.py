"""Compiled and checkpointed training steps compute what the plain one does."""

import shutil

import pytest
import torch
from conftest import Golden, relative

from harmonica import fusion
from harmonica.cache import Masking
from harmonica.fusion import block_runner
from harmonica.predictors import LAST
from harmonica.router import Router, threshold_schedule
from harmonica.training.objective import Student, iepo_loss, leave_one_out
from harmonica.training.sdt import train_trajectory
from harmonica.training.trajectory import Rollout


def gradients(golden: Golden, run, kind: str = "soft") -> tuple[torch.Tensor, torch.Tensor]:
    """Of every row of the scores, and where the student ends."""
    router = Router(golden.logits)
    schedule = threshold_schedule(golden.logits, golden.costs, 0.4)
    batch = golden.trajectories(run=run)
    masking = Masking(schedule.compute, kind, stores_fresh=True)
    # What a refresh runs, too: forced steps, and forks side by side.
    with torch.no_grad():
        errors = leave_one_out(Student(batch, golden.logits, masking, most_rows=24))
    assert errors.image.isfinite().all()
    end = train_trajectory(
        batch, router, masking, lambda o: iepo_loss(o.error, o.scores, 1.0, 1e-3).backward()
    )
    return torch.stack([row.grad for row in router.rows]), end.x


@pytest.mark.parametrize(
    "compiles",
    [
        False,
        pytest.param(
            True,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
            ],
        ),
    ],
)
def test_a_checkpointed_or_compiled_step_has_the_same_gradients(
    golden_b, compiles, monkeypatch, request
):
    monkeypatch.setattr(fusion, "GRAPHS", 12)
    fusion.fused.cache_clear()
    request.addfinalizer(fusion.fused.cache_clear)  # what it would make now has another limit
    golden = golden_b
    torch._dynamo.reset()
    plain, end = gradients(golden, block_runner(False, False))
    for checkpoints in (False, True):
        # Far fewer than steps times blocks: graphs are shared by all of them.
        with torch._dynamo.config.patch(recompile_limit=12):
            found, other = gradients(golden, block_runner(compiles, checkpoints))
        if compiles:
            assert relative(found, plain) < 1e-3 and relative(other, end) < 1e-5
        else:
            assert torch.equal(found, plain) and torch.equal(other, end)


def test_what_runs_again_asks_no_generator(golden_b, monkeypatch):
    """Nothing is drawn in a step."""

    def asked():
        raise AssertionError("a generator was asked for its state")

    monkeypatch.setattr(torch, "get_rng_state", asked)
    gradients(golden_b, block_runner(compiles=False, checkpoints=True))
    plan = threshold_schedule(golden_b.logits, golden_b.costs, 0.4)
    weights = torch.from_numpy(plan.compute.copy()).float().requires_grad_()
    rollout = Rollout(plan.compute, LAST, checkpoints=True)
    rollout(golden_b.trajectories(), weights).sum().backward()
    assert weights.grad.any()


@pytest.mark.parametrize(("kind", "graphs"), [("soft", 8), ("hard", 16), ("fixed", 16)])
def test_decisions_are_traced_whole_with_few_graphs(golden_b, kind, graphs, traced, monkeypatch):
    # Hard ones: four choices of what a block runs, of one rollout and of several side by side, and
    # with gradients the decisions that learn; whatever the number of steps and blocks.
    monkeypatch.setattr(fusion, "GRAPHS", graphs)
    torch._dynamo.reset()
    plain, end = gradients(golden_b, block_runner(False, False), kind)
    with torch._dynamo.config.patch(recompile_limit=graphs):
        found, other = gradients(golden_b, block_runner(True, False), kind)
    assert relative(found, plain) < 1e-5 and relative(other, end) < 1e-5
