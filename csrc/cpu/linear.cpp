// linear: y = activation(x weight^T + bias) + residual.
//
//   dz = dy activation'(preact),  dx = dz weight,  dweight = dz^T x,  dbias = sum over rows of dz
//
// Saved for the backward: preact = x weight^T + bias, where there is an activation. Threads take rows of the result.
#include "cpu/activation.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace vit::VIT_ISA {
namespace {

template <class A>
VIT_INLINE Vec<A> activate(Activation activation, Vec<A> x) {
  if (activation == Activation::gelu) return gelu<A, false>(x);
  if (activation == Activation::gelu_tanh) return gelu<A, true>(x);
  return x;
}

template <class A>
VIT_INLINE Vec<A> activate_grad(Activation activation, Vec<A> x) {
  return activation == Activation::gelu ? gelu_grad<A, false>(x) : gelu_grad<A, true>(x);
}

template <class T, class P, class O>
void forward(const LinearFwd& p) {
  using A = Acc<T>;
  const P* bias = static_cast<const P*>(p.bias);
  const O* residual = static_cast<const O*>(p.residual);
  T* preact = static_cast<T*>(p.preact);
  O* y = static_cast<O*>(p.y);
  const Matrix<T> x{static_cast<const T*>(p.x), p.x_stride, 1};
  const Matrix<P> weight{static_cast<const P*>(p.weight), 1, p.weight_stride};
  product<A>(p.context.num_threads, x, weight, p.M, p.N, p.K,
             [&](int64_t i, int64_t j0, int64_t columns, const A* sums) {
               for (int64_t j = 0; j < columns; j += kLanes<A>) {
                 const int64_t n = columns - j, at = i * p.N + j0 + j;
                 Vec<A> v = load<A>(sums + j, n);
                 if (bias) v += load<A>(bias + j0 + j, n);
                 if (preact) store<A>(preact + at, v, n);
                 v = activate<A>(p.activation, v);
                 if (residual) v += load<A>(residual + at, n);
                 store<A>(y + at, v, n);
               }
             });
}

template <class T, class P, class O>
void backward(const LinearBwd& p) {
  using A = Acc<T>;
  const int threads = p.context.num_threads;
  const O* dy = static_cast<const O*>(p.dy);
  const T* preact = static_cast<const T*>(p.preact);
  A* dz = static_cast<A*>(p.workspace);  // [M, N]
  parallel_for(threads, p.M, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * p.N; i < end * p.N; i += kLanes<A>) {
      const int64_t n = end * p.N - i;
      Vec<A> v = load<A>(dy + i, n);
      if (preact) v *= activate_grad<A>(p.activation, load<A>(preact + i, n));
      store<A>(dz + i, v, n);
    }
  });
  if (p.dx)
    product<A>(threads, Matrix<A>{dz, p.N, 1}, Matrix<P>{static_cast<const P*>(p.weight), p.weight_stride, 1}, p.M, p.K,
               p.N, [&](int64_t i, int64_t j0, int64_t n, const A* sums) {
                 for (int64_t j = 0; j < n; ++j) static_cast<T*>(p.dx)[i * p.K + j0 + j] = from_acc<T>(sums[j]);
               });
  if (p.dweight)
    product<A>(threads, Matrix<A>{dz, 1, p.N}, Matrix<T>{static_cast<const T*>(p.x), p.x_stride, 1}, p.N, p.K, p.M,
               [&](int64_t i, int64_t j0, int64_t n, const A* sums) {
                 for (int64_t j = 0; j < n; ++j) static_cast<P*>(p.dweight)[i * p.K + j0 + j] = from_acc<P>(sums[j]);
               });
  if (p.dbias)
    parallel_for(threads, ceil_div(p.N, kLanes<A>), [&](int64_t begin, int64_t end, int) {
      for (int64_t j = begin * kLanes<A>; j < min(end * kLanes<A>, p.N); j += kLanes<A>) {
        Vec<A> total{};
        for (int64_t i = 0; i < p.M; ++i) total += load<A>(dz + i * p.N + j, p.N - j);
        store<A>(static_cast<P*>(p.dbias) + j, total, p.N - j);
      }
    });
}

}  // namespace

void linear_fwd(const LinearFwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    with_param<T>(p.param_dtype, [&](auto w) {
      with_param<T>(p.out_dtype, [&](auto o) { forward<T, decltype(w), decltype(o)>(p); });
    });
  });
}

void linear_bwd(const LinearBwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    with_param<T>(p.param_dtype, [&](auto w) {
      with_param<T>(p.out_dtype, [&](auto o) { backward<T, decltype(w), decltype(o)>(p); });
    });
  });
}

std::size_t linear_fwd_workspace(const LinearFwd&) { return 0; }
std::size_t linear_bwd_workspace(const LinearBwd& p) { return static_cast<std::size_t>(p.M * p.N * acc_size(p.dtype)); }

}  // namespace vit::VIT_ISA
