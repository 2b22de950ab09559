"""Training of the bundled networks: options, batches, and a run that goes on where it stopped."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from harmonica.errors import HarmonicaError
from harmonica.files import first_line, keep_lines, read_torch, write_torch
from harmonica.lock import held
from harmonica.options import Options, flag_of, option, plain
from harmonica.output import make_folder


@dataclass(frozen=True)
class NetworkConfig(Options):
    """How a bundled network is trained.

    Attributes:
        MAY_CHANGE: what a run may go on with otherwise. More epochs make it longer, at the
            learning rate that a run of that length has there.
    """

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("data", "out", "epochs", "save_every")

    data: str = option(
        "cifar10", "images: a folder of class folders, or cifar10, which torchvision downloads"
    )
    out: Path = option(Path("training"), "folder of the checkpoint and of what comes out")
    epochs: int = option(10, "times that every image is seen", low=1)
    batch_size: int = option(128, "images per update", low=1)
    lr: float = option(1e-3, "learning rate at its peak", low=0)
    seed: int = option(0, "seed of initial weights and batches", low=0, high=2**32)
    save_every: int = option(200, "updates between checkpoints", low=1)


class Batches:
    """Batch of any step: an epoch's permutation and all that is drawn follow from (seed, step).

    Args:
        images: uint8 (N, 3, H, W).
        labels: (N,)

    Raises:
        HarmonicaError: fewer images than a batch has.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int):
        if len(images) < batch_size:
            raise HarmonicaError(
                f"--batch-size {batch_size} is more than the {len(images)} images; use fewer"
            )
        self.images, self.labels = images, labels
        self.batch_size, self.seed = batch_size, seed
        self.per_epoch = len(images) // batch_size

    def __call__(self, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Images (n, 3, H, W) in [0, 255], mirrored at random, labels (n,), and what else is drawn
        for this step is to be drawn with.
        """
        epoch, position = divmod(step, self.per_epoch)
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(self.seed + epoch)
        )
        index = order[position * self.batch_size : (position + 1) * self.batch_size]
        draw = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        images = self.images[index].float()
        mirrored = torch.rand(len(index), generator=draw) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, self.labels[index], draw

    def content_hash(self) -> str:
        """sha256 of the pixels and labels."""
        digest = hashlib.sha256(self.images.contiguous().numpy())
        digest.update(self.labels.contiguous().numpy())
        return digest.hexdigest()


class Stateful(Protocol):
    """A model, an optimiser, an average: what a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def train_network(
    config: NetworkConfig,
    batches: Batches,
    parts: dict[str, Stateful],
    update: Callable[[int], dict[str, Tensor]],
    *,
    log_every: int,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Make the updates that are missing, with a checkpoint every ``config.save_every`` of them.

    Args:
        parts: all that training stands on, ``optimizer`` among it, under the names it has in
            ``checkpoint.pt``.
        update: makes the update of a step, and returns its losses by name.
        log_every: updates between lines of ``metrics.jsonl``.
        after: called with the number of updates made, after each of them.

    Raises:
        HarmonicaError: ``--out`` cannot be written to, is in use, or holds another run.
    """
    total = config.epochs * batches.per_epoch
    make_folder(config.out)
    with held(config.out / ".lock", f"--out {config.out}"):
        checkpoint = _Checkpoint(config, batches.content_hash(), parts)
        step, seconds = checkpoint.load()
        if step > total:
            raise HarmonicaError(
                f"--epochs {config.epochs} is less than --out {config.out} has had "
                f"({step / batches.per_epoch:.1f}); pass another folder for a shorter run"
            )
        keep_lines(config.out / "metrics.jsonl", lambda line: line["step"] <= step)
        losses, started = [], time.monotonic() - seconds
        with (
            (config.out / "metrics.jsonl").open("a") as metrics,
            tqdm(
                total=total, initial=step, unit="step", desc=config.out.name, mininterval=5
            ) as bar,
        ):
            while step < total:
                losses.append({name: loss.detach() for name, loss in update(step).items()})
                step += 1
                bar.update()
                if step % log_every == 0 or step == total:
                    means = _means(losses)
                    rate = parts["optimizer"].param_groups[0]["lr"]
                    seconds = time.monotonic() - started
                    record = {"step": step, **means, "lr": rate, "seconds": seconds}
                    metrics.write(json.dumps(record) + "\n")
                    metrics.flush()
                    bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
                    losses = []
                if step % config.save_every == 0 or step == total:
                    checkpoint.save(step, time.monotonic() - started)
                after(step)


def _means(losses: list[dict[str, Tensor]]) -> dict[str, float]:
    return {name: torch.stack([loss[name] for loss in losses]).mean().item() for name in losses[0]}


@dataclass(frozen=True)
class _Checkpoint:
    """The file that a run goes on from, with what it was started with.

    Attributes:
        data_sha256: of the images and labels, wherever they lie.
    """

    config: NetworkConfig
    data_sha256: str
    parts: dict[str, Stateful]

    @property
    def path(self) -> Path:
        return self.config.out / "checkpoint.pt"

    def save(self, step: int, seconds: float) -> None:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        record = {"options": plain(self.config), "data": self.data_sha256}
        write_torch(self.path, {**states, **record, "step": step, "seconds": seconds})

    def load(self) -> tuple[int, float]:
        """Updates made and seconds taken; the parts are as they were then.

        Raises:
            HarmonicaError: it is of another run.
        """
        if not self.path.exists():
            return 0, 0.0
        state, out = read_torch(self.path), self.config.out
        now, then = plain(self.config), state.get("options") if isinstance(state, dict) else None
        if not isinstance(then, dict) or then.keys() != now.keys():
            raise HarmonicaError(
                f"{self.path} is not of this command in this version; pass another --out"
            )
        different = [
            f"{flag_of(name)} {then[name]}"
            for name in now
            if name not in self.config.MAY_CHANGE and now[name] != then[name]
        ]
        if state.get("data") != self.data_sha256:
            different.append("other images or labels in --data")
        if different:
            raise HarmonicaError(
                f"--out {out} was trained with {', '.join(different)}; go on with the same, or "
                "pass another --out"
            )
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            return int(state["step"]), float(state["seconds"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise HarmonicaError(
                f"{self.path} does not fit ({first_line(error)}); pass another --out"
            ) from None
