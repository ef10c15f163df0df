// The backward of attention for short sequences (equations in attention_bwd_mma.cu): one kernel, one block per head.
//
// q, k, dout of a head lie in shared memory as a whole. Each warp owns 16 keys: their k and v stay in registers as a
// fragments, dk and dv as sums, and it walks over all queries 16 at a time without a barrier. ds^T of the whole head is
// left in shared memory (over v, which is in registers by then); after one barrier each warp owns 16 queries and
// multiplies their ds with k for dq. 10 N L D FLOP per head, nothing computed twice; q, k, v, dout, out read once, dq,
// dk, dv written once, no workspace; the order of every sum is fixed because every sum has one owner.
// delta is computed from dout and out while the tiles arrive.
//
// Head dimensions up to 64, as many tokens as fit: 240 of 64 elements in the 227 KiB of Hopper (ViT's 197 and 201).
#include "attention.cuh"

namespace vit::cuda {
namespace {

constexpr int kD = 64;
constexpr int kMaxWarps = 15;

// Where what lies, in elements of 2 bytes.
struct Layout {
  int queries, keys;  // rounded up to 16
  int ds_pitch;

  VIT_HOST_DEVICE constexpr Layout(int64_t N, int64_t L)
      : queries(static_cast<int>((N + 15) / 16 * 16)),
        keys(static_cast<int>((L + 15) / 16 * 16)),
        ds_pitch(queries + 8) {}  // an odd number of 16-byte groups: no bank conflicts
  VIT_HOST_DEVICE constexpr int dout() const { return queries * (kD + 8); }
  VIT_HOST_DEVICE constexpr int k() const { return 2 * dout(); }
  VIT_HOST_DEVICE constexpr int v() const { return k() + keys * (kD + 8); }  // then ds^T
  VIT_HOST_DEVICE constexpr int numbers() const {
    const int v_size = keys * (kD + 8), ds_size = keys * ds_pitch;
    return v() + (v_size > ds_size ? v_size : ds_size);
  }
  constexpr int64_t bytes() const { return int64_t{2} * numbers() + int64_t{12} * queries; }  // m, 1 / l, delta
};

template <class T>
__global__ void __launch_bounds__(kMaxWarps * 32) attention_bwd_short_kernel(AttentionBwd p, bool pairs) {
  using R = Rows<T, kD>;
  const Layout layout(p.N, p.L);
  T* q_tile = reinterpret_cast<T*>(shared_memory());
  T* dout_tile = q_tile + layout.dout();
  T* k_tile = q_tile + layout.k();
  T* v_tile = q_tile + layout.v();
  T* ds_tile = v_tile;  // [key][query]
  float* m = reinterpret_cast<float*>(q_tile + layout.numbers());
  float* inverse = m + layout.queries;
  float* delta = inverse + layout.queries;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = layout.keys / 16, threads = 32 * warps;
  const int D = static_cast<int>(p.D);
  const HeadBlock at = head_block(blockIdx.x, p.H, 1);
  const Head<T> q(p.q, at.b, at.h), k(p.k, at.b, at.h), v(p.v, at.b, at.h), dq(p.dq, at.b, at.h), dk(p.dk, at.b, at.h),
      dv(p.dv, at.b, at.h), dout(p.dout, p.N * p.H * p.D, p.H * p.D, p.D, at.b, at.h),
      out(p.out, p.N * p.H * p.D, p.H * p.D, p.D, at.b, at.h);

  const auto load = [&](T* tile, const Head<T>& head, int from, int to, int64_t count) {
    for (int i = from * R::kGroups + static_cast<int>(threadIdx.x); i < to * R::kGroups; i += threads) {
      const int row = i / R::kGroups, group = i % R::kGroups;
      const bool valid = row < count && 8 * group < D;
      copy_async_16(R::at(tile, row, group), valid ? head.data + row * head.token + 8 * group : head.data,
                    valid ? 16 : 0);
    }
  };
  // Keys, values and the first half of the queries; work begins while the second half arrives.
  const int half = (layout.queries / 16 + 1) / 2 * 16;
  load(k_tile, k, 0, layout.keys, p.L);
  load(v_tile, v, 0, layout.keys, p.L);
  load(q_tile, q, 0, half, p.N);
  load(dout_tile, dout, 0, half, p.N);
  copy_async_commit();
  load(q_tile, q, half, layout.queries, p.N);
  load(dout_tile, dout, half, layout.queries, p.N);
  copy_async_commit();

  const Stats<float> stats(p, at.b, at.h);
  for (int row = warp; row < layout.queries; row += warps) {
    float sum = 0;
    if (row < p.N && 2 * lane < D) {
      const auto x = *reinterpret_cast<const Vector<T, 2>*>(dout.data + row * dout.token + 2 * lane);
      const auto y = *reinterpret_cast<const Vector<T, 2>*>(out.data + row * out.token + 2 * lane);
      sum = to_acc(x.v[0]) * to_acc(y.v[0]) + to_acc(x.v[1]) * to_acc(y.v[1]);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      delta[row] = sum;
      m[row] = stats.largest(row);
      inverse[row] = stats.inverse(row);
    }
  }
  copy_async_wait<1>();
  __syncthreads();

  uint32_t k_fragment[kD / 16][4], v_fragment[kD / 16][4];
#pragma unroll
  for (int d = 0; d < kD / 16; ++d) {
    R::load_a(k_fragment[d], k_tile, 16 * warp, d, lane);
    R::load_a(v_fragment[d], v_tile, 16 * warp, d, lane);
  }
  __syncthreads();  // all of v is in registers: ds may take its place

  const float scale = static_cast<float>(p.scale) * kLog2e;
  const bool exists[2] = {16 * warp + fragment_row(lane, 0) < p.L, 16 * warp + fragment_row(lane, 2) < p.L};
  float dk_sum[kD / 8][4] = {}, dv_sum[kD / 8][4] = {};
  for (int row = 0; row < layout.queries; row += 16) {
    if (row == half) {
      copy_async_wait<0>();
      __syncthreads();
    }
    float s[2][4] = {}, dp[2][4] = {};  // s^T and dp^T: 16 keys x 16 queries
#pragma unroll
    for (int d = 0; d < kD / 16; ++d) {
      uint32_t b[4];
      R::load_b(b, q_tile, row, d, lane);
      mma_16x8<T>(s[0], k_fragment[d], b[0], b[1]);
      mma_16x8<T>(s[1], k_fragment[d], b[2], b[3]);
      R::load_b(b, dout_tile, row, d, lane);
      mma_16x8<T>(dp[0], v_fragment[d], b[0], b[1]);
      mma_16x8<T>(dp[1], v_fragment[d], b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = row + 8 * i + fragment_column(lane, 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int query = column + j % 2;
        s[i][j] = exists[j / 2] ? probability(s[i][j], scale, m[query], inverse[query]) : 0.0f;
        dp[i][j] = exists[j / 2] ? s[i][j] * (dp[i][j] - delta[query]) : 0.0f;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = 16 * warp + fragment_row(lane, 2 * r);
        *reinterpret_cast<uint32_t*>(ds_tile + key * layout.ds_pitch + column) =
            pack<T>(dp[i][2 * r], dp[i][2 * r + 1]);
      }
    }
    multiply_fragments<T, kD, 16>(dv_sum, s, dout_tile + row * R::kPitch, 16, lane);
    multiply_fragments<T, kD, 16>(dk_sum, dp, q_tile + row * R::kPitch, 16, lane);
  }
  const float factor = static_cast<float>(p.scale);
  store_rows<T, kD>(dk, dk_sum, 16 * warp, p.L, D, factor, factor, pairs, lane);
  store_rows<T, kD>(dv, dv_sum, 16 * warp, p.L, D, 1.0f, 1.0f, pairs, lane);
  __syncthreads();

  for (int row = 16 * warp; row < layout.queries; row += 16 * warps) {
    float sum[kD / 8][4] = {};
    const MatrixAddress m = a_address_transposed(lane);
    for (int key = 0; key < layout.keys; key += 16) {
      uint32_t a[4], b[4];
      load_matrices_transposed(a, ds_tile + (key + m.row) * layout.ds_pitch + row + 8 * m.group);
#pragma unroll
      for (int d = 0; d < kD / 16; ++d) {
        R::load_b_transposed(b, k_tile, key, d, lane);
        mma_16x8<T>(sum[2 * d], a, b[0], b[1]);
        mma_16x8<T>(sum[2 * d + 1], a, b[2], b[3]);
      }
    }
    store_rows<T, kD>(dq, sum, row, p.N, D, factor, factor, pairs, lane);
  }
}

}  // namespace

bool attention_bwd_short_supports(const AttentionBwd& p) {
  if (path() == Path::portable || !is_16_bit(p.dtype) || p.N == 0 || p.N > 1024 || p.L == 0 || p.L > 16 * kMaxWarps)
    return false;
  return p.D > 32 && p.D <= kD && p.D % 8 == 0 && Layout(p.N, p.L).bytes() <= shared_limit(p.context.device) &&
         is_aligned(p.q.data) && is_aligned(p.k.data) && is_aligned(p.v.data) && is_aligned(p.dout) &&
         is_aligned(p.out, 4) &&
         strides_divide(
             8, {p.q.batch, p.q.token, p.q.head, p.k.batch, p.k.token, p.k.head, p.v.batch, p.v.token, p.v.head});
}

void attention_bwd_short(const AttentionBwd& p) {
  const Layout layout(p.N, p.L);
  const bool pairs = is_aligned(p.dq.data, 4) && is_aligned(p.dk.data, 4) && is_aligned(p.dv.data, 4) &&
                     strides_divide(2, {p.dq.batch, p.dq.token, p.dq.head, p.dk.batch, p.dk.token, p.dk.head,
                                        p.dv.batch, p.dv.token, p.dv.head});
  dispatch_16_bit(p.dtype, [&](auto element) {
    launch<attention_bwd_short_kernel<decltype(element)>>(
        {"attention_bwd", attention_shape(p.B, p.N, p.L, p.H, p.D), p.context, p.B * p.H, 2 * layout.keys,
         static_cast<std::size_t>(layout.bytes())},
        p, pairs);
  });
}

}  // namespace vit::cuda
