"""Parts of a checkpoint, which may be anybody's: each as it was put there, or a ValueError."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def count(value: Any) -> int:
    """A number of things that were done."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a count in it is none")
    return value


def number(value: Any) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a number in it is none")
    return value


def numbers(values: Any, length: int) -> list[float]:
    """That many of them."""
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(f"a list in it does not hold {length} numbers")
    return [number(value) for value in values]


def tensor(value: Any, like: Tensor) -> Tensor:
    """A tensor of its own with finite numbers, in the shape, precision and place of ``like``."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != like.shape:
        raise ValueError(f"a tensor in it is not of shape {tuple(like.shape)}")
    if not value.isfinite().all():
        raise ValueError("a tensor in it is not finite")
    return torch.empty_like(like).copy_(value)


def tensors(values: Any, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a module."""
    if not isinstance(values, dict) or values.keys() != like.keys():
        raise ValueError("parameters are missing or unknown")
    return {name: tensor(values[name], mine) for name, mine in like.items()}


def moments(state: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Moments of a checkpoint; rates as they are given now, which may differ when a run goes on."""
    now = optimizer.state_dict()
    known, groups = state["state"], state["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in now["param_groups"]]:
        raise ValueError("its optimiser learns other parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {k: _moments(known[k], p) for k, p in enumerate(parameters) if k in known}
    return {**now, "state": kept}


def _moments(state: Any, parameter: Tensor) -> dict[str, Tensor]:
    kept = {
        "step": tensor(state["step"], torch.zeros(())),
        "exp_avg": tensor(state["exp_avg"], parameter.detach()),
        "exp_avg_sq": tensor(state["exp_avg_sq"], parameter.detach()),
    }
    if kept["step"] < 0 or (kept["exp_avg_sq"] < 0).any():
        raise ValueError("its optimiser is in no state that training leads to")
    return kept
