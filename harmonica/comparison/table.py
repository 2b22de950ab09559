"""The table of a comparison."""

import statistics

from harmonica.image_error import readable


def markdown(results: list[dict]) -> str:
    """The table: a line for every method at every level.

    Errors, and what training took, are means over its seeds; time and scores are of the first.
    """
    names = sorted({name for result in results for name in result.get("scores", ())})
    head = [
        "method", "setting", "CUR", "MACs", "time", "MSE to uncached", "median", "PSNR",
        "MSE to exact", *names, "training",
    ]  # fmt: skip
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    groups: dict[tuple[str | None, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["level"], result["method"]), []).append(result)
    for (_, method), found in groups.items():
        lines.append(" | ".join(_cells_of_line(method, found, names)))
    return "\n".join(f"| {line} |" for line in lines)


def _cells_of_line(method: str, found: list[dict], names: list[str]) -> list[str]:
    first = next(result for result in found if "scores" in result)
    timing, scores = first["measured_speedup"], first["scores"]
    return [
        method,
        "" if len(found) > 1 else first["setting"],
        "" if first["cur"] is None else f"{statistics.fmean(r['cur'] for r in found):.1%}",
        f"{statistics.fmean(r['theoretical_speedup'] for r in found):.2f}x",
        f"{timing['ratio']:.2f}x",
        _spread([r["against_uncached"]["mse_mean"] for r in found]),
        readable(statistics.fmean(r["against_uncached"]["mse_median"] for r in found)),
        f"{statistics.fmean(r['against_uncached']['psnr_mean'] for r in found):.1f} dB",
        _spread([r["against_exact"]["mse_mean"] for r in found if "against_exact" in r]),
        *(f"{scores[name]:.2f}" if name in scores else "" for name in names),
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


def _spread(values: list[float]) -> str:
    """Mean over seeds, and their range in brackets."""
    if not values:
        return ""
    mean = readable(statistics.fmean(values))
    return (
        mean if len(values) == 1 else f"{mean} ({readable(min(values))} to {readable(max(values))})"
    )
