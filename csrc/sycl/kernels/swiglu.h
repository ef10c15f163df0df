// swiglu: y = silu(gate) x;  dx = dy silu(gate),  dgate = dy x silu'(gate) (activation.h).
//
// Saved for the backward: x and gate. A sub-group takes `per_unit` rows, its lanes are columns. 3 elements moved
// forward, 5 backward.
#pragma once

#include "activation.h"

template <class T>
VIT_KERNEL swiglu_fwd(const T* x, const T* gate, T* y, int64 M, int C, int64 x_stride, int64 gate_stride,
                      int per_unit) {
  using A = Acc<T>;
  const Place at = place();
  const int lane = at.lane;
  const int64 first = at.unit * per_unit, stop = first + per_unit < M ? first + per_unit : M;
  for (int64 row = first; row < stop; ++row) {
    const T *values = x + row * x_stride, *gates = gate + row * gate_stride;
    T* out = y + row * C;
    for_columns(C, lane, [&](int c) VIT_ALWAYS {
      store(out + c + lane, load<A>(values + c + lane) * activate(Activation::silu, load<A>(gates + c + lane)));
    });
  }
}

template <class T>
VIT_KERNEL swiglu_bwd(const T* dy, const T* x, const T* gate, T* dx, T* dgate, int64 M, int C, int64 x_stride,
                      int64 gate_stride, int64 dx_stride, int64 dgate_stride, int per_unit) {
  using A = Acc<T>;
  const Place at = place();
  const int lane = at.lane;
  const int64 first = at.unit * per_unit, stop = first + per_unit < M ? first + per_unit : M;
  for (int64 row = first; row < stop; ++row) {
    const T *grad = dy + row * C, *values = x + row * x_stride, *gates = gate + row * gate_stride;
    T *out = dx + row * dx_stride, *out_gate = dgate + row * dgate_stride;
    for_columns(C, lane, [&](int c) VIT_ALWAYS {
      const A d = load<A>(grad + c + lane), g = load<A>(gates + c + lane);
      store(out_gate + c + lane, d * load<A>(values + c + lane) * activation_derivative(Activation::silu, g));
      store(out + c + lane, d * activate(Activation::silu, g));
    });
  }
}
