"""What evaluate.py does: samples in, a table of scores and ``evaluation.json`` out."""

import json
from importlib.metadata import version

import torch
from accelerate import PartialState

from harmonica import __version__
from harmonica.backbone import check_gpus
from harmonica.files import write_atomically
from harmonica.metrics.collect import Rows, collect
from harmonica.metrics.config import EvaluateConfig
from harmonica.metrics.extractor import Extractor
from harmonica.metrics.images import pixels
from harmonica.metrics.instruments import Instruments, choose_instruments
from harmonica.metrics.paired import paired_rows
from harmonica.metrics.reference import Reference
from harmonica.metrics.scores import COLUMNS, PAIRED, all_scores, warnings_about
from harmonica.metrics.subject import Subject, open_subject
from harmonica.options import plain
from harmonica.output import check_output, commit

REPORT = "evaluation.json"
LIBRARIES = ("torch", "torchvision", "torch-fidelity", "torchmetrics")


def evaluate_and_report(config: EvaluateConfig) -> str | None:
    """Measure, write ``evaluation.json``; the table on the main process, None on the others.

    Raises:
        HarmonicaError: bad input, or a score that would not be a number.
    """
    check_output(config.out, REPORT)
    check_gpus()
    state = PartialState(cpu=not torch.cuda.is_available())
    # What is missing is fetched or encoded by one process of a machine, and the others wait at its
    # lock for as long as that takes.
    subject = open_subject(config, state.device)
    instruments = choose_instruments(config, subject, state.device)
    rows = measure(subject, instruments, config.batch_size, state)
    reference_rows = measure_reference(
        instruments.reference,
        instruments.extractor,
        instruments.metrics,
        config.batch_size,
        state,
    )
    state.destroy_process_group()
    if not state.is_main_process:
        return None
    reference = instruments.reference
    if reference is not None:
        reference = reference.completed(reference_rows)
    scores = all_scores(rows, instruments, reference)
    record = {
        "config": plain(config),
        **_provenance(subject, instruments),
        "commit": commit(),
        "device": str(state.device),
        "processes": state.num_processes,
        "versions": _versions(instruments),
        "scores": {score.name: score.value for score in scores},
        "per_image": {PAIRED[name][0]: rows[name].tolist() for name in PAIRED if name in rows},
        "warnings": warnings_about(rows, subject, instruments, reference),
        "left_out": list(instruments.left_out),
    }
    write_atomically(config.out / REPORT, json.dumps(record, indent=1).encode())
    lines = [*_heading(subject, record), *(f"{score.name:38} {score.shown}" for score in scores)]
    lines += [f"left out: {line}" for line in record["left_out"]]
    lines += [f"warning: {line}" for line in record["warnings"]]
    return "\n".join([*lines, f"{'report':38} {config.out / REPORT}"])


def measure(
    subject: Subject, instruments: Instruments, batch_size: int, state: PartialState
) -> Rows:
    """What is known of every sample by itself, (count, ...)."""
    columns = {COLUMNS[metric] for metric in instruments.metrics}

    def rows_of(indices: range) -> Rows:
        batch = subject.samples.read(indices)
        rows: Rows = {}
        if instruments.extractor is not None:
            found = instruments.extractor(batch.images)
            rows |= {name: value for name, value in found.items() if name in columns}
        if subject.against is not None:
            rows |= paired_rows(batch, subject.against.read(indices), instruments.lpips)
        if instruments.clip is not None:
            rows["clip"] = instruments.clip(batch.images, indices)
        return rows

    return collect(subject.count, batch_size, rows_of, state, "samples")


def measure_reference(
    reference: Reference | None,
    extractor: Extractor | None,
    metrics: tuple[str, ...],
    batch_size: int,
    state: PartialState,
) -> Rows:
    """What the metrics need of images of the reference; nothing where its file has it all."""
    columns = set() if reference is None else reference.columns(metrics)
    if not columns:
        return {}

    def rows_of(indices: range) -> Rows:
        found = extractor(reference.images.read(indices).images)
        return {name: value for name, value in found.items() if name in columns}

    return collect(len(reference.images), batch_size, rows_of, state, "reference")


def _versions(instruments: Instruments) -> dict[str, str]:
    libraries = LIBRARIES if instruments.clip is None else (*LIBRARIES, "transformers")
    return {"harmonica": __version__, **{name: version(name) for name in libraries}}


def _provenance(subject: Subject, instruments: Instruments) -> dict:
    """Where everything came from, by content."""
    plan = subject.plan
    schedule = None if plan is None else plan.schedule
    inputs = {
        "samples": subject.samples,
        "against": subject.against,
        "reference": instruments.reference,
    }
    networks = {
        "extractor": instruments.extractor,
        "lpips": instruments.lpips,
        "clip": instruments.clip,
    }
    return {
        "weights_hash": None if plan is None else plan.backbone.weights_hash,
        "setting": None if plan is None else plan.setting,
        "schedule": None if schedule is None else schedule.to_dict(),
        "count": subject.count,
        "size": list(subject.samples.size),
        **{
            role: None if found is None else {"name": found.name, "sha256": found.content_hash()}
            for role, found in inputs.items()
        },
        **{
            role: None if found is None else {"name": found.name, "sha256": found.sha256}
            for role, found in networks.items()
        },
    }


def _heading(subject: Subject, record: dict) -> list[str]:
    """What the scores of the table are of, and against what."""
    samples = f"{subject.samples.name}, {subject.count} of {pixels(subject.samples.size)}"
    lines = [f"{'samples':38} {samples}"]
    if subject.plan is not None:
        lines.append(f"{'weights':38} {subject.plan.backbone.weights_hash}")
        if subject.plan.setting:
            lines.append(f"{'setting':38} {subject.plan.setting}")
        if subject.plan.schedule is not None:
            lines.append(f"{'cache-utilisation ratio (CUR)':38} {subject.plan.schedule.cur:.1%}")
    if subject.speedup is not None:
        lines.append(f"{'theoretical speed-up (MACs)':38} {subject.speedup:.2f}x")
    for role in ("reference", "extractor", "against"):
        if record[role] is not None:
            content = record[role]["sha256"]
            suffix = "" if content is None else f", {content[:16]}"
            lines.append(f"{role:38} {record[role]['name']}{suffix}")
    return lines
