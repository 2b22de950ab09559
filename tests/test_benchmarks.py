"""The benchmarks run, and report what they say they do."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from harmonica.backbone import load_backbone
from harmonica.config import BackboneConfig
from harmonica.denoise import Trajectories
from harmonica.engine import Engine
from harmonica.randomness import Draws
from harmonica.sampling import trajectories
from harmonica.schedule import Schedule
from harmonica.timing import machine


def load(name: str):
    """A script, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, out, *arguments: str) -> dict:
    """What it writes for these flags."""
    flags = [*arguments, "--random-weights", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["bench", *flags])
    script.bench()
    return json.loads(out.read_text())


@pytest.fixture
def sampling(monkeypatch):
    script = load("bench_sampling")
    monkeypatch.setitem(script.PEAK_SIZE, "cpu", 64)
    return script


def test_a_sampling_benchmark(sampling, monkeypatch, tmp_path, capsys):
    found = run(
        sampling, monkeypatch, tmp_path / "out.json", "--num-sampling-steps", "2",
        "--num-images", "1", "--predictor", "taylor1",
    )  # fmt: skip
    assert found["config"]["target_cur"] == found["cur"] == 0.5
    assert found["rows"] == 2 and found["compiles"] is found["captures"] is False
    assert found["theoretical_speedup"] > 1.8
    uncached, cached = (found[f"seconds_{kind}"] for kind in ("uncached", "cached"))
    pair = uncached["median"] / cached["median"]  # the only one
    assert found["measured_speedup"] == pair and found["measured_speedup_range"] == [pair, pair]
    assert found["efficiency"] == pytest.approx(pair / found["theoretical_speedup"])
    assert 2**27 < found["peak_process_bytes"] < 2**37
    # The second of two steps reuses all 24 branches: 64 tokens of width 192 in float32.
    assert found["cache_bytes"] == 24 * 2 * 64 * 192 * 4
    assert {"seconds_uncached", "seconds_cached", "seconds_cached_last_values"} <= found.keys()
    assert "2.2 MiB" in capsys.readouterr().out


def test_a_sampling_benchmark_says_how_much_it_did_at_once(sampling, monkeypatch, tmp_path):
    run_whole = Engine._run

    def attempt(engine, batch):
        if engine.schedule is None and len(batch.x_T) > 2:
            raise torch.OutOfMemoryError
        return run_whole(engine, batch)

    arguments = ("--num-sampling-steps", "2", "--num-images", "4")
    whole = run(sampling, monkeypatch, tmp_path / "out.json", *arguments)
    monkeypatch.setattr(Engine, "_run", attempt)
    halved = run(sampling, monkeypatch, tmp_path / "halved.json", *arguments)
    assert (whole["images_at_once"], halved["images_at_once"]) == (4, 2)
    assert whole["rows"] == halved["rows"] == 8


def test_a_sampling_benchmark_tells_where_time_goes(sampling, monkeypatch, tmp_path, capsys):
    arguments = ("--num-sampling-steps", "2", "--num-images", "1", "--profile")
    found = run(sampling, monkeypatch, tmp_path / "out.json", *arguments)
    kinds = {*sampling.KINDS, "others"}
    for name in ("profile_uncached", "profile_cached"):
        assert found[name].keys() == kinds and found[name]["matrix products"] > 0
    assert (
        "profile_cached                   fused by torch.compile 0.0000 s"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_per_fused_addmm_native_layer_norm_0", "fused by torch.compile"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "others"),
    ],
)
def test_kernels_are_told_apart_by_name(sampling, kernel, kind):
    assert sampling.kind_of(kernel) == kind


def test_a_sampling_benchmark_names_its_own_flag(sampling, monkeypatch, tmp_path, capsys):
    arguments = ("--num-sampling-steps", "2", "--cur", "0.99")
    with pytest.raises(SystemExit):
        run(sampling, monkeypatch, tmp_path / "out.json", *arguments)
    assert "--target-cur 0.99 is out of reach" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["bench_sampling", "bench_training"])
def test_a_benchmark_refuses_its_report_before_it_measures(script, monkeypatch, tmp_path, capsys):
    kept = tmp_path / "kept.json"
    kept.write_text("measured")
    for out, why in ((kept, "is there already"), (kept / "in.json", "cannot be written to")):
        with pytest.raises(SystemExit) as ended:
            run(load(script), monkeypatch, out)
        said = capsys.readouterr()
        assert ended.value.code == 2 and f"--out {out} {why}" in said.err and not said.out
    assert kept.read_text() == "measured" and [*tmp_path.iterdir()] == [kept]


def test_a_sampling_benchmark_measures_memory_on_a_gpu(sampling, monkeypatch):
    """Made up here: of what it is measured, not how much it is."""
    backbone = load_backbone(BackboneConfig(num_sampling_steps=2), torch.device("cpu"))
    batch = trajectories(backbone, Draws(0, "sample"), range(2))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(sampling, "load_decoder", lambda config, device: len)
    on_gpu = replace(backbone, device=torch.device("cuda"))
    schedules = {"uncached": None, "cached": Schedule.full(2, backbone.costs)}
    for random, names in ((True, ["uncached", "cached"]), (False, [*schedules, "decoding"])):
        config = sampling.BenchConfig(random_weights=random)
        found = sampling.device_memory(config, on_gpu, schedules, batch)
        assert found == {f"peak_device_bytes_{name}": 7 for name in names}
        assert sampling.device_memory(config, backbone, schedules, batch) == {}


def test_a_training_benchmark(monkeypatch, tmp_path):
    script, windows = load("bench_training"), []
    condition = Trajectories._condition

    def counting(batch, steps):
        windows.append(len(steps))
        return condition(batch, steps)

    monkeypatch.setattr(Trajectories, "_condition", counting)
    found = run(
        script, monkeypatch, tmp_path / "out.json", "--num-sampling-steps", "4",
        "--global-batch-size", "2", "--lambda-rows", "64",
    )  # fmt: skip
    assert found["rows"] == 2
    # Four steps of the base, three forced ones, and what is left of each: two, one, none.
    assert found["refresh_evaluations"] == 4 + 3 + 3
    assert found["refresh_evaluations"] <= found["refresh_evaluations_limit"]
    # At the last step two forks run in one forward.
    assert found["refresh_forwards"] == 9 and found["refresh_rows_at_once"] == 64
    # Forwards make their conditioning as sweeps do: two of either, with warm-up, and refreshes.
    assert windows.count(4) == 2 + 2 + 2
    for timed in ("seconds_per_update", "seconds_per_refresh"):
        assert 0 < found[timed]["low"] <= found[timed]["median"] <= found[timed]["high"]
    assert found["forwards_per_update"] > 0
    assert "20000 updates of 2 rows" in found["projected_for"]
    assert "every 200 updates" in found["projected_for"]


def test_a_report_says_what_it_was_measured_on():
    found = machine(torch.device("cpu"))
    assert {"python", "cuda", "harmonica", "commit", "torch", "float32_products"} <= found.keys()
    assert found["processor"] not in ("", "x86_64")
