"""Router files: scores, the schedule they became, and what they were trained for."""

import argparse
import hashlib
import json
import math
import reprlib
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from harmonica import __version__
from harmonica.budget import Budget
from harmonica.errors import HarmonicaError, HarmonicaWarning
from harmonica.files import (
    existing_file,
    first_line,
    is_safetensors,
    parse_json,
    read_json,
    read_safetensors,
    read_torch,
    write_atomically,
)
from harmonica.flops import Costs
from harmonica.options import flag_of
from harmonica.predictors import Learned
from harmonica.router import SEMANTICS, budget_schedule, threshold_schedule
from harmonica.schedule import Schedule

# 1 knew no predictors: what is not computed takes the last value. 2 did not say height and width,
# nor which channels are guided.
FORMAT = 3


def _is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value that JSON held is of a field's type, numbers being finite ones."""
    if isinstance(kind, UnionType):
        return any(_is_of_type(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return type(value) is tuple and all(_is_of_type(one, get_args(kind)[0]) for one in value)
    if type(value) is int and kind in (int, float):
        return abs(value) < 2**63
    return type(value) is kind and (kind is not float or math.isfinite(value))


@dataclass(frozen=True)
class RouterInfo:
    """What a router was trained for. None: the file does not say (published layouts).

    ``height`` and ``width`` are those of the images, whose ``image_size`` is the model's.
    """

    model: str | None = None
    image_size: int | None = None
    height: int | None = None
    width: int | None = None
    num_classes: int | None = None
    sampler: str | None = None
    eta: float | None = None
    num_sampling_steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    cfg_scale: float | None = None
    guide_all_channels: bool | None = None
    threshold: float | None = None
    weights_hash: str | None = None
    hyperparameters: dict = field(default_factory=dict)
    source: str = "harmonica"
    version: str = __version__

    @classmethod
    def from_dict(cls, content: Any) -> "RouterInfo":
        """What ``asdict`` made, after JSON; fields that earlier versions did not know are None.

        Raises:
            TypeError, ValueError, OverflowError: it is something else.
        """
        if not isinstance(content, dict):
            raise TypeError(f"it is a {type(content).__name__}")
        if isinstance(content.get("timesteps"), list):
            content = {**content, "timesteps": tuple(content["timesteps"])}
        info = cls(**content)
        for spec in fields(cls):
            value = getattr(info, spec.name)
            if not _is_of_type(value, spec.type):
                raise ValueError(f"its {spec.name} is {reprlib.repr(value)}")
        return info

    def check(self, expected: "RouterInfo", force: bool = False) -> None:
        """Refuse what was trained for something else; warn of guidance and weights.

        Args:
            force: let another sampler with as many steps pass, with a warning.

        Raises:
            HarmonicaError: one sentence saying what does not fit.
        """
        flags = ("model", "image_size", "height", "width", "num_classes", "num_sampling_steps")
        for name in flags:
            mine, theirs = getattr(self, name), getattr(expected, name)
            if mine is not None and mine != theirs:
                flag = flag_of(name)
                raise HarmonicaError(
                    f"the router was trained with {flag} {mine}, not {theirs}; pass {flag} {mine} "
                    "or another router"
                )
        doubts = self._check_sampler(expected, force)
        if self.cfg_scale not in (None, expected.cfg_scale):
            doubts.append(
                f"with --cfg-scale {self.cfg_scale}, not {expected.cfg_scale}: its schedule may "
                "not suit that guidance"
            )
        if self.guide_all_channels not in (None, expected.guide_all_channels):
            flag = ("--no-guide-all-channels", "--guide-all-channels")[self.guide_all_channels]
            doubts.append(f"with {flag}: its schedule may not suit other guidance")
        if self.weights_hash not in (None, expected.weights_hash):
            doubts.append(
                f"on weights {self.weights_hash}, these are {expected.weights_hash}: its schedule "
                "may not suit them"
            )
        for doubt in doubts:
            warnings.warn(f"the router was trained {doubt}", HarmonicaWarning, stacklevel=3)

    def _check_sampler(self, expected: "RouterInfo", force: bool) -> list[str]:
        """Refuse another sampler, or the same one at other times, unless forced to take it.

        Returns:
            What to warn of then.
        """
        misfit, remedy = None, "train it again"
        for name in ("sampler", "eta"):
            mine, theirs, flag = getattr(self, name), getattr(expected, name), flag_of(name)
            if misfit is None and mine not in (None, theirs):
                misfit = f"with {flag} {mine}, not {theirs}"
                remedy = f"pass {flag} {mine} or another router"
        if misfit is None and not _are_same_times(self.timesteps, expected.timesteps):
            misfit = "at other timesteps than this sampler visits"
        if misfit is None:
            return []
        if not force:
            raise HarmonicaError(
                f"the router was trained {misfit}; {remedy} (sample.py and evaluate.py replay it "
                "all the same with --force)"
            )
        return [f"{misfit}: its schedule may not suit this sampler"]


def _are_same_times(recorded: tuple[float, ...] | None, expected: tuple[float, ...] | None) -> bool:
    """Up to rounding: logarithms of continuous times end differently on other processors."""
    if recorded is None or expected is None:
        return recorded is None
    return len(recorded) == len(expected) and all(
        math.isclose(mine, theirs, rel_tol=1e-6, abs_tol=1e-6)
        for mine, theirs in zip(recorded, expected, strict=True)
    )


@dataclass(frozen=True)
class RouterFile:
    """A trained router: its scores, the schedule it was exported with, and where it came from.

    ``schedule`` is None for published files, which hold scores alone.
    """

    logits: Tensor  # (T, N), sampling order
    info: RouterInfo
    schedule: Schedule | None = None

    def check(self, model: nn.Module, expected: RouterInfo, force: bool = False) -> None:
        """Refuse a router that was made for something else; see ``RouterInfo.check``.

        Raises:
            HarmonicaError: one sentence saying what does not fit.
        """
        self.info.check(expected, force)
        if self.logits.shape[1] != len(model.branch_names):
            raise HarmonicaError(
                f"the router has {self.logits.shape[1]} branches and --model {expected.model} has "
                f"{len(model.branch_names)}; use the model that the router was trained on"
            )
        if len(self.logits) != expected.num_sampling_steps:
            raise HarmonicaError(
                f"the router has {len(self.logits)} steps, not {expected.num_sampling_steps}; "
                f"pass --num-sampling-steps {len(self.logits)} or another router"
            )
        predictor = None if self.schedule is None else self.schedule.predictor
        if isinstance(predictor, Learned):
            channels, size = predictor.level.shape[2], model.config.hidden_size
            if channels not in (1, size):
                raise HarmonicaError(
                    f"the router has coefficients of {channels} channels and --model "
                    f"{expected.model} has {size}; use the model that the router was trained on"
                )

    @property
    def threshold(self) -> float:
        """What cuts the scores where nothing else is said."""
        return 0.1 if self.info.threshold is None else self.info.threshold

    def to_schedule(
        self,
        costs: Costs,
        threshold: float | None = None,
        semantics: str = "harmonica",
        budget: Budget | None = None,
    ) -> Schedule:
        """The exported schedule, or one that a budget, a threshold or other semantics make.

        Args:
            threshold: default: the file's own, or 0.1.
            semantics: one of ``SEMANTICS``; which rows of the scores count.
            budget: what the scores are cut at instead of a threshold.

        Raises:
            HarmonicaError: those rows cannot reuse as much as ``budget`` says.
        """
        rows = SEMANTICS[semantics](len(self.logits))
        if budget is not None:
            schedule = budget_schedule(self.logits, costs, budget, rows)
        elif threshold is None and self.schedule is not None and semantics == "harmonica":
            return replace(self.schedule, costs=costs)
        else:
            threshold = self.threshold if threshold is None else threshold
            schedule = threshold_schedule(self.logits, costs, threshold, rows)
        if self.schedule is None:
            return schedule
        return replace(schedule, predictor=self.schedule.predictor)


def _content_hash(logits: Tensor, schedule: str, info: str) -> str:
    digest = hashlib.sha256(logits.contiguous().numpy().tobytes())
    digest.update(schedule.encode())
    digest.update(info.encode())
    return digest.hexdigest()


def save_router(path: Path, router: RouterFile) -> None:
    """Write a router file: safetensors, everything else in its metadata."""
    logits = router.logits.detach().float().cpu().contiguous()
    info = json.dumps(asdict(router.info), sort_keys=True)
    schedule, coefficients = "", {}
    if router.schedule is not None:
        schedule = json.dumps(router.schedule.to_dict())  # with a hash of the coefficients
        coefficients = getattr(router.schedule.predictor, "tensors", {})
    metadata = {
        "format": f"harmonica-router-{FORMAT}",
        "info": info,
        "schedule": schedule,
        "content_hash": _content_hash(logits, schedule, info),
    }
    write_atomically(path, safetensors_bytes({"logits": logits, **coefficients}, metadata))


def _load_own(path: Path) -> RouterFile:
    tensors, metadata = read_safetensors(path)
    known = [f"harmonica-router-{number}" for number in range(1, FORMAT + 1)]
    if (
        metadata.get("format") not in known
        or "logits" not in tensors
        or any(tensor.dtype != torch.float32 for tensor in tensors.values())
    ):
        raise HarmonicaError(
            f"{path} is not a router file of format 1 to {FORMAT}; pass one that train_router.py "
            "wrote"
        )
    logits, info, schedule = (
        tensors["logits"],
        metadata.get("info", ""),
        metadata.get("schedule", ""),
    )
    if metadata.get("content_hash") != _content_hash(logits, schedule, info):
        raise HarmonicaError(f"{path} does not match its content hash; fetch or export it again")
    try:
        record = RouterInfo.from_dict(parse_json(info, "its record"))
        read = parse_json(schedule, "its schedule") if schedule else None
        table = None if read is None else Schedule.from_dict(read, tensors)
        if table is not None and table.compute.shape != logits.shape:
            raise ValueError("its schedule and its scores do not fit each other")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise HarmonicaError(
            f"{path} has malformed metadata ({first_line(error)}); export it again"
        ) from None
    return RouterFile(logits, record, table)


def load_schedule_file(path: Path, flag: str = "--path") -> tuple[Schedule, RouterInfo]:
    """A schedule JSON, and what it says that it was trained for.

    Raises:
        HarmonicaError: not there, or malformed.
    """
    content = read_json(existing_file(path, flag))
    schedule = Schedule.from_dict(content)
    try:
        says_nothing = {"source": "schedule JSON", "version": ""}
        return schedule, RouterInfo.from_dict(content.get("trained_for", says_nothing))
    except (TypeError, ValueError, OverflowError) as error:
        raise HarmonicaError(
            f"{path} has a malformed record ({first_line(error)}); export it again"
        ) from None


def _is_row(value: Any) -> bool:
    """Whether a value is a tensor of real numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _load_published(path: Path) -> RouterFile:
    """Both layouts of the released code. Their row i is the respaced index: 0 is the last step."""
    content = read_torch(path)
    arguments = None
    if isinstance(content, dict) and "routers" in content:
        arguments, content = content.get("args"), content["routers"]
    if not isinstance(content, dict) or not content:
        raise HarmonicaError(f"{path} holds no router; pass a file that train_router.py wrote")
    rows = [content.get(f"{i}.prob") for i in range(len(content))]
    if (
        not all(_is_row(row) for row in rows)
        or len({row.numel() for row in rows}) != 1
        or rows[0].numel() == 0
    ):
        raise HarmonicaError(
            f"{path} holds no router: its entries are not 0.prob .. {len(content) - 1}.prob of "
            "equal length; pass a file that train_router.py wrote"
        )
    logits = torch.stack([row.detach().float().flatten() for row in reversed(rows)])
    if not logits.isfinite().all():
        raise HarmonicaError(f"{path} holds scores that are not finite; use another router")
    known = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}

    def recorded(name: str, kind: type) -> Any:
        return known[name] if _is_of_type(known.get(name), kind) else None

    return RouterFile(
        logits,
        RouterInfo(
            model=recorded("model", str),
            image_size=recorded("image_size", int),
            num_classes=recorded("num_classes", int),
            num_sampling_steps=recorded("num_sampling_steps", int),
            cfg_scale=recorded("cfg_scale", float),
            threshold=recorded("ste_threshold", float),
            hyperparameters={k: v for k, v in known.items() if isinstance(v, int | float | str)},
            source="published .pt",
            version="",
        ),
    )


def load_router(path: Path, flag: str = "--path") -> RouterFile:
    """Read a router file, ours or a published one; a run directory stands for its router.

    Raises:
        HarmonicaError: not there, damaged, or not a router. Nothing in the file is executed.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [
            path / "router.safetensors",
            *sorted(path.glob("checkpoints/*.pt"), reverse=True),
        ]
        if (path / "config.yaml").is_file() and not candidates[0].is_file():
            raise HarmonicaError(
                f"{flag} {path} is a run that has not exported its router; let it finish, or "
                "go on with train_router.py --resume"
            )
        path = next((file for file in candidates if file.is_file()), candidates[0])
    existing_file(path, flag)
    router = _load_own(path) if is_safetensors(path) else _load_published(path)
    if router.logits.ndim != 2 or not math.prod(router.logits.shape):
        raise HarmonicaError(f"{path} holds no (step, branch) scores; use another router")
    if not router.logits.isfinite().all():
        raise HarmonicaError(f"{path} holds scores that are not finite; use another router")
    return router
