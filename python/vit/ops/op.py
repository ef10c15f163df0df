"""The glue between an op's formula and the kernels that run it: registration, autograd, and the choice of path.

This is the one clever file. An op is a record of functions (`Op`); `bind(op, backend)` gives a callable that takes

* for the reference: the plain PyTorch function, which autograd and torch.compile understand by themselves;
* for a native backend, one `autograd.Function` whose forward and backward call

  - the *launcher* (allocate outputs, pass pointers) when every tensor is an ordinary one: 1.2 us per call,
  - the *registered op* `torch.ops.vit_<backend>.<op>_fwd/_bwd` when something looks on (torch.compile, fake tensors,
    a dispatch mode, tensor subclasses): a raw kernel given a fake tensor would read address 0;

  and, where no gradient is wanted, the launcher or the registered op directly.

`torch.library.custom_op` with `register_autograd` would be one line and costs 12 us per call against 4.2 us.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from ..backends import BackendError, NativeBackend, Spec
from ..backends._base import constant

#: What a launcher may be given: anything else (subclasses, proxies) goes through the dispatcher.
_ORDINARY = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, list, tuple, torch.dtype})

_NO_TRANSFORMS = (
    "vit: {what} is not offered by the native kernel of '{op}' on backend '{backend}': its backward is a kernel, not a "
    'differentiable function. Use backend="reference"; where PyTorch\'s fused attention cannot do it either, '
    "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)


#: What a kernel returns: one tensor, or a tuple with None for each output that is not wanted.
Outputs = Tensor | tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Op:
    """Everything Python knows of one op; each function is written in ops/<name>.py.

    reference   the formula in plain PyTorch, with the public arguments; the oracle of all kernels
    arguments   public arguments -> the arguments of the forward kernel (casts, shapes), and what to do with its result
    fwd_schema, fwd_fake, fwd   schema, shape function and launcher of the forward kernel; its last argument `save`
                says whether the backward will follow, and its first output is the result. What is not computed is
                None from a launcher, `first argument.new_empty(0)` from a fake (a schema has no optional outputs)
    bwd_schema, bwd_fake, bwd   the same of the backward kernel
    save        (ctx, args, outputs): keep what backward needs
    backward    (ctx, bwd, dy): gradients for each argument of the forward kernel, None where not wanted
    limits      Spec -> reasons why no native kernel can run it
    """

    name: str
    reference: Callable[..., Tensor]
    arguments: Callable[..., tuple[tuple[Any, ...], Callable[[Tensor], Tensor] | None]]
    fwd_schema: str
    fwd_fake: Callable[..., Outputs]
    fwd: Callable[..., Outputs]
    bwd_schema: str
    bwd_fake: Callable[..., Outputs]
    bwd: Callable[..., Outputs]
    save: Callable[..., None]
    backward: Callable[..., tuple[Tensor | None, ...]]
    limits: Callable[[Spec], list[str]]

    #: Names of the forward kernel's arguments, the tensors among them first.
    inputs: tuple[str, ...] = field(init=False)
    #: The tensors among them -> what is allowed for each: a tensor, or None too.
    tensors: dict[str, tuple[type, ...]] = field(init=False)

    def __post_init__(self) -> None:
        arguments = self.fwd_schema.split("->")[0]
        object.__setattr__(self, "inputs", tuple(re.findall(r"(\w+)(?:,|\))", arguments)))
        kinds = {"": (Tensor,), "?": (Tensor, type(None))}
        object.__setattr__(self, "tensors", {n: kinds[k] for k, n in re.findall(r"Tensor(\??) (\w+)", arguments)})


class BoundOp:
    """An op on one backend: called with the op's public arguments, pickled and copied by its two names."""

    def __init__(self, op: Op, backend: str) -> None:
        self.op, self.backend = op, backend

    def __reduce__(self) -> tuple[Any, ...]:
        return _bind_by_name, (self.op.name, self.backend)

    def __deepcopy__(self, memo: Any) -> BoundOp:
        return self

    def __repr__(self) -> str:
        return f"vit.ops.{self.op.name} on {self.backend}"

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


class ReferenceOp(BoundOp):
    """The PyTorch formula itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.op.reference(*args, **kwargs)


class AutoOp(BoundOp):
    """The best backend for the arguments of each call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return call(self.op, "auto", *args, **kwargs)


class NativeOp(BoundOp):
    """A pair of compiled kernels behind one autograd.Function."""

    def __init__(self, op: Op, backend: str) -> None:
        super().__init__(op, backend)
        record = backends.get(backend)
        assert isinstance(record, NativeBackend)  # for the type checker: bind_all() looks before it calls
        self.record = record
        namespace = getattr(torch.ops, register(op, record))
        self.fwd_op = getattr(namespace, f"{op.name}_fwd").default
        self.bwd_op = getattr(namespace, f"{op.name}_bwd").default
        _register_gradients(self)
        self.function = _autograd_function(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        compiling = torch.compiler.is_compiling()
        tracing = torch._C._get_tracing_state() is not None
        if (compiling or tracing) and _exporting_to_onnx():
            return self.op.reference(*args, **kwargs)
        inputs, finish = self.op.arguments(*args, **kwargs)
        if not compiling:
            self.check_transforms(inputs)
        self.check(inputs)
        if tracing:
            y = self.trace(inputs)
        elif torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in inputs):
            y = self.function.apply(*(_distinct(inputs) if compiling else inputs))
        else:
            y = self.forward(*inputs, False)[0]
        return y if finish is None else finish(y)

    def forward(self, *args: Any) -> tuple[Any, ...]:
        """The forward kernel, by the shortest path that is safe for these arguments."""
        outputs = self.op.fwd(self.record, *args) if _ordinary(args) else self.fwd_op(*args)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(self, *args: Any) -> Any:
        """The backward kernel, likewise."""
        return self.op.bwd(self.record, *args) if _ordinary(args) else self.bwd_op(*args)

    def trace(self, inputs: Sequence[Any]) -> Any:
        """One node of a torch.jit trace: the registered op, which has gradients of its own.

        An autograd.Function would become a call into Python, which no trace can be compared by or saved with.
        """
        outputs = self.fwd_op(*inputs, False)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def check_transforms(self, inputs: Sequence[Any]) -> None:
        """Refuses what would silently lose a derivative or a batch dimension."""
        if torch._C._are_functorch_transforms_active():
            self.refuse("a torch.func transform (grad, vmap, jvp, ...)")
        if forward_ad._current_level >= 0 and any(
            isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in inputs
        ):
            self.refuse("forward-mode differentiation")

    def check(self, inputs: Sequence[Any]) -> None:
        """The guard of every call: one device of ours, a dtype of ours. The kernels check sizes themselves."""
        device = inputs[0].device
        fits = device.type in self.record.device_types and inputs[0].dtype in self.record.dtypes
        for a in inputs:  # all(...) over a generator would be a fifth of a small call
            if isinstance(a, Tensor) and a.device != device:
                fits = False
        if fits:
            return
        tensors = {name: a for name, a in zip(self.op.inputs, inputs, strict=False) if isinstance(a, Tensor)}
        if len({t.device for t in tensors.values()}) > 1:
            where = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
            raise ValueError(f"vit.ops.{self.op.name}: all tensors must be on one device, got {where}")
        spec = spec_of(self.op, tensors)
        raise BackendError(backends.refusal(self.backend, spec))

    def refuse(self, what: str) -> NoReturn:
        raise BackendError(_NO_TRANSFORMS.format(what=what, op=self.op.name, backend=self.backend))


def spec_of(op: Op, tensors: dict[str, Tensor]) -> Spec:
    """What a call with these tensors asks of a backend; the first one decides dtype and device."""
    first = next(iter(tensors.values()))
    return Spec(
        op.name,
        dtype=first.dtype,
        shapes={name: tuple(t.shape) for name, t in tensors.items()},
        training=torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()),
        device_type=first.device.type,
    )


def call(op: Op, backend: str, *args: Any, **kwargs: Any) -> Tensor:
    """A public op: the named backend, or for "auto" the most preferred one that can run these arguments."""
    for name, allowed in op.tensors.items():
        if name in kwargs and not isinstance(kwargs[name], allowed):
            raise TypeError(f"vit.ops.{op.name}: {name} must be a torch.Tensor, got {type(kwargs[name]).__name__}")
    if backend == "auto":
        tensors = {n: a for n, a in (*zip(op.inputs, args, strict=False), *kwargs.items()) if isinstance(a, Tensor)}
        backend = backends.choose("auto", [spec_of(op, tensors)]).name
    return bind(op, backend)(*args, **kwargs)


@constant
def _exporting_to_onnx() -> bool:
    """Whether what is traced becomes an ONNX file: it runs without our kernels, so it holds PyTorch's own ops."""
    return torch.onnx.is_in_onnx_export()


def _ordinary(args: Sequence[Any]) -> bool:
    """Whether raw pointers may be taken: nothing traces, no dispatch mode is on, every tensor is exactly a Tensor."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and _ORDINARY.issuperset(map(type, args))
        # The imaginary part of a conjugated tensor is a view whose sign only the dispatcher turns.
        and not any(type(a) is Tensor and a.is_neg() for a in args)
    )


def _distinct(inputs: Sequence[Any]) -> list[Any]:
    """The inputs with repeated tensors replaced by views: torch.compile refuses attention(x, x, x) otherwise."""
    distinct: list[Any] = []
    for a in inputs:
        repeated = isinstance(a, Tensor) and any(a is other for other in distinct)
        distinct.append(a.view_as(a) if repeated else a)
    return distinct


def _autograd_function(bound: NativeOp) -> type[torch.autograd.Function]:
    op = bound.op

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            outputs = bound.forward(*args, True)
            op.save(ctx, args, outputs)
            return outputs[0]

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            # sum().backward() sends stride-0 gradients; kernels read contiguous ones.
            grads = op.backward(ctx, bound.backward, dy.contiguous())
            if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                return _refuse_second(bound, ctx, dy, grads)
            return grads

    Function.__name__ = Function.__qualname__ = f"{op.name}_{bound.backend}"
    return Function


class _NoSecondBackward(torch.autograd.Function):
    """The identity on gradients made with create_graph=True, whose own backward says that there is none."""

    @staticmethod
    def forward(ctx: Any, bound: NativeOp, count: int, *tensors: Tensor) -> Any:
        ctx.bound = bound
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.bound.refuse("double backward")


def _refuse_second(bound: NativeOp, ctx: Any, dy: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    kept = [g for g in grads if g is not None]
    saved = [t for t in ctx.saved_tensors if t is not None]
    guarded = iter(_NoSecondBackward.apply(bound, len(kept), *kept, dy, *saved))
    return tuple(None if g is None else next(guarded) for g in grads)


def register(op: Op, record: NativeBackend) -> str:
    """Defines vit_<backend>::<op>_fwd and _bwd for torch.compile, fake tensors and profilers; returns the namespace."""
    namespace = f"vit_{record.name}"
    library = torch.library.Library(namespace, "FRAGMENT")
    _LIBRARIES.append(library)
    for direction, schema, launch, fake in (
        ("fwd", op.fwd_schema, op.fwd, op.fwd_fake),
        ("bwd", op.bwd_schema, op.bwd, op.bwd_fake),
    ):
        name = f"{op.name}_{direction}"
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _launcher(launch, record), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return namespace


def _register_gradients(bound: NativeOp) -> None:
    """The registered forward op differentiates by itself wherever no autograd.Function of ours stands around it: in
    torch.jit traces, whenever they run."""
    op = bound.op

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *args, saved = inputs
        # A trace says save=False whether or not its caller will want gradients: the forward is then run once more.
        outputs = output if saved else bound.fwd_op(*inputs[:-1], True)
        op.save(ctx, tuple(args), outputs if isinstance(outputs, tuple) else (outputs,))

    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = op.backward(ctx, bound.backward, dy.contiguous())
        return *(_refuse_second(bound, ctx, dy, grads) if torch.is_grad_enabled() else grads), None

    torch.library.register_autograd(bound.fwd_op, backward, setup_context=keep, lib=_LIBRARIES[-1])


_LIBRARIES: list[torch.library.Library] = []  # a Library undefines its ops when it is collected


def _launcher(launch: Callable[..., Any], record: NativeBackend) -> Callable[..., Any]:
    """A launcher as torch wants an op: what was not computed (None) is an empty tensor, as the fakes say."""

    def call(*args: Any) -> Any:
        outputs = launch(record, *args)
        if not isinstance(outputs, tuple):
            return outputs
        return tuple(args[0].new_empty(0) if y is None else y for y in outputs)

    return call


def bind(op: Op, backend: str) -> BoundOp:
    """The op on a backend of that name, or on "auto"; ValueError for an unknown name."""
    if (op.name, backend) not in _BOUND:
        backends.get(backend)  # raises
    return _BOUND[op.name, backend]


#: Made once at import: torch.compile traces the look-up but not the making.
_BOUND: dict[tuple[str, str], BoundOp] = {}


def bind_all(op: Op) -> None:
    """Makes the callables of a new op for every backend, and registers its kernels with torch.

    Programs saved by torch.export name the registered ops, so they exist as soon as vit is imported.
    """
    _BOUND[op.name, "auto"] = AutoOp(op, "auto")
    for record in backends.records().values():
        native = isinstance(record, NativeBackend)
        _BOUND[op.name, record.name] = (NativeOp if native else ReferenceOp)(op, record.name)


def _bind_by_name(op: str, backend: str) -> BoundOp:
    return _BOUND[op, backend]


# ----- what the ops' launchers share


def ptr(tensor: Tensor | None) -> int:
    """Address of the first element; 0 stands for "not given"."""
    return 0 if tensor is None else tensor.data_ptr()


def ptrs(*tensors: Tensor | None) -> tuple[int, ...]:
    """`ptr` of each."""
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


def launch(
    b: NativeBackend,
    kernel: Callable[..., None],
    workspace: Callable[..., int],
    pointers: tuple[int, ...],
    values: tuple[Any, ...],
    device: torch.device,
) -> None:
    """Calls a kernel that needs scratch memory: its fields are the pointers, the scratch memory, the other values."""
    nbytes = _workspace_bytes(workspace, len(pointers), values)
    scratch = b.workspace(nbytes, device) if nbytes else None
    kernel(*pointers, ptr(scratch), *values)


@functools.lru_cache(maxsize=1024)
def _workspace_bytes(workspace: Callable[..., int], pointers: int, values: tuple[Any, ...]) -> int:
    """Asked once per set of sizes, strides, dtypes and context: by the contract nothing else decides."""
    return workspace(*(0,) * (pointers + 1), *values)


def rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` [..., C] as rows of adjacent elements and the distance between rows; copies only when it must."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulator type of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast wants for matrix products of `x`; None when it is off or leaves `x` alone (float64, meta)."""
    kind = x.device.type
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
