"""What a router file holds: `python scripts/inspect_router.py FILE --threshold 0.1`."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch

from harmonica.errors import HarmonicaError, run_command
from harmonica.flops import Costs, measure_costs
from harmonica.options import CommandParser
from harmonica.plots import router_heatmap
from harmonica.router import SEMANTICS, Router
from harmonica.router_file import RouterFile, load_router, load_schedule_file
from models import MODELS, create_model


def open_file(arguments: argparse.Namespace) -> RouterFile:
    """What is to be shown; the scores of a schedule are its decisions.

    Raises:
        HarmonicaError: it cannot be read, or is asked for scores that it does not have.
    """
    path = arguments.file
    if path.suffix != ".json":
        return load_router(path, "FILE")
    if arguments.threshold is not None or arguments.semantics != "harmonica":
        raise HarmonicaError(
            f"FILE {path} is a schedule, which has no scores for --threshold or --semantics; pass "
            "the router"
        )
    schedule, info = load_schedule_file(path, "FILE")
    return RouterFile(Router.deciding(schedule.compute).logits(), info, schedule)


def branch_costs(router: RouterFile, model: str | None, image_size: int | None) -> Costs | None:
    """Costs of the router's branches, from its schedule or a model of the zoo; None: not known.

    Raises:
        HarmonicaError: ``--model`` is unknown, or not the router's; or an image size that nothing
            reads.
    """
    if model is None and router.schedule is not None:
        if image_size is not None:
            raise HarmonicaError(
                f"--image-size {image_size} is for --model; drop it, or add that: the file knows "
                "the costs of its branches"
            )
        return router.schedule.costs
    if model not in (None, *MODELS):
        raise HarmonicaError(f"--model {model} is unknown; use one of {', '.join(sorted(MODELS))}")
    name = model or router.info.model
    if name not in MODELS:
        if image_size is not None:
            raise HarmonicaError(
                f"--image-size {image_size} is of no use without the model; name it with --model"
            )
        return None
    try:
        with torch.device("meta"):
            model = create_model(name, image_size=image_size or router.info.image_size)
    except ValueError as error:
        raise HarmonicaError(f"--image-size does not fit: {error}; pass the router's") from None
    costs = measure_costs(model)
    if len(costs.names) != router.logits.shape[1]:
        raise HarmonicaError(
            f"the router has {router.logits.shape[1]} branches and --model {name} has "
            f"{len(costs.names)}; name the model that it was trained on"
        )
    return costs


@run_command
def inspect() -> None:
    parser = CommandParser(description="Show what a router file holds.")
    parser.add_argument(
        "file", type=Path, help="router file, ours or published, run directory, or schedule JSON"
    )
    parser.add_argument("--threshold", type=float, help="default: the exported schedule")
    parser.add_argument(
        "--semantics",
        choices=tuple(SEMANTICS),
        default="harmonica",
        help="how scores are read; ltc: every other step computes all (Learning-to-Cache)",
    )
    parser.add_argument("--model", help="for files that do not say")
    parser.add_argument("--image-size", type=int, help="of the model; default: its own")
    parser.add_argument("--out", type=Path, help="heat map; default: beside the file")
    parser.add_argument("--schedule", type=Path, help="also write the schedule as JSON, to this")
    arguments = parser.parse_args()
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise HarmonicaError(f"--threshold {arguments.threshold} is out of range; use 0 to 1")

    router = open_file(arguments)
    costs = branch_costs(router, arguments.model, arguments.image_size)
    if costs is None and arguments.schedule is not None:
        raise HarmonicaError("--schedule holds what branches cost; name the model with --model")
    count = router.logits.shape[1]
    nameless = Costs(tuple(f"{i}.branch" for i in range(count)), (1,) * count, 0)
    schedule = router.to_schedule(costs or nameless, arguments.threshold, arguments.semantics)
    known = {k: v for k, v in vars(router.info).items() if v not in (None, {}, "")}
    for name in (
        "source",
        "version",
        "model",
        "image_size",
        "sampler",
        "num_sampling_steps",
        "cfg_scale",
        "threshold",
        "weights_hash",
    ):
        if name in known:
            print(f"{name:22} {known[name]}")
    if schedule.cur == 0 and router.schedule is not None and router.schedule.cur > 0:
        threshold = router.threshold if arguments.threshold is None else arguments.threshold
        print(f"note: nothing that counts scores below {threshold:.3f}; the exported schedule")
        print(f"reuses {router.schedule.cur:.1%}")
    print(f"{'CUR':22} {schedule.cur:.1%}")
    if costs is None:
        print(f"{'theoretical speed-up':22} not known; name the model with --model")
    else:
        print(f"{'theoretical speed-up':22} {schedule.theoretical_speedup:.2f}x")
    print(f"{'computed per step':22} {' '.join(str(n) for n in schedule.compute.sum(axis=1))}")
    out = arguments.out
    if out is None:
        folder = arguments.file if arguments.file.is_dir() else arguments.file.parent
        out = folder / f"{arguments.file.stem}_heatmap.png"
    scores, title = router.logits.sigmoid().numpy(), str(arguments.file.name)
    router_heatmap(out, scores, schedule, title, has_costs=costs is not None)
    print(f"{'heat map':22} {out}")
    if arguments.schedule is not None:
        schedule.save(arguments.schedule, asdict(replace(router.info, hyperparameters={})))
        print(f"{'schedule':22} {arguments.schedule}")


if __name__ == "__main__":
    inspect()
