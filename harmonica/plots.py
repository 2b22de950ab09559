"""Pictures of a run: router heat map, lambda curve, image grids."""

import io
import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from harmonica.files import write_atomically
from harmonica.schedule import Schedule

OURS = ("harmonica", "trajectory-learned")  # thick lines of a comparison


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    write_atomically(path, buffer.getvalue())


def _branch_rows(kinds: list[str]) -> list[list[int]]:
    """Branch indices by kind: all attention branches, then all MLPs, ..."""
    return [[i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)]


def router_heatmap(
    path: Path, scores: np.ndarray, schedule: Schedule, title: str, has_costs: bool = True
) -> None:
    """Scores (T, N) in [0, 1], one panel per kind of branch; a dot marks what is computed.

    Args:
        has_costs: whether the multiply-accumulates of the schedule are known.
    """
    groups = _branch_rows(schedule.costs.kinds)
    figure = Figure((1.5 + 4.2 * len(groups), 1.2 + 0.22 * len(scores)), layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        image = axis.imshow(scores[:, group], vmin=0, vmax=1, cmap="viridis", aspect="auto")
        steps, columns = np.nonzero(schedule.compute[:, group])
        axis.scatter(columns, steps, s=6, c="white", edgecolors="black", linewidths=0.4)
        axis.set_title(schedule.costs.kinds[group[0]])
        axis.set_xlabel("block")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel("step, in sampling order")
    figure.colorbar(image, ax=axes[0].tolist(), label="score (dot: computed)")
    cost = f"CUR {schedule.cur:.1%}"
    if has_costs:
        cost += f", theoretical speed-up {schedule.theoretical_speedup:.2f}x"
    figure.suptitle(f"{title}\n{cost}")
    _save(figure, path)


def lambda_curve(path: Path, refreshes: list[tuple[int, list[float]]]) -> None:
    """Weights of the loss per step; ``refreshes`` are (update, weights (T,)), oldest first."""
    figure = Figure((7, 4), layout="constrained")
    axis = figure.subplots()
    shades = colormaps["viridis"](np.linspace(0.15, 0.95, len(refreshes)))
    for (update, weights), color in zip(refreshes, shades, strict=True):
        edge = update in (refreshes[0][0], refreshes[-1][0])
        axis.plot(
            range(1, len(weights)),
            weights[1:],
            color=color,
            linewidth=2 if edge else 0.8,
            label=f"update {update}" if edge else None,
        )
    axis.set_yscale("log")
    axis.set_xlabel("step, in sampling order")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("weight of the step's error, from lambda")
    axis.legend()
    _save(figure, path)


def learning_curve(path: Path, history: Sequence[tuple[int, float]]) -> None:
    """Image error of the best schedule so far on held-out seeds; ``history``: (update, error)."""
    figure = Figure((7, 4), layout="constrained")
    axis = figure.subplots()
    updates, errors = zip(*history, strict=True)
    axis.step(updates, errors, where="post", marker="o", markersize=3)
    if min(errors) > 0:
        axis.set_yscale("log")
    axis.set_xlabel("update")
    axis.set_ylabel("image error, held-out seeds")
    axis.grid(alpha=0.3, which="both")
    _save(figure, path)


def image_grid(path: Path, images: Tensor, columns: int) -> None:
    """Images (n, 3, H, W) in [0, 1] row by row; small ones are enlarged to be seen."""
    scale = max(1, 96 // images.shape[-1])
    grid = make_grid(images, nrow=columns, padding=1, pad_value=1.0)
    picture = to_pil_image(grid)
    picture = picture.resize((picture.width * scale, picture.height * scale), resample=0)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def comparison(path: Path, rows: dict[str, Tensor], columns: int = 12) -> None:
    """Same seeds side by side: one labelled row of images (n, 3, H, W) per entry.

    With exactly two rows a third shows their absolute difference, five times enlarged.
    """
    shown = {name: images[:columns] for name, images in rows.items()}
    if len(shown) == 2:
        first, second = shown.values()
        shown["difference x5"] = ((first - second).abs() * 5).clamp(0, 1)
    count = len(next(iter(shown.values())))
    figure = Figure((1.0 + 1.0 * count, 0.2 + 1.25 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], shown.items(), strict=True):
        grid = make_grid(images, nrow=count, padding=1, pad_value=1.0)
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=9, loc="left")
        axis.axis("off")
    _save(figure, path)


def pareto_plot(path: Path, results: list[dict]) -> None:
    """Quality against cost: a column per cost (MACs, time), a row per quality.

    Args:
        results: cells of a comparison, see ``harmonica.comparison``. Errors are means over the
            seeds of a method and level. Methods that take fewer steps are solid lines: a point
            below them is worth having. Thick lines are what this project learns by default.
    """
    seeds: dict[tuple, list[dict]] = {}
    for result in results:
        seeds.setdefault((result["method"], result["level"]), []).append(result)
    # Of every method and level the result with a time; one that was cut short has none yet.
    drawn = [max(found, key=lambda r: "measured_speedup" in r) for found in seeds.values()]

    def mean(result: dict, kind: str, name: str) -> float | None:
        found = [r[kind].get(name) for r in seeds[result["method"], result["level"]] if kind in r]
        return statistics.fmean(found) if found and None not in found else None

    costs = {
        "theoretical speed-up (MACs)": lambda r: r["theoretical_speedup"],
        "measured speed-up": lambda r: r.get("measured_speedup", {}).get("ratio"),
    }
    costs = {name: cost for name, cost in costs.items() if any(cost(r) for r in drawn)}
    qualities = {
        "MSE to the uncached images": lambda r: mean(r, "against_uncached", "mse_mean"),
        "MSE to the exact solution": lambda r: mean(r, "against_exact", "mse_mean"),
    }
    for name in sorted({name for result in drawn for name in result["scores"]}):
        qualities[name] = lambda r, name=name: mean(r, "scores", name)
    qualities = {name: value for name, value in qualities.items() if any(value(r) for r in drawn)}
    figure = Figure((2 + 5 * len(costs), 4 * len(qualities)), layout="constrained")
    axes = figure.subplots(len(qualities), len(costs), squeeze=False)
    methods = list(dict.fromkeys(result["method"] for result in drawn))
    colors = colormaps["tab20"](np.linspace(0, 1, max(2, len(methods))))
    for row, (quality, value) in zip(axes, qualities.items(), strict=True):
        for axis, (cost, speedup) in zip(row, costs.items(), strict=True):
            for method, marker, color in zip(methods, cycle("osD^vPX*<>ph"), colors, strict=False):
                points = sorted(
                    (speedup(r), value(r))
                    for r in drawn
                    if r["method"] == method and speedup(r) and value(r)
                )
                if not points:
                    continue
                axis.plot(
                    *zip(*points, strict=True),
                    linestyle="-" if method.startswith("fewer-steps") else ":",
                    linewidth=2.5 if method in OURS else 1.2,
                    marker=marker,
                    color=color,
                    label=method,
                )
            if quality.startswith("MSE"):
                axis.set_yscale("log")
            axis.set_xlabel(cost)
            axis.set_ylabel(quality)
            axis.grid(True, which="both", alpha=0.3)
    known = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    shown = [method for method in methods if method in known]
    figure.legend([known[m] for m in shown], shown, loc="outside right upper")
    _save(figure, path)
