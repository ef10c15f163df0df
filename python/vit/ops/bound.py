"""The callables of an op, one for each backend: `bind(op, backend)`.

* For the reference: the plain PyTorch function, which autograd and torch.compile understand by themselves.
* For a native backend, by what the arguments are:

  - ordinary tensors, nothing looking on: the *launcher* (allocate outputs, pass pointers), directly where no gradient
    is wanted, else inside one `autograd.Function`;
  - in a graph that other programs run (torch.jit.trace, torch.export, ONNX): PyTorch's own ops, as for the reference;
  - anything else (torch.compile, fake tensors, a dispatch mode, tensor subclasses): the *registered op*
    `torch.ops.vit_<backend>.<op>_fwd/_bwd`, since a raw kernel given a fake tensor would read address 0.

`torch.library.custom_op` with `register_autograd` would be one line and costs 12 us per call against 4.2 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from ..backends import BackendError, NativeBackend, Spec, constant
from . import flops, registration
from .launch import autocast_dtype
from .op import Op
from .repeat import Again, Learn, like, repeats

_CPU = torch.device("cpu")

#: What a launcher may be given: anything else (subclasses, proxies) goes through the dispatcher.
_ORDINARY = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, tuple, torch.dtype})

_NO_TRANSFORMS = (
    "vit: {what} is not offered by the native kernel of '{op}' on backend '{backend}': its backward is a kernel, not a "
    'differentiable function. Use backend="reference"; where PyTorch\'s fused attention cannot do it either, '
    "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)


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

    #: Whether what no kernel can do (a transform, a dtype) is refused. It is where the backend was named; what "auto"
    #: chose is the reference then.
    strict = True

    @cached_property
    def lenient(self) -> NativeOp:
        """The same kernels, chosen by "auto"."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__ | {"strict": False}
        return other

    @cached_property
    def repeats(self) -> tuple[Again, Learn]:
        """How calls that were made before are repeated."""
        return repeats(self.record)

    def __reduce__(self) -> tuple[Any, ...]:
        return _bind_by_name, (self.op.name, self.backend, self.strict)

    def __init__(self, op: Op, backend: str) -> None:
        super().__init__(op, backend)
        record = backends.get(backend)
        assert isinstance(record, NativeBackend)  # for the type checker: bind_all() looks before it calls
        self.record = record
        self.fwd_op, self.bwd_op = registration.register(op, record)
        registration.register_gradients(op, self.fwd_op, self.backward, self.guard_second)
        self.direct = _autograd_function(self, self.launched)
        self.dispatched = _autograd_function(self, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return self.compiled(*args, **kwargs)
        again, learn = self.repeats
        y: Any = False if kwargs or forward_ad._current_level >= 0 else again(args, self.record.scratch(_CPU))
        if type(y) is Tensor:
            return y
        if torch._C._get_tracing_state() is not None:
            return self.op.reference(*args, **kwargs)
        inputs, finish = self.op.arguments(*args, **kwargs)
        if self.transformed(inputs) or not self.takes(inputs):
            return self.op.reference(*args, **kwargs)
        direct = ordinary(inputs)
        graph = torch.is_grad_enabled() and _any_requires_grad(inputs)
        new = y is None and direct and not graph
        if graph:
            y = (self.direct if direct else self.dispatched).apply(*inputs)
        elif direct:
            if new:
                self.record.lib.listen()
            outputs = self.op.launch_fwd(self.record, *inputs, False)
            y = outputs[0] if type(outputs) is tuple else outputs
        else:
            y = _tuple(dispatched(self.fwd_op, *inputs, False))[0]
        y = y if finish is None else finish(y)
        if new:
            learn(args, y, like(self.record, y))
        return y

    def compiled(self, *args: Any, **kwargs: Any) -> Tensor:
        """A call that becomes part of a graph: of torch.compile the registered op, which has gradients of its own, as
        torch 2.6 traces no autograd.Function with a closure."""
        if runs_elsewhere():
            return self.op.reference(*args, **kwargs)
        inputs, finish = self.op.arguments(*args, **kwargs)
        if not self.takes(inputs):
            return self.op.reference(*args, **kwargs)
        saved = torch.is_grad_enabled() and _any_requires_grad(inputs)
        y = _tuple(self.fwd_op(*_distinct(inputs), saved))[0]
        return y if finish is None else finish(y)

    def launched(self, *args: Any) -> tuple[Any, ...]:
        """The forward kernel by its launcher."""
        return _tuple(self.op.launch_fwd(self.record, *args))

    def forward(self, *args: Any) -> tuple[Any, ...]:
        """The forward kernel, by the shortest path that is safe for these arguments."""
        return self.launched(*args) if ordinary(args) else _tuple(dispatched(self.fwd_op, *args))

    def backward(self, *args: Any) -> Any:
        """The backward kernel, likewise. Of a batch of gradients (vmap around autograd) PyTorch calls the registered op
        once for each."""
        fits = ordinary(args) and not batched(args[0])
        return self.op.launch_bwd(self.record, *args) if fits else dispatched(self.bwd_op, *args)

    def transformed(self, inputs: Sequence[Any]) -> bool:
        """Whether the reference has to compute, since a kernel would silently lose a derivative or a batch dimension;
        BackendError where the backend was named."""
        what = transform(inputs)
        if what is not None and self.strict:
            self.refuse(what)
        return what is not None

    def takes(self, inputs: Sequence[Any]) -> bool:
        """The guard of every call: one device of ours, a dtype of ours. The kernels check sizes themselves.

        False where the reference has to compute: "auto" chose these kernels when the model was built, and autocast
        asks for a dtype that they have not. An error where the backend was named.
        """
        device = inputs[0].device
        fits = device.type in self.record.device_types and inputs[0].dtype in self.record.dtypes
        for a in inputs[1:]:  # all(...) over a generator would be a fifth of a small call
            if isinstance(a, Tensor) and a.device != device:
                fits = False
        if fits:
            return True
        tensors = {name: a for name, a in zip(self.op.inputs, inputs, strict=False) if isinstance(a, Tensor)}
        if len({t.device for t in tensors.values()}) > 1:
            where = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
            raise ValueError(f"vit.ops.{self.op.name}: all tensors must be on one device, got {where}")
        if not self.strict:
            return False
        spec = spec_of(self.op, tensors)
        raise BackendError(backends.refusal(self.backend, spec, self.op.limits))

    def guard_second(self, ctx: Any, dy: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients as they are, or, where a graph of them is made, so that their own backward is refused."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return tuple(grads)
        kept = [g for g in grads if g is not None]
        saved = [t for t in ctx.saved_tensors if t is not None]
        guarded = iter(_NoSecondBackward.apply(self, len(kept), *kept, dy, *saved))
        return tuple(None if g is None else next(guarded) for g in grads)

    def refuse(self, what: str) -> NoReturn:
        raise BackendError(_NO_TRANSFORMS.format(what=what, op=self.op.name, backend=self.backend))


def spec_of(op: Op, tensors: dict[str, Tensor]) -> Spec:
    """What a call with the tensors needs; the first decides the device, and without autocast the dtype."""
    first = next(iter(tensors.values()))
    wanted = autocast_dtype(first) if op.autocasts else None
    return Spec(
        op.name,
        dtype=wanted or first.dtype,
        shapes={name: tuple(t.shape) for name, t in tensors.items()},
        training=torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()),
        device_type=first.device.type,
        device_index=first.device.index,
    )


def call(op: Any, backend: str, *args: Any, **kwargs: Any) -> Tensor:
    """A public op: the named backend, or for "auto" the most preferred one that can run these arguments."""
    for name, allowed in op.tensors.items():
        if name in kwargs and not isinstance(kwargs[name], allowed):
            raise TypeError(f"vit.ops.{op.name}: {name} must be a torch.Tensor, got {type(kwargs[name]).__name__}")
    if backend == "auto":
        if not torch.compiler.is_compiling() and transform((*args, *kwargs.values())):
            return op.reference(*args, **kwargs)
        tensors = {n: a for n, a in (*zip(op.inputs, args, strict=False), *kwargs.items()) if isinstance(a, Tensor)}
        backend = backends.choose("auto", [spec_of(op, tensors)], op.limits).name
    return bind(op, backend)(*args, *kwargs.values())  # in the order of the op's own arguments


def transform(inputs: Sequence[Any] | None = None) -> str | None:
    """The transform that a call is part of, which no kernel can follow: one of torch.func, or forward-mode
    differentiation of one of the inputs (None: of anything); None where there is none."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform (grad, vmap, jvp, ...)"
    if forward_ad._current_level >= 0 and (
        inputs is None or any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in inputs)
    ):
        return "forward-mode differentiation"
    return None


@constant
def runs_elsewhere() -> bool:
    """Whether what is traced becomes a graph that other programs read (torch.jit.trace, torch.export, ONNX; OpenVINO
    asks for one of these): they have not our kernels, so it holds PyTorch's own ops."""
    return (
        torch._C._get_tracing_state() is not None
        or getattr(torch.compiler, "_is_exporting_flag", False)  # from torch 2.7 on
        or torch.onnx.is_in_onnx_export()
    )


def ordinary(args: Sequence[Any]) -> bool:
    """Whether raw pointers may be taken: nothing traces, no dispatch mode is on, every tensor is exactly a Tensor."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or not _ORDINARY.issuperset(map(type, args))
    ):
        return False
    for a in args:  # noqa: SIM110 (any() of a generator takes three times as long)
        # The imaginary part of a conjugated tensor is a view whose sign only the dispatcher turns.
        if type(a) is Tensor and a.is_neg():
            return False
    return True


def batched(dy: Tensor) -> bool:
    """Whether a gradient stands for a batch of them: of is_grads_batched=True, or in torch.vmap."""
    return not torch._C._has_storage(dy)  # 0.05 us, and only in a backward: whose gradient alone can be one


def _any_requires_grad(args: Sequence[Any]) -> bool:
    for a in args:  # noqa: SIM110 (any() of a generator takes three times as long)
        if isinstance(a, Tensor) and a.requires_grad:
            return True
    return False


def dispatched(op: Any, *args: Any) -> Any:
    """A registered op, of which counters of operations know the work."""
    flops.offer()
    return op(*args)


def _distinct(inputs: Sequence[Any]) -> list[Any]:
    """The inputs with repeated tensors replaced by views: torch.compile refuses attention(x, x, x) otherwise."""
    distinct: list[Any] = []
    for a in inputs:
        repeated = isinstance(a, Tensor) and any(a is other for other in distinct)
        distinct.append(a.view_as(a) if repeated else a)
    return distinct


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _autograd_function(
    bound: NativeOp, forward_kernel: Callable[..., tuple[Any, ...]]
) -> type[torch.autograd.Function]:
    op = bound.op

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            outputs = forward_kernel(*args, True)
            op.save(ctx, args, outputs)
            return outputs[0]

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            return bound.guard_second(ctx, dy, op.backward(ctx, bound.backward, dy))

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


def bind(op: Any, backend: str, strict: bool = True) -> BoundOp:
    """The op on a backend of that name, or on "auto"; ValueError for an unknown name. Not strict: see NativeOp."""
    if (op.name, backend) not in _BOUND:
        backends.get(backend)  # raises
    return _bind_by_name(op.name, backend, strict)


#: Made once at import: torch.compile traces the look-up but not the making.
_BOUND: dict[tuple[str, str], BoundOp] = {}


def bind_all(op: Op) -> None:
    """Makes the callables of a new op for every backend, and registers its kernels with torch.

    Programs saved by torch.export name the registered ops, so they exist as soon as vit is imported.
    """
    put(AutoOp(op, "auto"))
    for record in backends.records().values():
        native = isinstance(record, NativeBackend)
        put((NativeOp if native else ReferenceOp)(op, record.name))


def put(callable: BoundOp) -> None:
    """Makes `bind` find it."""
    _BOUND[callable.op.name, callable.backend] = callable


def _bind_by_name(op: str, backend: str, strict: bool = True) -> BoundOp:
    bound = _BOUND[op, backend]
    return bound if strict or not isinstance(bound, NativeOp) else bound.lenient
