"""`vit.patch`: the modules of a live model compute with vit's ops.

A module gets a subclass of its class, of the same name, whose `forward` is other code: parameters, buffers, names,
hooks and isinstance() are what they were. A function put on each instance instead would break replicas and shallow
copies, and hold the model in a circle.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..backends import BackendError, Spec, get, reasons, records
from ..model import VisionTransformer
from ..ops import OPS
from . import block, fused
from .functional import candidates, evaluated_with, functions_of, names_in
from .report import Left, PatchReport, Swapped

#: Classes that hold other modules, or change nothing that an op computes.
_SILENT = (nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten)


def patch(model: nn.Module, backend: str = "auto") -> PatchReport:
    """Lets attention, norms, activations, gated MLPs and linear layers of a live model compute with vit's ops.

    model: of timm, transformers, torchvision or another library; also inside a wrapper (DistributedDataParallel,
    torch.compile). Parameters, their names, hooks and modes stay as they are, and so do logits and gradients, to the
    parity bound. backend: "auto" or a name of vit.backends().

    The report says of every module with arithmetic what was swapped (name, class, op, backend) and what not and why;
    `report.undo()` gives every module its own code back, and so does the end of `with vit.patch(model):`. A call with a
    mask, with dropout of probabilities, in a dtype or on a device that the ops do not have is computed by the module's
    own code. Not in graphs of second derivatives, which the kernels refuse by name.

    Raises TypeError for what is no module or is vit's own model, BackendError for a backend that cannot be used here.
    """
    _check(model, backend)
    report = PatchReport(type(model).__name__, backend, (), ())
    swapped: list[Swapped] = []
    left: list[Left] = []
    inside: set[nn.Module] = set()  # of modules that do not call them
    for name, module in list(model.named_modules()):
        if module in inside:
            continue
        kind = type(module)
        if isinstance(module, (nn.MultiheadAttention, torch.jit.ScriptModule, VisionTransformer)):
            inside |= set(module.modules()) - {module}
        found = _swap(module, model, backend)
        if isinstance(found, str):
            left.append(Left(name, kind.__name__, found))
        elif found is not None:
            since, ops, where = found
            try:
                module.__class__ = since
            except TypeError as error:  # a class whose instances have another layout in memory
                left.append(Left(name, kind.__name__, str(error)))
                continue
            report.remember(name, module, kind, since)
            if hasattr(module, "ls1"):  # a Block computes its scales itself
                inside |= {module.ls1, module.ls2}
            swapped.append(Swapped(name, kind.__name__, ops, where, _note(module, ops)))
    report.swapped, report.left = tuple(swapped), tuple(left)
    return report


def _check(model: Any, backend: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"vit: patch takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, VisionTransformer):
        raise TypeError(
            "vit: patch: this is vit's own model, whose ops are its own already; vit.create(backend=...) chooses them"
        )
    if backend != "auto" and (why := get(backend).unavailable()) is not None:
        usable = ", ".join(name for name, record in records().items() if record.unavailable() is None)
        raise BackendError(f"vit: backend '{backend}' cannot be used on this machine: {why}\nUsable here: {usable}.")


def _swap(module: nn.Module, model: nn.Module, backend: str) -> tuple[type, tuple[str, ...], str] | str | None:
    """The class that the module gets, its ops and their backend; or why it gets none; None where there is nothing."""
    kind: Any = type(module)
    if hasattr(kind, "_vit_swapped"):
        return f"swapped before, for backend {kind._vit_swapped[1]!r}"
    if isinstance(module, VisionTransformer):
        return "vit's own model, whose ops are its own already"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript holds no Python code to change"
    if kind in _SILENT:
        return None
    found = swapped(kind, backend, _own(kind))
    if found is None:
        return _reason_of_none(module)
    if why := _unusual(module):
        return why
    since, ops = found
    where = _backend_for(module, model, backend, ops)
    return (since, ops, where[0]) if isinstance(where, tuple) else where


def _own(kind: Any) -> Any:
    """The function whose code is exchanged."""
    return inspect.getattr_static(kind, "_conv_forward" if kind is nn.Conv2d else "forward", None)


@functools.cache
def swapped(kind: Any, backend: str, own: Any) -> tuple[type, tuple[str, ...]] | None:
    """The subclass of a class of modules that computes with vit's ops, and these; None where its code has none."""
    if not isinstance(own, FunctionType):
        return None
    functions = functions_of(backend)
    if tuple(names_in(own.__code__)) == block.BLOCK:
        made: Any = block.block(own, functions), ("linear", "attention", "gelu")
    else:
        made = fused.fused(kind, functions) or evaluated_with(own, functions)
    if made is None:
        return None
    forward, ops = made
    members: dict[str, Any] = {own.__name__: forward, "_vit_swapped": (kind, backend), "__reduce_ex__": _reduce}
    members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind)(kind.__name__, (kind,), members | {"__slots__": ()}), ops


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles are made of the class before and the backend: a class made at run time has no place that a
    pickle could name."""
    kind, backend = type(self)._vit_swapped
    _, _, *rest = kind.__reduce_ex__(self, protocol)
    return _new, (kind, backend), *rest


def _new(kind: Any, backend: str) -> Any:
    found = swapped(kind, backend, _own(kind))
    made: Any = kind if found is None else found[0]
    return made.__new__(made)


def _unusual(module: nn.Module) -> str | None:
    """What keeps a module of a class that could be swapped from it."""
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if hasattr(module, "parametrizations"):
        return "it is parametrized"
    foreign = [
        n for n, p in module._parameters.items() if p is not None and type(p) not in (nn.Parameter, torch.Tensor)
    ]
    if foreign:
        return f"{foreign[0]} is a {type(module._parameters[foreign[0]]).__name__}, not an ordinary parameter"
    if getattr(module, "fused_attn", True) is False:
        return "fused_attn is False: its probabilities exist, which the op does not make"
    if getattr(module, "_fast_norm", False):
        return "timm's fast norm, which rounds as autocast does"
    if isinstance(module, nn.MultiheadAttention):
        return fused.why_not(module)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
        return f"it normalises over {len(module.normalized_shape)} dimensions, and the op over the last"
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        return "eps is None: it depends on the dtype of each call"
    if type(module) is nn.Conv2d:
        return _no_patches(module)
    if tuple(names_in(_own(type(module)).__code__)) == block.BLOCK:
        return block.why_not(module)
    return _attention_function(module)


def _no_patches(conv: nn.Conv2d) -> str | None:
    from ..model.torch_layers import is_patch_projection

    if is_patch_projection(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups):
        return None if conv.padding_mode == "zeros" else f"padding_mode is {conv.padding_mode!r}"
    return "a convolution whose stride is not its kernel's size: no product with patches"


def _attention_function(module: nn.Module) -> str | None:
    """transformers' modules say in their configuration which function computes attention."""
    if "ALL_ATTENTION_FUNCTIONS" not in names_in(type(module).forward.__code__):
        return None
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name == "sdpa":
        return None
    return f"its attention function is {name!r}; model.set_attn_implementation('sdpa') before"


def _backend_for(module: nn.Module, model: nn.Module, backend: str, ops: tuple[str, ...]) -> tuple[str] | str:
    """The backend that runs all of a module's ops, as (name,); or why none does."""
    like: torch.Tensor = next(module.parameters(), next(model.parameters(), torch.empty(0, device="cpu")))
    if backend == "reference":
        return ("reference",)
    width = _head_dim(module)
    shapes: dict[str, tuple[int | str, ...]] = {} if width is None else {"q": ("*", "*", "*", width)}
    why: dict[str, None] = {}
    native = candidates(backend)
    first = [record for record in native if like.device.type in record.device_types][:1]  # the one that calls go to
    for record in first or native:
        specs = [Spec(op, like.dtype, shapes if op == "attention" else {}, device_type=like.device.type) for op in ops]
        found = [reason for one in specs for reason in reasons(record, one, OPS[one.op].limits)]
        if not found:
            return (record.name,)
        why |= dict.fromkeys(f"{record.name}: {reason}" for reason in found)
    return "; ".join(why) or "no native backend can be used on this machine; vit.backends() says why"


def _head_dim(module: nn.Module) -> int | None:
    module = getattr(module, "attn", module)  # of a block
    if isinstance(found := getattr(module, "head_dim", None), int):
        return found
    width, heads = getattr(module, "embed_dim", None), getattr(module, "num_heads", None)
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


def _note(module: nn.Module, ops: tuple[str, ...]) -> str:
    """When a swapped module's own code computes."""
    if "attention" not in ops:
        return ""
    rates = [getattr(module, name, None) for name in ("attn_drop", "dropout", "attention_dropout")]
    rate = next((r for r in (getattr(r, "p", r) for r in rates) if isinstance(r, float) and r), 0.0)
    masks = "with a mask"
    if isinstance(module, nn.MultiheadAttention):
        masks = "with a mask, need_weights, or another sequence"
    dropped = f", and in training, for dropout {rate:g} of the probabilities" if rate else ""
    return f"{masks}{dropped}: its own code"


def _reason_of_none(module: nn.Module) -> str | None:
    """Why a module of a class without any of the functions is left; None for one that only calls other modules."""
    forward: Callable[..., Any] = inspect.unwrap(type(module).forward)
    names = set(names_in(forward.__code__)) if isinstance(forward, FunctionType) else set()
    if names & {"softmax", "Softmax"}:
        return "it computes attention or probabilities by itself, not by scaled_dot_product_attention"
    if isinstance(module, (nn.Dropout, nn.AlphaDropout)):
        return "random numbers in training, which stay PyTorch's" if module.p else None
    if any(True for _ in module.children()):
        return None
    if getattr(type(module), "__name__", "") == "DropPath":
        return "random numbers in training, which stay PyTorch's"
    return "no op of vit computes it"
