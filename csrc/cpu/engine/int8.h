// Products of 8-bit integers on the tiles of gemm.h: y = x weight^T with
//
//   x      = x_scale[row] (u - zero),  u unsigned bytes, x_scale the smallest that lets u reach both ends of the row
//   weight = w_scale[n] s,             s signed bytes,   w_scale = largest |weight| of the row / 127
//   y      = x_scale w_scale (sum u s - zero sum s) + bias
//
// Activations get their scale row by row when they are made: no calibration, and a token does not depend on the others.
// `zero` is a constant of the layer: 128, or near the low end where GELU has made the input (Linear::zero).
//
// Sums of products are exact in int32. With AVX2 or AVX-512 but without VNNI, two products are added in 16 bits, which
// saturate: there w_scale also keeps |s[2j] + s[2j + 1]| <= 128, and 255 * 128 < 2^15. On weights with heavy tails that
// adds a quarter to the squared error of the weights; activations of 7 bits instead would have four times theirs.
#pragma once

#include "cpu/int8.h"
#include "cpu/linear.h"
#include "engine/network.h"

namespace vit::VIT_ISA {

struct q8 {  // a byte of such a product
  uint8_t bits;
};

template <>
struct Traits<q8> {
  using acc = int32_t;
};
// Whether products are added in pairs that saturate.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
inline constexpr bool kPairs = true;
#else
inline constexpr bool kPairs = false;
#endif

template <>
struct Step<q8> {
  using Word = uint32_t;
  using Words = u32v;
  static constexpr int kDepth = 4;
#if defined(__AVX512VNNI__)
  static constexpr int kParts = 1;
  static VIT_INLINE Words part(Words words, int) { return words; }
  static VIT_INLINE i32v dot(Words a, Words b, i32v c) {
    // Not the intrinsic: with it GCC 12 copies and spills every accumulator, at half the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
#elif defined(__AVX2__)
  static constexpr int kParts = 1;
  static VIT_INLINE Words part(Words words, int) { return words; }
  static VIT_INLINE i32v dot(Words a, Words b, i32v c) {
#if defined(__AVX512F__)
    const __m512i pairs = _mm512_maddubs_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b));
    return c + bit_cast<i32v>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#else
    const __m256i pairs = _mm256_maddubs_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b));
    return c + bit_cast<i32v>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  }
#else
  static constexpr int kParts = 4;  // one byte of each word, shifted to the top: the same for both, undone in dot
  static VIT_INLINE u32v part(Words words, int i) { return words << (24 - 8 * i); }
  static VIT_INLINE i32v dot(u32v a, u32v b, i32v c) { return c + bit_cast<i32v>(a >> 24) * (bit_cast<i32v>(b) >> 24); }
#endif
};

// Bytes from row to row of K of them: whole steps, whose last bytes may hold anything, for the weights there are zeros.
VIT_INLINE int64_t quantized_stride(int64_t K) { return round_up(K, Step<q8>::kDepth); }

// Rows as unsigned bytes and their scales, the left operand of a product.
struct Quantized {
  uint8_t* bytes;  // [rows, K], quantized_stride(K) apart
  float* scales;   // [rows]
};

// One row of K elements; returns its scale. `out` has room for K bytes.
template <class X>
VIT_INLINE float quantize_row(const X* x, int64_t K, int32_t zero, uint8_t* out) {
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  constexpr int64_t lanes = kLanes<float>;
  const int64_t full = K / lanes * lanes;
  f32v highest{}, lowest{};  // of the row and 0
  int64_t k = 0;
  const auto see = [&](f32v v) { highest = vmax(highest, v), lowest = vmin(lowest, v); };
  for (; k < full; k += lanes) see(load<float>(x + k));
  if (k < K) see(load<float>(x + k, K - k));
  const float above = fold<float, lanes>(highest, Most{}) / static_cast<float>(255 - zero);
  const float below = fold<float, lanes>(-lowest, Most{}) / static_cast<float>(zero);
  const float most = above > below ? above : below, scale = most > 0 ? most : 1.0f;
  const f32v inverse = broadcast(1.0f / scale), shift = broadcast(Layout<float>::magic + static_cast<float>(zero));
  const auto bytes_of = [&](f32v v) {
    // Adding the magic number rounds to an integer in the low bits of the float.
    return __builtin_convertvector(bit_cast<u32v>(fma(v, inverse, shift)) & 0xff, Bytes);
  };
  for (k = 0; k < full; k += lanes) {
    const Bytes bytes = bytes_of(load<float>(x + k));
    memcpy(out + k, &bytes, sizeof bytes);
  }
  if (k < K) {
    const Bytes bytes = bytes_of(load<float>(x + k, K - k));
    memcpy(out + k, &bytes, static_cast<size_t>(K - k));
  }
  return scale;
}

template <class O, Activation kActivation>
struct QuantizedEpilogue {
  const float* row_scales;  // [M]
  const float* scales;      // [N]
  const int32_t* sums;      // [N] zero times the sum of the packed row
  const float* bias;        // [N]
  const O* residual;        // [M, N] rows `stride` apart, may be null
  O* y;                     // [M, N] likewise
  int64_t stride;

  VIT_INLINE void prefetch(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    const int64_t at = row * stride + column;
    prefetch_rows<true>(y + at, stride, rows, columns);
    if (residual) prefetch_rows<false>(residual + at, stride, rows, columns);
  }

  void operator()(const Tile<int32_t>& tile) const {
    int64_t j = 0;
    for (; j + kLanes<float> <= tile.columns; j += kLanes<float>) columns<true>(tile, j);
    if (j < tile.columns) columns<false>(tile, j);
  }

 private:
  // One vector of columns, down the rows: what belongs to columns is loaded once (row by row took a tenth of a
  // product).
  template <bool kFull>
  VIT_INLINE void columns(const Tile<int32_t>& given, int64_t j) const {
    const QuantizedEpilogue e = *this;  // copies: see Epilogue
    const Tile<int32_t> tile = given;
    const int64_t n = kFull ? kLanes<float> : tile.columns - j, column = tile.column + j;
    const i32v offset = load<int32_t>(e.sums + column, n);
    const f32v column_scale = load<float>(e.scales + column, n), shift = load<float>(e.bias + column, n);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = (tile.row + r) * e.stride + column;
      const i32v sum = load<int32_t>(tile.data + r * tile.stride + j) - offset;
      const f32v scale = e.row_scales[tile.row + r] * column_scale;
      f32v v = activate<bf16, kActivation, true>(fma(__builtin_convertvector(sum, f32v), scale, shift));
      if (e.residual) v += load<float>(e.residual + at, n);
      store<float>(e.y + at, v, n);
    }
  }
};

// What a row of the weight becomes: 1 / scale and the sum of its bytes.
struct QuantizedWeightRow {
  const float* row;  // null: a column of zeros that fills a vector
  f32v inverse;
  i32v total;
};

// Bytes of the elements from k of a row of K elements; 0 beyond its end.
VIT_INLINE u32v quantized_words(QuantizedWeightRow& r, int64_t k, int64_t K) {
  typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  Bytes bytes[4] = {};
  const f32v magic = broadcast(Layout<float>::magic);
  for (int i = 0; r.row && i < 4 && k < K; ++i, k += kLanes<float>) {
    const i32v values = bit_cast<i32v>(fma(load<float>(r.row + k, K - k), r.inverse, magic)) - bit_cast<i32v>(magic);
    r.total += values;
    bytes[i] = __builtin_convertvector(values, Bytes);
  }
  return load_raw<u32v>(bytes);
}

// The largest |weight|, and where pairs saturate the largest |sum of a pair|: opposite signs cannot make it larger.
VIT_INLINE float largest_of_row(const float* row, int64_t K) {
  f32v largest{};
  i32v neighbour;
  for (int i = 0; i < kLanes<float>; ++i) neighbour[i] = i ^ 1;
  for (int64_t k = 0; k < K; k += kLanes<float>) {
    const f32v v = load<float>(row + k, K - k);
    largest = vmax(largest, abs<float>(v));
    if (kPairs) largest = vmax(largest, abs<float>(v + __builtin_shuffle(v, neighbour)));
  }
  return fold<float, kLanes<float>>(largest, Most{});
}

// The weight [N, K] of `out` in float32 into its panels; scales and sums of its rows. Rows that are
// rounded already come with their scales [N]: they are used unless they are too small for the products.
inline void pack_quantized(int threads, const float* weight, const float* given, const engine::Linear& out) {
  constexpr int64_t lanes = kWordLanes<q8>, word = sizeof(uint32_t);
  const int64_t N = out.N, K = out.K, steps = steps_of<q8>(K), vectors = ceil_div(N, lanes);
  parallel_for(threads, vectors, [&](int64_t begin, int64_t end, int) {
    for (int64_t vector = begin; vector < end; ++vector) {
      const int64_t panel = vector / kTileVectors<q8>, first = vector * lanes;
      const int64_t width = min<int64_t>(vectors - panel * kTileVectors<q8>, kTileVectors<q8>) * lanes;
      char* to = out.weight + (panel * kTileVectors<q8> * steps * lanes + vector % kTileVectors<q8> * lanes) * word;
      QuantizedWeightRow rows[lanes] = {};
      for (int64_t i = 0; i < min(lanes, N - first); ++i) {
        rows[i].row = weight + (first + i) * K;
        const float needed = largest_of_row(rows[i].row, K) / 127.0f;
        const float smallest = given ? given[first + i] : 0.0f, most = needed > smallest ? needed : smallest;
        const float scale = most > 0 ? most : 1.0f;
        rows[i].inverse = broadcast(1.0f / scale);
        out.scale[first + i] = scale;
      }
      for (int64_t s = 0; s < steps; s += lanes) {
        u32v block[lanes];
        for (int i = 0; i < lanes; ++i) block[i] = quantized_words(rows[i], s * 4, K);
        transpose(block);
        for (int64_t i = 0; i < min(lanes, steps - s); ++i)
          memcpy(to + (s + i) * width * word, &block[i], sizeof(u32v));
      }
      for (int64_t i = 0; i < min(lanes, N - first); ++i) {
        int32_t total = 0;
        for (int64_t lane = 0; lane < lanes; ++lane) total += rows[i].total[lane];
        out.sums[first + i] = out.zero * total;
      }
    }
  });
}

}  // namespace vit::VIT_ISA
