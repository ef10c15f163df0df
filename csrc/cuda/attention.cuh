// What the attention kernels share: addressing of heads, the tiles of the tensor-core kernels, and which kernel runs.
//
// Letters as in vit.h. kD is D rounded up to a size a kernel is compiled for; elements D..kD are zeros in shared
// memory, so they add nothing to any product.
#pragma once

#include "layout.cuh"
#include "runtime.cuh"
#include "types.cuh"

namespace vit::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;

// The compiled head dimension of a 16-bit tensor-core kernel: ViT's 32, 64, 80 (H), 96 and 128; 72 (So400m) runs in 80,
// 88 (g) in 96, everything up to 256 in 256.
constexpr int compiled_head_dim(int64_t D) {
  return D <= 32 ? 32 : D <= 64 ? 64 : D <= 80 ? 80 : D <= 96 ? 96 : D <= 128 ? 128 : 256;
}

template <class F>
void dispatch_head_dim(int64_t D, F f) {
  switch (compiled_head_dim(D)) {
    case 32:  // runs in 64, for the sake of the build
    case 64:
      return f(std::integral_constant<int, 64>{});
    case 80:
      return f(std::integral_constant<int, 80>{});
    case 96:
      return f(std::integral_constant<int, 96>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    default:
      return f(std::integral_constant<int, 256>{});
  }
}

// TF32 runs in 64 or 128, for the sake of the build; larger heads take the exact kernels.
inline constexpr int64_t kMaxHeadDimTF32 = 128;

// Calls f(T{}, head dimension) for a tensor-core kernel; T = float is TF32.
template <class F>
void dispatch_mma(DType dtype, int64_t D, F f) {
  if (dtype != DType::float32)
    return dispatch_16_bit(dtype, [&](auto element) { dispatch_head_dim(D, [&](auto kD) { f(element, kD); }); });
  if (D <= 64) return f(float{}, std::integral_constant<int, 64>{});
  f(float{}, std::integral_constant<int, 128>{});
}

// The tokens of one head of one image: element d of token n is data[n * token + d].
template <class T>
struct Head {
  T* data;
  int64_t token;

  template <class Data>
  __device__ Head(const HeadsOf<Data>& x, int64_t b, int64_t h) : Head(x.data, x.batch, x.token, x.head, b, h) {}
  __device__ Head(const void* base, int64_t batch_stride, int64_t token_stride, int64_t head_stride, int64_t b,
                  int64_t h)
      : data(const_cast<T*>(static_cast<const T*>(base)) + b * batch_stride + h * head_stride), token(token_stride) {}
};

// Which image, head and block of tokens a thread block works on; the blocks of one head are neighbours, so that they
// share its keys and values in the L2 cache.
struct HeadBlock {
  int64_t b, h, block;
};

__device__ inline HeadBlock head_block(int64_t index, int64_t H, int64_t blocks) {
  const int64_t head = index / blocks;
  return {head / H, head % H, index % blocks};
}

// m and 1 / l of the softmaxes of one head: `stats` of vit.h. Those of a query that does not exist make its p 0.
template <class T>
struct Stats {
  T* data;  // null: not wanted
  int64_t N;

  template <class P>
  __device__ Stats(const P& p, int64_t b, int64_t h)
      : data(p.stats ? static_cast<T*>(const_cast<void*>(p.stats)) + (b * p.H + h) * 2 * p.N : nullptr), N(p.N) {}
  __device__ T largest(int64_t n) const { return n < N ? data[n] : T(0); }
  __device__ T inverse(int64_t n) const { return n < N ? data[N + n] : T(0); }
  __device__ void store(int64_t n, T m, T inverse) const {
    if (!data || n >= N) return;
    data[n] = m;
    data[N + n] = inverse;
  }
  // Of the two rows that a thread has of c fragments, the first of which is that of query `first`.
  __device__ void store_rows(int64_t first, const float (&m)[2], const float (&inverse)[2], int lane) const {
    if (lane % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) store(first + fragment_row(lane, 2 * r), m[r], inverse[r]);
  }
};

// Rows of kD elements in shared memory, padded by one group of 16 bytes against bank conflicts.
template <class T, int kD>
struct Rows {
  static constexpr int kGroup = kVector<T>, kGroups = kD / kGroup, kPitch = kD + kGroup;

  __device__ static T* at(T* tile, int row, int group) { return tile + kGroup * padded<kGroups>(row, group); }

  // Brings tokens first .. first + rows - 1 of a head, zeros from token `count` on. Asynchronous where `vectors`.
  template <int rows, int threads>
  __device__ static void load(T* tile, const Head<T>& head, int64_t first, int64_t count, int D, bool vectors) {
    if (!vectors) return load_elements(tile, head, first, count, D, rows, threads);
#pragma unroll
    for (int i = 0; i < (rows * kGroups + threads - 1) / threads; ++i) {
      const int index = i * threads + static_cast<int>(threadIdx.x);
      if (rows * kGroups % threads != 0 && index >= rows * kGroups) continue;
      const int row = index / kGroups, group = index % kGroups;
      const int left = first + row < count ? D - kGroup * group : 0;
      const int valid = left < 0 ? 0 : left < kGroup ? left : kGroup;
      const T* from = head.data + (first + row) * head.token + kGroup * group;
      copy_async_16(at(tile, row, group), valid > 0 ? from : head.data, valid * static_cast<int>(sizeof(T)));
    }
  }

  // The same for tokens that 16-byte copies cannot read. Rare, and kept out of the kernels for the sake of the build.
  __device__ __noinline__ static void load_elements(T* tile, Head<T> head, int64_t first, int64_t count, int D,
                                                    int rows, int threads) {
    for (int i = threadIdx.x; i < rows * kD; i += threads) {
      const int row = i / kD, d = i % kD;
      tile[row * kPitch + d] = first + row < count && d < D ? head.data[(first + row) * head.token + d] : T{0};
    }
  }

  // The a fragment of rows row..row + 15, elements kMmaK k ..; the b fragments of two groups of 8 rows (n), elements
  // kMmaK k ..; and the b fragments of rows (k) row..row + kMmaK - 1, elements (n) 16 group .., which in TF32 come in
  // the order of k that c_as_a has.
  __device__ static void load_a(uint32_t (&f)[4], T* tile, int row, int k, int lane) {
    const MatrixAddress m = a_address(lane);
    load_matrices(f, at(tile, row + m.row, 2 * k + m.group));
    prepare_fragment<T>(f);
  }
  __device__ static void load_b(uint32_t (&f)[4], T* tile, int row, int k, int lane) {
    const MatrixAddress m = b_address(lane);
    load_matrices(f, at(tile, row + m.row, 2 * k + m.group));
    prepare_fragment<T>(f);
  }
  __device__ static void load_b_transposed(uint32_t (&f)[4], T* tile, int row, int group, int lane) {
    if constexpr (sizeof(T) == 2) {
      const MatrixAddress m = b_address_transposed(lane);
      load_matrices_transposed(f, at(tile, row + m.row, 2 * group + m.group));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T* from = tile + (row + 2 * (lane % 4) + i % 2) * kPitch + 16 * group + 8 * (i / 2) + lane / 4;
        f[i] = *reinterpret_cast<const uint32_t*>(from);
      }
      prepare_fragment<T>(f);
    }
  }
};

// The a fragments of tokens row .. row + 15 of a head of a 16-bit type, straight from memory; zeros from `count` on.
template <class T, int kD>
__device__ inline void load_queries(uint32_t (&fragment)[kD / 16][4], const Head<T>& q, int row, int count, int D,
                                    int lane) {
#pragma unroll
  for (int d = 0; d < kD / 16; ++d)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = row + lane / 4 + 8 * (i % 2);
      const int element = 16 * d + 2 * (lane % 4) + 8 * (i / 2);
      fragment[d][i] =
          token < count && element < D ? *reinterpret_cast<const uint32_t*>(q.data + token * q.token + element) : 0;
    }
}

// The a fragment of columns kMmaK k .. of a product, rounded to T: two tiles of c in 16 bits, one in TF32.
template <class T, int tiles>
__device__ inline void c_as_a(uint32_t (&a)[4], const float (&c)[tiles][4], int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2)
      a[i] = pack<T>(c[2 * k + i / 2][2 * (i % 2)], c[2 * k + i / 2][2 * (i % 2) + 1]);
    else
      a[i] = float_to_tf32(c[k][2 * (i % 2) + i / 2]);
  }
}

// sum[i] += a[16, kD] b[n, kD]^T for the columns n = 16 i .. of a tile, where a comes from rows row.. of another tile.
// Groups of 16 columns from `columns` on are skipped: no work for keys that do not exist.
template <class T, int kD, int kColumns>
__device__ inline void multiply_rows(float (&sum)[kColumns / 8][4], T* tile_a, int row, T* tile_b, int64_t columns,
                                     int lane) {
  using R = Rows<T, kD>;
  constexpr int kSteps = kD / kMmaK<T>;
  [[maybe_unused]] constexpr int kUnroll = kD <= 64 ? kSteps : 2;  // more costs registers: 155 for 115 at kD = 80
#pragma unroll kUnroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t a[4], b[4];
    R::load_a(a, tile_a, row, k, lane);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      if (16 * n < columns) {
        R::load_b(b, tile_b, 16 * n, k, lane);
        mma_16x8<T>(sum[2 * n], a, b[0], b[1]);
        mma_16x8<T>(sum[2 * n + 1], a, b[2], b[3]);
      }
    }
  }
}

// sum[16, kD] += p[16, kRows] tile[kRows, kD], p being the c fragments of a product, rounded to T on the way.
template <class T, int kD, int kRows>
__device__ inline void multiply_fragments(float (&sum)[kD / 8][4], const float (&p)[kRows / 8][4], T* tile,
                                          int64_t rows, int lane) {
  using R = Rows<T, kD>;
#pragma unroll
  for (int k = 0; k < kRows / kMmaK<T>; ++k) {
    if (kMmaK<T> * k >= rows) continue;
    uint32_t a[4];
    c_as_a<T>(a, p, k);
#pragma unroll
    for (int d = 0; d < kD / 16; ++d) {
      uint32_t b[4];
      R::load_b_transposed(b, tile, kMmaK<T> * k, d, lane);
      mma_16x8<T>(sum[2 * d], a, b[0], b[1]);
      mma_16x8<T>(sum[2 * d + 1], a, b[2], b[3]);
    }
  }
}

// The softmax of 16 rows of scores that come 16 x kKeys at a time; a thread holds two rows. m and l are the maximum and
// the sum of a row so far, in base 2.
struct OnlineSoftmax {
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};

  // Turns scores into weights relative to the new maximum, and shrinks what was summed before accordingly. Keys from
  // `keys` on do not exist.
  template <int kD, int kKeys>
  __device__ void add(float (&s)[kKeys / 8][4], float (&sum)[kD / 8][4], float scale, int64_t keys, int lane) {
    float top[2] = {m[0], m[1]};
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i][j] = 8 * i + fragment_column(lane, j) < keys ? s[i][j] * scale : -INFINITY;
        top[j / 2] = fmaxf(top[j / 2], s[i][j]);
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], shuffle_xor(top[r], 1));
      top[r] = fmaxf(top[r], shuffle_xor(top[r], 2));
      const float base = top[r] == -INFINITY ? 0.0f : top[r];  // no finite score yet: all weights are 0, not NaN
      const float shrink = fast_exp2(m[r] - base);
      m[r] = top[r];
      l[r] *= shrink;
#pragma unroll
      for (int i = 0; i < kD / 8; ++i) {
        sum[i][2 * r] *= shrink;
        sum[i][2 * r + 1] *= shrink;
      }
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
        for (int j = 2 * r; j < 2 * r + 2; ++j) {
          s[i][j] = fast_exp2(s[i][j] - base);
          l[r] += s[i][j];
        }
    }
  }

  // The four threads of a row add their sums.
  __device__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      l[r] += shuffle_xor(l[r], 1);
      l[r] += shuffle_xor(l[r], 2);
    }
  }
};

// 2^(s scale - m) / l, the exponential at most 1: where scores are so large that rounding exceeds the difference, the
// result must not be infinite. NaN stays NaN.
__device__ inline float probability(float s, float scale, float m, float inverse) {
  const float x = fmaf(s, scale, -m);
  return fast_exp2(x > 0 ? 0.0f : x) * inverse;
}

// Writes c fragments of 16 tokens x kD, times a factor per row, to a head; rows from `count` on do not exist.
template <class T, int kD>
__device__ inline void store_rows(const Head<T>& head, const float (&sum)[kD / 8][4], int64_t first, int64_t count,
                                  int D, float factor0, float factor1, bool pairs, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = first + fragment_row(lane, 2 * half);
    if (token >= count) continue;
    const float factor = half == 0 ? factor0 : factor1;
    T* to = head.data + token * head.token;
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      const int d = 8 * i + fragment_column(lane, 0);
      const float x = sum[i][2 * half] * factor, y = sum[i][2 * half + 1] * factor;
      if (pairs && d < D) {
        if constexpr (sizeof(T) == 2)
          *reinterpret_cast<uint32_t*>(to + d) = pack<T>(x, y);
        else
          *reinterpret_cast<Vector<T, 2>*>(to + d) = {{x, y}};
      } else {
        if (d < D) to[d] = from_acc<T>(x);
        if (d + 1 < D) to[d + 1] = from_acc<T>(y);
      }
    }
  }
}

// 16-byte copies need aligned tokens, stores of pairs aligned pairs.
inline bool strides_divide(int64_t n, std::initializer_list<int64_t> strides) {
  for (const int64_t s : strides)
    if (s % n != 0) return false;
  return true;
}

// ---- the kernels, one translation unit each ----

// Tensor cores, any N, L and D <= 256; TF32 up to kMaxHeadDimTF32.
void attention_fwd_mma(const AttentionFwd&);
// Tensor cores, one block per head with its keys and values in shared memory.
bool attention_fwd_short_supports(const AttentionFwd&);
void attention_fwd_short(const AttentionFwd&);
void attention_bwd_mma(const AttentionBwd&, const float* delta);
// wgmma, whole rows of scores in registers, up to 272 keys.
bool attention_fwd_hopper_supports(const AttentionFwd&);
void attention_fwd_hopper(const AttentionFwd&);
// The same with everything of the head in shared memory, no delta.
bool attention_bwd_short_supports(const AttentionBwd&);
void attention_bwd_short(const AttentionBwd&);
// wgmma, everything of the head in shared memory, no delta; on Path::wgmma_backward.
bool attention_bwd_hopper_supports(const AttentionBwd&);
void attention_bwd_hopper(const AttentionBwd&);
// float32 and float64, exact; and the shared memory of their blocks.
void attention_fwd_scalar(const AttentionFwd&);
void attention_bwd_scalar(const AttentionBwd&, const void* delta);
std::size_t attention_scalar_bytes(DType, int64_t D, bool backward);

Shape attention_shape(int64_t B, int64_t N, int64_t L, int64_t H, int64_t D);

}  // namespace vit::cuda
