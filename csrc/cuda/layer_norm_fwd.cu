// y = (x - mean) rstd weight + bias over the last dimension, rstd = 1 / sqrt(var + eps); mean and rstd are kept for the
// backward.
//
// Bytes per element: one read of x, one write of y; about 8 FLOP. Memory bound, so the only aim is full bandwidth:
// row_in_registers: one warp per row, the row stays in registers between the mean, the variance around that mean (two
// passes, no cancellation) and the result; 16-byte accesses; many warps in flight hide the latency.
// row_by_block: any width, alignment and type, one block per row, three passes over a row that the L1 cache holds.
#include "reduce.cuh"
#include "runtime.cuh"
#include "types.cuh"

namespace vit::cuda {
namespace {

constexpr int kWarps = 4;  // rows per block: small blocks leave no idle warps behind at the end of a wave
constexpr int kBlock = 256;

template <class T, int kChunks>
__global__ void __launch_bounds__(kWarps * 32) row_in_registers(LayerNormFwd p) {
  constexpr int n = kVector<T>;
  const int lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const Mixed<T> weight = {p.weight, p.param_dtype == DType::float32}, bias = {p.bias, p.param_dtype == DType::float32};
  for (int64_t row = first; row < p.M; row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* y = static_cast<T*>(p.y) + row * p.C;
    float v[kChunks][n];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int64_t c = (i * 32 + lane) * n;
      if (c < p.C) {
        load_vector(x + c, v[i]);
      } else {
#pragma unroll
        for (int j = 0; j < n; ++j) v[i][j] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
#pragma unroll
      for (int j = 0; j < n; ++j) sum += v[i][j];
    const float mean = warp_sum(sum) / static_cast<float>(p.C);
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if ((i * 32 + lane) * n < p.C)
#pragma unroll
        for (int j = 0; j < n; ++j) squares += (v[i][j] - mean) * (v[i][j] - mean);
    const float rstd = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(p.C) + static_cast<float>(p.eps));
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int64_t c = (i * 32 + lane) * n;
      if (c >= p.C) continue;
      float w[n], b[n], out[n];
      if (weight) weight.load(c, w);
      if (bias) bias.load(c, b);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        out[j] = (v[i][j] - mean) * rstd;
        if (weight) out[j] *= w[j];
        if (bias) out[j] += b[j];
      }
      store_vector(y + c, out);
    }
    if (p.mean && lane == 0) {
      static_cast<float*>(p.mean)[row] = mean;
      static_cast<float*>(p.rstd)[row] = rstd;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) row_by_block(LayerNormFwd p) {
  using A = Acc<T>;
  const Mixed<T> weight = {p.weight, p.param_dtype == DType::float32}, bias = {p.bias, p.param_dtype == DType::float32};
  for (int64_t row = blockIdx.x; row < p.M; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* y = static_cast<T*>(p.y) + row * p.C;
    A sum = 0, squares = 0;
    for (int64_t c = threadIdx.x; c < p.C; c += kBlock) sum += to_acc(x[c]);
    const A mean = block_sum<kBlock>(sum) / static_cast<A>(p.C);
    for (int64_t c = threadIdx.x; c < p.C; c += kBlock) {
      const A d = to_acc(x[c]) - mean;
      squares += d * d;
    }
    const A rstd = 1 / sqrt(block_sum<kBlock>(squares) / static_cast<A>(p.C) + static_cast<A>(p.eps));
    for (int64_t c = threadIdx.x; c < p.C; c += kBlock) {
      A out = (to_acc(x[c]) - mean) * rstd;
      if (weight) out *= weight.load(c);
      if (bias) out += bias.load(c);
      y[c] = from_acc<T>(out);
    }
    if (p.mean && threadIdx.x == 0) {
      static_cast<A*>(p.mean)[row] = mean;
      static_cast<A*>(p.rstd)[row] = rstd;
    }
  }
}

// The registers of a row: 32 lanes of `chunks` 16-byte vectors. 2: 512 columns of a 16-bit type (ViT-S), 4: 1024 (B,
// L), 6: 1536 (H, g); float32 half of that, so 10 covers ViT-H there.
template <class T>
void launch_row_in_registers(const LayerNormFwd& p, Launch shape) {
  const int64_t chunks = divide_up(p.C, 32 * kVector<T>);
  if (chunks <= 2) return launch<row_in_registers<T, 2>>(shape, p);
  if (chunks <= 4) return launch<row_in_registers<T, 4>>(shape, p);
  if (chunks <= 6) return launch<row_in_registers<T, 6>>(shape, p);
  return launch<row_in_registers<T, 10>>(shape, p);
}

template <class T>
bool fits_in_registers(const LayerNormFwd& p) {
  const int n = kVector<T>;
  return sizeof(T) < 8 && p.C <= 10 * 32 * n && p.C % n == 0 && p.x_stride % n == 0 && is_aligned(p.x) &&
         is_aligned(p.y) && is_aligned(p.weight) && is_aligned(p.bias);
}

}  // namespace
}  // namespace vit::cuda

namespace vit {

void layer_norm_fwd(const LayerNormFwd& p) {
  using namespace cuda;
  const char* op = "layer_norm_fwd";
  check(p);
  if (p.M == 0 || p.C == 0) return;
  const DeviceGuard guard(op, p.context);
  const Shape shape({{"M", p.M}, {"C", p.C}});
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) < 8)
      if (fits_in_registers<T>(p)) {
        const int64_t blocks = smaller<int64_t>(divide_up(p.M, kWarps), 1 << 30);
        return launch_row_in_registers<T>(p, {op, shape, p.context, blocks, kWarps * 32});
      }
    launch<row_by_block<T>>({op, shape, p.context, smaller<int64_t>(p.M, 1 << 30), kBlock, kBlockSumBytes}, p);
  });
}

}  // namespace vit
