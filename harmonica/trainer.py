"""A training run of a router: learning, logging, checkpoints, export."""

import io
import math
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs, broadcast_object_list
from tqdm import tqdm

from harmonica.autoencoder import load_decoder
from harmonica.backbone import load_backbone
from harmonica.batches import Batches
from harmonica.config import TrainConfig
from harmonica.engine import EAGER
from harmonica.errors import HarmonicaError
from harmonica.files import write_atomically
from harmonica.learner import Learner, StepwiseLearner
from harmonica.options import plain
from harmonica.plots import comparison, lambda_curve, router_heatmap
from harmonica.randomness import Draws
from harmonica.router import RouterFile, save_router
from harmonica.run_directory import RunDirectory
from harmonica.sampling import sample

PREVIEW_IMAGES = 12


class Trainer:
    """One training run of a router; ``run()`` does it all and returns the run directory."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.accelerator = _accelerator(config)
        # One process of a machine fetches missing weights, the others find them.
        with self.accelerator.local_main_process_first():
            self.backbone = load_backbone(config, self.accelerator.device)
            self.decode = load_decoder(config, self.accelerator.device)
        batches = Batches(self.accelerator, self.backbone, config.global_seed, config.compares_all)
        self.learner: Learner = StepwiseLearner(config, batches)

    def run(self) -> RunDirectory | None:
        """Train, export, draw; the run directory on the main process, None on the others.

        Raises:
            HarmonicaError: a loss that is not finite; the last checkpoint stands.
        """
        config, length = self.config, self.learner.sweep_length
        limits = [
            count
            for count in (config.max_steps, config.epochs and config.epochs * length)
            if count is not None
        ]
        directory = self._start()
        try:
            self._train(directory, min(limits))
            self._export(directory)
        finally:
            self.accelerator.end_training()
        return directory

    def _train(self, directory: RunDirectory | None, total: int) -> None:
        config, learner = self.config, self.learner
        with tqdm(total=total, desc="router", unit="update", disable=not self._is_main) as bar:
            while learner.updates < total:
                before = learner.updates
                record = learner.sweep(total - before)
                if not all(map(math.isfinite, record.values())):
                    raise HarmonicaError(
                        f"the loss is not finite after update {before}; lower --lr or use "
                        "--mixed-precision no"
                    )
                bar.update(learner.updates - before)
                schedule = learner.schedule()
                bar.set_postfix(cur=f"{schedule.cur:.1%}", mse=f"{record['mse']:.2e}")
                record = {
                    "update": learner.updates,
                    **record,
                    "cur": schedule.cur,
                    "theoretical_speedup": schedule.theoretical_speedup,
                }
                ends = learner.updates == total
                if ends or _passes(before, learner.updates, config.log_every):
                    self._log(directory, record)
                if ends or _passes(before, learner.updates, config.ckpt_every):
                    self._save_checkpoint(directory)

    # Output.

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def _start(self) -> RunDirectory | None:
        """The run directory, on the main process; and wandb inside it, if it was asked for.

        Raises:
            HarmonicaError: on every process, if the main one cannot make the directory.
        """
        directory, refusal = None, None
        if self._is_main:
            try:
                directory = RunDirectory.create(self.config.results_dir, self.config)
                self._start_wandb(directory)
            except HarmonicaError as error:
                refusal = str(error)
        refusal = broadcast_object_list([refusal])[0]
        if refusal is not None:
            raise HarmonicaError(refusal)
        return directory

    def _start_wandb(self, directory: RunDirectory) -> None:
        if not self.config.wandb:
            return
        from wandb.errors import Error  # nothing touches wandb without the flag

        try:
            self.accelerator.init_trackers(
                "harmonica",
                config=plain(self.config),
                init_kwargs={"wandb": {"dir": str(directory.path)}},
            )
        except (Error, OSError) as error:
            reason = str(error).split("\n")[0]
            raise HarmonicaError(
                f"--wandb cannot start ({reason}); run `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def _log(self, directory: RunDirectory | None, record: dict[str, float]) -> None:
        if directory is not None:
            directory.log(record)
        if self.config.wandb:
            self.accelerator.log(record, step=self.learner.updates)

    def _save_checkpoint(self, directory: RunDirectory | None) -> None:
        """Everything training stands on; all randomness follows from the counters and the seed."""
        if directory is None:
            return
        buffer = io.BytesIO()
        torch.save(self.learner.state_dict(), buffer)
        write_atomically(directory.checkpoint(self.learner.updates), buffer.getvalue())

    def _export(self, directory: RunDirectory | None) -> None:
        """Router file, schedule and pictures."""
        if directory is None:
            return
        config, backbone, schedule = self.config, self.backbone, self.learner.schedule()
        logits = self.learner.router.logits().cpu()
        save_router(
            directory.router,
            RouterFile(
                logits,
                backbone.router_info(threshold=self.learner.cut(), hyperparameters=plain(config)),
                schedule,
            ),
        )
        schedule.save(directory.schedule)
        router_heatmap(
            directory.path / "router.png",
            logits.sigmoid().numpy(),
            schedule,
            f"{config.model}, {config.sampler}, T = {config.num_sampling_steps}",
        )
        lambda_curve(directory.path / "lambda.png", self.learner.refreshes)
        draws, indices = Draws(config.global_seed, "sample"), range(PREVIEW_IMAGES)
        backbone = replace(backbone, how=EAGER)  # a preview is not worth compiling for
        rows = {
            name: self.decode(sample(backbone, choice, draws, indices, batch_size=PREVIEW_IMAGES))
            for name, choice in {"uncached": None, "with router": schedule}.items()
        }
        comparison(directory.path / "samples.png", rows)


def _passes(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after]."""
    return after // every > before // every


def _accelerator(config: TrainConfig) -> Accelerator:
    cpu = not torch.cuda.is_available()
    if cpu and config.mixed_precision == "fp16":
        raise HarmonicaError("--mixed-precision fp16 needs a GPU; use bf16 or no")
    # With published weights losses are of the order of 1e-8: let the fp16 scale grow quickly.
    scaler = GradScalerKwargs(growth_interval=50)
    return Accelerator(
        cpu=cpu,
        # The backbone is in its precision already; fp16 gradients want a scaler besides.
        mixed_precision="fp16" if config.mixed_precision == "fp16" else "no",
        log_with="wandb" if config.wandb else None,
        kwargs_handlers=[scaler],
    )
