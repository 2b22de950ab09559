"""The trajectory objective: what is trained is what is replayed, and its gradients are right."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Golden, relative
from fake_graphs import fake_cuda_graphs
from torch.autograd.graph import saved_tensors_hooks

from harmonica import fusion
from harmonica.backbone import load_backbone
from harmonica.baselines.fixed import evenly_spaced, random_schedule
from harmonica.budget import Budget
from harmonica.cache import Cache, Replay
from harmonica.engine import EAGER, Acceleration, Engine
from harmonica.errors import HarmonicaError
from harmonica.fusion import add_updates, embed, head, run_branches
from harmonica.predictors import LAST, Extrapolation, LastValue, Learned, combine
from harmonica.router import threshold_schedule
from harmonica.router_file import load_router, load_schedule_file
from harmonica.samplers import State
from harmonica.schedule import Schedule
from harmonica.training.coefficients import Coefficients, fit_coefficients
from harmonica.training.config import TrainConfig
from harmonica.training.consensus import NotFinite
from harmonica.training.exchanges import Exchanges
from harmonica.training.trainer import Trainer
from harmonica.training.trajectory import Rollout


def schedule(golden: Golden, predictor=LAST, cur: float = 0.5) -> Schedule:
    random = random_schedule(golden.num_steps, golden.costs, Budget(cur=cur), seed=1)
    return replace(random, predictor=predictor)


def linear(golden: Golden) -> Extrapolation:
    return Extrapolation(1, tuple(map(float, range(golden.num_steps))))


def decisions(schedule: Schedule) -> torch.Tensor:
    return torch.from_numpy(schedule.compute.copy()).float().requires_grad_()


class Weighed:
    """The decision written out: a weight between computing and reusing, in the cache as well."""

    def __init__(self, history, predictor, s, i, weight, computes):
        self.history, self.predictor, self.s, self.i = history, predictor, s, i
        self.weight, self.computes, self.following = weight, computes, history

    def __call__(self, fn, x):
        fresh = fn(x)
        if not self.history:
            self.following = [(self.s, fresh)]
            return fresh
        steps, values = zip(*self.history, strict=True)
        reused = combine(self.predictor.weights(self.s, self.i, steps), values)
        w, depth = self.weight, self.predictor.depth
        shifted, kept = [fresh, *values][:depth], [*values, values[-1]]
        mixed = [w * a + (1 - w) * b for a, b in zip(shifted, kept, strict=False)]
        steps = [self.s, *steps] if self.computes else steps
        self.following = list(zip(steps, mixed, strict=False))
        return w * fresh + (1 - w) * reused


def weighed(batch, plan: Schedule, weights: torch.Tensor) -> torch.Tensor:
    state, histories = State(batch.x_T), [[] for _ in plan.costs.names]
    for s in range(batch.num_steps):
        branches = [
            Weighed(history, plan.predictor, s, i, weights[s, i], plan.compute[s, i])
            for i, history in enumerate(histories)
        ]
        state = batch.walk(state, lambda s, x, b=branches: batch.predict(s, x, b), s, s + 1)
        histories = [branch.following for branch in branches]
    return state.x


@pytest.mark.parametrize("forecasts", [False, True])
def test_a_rollout_is_the_replay_and_its_gradients_are_those_of_weights(golden: Golden, forecasts):
    plan = schedule(golden, linear(golden) if forecasts else LAST)
    batch, weights = golden.trajectories(), decisions(plan)
    with torch.no_grad():
        reference = batch.walk(State(batch.x_T), batch.predict).x
        replayed = Engine(plan)(batch)
    images = Rollout(plan.compute, plan.predictor, checkpoints=False)(batch, weights)
    assert relative(images.detach(), replayed) < 2e-6
    (images - reference).square().mean().backward()
    naive = decisions(plan)
    (weighed(batch, plan, naive) - reference).square().mean().backward()
    assert relative(weights.grad[1:], naive.grad[1:]) < 1e-4
    assert (weights.grad[1:] != 0).all()


def test_checkpoints_change_memory_and_nothing_else(golden: Golden):
    plan, batch, gradients = schedule(golden, linear(golden)), golden.trajectories(), []
    kept = {}
    for checkpoints in (False, True):
        weights, numbers = decisions(plan), []
        with saved_tensors_hooks(lambda t, n=numbers: n.append(t.numel()) or t, lambda t: t):
            images = Rollout(plan.compute, plan.predictor, checkpoints)(batch, weights)
        kept[checkpoints] = sum(numbers)
        images.square().mean().backward()
        gradients.append(weights.grad)
    assert torch.equal(*gradients)
    assert kept[True] < 0.2 * kept[False]


def test_coefficients_have_the_gradient_of_finite_differences(golden: Golden):
    plan, batch = schedule(golden), golden.trajectories()
    coefficients = Coefficients(linear(golden), *plan.compute.shape, 1)

    def loss() -> torch.Tensor:
        images = Rollout(plan.compute, coefficients.live(), False)(batch, None)
        return images.double().square().mean()

    loss().backward()
    for rows in (coefficients.level, coefficients.slope):
        gradients = torch.stack([torch.zeros_like(r) if r.grad is None else r.grad for r in rows])
        s, i = divmod(int(gradients.abs().argmax()), plan.compute.shape[1])
        assert not plan.compute[s, i]
        row, step = rows[s], 0.01
        with torch.no_grad():
            row[i] += step
            above = loss().item()
            row[i] -= 2 * step
            below = loss().item()
            row[i] += step
        assert gradients[s, i].item() == pytest.approx((above - below) / (2 * step), rel=0.1)


def residuals(golden: Golden, plan: Schedule) -> float:
    """Squared local errors along the cached trajectory, summed."""
    batch, cache = golden.trajectories(), Cache(len(plan.costs.names), plan.predictor)
    errors = []

    def skipped(i, s):
        def branch(fn, x):
            errors.append((fn(x) - cache.predict(i, s)).square().sum().item())
            return cache.predict(i, s)

        return branch

    def predict(s, x):
        row = enumerate(plan.compute[s])
        return batch.predict(
            s, x, [Replay(cache, i, s, True) if c else skipped(i, s) for i, c in row]
        )

    with torch.no_grad():
        batch.walk(State(batch.x_T), predict)
    return sum(errors)


@pytest.mark.parametrize("base", ["last", "linear"])
def test_the_closed_form_is_nearer_along_the_trajectory(golden: Golden, base):
    start = LAST if base == "last" else linear(golden)
    plan, errors = schedule(golden), []
    for channels in (1, golden.model.config.hidden_size):
        learned = fit_coefficients([golden.trajectories()], plan, start, channels)
        assert learned.level.shape == (*plan.compute.shape, channels)
        computed = torch.from_numpy(plan.compute.copy())
        assert not learned.level[computed].any() and not learned.slope[computed].any()
        errors.append(residuals(golden, replace(plan, predictor=learned)))
    before = residuals(golden, replace(plan, predictor=start))
    assert errors[1] < errors[0] < before


def test_the_closed_form_counts_all_its_samples(golden: Golden):
    plan, batch = schedule(golden, linear(golden)), golden.trajectories()
    other = replace(batch, x_T=batch.x_T.flip(-1))

    def level(*batches):
        return fit_coefficients(batches, plan, plan.predictor, 1).level

    assert relative(level(batch, batch), level(batch)) < 1e-3
    apart = relative(level(other), level(batch))
    assert relative(level(other, batch), level(batch)) < 0.8 * apart


CONFIG = {
    "objective": "trajectory", "num_sampling_steps": 4, "global_batch_size": 2, "max_steps": 3,
    "held_out_every": 1, "held_out_batch_size": 4,
}  # fmt: skip


def trainer(folder, **options) -> Trainer:
    budget = {} if "freeze_schedule" in options else {"target_cur": 0.4}
    return Trainer(TrainConfig(**CONFIG | {"results_dir": folder} | budget | options))


def fora_file(folder, costs):
    path = folder / "fora.json"
    evenly_spaced(4, costs, Budget(cur=0.5)).save(path)
    return path


def test_training_on_images_meets_its_budget_and_never_gets_worse(tmp_path):
    running = trainer(tmp_path, predictor="learned", coefficients="scalar", refine=2)
    learner = running.learner
    before = learner.router.logits()
    folder = running.run().path
    exported, errors = load_router(folder).schedule, [error for _, error in learner.best.history]
    assert abs(exported.cur - 0.4) <= 0.5 / exported.compute.size
    assert len(errors) > 3 and errors[-1] < errors[0]
    assert not torch.equal(before, learner.router.logits())
    assert learner.values.held_out.error(exported) == pytest.approx(errors[-1])
    assert isinstance(exported.predictor, Learned)
    assert {"held_out.png", "router.png", "samples.png"} <= {p.name for p in folder.iterdir()}
    # What is replayed from the file is what was learned.
    assert exported == learner.schedule()
    with pytest.raises(HarmonicaError, match="router file"):
        load_schedule_file(folder / "schedule.json")[0]


def test_coefficients_learn_alone_once_the_schedule_is_settled(tmp_path):
    options = {"predictor": "learned", "coefficients": "scalar", "held_out_every": 3}
    learner = trainer(tmp_path, **options, schedule_updates=2, max_steps=4).learner
    held_out, tried = learner.values.held_out, []
    error, answers = held_out.error, iter([0.0])  # the first trial is the best, and settles it
    held_out.error = lambda schedule: tried.append(schedule) or next(answers, error(schedule))
    scores = [learner.logits()]
    for _ in range(4):
        learner.sweep()
        scores.append(learner.router.logits())
    assert not torch.equal(scores[0], scores[1]) and not torch.equal(scores[1], scores[2])
    assert torch.equal(scores[2], scores[3]) and torch.equal(scores[3], scores[4])
    # Tried when it settles, and then at its turn, with coefficients that went on from there.
    settled, last = tried
    assert np.array_equal(settled.compute, last.compute)
    assert not torch.equal(settled.predictor.level, last.predictor.level)
    assert relative(last.predictor.level, settled.predictor.level) < 2


def test_a_run_in_parts_settles_as_one_does(tmp_path):
    options = {"predictor": "learned", "coefficients": "scalar", "held_out_every": 3}
    options |= {"schedule_updates": 2}
    whole = trainer(tmp_path / "whole", **options, max_steps=4).run()
    for steps in (2, 4):
        parts = trainer(tmp_path / "parts", **options, max_steps=steps, resume="auto").run()
    assert load_router(parts.router).schedule == load_router(whole.router).schedule


def test_training_starts_from_the_better_place_of_the_rest(tmp_path, monkeypatch):
    for is_early in (False, True):
        learner = trainer(tmp_path, target_cur=0.4, max_steps=1).learner
        late, early = learner._starts()
        assert late.macs == early.macs and not np.array_equal(late.compute, early.compute)
        better = early if is_early else late
        monkeypatch.setattr(
            "harmonica.training.held_out.HeldOut.error",
            lambda self, plan, better=better: float((plan.compute != better.compute).any()),
        )
        assert trainer(tmp_path, target_cur=0.4).learner.schedule() == better


def test_exported_scores_give_the_exported_schedule(tmp_path):
    """Whatever held-out seeds kept: the file's threshold cuts where its schedule does."""
    for options in ({"held_out_every": 100}, {"predictor": "taylor1", "refine": 3}):
        running = trainer(tmp_path, **options)
        file = load_router(running.run().path)
        cut = threshold_schedule(file.logits, file.schedule.costs, file.info.threshold)
        assert np.array_equal(cut.compute, file.schedule.compute)


def test_what_errors_are_measured_against_is_sampled_by_one_engine(tmp_path, monkeypatch):
    """Captured once, for training and held-out batches; candidates are not captured."""
    runs = []
    for name, how in (("plain", EAGER), ("captured", Acceleration(captures=True))):
        backbone = replace(load_backbone(TrainConfig(**CONFIG), torch.device("cpu")), how=how)
        monkeypatch.setattr(
            "harmonica.training.trainer.load_backbone", lambda *a, found=backbone, **k: found
        )
        graphs = fake_cuda_graphs(monkeypatch)
        running = trainer(tmp_path / name)
        swept = [running.learner.sweep() for _ in range(2)]
        runs.append((swept, running.learner.learned.history, running.tally.evaluations))
    assert runs[0] == runs[1]
    # Of two held-out batches the second is captured.
    assert [graph.replays for graph in graphs] == [3]


def test_held_out_seeds_are_sampled_as_fast_as_others(tmp_path, monkeypatch):
    backbone = load_backbone(TrainConfig(**CONFIG), torch.device("cpu"))
    monkeypatch.setattr(
        "harmonica.training.trainer.load_backbone",
        lambda *a, **k: replace(backbone, how=Acceleration(compiles=True, captures=True)),
    )
    fake_cuda_graphs(monkeypatch)
    monkeypatch.setattr(fusion, "fused", lambda function: compiled.add(function) or function)
    compiled = set()
    learner = trainer(tmp_path).learner
    assert compiled == {embed, run_branches, add_updates, head}
    compiled.clear()
    learner.values.held_out.uncached(learner.batches("train", 0, learner.samples))
    assert not compiled  # which is a graph by now


def test_a_worse_trial_changes_nothing(tmp_path, monkeypatch):
    running = trainer(tmp_path)
    learner = running.learner
    best, scores, error = learner.schedule(), learner.logits(), learner.best.error
    monkeypatch.setattr(learner.values.held_out, "error", lambda schedule: 2 * error)
    learner.sweep()
    assert learner.schedule() == best and torch.equal(learner.logits(), scores)
    assert [found for _, found in learner.best.history] == [error, error]


def test_a_trial_that_is_not_finite_is_no_trial(tmp_path, monkeypatch):
    running = trainer(tmp_path, max_steps=2)
    held_out = running.learner.values.held_out
    error, answers = held_out.error, iter([float("nan"), 0.0])
    monkeypatch.setattr(held_out, "error", lambda schedule: next(answers, None) or error(schedule))
    before = running.learner.best.error
    running.learner.sweep()
    assert running.learner.best.error == before


def test_held_out_seeds_prefer_what_is_finite(tmp_path, monkeypatch):
    learner = trainer(tmp_path, predictor="learned", coefficients="scalar").learner
    held_out, plan = learner.values.held_out, replace(learner.schedule(), predictor=LAST)
    breaks = {LastValue}

    class Overflowing(Engine):
        """In half precision a part of the images may not be finite."""

        def __call__(self, batch):
            images = super().__call__(batch)
            if type(self.schedule.predictor) in breaks:
                images[0] = torch.nan
            return images

    monkeypatch.setattr("harmonica.training.held_out.Engine", Overflowing)
    assert held_out.error(plan) == float("inf")
    sampler = learner.backbone.sampler
    assert isinstance(held_out.better_base(plan, "time", sampler), Extrapolation)
    assert isinstance(learner.values.decided(plan).predictor, Extrapolation)
    breaks.add(Extrapolation)
    with pytest.raises(NotFinite, match=r"held-out seeds are not finite .* --mixed-precision no"):
        learner.values.decided(plan)


@pytest.mark.parametrize("forecasts", [False, True])
def test_a_rollout_goes_on_from_any_position(golden: Golden, forecasts):
    plan = schedule(golden, linear(golden) if forecasts else LAST)
    batch, rollout = golden.trajectories(), Rollout(plan.compute, plan.predictor)
    with torch.no_grad():
        positions = list(rollout.positions(batch, rollout.start(batch)))
        assert [position.s for position in positions] == list(range(golden.num_steps + 1))
        for position in positions:
            *_, last = rollout.positions(batch, position)
            assert torch.equal(last.state.x, positions[-1].state.x)


def test_exchanges_keep_the_cost_and_only_what_is_better(tmp_path):
    learner = trainer(tmp_path, held_out_batch_size=4).learner
    held_out, start = learner.values.held_out, learner.schedule()
    search = Exchanges(held_out, start, learner.logits(), seed=0)
    assert search.error == pytest.approx(held_out.error(start), rel=1e-4)
    kept, error = [], search.error
    for trial in range(12):
        kept.append(search.attempt(1 + trial % 2))
        assert (search.error < error) == kept[-1]
        assert search.schedule.macs == start.macs
        # What was rolled out from the middle is what the whole rollout gives.
        assert search.error == pytest.approx(held_out.error(search.schedule), rel=1e-4)
        error = search.error
    assert any(kept) and not all(kept)
    compute, scores = search.schedule.compute, search.logits[1:].numpy()
    assert scores[~compute[1:]].max() <= scores[compute[1:]].min()


@pytest.mark.parametrize(("most_bytes", "stride"), [(2**30, 1), (1, 4)])
def test_exchanges_share_what_comes_before(tmp_path, most_bytes, stride):
    """Positions that fit are kept; without any, a candidate starts from noise."""
    learner = trainer(tmp_path, held_out_batch_size=4).learner
    search = Exchanges(learner.values.held_out, learner.schedule(), learner.logits(), 0, most_bytes)
    tally, samples, firsts, rolled_out = learner.batches.tally, 2, [], search._rolled_out
    search._rolled_out = lambda schedule, s: firsts.append(s) or rolled_out(schedule, s)
    for _ in range(8):
        before, tries = tally.evaluations, len(firsts)
        search.attempt(1)
        if len(firsts) > tries:
            rolled = 4 - firsts[-1] // stride * stride
            assert tally.evaluations - before == rolled * samples
    assert max(firsts) > 1


def test_exchanges_end_where_there_is_nothing_to_exchange(tmp_path):
    for cur in (0.0, 0.75):
        running = trainer(tmp_path, target_cur=cur, refine=2, max_steps=1)
        assert load_router(running.run().path).schedule.cur == pytest.approx(cur)


@pytest.mark.parametrize("objective", ["trajectory", "sdt"])
def test_a_frozen_schedule_keeps_its_decisions(tmp_path, objective, bundled_costs):
    path = fora_file(tmp_path, bundled_costs)
    running = trainer(
        tmp_path / "runs", objective=objective, freeze_schedule=path, predictor="learned"
    )
    scores = running.learner.router.logits()
    exported = load_router(running.run().path).schedule
    assert np.array_equal(exported.compute, load_schedule_file(path)[0].compute)
    assert torch.equal(scores, running.learner.router.logits())
    coefficients = running.learner.values.frozen()
    reused = torch.from_numpy(~exported.compute)
    assert coefficients.level[reused].all() and not coefficients.level[~reused].any()


@pytest.mark.parametrize("objective", ["trajectory", "sdt"])
def test_the_closed_form_needs_no_updates(tmp_path, bundled_costs, objective):
    path = fora_file(tmp_path, bundled_costs)
    running = trainer(
        tmp_path / "runs", objective=objective, freeze_schedule=path, predictor="learned",
        fit="least-squares",
    )  # fmt: skip
    exported = load_router(running.run().path).schedule
    assert running.learner.updates == 0
    assert np.array_equal(exported.compute, load_schedule_file(path)[0].compute)
    held_out = running.learner.values.held_out
    assert held_out.error(exported) < held_out.error(replace(exported, predictor=LAST))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freeze_schedule": Path("x.json")}, "--freeze-schedule"),
        ({"freeze_schedule": Path("x.json"), "predictor": "learned"}, "--freeze-schedule x.json"),
        ({"objective": "trajectory", "l1": 1e-7}, "--objective trajectory"),
        ({"objective": "trajectory", "lambda_c": 7}, "--lambda-c is for --objective sdt"),
        ({"objective": "trajectory", "mask": "hard"}, "--mask is for --objective sdt"),
        ({"refine": 5}, "--refine is for --objective trajectory"),
        ({"held_out_every": 5}, "--held-out-every is for --objective trajectory"),
        ({"held_out_batch_size": 2}, "--held-out-batch-size is for"),
        ({"coefficient_lr": 0.1}, "--coefficient-lr is for --predictor learned"),
        ({"coordinate": "step"}, "--coordinate is for a --predictor"),
        ({"fit": "least-squares"}, "--fit"),
        (
            {
                "objective": "trajectory",
                "predictor": "learned",
                "fit": "least-squares",
                "schedule_updates": 5,
            },
            "--schedule-updates is for .* --fit gradient",
        ),
        ({"objective": "trajectory", "target_cur": 0.99}, "out of reach"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, said, tmp_path):
    with pytest.raises(HarmonicaError, match=said):
        config = TrainConfig(results_dir=tmp_path / "runs", num_sampling_steps=4, **options)
        config.check()
        Trainer(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("batch", "held_out"), [(12, 72), (8, 64), (64, 256)])
def test_held_out_seeds_can_be_shared_out_like_the_batch(batch, held_out):
    assert TrainConfig(global_batch_size=batch).held_out_batch_size == held_out
