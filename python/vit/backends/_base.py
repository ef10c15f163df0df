"""What a backend is: one record per file of this package, and the words in which it refuses."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

if TYPE_CHECKING:
    from ._native import Native

#: Must equal vit::kContract of csrc/vit.h.
CONTRACT = 5


class BackendError(RuntimeError):
    """A backend cannot do what was asked; the text lists the inputs, every candidate's reasons and the way out."""


@dataclass(frozen=True)
class Spec:
    """The calls that will be made of one op: enough to decide before the first call which backends can run it.

    `shapes` maps argument names to sizes; "*" stands for a size that may be anything (the batch).
    `param_dtype` is the type of weights where it differs from `dtype`. `options` are the op's non-tensor
    arguments a limit may depend on, for example {"dropout": 0.1}. Devices of one type differ: `device_index` None is
    the current one.
    """

    op: str
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    training: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    device_type: str = "cpu"
    param_dtype: torch.dtype | None = None
    device_index: int | None = None

    def __str__(self) -> str:
        def dims(shape: tuple[int | str, ...]) -> str:
            return "[" + ", ".join(map(str, shape)) + "]"

        tensors = "  ".join(f"{name} {dims(shape)}" for name, shape in self.shapes.items())
        dtype = str(self.dtype).removeprefix("torch.")
        if self.param_dtype is not None and self.param_dtype != self.dtype:
            dtype += " with " + str(self.param_dtype).removeprefix("torch.") + " parameters"
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return f"{tensors} {dtype} on {self.device_type}{options}".strip()


class Backend:
    """A place where ops run. Subclasses say on which devices and dtypes, and why not on others."""

    name: str = ""
    #: "auto" takes the usable backend of the highest priority.
    priority: int = 0
    device_types: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    def unavailable(self) -> str | None:
        """Why this backend cannot be used on this machine at all; None when it can."""
        return None

    def default_device(self) -> torch.device:
        """The device that `vit.create(backend=name)` means when none is given."""
        return torch.device(self.device_types[0])

    def reasons(self, spec: Spec) -> list[str]:
        """Why this backend cannot run `spec`, each with the actual and the required value; empty when it can."""
        why = self.unavailable()
        return ([why] if why else []) + self.mismatches(spec)

    def mismatches(self, spec: Spec) -> list[str]:
        """The reasons that follow from device and dtype alone, on whatever machine."""
        reasons = []
        if spec.device_type not in self.device_types:
            reasons.append(f"needs tensors on {' or '.join(self.device_types)}, got {spec.device_type}")
        if spec.dtype not in self.dtypes:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"dtype {str(spec.dtype).removeprefix('torch.')} is not one of {allowed}")
        return reasons

    def info(self) -> dict[str, Any]:
        """The record shown by `vit.backends()` and `vit info`."""
        why = self.unavailable()
        return {"available": why is None, "reason": why, "devices": list(self.device_types)}


class NativeBackend(Backend):
    """A backend whose kernels are the compiled module vit._<name>, loaded when first needed."""

    def unavailable(self) -> str | None:
        return _load(self.name)[1]

    def reasons(self, spec: Spec) -> list[str]:
        return super().reasons(spec) + self.lacking(spec)

    def lacking(self, spec: Spec) -> list[str]:
        """What `spec` asks for and the compiled module has not."""
        why = _lacking(self.name, spec.op, spec.options.get("activation"))
        return [] if why is None else [why]

    @cached_property
    def lib(self) -> Native:
        """The compiled module; raises BackendError with the reason when there is none."""
        return self.load()

    def load(self) -> Native:
        """Imports the compiled module."""
        module, why = _load(self.name)
        if module is None:
            hint = 'Use backend="auto" or "reference".'
            raise BackendError(f"vit: backend '{self.name}' cannot be used: {why}. {hint}")
        return cast("Native", module)

    @cached_property
    def codes(self) -> dict[torch.dtype, int]:
        """Values of vit::DType."""
        return {getattr(torch, name): int(value) for name, value in self.lib.DType.__members__.items()}

    @cached_property
    def pairings(self) -> dict[str, int]:
        """Values of vit::Pairing by their names."""
        return {name: int(value) for name, value in self.lib.Pairing.__members__.items()}

    @cached_property
    def activations(self) -> dict[str, int]:
        """Values of vit::Activation by their names."""
        return _Activations({name: int(value) for name, value in self.lib.Activation.__members__.items()})

    def context(self, device: torch.device) -> tuple[int, int, int, bool]:
        """The fields of vit::Context for a call on `device`: stream pointer, index, CPU threads, TF32 allowed."""
        raise NotImplementedError

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a result: a contiguous tensor of any content."""
        return torch.empty(shape, dtype=dtype, device=device)

    def scratch(self, device: torch.device) -> tuple[int, int]:
        """Address and bytes of scratch memory that is at hand."""
        return 0, 0

    def workspace(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Scratch memory for one call; the caller keeps the tensor alive until the kernel has been launched."""
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    #: Calls whose result has fewer bytes may be repeated without a launch (ops/repeat.py).
    repeats_below = 0

    #: Whether the backend's routine `move` copies, not PyTorch: where PyTorch's copies would start threads of the CPU.
    moves = False

    def info(self) -> dict[str, Any]:
        record = super().info() | {"build": build_record(self.name)}
        module, _ = _load(self.name)
        return record | (dict(module.info()) if module is not None else {})


class _Activations(dict[str, int]):
    def __missing__(self, name: str) -> NoReturn:
        raise BackendError(f'vit: the compiled module has no activation {name}. Use backend="reference".')


def expect(function: str, fields: str) -> None:
    """Names the fields that Python will give to a function of the contract; a module of others is refused when loaded.

    A backend may lack a function: then it refuses what needs it.
    """
    _EXPECTED[function] = fields.split()


_EXPECTED: dict[str, list[str]] = {}


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile takes the function's answer instead of tracing it.

    torch.compiler.assume_constant_result sets this very attribute, but first imports torch._dynamo: 1.1 s at every
    `import vit`.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """The compiled module vit._<name>, imported when first asked for, or the reason why there is none."""
    if name not in _LOADED:
        _LOADED[name] = _import(name)
    return _LOADED[name]


@constant
def _lacking(name: str, op: str, activation: str | None) -> str | None:
    """What the compiled module of that name has not; None where it has all, or is none."""
    module, _ = _load(name)
    if module is None:
        return None
    if op not in module.fields and f"{op}_fwd" not in module.fields:
        function = f"{op}_fwd" if f"{op}_fwd" in _EXPECTED else op  # a routine has one direction
        return f"its compiled module has no {function}"
    if activation is not None and activation not in module.Activation.__members__:
        return f"its compiled module has no activation {activation}"
    return None


_LOADED: dict[str, tuple[ModuleType | None, str | None]] = {}


def _import(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(f"vit._{name}")
    except ModuleNotFoundError:
        why = build_record(name).get("reason") or "this installation holds no compiled module"
        return None, f"not built: {why}"
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"
    if module.contract != CONTRACT:
        return None, f"built for contract {module.contract}, this vit needs {CONTRACT}: reinstall vit-kernels"
    for function, fields in _EXPECTED.items():
        found = module.fields.get(function)
        if found is None:
            setattr(module, function, _refusing(name, function))
        elif found != fields:
            return None, f"its {function} takes {found}, this vit gives {fields}: reinstall vit-kernels"
    try:
        module.info()  # chooses the kernels for this machine: a wrong VIT_CPU_ISA is a reason, not a crash later
    except RuntimeError as error:
        return None, str(error)
    return module, None


def _refusing(name: str, function: str) -> Callable[..., NoReturn]:
    """Stands where a compiled module lacks a function."""

    def refuse(*fields: Any) -> NoReturn:
        raise BackendError(
            f"vit: backend '{name}' cannot run '{function}': its compiled module has none. "
            'Use backend="auto" or "reference".'
        )

    return refuse


class HostWorkspace(threading.local):
    """One growing scratch buffer per Python thread: a fresh 10 MB block would be page-faulted in at every call."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.held = 0, 0  # address and bytes

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer of at least so many bytes, which the next call finds as `held`."""
        if self.buffer.numel() < nbytes:
            self.buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            self.held = self.buffer.data_ptr(), nbytes
        return self.buffer


def build_record(name: str) -> dict[str, Any]:
    """What setup.py wrote down about building this backend; empty in a source tree that was never installed."""
    path = Path(__file__).parent.parent / "_build.json"
    try:
        return json.loads(path.read_text()).get(name, {})
    except (OSError, ValueError):
        return {}
