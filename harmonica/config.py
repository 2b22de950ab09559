"""Configuration: frozen dataclasses hold every default; a preset, then flags, override them.

A field is a flag: ``num_sampling_steps`` is ``--num-sampling-steps``. ``aliases`` keep the flags
of the published scripts working. Unknown keys are errors.
"""

import argparse
import contextlib
import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args

import yaml

from harmonica.budget import Budget
from harmonica.cache import MASKS
from harmonica.diffusion import TRAIN_STEPS
from harmonica.errors import HarmonicaError
from harmonica.metrics import EXTRACTORS, METRICS
from harmonica.objective import ESTIMATORS, FORMS
from harmonica.router import SEMANTICS, load_router
from harmonica.samplers import SAMPLERS
from models import MODELS

# Three ways to say how much to reuse, of which one counts.
BUDGETS = ("l1", "target_cur", "target_speedup")
# A flag of a group replaces what a preset says of it, and of what follows from it by default.
REPLACED_BY_FLAG = (
    (BUDGETS, (*BUDGETS, "lambda_form", "compares_all")),
    (("epochs", "max_steps"), ("epochs", "max_steps")),
    (("global_batch_size",), ("lambda_batch_size",)),
)
# What sampling takes over from a router file unless a flag says otherwise.
SHARED_WITH_ROUTER = ("model", "image_size", "num_classes", "sampler", "eta", "cfg_scale")
PRECISIONS = ("no", "bf16", "fp16")
# Keys of ``harmonica.baselines.METHODS``, which stands above this module.
METHODS = (
    "fewer-steps",
    "fewer-steps-dpm-solver++",
    "fora",
    "delta-dit",
    "smoothcache",
    "uniform",
    "random",
)


def option(
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    many: bool = False,
) -> Any:
    """A dataclass field with its flag: help, further names, and the values it may take."""
    metadata = {"help": help, "aliases": aliases, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata={**metadata, "many": many})


@dataclass(frozen=True)
class BackboneConfig:
    """The model that is made faster, and how it is sampled."""

    model: str = option("DiT-Ti/4", "model of the zoo")
    image_size: int | None = option(None, "image side in pixels; default: the model's", low=1)
    num_classes: int | None = option(None, "classes; default: the model's", low=1)
    ckpt: Path | None = option(
        None,
        "weights (.pt or .safetensors); default: bundled or downloaded",
        aliases=("--weights",),
    )
    vae: str = option("ema", "decoder of latent models: ema, mse or a path")
    sampler: str = option("ddim", "sampler", choices=SAMPLERS)
    eta: float = option(0.0, "DDIM: 0 deterministic to 1 ancestral", low=0, high=1)
    num_sampling_steps: int = option(20, "T, model evaluations per image", low=2, high=TRAIN_STEPS)
    cfg_scale: float = option(1.5, "classifier-free guidance; 1 runs no unconditional half", low=0)
    guide_all_channels: bool = option(
        False, "guide every latent channel; published DiT guides three of four"
    )
    mixed_precision: str = option("no", "precision of the backbone", choices=PRECISIONS)


@dataclass(frozen=True)
class TrainConfig(BackboneConfig):
    """Router training."""

    method: str = option(
        "harmonica",
        "step-wise denoising training, or Learning-to-Cache, which is trained on --data",
        choices=("harmonica", "learning-to-cache"),
    )
    data: str | None = option(
        None, "images for Learning-to-Cache: a folder of class folders, or cifar10"
    )
    results_dir: Path = option(Path("results"), "parent folder of numbered run directories")
    epochs: int | None = option(
        None, "trajectories to train on; whichever of this and --max-steps ends first", low=1
    )
    max_steps: int | None = option(
        None, "router updates; 1000 if --epochs is not given either", low=1
    )
    global_batch_size: int = option(
        16, "model rows per forward over all processes; guidance takes two rows a sample", low=1
    )
    global_seed: int = option(
        0, "seed of initial scores, noise and labels", low=0, high=2**32, aliases=("--seed",)
    )
    lr: float = option(0.1, "AdamW learning rate of the logits", low=0)
    adam_eps: float = option(
        1e-15, "AdamW epsilon, to be far below the gradients", low=1e-30, high=1
    )
    l1: float | None = option(None, "beta, price of a computed branch, by hand", low=0)
    target_cur: float | None = option(
        None,
        "steer beta to this share of reused branches and export exactly that; 0.5 if neither "
        "--l1 nor --target-speedup is given",
        low=0,
        high=1,
    )
    target_speedup: float | None = option(None, "likewise, for a theoretical speed-up", low=1)
    threshold: float = option(
        0.1,
        "with beta by hand: score above which a branch is computed",
        aliases=("--ste-threshold",),
        low=0,
        high=1,
    )
    mask: str = option("soft", "how scores act in the student", choices=MASKS)
    stores_fresh: bool = option(
        True, "cache what was computed, as replay does; off: the blend, as published"
    )
    compares_all: bool | None = option(
        None,
        "compare every output channel, as published, not only those the sampler uses; default: if "
        "beta is set by hand, whose scale it is",
    )
    init_mean: float = option(0.0, "mean of the initial logits", low=-5, high=5)
    init_std: float = option(0.1, "standard deviation of the initial logits", low=0)
    lambda_c: int = option(200, "updates between refreshes of the image-error weights", low=1)
    lambda_estimator: str = option(
        "leave-one-out", "how they are estimated", choices=tuple(ESTIMATORS)
    )
    lambda_batch_size: int | None = option(
        None, "model rows of a refresh over all processes; default: twice the batch size", low=1
    )
    lambda_form: str | None = option(
        None,
        "how they enter the loss; default: published if beta is set by hand, whose scale it is, "
        "else sensitivity; constant is the loss of Learning-to-Cache",
        choices=FORMS,
    )
    log_every: int = option(100, "updates between lines of metrics.jsonl", low=1)
    ckpt_every: int = option(1000, "updates between checkpoints", low=1)
    wandb: bool = option(False, "report to Weights & Biases")
    num_workers: int = option(
        0,
        "processes that read --data; without it there is nothing to read",
        aliases=("--num-works",),
        low=0,
    )

    def __post_init__(self):
        """Fill in what follows from other fields, so that a run records what it did."""
        if self.l1 is None and self.target_speedup is None and self.target_cur is None:
            object.__setattr__(self, "target_cur", 0.5)
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "max_steps", 1000)
        if self.lambda_batch_size is None:
            object.__setattr__(self, "lambda_batch_size", 2 * self.global_batch_size)
        if self.compares_all is None:
            object.__setattr__(self, "compares_all", self.budget is None)
        if self.lambda_form is None:
            form = "sensitivity" if self.budget is not None else "published"
            if self.method == "learning-to-cache":
                form = "constant"
            object.__setattr__(self, "lambda_form", form)

    @property
    def budget(self) -> Budget | None:
        """What beta is steered to; None if it is set by hand."""
        return budget_of(self)


@dataclass(frozen=True)
class SampleConfig(BackboneConfig):
    """Sampling with and without a router."""

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
    method: str | None = option(
        None,
        "instead of a router: a method without training, at --target-cur or --target-speedup",
        choices=METHODS,
    )
    target_cur: float | None = option(None, "share of reused branches for --method", low=0, high=1)
    target_speedup: float | None = option(None, "likewise, theoretical speed-up", low=1)
    accelerate_method: str | None = option(
        None, "dynamiclayer is the published name of replay", choices=("dynamiclayer",)
    )
    ddim_sample: bool = option(False, "the published way to say --sampler ddim")
    classes: tuple[int, ...] | None = option(None, "class of every image", many=True)
    num_images: int | None = option(
        None,
        "images, classes drawn from the seed; default: one per class, at most 16",
        aliases=("--num-samples",),
        low=1,
    )
    seed: int = option(0, "seed of noise and labels", aliases=("--global-seed",), low=0, high=2**32)
    batch_size: int = option(64, "images per forward", low=1)
    out: Path = option(Path("samples"), "folder for pictures and the report")
    compare: bool = option(False, "also sample without the router and draw both rows")
    repeats: int = option(3, "timed repetitions after one warm-up", low=1)

    @property
    def budget(self) -> Budget | None:
        """What ``method`` is to reuse."""
        return budget_of(self)


@dataclass(frozen=True)
class EvaluateConfig(BackboneConfig):
    """How good images are: files, or sampled with a router or without."""

    samples: Path | None = option(
        None, "images to judge: npz with arr_0 (N, H, W, 3) uint8, or a folder"
    )
    path: Path | None = option(
        None,
        "or sample them with this router file, schedule JSON or run directory",
        aliases=("--router",),
    )
    threshold: float | None = option(
        None,
        "make the schedule from the scores; default: the exported one",
        aliases=("--thres",),
        low=0,
        high=1,
    )
    uncached: bool = option(False, "or sample them from the backbone without a cache")
    num_images: int | None = option(
        None,
        "images to sample (default: 5000), or the first so many of --samples (default: all)",
        aliases=("--num-samples",),
        low=1,
    )
    seed: int = option(
        1_000_000, "seed of noise and labels, apart from training's", low=0, high=2**32
    )
    batch_size: int = option(64, "images per forward", low=1)
    reference: str | None = option(
        None,
        "npz of statistics (mu, sigma, mu_s, sigma_s) or images (arr_0) or both, a folder, or "
        "cifar10, the default for images of the bundled backbone's size",
    )
    metrics: tuple[str, ...] | None = option(
        None, "default: all that the reference allows", choices=METRICS, many=True
    )
    extractor: str | None = option(
        None,
        "network whose features are compared; default: the one of the reference, else cifar for "
        "images of the bundled backbone's size, else inception",
        choices=EXTRACTORS,
    )
    against: Path | None = option(
        None,
        "npz or folder of uncached images of the same seeds, for PSNR, SSIM and LPIPS; default "
        "with --path: sampled too",
    )
    prompts: Path | None = option(None, "text file, a prompt a line, for the CLIP score")
    clip_model: str = option(
        "openai/clip-vit-large-patch14", "CLIP of the Hub or a folder; its name is part of a score"
    )
    out: Path = option(Path("evaluation"), "folder for the report")

    def __post_init__(self):
        """Fill in what follows from other fields, so that a run records what it did."""
        if self.samples is None and self.num_images is None:
            object.__setattr__(self, "num_images", 5000)


Config = TypeVar("Config", bound=BackboneConfig)


def budget_of(config: TrainConfig | SampleConfig) -> Budget | None:
    """The budget that the target flags say, of which one counts; None without any."""
    if config.target_cur is not None:
        return Budget(cur=config.target_cur)
    return None if config.target_speedup is None else Budget(speedup=config.target_speedup)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _types_of(spec: Any) -> tuple[type, ...]:
    """The types of a field, None left out."""
    kinds = get_args(spec.type) if isinstance(spec.type, UnionType) else (spec.type,)
    return tuple(kind for kind in kinds if kind is not type(None))


class CommandParser(argparse.ArgumentParser):
    """An argument parser that refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise HarmonicaError(f"{message}; see --help")


def build_parser(cls: type[BackboneConfig], description: str) -> CommandParser:
    """A parser with one flag per field and no default of its own."""
    parser = CommandParser(
        description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, help="YAML preset; flags override it")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    for spec in fields(cls):
        names = (flag_of(spec.name), *spec.metadata["aliases"])
        kind = _types_of(spec)[0]
        shown = spec.metadata["help"]
        if spec.default not in (None, False):
            shown += f" (default: {spec.default})"
        if kind is bool:
            parser.add_argument(
                *names, dest=spec.name, action=argparse.BooleanOptionalAction, help=shown
            )
        elif spec.metadata["many"]:
            item = get_args(kind)[0]
            parser.add_argument(*names, dest=spec.name, type=item, nargs="+", help=shown)
        else:
            parser.add_argument(*names, dest=spec.name, type=kind, help=shown)
    return parser


def _from_yaml(spec: Any, value: Any, path: Path) -> Any:
    """A preset's value in the type of its field."""
    kind = _types_of(spec)[0]
    if value is None and type(None) in get_args(spec.type):
        return None
    if spec.metadata["many"] and isinstance(value, list) and value:
        item = get_args(kind)[0]
        return tuple(_scalar_from_yaml(spec.name, item, element, path) for element in value)
    return _scalar_from_yaml(spec.name, kind, value, path)


def _scalar_from_yaml(name: str, kind: type, value: Any, path: Path) -> Any:
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 7e-8 as a string
        with contextlib.suppress(ValueError):
            return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    wanted = getattr(kind, "__name__", "list") if kind in (int, float, bool, str, Path) else "list"
    raise HarmonicaError(
        f"--config {path}: {name} = {value!r} is not a {wanted} to be used; correct the preset"
    )


def read_preset(cls: type[Config], path: Path) -> dict[str, Any]:
    """The fields that a YAML preset sets.

    Raises:
        HarmonicaError: unreadable, unknown keys, or values of the wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise HarmonicaError(f"--config {path} cannot be read ({reason}); check the file") from None
    if not isinstance(content, dict):
        raise HarmonicaError(f"--config {path} is not a mapping of options; check the file")
    known = {spec.name: spec for spec in fields(cls)}
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise HarmonicaError(
            f"--config {path} sets {', '.join(unknown)}, which this command does not know; "
            "remove it or correct its spelling"
        )
    return {key: _from_yaml(known[key], value, path) for key, value in content.items()}


def _validate_number(flag: str, value: Any, low: float | None, high: float | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise HarmonicaError(f"{flag} {value} is not a finite number; pass one")
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise HarmonicaError(f"{flag} {value} is out of range; use a value {allowed}")


def _validate_way_of_training(config: TrainConfig) -> None:
    """Images where they are needed, and only there."""
    if config.method == "learning-to-cache":
        if config.data is None:
            raise HarmonicaError(
                "--method learning-to-cache learns from images; name them with --data"
            )
        if config.lambda_form != "constant":
            raise HarmonicaError(
                f"--lambda-form {config.lambda_form} weighs whole trajectories, which --method "
                "learning-to-cache does not see; drop one"
            )
    elif config.data is not None:
        raise HarmonicaError("--data is for --method learning-to-cache; drop it")


def _validate_way_of_sampling(config: SampleConfig) -> None:
    """A router or a method with its budget, and nothing that neither of them reads."""
    if config.path is not None and config.method is not None:
        raise HarmonicaError("--path and --method exclude each other; pass one")
    if config.method is not None and config.budget is None:
        raise HarmonicaError(
            f"--method {config.method} needs a cost; add --target-speedup or --target-cur"
        )
    if config.method is None and config.budget is not None:
        raise HarmonicaError(f"{config.budget} is for a --method; name one")
    if config.path is None:
        if config.accelerate_method is not None or config.threshold is not None:
            raise HarmonicaError(
                "--threshold and --accelerate-method replay a router; name it with --path"
            )
        if config.semantics != "harmonica":
            raise HarmonicaError("--semantics reads a router; name it with --path")
        if config.compare and config.method is None:
            raise HarmonicaError("--compare needs a router or a method; add --path or --method")


def validate(config: BackboneConfig) -> None:
    """Refuse values that cannot work, naming the flag and the remedy."""
    if config.model not in MODELS:
        raise HarmonicaError(
            f"--model {config.model} is unknown; use one of {', '.join(sorted(MODELS))}"
        )
    for spec in fields(config):
        value, flag, rule = getattr(config, spec.name), flag_of(spec.name), spec.metadata
        for item in value if isinstance(value, tuple) else (value,):
            if rule["choices"] and item is not None and item not in rule["choices"]:
                raise HarmonicaError(
                    f"{flag} {item} is unknown; use one of {', '.join(rule['choices'])}"
                )
            _validate_number(flag, item, rule["low"], rule["high"])
    budgets = [flag_of(name) for name in BUDGETS if getattr(config, name, None) is not None]
    if len(budgets) > 1:
        raise HarmonicaError(f"{' and '.join(budgets)} exclude each other; pass one")
    if isinstance(config, TrainConfig):
        _validate_way_of_training(config)
    if isinstance(config, SampleConfig):
        _validate_way_of_sampling(config)
    factor = MODELS[config.model].latent_factor
    if config.image_size is not None and config.image_size % factor:
        raise HarmonicaError(
            f"--image-size {config.image_size} is not divisible by the latent factor {factor}; "
            f"use {max(1, config.image_size // factor) * factor}"
        )
    patch = MODELS[config.model].config.patch_size
    if config.image_size is not None and config.image_size // factor % patch:
        raise HarmonicaError(
            f"--image-size {config.image_size} gives a latent of {config.image_size // factor}, "
            f"which the patches of {config.model} do not tile; use a multiple of {factor * patch}"
        )


def _known_to_router(cls: type[BackboneConfig], values: dict[str, Any]) -> dict[str, Any]:
    """What the router file that is replayed says of model and sampler, if it is there."""
    path = values.get("path")
    if path is None or not path.exists() or path.suffix == ".json":
        return {}
    router = load_router(path)
    known = {name: getattr(router.info, name) for name in SHARED_WITH_ROUTER}
    known["num_sampling_steps"] = len(router.logits)
    return {name: value for name, value in known.items() if value is not None}


def resolve(cls: type[Config], arguments: argparse.Namespace) -> Config:
    """Defaults, then the preset, then the flags; validated."""
    given = dict(vars(arguments))
    given.pop("dry_run", None)
    preset = given.pop("config", None)
    values = read_preset(cls, preset) if preset is not None else {}
    if given.get("quick"):
        values.update(cls.QUICK)
    for flags, replaced in REPLACED_BY_FLAG:
        if given.keys() & set(flags):
            values = {name: value for name, value in values.items() if name not in replaced}
    values.update({k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    config = cls(**{**_known_to_router(cls, values), **values})
    validate(config)
    return config


def parse(cls: type[Config], description: str) -> Config:
    """The configuration of a command line; ``--dry-run`` prints it and ends the program."""
    arguments = build_parser(cls, description).parse_args()
    config = resolve(cls, arguments)
    if getattr(arguments, "dry_run", False):
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


def plain(config: BackboneConfig) -> dict[str, Any]:
    """The configuration as strings, numbers and lists, for YAML, JSON and trackers."""
    values = {}
    for spec in fields(config):
        value = getattr(config, spec.name)
        if isinstance(value, tuple):
            value = [str(item) if isinstance(item, Path) else item for item in value]
        values[spec.name] = str(value) if isinstance(value, Path) else value
    return values


def to_yaml(config: BackboneConfig) -> str:
    """The configuration as a preset that gives it back."""
    return yaml.safe_dump(plain(config), sort_keys=False)
