"""A comparison: cells are planned, measured, kept, and drawn."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial

import torch
import yaml
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from harmonica.backbone import load_backbone, load_decoder
from harmonica.baselines import METHODS, Plan
from harmonica.baselines.fixed import evenly_spaced
from harmonica.comparison.config import TRAINED, Cell, CompareConfig
from harmonica.comparison.table import markdown
from harmonica.config import TrainConfig
from harmonica.engine import Engine
from harmonica.errors import HarmonicaError
from harmonica.files import read_json, read_safetensors, write_atomically
from harmonica.image_error import ImageError
from harmonica.metrics.extractor import Extractor, load_extractor
from harmonica.metrics.instruments import bundled_size, suitable_extractor
from harmonica.metrics.reference import Reference, open_reference
from harmonica.metrics.scores import set_scores
from harmonica.options import plain, to_yaml
from harmonica.plots import pareto_plot
from harmonica.randomness import Draws
from harmonica.report import select_device
from harmonica.router import SEMANTICS, budget_schedule, load_router
from harmonica.samplers import create_sampler
from harmonica.sampling import eight_bit, sample, trajectories
from harmonica.schedule import Schedule
from harmonica.timing import timed
from harmonica.trainer import Trainer

# A method whose settings come no nearer to a level than this has no entry there.
TOLERANCE = 0.15
TIMED_BATCH = 16
REPORT = "comparison.json"


class Comparison:
    """One comparison; ``run()`` fills the folder and returns the printed table."""

    def __init__(self, config: CompareConfig):
        self.config = config
        self.device = select_device()
        self.backbone = load_backbone(config, self.device)
        self.decode = load_decoder(config, self.device)
        self.draws = Draws(config.image_seed, "sample")
        self.uncached = Plan(self.backbone)

    def run(self) -> str:
        """Measure what is missing, then write the table and the plot.

        Raises:
            HarmonicaError: bad input, or a folder of another comparison.
        """
        self._claim_folder()
        if self.reference is not None:
            _ = self.extractor  # what is missing is said before anything is sampled
        results = [self._result(cell) for cell in self.cells()]
        results = [result for result in results if "left_out" not in result]
        table = markdown(results)
        record = {
            "config": plain(self.config),
            "weights_hash": self.backbone.weights_hash,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "results": results,
        }
        write_atomically(self.config.out / REPORT, json.dumps(record, indent=1).encode())
        write_atomically(self.config.out / "table.md", f"{table}\n".encode())
        picture = self.config.out / "pareto.png"
        pareto_plot(picture, results)
        return f"{table}\n\n{self._footer()}\npicture: {picture}"

    def cells(self) -> Iterator[Cell]:
        """Every cell of the comparison; only methods that draw or learn have several seeds."""
        yield Cell("uncached")
        for level in self.config.levels:
            for method in self.config.methods:
                if method == "learning-to-cache" and self.config.data is None:
                    continue
                for seed in self.config.seeds if Cell(method).has_seeds else (0,):
                    yield Cell(method, level, seed)

    def _claim_folder(self) -> None:
        """Keep cells of one configuration together."""
        path, out = self.config.out / "config.yaml", self.config.out
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not path.is_file())):
            raise HarmonicaError(f"--out {out} is no folder of a comparison; pass another")
        if path.is_file():
            earlier = yaml.safe_load(path.read_text())
            for name, value in plain(self.config).items():
                if name not in self.config.FREE and earlier.get(name) != value:
                    raise HarmonicaError(
                        f"--out {out} holds a comparison with {name} {earlier.get(name)}, not "
                        f"{value}; pass another folder"
                    )
        write_atomically(path, to_yaml(self.config).encode())

    def _footer(self) -> str:
        config = self.config
        return (
            f"weights {self.backbone.weights_hash}, {config.sampler} T = "
            f"{config.num_sampling_steps}, guidance {config.cfg_scale:g}, {config.num_paired} "
            f"seeds from {config.image_seed} for errors, {config.num_images} images for "
            f"distances; exact: DDIM with {config.exact_steps} steps; time of a batch of "
            f"{TIMED_BATCH} against the uncached one in the same run, {torch.get_num_threads()} "
            f"threads on {self.device.type}"
        )

    # Plans.

    def plan(self, cell: Cell) -> Plan:
        """How a cell samples.

        Raises:
            HarmonicaError: its level is out of its reach.
        """
        if cell.level is None:
            return self.uncached
        if cell.method in METHODS:
            plan = METHODS[cell.method](self.backbone, cell.level, cell.seed)
        else:
            plan = Plan(self.backbone, self._trained_schedule(cell))
        speedup = plan.speedup_over(self.uncached)
        exact = evenly_spaced(self.config.num_sampling_steps, self.backbone.costs, cell.level)
        if abs(speedup / exact.theoretical_speedup - 1) > TOLERANCE:
            raise HarmonicaError(f"the nearest setting, {plan.setting}, gives {speedup:.2f}x")
        return plan

    def _trained_schedule(self, cell: Cell) -> Schedule:
        """A trained router cut at the cell's level; trained first, unless an earlier run did."""
        config, differences = self.config, TRAINED[cell.method]
        folder = config.out / "routers" / f"{cell.method}_seed{cell.seed}"
        finished = sorted(folder.glob("*/router.safetensors"))
        if not finished:
            is_alternate = cell.method == "learning-to-cache"
            training = config.of(
                TrainConfig,
                **differences,
                data=config.data if is_alternate else None,
                max_steps=config.train_updates,
                target_cur=config.train_cur / 2 if is_alternate else config.train_cur,
                global_seed=cell.seed,
                results_dir=folder,
            )
            finished = [Trainer(training).run().router]
        rows = SEMANTICS["ltc" if cell.method == "learning-to-cache" else "harmonica"]
        logits = load_router(finished[0]).logits
        return budget_schedule(logits, self.backbone.costs, cell.level, rows(len(logits)))

    # Measurements.

    def _result(self, cell: Cell) -> dict:
        """What a cell gave, from its file if it is finished."""
        path = self.config.out / "cells" / f"{cell.key}.json"
        if path.is_file():
            return read_json(path)
        about = {
            "method": cell.method,
            "level": None if cell.level is None else str(cell.level),
            "seed": cell.seed,
        }
        try:
            plan = self.plan(cell)
        except HarmonicaError as error:
            if cell.level is None:
                raise
            result = {**about, "left_out": str(error)}
        else:
            result = {**about, **self._measured(cell, plan)}
        write_atomically(path, json.dumps(result, indent=1).encode())
        return result

    def _measured(self, cell: Cell, plan: Plan) -> dict:
        is_first = cell.seed == (0 if cell.level is None else self.config.seeds[0])
        count = self.config.num_paired
        latents = self._sample(plan, 0, count, cell.key)
        reference = self.uncached_latents if cell.level is not None else latents
        error = ImageError.between(latents, reference, self.decode(latents), self.decode(reference))
        result = {
            "setting": plan.setting,
            "cur": None if plan.schedule is None else plan.schedule.cur,
            "schedule": None if plan.schedule is None else plan.schedule.to_dict(),
            "theoretical_speedup": plan.speedup_over(self.uncached),
            "against_uncached": error.to_dict(),
        }
        if self.config.exact_steps:
            exact = self.exact_latents
            distances = ImageError.between(latents, exact, self.decode(latents), self.decode(exact))
            result["against_exact"] = distances.to_dict()
        if is_first or not cell.has_seeds:
            result["measured_speedup"] = self._measured_speedup(plan)
            result["scores"] = self._scores(plan, latents, cell.key)
        return result

    def _sample(self, plan: Plan, start: int, stop: int, name: str) -> Tensor:
        indices, size = range(start, stop), self.config.batch_size
        return sample(plan.backbone, plan.schedule, self.draws, indices, None, size, name)

    @cached_property
    def uncached_latents(self) -> Tensor:
        return self._kept("uncached", self.uncached)

    @cached_property
    def exact_latents(self) -> Tensor:
        solver = create_sampler("ddim", self.config.exact_steps)
        return self._kept("exact", Plan(replace(self.backbone, sampler=solver)))

    def _kept(self, name: str, plan: Plan) -> Tensor:
        """Latents of the paired seeds, from the folder if an earlier run left them there."""
        path = self.config.out / "latents" / f"{name}.safetensors"
        if path.is_file():
            return read_safetensors(path)[0]["latents"]
        latents = self._sample(plan, 0, self.config.num_paired, name)
        write_atomically(path, safetensors_bytes({"latents": latents}))
        return latents

    @torch.inference_mode()
    def _measured_speedup(self, plan: Plan) -> dict:
        """Seconds of a batch without and with, in turn, and their ratio."""
        indices = range(TIMED_BATCH)
        runs = {
            name: partial(
                Engine(chosen.schedule, chosen.backbone.how),
                trajectories(chosen.backbone, self.draws, indices),
            )
            for name, chosen in {"uncached": self.uncached, "plan": plan}.items()
        }
        times = timed(runs, self.config.repeats, self.device)
        ratio = times["uncached"].median / times["plan"].median
        return {"ratio": ratio, **{name: vars(timing) for name, timing in times.items()}}

    def _scores(self, plan: Plan, paired: Tensor, name: str) -> dict[str, float]:
        """Scores of ``num_images`` images, of which the paired ones are the first."""
        count, batch = self.config.num_images, self.config.batch_size
        if self.reference is None:
            return {}
        rest = self._sample(plan, len(paired), count, name) if count > len(paired) else paired[:0]
        parts = [
            self.extractor(eight_bit(self.decode(latents)))
            for latents in torch.cat([paired[:count], rest]).split(batch)
        ]
        rows = {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}
        found = set_scores(rows, self.config.metrics, self.extractor, self.reference)
        return {score.name: score.value for score in found}

    @property
    def _is_bundled(self) -> bool:
        """Whether images are of the size of the bundled backbone's."""
        return bundled_size(self.config.model) == (self.backbone.image_size,) * 2

    @cached_property
    def reference(self) -> Reference | None:
        """Real images, or statistics of them; None if there are none for this model."""
        name = self.config.reference
        if name is None and self._is_bundled:
            name = "cifar10"
        if name is None or self.config.num_images == 0:
            return None
        reference = open_reference(name)
        lacking = set(self.config.metrics) - set(reference.allows())
        if lacking:
            raise HarmonicaError(
                f"--metrics {min(lacking)} cannot be had with --reference {name}; drop one"
            )
        return reference

    @cached_property
    def extractor(self) -> Extractor:
        name = suitable_extractor(self.reference, self._is_bundled)
        extractor = load_extractor(name, self.device)
        self.reference.check(extractor)
        return extractor
