"""PyTorch's functions computed by vit's ops, where these can run them, and code that finds them in place of PyTorch's.

A module of another library keeps its own code. It is evaluated with other global names: `F.linear` in it means `linear`
here. So what a library does around the functions stays exactly what it does, in every version of it.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import NativeBackend, get, records
from ..model.torch_layers import PLANNED, runs, watching_functions
from ..ops import OPS, bind
from ..ops.bound import transform
from ..ops.movement import of as movement_of

#: Names of PyTorch's functions -> the op that computes them.
OP_OF = {
    "linear": "linear",
    "conv2d": "linear",
    "layer_norm": "layer_norm",
    "rms_norm": "rms_norm",
    "gelu": "gelu",
    "silu": "gelu",
    "relu": "gelu",
    "scaled_dot_product_attention": "attention",
}


def _silu(ops: Any, input: Tensor, inplace: bool = False) -> Tensor | None:
    return ops.gelu(input, "silu") if not inplace and runs(ops.gelu, input) else None


def _relu(ops: Any, input: Tensor, inplace: bool = False) -> Tensor | None:
    return ops.gelu(input, "relu") if not inplace and runs(ops.gelu, input) else None


def _rms_norm(ops: Any, input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    """Only with a weight of x's dtype: which dtype the result of others has is PyTorch's to say."""
    same = weight is None or weight.dtype == input.dtype
    return PLANNED[F.rms_norm](ops, input, shape, weight, eps) if same else None


def _quick_gelu(ops: Any, input: Tensor, inplace: bool = False) -> Tensor | None:
    return ops.gelu(input, "quick") if not inplace and runs(ops.gelu, input) else None


_PLANNED: dict[Any, Callable[..., Tensor | None]] = {**PLANNED, F.silu: _silu, F.relu: _relu, F.rms_norm: _rms_norm}


def candidates(backend: str) -> list[NativeBackend]:
    """The native backends that may be taken on this machine, the most preferred first."""
    named = records().values() if backend == "auto" else [get(backend)]
    return [one for one in named if isinstance(one, NativeBackend) and one.unavailable() is None]


class Functions:
    """The functions on one backend, or for "auto" on the best one for the device of each call's tensors.

    Each takes PyTorch's arguments. What the ops cannot run (a mask, dropout, another dtype, a transform of torch.func)
    is computed by PyTorch's function itself.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        #: Type of device -> the ops for its tensors.
        self.ops: dict[str, Any] = {}
        for record in candidates(backend):
            bound = SimpleNamespace(**{op: bind(op, record.name) for op in OPS}, movement=movement_of(record.name))
            for device_type in record.device_types:
                self.ops.setdefault(device_type, bound)
        self.functional = _copy(F, {one.__name__: self._instead(one, plan) for one, plan in _PLANNED.items()})
        self.nn = _copy(nn, {"functional": self.functional})

    def for_tensor(self, x: Any) -> Any:
        """The ops for a tensor; None where PyTorch has to compute: other devices, transforms, a mode that looks on."""
        if not isinstance(x, Tensor) or (ops := self.ops.get(x.device.type)) is None:
            return None
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) not in ops.linear.record.dtypes:
            return None
        if not torch.compiler.is_compiling() and (transform() or watching_functions()):
            return None
        return ops

    def _instead(self, original: Callable[..., Any], planned: Callable[..., Tensor | None]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            ops = self.for_tensor(args[0] if args else next(iter(kwargs.values()), None))
            y = None if ops is None else planned(ops, *args, **kwargs)
            return original(*args, **kwargs) if y is None else y

        return function

    def quick_gelu(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """x * sigmoid(1.702 x) by the op, in place of a library's own function."""
        return self._instead(original, _quick_gelu)

    def rms_norm(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """F.rms_norm by the op, in place of a library's own function of the same arguments."""
        return self._instead(original, _rms_norm)

    def interfaces(self, table: Any) -> Interfaces:
        """transformers' table of attention functions, with the op in place of scaled_dot_product_attention's."""
        return Interfaces(table, self)


@functools.cache
def functions_of(backend: str) -> Functions:
    """The functions on a backend, made once."""
    return Functions(backend)


def _copy(module: ModuleType, changed: Mapping[str, Any]) -> ModuleType:
    """A module with some names changed."""
    copy = ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update(changed)
    return copy


class Interfaces:
    """transformers' ALL_ATTENTION_FUNCTIONS as its attention modules use it: by `get_interface`, `get` and by key."""

    def __init__(self, table: Any, functions: Functions) -> None:
        self.table, self.functions = table, functions

    def get_interface(self, name: str, default: Any) -> Any:
        """The function of that name, ours for "sdpa"."""
        return self._ours(name, self.table.get_interface(name, default))

    def get(self, name: str, default: Any = None) -> Any:
        """The same."""
        return self._ours(name, self.table.get(name, default))

    def __getitem__(self, name: str) -> Any:
        return self._ours(name, self.table[name])

    def _ours(self, name: str, theirs: Any) -> Any:
        if name != "sdpa":
            return theirs

        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            dropout: float = 0.0,
            scaling: float | None = None,
            is_causal: bool | None = None,
            **more: Any,
        ) -> Any:
            """query, key, value [B, H, N, D] -> ([B, N, H, D], None)."""
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            usual = attention_mask is None and not causal and not dropout
            usual = usual and all(one is None or one is False for one in more.values())
            if usual and getattr(module, "num_key_value_groups", 1) == 1:
                y = self.functions.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
                return y.transpose(1, 2).contiguous(), None
            if is_causal is not None:
                more["is_causal"] = is_causal
            return theirs(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)

        return attend


# ---- code that finds the functions ----


def names_in(code: CodeType) -> Iterator[str]:
    """The global names and attributes that a function uses, in order, those of functions inside it behind them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def _called(code: CodeType, known: Mapping[str, Any]) -> Iterator[str]:
    """The names that stand behind torch.nn.functional in a function's code."""
    before: Any = None
    for one in dis.get_instructions(code):
        if one.opname == "LOAD_GLOBAL":
            before = known.get(one.argval)
        elif one.opname in ("LOAD_ATTR", "LOAD_METHOD") and (before is F or before is nn):
            if before is F:
                yield one.argval
            before = F if before is nn and one.argval == "functional" else None
        elif one.opname not in ("PUSH_NULL", "CACHE", "PRECALL"):
            before = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _called(constant, known)


def evaluated_with(function: FunctionType, functions: Functions) -> tuple[FunctionType, tuple[str, ...]] | None:
    """The same code with the functions above in place of PyTorch's, and the ops that compute what it calls.

    None where it calls none of them.
    """
    known = function.__globals__
    changed: dict[str, Any] = {}
    ops = [OP_OF[name] for name in _called(function.__code__, known) if name in OP_OF]
    for name in dict.fromkeys(names_in(function.__code__)):
        value: Any = known.get(name)
        found: list[str] = []
        if value is F or value is nn:
            changed[name] = functions.functional if value is F else functions.nn
        elif _is(value, "timm.layers.activations", "quick_gelu"):
            found, changed[name] = ["gelu"], functions.quick_gelu(value)
        elif _is(value, "timm.layers.fast_norm", "rms_norm") or value is F.rms_norm:
            found, changed[name] = ["rms_norm"], functions.rms_norm(value)
        elif name == "ALL_ATTENTION_FUNCTIONS" and type(value).__module__.startswith("transformers."):
            found, changed[name] = ["attention"], functions.interfaces(value)
        else:
            continue
        ops += found
    if not ops:
        return None
    # Without the module's name torch.compile takes global names from here, not from the module.
    scope = {name: value for name, value in known.items() if name != "__name__"} | changed
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__, copy.__doc__ = function.__qualname__, function.__doc__
    return copy, tuple(dict.fromkeys(ops))


def _is(value: Any, module: str, name: str) -> bool:
    return getattr(value, "__module__", None) == module and getattr(value, "__name__", None) == name
