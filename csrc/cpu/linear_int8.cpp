// linear_int8: y = scale activation(x weight^T + bias) + residual, x quantized row by row, exact sums of bytes.
//
//   x_scale = max |x| / 127,  q = x / x_scale rounded half to even,  x weight^T = (sum q weight) x_scale weight_scale
//
// Three passes: rows of x to bytes; the weight to panels; the tiles of gemm.h on both. A step covers 4 values of k.
// 2 M N K operations, and N K + 3 M K bytes for the passes (bfloat16).
#include "cpu/int8.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"

namespace vit::VIT_ISA {
namespace {

constexpr float kLeast = 0x1p-100f;  // rows below it have the scale 1

struct Buffers {
  char *bytes, *x_scale, *weight, *sums;
  int64_t used;

  Buffers(const LinearInt8& p, char* base) {
    Arena arena{base};
    bytes = arena.take(p.M * round_up(p.K, Step<s8>::kDepth));
    x_scale = arena.take(p.M * static_cast<int64_t>(sizeof(float)));
    weight = arena.take(packed_b_bytes<s8>(p.K, p.N));
    sums = arena.take(round_up(p.N, kWordLanes<s8>) * static_cast<int64_t>(sizeof(int32_t)));
    used = arena.used;
  }
};

// One row as bytes q + kZero, of which `out` has room for a multiple of 4; returns its scale.
template <class X>
VIT_INLINE float quantize_row(const X* x, int64_t K, uint8_t* out) {
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  constexpr int64_t lanes = kLanes<float>;
  i32v most{};  // of |x| as integers, which sort as floats do, infinities and NaN last
  for (int64_t k = 0; k < K; k += lanes) most = Most{}(most, bit_cast<i32v>(load<float>(x + k, K - k)) & 0x7fffffff);
  const float largest = bit_cast<float>(fold<int32_t, kLanes<int32_t>>(most, Most{}));
  const bool finite = largest < INFINITY;
  const float scale = !finite ? NAN : largest < kLeast ? 1.0f : largest / 127.0f;
  const f32v divisor = broadcast(finite ? scale : INFINITY);
  // Adding the magic number rounds to an integer in the low bits of the float.
  const f32v magic = broadcast(Layout<float>::magic + static_cast<float>(Step<s8>::kZero));
  for (int64_t k = 0; k < K; k += lanes) {
    const f32v v = load<float>(x + k, K - k) / divisor;
    const Bytes q = __builtin_convertvector(bit_cast<u32v>(v + magic) & 0xff, Bytes);
    memcpy(out + k, &q, static_cast<size_t>(min(K - k, lanes)));
  }
  for (int64_t k = K; k % Step<s8>::kDepth; ++k) out[k] = 0;  // where the weight is 0
  return scale;
}

// The weight [N, K] into panels, and kZero times the sums of its rows.
void pack_weight(const LinearInt8& p, char* packed, int32_t* sums) {
  constexpr int64_t lanes = kWordLanes<s8>, depth = Step<s8>::kDepth, word = sizeof(uint32_t);
  const int64_t steps = steps_of<s8>(p.K), all = ceil_div(p.N, lanes);
  parallel_for(p.context.num_threads, all, [&](int64_t begin, int64_t end, int) {
    for (int64_t vector = begin; vector < end; ++vector) {
      const int64_t panel = vector / kTileVectors<s8>, first = vector * lanes;
      const int64_t vectors = min<int64_t>(all - panel * kTileVectors<s8>, kTileVectors<s8>);
      char* to = packed + (panel * kTileVectors<s8> * steps * lanes + vector % kTileVectors<s8> * lanes) * word;
      const int8_t* rows = static_cast<const int8_t*>(p.weight) + first * p.weight_stride;
      const u32v ones = broadcast(uint32_t{0x01010101});
      i32v total{};
      for (int64_t s = 0; s < steps; s += lanes) {
        const int64_t n = p.K - s * depth;
        u32v block[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          const int8_t* from = rows + i * p.weight_stride + s * depth;
          block[i] = first + i >= p.N ? u32v{} : n >= kVectorBytes ? load_raw<u32v>(from) : load_raw<u32v>(from, n);
        }
        transpose(block);
        for (int64_t i = 0; i < min(lanes, steps - s); ++i) {
          memcpy(to + (s + i) * vectors * kVectorBytes, &block[i], kVectorBytes);
          for (int part = 0; Step<s8>::kZero && part < Step<s8>::kParts; ++part)
            total = Step<s8>::dot(Step<s8>::part(ones, part), Step<s8>::part(block[i], part), total);
        }
      }
      total *= Step<s8>::kZero;
      memcpy(sums + first, &total, sizeof total);
    }
  });
}

template <class O, Activation kActivation>
struct IntegerEpilogue {
  const float* x_scale;       // [M]
  const float* weight_scale;  // [N]
  const int32_t* sums;        // [N] to be subtracted
  const float* bias;          // [N], may be null
  const float* scale;         // [N], may be null
  const O* residual;          // [M, N], may be null
  O* y;                       // [M, N]
  int64_t N;

  VIT_INLINE void prefetch(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    prefetch_rows<true>(y + row * N + column, N, rows, columns);
    if (residual) prefetch_rows<false>(residual + row * N + column, N, rows, columns);
  }

  void operator()(const Tile<int32_t>& tile) const {
    int64_t j = 0;
    for (; j + kLanes<float> <= tile.columns; j += kLanes<float>) columns<true>(tile, j);
    if (j < tile.columns) columns<false>(tile, j);
  }

 private:
  // One vector of columns, down the rows: what belongs to columns is loaded once.
  template <bool kFull>
  VIT_INLINE void columns(const Tile<int32_t>& given, int64_t j) const {
    const IntegerEpilogue e = *this;  // copies: see Epilogue
    const Tile<int32_t> tile = given;
    const int64_t n = kFull ? kLanes<float> : tile.columns - j, column = tile.column + j;
    const i32v offset = load<int32_t>(e.sums + column, n);
    const f32v of_column = load<float>(e.weight_scale + column, n);
    const f32v shift = e.bias ? load<float>(e.bias + column, n) : f32v{};
    const f32v factor = e.scale ? load<float>(e.scale + column, n) : f32v{};
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = (tile.row + r) * e.N + column;
      const i32v sum = load<int32_t>(tile.data + r * tile.stride + j) - offset;
      f32v v = __builtin_convertvector(sum, f32v) * (e.x_scale[tile.row + r] * of_column);
      if (e.bias) v += shift;
      v = activate<O, kActivation>(v);
      if (e.scale) v *= factor;
      if (e.residual) v += load<float>(e.residual + at, n);
      store<float>(e.y + at, v, n);
    }
  }
};

template <class X, class O>
void forward(const LinearInt8& p) {
  if (!p.M || !p.N) return;
  const Buffers buffers(p, static_cast<char*>(p.workspace));
  const int threads = p.context.num_threads;
  const int64_t row = round_up(p.K, Step<s8>::kDepth);
  float* x_scale = reinterpret_cast<float*>(buffers.x_scale);
  int32_t* sums = reinterpret_cast<int32_t*>(buffers.sums);
  parallel_for(threads, p.M, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      x_scale[i] = quantize_row(static_cast<const X*>(p.x) + i * p.x_stride, p.K,
                                reinterpret_cast<uint8_t*>(buffers.bytes) + i * row);
  });
  pack_weight(p, buffers.weight, sums);
  const Rhs<s8, Packed> rhs{{nullptr, 0, 0}, buffers.weight, p.K, p.N};
  with_activation(p.activation, [&](auto activation) {
    const IntegerEpilogue<O, decltype(activation)::value> epilogue{x_scale,
                                                                   static_cast<const float*>(p.weight_scale),
                                                                   sums,
                                                                   static_cast<const float*>(p.bias),
                                                                   static_cast<const float*>(p.scale),
                                                                   static_cast<const O*>(p.residual),
                                                                   static_cast<O*>(p.y),
                                                                   p.N};
    gemm(threads, Lhs{buffers.bytes, row, false}, rhs, p.M, epilogue);
  });
}

template <class F>
VIT_INLINE void with_float(DType dtype, const F& f) {  // check.cpp has refused the others
  if (dtype == DType::bfloat16) return f(bf16{});
  f(float{});
}

}  // namespace

void linear_int8(const LinearInt8& p) {
  with_float(p.dtype, [&](auto x) { with_float(p.out_dtype, [&](auto y) { forward<decltype(x), decltype(y)>(p); }); });
}

std::size_t linear_int8_workspace(const LinearInt8& p) { return static_cast<std::size_t>(Buffers(p, nullptr).used); }

}  // namespace vit::VIT_ISA
