"""Memory of training as it is published: DiT-XL/2 at 256 pixels, 16 rows, bfloat16.

Counted on tensors that are only described, with nothing of what a GPU's libraries take besides.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from memory import Peak
from torch._subclasses import FakeTensorMode

from harmonica.backbone import reduce_precision
from harmonica.cache import Masking
from harmonica.denoise import Guidance, Trajectories
from harmonica.fusion import block_runner
from harmonica.router import Router
from harmonica.samplers import create_sampler
from harmonica.training.objective import Student, iepo_loss, leave_one_out
from harmonica.training.sdt import StepError, train_trajectory
from models import create_model
from models.transformer import DiffusionTransformer

GB = 10**9


@contextlib.contextmanager
def described_model() -> Iterator[tuple[DiffusionTransformer, Peak]]:
    """DiT-XL/2 in bfloat16 without numbers, as all tensors in this context are, and their peak."""
    with torch.device("meta"):
        model = create_model("DiT-XL/2", image_size=256)
    reduce_precision(model, torch.bfloat16)
    state = model.state_dict()
    with FakeTensorMode(), Peak() as peak:
        weights = {name: torch.empty(v.shape, dtype=v.dtype) for name, v in state.items()}
        model.load_state_dict(weights, assign=True)
        yield model.requires_grad_(False).eval(), peak


def trajectories(
    model: DiffusionTransformer, steps: int, samples: int, checkpoints: bool = False
) -> Trajectories:
    return Trajectories(
        model,
        create_sampler("ddim", steps),
        Guidance(1.5),
        y=torch.zeros(samples, dtype=torch.long),
        x_T=torch.randn(samples, 4, 32, 32),
        indices=range(samples),
        run=block_runner(compiles=False, checkpoints=checkpoints),
    )


def masking(steps: int) -> Masking:
    """Half of all branches are computed anew."""
    computes = np.random.default_rng(0).random((steps, 56)) < 0.5
    computes[0] = True
    return Masking(computes, "soft", stores_fresh=True)


# As computed: 3.0 and 5.8 GB, of which 1.4 are weights.
@pytest.mark.parametrize(("checkpoints", "most"), [(True, 8 * GB), (False, 14 * GB)])
def test_training_fits(checkpoints, most):
    def update(step: StepError) -> None:
        iepo_loss(step.error, step.scores, 1.0, 1e-3).backward()

    with described_model() as (model, peak):
        batch = trajectories(model, 20, 8, checkpoints)
        train_trajectory(batch, Router(torch.zeros(20, 56)), masking(20), update, stop=2)
    assert 2 * GB < peak.bytes < most


def test_a_refresh_of_lambda_fits():
    """Of twice the batch, one rollout in a forward, which is what is left where memory is short."""
    with described_model() as (model, peak), torch.no_grad():
        batch = trajectories(model, 4, 16)
        leave_one_out(Student(batch, torch.zeros(4, 56), masking(4), most_rows=32))
    assert 2 * GB < peak.bytes < 8 * GB
