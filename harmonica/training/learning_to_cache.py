"""Learning-to-Cache (Ma et al., NeurIPS 2024): a router trained on images, by pairs of steps.

Every other step computes everything; the step after it may reuse what was just computed. Images
are noised to a random one of the former, the sampler makes its step, and the router's row of the
latter learns from the difference between cached and uncached output there. So it never meets the
errors of earlier reuse, which is what step-wise denoising training adds.

As published the model runs without guidance, on labels of which a tenth is dropped; unlike there,
latents are the autoencoder's mode rather than a draw, so that a sample is a function of its index.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from harmonica.cache import Cache, Masking, fill
from harmonica.denoise import Guidance, Trajectories
from harmonica.errors import HarmonicaError
from harmonica.labelled_images import LabelledImages
from harmonica.router import Router, alternate_rows
from harmonica.samplers import State
from harmonica.training.batches import Batches
from harmonica.training.sdt import StepError, TrainingMethod, learn_step

LABEL_DROPOUT = 0.1


class LearningToCache(TrainingMethod):
    """The published training, one update per batch of images.

    Args:
        samples: of this process in a batch.
        encode: images (n, 3, H, W) in [-1, 1] to latents.
    """

    def __init__(
        self,
        batches: Batches,
        samples: int,
        images: LabelledImages,
        encode: Callable[[Tensor], Tensor],
        num_workers: int,
    ):
        backbone = batches.backbone
        classes = backbone.model.config.num_classes
        # A model without classes does not see them.
        if classes and len(images.classes) > classes:
            raise HarmonicaError(
                f"--data has {len(images.classes)} classes and --model {backbone.name} has "
                f"{classes}; pass the images that the model was trained on"
            )
        self.batches, self.samples, self.num_workers = batches, samples, num_workers
        self.backbone, self.images, self.encode = backbone, images, encode
        self.draws = batches.draws("train")
        self.rows = alternate_rows(len(backbone.sampler.timesteps))
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None

    def _batches_from(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 (n, 3, H, W) and labels (n,) of batch ``number`` and all that follow."""

        def places() -> Iterator[list[int]]:
            for following in itertools.count(number):
                indices = self.batches.indices(following, self.samples)
                yield self.draws.integers("image", indices, len(self.images)).tolist()

        # A forked worker would keep the run's lock and pipes for as long as it lives.
        context = "spawn" if self.num_workers else None
        return iter(
            DataLoader(
                self.images,
                batch_sampler=places(),
                num_workers=self.num_workers,
                multiprocessing_context=context,
            )
        )

    def _next(self) -> tuple[Tensor, Tensor]:
        """The next batch.

        Raises:
            HarmonicaError: an image cannot be read.
        """
        try:
            return next(self._batches)
        except HarmonicaError as error:
            # A worker's comes with its traceback in front.
            raise HarmonicaError(str(error).rpartition("HarmonicaError: ")[2]) from None

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images.listing_hash}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse other images than those of the sweeps before.

        Raises:
            HarmonicaError: they are.
        """
        if state.get("images", self.images.listing_hash) != self.images.listing_hash:
            raise HarmonicaError(
                "--resume: --data has other images than the run was trained on; put the earlier "
                "ones back, or start a new run"
            )

    def train(
        self,
        number: int,
        router: Router,
        masking: Masking,
        update: Callable[[StepError], None],
        limit: int | None,
    ) -> None:
        """One sweep: as many updates as there are rows, each of a row drawn at random."""
        count = len(self.rows)
        first = number * count
        if self._batches is None:
            self._batches = self._batches_from(first)
        for k in range(first, first + (count if limit is None else min(count, limit))):
            # Every process draws the same row, so that its gradient can be averaged.
            s = self.rows[int(self.draws.integers("row", [k], count))]
            batch = self._noised(s - 1, k, *self._next())
            cache = masking.cache()
            learn_step(batch, s, _filled(batch, s, cache), cache, router, masking, update)

    def _noised(self, s: int, number: int, images: Tensor, labels: Tensor) -> Trajectories:
        """Trajectories that stand at noised images before evaluation s."""
        indices = self.batches.indices(number, self.samples)
        draws, backbone = self.draws, self.backbone
        mirrored = draws.integers("mirrored", indices, 2).bool()
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        x0 = self.encode(images.float() / 127.5 - 1)
        bar = backbone.sampler.alphas_bar[s]
        noise = draws.initial_noise(indices, backbone.latent_shape).to(x0.device)
        unlabelled = draws.integers("unlabelled", indices, round(1 / LABEL_DROPOUT)) == 0
        y = torch.where(unlabelled, backbone.model.null_label, labels)
        return Trajectories(
            backbone.model,
            backbone.sampler,
            Guidance(1.0),
            y=y.to(backbone.device),
            x_T=bar**0.5 * x0 + (1 - bar) ** 0.5 * noise,
            noise=lambda s: draws.step_noise(s, indices, backbone.latent_shape).to(x0.device),
            compares_all=self.batches.compares_all,
            indices=indices,
            steps_ahead=1,  # two steps are all that is made of it
            tally=self.batches.tally,
        )


@torch.no_grad()
def _filled(batch: Trajectories, s: int, cache: Cache) -> Tensor:
    """x_s, after step s - 1 has computed everything and filled the cache."""

    def predict(step: int, x: Tensor) -> Tensor:
        return fill(cache, batch, step, x)

    return batch.walk(State(batch.x_T), predict, start=s - 1, stop=s).x
