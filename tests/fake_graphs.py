"""CUDA graphs on a CPU: what was captured runs again in the same memory, and nothing else does."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeGraph(TorchDispatchMode):
    """Notes every operation while it is captured; numbers that Python made are as they were then.

    Attributes:
        replays: how often it was replayed.
        memory: the pool that it allocates from.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.replays, self.memory = [], 0, self

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def pool(self) -> object:
        return self.memory

    @torch.inference_mode()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for mine, made in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(mine, Tensor) and mine.data_ptr() != made.data_ptr():
                    mine.copy_(made)


@contextlib.contextmanager
def fake_capture(graph: FakeGraph, pool: object = None) -> Iterator[None]:
    """In the place of ``torch.cuda.graph``."""
    graph.memory = graph if pool is None else pool
    with graph:
        yield


def fake_cuda_graphs(monkeypatch) -> list[FakeGraph]:
    """From now on CUDA graphs are fake; returns all that are made."""
    made: list[FakeGraph] = []

    def make() -> FakeGraph:
        made.append(FakeGraph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return made
