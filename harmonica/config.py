"""What runs are configured by: every default stands here, once."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from harmonica.budget import Budget
from harmonica.cache import MASKS
from harmonica.diffusion import TRAIN_STEPS
from harmonica.errors import HarmonicaError
from harmonica.metrics import EXTRACTORS, METRICS
from harmonica.options import Options, flag_of, option, read_preset
from harmonica.predictors import COEFFICIENTS, COORDINATES, PREDICTORS
from harmonica.router import SEMANTICS, load_router
from harmonica.samplers import SAMPLERS
from harmonica.training.objective import ESTIMATORS, FORMS
from models import MODELS

# Three ways to say how much to reuse, of which one counts.
BUDGETS = ("l1", "target_cur", "target_speedup")
# What sampling takes over from a router file unless a flag says otherwise.
SHARED_WITH_ROUTER = ("model", "image_size", "num_classes", "sampler", "eta", "cfg_scale")
PRECISIONS = ("no", "bf16", "fp16")
# What a run may change when it goes on: how long it is, and what does not touch its numbers.
LENGTH_AND_OUTPUT = (
    "resume", "results_dir", "max_steps", "epochs", "log_every", "ckpt_every", "keep_ckpts",
    "timeout", "wandb", "num_workers", "compile", "cuda_graphs", "ckpt", "activation_checkpointing",
    "lambda_rows", "refine",
)  # fmt: skip
# Also, if somebody asks for it: the remedies of a loss that is not finite.
REMEDIES = ("lr", "coefficient_lr", "adam_eps", "mixed_precision")
# What does not change an image of a given index.
NOT_OF_THE_IMAGES = (
    "path", "ckpt", "accelerate_method", "ddim_sample", "num_images", "num_samples", "png",
    "timeout", "batch_size", "out", "compare", "repeats", "compile", "cuda_graphs",
    "text_encoder",
)  # fmt: skip
# Updates without --max-steps and --epochs, by objective: of one step, or of a whole trajectory.
UPDATES = {"sdt": 1000, "trajectory": 60}
# What step-wise training alone takes notice of.
STEPWISE = (
    "mask", "stores_fresh", "compares_all", "init_mean", "init_std", "lambda_c",
    "lambda_estimator", "lambda_batch_size", "lambda_rows", "lambda_form",
)  # fmt: skip
# Keys of ``harmonica.baselines.METHODS``, which stands above this module.
METHODS = (
    "fewer-steps",
    "fewer-steps-dpm-solver++",
    "fora",
    "fora-taylor1",
    "taylorseer1",
    "taylorseer2",
    "delta-dit",
    "smoothcache",
    "uniform",
    "random",
    "faster-diffusion",
    "deepcache",
)


def budget_of(config: "TrainConfig | ReplayConfig") -> Budget | None:
    """The budget that the target flags say, of which one counts; None without any."""
    if config.target_cur is not None:
        return Budget(cur=config.target_cur)
    return None if config.target_speedup is None else Budget(speedup=config.target_speedup)


def check_one_budget(config: "TrainConfig | SampleConfig") -> None:
    """Refuse several budgets.

    Raises:
        HarmonicaError: there are.
    """
    given = [flag_of(name) for name in BUDGETS if getattr(config, name, None) is not None]
    if len(given) > 1:
        raise HarmonicaError(f"{' and '.join(given)} exclude each other; pass one")


@dataclass(frozen=True)
class BackboneConfig(Options):
    """The model that is made faster, and how it is sampled.

    Attributes:
        READS_PROMPTS: whether prompts have another use than to be what is sampled.
    """

    READS_PROMPTS: ClassVar[bool] = False

    model: str = option("DiT-Ti/4", "model of the zoo")
    image_size: int | None = option(None, "image side in pixels; default: the model's", low=1)
    height: int | None = option(None, "image height of PixArt, where it is not --image-size", low=1)
    width: int | None = option(None, "likewise, width", low=1)
    num_classes: int | None = option(None, "classes; default: the model's", low=1)
    ckpt: Path | None = option(
        None,
        "weights (.pt, .pth, .safetensors) or the folder of a diffusers model; default: bundled or "
        "downloaded",
        aliases=("--weights",),
    )
    vae: str | None = option(
        None, "decoder of latent models: ema, mse, sdxl or a path; default: the model's"
    )
    prompts: Path | None = option(
        None,
        "what models of text draw: a text file, a prompt a line, or encoded prompts; default: the "
        "project's list",
    )
    prompt: str | None = option(None, "or one prompt")
    text_encoder: str | None = option(
        None, "T5 of the Hub or a folder, for prompts that are not encoded; default: the model's"
    )
    sampler: str | None = option(None, "sampler; default: the model's", choices=tuple(SAMPLERS))
    eta: float = option(0.0, "DDIM: 0 deterministic to 1 ancestral", low=0, high=1)
    num_sampling_steps: int | None = option(
        None, "T, model evaluations per image; default: the model's", low=2, high=TRAIN_STEPS
    )
    cfg_scale: float | None = option(
        None,
        "classifier-free guidance; 1 runs no unconditional half; default: the model's",
        low=0,
    )
    guide_all_channels: bool = option(
        False, "guide every latent channel; published DiT guides three of four"
    )
    mixed_precision: str = option("no", "precision of the backbone", choices=PRECISIONS)
    compile: bool | None = option(
        None, "run blocks compiled (needs a C++ compiler on a CPU); default: on a GPU"
    )
    cuda_graphs: bool | None = option(
        None, "sample whole trajectories as CUDA graphs; default: on a GPU"
    )

    def __post_init__(self):
        """Fill in what follows from other fields, so that a run records what it did."""
        spec = MODELS.get(self.model)
        if spec is None:
            return  # refused by ``check``
        defaults = {
            "vae": next(iter(spec.latent.autoencoders), None),
            "text_encoder": spec.text_encoder,
            "sampler": spec.sampler,
            "num_sampling_steps": spec.num_steps,
            "cfg_scale": spec.guidance,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def names_prompts(self) -> bool:
        return self.prompts is not None or self.prompt is not None

    def check(self) -> None:
        """Refuse values that cannot work, naming the flag and the remedy."""
        if self.model not in MODELS:
            raise HarmonicaError(
                f"--model {self.model} is unknown; use one of {', '.join(sorted(MODELS))}"
            )
        super().check()
        self._check_size()
        self._check_condition()
        spec = MODELS[self.model]
        if self.sampler == "iddpm" and spec.config.out_channels == spec.config.in_channels:
            raise HarmonicaError(
                f"--sampler iddpm needs a learned variance, which {self.model} does not have; use "
                f"{spec.sampler}"
            )
        others = {name for other in MODELS.values() for name in other.latent.autoencoders}
        if self.vae in others - set(spec.latent.autoencoders):
            known = ", ".join([*spec.latent.autoencoders, "a path"])
            raise HarmonicaError(
                f"--vae {self.vae} is of another latent space than {self.model}; use {known}"
            )

    def _check_condition(self) -> None:
        """Refuse prompts, classes or guidance that the model does not take."""
        spec = MODELS[self.model]
        if self.prompts is not None and self.prompt is not None:
            raise HarmonicaError("--prompts and --prompt exclude each other; pass one")
        if spec.text_encoder is None:
            if self.names_prompts and not self.READS_PROMPTS:
                flag = "--prompts" if self.prompts is not None else "--prompt"
                raise HarmonicaError(f"{flag} is for models of text; {self.model} takes classes")
            if spec.config.num_classes == 0 and self.cfg_scale != 1:
                raise HarmonicaError(
                    f"--cfg-scale {self.cfg_scale:g} needs a null class, which {self.model}, being "
                    "unconditional, does not have; use 1"
                )
        elif self.num_classes is not None:
            raise HarmonicaError(f"--num-classes: {self.model} takes prompts; drop it")

    def _check_size(self) -> None:
        """Refuse an image size that the model does not have."""
        spec = MODELS[self.model]
        if spec.sizes is not None and self.image_size not in (None, *spec.sizes):
            raise HarmonicaError(
                f"--image-size {self.image_size} is none of {self.model}; use one of "
                f"{', '.join(map(str, spec.sizes))}"
            )
        factor = spec.latent_factor
        if self.image_size is not None and self.image_size % factor:
            raise HarmonicaError(
                f"--image-size {self.image_size} is not divisible by the latent factor {factor}; "
                f"use {max(1, self.image_size // factor) * factor}"
            )
        patch = spec.config.patch_size
        for flag, side in (("--height", self.height), ("--width", self.width)):
            if side is not None and not spec.constructor.is_stretchable:
                raise HarmonicaError(f"{flag} {side}: images of {self.model} are square; drop it")
            if side is not None and side % (factor * patch):
                raise HarmonicaError(
                    f"{flag} {side} is not a multiple of {factor * patch}; use "
                    f"{max(1, side // (factor * patch)) * factor * patch}"
                )
        if self.image_size is not None and self.image_size // factor % patch:
            raise HarmonicaError(
                f"--image-size {self.image_size} gives a latent of {self.image_size // factor}, "
                f"which the patches of {self.model} do not tile; use a multiple of {factor * patch}"
            )

    @classmethod
    def known_from_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What the router file that is replayed says of model and sampler, if it is there."""
        path = values.get("path")
        if path is None or not path.exists() or path.suffix == ".json":
            return {}
        router = load_router(path)
        known = {name: getattr(router.info, name) for name in SHARED_WITH_ROUTER}
        known["num_sampling_steps"] = len(router.logits)
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True)
class TrainConfig(BackboneConfig):
    """Router training."""

    # A flag of a group replaces what a preset says of it, and of what follows from it by default.
    REPLACED_BY_FLAG: ClassVar = (
        (BUDGETS, (*BUDGETS, "lambda_form", "compares_all")),
        (("l1",), ("objective", "refine")),
        (("objective",), (*STEPWISE, "lr", "adam_eps", "max_steps", "epochs")),
        (("freeze_schedule",), BUDGETS),
        (("epochs", "max_steps"), ("epochs", "max_steps")),
        (("global_batch_size",), ("lambda_batch_size", "held_out_batch_size")),
        (("method",), ("data", "lambda_form", "compares_all")),
    )

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
        None,
        "router updates; without this and --epochs 1000, and 60 with --objective trajectory",
        low=1,
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
    objective: str = option(
        "sdt",
        "what --method harmonica learns on: each step's output against the teacher's, or the "
        "final image, differentiated through the whole trajectory",
        choices=("sdt", "trajectory"),
    )
    predictor: str = option(
        "last",
        "what stands in for a skipped branch: its last value, a polynomial through the last two "
        "or three, or learned coefficients",
        choices=(*PREDICTORS, "learned"),
    )
    coordinate: str = option(
        "time", "what distances between steps are measured in", choices=COORDINATES
    )
    coefficients: str = option(
        "channel", "learned: one number per branch and step, or per channel", choices=COEFFICIENTS
    )
    fit: str = option(
        "gradient",
        "learned: together with the router, or in closed form after it",
        choices=("gradient", "least-squares"),
    )
    coefficient_lr: float = option(0.003, "Adam learning rate of the coefficients", low=0)
    freeze_schedule: Path | None = option(
        None, "learn coefficients alone, for the schedule of this router file or schedule JSON"
    )
    refine: int = option(
        0, "flips to try after training with --objective trajectory, at equal cost", low=0
    )
    held_out_batch_size: int | None = option(
        None,
        "model rows that decide what is kept, over all processes; default: four times the batch",
        low=1,
    )
    held_out_every: int = option(10, "updates between such decisions", low=1)
    activation_checkpointing: bool = option(
        False, "keep less for gradients and run parts again: less memory, more time"
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
    lambda_rows: int = option(
        64,
        "model rows of one forward of a refresh: as many rollouts run side by side as fit",
        low=1,
    )
    lambda_form: str | None = option(
        None,
        "how they enter the loss; default: published if beta is set by hand, whose scale it is, "
        "else sensitivity; constant is the loss of Learning-to-Cache",
        choices=FORMS,
    )
    resume: str | None = option(
        None,
        "run directory to go on with, its options standing unless flags say otherwise; auto: the "
        "newest one under --results-dir with the same options, or a new one",
    )
    log_every: int = option(100, "updates between lines of metrics.jsonl", low=1)
    ckpt_every: int = option(
        1000, "most updates between checkpoints, unless one trajectory has more", low=1
    )
    keep_ckpts: int = option(3, "newest checkpoints that are kept", low=2)
    timeout: int = option(
        900, "seconds that a process waits for one that does not answer before it ends", low=1
    )
    wandb: bool = option(False, "report to Weights & Biases")
    num_workers: int = option(
        0,
        "processes that read --data; without it there is nothing to read",
        aliases=("--num-works",),
        low=0,
    )

    def __post_init__(self):
        super().__post_init__()
        is_free = self.freeze_schedule is None
        if is_free and all(getattr(self, name) is None for name in BUDGETS):
            object.__setattr__(self, "target_cur", 0.5)
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "max_steps", UPDATES.get(self.objective))
        if self.lambda_batch_size is None:
            object.__setattr__(self, "lambda_batch_size", 2 * self.global_batch_size)
        if self.held_out_batch_size is None:
            object.__setattr__(self, "held_out_batch_size", 4 * self.global_batch_size)
        if self.compares_all is None:
            published = self.l1 is not None or self.method == "learning-to-cache"
            object.__setattr__(self, "compares_all", published)
        if self.lambda_form is None:
            form = "sensitivity" if self.l1 is None else "published"
            if self.method == "learning-to-cache":
                form = "constant"
            object.__setattr__(self, "lambda_form", form)

    @property
    def budget(self) -> Budget | None:
        """What beta is steered to; None if it is set by hand."""
        return budget_of(self)

    @classmethod
    def known_from_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What the run that goes on was started with."""
        resume = values.get("resume")
        if resume in (None, "auto"):
            return {}
        path = Path(resume) / "config.yaml"
        if not path.is_file():
            raise HarmonicaError(
                f"--resume {resume} is not a run directory; pass one, or auto for the newest"
            )
        known = read_preset(cls, path)
        if values.keys() & {"epochs", "max_steps"}:
            known.update(epochs=None, max_steps=None)
        return known

    def differences(self, recorded: "TrainConfig", may_change: Collection[str]) -> list[str]:
        """Options that a run was started with otherwise, apart from some; as flag and value."""
        changed = [name for name in self._changed(recorded) if name not in may_change]
        return [f"{flag_of(name)} {getattr(recorded, name)}" for name in changed]

    def _changed(self, other: "TrainConfig") -> list[str]:
        return [
            spec.name
            for spec in fields(self)
            if getattr(self, spec.name) != getattr(other, spec.name)
        ]

    def check(self) -> None:
        """Also: one budget, and images where they are needed and only there."""
        super().check()
        check_one_budget(self)
        if self.method == "learning-to-cache":
            if MODELS[self.model].text_encoder is not None:
                raise HarmonicaError(
                    f"--method learning-to-cache learns from images with classes, and {self.model} "
                    "takes prompts; use the other method"
                )
            if self.data is None:
                raise HarmonicaError(
                    "--method learning-to-cache learns from images; name them with --data"
                )
            if self.lambda_form != "constant":
                raise HarmonicaError(
                    f"--lambda-form {self.lambda_form} weighs whole trajectories, which --method "
                    "learning-to-cache does not see; drop one"
                )
        elif self.data is not None:
            raise HarmonicaError("--data is for --method learning-to-cache; drop it")
        if self.method == "learning-to-cache" and (
            self.objective != "sdt" or self.predictor != "last" or self.freeze_schedule
        ):
            raise HarmonicaError(
                "--method learning-to-cache reuses last values at single steps; drop --objective, "
                "--predictor and --freeze-schedule"
            )
        if self.freeze_schedule is not None and self.predictor != "learned":
            raise HarmonicaError(
                "--freeze-schedule leaves nothing to learn but coefficients; add --predictor "
                "learned"
            )
        if self.freeze_schedule is not None and any(
            getattr(self, name) is not None for name in BUDGETS
        ):
            raise HarmonicaError(
                "--freeze-schedule has its own cost; drop --l1, --target-cur and --target-speedup"
            )
        if self.predictor != "learned" and (self.fit, self.coefficients) != ("gradient", "channel"):
            raise HarmonicaError(
                "--fit and --coefficients are for learned coefficients; add --predictor learned"
            )
        if self.objective == "trajectory" and self.l1 is not None:
            raise HarmonicaError(
                "--objective trajectory has no price for --l1; pass --target-cur or "
                "--target-speedup"
            )
        if self.objective == "trajectory":
            defaults = {spec.name: spec.default for spec in fields(self) if spec.name in STEPWISE}
            for name in self._changed(replace(self, **defaults)):
                raise HarmonicaError(
                    f"{flag_of(name)} is for --objective sdt, and this is trajectory; drop one"
                )
        if self.refine and (self.objective != "trajectory" or self.freeze_schedule is not None):
            raise HarmonicaError(
                "--refine moves what --objective trajectory has learned; add that, or drop it"
            )


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
        choices=METHODS,
    )
    target_cur: float | None = option(None, "share of reused branches for --method", low=0, high=1)
    target_speedup: float | None = option(None, "likewise, theoretical speed-up", low=1)
    predictor: str | None = option(
        None,
        "what stands in for a skipped branch; default: what the router was trained with, or the "
        "last value",
        choices=PREDICTORS,
    )
    coordinate: str = option(
        "time", "what --predictor measures distances between steps in", choices=COORDINATES
    )

    @property
    def budget(self) -> Budget | None:
        """What ``method`` is to reuse."""
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
        if self.method is None and self.budget is not None:
            raise HarmonicaError(f"{self.budget} is for a --method; name one")
        if self.path is None and (
            self.threshold is not None or self.semantics != "harmonica" or self.force
        ):
            raise HarmonicaError(
                "--threshold, --semantics and --force read a router; name it with --path"
            )
        if self.path is None and self.method is None and self.predictor is not None:
            raise HarmonicaError(
                "--predictor stands in for what is skipped; add --path or --method"
            )


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
        900, "with --num-samples: seconds to wait for a process that finishes no shard", low=1
    )
    seed: int = option(0, "seed of noise and labels", aliases=("--global-seed",), low=0, high=2**32)
    batch_size: int = option(64, "images per forward", low=1)
    out: Path = option(Path("samples"), "folder for pictures and the report")
    compare: bool = option(False, "also sample without the router and draw both rows")
    repeats: int = option(3, "timed repetitions after one warm-up", low=1)

    def check(self) -> None:
        """Also: images to look at or to measure, and nothing that is for others."""
        super().check()
        if self.num_samples is not None:
            if self.num_images is not None or self.compare:
                raise HarmonicaError(
                    "--num-samples makes images to measure, --num-images and --compare some to "
                    "look at; pass one or the other"
                )
        elif self.png:
            raise HarmonicaError("--png is for --num-samples; drop it")
        if self.path is None and self.accelerate_method is not None:
            raise HarmonicaError("--accelerate-method replays a router; name it with --path")
        if self.compare and self.path is None and self.method is None:
            raise HarmonicaError("--compare needs a router or a method; add --path or --method")


@dataclass(frozen=True)
class EvaluateConfig(ReplayConfig):
    """How good images are: files, or sampled with a router or without.

    Prompts are what a model of text samples, image i of prompt i, and what the CLIP score is of.
    """

    READS_PROMPTS: ClassVar[bool] = True

    samples: Path | None = option(
        None, "images to judge: npz with arr_0 (N, H, W, 3) uint8, or a folder"
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
        "with --path and --method: sampled too",
    )
    clip_model: str = option(
        "openai/clip-vit-large-patch14", "CLIP of the Hub or a folder; its name is part of a score"
    )
    out: Path = option(Path("evaluation"), "folder for the report")

    def __post_init__(self):
        super().__post_init__()
        if self.samples is None and self.num_images is None:
            object.__setattr__(self, "num_images", 5000)
