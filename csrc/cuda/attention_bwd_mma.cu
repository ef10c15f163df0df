// With s = scale q k^T, p = exp(s - m) / l, delta = sum over d of dout out (one number per query):
//   dv = p^T dout,  dp = dout v^T,  ds = p (dp - delta),  dq = scale ds k,  dk = scale ds^T q.
//
// Two kernels, no atomics, any N and L: keys_kernel owns 64 keys per block and passes over all queries for dk and dv;
// queries_kernel owns 64 queries and passes over all keys for dq. Scores are computed in both, 14 N L D FLOP per head
// instead of 10: the price of a fixed order of every sum and of no float32 copy of dq in memory. (Up to 256 tokens
// attention_bwd_short.cu does it in one kernel and 10.) 4 warps, each 16 of the owned rows; tiles of 16 to 64 others.
#include "attention.cuh"

namespace vit::cuda {
namespace {

constexpr int kOwned = 64;
constexpr int kThreads = 128;

// By the bytes of a row: 256 are 128 elements in 16 bits, 64 in TF32.
VIT_HOST_DEVICE constexpr int others_per_tile(int row) { return row <= 128 ? 64 : row <= 256 ? 32 : 16; }
VIT_HOST_DEVICE constexpr int stages(int row) { return row <= 256 ? 2 : 1; }

// Two owned tiles, two passing tiles per stage, and m, 1 / l and delta of the passing queries.
constexpr int shared_bytes(int row) {
  return (2 * kOwned + 2 * stages(row) * others_per_tile(row)) * (row + 16) +
         stages(row) * 3 * others_per_tile(row) * 4;
}
static_assert(shared_bytes(256) <= kLeastShared && shared_bytes(512) <= kLeastShared, "must run on every GPU");

template <class T, int kD>
__global__ void __launch_bounds__(kThreads)
    queries_kernel(AttentionBwd p, const float* delta, bool vectors, bool pairs) {
  using R = Rows<T, kD>;
  constexpr int kRow = kD * static_cast<int>(sizeof(T)), kOthers = others_per_tile(kRow), kStages = stages(kRow);
  constexpr int kTile = kOthers * R::kPitch;
  T* q_tile = reinterpret_cast<T*>(shared_memory());
  T* dout_tile = q_tile + kOwned * R::kPitch;
  T* tiles = dout_tile + kOwned * R::kPitch;  // [stage][k, v]
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16, D = static_cast<int>(p.D);
  const HeadBlock at = head_block(blockIdx.x, p.H, (p.N + kOwned - 1) / kOwned);
  const int64_t first = at.block * kOwned, head = (at.b * p.H + at.h) * p.N;
  const Head<T> q(p.q, at.b, at.h), k(p.k, at.b, at.h), v(p.v, at.b, at.h), dq(p.dq, at.b, at.h),
      dout(p.dout, p.N * p.H * p.D, p.H * p.D, p.D, at.b, at.h);
  const bool active = first + row < p.N;
  const float scale = static_cast<float>(p.scale) * kLog2e;
  const Stats<float> stats(p, at.b, at.h);
  float m[2], inverse[2], delta_row[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t token = first + row + fragment_row(lane, 2 * r);
    m[r] = stats.largest(token);
    inverse[r] = stats.inverse(token);
    delta_row[r] = token < p.N ? delta[head + token] : 0;
  }

  const auto load = [&](int64_t tile) {
    T* to = tiles + tile % kStages * (2 * kTile);
    R::template load<kOthers, kThreads>(to, k, tile * kOthers, p.L, D, vectors);
    R::template load<kOthers, kThreads>(to + kTile, v, tile * kOthers, p.L, D, vectors);
    copy_async_commit();
  };

  float sum[kD / 8][4] = {};
  const int64_t count = (p.L + kOthers - 1) / kOthers;
  R::template load<kOwned, kThreads>(q_tile, q, first, p.N, D, vectors);
  R::template load<kOwned, kThreads>(dout_tile, dout, first, p.N, D, vectors);
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
    const int64_t keys = p.L - tile * kOthers;
    if (active) {
      float s[kOthers / 8][4] = {}, dp[kOthers / 8][4] = {};
      multiply_rows<T, kD, kOthers>(s, q_tile, row, k_tile, keys, lane);
      multiply_rows<T, kD, kOthers>(dp, dout_tile, row, k_tile + kTile, keys, lane);
#pragma unroll
      for (int i = 0; i < kOthers / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float weight = probability(s[i][j], scale, m[j / 2], inverse[j / 2]);
          s[i][j] = 8 * i + fragment_column(lane, j) < keys ? weight * (dp[i][j] - delta_row[j / 2]) : 0.0f;
        }
      multiply_fragments<T, kD, kOthers>(sum, s, k_tile, keys, lane);
    }
    __syncthreads();
    if (kStages == 1 && tile + 1 < count) load(tile + 1);
  }
  const float factor = static_cast<float>(p.scale);
  if (active) store_rows<T, kD>(dq, sum, first + row, p.N, D, factor, factor, pairs, lane);
}

// kWantK and kWantV: above a head dimension of 128 the registers hold one of the two sums, and the kernel runs twice.
template <class T, int kD, bool kWantK, bool kWantV>
__global__ void __launch_bounds__(kThreads) keys_kernel(AttentionBwd p, const float* delta, bool vectors, bool pairs) {
  using R = Rows<T, kD>;
  constexpr int kRow = kD * static_cast<int>(sizeof(T)), kOthers = others_per_tile(kRow), kStages = stages(kRow);
  constexpr int kTile = kOthers * R::kPitch;
  T* k_tile = reinterpret_cast<T*>(shared_memory());
  T* v_tile = k_tile + kOwned * R::kPitch;
  T* tiles = v_tile + kOwned * R::kPitch;                                  // [stage][q, dout]
  float* numbers = reinterpret_cast<float*>(tiles + kStages * 2 * kTile);  // [stage][m, 1 / l, delta]
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16, D = static_cast<int>(p.D);
  const HeadBlock at = head_block(blockIdx.x, p.H, (p.L + kOwned - 1) / kOwned);
  const int64_t first = at.block * kOwned, head = (at.b * p.H + at.h) * p.N;
  const Head<T> q(p.q, at.b, at.h), k(p.k, at.b, at.h), v(p.v, at.b, at.h), dk(p.dk, at.b, at.h), dv(p.dv, at.b, at.h),
      dout(p.dout, p.N * p.H * p.D, p.H * p.D, p.D, at.b, at.h);
  const bool active = first + row < p.L;
  const float scale = static_cast<float>(p.scale) * kLog2e;
  const Stats<float> stats(p, at.b, at.h);

  const auto load = [&](int64_t tile) {
    const int stage = static_cast<int>(tile % kStages);
    T* to = tiles + stage * (2 * kTile);
    R::template load<kOthers, kThreads>(to, q, tile * kOthers, p.N, D, vectors);
    R::template load<kOthers, kThreads>(to + kTile, dout, tile * kOthers, p.N, D, vectors);
    copy_async_commit();
    for (int i = threadIdx.x; i < kOthers; i += kThreads) {
      const int64_t token = tile * kOthers + i;
      float* number = numbers + stage * 3 * kOthers + i;
      number[0] = stats.largest(token);
      number[kOthers] = stats.inverse(token);
      number[2 * kOthers] = token < p.N ? delta[head + token] : 0;
    }
  };

  float dk_sum[kD / 8][4] = {}, dv_sum[kD / 8][4] = {};
  const int64_t count = (p.N + kOthers - 1) / kOthers;
  R::template load<kOwned, kThreads>(k_tile, k, first, p.L, D, vectors);
  R::template load<kOwned, kThreads>(v_tile, v, first, p.L, D, vectors);
  if (count > 0) load(0);
  for (int64_t tile = 0; tile < count; ++tile) {
    if (kStages == 2 && tile + 1 < count) {
      load(tile + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    T* q_tile = tiles + tile % kStages * (2 * kTile);
    const float* m = numbers + tile % kStages * (3 * kOthers);
    const float *inverse = m + kOthers, *delta_row = inverse + kOthers;
    const int64_t queries = p.N - tile * kOthers;
    if (active) {
      float s[kOthers / 8][4] = {}, dp[kOthers / 8][4] = {};
      multiply_rows<T, kD, kOthers>(s, k_tile, row, q_tile, queries, lane);
      if constexpr (kWantK) multiply_rows<T, kD, kOthers>(dp, v_tile, row, q_tile + kTile, queries, lane);
#pragma unroll
      for (int i = 0; i < kOthers / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = 8 * i + fragment_column(lane, j);
          s[i][j] = probability(s[i][j], scale, m[column], inverse[column]);
          dp[i][j] = s[i][j] * (dp[i][j] - delta_row[column]);
        }
      if constexpr (kWantV) multiply_fragments<T, kD, kOthers>(dv_sum, s, q_tile + kTile, queries, lane);
      if constexpr (kWantK) multiply_fragments<T, kD, kOthers>(dk_sum, dp, q_tile, queries, lane);
    }
    __syncthreads();
    if (kStages == 1 && tile + 1 < count) load(tile + 1);
  }
  if (!active) return;
  const float factor = static_cast<float>(p.scale);
  if constexpr (kWantK) store_rows<T, kD>(dk, dk_sum, first + row, p.L, D, factor, factor, pairs, lane);
  if constexpr (kWantV) store_rows<T, kD>(dv, dv_sum, first + row, p.L, D, 1.0f, 1.0f, pairs, lane);
}

template <class T, int kD>
void run(const AttentionBwd& p, const float* delta, bool vectors, bool pairs) {
  Launch shape = {"attention_bwd", attention_shape(p.B, p.N, p.L, p.H, p.D),
                  p.context,       0,
                  kThreads,        static_cast<std::size_t>(shared_bytes(kD * sizeof(T)))};
  shape.blocks = p.B * p.H * divide_up(p.N, kOwned);
  launch<queries_kernel<T, kD>>(shape, p, delta, vectors, pairs);
  shape.blocks = p.B * p.H * divide_up(p.L, kOwned);
  if constexpr (kD <= 128) {
    launch<keys_kernel<T, kD, true, true>>(shape, p, delta, vectors, pairs);
  } else {
    launch<keys_kernel<T, kD, true, false>>(shape, p, delta, vectors, pairs);
    launch<keys_kernel<T, kD, false, true>>(shape, p, delta, vectors, pairs);
  }
}

}  // namespace

void attention_bwd_mma(const AttentionBwd& p, const float* delta) {
  const bool vectors = is_aligned(p.q.data) && is_aligned(p.k.data) && is_aligned(p.v.data) && is_aligned(p.dout) &&
                       p.D % (16 / bytes(p.dtype)) == 0 &&
                       strides_divide(16 / bytes(p.dtype), {p.q.batch, p.q.token, p.q.head, p.k.batch, p.k.token,
                                                            p.k.head, p.v.batch, p.v.token, p.v.head});
  const bool pairs = p.D % 2 == 0 && is_aligned(p.dq.data, 2 * bytes(p.dtype)) &&
                     is_aligned(p.dk.data, 2 * bytes(p.dtype)) && is_aligned(p.dv.data, 2 * bytes(p.dtype)) &&
                     strides_divide(2, {p.dq.batch, p.dq.token, p.dq.head, p.dk.batch, p.dk.token, p.dk.head,
                                        p.dv.batch, p.dv.token, p.dv.head});
  dispatch_mma(p.dtype, p.D, [&](auto element, auto head_dim) {
    run<decltype(element), decltype(head_dim)::value>(p, delta, vectors, pairs);
  });
}

}  // namespace vit::cuda
