"""Options and cells of a comparison."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from harmonica.baselines import METHODS
from harmonica.budget import Budget
from harmonica.config import BackboneConfig
from harmonica.diffusion import TRAIN_STEPS
from harmonica.errors import HarmonicaError
from harmonica.metrics import METRICS
from harmonica.options import option

# Published settings that this project changed, by what they are about.
_PUBLISHED: dict[str, dict] = {
    "lambda": {"lambda_form": "published"},
    "stored": {"stores_fresh": False},
    "compared": {"compares_all": True},
    "lr": {"lr": 0.01, "adam_eps": 1e-8},
    "start": {"init_std": 1.0},
    "refresh": {"lambda_c": 500, "lambda_batch_size": 16},
}
# Methods that learn, and what sets them apart from this project's own training.
TRAINED: dict[str, dict] = {
    "harmonica": {},
    # As published, but for beta, which is steered.
    "harmonica-published": {k: v for part in _PUBLISHED.values() for k, v in part.items()},
    **{f"harmonica-published-{name}": part for name, part in _PUBLISHED.items()},
    "sdt-ltc-loss": {"lambda_form": "constant"},
    "learning-to-cache": {"method": "learning-to-cache"},
}
# What may stand in for what a schedule skips, beside last values.
_VALUES: dict[str, dict] = {
    "-taylor1": {"predictor": "taylor1"},
    "-fitted": {"predictor": "learned", "fit": "least-squares"},
    "-learned": {"predictor": "learned"},
}
_TRAJECTORY = {"objective": "trajectory"}
# These learn for one cost: a schedule, and what stands in at that schedule.
TRAINED_AT_LEVEL: dict[str, dict] = {
    "trajectory": _TRAJECTORY,
    **{f"trajectory{name}": _TRAJECTORY | value for name, value in _VALUES.items()},
    **{f"harmonica{name}": value for name, value in _VALUES.items()},
}
# These go on with exchanges where the others ended.
REFINED = {f"{name}-refined": name for name in TRAINED_AT_LEVEL if name.startswith("trajectory")}
# These learn what stands in for what FORA skips: in closed form, or on the final image.
ON_FORA = {f"fora{name}": _TRAJECTORY | _VALUES[name] for name in ("-fitted", "-learned")}
LEARNED = (*TRAINED, *TRAINED_AT_LEVEL, *REFINED, *ON_FORA)
ALL_METHODS = (*LEARNED, *METHODS)
DEFAULT_METHODS = (
    *("trajectory", "trajectory-taylor1", "trajectory-learned"),
    *("harmonica", "sdt-ltc-loss", "learning-to-cache"),
    *METHODS,
)


@dataclass(frozen=True)
class CompareConfig(BackboneConfig):
    """Comparison of methods at equal cost."""

    methods: tuple[str, ...] = option(
        DEFAULT_METHODS, "methods to compare", choices=ALL_METHODS, many=True
    )
    speedups: tuple[float, ...] | None = option(
        None, "cost levels: theoretical speed-ups; default: 1.25 1.5 2 2.5", low=1, many=True
    )
    curs: tuple[float, ...] | None = option(
        None, "cost levels as shares of reuse instead", low=0, high=1, many=True
    )
    num_images: int = option(
        5000,
        "images per cell that are scored against the reference; 0: none",
        low=0,
        aliases=("--num-samples",),
    )
    num_paired: int = option(512, "seeds whose images are compared with their own", low=1)
    exact_steps: int = option(
        200, "DDIM steps of the exact solution; 0: none", low=0, high=TRAIN_STEPS
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "seeds of training and of random schedules", low=0, many=True
    )
    image_seed: int = option(
        1_000_000, "seed of noise and labels, apart from training's", low=0, high=2**32
    )
    train_updates: int = option(1000, "router updates of methods that learn", low=1)
    trajectory_updates: int = option(
        40, "updates of methods that learn on the final image, at every level anew", low=1
    )
    exchanges: int = option(200, "trials of methods that exchange branches after learning", low=1)
    train_cur: float = option(
        0.5,
        "share of reuse they are trained at, and cut at every level; Learning-to-Cache, which can "
        "reuse in every other step only, is trained at half of it",
        low=0,
        high=1,
    )
    reference: str | None = option(
        None, "set of real images; default: cifar10 for the bundled backbone, else none"
    )
    metrics: tuple[str, ...] = option(
        ("fid",), "scores against the reference", choices=METRICS, many=True
    )
    data: str | None = option(
        None, "images for Learning-to-Cache, which is left out without: class folders, or cifar10"
    )
    batch_size: int = option(64, "images per forward", low=1)
    repeats: int = option(3, "timed repetitions", low=1)
    out: Path = option(Path("comparison"), "folder of cells, table and plot")
    jobs: int = option(
        1,
        "processes that train and sample side by side; on several GPUs each takes one in turn",
        low=1,
    )
    quick: bool = option(False, "a few minutes: small numbers of everything not given by a flag")

    SMALL: ClassVar[dict] = {
        "speedups": (1.5, 2.0),
        "num_images": 256,
        "num_paired": 16,
        "exact_steps": 50,
        "seeds": (0,),
        "train_updates": 95,
        "trajectory_updates": 4,
        "exchanges": 4,
        "repeats": 1,
    }
    REPLACED_BY_FLAG: ClassVar = (
        *BackboneConfig.REPLACED_BY_FLAG,
        (("speedups", "curs"), ("speedups", "curs")),
    )
    # What may change between runs into the same folder.
    FREE: ClassVar[set[str]] = {"methods", "speedups", "curs", "seeds", "batch_size", "out", "jobs"}

    def __post_init__(self):
        super().__post_init__()
        if self.speedups is None and self.curs is None:
            object.__setattr__(self, "speedups", (1.25, 1.5, 2.0, 2.5))

    def check(self) -> None:
        """Also: levels and numbers that can be sampled."""
        super().check()
        if self.exact_steps == 1:
            raise HarmonicaError("--exact-steps 1 is no trajectory; use 0 or at least 2")
        reach = 1 - 1 / self.num_sampling_steps
        for cur in self.curs or ():
            if cur > reach:
                raise HarmonicaError(
                    f"--curs {cur} is out of reach: with {self.num_sampling_steps} steps at most "
                    f"{reach:.3f} can be reused; lower it or add steps"
                )

    @property
    def levels(self) -> list[Budget]:
        speedups = [Budget(speedup=x) for x in self.speedups or ()]
        return speedups + [Budget(cur=x) for x in self.curs or ()]

    def of(self, cls: type[BackboneConfig], **rest) -> BackboneConfig:
        """Another configuration of the same backbone and sampler."""
        shared = {spec.name: getattr(self, spec.name) for spec in fields(BackboneConfig)}
        return cls(**{**shared, **rest})


@dataclass(frozen=True)
class Cell:
    """One method at one level with one seed; no level stands for the uncached run."""

    method: str
    level: Budget | None = None
    seed: int = 0

    @property
    def key(self) -> str:
        level = "" if self.level is None else f"_{str(self.level).removeprefix('--target-')}"
        return f"{self.method}{level}_seed {self.seed}".replace(" ", "")

    @property
    def has_seeds(self) -> bool:
        """Whether another seed makes another schedule."""
        return self.method in (*LEARNED, "random")
