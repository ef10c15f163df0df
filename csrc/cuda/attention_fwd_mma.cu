// out = softmax(scale q k^T) v per head, by tensor cores, without a score matrix in memory (online softmax).
//
// A block of 4 warps takes 64 queries of one head, each warp 16; keys and values pass through shared memory in tiles of
// 16 to 64, copied asynchronously one tile ahead. Per head 4 N L D FLOP; q and out are
// moved once, k and v once per 64 queries, from the L2 cache. Work is cut to multiples of 16 queries and 16 keys: at N
// = 197 that is 208 x 208, 90 % of it useful. Every query is computed the same way whatever the others are.
#include "attention.cuh"

namespace vit::cuda {
namespace {

constexpr int kQueries = 64;
constexpr int kThreads = 128;

// By the bytes of a row: 256 are 128 elements in 16 bits, 64 in TF32.
VIT_HOST_DEVICE constexpr int keys_per_tile(int row) { return row <= 256 ? 64 : 32; }
VIT_HOST_DEVICE constexpr int stages(int row) { return row <= 256 ? 2 : 1; }
constexpr int shared_bytes(int row) { return (kQueries + 2 * stages(row) * keys_per_tile(row)) * (row + 16); }
static_assert(shared_bytes(256) <= kLeastShared && shared_bytes(512) <= kLeastShared, "must run on every GPU");

template <class T, int kD>
__global__ void __launch_bounds__(kThreads) attention_fwd_kernel(AttentionFwd p, bool vectors, bool pairs) {
  using R = Rows<T, kD>;
  constexpr int kRow = kD * static_cast<int>(sizeof(T)), kKeys = keys_per_tile(kRow), kStages = stages(kRow);
  constexpr int kTile = kKeys * R::kPitch;
  T* q_tile = reinterpret_cast<T*>(shared_memory());
  T* tiles = q_tile + kQueries * R::kPitch;  // [stage][k, v]
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16, D = static_cast<int>(p.D);
  const HeadBlock at = head_block(blockIdx.x, p.H, (p.N + kQueries - 1) / kQueries);
  const int64_t first = at.block * kQueries;
  const Head<T> q(p.q, at.b, at.h), k(p.k, at.b, at.h), v(p.v, at.b, at.h),
      out(p.out, p.N * p.H * p.D, p.H * p.D, p.D, at.b, at.h);
  const bool active = first + row < p.N;  // a warp without queries only helps to copy
  const float scale = static_cast<float>(p.scale) * kLog2e;

  const auto load = [&](int64_t tile) {
    T* to = tiles + tile % kStages * (2 * kTile);
    R::template load<kKeys, kThreads>(to, k, tile * kKeys, p.L, D, vectors);
    R::template load<kKeys, kThreads>(to + kTile, v, tile * kKeys, p.L, D, vectors);
    copy_async_commit();
  };

  float sum[kD / 8][4] = {};
  OnlineSoftmax softmax;
  const int64_t count = (p.L + kKeys - 1) / kKeys;
  R::template load<kQueries, kThreads>(q_tile, q, first, p.N, D, vectors);
  load(0);
  for (int64_t tile = 0; tile < count; ++tile) {
    if (kStages == 2 && tile + 1 < count) {
      load(tile + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    T* k_tile = tiles + tile % kStages * (2 * kTile);
    const int64_t keys = p.L - tile * kKeys;  // that exist, may exceed kKeys
    if (active) {
      float s[kKeys / 8][4] = {};
      multiply_rows<T, kD, kKeys>(s, q_tile, row, k_tile, keys, lane);
      softmax.add<kD, kKeys>(s, sum, scale, keys, lane);
      multiply_fragments<T, kD, kKeys>(sum, s, k_tile + kTile, keys, lane);
    }
    __syncthreads();  // before the tile is overwritten
    if (kStages == 1 && tile + 1 < count) load(tile + 1);
  }
  if (!active) return;
  softmax.finish();
  const float inverse[2] = {1.0f / softmax.l[0], 1.0f / softmax.l[1]};
  Stats<float>(p, at.b, at.h).store_rows(first + row, softmax.m, inverse, lane);
  store_rows<T, kD>(out, sum, first + row, p.N, D, inverse[0], inverse[1], pairs, lane);
}

}  // namespace

void attention_fwd_mma(const AttentionFwd& p) {
  const bool vectors = is_aligned(p.q.data) && is_aligned(p.k.data) && is_aligned(p.v.data) &&
                       strides_divide(16 / bytes(p.dtype), {p.q.batch, p.q.token, p.q.head, p.k.batch, p.k.token,
                                                            p.k.head, p.v.batch, p.v.token, p.v.head});
  const bool pairs = p.D % 2 == 0 && is_aligned(p.out, 2 * bytes(p.dtype));
  const int64_t blocks = p.B * p.H * divide_up(p.N, kQueries);
  dispatch_mma(p.dtype, p.D, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kD = decltype(head_dim)::value;
    launch<attention_fwd_kernel<T, kD>>({"attention_fwd", attention_shape(p.B, p.N, p.L, p.H, p.D), p.context, blocks,
                                         kThreads, static_cast<std::size_t>(shared_bytes(kD * sizeof(T)))},
                                        p, vectors, pairs);
  });
}

}  // namespace vit::cuda
