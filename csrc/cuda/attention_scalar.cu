// Attention in float32 and float64 by plain fused multiply-adds; equations as in attention_fwd_mma.cu and
// attention_bwd_mma.cu.
//
// Compiled head dimensions: 64, 128 and 256. A block of 16 x 16 threads takes kTile = 16 kPer tokens of one head,
// thread (y, x) the rows y + 16 i of them; the other side passes through shared memory kTile tokens at a time. Scores
// of a tile are kTile x kTile in shared memory, sums over tokens [kPer, kD / 16] in registers: columns x + 16 j. Rows
// in shared memory are one element longer than kD, so that 16 threads on 16 rows hit 16 banks. Correct and reasonable
// rather than fast: ViTs run attention in 16 bits. The tiles are the same on every GPU, and with them the bits of a
// result: small enough for one of 99 KiB.
#include "attention.cuh"

namespace vit::cuda {
namespace {

constexpr int kThreads = 256;

constexpr int compiled(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }

// kPer by the bytes of an element: 4, 2, 1 of the forward in float32 and 2, 1, 1 in float64; 2, 2, 1 and 1 of the
// backward.
VIT_HOST_DEVICE constexpr int per_thread(int size, int kD, bool backward) {
  if (backward) return size == 4 && kD <= 128 ? 2 : 1;
  const int wanted = 1024 / (size * kD);
  return wanted < 1 ? 1 : wanted;
}

// Shared memory of a block: 50 to 65 KiB forward, 37 to 73 KiB backward, but for float64 beyond 128.
constexpr int shared_bytes(int size, int kD, bool backward) {
  const int tile = 16 * per_thread(size, kD, backward);
  return size *
         (backward ? 4 * tile * (kD + 1) + 2 * tile * (tile + 1) + 3 * tile : 3 * tile * (kD + 1) + tile * (tile + 1));
}

constexpr bool fits_everywhere(int size, bool backward, int most) {
  for (int kD = 64; kD <= most; kD *= 2)
    if (shared_bytes(size, kD, backward) > kLeastShared) return false;
  return true;
}
static_assert(fits_everywhere(4, false, 256) && fits_everywhere(4, true, 256) && fits_everywhere(8, false, 256) &&
                  fits_everywhere(8, true, 128),
              "only the backward in float64 beyond 128 (133 KiB) may need more than the smallest GPU has");

template <class T, int kD, int kPer>
struct Block {
  static constexpr int kTile = 16 * kPer, kPitch = kD + 1, kColumns = kD / 16;
  int x = threadIdx.x % 16, y = threadIdx.x / 16;

  __device__ void load(T* tile, const Head<T>& head, int64_t first, int64_t count, int D) const {
    for (int i = threadIdx.x; i < kTile * kD; i += kThreads) {
      const int row = i / kD, d = i % kD;
      tile[row * kPitch + d] = first + row < count && d < D ? head.data[(first + row) * head.token + d] : T(0);
    }
  }

  // s[i][j] = a[y + 16 i] . b[x + 16 j]
  __device__ void products(T (&s)[kPer][kPer], const T* a, const T* b) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i)
#pragma unroll
      for (int j = 0; j < kPer; ++j) s[i][j] = 0;
#pragma unroll 4
    for (int d = 0; d < kD; ++d) {
      T ra[kPer], rb[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        ra[i] = a[(y + 16 * i) * kPitch + d];
        rb[i] = b[(x + 16 * i) * kPitch + d];
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i)
#pragma unroll
        for (int j = 0; j < kPer; ++j) s[i][j] += ra[i] * rb[j];
    }
  }

  // sum[i][j] += sum over tokens t of w[y + 16 i][t] tile[t][x + 16 j]
  __device__ void accumulate(T (&sum)[kPer][kColumns], const T* w, const T* tile) const {
#pragma unroll 2
    for (int t = 0; t < kTile; ++t) {
      T rw[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) rw[i] = w[(y + 16 * i) * (kTile + 1) + t];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const T b = tile[t * kPitch + x + 16 * j];
#pragma unroll
        for (int i = 0; i < kPer; ++i) sum[i][j] += rw[i] * b;
      }
    }
  }

  __device__ void put(T* w, const T (&s)[kPer][kPer]) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i)
#pragma unroll
      for (int j = 0; j < kPer; ++j) w[(y + 16 * i) * (kTile + 1) + x + 16 * j] = s[i][j];
  }

  __device__ void store(const Head<T>& head, const T (&sum)[kPer][kColumns], int64_t first, int64_t count, int D,
                        const T (&factor)[kPer]) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int64_t token = first + y + 16 * i;
      if (token >= count) continue;
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (x + 16 * j < D) head.data[token * head.token + x + 16 * j] = sum[i][j] * factor[i];
    }
  }
};

// Sum and maximum over the 16 threads of a row: half a warp.
template <class T>
__device__ inline T row_sum(T value) {
#pragma unroll
  for (int mask = 8; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class T>
__device__ inline T row_max(T value) {
#pragma unroll
  for (int mask = 8; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

template <class T, int kD>
__global__ void __launch_bounds__(kThreads) fwd_scalar(AttentionFwd p) {
  constexpr int kPer = per_thread(sizeof(T), kD, false);
  using B = Block<T, kD, kPer>;
  constexpr int kTile = B::kTile;
  const B block;
  T* q_tile = reinterpret_cast<T*>(shared_memory());
  T* k_tile = q_tile + kTile * B::kPitch;
  T* v_tile = k_tile + kTile * B::kPitch;
  T* weights = v_tile + kTile * B::kPitch;
  const HeadBlock at = head_block(blockIdx.x, p.H, (p.N + kTile - 1) / kTile);
  const int64_t first = at.block * kTile;
  const int D = static_cast<int>(p.D);
  const Head<T> q(p.q, at.b, at.h), k(p.k, at.b, at.h), v(p.v, at.b, at.h),
      out(p.out, p.N * p.H * p.D, p.H * p.D, p.D, at.b, at.h);
  const T scale = static_cast<T>(p.scale), infinity = static_cast<T>(INFINITY);
  T sum[kPer][B::kColumns] = {}, m[kPer], l[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    m[i] = -infinity;
    l[i] = 0;
  }
  block.load(q_tile, q, first, p.N, D);
  for (int64_t key = 0; key < p.L; key += kTile) {
    __syncthreads();  // before the tiles are overwritten
    block.load(k_tile, k, key, p.L, D);
    block.load(v_tile, v, key, p.L, D);
    __syncthreads();
    T s[kPer][kPer];
    block.products(s, q_tile, k_tile);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      T top = m[i];
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        s[i][j] = key + block.x + 16 * j < p.L ? rounded_product(s[i][j], scale) : -infinity;
        top = s[i][j] > top ? s[i][j] : top;
      }
      top = row_max(top);
      const T base = top == -infinity ? T(0) : top, shrink = exp(m[i] - base);
      T part = 0;
#pragma unroll
      for (int j = 0; j < kPer; ++j) part += s[i][j] = exp(s[i][j] - base);
      l[i] = l[i] * shrink + row_sum(part);
      m[i] = top;
#pragma unroll
      for (int j = 0; j < B::kColumns; ++j) sum[i][j] *= shrink;
    }
    block.put(weights, s);
    __syncthreads();
    block.accumulate(sum, weights, v_tile);
  }
  T factor[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    factor[i] = 1 / l[i];
    if (block.x == 0) Stats<T>(p, at.b, at.h).store(first + block.y + 16 * i, m[i], factor[i]);
  }
  block.store(out, sum, first, p.N, D, factor);
}

// kQueries: the block owns queries and sums dq over keys; else it owns keys and sums dk and dv over queries.
template <class T, int kD, bool kQueries>
__global__ void __launch_bounds__(kThreads) bwd_scalar(AttentionBwd p, const T* delta) {
  constexpr int kPer = per_thread(sizeof(T), kD, true);
  using B = Block<T, kD, kPer>;
  constexpr int kTile = B::kTile;
  const B block;
  T* own_a = reinterpret_cast<T*>(shared_memory());  // q or k
  T* own_b = own_a + kTile * B::kPitch;              // dout or v
  T* other_a = own_b + kTile * B::kPitch;            // k or q
  T* other_b = other_a + kTile * B::kPitch;          // v or dout
  T* weights = other_b + kTile * B::kPitch;
  T* ds = weights + kTile * (kTile + 1);
  T* numbers = ds + kTile * (kTile + 1);  // m, 1 / l and delta of the tile's queries
  const int64_t own_count = kQueries ? p.N : p.L, other_count = kQueries ? p.L : p.N;
  const HeadBlock at = head_block(blockIdx.x, p.H, (own_count + kTile - 1) / kTile);
  const int64_t first = at.block * kTile, head = (at.b * p.H + at.h) * p.N;
  const int D = static_cast<int>(p.D);
  const Head<T> q(p.q, at.b, at.h), k(p.k, at.b, at.h), v(p.v, at.b, at.h),
      dout(p.dout, p.N * p.H * p.D, p.H * p.D, p.D, at.b, at.h), dq(p.dq, at.b, at.h), dk(p.dk, at.b, at.h),
      dv(p.dv, at.b, at.h);
  const T scale = static_cast<T>(p.scale);
  const Stats<T> stats(p, at.b, at.h);
  const auto load_numbers = [&](int64_t query) {
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
      numbers[i] = stats.largest(query + i);
      numbers[kTile + i] = stats.inverse(query + i);
      numbers[2 * kTile + i] = query + i < p.N ? delta[head + query + i] : T(0);
    }
  };
  T sum_a[kPer][B::kColumns] = {}, sum_b[kPer][B::kColumns] = {};  // dq, or dk and dv
  block.load(own_a, kQueries ? q : k, first, own_count, D);
  block.load(own_b, kQueries ? dout : v, first, own_count, D);
  if (kQueries) load_numbers(first);
  for (int64_t other = 0; other < other_count; other += kTile) {
    __syncthreads();
    block.load(other_a, kQueries ? k : q, other, other_count, D);
    block.load(other_b, kQueries ? v : dout, other, other_count, D);
    if (!kQueries) load_numbers(other);
    __syncthreads();
    T s[kPer][kPer], dp[kPer][kPer];
    block.products(s, own_a, other_a);
    block.products(dp, own_b, other_b);
#pragma unroll
    for (int i = 0; i < kPer; ++i)
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int query = kQueries ? block.y + 16 * i : block.x + 16 * j;
        const bool key_exists = !kQueries || other + block.x + 16 * j < p.L;
        const T power = rounded_product(s[i][j], scale) - numbers[query];  // above 0 by rounding, see probability()
        s[i][j] = key_exists ? exp(power > 0 ? T(0) : power) * numbers[kTile + query] : T(0);
        dp[i][j] = s[i][j] * (dp[i][j] - numbers[2 * kTile + query]);
      }
    block.put(ds, dp);
    if (!kQueries) block.put(weights, s);
    __syncthreads();
    block.accumulate(sum_a, ds, other_a);
    if (!kQueries) block.accumulate(sum_b, weights, other_b);
  }
  T factor[kPer], one[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    factor[i] = scale;
    one[i] = 1;
  }
  block.store(kQueries ? dq : dk, sum_a, first, own_count, D, factor);
  if (!kQueries) block.store(dv, sum_b, first, own_count, D, one);
}

template <class F>
void dispatch_scalar(DType dtype, int64_t D, F f) {
  const auto choose = [&](auto element) {
    if (compiled(D) == 64) return f(element, std::integral_constant<int, 64>{});
    if (compiled(D) == 128) return f(element, std::integral_constant<int, 128>{});
    f(element, std::integral_constant<int, 256>{});
  };
  if (dtype == DType::float64) return choose(double{});
  choose(float{});
}

}  // namespace

std::size_t attention_scalar_bytes(DType dtype, int64_t D, bool backward) {
  return static_cast<std::size_t>(shared_bytes(static_cast<int>(bytes(dtype)), compiled(D), backward));
}

void attention_fwd_scalar(const AttentionFwd& p) {
  dispatch_scalar(p.dtype, p.D, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kD = decltype(head_dim)::value;
    const int64_t blocks = p.B * p.H * divide_up(p.N, 16 * per_thread(sizeof(T), kD, false));
    launch<fwd_scalar<T, kD>>({"attention_fwd", attention_shape(p.B, p.N, p.L, p.H, p.D), p.context, blocks, kThreads,
                               attention_scalar_bytes(p.dtype, p.D, false)},
                              p);
  });
}

void attention_bwd_scalar(const AttentionBwd& p, const void* delta) {
  dispatch_scalar(p.dtype, p.D, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kD = decltype(head_dim)::value, kTile = 16 * per_thread(sizeof(T), kD, true);
    Launch shape = {"attention_bwd", attention_shape(p.B, p.N, p.L, p.H, p.D),  p.context, 0,
                    kThreads,        attention_scalar_bytes(p.dtype, p.D, true)};
    shape.blocks = p.B * p.H * divide_up(p.N, kTile);
    launch<bwd_scalar<T, kD, true>>(shape, p, static_cast<const T*>(delta));
    shape.blocks = p.B * p.H * divide_up(p.L, kTile);
    launch<bwd_scalar<T, kD, false>>(shape, p, static_cast<const T*>(delta));
  });
}

}  // namespace vit::cuda
