// out = softmax(scale q k^T) v per head for up to 272 keys, by wgmma: a whole row of scores stays in registers, so
// there is one maximum, one sum and no rescaling.
//
// One block of one warpgroup per head: keys and values are read once into shared memory (cp.async: any strides of whole
// 16 bytes, heads of any multiple of 8) and stay; queries come 64 at a time, straight into registers. A score row of
// 208 keys is 104 registers of each thread; its weights, rounded, are the a operand of the second product where they
// are. Three blocks share a multiprocessor and nothing else (up to 208 keys of 64; two beyond): while one is in its
// softmax another multiplies and the third loads. Few heads (small batches) get a block per 64 queries instead.
//
// Per head 4 N L D FLOP, cut to 64 queries and to 64, 128, 208 or 272 keys; q, k, v read once, out written once. At
// N = 197, D = 64, per multiprocessor of an H200 and head: 100 KB of memory 5700 clocks, wgmma 3300, exponentials 3300,
// other instructions of the softmax 2000: bound by memory if the three overlap well.
#include "attention_hopper.cuh"

namespace vit::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kQueries = 64;

VIT_HOST_DEVICE constexpr int shared_bytes(int kD, int kKeys) { return 2 * 16 * by_group(kKeys, 0, kD / 8); }

// As many as registers and shared memory allow: 128, 168 and 255 registers per thread at 4, 3 and 2 blocks.
constexpr int blocks_per_multiprocessor(int kD, int kKeys) {
  const int by_registers = kKeys <= 128 ? 4 : kKeys <= 208 ? 3 : 2;
  const int by_memory = 227 * 1024 / (shared_bytes(kD, kKeys) + 1024);
  return by_registers < by_memory ? by_registers : by_memory;
}

// The scale as the kernel has it, in base 2 and float32: 0 for one that is too small, and -inf times 0 is NaN.
VIT_HOST_DEVICE inline float scale_of(const AttentionFwd& p) { return static_cast<float>(p.scale) * kLog2e; }

#ifdef VIT_CUDA_HOPPER

// The scores of 64 queries: wgmma takes at most 256 columns, and 272 are two products of 136.
template <int kKeys>
struct Scores {
  static constexpr int kParts = kKeys > 256 ? 2 : 1, kColumns = kKeys / kParts;
  float part[kParts][kColumns / 2];

  // Element j of the c fragment of keys 8 i ..: query fragment_row(lane, j), key 8 i + fragment_column(lane, j).
  __device__ float& at(int i, int j) { return part[8 * i / kColumns][8 * i % kColumns / 2 + j]; }
};

// Turns scores into weights, rounded to a fragments of the second product; m and l are the maximum and the sum of the
// thread's two rows, in base 2. There are at least kLeast keys.
template <class T, int kKeys, int kLeast>
__device__ inline void softmax(Scores<kKeys>& s, uint32_t (&weights)[kKeys / 16][4], float (&m)[2], float (&l)[2],
                               float scale, int keys, int lane) {
  float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (8 * i + 8 > kLeast && 8 * i + fragment_column(lane, j) >= keys) s.at(i, j) = -INFINITY;
      top[j / 2] = fmaxf(top[j / 2], s.at(i, j));
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(top[r], shuffle_xor(top[r], 1));
    top[r] = fmaxf(top[r], shuffle_xor(top[r], 2));
    m[r] = top[r] == -INFINITY ? 0.0f : top[r] * scale;  // no finite score: all weights are 0, not NaN
    l[r] = 0;
  }
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s.at(i, j) = fast_exp2(fmaf(s.at(i, j), scale, -m[j / 2]));
      l[j / 2] += s.at(i, j);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) weights[i / 2][2 * (i % 2) + r] = pack<T>(s.at(i, 2 * r), s.at(i, 2 * r + 1));
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    l[r] += shuffle_xor(l[r], 1);
    l[r] += shuffle_xor(l[r], 2);
  }
}

#endif  // VIT_CUDA_HOPPER

// `parts` blocks per head take its tiles of 64 queries in turn.
template <class T, int kD, int kKeys, int kLeast>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor(kD, kKeys))
    attention_fwd_hopper_kernel(const __grid_constant__ AttentionFwd p, int parts) {
#ifdef VIT_CUDA_HOPPER
  Vector<T, 8>* k_tile = reinterpret_cast<Vector<T, 8>*>(shared_memory());
  Vector<T, 8>* v_tile = k_tile + by_group(kKeys, 0, kD / 8);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int D = static_cast<int>(p.D), N = static_cast<int>(p.N), keys = static_cast<int>(p.L);
  const HeadBlock at = head_block(blockIdx.x, p.H, parts);
  const Head<T> q(p.q, at.b, at.h), k(p.k, at.b, at.h), v(p.v, at.b, at.h),
      out(p.out, p.N * p.H * p.D, p.H * p.D, p.D, at.b, at.h);
  const float scale = scale_of(p);
  wait_on_dependent_grids();
  launch_dependent_grids();

  // Zeros where there is no key: a weight of 0 times anything left in shared memory could be NaN.
  load_by_group<T, kD>(k_tile, k, kKeys, keys, D, kThreads);
  copy_async_commit();
  load_by_group<T, kD>(v_tile, v, kKeys, keys, D, kThreads);
  copy_async_commit();

  const int first = static_cast<int>(at.block) * kQueries + 16 * warp, step = parts * kQueries;
  for (int row = first; row - 16 * warp < N; row += step) {
    uint32_t queries[kD / 16][4];
    load_queries<T, kD>(queries, q, row, N, D, lane);
    if (row == first) {  // the keys are here; the values still under way
      copy_async_wait<1>();
      fence_for_wgmma();
      __syncthreads();
    }
    Scores<kKeys> s;
    wgmma_fence(queries);
#pragma unroll
    for (int d = 0; d < kD / 16; ++d)
#pragma unroll
      for (int i = 0; i < s.kParts; ++i)
        WgmmaRegisters<T, s.kColumns, false>::issue(
            s.part[i], queries[d], rows_descriptor(shared_address(k_tile), kKeys, s.kColumns * i, d), d > 0);
    wgmma_commit();
    wgmma_wait<0>(s.part);

    uint32_t weights[kKeys / 16][4];
    float m[2], l[2];
    softmax<T, kKeys, kLeast>(s, weights, m, l, scale, keys, lane);
    if (row == first) {
      copy_async_wait<0>();
      fence_for_wgmma();
      __syncthreads();
    }
    float sum[kD / 2];
    wgmma_fence(weights);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
      WgmmaRegisters<T, kD, true>::issue(sum, weights[i], columns_descriptor(shared_address(v_tile), kKeys, 16 * i),
                                         i > 0);
    wgmma_commit();
    wgmma_wait<0>(sum);
    const float factor[2] = {1.0f / l[0], 1.0f / l[1]};
    store_vectors<T, kD>(out, sum, row, N, D, factor, lane);
    Stats<float>(p, at.b, at.h).store_rows(row, m, factor, lane);
  }
#endif
}

constexpr int kMostKeys = 272;

// The keys a kernel is compiled for. Short rows of uncommon heads are left to the other kernels, for the sake of the
// build: 197 and 257 tokens are ViT's.
constexpr int compiled_keys(int64_t L) { return L <= 64 ? 64 : L <= 128 ? 128 : L <= 208 ? 208 : kMostKeys; }

template <class F>
void dispatch_sizes(int64_t D, int64_t L, F f) {
  const auto keys = [&](auto kD) {
    if (compiled_keys(L) == kMostKeys)
      return f(kD, std::integral_constant<int, kMostKeys>{}, std::integral_constant<int, 209>{});
    f(kD, std::integral_constant<int, 208>{}, std::integral_constant<int, 129>{});
  };
  switch (compiled_head_dim(D)) {
    case 32:
      return keys(std::integral_constant<int, 32>{});
    case 80:
      return keys(std::integral_constant<int, 80>{});
    case 96:
      return keys(std::integral_constant<int, 96>{});
    case 128:
      return keys(std::integral_constant<int, 128>{});
    default: {
      const std::integral_constant<int, 64> kD;
      if (compiled_keys(L) == 64) return f(kD, std::integral_constant<int, 64>{}, std::integral_constant<int, 1>{});
      if (compiled_keys(L) == 128) return f(kD, std::integral_constant<int, 128>{}, std::integral_constant<int, 65>{});
      keys(kD);
    }
  }
}

}  // namespace

bool attention_fwd_hopper_supports(const AttentionFwd& p) {
  return hopper_allowed(p.context.device) && is_16_bit(p.dtype) && p.D % 8 == 0 && p.D <= 128 && p.L <= kMostKeys &&
         (p.L > 128 || compiled_head_dim(p.D) == 64) && p.N <= (1 << 20) &&
         scale_of(p) > 0 &&  // the largest score is that of the largest product
         is_aligned(p.q.data, 4) && is_aligned(p.k.data) && is_aligned(p.v.data) && is_aligned(p.out) &&
         strides_divide(2, {p.q.batch, p.q.token, p.q.head}) &&
         strides_divide(8, {p.k.batch, p.k.token, p.k.head, p.v.batch, p.v.token, p.v.head});
}

void attention_fwd_hopper(const AttentionFwd& p) {
  const int64_t heads = p.B * p.H, tiles = divide_up(p.N, kQueries);
  const int64_t parts = smaller(tiles, divide_up(int64_t{2} * multiprocessors(p.context.device), heads));
  dispatch_16_bit(p.dtype, [&](auto element) {
    dispatch_sizes(p.D, p.L, [&](auto kD, auto kKeys, auto kLeast) {
      launch<attention_fwd_hopper_kernel<decltype(element), decltype(kD)::value, decltype(kKeys)::value,
                                         decltype(kLeast)::value>>(
          {"attention_fwd", attention_shape(p.B, p.N, p.L, p.H, p.D), p.context, heads * parts, kThreads,
           static_cast<std::size_t>(shared_bytes(kD, kKeys)), 1, true},
          p, static_cast<int>(parts));
    });
  });
}

}  // namespace vit::cuda
