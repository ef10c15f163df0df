// rows = softmax(scale q k^T) of chosen queries: what attention multiplies v with, in memory.
//
// A block takes kRows rows of a head, whose queries lie in shared memory; each of its warps reads every kWarps-th key,
// a lane every 32nd element, and leaves the scores where the probabilities will be. Then a warp makes the softmax of
// one row, three times over its scores. Products are exact multiply-adds in every dtype, and neither which rows a block
// has nor the GPU changes the order of a sum. Bytes: the keys once for kRows rows, 4 or 8 per probability (five times,
// mostly in the cache). For pictures: a few rows of a head.
#include "attention.cuh"
#include "reduce.cuh"

namespace vit::cuda {
namespace {

constexpr int kWarps = 4, kBlock = 32 * kWarps;
constexpr int kRows = kWarps;  // one for each warp in the softmax

__device__ inline float power(float x) { return fast_exp2(x * kLog2e); }
__device__ inline double power(double x) { return exp(x); }

// Scores to their softmax, by one warp. Where no score is a number or all are -infinity, NaN like the reference.
template <class A>
__device__ inline void softmax(A* row, int64_t keys, int lane) {
  A largest = -static_cast<A>(INFINITY), total = 0;
  for (int64_t j = lane; j < keys; j += 32) largest = row[j] > largest ? row[j] : largest;
  largest = warp_max(largest);
  for (int64_t j = lane; j < keys; j += 32) total += row[j] = power(row[j] - largest);
  total = warp_sum(total);
  for (int64_t j = lane; j < keys; j += 32) row[j] /= total;
}

template <class T>
__global__ void __launch_bounds__(kBlock) rows_of_heads(AttentionRows p) {
  using A = Acc<T>;
  A* queries = reinterpret_cast<A*>(shared_memory());  // [kRows, D]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = static_cast<int>(p.D);
  const HeadBlock at = head_block(blockIdx.x, p.H, (p.R + kRows - 1) / kRows);
  const int64_t first = at.block * kRows;
  const int count = static_cast<int>(p.R - first < kRows ? p.R - first : kRows);
  const Head<T> q(p.q, at.b, at.h), k(p.k, at.b, at.h);
  const Head<A> rows(p.rows, at.b, at.h);
  for (int i = threadIdx.x; i < kRows * D; i += kBlock) {
    const int r = i / D, d = i % D;
    A value = 0;
    if (r < count) {
      const int64_t n = p.queries ? static_cast<const int64_t*>(p.queries)[first + r] : first + r;
      value = to_acc(q.data[n * q.token + d]);
    }
    queries[i] = value;
  }
  __syncthreads();
  const A scale = static_cast<A>(p.scale);
  for (int64_t j = warp; j < p.L; j += kWarps) {
    const T* key = k.data + j * k.token;
    A sum[kRows] = {};
    for (int d = lane; d < D; d += 32) {
      const A value = to_acc(key[d]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] += queries[r * D + d] * value;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const A score = warp_sum(sum[r]) * scale;
      if (lane == 0 && r < count) rows.data[(first + r) * rows.token + j] = score;
    }
  }
  __syncthreads();
  if (warp < count) softmax(rows.data + (first + warp) * rows.token, p.L, lane);
}

}  // namespace
}  // namespace vit::cuda

namespace vit {

std::size_t attention_rows_workspace(const AttentionRows&) { return 0; }

void attention_rows(const AttentionRows& p) {
  using namespace cuda;
  const char* op = "attention_rows";
  check(p);
  if (p.B * p.R * p.H * p.L == 0) return;
  if (p.D < 1 || p.D > 256) fail(op, "head dimension " + std::to_string(p.D) + " is not within 1..256");
  const DeviceGuard guard(op, p.context);
  const Launch how = {op,        Shape({{"B", p.B}, {"R", p.R}, {"L", p.L}, {"H", p.H}, {"D", p.D}}),
                      p.context, p.B * p.H * divide_up(p.R, kRows),
                      kBlock,    kRows * static_cast<std::size_t>(p.D) * (p.dtype == DType::float64 ? 8 : 4)};
  dispatch(p.dtype, [&](auto element) { launch<rows_of_heads<decltype(element)>>(how, p); });
}

}  // namespace vit
