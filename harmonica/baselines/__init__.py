"""Ways of sampling at a given cost that need no training: what a router has to beat.

Each is a maker of a :class:`Plan`. Learning-to-Cache is trained: see
``harmonica.training.learning_to_cache``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from harmonica.backbone import Backbone
from harmonica.baselines.delta_dit import nearest_delta_dit
from harmonica.baselines.fixed import evenly_spaced, fora, random_schedule, taylorseer
from harmonica.baselines.long_skips import nearest_deepcache, nearest_faster_diffusion
from harmonica.baselines.smoothcache import nearest_smoothcache, output_changes
from harmonica.budget import Budget
from harmonica.predictors import create_predictor
from harmonica.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """How a method samples.

    Attributes:
        backbone: the model with the method's sampler.
        schedule: what it replays; None computes everything.
        setting: the method's own parameters, for people.
    """

    backbone: Backbone
    schedule: Schedule | None = None
    setting: str = ""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one row over the whole trajectory."""
        if self.schedule is not None:
            return self.schedule.macs
        return len(self.backbone.sampler.timesteps) * self.backbone.costs.total

    def speedup_over(self, other: "Plan") -> float:
        """Theoretical speed-up: multiply-accumulates of the other plan over those of this one."""
        return other.macs / self.macs


def _num_steps(backbone: Backbone) -> int:
    return len(backbone.sampler.timesteps)


def _fewer_steps(backbone: Backbone, budget: Budget, sampler: str) -> Plan:
    kept = 1 / budget.speedup if budget.speedup is not None else 1 - budget.cur
    steps = max(2, round(_num_steps(backbone) * kept))
    eta = getattr(backbone.sampler, "eta", 0.0)
    return Plan(backbone.sampled_by(sampler, steps, eta), None, f"{sampler}, T = {steps}")


def fewer_steps(backbone: Backbone, budget: Budget, seed: int) -> Plan:
    """The same sampler with the number of steps nearest to the budget; nothing is reused."""
    return _fewer_steps(backbone, budget, backbone.sampler.name)


def fewer_steps_of_dpm_solver(backbone: Backbone, budget: Budget, seed: int) -> Plan:
    """DPM-Solver++ with the number of steps nearest to the budget: what a user would pick."""
    return _fewer_steps(backbone, budget, "dpm-solver++-zero")


def _nearest(backbone: Backbone, budget: Budget, make: Callable[[int], Schedule]) -> Plan:
    """The interval whose schedule is nearest to the budget."""
    schedules = {n: make(n) for n in range(2, _num_steps(backbone) + 1)}
    interval = min(schedules, key=lambda n: budget.distance(schedules[n]))
    return Plan(backbone, schedules[interval], f"N = {interval}")


def nearest_fora(backbone: Backbone, budget: Budget, seed: int) -> Plan:
    """FORA with the interval nearest to the budget."""
    return _nearest(backbone, budget, lambda n: fora(_num_steps(backbone), backbone.costs, n))


def fora_with_forecasts(backbone: Backbone, budget: Budget, seed: int) -> Plan:
    """FORA, with the line through the last two computed values in place of the last."""
    return _with_lines(nearest_fora(backbone, budget, seed))


def _with_lines(plan: Plan) -> Plan:
    line = create_predictor("taylor1", "step", plan.backbone.sampler)
    return replace(plan, schedule=replace(plan.schedule, predictor=line))


def nearest_taylorseer(order: int) -> Callable[[Backbone, Budget, int], Plan]:
    """TaylorSeer of an order, with the interval nearest to the budget."""

    def plan(backbone: Backbone, budget: Budget, seed: int) -> Plan:
        steps, costs = _num_steps(backbone), backbone.costs
        return _nearest(backbone, budget, lambda n: taylorseer(steps, costs, n, order))

    return plan


def uniform(backbone: Backbone, budget: Budget, seed: int) -> Plan:
    """Whole reused steps, evenly spaced in time, exactly at the budget."""
    return Plan(backbone, evenly_spaced(_num_steps(backbone), backbone.costs, budget))


def uniform_with_forecasts(backbone: Backbone, budget: Budget, seed: int) -> Plan:
    """The same, with the line through the last two computed values in place of the last."""
    return _with_lines(uniform(backbone, budget, seed))


def random(backbone: Backbone, budget: Budget, seed: int) -> Plan:
    """Branches reused at random, exactly at the budget."""
    schedule = random_schedule(_num_steps(backbone), backbone.costs, budget, seed)
    return Plan(backbone, schedule, f"seed {seed}")


def delta_dit(backbone: Backbone, budget: Budget, seed: int) -> Plan:
    """Delta-DiT with the interval and span nearest to the budget."""
    return Plan(backbone, *nearest_delta_dit(_num_steps(backbone), backbone.costs, budget))


def smoothcache(backbone: Backbone, budget: Budget, seed: int) -> Plan:
    """SmoothCache with the threshold nearest to the budget, after a calibration pass."""
    return Plan(
        backbone, *nearest_smoothcache(output_changes(backbone, seed), backbone.costs, budget)
    )


def faster_diffusion(backbone: Backbone, budget: Budget, seed: int) -> Plan:
    """Faster Diffusion with the interval nearest to the budget."""
    return Plan(backbone, *nearest_faster_diffusion(_num_steps(backbone), backbone.costs, budget))


def deepcache(backbone: Backbone, budget: Budget, seed: int) -> Plan:
    """DeepCache with the interval and number of outer blocks nearest to the budget."""
    return Plan(backbone, *nearest_deepcache(_num_steps(backbone), backbone.costs, budget))


METHODS: dict[str, Callable[[Backbone, Budget, int], Plan]] = {
    "fewer-steps": fewer_steps,
    "fewer-steps-dpm-solver++": fewer_steps_of_dpm_solver,
    "fora": nearest_fora,
    "fora-taylor1": fora_with_forecasts,
    "taylorseer1": nearest_taylorseer(1),
    "taylorseer2": nearest_taylorseer(2),
    "delta-dit": delta_dit,
    "smoothcache": smoothcache,
    "uniform": uniform,
    "uniform-taylor1": uniform_with_forecasts,
    "random": random,
    "faster-diffusion": faster_diffusion,
    "deepcache": deepcache,
}
# These look at samples of their own first.
CALIBRATED = ("smoothcache",)
# Only for models with long skip connections.
OF_LONG_SKIPS = ("faster-diffusion", "deepcache")
