// With xhat = (x - mean) rstd and g = dy weight:
//   dx = rstd (g - mean(g) - xhat mean(g xhat)),  dweight = sum over rows of dy xhat,  dbias = sum over rows of dy.
//
// Bytes per element: reads dy and x, writes dx; about 14 FLOP.
// rows_in_registers: a fixed grid of blocks, one warp per row, dy and x of the row in registers; each warp keeps its
// share of dweight and dbias in registers over all its rows, so x and dy are read once for all three gradients. The
// warps of a block add their shares in order, sum_partials adds the blocks in order: no atomics.
// dx_by_block and columns_by_block: any width, alignment and type, each reading dy and x once more.
#include "reduce.cuh"
#include "runtime.cuh"
#include "types.cuh"

namespace vit::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / 32;
static_assert(kWarps == kPartialRows, "a block takes kPartialRows rows at a time, one per warp");

// dy and x of a row stay in registers as they came, in T, and are converted where they are used: in float32 they were
// 159 registers at C = 1024, one block on a multiprocessor.
template <class T, int kChunks>
__global__ void __launch_bounds__(kBlock, kChunks* kVector<T> <= 32 ? 2 : 1)
    rows_in_registers(LayerNormBwd p, bool want_parameters) {
  constexpr int n = kVector<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Mixed<T> weight = {p.weight, p.param_dtype == DType::float32};
  const float inv_C = 1.0f / static_cast<float>(p.C);
  float dweight[kChunks][n] = {}, dbias[kChunks][n] = {};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < p.M; row += stride) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.C;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const float mean = static_cast<const float*>(p.mean)[row], rstd = static_cast<const float*>(p.rstd)[row];
    Vector<T, n> row_dy[kChunks], row_x[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int64_t c = (i * 32 + lane) * n;
      if (c >= p.C) continue;
      row_dy[i] = *reinterpret_cast<const Vector<T, n>*>(dy + c);
      row_x[i] = *reinterpret_cast<const Vector<T, n>*>(x + c);
    }
    float sum_g = 0, sum_gx = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int64_t c = (i * 32 + lane) * n;
      if (c >= p.C) continue;
      float w[n];
      if (weight) weight.load(c, w);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        float g = to_acc(row_dy[i].v[j]);
        const float xhat = (to_acc(row_x[i].v[j]) - mean) * rstd;
        dweight[i][j] += g * xhat;
        dbias[i][j] += g;
        if (weight) g *= w[j];
        sum_g += g;
        sum_gx += g * xhat;
      }
    }
    if (!p.dx) continue;
    sum_g = warp_sum(sum_g) * inv_C;
    sum_gx = warp_sum(sum_gx) * inv_C;
    T* dx = static_cast<T*>(p.dx) + row * p.C;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int64_t c = (i * 32 + lane) * n;
      if (c >= p.C) continue;
      float out[n], w[n];
      if (weight) weight.load(c, w);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float g = weight ? to_acc(row_dy[i].v[j]) * w[j] : to_acc(row_dy[i].v[j]);
        out[j] = rstd * (g - sum_g - (to_acc(row_x[i].v[j]) - mean) * rstd * sum_gx);
      }
      store_vector(dx + c, out);
    }
  }
  if (!want_parameters) return;
  // Warp after warp adds its share to the block's, [2][C] in shared memory.
  float* total = reinterpret_cast<float*>(shared_memory());
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn)
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int64_t c = (i * 32 + lane) * n;
        if (c >= p.C) continue;
#pragma unroll
        for (int j = 0; j < n; ++j) {
          total[c + j] = dweight[i][j] + (turn > 0 ? total[c + j] : 0);
          total[p.C + c + j] = dbias[i][j] + (turn > 0 ? total[p.C + c + j] : 0);
        }
      }
    __syncthreads();
  }
  float* partial = static_cast<float*>(p.workspace) + blockIdx.x * (2 * p.C);
  for (int64_t c = threadIdx.x; c < 2 * p.C; c += kBlock) partial[c] = total[c];
}

template <class T>
__global__ void __launch_bounds__(kBlock) dx_by_block(LayerNormBwd p) {
  using A = Acc<T>;
  const Mixed<T> weight = {p.weight, p.param_dtype == DType::float32};
  for (int64_t row = blockIdx.x; row < p.M; row += gridDim.x) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.C;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const A mean = static_cast<const A*>(p.mean)[row], rstd = static_cast<const A*>(p.rstd)[row];
    const auto g = [&](int64_t c) -> A { return to_acc(dy[c]) * (weight ? weight.load(c) : A(1)); };
    A sum_g = 0, sum_gx = 0;
    for (int64_t c = threadIdx.x; c < p.C; c += kBlock) {
      sum_g += g(c);
      sum_gx += g(c) * ((to_acc(x[c]) - mean) * rstd);
    }
    sum_g = block_sum<kBlock>(sum_g) / static_cast<A>(p.C);
    sum_gx = block_sum<kBlock>(sum_gx) / static_cast<A>(p.C);
    T* dx = static_cast<T*>(p.dx) + row * p.C;
    for (int64_t c = threadIdx.x; c < p.C; c += kBlock)
      dx[c] = from_acc<T>(rstd * (g(c) - sum_g - (to_acc(x[c]) - mean) * rstd * sum_gx));
  }
}

// partial[i][0][c] of dweight and partial[i][1][c] of dbias; a block is 32 columns of one partial i.
template <class T>
__global__ void __launch_bounds__(kBlock) columns_by_block(LayerNormBwd p, int partials) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = (blockIdx.x / partials) * int64_t{32} + lane;
  const int i = blockIdx.x % partials;
  A dweight = 0, dbias = 0;
  if (c < p.C)
    for (int64_t row = int64_t{i} * kWarps + warp; row < p.M; row += int64_t{partials} * kWarps) {
      const A dy = to_acc(static_cast<const T*>(p.dy)[row * p.C + c]);
      const A x = to_acc(static_cast<const T*>(p.x)[row * p.x_stride + c]);
      dweight += dy * ((x - static_cast<const A*>(p.mean)[row]) * static_cast<const A*>(p.rstd)[row]);
      dbias += dy;
    }
  A* part = reinterpret_cast<A*>(shared_memory());
  part[threadIdx.x] = dweight;
  part[kBlock + threadIdx.x] = dbias;
  __syncthreads();
  if (warp > 0 || c >= p.C) return;
  for (int k = 1; k < kWarps; ++k) {
    dweight += part[k * 32 + lane];
    dbias += part[kBlock + k * 32 + lane];
  }
  A* partial = static_cast<A*>(p.workspace) + int64_t{i} * (2 * p.C);
  partial[c] = dweight;
  partial[p.C + c] = dbias;
}

// 40 or 48 columns per lane, four registers each (dy, x, dweight, dbias): 1536 columns of a 16-bit type, 1280 of
// float32.
template <class T>
inline constexpr int kMaxChunks = sizeof(T) == 2 ? 6 : 10;

template <class T>
bool fits_in_registers(const LayerNormBwd& p) {
  const int n = kVector<T>;
  return sizeof(T) < 8 && p.C <= kMaxChunks<T> * 32 * n && p.C % n == 0 && p.x_stride % n == 0 && is_aligned(p.dy) &&
         is_aligned(p.x) && is_aligned(p.dx) && is_aligned(p.weight);
}

template <class T>
void run_in_registers(const LayerNormBwd& p, Launch shape, bool want_parameters) {
  // dx alone needs no partials: as many blocks as there are rows for
  shape.blocks = want_parameters ? partial_count(p.M) : smaller<int64_t>(divide_up(p.M, kWarps), 1 << 30);
  shape.threads = kBlock;
  shape.shared_bytes = want_parameters ? 2 * p.C * sizeof(float) : 0;
  const int64_t chunks = divide_up(p.C, 32 * kVector<T>);
  if constexpr (sizeof(T) == 2) {
    if (chunks <= 2) return launch<rows_in_registers<T, 2>>(shape, p, want_parameters);
    if (chunks == 4) return launch<rows_in_registers<T, 4>>(shape, p, want_parameters);
  }
  if (chunks <= 3) return launch<rows_in_registers<T, 3>>(shape, p, want_parameters);
  if (chunks <= 6) return launch<rows_in_registers<T, 6>>(shape, p, want_parameters);
  return launch<rows_in_registers<T, kMaxChunks<T>>>(shape, p, want_parameters);
}

template <class T>
void run(const LayerNormBwd& p, Launch shape) {
  using A = Acc<T>;
  const bool want_parameters = p.dweight || p.dbias;
  const int partials = partial_count(p.M);
  bool done = false;
  if constexpr (sizeof(T) < 8)
    if (fits_in_registers<T>(p)) {
      run_in_registers<T>(p, shape, want_parameters);
      done = true;
    }
  if (!done) {
    if (p.dx && p.M > 0)
      launch<dx_by_block<T>>({shape.op, shape.shape, p.context, smaller<int64_t>(p.M, 1 << 30), kBlock, kBlockSumBytes},
                             p);
    if (want_parameters)
      launch<columns_by_block<T>>(
          {shape.op, shape.shape, p.context, divide_up(p.C, 32) * partials, kBlock, 2 * kBlock * sizeof(A)}, p,
          partials);
  }
  const A* partial = static_cast<const A*>(p.workspace);
  if (p.dweight) launch_sum_partials<T>(shape, partial, mixed<T>(p.dweight, p.param_dtype), p.C, partials, 2 * p.C);
  if (p.dbias) launch_sum_partials<T>(shape, partial + p.C, mixed<T>(p.dbias, p.param_dtype), p.C, partials, 2 * p.C);
}

}  // namespace
}  // namespace vit::cuda

namespace vit {

std::size_t layer_norm_bwd_workspace(const LayerNormBwd& p) {
  const std::size_t acc = p.dtype == DType::float64 ? 8 : 4;
  return cuda::aligned(cuda::partial_count(p.M) * 2 * p.C * acc);
}

void layer_norm_bwd(const LayerNormBwd& p) {
  using namespace cuda;
  const char* op = "layer_norm_bwd";
  check(p);
  if (p.C == 0) return;
  require(p.workspace || !(p.dweight || p.dbias), op, "workspace must not be null when dweight or dbias is wanted");
  const DeviceGuard guard(op, p.context);
  const Shape shape({{"M", p.M}, {"C", p.C}});
  dispatch(p.dtype, [&](auto element) { run<decltype(element)>(p, {op, shape, p.context, 0, kBlock}); });
}

}  // namespace vit
