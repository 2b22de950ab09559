"""Train the bundled backbone: a class-conditional DiT-Ti/4 on CIFAR-10, in pixel space.

    python scripts/train_backbone.py --data cifar10 --out backbone

``--data`` is a folder of class folders (torchvision's ImageFolder) or ``cifar10``, which
torchvision downloads. The run writes a checkpoint every ``--save-every`` steps and resumes from it
when the command is repeated; ``--epochs`` may be others then, other options that move the weights
are refused. Batches are a function of the step alone, so a resumed run sees the same data as one
that was never stopped. ``--init`` starts from shipped weights instead, with a new optimiser.

Every ``--export-every`` epochs, and at the end, the averaged weights are written in half precision
(``weights.safetensors``) with a grid of samples, one row per class (``samples.png``).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.nn import functional as F

from harmonica.backbone import load_backbone, select_device
from harmonica.config import BackboneConfig
from harmonica.diffusion import TRAIN_STEPS, Diffusion
from harmonica.errors import run_command
from harmonica.files import existing_file, write_atomically
from harmonica.labelled_images import load_labelled_images
from harmonica.network_training import Batches, NetworkConfig, train_network
from harmonica.options import option, parse
from harmonica.plots import image_grid
from harmonica.randomness import Draws
from harmonica.sampling import sample
from harmonica.weights import load_weights
from models import MODELS
from models.dit import DiT

NAME = "DiT-Ti/4"
CONFIG = MODELS[NAME].config
LOG_EVERY = 100


@dataclass(frozen=True)
class TrainBackboneConfig(NetworkConfig):
    """How the backbone is trained."""

    MAY_CHANGE: ClassVar = (*NetworkConfig.MAY_CHANGE, "export_every", "compile")

    out: Path = option(Path("backbone"), "folder of the checkpoint, weights and samples")
    epochs: int = option(60, "times that every image is seen", low=1)
    warmup: int = option(500, "updates in which the learning rate rises", low=1)
    ema_decay: float = option(0.9995, "decay of the average of weights", low=0, high=1)
    export_every: int = option(5, "epochs between weights.safetensors and samples.png", low=1)
    init: Path | None = option(None, "weights to start from, with a new optimiser")
    compile: bool = option(True, "run the model compiled (needs a C++ compiler on a CPU)")

    def check(self) -> None:
        """Also: weights to start from."""
        super().check()
        if self.init is not None:
            existing_file(self.init, "--init")


def with_noise(
    images: Tensor, labels: Tensor, draw: torch.Generator, null: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0 in [-1, 1], labels with 10 % dropped to the null class, timesteps, noise."""
    x0 = images / 127.5 - 1.0
    dropped = torch.rand(len(x0), generator=draw) < 0.1
    y = torch.where(dropped, null, labels)
    # One timestep per stratum: uniform as before, with less variance in the loss.
    strata = torch.arange(len(x0)) + torch.rand(len(x0), generator=draw)
    t = (strata * TRAIN_STEPS / len(x0)).long().clamp(max=TRAIN_STEPS - 1)
    return x0, y, t, torch.randn(x0.shape, generator=draw)


class SigmoidGELU(torch.nn.Module):
    """The tanh approximation of GELU, with tanh written as a sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


class HybridLoss:
    """L_simple + L_vlb of improved diffusion; the bound trains the variance channels alone."""

    def __init__(self, diffusion: Diffusion, device: torch.device):
        of_x0, of_xt = diffusion.posterior_mean_coefficients
        tables = {
            "signal": np.sqrt(diffusion.alphas_bar),
            "noise": np.sqrt(1.0 - diffusion.alphas_bar),
            "of_x0": of_x0,
            "of_xt": of_xt,
            "log_min": diffusion.posterior_log_variance,
            "log_max": np.log(diffusion.betas),
        }
        self.tables = {
            name: torch.from_numpy(values).float().to(device)[:, None, None, None]
            for name, values in tables.items()
        }

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.tables["signal"][t] * x0 + self.tables["noise"][t] * noise

    def __call__(
        self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of the noise, and the variational bound in bits per dimension."""
        eps, variance = output.chunk(2, dim=1)
        at = {name: table[t] for name, table in self.tables.items()}
        log_var = at["log_min"] + (variance + 1) / 2 * (at["log_max"] - at["log_min"])
        x0_hat = (xt - at["noise"] * eps.detach()) / at["signal"]
        mean = at["of_x0"] * x0_hat + at["of_xt"] * xt
        true_mean = at["of_x0"] * x0 + at["of_xt"] * xt
        kl = 0.5 * (
            log_var
            - at["log_min"]
            - 1
            + (at["log_min"] - log_var).exp()
            + (true_mean - mean).square() * (-log_var).exp()
        )
        # The last step is a likelihood of 8-bit pixels, not a divergence of two Gaussians.
        inverse_std = (-0.5 * log_var).exp()
        upper = torch.special.ndtr((x0 - mean + 1 / 255) * inverse_std)
        lower = torch.special.ndtr((x0 - mean - 1 / 255) * inverse_std)
        upper = torch.where(x0 > 0.999, 1.0, upper)
        lower = torch.where(x0 < -0.999, 0.0, lower)
        nll = -(upper - lower).clamp(min=1e-12).log()
        bound = torch.where((t == 0)[:, None, None, None], nll, kl).mean() / math.log(2)
        return F.mse_loss(eps, noise), bound


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine decay to zero at ``total``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class Average:
    """Moving average of a model's weights, which forgets faster at the start."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, updates: int) -> None:
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.weights.items():
            value.copy_(state[name])


def export(ema: dict[str, Tensor], out: Path) -> None:
    """Write the averaged weights in half precision, and what they draw: one row per class."""
    path = out / "weights.safetensors"
    half = {name: value.half().cpu().contiguous() for name, value in ema.items()}
    write_atomically(path, safetensors_bytes(half))
    device = next(iter(ema.values())).device
    num_classes = len(ema["y_embedder.embedding_table.weight"]) - 1
    config = BackboneConfig(model=NAME, ckpt=path, num_classes=num_classes, num_sampling_steps=50)
    backbone = load_backbone(config, device)
    labels = torch.arange(num_classes).repeat_interleave(10)
    latents = sample(backbone, None, Draws(0, "sample"), range(len(labels)), labels)
    image_grid(out / "samples.png", ((latents + 1) / 2).clamp(0, 1), columns=10)


def create_model(classes: int, device: torch.device) -> DiT:
    """The backbone, in a form that trains fast on the device."""
    model = DiT(replace(CONFIG, num_classes=classes)).to(device)
    if device.type == "cpu":
        # The CPU backward of scaled_dot_product_attention takes a third of the whole step, and
        # tanh an eighth where it is compiled; the sigmoid of twice the argument is the same.
        for block in model.blocks:
            block.attn.fused_attn = False
            block.mlp.act = SigmoidGELU()
    return model


def train(config: TrainBackboneConfig, batches: Batches, classes: int) -> None:
    """Train from the start or from the checkpoint, and export."""
    torch.manual_seed(config.seed)
    device, total = select_device(), config.epochs * batches.per_epoch
    model = create_model(classes, device)
    if config.init is not None:
        load_weights(model, config.init, NAME)
    average = Average(model, config.ema_decay)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.lr,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        fused=True,
    )
    forward = torch.compile(model) if config.compile else model
    loss_fn = HybridLoss(Diffusion.respaced(TRAIN_STEPS), device)

    def update(step: int) -> dict[str, Tensor]:
        drawn = with_noise(*batches(step), null=classes)
        x0, y, t, noise = (value.to(device) for value in drawn)
        xt = loss_fn.add_noise(x0, t, noise)
        with torch.autocast(device.type, torch.bfloat16):
            output = forward(xt, t, y)
        mse, bound = loss_fn(output.float(), x0, xt, t, noise)
        (mse + bound).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, total, config.lr, config.warmup)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step + 1)
        return {"mse": mse, "bound": bound}

    def export_at_times(step: int) -> None:
        if step % (config.export_every * batches.per_epoch) == 0 and step < total:
            export(average.weights, config.out)

    parts = {"model": model, "ema": average, "optimizer": optimizer}
    train_network(config, batches, parts, update, log_every=LOG_EVERY, after=export_at_times)
    export(average.weights, config.out)


@run_command
def main() -> None:
    config = parse(TrainBackboneConfig, __doc__.split("\n")[0])
    images, labels, classes = load_labelled_images(config.data, CONFIG.input_size)
    train(config, Batches(images, labels, config.batch_size, config.seed), len(classes))


if __name__ == "__main__":
    main()
