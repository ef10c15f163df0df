// gelu: y = f(x), dx = dy f'(x), elementwise, f an activation (formulas: activation.h).
//
// Saved for the backward: x. Threads take contiguous blocks of elements. Per element: 2 elements moved forward, 3
// backward; about 30 (float32) or 20 (bfloat16) vector operations and one division.
#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // elements of one unit of work: below it a second thread costs more than it saves

// Calls f(i, n) for every vector of [0, size), in parallel; n of its lanes are elements.
template <class A, class F>
VIT_INLINE void for_vectors(int threads, int64_t size, const F& f) {
  parallel_for(threads, ceil_div(size, kBlock), [&](int64_t begin, int64_t end, int) {
    const int64_t stop = min(end * kBlock, size);
    int64_t i = begin * kBlock;
    for (; i + kLanes<A> <= stop; i += kLanes<A>) f(i, int64_t{kLanes<A>});
    if (i < stop) f(i, stop - i);
  });
}

template <class T, Activation kActivation>
void forward(const GeluFwd& p) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  for_vectors<A>(p.context.num_threads, p.n,
                 [=](int64_t i, int64_t n) { store<A>(y + i, activate<T, kActivation>(load<A>(x + i, n)), n); });
}

template <class T, Activation kActivation>
void backward(const GeluBwd& p) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(p.x);
  const T* dy = static_cast<const T*>(p.dy);
  T* dx = static_cast<T*>(p.dx);
  for_vectors<A>(p.context.num_threads, p.n, [=](int64_t i, int64_t n) {
    store<A>(dx + i, load<A>(dy + i, n) * activation_derivative<T, kActivation>(load<A>(x + i, n)), n);
  });
}

}  // namespace

void gelu_fwd(const GeluFwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    with_activation(p.activation, [&](auto f) { forward<decltype(t), decltype(f)::value>(p); });
  });
}

void gelu_bwd(const GeluBwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    with_activation(p.activation, [&](auto f) { backward<decltype(t), decltype(f)::value>(p); });
  });
}

}  // namespace vit::VIT_ISA
