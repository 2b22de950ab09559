"""Fixtures: golden recordings, and the tiny models they were made with."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from harmonica import fusion
from harmonica.denoise import Guidance, Trajectories
from harmonica.flops import Costs, measure_costs
from harmonica.samplers import Sampler, create_sampler
from models import create_model
from models.dit import DiT, DiTConfig

ROOT = Path(__file__).parent.parent
INJECTED: Counter[str] = Counter()
SURVIVED: Counter[str] = Counter()
PASSED = pytest.StashKey[bool]()


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="many rounds of faults and mutations")


def pytest_configure(config):
    """Tests expect a CPU, those of ``-m gpu`` apart; so do the programs that they start."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, which tests see with -m gpu alone")


def pytest_terminal_summary(terminalreporter):
    """What was survived, in the nightly form."""
    if not terminalreporter.config.getoption("--soak"):
        return
    terminalreporter.write_line("| fault | injected | survived | lost |")
    terminalreporter.write_line("|---|---|---|---|")
    for name, count in INJECTED.items():
        survived = SURVIVED[name]
        terminalreporter.write_line(f"| {name} | {count} | {survived} | {count - survived} |")
    broken = sum(len(terminalreporter.stats.get(kind, [])) for kind in ("failed", "error"))
    if broken:
        terminalreporter.write_line(f"{broken} tests failed or could not begin: there may be more")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture(scope="session")
def rounds(request) -> int:
    """Of every random fault."""
    return int(os.environ.get("ROUNDS", 20)) if request.config.getoption("--soak") else 3


@pytest.fixture(scope="session")
def nightly(request) -> None:
    """For tests that wait long: skipped unless asked for."""
    if not request.config.getoption("--soak"):
        pytest.skip("in the nightly form: --soak")


class Faults:
    """Counts the faults of a test as they are injected: they are survived if the test passes."""

    def __init__(self):
        self.injected: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        self.injected[name] += count


@pytest.fixture
def faults(request) -> Iterator[Faults]:
    counted = Faults()
    yield counted
    INJECTED.update(counted.injected)
    if request.node.stash.get(PASSED, False):
        SURVIVED.update(counted.injected)


GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One recording: ``arrays`` under their recorded names, hyper-parameters, and the model."""

    hparams: dict
    arrays: dict[str, Tensor]
    model: DiT

    @property
    def num_steps(self) -> int:
        return self.hparams["T"]

    @cached_property
    def costs(self) -> Costs:
        return measure_costs(self.model)

    @property
    def logits(self) -> Tensor:
        """(T, N) in sampling order; recorded last step first."""
        return self.arrays["logits"].flip(0)

    def trajectories(self, sampler: Sampler | None = None, **changes) -> Trajectories:
        fields = {
            "model": self.model,
            "sampler": sampler or create_sampler("ddim", self.num_steps),
            "guidance": Guidance(self.hparams["cfg_scale"]),
            "y": self.arrays["class_labels"],
            "x_T": self.arrays["x_T"],
        }
        return Trajectories(**{**fields, **changes})


def load_golden(name: str) -> Golden:
    with np.load(GOLDEN / f"dit_{name}.npz") as file:
        hparams = json.loads(str(file["hparams"]))
        arrays = {k: torch.from_numpy(np.array(file[k])) for k in file.files if k != "hparams"}
    model = DiT(DiTConfig(**hparams["model"]))
    prefix = "weights/"
    weights = {k[len(prefix) :]: arrays.pop(k) for k in list(arrays) if k.startswith(prefix)}
    model.load_state_dict(weights)
    return Golden(hparams, arrays, model.requires_grad_(False).eval())


@pytest.fixture(scope="session", params=["a", "b"])
def golden(request) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="session")
def golden_b() -> Golden:
    return load_golden("b")


@pytest.fixture(scope="session")
def bundled_costs() -> Costs:
    """Of the bundled backbone."""
    return measure_costs(create_model("DiT-Ti/4"))


def relative(value: Tensor, reference: Tensor) -> float:
    """Relative L2 distance; NaN never passes a comparison."""
    reference = reference.double()
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.fixture
def traced(monkeypatch):
    """Blocks are traced as for compilation, which takes long, and the graphs run as they are."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile(*a, backend="eager", **k))
    fusion.fused.cache_clear()
    yield
    fusion.fused.cache_clear()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run one of the command-line files as a user would, from another folder."""
    script, *rest = arguments
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, rest)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory) -> Path:
    """A random T5 of width 16 over single letters, laid out as a pipeline on the Hub is."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    folder = tmp_path_factory.mktemp("t5")
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -1.0)]
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=[*special, *letters], extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def labelled_images(tmp_path) -> Path:
    """Ten smooth pictures in two class folders."""
    draw = np.random.default_rng(0)
    for i in range(10):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        small.resize((40, 32)).save(path)
    return tmp_path / "images"
