"""The comparison: every method on the same seeds, resumable, tabulated and drawn."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_command
from PIL import Image

from harmonica.baselines import OF_LONG_SKIPS
from harmonica.budget import Budget
from harmonica.comparison import jobs
from harmonica.comparison.config import DEFAULT_METHODS, LEARNED, TRAINED, Cell, CompareConfig
from harmonica.comparison.routers import Routers
from harmonica.comparison.run import Comparison
from harmonica.comparison.table import markdown, overview
from harmonica.errors import HarmonicaError, HarmonicaWarning, Interrupted, OutOfReach
from harmonica.image_error import readable
from harmonica.lock import held
from harmonica.options import build_parser, resolve
from harmonica.router_file import load_router
from harmonica.training.config import ROWS
from harmonica.training.learner import StepwiseLearner
from harmonica.training.trajectory_learner import TrajectoryLearner

TINY = {
    "num_sampling_steps": 4, "num_images": 6, "num_paired": 2, "exact_steps": 8, "seeds": (0, 1),
    "train_updates": 4, "trajectory_updates": 1, "repeats": 1, "speedups": (1.5,),
}  # fmt: skip


@pytest.mark.slow
def test_every_method_in_one_comparison(tmp_path, labelled_images):
    """The quick form, smaller still, as a user runs it: table, plot, JSON."""
    out = tmp_path / "out"
    done = run_command(
        "scripts/compare.py", "--quick", "--num-sampling-steps", "4", "--num-images", "16",
        "--num-paired", "4", "--exact-steps", "8", "--train-updates", "6", "--seeds", "0",
        "--trajectory-updates", "1",
        "--speedups", "1.5", "--data", labelled_images, "--out", out, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "comparison.json").read_text())
    results = report["results"]
    seen = {result["method"] for result in results}
    # FORA has no interval near this level; whole reused steps are what --method uniform is.
    assert seen == {"uncached", *DEFAULT_METHODS} - {"fora", "fora-taylor1", *OF_LONG_SKIPS}
    for result in results:
        assert len(result["against_uncached"]["mse"]) == 4
        if result["method"] != "uncached":
            assert 1.5 * 0.85 < result["theoretical_speedup"] < 1.5 * 1.15
            assert result["against_exact"]["mse_mean"] > 0
    assert all(result["scores"]["FID-cifar"] > 0 for result in results)
    assert all(result["measured_speedup"]["ratio"] > 0 for result in results)
    table = (out / "table.md").read_text()
    assert table in done.stdout and all(f"| {method} |" in table for method in seen)
    assert report["weights_hash"] in done.stdout
    assert (out / "pareto.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    config = CompareConfig(
        **{**TINY, "num_images": 0}, methods=("harmonica", "random"),
        out=tmp_path_factory.mktemp("comparison") / "out",
    )  # fmt: skip
    Comparison(config).run()
    return config


@pytest.fixture
def finished(once, tmp_path):
    """A copy, for tests that go on with it."""
    return replace(once, out=shutil.copytree(once.out, tmp_path / "comparison"))


def test_finished_cells_are_not_computed_again(finished, monkeypatch):
    def results() -> list[dict]:
        return json.loads((finished.out / "comparison.json").read_text())["results"]

    before = results()

    def refuse(*arguments, **options):
        raise AssertionError("sampled again")

    monkeypatch.setattr("harmonica.comparison.run.sample", refuse)
    Comparison(finished).run()
    assert results() == before
    # A cell that was lost is measured again.
    next((finished.out / "cells").glob("random*_seed1.json")).unlink()
    with pytest.raises(AssertionError, match="sampled again"):
        Comparison(finished).run()


def test_a_folder_holds_one_comparison(finished, tmp_path):
    with pytest.raises(HarmonicaError, match="num_paired 2, not 3"):
        Comparison(replace(finished, num_paired=3)).run()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(HarmonicaError, match="--out"):
        Comparison(replace(finished, out=foreign)).run()
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


def test_cells_of_seeds_differ_and_share_the_reference(finished):
    report = json.loads((finished.out / "comparison.json").read_text())
    errors = {(r["method"], r["seed"]): r["against_uncached"]["mse"] for r in report["results"]}
    assert errors["uncached", 0] == [0, 0]
    assert errors["random", 0] != errors["random", 1]
    assert errors["harmonica", 0] != errors["harmonica", 1]
    # Only the first seed is timed.
    timed = [(r["method"], r["seed"]) for r in report["results"] if "measured_speedup" in r]
    assert sorted(timed) == [("harmonica", 0), ("random", 0), ("uncached", 0)]


def test_a_line_of_the_table_is_the_mean_over_seeds(finished):
    results = json.loads((finished.out / "comparison.json").read_text())["results"]
    means = [r["against_uncached"]["mse_mean"] for r in results if r["method"] == "random"]
    line = next(x for x in markdown(results).splitlines() if "| random" in x)
    numbers = re.search(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", line).groups()
    expected = [sum(means) / 2, min(means), max(means)]
    assert [float(number) for number in numbers] == pytest.approx(expected, rel=0.005)


def test_the_overview_has_a_column_for_every_level(finished):
    results = json.loads((finished.out / "comparison.json").read_text())["results"]
    worse = {"mse_mean": 0.25}
    only = [r for r in results if (r["method"], r["seed"]) == ("random", 0)]
    dearer = [
        {**r, "level": "--target-speedup 2.0", "against_uncached": worse, "against_exact": worse}
        for r in only
    ]
    first, *others = overview(results + dearer).split("\n\n")
    head, _, *lines = first.splitlines()
    assert head == "| MSE to uncached; uncached 0 | speedup 1.5 | speedup 2.0 |"
    means = [r["against_uncached"]["mse_mean"] for r in results if r["method"] == "harmonica"]
    (learned,) = [line for line in lines if line.startswith("| harmonica |")]
    assert readable(sum(means) / 2) in learned and learned.endswith(" |  |")
    (random,) = [line for line in lines if line.startswith("| random |")]
    assert random.endswith(" | 0.250 |")
    assert [table.split(";")[0] for table in others] == ["| MSE to exact", "| measured speed-up"]


def test_errors_are_readable_at_any_size():
    numbers = [0, 1.2345e-9, 9.996e-5, 0.0012345, 3.14159, 123.4, float("nan"), float("inf")]
    assert [readable(number) for number in numbers] == [
        "0", "0.00000000123", "0.0001000", "0.00123", "3.14", "123", "nan", "inf",
    ]  # fmt: skip


def test_more_steps_come_nearer_to_the_exact_solution(tmp_path):
    errors = []
    for steps in (3, 6):
        config = CompareConfig(
            **{**TINY, "num_images": 0, "exact_steps": 30, "num_sampling_steps": steps},
            methods=(), out=tmp_path / str(steps),
        )  # fmt: skip
        Comparison(config).run()
        results = json.loads((config.out / "comparison.json").read_text())["results"]
        errors.append(results[0]["against_exact"]["mse_mean"])
    assert 0 < errors[1] < 0.7 * errors[0]


def test_the_table_holds_all_cells_of_its_folder(finished):
    """A run with other methods, costs or seeds adds to it; the order is that of cost and method."""
    before = json.loads((finished.out / "comparison.json").read_text())["results"]
    Comparison(replace(finished, methods=("fewer-steps",), speedups=(1.3, 2.0))).run()
    results = json.loads((finished.out / "comparison.json").read_text())["results"]
    assert [(r["level"], r["method"], r["seed"]) for r in results] == [
        (None, "uncached", 0),
        ("--target-speedup 1.3", "fewer-steps", 0),
        *(("--target-speedup 1.5", name, i) for name in ("harmonica", "random") for i in (0, 1)),
        ("--target-speedup 2", "fewer-steps", 0),
    ]
    assert [r for r in results if r["level"] in (None, "--target-speedup 1.5")] == before


def test_another_first_seed_is_timed_and_scored_too(finished):
    Comparison(replace(finished, seeds=(1,))).run()
    report = json.loads((finished.out / "comparison.json").read_text())
    assert all("measured_speedup" in r for r in report["results"])


def test_time_can_be_measured_again_alone(finished, monkeypatch):
    path = finished.out / "cells" / "random_speedup1.5_seed0.json"
    cell = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in cell.items() if k != "measured_speedup"}))
    monkeypatch.setattr(Comparison, "_of_images", None)
    Comparison(finished).run()
    again = json.loads(path.read_text())
    assert again.pop("measured_speedup")["ratio"] > 0
    assert again.items() <= cell.items()


def test_a_router_that_was_cut_short_goes_on(finished, monkeypatch):
    folder = next((finished.out / "routers").glob("harmonica_seed0/*"))
    expected = load_router(folder / "router.safetensors").logits
    (folder / "router.safetensors").unlink()
    (finished.out / "cells" / "harmonica_speedup1.5_seed0.json").unlink()
    sweep, began = StepwiseLearner.sweep, []
    monkeypatch.setattr(
        StepwiseLearner, "sweep", lambda self, rest: began.append(self.updates) or sweep(self, rest)
    )
    Comparison(finished).run()
    assert began == [3]  # of four updates, three of which are a whole trajectory
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert torch.equal(load_router(folder / "router.safetensors").logits, expected)


def test_exchanges_go_on_where_training_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("harmonica.training.config.HELD_OUT_ROWS", 4)
    monkeypatch.setitem(ROWS, "trajectory", 2)
    config = CompareConfig(
        **{**TINY, "num_images": 0, "seeds": (0,)}, methods=("trajectory",), exchanges=2,
        out=tmp_path / "out",
    )  # fmt: skip
    Comparison(config).run()
    monkeypatch.setattr(TrajectoryLearner, "sweep", None)  # there is nothing left to learn
    Comparison(replace(config, methods=("trajectory-refined",))).run()
    cells = {
        name: json.loads((config.out / "cells" / f"{name}_speedup1.5_seed0.json").read_text())
        for name in ("trajectory", "trajectory-refined")
    }
    effort = {name: cell["training"]["evaluations"] for name, cell in cells.items()}
    assert effort["trajectory-refined"] > effort["trajectory"] > 0


def test_scores_of_every_seed_with_what_to_know_about_them(tmp_path):
    config = CompareConfig(
        **{**TINY, "num_images": 3}, methods=("random",), out=tmp_path / "out",
    )  # fmt: skip
    said = Comparison(config).run()
    assert "FID-cifar from 3 samples for 128 features is far too large" in said
    results = json.loads((config.out / "comparison.json").read_text())["results"]
    uncached, *random = results
    sets = [uncached["scores"], *uncached["scores_of_other_images"]]
    assert len({scores["FID-cifar"] for scores in sets}) == 3
    assert len({result["scores"]["FID-cifar"] for result in random}) == 2
    numbers = [scores["FID-cifar"] for scores in sets]
    shown = f"{sum(numbers) / 3:.2f} ({min(numbers):.2f} to {max(numbers):.2f})"
    assert shown in markdown(results).splitlines()[2]


def test_images_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    broken = torch.full((2, 3, 32, 32), torch.nan)
    monkeypatch.setattr(Comparison, "_sample", lambda *_: broken)
    config = CompareConfig(**{**TINY, "num_images": 0}, methods=(), out=tmp_path / "out")
    with pytest.raises(HarmonicaError, match=r"sampled image 0 .* is not finite"):
        Comparison(config).run()


def test_other_weights_need_another_folder(finished, monkeypatch):
    other = Comparison(finished)
    monkeypatch.setattr(other, "_provenance", lambda: {"weights_hash": "0" * 16})
    with pytest.raises(HarmonicaError, match="weights_hash"):
        other.run()


def test_a_level_out_of_reach_is_said(tmp_path):
    config = CompareConfig(
        **{**TINY, "num_images": 0, "speedups": (1.2,)}, methods=("fora",), out=tmp_path / "out"
    )
    assert "left out: fora at --target-speedup 1.2" in Comparison(config).run()


def test_a_reference_of_images_is_measured(tmp_path, labelled_images):
    config = CompareConfig(
        **{**TINY, "num_images": 4}, methods=(), reference=str(tmp_path / "pictures"),
        metrics=("fid", "precision"), out=tmp_path / "out",
    )  # fmt: skip
    (tmp_path / "pictures").mkdir()
    for i, path in enumerate(sorted(labelled_images.rglob("*.png"))):
        with Image.open(path) as image:
            image.resize((32, 32)).save(tmp_path / "pictures" / f"{i}.png")
    Comparison(config).run()
    report = json.loads((config.out / "comparison.json").read_text())
    assert set(report["results"][0]["scores"]) == {"FID-cifar", "precision-cifar"}


@pytest.mark.slow
def test_parts_of_the_method_one_by_one(tmp_path):
    """Every schedule can be compared with every value, with what training took."""
    methods = ("fora", "fora-fitted", "fora-learned", "harmonica-learned", "trajectory-refined")
    config = CompareConfig(
        **{**TINY, "num_images": 0, "speedups": None, "seeds": (0,)}, curs=(0.5,), methods=methods,
        exchanges=2, out=tmp_path / "out",
    )  # fmt: skip
    table = Comparison(config).run()
    report = json.loads((config.out / "comparison.json").read_text())
    by_method = {result["method"]: result for result in report["results"]}
    assert by_method.keys() == {"uncached", *methods}
    tables = {
        name: result["schedule"]["compute"]
        for name, result in by_method.items()
        if result["schedule"]
    }
    assert tables["fora"] == tables["fora-fitted"] == tables["fora-learned"]
    assert tables["fora"] != tables["harmonica-learned"]
    training = {name: result.get("training") for name, result in by_method.items()}
    assert training["fora"] is None
    assert all(training[name]["evaluations"] > 0 for name in methods[1:])
    evaluations = training["fora-learned"]["evaluations"]
    assert f"{evaluations / 1000:.1f}k, " in table


def test_quick_gives_way_to_flags_and_presets_to_quick():
    parser = build_parser(CompareConfig, "")
    preset = str(ROOT / "configs" / "compare_demo.yaml")
    config = resolve(
        CompareConfig, parser.parse_args(["--config", preset, "--quick", "--num-paired", "3"])
    )
    assert config.num_paired == 3
    assert config.num_images == CompareConfig.SMALL["num_images"]
    assert config.compile


@pytest.mark.parametrize("method", LEARNED)
def test_what_learns_could_be_asked_for_by_flags(method, tmp_path):
    """Not least every objective with every predictor, in closed form or by gradient."""
    config = CompareConfig(**TINY, data="cifar10", out=tmp_path)
    training = Routers(config, None)._training(Cell(method, Budget(speedup=1.5)))
    if training.freeze_schedule is not None:
        training.freeze_schedule.parent.mkdir()
        training.freeze_schedule.write_text("{}")
    training.check()


def test_published_settings_one_at_a_time():
    """Each has a method of its own, all together have another."""
    parts = [options for name, options in TRAINED.items() if "-published-" in name]
    assert len(parts) == 6
    together = [setting for options in parts for setting in options.items()]
    assert sorted(together, key=str) == sorted(TRAINED["harmonica-published"].items(), key=str)


# Several processes.


def runs_of(folder: Path) -> list[Path]:
    """Trainings that were begun."""
    return sorted(path.parent for path in folder.glob("routers/*/*/config.yaml"))


def by_place(folder: Path) -> dict[tuple, dict]:
    results = json.loads((folder / "comparison.json").read_text())["results"]
    return {(r["method"], r["level"], r["seed"]): r for r in results}


def processes_with(word: str) -> list[int]:
    """Those whose command line holds it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


@contextmanager
def while_training(folder: Path, act: Callable[[int], None]) -> Iterator[None]:
    """Do something with the process that is first seen to train, at a moment when it does."""

    def watch() -> None:
        while not ended.wait(0.01):
            for run in runs_of(folder):
                lock = folder / "jobs" / f"router_{run.parent.name}.lock"
                signed = lock.read_text().split() if lock.is_file() else []
                if not (run / "router.safetensors").exists() and signed:
                    act(int(signed[1]))
                    acted.append(run)
                    return

    acted, ended = [], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    assert acted, "nothing was seen to train"


@pytest.fixture
def few_held_out(tmp_path, monkeypatch):
    """Trajectories learn on few rows, here and in processes that are started."""
    changes = """
import sys
sys.path.insert(0, {root!r})
from harmonica.training import config
config.HELD_OUT_ROWS, config.ROWS["trajectory"] = 4, 2
"""
    (tmp_path / "sitecustomize.py").write_text(changes.format(root=str(ROOT)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("harmonica.training.config.HELD_OUT_ROWS", 4)
    monkeypatch.setitem(ROWS, "trajectory", 2)


@pytest.mark.slow
def test_processes_give_what_one_gives(tmp_path, few_held_out):
    methods = ("harmonica", "trajectory-refined", "random", "uniform")
    config = CompareConfig(
        **{**TINY, "num_images": 3, "speedups": (1.5, 2.0), "seeds": (0,)}, methods=methods,
        exchanges=2, out=tmp_path / "one",
    )  # fmt: skip
    Comparison(config).run()
    several = replace(config, jobs=2, out=tmp_path / "several")
    Comparison(several).run()
    one, other = by_place(config.out), by_place(several.out)
    assert one.keys() == other.keys() and len(one) == 1 + 2 * len(methods)
    for place, expected in one.items():
        found = other[place]
        assert found["schedule"] == expected["schedule"]
        assert found["scores"] == pytest.approx(expected["scores"], rel=1e-3)
        for name in ("against_uncached", "against_exact"):
            assert found[name]["mse"] == pytest.approx(expected[name]["mse"], rel=1e-3)
        assert found["measured_speedup"]["ratio"] > 0
        if "training" in expected:
            assert found["training"]["evaluations"] == expected["training"]["evaluations"]
    # Each router learned once, and not in this process.
    learned = [f"{run.parent.name}/{run.name}" for run in runs_of(several.out)]
    assert learned == [f"{run.parent.name}/{run.name}" for run in runs_of(config.out)]
    signed = {lock.read_text().split()[1] for lock in (several.out / "jobs").glob("*.lock")}
    assert len(signed) == 2 and str(os.getpid()) not in signed


@pytest.mark.slow
def test_a_process_that_is_killed_loses_nothing(tmp_path):
    config = CompareConfig(
        **{**TINY, "num_images": 0}, methods=("harmonica", "random"), jobs=2, out=tmp_path / "out"
    )
    killed = while_training(config.out, lambda process: os.kill(process, signal.SIGKILL))
    with killed, pytest.warns(HarmonicaWarning, match=r"ended by SIGKILL, see .*jobs/[01]\.log"):
        Comparison(config).run()
    cells = {(method, seed) for method, _, seed in by_place(config.out)}
    assert cells == {("uncached", 0), *((name, i) for name in config.methods for i in (0, 1))}
    assert len(runs_of(config.out)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes_and_the_next_call_goes_on(tmp_path, signum):
    config = CompareConfig(
        **{**TINY, "num_images": 0}, methods=("harmonica",), jobs=2, out=tmp_path / "out"
    )
    stopped = while_training(config.out, lambda _: os.kill(os.getpid(), signum))
    with stopped, pytest.raises(Interrupted, match="the same command goes on"):
        Comparison(config).run()
    assert not processes_with(str(config.out))
    begun = runs_of(config.out)
    Comparison(replace(config, jobs=1)).run()
    assert set(begun) <= set(runs_of(config.out)) and len(runs_of(config.out)) == 2
    assert len(by_place(config.out)) == 3


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path):
    """Even if that is killed."""
    out = tmp_path / "out"
    command = [
        sys.executable, ROOT / "scripts" / "compare.py", "--quick", "--methods", "harmonica",
        "--seeds", "0", "1", "--num-images", "0", "--train-updates", "100000", "--jobs", "2",
        "--out", out,
    ]  # fmt: skip
    main = subprocess.Popen(list(map(str, command)), cwd=tmp_path)
    try:
        with while_training(out, lambda _: main.kill()):
            main.wait(timeout=120)
    finally:
        main.kill()
    end = time.monotonic() + 30
    while processes_with(str(out)):
        assert time.monotonic() < end, "a process outlived the one that started it"
        time.sleep(0.1)


@pytest.mark.slow
def test_what_a_process_refuses_is_repeated(finished):
    """In a warning, and by the pass that follows."""
    (finished.out / "latents" / "uncached.safetensors").write_bytes(b"damaged")
    (finished.out / "cells" / "random_speedup1.5_seed0.json").unlink()
    with (
        pytest.warns(HarmonicaWarning, match=r"ended with status 2 \(error: .*uncached"),
        pytest.raises(HarmonicaError, match="uncached"),
    ):
        Comparison(replace(finished, jobs=2)).run()


def test_nothing_is_started_for_what_is_finished(finished, monkeypatch):
    monkeypatch.setattr("harmonica.comparison.jobs._start", None)
    Comparison(replace(finished, jobs=2)).run()


def piece(name: str, done: list[str], after: str | None = None, error: Exception | None = None):
    """One that notes that it was done, or raises."""

    def finish() -> None:
        if error is not None:
            raise error
        done.append(name)

    return jobs.Piece(name, lambda: name in done, finish, after)


def test_what_is_refused_stops_only_what_waits_for_it(tmp_path, capsys):
    (tmp_path / "jobs").mkdir()
    done: list[str] = []
    refused = HarmonicaError("not finite")
    pieces = [
        piece("images", done, after="refined"), piece("refined", done, after="router"),
        piece("router", done, error=refused), piece("other", done),
        piece("far", done, error=OutOfReach("no setting")), piece("last", done, after="other"),
    ]  # fmt: skip
    with pytest.raises(HarmonicaError, match="not finite"):
        jobs.finish_all(pieces, tmp_path)
    assert done == ["other", "last"] and "router: not finite" in capsys.readouterr().err
    # What is out of reach stays settled, and so is nothing to start a process for.
    jobs.side_by_side([piece("far", done), piece("other", done)], 2, tmp_path)
    assert done == ["other", "last"]


def test_a_piece_is_done_by_one_process(tmp_path):
    (tmp_path / "jobs").mkdir()
    done: list[str] = []
    first, second = piece("first", done), piece("second", done)
    with (
        held(tmp_path / "jobs" / "first.lock", "--out"),
        jobs._begun([first, second], tmp_path / "jobs") as begun,
    ):
        assert begun is second
        with jobs._begun([first, second], tmp_path / "jobs") as other:
            assert other is None


def test_a_signal_that_ended_the_others_is_not_swallowed(tmp_path, monkeypatch):
    """All processes of a batch job may have it at once."""

    def start(out, log, environment):
        os.kill(os.getpid(), signal.SIGTERM)
        return subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"])

    monkeypatch.setattr(jobs, "_start", start)
    with pytest.raises(Interrupted):
        jobs.side_by_side([piece("one", [])], 1, tmp_path)


def test_a_folder_is_of_one_call_at_a_time(finished):
    config = (finished.out / "config.yaml").read_bytes()
    with held(finished.out / ".lock", "--out"), pytest.raises(HarmonicaError, match="in use by"):
        Comparison(replace(finished, speedups=(1.2,))).run()
    assert (finished.out / "config.yaml").read_bytes() == config


@pytest.mark.parametrize(
    ("seen", "count", "given"),
    [(None, 2, ["0", "1", "0"]), ("3, 5,7", 3, ["3", "5", "7"]), ("GPU-a", 1, ["GPU-a"] * 3)],
)
def test_processes_take_gpus_in_turn_and_share_threads(monkeypatch, seen, count, given):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    environments = [jobs._environment(number, 3) for number in range(3)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == given
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"2"}
