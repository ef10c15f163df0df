"""Forwards as CUDA graphs: how they are made, replayed and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

#: Named results of a forward, where a replay puts them.
Results = dict[str, Tensor]

#: Forwards before a capture, as in PyTorch's guide: kernels are loaded then, which a capture does not allow, and what
#: is asked of the device once is known afterwards.
WARM_UP = 3

#: Graphs that are kept. One of ViT-B/16 has 90 nodes of some KB; what they compute in is shared.
MOST = 32


class Gpu(Protocol):
    """What an engine asks of a device: tests have one without a GPU."""

    device: torch.device
    architecture: str

    def here(self) -> Any:
        """Where the calling thread's work goes."""

    def at(self, caller: Any) -> AbstractContextManager[Any]:
        """A context for work of the caller, in whatever thread."""

    def turn(self, caller: Any) -> AbstractContextManager[Any]:
        """A context for the engine's work: behind the caller's so far, and before the caller's next."""

    def capture(self, forward: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """A graph of a forward: its replay, and where each replay puts the results. Inside of a turn."""

    def memory(self) -> int:
        """Bytes that graphs compute in."""


class CudaGpu:
    """A GPU by PyTorch: one stream and one pool of memory for all graphs of an engine."""

    #: One capture at a time in the process: PyTorch synchronises the device before each, which ends another one.
    capturing = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        self.stream = torch.cuda.Stream(device)
        # Graphs may share it, in whatever order they are replayed: never two at once (one stream), each begins with
        # its images, and what is taken from one, its results, stays allocated while it is kept.
        self.pool = torch.cuda.graph_pool_handle()

    def here(self) -> torch.cuda.Stream:
        stream = torch.cuda.current_stream(self.device)
        with self.at(stream):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "vit.Engine: a call of an engine replays a graph, which cannot become part of another one; capture "
                    "the model's own forward"
                )
        return stream

    def at(self, caller: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(caller)

    @contextmanager
    def turn(self, caller: torch.cuda.Stream) -> Iterator[None]:
        self.stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:  # memory of the caller's tensors is the caller's again only behind this
            caller.wait_stream(self.stream)

    def capture(self, forward: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        for _ in range(WARM_UP):
            forward()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads ask of the runtime meanwhile does not end the capture.
        with self.capturing, torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            results = forward()
        return graph.replay, results

    def memory(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self.pool))


@dataclass(frozen=True)
class Captured:
    """A forward of one batch of images, which are copied to `images` before each replay."""

    images: Tensor
    replay: Callable[[], None]
    results: Results


class Cache:
    """The graphs of an engine by what they compute; the one unused for longest goes first."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.graphs: OrderedDict[Hashable, Captured] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Captured]) -> Captured:
        """The graph of that key, made if there is none."""
        graph = self.graphs.pop(key, None)
        if graph is None:
            while len(self.graphs) >= self.most:  # before, so that its memory serves the new one
                self.graphs.popitem(last=False)
            graph = make()
        self.graphs[key] = graph
        return graph
