// The product in float32 and float64: plain fused multiply-adds, every float32 product exact to its rounding.
//
// A block of 16 x 16 threads computes a tile of 16 kPer x 16 kPer, each thread kPer x kPer elements, 8 k at a time from
// shared memory; the next 8 k are read into registers meanwhile. Bound by FMA: with kPer = 8 a thread does 64 FMA per
// 16 words from shared memory. Any strides. Each element adds its products one by one from k = 0 on, whatever the tile.
#include "gemm.cuh"

namespace vit::cuda {
namespace {

constexpr int kStep = 8;  // k per tile
constexpr int kBlock = 256;

template <class T, int kPer>
__global__ void __launch_bounds__(kBlock) gemm_fma(Operand a, Operand b, int64_t batches, int64_t K, int64_t K_split,
                                                   const __grid_constant__ Epilogue<T> epilogue) {
  constexpr int kTile = 16 * kPer, kPitch = kTile + 16 / static_cast<int>(sizeof(T));
  constexpr int kLoads = kTile * kStep / kBlock;
  T* shared = reinterpret_cast<T*>(shared_memory());  // [2 stages][a, b][kStep][kPitch]
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;

  const BlockPart<T, kTile> part(blockIdx.x, a, b, epilogue.M, epilogue.N, K, K_split, batches);

  // Neighbouring threads read along the stride that is 1.
  const auto place = [](const Operand& o, int i, int& row, int& k) {
    const int index = i * kBlock + static_cast<int>(threadIdx.x);
    const bool k_first = o.k == 1;
    row = k_first ? index / kStep : index % kTile;
    k = k_first ? index % kStep : index / kTile;
  };
  T next_a[kLoads], next_b[kLoads];
  const auto fetch = [&](int64_t k0) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int row, k;
      place(a, i, row, k);
      next_a[i] =
          part.m + row < epilogue.M && k0 + k < part.k_end ? part.a[(part.m + row) * a.row + (k0 + k) * a.k] : T(0);
      place(b, i, row, k);
      next_b[i] =
          part.n + row < epilogue.N && k0 + k < part.k_end ? part.b[(part.n + row) * b.row + (k0 + k) * b.k] : T(0);
    }
  };
  const auto keep = [&](int stage) {
    T* to = shared + stage * (2 * kStep * kPitch);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int row, k;
      place(a, i, row, k);
      to[k * kPitch + row] = next_a[i];
      place(b, i, row, k);
      to[(kStep + k) * kPitch + row] = next_b[i];
    }
  };

  // Thread (tx, ty) of the first kPer also sums row tx of those that the 16 threads of ty multiply.
  const bool sums_rows = epilogue.sums_rows(part.n) && tx < kPer;
  const int summed = (tx / kVector<T> * 16 + ty) * kVector<T> + tx % kVector<T>;
  T sum[kPer][kPer] = {}, row_sum = 0;
  fetch(part.k_begin);
  int stage = 0;
  for (int64_t k0 = part.k_begin; k0 < part.k_end; k0 += kStep, stage ^= 1) {
    keep(stage);
    __syncthreads();  // the other stage is free again after this, too: everybody has left the step before
    if (k0 + kStep < part.k_end) fetch(k0 + kStep);
    const T* from = shared + stage * (2 * kStep * kPitch);
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      T row[kPer], column[kPer];
      // groups of 4 (float32) or 2, 16 threads apart: no bank conflicts, and 16-byte loads
      constexpr int n = kVector<T>;
#pragma unroll
      for (int i = 0; i < kPer; i += n) {
        const auto va = *reinterpret_cast<const Vector<T, n>*>(from + k * kPitch + (i / n * 16 + ty) * n);
        const auto vb = *reinterpret_cast<const Vector<T, n>*>(from + (kStep + k) * kPitch + (i / n * 16 + tx) * n);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          row[i + j] = va.v[j];
          column[i + j] = vb.v[j];
        }
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i)
#pragma unroll
        for (int j = 0; j < kPer; ++j) sum[i][j] += row[i] * column[j];
    }
    if (sums_rows) {
#pragma unroll
      for (int k = 0; k < kStep; ++k) row_sum += from[k * kPitch + summed];
    }
  }
  if (sums_rows) epilogue.apply_row(part.plane, part.m + summed, row_sum);
  // Through shared memory, so that memory is written in whole lines.
  constexpr int n = kVector<T>, kSums = kTile + 4;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPer; ++i)
#pragma unroll
    for (int j = 0; j < kPer; ++j)
      shared[((i / n * 16 + ty) * n + i % n) * kSums + (j / n * 16 + tx) * n + j % n] = sum[i][j];
  __syncthreads();
  apply_tile<kTile, kBlock, kSums>(epilogue, shared, part.plane, part.m, part.n);
}

template <class T, int kPer>
void run(const char* op, const Gemm& g, const Context& context) {
  constexpr int kTile = 16 * kPer, kPitch = kTile + 16 / static_cast<int>(sizeof(T));
  const int64_t blocks = divide_up(g.M, kTile) * divide_up(g.N, kTile) * g.batch * g.splits;
  const int64_t K_split = divide_up(divide_up(g.K, kStep), g.splits) * kStep;
  constexpr std::size_t shared_bytes = larger(4 * kStep * kPitch, kTile * (kTile + 4)) * sizeof(T);
  static_assert(shared_bytes <= kLeastShared, "must run on every GPU");
  launch<gemm_fma<T, kPer>>(
      {op, Shape({{"batch", g.batch}, {"M", g.M}, {"N", g.N}, {"K", g.K}}), context, blocks, kBlock, shared_bytes}, g.a,
      g.b, g.batch, g.K, K_split, Epilogue<T>(g));
}

}  // namespace

void gemm_scalar(const char* op, const Gemm& g, const Context& context) {
  if (g.dtype == DType::float64) return run<double, 4>(op, g, context);
  const bool large = divide_up(g.M, 128) * divide_up(g.N, 128) * g.batch * g.splits >= 132;
  if (large) return run<float, 8>(op, g, context);
  run<float, 4>(op, g, context);
}

}  // namespace vit::cuda
