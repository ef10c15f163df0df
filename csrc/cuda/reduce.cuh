// Sums over a block and over the rows of a matrix, in an order that depends on sizes alone; the maximum of a warp.
#pragma once

#include "runtime.cuh"
#include "types.cuh"

namespace vit::cuda {

// The largest of the 32 lanes, known to every lane; where lanes have NaN it may be any of the others.
template <class T>
__device__ inline T warp_max(T x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const T other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// The sum of x over a block of `threads`, known to every thread. Uses the first 32 words of the shared memory.
template <int threads, class A>
__device__ inline A block_sum(A x) {
  A* part = reinterpret_cast<A*>(shared_memory());
  x = warp_sum(x);
  __syncthreads();  // the words may still be read by the sum before this one
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  A sum = 0;
#pragma unroll
  for (int i = 0; i < threads / 32; ++i) sum += part[i];
  return sum;
}

// Shared memory of a kernel that calls block_sum.
inline constexpr std::size_t kBlockSumBytes = 32 * sizeof(double);

// Columns of [M, C] are summed in two stages: row r goes to partial (r / kPartialRows) % partials, and the partials are
// added in order. At most 264 = two blocks on each multiprocessor of an H100 or H200; a constant, not the size of the
// GPU at hand, so that the sum is the same on every GPU.
inline constexpr int kPartialRows = 8;

constexpr int partial_count(int64_t M) {
  const int64_t wanted = (M + kPartialRows - 1) / kPartialRows;
  return static_cast<int>(wanted < 1 ? 1 : wanted > 264 ? 264 : wanted);
}

// out[c] = sum over i of partial[i * stride + c]. One block takes 32 columns; thread row t adds partials t, t + 8, ...,
// then the eight sums are added in order.
template <class T>
__global__ void __launch_bounds__(256)
    sum_partials(const Acc<T>* __restrict__ partial, Mixed<T> out, int64_t C, int partials, int64_t stride) {
  using A = Acc<T>;
  A* part = reinterpret_cast<A*>(shared_memory());
  const int lane = threadIdx.x % 32, t = threadIdx.x / 32;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  A sum = 0;
  if (c < C)
    for (int i = t; i < partials; i += 8) sum += partial[i * stride + c];
  part[threadIdx.x] = sum;
  __syncthreads();
  if (t > 0 || c >= C) return;
#pragma unroll
  for (int i = 1; i < 8; ++i) sum += part[i * 32 + lane];
  out.store(c, sum);
}

template <class T>
void launch_sum_partials(const Launch& like, const Acc<T>* partial, Mixed<T> out, int64_t C, int partials,
                         int64_t stride) {
  launch<sum_partials<T>>({like.op, like.shape, like.context, divide_up(C, 32), 256, 256 * sizeof(Acc<T>)}, partial,
                          out, C, partials, stride);
}

}  // namespace vit::cuda
