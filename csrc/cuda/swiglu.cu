// y = silu(gate) x, silu(g) = g / (1 + exp(-g)) (activation.cuh); backward dx = dy silu(gate), dgate = dy x
// silu'(gate).
//
// Bytes per element: forward two reads and one write, backward three reads and two writes; 10 to 20 FLOP. One thread
// takes one 16-byte vector of a row where rows have them.
#include "activation.cuh"
#include "runtime.cuh"

namespace vit::cuda {
namespace {

constexpr int kBlock = 256;

// Calls f(row, column) for the vectors of [M, C], spread over the grid.
template <int width, class F>
__device__ inline void for_vectors(int64_t M, int64_t C, const F& f) {
  const int64_t per_row = C / width, step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < M * per_row; i += step)
    f(i / per_row, i % per_row * width);
}

template <class T, int width>
__global__ void __launch_bounds__(kBlock) forward(SwigluFwd p) {
  for_vectors<width>(p.M, p.C, [&](int64_t row, int64_t c) {
    Acc<T> x[width], gate[width];
    load_vector(static_cast<const T*>(p.x) + row * p.x_stride + c, x);
    load_vector(static_cast<const T*>(p.gate) + row * p.gate_stride + c, gate);
#pragma unroll
    for (int j = 0; j < width; ++j) x[j] *= activate<T>(Activation::silu, gate[j]);
    store_vector(static_cast<T*>(p.y) + row * p.C + c, x);
  });
}

template <class T, int width>
__global__ void __launch_bounds__(kBlock) backward(SwigluBwd p) {
  for_vectors<width>(p.M, p.C, [&](int64_t row, int64_t c) {
    Acc<T> dy[width], x[width], gate[width];
    load_vector(static_cast<const T*>(p.dy) + row * p.C + c, dy);
    load_vector(static_cast<const T*>(p.x) + row * p.x_stride + c, x);
    load_vector(static_cast<const T*>(p.gate) + row * p.gate_stride + c, gate);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      x[j] *= dy[j] * activation_derivative<T>(Activation::silu, gate[j]);
      dy[j] *= activate<T>(Activation::silu, gate[j]);
    }
    store_vector(static_cast<T*>(p.dgate) + row * p.dgate_stride + c, x);
    store_vector(static_cast<T*>(p.dx) + row * p.dx_stride + c, dy);
  });
}

// Whether every row can be read in 16-byte pieces.
template <class T, class P>
bool vectors(const P& p) {
  const int64_t n = kVector<T>;
  return p.C % n == 0 && p.x_stride % n == 0 && p.gate_stride % n == 0 && is_aligned(p.x) && is_aligned(p.gate);
}

Launch shape_of(const char* op, int64_t M, int64_t C, int width, const Context& context) {
  const int64_t blocks = smaller<int64_t>(divide_up(M * C / width, kBlock), 1 << 30);
  return {op, Shape({{"M", M}, {"C", C}}), context, blocks, kBlock};
}

}  // namespace
}  // namespace vit::cuda

namespace vit {

void swiglu_fwd(const SwigluFwd& p) {
  using namespace cuda;
  const char* op = "swiglu_fwd";
  check(p);
  const DeviceGuard guard(op, p.context);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (vectors<T>(p) && is_aligned(p.y))
      launch<forward<T, kVector<T>>>(shape_of(op, p.M, p.C, kVector<T>, p.context), p);
    else
      launch<forward<T, 1>>(shape_of(op, p.M, p.C, 1, p.context), p);
  });
}

void swiglu_bwd(const SwigluBwd& p) {
  using namespace cuda;
  const char* op = "swiglu_bwd";
  check(p);
  const DeviceGuard guard(op, p.context);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool gradients = p.dx_stride % kVector<T> == 0 && p.dgate_stride % kVector<T> == 0 && is_aligned(p.dy) &&
                           is_aligned(p.dx) && is_aligned(p.dgate);
    if (vectors<T>(p) && gradients)
      launch<backward<T, kVector<T>>>(shape_of(op, p.M, p.C, kVector<T>, p.context), p);
    else
      launch<backward<T, 1>>(shape_of(op, p.M, p.C, 1, p.context), p);
  });
}

}  // namespace vit
