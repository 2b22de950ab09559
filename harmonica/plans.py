"""How to sample faster, as the flags say: a router, or a method that needs no training."""

from dataclasses import replace

from harmonica.backbone import Backbone
from harmonica.baselines import METHODS, Plan
from harmonica.errors import HarmonicaError
from harmonica.sample_config import ReplayConfig
from harmonica.sampling import load_schedule, with_predictor


def choose_plan(config: ReplayConfig, backbone: Backbone) -> tuple[str, Plan] | None:
    """The plan, and what to call it; None if nothing says so.

    Raises:
        HarmonicaError: a router that does not fit, or a predictor where nothing is skipped.
    """
    if config.method is not None:
        name = config.method
        plan = METHODS[name](backbone, config.budget, config.method_seed)
    elif config.path is not None:
        schedule = load_schedule(
            config.path,
            config.threshold,
            backbone,
            config.semantics,
            force=config.force,
            budget=config.budget,
        )
        name, plan = "router", Plan(backbone, schedule)
    else:
        return None
    if plan.schedule is None:
        if config.predictor is not None:
            raise HarmonicaError(
                f"--predictor stands in for what is skipped, and --method {name} skips nothing; "
                "drop it"
            )
        return name, plan
    schedule = with_predictor(plan.schedule, config.predictor, config.coordinate, plan.backbone)
    is_cut_anew = config.path is not None and (
        config.budget is not None or config.threshold is not None or config.semantics != "harmonica"
    )
    if is_cut_anew and schedule.predictor.name == "learned":
        raise HarmonicaError(
            f"--path {config.path} has coefficients that were learned for its own schedule, not "
            "for another one of its scores; add --predictor last, or train for it"
        )
    return name, replace(plan, schedule=schedule)
