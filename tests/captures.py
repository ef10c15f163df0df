"""What torch.cuda.CUDAGraph does on a GPU, done on the emulators of the CUDA kernels, whose tensors lie on the CPU.

In a capture the emulated runtime keeps our launches and runs none; what PyTorch computes between them runs, on whatever
their results hold, and is kept as well; what it writes to is as before afterwards, as on a GPU, where nothing runs. A
replay does all of it again, in order, in the same memory: a result that the replay did not make, or a number that was
read in the capture, is wrong afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cuda_emulator import Emulated
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What asks a GPU for a number, and so waits for it.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}
#: What takes memory and writes nothing.
ROOM = ("aten::empty", "aten::new_empty")


class CaptureError(RuntimeError):
    """What a capture does not allow, by name."""


def replayed(emulated: Emulated, f: Callable[[], list[Tensor]], inputs: Iterable[Tensor]) -> None:
    """A call that warms up, a capture, other contents in the same memory, and a replay: the bytes of a call."""
    f()
    graph = Graph(emulated)
    with graph.capture():
        results = f()
    with torch.no_grad():
        for x in inputs:
            x.copy_(x.flip(0).clone())
    graph.replay()
    for found, expected in zip(results, f(), strict=True):
        assert torch.equal(found.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


class Graph(TorchDispatchMode):
    """A capture and its replay.

        graph = Graph(emulated)
        with graph.capture():
            y = f(x)
        x.copy_(...)
        graph.replay()        # y is f of the new x

    Its memory lives as long as the graph, as the pool of one does on a GPU.
    """

    def __init__(self, emulated: Emulated) -> None:
        super().__init__()
        self.emulated = emulated
        self.steps: list[Callable[[], Any]] = []
        self.alive: list[Any] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # address -> what was written to, and its content
        self.kept = 0

    @contextmanager
    def capture(self) -> Iterator[None]:
        """CaptureError for what is not allowed."""
        # Our ops take pointers from ordinary tensors alone, and these are: nothing but this mode looks on.
        length, torch._C._len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack, lambda: 0
        self.kept = self.emulated.kept()
        self.emulated.capture(True)
        failure: RuntimeError | None = None
        try:
            with self:
                yield
        except RuntimeError as error:
            failure = error
        finally:
            self.emulated.capture(False)
            torch._C._len_torch_dispatch_stack = length
        if refused := self.emulated.refused():
            raise CaptureError(f"calls of the runtime that a capture does not allow: {refused}") from failure
        if failure is not None:
            raise failure
        self.take_launches()
        for written, content in self.before.values():
            written.data.copy_(content)
        self.before.clear()

    def replay(self) -> None:
        with torch.no_grad():
            for step in self.steps:
                step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in READS:
            raise CaptureError(f"{name} reads a number of the GPU")
        self.take_launches()
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        writes = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for i, argument in enumerate(func._schema.arguments):
            if argument in writes:
                for t in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name)):
                    self.before.setdefault(t.data_ptr(), (t, t.detach().clone()))
        results = func(*args, **kwargs)
        made = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
        self.alive.append((args, kwargs, made))
        if writes:
            self.steps.append(lambda: func(*args, **kwargs))
        elif not name.startswith(ROOM) and not all(t.untyped_storage().data_ptr() in inputs for t in made):
            self.steps.append(lambda: self.again(func, args, kwargs, made))
        return results

    @staticmethod
    def again(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        """Computes a result once more, where it lay."""
        results = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
        for old, new in zip(made, results, strict=True):
            old.copy_(new)

    def take_launches(self) -> None:
        """Launches since the last step become the next one."""
        first, last = self.kept, self.emulated.kept()
        if first < last:
            self.steps.append(lambda: self.emulated.replay(first, last))
        self.kept = last
