"""The tables of a comparison."""

import statistics
from collections.abc import Callable
from functools import partial

from harmonica.comparison.config import ALL_METHODS
from harmonica.image_error import readable


def markdown(results: list[dict]) -> str:
    """The table: a line for every method at every level.

    Numbers are means over its seeds, with their range; time is of the first seed. The range of the
    uncached run's scores is over sets of other images.
    """
    names = sorted({name for result in results for name in result.get("scores", ())})
    head = [
        "cost", "method", "setting", "CUR", "MACs", "time", "MSE to uncached", "median", "PSNR",
        "MSE to exact", *names, "training",
    ]  # fmt: skip
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for (level, method), found in _groups(results).items():
        cost = "" if level is None else level.removeprefix("--target-")
        lines.append(" | ".join([cost, *_cells_of_line(method, found, names)]))
    return "\n".join(f"| {line} |" for line in lines)


def overview(results: list[dict]) -> str:
    """A table for every quality: a line for every method, a column for every level."""
    names = sorted({name for result in results for name in result.get("scores", ())})
    qualities: dict[str, Callable[[list[dict]], str]] = {
        "MSE to uncached": partial(_error, against="against_uncached"),
        "MSE to exact": partial(_error, against="against_exact"),
        **{name: partial(_score, name=name) for name in names},
        "measured speed-up": _measured,
    }
    groups = _groups(results)
    levels = list(dict.fromkeys(level for level, _ in groups if level is not None))
    methods = sorted({method for level, method in groups if level}, key=ALL_METHODS.index)
    tables = []
    for quality, shown in qualities.items():
        known = {place: shown(found) for place, found in groups.items()}
        if not any(known[place] for place in groups if place[0]):
            continue
        uncached = known.get((None, "uncached"), "")
        beside = f"; uncached {uncached}" if uncached else ""
        heads = [f"{quality}{beside}", *(level.removeprefix("--target-") for level in levels)]
        lines = [heads, ["---"] * len(heads)]
        lines += [[name, *(known.get((at, name), "") for at in levels)] for name in methods]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


def _groups(results: list[dict]) -> dict[tuple[str | None, str], list[dict]]:
    """Results of all seeds by level and method."""
    groups: dict[tuple[str | None, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["level"], result["method"]), []).append(result)
    return groups


def _error(found: list[dict], against: str) -> str:
    return _spread([result[against]["mse_mean"] for result in found if against in result])


def _score(found: list[dict], name: str) -> str:
    return _spread(_scores(found, name), "{:.2f}".format)


def _measured(found: list[dict]) -> str:
    ratios = [r["measured_speedup"]["ratio"] for r in found if "measured_speedup" in r]
    return f"{ratios[0]:.2f}x" if ratios else ""


def _cells_of_line(method: str, found: list[dict], names: list[str]) -> list[str]:
    setting, cur = found[0]["setting"], found[0]["cur"]
    return [
        method,
        "" if len(found) > 1 else setting,
        "" if cur is None else f"{statistics.fmean(r['cur'] for r in found):.1%}",
        f"{statistics.fmean(r['theoretical_speedup'] for r in found):.2f}x",
        _measured(found),
        _error(found, "against_uncached"),
        readable(statistics.fmean(r["against_uncached"]["mse_median"] for r in found)),
        f"{statistics.fmean(r['against_uncached']['psnr_mean'] for r in found):.1f} dB",
        _error(found, "against_exact"),
        *(_score(found, name) for name in names),
        _effort([r["training"] for r in found if "training" in r]),
    ]


def _effort(found: list[dict]) -> str:
    """Evaluations of the model on one sample, and seconds."""
    if not found:
        return ""
    evaluations, seconds = (
        statistics.fmean(effort[name] for effort in found) for name in ("evaluations", "seconds")
    )
    return f"{evaluations / 1000:.1f}k, {seconds:.0f} s"


def _scores(found: list[dict], name: str) -> list[float]:
    """Of all sets of images that a line is about."""
    sets = [s for r in found for s in [r["scores"], *r.get("scores_of_other_images", ())]]
    return [scores[name] for scores in sets if name in scores]


def _spread(values: list[float], shown: Callable[[float], str] = readable) -> str:
    """Mean, and the range of several values in brackets."""
    if not values:
        return ""
    mean = shown(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({shown(min(values))} to {shown(max(values))})"
