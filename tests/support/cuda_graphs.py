"""Stand-ins for CUDA graphs and streams on a CPU."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """A CUDAGraph, and torch.cuda.graph's context: records operators, and replays them with the same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::item", "aten::_local_scalar_dense"):  # the host waits for the device
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore about it")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(result), strict=True):
                if new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
                    old.copy_(new)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Replace torch.cuda's graphs and streams. Returns the list of the graphs that will be captured."""
    graphs: list[Graph] = []

    def capture(graph: Graph) -> Graph:
        graphs.append(graph)
        return graph

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    return graphs
