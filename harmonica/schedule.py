"""Schedule: which (step, branch) is computed, and what stands in for the others.

Everything that caches is a maker of these.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from harmonica.errors import HarmonicaError
from harmonica.files import first_line, write_atomically
from harmonica.flops import Costs
from harmonica.predictors import LAST, Predictor, from_dict, to_dict

FORMAT = 1
# A row of one step; sums over a trajectory stay within 64 bits.
MOST_MACS = 2**50
# What stands in for what is not computed: what the predictor makes of a branch's values; or, for a
# stretch of blocks that is reused whole, the difference that it made to its input, or its output.
REUSES = ("branches", "blocks", "outputs")


@dataclass(frozen=True, eq=False)
class Schedule:
    """An immutable table of decisions.

    Attributes:
        compute: (T, N) bool, True = compute; rows in sampling order, row 0 all True.
        costs: names and multiply-accumulates of the N branches.
        reuses: what is put in place of what is not computed, one of ``REUSES``.
        predictor: what is made of a branch's earlier values.

    Raises:
        ValueError: row 0 reuses something, the shapes disagree, or blocks are reused in part.
    """

    compute: np.ndarray
    costs: Costs
    reuses: str = "branches"
    predictor: Predictor = LAST

    def __post_init__(self):
        table = np.array(self.compute, dtype=bool)
        if table.ndim != 2 or table.shape[1] != len(self.costs.names):
            raise ValueError(
                f"a schedule of shape {table.shape} does not fit {len(self.costs.names)} branches"
            )
        if len(table) == 0 or not table[0].all():
            raise ValueError("the first step of a schedule must compute every branch")
        if self.reuses not in REUSES:
            raise ValueError(f"reuse of {self.reuses!r} is not one of {', '.join(REUSES)}")
        if self.reuses != "branches" and self.predictor != LAST:
            raise ValueError(f"{self.reuses} are reused as they are, without a predictor")
        table.flags.writeable = False
        object.__setattr__(self, "compute", table)
        if self.reuses != "branches":
            blocks = self.costs.blocks
            order = list(dict.fromkeys(blocks))
            if (table != self.block_compute[:, [order.index(block) for block in blocks]]).any():
                raise ValueError(f"reuse of {self.reuses} decides for all branches of one alike")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Schedule)
            and (self.costs, self.reuses) == (other.costs, other.reuses)
            and to_dict(self.predictor) == to_dict(other.predictor)
            and np.array_equal(self.compute, other.compute)
        )

    @classmethod
    def full(cls, num_steps: int, costs: Costs) -> "Schedule":
        """Everything computed at every step."""
        return cls(np.ones((num_steps, len(costs.names)), dtype=bool), costs)

    @property
    def num_steps(self) -> int:
        return len(self.compute)

    @property
    def cur(self) -> float:
        """Cache-utilisation ratio: the share of (step, branch) outputs taken from the cache."""
        return float(1.0 - self.compute.mean())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one row over the whole trajectory."""
        branches = self.compute.astype(np.int64) @ np.array(self.costs.macs, dtype=np.int64)
        macs = int(branches.sum()) + self.num_steps * self.costs.rest
        if self.reuses != "branches" and self.costs.joins:
            # Of a block that is reused whole, the end of a long skip does not run either.
            joins = np.array(self.costs.joins, dtype=np.int64)
            macs -= int(((~self.block_compute).astype(np.int64) @ joins).sum())
        return macs

    @property
    def block_compute(self) -> np.ndarray:
        """(T, blocks) bool: whether any branch of a block is computed."""
        blocks = self.costs.blocks
        members = [[b == block for b in blocks] for block in dict.fromkeys(blocks)]
        return np.stack([self.compute[:, member].any(axis=1) for member in members], axis=1)

    @property
    def theoretical_speedup(self) -> float:
        """Multiply-accumulates without the cache over those with it."""
        return self.num_steps * self.costs.total / self.macs

    @property
    def hash(self) -> str:
        """Short content hash of the decisions, the branch names and the predictor."""
        digest = hashlib.sha256("\n".join(self.costs.names).encode())
        digest.update(str(self.compute.shape).encode() + np.packbits(self.compute).tobytes())
        if self.reuses != "branches":
            digest.update(self.reuses.encode())
        if self.predictor != LAST:
            digest.update(json.dumps(to_dict(self.predictor)).encode())
        return digest.hexdigest()[:16]

    def to_dict(self) -> dict:
        """JSON form; a row is a string with 1 for compute and 0 for reuse."""
        return {
            "format": FORMAT,
            "hash": self.hash,
            "cur": round(self.cur, 6),
            "theoretical_speedup": round(self.theoretical_speedup, 6),
            "branch_names": list(self.costs.names),
            "branch_macs": list(self.costs.macs),
            "other_macs": self.costs.rest,
            **({"join_macs": list(self.costs.joins)} if self.costs.joins else {}),
            "reuses": self.reuses,
            "predictor": to_dict(self.predictor),
            "compute": ["".join("01"[int(c)] for c in row) for row in self.compute],
        }

    @classmethod
    def from_dict(cls, content: dict, tensors: Mapping[str, Tensor] | None = None) -> "Schedule":
        """Inverse of :meth:`to_dict`.

        Args:
            tensors: of the router file that it was in, for learned coefficients.

        Raises:
            HarmonicaError: fields are missing, malformed, or do not match the hash.
        """
        try:
            costs = Costs(
                tuple(str(name) for name in content["branch_names"]),
                tuple(int(macs) for macs in content["branch_macs"]),
                int(content["other_macs"]),
                tuple(int(macs) for macs in content.get("join_macs", ())),
            )
            if len(costs.macs) != len(costs.names):
                raise ValueError("branch names and MACs differ in number")
            if costs.joins and len(costs.joins) != len(set(costs.blocks)):
                raise ValueError("blocks and MACs of their skip connections differ in number")
            if any(set(row) - {"0", "1"} for row in content["compute"]):
                raise ValueError("rows must consist of 0 and 1")
            table = [[c == "1" for c in row] for row in content["compute"]]
            reuses = content.get("reuses", "branches")
            table = np.array(table, dtype=bool)
            described = content.get("predictor", {"name": "last"})
            if tensors is None and described["name"] == "learned":
                raise HarmonicaError(
                    "the coefficients of a learned schedule are in its router file; pass that one"
                )
            predictor = from_dict(described, table.shape, tensors)
            schedule = cls(table, costs, reuses, predictor)
            if min(costs.macs, default=0) < 0 or costs.rest < 0 or not 0 < costs.total < MOST_MACS:
                raise ValueError("its MACs are out of range")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise HarmonicaError(
                f"the schedule is malformed ({first_line(error)}); export it again"
            ) from None
        if content.get("hash") != schedule.hash:
            raise HarmonicaError("the schedule does not match its hash; the file was changed")
        return schedule

    def save(self, path: Path, trained_for: dict | None = None) -> None:
        """Write the JSON form atomically.

        Args:
            trained_for: record of the model and sampler (``RouterInfo``), if it is for some.
        """
        record = {} if trained_for is None else {"trained_for": trained_for}
        write_atomically(path, json.dumps({**self.to_dict(), **record}, indent=1).encode())
