// gelu: y = gelu(x), dx = dy gelu'(x), elementwise (formulas: activation.h).
//
// Saved for the backward: x. A sub-group takes kElements adjacent elements, a vector at a time. 2 elements moved
// forward, 3 backward.
#pragma once

#include "activation.h"

template <class T>
VIT_KERNEL gelu_fwd(const T* x, T* y, int64 n, Activation activation) {
  using A = Acc<T>;
  const Place at = place();
  const int64 first = at.unit * vit::tiles::kElements;
  if (first >= n) return;
  const T* in = x + first;
  T* out = y + first;
  const int lane = at.lane, count = n - first < vit::tiles::kElements ? int(n - first) : vit::tiles::kElements;
  for_columns(count, lane,
              [&](int i) VIT_ALWAYS { store(out + i + lane, activate(activation, load<A>(in + i + lane))); });
}

template <class T>
VIT_KERNEL gelu_bwd(const T* dy, const T* x, T* dx, int64 n, Activation activation) {
  using A = Acc<T>;
  const Place at = place();
  const int64 first = at.unit * vit::tiles::kElements;
  if (first >= n) return;
  const T *grad = dy + first, *in = x + first;
  T* out = dx + first;
  const int lane = at.lane, count = n - first < vit::tiles::kElements ? int(n - first) : vit::tiles::kElements;
  for_columns(count, lane, [&](int i) VIT_ALWAYS {
    store(out + i + lane, load<A>(grad + i + lane) * activation_derivative(activation, load<A>(in + i + lane)));
  });
}
