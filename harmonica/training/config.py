"""How a router is trained: flags, presets, and the record of a run."""

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from harmonica.budget import Budget
from harmonica.cache import MASKS
from harmonica.config import BUDGETS, BackboneConfig, budget_of, check_one_budget
from harmonica.errors import HarmonicaError
from harmonica.options import flag_of, option, read_preset
from harmonica.predictors import COEFFICIENTS, COORDINATES, PREDICTORS
from harmonica.training.objective import ESTIMATORS, FORMS
from models import MODELS

# What a run may change when it goes on: how long it is, and what does not touch its numbers.
LENGTH_AND_OUTPUT = (
    "resume", "results_dir", "max_steps", "epochs", "log_every", "ckpt_every", "keep_ckpts",
    "timeout", "wandb", "num_workers", "compile", "cuda_graphs", "ckpt", "activation_checkpointing",
    "lambda_rows", "refine",
)  # fmt: skip
# Also, if somebody asks for it: the remedies of a loss that is not finite.
REMEDIES = ("lr", "coefficient_lr", "adam_eps", "mixed_precision")
# By objective, whose updates are of one step or of a whole trajectory: their number without
# --max-steps and --epochs, model rows of each without --global-batch-size, and how many lie between
# checkpoints without --ckpt-every.
UPDATES = {"sdt": 1000, "trajectory": 40}
ROWS = {"sdt": 16, "trajectory": 8}
UNSAVED = {"sdt": 1000, "trajectory": 5}
# Updates of the schedule before its coefficients learn alone, without --schedule-updates.
MOVING = 20
HELD_OUT_ROWS = 64  # at least: errors of seeds have heavy tails
# What step-wise training alone takes notice of.
STEPWISE = (
    "mask", "stores_fresh", "compares_all", "init_mean", "init_std", "lambda_c",
    "lambda_estimator", "lambda_batch_size", "lambda_rows", "lambda_form",
)  # fmt: skip
# What suits one objective and not the other.
OF_OBJECTIVE = (
    *STEPWISE, "refine", "global_batch_size", "held_out_batch_size", "held_out_every", "lr",
    "adam_eps", "max_steps", "epochs", "ckpt_every", "schedule_updates",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(BackboneConfig):
    """Router training."""

    # A flag of a group replaces what a preset says of it, and of what follows from it by default.
    REPLACED_BY_FLAG: ClassVar = (
        *BackboneConfig.REPLACED_BY_FLAG,
        (BUDGETS, (*BUDGETS, "lambda_form", "compares_all")),
        (("l1",), ("objective",)),
        (("method",), ("data", "lambda_form", "compares_all", "objective", "predictor")),
        (("objective",), OF_OBJECTIVE),
        (
            ("predictor",),
            ("fit", "coefficients", "coefficient_lr", "coordinate", "schedule_updates"),
        ),
        (("fit",), ("schedule_updates",)),
        (("target_cur", "target_speedup"), ("threshold",)),
        (("freeze_schedule",), (*BUDGETS, "refine", "threshold", "schedule_updates")),
        (("epochs", "max_steps"), ("epochs", "max_steps")),
        (("global_batch_size",), ("lambda_batch_size", "held_out_batch_size")),
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
        "router updates; without this and --epochs 1000, and 40 with --objective trajectory",
        low=1,
    )
    global_batch_size: int | None = option(
        None,
        "model rows per forward over all processes, of which guidance takes two a sample; "
        "default: 16, and 8 with --objective trajectory",
        low=1,
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
    schedule_updates: int | None = option(
        None,
        "updates that move the schedule with --objective trajectory, where coefficients learn by "
        "gradient; later ones are of coefficients alone, at the schedule that was best by then; "
        f"default: {MOVING}",
        low=0,
    )
    refine: int = option(
        0,
        "exchanges to try after training with --objective trajectory, at equal cost; they keep up "
        "to 4 GB of held-out trajectories, and twice that for a moment",
        low=0,
    )
    held_out_batch_size: int | None = option(
        None,
        "model rows that decide what is kept, over all processes; default: a multiple of "
        f"the batch, four times at least, {HELD_OUT_ROWS} or more",
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
        "most model rows of one forward of a refresh: as many rollouts run side by side as fit, "
        "fewer where a GPU's memory is short",
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
        "newest one under --results-dir with the same options and weights, or a new one",
    )
    log_every: int = option(100, "updates between lines of metrics.jsonl", low=1)
    ckpt_every: int | None = option(
        None,
        "most updates between checkpoints, unless one trajectory has more, and most exchanges; "
        "default: 1000, and 5 with --objective trajectory",
        low=1,
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
        if self.global_batch_size is None:
            rows = ROWS.get(self.objective, ROWS["sdt"])
            object.__setattr__(self, "global_batch_size", rows)
        if self.ckpt_every is None:
            unsaved = UNSAVED.get(self.objective, UNSAVED["sdt"])
            object.__setattr__(self, "ckpt_every", unsaved)
        if self.lambda_batch_size is None:
            object.__setattr__(self, "lambda_batch_size", 2 * self.global_batch_size)
        if self.held_out_batch_size is None:
            times = max(4, math.ceil(HELD_OUT_ROWS / self.global_batch_size))
            object.__setattr__(self, "held_out_batch_size", times * self.global_batch_size)
        if self.compares_all is None:
            published = self.l1 is not None or self.method == "learning-to-cache"
            object.__setattr__(self, "compares_all", published)
        if self.lambda_form is None:
            form = "sensitivity" if self.l1 is None else "published"
            if self.method == "learning-to-cache":
                form = "constant"
            object.__setattr__(self, "lambda_form", form)

        if self.schedule_updates is None and self._settles:
            object.__setattr__(self, "schedule_updates", MOVING)

    @property
    def _settles(self) -> bool:
        """Whether there are coefficients that can learn after the schedule."""
        learns = self.predictor == "learned" and self.fit == "gradient"
        return learns and self.objective == "trajectory" and self.freeze_schedule is None

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
        """Also: one budget, images where they are needed, and nothing that has no effect."""
        super().check()
        check_one_budget(self)
        if self.method == "learning-to-cache":
            self._check_learning_to_cache()
        elif self.data is not None:
            raise HarmonicaError("--data is for --method learning-to-cache; drop it")
        if self.freeze_schedule is not None:
            self._check_frozen()
        if self.objective == "trajectory" and self.l1 is not None:
            raise HarmonicaError(
                "--objective trajectory has no price for --l1; pass --target-cur or "
                "--target-speedup"
            )
        self._check_effects()

    def _check_learning_to_cache(self) -> None:
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
        if self.objective != "sdt" or self.predictor != "last" or self.freeze_schedule:
            raise HarmonicaError(
                "--method learning-to-cache reuses last values at single steps; drop --objective, "
                "--predictor and --freeze-schedule"
            )

    def _check_frozen(self) -> None:
        if self.predictor != "learned":
            raise HarmonicaError(
                "--freeze-schedule leaves nothing to learn but coefficients; add --predictor "
                "learned"
            )
        if any(getattr(self, name) is not None for name in BUDGETS):
            raise HarmonicaError(
                "--freeze-schedule has its own cost; drop --l1, --target-cur and --target-speedup"
            )

    def _check_effects(self) -> None:
        """Refuse an option that is not its default where it does nothing."""
        on_images = self.objective == "trajectory"
        learns_values = self.predictor == "learned"
        has_effect = {
            **dict.fromkeys(STEPWISE, (not on_images, "--objective sdt")),
            "cuda_graphs": (
                on_images or learns_values or not self.cuda_graphs,
                "--objective trajectory or --predictor learned",
            ),
            "threshold": (self.l1 is not None, "--l1"),
            "refine": (
                on_images and self.freeze_schedule is None,
                "--objective trajectory without --freeze-schedule",
            ),
            "schedule_updates": (
                self._settles,
                "--objective trajectory with --predictor learned, --fit gradient and no "
                "--freeze-schedule",
            ),
            "held_out_every": (on_images, "--objective trajectory"),
            "held_out_batch_size": (
                on_images or learns_values,
                "--objective trajectory or --predictor learned",
            ),
            "fit": (learns_values, "--predictor learned"),
            "coefficients": (learns_values, "--predictor learned"),
            "coefficient_lr": (
                learns_values and self.fit == "gradient",
                "--predictor learned with --fit gradient",
            ),
            "coordinate": (self.predictor != "last", "a --predictor that forecasts"),
        }
        # Only these: the default of one that is read would change what others are by default.
        unread = {name: reader for name, (is_read, reader) in has_effect.items() if not is_read}
        defaults = {spec.name: spec.default for spec in fields(self) if spec.name in unread}
        for name in self._changed(replace(self, **defaults)):
            raise HarmonicaError(f"{flag_of(name)} is for {unread[name]}; drop it, or add that")
