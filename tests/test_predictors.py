"""What stands in for a skipped branch: exactness, identities, files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from harmonica.errors import HarmonicaError
from harmonica.flops import Costs
from harmonica.predictors import (
    LAST,
    Extrapolation,
    Learned,
    TaylorSeer,
    combine,
    coordinate_of,
    from_dict,
    to_dict,
)
from harmonica.samplers import create_sampler
from harmonica.schedule import Schedule

STEPS = tuple(map(float, range(8)))


def forecast(predictor, s, computed, function) -> float:
    values = [torch.tensor(function(c), dtype=torch.float64) for c in computed]
    return float(combine(predictor.weights(s, 0, computed), values))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("computed", [(5, 4, 2), (3, 1, 0), (6, 3, 2)])
def test_extrapolation_is_exact_for_polynomials_of_its_order(order, computed):
    coordinate = tuple(float(x) for x in np.cumsum(np.random.default_rng(0).uniform(0.1, 1, 8)))
    predictor = Extrapolation(order, coordinate)
    for degree in range(order + 2):
        exact = coordinate[7] ** degree
        found = forecast(
            predictor, 7, computed[: order + 1], lambda c, d=degree: coordinate[c] ** d
        )
        assert (found == pytest.approx(exact, rel=1e-9)) == (degree <= order)


def test_with_one_value_every_predictor_returns_it():
    value = torch.randn(2, 3)
    for predictor in (LAST, Extrapolation(1, STEPS), Extrapolation(2, STEPS), TaylorSeer(2)):
        assert predictor.weights(3, 0, (1,)) == (1.0,)
        assert combine(predictor.weights(3, 0, (1,)), (value,)) is value  # no copy
    learned = Learned.start(Extrapolation(1, STEPS), 8, 1, 1)
    assert [w.item() for w in learned.weights(3, 0, (1,))] == [1.0]


def test_taylorseer_of_order_one_is_linear_extrapolation_in_steps():
    for s, computed in ((3, (2, 0)), (7, (4, 3))):
        expected = Extrapolation(1, STEPS).weights(s, 0, computed)
        assert TaylorSeer(1).weights(s, 0, computed) == pytest.approx(expected)


def test_taylorseer_of_order_two_is_the_series_of_backward_differences():
    # v = c**2 at steps 6, 4, 2: first differences 10 and 6, second (10 - 6) / 2 = 2.
    found = forecast(TaylorSeer(2), 7, (6, 4, 2), lambda c: c**2)
    assert found == pytest.approx(36 + 10 * 1 + 2 * 1 / 2)


def test_coordinates_are_steps_times_and_log_snr():
    sampler = create_sampler("ddim", 4)
    assert coordinate_of("step", sampler) == (0, 1, 2, 3)
    assert coordinate_of("time", sampler) == tuple(sampler.timesteps)
    for u, t in zip(coordinate_of("log-snr", sampler), sampler.timesteps, strict=True):
        signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[int(t)]
        assert u == pytest.approx(np.log(signal / (1 - signal)))


@pytest.mark.parametrize("base", [LAST, Extrapolation(1, STEPS)])
def test_learned_coefficients_start_at_their_base(base):
    learned = Learned.start(base, 8, 3, 4)
    value, older = torch.randn(2, 2, 5, 4)
    for computed, values in (((4, 2), (value, older)), ((4,), (value,))):
        expected = combine(base.weights(6, 1, computed)[: len(values)], values[: base.depth])
        found = combine(learned.weights(6, 1, computed), values)
        assert torch.allclose(found, expected, atol=1e-5)


def test_learned_coefficients_act_on_level_and_slope():
    learned = Learned.start(LAST, 8, 3, 4)
    level, slope = torch.zeros(2, 8, 3, 4)
    level[6, 1], slope[6, 1] = torch.arange(4.0), 0.5
    learned = replace(learned, level=level, slope=slope)
    value, older = torch.randn(2, 2, 5, 4)
    found = combine(learned.weights(6, 1, (4, 2)), (value, older))
    expected = (1 + torch.arange(4.0)) * value + 0.5 * (value - older)
    assert torch.allclose(found, expected, atol=1e-6)


def test_half_precision_does_not_round_small_coefficients_away():
    value, older = torch.full((2, 1, 1, 1), 256.0, dtype=torch.bfloat16)
    weights = (torch.tensor(1.003), torch.tensor(0.003))
    found = combine(weights, (value, older))
    assert found.dtype == torch.bfloat16 and found.item() == 258.0  # of 257.5; 1.0 would leave 256


def schedule(predictor) -> Schedule:
    compute = np.ones((8, 2), dtype=bool)
    compute[3:5] = False
    return Schedule(compute, Costs(("blocks.0.attn", "blocks.0.mlp"), (3, 5), 2), "branches",
                    predictor)  # fmt: skip


@pytest.mark.parametrize(
    "predictor",
    [LAST, Extrapolation(2, STEPS), TaylorSeer(1), Learned.start(Extrapolation(1, STEPS), 8, 2, 4)],
)
def test_a_schedule_carries_its_predictor_through_json(predictor):
    content = json.loads(json.dumps(schedule(predictor).to_dict()))
    again = Schedule.from_dict(content, getattr(predictor, "tensors", None))
    assert again == schedule(predictor)
    assert to_dict(again.predictor) == to_dict(predictor)
    assert (schedule(predictor).hash == schedule(LAST).hash) == (predictor == LAST)


def test_a_schedule_without_a_predictor_is_an_older_one():
    content = schedule(LAST).to_dict()
    del content["predictor"]
    assert Schedule.from_dict(content).predictor == LAST


@pytest.mark.parametrize(
    "content",
    [
        {"name": "oracle"},
        {"name": "extrapolation", "order": 3, "coordinate": list(STEPS)},
        {"name": "extrapolation", "order": 1, "coordinate": [0.0] * 8},
        {"name": "extrapolation", "order": 1, "coordinate": [*STEPS[:7], float("nan")]},
        "last",
    ],
)
def test_malformed_predictors_are_refused(content):
    document = schedule(LAST).to_dict() | {"predictor": content}
    with pytest.raises(HarmonicaError, match="malformed"):
        Schedule.from_dict(document)


def test_learned_coefficients_are_not_in_a_schedule_alone():
    document = schedule(Learned.start(LAST, 8, 2, 1)).to_dict()
    with pytest.raises(HarmonicaError, match="router file"):
        Schedule.from_dict(document)


def test_changed_coefficients_are_noticed():
    learned = Learned.start(LAST, 8, 2, 4)
    tensors = {name: value.clone() for name, value in learned.tensors.items()}
    assert from_dict(to_dict(learned), (8, 2), tensors).depth == 2
    tensors["slope"][0, 0, 0] = 1e-3
    with pytest.raises(ValueError, match="hash"):
        from_dict(to_dict(learned), (8, 2), tensors)
