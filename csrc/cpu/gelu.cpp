// gelu: y = gelu(x), dx = dy gelu'(x), elementwise (formulas: activation.h).
//
// Saved for the backward: x. Threads take contiguous blocks of elements. Per element: 2 elements moved forward, 3
// backward; some 20 operations, so that large tensors are bound by memory.
#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // elements of one unit of work: below it a second thread costs more than it saves

template <class T, bool kTanh>
void forward(const GeluFwd& p) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  parallel_for(p.context.num_threads, ceil_div(p.n, kBlock), [&](int64_t begin, int64_t end, int) {
    const int64_t stop = min(end * kBlock, p.n);
    for (int64_t i = begin * kBlock; i < stop; i += kLanes<A>)
      store<A>(y + i, gelu<A, kTanh>(load<A>(x + i, stop - i)), stop - i);
  });
}

template <class T, bool kTanh>
void backward(const GeluBwd& p) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(p.x);
  const T* dy = static_cast<const T*>(p.dy);
  T* dx = static_cast<T*>(p.dx);
  parallel_for(p.context.num_threads, ceil_div(p.n, kBlock), [&](int64_t begin, int64_t end, int) {
    const int64_t stop = min(end * kBlock, p.n);
    for (int64_t i = begin * kBlock; i < stop; i += kLanes<A>) {
      const int64_t n = stop - i;
      store<A>(dx + i, load<A>(dy + i, n) * gelu_grad<A, kTanh>(load<A>(x + i, n)), n);
    }
  });
}

}  // namespace

void gelu_fwd(const GeluFwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.activation == Activation::gelu ? forward<T, false>(p) : forward<T, true>(p);
  });
}

void gelu_bwd(const GeluBwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.activation == Activation::gelu ? backward<T, false>(p) : backward<T, true>(p);
  });
}

}  // namespace vit::VIT_ISA
