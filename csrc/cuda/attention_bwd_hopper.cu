// The backward of attention by wgmma (equations in attention_bwd_mma.cu): one kernel, no atomics, no workspace. It
// never ran on a GPU and is taken on Path::wgmma_backward alone, until one has said whether it is the faster.
//
// q, k, v, dout of a head lie in shared memory as a whole. A warpgroup takes 64 keys at a time and walks over all
// queries, 32 to a step: s^T = k q^T and dp^T = v dout^T through descriptors, p^T and ds^T rounded to operands a in
// registers, dv += p^T dout and dk += ds^T q. Then it takes 64 queries at a time, these in registers, and walks over
// all keys: s, dp, dq += ds k. Scores are computed in both, 14 N L D FLOP per head instead of 10: the price for ds that
// never leaves its registers. So warpgroups meet once, after the loads, and two heads share a multiprocessor: while one
// loads the other multiplies. Where rows are no multiple of 32 the last step begins earlier, and what was done before
// counts as 0. Every sum has one owner, and an order that follows from N and L alone.
//
// q, k, v, dout, out read once, dq, dk, dv written once. At N = L = 197, D = 64, per multiprocessor of an H200 and
// head: 202 KB of memory 10,900 clocks, wgmma 12,600, operands from shared memory 9,800, exponentials 7,200. Few heads
// (small batches) get several blocks, which take the tiles of 64 in turn.
#include "attention_hopper.cuh"

namespace vit::cuda {
namespace {

constexpr int kTile = 64;  // rows of a warpgroup's product
constexpr int kStep = 32;  // columns of its scores

// How a head dimension is run: warpgroups of a block that is alone on its multiprocessor (at D = 64 there are mostly
// two blocks of two), which says how many registers a thread has: 128, 168 and 255. And whether a warpgroup begins the
// scores of a step before its last products are done, which needs the registers for the operands of both; where there
// are none, the other warpgroups multiply meanwhile.
struct Plan {
  int warpgroups;
  bool overlaps_itself;
};

VIT_HOST_DEVICE constexpr Plan plan(int kD) {
  return kD == 64 ? Plan{4, false} : kD == 80 ? Plan{3, true} : kD == 96 ? Plan{3, false} : Plan{2, true};
}

// Rows of a tile: whole steps of k of the products over them, and one step of scores at least.
VIT_HOST_DEVICE constexpr int tile_rows(int64_t tokens) {
  const int rows = static_cast<int>((tokens + 15) / 16 * 16);
  return rows < kStep ? kStep : rows;
}

// k, v, q, dout, then m, 1 / l and delta of the queries: where they begin, in bytes. The operand of the last 64 keys
// runs over the end of its tile into the next one: rows of a product that nobody stores.
struct Layout {
  int keys, queries, row;

  VIT_HOST_DEVICE constexpr Layout(int kD, int64_t N, int64_t L)
      : keys(tile_rows(L)), queries(tile_rows(N)), row(2 * kD) {}
  VIT_HOST_DEVICE constexpr int q() const { return 2 * keys * row; }
  VIT_HOST_DEVICE constexpr int numbers() const { return q() + 2 * queries * row; }
  VIT_HOST_DEVICE constexpr int bytes() const { return numbers() + 12 * queries; }
};

#ifdef VIT_CUDA_HOPPER

template <class T>
struct Tile {
  Vector<T, 8>* data;  // by_group
  int rows;

  // As operands: 16 elements of rows `row` .., and 16 rows of all elements.
  __device__ uint64_t rows_at(int row, int step) const {
    return moved(rows_descriptor(shared_address(data), rows, 0, 0), by_group(rows, row, 2 * step));
  }
  __device__ uint64_t columns_at(int row) const {
    return moved(columns_descriptor(shared_address(data), rows, 0), row);
  }
  // The a fragments of rows row .. row + 15.
  template <int kD>
  __device__ void load(uint32_t (&fragment)[kD / 16][4], int row, int lane) const {
    const MatrixAddress m = a_address(lane);
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) load_matrices(fragment[i], data + by_group(rows, row + m.row, 2 * i + m.group));
  }
  // Where a step begins that ends with the last row.
  __device__ int step_at(int begin) const { return begin + kStep <= rows ? begin : rows - kStep; }
};

// What a block has in shared memory.
template <class T, int kD>
struct Operands {
  Tile<T> k, v, q, dout;
  float *m, *inverse, *delta;  // of the queries

  __device__ explicit Operands(const AttentionBwd& p) {
    const Layout layout(kD, p.N, p.L);
    const auto at = [](int byte) { return reinterpret_cast<Vector<T, 8>*>(shared_memory() + byte); };
    k = {at(0), layout.keys};
    v = {at(layout.keys * layout.row), layout.keys};
    q = {at(layout.q()), layout.queries};
    dout = {at(layout.q() + layout.queries * layout.row), layout.queries};
    m = reinterpret_cast<float*>(at(layout.numbers()));
    inverse = m + layout.queries;
    delta = inverse + layout.queries;
  }
};

// Writes m, 1 / l and delta = dout . out of every query, 0 where there is none. 8 lanes have a query, a lane every
// eighth 16 bytes of it.
template <class T>
__device__ inline void make_numbers(float* m, float* inverse, float* delta, int queries, const AttentionBwd& p,
                                    const Head<T>& dout, const Head<T>& out, const Stats<float>& stats) {
  const int part = threadIdx.x % 8;
#pragma unroll 2
  for (int row = threadIdx.x / 8; row < queries; row += static_cast<int>(blockDim.x) / 8) {
    float sum = 0;
    for (int d = 8 * part; d < static_cast<int>(p.D) && row < static_cast<int>(p.N); d += 64) {
      float x[8], y[8];
      load_vector(dout.data + row * dout.token + d, x);
      load_vector(out.data + row * out.token + d, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
    }
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
    if (part != 0) continue;
    m[row] = stats.largest(row);
    inverse[row] = stats.inverse(row);
    delta[row] = sum;
  }
}

// Products of kStep columns, rounded to operands a of the next.
template <class T>
__device__ inline void as_operands(uint32_t (&a)[kStep / 16][4], const float (&x)[kStep / 2]) {
#pragma unroll
  for (int i = 0; i < kStep / 8; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) a[i / 2][2 * (i % 2) + r] = pack<T>(x[4 * i + 2 * r], x[4 * i + 2 * r + 1]);
}

// sum[64, kD] (+)= a[64, kStep] times rows `row` .. of a tile.
template <class T, int kD>
__device__ inline void add_product(float (&sum)[kD / 2], const uint32_t (&a)[kStep / 16][4], const Tile<T>& tile,
                                   int row, bool add) {
#pragma unroll
  for (int i = 0; i < kStep / 16; ++i)
    WgmmaRegisters<T, kD, true>::issue(sum, a[i], tile.columns_at(row + 16 * i), add || i > 0);
}

__device__ inline Vector<float, 2> pair_at(const float* x) { return *reinterpret_cast<const Vector<float, 2>*>(x); }

// dk and dv of keys first .. first + 63.
template <class T, int kD>
__device__ inline void keys_tile(const AttentionBwd& p, const Operands<T, kD>& in, const HeadBlock& at, int first,
                                 int lane) {
  const float scale = static_cast<float>(p.scale) * kLog2e;
  float dk_sum[kD / 2], dv_sum[kD / 2];
  uint32_t weights[kStep / 16][4], ds[kStep / 16][4];  // in use until the next step's wait
  for (int begin = 0; begin < static_cast<int>(p.N); begin += kStep) {
    const int row = in.q.step_at(begin);
    float s[kStep / 2], dp[kStep / 2];
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kD / 16; ++i)
      Wgmma<T, kStep, false, false>::issue(s, in.k.rows_at(first, i), in.q.rows_at(row, i), i > 0);
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < kD / 16; ++i)
      Wgmma<T, kStep, false, false>::issue(dp, in.v.rows_at(first, i), in.dout.rows_at(row, i), i > 0);
    wgmma_commit();
    wgmma_wait<1>(s);  // the products before it are done too, and with their operands
#pragma unroll
    for (int i = 0; i < kStep / 8; ++i) {
      const int query = row + 8 * i + fragment_column(lane, 0);
      const auto m = pair_at(in.m + query), inverse = pair_at(in.inverse + query);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float weight = probability(s[4 * i + j], scale, m.v[j % 2], inverse.v[j % 2]);
        s[4 * i + j] = query >= begin ? weight : 0.0f;  // both of a pair or none: begin is even
      }
    }
    as_operands<T>(weights, s);
    wgmma_wait<0>(dp);
#pragma unroll
    for (int i = 0; i < kStep / 8; ++i) {
      const auto delta = pair_at(in.delta + row + 8 * i + fragment_column(lane, 0));
#pragma unroll
      for (int j = 0; j < 4; ++j) dp[4 * i + j] = s[4 * i + j] * (dp[4 * i + j] - delta.v[j % 2]);
    }
    as_operands<T>(ds, dp);
    wgmma_fence(weights[0], weights[1], ds[0], ds[1]);
    add_product<T, kD>(dv_sum, weights, in.dout, row, begin > 0);
    add_product<T, kD>(dk_sum, ds, in.q, row, begin > 0);
    wgmma_commit();
    if constexpr (!plan(kD).overlaps_itself) wgmma_wait<0>(dv_sum, dk_sum);
  }
  wgmma_wait<0>(dv_sum, dk_sum);
  const float one[2] = {1.0f, 1.0f}, factor[2] = {static_cast<float>(p.scale), static_cast<float>(p.scale)};
  const int row = first + 16 * static_cast<int>(threadIdx.x / 32 % 4);
  store_vectors<T, kD>(Head<T>(p.dv, at.b, at.h), dv_sum, row, static_cast<int>(p.L), static_cast<int>(p.D), one, lane);
  store_vectors<T, kD>(Head<T>(p.dk, at.b, at.h), dk_sum, row, static_cast<int>(p.L), static_cast<int>(p.D), factor,
                       lane);
}

// dq of queries first .. first + 63.
template <class T, int kD>
__device__ inline void queries_tile(const AttentionBwd& p, const Operands<T, kD>& in, const HeadBlock& at, int first,
                                    int lane) {
  const float scale = static_cast<float>(p.scale) * kLog2e;
  const int row = first + 16 * static_cast<int>(threadIdx.x / 32 % 4);
  const int there = row < in.q.rows ? row : 0;  // a warp without queries works on others' and stores nothing
  float m[2], inverse[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = there + fragment_row(lane, 2 * r);
    m[r] = in.m[query];
    inverse[r] = in.inverse[query];
    delta[r] = in.delta[query];
  }
  uint32_t q[kD / 16][4], dout[kD / 16][4];
  in.q.template load<kD>(q, there, lane);
  in.dout.template load<kD>(dout, there, lane);
  float sum[kD / 2];
  uint32_t ds[kStep / 16][4];  // in use until the next step's wait
  for (int begin = 0; begin < static_cast<int>(p.L); begin += kStep) {
    const int from = in.k.step_at(begin);
    float s[kStep / 2], dp[kStep / 2];
    wgmma_fence(q, dout);
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) WgmmaRegisters<T, kStep, false>::issue(s, q[i], in.k.rows_at(from, i), i > 0);
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) WgmmaRegisters<T, kStep, false>::issue(dp, dout[i], in.v.rows_at(from, i), i > 0);
    wgmma_commit();
    wgmma_wait<1>(s);
#pragma unroll
    for (int i = 0; i < kStep / 2; ++i) s[i] = probability(s[i], scale, m[i % 4 / 2], inverse[i % 4 / 2]);
    wgmma_wait<0>(dp);
#pragma unroll
    for (int i = 0; i < kStep / 2; ++i) {
      const int key = from + 8 * (i / 4) + fragment_column(lane, i % 4);
      dp[i] = key >= begin && key < static_cast<int>(p.L) ? s[i] * (dp[i] - delta[i % 4 / 2]) : 0.0f;
    }
    as_operands<T>(ds, dp);
    wgmma_fence(ds[0], ds[1]);
    add_product<T, kD>(sum, ds, in.k, from, begin > 0);
    wgmma_commit();
    if constexpr (!plan(kD).overlaps_itself) wgmma_wait<0>(sum);
  }
  wgmma_wait<0>(sum);
  const float factor[2] = {static_cast<float>(p.scale), static_cast<float>(p.scale)};
  store_vectors<T, kD>(Head<T>(p.dq, at.b, at.h), sum, row, static_cast<int>(p.N), static_cast<int>(p.D), factor, lane);
}

#endif  // VIT_CUDA_HOPPER

// `parts` blocks per head take its tiles in turn, those of keys first.
template <class T, int kD>
__global__ void __launch_bounds__(128 * plan(kD).warpgroups, 1)
    attention_bwd_hopper_kernel(const __grid_constant__ AttentionBwd p, int parts) {
#ifdef VIT_CUDA_HOPPER
  const Operands<T, kD> in(p);
  const int lane = threadIdx.x % 32, threads = static_cast<int>(blockDim.x);
  const int N = static_cast<int>(p.N), L = static_cast<int>(p.L), D = static_cast<int>(p.D);
  const HeadBlock at = head_block(blockIdx.x, p.H, parts);
  const auto contiguous = [&](const void* x) { return Head<T>(x, p.N * p.H * p.D, p.H * p.D, p.D, at.b, at.h); };
  const Head<T> q(p.q, at.b, at.h), k(p.k, at.b, at.h), v(p.v, at.b, at.h), dout = contiguous(p.dout),
                                                                            out = contiguous(p.out);
  wait_on_dependent_grids();
  launch_dependent_grids();

  load_by_group<T, kD>(in.k.data, k, in.k.rows, L, D, threads);
  load_by_group<T, kD>(in.q.data, q, in.q.rows, N, D, threads);
  load_by_group<T, kD>(in.v.data, v, in.v.rows, L, D, threads);
  load_by_group<T, kD>(in.dout.data, dout, in.dout.rows, N, D, threads);
  copy_async_commit();
  make_numbers(in.m, in.inverse, in.delta, in.q.rows, p, dout, out, Stats<float>(p, at.b, at.h));
  copy_async_wait<0>();
  fence_for_wgmma();
  __syncthreads();

  const int step = parts * (threads / 128), keys = (L + kTile - 1) / kTile;
  int tile = shuffle(static_cast<int>(at.block) * (threads / 128) + static_cast<int>(threadIdx.x) / 128, 0);
  for (; tile < keys; tile += step) keys_tile<T, kD>(p, in, at, kTile * tile, lane);
  for (tile -= keys; kTile * tile < N; tile += step) queries_tile<T, kD>(p, in, at, kTile * tile, lane);
#endif
}

template <class F>
void dispatch_sizes(int64_t D, F f) {
  switch (compiled_head_dim(D)) {
    case 80:
      return f(std::integral_constant<int, 80>{});
    case 96:
      return f(std::integral_constant<int, 96>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    default:
      f(std::integral_constant<int, 64>{});
  }
}

}  // namespace

bool attention_bwd_hopper_supports(const AttentionBwd& p) {
  if (path() != Path::wgmma_backward || !hopper_allowed(p.context.device) || !is_16_bit(p.dtype)) return false;
  if (p.D <= 32 || p.D > 128 || p.D % 8 != 0 || p.N == 0 || p.N > 1024 || p.L == 0 || p.L > 1024) return false;
  const auto aligned_heads = [](const auto& x) {
    return is_aligned(x.data) && strides_divide(8, {x.batch, x.token, x.head});
  };
  return Layout(compiled_head_dim(p.D), p.N, p.L).bytes() <= shared_limit(p.context.device) && aligned_heads(p.q) &&
         aligned_heads(p.k) && aligned_heads(p.v) && aligned_heads(p.dq) && aligned_heads(p.dk) &&
         aligned_heads(p.dv) && is_aligned(p.dout) && is_aligned(p.out);
}

void attention_bwd_hopper(const AttentionBwd& p) {
  dispatch_16_bit(p.dtype, [&](auto element) {
    dispatch_sizes(p.D, [&](auto kD) {
      const int64_t reserved = 1024, bytes = Layout(kD, p.N, p.L).bytes();  // reserved of every block, by the driver
      const bool two = kD == 64 && 2 * (bytes + reserved) <= shared_limit(p.context.device) + reserved;
      const int warpgroups = two ? 2 : plan(kD).warpgroups;
      const int64_t heads = p.B * p.H, tiles = divide_up(p.N, kTile) + divide_up(p.L, kTile);
      const int64_t parts = smaller(divide_up(tiles, warpgroups),
                                    divide_up(int64_t{two ? 2 : 1} * multiprocessors(p.context.device), heads));
      launch<attention_bwd_hopper_kernel<decltype(element), decltype(kD)::value>>(
          {"attention_bwd", attention_shape(p.B, p.N, p.L, p.H, p.D), p.context, heads * parts, 128 * warpgroups,
           static_cast<std::size_t>(bytes), 1, true},
          p, static_cast<int>(parts));
    });
  });
}

}  // namespace vit::cuda
