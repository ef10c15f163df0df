"""The affine map of a fully connected layer on 8-bit integers, with what follows it fused in: a forward alone."""

from __future__ import annotations

from torch import Tensor

from .bound import call
from .quantized import INT8, routine_of


def linear_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiplies by a weight matrix of 8-bit integers, adds the bias, applies activation and scale, adds the residual.

    x_scale = max |x| of the row / 127, q = x / x_scale rounded half to even,
    y = scale * activation((sum of q weight) * (x_scale * weight_scale) + bias) + residual

    in float32: division, rounding and the sums in 32-bit integers are exact, so that q and the sums are equal on every
    backend, and y too where there are only they and the scales. A row whose largest |x| is below 2^-100 has the scale
    1; one that holds a NaN or an infinity gives NaN. activation: as of vit.ops.linear.

    x [..., K] float32, bfloat16 or float16, K at most 131072; weight [N, K] int8, from -127 to 127; weight_scale and
    bias [N] float32; residual [..., N] (the shape of y) or None; scale [N] or None; y [..., N] in x's dtype, or in the
    widest of x's, the residual's and the scale's. For inference: there is no backward.
    Raises ValueError for sizes or dtypes that do not fit, BackendError when the named backend cannot run it or a
    gradient is wanted.
    """
    given = {"x": x, "weight": weight, "weight_scale": weight_scale, "bias": bias, "activation": activation}
    return call(OP, backend, **given, residual=residual, scale=scale)


OP = routine_of(INT8)
