// What linear and linear_int8 do with a result before they write it: y = scale activation(value + bias) + residual.
#pragma once

#include "activation.h"
#include "common.h"

// Finishes one vector of results: `at` is the place of its first lane in y, `column` that lane's column. Pointers may
// be null; preact takes value + bias.
template <class A, class P, class O, class T>
VIT_INLINE void epilogue(A value, int64 at, int column, int lane, const P* bias, const A* scale, const O* residual,
                         O* y, T* preact, Activation activation) {
  if (bias) {
    const P* b = bias + column;
    value += load<A>(b + lane);
  }
  if (preact) {
    T* p = preact + at;
    store(p + lane, value);
  }
  value = activate(activation, value);
  if (scale) {
    const A* s = scale + column;
    value *= s[lane];
  }
  if (residual) {
    const O* r = residual + at;
    value += load<A>(r + lane);
  }
  O* out = y + at;
  store(out + lane, value);
}
