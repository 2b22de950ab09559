"""What a router file holds: `python scripts/inspect_router.py FILE --threshold 0.1`."""

from pathlib import Path

import torch

from harmonica.errors import HarmonicaError, run_command
from harmonica.flops import Costs, measure_costs
from harmonica.options import CommandParser
from harmonica.plots import router_heatmap
from harmonica.router import SEMANTICS, RouterFile, load_router
from models import MODELS, create_model


def branch_costs(router: RouterFile, model: str | None, image_size: int | None) -> Costs:
    """Costs of the router's branches, from its schedule or from a model of the zoo.

    Raises:
        HarmonicaError: the file does not say its model and ``--model`` does not either; or an
            image size that nothing reads.
    """
    if model is None and router.schedule is not None:
        if image_size is not None:
            raise HarmonicaError(
                f"--image-size {image_size} is for --model; drop it, or add that: the file knows "
                "the costs of its branches"
            )
        return router.schedule.costs
    name = model or router.info.model
    if name is None or name not in MODELS:
        raise HarmonicaError(
            "the file does not say which model of the zoo it is for; name it with --model"
        )
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
    parser.add_argument("file", type=Path, help="router file, ours or published, or run directory")
    parser.add_argument("--threshold", type=float, help="default: the exported schedule")
    parser.add_argument(
        "--semantics",
        choices=tuple(SEMANTICS),
        default="harmonica",
        help="how scores are read; ltc: every other step computes all (Learning-to-Cache)",
    )
    parser.add_argument("--model", help="for files that do not say")
    parser.add_argument("--image-size", type=int, help="with --model; default: the model's")
    parser.add_argument("--out", type=Path, help="heat map; default: beside the file")
    arguments = parser.parse_args()
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise HarmonicaError(f"--threshold {arguments.threshold} is out of range; use 0 to 1")

    router = load_router(arguments.file, "FILE")
    costs = branch_costs(router, arguments.model, arguments.image_size)
    schedule = router.to_schedule(costs, arguments.threshold, arguments.semantics)
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
        print(
            f"note: nothing scores below --threshold {arguments.threshold}; the exported schedule"
        )
        print(f"reuses {router.schedule.cur:.1%}, its cut is at {router.info.threshold:.3f}")
    print(f"{'CUR':22} {schedule.cur:.1%}")
    print(f"{'theoretical speed-up':22} {schedule.theoretical_speedup:.2f}x")
    print(f"{'computed per step':22} {' '.join(str(n) for n in schedule.compute.sum(axis=1))}")
    out = arguments.out
    if out is None:
        folder = arguments.file if arguments.file.is_dir() else arguments.file.parent
        out = folder / f"{arguments.file.stem}_heatmap.png"
    router_heatmap(out, router.logits.sigmoid().numpy(), schedule, str(arguments.file.name))
    print(f"{'heat map':22} {out}")


if __name__ == "__main__":
    inspect()
