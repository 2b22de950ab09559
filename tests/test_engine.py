"""The engine: the same images as the model's own forward, with what is kept planned ahead."""

import contextlib
import itertools
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Golden, pytest_configure, relative
from fake_graphs import FakeGraph, fake_cuda_graphs
from families import by_branches, limit_windows, other_batches, tiny, tiny_trajectories
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from harmonica import engine, fusion
from harmonica.backbone import load_backbone, reduce_precision, set_float32_products
from harmonica.baselines.delta_dit import delta_dit
from harmonica.baselines.fixed import fora, random_schedule
from harmonica.budget import Budget
from harmonica.config import BackboneConfig
from harmonica.engine import EAGER, Acceleration, Engine, PlannedReplay, Recipe, planned_cache_bytes
from harmonica.errors import HarmonicaError, HarmonicaWarning
from harmonica.flops import Costs, measure_costs
from harmonica.fusion import Update, add_updates, embed, head, join, run_branches
from harmonica.options import build_parser, resolve
from harmonica.precision import single_precision
from harmonica.predictors import LAST, Extrapolation, Learned
from harmonica.replay_plan import Add, Compute, plan_replay
from harmonica.samplers import State, create_sampler
from harmonica.schedule import Schedule
from harmonica.timing import timed
from harmonica.training.config import TrainConfig
from harmonica.training.learner import StepwiseLearner
from harmonica.training.trainer import Trainer
from models.layers import gated
from models.transformer import call_block

NAMES = tuple(f"blocks.{i}.{k}" for i in range(3) for k in ("attn", "mlp"))
COSTS = Costs(NAMES, (5, 9) * 3, 4)


def schedules(golden: Golden) -> list[Schedule]:
    steps, costs = golden.num_steps, golden.costs
    return [
        Schedule.full(steps, costs),
        fora(steps, costs, 3),
        *(random_schedule(steps, costs, Budget(cur=cur), seed=1) for cur in (0.2, 0.5, 0.8)),
    ]


@torch.no_grad()
def test_replay_equals_caching_branches_bit_for_bit(golden: Golden):
    for schedule in schedules(golden):
        batch = golden.trajectories()
        assert torch.equal(Engine(schedule)(batch), by_branches(batch, schedule))
    full = golden.trajectories()
    assert torch.equal(Engine(None)(full), full.walk(State(full.x_T), full.predict).x)


@torch.no_grad()
def test_forecasts_replay_like_caching_branches(golden: Golden):
    steps = golden.num_steps
    learned = Learned.start(LAST, steps, len(golden.costs.names), golden.model.config.hidden_size)
    generator = torch.Generator().manual_seed(0)
    learned = replace(
        learned,
        level=0.1 * torch.randn(learned.level.shape, generator=generator),
        slope=0.1 * torch.randn(learned.level.shape, generator=generator),
    )
    index = tuple(map(float, range(steps)))
    for predictor in (Extrapolation(1, index), Extrapolation(2, index), learned):
        plain = random_schedule(steps, golden.costs, Budget(cur=0.5), seed=1)
        schedule = replace(plain, predictor=predictor)
        batch = golden.trajectories()
        forecast = Engine(schedule)(batch)
        # The predictor's weights are folded into the gates, which rounds elsewhere.
        assert relative(forecast, by_branches(batch, schedule)) < 2e-6
        assert relative(forecast, Engine(plain)(batch)) > 2e-5


@torch.no_grad()
def test_small_coefficients_count_in_half_precision():
    """bfloat16 cannot tell 1.0015 from 1."""
    batch = tiny_trajectories("dit")
    reduce_precision(batch.model, torch.bfloat16)
    plain, finals = cases("dit")[1], []
    for channels in (1, batch.model.config.hidden_size):
        learned = Learned.start(LAST, *plain.compute.shape, channels)
        learned = replace(learned, level=torch.full_like(learned.level, 0.0015))
        finals.append(Engine(replace(plain, predictor=learned))(batch))
    assert torch.equal(*finals)
    assert relative(finals[0], Engine(plain)(batch)) > 1e-4


@torch.no_grad()
def test_stochastic_samplers_replay_too(golden: Golden):
    batch = golden.trajectories(
        create_sampler("iddpm", golden.num_steps), noise=lambda s: golden.arrays["iddpm/noise"][s]
    )
    schedule = schedules(golden)[3]
    assert torch.equal(Engine(schedule)(batch), by_branches(batch, schedule))


def test_a_value_is_kept_only_while_a_later_step_reads_it():
    """Walk random plans: every read finds the last computed values, and nothing is left over."""
    for seed, depth in itertools.product(range(10), (1, 2, 3)):
        schedule = random_schedule(9, COSTS, Budget(cur=0.6), seed)
        plan = plan_replay(schedule.compute, NAMES, depth)
        kept: set[tuple[int, int]] = set()
        most = 0
        for s, step in enumerate(plan.steps):
            seen = []
            for operation in step:
                for i, *_ in operation.branches:
                    seen.append(i)
                if isinstance(operation, Add):
                    for i, block, k, steps in operation.branches:
                        assert NAMES[i] == f"blocks.{block}.{('attn', 'mlp')[k]}"
                        assert not schedule.compute[s, i]
                        computed = np.flatnonzero(schedule.compute[:s, i])
                        assert list(steps) == computed[::-1][:depth].tolist()
                        assert kept >= {(i, step) for step in steps}
                    kept -= set(operation.dropped)
                else:
                    for i, k, keeps in operation.branches:
                        assert NAMES[i] == f"blocks.{operation.block}.{('attn', 'mlp')[k]}"
                        assert schedule.compute[s, i]
                        if keeps:
                            kept.add((i, s))
                most = max(most, len(kept))
            assert seen == list(range(len(NAMES)))  # every branch once, in the model's order
        assert not kept and most == plan.peak_values


def test_consecutive_reused_branches_are_one_operation():
    row = np.ones((2, 6), dtype=bool)
    row[1, 1:5] = False
    plan = plan_replay(row, NAMES)
    assert [type(operation) for operation in plan.steps[1]] == [Compute, Add, Compute]
    assert len(plan.steps[0]) == 3  # whole blocks
    assert len(plan.steps[1][1].branches) == 4 and plan.peak_values == 4


class Watched(dict):
    """A dictionary that remembers the most entries and bytes that it held at once."""

    entries = size = 0

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.entries = max(self.entries, len(self))
        self.size = max(self.size, sum(kept.nbytes for kept in self.values()))


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_the_peak_is_the_planned_one(golden: Golden, depth):
    steps = tuple(map(float, range(golden.num_steps)))
    predictor = LAST if depth == 1 else Extrapolation(1, steps)
    for schedule in schedules(golden):
        schedule, batch = replace(schedule, predictor=predictor), golden.trajectories()
        recipe = Recipe(schedule, batch)
        replay = PlannedReplay(batch, recipe, EAGER)
        kept = replay.kept = Watched()
        batch.walk(State(batch.x_T), replay.predict)
        assert kept.entries == recipe.plan.peak_values
        rows = batch.guidance.halves * len(batch.x_T)
        planned = planned_cache_bytes(schedule, batch.model, batch.x_T.shape[-2:], rows)
        assert kept.size == planned
        assert not kept


def test_what_reuses_whole_blocks_keeps_no_branches(golden_b: Golden):
    blockwise = delta_dit(golden_b.num_steps, golden_b.costs, 2, 1, golden_b.num_steps // 2)
    assert planned_cache_bytes(blockwise, golden_b.model, (8, 8), 2) is None


@torch.no_grad()
@pytest.mark.parametrize("forecasts", [False, True])
def test_conditioning_is_made_once_a_trajectory_or_a_window(
    golden_b: Golden, forecasts, monkeypatch
):
    batch, schedule = golden_b.trajectories(), schedules(golden_b)[2]
    kind, counts = type(golden_b.model), []
    condition, steps = kind.condition, golden_b.num_steps
    if forecasts:
        line = Extrapolation(1, tuple(map(float, range(steps))))
        schedule = replace(schedule, predictor=line)

    def counting(model, t, context):
        counts.append(len(t))
        return condition(model, t, context)

    monkeypatch.setattr(kind, "condition", counting)
    rows = batch.guidance.halves * len(batch.x_T)
    whole = Engine(schedule)(batch)
    assert counts == [steps * rows]
    counts.clear()
    limit_windows(monkeypatch, batch, 3)
    assert relative(Engine(schedule)(batch), whole) < 1e-5
    assert len(counts) == -(-steps // 3) and sum(counts) == steps * rows


# Batches that do not fit into memory.


TOO_MUCH = [
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: out of memory",
]


def out_of_memory(said: str) -> RuntimeError:
    """As libraries say it; where they say nothing, torch does."""
    return RuntimeError(said) if said else torch.OutOfMemoryError()


def limited(monkeypatch, most: int, said: str = "") -> list[int]:
    """Give every engine the memory for so many samples; returns the sizes that it tries."""
    run, tried = Engine._run, []

    def attempt(engine, batch):
        tried.append(len(batch.x_T))
        if len(batch.x_T) > most:
            raise out_of_memory(said)
        return run(engine, batch)

    monkeypatch.setattr(Engine, "_run", attempt)
    return tried


@pytest.mark.parametrize("sampler", ["ddim", "iddpm"])
@torch.no_grad()
def test_a_batch_that_does_not_fit_into_memory_is_halved(golden_b, sampler, monkeypatch, capsys):
    seven = torch.arange(7) % len(golden_b.arrays["x_T"])
    noise = golden_b.arrays["iddpm/noise"][:, seven] * torch.arange(1, 8).view(-1, 1, 1, 1)
    batch = golden_b.trajectories(
        create_sampler(sampler, golden_b.num_steps),
        y=golden_b.arrays["class_labels"][seven],
        x_T=golden_b.arrays["x_T"][seven] * torch.arange(1, 8).view(-1, 1, 1, 1),
        noise=lambda s: noise[s],
        indices=range(7),
    )
    schedule = schedules(golden_b)[2]
    whole = Engine(schedule)(batch)
    tried = limited(monkeypatch, most=3)
    engine = Engine(schedule)
    assert relative(engine(batch), whole) < 1e-5
    assert tried == [7, 4, 2, 2, 2, 2]  # all parts of one size
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "7 images do not fit" in said and "2 at a time" in said
    tried.clear()
    engine(batch)
    assert tried == [2] * 4 and not capsys.readouterr().err  # known by now


@pytest.mark.parametrize("said", TOO_MUCH)
@torch.no_grad()
def test_libraries_run_out_of_memory_in_words_of_their_own(golden_b, said, monkeypatch):
    whole = Engine(None)(golden_b.trajectories())
    tried = limited(monkeypatch, 1, said)
    assert relative(Engine(None)(golden_b.trajectories()), whole) < 1e-5
    assert tried == [3, 2, 1, 1, 1]


@torch.no_grad()
def test_what_smaller_batches_do_not_help_is_raised(golden_b, monkeypatch):
    for said in ("mat1 and mat2 shapes cannot be multiplied", "CUBLAS_STATUS_EXECUTION_FAILED"):
        tried = limited(monkeypatch, 0, said)
        with pytest.raises(RuntimeError, match=said):
            Engine(None)(golden_b.trajectories())
        assert len(tried) == 1


@torch.no_grad()
def test_an_image_that_does_not_fit_into_memory_is_refused(golden_b, monkeypatch):
    tried = limited(monkeypatch, most=0)
    with pytest.raises(HarmonicaError, match="not even one image fits"):
        Engine(None)(golden_b.trajectories())
    assert tried[-1] == 1


@pytest.mark.parametrize("said", ["", TOO_MUCH[1]])
def test_training_that_does_not_fit_into_memory_is_refused(said, tmp_path, monkeypatch):
    swept = StepwiseLearner.sweep

    def sweep(learner, remaining):
        if learner.updates:
            raise out_of_memory(said)
        return swept(learner, remaining)

    monkeypatch.setattr(StepwiseLearner, "sweep", sweep)
    config = TrainConfig(num_sampling_steps=2, global_batch_size=2, results_dir=tmp_path)
    with pytest.raises(HarmonicaError) as refusal:
        Trainer(config).run()
    for named in (
        *("--global-batch-size", "--activation-checkpointing", "--lambda-batch-size"),
        "the last good checkpoint is",  # what was learned before is not lost
    ):
        assert named in str(refusal.value)


# Precision and time.


def rounding() -> tuple[str, bool]:
    """Of matrix products, and of convolutions."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def test_float32_products_are_rounded_on_a_gpu_unless_a_flag_says_otherwise():
    def precision(device, *flags):
        config = resolve(BackboneConfig, build_parser(BackboneConfig, "").parse_args(flags))
        set_float32_products(config, torch.device(device))
        return rounding()

    before, rounded, exact = rounding(), ("high", True), ("highest", False)
    try:
        assert precision("cuda") == precision("cuda", "--tf32") == rounded
        assert precision("cuda", "--no-tf32") == precision("cpu") == exact
        with pytest.raises(HarmonicaError, match="--tf32 needs a GPU"):
            precision("cpu", "--tf32")
        precision("cuda")
        load_backbone(BackboneConfig(), torch.device("cpu"))
        assert rounding() == exact
        precision("cuda")
        with single_precision():
            assert rounding() == exact
        assert rounding() == rounded
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Operations(TorchDispatchMode):
    """Notes what runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_gated_sum_in_half_precision_makes_no_copies_on_a_gpu():
    """With the autocast of a GPU, on tensors that have nothing of one but their device."""
    with FakeTensorMode(), Operations() as operations:
        x = torch.empty(2, 5, 8, device="cuda")
        gate, update = (torch.empty(2, n, 8, device="cuda", dtype=torch.half) for n in (1, 5))
        operations.seen.clear()
        torch.set_autocast_enabled("cuda", True)
        try:
            out = gated(x, gate, update)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert operations.seen == ["aten.addcmul.default"] and out.dtype == torch.float32


@torch.no_grad()
def test_a_reused_block_runs_nothing(golden: Golden):
    calls = []
    hooks = [
        module.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(golden.model.blocks)
        for module in (block.norm1, block.attn, block.norm2, block.mlp)
    ]
    schedule = fora(golden.num_steps, golden.costs, golden.num_steps)
    Engine(schedule)(golden.trajectories())
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == sorted(list(range(len(golden.model.blocks))) * 4)


# Captured trajectories.

CAPTURED = Acceleration(captures=True)


@pytest.fixture
def graphs(monkeypatch) -> list[FakeGraph]:
    """All CUDA graphs that are made: fake ones."""
    return fake_cuda_graphs(monkeypatch)


@pytest.mark.parametrize(
    ("family", "sampler"),
    [("dit", "ddim"), ("dit", "iddpm"), ("uvit", "dpm-solver"), ("pixart", "sa-solver")],
)
@pytest.mark.parametrize("window", [2, 5])
@torch.no_grad()
def test_a_replayed_graph_is_of_the_batch_at_hand(family, sampler, window, graphs, monkeypatch):
    costs = measure_costs(tiny(family))
    last = random_schedule(5, costs, Budget(cur=0.5), seed=1)
    line = Extrapolation(1, tuple(map(float, range(5))))
    learned = Learned.start(line, 5, len(costs.names), 1)
    for schedule in (None, last, replace(last, predictor=learned)):
        graphs.clear()
        engine, batches = Engine(schedule, CAPTURED), other_batches(family, sampler)
        limit_windows(monkeypatch, batches[0], window)
        finals = [engine(batch) for batch in batches]
        # The first runs as it is, the second is captured.
        assert [graph.replays for graph in graphs] == [3]
        for final, batch in zip(finals, batches, strict=True):
            assert batch.tally.evaluations == 5 * len(batch.x_T)
            assert torch.equal(final, Engine(schedule)(batch))
        assert relative(finals[3], finals[2]) > 0.1


@torch.no_grad()
def test_blocks_that_are_reused_whole_are_captured_too(graphs):
    costs = measure_costs(tiny("uvit"))
    whole_steps = replace(fora(5, costs, 2), reuses="outputs")
    for blockwise in (delta_dit(5, costs, 2, 1, 2), whole_steps):
        engine, batches = Engine(blockwise, CAPTURED), other_batches("uvit", "dpm-solver")
        for batch in batches:
            assert torch.equal(engine(batch), Engine(blockwise)(batch))
        assert graphs.pop().replays == 3


@torch.no_grad()
def test_a_graph_is_captured_before_the_clock_starts(golden_b: Golden, graphs, monkeypatch):
    run, runs, calls = Engine._run, [], []

    def counting(engine, batch):
        runs.append(batch)
        return run(engine, batch)

    monkeypatch.setattr(Engine, "_run", counting)
    for device, how in (("cuda", CAPTURED), ("cpu", EAGER)):
        engine, batch = Engine(schedules(golden_b)[2], how), golden_b.trajectories()

        def call(engine=engine, batch=batch):
            before = len(runs)
            engine(batch)
            calls.append(len(runs) - before)

        calls.clear()
        timing = timed({"a": call}, 3, torch.device(device))["a"]
        assert timing.low <= timing.median <= timing.high
        assert calls == ([1, 1, 0, 0, 0] if how.captures else [1, 1, 1, 1])
    assert len(graphs) == 1 and graphs[0].replays == 4


@torch.no_grad()
def test_graphs_share_their_memory_while_there_are_any(golden_b: Golden, graphs):
    def captured() -> Engine:
        engine = Engine(None, CAPTURED)
        for _ in range(2):
            engine(golden_b.trajectories())
        return engine

    engines = [captured()]
    engines.append(captured())
    engines[0] = captured()
    assert len({id(graph.pool()) for graph in graphs}) == 1
    engines.clear()
    captured()
    assert graphs[3].pool() is not graphs[0].pool()  # which torch takes back


@torch.no_grad()
def test_without_a_graph_sampling_goes_on(golden_b: Golden, graphs, monkeypatch):
    streams, generator = ["main"], SimpleNamespace(state="free")
    generator.clone_state = lambda: generator.state
    generator.graphsafe_set_state = lambda state: setattr(generator, "state", state)

    @contextlib.contextmanager
    def failing(graph, pool=None):
        streams.append("of the capture")  # where torch remains, as its own context fails
        generator.state = "waiting for the end of the capture"
        yield
        raise RuntimeError("CUDA error: operation not permitted\nCompile with TORCH_USE_CUDA_DSA")

    @contextlib.contextmanager
    def stream(chosen):
        try:
            yield
        finally:
            streams.append(chosen)

    monkeypatch.setattr(torch.cuda, "graph", failing)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    engine, batch = Engine(schedules(golden_b)[2], CAPTURED), golden_b.trajectories()
    expected = engine(batch)
    with pytest.warns(HarmonicaWarning, match=r"\(CUDA error: operation not permitted\)") as said:
        assert torch.equal(engine(batch), expected) and torch.equal(engine(batch), expected)
    assert len(said) == len(graphs) == 1 and not engine.how.captures
    assert streams == ["main", "of the capture", "main"] and generator.state == "free"


# Compiled blocks.

COMPILED = Acceleration(compiles=True)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
# Graphs that ``cases`` take, in 67, 178 and 68 calls of what is compiled: blocks with consecutive
# branches and the head, which add up to four updates of either kind; embedding; long skips; sums.
MOST_GRAPHS = {"dit": 20, "uvit": 15, "pixart": 22}


@contextlib.contextmanager
def counted_graphs():
    """What Dynamo counts, started anew."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def cases(family: str) -> list[Schedule]:
    """Random decisions, replayed with last values and with forecasts."""
    costs = measure_costs(tiny(family))
    last = [random_schedule(5, costs, Budget(cur=cur), seed=1) for cur in (0.3, 0.6)]
    return [*last, replace(last[1], predictor=Extrapolation(1, tuple(map(float, range(5)))))]


def replay_compiled(family: str, tolerance: float, dtype: torch.dtype = torch.float32) -> None:
    """Compiled replay of every case is the eager one, with few graphs and no break."""
    batch = tiny_trajectories(family)
    reduce_precision(batch.model, dtype)
    full = batch.walk(State(batch.x_T), batch.predict).x
    with counted_graphs() as counters:
        for schedule in cases(family):
            eager = Engine(schedule)(batch)
            assert relative(Engine(schedule, COMPILED)(batch), eager) < tolerance
            assert relative(full, eager) > 2 * tolerance
        assert counters["stats"]["unique_graphs"] <= MOST_GRAPHS[family]
        assert not counters["graph_break"]


@pytest.mark.parametrize("family", MOST_GRAPHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_replay_is_traced_whole_with_few_graphs(family, dtype, traced, monkeypatch):
    limit_windows(monkeypatch, tiny_trajectories(family), 2)
    replay_compiled(family, 1e-6, dtype)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "has_gates"), [("dit", True), ("pixart", True), ("uvit", False)]
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_is_compiled_adds_few_updates_of_few_kinds(family, has_gates, depth, monkeypatch):
    """Every number and mixture is a graph of its own, of which torch allows so many."""
    absorbed, added = [], []

    def noting(function):
        def run(*arguments):
            if function in (run_branches, head):
                absorbed.append(arguments[{run_branches: 3, head: 2}[function]])
            if function is add_updates:
                added.append(arguments[1])
            return function(*arguments)

        return run

    monkeypatch.setattr(fusion, "fused", noting)
    batch = tiny_trajectories(family)
    steps = tuple(map(float, range(5)))
    for schedule in cases(family):
        predictor = LAST if depth == 1 else Extrapolation(depth - 1, steps)
        schedule = replace(schedule, predictor=predictor)
        eager = Engine(schedule)(batch)
        assert relative(Engine(schedule, COMPILED)(batch), eager) < 1e-6
    assert all(update.is_gated is has_gates for taken in absorbed for update in taken)
    for taken in absorbed:
        # Mixtures are graphs of their own, and so is what is read twice.
        assert len({update.kind for update in taken[1:]}) <= 1
        tensors = [value for update in taken for value in update.values]
        assert len(set(map(id, tensors))) == len(tensors)
    most = max(map(len, absorbed))
    assert most <= engine.ABSORBED and (family == "uvit" or most > 1)
    assert all(len({update.kind for update in together}) == 1 for together in added)
    values = [sum(len(update.values) for update in together) for together in added]
    assert 1 < max(values) <= engine.ARITIES[0]


@pytest.mark.parametrize("family", MOST_GRAPHS)
@torch.no_grad()
def test_weights_are_folded_into_gates_without_rounding(family):
    """Also into those of half precision, and where a branch has none."""
    batch, schedule = tiny_trajectories(family), cases(family)[2]
    reduce_precision(batch.model, torch.bfloat16)
    recipe, window = Recipe(schedule, batch), batch.window(0)
    factors, seen = recipe.factors(window), set()
    for s, step in enumerate(recipe.plan.steps):
        added = [operation for operation in step if isinstance(operation, Add)]
        for i, block, k, steps in itertools.chain(*(each.branches for each in added)):
            gate = window[s].blocks[block][k].gate
            weights = schedule.predictor.weights(s, i, steps)
            folded = factors.pop((s, i))
            assert not any(factor.any() for factor in folded[len(weights) :])
            for factor, weight in zip(folded, weights, strict=False):
                exact = torch.tensor(weight, dtype=torch.float32)
                exact = exact if gate is None else gate.float() * exact
                assert factor.dtype == torch.float32 and torch.equal(
                    factor, exact.expand_as(factor)
                )
                seen.add((gate is None, len(steps)))
    assert not factors
    assert {count for _, count in seen} == {1, 2}
    has_gates = {"dit": {True}, "pixart": {True, False}, "uvit": {False}}
    assert {not lacks for lacks, _ in seen} == has_gates[family]


@torch.no_grad()
def test_reuse_of_whole_blocks_compiles_all_that_is_run(monkeypatch):
    compiled, costs = set(), measure_costs(tiny("uvit"))
    monkeypatch.setattr(fusion, "fused", lambda function: compiled.add(function) or function)
    batch = tiny_trajectories("uvit")
    for schedule in (delta_dit(5, costs, 2, 1, 2), replace(fora(5, costs, 2), reuses="outputs")):
        eager = Engine(schedule)(batch)
        assert not compiled
        assert torch.equal(Engine(schedule, COMPILED)(batch), eager)
        assert compiled == {embed, call_block, join, head}
        compiled.clear()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("family", MOST_GRAPHS)
@torch.no_grad()
def test_compiled_replay_of_every_family_is_the_same_up_to_rounding(family):
    replay_compiled(family, 1e-5)


@pytest.mark.slow
@needs_compiler
@torch.no_grad()
def test_compiled_replay_in_half_precision_differs_by_its_rounding():
    """2 % of the image, 1.1 % was seen: fused, intermediate values are not rounded to 8 bits."""
    batch, schedule = tiny_trajectories("dit"), cases("dit")[1]
    exact = Engine(schedule)(batch)
    reduce_precision(batch.model, torch.bfloat16)
    eager, compiled = Engine(schedule)(batch), Engine(schedule, COMPILED)(batch)
    assert relative(compiled, eager) < 0.02
    assert relative(compiled, exact) < 1.25 * relative(eager, exact) < 0.02
    # Reuse has to be seen beyond rounding.
    assert relative(Engine(None)(batch), eager) > 0.04


@pytest.mark.slow
@needs_compiler
@torch.no_grad()
def test_compiled_replay_of_a_trained_model_is_the_same_up_to_rounding(golden_b: Golden):
    with counted_graphs() as counters:
        for schedule in schedules(golden_b):
            batch = golden_b.trajectories()
            assert relative(Engine(schedule, COMPILED)(batch), by_branches(batch, schedule)) < 1e-5
        blockwise = delta_dit(golden_b.num_steps, golden_b.costs, 2, 1, golden_b.num_steps // 2)
        replayed = Engine(blockwise)(golden_b.trajectories())
        assert relative(Engine(blockwise, COMPILED)(golden_b.trajectories()), replayed) < 1e-5
        # Attention, MLP, whole blocks and head, which add 0 to 4 before; embedding; blocks by
        # themselves; sums.
        assert counters["stats"]["unique_graphs"] <= 4 * 5 + 1 + 1 + 4
        assert not counters["graph_break"]


@pytest.mark.parametrize("weights_stand_alone", [False, True])
def test_adding_in_groups_is_adding_one_by_one(golden_b: Golden, weights_stand_alone, monkeypatch):
    """Eighteen branches, of which every sixth has no gate: in groups of 8, 4, 2 and 1 of a kind."""
    x, *values = torch.randn(19, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    alone = torch.tensor([0.1]) if weights_stand_alone else None
    factors = [alone if k % 6 == 5 else value[:, :1].sin() for k, value in enumerate(values)]
    updates = [Update((v,), (factor,)) for v, factor in zip(values, factors, strict=True)]
    expected = x
    for (value,), (factor,) in sorted(updates, key=lambda update: not update.is_gated):
        expected = torch.addcmul(expected, torch.ones(1) if factor is None else factor, value)
    groups = []

    def counting(function):
        return lambda x, updates: groups.append(len(updates)) or function(x, updates)

    monkeypatch.setattr(fusion, "fused", counting)
    batch = golden_b.trajectories()
    replay = PlannedReplay(batch, Recipe(None, batch), COMPILED)
    assert torch.equal(replay._complete(x, updates), expected)
    assert groups == [8, 4, 2, 1, 2, 1]


@torch.no_grad()
def test_running_some_branches_adds_what_the_stream_lacks_first(golden_b: Golden):
    batch = golden_b.trajectories()
    parts, block = batch.conditioning(0).blocks[0], golden_b.model.blocks[0]
    rows = torch.cat([batch.x_T] * batch.guidance.halves)
    x = golden_b.model.embed(rows, batch.conditioning(0))
    before = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    complete = x + 0.5 * parts[1].gate * before
    lacking = [Update((before,), (0.5 * parts[1].gate,))]
    after, (value,) = run_branches(block, (1,), x, lacking, parts)
    assert relative(value, block.mlp_update(complete, parts[1])) < 1e-5
    assert relative(after, complete) < 1e-6
    # All but the last update.
    after, (first, _) = run_branches(block, (0, 1), x, [], parts)
    assert relative(after, x + parts[0].gate * first) < 1e-6


@pytest.mark.parametrize(
    ("marks", "hidden"),
    [("not slow", True), ("", True), ("slow or not slow", True), ("not gpu", True), ("gpu", False)],
)
def test_only_tests_of_a_gpu_see_one(marks, hidden, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr=marks)))
    seen = [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    assert subprocess.check_output(seen, text=True).strip() == ("" if hidden else "3")
