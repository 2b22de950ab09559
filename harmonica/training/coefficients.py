"""Learned coefficients of a predictor: as parameters, and in closed form.

:class:`Coefficients` learns by gradient, on whatever objective the router has. ``fit_coefficients``
takes calibration samples: along the cached trajectory, what each skipped branch would have computed
is regressed on what stands in for it.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from harmonica.cache import Cache, Replay
from harmonica.denoise import Trajectories
from harmonica.predictors import Extrapolation, LastValue, Learned, combine
from harmonica.samplers import State
from harmonica.schedule import Schedule

# Weight of staying at the base, as a share of the values' own power: without it, channels that
# hardly move would take any coefficient.
RIDGE = 1e-3

Reduce = Callable[[Tensor], Tensor]
# By step and branch: (channels, k, k) normal equations and their (channels, k, 1) right-hand side.
Sums = dict[tuple[int, int], tuple[Tensor, Tensor]]


class Coefficients(nn.Module):
    """Level and slope of :class:`Learned`, one parameter per step, zero at first.

    So each step has its own optimiser state, as rows of a router have.
    """

    def __init__(
        self,
        base: LastValue | Extrapolation,
        num_steps: int,
        num_branches: int,
        channels: int,
    ):
        super().__init__()
        self.base = base

        def rows() -> nn.ParameterList:
            return nn.ParameterList(torch.zeros(num_branches, channels) for _ in range(num_steps))

        self.level, self.slope = rows(), rows()

    def row(self, s: int) -> tuple[Tensor, Tensor]:
        """Parameters of step s, (N, channels) each."""
        return self.level[s], self.slope[s]

    def live(self) -> Learned:
        """The predictor through which gradients reach these parameters."""
        return Learned(self.base, list(self.level), list(self.slope))

    def frozen(self) -> Learned:
        """The predictor with these values, apart from them."""
        level, slope = (torch.stack([row.detach() for row in t]) for t in (self.level, self.slope))
        return Learned(self.base, level.cpu(), slope.cpu())

    @torch.no_grad()
    def go_on_from(self, learned: Learned) -> None:
        """Take its coefficients; its base is this one's."""
        for mine, other in ((self.level, learned.level), (self.slope, learned.slope)):
            for row, values in zip(mine, other, strict=True):
                row.copy_(values)


class _Regressed:
    """A skipped branch that also computes, fits its coefficients, and returns the fitted value."""

    def __init__(self, cache: Cache, i: int, s: int, learned: Learned, reduce: Reduce, sums: Sums):
        self.cache, self.i, self.s, self.learned = cache, i, s, learned
        self.reduce, self.sums = reduce, sums

    def __call__(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        target = fn(x)
        fit_branch(self.learned, self.cache, self.i, self.s, target, self.reduce, self.sums)
        return self.cache.predict(self.i, self.s).to(target.dtype)


def fit_branch(
    learned: Learned, cache: Cache, i: int, s: int, target: Tensor, reduce: Reduce, sums: Sums
) -> None:
    """Write the coefficients at (s, i) that bring the prediction nearest to ``target`` (B, L, d).

    Least squares per channel, or over all channels where coefficients are scalars; a ridge keeps
    them at the base where the data says nothing. What earlier samples left in ``sums`` counts too.
    """
    channels = learned.level.shape[-1]
    steps, values = cache.entries(i)
    values = [value.float() for value in values]
    columns = [values[0]]
    if len(values) > 1:
        columns.append(values[0] - values[1])
    rest = target.float() - combine(learned.base.weights(s, i, steps), values)

    def summed(a: Tensor, b: Tensor) -> Tensor:
        products = (a * b).flatten(0, -2).double().sum(0)
        return products.sum(0, keepdim=True) if channels == 1 else products

    size = len(columns)
    normal = torch.zeros(channels, size, size, dtype=torch.float64, device=rest.device)
    right = torch.zeros(channels, size, dtype=torch.float64, device=rest.device)
    for a, b in itertools.product(range(size), repeat=2):
        normal[:, a, b] = summed(columns[a], columns[b])
    for a in range(size):
        right[:, a] = summed(columns[a], rest)
    # Over all processes: what is fitted does not depend on how many share the samples.
    normal, right = reduce(torch.cat([normal, right[..., None]], dim=-1)).split([size, 1], dim=-1)
    if (s, i) in sums:
        normal, right = (a + b for a, b in zip(sums[s, i], (normal, right), strict=True))
    sums[s, i] = normal, right
    power = normal.diagonal(dim1=1, dim2=2)
    solved = torch.linalg.solve(normal + torch.diag_embed(RIDGE * power + 1e-12), right)
    learned.level[s, i] = solved[:, 0, 0].to(learned.level)
    if size > 1:
        learned.slope[s, i] = solved[:, 1, 0].to(learned.slope)


@torch.no_grad()
def fit_coefficients(
    batches: Sequence[Trajectories],
    schedule: Schedule,
    base: LastValue | Extrapolation,
    channels: int,
    reduce: Reduce = lambda sums: sums,
) -> Learned:
    """Coefficients in closed form, from walks along the cached trajectory.

    Later steps are fitted on trajectories with the fitted values of earlier ones in them, and each
    batch goes on from what the ones before it gave.

    Args:
        batches: calibration samples, from noise; a forward each.
        base: what the coefficients start from.
        channels: 1 for scalars, else the model's width.
        reduce: sums a tensor over processes.
    """
    steps, branches = schedule.compute.shape
    learned = Learned.start(base, steps, branches, channels).to(batches[0].x_T.device)
    sums: Sums = {}
    for batch in batches:
        cache = Cache(branches, learned)

        def predict(s: int, x: Tensor, batch=batch, cache=cache) -> Tensor:
            hooks = [
                Replay(cache, i, s, True)
                if computes
                else _Regressed(cache, i, s, learned, reduce, sums)
                for i, computes in enumerate(schedule.compute[s])
            ]
            return batch.predict(s, x, hooks)

        batch.walk(State(batch.x_T), predict)
    return learned
