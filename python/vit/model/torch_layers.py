"""PyTorch's own layers, computed by the ops of a plan.

The layers of a model are exactly `torch.nn.Linear`, `Conv2d`, `LayerNorm`, `GELU`, `Dropout` and `Identity`, as timm's
are: tools that look for a type (dynamic quantization, adapters, per-sample gradients, counters) find them. Their
arithmetic is the plan's all the same:

* a layer that nobody has touched is not called: the op is, on the layer's parameters (1 us less, and ops can be fused);
* any other layer is called as timm calls it, with one tensor, and what it asks of PyTorch (`F.linear`, `F.layer_norm`,
  `F.gelu`, attention, a convolution of patches) goes to the plan's kernels, if they can run it.

Touched means: replaced by another class, hooked, given a `forward` of its own or through its class, parametrized, or
holding weights with an arithmetic of their own (sharded or quantized tensors). While a `TorchFunctionMode` of the
caller's looks at PyTorch's functions, all layers are; a `TorchDispatchMode` sees the operators that run, ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops.bound import NativeOp, spec_of
from .patches import patchify
from .quant_linear import QuantLinear

#: Names of the activations that `linear` computes, by what torch.nn.GELU calls them.
ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


#: Classes whose calls may be passed over -> their forward as it was at import: one that was put into a class since
#: then (attention that keeps its probabilities, arithmetic in another format) is called.
_FORWARDS: dict[type[nn.Module], Any] = {}
_CALL = nn.Module.__call__


def know(*kinds: type[nn.Module]) -> None:
    """Remembers the forward of classes."""
    _FORWARDS.update((kind, kind.forward) for kind in kinds)


know(nn.Linear, nn.Conv2d, nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.Dropout, nn.Identity, nn.Sequential, QuantLinear)


def as_known(kinds: Collection[type[nn.Module]]) -> bool:
    """Whether nobody has put another forward into one of the classes: 0.25 us a class."""
    # Lists, whose elements are compared by identity first: all() over a generator takes three times as long.
    return [kind.forward for kind in kinds] == [_FORWARDS.get(kind, kind.forward) for kind in kinds]


def watched_everywhere() -> bool:
    """Whether a hook, another way to call modules, or a mode looks at every module of the process."""
    # Read as attributes, not kept: the tables are PyTorch's to replace.
    return (
        nn.Module.__call__ is not _CALL
        or bool(
            everywhere._global_forward_hooks
            or everywhere._global_forward_pre_hooks
            or everywhere._global_backward_hooks
            or everywhere._global_backward_pre_hooks
        )
        or watching_functions()
    )


def watching_functions() -> bool:
    """Whether a mode of the caller's looks at PyTorch's functions. torch.compile and torch.export have some of their
    own, who want the ops."""
    return (
        torch._C._len_torch_function_stack() > 0
        and not torch.compiler.is_compiling()
        and any(not isinstance(mode, (_Planned, DeviceContext)) for mode in _get_current_function_mode_stack())
    )


def unwatched(modules: Iterable[nn.Module]) -> bool:
    """Whether no hook and no `forward` of its own shows that one of the modules is not called: 0.15 us a module."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
        if "forward" in m.__dict__:
            return False
    return True


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of that class and nobody would notice that it is not called."""
    return (
        type(module) is kind
        and unwatched((module,))
        and module._compiled_call_impl is None
        and as_known((kind,))
        and not watched_everywhere()
    )


def plain(tensors: Iterable[Any]) -> bool:
    """Whether kernels may compute with these: none is a wrapper with an arithmetic of its own (sharded, quantized)."""
    # Fake and functional tensors are subclasses too, and no wrappers: the registered ops know them.
    for t in tensors:  # noqa: SIM110 (all() of a generator takes three times as long)
        if type(t) not in _ORDINARY and is_traceable_wrapper_subclass(t):
            return False
    return True


_ORDINARY: tuple[type, ...] = (Tensor, nn.Parameter, type(None))  # torch.compile of torch 2.6 traces no sets


def call(ops: Any, layer: nn.Module, x: Any) -> Tensor:
    """layer(x), by the ops of a plan."""
    if not isinstance(x, Tensor):  # a tracer's stand-in
        return layer(x)
    compute = _COMPUTE.get(type(layer))
    if compute is not None and untouched(layer, type(layer)) and plain([*layer._parameters.values(), x]):
        return compute(ops, layer, x)
    if any(isinstance(getattr(ops, op), NativeOp) for op in ("linear", "layer_norm", "rms_norm", "gelu")):
        with planned(ops):
            return layer(x)
    return layer(x)


def planned(ops: Any) -> AbstractContextManager[Any]:
    """PyTorch's functions are computed by the ops of a plan, and modes of the caller see the functions."""
    return _below_modes(_Planned(ops)) if watching_functions() else _Planned(ops)


@contextmanager
def _below_modes(lowest: TorchFunctionMode) -> Iterator[None]:
    above = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    for mode in (lowest, *reversed(above)):
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in range(len(above) + 1):
            _pop_mode()
        for mode in reversed(above):
            _push_mode(mode)


def weight_and_bias(layer: nn.Module) -> tuple[Any, Any]:
    """layer.weight, layer.bias: nn.Module's look-up of a name takes 0.2 us."""
    own = layer._parameters
    # Replicas and sharding programs keep plain tensors in their places.
    return (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (layer.weight, layer.bias)


def linear(
    ops: Any,
    layer: nn.Linear | QuantLinear,
    x: Tensor,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """An untouched Linear or QuantLinear, with what may be fused to it."""
    if isinstance(layer, QuantLinear):
        return layer.product(ops)(x, layer.weight, layer.weight_scale, layer.bias, activation, residual, scale)
    return ops.linear(x, *weight_and_bias(layer), activation, residual, scale)


def layer_norm(ops: Any, layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """An untouched LayerNorm; over other dimensions than the last it is PyTorch's."""
    if layer.normalized_shape != x.shape[-1:]:
        return layer(x)
    return ops.layer_norm(x, *weight_and_bias(layer), layer.eps)


def rms_norm(ops: Any, layer: nn.RMSNorm, x: Tensor) -> Tensor:
    """An untouched RMSNorm; over other dimensions than the last, or with PyTorch's own eps, it is PyTorch's."""
    if layer.normalized_shape != x.shape[-1:] or layer.eps is None:
        return layer(x)
    return ops.rms_norm(x, layer.weight, layer.eps)


def dropout(ops: Any, layer: nn.Dropout, x: Tensor) -> Tensor:
    """An untouched Dropout."""
    return layer(x) if layer.training and layer.p else x


def _gelu(ops: Any, layer: nn.GELU, x: Tensor) -> Tensor:
    return ops.gelu(x, layer.approximate)


def _identity(ops: Any, layer: nn.Identity, x: Tensor) -> Tensor:
    return x


_COMPUTE: dict[type, Callable[..., Tensor]] = {
    nn.Linear: linear,
    QuantLinear: linear,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GELU: _gelu,
    nn.Dropout: dropout,
    nn.Identity: _identity,
}


class _Planned(TorchFunctionMode):
    """Sends what layers ask of PyTorch to the kernels of a plan, where these can run it."""

    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.ops = ops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        planned = PLANNED.get(func)
        y = None if planned is None else planned(self.ops, *args, **kwargs)
        return func(*args, **kwargs) if y is None else y


def runs(op: Any, x: Tensor, *others: Tensor | None) -> bool:
    """Whether a plan's kernel can be given these instead of PyTorch's function."""
    return (
        isinstance(op, NativeOp)
        and x.device.type in op.record.device_types
        and x.dtype in op.record.dtypes
        and plain((x, *others))
        and all(t is None or t.dtype == x.dtype or torch.is_autocast_enabled(x.device.type) for t in others)
    )


def _plan_linear(ops: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    fits = weight.dim() == 2 and runs(ops.linear, input, weight, bias)
    return ops.linear(input, weight, bias) if fits else None


def _plan_layer_norm(
    ops: Any,
    input: Tensor,
    normalized_shape: Iterable[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    fits = tuple(normalized_shape) == input.shape[-1:] and runs(ops.layer_norm, input, weight, bias)
    return ops.layer_norm(input, weight, bias, eps) if fits else None


def _plan_rms_norm(
    ops: Any, input: Tensor, normalized_shape: Iterable[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor | None:
    fits = tuple(normalized_shape) == input.shape[-1:] and eps is not None and runs(ops.rms_norm, input, weight)
    return ops.rms_norm(input, weight, eps) if fits else None


def _plan_gelu(ops: Any, input: Tensor, approximate: str = "none") -> Tensor | None:
    return ops.gelu(input, approximate) if runs(ops.gelu, input) else None


def _plan_conv2d(
    ops: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """A convolution whose stride is its kernel's size is a product with patches: [B, C, H, W] -> [B, dim, gh, gw]."""
    # Sizes are tensors while torch.jit.trace looks on.
    kernel = int(weight.shape[2]), int(weight.shape[3])
    fits = is_patch_projection(kernel, stride, padding, dilation, groups) and input.dim() == 4
    if not fits or not runs(ops.linear, input, weight, bias):
        return None
    rows, columns = int(input.shape[2]) // kernel[0], int(input.shape[3]) // kernel[1]
    image = input[:, :, : rows * kernel[0], : columns * kernel[1]]
    y = ops.linear(patchify(image, kernel, ops.movement.contiguous), weight.flatten(1), bias)  # [B, N, dim]
    return ops.movement.contiguous(y.transpose(1, 2)).unflatten(2, (rows, columns))


def _plan_attention(
    ops: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attention without a mask: query [B, H, N, D], key and value [B, H, L, D] -> [B, H, N, D]."""
    op = ops.attention
    if attn_mask is not None or dropout_p or is_causal or query.dim() != 4 or not runs(op, query, key, value):
        return None
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    fits = k.shape == v.shape and q.shape[::2] == k.shape[::2] and q.shape[3] == k.shape[3]
    if not fits or op.op.limits(spec_of(op.op, {"q": q, "k": k, "v": v})):
        return None
    return op(q, k, v, scale=scale).transpose(1, 2)


def is_patch_projection(
    kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int, step: tuple[int, int] | None = None
) -> bool:
    """Whether these are the arguments of a convolution that reads each pixel once. step: instead, of one that reads
    whole patches so many pixels apart."""
    return (
        tuple(stride if isinstance(stride, (tuple, list)) else (stride,) * 2) == (step or kernel)
        and padding in (0, (0, 0), "valid")
        and dilation in (1, (1, 1))
        and groups == 1
    )


#: PyTorch's functions -> the op of a plan that computes them; None where it cannot.
PLANNED: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _plan_linear,
    F.layer_norm: _plan_layer_norm,
    F.rms_norm: _plan_rms_norm,
    F.gelu: _plan_gelu,
    F.conv2d: _plan_conv2d,
    F.scaled_dot_product_attention: _plan_attention,
}
