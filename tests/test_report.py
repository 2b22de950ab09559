"""What sample.py writes down, and what it does not."""

import json

import pytest
import torch

from harmonica import report
from harmonica.errors import HarmonicaError
from harmonica.sample_config import SampleConfig


def sampling(folder) -> SampleConfig:
    return SampleConfig(
        num_sampling_steps=4, method="fora", target_cur=0.5, num_images=2, compare=True, repeats=1,
        out=folder / "out",
    )  # fmt: skip


def test_a_report_says_what_the_cache_holds_and_what_it_was_measured_on(tmp_path):
    table = report.sample_and_report(sampling(tmp_path))
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    # Steps 1 and 3 reuse all 24 branches: two guided images, 64 tokens of width 192 in float32.
    assert written["cache_bytes"] == 24 * 4 * 64 * 192 * 4
    assert "cache at its peak, as planned" in table and "4.5 MiB" in table
    assert written["acceleration"] == {"compiles": False, "captures": False}
    assert written["machine"]["device"] == "cpu"


def test_images_that_are_not_finite_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    sample = report.sample

    def broken(*arguments):
        latents = sample(*arguments).clone()
        latents[1, 0, 0, 0] = torch.nan
        return latents

    monkeypatch.setattr(report, "sample", broken)
    with pytest.raises(HarmonicaError, match=r"sampled image 1 .* is not finite"):
        report.sample_and_report(sampling(tmp_path))
    assert not (tmp_path / "out").exists()
