// Chooses the kernel of a product, and adds the parts of a split one.
#include "gemm.cuh"

namespace vit::cuda {
namespace {

constexpr int kBlock = 256;

// out[i] = sum over s of partial[s][i] in the order of s. Reads splits accumulators and writes one element of out.
template <class T>
__global__ void __launch_bounds__(kBlock)
    sum_splits(const Acc<T>* __restrict__ partial, Mixed<T> out, int64_t n, int splits) {
  using A = Acc<T>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) * 4;
  if (i + 4 <= n && n % 4 == 0 && reinterpret_cast<uintptr_t>(out.data) % 16 == 0) {
    A sum[4], next[4];
    load_vector(partial + i, sum);
    for (int s = 1; s < splits; ++s) {
      load_vector(partial + s * n + i, next);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += next[j];
    }
    return out.store(i, sum);
  }
  for (int64_t j = i; j < i + 4 && j < n; ++j) {
    A sum = partial[j];
    for (int s = 1; s < splits; ++s) sum += partial[s * n + j];
    out.store(j, sum);
  }
}

// Whether the tensor memory accelerator can read both operands, and the epilogue access 16 bytes. From strides,
// alignment, N and K, never from M. An a of adjacent rows exists only with a b of adjacent rows (a weight gradient).
bool hopper_supports(const Gemm& g, const Context& context) {
  const Access a = access(g.a, g.dtype), b = access(g.b, g.dtype);
  const auto fits = [](int64_t n) { return n < (int64_t{1} << 31) - 1024; };  // a tile further is an int, too
  const auto distinct = [](const Operand& o) { return o.row > 0 && o.k > 0 && o.batch >= 0; };
  return hopper_allowed(context.device) && a.vectors && b.vectors && (a.k_major || !b.k_major) && distinct(g.a) &&
         distinct(g.b) && g.N % 8 == 0 && g.K >= 8 && fits(g.M) && fits(g.N) && fits(g.K) && fits(g.batch) &&
         is_aligned(g.out) && is_aligned(g.residual) && is_aligned(g.preact) && is_aligned(g.bias) &&
         is_aligned(g.scale);
}

}  // namespace

// A GPU of 132 multiprocessors (H100, H200) works in waves of 132 tiles of 128 x 128. The fewest parts that keep 90 %
// of the last wave busy, at least 1024 long, else the fullest: B/16's first MLP weight (144 tiles) is cut into 5.
int gemm_splits(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t wave = 132;
  const int64_t tiles = divide_up(M, 128) * divide_up(N, 128);
  const int64_t most = smaller<int64_t>(16, K / 1024);
  int best = 1;
  double fullest = 0;
  for (int splits = 1; splits <= most; ++splits) {
    const int64_t work = tiles * splits;
    const double full = static_cast<double>(work) / static_cast<double>(divide_up(work, wave) * wave);
    if (full > fullest + 1e-9) {
      fullest = full;
      best = splits;
    }
    if (full >= 0.9) break;
  }
  return best;
}

std::size_t gemm_workspace(const Gemm& g) {
  const std::size_t acc = g.dtype == DType::float64 ? 8 : 4;
  return g.splits > 1 ? aligned(static_cast<std::size_t>(g.splits * g.batch * g.M * g.N) * acc) : 0;
}

Access access(const Operand& o, DType dtype) {
  const int64_t group = 16 / static_cast<int64_t>(bytes(dtype));
  const bool k_major = o.k == 1 || o.row != 1;  // neither: element by element, as rows of k
  const int64_t along = k_major ? o.k : o.row, across = k_major ? o.row : o.k;
  return {k_major, along == 1 && across % group == 0 && o.batch % group == 0 && is_aligned(o.data)};
}

void gemm(const char* op, const Gemm& g, const Context& context) {
  if (g.batch == 0 || g.M == 0 || g.N == 0) return;
  const bool tf32 = g.dtype == DType::float32 && context.allow_tf32;
  if (!is_16_bit(g.dtype) && !tf32)
    gemm_scalar(op, g, context);
  else if (is_16_bit(g.dtype) && hopper_supports(g, context))
    gemm_hopper(op, g, context);
  else
    gemm_mma(op, g, context);
  if (g.splits == 1) return;
  const auto sum = [&](const void* partials, void* out, DType out_dtype, int64_t n) {
    dispatch(g.dtype, [&](auto element) {
      using T = decltype(element);
      launch<sum_splits<T>>(
          {op, Shape({{"M", g.M}, {"N", g.N}, {"splits", g.splits}}), context, divide_up(n, 4 * kBlock), kBlock},
          static_cast<const Acc<T>*>(partials), mixed<T>(out, out_dtype), n, g.splits);
    });
  };
  sum(g.workspace, g.out, g.out_dtype, g.batch * g.M * g.N);
  if (g.row_sums) sum(g.row_partials, g.row_sums, g.bias_dtype, g.M);
}

}  // namespace vit::cuda
