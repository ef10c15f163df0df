// swiglu: y = silu(gate) x, silu(g) = g / (1 + e^-g) (activation.h).
//
//   dx = dy silu(gate),  dgate = dy x silu'(gate)
//
// Saved for the backward: x and gate. Threads take runs of rows. Per element: 3 elements moved forward, 5 backward;
// about 15 vector operations and one division. Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {
namespace {

constexpr int64_t kElements = 4096;  // of one unit of work: below it a second thread costs more than it saves

// Calls f(row, j, n) for every vector of [M, C], in parallel; n of its lanes are elements.
template <class A, class F>
VIT_INLINE void for_vectors(int threads, int64_t M, int64_t C, const F& f) {
  const int64_t rows = max(int64_t{1}, kElements / max(C, int64_t{1}));
  parallel_for(threads, ceil_div(M, rows), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin * rows; row < min(end * rows, M); ++row) {
      int64_t j = 0;
      for (; j + kLanes<A> <= C; j += kLanes<A>) f(row, j, int64_t{kLanes<A>});
      if (j < C) f(row, j, C - j);
    }
  });
}

template <class T>
void forward(const SwigluFwd& p) {
  using A = Acc<T>;
  const T *x = static_cast<const T*>(p.x), *gate = static_cast<const T*>(p.gate);
  T* y = static_cast<T*>(p.y);
  for_vectors<A>(p.context.num_threads, p.M, p.C, [=, &p](int64_t row, int64_t j, int64_t n) {
    const Vec<A> g = load<A>(gate + row * p.gate_stride + j, n);
    store<A>(y + row * p.C + j, activate<T, Activation::silu>(g) * load<A>(x + row * p.x_stride + j, n), n);
  });
}

template <class T>
void backward(const SwigluBwd& p) {
  using A = Acc<T>;
  const T *dy = static_cast<const T*>(p.dy), *x = static_cast<const T*>(p.x), *gate = static_cast<const T*>(p.gate);
  T *dx = static_cast<T*>(p.dx), *dgate = static_cast<T*>(p.dgate);
  for_vectors<A>(p.context.num_threads, p.M, p.C, [=, &p](int64_t row, int64_t j, int64_t n) {
    const Vec<A> d = load<A>(dy + row * p.C + j, n), g = load<A>(gate + row * p.gate_stride + j, n);
    const Vec<A> slope = activation_derivative<T, Activation::silu>(g);
    store<A>(dgate + row * p.dgate_stride + j, d * load<A>(x + row * p.x_stride + j, n) * slope, n);
    store<A>(dx + row * p.dx_stride + j, d * activate<T, Activation::silu>(g), n);
  });
}

}  // namespace

void swiglu_fwd(const SwigluFwd& p) {
  with_dtype(p.dtype, [&](auto t) { forward<decltype(t)>(p); });
}

void swiglu_bwd(const SwigluBwd& p) {
  with_dtype(p.dtype, [&](auto t) { backward<decltype(t)>(p); });
}

}  // namespace vit::VIT_ISA
