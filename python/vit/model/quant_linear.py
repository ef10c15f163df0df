"""A linear layer on numbers of 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import BackendError, Spec
from ..ops.quantized import FORMATS, INT8, Format
from .planned import CallsOps


class QuantLinear(CallsOps, nn.Module):
    """x weight^T + bias as `vit.ops.linear_int8` or `linear_fp8` has it: [..., in_features] -> [..., out_features].

    Buffers: weight [out_features, in_features] int8 or float8_e4m3fn, which decides, weight_scale and bias
    [out_features] float32; the bias is None where there is none. All keep their types when the module is given another.
    """

    bias: Tensor | None
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format = next(form.name for form in FORMATS.values() if form.dtype == weight.dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, mean: Tensor | None = None, form: Format = INT8) -> QuantLinear:
        """Of a Linear's weight and bias, rounded row by row as the format says.

        With the mean of the input [in_features] a bias takes back what rounding takes from the mean of the output.
        """
        q, scale = form.quantize_rows(weight.detach())
        if bias is not None:
            bias = bias.detach().float().clone()
            if mean is not None:
                bias += (weight.detach().float() - q.float() * scale) @ mean.to(bias)
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
        return Spec(
            FORMATS[self.format].routine, dtype, shapes, False, device_type=device.type, device_index=device.index
        )

    def product(self, ops: Any) -> Callable[..., Tensor]:
        """The routine of a plan that multiplies by this weight."""
        return getattr(ops, FORMATS[self.format].routine)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.ops)(x, self.weight, self.weight_scale, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        kept = {name: getattr(self, name) for name in ("weight", "weight_scale", "bias")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = getattr(self, name)
            if before is not None and now.dtype != before.dtype:  # another place, but the same numbers
                setattr(self, name, now.to(before.dtype) if before.is_meta else before.to(now.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """With the weight as bytes: PyTorch (2.14 too) writes a pickle of an e4m3 tensor that it cannot read."""
        return self.__dict__ | {"_buffers": self._buffers | {"weight": self.weight.view(torch.uint8)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight = self.weight.view(FORMATS[self.format].dtype)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Refuses numbers of another format: PyTorch would round them to this one, under the scales of the other."""
        given, errors = state.get(f"{prefix}weight"), rest[-1]
        if isinstance(given, Tensor) and given.dtype != self.weight.dtype:
            errors.append(
                f"{prefix}weight is {given.dtype}, this layer multiplies {self.weight.dtype}: load it into a model "
                "that vit.quantize made with the same dtype"
            )
            return
        super()._load_from_state_dict(state, prefix, *rest)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, dtype={self.weight.dtype}"
