"""What needs a GPU: `bash scripts/test.sh -m gpu --numprocesses 1`."""

import contextlib
import gc
import io
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import load_golden, relative
from diffusers import AutoencoderKL
from families import limit_windows, other_batches, tiny
from test_benchmarks import load, run
from test_block_runner import gradients

from harmonica.autoencoder import Decoder
from harmonica.backbone import load_backbone
from harmonica.baselines.delta_dit import delta_dit
from harmonica.baselines.fixed import fora, random_schedule
from harmonica.budget import Budget
from harmonica.config import BackboneConfig
from harmonica.denoise import Trajectories
from harmonica.engine import EAGER, Acceleration, Engine
from harmonica.errors import HarmonicaWarning
from harmonica.flops import measure_costs
from harmonica.fusion import block_runner
from harmonica.precision import single_precision
from harmonica.predictors import LAST, Extrapolation, Learned
from harmonica.randomness import Draws
from harmonica.router_file import load_router
from harmonica.samplers import SAMPLERS, State
from harmonica.sampling import sample, trajectories
from harmonica.schedule import Schedule
from harmonica.training.config import TrainConfig
from harmonica.training.trainer import Trainer
from models import SDXL
from models.layers import gated

pytestmark = pytest.mark.gpu
GPU, GB = torch.device("cuda"), 10**9
CAPTURED = Acceleration(captures=True)


@pytest.fixture(autouse=True)
def another_run():
    """Accelerate knows one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


# Captured trajectories.


def compare_captured(
    schedule: Schedule, batches: list[Trajectories], how: Acceleration, tolerance: float
) -> None:
    """Batches of a graph with eager ones: the second captures it, later ones replay it."""
    eager, captured = Engine(schedule), Engine(schedule, how)
    with torch.inference_mode():
        finals = [captured(batch) for batch in batches]
        for final, batch in zip(finals, batches, strict=True):
            expected = eager(batch)
            assert relative(final, expected) < tolerance
            # Reuse has to be seen beyond that.
            assert relative(Engine(None)(batch), expected) > 2 * tolerance
    assert relative(finals[2], finals[1]) > 0.1
    assert captured.how == how and captured._captured.keys() == {batches[0].x_T.shape}


def compare_bundled(config: BackboneConfig, tolerance: float) -> None:
    backbone = load_backbone(config, GPU)
    schedule = random_schedule(6, backbone.costs, Budget(cur=0.5), seed=0)
    draws = Draws(0, "sample")
    batches = [trajectories(backbone, draws, range(k, k + 4)) for k in (0, 4, 8)]
    compare_captured(schedule, batches, backbone.how, tolerance)
    latents = sample(backbone, schedule, draws, range(6), batch_size=4)
    assert latents.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_captured_trajectories_equal_eager_ones(sampler):
    compare_bundled(BackboneConfig(sampler=sampler, num_sampling_steps=6, compile=False), 1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 5e-3), ("bf16", 0.05), ("fp16", 0.02)])
def test_compiled_and_captured_trajectories_equal_eager_ones(precision, tolerance):
    compare_bundled(BackboneConfig(num_sampling_steps=6, mixed_precision=precision), tolerance)


def on_gpu(batch: Trajectories) -> Trajectories:
    return replace(
        batch,
        model=batch.model.to(GPU),
        y=batch.y.to(GPU),
        x_T=batch.x_T.to(GPU),
        noise=lambda s: batch.noise(s).to(GPU),
    )


FAMILIES = [("dit", "iddpm"), ("uvit", "dpm-solver"), ("pixart", "sa-solver")]


@pytest.mark.parametrize(("family", "sampler"), FAMILIES)
@pytest.mark.parametrize(
    ("forecast", "compiles"),
    [("last", False), ("taylor2", False), ("learned", False), ("learned", True)],
)
def test_every_family_and_predictor_is_captured(family, sampler, forecast, compiles, monkeypatch):
    costs, width = measure_costs(tiny(family)), tiny(family).config.hidden_size
    steps = tuple(map(float, range(5)))
    learned = Learned.start(Extrapolation(1, steps), 5, len(costs.names), width)
    predictors = {
        "last": LAST,
        "taylor2": Extrapolation(2, steps),
        "learned": replace(learned, level=learned.level + 0.05, slope=learned.slope - 0.1),
    }
    schedule = random_schedule(5, costs, Budget(cur=0.5), seed=1)
    schedule = replace(schedule, predictor=predictors[forecast])
    batches = [on_gpu(batch) for batch in other_batches(family, sampler)]
    limit_windows(monkeypatch, batches[0], 2)
    how = replace(CAPTURED, compiles=compiles)
    with single_precision():  # earlier tests allow TensorFloat-32
        compare_captured(schedule, batches, how, 1e-3 if compiles else 1e-5)


@pytest.mark.parametrize("compiles", [False, True])
def test_blocks_that_are_reused_whole_are_captured(compiles):
    costs = measure_costs(tiny("uvit"))
    batches = [on_gpu(batch) for batch in other_batches("uvit", "dpm-solver")]
    for schedule in (delta_dit(5, costs, 2, 1, 2), replace(fora(5, costs, 2), reuses="outputs")):
        how = replace(CAPTURED, compiles=compiles)
        with single_precision():
            compare_captured(schedule, batches, how, 1e-3 if compiles else 1e-5)


@torch.inference_mode()
def test_engines_side_by_side_share_their_memory():
    backbone = load_backbone(BackboneConfig(num_sampling_steps=6, compile=False), GPU)
    batch = trajectories(backbone, Draws(0, "sample"), range(256))
    schedule = random_schedule(6, backbone.costs, Budget(cur=0.5), seed=0)
    engines = [Engine(None, CAPTURED), Engine(schedule, CAPTURED), Engine(None, CAPTURED)]
    expected = [Engine(engine.schedule)(batch) for engine in engines]
    torch.cuda.empty_cache()
    reserved = [torch.cuda.memory_reserved()]
    for engine in engines:
        for _ in range(2):
            engine(batch)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    # The third graph is like the first, whose memory it takes.
    assert reserved[3] - reserved[2] < 0.5 * (reserved[1] - reserved[0])
    for _ in range(2):
        for engine, final in zip(engines, expected, strict=True):
            assert relative(engine(batch), final) < 1e-5
    pools = {graph.graph.pool() for engine in engines for graph in engine._captured.values()}
    assert len(pools) == 1
    # Where all graphs are gone, so is their memory: another begins anew.
    engines.clear()
    del engine
    gc.collect()
    again = Engine(None, CAPTURED)
    for _ in range(3):
        assert relative(again(batch), expected[0]) < 1e-5
    assert again.how.captures


@torch.inference_mode()
def test_a_capture_that_fails_leaves_no_trace(monkeypatch):
    backbone = load_backbone(BackboneConfig(num_sampling_steps=6, compile=False), GPU)
    batch = trajectories(backbone, Draws(0, "sample"), range(4))
    engine, expected, evaluate = Engine(None, CAPTURED), Engine(None)(batch), Trajectories.evaluate

    def reading(batch, forward, s, x):
        x.sum().item()  # what must not happen during capture
        return evaluate(batch, forward, s, x)

    with monkeypatch.context() as patched:
        patched.setattr(Trajectories, "evaluate", reading)
        engine(batch)
        with pytest.warns(HarmonicaWarning, match="no CUDA graph could be captured") as said:
            for _ in range(2):
                assert relative(engine(batch), expected) < 1e-5
    warned = [warning for warning in said if issubclass(warning.category, HarmonicaWarning)]
    assert len(warned) == 1 and not engine.how.captures
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(2, device=GPU).isfinite().all()  # generators are not left in a capture
    torch.cuda.empty_cache()
    other = Engine(None, CAPTURED)
    for _ in range(3):
        assert relative(other(batch), expected) < 1e-5
    assert other.how.captures


# Memory.


@torch.inference_mode()
def halved() -> tuple[int | None, float, str]:
    """A batch of 256 in six tenths of the memory that it takes.

    Returns:
        How many images fitted, how far they are from those of the whole batch, and what was said.
    """
    backbone = load_backbone(BackboneConfig(num_sampling_steps=2, compile=False), GPU)
    batch = trajectories(backbone, Draws(0, "sample"), range(256))
    Engine(None)(batch)
    needed = -torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole = Engine(None)(batch)
    needed += torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    most = torch.cuda.memory_reserved() + 0.6 * needed
    torch.cuda.set_per_process_memory_fraction(most / total)
    engine, said = Engine(None), io.StringIO()
    with contextlib.redirect_stderr(said):
        error = relative(engine(batch), whole)
    return engine.most, error, said.getvalue()


def test_a_batch_that_does_not_fit_is_halved():
    # In a process of its own: what other tests left of the memory would serve a part of the batch.
    with get_context("spawn").Pool(1) as pool:
        most, error, said = pool.apply(halved)
    assert most < 256 and "256 images do not fit" in said
    # Other kernels for other sizes, which round factors.
    assert error < 5e-3


@torch.no_grad()
def test_a_gated_sum_in_half_precision_allocates_its_result_alone():
    x = torch.randn(16, 256, 1152, device=GPU)
    update = torch.randn(16, 256, 1152, device=GPU, dtype=torch.bfloat16)
    gate = torch.randn(16, 1, 1152, device=GPU, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        out = gated(x, gate, update)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * out.nbytes
    assert relative(out, x.double() + gate.double() * update.double()) < 1e-6


@pytest.mark.parametrize(("checkpoints", "most"), [(True, 8 * GB), (False, 14 * GB)])
def test_training_fits(checkpoints, most, monkeypatch, tmp_path):
    """DiT-XL/2 at 256 pixels, 16 rows; with checkpoints as its preset runs on small GPUs."""
    monkeypatch.setattr("harmonica.training.trainer.load_decoder", lambda *arguments: None)
    small = ("--activation-checkpointing", "--lambda-batch-size", "16", "--lambda-rows", "16")
    found = run(
        load("bench_training"), monkeypatch, tmp_path / "out.json", "--model", "DiT-XL/2",
        "--image-size", "256", "--mixed-precision", "bf16", "--num-sampling-steps", "20",
        "--global-batch-size", "16", "--no-compile", *(small if checkpoints else ()),
    )  # fmt: skip
    # Weights alone are 1.4 GB.
    assert 2 * GB < found["peak_device_bytes"] < most


def test_an_image_of_2048_pixels_fits(monkeypatch, tmp_path):
    """PixArt-Sigma at half of its branches reused, and an autoencoder of Stable Diffusion XL's."""
    found = run(
        load("bench_sampling"), monkeypatch, tmp_path / "out.json", "--model", "PixArt-Sigma-XL/2",
        "--image-size", "2048", "--mixed-precision", "bf16", "--num-sampling-steps", "4",
        "--num-images", "1", "--no-compile",
    )  # fmt: skip
    assert 4 * GB < found["peak_device_bytes_cached"] < 24 * GB
    widths = (128, 256, 512, 512)
    autoencoder = AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, sample_size=1024, scaling_factor=SDXL.scale,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    decode = Decoder(SDXL, autoencoder.to(GPU).eval())
    torch.cuda.reset_peak_memory_stats()
    assert decode(torch.randn(1, 4, 256, 256, device=GPU)).shape == (1, 3, 2048, 2048)
    assert 3 * GB < torch.cuda.max_memory_allocated() < 24 * GB


def test_a_sampling_benchmark_measures_the_gpu(monkeypatch, tmp_path):
    script = load("bench_sampling")
    found = run(script, monkeypatch, tmp_path / "out.json", "--num-sampling-steps", "6")
    assert found["device"] != "cpu" and found["compiles"] and found["captures"]
    assert found["images_at_once"] == found["rows"] / 2 == 8
    assert 0 < found["peak_device_bytes_uncached"] < found["peak_device_bytes_cached"]
    # No GPU that torch still runs on is slower than this.
    assert found["matrix_product_macs_per_second"] > 1e12
    assert found["matrix_product_macs_per_second"] > found["uncached_macs_per_second"]


# Training.


@pytest.mark.parametrize(
    ("kind", "compiles", "checkpoints"),
    [("soft", False, True), ("soft", True, False), ("soft", True, True), ("hard", True, True)],
)
def test_compiled_and_checkpointed_steps_have_the_same_gradients(kind, compiles, checkpoints):
    recorded = load_golden("b")
    arrays = {name: value.to(GPU) for name, value in recorded.arrays.items()}
    golden = replace(recorded, arrays=arrays, model=recorded.model.to(GPU))
    with single_precision():
        plain, end = gradients(golden, block_runner(False, False), kind)
        found, other = gradients(golden, block_runner(compiles, checkpoints), kind)
    assert plain.device.type == GPU.type and plain.any()
    assert relative(found, plain) < 1e-3 and relative(other, end) < 1e-4


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_on_a_gpu(precision, tmp_path):
    trainer = Trainer(
        TrainConfig(
            num_sampling_steps=4, global_batch_size=8, max_steps=9, mixed_precision=precision,
            results_dir=tmp_path,
        )
    )  # fmt: skip
    directory = trainer.run()
    assert load_router(directory.path).schedule.cur == 0.5
    backbone, draws = replace(trainer.backbone, how=EAGER), Draws(0, "sample")
    full = Schedule.full(4, backbone.costs)
    replayed = sample(backbone, full, draws, range(4))
    batch = trajectories(backbone, draws, range(4))
    with torch.inference_mode():
        assert torch.equal(replayed, batch.walk(State(batch.x_T), batch.predict).x.cpu())


def test_the_trajectory_objective_on_a_gpu(tmp_path):
    config = TrainConfig(
        objective="trajectory", predictor="learned", num_sampling_steps=4, global_batch_size=4,
        max_steps=3, held_out_every=1, held_out_batch_size=16, refine=2, results_dir=tmp_path,
    )  # fmt: skip
    trainer = Trainer(config)
    directory = trainer.run()
    uncached = trainer.learner.values.held_out.uncached
    assert uncached.how.captures and len(uncached._captured) == 1
    assert load_router(directory.path).schedule.cur == 0.5
    errors = [error for _, error in trainer.learner.best.history]
    assert 0 < errors[-1] <= 1.001 * errors[0]
