// Attention for short sequences: one block per head, all its keys and values in shared memory.
//
// attention_fwd_mma.cu reads k and v once per 64 queries from the L2 cache: at N = 197 2.4 times the bytes that device
// memory delivers. Here they are read once. Each warp takes 16 queries at a time, straight into registers, and walks
// over the keys 64 at a time (online softmax) without a barrier; the last keys arrive while the first are in use. Two
// blocks fit on a multiprocessor, so that one loads while the other computes. 4 N L D FLOP; q, k, v read once, out
// written once: N / 2 FLOP per byte, at N = 197 the limit is memory.
//
// Head dimensions 33 to 80, as many keys as two blocks per multiprocessor can hold: 389 of 64 elements on Hopper.
#include "attention.cuh"

namespace vit::cuda {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kKeys = 64;   // per step of the softmax
constexpr int kGroups = 4;  // parts in which keys and values arrive

constexpr int64_t shared_bytes(int kD, int64_t L) { return (L + 15) / 16 * 16 * (kD + 8) * 2 * 2; }

template <class T, int kD>
__global__ void __launch_bounds__(kMaxWarps * 32, 2) attention_fwd_short_kernel(AttentionFwd p, bool pairs) {
  using R = Rows<T, kD>;
  const int keys = static_cast<int>((p.L + 15) / 16 * 16), D = static_cast<int>(p.D);
  T* k_tile = reinterpret_cast<T*>(shared_memory());
  T* v_tile = k_tile + keys * R::kPitch;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = static_cast<int>(blockDim.x);
  const HeadBlock at = head_block(blockIdx.x, p.H, 1);
  const Head<T> q(p.q, at.b, at.h), k(p.k, at.b, at.h), v(p.v, at.b, at.h),
      out(p.out, p.N * p.H * p.D, p.H * p.D, p.D, at.b, at.h);
  const float scale = static_cast<float>(p.scale) * kLog2e;

  const auto load = [&](T* tile, const Head<T>& head, int from, int to) {
    for (int i = from * R::kGroups + static_cast<int>(threadIdx.x); i < to * R::kGroups; i += threads) {
      const int row = i / R::kGroups, group = i % R::kGroups;
      const bool valid = row < p.L && 8 * group < D;
      copy_async_16(R::at(tile, row, group), valid ? head.data + row * head.token + 8 * group : head.data,
                    valid ? 16 : 0);
    }
  };
  const int per_group = (keys + kGroups * kKeys - 1) / (kGroups * kKeys) * kKeys;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int from = i * per_group, to = from + per_group < keys ? from + per_group : keys;
    load(k_tile, k, from, to);
    load(v_tile, v, from, to);
    copy_async_commit();
  }
  // Keys from `key` on are needed: every thread waits for its own copies of that part, then for the others'.
  const auto wait_for = [&](int key) {
    if (key % per_group != 0) return;
    switch (key / per_group) {
      case 0:
        copy_async_wait<3>();
        break;
      case 1:
        copy_async_wait<2>();
        break;
      case 2:
        copy_async_wait<1>();
        break;
      default:
        copy_async_wait<0>();
    }
    __syncthreads();
  };

  for (int row = 16 * warp; row < p.N; row += threads / 2) {  // every warp has a first round: see the launch
    uint32_t q_fragment[kD / 16][4];
    load_queries<T, kD>(q_fragment, q, row, static_cast<int>(p.N), D, lane);
    OnlineSoftmax softmax;
    float sum[kD / 8][4] = {};
    for (int key = 0; key < keys; key += kKeys) {
      if (row == 16 * warp) wait_for(key);
      float s[kKeys / 8][4] = {};
#pragma unroll
      for (int d = 0; d < kD / 16; ++d)
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n)
          if (key + 16 * n < keys) {
            uint32_t b[4];
            R::load_b(b, k_tile, key + 16 * n, d, lane);
            mma_16x8<T>(s[2 * n], q_fragment[d], b[0], b[1]);
            mma_16x8<T>(s[2 * n + 1], q_fragment[d], b[2], b[3]);
          }
      softmax.add<kD, kKeys>(s, sum, scale, p.L - key, lane);
      multiply_fragments<T, kD, kKeys>(sum, s, v_tile + key * R::kPitch, keys - key, lane);
    }
    softmax.finish();
    const float inverse[2] = {1.0f / softmax.l[0], 1.0f / softmax.l[1]};
    Stats<float>(p, at.b, at.h).store_rows(row, softmax.m, inverse, lane);
    store_rows<T, kD>(out, sum, row, p.N, D, inverse[0], inverse[1], pairs, lane);
  }
}

int compiled(int64_t D) { return D <= 64 ? 64 : 80; }

}  // namespace

bool attention_fwd_short_supports(const AttentionFwd& p) {
  if (path() == Path::portable || !is_16_bit(p.dtype) || p.D <= 32 || p.D > 80 || p.D % 8 != 0 || p.N > (1 << 20))
    return false;
  const int64_t reserved = 1024;  // of every block, by the driver
  return 2 * (shared_bytes(compiled(p.D), p.L) + reserved) <= shared_limit(p.context.device) + reserved &&
         is_aligned(p.q.data, 4) && is_aligned(p.k.data) && is_aligned(p.v.data) &&
         strides_divide(2, {p.q.batch, p.q.token, p.q.head}) &&
         strides_divide(8, {p.k.batch, p.k.token, p.k.head, p.v.batch, p.v.token, p.v.head});
}

void attention_fwd_short(const AttentionFwd& p) {
  const bool pairs = is_aligned(p.out, 4);
  const int64_t rows = divide_up(p.N, 16), rounds = divide_up(rows, kMaxWarps), warps = divide_up(rows, rounds);
  const Launch shape = {"attention_fwd",
                        attention_shape(p.B, p.N, p.L, p.H, p.D),
                        p.context,
                        p.B * p.H,
                        static_cast<int>(32 * warps),
                        static_cast<std::size_t>(shared_bytes(compiled(p.D), p.L))};
  dispatch_16_bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (compiled(p.D) == 64) return launch<attention_fwd_short_kernel<T, 64>>(shape, p, pairs);
    launch<attention_fwd_short_kernel<T, 80>>(shape, p, pairs);
  });
}

}  // namespace vit::cuda
