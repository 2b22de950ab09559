"""The model and how it is sampled: what every command is configured by."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from harmonica.budget import Budget
from harmonica.diffusion import TRAIN_STEPS
from harmonica.errors import HarmonicaError
from harmonica.options import Options, flag_of, option
from harmonica.samplers import SAMPLERS
from models import MODELS

PRECISIONS = ("no", "bf16", "fp16")
# What bytes that are not of an encoding become on a command line.
SURROGATES = range(0xD800, 0xE000)
# More would be asked for by a file that is broken: they would not fit into memory.
MOST_PIXELS, MOST_CLASSES = 2**14, 10**6
# Three ways to say how much to reuse, of which one counts.
BUDGETS = ("l1", "target_cur", "target_speedup")


class HasBudget(Protocol):
    """A configuration with the target flags."""

    target_cur: float | None
    target_speedup: float | None


def budget_of(config: HasBudget) -> Budget | None:
    """The budget that the target flags say, of which one counts; None without any."""
    if config.target_cur is not None:
        return Budget(cur=config.target_cur)
    return None if config.target_speedup is None else Budget(speedup=config.target_speedup)


def check_one_budget(config: HasBudget) -> None:
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
    REPLACED_BY_FLAG: ClassVar = ((("sampler",), ("eta", "guide_all_channels")),)

    model: str = option("DiT-Ti/4", "model of the zoo")
    image_size: int | None = option(
        None, "image side in pixels; default: the model's", low=1, high=MOST_PIXELS
    )
    height: int | None = option(
        None, "image height of PixArt, where it is not --image-size", low=1, high=MOST_PIXELS
    )
    width: int | None = option(None, "likewise, width", low=1, high=MOST_PIXELS)
    num_classes: int | None = option(
        None, "classes; default: the model's", low=1, high=MOST_CLASSES
    )
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
        None,
        "T, model evaluations per image; default: the model's with that sampler",
        low=2,
        high=TRAIN_STEPS,
    )
    cfg_scale: float | None = option(
        None,
        "classifier-free guidance; 1 runs no unconditional half; default: the model's",
        low=0,
    )
    guide_all_channels: bool = option(
        False,
        "guide every latent channel; published DiT guides three of four, as does PixArt with iddpm",
    )
    mixed_precision: str = option("no", "precision of the backbone", choices=PRECISIONS)
    tf32: bool | None = option(
        None,
        "round float32 factors of matrix products and convolutions to TensorFloat-32; default: on "
        "a GPU",
    )
    compile: bool | None = option(
        None, "run the model compiled (needs a C++ compiler on a CPU); default: on a GPU"
    )
    cuda_graphs: bool | None = option(
        None, "sample whole trajectories as CUDA graphs; default: on a GPU"
    )

    def __post_init__(self):
        """Fill in what follows from other fields, so that a run records what it did."""
        spec = MODELS.get(self.model)
        if spec is None:
            return  # refused by ``check``
        sampler = self.sampler or spec.sampler
        defaults = {
            "vae": next(iter(spec.latent.autoencoders), None),
            "text_encoder": spec.text_encoder,
            "sampler": sampler,
            "num_sampling_steps": spec.num_steps_with.get(sampler, spec.num_steps),
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
        if self.eta and self.sampler != "ddim":
            raise HarmonicaError(f"--eta is for --sampler ddim, not {self.sampler}; drop it")
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
        if self.prompt is not None and any(ord(c) in SURROGATES for c in self.prompt):
            raise HarmonicaError(
                "--prompt is not text of this terminal's encoding; set a UTF-8 locale, or pass it "
                "in a file with --prompts"
            )
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
