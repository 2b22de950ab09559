"""A comparison: cells are planned, measured, kept, and drawn."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from harmonica.autoencoder import load_decoder
from harmonica.backbone import load_backbone, select_device
from harmonica.baselines import METHODS, OF_LONG_SKIPS, Plan
from harmonica.baselines.fixed import evenly_spaced
from harmonica.comparison.config import (
    ALL_METHODS,
    LEARNED,
    REFINED,
    TRAINED,
    Cell,
    CompareConfig,
)
from harmonica.comparison.jobs import Piece, side_by_side
from harmonica.comparison.routers import Routers
from harmonica.comparison.table import markdown, overview
from harmonica.engine import Engine
from harmonica.errors import HarmonicaError, OutOfReach
from harmonica.evaluation import measure_reference
from harmonica.files import read_json, read_safetensors, read_yaml, write_atomically
from harmonica.image_error import ImageError
from harmonica.labelled_images import LabelledImages
from harmonica.lock import held, held_in_turn
from harmonica.metrics.extractor import Extractor, load_extractor
from harmonica.metrics.instruments import bundled_size, check_size, suitable_extractor
from harmonica.metrics.reference import Reference, open_reference
from harmonica.metrics.scores import set_scores, set_warnings
from harmonica.options import plain
from harmonica.output import make_folder
from harmonica.plots import pareto_plot
from harmonica.randomness import Draws
from harmonica.sampling import check_finite, eight_bit, sample, trajectories
from harmonica.timing import timed
from models import MODELS

# A method whose settings come no nearer to a level than this has no entry there.
TOLERANCE = 0.15
# Images at once: on a GPU so many that its work, not starting it, is what is timed.
TIMED_BATCH = {"cpu": 8, "cuda": 64}
UNCACHED_SETS = 3  # of images whose scores show how much chance is in them
REPORT = "comparison.json"
LOCK = ".lock"  # of the folder: two would measure the same and write over each other's options


class Comparison:
    """One comparison; ``run()`` adds cells to its folder and returns the table of all of them."""

    def __init__(self, config: CompareConfig):
        self.config = config
        self.device = select_device()
        self.backbone = load_backbone(config, self.device)
        self.decode = load_decoder(config, self.device)
        self.draws = Draws(config.image_seed, "sample")
        self.uncached = Plan(self.backbone)
        self.routers = Routers(config, self.backbone)

    def run(self) -> str:
        """Measure what is missing, then write the table and the plot.

        Raises:
            HarmonicaError: bad input, or a folder of another comparison.
            Interrupted: a signal came while others trained and sampled; the same call goes on.
        """
        # What is missing is said before anything is sampled.
        provenance = self._provenance()
        if "learning-to-cache" in self.config.methods and self._has_labelled_images:
            LabelledImages(self.config.data, self.backbone.image_size)
        self._check_folder()
        with held(self.config.out / LOCK, f"--out {self.config.out}"):
            self._claim("config.yaml", plain(self.config), self.config.FREE)
            self._claim("provenance.yaml", provenance, set())
            return self._measure_all(provenance)

    def _measure_all(self, provenance: dict) -> str:
        if self.config.jobs > 1:
            side_by_side(self.pieces(), self.config.jobs, self.config.out)
        # What is left: times, which are of one process alone, and all that others did not finish.
        left_out = []
        for cell in self.cells():
            try:
                self._measure(cell)
            except OutOfReach as error:
                left_out.append(f"{cell.method} at {cell.level}: {error}")
        results = self._finished()
        table = f"{markdown(results)}\n\n{overview(results)}\n\n{self._footer(results)}"
        record = {"config": plain(self.config), **provenance, "results": results}
        record["left_out"] = left_out
        write_atomically(self.config.out / REPORT, json.dumps(record, indent=1).encode())
        write_atomically(self.config.out / "table.md", f"{table}\n".encode())
        picture = self.config.out / "pareto.png"
        pareto_plot(picture, results)
        lines = [table, *(f"left out: {line}" for line in left_out), *_warnings(results)]
        return "\n".join([*lines, f"picture: {picture}"])

    def cells(self) -> Iterator[Cell]:
        """Every cell of the comparison; only methods that draw or learn have several seeds."""
        yield Cell("uncached")
        for level in self.config.levels:
            for method in self.config.methods:
                if method == "learning-to-cache" and not self._has_labelled_images:
                    continue
                if method in OF_LONG_SKIPS and not self.backbone.model.joins:
                    continue
                for seed in self.config.seeds if Cell(method).has_seeds else (0,):
                    yield Cell(method, level, seed)

    def pieces(self) -> list[Piece]:
        """What processes may share, in the order in which it is best begun: what takes long, or is
        waited for, first.
        """
        cells = list(self.cells())
        refined = [cell for cell in cells if cell.method in REFINED]
        bases = [replace(cell, method=REFINED[cell.method]) for cell in refined]
        learned = [cell for cell in cells if cell.method in LEARNED]
        # Cells of several levels may share a router.
        routers = {
            piece.name: piece
            for cell in (*refined, *bases, *learned)
            for piece in [self._router(cell)]
        }
        return [*routers.values(), *map(self._images_of, cells)]

    def _router(self, cell: Cell) -> Piece:
        base = REFINED.get(cell.method)
        return Piece(
            self._router_name(cell),
            partial(self.routers.is_finished, cell),
            partial(self.routers.run, cell),
            base and self._router_name(replace(cell, method=base)),
        )

    def _router_name(self, cell: Cell) -> str:
        return f"router_{self.routers.name(cell)}"

    def _images_of(self, cell: Cell) -> Piece:
        return Piece(
            f"images_{cell.key}",
            partial(self.has_images, cell),
            partial(self.measure_images, cell),
            self._router_name(cell) if cell.method in LEARNED else None,
        )

    @property
    def _has_labelled_images(self) -> bool:
        """For Learning-to-Cache, which knows no prompts."""
        return self.config.data is not None and MODELS[self.config.model].text_encoder is None

    def _provenance(self) -> dict[str, str | bool | None]:
        """What cells depend on beside the options."""
        has_reference = self.reference is not None
        return {
            "weights_hash": self.backbone.weights_hash,
            "extractor": self.extractor.sha256 if has_reference else None,
            "reference": self.reference.content_hash() if has_reference else None,
            "device": self.device.type,
            "torch": str(torch.__version__),
            "compiles": self.backbone.how.compiles,
            "captures": self.backbone.how.captures,
        }

    def _check_folder(self) -> None:
        """Make the folder, unless it is there.

        Raises:
            HarmonicaError: it is not a comparison's.
        """
        out = self.config.out
        if not out.is_file():
            make_folder(out)
        is_ours = (out / "config.yaml").is_file()
        if out.is_file() or (not is_ours and any(path.name != LOCK for path in out.iterdir())):
            raise HarmonicaError(f"--out {out} is no folder of a comparison; pass another")

    def _claim(self, name: str, values: dict, free: set[str]) -> None:
        """Keep cells of one configuration together: what is not ``free`` must not change.

        Raises:
            HarmonicaError: it did.
        """
        path, out = self.config.out / name, self.config.out
        if path.is_file():
            earlier = read_yaml(path)
            if not isinstance(earlier, dict):
                raise HarmonicaError(f"{path} is no record of a comparison; pass another folder")
            for key, value in values.items():
                if key not in free and earlier.get(key) != value:
                    raise HarmonicaError(
                        f"--out {out} holds a comparison with {key} {earlier.get(key)}, not "
                        f"{value}; pass another folder"
                    )
        write_atomically(path, yaml.safe_dump(values, sort_keys=False).encode())

    def _footer(self, results: list[dict]) -> str:
        config, device = self.config, self.device.type
        methods = {result["method"] for result in results}
        once = ", ".join(name for name in TRAINED if name in methods)
        shared = f", once for all levels for {once}" if once else ""
        return (
            f"weights {self.backbone.weights_hash}, {config.sampler} T = "
            f"{config.num_sampling_steps}, guidance {config.cfg_scale:g}, {config.num_paired} "
            f"seeds from {config.image_seed} for errors, {config.num_images} images for "
            f"distances, of which the uncached run makes {UNCACHED_SETS} sets; exact: DDIM with "
            f"{config.exact_steps} steps; time of a batch of {TIMED_BATCH[device]} against the "
            f"uncached one in the same run, {torch.get_num_threads()} threads on {device}; "
            f"training: evaluations of the model on one sample, and seconds{shared}, which with "
            "--jobs are more than alone"
        )

    # Plans.

    def plan(self, cell: Cell) -> Plan:
        """How a cell samples; what has to learn does it first, unless an earlier run did.

        Raises:
            OutOfReach: no setting is near its level.
        """
        if cell.level is None:
            return self.uncached
        if cell.method in METHODS:
            plan = METHODS[cell.method](self.backbone, cell.level, cell.seed)
        else:
            plan = self.routers.plan(cell)
        speedup = plan.speedup_over(self.uncached)
        exact = evenly_spaced(self.config.num_sampling_steps, self.backbone.costs, cell.level)
        if abs(speedup / exact.theoretical_speedup - 1) > TOLERANCE:
            raise OutOfReach(f"the nearest setting, {plan.setting}, gives {speedup:.2f}x")
        return plan

    # Measurements.

    def _finished(self) -> list[dict]:
        """All cells of the folder, by cost, method and seed."""

        def place(result: dict) -> tuple:
            if result["level"] is None:
                return ()
            budget, number = result["level"].split()
            return budget, float(number), ALL_METHODS.index(result["method"]), result["seed"]

        cells = (self.config.out / "cells").glob("*.json")
        return sorted((read_json(path) for path in cells), key=place)

    def _file(self, cell: Cell) -> Path:
        return self.config.out / "cells" / f"{cell.key}.json"

    def has_images(self, cell: Cell) -> bool:
        """Whether they are measured."""
        path = self._file(cell)
        return path.is_file() and "scores" in read_json(path)

    def measure_images(self, cell: Cell) -> None:
        """Measure them, unless they are, and no time.

        Raises:
            OutOfReach: see ``plan``.
        """
        self._add(cell, {"scores": self._of_images})

    def _measure(self, cell: Cell) -> None:
        """Measure what is not in the file of a cell yet: images, then time.

        Raises:
            OutOfReach: see ``plan``.
        """
        wanted = {"scores": self._of_images}
        # Another seed of a method takes about the same time.
        if not cell.has_seeds or cell.seed == self.config.seeds[0]:
            wanted["measured_speedup"] = self._of_time
        self._add(cell, wanted)

    def _add(self, cell: Cell, wanted: dict[str, Callable[[Cell, Plan], dict]]) -> None:
        """Measure what the file of a cell lacks, and put it there."""
        path = self._file(cell)
        known = read_json(path) if path.is_file() else {}
        lacking = [measure for name, measure in wanted.items() if name not in known]
        plan = self.plan(cell) if lacking else None
        for measure in lacking:
            known |= measure(cell, plan)
            write_atomically(path, json.dumps(known, indent=1).encode())

    def _of_images(self, cell: Cell, plan: Plan) -> dict:
        latents = self._latents(cell, plan)
        result = {
            "method": cell.method,
            "level": None if cell.level is None else str(cell.level),
            "seed": cell.seed,
            **self._errors(plan, latents, cell.key),
            **self._scores(plan, cell.key, latents),
        }
        if cell.level is None:
            count = self.config.num_images
            others = [
                self._scores(plan, f"uncached, set {k + 1}", start=k * count)
                for k in range(1, UNCACHED_SETS)
            ]
            result["scores_of_other_images"] = [other["scores"] for other in others]
        if cell.method in LEARNED:
            result["training"] = asdict(self.routers.run(cell).effort())
        return result

    def _latents(self, cell: Cell, plan: Plan) -> Tensor:
        """Latents of the paired seeds."""
        if cell.level is None:
            return self.uncached_latents
        return self._sample(plan, 0, self.config.num_paired, cell.key)

    def _errors(self, plan: Plan, latents: Tensor, name: str) -> dict:
        """What was done, and how far the paired images are from the uncached and exact ones."""
        images = self._images(latents, 0, name)
        against = {"against_uncached": (self.uncached_latents, self.uncached_images)}
        if self.config.exact_steps:
            against["against_exact"] = (self.exact_latents, self.exact_images)
        return {
            "setting": plan.setting,
            "cur": None if plan.schedule is None else plan.schedule.cur,
            "schedule": None if plan.schedule is None else plan.schedule.to_dict(),
            "theoretical_speedup": plan.speedup_over(self.uncached),
            **{
                name: ImageError.between(latents, reference, images, others).to_dict()
                for name, (reference, others) in against.items()
            },
        }

    def _images(self, latents: Tensor, start: int, name: str) -> Tensor:
        """Images (n, 3, H, W) in [0, 1] of samples from index ``start`` on.

        Raises:
            HarmonicaError: one is not finite.
        """
        images = self.decode(latents)
        check_finite(latents, images, range(start, start + len(latents)), name)
        return images

    def _sample(self, plan: Plan, start: int, stop: int, name: str) -> Tensor:
        indices, size = range(start, stop), self.config.batch_size
        return sample(plan.backbone, plan.schedule, self.draws, indices, None, size, name)

    @cached_property
    def uncached_latents(self) -> Tensor:
        return self._kept("uncached", self.uncached)

    @cached_property
    def exact_latents(self) -> Tensor:
        exact = self.backbone.sampled_by("ddim", self.config.exact_steps)
        return self._kept("exact", Plan(exact))

    @cached_property
    def uncached_images(self) -> Tensor:
        return self.decode(self.uncached_latents)

    @cached_property
    def exact_images(self) -> Tensor:
        return self.decode(self.exact_latents)

    def _kept(self, name: str, plan: Plan) -> Tensor:
        """Latents of the paired seeds, from the folder if another run left them there or will."""
        path = self.config.out / "latents" / f"{name}.safetensors"
        make_folder(path.parent)
        with held_in_turn(path.with_suffix(".lock"), f"--out {self.config.out}"):
            if path.is_file():
                return read_safetensors(path)[0]["latents"]
            latents = self._sample(plan, 0, self.config.num_paired, name)
            write_atomically(path, safetensors_bytes({"latents": latents}))
        return latents

    @torch.inference_mode()
    def _of_time(self, cell: Cell, plan: Plan) -> dict:
        """Seconds of a batch without and with, in turn, and their ratio."""
        indices = range(TIMED_BATCH[self.device.type])
        runs = {
            name: partial(
                Engine(chosen.schedule, chosen.backbone.how),
                trajectories(chosen.backbone, self.draws, indices),
            )
            for name, chosen in {"uncached": self.uncached, "plan": plan}.items()
        }
        times = timed(runs, self.config.repeats, self.device)
        ratio = times["uncached"].median / times["plan"].median
        seconds = {name: vars(timing) for name, timing in times.items()}
        return {"measured_speedup": {"ratio": ratio, **seconds}}

    def _scores(
        self, plan: Plan, name: str, known: Tensor | None = None, start: int = 0
    ) -> dict[str, dict[str, float] | list[str]]:
        """Scores of ``num_images`` images from index ``start`` on, and what to know about them.

        Args:
            known: latents of the first of them.
        """
        count, batch = self.config.num_images, self.config.batch_size
        if self.reference is None:
            return {"scores": {}, "warnings": []}
        stop, done = start + count, start if known is None else start + len(known)
        latents = [] if known is None else [known[:count]]
        if done < stop:
            latents.append(self._sample(plan, done, stop, name))
        parts = [
            self.extractor(eight_bit(self._images(part, start + k * batch, name)))
            for k, part in enumerate(torch.cat(latents).split(batch))
        ]
        rows = {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}
        how = rows, self.config.metrics, self.extractor, self.completed_reference
        scores = {score.name: score.value for score in set_scores(*how)}
        return {"scores": scores, "warnings": set_warnings(*how)}

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
    def completed_reference(self) -> Reference:
        """With the features that have to be taken from its images."""
        state = PartialState(cpu=self.device.type == "cpu")
        rows = measure_reference(
            self.reference, self.extractor, self.config.metrics, self.config.batch_size, state
        )
        return self.reference.completed(rows)

    @cached_property
    def extractor(self) -> Extractor:
        name = suitable_extractor(self.reference, self._is_bundled)
        check_size(name, self.backbone.pixels, self.reference, "the model's are")
        extractor = load_extractor(name, self.device)
        self.reference.check(extractor)
        return extractor


def _warnings(results: list[dict]) -> list[str]:
    """What is to be known about scores, with the first cell that it is about."""
    first: dict[str, dict] = {}
    for result in results:
        for warning in result.get("warnings", ()):
            first.setdefault(warning, result)
    return [
        f"warning: {warning} (first of {result['method']} {result['level'] or ''}".rstrip() + ")"
        for warning, result in first.items()
    ]
