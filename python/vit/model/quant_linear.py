"""A linear layer on 8-bit integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..backends import BackendError, Spec
from ..ops._linear_int8 import quantize_rows
from .planned import CallsOps


class QuantLinear(CallsOps, nn.Module):
    """x weight^T + bias as `vit.ops.linear_int8` computes it: [..., in_features] -> [..., out_features].

    Buffers: weight [out_features, in_features] int8, weight_scale and bias [out_features] float32; the bias is None
    where there is none. weight_scale and bias stay float32 when the module is given another dtype.
    """

    bias: Tensor | None
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, mean: Tensor | None = None) -> QuantLinear:
        """Of a Linear's weight and bias: weight_scale = max |row of the weight| / 127, rounded half to even.

        With the mean of the input [in_features] a bias takes back what rounding takes from the mean of the output.
        """
        q, scale = quantize_rows(weight.detach())
        if bias is not None:
            bias = bias.detach().float().clone()
            if mean is not None:
                bias += (weight.detach().float() - q * scale) @ mean.to(bias)
        return cls(q, scale.flatten(), bias).eval()

    def own_spec(self, device: torch.device, dtype: torch.dtype, training: bool) -> Spec:
        """Its product, for inference; BackendError for training."""
        if training:
            raise BackendError(
                "vit: a quantized model has no backward: train the model first and quantize it then (vit.quantize)"
            )
        shapes: dict[str, tuple[int | str, ...]] = {
            "x": ("*", self.in_features),
            "weight": (self.out_features, self.in_features),
        }
        return Spec("linear_int8", dtype, shapes, False, device_type=device.type, device_index=device.index)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear_int8(x, self.weight, self.weight_scale, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        kept = {name: getattr(self, name) for name in ("weight", "weight_scale", "bias")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = getattr(self, name)
            if before is not None and now.dtype != before.dtype:  # another place, but the same numbers
                setattr(self, name, now.to(before.dtype) if before.is_meta else before.to(now.device))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
