// y = scale activation(x weight^T + bias) + residual, all of it in the epilogue of one product (gemm.cuh).
//
// Backward, with dz = scale dy activation'(preact):
//   dx = dz weight,  dweight = dz^T x,  dbias = sum over rows of dz,  dscale = sum over rows of dy activation(preact).
// prepare_dz writes dz in the type of the products and sums its columns, and those of dscale, in the same pass (two
// reads, one write per element). Without an activation and a scale dy is dz, and nothing is prepared: the product of
// dweight sums the columns of dy beside it (Gemm::row_sums). The sum over rows of dweight is cut into parts that are
// added in order. 2 M N K FLOP per product.
#include "gemm.cuh"
#include "reduce.cuh"

namespace vit::cuda {
namespace {

constexpr int kBlock = 256;

// to[column] = the sum of the 8 warps' shares of each column of a block. Called by the whole block.
template <int width, class A>
__device__ inline void sum_warps(const A (&share)[width], A* to, int64_t first, int64_t N) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  A* part = reinterpret_cast<A*>(shared_memory());  // [8][32 width]
  __syncthreads();                                  // the sums before these may still be read
#pragma unroll
  for (int j = 0; j < width; ++j) part[(warp * 32 + lane) * width + j] = share[j];
  __syncthreads();
  for (int c = threadIdx.x; c < 32 * width && first + c < N; c += kBlock) {
    A total = 0;
    for (int k = 0; k < kPartialRows; ++k) total += part[k * 32 * width + c];
    to[first + c] = total;
  }
}

// What prepare_dz reads and leaves; null: not given, not wanted.
template <class T>
struct Prepare {
  Mixed<T> dy;
  const T* preact;
  const Acc<T>* scale;
  Activation activation;
  T* dz;
  Acc<T>*dbias, *dscale;  // [partials][N]
};

// A block takes 32 * width columns; its 8 warps take rows 8 i + warp of partial i (reduce.cuh).
template <class T, int width>
__global__ void __launch_bounds__(kBlock) prepare_dz(Prepare<T> p, int64_t M, int64_t N, int partials) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int i = blockIdx.x % partials;
  const int64_t first = static_cast<int64_t>(blockIdx.x / partials) * 32 * width, column = first + lane * width;
  A sum[width] = {}, scaled[width] = {}, scale[width];
#pragma unroll
  for (int j = 0; j < width; ++j) scale[j] = p.scale && column < N ? p.scale[column + j] : A(1);
  if (column < N)
    for (int64_t row = int64_t{i} * kPartialRows + warp; row < M; row += int64_t{partials} * kPartialRows) {
      A g[width], z[width];
      p.dy.load(row * N + column, g);
      if (p.preact) load_vector(p.preact + row * N + column, z);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if (p.dscale) scaled[j] += g[j] * activate<T>(p.activation, z[j]);
        g[j] *= scale[j];
        if (p.activation != Activation::none) g[j] *= activation_derivative<T>(p.activation, z[j]);
      }
      if (p.dz) store_vector(p.dz + row * N + column, g);
#pragma unroll
      for (int j = 0; j < width; ++j) sum[j] += g[j];
    }
  if (p.dbias) sum_warps(sum, p.dbias + int64_t{i} * N, first, N);
  if (p.dscale) sum_warps(scaled, p.dscale + int64_t{i} * N, first, N);
}

// to[rows, columns] = from, rows from_stride apart: float32 parameters for products in another type.
template <class T>
__global__ void __launch_bounds__(kBlock)
    cast_rows(const float* __restrict__ from, int64_t from_stride, T* __restrict__ to, int64_t rows, int64_t columns) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < rows * columns; i += step)
    to[i] = from_acc<T>(static_cast<Acc<T>>(from[i / columns * from_stride + i % columns]));
}

// Cuts a workspace into aligned parts. With a null base it only counts.
struct Carve {
  unsigned char* base;
  std::size_t used = 0;

  void* take(std::size_t n) {
    void* p = base ? base + used : nullptr;
    used += aligned(n);
    return n ? p : nullptr;
  }
};

std::size_t weight_bytes(int64_t N, int64_t K, DType dtype, DType param_dtype) {
  return dtype == param_dtype ? 0 : static_cast<std::size_t>(N * K) * bytes(dtype);
}

// The weight as an operand of type dtype: itself, or its cast copy in `workspace`.
struct Weight {
  const void* data;
  int64_t stride;
};

Weight cast_weight(const Launch& like, const void* weight, int64_t stride, int64_t N, int64_t K, DType dtype,
                   DType param_dtype, void* workspace) {
  if (dtype == param_dtype || N * K == 0) return {weight, stride};
  const auto cast = [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = smaller<int64_t>(divide_up(N * K, kBlock), 1 << 16);
    launch<cast_rows<T>>({like.op, like.shape, like.context, blocks, kBlock}, static_cast<const float*>(weight), stride,
                         static_cast<T*>(workspace), N, K);
  };
  if (dtype == DType::float64)
    cast(double{});
  else
    dispatch_16_bit(dtype, cast);
  return {workspace, K};
}

// Where a backward keeps what, and which of it is needed.
struct BackwardPlan {
  bool store_dz;   // dy is not dz in the type of the products
  bool sums_bias;  // the product of dweight has dbias beside it
  bool prepare;    // prepare_dz has something to do
  int partials, splits;
  std::size_t workspace;
  void *dz, *dbias, *dscale, *weight, *split_sums;
};

// The operands of dweight: dz and x, their columns as rows.
Operand dz_columns(const LinearBwd& p, const void* dz) { return {dz, 1, p.N, 0}; }
Operand x_columns(const LinearBwd& p) { return {p.x, 1, p.x_stride, 0}; }

BackwardPlan plan(const LinearBwd& p, void* workspace) {
  BackwardPlan plan;
  const std::size_t acc = p.dtype == DType::float64 ? 8 : 4, MN = static_cast<std::size_t>(p.M * p.N);
  plan.store_dz = (p.dx || p.dweight) && (p.activation != Activation::none || p.scale || p.out_dtype != p.dtype);
  plan.sums_bias =
      p.dbias && p.dweight && p.K > 0 && !plan.store_dz && !p.dscale && can_sum_rows(dz_columns(p, p.dy), x_columns(p));
  plan.prepare = plan.store_dz || (p.dbias && !plan.sums_bias) || p.dscale;
  plan.partials = partial_count(p.M);
  plan.splits = p.dweight ? gemm_splits(p.N, p.K, p.M) : 1;
  Carve carve = {static_cast<unsigned char*>(workspace)};
  plan.dz = carve.take(plan.store_dz ? MN * bytes(p.dtype) : 0);
  plan.dbias = carve.take(p.dbias ? plan.partials * p.N * acc : 0);  // room for a row of each split, too: at most 16
  plan.dscale = carve.take(p.dscale ? plan.partials * p.N * acc : 0);
  plan.weight = carve.take(p.dx ? weight_bytes(p.N, p.K, p.dtype, p.param_dtype) : 0);
  plan.split_sums = carve.take(plan.splits > 1 ? plan.splits * p.N * p.K * acc : 0);
  plan.workspace = carve.used;
  return plan;
}

template <class T>
void run_prepare(const LinearBwd& p, const BackwardPlan& plan, const Launch& like) {
  constexpr int n = kVector<T>;
  using A = Acc<T>;
  const Prepare<T> all = {
      mixed<T>(p.dy, p.out_dtype), static_cast<const T*>(p.preact), static_cast<const A*>(p.scale), p.activation,
      static_cast<T*>(plan.dz),    static_cast<A*>(plan.dbias),     static_cast<A*>(plan.dscale)};
  const bool vectors = p.N % n == 0 && is_aligned(p.dy) && is_aligned(p.preact) && is_aligned(plan.dz);
  const auto go = [&](auto width) {
    constexpr int w = decltype(width)::value;
    launch<prepare_dz<T, w>>(
        {like.op, like.shape, like.context, divide_up(p.N, 32 * w) * plan.partials, kBlock, kBlock * w * sizeof(A)},
        all, p.M, p.N, plan.partials);
  };
  if (vectors)
    go(std::integral_constant<int, n>{});
  else
    go(std::integral_constant<int, 1>{});
  if (p.dbias) launch_sum_partials<T>(like, all.dbias, mixed<T>(p.dbias, p.param_dtype), p.N, plan.partials, p.N);
  if (p.dscale)
    launch_sum_partials<T>(like, all.dscale, mixed<T>(p.dscale, DTypeOf<A>::value), p.N, plan.partials, p.N);
}

}  // namespace
}  // namespace vit::cuda

namespace vit {

std::size_t linear_fwd_workspace(const LinearFwd& p) {
  return cuda::aligned(cuda::weight_bytes(p.N, p.K, p.dtype, p.param_dtype));
}

std::size_t linear_bwd_workspace(const LinearBwd& p) {
  LinearBwd all = p;  // the size is that of all gradients: which ones are wanted is in the pointers
  char wanted;
  all.dx = all.dweight = all.dbias = all.dscale = &wanted;
  return cuda::plan(all, nullptr).workspace;
}

void linear_fwd(const LinearFwd& p) {
  using namespace cuda;
  const char* op = "linear_fwd";
  check(p);
  if (p.M == 0 || p.N == 0) return;
  require(p.dtype == p.param_dtype || p.K == 0 || p.workspace, op,
          "workspace must not be null, see linear_fwd_workspace");
  const DeviceGuard guard(op, p.context);
  const Launch like = {op, Shape({{"M", p.M}, {"N", p.N}, {"K", p.K}}), p.context, 0, 0};
  const Weight weight = cast_weight(like, p.weight, p.weight_stride, p.N, p.K, p.dtype, p.param_dtype, p.workspace);
  Gemm g;
  g.a = {p.x, p.x_stride, 1, 0};
  g.b = {weight.data, weight.stride, 1, 0};
  g.M = p.M;
  g.N = p.N;
  g.K = p.K;
  g.bias = p.bias;
  g.bias_dtype = p.param_dtype;
  g.activation = p.activation;
  g.scale = p.scale;
  g.residual = p.residual;
  g.preact = p.preact;
  g.out = p.y;
  g.out_dtype = p.out_dtype;
  g.dtype = p.dtype;
  gemm(op, g, p.context);
}

void linear_bwd(const LinearBwd& p) {
  using namespace cuda;
  const char* op = "linear_bwd";
  check(p);
  const BackwardPlan plan = cuda::plan(p, p.workspace);
  require(plan.workspace == 0 || p.workspace, op, "workspace must not be null, see linear_bwd_workspace");
  const DeviceGuard guard(op, p.context);
  const Launch like = {op, Shape({{"M", p.M}, {"N", p.N}, {"K", p.K}}), p.context, 0, 0};
  if (plan.prepare) dispatch(p.dtype, [&](auto element) { run_prepare<decltype(element)>(p, plan, like); });
  Gemm g;
  g.a = {plan.store_dz ? plan.dz : p.dy, p.N, 1, 0};
  g.dtype = g.out_dtype = g.bias_dtype = p.dtype;
  if (p.dx) {
    const Weight weight = cast_weight(like, p.weight, p.weight_stride, p.N, p.K, p.dtype, p.param_dtype, plan.weight);
    g.b = {weight.data, 1, weight.stride, 0};
    g.M = p.M;
    g.N = p.K;
    g.K = p.N;
    g.out = p.dx;
    gemm(op, g, p.context);
  }
  if (!p.dweight) return;
  g.a = dz_columns(p, g.a.data);
  g.b = x_columns(p);
  g.M = p.N;
  g.N = p.K;
  g.K = p.M;
  g.out = p.dweight;
  g.out_dtype = p.param_dtype;
  g.splits = plan.splits;
  g.workspace = plan.split_sums;
  if (plan.sums_bias) {
    g.bias_dtype = p.param_dtype;
    g.row_sums = p.dbias;
    g.row_partials = plan.dbias;
  }
  gemm(op, g, p.context);
}

}  // namespace vit
