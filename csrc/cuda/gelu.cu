// gelu: y = x Phi(x) or its tanh form; backward dx = dy gelu'(x), from x alone.
//
// Bytes per element: forward one read and one write, backward two reads and one write; 15 to 30 FLOP. One thread takes
// two 16-byte vectors, the block's threads side by side.
#include "activation.cuh"
#include "runtime.cuh"

namespace vit::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kVectorsPerThread = 2;

// f(x) over [n], or f(x, dy) where dy is not null.
template <class T, bool kBackward>
__global__ void __launch_bounds__(kBlock)
    elementwise(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ out, int64_t n,
                Activation activation, bool vectors) {
  using A = Acc<T>;
  constexpr int width = kVector<T>;
  const auto f = [&](A value, A gradient) -> A {
    if constexpr (kBackward)
      return gradient * activation_derivative<T>(activation, value);
    else
      return activate<T>(activation, value);
  };
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kBlock * kVectorsPerThread * width);
  A value[kVectorsPerThread][width], gradient[kVectorsPerThread][width];
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {  // all loads before the first use
    const int64_t i = first + (k * kBlock + static_cast<int>(threadIdx.x)) * width;
    if (!vectors || i + width > n) continue;
    load_vector(x + i, value[k]);
    if constexpr (kBackward) load_vector(dy + i, gradient[k]);
  }
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {
    const int64_t i = first + (k * kBlock + static_cast<int>(threadIdx.x)) * width;
    if (vectors && i + width <= n) {
      A result[width];
#pragma unroll
      for (int j = 0; j < width; ++j) result[j] = f(value[k][j], kBackward ? gradient[k][j] : A(0));
      store_vector(out + i, result);
    } else {
      for (int64_t j = i; j < i + width && j < n; ++j)
        out[j] = from_acc<T>(f(to_acc(x[j]), kBackward ? to_acc(dy[j]) : A(0)));
    }
  }
}

template <bool kBackward>
void run(const char* op, const void* x, const void* dy, void* out, int64_t n, Activation activation, DType dtype,
         const Context& context) {
  if (n == 0) return;
  const DeviceGuard guard(op, context);
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = divide_up(n, kBlock * kVectorsPerThread * kVector<T>);
    const bool vectors = is_aligned(x) && is_aligned(dy) && is_aligned(out);
    launch<elementwise<T, kBackward>>({op, Shape({{"n", n}}), context, blocks, kBlock}, static_cast<const T*>(x),
                                      static_cast<const T*>(dy), static_cast<T*>(out), n, activation, vectors);
  });
}

}  // namespace
}  // namespace vit::cuda

namespace vit {

void gelu_fwd(const GeluFwd& p) {
  check(p);
  cuda::run<false>("gelu_fwd", p.x, nullptr, p.y, p.n, p.activation, p.dtype, p.context);
}

void gelu_bwd(const GeluBwd& p) {
  check(p);
  cuda::run<true>("gelu_bwd", p.x, p.dy, p.dx, p.n, p.activation, p.dtype, p.context);
}

}  // namespace vit
