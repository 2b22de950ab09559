"""Routers that the methods of a comparison learn; each learns once, and is kept."""

import shutil
from dataclasses import replace
from typing import Any

from harmonica.backbone import Backbone
from harmonica.baselines import METHODS, Plan
from harmonica.budget import Budget
from harmonica.comparison.config import (
    ON_FORA,
    REFINED,
    TRAINED,
    TRAINED_AT_LEVEL,
    Cell,
    CompareConfig,
)
from harmonica.errors import OutOfReach
from harmonica.router import SEMANTICS, budget_schedule
from harmonica.router_file import RouterFile, load_router
from harmonica.training.config import TrainConfig
from harmonica.training.run_directory import RunDirectory
from harmonica.training.trainer import Trainer


class Routers:
    """Those in the folder of a comparison; what is missing there learns when it is asked for."""

    def __init__(self, config: CompareConfig, backbone: Backbone):
        self.config, self.backbone = config, backbone

    def plan(self, cell: Cell) -> Plan:
        """How a method that learns samples."""
        if cell.method in TRAINED:
            return self._cut(cell)
        return Plan(self.backbone, self._router(cell).schedule)

    def _cut(self, cell: Cell) -> Plan:
        """The scores of a router that learned once, cut at the cell's level."""
        logits, costs = self._router(cell).logits, self.backbone.costs
        rows = SEMANTICS["ltc" if cell.method == "learning-to-cache" else "harmonica"](len(logits))
        try:
            return Plan(self.backbone, budget_schedule(logits, costs, cell.level, rows))
        except OutOfReach:
            most = Budget(cur=len(rows) / len(logits))
            schedule = budget_schedule(logits, costs, most, rows)
            return Plan(self.backbone, schedule, "all that it can reuse")

    def _router(self, cell: Cell) -> RouterFile:
        router = load_router(self.run(cell).router)
        router.check(self.backbone.model, self.backbone.router_info())
        return router

    def run(self, cell: Cell) -> RunDirectory:
        """The run of a method that learns, in the comparison's folder.

        One that was cut short goes on. One with other options stays as it is, beside a new one.
        """
        config = self._training(cell)
        known = self._known(config)
        if known is not None and known.router.is_file():
            return known
        schedule = config.freeze_schedule
        if schedule is not None and not schedule.is_file():
            METHODS["fora"](self.backbone, cell.level, cell.seed).schedule.save(schedule)
        if known is None and cell.method in REFINED:
            base = self.run(replace(cell, method=REFINED[cell.method]))
            folder = config.results_dir
            copy_of = folder / ".copy"
            shutil.rmtree(copy_of, ignore_errors=True)
            # As if it had been stopped before its end.
            shutil.copytree(base.path, copy_of, ignore=shutil.ignore_patterns(base.router.name))
            copy_of.rename(RunDirectory.create(folder, config).path)
        return Trainer(config).run()

    def is_finished(self, cell: Cell) -> bool:
        """Whether that run is."""
        known = self._known(self._training(cell))
        return known is not None and known.router.is_file()

    def _known(self, config: TrainConfig) -> RunDirectory | None:
        """The run with these options, as far as it has come."""
        return RunDirectory.newest_like(config.results_dir, config, self.backbone.weights_hash)

    @staticmethod
    def name(cell: Cell) -> str:
        """Of the folder of that run, which cells of several levels may share."""
        return f"{cell.method}_seed{cell.seed}" if cell.method in TRAINED else cell.key

    def _training(self, cell: Cell) -> TrainConfig:
        folder = self.config.out / "routers" / self.name(cell)
        options = self._options(cell)
        if cell.method in ON_FORA:
            options["freeze_schedule"] = folder.parent / f"{folder.name}.json"
        # Not every objective has compiled blocks, and what training took is compared.
        shared = replace(self.config, compile=False)
        options.update(global_seed=cell.seed, results_dir=folder, resume="auto")
        training = shared.of(TrainConfig, **options)
        if training.schedule_updates is not None:
            # By default a fixed number, which may leave coefficients none to themselves.
            training = replace(training, schedule_updates=training.max_steps // 2)
        return training

    def _options(self, cell: Cell) -> dict[str, Any]:
        """How a method learns, the schedule of FORA left out."""
        config, method = self.config, cell.method
        if method in TRAINED:
            is_alternate = method == "learning-to-cache"
            return {
                **TRAINED[method],
                "data": config.data if is_alternate else None,
                "max_steps": config.train_updates,
                "target_cur": config.train_cur / 2 if is_alternate else config.train_cur,
            }
        at_level = {"target_cur": cell.level.cur, "target_speedup": cell.level.speedup}
        if method in ON_FORA:
            options = ON_FORA[method]
        elif method in REFINED:
            options = {**TRAINED_AT_LEVEL[REFINED[method]], **at_level, "refine": config.exchanges}
        else:
            options = {**TRAINED_AT_LEVEL[method], **at_level}
        on_image = options.get("objective") == "trajectory"
        updates = config.trajectory_updates if on_image else config.train_updates
        return {**options, "max_steps": updates}
