"""A training run of a router: batches, weights, updates, budget, logging, export."""

import io
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs, broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from harmonica.backbone import load_backbone, load_decoder, load_encoder
from harmonica.baselines.learning_to_cache import LearningToCache
from harmonica.cache import Masking
from harmonica.config import TrainConfig
from harmonica.denoise import Trajectories
from harmonica.engine import EAGER
from harmonica.errors import HarmonicaError
from harmonica.files import write_atomically
from harmonica.labelled_images import LabelledImages
from harmonica.objective import ESTIMATORS, Student, iepo_loss, image_error_weights
from harmonica.options import plain
from harmonica.plots import comparison, lambda_curve, router_heatmap
from harmonica.randomness import Draws
from harmonica.router import (
    Router,
    RouterFile,
    budget_schedule,
    save_router,
    threshold_schedule,
)
from harmonica.run_directory import RunDirectory
from harmonica.sampling import sample, trajectories
from harmonica.schedule import Schedule
from harmonica.sdt import (
    BetaControl,
    StepError,
    StepwiseDenoising,
    TrainingMethod,
    router_optimizer,
)

PREVIEW_IMAGES = 12


class Trainer:
    """One training run of a router; ``run()`` does it all and returns the run directory."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.accelerator = _accelerator(config)
        processes = self.accelerator.num_processes
        is_guided = config.cfg_scale != 1.0 and config.method == "harmonica"
        halves = 2 if is_guided else 1
        self.samples = samples_per_process(
            config.global_batch_size, halves, processes, "--global-batch-size"
        )
        self.lambda_samples = samples_per_process(
            config.lambda_batch_size, halves, processes, "--lambda-batch-size"
        )
        # One process of a machine fetches missing weights, the others find them.
        with self.accelerator.local_main_process_first():
            self.backbone = load_backbone(config, self.accelerator.device)
            self.decode = load_decoder(config, self.accelerator.device)
            self.method = self._training_method()
        self.router = Router.initial(
            config.num_sampling_steps,
            len(self.backbone.costs.names),
            config.global_seed,
            config.init_mean,
            config.init_std,
            self.method.rows,
        ).to(self.accelerator.device)
        self.optimizer = self.accelerator.prepare(
            router_optimizer(self.router, config.lr, config.adam_eps)
        )
        self.schedule()  # a target out of reach is refused before anything is written
        self.beta = BetaControl(config.l1, config.budget is not None, config.lr)
        self.weights = torch.zeros(config.num_sampling_steps)
        self.refreshes: list[tuple[int, list[float]]] = []
        self.updates = self.trajectories = 0

    def _training_method(self) -> TrainingMethod:
        """Whole trajectories from noise, or pairs of steps from images."""
        config = self.config
        if config.method == "harmonica":
            return StepwiseDenoising(
                config.num_sampling_steps, lambda number: self.batch("train", number, self.samples)
            )
        return LearningToCache(
            self.backbone,
            LabelledImages(config.data, self.backbone.image_size),
            load_encoder(config, self.accelerator.device),
            Draws(config.global_seed, "train"),
            lambda number: self._indices(number, self.samples),
            config.num_workers,
            config.compares_all,
        )

    # Schedules.

    def schedule(self) -> Schedule:
        """What the scores stand for now: at the target if there is one, else at the threshold."""
        config, logits, costs = self.config, self.router.logits(), self.backbone.costs
        if config.budget is not None:
            return budget_schedule(logits, costs, config.budget, self.method.rows)
        return threshold_schedule(logits, costs, config.threshold, self.method.rows)

    def masking(self) -> Masking:
        """How the scores act on the next trajectory: they cut where the exported schedule cuts."""
        return Masking(self.schedule().compute, self.config.mask, self.config.stores_fresh)

    def cut(self) -> float:
        """The score above which the exported schedule computes."""
        if self.config.budget is None:
            return self.config.threshold
        reused = ~torch.from_numpy(self.schedule().compute.copy())
        scores = self.router.logits().sigmoid().cpu()[reused]
        return scores.max().item() if len(scores) else 0.0

    # Batches.

    def _indices(self, number: int, samples: int) -> range:
        """This process's part of batch ``number``: global sample indices, whatever the ranks."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        first = (number * processes + rank) * samples
        return range(first, first + samples)

    def batch(self, purpose: str, number: int, samples: int) -> Trajectories:
        """This process's trajectories of batch ``number``."""
        draws = Draws(self.config.global_seed, purpose)
        batch = trajectories(self.backbone, draws, self._indices(number, samples))
        return replace(batch, compares_all=self.config.compares_all)

    # Training.

    def refresh_weights(self) -> None:
        """Re-estimate lambda on a fresh batch, averaged over processes."""
        if self.config.lambda_form == "constant":
            nothing = torch.zeros(self.config.num_sampling_steps)
            self.weights = image_error_weights(nothing, nothing, "constant")
            self.refreshes.append((self.updates, self.weights.tolist()))
            return
        batch = self.batch("lambda", len(self.refreshes), self.lambda_samples)
        student = Student(batch, self.router.logits(), self.masking())
        with torch.no_grad():
            errors = ESTIMATORS[self.config.lambda_estimator](student)
        image, output = self.accelerator.reduce(torch.stack([errors.image, errors.output]), "mean")
        self.weights = image_error_weights(image.cpu(), output.cpu(), self.config.lambda_form)
        self.refreshes.append((self.updates, self.weights.tolist()))

    def update(self, step: StepError) -> tuple[Tensor, Tensor]:
        """One AdamW step of one row.

        Returns:
            (3,) loss, teacher-student error, sum of scores; and (N,) what a unit of each score
            saves in weighted error.
        """
        row, weight = self.router.row(step.s), self.weights[step.s].item()
        loss = iepo_loss(step.error, step.scores, weight, self.beta.beta)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        row.grad = self.accelerator.reduce(row.grad, "mean")
        self.optimizer.step()
        self.router.clamp(step.s)
        self.updates += 1
        scores = step.scores.detach()
        worths = self.beta.beta - row.grad / (scores * (1 - scores))
        return torch.stack([loss.detach(), step.error.detach(), scores.sum()]), worths

    def train_one(self, remaining: int | None) -> Tensor:
        """One sweep over the rows, of at most ``remaining`` updates.

        Returns:
            (updates, 3): loss, teacher-student error, sum of scores; averaged over processes.
        """
        results: list[tuple[Tensor, Tensor]] = []
        self.method.train(
            self.trajectories,
            self.router,
            self.masking(),
            lambda step: results.append(self.update(step)),
            remaining,
        )
        self.trajectories += 1
        records, worths = (torch.stack(column) for column in zip(*results, strict=True))
        self._steer_beta(worths)
        return self.accelerator.reduce(records, "mean").cpu()

    def _steer_beta(self, worths: Tensor) -> None:
        """After a trajectory: move beta towards the target share of reused branches."""
        if self.config.budget is None:
            return
        rows = list(self.method.rows)
        target = 1.0 - float(self.schedule().compute[rows].mean())
        if self.beta.is_unset:
            self.beta.start(worths, target)
        else:
            below = self.router.logits()[rows] <= 0
            self.beta.update(below.float().mean().item(), target)

    def run(self) -> RunDirectory | None:
        """Train, export, draw; the run directory on the main process, None on the others.

        Raises:
            HarmonicaError: a loss that is not finite; the last checkpoint stands.
        """
        config, steps = self.config, len(self.method.rows)
        limits = [
            count
            for count in (config.max_steps, config.epochs and config.epochs * steps)
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
        config, refresh_at = self.config, 0
        with tqdm(total=total, desc="router", unit="update", disable=not self._is_main) as bar:
            while self.updates < total:
                if self.updates >= refresh_at:
                    bar.set_description("router, image-error weights")
                    self.refresh_weights()
                    bar.set_description("router")
                    refresh_at = self.updates + config.lambda_c
                before = self.updates
                table = self.train_one(total - self.updates)
                if not table.isfinite().all():
                    raise HarmonicaError(
                        f"the loss is not finite after update {before}; lower --lr or use "
                        "--mixed-precision no"
                    )
                bar.update(self.updates - before)
                bar.set_postfix(cur=f"{self.schedule().cur:.1%}", mse=f"{table[:, 1].mean():.2e}")
                if _passes(before, self.updates, config.log_every) or self.updates == total:
                    self._log(directory, table)
                if _passes(before, self.updates, config.ckpt_every) or self.updates == total:
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

    def _log(self, directory: RunDirectory | None, table: Tensor) -> None:
        loss, mse, l1 = table.mean(dim=0).tolist()
        schedule = self.schedule()
        record = {
            "update": self.updates,
            "trajectory": self.trajectories,
            "loss": loss,
            "mse": mse,
            "l1": l1,
            "beta": self.beta.beta,
            "cur": schedule.cur,
            "theoretical_speedup": schedule.theoretical_speedup,
        }
        if directory is not None:
            directory.log(record)
        if self.config.wandb:
            self.accelerator.log(record, step=self.updates)

    def _save_checkpoint(self, directory: RunDirectory | None) -> None:
        """Everything training stands on; all randomness follows from the counters and the seed."""
        if directory is None:
            return
        buffer = io.BytesIO()
        torch.save(
            {
                "router": self.router.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "updates": self.updates,
                "trajectories": self.trajectories,
                "refreshes": self.refreshes,
                "weights": self.weights,
                "beta": self.beta.beta,
            },
            buffer,
        )
        write_atomically(directory.checkpoint(self.updates), buffer.getvalue())

    def _export(self, directory: RunDirectory | None) -> None:
        """Router file, schedule and pictures."""
        if directory is None:
            return
        config, backbone, schedule = self.config, self.backbone, self.schedule()
        logits = self.router.logits().cpu()
        save_router(
            directory.router,
            RouterFile(
                logits,
                backbone.router_info(threshold=self.cut(), hyperparameters=plain(config)),
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
        lambda_curve(directory.path / "lambda.png", self.refreshes)
        draws, indices = Draws(config.global_seed, "sample"), range(PREVIEW_IMAGES)
        backbone = replace(backbone, how=EAGER)  # a preview is not worth compiling for
        rows = {
            name: self.decode(sample(backbone, choice, draws, indices, batch_size=self.samples))
            for name, choice in {"uncached": None, "with router": schedule}.items()
        }
        comparison(directory.path / "samples.png", rows)


def _passes(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after]."""
    return after // every > before // every


def samples_per_process(rows: int, halves: int, processes: int, flag: str) -> int:
    """Samples per process for a number of model rows over all processes."""
    unit = halves * processes
    if rows % unit:
        lower, upper = rows // unit * unit, -(-rows // unit) * unit
        fitting = f"{lower} or {upper}" if lower else f"{upper}"
        what = f"{processes} process{'es' if processes > 1 else ''}"
        if halves == 2:
            what += " of two guidance halves"
        raise HarmonicaError(f"{flag} {rows} is not divisible by {what}; use {fitting}")
    return rows // unit


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
