// y = x rstd weight over the last dimension, rstd = 1 / sqrt(mean(x^2) + eps); rstd is kept for the backward.
//
//   xhat = x rstd,  g = dy weight,  dx = rstd (g - xhat mean(g xhat)),  dweight = sum over rows of dy xhat
//
// Bytes per element: forward one read and one write, backward two reads and one write; 4 and 9 FLOP. One warp takes a
// row, in 16-byte pieces where the row has them, twice: the second time it comes from the L1 cache. The gradient of the
// weight reads dy and x once more: a block sums 32 columns of every partial (reduce.cuh), and the partials are added in
// order: no atomics.
#include "reduce.cuh"
#include "runtime.cuh"
#include "types.cuh"

namespace vit::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kWarps = 4;  // rows per block: small blocks leave no idle warps behind at the end of a wave
static_assert(kBlock / 32 == kPartialRows, "a block takes kPartialRows rows at a time, one per warp");

// Calls f(row) for the rows of a warp.
template <class F>
__device__ inline void for_rows(int64_t M, const F& f) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t row = first; row < M; row += static_cast<int64_t>(gridDim.x) * kWarps) f(row);
}

template <class T, int width>
__global__ void __launch_bounds__(kWarps * 32) forward_rows(RmsNormFwd p) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  const Mixed<T> weight = {p.weight, p.param_dtype == DType::float32};
  for_rows(p.M, [&](int64_t row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* y = static_cast<T*>(p.y) + row * p.C;
    A squares = 0;
    for (int64_t c = lane * width; c < p.C; c += 32 * width) {
      A v[width];
      load_vector(x + c, v);
#pragma unroll
      for (int j = 0; j < width; ++j) squares += v[j] * v[j];
    }
    const A rstd = A(1) / sqrt(warp_sum(squares) / static_cast<A>(p.C) + static_cast<A>(p.eps));
    for (int64_t c = lane * width; c < p.C; c += 32 * width) {
      A v[width], w[width];
      load_vector(x + c, v);
      if (weight) weight.load(c, w);
#pragma unroll
      for (int j = 0; j < width; ++j) v[j] *= weight ? rstd * w[j] : rstd;
      store_vector(y + c, v);
    }
    if (p.rstd && lane == 0) static_cast<A*>(p.rstd)[row] = rstd;
  });
}

template <class T, int width>
__global__ void __launch_bounds__(kWarps * 32) backward_rows(RmsNormBwd p) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  const Mixed<T> weight = {p.weight, p.param_dtype == DType::float32};
  for_rows(p.M, [&](int64_t row) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.C;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* dx = static_cast<T*>(p.dx) + row * p.C;
    const A rstd = static_cast<const A*>(p.rstd)[row];
    const auto load = [&](int64_t c, A(&g)[width], A(&xhat)[width]) {
      A w[width];
      load_vector(dy + c, g);
      load_vector(x + c, xhat);
      if (weight) weight.load(c, w);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if (weight) g[j] *= w[j];
        xhat[j] *= rstd;
      }
    };
    A sum = 0, g[width], xhat[width];
    for (int64_t c = lane * width; c < p.C; c += 32 * width) {
      load(c, g, xhat);
#pragma unroll
      for (int j = 0; j < width; ++j) sum += g[j] * xhat[j];
    }
    const A mean = warp_sum(sum) / static_cast<A>(p.C);
    for (int64_t c = lane * width; c < p.C; c += 32 * width) {
      load(c, g, xhat);
#pragma unroll
      for (int j = 0; j < width; ++j) g[j] = rstd * (g[j] - xhat[j] * mean);
      store_vector(dx + c, g);
    }
  });
}

// partial[i][c] of dweight; a block is 32 columns of one partial i.
template <class T>
__global__ void __launch_bounds__(kBlock) weight_columns(RmsNormBwd p, int partials) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = (blockIdx.x / partials) * int64_t{32} + lane;
  const int i = blockIdx.x % partials;
  A sum = 0;
  if (c < p.C)
    for (int64_t row = int64_t{i} * kPartialRows + warp; row < p.M; row += int64_t{partials} * kPartialRows)
      sum += to_acc(static_cast<const T*>(p.dy)[row * p.C + c]) *
             (to_acc(static_cast<const T*>(p.x)[row * p.x_stride + c]) * static_cast<const A*>(p.rstd)[row]);
  A* part = reinterpret_cast<A*>(shared_memory());
  part[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || c >= p.C) return;
  for (int k = 1; k < kPartialRows; ++k) sum += part[k * 32 + lane];
  static_cast<A*>(p.workspace)[int64_t{i} * p.C + c] = sum;
}

template <class T, class P>
bool vectors(const P& p) {
  return p.C % kVector<T> == 0 && p.x_stride % kVector<T> == 0 && is_aligned(p.x) && is_aligned(p.weight);
}

int64_t row_blocks(int64_t M) { return smaller<int64_t>(divide_up(M, kWarps), 1 << 30); }

template <class T>
void backward(const RmsNormBwd& p, const Launch& like) {
  if (p.dx) {
    const Launch rows = {like.op, like.shape, p.context, row_blocks(p.M), kWarps * 32};
    if (vectors<T>(p) && is_aligned(p.dy) && is_aligned(p.dx))
      launch<backward_rows<T, kVector<T>>>(rows, p);
    else
      launch<backward_rows<T, 1>>(rows, p);
  }
  if (!p.dweight) return;
  const int partials = partial_count(p.M);
  launch<weight_columns<T>>(
      {like.op, like.shape, p.context, divide_up(p.C, 32) * partials, kBlock, kBlock * sizeof(Acc<T>)}, p, partials);
  launch_sum_partials<T>(like, static_cast<const Acc<T>*>(p.workspace), mixed<T>(p.dweight, p.param_dtype), p.C,
                         partials, p.C);
}

}  // namespace
}  // namespace vit::cuda

namespace vit {

void rms_norm_fwd(const RmsNormFwd& p) {
  using namespace cuda;
  const char* op = "rms_norm_fwd";
  check(p);
  if (p.M == 0 || p.C == 0) return;
  const DeviceGuard guard(op, p.context);
  const Launch rows = {op, Shape({{"M", p.M}, {"C", p.C}}), p.context, row_blocks(p.M), kWarps * 32};
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (vectors<T>(p) && is_aligned(p.y))
      launch<forward_rows<T, kVector<T>>>(rows, p);
    else
      launch<forward_rows<T, 1>>(rows, p);
  });
}

std::size_t rms_norm_bwd_workspace(const RmsNormBwd& p) {
  return cuda::aligned(cuda::partial_count(p.M) * p.C * (p.dtype == DType::float64 ? 8 : 4));
}

void rms_norm_bwd(const RmsNormBwd& p) {
  using namespace cuda;
  const char* op = "rms_norm_bwd";
  check(p);
  if (p.C == 0) return;
  require(p.workspace || !p.dweight, op, "workspace must not be null when dweight is wanted");
  const DeviceGuard guard(op, p.context);
  const Launch like = {op, Shape({{"M", p.M}, {"C", p.C}}), p.context, 0, 0};
  dispatch(p.dtype, [&](auto element) { backward<decltype(element)>(p, like); });
}

}  // namespace vit
