"""What is replayed, and what is sampled: flags, presets, and the record of both."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from harmonica.baselines import METHODS
from harmonica.budget import Budget
from harmonica.config import BackboneConfig, budget_of, check_one_budget
from harmonica.errors import HarmonicaError
from harmonica.options import flag_of, option
from harmonica.predictors import COORDINATES, PREDICTORS
from harmonica.router import SEMANTICS
from harmonica.router_file import load_router, load_schedule_file

# What sampling takes over from a router file unless a flag says otherwise.
SHARED_WITH_ROUTER = (
    "model", "image_size", "num_classes", "sampler", "eta", "cfg_scale", "guide_all_channels",
)  # fmt: skip
# What does not change an image of a given index.
NOT_OF_THE_IMAGES = (
    "path", "ckpt", "vae", "accelerate_method", "ddim_sample", "num_images", "num_samples", "png",
    "timeout", "batch_size", "out", "compare", "repeats", "compile", "cuda_graphs",
)  # fmt: skip

# What makes images to measure alone takes notice of.
OF_SHARDS = ("png", "shard_size", "timeout")


def known_from_router(values: dict[str, Any]) -> dict[str, Any]:
    """What the router or schedule ``path`` says of model and sampler, if there is one."""
    path = values.get("path")
    if path is None or not path.exists():
        return {}
    if path.suffix == ".json":
        schedule, info = load_schedule_file(path)
        steps = schedule.num_steps
    else:
        router = load_router(path)
        info, steps = router.info, len(router.logits)
    known = {name: getattr(info, name) for name in SHARED_WITH_ROUTER}
    for side in ("height", "width"):
        if getattr(info, side) != info.image_size:  # not every model has a flag for it
            known[side] = getattr(info, side)
    known["num_classes"] = info.num_classes or None  # an unconditional model's is not to be said
    known["num_sampling_steps"] = steps
    return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True)
class ReplayConfig(BackboneConfig):
    """A router to be replayed and the schedule that is made of it, or a method without one."""

    path: Path | None = option(
        None, "router file, published .pt, schedule JSON, or run directory", aliases=("--router",)
    )
    threshold: float | None = option(
        None,
        "make the schedule from the scores; default: the exported one",
        aliases=("--thres",),
        low=0,
        high=1,
    )
    semantics: str = option(
        "harmonica",
        "how scores are read; ltc: every other step computes all, as routers of Learning-to-Cache "
        "mean it",
        choices=tuple(SEMANTICS),
    )
    force: bool = option(False, "replay a router that was trained for another sampler")
    method: str | None = option(
        None,
        "instead of a router: a method without training, at --target-cur or --target-speedup",
        choices=tuple(METHODS),
    )
    target_cur: float | None = option(
        None,
        "share of reused branches: for --method, or to cut the scores of --path anew",
        low=0,
        high=1,
    )
    target_speedup: float | None = option(None, "likewise, theoretical speed-up", low=1)
    method_seed: int = option(
        0, "seed of a --method that draws its schedule or calibrates", low=0, high=2**32
    )
    predictor: str | None = option(
        None,
        "what stands in for a skipped branch; default: what the router was trained with, or the "
        "last value",
        choices=PREDICTORS,
    )
    coordinate: str = option(
        "time", "what --predictor measures distances between steps in", choices=COORDINATES
    )

    @classmethod
    def known_from_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        return known_from_router(values)

    @property
    def budget(self) -> Budget | None:
        """What ``method``, or a schedule made of the scores of ``path``, is to reuse."""
        return budget_of(self)

    def check(self) -> None:
        """Also: a router or a method with its budget, and nothing that neither of them reads."""
        super().check()
        check_one_budget(self)
        if self.path is not None and self.method is not None:
            raise HarmonicaError("--path and --method exclude each other; pass one")
        if self.method is not None and self.budget is None:
            raise HarmonicaError(
                f"--method {self.method} needs a cost; add --target-speedup or --target-cur"
            )
        if self.budget is not None and self.path is None and self.method is None:
            raise HarmonicaError(f"{self.budget} is for a --method or a router; add one or --path")
        if self.budget is not None and self.threshold is not None:
            raise HarmonicaError(f"--threshold and {self.budget} exclude each other; pass one")
        if self.path is None and (
            self.threshold is not None or self.semantics != "harmonica" or self.force
        ):
            raise HarmonicaError(
                "--threshold, --semantics and --force read a router; name it with --path"
            )
        if self.method is None and self.method_seed:
            raise HarmonicaError("--method-seed is for a --method; name one")
        if self.path is None and self.method is None and self.predictor is not None:
            raise HarmonicaError(
                "--predictor stands in for what is skipped; add --path or --method"
            )
        if self.predictor in (None, "last") and self.coordinate != "time":
            raise HarmonicaError("--coordinate is for a --predictor that forecasts; add one")


@dataclass(frozen=True)
class SampleConfig(ReplayConfig):
    """Sampling with and without a router."""

    accelerate_method: str | None = option(
        None, "dynamiclayer is the published name of replay", choices=("dynamiclayer",)
    )
    ddim_sample: bool = option(False, "the published way to say --sampler ddim")
    classes: tuple[int, ...] | None = option(None, "class of every image", many=True)
    num_images: int | None = option(
        None,
        "images to look at, classes drawn from the seed; default: one per class, at most 16",
        low=1,
    )
    num_samples: int | None = option(
        None,
        "instead: images to measure, all classes equally often, by any number of processes, into "
        "shards and one npz; the same command goes on where it stopped",
        low=1,
    )
    png: bool = option(False, "with --num-samples: PNG files too")
    shard_size: int = option(128, "images per shard of --num-samples", low=1)
    timeout: int = option(
        900, "with --num-samples: seconds without a new image after which it gives up", low=1
    )
    seed: int = option(0, "seed of noise and labels", aliases=("--global-seed",), low=0, high=2**32)
    batch_size: int = option(64, "images per forward", low=1)
    out: Path = option(Path("samples"), "folder for pictures and the report")
    compare: bool = option(False, "also sample without the router and draw both rows")
    repeats: int = option(3, "timed repetitions, after warming up", low=1)

    def check(self) -> None:
        """Also: images to look at or to measure, and nothing that is for others."""
        super().check()
        if self.num_samples is not None:
            if self.num_images is not None or self.compare:
                raise HarmonicaError(
                    "--num-samples makes images to measure, --num-images and --compare some to "
                    "look at; pass one or the other"
                )
        else:
            self._check_no_shards()
        if self.path is None and self.accelerate_method is not None:
            raise HarmonicaError("--accelerate-method replays a router; name it with --path")
        if self.compare and self.path is None and self.method is None:
            raise HarmonicaError("--compare needs a router or a method; add --path or --method")

    def _check_no_shards(self) -> None:
        """Refuse what is for --num-samples."""
        for spec in fields(self):
            if spec.name in OF_SHARDS and getattr(self, spec.name) != spec.default:
                raise HarmonicaError(f"{flag_of(spec.name)} is for --num-samples; drop it")
