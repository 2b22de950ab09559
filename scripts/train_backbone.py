"""Train the bundled backbone: a class-conditional DiT-Ti/4 on CIFAR-10, in pixel space.

    python scripts/train_backbone.py --data cifar10 --out backbone

``--data`` is a folder of class folders (torchvision's ImageFolder) or ``cifar10``, which
torchvision downloads. The run writes a checkpoint every ``--save-every`` steps and resumes from it
when the command is repeated. Batches are a function of the step alone, so a resumed run sees the
same data as one that was never stopped. ``--init`` starts from shipped weights instead, with a new
optimiser.

Every ``--export-every`` epochs, and at the end, the averaged weights are written in half precision
(``weights.safetensors``) with a grid of samples, one row per class (``samples.png``).
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from harmonica.backbone import load_backbone
from harmonica.config import BackboneConfig
from harmonica.diffusion import TRAIN_STEPS, Diffusion
from harmonica.errors import HarmonicaError, run_command
from harmonica.files import existing_file, read_torch, write_atomically, write_torch
from harmonica.labelled_images import load_labelled_images
from harmonica.options import CommandParser, flag_of
from harmonica.plots import image_grid
from harmonica.randomness import Draws
from harmonica.sampling import sample
from harmonica.weights import load_weights
from models import MODELS
from models.dit import DiT

CONFIG = MODELS["DiT-Ti/4"].config


class Batches:
    """Batch of any step: an epoch's permutation and the noise follow from (seed, step)."""

    def __init__(self, images: Tensor, labels: Tensor, null: int, batch_size: int, seed: int):
        if len(images) < batch_size:
            raise HarmonicaError(
                f"--batch-size {batch_size} is more than the {len(images)} images; use fewer"
            )
        self.images, self.labels, self.null = images, labels, null
        self.batch_size, self.seed = batch_size, seed
        self.per_epoch = len(images) // batch_size

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0 in [-1, 1], labels with 10 % dropped to the null class, timesteps, noise."""
        epoch, position = divmod(step, self.per_epoch)
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(self.seed + epoch)
        )
        index = order[position * self.batch_size : (position + 1) * self.batch_size]
        draw = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        x0 = self.images[index].float() / 127.5 - 1.0
        mirrored = torch.rand(len(index), generator=draw) < 0.5
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        dropped = torch.rand(len(index), generator=draw) < 0.1
        y = torch.where(dropped, self.null, self.labels[index])
        # One timestep per stratum: uniform as before, with less variance in the loss.
        strata = torch.arange(len(index)) + torch.rand(len(index), generator=draw)
        t = (strata * TRAIN_STEPS / len(index)).long().clamp(max=TRAIN_STEPS - 1)
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


def export(ema: dict[str, Tensor], out: Path) -> None:
    """Write the averaged weights in half precision, and what they draw: one row per class."""
    path = out / "weights.safetensors"
    half = {name: value.half().cpu().contiguous() for name, value in ema.items()}
    write_atomically(path, safetensors_bytes(half))
    device = next(iter(ema.values())).device
    num_classes = len(ema["y_embedder.embedding_table.weight"]) - 1
    config = BackboneConfig(ckpt=path, num_classes=num_classes, num_sampling_steps=50)
    backbone = load_backbone(config, device)
    labels = torch.arange(num_classes).repeat_interleave(10)
    latents = sample(backbone, None, Draws(0, "sample"), range(len(labels)), labels)
    image_grid(out / "samples.png", ((latents + 1) / 2).clamp(0, 1), columns=10)


def train(args: argparse.Namespace) -> None:

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    images, labels, classes = load_labelled_images(args.data, CONFIG.input_size)
    num_classes = len(classes)
    batches = Batches(images, labels, num_classes, args.batch_size, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    total = args.epochs * batches.per_epoch

    model = DiT(replace(CONFIG, num_classes=num_classes)).to(device)
    if device.type == "cpu":
        # The CPU backward of scaled_dot_product_attention takes a third of the whole step, and
        # tanh an eighth where it is compiled; the sigmoid of twice the argument is the same.
        for block in model.blocks:
            block.attn.fused_attn = False
            block.mlp.act = SigmoidGELU()
    if args.init is not None:
        load_weights(model, existing_file(args.init, "--init"), "DiT-Ti/4")
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.lr,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        fused=True,
    )
    checkpoint, step, seconds = args.out / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = read_torch(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema = {name: value.to(device) for name, value in state["ema"].items()}
        step, seconds = state["step"], state.get("seconds", 0.0)

    forward = torch.compile(model)
    loss_fn = HybridLoss(Diffusion.respaced(TRAIN_STEPS), device)
    losses, started = [], time.time() - seconds
    bar = tqdm(total=total, initial=step, unit="step", desc="backbone", mininterval=5)
    metrics = (args.out / "metrics.jsonl").open("a")
    while step < total:
        x0, y, t, noise = (value.to(device) for value in batches(step))
        xt = loss_fn.add_noise(x0, t, noise)
        rate = learning_rate(step, total, args.lr, args.warmup)
        with torch.autocast(device.type, torch.bfloat16):
            output = forward(xt, t, y)
        mse, bound = loss_fn(output.float(), x0, xt, t, noise)
        (mse + bound).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(args.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        losses.append((mse.detach(), bound.detach()))
        bar.update()
        if step % 100 == 0:
            mean_mse, mean_bound = (torch.stack(x).mean().item() for x in zip(*losses, strict=True))
            record = {
                "step": step,
                "mse": mean_mse,
                "bound": mean_bound,
                "lr": rate,
                "seconds": time.time() - started,
            }
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            bar.set_postfix(mse=f"{mean_mse:.4f}", bound=f"{mean_bound:.4f}")
            losses = []
        if step % args.save_every == 0 or step == total:
            write_torch(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "ema": ema,
                    "step": step,
                    "seconds": time.time() - started,
                    "optimizer": optimizer.state_dict(),
                },
            )
        if step % (args.export_every * batches.per_epoch) == 0 or step == total:
            export(ema, args.out)


@run_command
def main() -> None:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--ema-decay", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--export-every", type=int, default=5, help="epochs")
    parser.add_argument("--init", type=Path, help="weights to start from (.safetensors)")
    args = parser.parse_args()
    for name in ("epochs", "batch_size", "warmup", "save_every", "export_every"):
        if getattr(args, name) < 1:
            raise HarmonicaError(f"{flag_of(name)} must be at least 1")
    if args.init is not None and (args.out / "checkpoint.pt").exists():
        raise HarmonicaError(
            f"--init does not go with the checkpoint in --out {args.out}; drop one"
        )
    train(args)


if __name__ == "__main__":
    main()
