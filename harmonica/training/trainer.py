"""A training run of a router: learning, logging, checkpoints, export."""

import reprlib
import time
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs, InitProcessGroupKwargs
from tqdm import tqdm

from harmonica import __version__
from harmonica.autoencoder import load_decoder
from harmonica.backbone import check_gpus, load_backbone
from harmonica.engine import EAGER
from harmonica.errors import HarmonicaError
from harmonica.files import first_line
from harmonica.fusion import block_runner
from harmonica.interruption import Interruption
from harmonica.options import flag_of, plain
from harmonica.plots import comparison, router_heatmap
from harmonica.randomness import Draws
from harmonica.router_file import RouterFile, save_router
from harmonica.sampling import load_schedule, sample
from harmonica.training.batches import Batches, within_memory
from harmonica.training.checkpoint import Stage
from harmonica.training.config import TrainConfig
from harmonica.training.consensus import Consensus, peers
from harmonica.training.learner import Learner, StepwiseLearner
from harmonica.training.progress import Progress
from harmonica.training.restored import count, number
from harmonica.training.run_directory import Effort, RunDirectory
from harmonica.training.trajectory_learner import TrajectoryLearner
from models.transformer import call_block

PREVIEW_IMAGES = 12
CHECKPOINT_FORMAT = 1
# What parts of a checkpoint raise that are not what this version puts there.
UNFIT = (
    AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class Trainer:
    """One training run of a router; ``run()`` does it all and returns the run directory."""

    @peers()
    def __init__(self, config: TrainConfig, *, random_weights: bool = False):
        """``random_weights``: freshly initialised ones, for measuring speed."""
        self.config = config
        self.accelerator = _accelerator(config)
        # What is missing is fetched or encoded by one process of a machine. The others wait at
        # its lock for as long as that takes, and not in a collective, which has a time-out.
        self.backbone = load_backbone(
            config, self.accelerator.device, random_weights=random_weights
        )
        self.decode = load_decoder(config, self.accelerator.device)
        # The trajectory objective makes its own checkpoints, and no graph of what it decides.
        run = call_block
        if config.objective == "sdt":
            run = block_runner(self.backbone.how.compiles, config.activation_checkpointing)
        batches = Batches(
            self.accelerator, self.backbone, config.global_seed, config.compares_all, run
        )
        self.tally, self._started = batches.tally, time.monotonic()
        self._earlier = Effort()  # parts of the run that this one goes on from
        self._effort_of_updates = Effort()
        self.interruption = Interruption()
        consensus = Consensus(self.accelerator, self.interruption)
        frozen = None
        if config.freeze_schedule is not None:
            frozen = load_schedule(
                config.freeze_schedule,
                None,
                self.backbone,
                flag="--freeze-schedule",
                needs_schedule=True,
            )
            if frozen.reuses != "branches" or frozen.compute.all():
                raise HarmonicaError(
                    f"--freeze-schedule {config.freeze_schedule} reuses no single branches, so "
                    "there are no coefficients to learn; pass another schedule"
                )
        # Of files, which may change before the run goes on.
        self._hashes = {
            "prompts": self.backbone.conditions.content_hash(),
            "freeze_schedule": frozen and frozen.hash,
        }
        kind = TrajectoryLearner if config.objective == "trajectory" else StepwiseLearner
        with within_memory(config.objective):
            self.learner: Learner = kind(config, batches, consensus, frozen)

    @peers()
    def run(self) -> RunDirectory | None:
        """Train, export, draw; the run directory on the main process, None on the others.

        Raises:
            HarmonicaError: a loss that is not finite on any process, a process that is gone, a
                disk that is full.
            Interrupted: a signal asked for it.
        """
        config, length = self.config, self.learner.sweep_length
        limits = [
            limit
            for limit in (config.max_steps, config.epochs and config.epochs * length)
            if limit is not None
        ]
        weights_hash = self.backbone.weights_hash
        with Progress(config, weights_hash, self.interruption, self._is_main) as progress:
            try:
                progress.start(self._load_state, self._start_wandb)
                with progress.secured(), within_memory(config.objective):
                    self._train(progress, min(limits) if self.learner.learns else 0)
                    self.learner.finish(lambda: self._hold(progress))
                self._export(progress.directory)
            finally:
                self.accelerator.end_training()
        return progress.directory

    def _train(self, progress: Progress, total: int) -> None:
        config, learner, directory = self.config, self.learner, progress.directory
        if directory is not None:
            directory.forget_after(learner.updates)
        with tqdm(
            total=total,
            initial=min(learner.updates, total),
            desc="router",
            unit="update",
            disable=not self._is_main,
        ) as bar:
            self._hold(progress)
            if learner.trials and learner.updates < total:  # exchanges are left behind
                self._earlier = self._effort_of_updates
            while learner.updates < total:
                before = learner.updates
                record = learner.sweep(total - before)
                # A last sweep that is cut short is made again, whole, if the run goes on: so a run
                # in two parts ends where a run in one does.
                if learner.updates - before == learner.sweep_length:
                    self._hold(progress)
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

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    # What training stands on.

    def _hold(self, progress: Progress) -> None:
        stage = Stage(self.learner.updates, self.learner.trials)
        if not stage.trials:
            self._effort_of_updates = self.effort
        progress.hold(stage, self._state, self.learner.sweep_length)

    def _state(self) -> dict[str, Any]:
        """Everything training stands on. Of generators there is that of exchanges alone: all other
        randomness follows from the seed and the counters.
        """
        scaler = self.accelerator.scaler
        return {
            "format": CHECKPOINT_FORMAT,
            "versions": {"harmonica": __version__, "torch": str(torch.__version__)},
            "config": plain(self.config),
            "weights_hash": self.backbone.weights_hash,
            "hashes": self._hashes,
            "learner": self.learner.state_dict(),
            "effort": asdict(self.effort),
            "effort_of_updates": asdict(self._effort_of_updates),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            HarmonicaError: it is of another version, another run, or none.
        """
        versions = reprlib.repr(state.get("versions"))
        try:
            if state.get("format") != CHECKPOINT_FORMAT:
                raise HarmonicaError(
                    f"the checkpoint is not of format {CHECKPOINT_FORMAT}; go on with the version "
                    f"of the project that wrote it ({versions})"
                )
            self._refuse_other_files(state)
            self.learner.load_state_dict(state["learner"])
            self._earlier = _effort(state.get("effort", {}))
            self._effort_of_updates = _effort(state.get("effort_of_updates", {}))
            self.tally.evaluations = 0  # setting up was counted when the run began
            scaler, saved = self.accelerator.scaler, state["scaler"]
            if scaler is not None and saved is not None:
                scaler.load_state_dict({name: number(saved[name]) for name in scaler.state_dict()})
        except UNFIT as error:
            raise HarmonicaError(
                f"the checkpoint does not fit this version of the project ({first_line(error)}); "
                f"go on with the one that wrote it ({versions})"
            ) from None

    def _refuse_other_files(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint of a run on other weights, prompts or schedules."""
        weights = state["weights_hash"]
        if weights != self.backbone.weights_hash:
            raise HarmonicaError(
                f"--resume: the run was trained on weights {reprlib.repr(weights)}, these are "
                f"{self.backbone.weights_hash}; pass its weights with --ckpt"
            )
        for name, mine in self._hashes.items():
            if state.get("hashes", {}).get(name, mine) != mine:
                raise HarmonicaError(
                    f"--resume: {flag_of(name)} is not what the run was trained with; put the "
                    "earlier file back, or start a new run"
                )

    @property
    def effort(self) -> Effort:
        """What the run has taken so far; processes share evaluations evenly."""
        mine = self.tally.evaluations * self.accelerator.num_processes
        return Effort(
            self._earlier.evaluations + mine,
            self._earlier.seconds + time.monotonic() - self._started,
        )

    # Output.

    def _start_wandb(self, directory: RunDirectory) -> None:
        """If it was asked for."""
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
            raise HarmonicaError(
                f"--wandb cannot start ({first_line(error)}); run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from None

    def _log(self, directory: RunDirectory | None, record: dict[str, float]) -> None:
        if directory is not None:
            directory.log(record)
        if self.config.wandb:
            self.accelerator.log(record, step=self.learner.updates)

    def _export(self, directory: RunDirectory | None) -> None:
        """Router file, schedule and pictures."""
        if directory is None:
            return
        config, backbone, schedule = self.config, self.backbone, self.learner.schedule()
        logits = self.learner.logits().cpu()
        directory.record_effort(self.effort)
        schedule.save(directory.schedule, asdict(backbone.router_info()))
        save_router(  # last: a run that has one is finished
            directory.router,
            RouterFile(
                logits,
                backbone.router_info(
                    threshold=self.learner.cut(),
                    hyperparameters=plain(replace(config, resume=None)),
                ),
                schedule,
            ),
        )
        router_heatmap(
            directory.path / "router.png",
            logits.sigmoid().numpy(),
            schedule,
            f"{config.model}, {config.sampler}, T = {config.num_sampling_steps}",
        )
        self.learner.draw(directory.path)
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
    check_gpus()
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
        # A peer that is gone ends the run at once, one that does not answer after this time.
        kwargs_handlers=[scaler, InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout))],
    )


def _effort(state: dict[str, Any]) -> Effort:
    """That of a checkpoint."""
    known = Effort(**state)
    return Effort(count(known.evaluations), number(known.seconds))
